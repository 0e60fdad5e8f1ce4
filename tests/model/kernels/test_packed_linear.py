"""Packed linear layers compute what the plain ones do, wherever their bytes lie."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from splitwiser import LLM, SamplingParams
from splitwiser.machine.shared_memory import SharedModule
from splitwiser.model.compatibility import attach_engine
from splitwiser.model.kernels import packed_linear as packed
from splitwiser.model.kernels.packed_linear import PackedLinear, pack_linears
from splitwiser.model.loading import load_model
from splitwiser.study.operations import count_architecture
from tests.support.tokens import LENGTHS, SERVED, prompts_of

needs_packing = pytest.mark.skipif(
    packed.find_packing_problem() is not None, reason=f"cannot pack: {packed.find_packing_problem()}"
)
needs_panels = pytest.mark.skipif(
    packed.find_small_batch_problem() is not None, reason=f"products of a few rows: {packed.find_small_batch_problem()}"
)
needs_compression = pytest.mark.skipif(
    not packed.supports_compression() or packed.find_small_batch_problem() is not None,
    reason="this processor lacks the instructions for compressed weights, or oneDNN lays weights out otherwise",
)
needs_small_batches = pytest.mark.skipif(
    packed.max_small_rows() == 0, reason="this processor has no products of bfloat16 pairs"
)


def linear(bias: bool = True, inputs: int = 48, outputs: int = 96) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16).requires_grad_(False)


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def assert_same(made: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(made, expected, atol=0.02, rtol=0.02)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 7, 48), (300, 48)])
def test_computes_what_the_linear_layer_does(shape: tuple[int, ...], bias: bool) -> None:
    plain = linear(bias)
    with torch.inference_mode():
        assert_same(PackedLinear(plain)(inputs(*shape)), plain(inputs(*shape)))


@needs_packing
@pytest.mark.parametrize("width", [64, 32, 96])
def test_inputs_of_another_width_are_refused(width: int) -> None:
    packed_layer = PackedLinear(linear())  # 48 inputs: 6 rows of 64 are as many numbers as 8 of 48
    with torch.inference_mode(), pytest.raises(RuntimeError):
        packed_layer(inputs(6, width))


@needs_packing
@needs_panels
@pytest.mark.parametrize("activation", [packed.IDENTITY, packed.RELU])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(64, 128), (48, 96), (40, 100), (576, 1), (2, 65)], ids=str)
def test_products_of_a_few_rows_are_those_of_many(
    sizes: tuple[int, int], bias: bool, activation: tuple[str, str]
) -> None:
    few = packed.max_small_rows()
    layer = PackedLinear(linear(bias, *sizes)).with_activation(activation)
    assert layer.struct is not None
    many, residual = inputs(few + 1, sizes[0]), inputs(few + 1, sizes[1])
    with torch.inference_mode():
        expected = layer(many)
        for rows in {*range(1, 14), few}:
            assert_same(layer(many[:rows]), expected[:rows])
            if activation == packed.IDENTITY:
                assert_same(layer.added_to(residual[:rows], many[:rows]), expected[:rows] + residual[:rows])


@needs_packing
@needs_panels
def test_products_of_a_few_rows_leave_onednns_as_they_are() -> None:
    """Both may shape the tiles of the same threads."""
    layer, many = PackedLinear(linear(True, 200, 300)), inputs(packed.max_small_rows() + 50, 200)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            few = layer(many[:3])
            expected = layer(many)
            assert torch.equal(layer(many[:3]), few)
            assert torch.equal(layer(many), expected)
    finally:
        torch.set_num_threads(threads)
    assert_same(few, expected[:3])


@needs_packing
@pytest.mark.parametrize("rows", [1, 100])
def test_activations_over_one_weight(rows: int) -> None:
    layer = PackedLinear(linear())
    functions = {packed.RELU: nn.ReLU(), ("gelu", "tanh"): nn.GELU(approximate="tanh"), packed.IDENTITY: nn.Identity()}
    with torch.inference_mode():
        plain = layer(inputs(rows, 48))
        for activation, function in functions.items():
            other = layer.with_activation(activation)
            assert other.packed.data_ptr() == layer.packed.data_ptr()
            assert_same(other(inputs(rows, 48)), function(plain))
        assert torch.equal(layer(inputs(rows, 48)), plain)


def laid_out(weight: torch.Tensor, panel: int, filled: int) -> torch.Tensor:
    """The bytes of ``weight`` in panels of ``panel`` outputs, its inputs filled up to ``filled``, with no numbers."""
    outputs, inputs = weight.shape
    panels = -(-outputs // panel)
    whole = torch.full((panels * panel, filled), float("nan"), dtype=torch.bfloat16)
    whole[:outputs, :inputs] = weight
    pairs = whole.view(panels, panel, filled // 2, 2).transpose(1, 2)
    return pairs.contiguous().view(-1).view(torch.uint8)


@pytest.fixture
def own_layout(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Linear, torch.Tensor], PackedLinear]:
    """Makes a packed layer of the bytes given, whose products of many rows are the plain layer's."""

    def make(plain: nn.Linear, lying: torch.Tensor) -> PackedLinear:
        def multiply(_: PackedLinear, rows: torch.Tensor, bare: bool = False) -> torch.Tensor:
            return rows @ plain.weight.T if bare else plain(rows)

        layer = PackedLinear(plain)
        layer.packed = lying
        monkeypatch.setattr(packed, "_PANELS", {})
        monkeypatch.setattr(packed, "open_packed", lambda *_: torch.empty(0))
        monkeypatch.setattr(PackedLinear, "_multiply", multiply)
        return layer

    return make


