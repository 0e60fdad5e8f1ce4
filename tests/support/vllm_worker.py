"""A worker of the back end vLLM on a GPU whose engine is none: it has the shared pool and the messages, no model.

It stands for the Python of vLLM's environment (:func:`put_python`). Prefill writes the sum of a prompt's tokens to the pool;
decode's one token is what it finds there.
"""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SHOWN = (
    "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_CLIENT_PRIORITY", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "VLLM_ENABLE_V1_MULTIPROCESSING",
)  # fmt: skip


def put_python(folder: Path, version: str = "0.32.0") -> Path:
    """Make ``folder``, an environment whose Python says it has vLLM ``version`` for CUDA and runs this module as workers."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    versions = json.dumps({"vllm": version, "torch": "2.13.0"})
    python.write_text(
        f"#!/bin/sh\nif [ \"$2\" = -c ]; then echo '{versions}'; exit; fi\n"
        f"export PYTHONPATH='{os.pathsep.join(filter(None, sys.path))}'\nexec {sys.executable} {__file__} \"$@\"\n"
    )
    python.chmod(0o755)
    return folder


def main() -> None:
    """Run a worker with the modules of this one in place of those that import vLLM."""
    import torch

    from splitwiser.vllm_backend.leases import Lender

    engine, connector = ModuleType("engine"), ModuleType("connector")
    engine.__dict__.update(Engine=Engine, DEVICE=torch.device("cuda"))
    connector.__dict__["Exchange"] = lambda pool, _first, _last, sources, _send: SimpleNamespace(
        pool=pool, sources=sources, lender=Lender()
    )
    sys.modules |= {"splitwiser.vllm_backend.engine": engine, "splitwiser.vllm_backend.connector": connector}
    _, _, program, module, *pipes = sys.argv
    assert (Path(program).name, module) == ("elsewhere.py", "splitwiser.vllm_backend.worker")
    from splitwiser.vllm_backend import worker

    worker.main(pipes)


class Engine:
    """See :class:`splitwiser.vllm_backend.engine.Engine`."""

    blocks, block_tokens, longest = 8, 16, 128

    def __init__(self, setup: Any, exchange: Any) -> None:
        self.setup, self.exchange = setup, exchange
        self.todo: list[Any] = []

    @property
    def has_work(self) -> bool:
        return bool(self.todo)

    def settings(self) -> dict[str, Any]:
        pool = self.exchange.pool
        shown = {name: os.environ.get(name) for name in SHOWN}
        return {"threads": 1, "pool": [str(pool.device), pool.numel()], **shown}

    def add_prompt(self, request: Any, decode_worker: str) -> None:
        self.exchange.pool[7] = sum(request.prompt_token_ids)
        self.exchange.lender.lend("lease", [], decode_worker)
        lease = {"lease": "lease", "blocks": (7,), "kept": 0}
        self.todo.append(_made(request, 3, True, None, lease, decode_worker))

    def add_handoff(self, message: Any) -> None:
        (block,) = message.blocks
        pool = self.exchange.sources.get(message.handoff.prefill_worker, self.exchange.pool)
        self.todo.append(_made(message.request, int(pool[block]), False, "length", None, ""))

    def step(self) -> Any:
        made, self.todo = self.todo, []
        phase = self.setup.role
        return SimpleNamespace(
            phase=phase, start_ns=1, end_ns=2, requests=1, tokens=1, decode_tokens=int(phase == "decode"), made=made
        )


def _made(request: Any, token: int, is_first: bool, reason: Any, lease: Any, decode_worker: str) -> Any:
    return SimpleNamespace(
        request=request,
        token=token,
        is_first=is_first,
        reason=reason,
        start_ns=1,
        cached_tokens=0,
        logprobs=None,
        prompt_logprobs=(),
        lease=lease,
        decode_worker=decode_worker,
    )


if __name__ == "__main__":
    main()
