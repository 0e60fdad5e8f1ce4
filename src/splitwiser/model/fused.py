"""Parts of a bfloat16 model on a CPU that compute what transformers' own do in fewer passes over memory and fewer calls.

A part is recognised by its structure and, before it takes the place of the model's own, shown on random numbers to compute
the same as that one; if it does not, the model's own stays. Random numbers go through a layer of the model as a forward of
the whole model would send them: what each module is called with is noted in one such forward.
"""

import copy
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from splitwiser.model.attention import (
    AttentionOptions,
    AttentionStep,
    StepCache,
    attention_function,
    serving,
)
from splitwiser.model.forward import forward
from splitwiser.model.kernels.build import load_native
from splitwiser.model.kernels.packed_linear import PackedLinear, Product, is_packable, most_few
from splitwiser.model.paged_attention import KernelInputs, PagedAttention

# gates x / (1 + exp(-(linear * x + cubic * x^3))): SiLU, GELU's form with tanh, and the quick form of GELU
_GATES = ((1.0, 0.0), (2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715), (1.702, 0.0))
# activations that oneDNN applies to a product: its name for one, and which form of it
_ACTIVATIONS = (("relu", ""), ("gelu", "none"), ("gelu", "tanh"), ("swish", ""))
# the rows that parts are compared on: far apart in scale, so that an epsilon and a limit show
_SCALES = (1e-3, 0.03, 0.3, 1.0, 3.0, 30.0, 1000.0)
# of the norm of a row: a few roundings to bfloat16, each at most 1/256 of a number
_TOLERANCE = 1 / 64


class FusedNorm(nn.Module):
    """Root-mean-square norm: ``x / sqrt(mean(x^2) + epsilon) * (weight + offset)``, rounded once."""

    def __init__(self, weight: nn.Parameter, epsilon: float, offset: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.offset = weight, epsilon, offset

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        hidden_states = hidden_states.contiguous()
        output, width = torch.empty_like(hidden_states), hidden_states.shape[-1]
        _functions().rms_norm(
            hidden_states.data_ptr(), self.weight.data_ptr(), output.data_ptr(), self.offset, self.epsilon,
            output.numel() // width, width, torch.get_num_threads(),
        )  # fmt: skip
        return output


class FusedMLP(nn.Module):
    """``down(f(gate(x)) * up(x))`` with gate and up as one product; ``factors`` choose f, see kernels/csrc/fused.cpp."""

    def __init__(
        self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear, factors: tuple[float, float]
    ) -> None:
        super().__init__()
        self.gate_up_proj = PackedLinear(_joined([gate_proj, up_proj]))
        self.down_proj = PackedLinear(down_proj)
        self.factors = factors

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """Shape (..., width) to the same, plus ``residual``."""
        gate_up = self.gate_up_proj(hidden_states)
        width = self.down_proj.in_features
        gated = gate_up.new_empty(*gate_up.shape[:-1], width)
        _functions().gate(
            gate_up.data_ptr(), gated.data_ptr(), *self.factors, gated.numel() // width, width, torch.get_num_threads()
        )
        return _product(self.down_proj, gated, residual)


class FusedAttention(nn.Module):
    """An attention layer with queries, keys and values as one product, whose heads are normalised, where the model does
    that, and turned in place.

    ``options`` are what the model's own layer asks its attention for; ``halved`` says that a cosine turns two numbers, so
    that there are half as many as numbers turned.
    """

    q_norm: FusedNorm | None
    k_norm: FusedNorm | None

    def __init__(
        self,
        own: Any,  # noqa: ANN401  # an attention layer of transformers
        options: AttentionOptions,
        norms: Sequence[FusedNorm],
        halved: bool,
    ) -> None:
        super().__init__()
        projections: list[Any] = [own.q_proj, own.k_proj, own.v_proj]
        self.layer_idx, self.head_dim = own.layer_idx, own.head_dim
        self.qkv_proj = PackedLinear(_joined(projections))
        self.o_proj = PackedLinear(own.o_proj)
        self.heads = [each.out_features // own.head_dim for each in projections]
        self.scaling, self.softcap, self.sinks = options.scaling, options.softcap, options.sinks
        self.q_norm, self.k_norm = norms or (None, None)
        self.halved = halved

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: object,
        past_key_values: Any,  # noqa: ANN401  # the step's cache, which to transformers has no type
        residual: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Shape (1, tokens, width) to the same, plus ``residual``; cosines and sines are (1, tokens, angles)."""
        joint = self.qkv_proj(hidden_states)
        self._turn(joint, *position_embeddings)
        heads = joint.view(1, joint.shape[1], -1, self.head_dim).transpose(1, 2)
        query, key, value = heads.split(self.heads, dim=1)
        key, value = past_key_values.update(key, value, self.layer_idx)
        attended, _weights = attention_function(
            self, query, key, value, attention_mask, self.scaling, softcap=self.softcap, s_aux=self.sinks
        )
        return _product(self.o_proj, attended.flatten(2), residual), None

    def _turn(self, joint: Tensor, cosines: Tensor, sines: Tensor) -> None:
        query_weight, key_weight, offset, epsilon = None, None, 0.0, 0.0
        if self.q_norm and self.k_norm:
            query_weight, key_weight = self.q_norm.weight.data_ptr(), self.k_norm.weight.data_ptr()
            offset, epsilon = self.q_norm.offset, self.q_norm.epsilon
        cosines, sines, angles = cosines.contiguous(), sines.contiguous(), cosines.shape[-1]
        _functions().rotate_heads(
            joint.data_ptr(), cosines.data_ptr(), sines.data_ptr(), cosines.dtype == torch.float32,
            query_weight, key_weight, offset, epsilon, joint.shape[1], joint.shape[2], *self.heads[:2], self.head_dim,
            angles * 2 if self.halved else angles, angles, torch.get_num_threads(),
        )  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_: ClassVar = [("weight", ctypes.c_void_p), ("offset", ctypes.c_float), ("epsilon", ctypes.c_float)]


class _Layer(ctypes.Structure):
    """A :class:`FusedLayer` as kernels/csrc/layer.cpp takes it."""

    _fields_: ClassVar = [
        *((name, Product) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _Norm) for name in ("input", "post", "query", "key")),
        *((name, ctypes.c_float) for name in ("linear", "cubic", "scaling", "softcap")),
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "head_dim", "halved")),
    ]


class _Step(ctypes.Structure):
    """A step at a layer, as kernels/csrc/layer.cpp takes it."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", *KernelInputs._fields)),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "block_tokens", "table_width", "angles", "in_float32", "threads")
        ),
    ]


