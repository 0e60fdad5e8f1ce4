"""Other engines in a comparison: :mod:`.run` starts one in its own environment, where :mod:`.program` drives it."""
