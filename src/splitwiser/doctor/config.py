"""What the doctor is asked about."""

from dataclasses import dataclass

from splitwiser import constants
from splitwiser.options import check_counts
from splitwiser.workload.synthetic import parse_lengths


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """A run's model, numbers, pool and device, whether to try the hub, and, by ``prompt_tokens``, whether the prompts are
    random ones instead of text. Raises :class:`~splitwiser.errors.InputError`."""

    model: str = constants.MODEL
    dtype: str = constants.DTYPE
    load_format: str = constants.LOAD_FORMAT
    kv_memory: str = constants.KV_MEMORY
    max_batch: int = constants.MAX_BATCH
    device: str = constants.DEVICE
    prompt_tokens: str | None = None
    hub: bool = False

    def __post_init__(self) -> None:
        if self.prompt_tokens is not None:
            parse_lengths("--prompt_tokens", self.prompt_tokens)
        check_counts(self, "max_batch")
