"""Names of number formats; imports no torch, so that a configuration can be checked without it."""

from collections.abc import Mapping, Sequence

from splitwiser.errors import unknown_name

SPELLINGS = {
    "auto": ("auto",),
    "float32": ("float32", "fp32", "float"),
    "bfloat16": ("bfloat16", "bf16"),
    "float16": ("float16", "fp16", "half"),
}
KV_SPELLINGS = {"auto": SPELLINGS["auto"], "bfloat16": SPELLINGS["bfloat16"], "int8": ("int8",)}


def dtype_name(dtype: object, option: str = "--dtype", spellings: Mapping[str, Sequence[str]] = SPELLINGS) -> str:
    """Return ``auto`` or torch's name of ``dtype``, one of ``spellings`` or a torch.dtype. Raises
    :class:`~splitwiser.errors.InputError`, which names ``option``."""
    given = str(dtype).removeprefix("torch.")
    for name, each in spellings.items():
        if given in each:
            return name
    raise unknown_name(option, given, spellings)
