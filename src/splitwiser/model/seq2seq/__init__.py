"""Encoder-decoders over the KV pool: their attention, the parts that are replaced for it, their forward, and the proof at
load."""
