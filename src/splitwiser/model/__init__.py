"""A transformers model whose forward runs exactly over the paged KV pool."""
