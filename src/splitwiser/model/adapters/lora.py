"""Linear layers with the parts of several LoRA adapters, of which each token of a step gets its own request's or none."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from splitwiser.model.adapters.loaded import LoraPart
from splitwiser.model.attention import current_loras


class LoraLinear(nn.Module):
    """A linear layer (``base``, whatever computes it) and what LoRA adapters add to its output (Hu et al. 2021,
    arXiv 2106.09685): ``scaling * up @ down @ input``.

    The matrices of all adapters stand side by side, so that a step takes two products however many adapters its requests
    use: of each token's inner numbers, only those of its own adapter are kept. Which these are is read from a tensor on the
    device, so a CUDA graph can replay the layer. ``parts`` are by the number of the adapter.
    """

    owners: Tensor
    scaling: Tensor

    def __init__(self, base: nn.Module, parts: Mapping[int, LoraPart]) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.cat([part.down for part in parts.values()]), requires_grad=False)
        self.up = nn.Parameter(torch.cat([part.up.T for part in parts.values()]), requires_grad=False)
        ranks = torch.tensor([len(part.down) for part in parts.values()])
        owners, scaling = torch.tensor(list(parts)), torch.tensor([part.scaling for part in parts.values()])
        self.register_buffer("owners", owners.repeat_interleave(ranks).to(self.down.device))
        self.register_buffer("scaling", scaling.repeat_interleave(ranks).to(self.down))

    @property
    def weight(self) -> Tensor:
        """The base layer's, whose dtype some models read."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features). Raises the error of
        :meth:`~splitwiser.model.attention.AttentionStep.loras_of`."""
        output: Tensor = self.base(inputs)
        rows = inputs.flatten(0, -2)
        loras = current_loras(len(rows))
        if loras is None:
            return output
        kept = (self.owners == loras[:, None]) * self.scaling
        return torch.addmm(output.flatten(0, -2), linear(rows, self.down) * kept, self.up).view_as(output)


def add_lora(module: nn.Module, adapters: Iterable[Mapping[str, LoraPart]]) -> None:
    """Put a :class:`LoraLinear` around each layer of ``module`` that one of ``adapters`` has a part for, by the layer's
    path; the first adapter has number 1. Such layers are left out of fused modules; the layer within is still packed."""
    parts: defaultdict[str, dict[int, LoraPart]] = defaultdict(dict)
    for number, adapter in enumerate(adapters, 1):
        for path, part in adapter.items():
            parts[path][number] = part
    for path, of_layer in parts.items():
        module.set_submodule(path, LoraLinear(module.get_submodule(path), of_layer))
