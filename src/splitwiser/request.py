"""Input and output of the engine: sampling parameters, requests, their outputs and their times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from splitwiser import constants
from splitwiser.errors import InputError

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]  # text, or token ids


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are sampled and when it ends; the names are vLLM's.

    ``temperature`` 0 is greedy (the default here, so that tokens equal ``model.generate``'s). Otherwise tokens are drawn
    from the softmax of logits / ``temperature``, limited to the ``top_k`` most likely tokens (0: no limit) and to the most
    likely ones whose probabilities add up to ``top_p``. ``seed`` determines the tokens of this request, whatever other
    requests run; by default it follows from the run's seed and the request's number. A request ends after ``max_tokens``
    tokens, at an end-of-sequence token (unless ``ignore_eos``), or as soon as its text contains one of the ``stop``
    strings, which is cut off. Raises :class:`~splitwiser.errors.InputError` for values out of range.
    """

    max_tokens: int = 16
    temperature: float = constants.TEMPERATURE
    top_k: int = constants.TOP_K
    top_p: float = constants.TOP_P
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more, not {self.max_tokens}")
        if not self.temperature >= 0:
            raise InputError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not isinstance(self.stop, tuple) or not all(isinstance(each, str) and each for each in self.stop):
            raise InputError(f"stop must be a tuple of non-empty strings, not {self.stop!r}")


@dataclass(frozen=True)
class Request:
    """One tokenised prompt with its parameters; ``arrival_s`` is in seconds after the start of the run."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float = 0.0

    @property
    def max_kv_tokens(self) -> int:
        """Largest number of tokens whose K and V are kept: the prompt and all new tokens except the last, whose K and V
        are never read."""
        return len(self.prompt_token_ids) + self.params.max_tokens - 1


@dataclass
class RequestMetrics:
    """Times of the events of one request, in nanoseconds of ``time.perf_counter_ns``, and the latencies derived from them.

    TTFT counts from the arrival, so it includes waiting. TPOT is (E2E - TTFT) / (output tokens - 1), as vLLM defines it.
    """

    arrival_ns: int
    prefill_start_ns: int = 0
    token_ns: list[int] = field(default_factory=list)
    decode_start_ns: int | None = None
    prefill_worker: str = ""
    decode_worker: str = ""

    @property
    def queue_ms(self) -> float:
        """Time from the arrival to the start of the first prefill step."""
        return (self.prefill_start_ns - self.arrival_ns) / 1e6

    @property
    def handoff_ms(self) -> float | None:
        """Time from the end of prefill to the start of the first decode step; None for a request of one token."""
        return None if self.decode_start_ns is None else (self.decode_start_ns - self.token_ns[0]) / 1e6

    @property
    def ttft_ms(self) -> float:
        """Time from the arrival to the first token."""
        return (self.token_ns[0] - self.arrival_ns) / 1e6

    @property
    def e2el_ms(self) -> float:
        """Time from the arrival to the last token."""
        return (self.token_ns[-1] - self.arrival_ns) / 1e6

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first; None for a request of one token."""
        return (self.e2el_ms - self.ttft_ms) / (len(self.token_ns) - 1) if len(self.token_ns) > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """Times between two successive tokens."""
        return [(later - earlier) / 1e6 for earlier, later in zip(self.token_ns, self.token_ns[1:], strict=False)]


@dataclass
class RequestOutput:
    """The finished result of one request. ``text`` is empty if the model has no tokenizer, ``prompt`` is None if the prompt
    was given as token ids."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    metrics: RequestMetrics
    prompt: str | None = None
