"""Answers and steps with known times."""

from collections.abc import Sequence

from splitwiser.engine.messages import Role, StepPhase, StepRecord
from splitwiser.request import FinishReason, RequestMetrics, RequestOutput

MS = 1_000_000  # nanoseconds
START_NS = 7_000 * MS


def make_output(
    request_id: int = 0,
    *,
    arrival: int = 0,
    prefill: int = 0,
    decode: int | None = None,
    tokens: Sequence[int] = (1,),
    prompt_tokens: int = 3,
    text: str = "",
    reason: FinishReason = "length",
    cancelled: int | None = None,
    start_ns: int = START_NS,
) -> RequestOutput:
    """A request that was answered, or ``cancelled`` then; times in milliseconds from ``start_ns``, ``tokens`` holds the time
    of each."""
    metrics = RequestMetrics(
        start_ns + arrival * MS,
        prefill_start_ns=start_ns + prefill * MS,
        token_ns=[start_ns + moment * MS for moment in tokens],
        decode_start_ns=None if decode is None else start_ns + decode * MS,
        prefill_worker="prefill-0",
        decode_worker="decode-1",
        cancelled_ns=None if cancelled is None else start_ns + cancelled * MS,
    )
    reason = reason if cancelled is None else "cancelled"
    return RequestOutput(request_id, tuple(range(prompt_tokens)), [9] * len(tokens), text, reason, metrics)


def make_step(
    worker: str,
    phase: StepPhase,
    start: int,
    end: int,
    *,
    requests: int = 1,
    tokens: int = 1,
    decode_tokens: int = 0,
    role: Role = "mixed",
    start_ns: int = START_NS,
) -> StepRecord:
    """A step from ``start`` to ``end``, in milliseconds from ``start_ns``; ``decode_tokens`` are those of a hybrid step."""
    begin, finish = start_ns + start * MS, start_ns + end * MS
    of_decode = {"prefill": 0, "decode": tokens}.get(phase, decode_tokens)
    return StepRecord(worker, role, phase, begin, finish, requests, tokens, of_decode)
