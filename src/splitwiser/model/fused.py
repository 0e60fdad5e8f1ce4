"""Fused modules: they compute what transformers' modules do in fewer passes over memory and fewer calls. Those of a CPU are
for bfloat16; a GPU has the norm alone. :mod:`splitwiser.model.fusing` puts them into a model."""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, TypeGuard, overload

import torch
from torch import Tensor, nn

from splitwiser.model.attention import AttentionOptions, Mask, current_step, find_step
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.int8_linear import Int8Linear
from splitwiser.model.kernels.packed_linear import LinearStruct, PackedLinear, is_fast_for_many_rows, max_small_rows
from splitwiser.model.paged_attention import ComputedAhead, KernelInputs, LayerLoop, PagedAttention


class FusedNorm(nn.Module):
    """Root-mean-square norm: ``x / sqrt(mean(x^2) + epsilon) * (weight + offset)``, rounded once."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.offset = weight, epsilon, offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``hidden_states``, shape (..., width)."""
        hidden_states = hidden_states.contiguous()
        output, width = torch.empty_like(hidden_states), hidden_states.shape[-1]
        _functions().rms_norm(
            hidden_states.data_ptr(), self.weight.data_ptr(), output.data_ptr(), self.offset, self.epsilon,
            output.numel() // width, width, torch.get_num_threads(),
        )  # fmt: skip
        return output


class TorchNorm(nn.Module):
    """Root-mean-square norm ``x / sqrt(mean(x^2) + epsilon) * weight`` by PyTorch's function, on a GPU one kernel where
    transformers' modules launch eight; rounded once."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise ``hidden_states``, shape (..., width)."""
        return torch.rms_norm(hidden_states, self.weight.shape, self.weight, self.epsilon)


class FusedMLP(nn.Module):
    """Gated multi-layer perceptron ``down(f(gate(x)) * up(x))`` with gate and up as one product; ``factors`` are the
    (linear, cubic) of ``f(x) = x / (1 + exp(-(linear * x + cubic * x^3)))``."""

    def __init__(self, gate_up_proj: PackedLinear, down_proj: PackedLinear, factors: tuple[float, float]) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.factors = gate_up_proj, down_proj, factors

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the output for ``hidden_states`` plus ``residual``, each of shape (..., width)."""
        gate_up = self.gate_up_proj(hidden_states)
        width = self.down_proj.in_features
        gated = gate_up.new_empty(*gate_up.shape[:-1], width)
        _functions().gate(
            gate_up.data_ptr(), gated.data_ptr(), *self.factors, gated.numel() // width, width, torch.get_num_threads()
        )
        return _apply(self.down_proj, gated, residual)


class PlainMLP(nn.Module):
    """Multi-layer perceptron ``down(up(x))`` without a gate; ``up_proj`` has the activation."""

    def __init__(self, up_proj: PackedLinear, down_proj: PackedLinear) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up_proj, down_proj

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the output for ``hidden_states`` plus ``residual``, each of shape (..., width)."""
        return _apply(self.down_proj, self.up_proj(hidden_states), residual)


