"""A run's files and figures."""
