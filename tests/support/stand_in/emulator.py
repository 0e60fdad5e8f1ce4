"""Computes what kernels on the stand-in's device would have computed.

Every CUDA kernel of PyTorch's operators is replaced by the CPU's over the same memory. A captured graph is the list of the
calls that were made in it, which a replay makes again. What PyTorch does on the host stays its own where it launches nothing
that could be told apart: allocation, views, the checks of copies and of flash attention, what a capture refuses.
"""

import ctypes
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# of the operators that have a CUDA kernel, those that compute nothing themselves
ON_THE_HOST = {
    "_cudnn_init_dropout_state", "_efficientzerotensor", "_fused_sdp_choice", "_local_scalar_dense", "empty",
    "empty_strided", "is_set_to",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "record_stream", "resize_", "set_",
}  # fmt: skip
# those that wait for the device, since their result's shape depends on what is computed
SYNCHRONISING = {
    "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave", "unique_consecutive",
    "unique_dim",
}  # fmt: skip
Call = Callable[[], object]
Fill = Callable[[Any], None]

_libraries = ctypes.CDLL(None)  # those that the process was started with
_library = torch.library.Library("aten", "IMPL", "CUDA")


class _Capture(threading.local):
    """The calls of the graph that this thread captures; None while it captures none."""

    calls: list[Call] | None = None


_capture = _Capture()


def _histc(tensor: Tensor, *settings: Any) -> Tensor:
    return torch.histc(tensor.float(), *settings).to(tensor.dtype)


# those whose kernel for the CPU takes fewer types than that for CUDA
WIDER: dict[str, Callable[..., Any]] = {"histc": _histc}


def install() -> None:
    """Replace the kernels. For a process that has the stand-in's libraries."""
    checked: dict[str, Callable[..., Fill]] = {
        "copy_": _copy,
        "_flash_attention_forward": _flash_attention,
        "_efficient_attention_forward": _efficient_attention,
    }
    kernels = {name: torch.library.get_kernel(f"aten::{name}", "CUDA") for name in checked}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for operator in _operators_with_kernels():
            _library.impl(operator, _on_cpu(operator), allow_override=True)
        for name, compute in checked.items():
            _library.impl(name, _checked_by(kernels[name], compute), with_keyset=True, allow_override=True)
    torch.cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = _Graph  # type: ignore[misc]


def install_decode_attention(gpu_kernel: ModuleType) -> None:
    """Let the call of ``splitwiser.model.kernels.gpu_attention.GpuDecodeAttention``, which launches Triton's kernels,
    compute on the CPU."""
    gpu_kernel.GpuDecodeAttention.__call__ = _decode_attention


def on_host(value: Any) -> Any:
    """``value`` with tensors of the CPU in place of the device's, over the same memory, which they do not keep."""
    match value:
        case Tensor() if value.is_cuda:
            storage = value.untyped_storage()
            if not storage.nbytes():
                return torch.empty(value.shape, dtype=value.dtype)
            memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
            whole = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            return torch.empty(0, dtype=value.dtype).set_(whole, value.storage_offset(), value.shape, value.stride())
        case torch.device():
            return torch.device("cpu")
        case torch.Generator():
            return None
        case list() | tuple() if not isinstance(value, torch.Size):
            return type(value)(map(on_host, value))
    return value


