"""Linear layers of a bfloat16 model on a CPU, with their weights packed once into the layout of oneDNN's matrix products.

PyTorch's own linear layer passes oneDNN the plain weights, which it converts in every call, and adds the bias in a separate
pass. A packed weight is bytes (:mod:`splitwiser.model.kernels.onednn`), so it can lie in memory that processes share, like
any other tensor.

Small batches are bound by reading the weights and by the overhead of a call. A compiled function of this project computes
them from the packed bytes, if these are shown to lie in the layout that it reads. Where that is faster, it reads compressed
weights (csrc/compressed.h) in their place, and these are widened before each product that is oneDNN's.
"""

import copy
import ctypes
import math
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn

from splitwiser.machine.pages import return_freed_memory
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.onednn import open_packed, pack_weight
from splitwiser.model.kernels.tile_trials import (
    ALL_ROWS,
    TRIED_ROWS,
    best_seconds,
    last_row_count,
    remembered_trial,
    rows_by_dots,
)

IDENTITY, RELU = ("none", ""), ("relu", "")
PANELS = (64, 32, 48, 16)  # outputs per panel: of AVX-512, of AMX, and what else oneDNN has kernels for
TRIED_SIZES = 1024, 2048  # inputs and outputs of each layer of a trial
TRIED_BYTES = 64 << 20  # of all their weights
MANY_ROWS, MANY_LAYERS = 512, 4  # of the trial of products of many rows
# a product of this project's that takes so many times as long as oneDNN's is the better one: it saves calls
WORTH_FEWER_CALLS = 1.1
COMPRESSED_AT_MOST = 0.9  # of a weight's bytes; where exponents take so many values that it needs more, it stays plain


class LinearStruct(ctypes.Structure):
    """A layer as csrc/linear.h's ``Linear``: addresses of its weight, its bias (0: none) and, of an int8 weight, its scales
    and offsets, its sizes, the outputs per panel of its weight, its inputs with their padding, up to how many rows are
    left to dot products where there are AMX tiles, and whether its weight is compressed."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("packed", "bias", "scales", "offsets")),
        ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("relu", ctypes.c_int64),
        ("panel", ctypes.c_int64), ("padded_inputs", ctypes.c_int64), ("dot_rows", ctypes.c_int64),
        ("compressed", ctypes.c_int64),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A packed weight at the address where it lies: as oneDNN's tensor, and for small batches (None: oneDNN computes these
    too)."""

    address: int
    weight: Tensor
    struct: LinearStruct | None