class FusedLayer(nn.Module):
    """A decoder layer of fused parts whose residuals are added in the products before them.

    In decode steps of a few requests it is one call: there calls would take as long as the reading of the weights.
    """

    input_layernorm: FusedNorm
    self_attn: FusedAttention
    post_attention_layernorm: FusedNorm
    mlp: FusedMLP

    def __init__(self, own: Any) -> None:  # noqa: ANN401  # whose children are of these types
        super().__init__()
        self.input_layernorm, self.self_attn = own.input_layernorm, own.self_attn
        self.post_attention_layernorm, self.mlp = own.post_attention_layernorm, own.mlp
        self._at: tuple[int, _Layer] | None = None

    def forward(self, hidden_states: Tensor, **attention: Any) -> Tensor:  # noqa: ANN401  # the model's own arguments
        """Shape (1, tokens, width) to the same; ``attention`` is what the attention layer is given beside."""
        if hidden_states.shape[1] <= most_few() and (place := self._place(**attention)) and (own := self._describe()):
            return self._call_once(own, place, hidden_states.contiguous(), *attention["position_embeddings"])
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), residual=hidden_states, **attention)
        output: Tensor = self.mlp(self.post_attention_layernorm(attended), attended)
        return output

    def _place(self, attention_mask: object, past_key_values: object, **_: object) -> KernelInputs | None:
        if not isinstance(past_key_values, PagedAttention):
            return None
        return past_key_values.kernel_inputs(self.self_attn.layer_idx, attention_mask)

    def _call_once(
        self, own: _Layer, place: KernelInputs, hidden_states: Tensor, cosines: Tensor, sines: Tensor
    ) -> Tensor:
        cosines, sines = cosines.contiguous(), sines.contiguous()
        output = torch.empty_like(hidden_states)
        step = _Step(
            cosines.data_ptr(), sines.data_ptr(), *(tensor.data_ptr() for tensor in place),
            hidden_states.shape[1], place.keys.shape[1], place.tables.shape[1], cosines.shape[-1],
            cosines.dtype == torch.float32, torch.get_num_threads(),
        )  # fmt: skip
        _functions().layer_of_few(ctypes.byref(own), ctypes.byref(step), hidden_states.data_ptr(), output.data_ptr())
        return output

    def _describe(self) -> _Layer | None:
        """The layer where it lies now; None if it has what the one call does not do."""
        attention, mlp, address = self.self_attn, self.mlp, self.self_attn.qkv_proj.packed.data_ptr()
        if self._at is None or self._at[0] != address:
            products = [
                linear.product for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
            ]
            if None in products or attention.sinks is not None or attention.heads[1] != attention.heads[2]:
                return None
            norms = [self.input_layernorm, self.post_attention_layernorm, attention.q_norm, attention.k_norm]
            self._at = address, _Layer(
                *products,
                *(_Norm(norm.weight.data_ptr(), norm.offset, norm.epsilon) if norm else _Norm() for norm in norms),
                *mlp.factors, attention.scaling, attention.softcap or 0.0, *attention.heads[:2], attention.head_dim,
                attention.halved,
            )  # fmt: skip
        return self._at[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_at": None}  # an address means nothing to another process


def fuse_parts(module: nn.Module) -> None:
    """Replace the parts of ``module`` that a fused one is shown to compute the same as, one after another, so that a second
    copy of the weights never exists as a whole.

    ``module`` is a causal model that attends as :data:`splitwiser.model.attention.NAME`, with its linear layers not packed
    yet.
    """
    calls = _record_calls(module)
    if find_problem() is None:
        for candidates in (_norms, _mlps, _attentions, _layers):
            _replace_children(module, candidates, calls)
    _fuse_activations(module, calls)


def describe_parts(module: nn.Module) -> str:
    """The fused parts of ``module`` and how many there are of each, for a run's record."""
    names = {FusedNorm: "rms_norm", FusedMLP: "gated_mlp", FusedAttention: "attention", FusedLayer: "decoder_layer"}
    parts = list(module.modules())
    counts = Counter(names[type(part)] for part in parts if type(part) in names)
    counts["activation"] = sum(isinstance(part, PackedLinear) and part.activation[0] != "none" for part in parts)
    described = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return described or f"none ({find_problem() or 'no part of the model is like one'})"


def find_problem() -> str | None:
    """Why there are no compiled functions here, in a line; None if there are. Activations are fused without them."""
    try:
        _functions()
    except RuntimeError as error:
        return str(error)
    return None


def _replace_children(module: nn.Module, candidates: "_Candidates", calls: "_Calls") -> None:
    for name, own in list(module.named_children()):
        _replace_children(own, candidates, calls)
        if own in calls and (made := _first_same(own, candidates, calls[own])):
            setattr(module, name, made)


def _fuse_activations(module: nn.Module, calls: "_Calls") -> None:
    for child in list(module.children()):
        _fuse_activations(child, calls)
    if module in calls:
        _fuse_activation(module, calls)


# -- candidates: what might take the place of a part, the likeliest first


def _norms(own: nn.Module, call: "_Call") -> Iterator[nn.Module]:
    weight, epsilon = getattr(own, "weight", None), getattr(own, "variance_epsilon", getattr(own, "eps", None))
    if not (isinstance(weight, nn.Parameter) and isinstance(epsilon, float) and len(list(own.parameters())) == 1):
        return
    hidden = call.hidden_states
    if (
        weight.dtype == hidden.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape == hidden.shape[-1:]
    ):
        for offset in (0.0, 1.0):
            yield FusedNorm(weight, epsilon, offset)


def _mlps(own: nn.Module, _: "_Call") -> Iterator[nn.Module]:
    linears = _linears(own, "gate_proj", "up_proj", "down_proj")
    if linears and _can_join(linears[:2]):
        made = FusedMLP(linears[0], linears[1], linears[2], _GATES[0])
        for made.factors in _GATES:
            yield made


def _attentions(own: nn.Module, call: "_Call") -> Iterator[nn.Module]:
    linears = _linears(own, "q_proj", "k_proj", "v_proj", "o_proj")
    head_dim, layer_idx = getattr(own, "head_dim", None), getattr(own, "layer_idx", None)
    if not (linears and _can_join(linears[:3]) and isinstance(head_dim, int) and isinstance(layer_idx, int)):
        return
    norms = [part for name in ("q_norm", "k_norm") if isinstance(part := getattr(own, name, None), FusedNorm)]
    kinds = {(norm.offset, norm.epsilon, len(norm.weight)) for norm in norms}
    if norms and (len(norms) != 2 or len(kinds) != 1 or len(norms[0].weight) != head_dim):
        return
    cosines, sines = call.named["position_embeddings"]
    if cosines.dtype != sines.dtype or cosines.dtype not in (torch.bfloat16, torch.float32):
        return
    if not cosines.shape[:-1] == sines.shape[:-1] == call.hidden_states.shape[:-1]:
        return
    options = _outcome(own, call).options
    if options is not None:
        made = FusedAttention(own, options, norms, halved=False)
        for made.halved in (False, True):
            if cosines.shape[-1] * (1 + made.halved) <= head_dim:
                yield made


def _layers(own: nn.Module, _: "_Call") -> Iterator[nn.Module]:
    parts = {
        "input_layernorm": FusedNorm, "self_attn": FusedAttention,
        "post_attention_layernorm": FusedNorm, "mlp": FusedMLP,
    }  # fmt: skip
    if {name: type(child) for name, child in own.named_children()} == parts:
        yield FusedLayer(own)


def _fuse_activation(own: nn.Module, calls: "_Calls") -> None:
    """Have ``fc1`` of ``own`` compute ``activation_fn`` too, if what they and ``own`` compute stays the same."""
    first, activation = getattr(own, "fc1", None), getattr(own, "activation_fn", None)
    if not (is_packable(first) and isinstance(activation, nn.Module) and first in calls and activation in calls):
        return
    made = _first_same(nn.Sequential(first, activation), _with_activation, calls[first])
    if made is None:
        return

    def with_both(*_: object) -> Iterator[nn.Module]:
        layer = copy.copy(own)
        layer._modules = {**own._modules, "fc1": made, "activation_fn": nn.Identity()}
        yield layer

    if _first_same(own, with_both, calls[own]):  # nothing lies between the two
        own.fc1, own.activation_fn = made, nn.Identity()


def _with_activation(pair: nn.Module, _: "_Call") -> Iterator[nn.Module]:
    made = PackedLinear(pair.get_submodule("0"))  # type: ignore[arg-type]
    for made.activation in _ACTIVATIONS:
        yield made


def _linears(own: nn.Module, *names: str) -> list[nn.Linear]:
    """The children of these names, if all are linear layers that can be packed; else none."""
    found = [part for name in names if is_packable(part := getattr(own, name, None))]
    return found if len(found) == len(names) else []


def _can_join(linears: Sequence[nn.Linear]) -> bool:
    return len({(each.in_features, each.bias is None) for each in linears}) == 1


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of ``linears``, one after another."""
    inputs, outputs = linears[0].in_features, sum(each.out_features for each in linears)
    joined = nn.Linear(inputs, outputs, device="meta")
    joined.weight = nn.Parameter(torch.cat([each.weight.data for each in linears]), requires_grad=False)
    biases = [each.bias.data for each in linears if each.bias is not None]
    joined.register_parameter("bias", nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None)
    return joined


def _product(linear: PackedLinear, inputs: Tensor, residual: Tensor | None) -> Tensor:
    output: Tensor = linear(inputs) if residual is None else linear.added_to(residual, inputs)
    return output


# -- the proof


class _Call(NamedTuple):
    """What a module is called with in a forward of the whole model."""

    given: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """What the module is called for."""
        hidden: Tensor = self.given[0] if self.given else self.named["hidden_states"]
        return hidden


_Calls = WeakKeyDictionary[nn.Module, _Call]  # weak, so that what is replaced goes at once
_Candidates = Callable[[nn.Module, _Call], Iterator[nn.Module]]


class _Outcome(AttentionStep):
    """Stands in for the step in the call of a part, and notes what the part stores, asks for and returns."""

    def __init__(self) -> None:
        self.numbers: list[Tensor] = []
        self.others: list[object] = []
        self.options: AttentionOptions | None = None
        self._random = torch.Generator().manual_seed(1)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.numbers += [key, value]
        self.others.append(layer_idx)
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """Random numbers, which do not hide what the part makes of them."""
        self.numbers.append(query)
        self.others += [id(mask), options.scaling, options.softcap, id(options.sinks)]
        self.options = options
        shape = 1, query.shape[2], query.shape[1], value.shape[3]
        return torch.randn(shape, generator=self._random).to(query.dtype)

    def agrees(self, other: "_Outcome") -> bool:
        """Whether all is the same, up to a few roundings of a row's numbers."""
        if self.others != other.others or len(self.numbers) != len(other.numbers):
            return False
        return all(map(_agree, self.numbers, other.numbers))


def _agree(expected: Tensor, made: Tensor) -> bool:
    if expected.shape != made.shape or expected.dtype != made.dtype:
        return False
    bounds = _TOLERANCE * expected.float().norm(dim=-1)
    return bool(((expected.float() - made.float()).norm(dim=-1) <= bounds).all())


def _record_calls(module: nn.Module) -> _Calls:
    """What each part of ``module`` is called with in a forward of a few tokens."""
    calls = _Calls()

    def note(part: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[part] = _Call(given, named)

    hooks = [part.register_forward_pre_hook(note, with_kwargs=True) for part in module.modules()]
    step, tokens = _Outcome(), len(_SCALES)
    try:
        forward(module, step, [0] * tokens, range(tokens), [0])  # type: ignore[arg-type]
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _first_same(own: nn.Module, candidates: _Candidates, call: _Call) -> nn.Module | None:
    """The first candidate that computes what ``own`` does, with the attributes of ``own`` that a model might read."""
    try:
        expected = None
        for made in candidates(own, call):
            expected = expected or _outcome(own, call)
            if expected.agrees(_outcome(made, call)):
                for name, value in vars(own).items():
                    if not name.startswith("_") and not hasattr(made, name):
                        setattr(made, name, value)
                return made.train(own.training)
    except Exception:  # whatever a foreign part raises means the same: it is not like ours
        return None
    return None


def _outcome(part: nn.Module, call: _Call) -> _Outcome:
    """What comes of calling ``part`` as in ``call``, but with random numbers, the same ones each time."""
    outcome, random = _Outcome(), torch.Generator().manual_seed(0)
    given = [_randomised(value, outcome, random) for value in call.given]
    named = {name: _randomised(value, outcome, random) for name, value in call.named.items()}
    with serving(outcome):
        output = part(*given, **named)
    outcome.numbers.append(output[0] if isinstance(output, tuple) else output)
    outcome.others.append(type(output))
    return outcome


def _randomised(value: object, step: _Outcome, random: torch.Generator) -> object:
    """``value`` with other numbers: rows of all scales, cosines and sines, and positions far apart."""
    if isinstance(value, StepCache):
        return step
    if isinstance(value, tuple):  # of cosines and sines
        return tuple(torch.randn(each.shape, generator=random).sin().to(each.dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return torch.randint(1 << 20, value.shape, generator=random)
    scales = torch.tensor(_SCALES).repeat(value.numel())[: value.numel() // value.shape[-1]]
    return (torch.randn(value.shape, generator=random) * scales.view(*value.shape[:-1], 1)).to(value.dtype)


@cache
def _functions() -> ctypes.CDLL:
    """The functions of kernels/csrc/fused.cpp. Raises RuntimeError, with the reason, where they cannot be had."""
    library, described = load_native()
    if library is None:
        raise RuntimeError(described)
    return library
