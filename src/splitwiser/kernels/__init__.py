"""Code for other compilers than Python's."""