def run(device: torch.device, call: Call) -> None:
    """Make a call that stands for kernels launched on ``device``; a capture takes it down."""
    if _capture.calls is not None:
        if _libraries.stand_in_launch(ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        _capture.calls.append(call)
    call()


class _Graph(torch.cuda.graphs.CUDAGraph):
    """A graph that makes its calls again when it is replayed."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self._calls: list[Call] = []

    def capture_begin(self, *arguments: Any, **settings: Any) -> None:
        super().capture_begin(*arguments, **settings)
        _capture.calls = self._calls

    def capture_end(self) -> None:
        _capture.calls = None
        super().capture_end()

    def replay(self) -> None:
        super().replay()
        for call in self._calls:
            call()


# -- any operator


def _operators_with_kernels() -> Iterator[OpOverload]:
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace != "aten" or base in ON_THE_HOST:
            continue
        operator: OpOverload = getattr(getattr(torch.ops.aten, base), overload or "default")
        if not any(each.alias_info and not each.alias_info.is_write for each in operator._schema.returns):  # no view
            yield operator


def _on_cpu(operator: OpOverload) -> Callable[..., Any]:
    """What stands for ``operator`` on the device."""
    schema = operator._schema
    base = schema.name.partition("::")[2]
    waits = base in SYNCHRONISING
    kernel = WIDER.get(base, operator) if operator._overloadname == "default" else operator
    names = [argument.name for argument in schema.arguments]
    written = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    returns_written = any(each.alias_info for each in schema.returns)

    def perform(*arguments: Any, **settings: Any) -> Any:
        device = _device_of([*arguments, *settings.values()])
        if waits:
            torch.cuda.current_stream(device).synchronize()
        inputs = on_host(arguments)
        options = {name: on_host(value) for name, value in settings.items()}
        outputs: list[Tensor] = []  # on the host, of what is made anew

        def compute() -> Any:
            made = kernel(*inputs, **options)
            for output, tensor in zip(outputs, _tensors(made), strict=False):
                output.copy_(tensor)
            return made

        if returns_written:
            given = dict(zip(names, arguments, strict=False)) | settings
            seen = dict(zip(names, inputs, strict=False)) | options
            run(device, compute)
            for name in written:  # a kernel may give its output another shape
                if isinstance(given[name], Tensor) and given[name].shape != seen[name].shape:
                    _resize(given[name], seen[name])
            return given[written[0]] if len(schema.returns) == 1 else tuple(given[name] for name in written)
        results: list[Any] = []

        def first() -> None:
            results.append(compute())

        run(device, first)
        made = _on_device(results.pop(), device)
        outputs += map(on_host, _tensors(made))
        return made

    return perform


def _resize(tensor: Tensor, computed: Tensor) -> None:
    tensor.resize_(computed.shape)
    place = on_host(tensor)
    place.copy_(computed)
    if _capture.calls is not None:
        _capture.calls.append(lambda: place.copy_(computed))


def _device_of(values: Sequence[Any]) -> torch.device:
    """Of the first tensor of the device, or that which is asked for, or the current one."""
    for tensor in _tensors(values):
        if tensor.is_cuda:
            return tensor.device
    asked = [value for value in values if isinstance(value, torch.device) and value.index is not None]
    return asked[0] if asked else torch.device("cuda", torch.cuda.current_device())


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _on_device(made: Any, device: torch.device) -> Any:
    """What a kernel made, in memory of the device."""
    if isinstance(made, Tensor):
        tensor = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=device)
        on_host(tensor).copy_(made)
        return tensor
    return type(made)(_on_device(each, device) for each in made) if isinstance(made, (list, tuple)) else made


# -- operators whose own host code runs as well


def _checked_by(kernel: Any, compute: Callable[..., Fill]) -> Callable[..., Any]:
    """What runs the operator's own ``kernel``, which checks, allocates and launches what does nothing, and then computes
    what that returned. ``compute`` is given the arguments, all on the host, and returns what fills the results."""

    def perform(keys: Any, *arguments: Any, **settings: Any) -> Any:
        made = kernel.call_boxed(keys, *arguments, **settings)
        fill = compute(*on_host(arguments), **{name: on_host(value) for name, value in settings.items()})
        results = on_host(made)
        run(_device_of([*arguments, *settings.values()]), lambda: fill(results))
        return made

    return perform


def _copy(to: Tensor, source: Tensor, *_: bool) -> Fill:
    def fill(_: Any) -> None:
        to.copy_(source)

    return fill


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    max_query: int,
    max_key: int,
    dropout: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **_: object,
) -> Fill:
    """Sequences of one length, (sequences, tokens, heads, head size), or, with offsets, any laid end to end, (tokens, heads,
    head size). The last query of each stands at its last key."""
    left = -1 if window_size_left is None else window_size_left
    right = 0 if is_causal else -1 if window_size_right is None else window_size_right

    def seen(queries: int, keys: int) -> Tensor:
        distance = torch.arange(keys)[None] - torch.arange(keys - queries, keys)[:, None]
        return ((distance >= -left) | (left < 0)) & ((distance <= right) | (right < 0))

    def fill(results: Sequence[Tensor]) -> None:
        output, log_sums = results[:2]
        if query_offsets is None or key_offsets is None:
            for q, k, v, weighted, sums in zip(query, key, value, output, log_sums, strict=True):
                _attend(q, k, v, weighted, sums, scale, seen(len(q), len(k)))
            return
        for number in range(len(query_offsets) - 1):
            own = slice(*query_offsets[number : number + 2].tolist())
            context = slice(*key_offsets[number : number + 2].tolist())
            q, k, v = query[own], key[context], value[context]
            if len(q):
                _attend(q, k, v, output[own], log_sums[:, own], scale, seen(len(q), len(k)))

    return fill


def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    max_query: int | None,
    max_key: int | None,
    dropout: float,
    mask_type: int,
    compute_log_sums: bool = False,
    *,
    scale: float | None = None,
    **_: object,
) -> Fill:
    """Sequences of one length, (sequences, tokens, heads, head size), as ``scaled_dot_product_attention`` has them."""

    def fill(results: Sequence[Tensor]) -> None:
        causal = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril() if mask_type else None
        for number, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
            sums = results[1][number] if compute_log_sums else None
            added = None if bias is None else bias[number]
            _attend(q, k, v, results[0][number], sums, scale, causal, added)

    return fill


# -- decode attention


def _decode_attention(
    _: object,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    starts: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    bias_by_position: bool = False,
) -> Tensor:
    """What :meth:`splitwiser.model.kernels.gpu_attention.GpuDecodeAttention.__call__` computes."""
    device = query.device
    if device.index != torch.cuda.current_device():
        raise RuntimeError(
            f"CUDA error: an illegal memory access was encountered: Triton launches on the current device, and it is "
            f"cuda:{torch.cuda.current_device()}, not {device}"
        )
    for name, tensor in (("keys", keys), ("values", values), ("tables", tables), ("lengths", lengths)):
        if not tensor.is_contiguous():
            raise AssertionError(f"a Triton kernel is given {name} that are not contiguous")
    made = query.new_empty(*query.shape[:2], values.shape[-1])
    output, query, keys, values, tables, starts, lengths, sinks, bias = on_host(
        (made, query, keys, values, tables, starts, lengths, sinks, bias)
    )
    block_tokens = keys.shape[1]

    def compute() -> None:
        for request, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            positions = torch.arange(start, length)
            slots = tables[request][positions // block_tokens].long() * block_tokens + positions % block_tokens
            key, value = (kept.flatten(0, 1)[slots] for kept in (keys, values))
            own = slice(request, request + 1)
            entries = positions if bias_by_position else length - 1 - positions
            added = None if bias is None else bias[:, None, entries.clamp(max=bias.shape[1] - 1)]
            _attend(query[own], key, value, output[own], None, scaling, None, added, softcap, sinks)

    run(device, compute)
    return made


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor | None,
    scaling: float | None,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attention of one sequence in float32, into ``output`` (tokens, heads, value size) and, of each row of weights, the
    logarithm of their sum into the first columns of ``log_sums`` (heads, tokens). ``seen`` is (query tokens, key tokens)."""
    tokens, heads, size = query.shape
    grouped = query.float().view(tokens, key.shape[1], -1, size)
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key.float()).flatten(0, 1)
    scores *= size**-0.5 if scaling is None else scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.float()
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    sums = scores.logsumexp(-1)
    if sinks is not None:
        sums = torch.logaddexp(sums, sinks.float()[:, None])
    weights = torch.exp(scores - sums[..., None]).nan_to_num().unflatten(0, (key.shape[1], -1))
    output.copy_(torch.einsum("hgqk,khd->qhgd", weights, value.float()).reshape(tokens, heads, -1))
    if log_sums is not None:
        log_sums[:, :tokens] = sums
