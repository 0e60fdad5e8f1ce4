"""The pool's memory, the allocator of its blocks and the size the pool gets."""

import os
import random

import pytest
import torch

from splitwiser.machine import memory as main_memory
from splitwiser.machine.shared_memory import SharedMemory
from splitwiser.model import kv_pool
from splitwiser.model.kernels.interface import LayerShape
from splitwiser.model.kv_pool import (
    BlockAllocator,
    KVPool,
    block_nbytes,
    plan_blocks,
)
from tests.support.assertions import assert_says, refusal

CPU = torch.device("cpu")
LAYERS = [LayerShape(2, 3, 5), LayerShape(1, 4, 4)]
BLOCK = 4


def make_pool(blocks: int = 6, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(LAYERS, blocks, BLOCK, dtype, CPU)


# the pool


def test_each_layer_has_its_own_shape() -> None:
    pool = make_pool()
    assert [tuple(tensor.shape) for tensor in pool.keys] == [(6, 4, 2, 3), (6, 4, 1, 4)]
    assert [tuple(tensor.shape) for tensor in pool.values] == [(6, 4, 2, 5), (6, 4, 1, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pool_is_zeroed(dtype: torch.dtype) -> None:
    pool = make_pool(dtype=dtype)
    assert {tensor.dtype for tensor in [*pool.keys, *pool.values]} == {dtype}
    assert all(not tensor.any() for tensor in [*pool.keys, *pool.values])


def test_prefault_maps_the_first_blocks_only_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerShape(1, 1024, 1024)  # 16 KiB of keys in a block, and as much of values
    monkeypatch.setattr(kv_pool, "PREFAULT_BYTES", 100 << 15)
    memory = SharedMemory(1000 << 15, CPU)
    pool = KVPool([layer], 1000, BLOCK, torch.float32, CPU, memory.tensor)
    pool.keys[0][7] = 1
    assert taken_kib(memory) == 16
    pool.prefault(range(5, 505))
    assert taken_kib(memory) == 100 * 32
    assert int(pool.keys[0].sum()) == pool.keys[0][7].numel()
    memory.close()


def taken_kib(memory: SharedMemory) -> int:
    """Size of the pages that the system has given to ``memory``."""
    assert memory._fd is not None
    return os.fstat(memory._fd).st_blocks // 2


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_are_those_of_all_numbers(dtype: torch.dtype, size: int) -> None:
    numbers = 6 * BLOCK * (2 * (3 + 5) + 1 * (4 + 4))
    assert make_pool(dtype=dtype).nbytes == numbers * size == 6 * block_nbytes(LAYERS, BLOCK, dtype)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_that_tokens_take(tokens: int, blocks: int) -> None:
    assert make_pool().blocks_for(tokens) == blocks


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read_through_the_blocks(layer: int, dtype: torch.dtype) -> None:
    pool, shape = make_pool(dtype=dtype), LAYERS[layer]
    tables = [[4, 1], [0, 5]]  # two requests of two blocks, in no order
    keys = torch.randn(2, 8, shape.kv_heads, shape.key_dim).to(dtype)
    values = torch.randn(2, 8, shape.kv_heads, shape.value_dim).to(dtype)
    for request, blocks in enumerate(tables):
        slots = torch.tensor([blocks[position // BLOCK] * BLOCK + position % BLOCK for position in range(8)])
        pool.write(layer, slots, keys[request], values[request])
    read_keys, read_values = pool.read(layer, torch.tensor(tables))
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)


def test_int8_holds_multiples_of_the_scale_of_each_token_and_head() -> None:
    pool, keys = make_pool(dtype=torch.int8), torch.tensor([[[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]])
    pool.write(0, torch.tensor([9]), keys, torch.randn(1, 2, 5))
    assert pool.keys[0][2, 1, :, :3].tolist() == [[64, -127, 32], [0, 0, 0]]
    read_keys, _ = pool.read(0, torch.tensor([[2]]))
    torch.testing.assert_close(read_keys[0, 1], keys[0], atol=2 / 254, rtol=0)


def test_int8_takes_a_byte_a_number_and_four_a_scale() -> None:
    expected = BLOCK * (2 * (3 + 4 + 5 + 4) + 1 * (4 + 4 + 4 + 4))
    assert make_pool(dtype=torch.int8).nbytes == 6 * expected == 6 * block_nbytes(LAYERS, BLOCK, torch.int8)


def test_other_number_formats_are_converted_as_they_are_written() -> None:
    pool, keys = make_pool(dtype=torch.bfloat16), torch.randn(1, 2, 3)
    pool.write(0, torch.tensor([9]), keys, torch.randn(1, 2, 5))
    assert torch.equal(pool.keys[0][2, 1], keys[0].bfloat16())


def test_a_slot_written_again_holds_the_later() -> None:
    pool, slot = make_pool(), torch.tensor([9])
    for number in (5.0, 7.0):
        pool.write(0, slot, torch.full((1, 2, 3), number), torch.full((1, 2, 5), number))
    assert (pool.keys[0].max().item(), pool.values[0].max().item()) == (7.0, 7.0)


def test_writing_touches_its_slots_only() -> None:
    pool = make_pool()
    pool.write(0, torch.tensor([9]), torch.ones(1, 2, 3), torch.ones(1, 2, 5))
    assert pool.keys[0].nonzero()[:, :2].unique(dim=0).tolist() == [[2, 1]]
    assert pool.values[0].nonzero()[:, :2].unique(dim=0).tolist() == [[2, 1]]
    assert not pool.keys[1].any()


def test_what_was_read_is_a_copy() -> None:
    pool = make_pool()
    keys, values = pool.read(0, torch.tensor([[0]]))
    keys += 1
    values += 1
    assert not pool.keys[0].any()
    assert not pool.values[0].any()


# the allocator


def test_first_blocks_come_in_order_from_the_first() -> None:
    allocator = BlockAllocator(10, 5)
    assert (allocator.allocate(2), allocator.allocate(3), allocator.free_count) == ([10, 11], [12, 13, 14], 0)


def test_all_or_none_are_handed_out() -> None:
    allocator = BlockAllocator(0, 4)
    assert (allocator.allocate(5), allocator.free_count, allocator.allocate(4)) == (None, 4, [0, 1, 2, 3])


def test_nothing_asked_is_nothing_given() -> None:
    allocator = BlockAllocator(0, 0)
    assert (allocator.allocate(0), allocator.allocate(1)) == ([], None)


@pytest.mark.parametrize(
    ("blocks", "named"),
    [([3], 3), ([0, 3], 3), ([0, 0], 0), ([99], 99)],
    ids=["free", "one of two free", "twice in one call", "of another range"],
)
def test_block_that_is_not_in_use_is_named(blocks: list[int], named: int) -> None:
    allocator = BlockAllocator(0, 5)
    allocator.allocate(3)
    with pytest.raises(ValueError, match=rf"\[{named}\]"):
        allocator.release(blocks)


def test_second_release_is_refused() -> None:
    allocator = BlockAllocator(0, 5)
    blocks = allocator.allocate(3)
    assert blocks
    allocator.release(blocks)
    with pytest.raises(ValueError, match="are not in use; a block is freed once"):
        allocator.release(blocks)


def test_refused_release_takes_nothing_back() -> None:
    allocator = BlockAllocator(0, 5)
    allocator.allocate(2)
    with pytest.raises(ValueError, match="not in use"):
        allocator.release([0, 1, 4])
    allocator.release([0, 1])  # still in use
    assert allocator.free_count == 5


@pytest.mark.parametrize("seed", range(10))
def test_any_sequence_keeps_the_blocks_apart(seed: int) -> None:
    rng = random.Random(seed)
    first, count = rng.randrange(50), rng.randrange(1, 40)
    everything = set(range(first, first + count))
    allocator = BlockAllocator(first, count)
    held: list[list[int]] = []
    for _ in range(400):
        taken = {block for blocks in held for block in blocks}
        assert allocator.free_count == count - len(taken)
        if held and rng.random() < 0.45:
            allocator.release(held.pop(rng.randrange(len(held))))
            continue
        wanted = rng.randrange(count // 2 + 2)
        blocks = allocator.allocate(wanted)
        if wanted > count - len(taken):
            assert blocks is None
        else:
            assert blocks is not None
            assert len(set(blocks)) == wanted
            assert set(blocks) <= everything - taken
            held.append(blocks)
    for blocks in held:
        allocator.release(blocks)
    assert sorted(allocator.allocate(count) or []) == sorted(everything)


# the size


def plan(kv_memory: str, *, max_batch: int = 8, max_positions: int | None = 100) -> int:
    return plan_blocks(LAYERS, kv_memory, BLOCK, torch.float32, CPU, max_batch, max_positions)


NBYTES = block_nbytes(LAYERS, BLOCK, torch.float32)


@pytest.mark.parametrize(("more", "blocks"), [(0, 7), (NBYTES - 1, 7), (NBYTES, 8)])
def test_explicit_size_gives_the_blocks_that_fit(more: int, blocks: int) -> None:
    assert plan(f"{7 * NBYTES + more}B") == blocks


def test_one_block_is_enough() -> None:
    assert plan(f"{NBYTES}B") == 1


def test_less_than_a_block_says_what_a_block_takes() -> None:
    message = refusal(plan, f"{NBYTES - 1}B")
    assert_says(message, f"kv_memory '{NBYTES - 1}B' is less than one block", f"{NBYTES} bytes")


def test_more_than_the_machine_has_is_refused() -> None:
    assert_says(refusal(plan, "1000000GiB"), "kv_memory '1000000GiB'")


def test_wrong_size_is_refused_by_the_plan() -> None:
    assert_says(refusal(plan, "lots"), "kv_memory 'lots' is not a size")


@pytest.mark.parametrize(
    ("max_batch", "max_positions", "blocks"),
    [(8, 100, 8 * 25), (8, 101, 8 * 26), (1, 3, 1), (2, None, 2 * 2048), (2, 10**6, 2 * 2048), (3, 8192, 3 * 2048)],
)
def test_auto_holds_a_batch_of_the_longest(
    max_batch: int, max_positions: int | None, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_memory, "available_memory", lambda: 10**12)
    assert plan("auto", max_batch=max_batch, max_positions=max_positions) == blocks


@pytest.mark.parametrize(("available", "blocks"), [(4 * 10 * NBYTES, 10), (4 * 11 * NBYTES - 1, 10), (0, 1)])
def test_auto_takes_a_quarter_of_the_memory_at_most(
    available: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main_memory, "available_memory", lambda: available)
    assert plan("auto") == blocks


def test_auto_takes_half_of_a_gpus_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 10 * NBYTES, 10**12))
    assert plan_blocks(LAYERS, "auto", BLOCK, torch.float32, torch.device("cuda", 0), 8, 100) == 10
