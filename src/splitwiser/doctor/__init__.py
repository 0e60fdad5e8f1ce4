"""``splitwiser doctor``: what this machine has, and which modes work on it for a model."""