@needs_packing
@needs_small_batches
@pytest.mark.parametrize("filled", [40, 42, 64])
@pytest.mark.parametrize("panel", packed.PANELS)
def test_panels_of_other_widths_are_found_and_read(
    panel: int, filled: int, own_layout: Callable[[nn.Linear, torch.Tensor], PackedLinear]
) -> None:
    plain = linear(True, 40, 200)
    layer = own_layout(plain, laid_out(plain.weight, panel, filled))
    assert layer.struct is not None
    assert (layer.struct.panel, layer.struct.padded_inputs) == (panel, filled)
    few = packed.max_small_rows()
    many, residual = inputs(few, 40), inputs(few, 200)
    with torch.inference_mode():
        for rows in {*range(1, 14), few}:
            expected = plain(many[:rows])
            assert_same(layer(many[:rows]), expected)
            assert_same(layer.added_to(residual[:rows], many[:rows]), expected + residual[:rows])


@needs_packing
@needs_small_batches
def test_what_lies_otherwise_is_left_to_onednn(
    own_layout: Callable[[nn.Linear, torch.Tensor], PackedLinear],
) -> None:
    plain = linear()
    plain.bias.fill_(1000)  # beside which the products are as good as nothing
    layer = own_layout(plain, plain.weight.view(torch.uint8).view(-1))
    assert layer.struct is None
    with torch.inference_mode():
        assert_same(layer(inputs(1, 48)), plain(inputs(1, 48)))


