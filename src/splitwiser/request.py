"""Input and output of the engine: sampling parameters, requests, their outputs and their times."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.options import Options
from splitwiser.text import check_text, shorten

FinishReason = Literal["stop", "length"]
Prompt = str | Sequence[int]  # text, or token ids
PromptInput = Prompt | Iterable[int] | Mapping[str, Any]
"""What users give: a prompt, an array or tensor of token ids, vLLM's ``{"prompt": text}`` or ``{"prompt_token_ids":
ids}``, or a chat, ``{"messages": [{"role": "user", "content": text}, ...]}``."""


_NOT_TAKEN = {
    "here it is max_tokens, the number of new tokens": ("max_new_tokens", "max_length"),
    "here it is stop": ("stop_strings",),
    "here temperature 0 is greedy, and above 0 tokens are drawn": ("do_sample",),
    "a prompt has one output; give the prompt several times, with a seed each": ("n", "best_of", "num_return_sequences"),
    "there is no beam search; tokens are greedy or drawn one by one": ("num_beams", "early_stopping", "length_penalty"),
    "logits are used as the model gives them": (
        "presence_penalty", "frequency_penalty", "repetition_penalty", "no_repeat_ngram_size", "logit_bias", "bad_words",
        "bad_words_ids", "allowed_token_ids", "suppress_tokens", "logits_processors", "structured_outputs",
        "guided_decoding",
    ),
    "tokens are drawn by temperature, top_k and top_p alone": ("min_p", "typical_p"),
    "ignore_eos makes a request generate all of its max_tokens": ("min_tokens", "min_new_tokens", "min_length"),
    "end-of-sequence tokens are the checkpoint's own; stop takes strings": ("stop_token_ids", "eos_token_id"),
    "outputs have tokens, text and times alone": ("logprobs", "prompt_logprobs", "output_scores", "output_logits"),
    "text is made without special tokens and without the stop string; token_ids has every token": (
        "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Options):
    """How the tokens of one request are sampled and when it ends; the names are vLLM's.

    ``temperature`` 0 is greedy (the default here, so that tokens equal ``model.generate``'s). Otherwise tokens are drawn
    from the softmax of logits / ``temperature``, limited to the ``top_k`` most likely tokens (0 or -1: no limit) and to the
    most likely ones whose probabilities add up to ``top_p``. ``seed`` determines the tokens of this request, whatever other
    requests run; by default it follows from the run's seed and the request's number. A request ends after ``max_tokens``
    tokens (None: as many as the model and the KV pool have room for), at an end-of-sequence token (unless ``ignore_eos``),
    or as soon as its text contains one of the strings ``stop`` (one, or a sequence), which is cut off.

    Not taken, of vLLM's parameters and those of transformers' ``generate``:

    | not taken | instead, or why |
    |---|---|
    | max_new_tokens, max_length | ``max_tokens`` |
    | stop_strings | ``stop`` |
    | do_sample | ``temperature``: 0 is greedy |
    | n, best_of, num_return_sequences | the prompt several times, with a seed each |
    | num_beams, early_stopping, length_penalty | there is no beam search |
    | presence_penalty, frequency_penalty, repetition_penalty | logits are used as the model gives them |
    | no_repeat_ngram_size, logit_bias, logits_processors, bad_words, bad_words_ids | the same |
    | allowed_token_ids, suppress_tokens, structured_outputs, guided_decoding | the same |
    | min_p, typical_p | ``temperature``, ``top_k`` and ``top_p`` |
    | min_tokens, min_new_tokens, min_length | ``ignore_eos`` for exactly ``max_tokens`` |
    | stop_token_ids, eos_token_id | the checkpoint's own; ``stop`` takes strings |
    | logprobs, prompt_logprobs, output_scores, output_logits | outputs have tokens, text and times alone |
    | detokenize, skip_special_tokens, spaces_between_special_tokens | ``token_ids`` has every token |
    | include_stop_str_in_output | the same |

    Raises :class:`~splitwiser.errors.InputError` for values out of range, and for parameters that are unknown or not taken.
    """

    NOT_TAKEN: ClassVar[Mapping[str, str]] = {name: reason for reason, names in _NOT_TAKEN.items() for name in names}

    max_tokens: int | None = 16
    temperature: float = constants.TEMPERATURE
    top_k: int = constants.TOP_K
    top_p: float = constants.TOP_P
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more, or None for all there is room for, not {self.max_tokens}")
        if not self.temperature >= 0:
            raise InputError(f"--temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < -1:
            raise InputError(f"--top_k must be 1 or more, or 0 or -1 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(each, str) and each for each in stop):
            raise InputError(f"stop must be a string or a sequence of strings, none of them empty, not {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "top_k", max(self.top_k, 0))


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """Return the ``messages`` of a chat, each with a ``role`` and a ``content``, which are text. Raises :class:`InputError`,
    beginning with ``where``, for others."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise InputError(f"{where}: messages must be a list, each with 'role' and 'content', not {shorten(messages)}")
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise InputError(f"{where}: message {number} must have 'role' and 'content' alone, not {shorten(message)}")
        for key, value in message.items():
            if not isinstance(value, str):
                raise InputError(f"{where}: message {number}: its {key} must be text, not {shorten(value)}")
            check_text(value, f"{where}: message {number}: {key}")
        checked.append(dict(message))
    if not checked:
        raise InputError(f"{where}: a chat needs at least one message")
    return checked


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its requests carry it.

    ``lora`` is its number, from 1 on, among the LoRA adapters whose parts are added to the outputs of linear layers; 0 if
    it adds none. It puts ``virtual_tokens`` tokens before each prompt, whose K and V lie in the blocks ``blocks`` of the KV
    pool. All its requests share the full blocks among these; the ``tail_tokens`` tokens of the last block, if that is not
    full, are copied to each request's own first block.
    """

    name: str
    lora: int = 0
    virtual_tokens: int = 0
    blocks: tuple[int, ...] = ()
    tail_tokens: int = 0

    @property
    def shared_blocks(self) -> tuple[int, ...]:
        """The full blocks."""
        return self.blocks[:-1] if self.tail_tokens else self.blocks


NO_ADAPTER = Adapter("none")
"""What a request without an adapter carries; its name is how users ask for that."""


@dataclass(frozen=True, repr=False)
class Request:
    """One tokenised prompt with its parameters, of which ``max_tokens`` is a number; ``arrival_s`` is in seconds after the
    start of the run. ``encoded``: the prompt is read as a whole by an encoder, and the decoder begins with a token of its
    own. Policies may order waiting requests by ``priority``, the lowest first, and by ``ttft_target_ms``, the TTFT in
    milliseconds that it is to have."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float = 0.0
    adapter: Adapter = NO_ADAPTER
    encoded: bool = False
    priority: int = 0
    ttft_target_ms: float | None = None

    def __repr__(self) -> str:
        prompt_tokens = len(self.prompt_token_ids)
        adapter = "" if self.adapter is NO_ADAPTER else f", adapter={self.adapter.name!r}"
        return (
            f"Request(request_id={self.request_id}, prompt_tokens={prompt_tokens}, max_tokens={self.max_tokens}, "
            f"arrival_s={self.arrival_s:g}{adapter})"
        )

    @property
    def max_tokens(self) -> int:
        """Maximum number of new tokens."""
        assert self.params.max_tokens is not None
        return self.params.max_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Largest number of tokens whose K and V are kept in blocks of its own: virtual tokens that fill no block, the
        prompt, the decoder's own first token if there is one, and all new tokens except the last, whose K and V are never
        read."""
        return self.adapter.tail_tokens + self.prefilled_tokens + self.max_tokens - 1

    @property
    def prefilled_tokens(self) -> int:
        """Number of tokens whose K and V prefill stores: the prompt, and the decoder's own first token if there is one."""
        return len(self.prompt_token_ids) + self.encoded


@dataclass(repr=False)
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

    def __repr__(self) -> str:
        if not self.token_ns:
            return "RequestMetrics(no token yet)"
        latencies = {name: getattr(self, name) for name in ("queue_ms", "ttft_ms", "tpot_ms", "e2el_ms")}
        shown = ", ".join(f"{name}={value:.1f}" for name, value in latencies.items() if value is not None)
        return f"RequestMetrics(tokens={len(self.token_ns)}, {shown})"

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


@dataclass(frozen=True)
class CompletionOutput:
    """The completion of a prompt, in the form of vLLM's; ``index`` is always 0, since a prompt has one."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason


@dataclass(repr=False)
class RequestOutput:
    """The finished result of one request. ``text`` is empty if the model has no tokenizer. ``prompt`` is the text that was
    given, or that the chat template wrote, and None if the prompt was given as token ids. ``adapter`` is None if the model
    ran without one."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    metrics: RequestMetrics
    prompt: str | None = None
    adapter: str | None = None
    priority: int = 0
    finished: ClassVar[bool] = True  # as vLLM's, which also returns parts

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt_tokens={len(self.prompt_token_ids)}, "
            f"tokens={len(self.token_ids)}, text={shorten(self.text)}, finish_reason={self.finish_reason!r})"
        )

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The completion as a list of one, as vLLM's ``RequestOutput`` has it."""
        return [CompletionOutput(0, self.text, self.token_ids, self.finish_reason)]
