"""Fused modules: they compute what transformers' modules do in fewer passes over memory and fewer calls. Those of a CPU are
for bfloat16; a GPU has the norm alone. :mod:`splitwiser.model.fusing` puts them into a model."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from splitwiser.model.attention import AttentionOptions, attention_function, current_step
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.packed_linear import LinearStruct, PackedLinear, max_small_rows
from splitwiser.model.paged_attention import KernelInputs, PagedAttention


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


class FusedAttention(nn.Module):
    """Attention layer with queries, keys and values as one product, whose heads are normalised (if the model does that) and
    rotated in place.

    ``own`` is the layer that it replaces and ``options`` what that layer passes to its attention. If ``half_angles``,
    cosines and sines cover half of the rotated numbers of a head, and both halves are rotated by the same angles.
    """

    q_norm: FusedNorm | None
    k_norm: FusedNorm | None

    def __init__(
        self,
        own: Any,  # noqa: ANN401  # an attention layer of transformers
        qkv_proj: PackedLinear,
        o_proj: PackedLinear,
        options: AttentionOptions,
        norms: Sequence[FusedNorm],
        half_angles: bool,
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
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: object,
        residual: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Return the output for ``hidden_states`` plus ``residual``, each of shape (1, tokens, width);
        ``position_embeddings`` are cosines and sines, (1, tokens, angles) each."""
        joint = self.qkv_proj(hidden_states)
        self._rotate(joint, *position_embeddings)
        heads = joint.view(1, joint.shape[1], -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split(self.heads, dim=1)
        key, value = current_step().update(key, value, self.layer_idx)
        attended, _weights = attention_function(
            self, query, key, value, attention_mask, self.options.scaling, softcap=self.options.softcap,
            s_aux=self.options.sinks, bias=self.options.bias, bias_by_position=self.options.bias_by_position,
        )  # fmt: skip
        return _apply(self.o_proj, attended.flatten(2), residual), None

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
    """A :class:`FusedNorm` as csrc/layer.cpp's ``Norm``."""

    _fields_: ClassVar = [("weight", ctypes.c_void_p), ("offset", ctypes.c_float), ("epsilon", ctypes.c_float)]


class _LayerStruct(ctypes.Structure):
    """A :class:`FusedLayer` as csrc/layer.cpp's ``Layer``."""

    _fields_: ClassVar = [
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _NormStruct) for name in ("input", "post", "query", "key")),
        *((name, ctypes.c_float) for name in ("linear", "cubic", "scaling", "softcap")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "half_angles")),
    ]


class _StepStruct(ctypes.Structure):
    """A decode step at one layer as csrc/layer.cpp's ``Step``."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", *KernelInputs._fields)),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "block_tokens", "table_width", "angles", "angles_in_float32", "threads")
        ),
    ]


class FusedLayer(nn.Module):
    """Decoder layer of fused modules that adds the residuals within the products before them.

    In decode steps of a small batch it is one call: separate calls would take as long as reading the weights.
    """

    input_layernorm: FusedNorm
    self_attn: FusedAttention
    post_attention_layernorm: FusedNorm
    mlp: FusedMLP

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # whose children are of these types
        super().__init__()
        self.input_layernorm, self.self_attn = own.input_layernorm, own.self_attn
        self.post_attention_layernorm, self.mlp = own.post_attention_layernorm, own.mlp
        self._struct: tuple[int, _LayerStruct] | None = None  # and the address of a weight that it holds for

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:  # noqa: ANN401  # the model's own arguments
        """Return the output for ``hidden_states``, shape (1, tokens, width); ``attention`` are the other arguments of the
        attention layer."""
        if (
            hidden_states.shape[1] <= max_small_rows()
            and (inputs := self._kernel_inputs(**attention))
            and (layer := self._find_struct())
        ):
            return self._run_at_once(layer, inputs, hidden_states.contiguous(), *attention["position_embeddings"])
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), residual=hidden_states, **attention)
        output: Tensor = self.mlp(self.post_attention_layernorm(attended), attended)
        return output

    def _kernel_inputs(self, attention_mask: object, **_: object) -> KernelInputs | None:
        step = current_step()
        if not isinstance(step, PagedAttention):
            return None
        return step.kernel_inputs(self.self_attn.layer_idx, attention_mask)

    def _run_at_once(
        self, layer: _LayerStruct, inputs: KernelInputs, hidden_states: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensor:
        """Compute the whole layer in one call."""
        cosines, sines = cosines.contiguous(), sines.contiguous()
        output = torch.empty_like(hidden_states)
        step = _StepStruct(
            cosines.data_ptr(), sines.data_ptr(), *(tensor.data_ptr() for tensor in inputs),
            hidden_states.shape[1], inputs.keys.shape[1], inputs.tables.shape[1], cosines.shape[-1],
            cosines.dtype == torch.float32, torch.get_num_threads(),
        )  # fmt: skip
        _functions().layer_small_batch(
            ctypes.byref(layer), ctypes.byref(step), hidden_states.data_ptr(), output.data_ptr()
        )
        return output

    def _find_struct(self) -> _LayerStruct | None:
        """Return the layer at the addresses of its weights; None if the one call does not support it."""
        attention, mlp, address = self.self_attn, self.mlp, self.self_attn.qkv_proj.packed.data_ptr()
        if self._struct is None or self._struct[0] != address:
            linears = [each.struct for each in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)]
            options = attention.options
            is_plain = options.sinks is None and options.bias is None and attention.heads[1] == attention.heads[2]
            if None in linears or not is_plain:
                return None
            norms = [self.input_layernorm, self.post_attention_layernorm, attention.q_norm, attention.k_norm]
            self._struct = address, _LayerStruct(
                *linears,
                *(
                    _NormStruct(norm.weight.data_ptr(), norm.offset, norm.epsilon) if norm else _NormStruct()
                    for norm in norms
                ),
                *mlp.factors, options.scaling, options.softcap or 0.0, *attention.heads[:2], attention.head_dim,
                attention.half_angles,
            )  # fmt: skip
        return self._struct[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_struct": None}  # an address is meaningless in another process


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
