"""Splitwiser: LLM inference with prefill and decode placed apart on one device, and measured."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from splitwiser.llm import LLM
    from splitwiser.request import RequestOutput, SamplingParams

__all__ = ["LLM", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> object:
    # importing torch and transformers takes seconds, which `splitwiser --help` and `splitwiser cases` need not wait for
    if name == "LLM":
        from splitwiser.llm import LLM

        return LLM
    if name in ("RequestOutput", "SamplingParams"):
        from splitwiser import request

        return getattr(request, name)
    raise AttributeError(f"module 'splitwiser' has no attribute '{name}'")
