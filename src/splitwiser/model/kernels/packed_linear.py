"""Linear layers of a bfloat16 model on a CPU, with their weights laid out once as oneDNN's matrix products want them.

PyTorch's own linear layer hands oneDNN the plain weights, which it lays out anew in every call, and writes the bias in a
pass of its own. A packed weight is bytes in a layout of oneDNN's choosing, so it can lie in memory that processes share,
like any other tensor; PyTorch opens it there through the C interface that its ahead-of-time compiler uses for the same.

Products of a few rows are bound by the reading of the weights, and by what a call costs. They are computed by a function of
our own, which reads the packed bytes, where these are shown to lie as it expects them.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from splitwiser.model.kernels.build import load_native

RELU = ("relu", "")
PANELS = (64, 32, 48, 16)  # outputs of a panel: of AVX-512, of AMX, and what else oneDNN has kernels for


class Product(ctypes.Structure):
    """A packed layer as csrc/layer.cpp takes it: addresses of its weight and bias (0: none), its sizes, and how the
    weight lies: in panels of so many outputs, its inputs filled up to so many."""

    _fields_: ClassVar = [
        ("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64), ("outputs", ctypes.c_int64), ("relu", ctypes.c_int64),
        ("panel", ctypes.c_int64), ("filled", ctypes.c_int64),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """A packed weight where it lies: as oneDNN's tensor, and with an activation for products of a few rows (None: these are
    oneDNN's, too)."""

    address: int
    activation: tuple[str, str]
    weight: Tensor
    product: Product | None


