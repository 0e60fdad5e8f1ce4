"""Splitwiser: LLM inference with prefill and decode placed apart on one device, and measured."""

import gc
from importlib import import_module
from typing import TYPE_CHECKING

from splitwiser.version import __version__

if TYPE_CHECKING:
    from splitwiser.config import RunConfig
    from splitwiser.llm import LLM
    from splitwiser.placement.config import EngineConfig
    from splitwiser.request import RequestOutput, SamplingParams

__all__ = ["LLM", "EngineConfig", "RequestOutput", "RunConfig", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "llm",
    "EngineConfig": "placement.config",
    "RequestOutput": "request",
    "RunConfig": "config",
    "SamplingParams": "request",
}


def __getattr__(name: str) -> object:
    # importing torch and transformers takes seconds, which `splitwiser --help` and `splitwiser cases` need not wait for
    if name not in _HOMES:
        raise AttributeError(f"module 'splitwiser' has no attribute '{name}'")
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # imports make a million objects that stay, and looking for garbage among them takes a second
    try:
        return getattr(import_module(f"splitwiser.{_HOMES[name]}"), name)
    finally:
        gc.set_threshold(*thresholds)


def __dir__() -> list[str]:
    return list(__all__)
