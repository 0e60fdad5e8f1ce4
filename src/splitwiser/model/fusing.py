"""Replaces modules of a model in a half precision by fused ones that are shown to compute the same, and packs its other
linear layers.

A module is recognised by its structure. A candidate takes its place only if, called with the same random numbers, both
store, ask of the attention and return the same up to rounding; otherwise the model's own module stays. The arguments of each
module are recorded in one forward of the whole model, and only their numbers are replaced by random ones.
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from splitwiser.model.attention import AttentionOptions, AttentionStep, Mask, StepCache, serving
from splitwiser.model.direct import DirectDecoder, direct_decoder, use_directly
from splitwiser.model.forward import forward
from splitwiser.model.fused import (
    FusedAttention,
    FusedLayer,
    FusedMLP,
    FusedNorm,
    LayerStack,
    PlainMLP,
    StackedLayers,
    TorchNorm,
    find_compile_problem,
    is_layer_norm,
)
from splitwiser.model.kernels.int8_linear import Int8Linear
from splitwiser.model.kernels.packed_linear import IDENTITY, RELU, PackedLinear, is_packable, pack_linears

# gates x / (1 + exp(-(linear * x + cubic * x^3))): SiLU, GELU's form with tanh, and the quick form of GELU
_GATES = ((1.0, 0.0), (2 * (2 / torch.pi) ** 0.5, 2 * (2 / torch.pi) ** 0.5 * 0.044715), (1.702, 0.0))
# activations that oneDNN applies to a product: its name for one, and which form of it
_ACTIVATIONS = (RELU, ("gelu", "none"), ("gelu", "tanh"), ("swish", ""))
# what models call the layers of a gated feed-forward network
_GATED = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
# what models call the last layer of their attention
_OUTPUTS = ("o_proj", "out_proj")
# what models call the parts of a layer whose feed-forward network has no gate: norm, attention, norm, first linear layer,
# activation and last linear layer
_PLAIN_LAYERS = (("self_attn_layer_norm", "self_attn", "final_layer_norm", "fc1", "activation_fn", "fc2"),)
# what models call a linear layer and the activation of its output
_ACTIVATED = (
    ("fc1", "activation_fn"), ("dense_h_to_4h", "act"), ("dense_h_to_4h", "gelu_impl"), ("up_proj", "act"),
    ("fc_in", "act"), ("c_fc", "act"), ("wi", "act"),
)  # fmt: skip
# of the rows that modules are compared on: far apart, so that an epsilon or a limit makes a difference
_SCALES = (1e-3, 0.03, 0.3, 1.0, 3.0, 30.0, 1000.0)
# relative to the norm of a row: a few roundings to bfloat16, each at most 1/256 of a number
_TOLERANCE = 1 / 64


Run = Callable[[Any, AttentionStep, Sequence[int]], object]  # runs a whole model through a step over token ids


def run_decoder(module: PreTrainedModel, step: AttentionStep, token_ids: Sequence[int]) -> None:
    """Run a decoder once over one prompt."""
    forward(module, step, token_ids, range(len(token_ids)), [0])


def fuse_parts(
    module: nn.Module, remembered: Sequence[int | None] | None = None, run: Run = run_decoder
) -> list[int | None]:
    """Replace the modules within ``module`` that a fused one is shown to compute the same as, one after another, so that
    there are never two copies of all weights; and, on a CPU, pack the linear layers that are left. Returns the number of the
    chosen candidate for each module in turn, None where its own stays; if these are ``remembered``, nothing is tried.

    ``module`` is a model that ``run`` runs, whose attention implementation is :data:`splitwiser.model.attention.NAME`.
    """
    calls = _record_calls(module, run)
    fusing = _Fusing(calls, remembered)
    if next(module.parameters()).is_cuda:
        fusing.replace_children(module, _gpu_norm_candidates)
        return fusing.choices
    if find_compile_problem() is None:
        for candidates in (_norm_candidates, _mlp_candidates, _attention_candidates, _layer_candidates):
            fusing.replace_children(module, candidates)
        _stack_layers(module)
        _mark_last_layer(module)
    fusing.fuse_activations(module)
    pack_linears(module, keep=_read_by_their_parents(module, calls))
    if decoder := DirectDecoder.find(module):
        fusing.call_directly(decoder)
    return fusing.choices


def describe_parts(module: nn.Module) -> str:
    """Return the kinds of fused modules within ``module`` and the number of each, for a run's record."""
    names = {
        TorchNorm: "rms_norm", FusedNorm: "rms_norm", FusedMLP: "gated_mlp", FusedAttention: "attention",
        FusedLayer: "decoder_layer",
    }  # fmt: skip
    parts = list(module.modules())
    counts = Counter(names[type(part)] for part in parts if type(part) in names)
    counts["activation"] = sum(
        isinstance(part, PackedLinear | Int8Linear) and part.activation != IDENTITY for part in parts
    )
    counts["decoder"] = int(isinstance(module, PreTrainedModel) and direct_decoder(module) is not None)
    described = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    missing = None if next(module.parameters()).is_cuda else find_compile_problem()
    return described or f"none ({missing or 'no module of the model matches one'})"