class PackedLinear(nn.Module):
    """A linear layer that computes the same as ``linear``, which holds bfloat16 weights on a CPU, from a packed copy of its
    weight.

    ``packed`` is that copy as bytes. ``weight`` has the shape and dtype of the weight but no numbers, since some models read
    its dtype. ``activation`` is applied to the output: oneDNN's name of a function, and which form of it ("" if there is
    only one). ``compressions`` counts the weights that were compressed in this process: these move one by one, all others
    together.
    """

    compressions: ClassVar[int] = 0
    packed: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.activation = IDENTITY
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed, self._layout = pack_weight(linear.weight.detach())
        self.register_buffer("packed", packed)
        self.bias = linear.bias
        self._plain_nbytes: int | None = None  # of a compressed weight, as oneDNN takes it
        self._opened: _Opened | None = None

    def with_activation(self, activation: tuple[str, str]) -> "PackedLinear":
        """Return a layer over the same packed weight with another ``activation``."""
        layer = copy.copy(self)
        layer._buffers = self._buffers.copy()
        layer.activation = activation
        return layer

    @property
    def weight(self) -> Tensor:
        """A tensor of the weight's shape and dtype, filled with not-a-number."""
        return torch.full((), float("nan"), dtype=torch.bfloat16).expand(self.out_features, self.in_features)

    def unpacked(self) -> Tensor:
        """Return the weight as it was, (out features, in features)."""
        plain: Tensor = self._weight().to_dense()
        return plain

    def compress(self) -> bool:
        """Keep the weight compressed without loss, if that saves memory; returns whether it does."""
        functions, struct = _small_batch_functions(), self._open().struct
        if functions is None or struct is None or struct.panel != PANELS[0] or self._plain_nbytes is not None:
            return False
        sizes = _panels_and_pairs(struct)
        room = torch.empty(int(COMPRESSED_AT_MOST * self.packed.nbytes), dtype=torch.uint8)
        if size := functions.compress(struct.packed, *sizes, room.data_ptr(), room.nbytes):
            self._plain_nbytes, self.packed, self._opened = self.packed.nbytes, room[:size].clone(), None
            PackedLinear.compressions += 1
        return bool(size)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features)."""
        struct = self._small_batch_struct(inputs)
        return self._multiply_small_batch(struct, inputs) if struct else self._multiply(inputs)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """Return ``residual``, shape (..., out features), plus the output without an activation, rounded once."""
        if struct := self._small_batch_struct(inputs):
            return self._multiply_small_batch(struct, inputs, residual)
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self._weight(), self.bias, "add")
        return total

    @property
    def struct(self) -> LinearStruct | None:
        """The layer for small batches, of :func:`max_small_rows` rows at most; None if oneDNN computes these too."""
        struct = self._open().struct
        if struct:
            struct.dot_rows, _ = _row_limits()
        return struct

    def _multiply(self, inputs: Tensor, bare: bool = False) -> Tensor:
        """Compute the output with oneDNN; if ``bare``, without bias and activation."""
        bias, (name, form) = (None, IDENTITY) if bare else (self.bias, self.activation)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight(), bias, name, [], form)
        return output

    def _small_batch_struct(self, inputs: Tensor) -> LinearStruct | None:
        """The layer for small batches if ``inputs`` are one, else None."""
        # what is of another width or type is oneDNN's to refuse
        fits = inputs.shape[-1] == self.in_features and inputs.dtype == torch.bfloat16
        return self.struct if fits and inputs.numel() <= max_small_rows() * self.in_features else None

    def _multiply_small_batch(self, struct: LinearStruct, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        inputs = inputs.contiguous()
        residual = None if residual is None else residual.contiguous()
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        functions = _small_batch_functions()
        assert functions is not None
        functions.multiply_small_batch(
            ctypes.byref(struct), inputs.data_ptr(), None if residual is None else residual.data_ptr(),
            output.data_ptr(), inputs.numel() // self.in_features, torch.get_num_threads(),
        )  # fmt: skip
        return output

    def _weight(self) -> Tensor:
        """Return the weight as oneDNN's tensor. A compressed one is widened into memory of the calling thread, where it lies
        until the next one is."""
        if self._plain_nbytes is None:
            return self._open().weight
        functions, struct = _small_batch_functions(), self._struct_of(PANELS[0])
        assert functions is not None
        assert struct is not None
        room = _widened_room(self._plain_nbytes)
        functions.widen(struct.packed, *_panels_and_pairs(struct), room, torch.get_num_threads())
        return open_packed(room, (self.out_features, self.in_features), self._layout, torch.bfloat16)

    def _open(self) -> _Opened:
        """Return the packed weight, opened anew if ``packed`` has moved."""
        address = self.packed.data_ptr()
        if self._opened is None or self._opened.address != address:
            weight = open_packed(address, (self.out_features, self.in_features), self._layout, torch.bfloat16)
            self._opened = _Opened(address, weight, None)
            if struct := self._find_struct():
                self._opened = _Opened(address, weight, struct)
        return self._opened

    def _find_struct(self) -> LinearStruct | None:
        """Return the layer with the panel width for which the function for small batches is shown to compute the same as
        oneDNN, tried once per layout; None if there is no such width."""
        if _small_batch_functions() is None or self.in_features % 2 or self.activation not in (IDENTITY, RELU):
            return None
        if self._plain_nbytes is not None:
            return self._struct_of(PANELS[0])
        case = (self._layout, self.out_features, self.in_features)
        if case not in _PANELS:
            if not self.packed.any():  # zeros would show nothing
                return None
            _PANELS[case] = next(filter(self._lies_in_panels, PANELS), None)
        panel = _PANELS[case]
        return None if panel is None else self._struct_of(panel)

    def _struct_of(self, panel: int) -> LinearStruct | None:
        """Return the layer as if its weight lay in panels of ``panel`` outputs; None if its size rules that out."""
        padded_inputs, rest = divmod(
            self._plain_nbytes or self.packed.nbytes, 2 * panel * -(-self.out_features // panel)
        )
        if rest or padded_inputs % 2 or padded_inputs < self.in_features:
            return None
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = self.in_features, self.out_features, self.activation == RELU, panel, padded_inputs
        return LinearStruct(self.packed.data_ptr(), bias, None, None, *sizes, ALL_ROWS, self._plain_nbytes is not None)

    def _lies_in_panels(self, panel: int) -> bool:
        """Whether the weight, read in panels of ``panel`` outputs, gives oneDNN's product. Compared without bias and
        activation, which could hide a difference."""
        struct = self._struct_of(panel)
        if struct is None:
            return False
        struct.bias, struct.relu = None, False
        inputs = torch.linspace(-9, 9, 2 * self.in_features).sin().bfloat16().view(2, self.in_features)
        with torch.inference_mode():
            expected = self._multiply(inputs, bare=True).float()
            output = self._multiply_small_batch(struct, inputs).float()
        return torch.allclose(output, expected, rtol=1 / 64, atol=float(expected.square().mean().sqrt()) / 64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # an address is meaningless in another process


_PANELS: dict[tuple[bytes, int, int], int | None] = {}
_WIDENED = threading.local()


def _panels_and_pairs(struct: LinearStruct) -> tuple[int, int]:
    return -(-struct.outputs // struct.panel), struct.padded_inputs // 2


def _widened_room(nbytes: int) -> int:
    """Return the address of memory of the calling thread for a plain weight of ``nbytes`` bytes."""
    room: Tensor | None = getattr(_WIDENED, "room", None)
    if room is None or room.nbytes < nbytes:
        room = _WIDENED.room = torch.empty(nbytes, dtype=torch.uint8)
    return room.data_ptr()


def is_packable(module: object) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a plain linear layer that holds bfloat16 weights on a CPU."""
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def pack_linears(module: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """Replace every linear layer in ``module`` that holds bfloat16 weights on a CPU by a packed one, except those to
    ``keep``, one after another, so that there are never two copies of all weights. A weight that is also an embedding is
    kept there as well."""
    for name, child in list(module.named_children()):
        if is_packable(child) and child not in keep:
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child, keep)


