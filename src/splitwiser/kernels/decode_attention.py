"""The two Triton functions behind :mod:`splitwiser.gpu_kernel`; importable only where Triton is."""

import triton
import triton.language as tl


@triton.jit
def attend_part(
    query, keys, values, tables, starts, lengths, partial, largest, sums, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One part of one request's context, for the GROUP heads that share a K/V head.

    Writes the weighted sum of V, not yet divided, to ``partial`` (requests, heads, PARTS, VALUE_DIM), and the largest
    score and the sum of weights to ``largest`` and ``sums`` (requests, heads, PARTS), all float32.
    """
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    start = tl.load(starts + request)
    length = tl.load(lengths + request)
    share = tl.cdiv(tl.cdiv(length - start, PARTS), TILE) * TILE
    first = start + part * share
    last = tl.minimum(first + share, length)

    rows = tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows
    key_dims = tl.arange(0, KEY_PAD)
    value_dims = tl.arange(0, VALUE_PAD)
    in_group = rows < GROUP
    q = tl.load(
        query + (request * HEADS + heads[:, None]) * KEY_DIM + key_dims[None, :],
        mask=in_group[:, None] & (key_dims[None, :] < KEY_DIM),
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for begin in range(first, last, TILE):
        positions = begin + tl.arange(0, TILE)
        seen = positions < last
        blocks = tl.load(tables + request * WIDTH + positions // BLOCK_TOKENS, mask=seen, other=0)
        slots = (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS) * KV_HEADS + kv_head
        k = tl.load(
            keys + slots[:, None] * KEY_DIM + key_dims[None, :],
            mask=seen[:, None] & (key_dims[None, :] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # the hyperbolic tangent
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        v = tl.load(
            values + slots[:, None] * VALUE_DIM + value_dims[None, :],
            mask=seen[:, None] & (value_dims[None, :] < VALUE_DIM),
            other=0.0,
        )
        total = total * shrink + tl.sum(weights, axis=1)
        weighted = weighted * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    place = (request * HEADS + heads) * PARTS + part
    tl.store(
        partial + place[:, None] * VALUE_DIM + value_dims[None, :],
        weighted,
        mask=in_group[:, None] & (value_dims[None, :] < VALUE_DIM),
    )
    tl.store(largest + place, top, mask=in_group)
    tl.store(sums + place, total, mask=in_group)


@triton.jit
def join_parts(
    partial, largest, sums, output, sinks,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One head of one request: its parts brought to the same scale, added and divided; a sink takes its share of the
    weights. A part without a position has a largest score of minus infinity and so no weight."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    parts = tl.arange(0, PARTS_PAD)
    dims = tl.arange(0, VALUE_PAD)
    place = (request * HEADS + head) * PARTS
    tops = tl.load(largest + place + parts, mask=parts < PARTS, other=float("-inf"))
    top = tl.max(tops, axis=0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        top = tl.maximum(top, sink)
    scales = tl.exp(tops - top)
    total = tl.sum(tl.load(sums + place + parts, mask=parts < PARTS, other=0.0) * scales, axis=0)
    if SINKS:
        total += tl.exp(sink - top)
    weighted = tl.load(
        partial + (place + parts[:, None]) * VALUE_DIM + dims[None, :],
        mask=(parts[:, None] < PARTS) & (dims[None, :] < VALUE_DIM),
        other=0.0,
    )
    result = tl.sum(weighted * scales[:, None], axis=0) / total
    tl.store(output + (request * HEADS + head) * VALUE_DIM + dims, result, mask=dims < VALUE_DIM)