# -- candidates: what might replace a module, the likeliest first


class _Call(NamedTuple):
    """The arguments of a module in a forward of the whole model."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """The module's main input."""
        hidden: Tensor = self.positional[0] if self.positional else self.named["hidden_states"]
        return hidden


_Calls = WeakKeyDictionary[nn.Module, _Call]  # weak, so that a replaced module is freed at once
_Candidates = Callable[[nn.Module, _Call], Iterator[nn.Module]]


def _norm_candidates(own: nn.Module, call: _Call) -> Iterator[nn.Module]:
    if (found := _norm_weight(own, call)) and found[0].dtype == torch.bfloat16 and found[0].device.type == "cpu":
        for offset in (0.0, 1.0):
            yield FusedNorm(*found, offset)


def _gpu_norm_candidates(own: nn.Module, call: _Call) -> Iterator[nn.Module]:
    if (found := _norm_weight(own, call)) and found[0].dtype in (torch.bfloat16, torch.float16):
        yield TorchNorm(*found)


def _norm_weight(own: nn.Module, call: _Call) -> tuple[nn.Parameter, float] | None:
    """Return the weight and the epsilon of a module that may be a norm, of the type and the width of its input; None of any
    other."""
    weight, epsilon = getattr(own, "weight", None), getattr(own, "variance_epsilon", getattr(own, "eps", None))
    if not (isinstance(weight, nn.Parameter) and isinstance(epsilon, float) and len(list(own.parameters())) == 1):
        return None
    hidden = call.hidden_states
    return (weight, epsilon) if weight.dtype == hidden.dtype and weight.shape == hidden.shape[-1:] else None


def _mlp_candidates(own: nn.Module, _: _Call) -> Iterator[nn.Module]:
    for names in _GATED:
        linears = _packable_children(own, *names)
        if linears and _can_concatenate(linears[:2]):
            gate_up_proj, down_proj = PackedLinear(_concatenate(linears[:2])), PackedLinear(linears[2])
            for factors in _GATES:
                yield FusedMLP(gate_up_proj, down_proj, factors)


def _attention_candidates(own: nn.Module, call: _Call) -> Iterator[nn.Module]:
    found = (_packable_children(own, "q_proj", "k_proj", "v_proj", output) for output in _OUTPUTS)
    linears = next(filter(None, found), [])
    head_dim, layer_idx = getattr(own, "head_dim", None), getattr(own, "layer_idx", None)
    if not (linears and _can_concatenate(linears[:3]) and isinstance(head_dim, int) and isinstance(layer_idx, int)):
        return
    norms = [part for name in ("q_norm", "k_norm") if isinstance(part := getattr(own, name, None), FusedNorm)]
    kinds = {(norm.offset, norm.epsilon, len(norm.weight)) for norm in norms}
    if norms and (len(norms) != 2 or len(kinds) != 1 or len(norms[0].weight) != head_dim):
        return
    angles = call.named.get("position_embeddings")
    if angles is not None and not _can_rotate(angles, call.hidden_states):
        return
    options = _run(own, call).options
    if options is None:
        return
    qkv_proj, o_proj = PackedLinear(_concatenate(linears[:3])), PackedLinear(linears[3])
    if angles is None:
        for factor in (1.0, getattr(own, "scaling", 1.0)):  # which a layer may multiply its queries by itself
            scaled = replace(options, scaling=options.scaling * factor)
            yield FusedAttention(own, qkv_proj, o_proj, scaled, norms)
        return
    for half_angles in (False, True):
        if angles[0].shape[-1] * (1 + half_angles) <= head_dim:
            yield FusedAttention(own, qkv_proj, o_proj, options, norms, half_angles)