def compress_linears(module: nn.Module) -> str:
    """Compress the weight of every :class:`PackedLinear` in ``module`` for which that saves memory, one after another, where
    products of a few rows are faster so; returns a clause for a run's record, empty if there are none."""
    layers = [each for each in module.modules() if isinstance(each, PackedLinear)]
    count = sum(each.compress() for each in layers) if supports_compression() and _compressed_is_faster() else 0
    if not count:
        return ""
    return_freed_memory()
    share = compressed_share(module)
    return f"; {count} of {len(layers)} weights compressed without loss, all to {share:.1%} of their bytes"


def compressed_share(module: nn.Module) -> float:
    """Return the bytes of all packed weights in ``module`` over those that they have without compression; 1 if there are
    none."""
    layers = [each for each in module.modules() if isinstance(each, PackedLinear)]
    plain = sum(each._plain_nbytes or each.packed.nbytes for each in layers)
    return sum(each.packed.nbytes for each in layers) / plain if plain else 1.0


@cache
def _compressed_is_faster() -> bool:
    """Whether products of one row take less time with compressed weights, which are supported."""
    functions = _small_batch_functions()
    assert functions is not None
    return bool(remembered_trial(functions, "compressed", _try_compressed))


def supports_compression() -> bool:
    """Whether this processor has the instructions for compressed weights, and no AMX tiles: these read plain ones."""
    functions = _small_batch_functions()
    return bool(functions and functions.supports_compressed() and not functions.may_use_tiles())


def _try_compressed() -> bool:
    layers = {"plain": layers_for_trial(), "compressed": layers_for_trial()}
    if not all(each.compress() for each in layers["compressed"]):
        return False
    inputs = torch.linspace(-9, 9, TRIED_SIZES[0]).sin().bfloat16().view(1, -1)

    def multiply(name: str) -> list[Tensor]:
        return [layer(inputs) for layer in layers[name]]

    with torch.inference_mode():
        times = best_seconds({name: partial(multiply, name) for name in layers})
    return times["compressed"] < times["plain"]


