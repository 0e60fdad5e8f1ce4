"""Configuration of ``splitwiser doctor``."""

from dataclasses import dataclass

from splitwiser import constants
from splitwiser.model.dtypes import KV_SPELLINGS, dtype_name
from splitwiser.options import check_counts
from splitwiser.workload.synthetic import parse_lengths


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """The options of a run that decide whether it works; and ``hub``: whether to contact the hub.

    ``prompt_tokens`` is given if the prompts are random tokens instead of text. Raises
    :class:`~splitwiser.errors.InputError` for invalid values.
    """

    model: str = constants.MODEL
    models: str = str(constants.MODELS)
    dtype: str = constants.DTYPE
    load_format: str = constants.LOAD_FORMAT
    kv_memory: str = constants.KV_MEMORY
    kv_dtype: str = constants.KV_DTYPE
    max_batch: int = constants.MAX_BATCH
    device: str = constants.DEVICE
    prompt_tokens: str | None = None
    backend_python: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens is not None:
            parse_lengths("--prompt_tokens", self.prompt_tokens)
        check_counts(self, "max_batch")
        object.__setattr__(self, "kv_dtype", dtype_name(self.kv_dtype, "--kv_dtype", KV_SPELLINGS))
