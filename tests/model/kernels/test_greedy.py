"""The likeliest token is PyTorch's, in every number format."""

import pytest
import torch

from splitwiser.model.kernels import greedy
from splitwiser.model.kernels.greedy import likeliest


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (3, 33), (64, 5001)])
def test_the_likeliest_is_pytorchs(
    shape: tuple[int, int], dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(greedy, "_library", lambda: None)
    logits = rows(*shape).to(dtype)
    expected = logits.float().argmax(dim=-1)
    assert torch.equal(likeliest(logits), expected)
    assert torch.equal(likeliest(logits - 100), (logits - 100).float().argmax(dim=-1))  # all negative, and many equal
    assert torch.equal(likeliest(logits.t().contiguous().t()), expected)


@pytest.mark.parametrize("place", [0, 1, 40, 99])
def test_infinities_have_their_place(place: int) -> None:
    logits = torch.full((2, 100), float("-inf"), dtype=torch.bfloat16)
    logits[0, place] = -1e30
    logits[1, place:] = float("inf")
    assert likeliest(logits).tolist() == [place, place]