@needs_packing
@needs_small_batches
def test_bytes_too_few_or_too_many_for_whole_panels_are_not_tried(
    own_layout: Callable[[nn.Linear, torch.Tensor], PackedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise AssertionError("it would read what is not there")

    plain = linear(True, 48, 64)
    monkeypatch.setattr(PackedLinear, "_multiply_small_batch", fail)
    for size in (64 * 46 * 2, 64 * 48 * 2 + 64):
        assert own_layout(plain, torch.ones(size, dtype=torch.uint8)).struct is None


@needs_packing
@needs_panels
def test_weights_of_zeros_decide_nothing_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_PANELS", {})
    plain = linear()
    layer = PackedLinear(plain)
    with torch.no_grad():
        plain.weight.zero_()
    assert PackedLinear(plain).struct is None
    assert layer.struct is not None


@pytest.mark.parametrize("problem", [None, "oneDNN uses another weight layout here"])
def test_a_run_says_what_computes_products_of_a_few_rows(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "find_small_batch_problem", lambda: problem)
    said = packed.describe()
    assert said.startswith("oneDNN's, weights packed once; products of small batches ")
    assert said.endswith(
        f"oneDNN's too ({problem})" if problem else f"layer.cpp's (up to {packed.max_small_rows()} rows)"
    )


@needs_packing
def test_another_layout_of_onednns_is_the_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_small_batch_functions", object)  # whatever this processor has
    monkeypatch.setattr(packed, "max_small_rows", lambda: 6)
    monkeypatch.setattr(PackedLinear, "_find_struct", lambda _: None)  # as with plain weights
    assert packed.find_small_batch_problem.__wrapped__() == "oneDNN uses another weight layout here"


@needs_packing
def test_reads_its_bytes_from_where_they_lie() -> None:
    plain = linear()
    layer = PackedLinear(plain)
    with torch.inference_mode():
        assert_same(layer(inputs(3, 48)), plain(inputs(3, 48)))
        layer.packed = layer.packed.clone()
        assert_same(layer(inputs(3, 48)), plain(inputs(3, 48)))
        layer.packed.zero_()
        assert_same(layer(inputs(3, 48)), plain.bias.expand(3, -1))


@needs_packing
def test_travels_in_shared_memory_and_counts_once() -> None:
    plain = linear()
    shared = SharedModule(nn.Sequential(PackedLinear(plain)), torch.device("cpu"))
    assert shared.memories[0].tensor.nbytes < 2 * plain.weight.nbytes
    opened = shared.open()
    with torch.inference_mode():
        assert_same(opened(inputs(3, 48)), plain(inputs(3, 48)))
        shared.memories[0].tensor.zero_()
        assert not opened(inputs(3, 48)).any()


@needs_packing
def test_a_pickled_layer_finds_its_own_bytes() -> None:
    plain = linear()
    layer = PackedLinear(plain)
    with torch.inference_mode():
        layer(inputs(1, 48))
        copied = pickle.loads(pickle.dumps(layer))
        layer.packed.zero_()
        assert_same(copied(inputs(3, 48)), plain(inputs(3, 48)))


@needs_packing
def test_the_weight_has_a_type_and_no_numbers() -> None:
    weight = PackedLinear(linear()).weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.bfloat16, (96, 48))
    assert bool(weight.isnan().all())


def compressed(plain: nn.Linear) -> PackedLinear:
    packed_layer = PackedLinear(plain)
    assert packed_layer.compress()
    return packed_layer


def patterns() -> torch.Tensor:
    """Each of the 65,536 patterns of bits: zeros, denormals, infinities and what is no number included."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)


def lay(layer: PackedLinear, weight: torch.Tensor) -> PackedLinear:
    """Give ``layer``, whose layout has been tried on other numbers, ``weight``."""
    assert layer.struct is not None
    layer.packed = laid_out(weight, layer.struct.panel, layer.struct.padded_inputs)
    return layer


def assert_widened(layer: PackedLinear) -> None:
    before = layer.packed
    assert layer.compress()
    layer._weight()
    assert torch.equal(packed._WIDENED.room[: before.nbytes], before)


@needs_compression
def test_each_pattern_of_bits_in_a_panel_of_16_high_bytes_is_compressed_and_widened() -> None:
    in_order = patterns().view(1024, 64)
    layer = lay(PackedLinear(linear(False, 64, 1024)), in_order)
    assert_widened(layer)
    assert layer.packed.nbytes < 0.77 * 2 * in_order.numel()


@needs_compression
def test_each_pattern_of_bits_among_all_others_is_compressed_and_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "COMPRESSED_AT_MOST", 2)
    mixed = patterns()[torch.randperm(2**16)].view(256, 256)
    assert_widened(lay(PackedLinear(linear(False, 256, 256)), mixed))


@needs_compression
@pytest.mark.parametrize("activation", [packed.IDENTITY, packed.RELU, ("gelu", "tanh")])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(64, 128), (48, 96), (40, 100), (576, 65)], ids=str)
def test_products_with_compressed_weights_are_the_same(
    sizes: tuple[int, int], bias: bool, activation: tuple[str, str]
) -> None:
    plain = linear(bias, *sizes)
    plain.weight[::5, 6] = 1e-30  # with an exponent that no other weight has
    layer, small = (each(plain).with_activation(activation) for each in (PackedLinear, compressed))
    many, residual = inputs(300, sizes[0]), inputs(300, sizes[1])
    with torch.inference_mode():
        for rows in (*range(1, 14), packed.max_small_rows(), 300):
            assert torch.equal(small(many[:rows]), layer(many[:rows]))
            if activation == packed.IDENTITY:
                expected = layer.added_to(residual[:rows], many[:rows])
                assert torch.equal(small.added_to(residual[:rows], many[:rows]), expected)
        assert torch.equal(small.unpacked(), plain.weight)


@needs_compression
def test_a_weight_of_too_many_exponents_stays_plain() -> None:
    layer = PackedLinear(linear())
    lay(layer, patterns()[torch.randperm(2**16)[: 48 * 96]].view(96, 48))
    before = layer.packed
    assert not layer.compress()
    assert layer.packed is before


@needs_compression
def test_a_compressed_weight_travels_in_shared_memory() -> None:
    plain = linear()
    opened = SharedModule(nn.Sequential(compressed(plain)), torch.device("cpu")).open()
    with torch.inference_mode():
        for rows in (3, 300):
            assert torch.equal(opened(inputs(rows, 48)), PackedLinear(plain)(inputs(rows, 48)))


@needs_compression
@pytest.mark.parametrize("faster", [True, False])
def test_weights_are_compressed_where_that_is_faster(faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedLinear(linear())
    plain = layer.packed.nbytes
    monkeypatch.setattr(packed, "_compressed_is_faster", lambda: faster)
    said = packed.compress_linears(nn.Sequential(layer))
    share = layer.packed.nbytes / plain
    expected = f"; 1 of 1 weights compressed without loss, all to {share:.1%} of their bytes"
    assert said == (expected if faster else "")
    assert (share < 1) == faster


@needs_small_batches
@needs_panels
@pytest.mark.parametrize(("onednn", "fast"), [(0.8, False), (0.95, True)])
def test_many_rows_are_left_to_onednn_where_it_is_faster(
    onednn: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(candidates: dict[str, Callable[[], list[torch.Tensor]]]) -> dict[str, float]:
        for whole, *chunks in zip(candidates["onednn"](), *[iter(candidates["chunks"]())] * 4, strict=True):
            assert_same(torch.cat(chunks), whole)
        return {"chunks": 1.0, "onednn": onednn}

    monkeypatch.setattr(packed, "max_small_rows", lambda: 128)
    monkeypatch.setattr(packed, "best_seconds", timed)
    assert packed._try_many_rows() is fast


@needs_small_batches
def test_many_rows_are_left_to_onednn_where_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "max_small_rows", lambda: 0)
    assert packed._try_many_rows() is False


@needs_packing
def test_only_bfloat16_linear_layers_are_packed() -> None:
    other = nn.Linear(8, 8)
    module = nn.Sequential(linear(), nn.Sequential(other, linear(False)), nn.Embedding(4, 8))
    pack_linears(module)
    assert isinstance(module[0], PackedLinear)
    assert isinstance(module.get_submodule("1.1"), PackedLinear)
    assert module.get_submodule("1.0") is other


@needs_packing
@pytest.mark.parametrize("name", SERVED)
def test_packing_changes_no_figure_of_the_architecture(name: str, tiny: Callable[[str], Path]) -> None:
    counts = []
    for pack in (False, True):
        model = load_model(tiny(name), dtype="bfloat16", device="cpu", load_format="auto")
        attach_engine(model, pack=pack)
        counted = count_architecture(model, model.dtype)
        counts.append((counted.weights, counted.head, model.parameters))
    assert counts[0] == counts[1]


@needs_packing
@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_all_placements_make_the_same_tokens(name: str, tiny: Callable[[str], Path]) -> None:
    prompts = prompts_of(LENGTHS, seed=8)
    made = []
    placements: list[dict[str, Any]] = [{}, {"mode": "mp"}]
    for settings in placements:
        with LLM(tiny(name), dtype="bfloat16", max_batch=1, prefill_tokens=512, **settings) as llm:
            assert llm.started.kernels["linear_layers"].startswith(packed.describe())
            outputs = [llm.generate([prompt], SamplingParams(max_tokens=12))[0] for prompt in prompts]
            made.append([output.token_ids for output in outputs])
    assert made[0] == made[1]


def test_plain_kernels_leave_the_layers_alone(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("llama"), dtype="bfloat16", kernels="plain") as llm:
        assert llm.started.kernels["linear_layers"] == "PyTorch's own (as asked for)"
        assert not any(isinstance(part, PackedLinear) for part in llm.model.module.modules())


def test_float32_is_not_packed(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("llama")) as llm:
        assert llm.started.kernels["linear_layers"] == "PyTorch's own (packing is for bfloat16 on a CPU)"
