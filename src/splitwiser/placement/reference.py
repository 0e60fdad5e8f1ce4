"""Mode ``generate``: transformers' own ``generate``, without workers and KV pool."""

from contextlib import ExitStack
from dataclasses import replace

from splitwiser.engine.generate import GenerateEngine
from splitwiser.model.compatibility import padding_changes_tokens
from splitwiser.model.trials import remembered_flag
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.prepare import StartedEngine, load

ONE_LENGTH = "prompts of one length at a time: padding may change this model's tokens"


def start(config: EngineConfig, _: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`."""
    model = load(replace(config, kv_memory="auto"))  # no KV pool has to fit beside the weights
    one_length = remembered_flag(model, "padding changes tokens", padding_changes_tokens)
    if one_length:
        model.notes.append(ONE_LENGTH)
    using = None
    if config.adapter_files:
        from splitwiser.model.adapters.reference import ReferenceAdapters  # imports peft, which takes seconds

        using = ReferenceAdapters(model, list(config.adapter_files.values()), config.merge_adapter).using
    kernels = dict.fromkeys(("prefill_attention", "decode_attention"), "transformers' own")
    return StartedEngine(model, GenerateEngine(model, config.batch_size, one_length, using), None, kernels, [])
