"""Input and output of the engine: sampling parameters, requests, their outputs and their times."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, ClassVar, Literal

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.options import Options
from splitwiser.text import check_text, shorten

FinishReason = Literal["stop", "length", "cancelled"]
Prompt = str | Sequence[int]  # text, or token ids
PromptInput = Prompt | Iterable[int] | Mapping[str, Any]
"""What users give: a prompt, an array or tensor of token ids, vLLM's ``{"prompt": text}`` or ``{"prompt_token_ids":
ids}``, or a chat, ``{"messages": [{"role": "user", "content": text}, ...]}``."""


_NOT_TAKEN = {
    "here it is max_tokens, the number of new tokens": ("max_new_tokens", "max_length"),
    "here it is stop": ("stop_strings",),
    "here temperature 0 is greedy, and above 0 tokens are drawn": ("do_sample",),
    "here it is n, all of which are returned": ("best_of", "num_return_sequences"),
    "there is no beam search; tokens are greedy or drawn one by one": ("num_beams", "early_stopping", "length_penalty"),
    "logits are changed by the three penalties, logit_bias and min_tokens alone": (
        "no_repeat_ngram_size", "logits_processors", "structured_outputs", "guided_decoding", "encoder_repetition_penalty",
        "allowed_token_ids", "bad_words", "bad_words_ids",
    ),
    "a logit_bias of -100 for each token keeps them from being chosen": ("suppress_tokens",),
    "here it is logit_bias, by token id": ("sequence_bias",),
    "tokens are drawn by temperature, top_k, top_p and min_p alone": ("typical_p", "top_h", "epsilon_cutoff", "eta_cutoff"),
    "here it is min_tokens, the number of new tokens": ("min_new_tokens", "min_length"),
    "here it is stop_token_ids, beside the checkpoint's own end-of-sequence tokens": ("eos_token_id",),
    "here it is logprobs, of the likeliest tokens": ("output_scores", "output_logits"),
    "text is made without special tokens and without the stop string; token_ids has every token": (
        "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output",
    ),
}  # fmt: skip
MOST_LOGPROBS = 20  # as in vLLM, unless it is told otherwise; messages between workers stay small
_LIMITS = {"min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}  # as in vLLM


@dataclass(frozen=True, kw_only=True)
class SamplingParams(Options):
    """How the tokens of one request are sampled and when it ends; the names are vLLM's.

    ``temperature`` 0 is greedy (the default here, so that tokens equal ``model.generate``'s). Otherwise tokens are drawn
    from the softmax of logits / ``temperature``, limited to the ``top_k`` most likely tokens (0 or -1: no limit), to the
    most likely ones whose probabilities add up to ``top_p``, and to those at least ``min_p`` times as likely as the
    likeliest. ``seed`` determines the tokens of this request, whatever other
    requests run; by default it follows from the run's seed and the request's number. A request ends after ``max_tokens``
    tokens (None: as many as the model and the KV pool have room for), at an end-of-sequence token (unless ``ignore_eos``),
    at one of ``stop_token_ids``, whose text is left out, or as soon as its text contains one of the strings ``stop`` (one,
    or a sequence), which is cut off; of these, ``max_tokens`` alone ends it before it has ``min_tokens`` tokens.

    Greedy or not, a token is chosen from logits that are changed in this order, in float32:

    1. ``logit_bias`` adds a number from -100 to 100 to the logit of each token id in it.
    2. Tokens that would end a request of less than ``min_tokens`` tokens get minus infinity.
    3. ``repetition_penalty`` divides the logit of each token that is in the prompt or the output if it is positive, and
       multiplies it if not (1: no change), as in transformers; of an encoder-decoder, the output's alone.
    4. ``frequency_penalty``, times how often a token is in the output, and ``presence_penalty``, if it is there at all,
       are subtracted from its logit.

    ``n`` samples are generated of the prompt, each a request of its own; the first has the tokens that it would have alone,
    and the others have seeds that follow from its seed. Greedy samples are all the same.

    ``logprobs`` gives the output's ``logprobs``: of each new token its own log-probability, and those of this many of the
    likeliest tokens, 0 to 20; ``prompt_logprobs`` the same of each prompt token after the first, which an encoder's prompt
    does not have. They are the logarithm of the softmax of the model's own logits, before all of the above, as vLLM's
    ``raw_logprobs`` and of transformers' ``output_logits``, in float32. By default neither is computed.

    Not taken, of vLLM's parameters and those of transformers' ``generate``:

    | not taken | instead, or why |
    |---|---|
    | max_new_tokens, max_length | ``max_tokens`` |
    | stop_strings | ``stop`` |
    | do_sample | ``temperature``: 0 is greedy |
    | best_of, num_return_sequences | ``n``, all of which are returned |
    | num_beams, early_stopping, length_penalty | there is no beam search |
    | no_repeat_ngram_size, encoder_repetition_penalty, logits_processors | the changes above are all |
    | structured_outputs, guided_decoding, allowed_token_ids, bad_words, bad_words_ids | the same |
    | suppress_tokens | ``logit_bias`` of -100 for each token |
    | sequence_bias | ``logit_bias`` |
    | typical_p, top_h, epsilon_cutoff, eta_cutoff | ``temperature``, ``top_k``, ``top_p`` and ``min_p`` |
    | min_new_tokens, min_length | ``min_tokens`` |
    | eos_token_id | ``stop_token_ids``, beside the checkpoint's own |
    | output_scores, output_logits | ``logprobs`` |
    | detokenize, skip_special_tokens, spaces_between_special_tokens | ``token_ids`` has every token |
    | include_stop_str_in_output | the same |

    Raises :class:`~splitwiser.errors.InputError` for values out of range, and for parameters that are unknown or not taken.
    """

    NOT_TAKEN: ClassVar[Mapping[str, str]] = {name: reason for reason, names in _NOT_TAKEN.items() for name in names}

    n: int = 1
    max_tokens: int | None = 16
    temperature: float = constants.TEMPERATURE
    top_k: int = constants.TOP_K
    top_p: float = constants.TOP_P
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    seed: int | None = None
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 1:
            raise InputError(f"--n must be 1 or more samples of each prompt, not {self.n!r}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InputError(f"max_tokens must be 1 or more, or None for all there is room for, not {self.max_tokens}")
        if not self.temperature >= 0:
            raise InputError(f"--temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < -1:
            raise InputError(f"--top_k must be 1 or more, or 0 or -1 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(self, name) <= most:
                raise InputError(f"--{name} must be from {least} to {most}, not {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"--repetition_penalty must be above 0, or 1 for none, not {self.repetition_penalty}")
        if not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise InputError(f"--min_tokens must be a whole number of 0 or more, not {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InputError(f"--min_tokens must be at most max_tokens, {self.max_tokens}, not {self.min_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and (not isinstance(count, int) or not 0 <= count <= MOST_LOGPROBS):
                raise InputError(
                    f"--{name} must be from 0 to {MOST_LOGPROBS}, how many of the likeliest tokens, or None, not {count!r}"
                )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(each, str) and each for each in stop):
            raise InputError(f"stop must be a string or a sequence of strings, none of them empty, not {self.stop!r}")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _as_token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _as_bias(self.logit_bias))
        object.__setattr__(self, "top_k", max(self.top_k, 0))

    def filled(self, own: Mapping[str, Any]) -> "SamplingParams":
        """Return these parameters with the values in ``own`` for those that have their default."""
        left = {name: value for name, value in own.items() if getattr(self, name) == getattr(SamplingParams, name)}
        return replace(self, **left) if left else self

    @cached_property
    def changes_logits(self) -> bool:
        """Whether a token is chosen from other logits than the model's own; asked for in every step."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or self.min_tokens > 0 or self.logit_bias is not None

    @property
    def is_exact(self) -> bool:
        """Whether the request generates all of its ``max_tokens``, whatever they are."""
        return self.ignore_eos and not self.stop and not self.stop_token_ids


def _as_token_ids(given: Any) -> tuple[int, ...]:  # noqa: ANN401  # anything, which is what is checked
    """Return ``given``, a token id or several, as a tuple. Raises :class:`InputError`."""
    try:
        ids = () if given is None else tuple(map(index, [given] if isinstance(given, (int, str)) else given))
    except TypeError as error:
        raise InputError(f"--stop_token_ids must be token ids, such as [2, 13], not {shorten(given)}") from error
    if any(token < 0 for token in ids):
        raise InputError(f"--stop_token_ids must be token ids of 0 or more, not {shorten(given)}")
    return ids


def _as_bias(given: object) -> dict[int, float] | None:
    """Return ``given``, a mapping from token ids, which JSON writes as text, to numbers; None if it has none. Raises
    :class:`InputError`."""
    if given is None:
        return None
    try:
        if not isinstance(given, Mapping):
            raise TypeError
        bias = {int(key) if isinstance(key, str) else index(key): float(value) for key, value in given.items()}
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--logit_bias must give numbers by token id, such as {{2: -100}}, not {shorten(given)}"
        ) from error
    for token, value in bias.items():
        if token < 0 or not -100 <= value <= 100:
            raise InputError(
                f"--logit_bias must give token ids of 0 or more a number from -100 to 100, not {value:g} to {token}"
            )
    return bias or None


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
    own. Policies may order waiting requests by ``priority``, the lowest first, by ``ttft_target_ms``, the TTFT in
    milliseconds that it is to have, and by ``predicted_tokens``, the number of new tokens that it is predicted to come to.
    It is number ``sample`` of the samples of prompt number ``prompt_id``; if it ``shares_prompt``, there are others."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival_s: float = 0.0
    adapter: Adapter = NO_ADAPTER
    encoded: bool = False
    priority: int = 0
    ttft_target_ms: float | None = None
    predicted_tokens: int | None = None
    prompt_id: int = 0
    sample: int = 0

    def __repr__(self) -> str:
        prompt_tokens = len(self.prompt_token_ids)
        adapter = "" if self.adapter is NO_ADAPTER else f", adapter={self.adapter.name!r}"
        return (
            f"Request(request_id={self.request_id}, prompt_tokens={prompt_tokens}, max_tokens={self.max_tokens}, "
            f"arrival_s={self.arrival_s:g}{adapter})"
        )

    @property
    def shares_prompt(self) -> bool:
        """Whether there are other requests of the same prompt."""
        return self.params.n > 1

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

    TTFT counts from the arrival, so it includes waiting. TPOT is (E2E - TTFT) / (output tokens - 1), as vLLM defines it. A
    request that was cancelled, at ``cancelled_ns``, has the latencies of the tokens that it had by then, and nan for E2E and
    for those that need a token if it had none. ``cached_tokens`` are prompt tokens whose K and V prefill found;
    ``preemptions`` counts how often the request lost its blocks and was recomputed.
    """

    arrival_ns: int
    prefill_start_ns: int = 0
    token_ns: list[int] = field(default_factory=list)
    decode_start_ns: int | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    cached_tokens: int = 0
    preemptions: int = 0
    cancelled_ns: int | None = None

    def __repr__(self) -> str:
        if not self.token_ns:
            return "RequestMetrics(no token yet)"
        latencies = {name: getattr(self, name) for name in ("queue_ms", "ttft_ms", "tpot_ms", "e2el_ms")}
        shown = ", ".join(f"{name}={value:.1f}" for name, value in latencies.items() if value is not None)
        return f"RequestMetrics(tokens={len(self.token_ns)}, {shown})"

    @property
    def finish_ns(self) -> int:
        """Time of the last token or, of a request that was cancelled, of that."""
        return self.token_ns[-1] if self.cancelled_ns is None else self.cancelled_ns

    @property
    def queue_ms(self) -> float:
        """Time from the arrival to the start of the first prefill step."""
        return (self.prefill_start_ns - self.arrival_ns) / 1e6 if self.token_ns else math.nan

    @property
    def handoff_ms(self) -> float | None:
        """Time from the end of prefill to the start of the first decode step; None for a request of one token."""
        return None if self.decode_start_ns is None else (self.decode_start_ns - self.token_ns[0]) / 1e6

    @property
    def ttft_ms(self) -> float:
        """Time from the arrival to the first token."""
        return (self.token_ns[0] - self.arrival_ns) / 1e6 if self.token_ns else math.nan

    @property
    def e2el_ms(self) -> float:
        """Time from the arrival to the last token."""
        return (self.token_ns[-1] - self.arrival_ns) / 1e6 if self.cancelled_ns is None else math.nan

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first; None for a request of one token."""
        after = len(self.token_ns) - 1
        return (self.token_ns[-1] - self.token_ns[0]) / 1e6 / after if after > 0 else None

    @property
    def itl_ms(self) -> list[float]:
        """Times between two successive tokens."""
        return [(later - earlier) / 1e6 for earlier, later in zip(self.token_ns, self.token_ns[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of a token at one place, in the form of vLLM's. ``rank`` is 1 and as many as there are likelier
    tokens; ``decoded_token`` is the token's text alone, which is empty for a special token or without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str


TokenChoices = dict[int, Logprob]
"""Log-probabilities at one place by token id: first of the token that is there, then of the likeliest ones."""


@dataclass(frozen=True)
class CompletionOutput:
    """A completion of a prompt, in the form of vLLM's; ``index`` is its number among the prompt's samples."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    logprobs: Sequence[TokenChoices] | None = None
    cumulative_logprob: float | None = None


@dataclass(repr=False)
class RequestOutput:
    """The finished result of one request. ``text`` is empty if the model has no tokenizer. ``prompt`` is the text that was
    given, or that the chat template wrote, and None if the prompt was given as token ids. ``adapter`` is None if the model
    ran without one. ``logprobs`` has an entry for each token, and ``prompt_logprobs`` for each of the prompt, of which the
    first is None; each is None if it was not asked for. Of a prompt with several samples it is the first, number ``sample``
    0, and ``others`` are the others."""

    request_id: int
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    metrics: RequestMetrics
    prompt: str | None = None
    adapter: str | None = None
    priority: int = 0
    logprobs: list[TokenChoices] | None = None
    prompt_logprobs: list[TokenChoices | None] | None = None
    prompt_id: int = 0
    sample: int = 0
    others: list["RequestOutput"] = field(default_factory=list)
    finished: ClassVar[bool] = True  # as vLLM's, which also returns parts

    def __repr__(self) -> str:
        return (
            f"RequestOutput(request_id={self.request_id}, prompt_tokens={len(self.prompt_token_ids)}, "
            f"tokens={len(self.token_ids)}, text={shorten(self.text)}, finish_reason={self.finish_reason!r})"
        )

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of the whole output, the sum of its tokens'; None without ``logprobs``."""
        if self.logprobs is None:
            return None
        return sum(choices[token].logprob for token, choices in zip(self.token_ids, self.logprobs, strict=True))

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The completions of all samples, as vLLM's ``RequestOutput`` has them."""
        return [
            CompletionOutput(
                each.sample, each.text, each.token_ids, each.finish_reason, each.logprobs, each.cumulative_logprob
            )
            for each in (self, *self.others)
        ]