class PackedLinear(nn.Module):
    """Computes what ``linear``, which holds bfloat16 weights on a CPU, does, from a packed copy of its weight.

    ``packed`` is that copy as bytes; ``weight`` has the shape and type of the weight and no numbers, since some models ask
    for its type. ``activation`` is oneDNN's name of a function of the output, and which form of it ("" where it has one); it
    may be set anew.
    """

    packed: Tensor

    def __init__(self, linear: nn.Linear, activation: tuple[str, str] = ("none", "")) -> None:
        super().__init__()
        self.activation = activation
        self.in_features, self.out_features = linear.in_features, linear.out_features
        opaque = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._layout = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(opaque).tolist())
        self.register_buffer("packed", _bytes_of(opaque))
        self.bias = linear.bias
        self._opened: _Opened | None = None

    @property
    def weight(self) -> Tensor:
        """A tensor of the weight's shape and type that says not-a-number everywhere."""
        return torch.full((), float("nan"), dtype=torch.bfloat16).expand(self.out_features, self.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Shape (..., in features) to (..., out features)."""
        product = self._few(inputs)
        return self._multiply_few(product, inputs) if product else self._multiply(inputs)

    def added_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual``, shape (..., out features), plus the product, which has no activation; rounded once."""
        if product := self._few(inputs):
            return self._multiply_few(product, inputs, residual)
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            inputs, residual, self._open().weight, self.bias, "add"
        )
        return total

    @property
    def product(self) -> Product | None:
        """The layer for products of a few rows, :func:`most_few` at most; None where oneDNN does these too."""
        return self._open().product

    def _multiply(self, inputs: Tensor, bare: bool = False) -> Tensor:
        """oneDNN's product; ``bare``: without bias and activation."""
        bias, (name, form) = (None, ("none", "")) if bare else (self.bias, self.activation)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._open().weight, bias, name, [], form)
        return output

    def _few(self, inputs: Tensor) -> Product | None:
        """The layer for a product of a few rows, if that is what ``inputs`` ask for."""
        few = inputs.numel() <= most_few() * self.in_features and inputs.dtype == torch.bfloat16
        return self._open().product if few else None

    def _multiply_few(self, product: Product, inputs: Tensor, residual: Tensor | None = None) -> Tensor:
        inputs = inputs.contiguous()
        residual = None if residual is None else residual.contiguous()
        output = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        functions = _few_functions()
        assert functions is not None
        functions.multiply_few(
            ctypes.byref(product), inputs.data_ptr(), None if residual is None else residual.data_ptr(),
            output.data_ptr(), inputs.numel() // self.in_features, torch.get_num_threads(),
        )  # fmt: skip
        return output

    def _open(self) -> _Opened:
        """The packed weight over wherever ``packed`` lies now."""
        address = self.packed.data_ptr()
        if self._opened is None or (self._opened.address, self._opened.activation) != (address, self.activation):
            weight = _open_at(address, (self.out_features, self.in_features), self._layout)
            self._opened = _Opened(address, self.activation, weight, None)
            if product := self._find_product():
                self._opened = _Opened(address, self.activation, weight, product)
        return self._opened

    def _find_product(self) -> Product | None:
        """The layer as the function for a few rows reads it: in the panels with which that one is shown to compute what
        oneDNN does, tried out once for every layout. None if there are none."""
        if most_few() == 0 or self.in_features % 2 or self.activation not in (("none", ""), RELU):
            return None
        case = (self._layout, self.out_features, self.in_features)
        if case not in _PANELS:
            if not self.packed.any():  # zeros would show nothing
                return None
            _PANELS[case] = next(filter(self._lies_in, PANELS), None)
        panel = _PANELS[case]
        return None if panel is None else self._in_panels(panel)

    def _in_panels(self, panel: int) -> Product | None:
        """The layer as it lies if it lies in panels of ``panel`` outputs; None if those would not be as many bytes."""
        filled, rest = divmod(self.packed.nbytes, 2 * panel * -(-self.out_features // panel))
        if rest or filled % 2 or filled < self.in_features:
            return None
        bias = None if self.bias is None else self.bias.data_ptr()
        sizes = self.in_features, self.out_features, self.activation == RELU, panel, filled
        return Product(self.packed.data_ptr(), bias, *sizes)

    def _lies_in(self, panel: int) -> bool:
        """Whether, read so, the weight gives oneDNN's product, without what might hide that it does not."""
        product = self._in_panels(panel)
        if product is None:
            return False
        product.bias, product.relu = None, False
        inputs = torch.linspace(-9, 9, 2 * self.in_features).sin().bfloat16().view(2, self.in_features)
        with torch.inference_mode():
            expected, made = self._multiply(inputs, bare=True).float(), self._multiply_few(product, inputs).float()
        return torch.allclose(made, expected, rtol=1 / 64, atol=float(expected.square().mean().sqrt()) / 64)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # an address means nothing to another process


_PANELS: dict[tuple[bytes, int, int], int | None] = {}


def is_packable(module: object) -> TypeGuard[nn.Linear]:
    """Whether ``module`` is a plain linear layer that holds bfloat16 weights on a CPU."""
    return type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.device.type == "cpu"


def pack_linears(module: nn.Module) -> None:
    """Replace every linear layer in ``module`` that holds bfloat16 weights on a CPU by a packed one, one after another, so
    that a second copy of the weights never exists as a whole. A weight that is also an embedding stays there as well."""
    for name, child in list(module.named_children()):
        if is_packable(child):
            setattr(module, name, PackedLinear(child))
        else:
            pack_linears(child)


@cache
def find_problem() -> str | None:
    """Why weights cannot be packed here, in a line; None if they can, which is tried out on a small layer."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 here"
    try:
        linear = nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False)
        inputs = torch.linspace(-1, 1, 128, dtype=torch.bfloat16).view(2, 64)
        with torch.inference_mode():
            wrong = not torch.allclose(PackedLinear(linear)(inputs), linear(inputs), atol=0.02)
    except (RuntimeError, AttributeError, OSError) as error:
        return f"PyTorch {torch.__version__} cannot: {type(error).__name__}"
    return "a packed layer computes something else" if wrong else None


@cache
def most_few() -> int:
    """The most rows of a product that counts as one of few; 0 where there is no function for them."""
    functions = _few_functions()
    return int(functions.most_few()) if functions else 0


@cache
def find_few_problem() -> str | None:
    """Why products of a few rows are oneDNN's too, in a few words; None if the function for them reads what oneDNN packs,
    which is tried out on a small layer. It does not where oneDNN leaves them plain, without products of bfloat16 pairs."""
    if problem := find_problem():
        return problem
    if most_few() == 0:
        return "this processor has no function for them"
    linear = nn.Linear(64, 128, dtype=torch.bfloat16).requires_grad_(False)
    return None if PackedLinear(linear).product else "oneDNN lays weights out otherwise here"


def describe() -> str:
    """What computes packed layers, for a run's record."""
    problem = find_few_problem()
    few = f"oneDNN's too ({problem})" if problem else f"layer.cpp's (up to {most_few()})"
    return f"oneDNN's, weights packed once; products of a few rows {few}"


@cache
def _few_functions() -> ctypes.CDLL | None:
    """The functions of csrc/layer.cpp, where this processor has what they need."""
    library, _ = load_native()
    if library is None or library.most_few() == 0:
        return None
    return library


# -- what follows speaks to PyTorch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def _bytes_of(opaque: Tensor) -> Tensor:
    """A copy of the bytes of oneDNN's ``opaque``, as uint8."""
    copied = torch.empty(torch.ops.mkldnn._nbytes(opaque), dtype=torch.uint8)
    handle = ctypes.c_void_p(_pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(opaque)))
    address = ctypes.c_void_p()
    try:
        _check(_library().aoti_torch_get_data_ptr(handle, ctypes.byref(address)))
        assert address.value is not None
        ctypes.memmove(copied.data_ptr(), address.value, copied.nbytes)
    finally:
        _check(_library().aoti_torch_delete_tensor_object(handle))
    return copied


def _open_at(address: int, shape: tuple[int, int], layout: bytes) -> Tensor:
    """The tensor of ``shape`` that lies packed at ``address``, which it does not own."""
    library = _library()
    sizes, strides = (ctypes.c_int64 * 2)(*shape), (ctypes.c_int64 * 2)(shape[1], 1)
    handle = ctypes.c_void_p()
    _check(
        library.aoti_torch_create_tensor_from_blob_v2(
            ctypes.c_void_p(address), ctypes.c_int64(2), sizes, strides, ctypes.c_int64(0),
            library.aoti_torch_dtype_bfloat16(), library.aoti_torch_device_type_cpu(), 0, ctypes.byref(handle),
            library.aoti_torch_layout__mkldnn(), layout, ctypes.c_int64(len(layout)),
        )
    )  # fmt: skip
    opened: Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule(handle))
    return opened


def _check(status: int) -> None:
    if status:
        raise RuntimeError("PyTorch's C interface refused a call")


def _pointer(capsule: object) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, None))


def _capsule(handle: ctypes.c_void_p) -> Any:  # noqa: ANN401  # PyTorch's types say void pointer, and it wants a capsule
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(handle, None, None)
