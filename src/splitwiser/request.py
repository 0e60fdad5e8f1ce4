"""What is asked of the engine and what it answers: sampling parameters, a request, its output and its times."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from splitwiser import constants
from splitwiser.errors import InputError

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]  # text, or token ids


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends; the names are vLLM's.

    ``temperature`` 0 is greedy (the default here, so that tokens equal ``model.generate``'s). Otherwise tokens are drawn
    from the softmax of logits / ``temperature``, kept to the ``top_k`` likeliest (0 keeps all) and to the likeliest that
    make up ``top_p`` of the probability. ``seed`` fixes the draws of this request whatever else runs beside it; without
    one it follows from the run's seed and the request's number. A request ends after ``max_tokens`` tokens, at an
    end-of-sequence token (unless ``ignore_eos``), or where its text comes to hold one of the ``stop`` strings, which is
    cut off. Raises :class:`~splitwiser.errors.InputError` on values out of range.
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
    """One prompt on its way through the engine. ``seed`` is resolved; ``arrival_s`` counts from the run's start."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float = 0.0

    @property
    def most_tokens(self) -> int:
        """Positions whose K and V must be kept at most: the prompt and all new tokens but the last, which nothing
        reads again."""
        return len(self.prompt_token_ids) + self.params.max_tokens - 1


@dataclass
class RequestMetrics:
    """When things happened to one request, in nanoseconds of ``time.perf_counter_ns``, and the figures derived from it.

    TTFT counts from the arrival, so waiting is in it. TPOT is (E2E - TTFT) / (output tokens - 1), as vLLM defines it.
    """

    arrival_ns: int
    prefill_start_ns: int = 0
    token_ns: list[int] = field(default_factory=list)
    decode_start_ns: int | None = None
    prefill_worker: str = ""
    decode_worker: str = ""

    @property
    def queue_ms(self) -> float:
        """From arrival to the start of the first prefill step."""
        return (self.prefill_start_ns - self.arrival_ns) / 1e6

    @property
    def handoff_ms(self) -> float | None:
        """From the end of the prefill step to the start of the first decode step; None for a request of one token."""
        return None if self.decode_start_ns is None else (self.decode_start_ns - self.token_ns[0]) / 1e6

    @property
    def ttft_ms(self) -> float:
        """From arrival to the first token."""
        return (self.token_ns[0] - self.arrival_ns) / 1e6

    @property
    def e2el_ms(self) -> float:
        """From arrival to the last token."""
        return (self.token_ns[-1] - self.arrival_ns) / 1e6

    @property
    def tpot_ms(self) -> float | None:
        """Time per output token after the first; None for a request of one token."""
        return (self.e2el_ms - self.ttft_ms) / (len(self.token_ns) - 1) if len(self.token_ns) > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """Each gap between two tokens."""
        return [(later - earlier) / 1e6 for earlier, later in zip(self.token_ns, self.token_ns[1:], strict=False)]


@dataclass
class RequestOutput:
    """What a request came to. ``text`` is empty where the model has no tokenizer, ``prompt`` None where the prompt was
    given as token ids."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    metrics: RequestMetrics
    prompt: str | None = None
