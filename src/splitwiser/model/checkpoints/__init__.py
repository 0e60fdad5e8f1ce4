"""Models as users name them and as they lie in files: names, hub, configurations, weights and tokenizers."""
