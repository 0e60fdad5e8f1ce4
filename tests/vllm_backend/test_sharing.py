"""The memory that engines share, on a CPU; on a GPU in tests/end_to_end/test_stand_in.py."""

import os
from collections.abc import Iterator

import pytest
import torch

from splitwiser.vllm_backend.messages import SharedFile
from splitwiser.vllm_backend.sharing import open_pool, read_handles, write_handles


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.memfd_create("shared")
    yield number
    os.close(number)


def test_the_pool_is_the_same_zeroed_memory_for_all(fd: int) -> None:
    first, second = (open_pool(SharedFile(fd, 4096), torch.device("cpu")) for _ in range(2))
    assert (second.numel(), int(second.max())) == (4096, 0)
    first[9] = 3
    assert int(second[9]) == 3


def test_handles_are_read_as_often_as_there_are_engines(fd: int) -> None:
    assert read_handles(fd) is None
    write_handles(fd, {"weight": (b"handle", 64)})
    assert [read_handles(fd) for _ in range(3)] == [{"weight": (b"handle", 64)}] * 3
