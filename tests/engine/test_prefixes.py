"""Which blocks are found again, by whom and for how long."""

from splitwiser.engine.prefixes import Chain, PrefixCache
from splitwiser.engine.steps import SequenceState
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.request import NO_ADAPTER, Adapter, Request, SamplingParams

BLOCK = 4


class Owner:
    """A prefix cache over its own blocks, with sequences whose prompts are as given."""

    def __init__(self, blocks: int, *, keeps: bool = True) -> None:
        self.allocator = BlockAllocator(0, blocks)
        self.cache = PrefixCache(self.allocator, BLOCK, keeps=keeps)
        self.count = 0

    def begin(self, *prompt: int, adapter: Adapter = NO_ADAPTER, written: bool = True) -> tuple[SequenceState, Chain]:
        sequence = SequenceState(Request(self.count, prompt, SamplingParams(), 0, adapter=adapter), ())
        self.count += 1
        chain = self.cache.find(sequence)
        self.allocator.share(chain.found)
        new = self.allocator.allocate(-(-(len(prompt) + adapter.tail_tokens) // BLOCK) - chain.blocks)
        assert new is not None
        sequence.blocks = [*adapter.shared_blocks, *chain.found, *new]
        self.cache.extend(chain, sequence, sequence.length, written=written)
        return sequence, chain

    def found(self, *prompt: int, adapter: Adapter = NO_ADAPTER) -> list[int]:
        return self.cache.find(SequenceState(Request(99, prompt, SamplingParams(), 0, adapter=adapter), ())).found


def test_only_full_blocks_of_the_same_beginning_are_found() -> None:
    owner = Owner(9)
    owner.begin(*range(11))
    assert owner.found(*range(20)) == [0, 1]  # 8 of 11 tokens
    assert owner.found(*range(7), 99, 8, 9) == [0]
    assert owner.found(99, *range(1, 20)) == []
    assert owner.found(*range(4, 20)) == []  # the same tokens behind others


def test_the_last_token_is_never_found() -> None:
    owner = Owner(9)
    owner.begin(*range(8))
    assert owner.found(*range(8)) == [0]
    assert owner.found(*range(9)) == [0, 1]


def test_tokens_of_the_same_hash_are_told_apart() -> None:
    same, other = 0, 2**61 - 1
    assert hash((same,) * 4) == hash((other,) * 4)
    owner = Owner(9)
    owner.begin(*[same] * 5)
    assert owner.found(*[same] * 5) == [0]
    assert owner.found(*[other] * 5) == []


def test_each_adapter_has_its_own_blocks() -> None:
    owner, lora = Owner(9), Adapter("lora", lora=1)
    owner.begin(*range(9), adapter=lora)
    assert owner.found(*range(9)) == []
    assert owner.found(*range(9), adapter=lora) == [0, 1]


def test_virtual_tokens_that_fill_no_block_stand_in_the_first_one() -> None:
    owner, virtual = Owner(9), Adapter("virtual", virtual_tokens=7, blocks=(50, 51), tail_tokens=3)
    _, chain = owner.begin(*range(9), adapter=virtual)
    assert chain.blocks == 3  # of 1, 4 and 4 tokens
    assert owner.found(*range(6), adapter=virtual) == [0, 1]


def test_who_comes_while_a_block_is_being_filled_follows_who_fills_it() -> None:
    owner = Owner(9)
    first, _ = owner.begin(*range(9), written=False)
    assert owner.begin(*range(12), 0, written=False)[1].follows == 0
    assert owner.begin(*range(14), written=False)[1].follows == 1  # of both, who fills the last of them
    assert owner.begin(*range(10), written=False)[1].follows == 0
    owner.cache.mark_written(first)
    assert owner.begin(*range(11), written=False)[1].follows is None


def test_released_blocks_are_found_until_they_are_overwritten_the_end_first() -> None:
    owner = Owner(4)
    sequence, _ = owner.begin(*range(12))
    owner.cache.release(sequence)
    assert owner.allocator.free_count == 4
    assert owner.found(*range(13)) == [0, 1, 2]
    owner.begin(50, 51, 52, 53, 54)  # the free block, and one that was kept
    assert owner.found(*range(13)) == [0, 1]


def test_the_least_recently_used_is_overwritten_first() -> None:
    owner = Owner(4)
    first, _ = owner.begin(*range(5))
    second, _ = owner.begin(*range(20, 25))
    owner.cache.release(first)
    owner.cache.release(second)
    again, _ = owner.begin(*range(5))
    owner.cache.release(again)
    owner.begin(*range(40, 49))
    assert (owner.found(*range(5)), owner.found(*range(20, 25))) == ([0], [])


def test_a_shared_block_is_free_when_the_last_has_released_it() -> None:
    owner = Owner(4)
    first, _ = owner.begin(*range(6))
    second, _ = owner.begin(*range(7))
    owner.cache.release(first)
    assert owner.allocator.free_count == 2
    owner.cache.release(second)
    assert owner.allocator.free_count == 4


def test_without_keeping_blocks_are_found_while_they_are_in_use() -> None:
    owner = Owner(9, keeps=False)
    first, _ = owner.begin(*range(9))
    second, _ = owner.begin(*range(9))
    owner.cache.release(first)
    assert owner.found(*range(9)) == [0, 1]
    owner.cache.release(second)
    assert owner.found(*range(9)) == []
    assert owner.allocator.free_count == 9


def test_blocks_that_nobody_will_fill_are_forgotten() -> None:
    owner = Owner(9)
    filled, _ = owner.begin(*range(5), written=False)
    owner.cache.mark_written(filled)
    unfilled, _ = owner.begin(*range(9), written=False)
    owner.cache.forget_unwritten(unfilled)
    assert owner.found(*range(9)) == [0]
    owner.cache.release(unfilled)
    owner.cache.release(filled)
    assert owner.allocator.free_count == 9
