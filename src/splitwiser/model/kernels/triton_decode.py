"""The two Triton functions of :mod:`splitwiser.model.kernels.gpu_attention`; importing this module needs Triton."""

import triton
import triton.language as tl


# no specialisation on arguments that change from step to step, so that no step waits for a compiler
@triton.jit(do_not_specialize=["width"], do_not_specialize_on_alignment=["tables", "starts", "lengths"])
def attend_part(
    query, keys, values, tables, width, starts, lengths, sinks, bias, output, largest, sums, scaling, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, BIASES: tl.constexpr,
    BIAS_BY_POSITION: tl.constexpr,
):  # fmt: skip
    """Attend over one part of one request's context, for up to ROWS of the GROUP heads that share a K/V head.

    With one part it writes the result to ``output`` (requests, heads, VALUE_DIM). With several it writes the weighted sum of
    V, not yet divided, to ``output`` (requests, heads, PARTS, VALUE_DIM), and the largest score and the sum of weights to
    ``largest`` and ``sums`` (requests, heads, PARTS), all float32. A row of ``tables`` has ``width`` blocks, and
    one of ``bias`` BIASES entries (0: there is no bias).
    """
    request = tl.program_id(0)
    sharers: tl.constexpr = (GROUP + ROWS - 1) // ROWS  # programs that share a K/V head, each with ROWS heads
    kv_head = tl.program_id(1) // sharers
    part = tl.program_id(2)
    start = tl.load(starts + request).to(tl.int32)
    length = tl.load(lengths + request).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length - start, PARTS), TILE) * TILE
    first = start + part * share
    last = tl.minimum(first + share, length)

    rows = tl.program_id(1) % sharers * ROWS + tl.arange(0, ROWS)
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
    if SINKS:  # a sink is a score without a value; the first part counts it
        top = tl.load(sinks + heads, mask=in_group & (part == 0), other=float("-inf")).to(tl.float32)
        total = (top > float("-inf")).to(tl.float32)
    weighted = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    for begin in range(first, last, TILE):
        positions = begin + tl.arange(0, TILE)
        seen = positions < last
        # a pool may have more elements than 32 bits can index
        blocks = tl.load(tables + request * width + positions // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        slots = (blocks * BLOCK_TOKENS + positions % BLOCK_TOKENS) * KV_HEADS + kv_head
        k = tl.load(
            keys + slots[:, None] * KEY_DIM + key_dims[None, :],
            mask=seen[:, None] & (key_dims[None, :] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # the hyperbolic tangent
        if BIASES > 0:
            entries = tl.minimum(positions if BIAS_BY_POSITION else length - 1 - positions, BIASES - 1)
            within = in_group[:, None] & seen[None, :]
            scores += tl.load(bias + heads[:, None] * BIASES + entries[None, :], mask=within, other=0.0)
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
    if PARTS == 1:
        weighted = weighted / total[:, None]
    else:
        tl.store(largest + place, top, mask=in_group)
        tl.store(sums + place, total, mask=in_group)
    tl.store(
        output + place[:, None] * VALUE_DIM + value_dims[None, :],
        weighted,
        mask=in_group[:, None] & (value_dims[None, :] < VALUE_DIM),
    )


@triton.jit
def join_parts(
    partial, largest, sums, output,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combine the parts, a power of 2 of them, of one head of one request: rescale them to the largest score of all, add
    and divide. A part without positions has a largest score of minus infinity and so no weight."""
    request = tl.program_id(0)
    head = tl.program_id(1)
    parts = (request * HEADS + head) * PARTS + tl.arange(0, PARTS)
    dims = tl.arange(0, VALUE_PAD)
    tops = tl.load(largest + parts)
    scales = tl.exp(tops - tl.max(tops, axis=0))
    total = tl.sum(tl.load(sums + parts) * scales, axis=0)
    weighted = tl.load(partial + parts[:, None] * VALUE_DIM + dims[None, :], mask=dims[None, :] < VALUE_DIM, other=0.0)
    result = tl.sum(weighted * scales[:, None], axis=0) / total
    tl.store(output + (request * HEADS + head) * VALUE_DIM + dims, result, mask=dims < VALUE_DIM)
