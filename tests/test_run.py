"""What the command ``run`` hands to the engine."""

import inspect
from dataclasses import fields
from typing import Any

import pytest

from splitwiser import LLM
from splitwiser.cli import main
from splitwiser.config import RunConfig
from splitwiser.options import to_arguments

OPTIONS: dict[str, Any] = {
    "model": "somewhere", "mode": "mps", "workers": "[{role: mixed}]", "share": "none", "itl_target_ms": 12.5,
    "lend": False, "decode_priority": False, "mps": "existing", "exclusive": True, "dtype": "float16", "device": "cuda:1",
    "load_format": "dummy", "kv_memory": "3MiB", "max_batch": 7, "batch_size": 5, "prefill_tokens": 11, "kernels": "plain",
    "seed": 13,
}  # fmt: skip


class _AskedError(BaseException):
    """The engine is asked for, which is all that is looked at."""


@pytest.fixture(scope="module")
def asked_of_llm() -> dict[str, Any]:
    """What ``splitwiser run`` gives :class:`LLM` when each option is other than its default."""
    asked: dict[str, Any] = {}

    def ask(model: str, **settings: Any) -> None:
        asked.update(settings, model=model)
        raise _AskedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitwiser.run.LLM", ask)
        with pytest.raises(_AskedError):
            main(["run", "--prompt_tokens=5", "--output_tokens=2", *to_arguments(OPTIONS)])
    return asked


@pytest.mark.parametrize("name", inspect.signature(LLM).parameters)
def test_an_option_reaches_the_engine(name: str, asked_of_llm: dict[str, Any]) -> None:
    (default,) = (field.default for field in fields(RunConfig) if field.name == name)
    assert OPTIONS[name] != default
    assert asked_of_llm[name] == OPTIONS[name]
