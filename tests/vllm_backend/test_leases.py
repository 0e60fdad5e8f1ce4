"""Who owns the blocks that prefill hands to decode, whatever becomes of their requests."""

import random
from dataclasses import dataclass

import pytest

from splitwiser.vllm_backend.leases import Lender, exchange


@dataclass
class Numbered:
    block_id: int


def numbers(blocks: list[Numbered]) -> list[int]:
    return [block.block_id for block in blocks]


def test_an_exchange_gives_each_side_the_numbers_of_the_other() -> None:
    lender = Lender()
    full, empty = [Numbered(3), Numbered(7)], [Numbered(20), Numbered(21), Numbered(22)]
    lender.lend("r", full, "decode-0")
    lender.end("r", exchange(empty, numbers(full)))
    assert (numbers(full), numbers(empty)) == ([20, 21], [3, 7, 22])
    assert (lender.take_ended(), lender.take_ended(), lender.open_leases) == ({"r"}, set(), 0)


def test_blocks_that_decode_did_not_take_keep_their_numbers() -> None:
    lender = Lender()
    full = [Numbered(3), Numbered(7)]
    lender.lend("r", full, "decode-0")
    lender.end("r", ())
    assert numbers(full) == [3, 7]
    assert lender.take_ended() == {"r"}


def test_a_dead_worker_gives_back_what_was_leased_to_it_alone() -> None:
    lender = Lender()
    for lease, worker in (("a", "decode-0"), ("b", "decode-1"), ("c", "decode-0")):
        lender.lend(lease, [Numbered(1)], worker)
    lender.reclaim("decode-0")
    assert lender.take_ended() == {"a", "c"}
    assert lender.open_leases == 1


def test_a_lease_ends_once_and_by_as_many_blocks_as_it_has() -> None:
    lender = Lender()
    blocks = [Numbered(3), Numbered(7)]
    lender.lend("r", blocks, "decode-0")
    with pytest.raises(ValueError, match="argument"):
        lender.end("r", (1,))
    lender.end("r", (1, 2))
    with pytest.raises(KeyError):
        lender.end("r", (1, 2))


def test_fewer_own_blocks_than_offered_change_nothing() -> None:
    own = [Numbered(1)]
    with pytest.raises(ValueError, match="2 blocks are offered for 1"):
        exchange(own, [5, 6])
    assert numbers(own) == [1]


def test_no_number_is_lost_or_owned_twice_after_any_order_of_events() -> None:
    rng = random.Random(1)
    lender = Lender()
    sides = [[Numbered(number) for number in range(low, low + 40)] for low in (0, 40)]
    free = [list(side) for side in sides]
    leased: dict[str, list[Numbered]] = {}
    running: list[list[Numbered]] = []
    for step in range(2000):
        count = rng.randint(1, 4)
        event = rng.choice(["lend", "take", "drop", "finish"])
        if event == "lend" and len(free[0]) >= count:
            leased[str(step)] = [free[0].pop(rng.randrange(len(free[0]))) for _ in range(count)]
            lender.lend(str(step), leased[str(step)], "decode-0")
        elif event == "finish" and running:
            free[1] += running.pop(rng.randrange(len(running)))
        elif leased and event in ("take", "drop"):
            lease = rng.choice(list(leased))
            blocks = leased[lease]
            if event == "take" and len(free[1]) >= len(blocks):
                own = [free[1].pop() for _ in blocks]
                lender.end(lease, exchange(own, numbers(blocks)))
                running.append(own)
            else:
                lender.end(lease, ())
            assert lender.take_ended() == {lease}
            free[0] += leased.pop(lease)
    assert lender.open_leases == len(leased)
    assert sorted(numbers(sides[0] + sides[1])) == list(range(80))