def _can_rotate(angles: tuple[Tensor, Tensor], hidden_states: Tensor) -> bool:
    """Whether ``angles`` are the cosines and sines of the tokens of ``hidden_states``, of a type that heads are rotated
    with."""
    cosines, sines = angles
    return (
        cosines.dtype == sines.dtype
        and cosines.dtype in (torch.bfloat16, torch.float32)
        and cosines.shape[:-1] == sines.shape[:-1] == hidden_states.shape[:-1]
    )


def _layer_candidates(own: nn.Module, _: _Call) -> Iterator[nn.Module]:
    children = dict(own.named_children())
    parts = {
        "input_layernorm": FusedNorm, "self_attn": FusedAttention,
        "post_attention_layernorm": FusedNorm, "mlp": FusedMLP,
    }  # fmt: skip
    if {name: type(child) for name, child in children.items()} == parts:
        yield FusedLayer(*(children[name] for name in parts))  # type: ignore[arg-type]
    for names in _PLAIN_LAYERS:
        if set(names) == set(children):
            yield from _plain_layers(*(children[name] for name in names))


def _plain_layers(
    norm: nn.Module, attention: nn.Module, other_norm: nn.Module, first: nn.Module, _: nn.Module, last: nn.Module
) -> Iterator[nn.Module]:
    norms = [part for part in (norm, other_norm) if is_layer_norm(part)]
    if len(norms) == 2 and isinstance(attention, FusedAttention) and is_packable(first) and is_packable(last):
        up_proj, down_proj = PackedLinear(first), PackedLinear(last)
        for activation in _ACTIVATIONS:
            yield FusedLayer(norms[0], attention, norms[1], PlainMLP(up_proj.with_activation(activation), down_proj))


def _stack_layers(module: nn.Module) -> None:
    """Let consecutive fused layers within ``module`` be computed in one call."""
    for part in list(module.modules()):
        for is_layer, run in itertools.groupby(part.children(), lambda child: isinstance(child, FusedLayer)):
            if is_layer:
                LayerStack.make([child for child in run if isinstance(child, FusedLayer)])
        for name, child in list(part.named_children()):
            if type(child) is nn.ModuleList and len(child) and all(isinstance(each, FusedLayer) for each in child):
                setattr(part, name, StackedLayers(child))


def _mark_last_layer(module: nn.Module) -> None:
    """Mark the fused layer in ``module``, if there is one, that is the last before the head."""
    if not isinstance(module, PreTrainedModel):
        return
    count = getattr(module.config.get_text_config(), "num_hidden_layers", None)
    for part in module.modules():
        if isinstance(part, FusedLayer):
            part.is_last = part.self_attn.layer_idx + 1 == count


def _activation_candidates(pair: nn.Module, _: _Call) -> Iterator[nn.Module]:
    linear = PackedLinear(pair.get_submodule("0"))  # type: ignore[arg-type]
    for activation in _ACTIVATIONS:
        yield linear.with_activation(activation)


def _packable_children(own: nn.Module, *names: str) -> list[nn.Linear]:
    """Return the children of these names if all are linear layers that can be packed; else an empty list."""
    found = [part for name in names if is_packable(part := getattr(own, name, None))]
    return found if len(found) == len(names) else []


def _can_concatenate(linears: Sequence[nn.Linear]) -> bool:
    return len({(each.in_features, each.bias is None) for each in linears}) == 1


