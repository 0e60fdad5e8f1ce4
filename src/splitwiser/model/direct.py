"""The forward of a decoder of fused layers by a few calls of its own modules.

Around its layers, transformers' forward makes masks, copies options and wraps outputs. In a decode step of one request that
counts, since the weights that were just read have taken the caches from Python. :class:`DirectDecoder` is used in its place
where it is shown to compute the very same numbers.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from splitwiser.model.attention import Mask
from splitwiser.model.fused import StackedLayers

CAUSAL = Mask(causal_mask_function)


@dataclass(frozen=True)
class _Names:
    """What a model calls its modules beside ``embed_tokens`` and ``layers``: its last norm, and what it makes of positions,
    angles or embeddings to add."""

    norm: str
    angles: str | None = None
    places: str | None = None

    @property
    def all(self) -> set[str]:
        """The names of all children of the model without its head."""
        return {"embed_tokens", "layers", *filter(None, (self.norm, self.angles, self.places))}


_KNOWN = (_Names("norm", angles="rotary_emb"), _Names("final_layer_norm", places="embed_positions"))


@dataclass(frozen=True, eq=False)
class DirectDecoder:
    """Calls the modules of a decoder: those of ``body``, called ``names``, and ``head`` of ``module``. They are looked up in
    each call, since others may take their places."""

    module: PreTrainedModel
    body: Any  # a module, whose children mypy does not know
    names: _Names
    head: str

    @classmethod
    def find(cls, module: nn.Module) -> "DirectDecoder | None":
        """Return ``module`` as a decoder of known structure; None if it has another one."""
        if not isinstance(module, PreTrainedModel):
            return None
        own_head = module.get_output_embeddings()
        head = next((name for name, child in module.named_children() if child is own_head), None)
        for body in module.modules():
            children = dict(body.named_children())
            names = next((names for names in _KNOWN if names.all == set(children)), None)
            if head and names and isinstance(children["layers"], StackedLayers):
                return cls(module, body, names, head)
        return None

    def __call__(self, token_ids: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of ``rows``, shape (rows, vocabulary), in the current step. Its tokens are ``token_ids`` at
        ``positions``, of shape (1, tokens); all are int64."""
        body, names = self.body, self.names
        hidden: Tensor = body.embed_tokens(token_ids)
        if names.places:
            hidden = hidden + getattr(body, names.places)(None, 0, position_ids=positions)
        angles = getattr(body, names.angles)(hidden, position_ids=positions) if names.angles else None
        norm, head = getattr(body, names.norm), getattr(self.module, self.head)
        if len(rows) == token_ids.shape[1]:
            at_once: Tensor | None = body.layers.stack.logits(hidden, CAUSAL, angles, norm, head)
            if at_once is not None:
                return at_once[0]
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=CAUSAL, position_embeddings=angles)
        logits: Tensor = head(norm(hidden[:, rows]))  # the norm of a row does not depend on other rows
        return logits[0]

    @property
    def parts(self) -> list[nn.Module]:
        """The modules after which nothing else than what is called here may happen: of the layers the last."""
        own = dict(self.body.named_children())
        made = [own[name] for name in ("embed_tokens", self.names.places, self.names.norm) if name]
        return [*made, list(own["layers"].children())[-1]]

    @property
    def has_hooks(self) -> bool:
        """Whether somebody wants to know of the forwards that this takes the place of."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in (self.module, self.body))


def use_directly(decoder: DirectDecoder) -> None:
    """Let steps of the decoder's module be computed by it."""
    vars(decoder.module)["direct"] = decoder


def direct_decoder(module: PreTrainedModel) -> DirectDecoder | None:
    """Return what computes steps of ``module`` in place of its own forward; None if that is to be called."""
    found: DirectDecoder | None = vars(module).get("direct")
    return None if found is None or found.has_hooks else found
