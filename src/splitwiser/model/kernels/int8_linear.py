"""Linear layers with int8 weights on a CPU: each weight is a whole number times a scale of its output, and each input one
times a scale of its row, found when the layer runs (dynamic quantisation by output channel and by token, as LLM.int8(),
Dettmers et al. 2022, has it, without its outliers).

csrc/int8.cpp computes them where the processor has the instructions; elsewhere PyTorch's product of int8 matrices does, with
the same numbers.
"""

import ctypes
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, silu

from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.packed_linear import IDENTITY, RELU, LinearStruct, PackedLinear, layers_for_trial
from splitwiser.model.kernels.tile_trials import ALL_ROWS, TRIED_ROWS, best_seconds, remembered_trial, rows_by_dots

LARGEST = 127  # so that a number and its negative are rounded alike
PANEL, QUAD = 64, 4  # outputs and inputs that csrc/int8.cpp reads together
TILE_INPUTS = 64  # inputs of an AMX tile, to whole numbers of which they are padded
_ACTIVATIONS = {("gelu", "none"): gelu, ("gelu", "tanh"): lambda x: gelu(x, approximate="tanh"), ("swish", ""): silu}


class Int8Linear(nn.Module):
    """A linear layer that computes what ``packed`` does, from int8 weights.

    The buffer ``packed`` holds the weights, int8, padded with zeros, in the panels that csrc/int8.cpp reads or, without it,
    in shape (outputs, inputs); ``scales`` (float32) and ``offsets`` (int32) have a number for each output. ``weight`` has
    the shape and dtype of the weight but no numbers, since some models read its dtype.
    """

    packed: Tensor
    scales: Tensor
    offsets: Tensor

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.activation, self.bias = packed.activation, packed.bias
        self.in_features, self.out_features = packed.in_features, packed.out_features
        self.padded_inputs = -(-self.in_features // TILE_INPUTS) * TILE_INPUTS
        missing = -self.out_features % PANEL
        weight, scales = quantise(packed.unpacked())
        weight = pad(weight, (0, self.padded_inputs - self.in_features, 0, missing))
        sums = weight.sum(dim=1, dtype=torch.int32)
        if _functions():
            weight = weight.view(-1, PANEL, self.padded_inputs // QUAD, QUAD).transpose(1, 2).contiguous()
        self.register_buffer("packed", weight)
        self.register_buffer("scales", pad(scales, (0, missing)))
        self.register_buffer("offsets", sums * (LARGEST + 1))
        self._struct: tuple[int, LinearStruct] | None = None  # and the address of the weights that it holds for

    @property
    def weight(self) -> Tensor:
        """A tensor of the weight's shape and dtype, filled with not-a-number."""
        return torch.full((), float("nan"), dtype=torch.bfloat16).expand(self.out_features, self.in_features)

    @property
    def struct(self) -> LinearStruct | None:
        """The layer for a product of a few rows within a larger function; None without the compiled product, or if its
        activation is not one that it computes."""
        address = self.packed.data_ptr()
        if not _functions() or self.activation not in (IDENTITY, RELU):
            return None
        if self._struct is None or self._struct[0] != address:
            self._struct = address, self._make_struct(self.activation == RELU)
        return self._struct[1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features)."""
        output = self._multiply(inputs, None)
        function = _ACTIVATIONS.get(self.activation)
        return output if function is None else function(output)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """Return ``residual``, shape (..., out features), plus the output without an activation, rounded once."""
        return self._multiply(inputs, residual)

    def _multiply(self, inputs: Tensor, residual: Tensor | None) -> Tensor:
        """Return the output, with ``relu`` but no other activation, plus ``residual``.

        Raises :class:`RuntimeError` for inputs of another width."""
        if inputs.shape[-1] != self.in_features:
            raise RuntimeError(f"inputs have width {inputs.shape[-1]}, and the layer has {self.in_features}")
        inputs = inputs.contiguous()
        functions = _functions()
        if functions is None:
            return self._multiply_plainly(inputs, residual)
        residual = None if residual is None else residual.contiguous()
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        struct = self.struct or self._make_struct(relu=False)
        _call(functions, struct, inputs, residual, output)
        return output

    def _multiply_plainly(self, inputs: Tensor, residual: Tensor | None) -> Tensor:
        rows, row_scales = quantise(inputs.view(-1, self.in_features))
        sums = torch._int_mm(rows, self.packed[: self.out_features, : self.in_features].t())
        output = sums * (row_scales[:, None] * self.scales[: self.out_features])
        output = output.view(*inputs.shape[:-1], self.out_features)
        for each in (self.bias, residual):
            output = output if each is None else output + each
        return (output.relu() if self.activation == RELU else output).to(inputs.dtype)

    def _make_struct(self, relu: bool, dot_rows: int | None = None) -> LinearStruct:
        dot_rows = _dot_rows() if dot_rows is None else dot_rows
        bias = None if self.bias is None else self.bias.data_ptr()
        return LinearStruct(
            self.packed.data_ptr(), bias, self.scales.data_ptr(), self.offsets.data_ptr(),
            self.in_features, self.out_features, relu, PANEL, self.padded_inputs, dot_rows,
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_struct": None}  # an address is meaningless in another process


def quantise(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``numbers``, (rows, width), as int8 from -127 to 127, and the scale of each row (float32, (rows,))."""
    largest = numbers.abs().amax(dim=-1).float()
    factors = torch.where(largest > 0, largest.new_tensor(LARGEST) / largest, 0.0)
    return (numbers.float() * factors[:, None]).round().to(torch.int8), largest / LARGEST


def quantise_linears(module: nn.Module) -> int:
    """Replace every :class:`PackedLinear` in ``module`` by a layer of int8 weights, one after another, so that there are
    never two copies of all weights. Returns their number."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, PackedLinear):
            setattr(module, name, Int8Linear(child))
            count += 1
        else:
            count += quantise_linears(child)
    return count


def describe() -> str:
    """Return what computes layers of int8 weights, for a run's record."""
    if not _functions():
        return "torch._int_mm's"
    return "int8.cpp's" + (f" (in AMX tiles from {_dot_rows() + 1} rows on)" if _dot_rows() < ALL_ROWS else "")


@cache
def _dot_rows() -> int:
    """Return up to how many rows products are left to dot products, which is tried where a processor has AMX tiles."""
    functions = _functions()
    if functions is None or not functions.may_use_tiles():
        return ALL_ROWS
    return cast("int", remembered_trial(functions, "int8 products", partial(_try_rows, functions)))


def _try_rows(functions: ctypes.CDLL) -> int:
    layers = [Int8Linear(each) for each in layers_for_trial()]
    structs = {
        name: [layer._make_struct(relu=False, dot_rows=dot_rows) for layer in layers]
        for name, dot_rows in (("dots", ALL_ROWS), ("tiles", 0))
    }
    times = {}
    for rows in TRIED_ROWS:
        inputs = torch.linspace(-9, 9, rows * layers[0].in_features).sin().bfloat16().view(rows, -1)
        outputs = {name: inputs.new_empty(rows, layers[0].out_features) for name in structs}

        def run(name: str, inputs: Tensor = inputs, outputs: dict[str, Tensor] = outputs) -> None:
            for struct in structs[name]:
                _call(functions, struct, inputs, None, outputs[name])

        times[rows] = best_seconds({name: partial(run, name) for name in structs})
        if not torch.equal(outputs["tiles"], outputs["dots"]):
            return ALL_ROWS
    return rows_by_dots(times)


def _call(
    functions: ctypes.CDLL, struct: LinearStruct, inputs: Tensor, residual: Tensor | None, output: Tensor
) -> None:
    functions.multiply_int8(
        ctypes.byref(struct), inputs.data_ptr(), None if residual is None else residual.data_ptr(),
        output.data_ptr(), inputs.numel() // struct.inputs, torch.get_num_threads(),
    )  # fmt: skip


@cache
def _functions() -> ctypes.CDLL | None:
    """Return the functions of csrc/int8.cpp; None if they cannot be compiled or this processor lacks their instructions."""
    library, _ = load_native()
    return library if library is not None and library.supports_int8() else None
