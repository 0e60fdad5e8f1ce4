"""The likeliest token is PyTorch's, in every number format."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwiser import LLM, SamplingParams
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.greedy import CpuLikeliest, likeliest
from splitwiser.model.kernels.interface import LikeliestKernel

LIBRARY, _REASON = load_native()
KERNELS = [likeliest, *([CpuLikeliest(LIBRARY)] if LIBRARY else [])]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: getattr(kernel, "__name__", "compiled"))


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 33), (64, 5001)])
def test_the_likeliest_is_pytorchs(shape: tuple[int, int], dtype: torch.dtype, kernel: LikeliestKernel) -> None:
    logits = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    expected = logits.float().argmax(dim=-1)
    assert torch.equal(kernel(logits), expected)
    assert torch.equal(kernel(logits - 100), (logits - 100).float().argmax(dim=-1))  # all negative, and many equal
    assert torch.equal(kernel(logits.t().contiguous().t()), expected)


@each_kernel
@pytest.mark.parametrize("place", [0, 1, 40, 99])
def test_infinities_have_their_place(place: int, kernel: LikeliestKernel) -> None:
    logits = torch.full((2, 100), float("-inf"), dtype=torch.bfloat16)
    logits[0, place] = -1e30
    logits[1, place:] = float("inf")
    assert kernel(logits).tolist() == [place, place]


@pytest.mark.skipif(LIBRARY is None, reason=_REASON)
@pytest.mark.parametrize(("kernels", "asked"), [("auto", True), ("plain", False)])
def test_steps_ask_the_kernel_unless_all_is_pytorchs(
    kernels: str, asked: bool, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[torch.Tensor] = []

    def note(_: CpuLikeliest, logits: torch.Tensor) -> torch.Tensor:
        calls.append(logits)
        return likeliest(logits)

    with LLM(tiny("opt"), dtype="bfloat16", kernels=kernels) as llm:
        monkeypatch.setattr(CpuLikeliest, "__call__", note)
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert len(calls) == (3 if asked else 0)
