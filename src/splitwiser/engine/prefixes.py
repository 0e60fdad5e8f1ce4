"""Prefix caching: finds the blocks of the KV pool that hold the K and V of a request's first tokens.

The K and V of a token depend on all tokens before it. So a full block is known by a chain: by its own tokens and its parent,
the block before it, which stands for everything earlier. The first block's parent is what else changes K and V: the adapter.
A dictionary finds a block by the hash of both and compares the tokens themselves, so two prefixes of one hash stay two.
"""

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from splitwiser.engine.steps import SequenceState
from splitwiser.model.kv_pool import BlockAllocator
from splitwiser.request import Request

Key = tuple[Hashable, tuple[int, ...]]


class _Node(NamedTuple):
    """A block that can be found by ``key``. Its ``number`` is never given again, as the block's own is."""

    number: int
    key: Key
    block: int


def may_share(request: Request, *, prefix_caching: bool, longest_shared: float = math.inf) -> bool:
    """Return whether a request shares blocks with those that begin alike: with ``prefix_caching``, or if it is one of the
    samples of a prompt. Sources of encoders do not, nor prompts whose log-probabilities are asked for, since these have to
    be computed, nor a request that may have more than ``longest_shared`` tokens."""
    return (
        (prefix_caching or request.shares_prompt)
        and not request.encoded
        and request.params.prompt_logprobs is None
        and request.max_kv_tokens <= longest_shared
    )


@dataclass
class Chain:
    """The blocks of one sequence that can be found: they hold its first ``tokens`` tokens, and the next one's parent is
    ``parent``. The ``found`` ones are another's, of which the request ``follows`` is still to fill the last; None if it is
    filled."""

    parent: Hashable
    blocks: int = 0
    tokens: int = 0
    found: list[int] = field(default_factory=list)
    follows: int | None = None


class PrefixCache:
    """The blocks of ``allocator``, of ``block_tokens`` tokens, that can be found by the tokens whose K and V they hold.

    A block can be found as soon as a request has it that is to fill it, so that requests which arrive together compute
    their common beginning once. With ``keeps`` it can be found after its release too, until it is overwritten.
    """

    def __init__(self, allocator: BlockAllocator, block_tokens: int, *, keeps: bool) -> None:
        self._allocator = allocator
        self._block_tokens = block_tokens
        self._keeps = keeps
        self._nodes: dict[Key, _Node] = {}
        self._node_of: dict[int, _Node] = {}
        self._writers: dict[int, int] = {}  # which request is still to fill a block
        self._numbers = count()
        allocator.on_reuse = self._remove

    def find(self, sequence: SequenceState) -> Chain:
        """Return the chain of a sequence that has no blocks yet, with those found that hold its first tokens. They hold less
        than all of its tokens: the last one has to be computed, for its logits."""
        chain = Chain(sequence.request.adapter)
        while (key := self._next_key(chain, sequence, sequence.length - 1)) and (node := self._nodes.get(key)):
            chain.found.append(node.block)
            _advance(chain, node)
        if chain.found:
            chain.follows = self._writers.get(chain.found[-1])
        return chain

    def extend(self, chain: Chain, sequence: SequenceState, tokens: int, *, written: bool) -> None:
        """Let the blocks of ``sequence`` be found that its first ``tokens`` tokens fill; ``written`` says whether they are
        filled already, or by the coming prefill. A block whose tokens another one holds already is passed over."""
        own = sequence.own_blocks
        while key := self._next_key(chain, sequence, tokens):
            node = self._nodes.get(key)
            if node is None:
                block = own[chain.blocks]
                node = self._nodes[key] = self._node_of[block] = _Node(next(self._numbers), key, block)
                self._allocator.keep(block)
                if not written:
                    self._writers[block] = sequence.request.request_id
            _advance(chain, node)

    def mark_written(self, sequence: SequenceState) -> None:
        """Record that the prefill of ``sequence`` has filled its blocks."""
        for block in sequence.own_blocks:
            self._writers.pop(block, None)

    def release(self, sequence: SequenceState) -> None:
        """Take the sequence's references from its blocks."""
        blocks = sequence.own_blocks
        self._allocator.release(blocks)
        if not self._keeps:
            self._forget(block for block in blocks if not self._allocator.is_used(block))

    def forget_unwritten(self, sequence: SequenceState) -> None:
        """Let nobody find the blocks that the prefill of ``sequence`` is still to fill, since it may not."""
        number = sequence.request.request_id
        self._forget(block for block in sequence.own_blocks if self._writers.get(block) == number)

    def _next_key(self, chain: Chain, sequence: SequenceState, most: int) -> Key | None:
        """Return the key of the block after ``chain``, if the first ``most`` tokens of ``sequence`` fill it."""
        # the first block also holds the last virtual tokens of the adapter, if these fill no block
        before = 0 if chain.blocks else sequence.request.adapter.tail_tokens
        end = chain.tokens + self._block_tokens - before
        return (chain.parent, tuple(sequence.tokens(chain.tokens, end))) if end <= most else None

    def _forget(self, blocks: Iterable[int]) -> None:
        for block in [each for each in blocks if each in self._node_of]:
            self._remove(block)
            self._allocator.forget(block)

    def _remove(self, block: int) -> None:
        del self._nodes[self._node_of.pop(block).key]
        self._writers.pop(block, None)


def _advance(chain: Chain, node: _Node) -> None:
    chain.blocks += 1
    chain.tokens += len(node.key[1])
    chain.parent = node.number
