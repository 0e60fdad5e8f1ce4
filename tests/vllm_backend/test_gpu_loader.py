"""The loader of a GPU's engines, on a CPU, where vLLM hands tensors over by value: all but the mapping itself."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.models import make_tiny
from tests.support.tokens import references

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PROMPT = [5, 6, 7, 8, 9]
# an engine over the shared weights, which prints the tokens of one request
PROGRAM = """
import sys
import torch
from vllm.model_executor.layers import utils
from splitwiser.engine.messages import WorkerSpec
from splitwiser.request import Request, SamplingParams
from splitwiser.vllm_backend import engine
from splitwiser.vllm_backend.gpu_loader import GpuSharedLoader
from splitwiser.vllm_backend.messages import EngineOptions, EngineSetup, SharedFile

model, fd, *prompt = sys.argv[1:]
engine.SharedLoader = GpuSharedLoader
# what only a GPU has, and that its weights stay as they were loaded
torch.accelerator.current_device_index = lambda: 0
utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear)
options = EngineOptions(model, "float32", -1, 4, 64, 1 << 22, True, 0, frozenset(), False, False)
file = SharedFile(int(fd), 0)
made = engine.Engine(EngineSetup(WorkerSpec("mixed-0", "mixed", 50), 0, options, file, file, None, 0, 1, {}, {}, {}), None)
made.add(Request(0, tuple(map(int, prompt)), SamplingParams(max_tokens=12), seed=0))
tokens = []
while made.has_work:
    step = made.step()
    tokens += [each.token for each in step.made] if step else []
print("tokens", *tokens)
"""


def test_the_second_engine_needs_no_checkpoint_for_the_first_ones_tokens(vllm_python: str, tmp_path: Path) -> None:
    model = make_tiny("opt", tmp_path / "model", hidden_size=128, word_embed_proj_dim=128)
    empty = tmp_path / "empty"
    shutil.copytree(model, empty, ignore=shutil.ignore_patterns("*.safetensors"))
    fd = os.memfd_create("weights")
    expected = references(model, [PROMPT], 12)[0]
    try:
        assert [tokens_of(vllm_python, where, fd) for where in (model, empty)] == [expected, expected]
    finally:
        os.close(fd)


def tokens_of(python: str, model: Path, fd: int) -> list[int]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [python, "-c", PROGRAM, str(model), str(fd), *map(str, PROMPT)],
        env=environment, pass_fds=[fd], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("tokens"))
    return [int(each) for each in line.split()[1:]]