def _concatenate(linears: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer whose outputs are those of ``linears``, one after another."""
    inputs, outputs = linears[0].in_features, sum(each.out_features for each in linears)
    joined = nn.Linear(inputs, outputs, device="meta")
    joined.weight = nn.Parameter(torch.cat([each.weight.data for each in linears]), requires_grad=False)
    biases = [each.bias.data for each in linears if each.bias is not None]
    joined.register_parameter("bias", nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None)
    return joined


# -- replacement


class _Fusing:
    """Replaces modules by candidates: those that are shown to be equivalent, or those ``remembered``."""

    def __init__(self, calls: _Calls, remembered: Sequence[int | None] | None) -> None:
        self.choices: list[int | None] = []
        self._calls = calls
        self._remembered = None if remembered is None else iter(remembered)

    def replace_children(self, module: nn.Module, candidates: _Candidates) -> None:
        for name, own in list(module.named_children()):
            self.replace_children(own, candidates)
            if own in self._calls and (fused := self._choose(own, candidates, self._calls[own])):
                setattr(module, name, fused)

    def fuse_activations(self, module: nn.Module) -> None:
        for child in list(module.children()):
            self.fuse_activations(child)
        if module in self._calls:
            self._fuse_activation(module)

    def _fuse_activation(self, own: nn.Module) -> None:
        """Let a linear layer of ``own`` compute the activation behind it too, if the two and ``own`` as a whole then compute
        the same."""
        calls, children = self._calls, dict(own.named_children())
        names = next((pair for pair in _ACTIVATED if set(pair) <= set(children)), None)
        if names is None:
            return
        first, activation = (children[name] for name in names)
        if not (is_packable(first) and first in calls and activation in calls):
            return
        fused = self._choose(nn.Sequential(first, activation), _activation_candidates, calls[first])
        if fused is None:
            return

        def with_fused_activation(*_: object) -> Iterator[nn.Module]:
            layer = copy.copy(own)
            layer._modules = {**own._modules, names[0]: fused, names[1]: nn.Identity()}
            yield layer

        if self._choose(own, with_fused_activation, calls[own]):  # nothing is computed between the two
            setattr(own, names[0], fused)
            setattr(own, names[1], nn.Identity())

    def call_directly(self, decoder: DirectDecoder) -> None:
        """Let steps of a model be computed by ``decoder``, if that computes the very same as its own forward."""
        chosen = _computes_the_same(decoder) if self._remembered is None else next(self._remembered) is not None
        self.choices.append(0 if chosen else None)
        if chosen:
            use_directly(decoder)

    def _choose(self, own: nn.Module, candidates: _Candidates, call: _Call) -> nn.Module | None:
        """Return the chosen candidate with the attributes of ``own`` that a model might read; None if ``own`` stays."""
        if self._remembered is None:
            number, chosen = _find_equivalent(own, candidates, call) or (None, None)
        else:
            number = next(self._remembered)
            chosen = None if number is None else next(itertools.islice(candidates(own, call), number, None))
        self.choices.append(number)
        if chosen is None:
            return None
        for name, value in vars(own).items():
            if not name.startswith("_") and not hasattr(chosen, name):
                setattr(chosen, name, value)
        return chosen.train(own.training)


def _find_equivalent(own: nn.Module, candidates: _Candidates, call: _Call) -> tuple[int, nn.Module] | None:
    """Return the first candidate that computes the same as ``own``, after its number; None if none does."""
    try:
        expected = None
        for number, candidate in enumerate(candidates(own, call)):
            expected = expected or _run(own, call)
            if expected.agrees(_run(candidate, call)):
                return number, candidate
    except Exception:  # whatever a foreign module raises means the same: it is not like ours
        return None
    return None


# -- comparison


class _Recorder(AttentionStep):
    """Takes the place of the step while a module runs, and records what the module stores, asks for and returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[Tensor] = []
        self.others: list[object] = []
        self.options: AttentionOptions | None = None
        self._random = torch.Generator().manual_seed(1)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.numbers += [key, value]
        self.others.append(layer)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: object, options: AttentionOptions) -> Tensor:
        """Return random numbers, which do not hide what the module does with them."""
        self.numbers.append(query.float() * options.scaling)
        self.others += [mask if isinstance(mask, Mask) else id(mask), options.softcap, id(options.sinks)]
        self.others += [id(options.bias), options.bias_by_position]
        self.options = options
        shape = 1, query.shape[2], query.shape[1], value.shape[3]
        return torch.randn(shape, generator=self._random).to(query)

    def agrees(self, other: "_Recorder") -> bool:
        """Whether ``other`` recorded the same, up to a few roundings of a row's numbers."""
        if self.others != other.others or len(self.numbers) != len(other.numbers):
            return False
        return all(map(_agree, self.numbers, other.numbers))


