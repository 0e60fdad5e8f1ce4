"""What the command ``run`` hands to the engine."""

from dataclasses import fields
from typing import Any

import pytest

from splitwiser.cli import main
from splitwiser.options import to_arguments
from splitwiser.placement.config import EngineConfig

OPTIONS: dict[str, Any] = {
    "model": "somewhere", "mode": "mps", "workers": "[{role: mixed}]", "share": "none", "itl_target_ms": 12.5,
    "lend": False, "second_lane": False, "decode_priority": False, "mps": "existing",
    "dtype": "float16", "device": "cuda:1", "gpu_id": 1,
    "load_format": "dummy", "kv_memory": "3MiB", "max_batch": 7, "batch_size": 5, "prefill_tokens": 11, "kernels": "plain",
    "seed": 13, "models": "elsewhere", "policy": "splitwiser.engine.policy:FirstCome",
    "generation_config": "checkpoint", "schedule": "splitwiser.engine.schedule:Hybrid", "reserve": True,
    "prefix_caching": True, "kv_dtype": "int8",
}  # fmt: skip


class _AskedError(BaseException):
    """The engine is asked for, which is all that is looked at."""


def asked_of_llm(options: dict[str, Any]) -> EngineConfig:
    """The configuration that ``splitwiser run`` gives :class:`LLM`."""
    asked: list[EngineConfig] = []

    def ask(config: EngineConfig) -> None:
        asked.append(config)
        raise _AskedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitwiser.commands.run.check_quickly", lambda _: None)  # there is no such model
        patch.setattr("splitwiser.run.LLM", lambda *, config: ask(config))
        with pytest.raises(_AskedError):
            main(["run", "--prompt_tokens=5", "--output_tokens=2", *to_arguments(options)])
    return asked[0]


def test_every_option_reaches_the_engine() -> None:
    private = {**OPTIONS, "mps": "private", "exclusive": True}  # which excludes an existing daemon
    quantised = {"quantization": "int8", "dtype": "bfloat16"}  # which excludes other formats and plain kernels
    other = {
        "backend": "vllm",
        "backend_python": "there",
        "mode": "mp",
        "kv_transfer": "copy",
    }  # which excludes mode mps and policies
    for options in (OPTIONS, private, quantised, other):
        config = asked_of_llm(options)
        assert {name: getattr(config, name) for name in options} == options
    given = {**other, **OPTIONS, "exclusive": True, "quantization": "int8"}
    differing = {name for name, value in given.items() if value != getattr(EngineConfig(), name)}
    of_files = {"adapters", "use_adapter", "merge_adapter"}  # which have to be there; tests/test_config.py
    assert differing == {field.name for field in fields(EngineConfig)} - of_files