class FusedAttention(nn.Module):
    """Attention layer with queries, keys and values as one product, whose heads are normalised (if the model does that) and
    rotated in place (if it is given angles).

    ``own`` is the layer that it replaces and ``options`` what that layer passes to its attention; a factor of its queries
    may be part of their scaling. If ``half_angles``, cosines and sines cover half of the rotated numbers of a head, and both
    halves are rotated by the same angles.
    """

    q_norm: FusedNorm | None
    k_norm: FusedNorm | None

    def __init__(
        self,
        own: Any,  # noqa: ANN401  # an attention layer of transformers
        qkv_proj: PackedLinear,
        o_proj: PackedLinear,
        options: AttentionOptions,
        norms: Sequence[FusedNorm] = (),
        half_angles: bool = False,
    ) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = own.layer_idx, own.head_dim
        self.qkv_proj, self.o_proj = qkv_proj, o_proj
        self.heads = [each.out_features // own.head_dim for each in (own.q_proj, own.k_proj, own.v_proj)]
        self.options = options
        self.q_norm, self.k_norm = norms or (None, None)
        self.half_angles = half_angles

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: object = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states``, each of shape (1, tokens, width); ``position_embeddings`` are cosines and
        sines, (1, tokens, angles) each."""
        joint = self.project(hidden_states, position_embeddings)
        output: Tensor = self.o_proj(self.attend(joint, attention_mask))
        return output, None

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the queries, keys and values of ``hidden_states``, rotated: shape (1, tokens, all heads x head size)."""
        joint: Tensor = self.qkv_proj(hidden_states)
        if position_embeddings is not None:
            self._rotate(joint, *position_embeddings)
        return joint

    def attend(self, joint: Tensor, attention_mask: object, rows: Tensor | None = None) -> Tensor:
        """Store the keys and values of ``joint``, what :meth:`project` returns, and return the attention of its queries,
        shape (1, tokens, heads x head size); with ``rows`` (int64) of those tokens alone, in a step of the engine."""
        step = current_step()
        heads = joint.view(1, joint.shape[1], -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split(self.heads, dim=1)
        key, value = step.update(key, value, self.layer_idx)
        if rows is None:
            return step.attend(query, key, value, attention_mask, self.options).flatten(2)
        assert isinstance(step, PagedAttention)
        assert isinstance(attention_mask, Mask)
        layer = step.attended_layer(key)
        query, key, value = (each.index_select(2, rows) for each in (query, key, value))
        return step.at_rows(rows).attend_at(layer, query, key, value, attention_mask, self.options).flatten(2)

    def _rotate(self, joint: Tensor, cosines: Tensor, sines: Tensor) -> None:
        """Normalise and rotate the query and key heads of ``joint`` (1, tokens, heads x head size) in place."""
        query_weight, key_weight, offset, epsilon = None, None, 0.0, 0.0
        if self.q_norm and self.k_norm:
            query_weight, key_weight = self.q_norm.weight.data_ptr(), self.k_norm.weight.data_ptr()
            offset, epsilon = self.q_norm.offset, self.q_norm.epsilon
        cosines, sines, angles = cosines.contiguous(), sines.contiguous(), cosines.shape[-1]
        _functions().rotate_heads(
            joint.data_ptr(), cosines.data_ptr(), sines.data_ptr(), cosines.dtype == torch.float32,
            query_weight, key_weight, offset, epsilon, joint.shape[1], joint.shape[2], *self.heads[:2], self.head_dim,
            angles * 2 if self.half_angles else angles, angles, torch.get_num_threads(),
        )  # fmt: skip


class _NormStruct(ctypes.Structure):
    """A norm as csrc/parts.h's ``Norm``."""

    _fields_: ClassVar = [
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p),
        ("offset", ctypes.c_float), ("epsilon", ctypes.c_float), ("centred", ctypes.c_int64),
    ]  # fmt: skip


def is_layer_norm(part: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether ``part`` is a norm of bfloat16 rows by their mean and standard deviation."""
    return type(part) is nn.LayerNorm and part.weight is not None and part.weight.dtype == torch.bfloat16


def _norm_struct(norm: FusedNorm | nn.LayerNorm | None) -> _NormStruct:
    if norm is None:
        return _NormStruct()
    if isinstance(norm, FusedNorm):
        return _NormStruct(norm.weight.data_ptr(), None, norm.offset, norm.epsilon, False)
    bias = None if norm.bias is None else norm.bias.data_ptr()
    return _NormStruct(norm.weight.data_ptr(), bias, 0.0, norm.eps, True)


class _LayerStruct(ctypes.Structure):
    """A :class:`FusedLayer` as csrc/layer.cpp's ``Layer``."""

    _fields_: ClassVar = [
        *((name, LinearStruct) for name in ("qkv", "o", "up", "down")),
        *((name, _NormStruct) for name in ("input", "post", "query", "key")),
        *((name, ctypes.c_float) for name in ("linear", "cubic", "scaling", "softcap")),
        *((name, ctypes.c_int64) for name in ("gated", "heads", "kv_heads", "head_dim", "half_angles")),
    ]


class _HeadStruct(ctypes.Structure):
    """A norm and a linear layer that follow the layers of a model, as csrc/layer.cpp's ``Head``."""

    _fields_: ClassVar = [("norm", _NormStruct), ("linear", LinearStruct)]


class _StepStruct(ctypes.Structure):
    """A decode step as csrc/layer.cpp's ``Step``."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", *KernelInputs._fields)),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "block_tokens", "table_width", "int8_pool", "angles", "angles_in_float32", "threads")
        ),
    ]


class FusedLayer(nn.Module):
    """Decoder layer of fused modules that adds the residuals within the products before them.

    In decode steps of a small batch its :class:`LayerStack`, in which it has a ``number``, computes it. In other steps, what
    comes before and after attention is one call each if this project's own products are fast for many rows: a chunk of rows
    passes through all of it before the next one, and lies in a cache meanwhile.
    """

    def __init__(
        self,
        input_layernorm: FusedNorm | nn.LayerNorm,
        self_attn: FusedAttention,
        post_attention_layernorm: FusedNorm | nn.LayerNorm,
        mlp: FusedMLP | PlainMLP,
    ) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = input_layernorm, self_attn
        self.post_attention_layernorm, self.mlp = post_attention_layernorm, mlp
        self.stack, self.number = LayerStack([self]), 0
        self.is_last = False  # of the model's layers

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: object,
    ) -> Tensor:
        """Return the output for ``hidden_states``, shape (1, tokens, width), with the arguments of the model's own layer. If
        the layer ``is_last``, the output of tokens after which no logits are computed is zero."""
        if hidden_states.shape[1] <= max_small_rows():
            made = self.stack.run(self.number, hidden_states, attention_mask, position_embeddings, **others)
            if made is not None:
                return made
        rows = self._find_wanted_rows(hidden_states.shape[1], attention_mask)
        hidden_states = hidden_states.contiguous()
        if struct := self.stack.struct_for_many_rows(self.number):
            joint = _project_rows(struct, hidden_states, position_embeddings)
        else:
            joint = self.self_attn.project(self.input_layernorm(hidden_states), position_embeddings)
        attended = self.self_attn.attend(joint, attention_mask, rows)
        residual = hidden_states if rows is None else hidden_states.index_select(1, rows)
        if struct:
            output = _complete_rows(struct, attended, residual)
        else:
            residual = self.self_attn.o_proj.added_to(residual, attended)
            output = self.mlp(self.post_attention_layernorm(residual), residual)
        return output if rows is None else torch.zeros_like(hidden_states).index_copy_(1, rows, output)

    def _find_wanted_rows(self, tokens: int, attention_mask: object) -> Tensor | None:
        """Return the numbers of those of a step's ``tokens`` whose output is read, if these are few; None for all."""
        step = current_step()
        if not self.is_last or step.wanted_rows is None or not isinstance(step, PagedAttention):
            return None
        few = 2 * len(step.wanted_rows) <= tokens and isinstance(attention_mask, Mask)
        return step.wanted_rows if few else None

    def make_struct(self) -> _LayerStruct | None:
        """Return the layer at the addresses of its weights; None if the call for small batches does not support it."""
        attention, mlp, options = self.self_attn, self.mlp, self.self_attn.options
        up_proj, factors = (mlp.up_proj, None) if isinstance(mlp, PlainMLP) else (mlp.gate_up_proj, mlp.factors)
        linears = [each.struct for each in (attention.qkv_proj, attention.o_proj, up_proj, mlp.down_proj)]
        is_plain = options.sinks is None and options.bias is None and attention.heads[1] == attention.heads[2]
        if None in linears or not is_plain:
            return None
        norms = self.input_layernorm, self.post_attention_layernorm, attention.q_norm, attention.k_norm
        return _LayerStruct(
            *linears, *map(_norm_struct, norms), *(factors or (0.0, 0.0)), options.scaling, options.softcap or 0.0,
            factors is not None, *attention.heads[:2], attention.head_dim, attention.half_angles,
        )  # fmt: skip


class StackedLayers(nn.ModuleList):
    """The layers of a model, which are all in one :class:`LayerStack`; a loop over them is :meth:`LayerStack.loop`."""

    @property
    def stack(self) -> "LayerStack":
        """The layers as what computes them in one call."""
        first = self[0]
        assert isinstance(first, FusedLayer)
        return first.stack

    def __iter__(self) -> Iterator[FusedLayer]:
        return self.stack.loop()

    @overload
    def __getitem__(self, idx: slice) -> nn.ModuleList: ...
    @overload
    def __getitem__(self, idx: int) -> nn.Module: ...
    def __getitem__(self, idx: int | slice) -> nn.Module:
        """See :class:`torch.nn.ModuleList`; for a slice of all layers, which models loop over, no other list is made."""
        if isinstance(idx, int):
            return super().__getitem__(idx)
        chosen = list(self.children())[idx]
        return self if len(chosen) == len(self) and idx.step in (None, 1) else nn.ModuleList(chosen)


class LayerStack:
    """Consecutive decoder layers, which a decode step of a small batch computes in one call: with a few rows, separate calls
    take as long as reading the weights does.

    The layer that the model calls first computes those after it too, each on the output of the one before. A later one
    returns what is computed already if it is called with that output and the same other arguments. If it is not, the model
    does something between the two: the layer is computed again, and the calls of later steps end before it. If in a step all
    were asked for what was computed already, in a loop over :class:`StackedLayers`, such a loop ends after the first one in
    later steps: to call modules that have nothing to compute takes longer than some products.
    """

    def __init__(self, layers: Sequence[FusedLayer]) -> None:
        self._layers = list(layers)
        self._numbers = [each.self_attn.layer_idx for each in layers]  # as the pool counts
        self._starts: set[int] = set()  # the numbers of layers that are not computed with the one before
        self._is_whole = False  # whether the model does nothing between any two of its layers
        self._structs: tuple[tuple[int, int], Any, list[bool]] | None = None

    @classmethod
    def make(cls, layers: Sequence[FusedLayer]) -> None:
        """Make ``layers`` a stack."""
        stack = cls(layers)
        for number, layer in enumerate(layers):
            layer.stack, layer.number = stack, number

    def run(
        self,
        number: int,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **_: object,
    ) -> Tensor | None:
        """Return the output of layer ``number`` for ``hidden_states``, (1, tokens, width); None if the step is not one of
        decode or the call does not support the layer."""
        step = current_step()
        if not isinstance(step, PagedAttention):
            return None
        layer = self._numbers[number]
        others = attention_mask, position_embeddings
        if ahead := step.computed_ahead.get(layer):
            if all(one is other for one, other in zip((hidden_states, *others), ahead.inputs, strict=True)):
                if step.loop:
                    step.loop.answers += 1
                return ahead.output
            self._starts.add(number)
        structs, supported = self._find_structs()
        numbers = range(number, len(self._layers))
        end = next((at for at in numbers if not supported[at] or (at > number and at in self._starts)), numbers.stop)
        layers = self._numbers[number:end]
        inputs = step.kernel_inputs(layers, attention_mask) if layers else None
        if inputs is None:
            return None
        outputs = _run_layers(structs[number], inputs, hidden_states.contiguous(), position_embeddings)
        if self._is_whole and step.loop and len(layers) == len(self._layers) and not self._have_hooks():
            step.loop.is_done = True
            return outputs[-1]
        made = outputs.unbind()
        for layer, before, output in zip(layers[1:], made, made[1:], strict=False):
            step.computed_ahead[layer] = ComputedAhead((before, *others), output)
        return made[0]

    def logits(
        self,
        hidden_states: Tensor,
        mask: Mask,
        position_embeddings: tuple[Tensor, Tensor] | None,
        norm: nn.Module,
        head: nn.Module,
    ) -> Tensor | None:
        """Return ``head(norm(...))`` of the output of all layers for ``hidden_states``, shape (1, tokens, vocabulary), in
        one call; None if the step is not one of decode of a small batch, or the call does not support one of the modules."""
        step, (structs, supported) = current_step(), self._find_structs()
        if not (hidden_states.shape[1] <= max_small_rows() and isinstance(step, PagedAttention) and all(supported)):
            return None
        struct = _head_struct(norm, head)
        inputs = step.kernel_inputs(self._numbers, mask)
        if struct is None or inputs is None or self._have_hooks(norm, head):
            return None
        logits = hidden_states.new_empty(*hidden_states.shape[:2], struct.linear.outputs)
        _run_layers(structs[0], inputs, hidden_states.contiguous(), position_embeddings, (struct, logits))
        return logits

    def loop(self) -> Iterator[FusedLayer]:
        """Yield the layers, for the model to call each before it takes the next: all, or the first one alone if it then has
        returned the output of the last one."""
        step = find_step()
        if not isinstance(step, PagedAttention):
            yield from self._layers
            return
        step.loop = loop = LayerLoop()
        for layer in self._layers:
            yield layer
            if loop.is_done:
                return
        step.loop = None
        if loop.answers == len(self._layers) - 1:
            self._is_whole = True

    def _have_hooks(self, *others: nn.Module) -> bool:
        """Whether somebody wants to know of the calls of single layers or of the ``others``."""
        return any(each._forward_hooks or each._forward_pre_hooks for each in (*self._layers, *others))

    def struct_for_many_rows(self, number: int) -> _LayerStruct | None:
        """Return layer ``number`` for calls with any number of rows; None if these do not support it or are slower."""
        is_packed = isinstance(self._layers[number].self_attn.qkv_proj, PackedLinear)
        if not (is_fast_for_many_rows() if is_packed else hasattr(_functions(), "project_rows")):
            return None
        structs, supported = self._find_structs()
        struct: _LayerStruct = structs[number]
        return struct if supported[number] else None

    def _find_structs(self) -> tuple[Any, list[bool]]:
        """Return all layers as an array at the addresses of their weights, and which the call supports."""
        place = self._layers[0].self_attn.qkv_proj.packed.data_ptr(), PackedLinear.compressions
        if self._structs is None or self._structs[0] != place:
            structs = [layer.make_struct() for layer in self._layers]
            array = (_LayerStruct * len(structs))(*(each or _LayerStruct() for each in structs))
            self._structs = place, array, [each is not None for each in structs]
        return self._structs[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_structs": None}  # an address is meaningless in another process


def _project_rows(struct: _LayerStruct, hidden_states: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return what :meth:`FusedAttention.project` does for the layer's normalised ``hidden_states``."""
    cosines, sines = _contiguous(angles)
    joint = hidden_states.new_empty(*hidden_states.shape[:2], struct.qkv.outputs)
    _functions().project_rows(
        ctypes.byref(struct), hidden_states.data_ptr(), *map(_address, (cosines, sines)), *_angles(cosines),
        joint.data_ptr(), joint.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return joint


def _complete_rows(struct: _LayerStruct, attended: Tensor, residual: Tensor) -> Tensor:
    """Return a layer's output for what its attention has ``attended`` and the ``residual`` before it."""
    attended, output = attended.contiguous(), torch.empty_like(residual)
    _functions().complete_rows(
        ctypes.byref(struct), attended.data_ptr(), residual.data_ptr(), output.data_ptr(), output.shape[1],
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def _head_struct(norm: nn.Module, head: nn.Module) -> _HeadStruct | None:
    """Return the two at the addresses of their weights; None if the call for small batches does not support one."""
    linear = head.struct if isinstance(head, PackedLinear | Int8Linear) else None
    if linear is None or not (isinstance(norm, FusedNorm) or is_layer_norm(norm)):
        return None
    return _HeadStruct(_norm_struct(norm), linear)


def _run_layers(
    first: _LayerStruct,
    inputs: KernelInputs,
    hidden_states: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    final: tuple[_HeadStruct, Tensor] | None = None,
) -> Tensor:
    """Compute the layers from ``first`` on, one for each of ``inputs``' layers of the pool, in one call. Returns the output
    of each, shape (layers, 1, tokens, width), or, if a ``final`` head and room for its logits are given, of the last."""
    cosines, sines = _contiguous(angles)
    outputs = hidden_states.new_empty(1 if final else len(inputs.keys), *hidden_states.shape)
    keys, values = (
        (ctypes.c_void_p * len(layers))(*(each.data_ptr() for each in layers))
        for layers in (inputs.keys, inputs.values)
    )
    step = _StepStruct(
        *map(_address, (cosines, sines)), ctypes.addressof(keys), ctypes.addressof(values),
        *(each.data_ptr() for each in inputs[2:]),
        hidden_states.shape[1], inputs.keys[0].shape[1], inputs.tables.shape[1], inputs.keys[0].dtype == torch.int8,
        *_angles(cosines), torch.get_num_threads(),
    )  # fmt: skip
    _functions().layers_small_batch(
        ctypes.byref(first), len(inputs.keys), ctypes.byref(step), hidden_states.data_ptr(), outputs.data_ptr(),
        *((ctypes.byref(final[0]), final[1].data_ptr()) if final else (None, None)),
    )  # fmt: skip
    return outputs


def _contiguous(angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    return (angles[0].contiguous(), angles[1].contiguous()) if angles else (None, None)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _angles(cosines: Tensor | None) -> tuple[int, bool]:
    """Return the number of angles of a token, and whether they are in float32."""
    return (0, False) if cosines is None else (cosines.shape[-1], cosines.dtype == torch.float32)


def _apply(linear: PackedLinear, inputs: Tensor, residual: Tensor | None) -> Tensor:
    output: Tensor = linear(inputs) if residual is None else linear.added_to(residual, inputs)
    return output


def find_compile_problem() -> str | None:
    """Return why the compiled functions of fused modules are missing, in one line; None if they are there."""
    try:
        _functions()
    except RuntimeError as error:
        return str(error)
    return None


@cache
def _functions() -> ctypes.CDLL:
    """Return the functions of csrc/fused.cpp and layer.cpp. Raises RuntimeError with the reason if they cannot be compiled
    or loaded."""
    library, described = load_native()
    if library is None:
        raise RuntimeError(described)
    return library
