"""Mode ``generate`` with adapters: peft's own modules for LoRA, and transformers' own ``generate`` with virtual tokens in
its cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from splitwiser.model.adapters.files import WEIGHTS, AdapterFiles
from splitwiser.model.adapters.loaded import KeysValues
from splitwiser.model.adapters.reading import NAME, fitting, load_adapter, open_peft
from splitwiser.model.forward import cache_argument
from splitwiser.model.loading import LoadedModel
from splitwiser.request import Adapter

Generate = Callable[..., Tensor]


class ReferenceAdapters:
    """The adapters of a model as peft and transformers compute them.

    LoRA layers are peft's, and on for the requests that use them. Virtual tokens are tokens that ``generate`` finds in its
    cache. (peft's own ``generate`` puts them there too, but with transformers 5.24, where the cache has another name, peft
    0.21 loses them.)
    """

    def __init__(self, model: LoadedModel, files: Sequence[AdapterFiles], merge: bool) -> None:
        self._model = model
        self._keys_values: dict[str, KeysValues] = {}
        self._opened: PeftModel | None = None
        self._names: dict[str, str] = {}  # within peft, of the adapters that are peft's modules
        for each in files:
            if each.virtual_tokens or merge:
                self._keys_values[each.name] = load_adapter(model, each, merge).keys_values
        for each in files if not merge else ():
            if not each.virtual_tokens:
                self._open(each)
        model.adapters = {each.name: Adapter(each.name, virtual_tokens=each.virtual_tokens) for each in files}

    def _open(self, files: AdapterFiles) -> None:
        with fitting(self._model, files):
            if self._opened is None:
                self._opened, self._names[files.name] = open_peft(self._model, files), NAME
                return
            name = self._names[files.name] = f"{NAME}{len(self._names)}"
            loaded = self._opened.load_adapter(
                files.directory, name, torch_device=str(self._model.device), autocast_adapter_dtype=False
            )
            if loaded.missing_keys:
                raise KeyError(f"{WEIGHTS[0]} lacks {loaded.missing_keys[0]}")

    @contextmanager
    def using(self, adapter: Adapter) -> Iterator[Generate]:
        """Yield ``generate`` of the model with ``adapter``; it takes ``input_ids`` and ``attention_mask`` of shape
        (rows, tokens), and transformers' other arguments."""
        if self._opened is not None and adapter.name in self._names:
            self._opened.set_adapter(self._names[adapter.name])
            yield self._opened.generate
            return
        with self._opened.disable_adapter() if self._opened is not None else nullcontext():
            yield partial(self._generate, self._keys_values.get(adapter.name, []))

    def _generate(
        self,
        keys_values: KeysValues,
        input_ids: Tensor,
        attention_mask: Tensor,
        **others: Any,  # noqa: ANN401  # transformers' arguments
    ) -> Tensor:
        module = self._model.module
        if keys_values:
            rows, tokens = len(input_ids), keys_values[0][0].shape[1]
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(keys_values):
                cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
            others[cache_argument(module)] = cache
            input_ids = torch.cat([input_ids.new_zeros(rows, tokens), input_ids], dim=1)
            attention_mask = torch.cat([attention_mask.new_ones(rows, tokens), attention_mask], dim=1)
        generate = cast("Generate", module.generate)
        return generate(input_ids=input_ids, attention_mask=attention_mask, **others)
