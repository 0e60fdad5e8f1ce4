"""Names of number formats; imports no torch, so that a configuration can be checked without it."""

from splitwiser.errors import unknown_name

SPELLINGS = {
    "auto": ("auto",),
    "float32": ("float32", "fp32", "float"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
}
_NAMES = {spelling: name for name, spellings in SPELLINGS.items() for spelling in spellings}


def dtype_name(dtype: object) -> str:
    """Return ``auto`` or torch's name of ``dtype``, one of :data:`SPELLINGS` or a torch.dtype. Raises
    :class:`~splitwiser.errors.InputError`."""
    given = str(dtype).removeprefix("torch.")
    if given not in _NAMES:
        raise unknown_name("--dtype", given, SPELLINGS)
    return _NAMES[given]
