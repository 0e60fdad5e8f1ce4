"""Operations and bytes of a step, against figures worked by hand."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwiser.model.fused import find_compile_problem
from splitwiser.model.kernels import packed_linear
from splitwiser.model.kernels.int8_linear import Int8Linear, quantise_linears
from splitwiser.model.loading import load_model
from splitwiser.model.routes import ROUTES
from splitwiser.study.operations import Architecture, EncoderDecoder, ExpertWeights, count_architecture

Tiny = Callable[[str], Path]


def count(directory: Path, dtype: str = "float32", kv_dtype: torch.dtype | None = None) -> Architecture:
    model = load_model(directory, dtype=dtype, device="cpu", load_format="auto")
    ROUTES[model.kind].attach(model)
    return count_architecture(model, kv_dtype or model.dtype)


# hidden 48, 3 layers, vocabulary 151 in all of them
OPT_WEIGHTS = 3 * (4 * 48 * 48 + 2 * 48 * 96)  # q, k, v, out; two feed-forward matrices
LLAMA_WEIGHTS = 3 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)  # q, out; k, v of 2 heads of 12; gate, up, down
HEAD = 151 * 48


def test_weights_of_opt(tiny: Tiny) -> None:
    counted = count(tiny("opt"))
    assert (counted.weights, counted.head, counted.experts) == (OPT_WEIGHTS, HEAD, ())
    assert [(each.heads, each.kv_heads, each.key_dim, each.value_dim) for each in counted.layers] == [
        (4, 4, 12, 12)
    ] * 3


def test_int8_keys_and_values_take_a_byte_a_number_and_a_scale(tiny: Tiny) -> None:
    least, int8 = (count(tiny("opt"), kv_dtype=kv_dtype).decode([10, 7]) for kv_dtype in (None, torch.int8))
    assert least.flops == int8.flops
    assert least.nbytes - int8.nbytes == 3 * (17 + 2) * 2 * 4 * (4 * 12 - (12 + 4))  # layers x tokens x (K, V) x heads


def test_a_whole_prompt_of_opt(tiny: Tiny) -> None:
    cost = count(tiny("opt")).prefill([(0, 10)], rows=1)
    attention = 3 * 4 * (10 * 11 // 2) * 4 * 12  # layers x 4 x positions seen x heads x head size
    assert cost.flops == 2 * OPT_WEIGHTS * 10 + 2 * HEAD + attention
    # weights and head once; K and V of 10 tokens written and read, 2 x 48 numbers a layer
    assert cost.nbytes == 4 * (OPT_WEIGHTS + HEAD + 3 * (10 + 10) * 96)


@pytest.mark.skipif(find_compile_problem() is not None, reason=f"not compiled: {find_compile_problem()}")
@pytest.mark.skipif(packed_linear.find_packing_problem() is not None, reason="weights cannot be packed here")
def test_the_last_layer_of_fused_ones_attends_from_the_ends_of_prompts(tiny: Tiny) -> None:
    model = load_model(tiny("opt"), dtype="bfloat16", device="cpu", load_format="auto")
    ROUTES[model.kind].attach(model, pack=True)
    cost = count_architecture(model, model.dtype).prefill([(0, 10), (0, 10)], rows=2)
    behind = 48 * 48 + 2 * 48 * 96  # attention's output and the feed-forward matrices
    attention = (2 * (10 * 11 // 2) + 10) * 4 * 4 * 12  # positions seen in three layers x heads x head size
    assert cost.flops == 2 * (2 * OPT_WEIGHTS * 10 - 2 * behind * 9 + 2 * HEAD + attention)


def test_packed_prompts_share_the_weights_but_not_their_attention(tiny: Tiny) -> None:
    counted = count(tiny("opt"))
    alone, packed = counted.prefill([(0, 10)], rows=1), counted.prefill([(0, 10), (0, 10)], rows=2)
    assert packed.flops == 2 * alone.flops
    assert packed.nbytes == alone.nbytes + 4 * 3 * (10 + 10) * 96


def test_a_chunk_attends_to_what_came_before_it(tiny: Tiny) -> None:
    cost = count(tiny("opt")).prefill([(20, 5)], rows=1)
    seen = 21 + 22 + 23 + 24 + 25
    assert cost.flops == 2 * OPT_WEIGHTS * 5 + 2 * HEAD + 3 * 4 * seen * 48
    assert cost.nbytes == 4 * (OPT_WEIGHTS + HEAD + 3 * (25 + 5) * 96)


def test_a_decode_step_of_llama_with_grouped_heads(tiny: Tiny) -> None:
    counted = count(tiny("llama"))
    assert (counted.weights, counted.head) == (LLAMA_WEIGHTS, HEAD)
    cost = counted.decode([7, 100])
    assert cost.flops == 2 * (LLAMA_WEIGHTS + HEAD) * 2 + 3 * 4 * 107 * 4 * 12  # 4 query heads attend
    assert cost.nbytes == 4 * (LLAMA_WEIGHTS + HEAD + 3 * (107 + 2) * 2 * 2 * 12)  # 2 heads of K and V are read


def test_half_precision_halves_the_bytes_alone(tiny: Tiny) -> None:
    full, half = (count(tiny("llama"), dtype).decode([50]) for dtype in ("float32", "bfloat16"))
    assert (half.flops, half.nbytes * 2) == (full.flops, full.nbytes)


@pytest.mark.skipif(
    not packed_linear.supports_compression() or packed_linear.find_small_batch_problem() is not None,
    reason="this processor lacks the instructions, or oneDNN lays weights out otherwise",
)
def test_compressed_weights_are_fewer_bytes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_compressed_is_faster", lambda: True)
    model = load_model(tiny("opt"), dtype="bfloat16", device="cpu", load_format="auto")
    ROUTES[model.kind].attach(model, pack=True)
    plain = count_architecture(model, model.dtype)
    packed_linear.compress_linears(model.module)
    small = count_architecture(model, model.dtype)
    assert (plain.weight_bytes, small.weights) == (2, plain.weights)
    saved = (OPT_WEIGHTS + HEAD) * (2 - small.weight_bytes)
    assert plain.decode([7]).nbytes - small.decode([7]).nbytes == pytest.approx(saved)
    assert saved > 0


@pytest.mark.skipif(packed_linear.find_packing_problem() is not None, reason="this processor packs no weights")
def test_int8_weights_are_a_byte_each_with_their_padding_and_scales(tiny: Tiny) -> None:
    model = load_model(tiny("opt"), dtype="bfloat16", device="cpu", load_format="auto")
    ROUTES[model.kind].attach(model, pack=True)
    plain = count_architecture(model, model.dtype)
    quantise_linears(model.module)
    small = count_architecture(model, model.dtype)
    assert (small.weights, small.head, small.last_weights) == (plain.weights, plain.head, plain.last_weights)
    layers = [part for part in model.module.modules() if isinstance(part, Int8Linear)]
    nbytes = sum(each.packed.nbytes + 4 * (len(each.scales) + len(each.offsets)) for each in layers)
    assert small.weight_bytes * (small.weights + small.head) == pytest.approx(nbytes)
    assert small.prefill([(0, 10)], rows=1).flops == plain.prefill([(0, 10)], rows=1).flops


def test_a_sliding_window_limits_what_is_read(tiny: Tiny) -> None:
    counted = count(tiny("mistral"))  # window 9 in every layer
    assert [layer.seen_by(99) for layer in counted.layers] == [9, 9, 9]
    assert counted.layers[0].pairs(0, 20) == sum(min(position + 1, 9) for position in range(20))
    assert counted.layers[0].pairs(15, 5) == 5 * 9
    assert counted.decode([100]).nbytes == counted.decode([200]).nbytes


def test_layers_with_and_without_a_window_are_told_apart(tiny: Tiny) -> None:
    assert [layer.seen_by(99) for layer in count(tiny("gpt_oss")).layers] == [9, 100, 9]


def test_of_experts_only_the_active_ones_count(tiny: Tiny) -> None:
    counted = count(tiny("gpt_oss"))  # 4 experts, 2 a token
    one = 3 * 48 * 96  # gate and up, down
    assert sum(each.numbers for each in counted.experts) == 3 * 4 * one
    dense = 3 * (2 * 48 * 64 + 2 * 48 * 32 + 4 * 48)  # q, out of 4 heads of 16; k, v of 2; router
    assert counted.weights == dense
    assert counted.notes == ()
    per_token = 2 * (dense + 3 * 2 * one) + 2 * HEAD
    attention = 4 * 1 * 64 * 3
    assert counted.decode([1]).flops == per_token + attention


def test_more_tokens_touch_more_experts() -> None:
    weights = ExpertWeights(numbers=800, experts=8, active=2)
    assert weights.touched(1) == pytest.approx(200)
    assert weights.touched(2) == pytest.approx(800 * (1 - 0.75**2))
    assert weights.touched(1000) == pytest.approx(800)


def test_gpt2_keeps_its_products_in_transposed_layers(tiny: Tiny) -> None:
    assert count(tiny("gpt2")).weights == 3 * (48 * 144 + 48 * 48 + 2 * 48 * 192)


# hidden 48, 4 heads of 12, feed-forward 96; 3 layers in the encoder and 2 in the decoder
T5_SOURCE = 3 * (4 * 48 * 48 + 2 * 48 * 96) + 2 * 2 * 48 * 48  # the encoder; what makes K and V of its states
T5_ANSWER = 2 * (6 * 48 * 48 + 2 * 48 * 96)  # four matrices for the answer and two for the source; feed-forward


def test_what_passes_through_which_weights_of_an_encoder_decoder(tiny: Tiny) -> None:
    counted = count(tiny("t5"))
    assert isinstance(counted, EncoderDecoder)
    assert (counted.source_weights, counted.weights, counted.head) == (T5_SOURCE, T5_ANSWER, HEAD)
    assert (len(counted.encoder), len(counted.layers)) == (3, 2)


def test_a_source_is_encoded_and_read_by_the_first_token(tiny: Tiny) -> None:
    cost = count(tiny("t5")).prefill([(0, 10), (0, 20)], rows=2)
    encoder = 3 * 4 * (10 * 10 + 20 * 20) * 4 * 12  # layers x 4 x positions seen x heads x head size
    decoder = 2 * 4 * (11 + 21) * 4 * 12
    assert cost.flops == 2 * T5_SOURCE * 30 + 2 * (T5_ANSWER + HEAD) * 2 + encoder + decoder
    # all weights once; K and V of all tokens written and read
    assert cost.nbytes == 4 * (T5_SOURCE + T5_ANSWER + HEAD + 2 * 2 * (11 + 21) * 96)


def test_a_decode_step_of_an_encoder_decoder_uses_the_decoder_alone(tiny: Tiny) -> None:
    cost = count(tiny("t5")).decode([12, 30])
    assert cost.flops == 2 * (T5_ANSWER + HEAD) * 2 + 2 * 4 * 42 * 4 * 12
    assert cost.nbytes == 4 * (T5_ANSWER + HEAD + 2 * (42 + 2) * 96)