@cache
def find_packing_problem() -> str | None:
    """Return why weights cannot be packed on this machine, in one line; None if they can, which is tried on a small
    layer."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN does not support bfloat16 here"
    try:
        linear = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
        inputs = torch.linspace(-1, 1, 128, dtype=torch.bfloat16).view(2, 64)
        with torch.inference_mode():
            wrong = not torch.allclose(PackedLinear(linear)(inputs), linear(inputs), atol=0.02)
    except (RuntimeError, AttributeError, OSError) as error:
        return f"PyTorch {torch.__version__} cannot: {type(error).__name__}"
    return "a packed layer gives a different result" if wrong else None


@cache
def max_small_rows() -> int:
    """Return the largest number of rows in a small batch; 0 without a compiled function for small batches."""
    return _row_limits()[1]


@cache
def is_fast_for_many_rows() -> bool:
    """Whether the compiled products of small batches are as fast as oneDNN's for many rows in chunks. They are on processors
    without AMX tiles; with them it is tried."""
    functions = _small_batch_functions()
    if functions is None or not functions.may_use_tiles():
        return functions is not None
    return bool(remembered_trial(functions, "many rows", _try_many_rows))


def _try_many_rows() -> bool:
    if not max_small_rows() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    layers = layers_for_trial()[:MANY_LAYERS]
    if not all(layer.struct for layer in layers):
        return False
    inputs = torch.linspace(-9, 9, MANY_ROWS * TRIED_SIZES[0]).sin().bfloat16().view(MANY_ROWS, -1)

    def multiply_in_chunks() -> list[Tensor]:
        return [layer(chunk) for layer in layers for chunk in inputs.split(max_small_rows())]

    with torch.inference_mode():
        times = best_seconds(
            {"chunks": multiply_in_chunks, "onednn": lambda: [layer._multiply(inputs) for layer in layers]}
        )
    return times["chunks"] <= WORTH_FEWER_CALLS * times["onednn"]


@cache
def _row_limits() -> tuple[int, int]:
    """Return up to how many rows products are left to dot products, and the largest number of rows in a small batch. Where a
    processor has AMX tiles, both are tried."""
    functions = _small_batch_functions()
    if functions is None:
        return ALL_ROWS, 0
    if not functions.may_use_tiles():
        return ALL_ROWS, int(functions.max_small_rows())
    dot_rows, rows = cast("list[int]", remembered_trial(functions, "products", partial(_try_rows, functions)))
    return dot_rows, rows


def _try_rows(functions: ctypes.CDLL) -> tuple[int, int]:
    """Time products of various numbers of rows by dot products, by tiles and by oneDNN."""
    most = int(functions.max_small_rows())
    layers = layers_for_trial() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    structs = [struct for layer in layers if (struct := layer._open().struct)]
    if not structs:
        return ALL_ROWS, most

    def multiply(name: str, inputs: Tensor) -> list[Tensor]:
        if name == "onednn":
            return [layer._multiply(inputs) for layer in layers]
        for struct in structs:
            struct.dot_rows = ALL_ROWS if name == "dots" else 0
        pairs = zip(layers, structs, strict=True)
        return [layer._multiply_small_batch(struct, inputs) for layer, struct in pairs]

    times = {}
    with torch.inference_mode():
        for rows in (each for each in TRIED_ROWS if each <= most):
            inputs = torch.linspace(-9, 9, rows * TRIED_SIZES[0]).sin().bfloat16().view(rows, -1)
            candidates = {name: partial(multiply, name, inputs) for name in ("dots", "tiles", "onednn")}
            (dots, *_), (tiles, *_) = candidates["dots"](), candidates["tiles"]()
            if not torch.allclose(tiles, dots, atol=1 / 64, rtol=1 / 64):
                del candidates["tiles"]
            times[rows] = {"tiles": math.inf, **best_seconds(candidates)}
    small = last_row_count(times, lambda each: min(each["dots"], each["tiles"]) <= WORTH_FEWER_CALLS * each["onednn"])
    return rows_by_dots(times), small


def layers_for_trial() -> list[PackedLinear]:
    """Return layers with equal weights, which together do not fit a processor's caches, as those of a model do not."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(*TRIED_SIZES, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / TRIED_SIZES[0] ** 0.5)
    layers = [PackedLinear(linear)]
    for _ in range(1, TRIED_BYTES // layers[0].packed.nbytes):
        layers.append(layers[0].with_activation(IDENTITY))
        layers[-1].packed = layers[0].packed.clone()
    return layers


@cache
def find_small_batch_problem() -> str | None:
    """Return why oneDNN computes small batches too, in a few words; None if the function for them reads oneDNN's layout,
    which is tried on a small layer. It does not if oneDNN leaves weights plain, on processors without bfloat16 products."""
    if problem := find_packing_problem():
        return problem
    if _small_batch_functions() is None:
        return "this processor lacks the instructions for them"
    if max_small_rows() == 0:
        return "it was faster in a trial"
    linear = nn.Linear(64, 128, dtype=torch.bfloat16).requires_grad_(False)
    return None if PackedLinear(linear).struct else "oneDNN uses another weight layout here"


def describe() -> str:
    """Return what computes packed layers, for a run's record."""
    problem = find_small_batch_problem()
    small = (
        f"oneDNN's too ({problem})" if problem else f"layer.cpp's (up to {max_small_rows()} rows{_describe_tiles()})"
    )
    return f"oneDNN's, weights packed once; products of small batches {small}"


def _describe_tiles() -> str:
    dot_rows, rows = _row_limits()
    return f", in AMX tiles from {dot_rows + 1} on" if dot_rows < rows else ""


@cache
def _small_batch_functions() -> ctypes.CDLL | None:
    """Return the functions of csrc/layer.cpp; None if they cannot be compiled or this processor lacks their
    instructions."""
    library, _ = load_native()
    if library is None or library.max_small_rows() == 0:
        return None
    return library
