"""Models of transformers: loading them, and running their forward exactly over the paged KV pool."""