def _agree(expected: Tensor, given: Tensor) -> bool:
    if expected.shape != given.shape or expected.dtype != given.dtype:
        return False
    bounds = _TOLERANCE * expected.float().norm(dim=-1)
    return bool(((expected.float() - given.float()).norm(dim=-1) <= bounds).all())


def _computes_the_same(decoder: DirectDecoder) -> bool:
    """Whether ``decoder`` and the model's own forward store, ask of the attention and return the same numbers, with rows of
    all scales between their modules and positions far apart."""
    random, rows = torch.Generator().manual_seed(0), len(_SCALES)
    config = decoder.module.config.get_text_config()
    limits = config.vocab_size, getattr(config, "max_position_embeddings", None) or rows
    token_ids, positions = (torch.randint(limit, (rows,), generator=random) for limit in limits)

    def scale(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        return _scaled(output)

    hooks = [part.register_forward_hook(scale) for part in decoder.parts]
    own, direct = _Recorder(), _Recorder()
    try:
        own.numbers.append(forward(decoder.module, own, token_ids, positions, range(rows)))
        with serving(direct):
            direct.numbers.append(decoder(token_ids[None], positions[None], torch.arange(rows)))
    except Exception:  # as in _find_equivalent
        return False
    finally:
        for hook in hooks:
            hook.remove()
    return own.others == direct.others and all(map(torch.equal, own.numbers, direct.numbers))


def _record_calls(module: nn.Module, run: Run) -> _Calls:
    """Return the arguments of each module within ``module`` when ``run`` takes it over a few tokens."""
    calls = _Calls()

    def record(part: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[part] = _Call(positional, named)

    hooks = [part.register_forward_pre_hook(record, with_kwargs=True) for part in module.modules()]
    tokens = len(_SCALES)
    try:
        run(module, _Recorder(), [0] * tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _read_by_their_parents(module: nn.Module, calls: _Calls) -> set[nn.Module]:
    """Return the linear layers within ``module`` whose parent computes without calling them, as LongCat's router does with
    its weight: a packed one has no numbers to read."""
    called = [part for part in module.modules() if part in calls]
    return {
        part for parent in called for part in parent.children() if isinstance(part, nn.Linear) and part not in calls
    }


def _run(part: nn.Module, call: _Call) -> _Recorder:
    """Call ``part`` as in ``call`` but with random numbers, the same ones each time, and return what it did."""
    recorder, random = _Recorder(), torch.Generator().manual_seed(0)
    positional = [_randomised(value, recorder, random) for value in call.positional]
    named = {name: _randomised(value, recorder, random) for name, value in call.named.items()}
    with serving(recorder):
        output = part(*positional, **named)
    recorder.numbers.append(output[0] if isinstance(output, tuple) else output)
    recorder.others.append(type(output))
    return recorder


def _randomised(value: object, recorder: _Recorder, random: torch.Generator) -> object:
    """Return ``value`` with random numbers: rows of all scales, cosines and sines, and positions far apart."""
    if isinstance(value, StepCache):
        return recorder
    if isinstance(value, tuple):  # of cosines and sines
        return tuple(torch.randn(each.shape, generator=random).sin().to(each) for each in value)
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return torch.randint(1 << 20, value.shape, generator=random).to(value.device)
    return _scaled(torch.randn(value.shape, generator=random)).to(value)


def _scaled(numbers: Tensor) -> Tensor:
    """Return rows of ``numbers`` times :data:`_SCALES`."""
    scales = torch.tensor(_SCALES).repeat(numbers.numel())[: numbers.numel() // numbers.shape[-1]]
    return numbers * scales.view(*numbers.shape[:-1], 1).to(numbers.dtype)
