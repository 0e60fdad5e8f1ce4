"""Kernels of a forward: attention over the KV pool, packed linear layers, and the building and choice of compiled ones."""
