"""Attention modules for decoders whose own does not call transformers' attention interface: one file a family, and the table
of them (:mod:`splitwiser.model.dispatch.table`)."""
