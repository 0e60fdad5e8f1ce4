"""Memory in huge pages."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from splitwiser.machine import pages
from splitwiser.machine.describe import peak_memory_mb, reset_peak_memory
from splitwiser.machine.pages import HUGE, gather, map_memory, use_pages


def kib(field: str) -> int:
    """What this process has mapped of a kind that /proc/self/smaps_rollup tells."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def test_memory_of_ones_own_is_zero_and_takes_what_is_used() -> None:
    before = kib("Rss")
    memory = map_memory(1 << 30)
    memory[5] = 7
    assert (memory.dtype, memory.nbytes, memory.data_ptr() % HUGE) == (torch.uint8, 1 << 30, 0)
    assert memory[: 2 * HUGE].sum() == 7
    assert kib("Rss") - before < 100 << 10


def test_memory_goes_back_with_its_last_tensor() -> None:
    before = kib("Rss")
    memory = map_memory(64 << 20)
    part = memory.fill_(1)[32 << 20 :]
    del memory
    gc.collect()
    assert int(part.sum()) == 32 << 20
    del part
    gc.collect()
    assert kib("Rss") - before < 32 << 10


def test_a_file_is_shared_by_all_who_map_it() -> None:
    fd = os.memfd_create("splitwiser")
    os.ftruncate(fd, 3 * HUGE + 100)
    one, other = (map_memory(3 * HUGE + 100, fd) for _ in range(2))
    os.close(fd)
    one[-1] = 9
    use_pages(other)
    assert (int(other[-1]), int(other.sum())) == (9, 9)
    assert one.data_ptr() % HUGE == other.data_ptr() % HUGE == 0


def test_memory_that_cannot_be_mapped_is_an_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        map_memory(100, 12345)


def can_have_huge_pages() -> bool:
    fd = os.memfd_create("splitwiser")
    os.ftruncate(fd, HUGE)
    memory = map_memory(HUGE, fd)
    os.close(fd)
    before = kib("ShmemPmdMapped")
    use_pages(memory)
    return kib("ShmemPmdMapped") > before


@pytest.mark.skipif(not can_have_huge_pages(), reason="this system has no huge pages to give")
@pytest.mark.parametrize(("shared", "field"), [(False, "AnonHugePages"), (True, "ShmemPmdMapped")])
def test_pages_that_are_asked_for_are_huge(shared: bool, field: str) -> None:
    fd = os.memfd_create("splitwiser") if shared else None
    if fd is not None:
        os.ftruncate(fd, 8 * HUGE)
    memory = map_memory(8 * HUGE, fd)
    if fd is not None:
        os.close(fd)
    memory[3 * HUGE + 1 :][:100] = 4
    before = kib(field)
    use_pages(memory[HUGE // 2 : 5 * HUGE])  # of which four are whole
    assert kib(field) - before == 4 * (HUGE >> 10)
    assert int(memory.sum()) == 400


@pytest.mark.parametrize("width", [500, 3000])  # tensors on the heap, and some with mappings of their own
def test_there_is_no_second_copy_of_a_module_as_it_is_gathered(width: int) -> None:
    layers = [nn.Linear(width, width) for _ in range((300 << 20) // (4 * width * width))]
    above = torch.zeros(1000)  # keeps the heap from ending where they did
    reset_peak_memory(torch.device("cpu"))
    before = kib("Rss")
    gather(nn.Sequential(*layers))
    assert peak_memory_mb(torch.device("cpu")) * 1e6 / 1024 - before < 150 << 10
    del above


def test_a_gathered_module_computes_the_same_in_one_memory() -> None:
    norm = nn.BatchNorm1d(50)
    module = nn.Sequential(nn.Linear(30, 50), norm, nn.Linear(50, 30)).eval()
    module.register_buffer("again", norm.running_mean)  # which is one tensor at two places
    with torch.inference_mode():
        module.register_buffer("steps", torch.arange(5))
    inputs = torch.randn(4, 30)
    expected = module(inputs)
    allocated: list[torch.Tensor] = []

    def allocate(nbytes: int) -> torch.Tensor:
        allocated.append(map_memory(nbytes))
        return allocated[0]

    places = gather(module, allocate)
    assert torch.equal(module(inputs), expected)
    assert module.again is norm.running_mean
    assert module.get_buffer("steps").add(1).tolist() == [1, 2, 3, 4, 5]
    tensors = {id(each): each for each in [*module.parameters(), *module.buffers()]}
    (memory,) = allocated
    assert {key: each.data_ptr() - memory.data_ptr() for key, each in tensors.items()} == places
    assert all(place % pages.ALIGNMENT == 0 for place in places.values())
