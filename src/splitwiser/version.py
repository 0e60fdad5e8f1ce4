"""The version of this package: stated here alone, and read from here by its metadata."""

__version__ = "0.1.0"
