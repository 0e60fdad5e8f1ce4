"""The settings of a checkpoint's ``generation_config.json``: those that are sampling parameters here, and the others."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

# Settings that change no token here: special tokens, lengths, how it is computed and reported, and what each request sets
# itself. Of the others, no mode applies more than own_sampling has; a note tells the user.
_CHANGES_NO_TOKEN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "max_time",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "use_cache", "cache_implementation", "cache_config",
    "max_cache_len", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
    "prefill_chunk_size", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "transformers_version",
}  # fmt: skip
_NEUTRAL: dict[str, object] = GenerationConfig._get_default_generation_params() | {"guidance_scale": 1.0}
_OF_DRAWING = ("temperature", "top_k", "top_p", "min_p")


def own_sampling(generation: GenerationConfig | None) -> dict[str, Any]:
    """Return the parameters of :class:`~splitwiser.request.SamplingParams` by which ``model.generate`` would choose tokens
    if it were given none: the repetition penalty, and how tokens are drawn if the settings say that they are."""
    if generation is None:
        return {}
    of_generate = ["repetition_penalty", *(_OF_DRAWING if generation.do_sample else ())]
    given = {name: getattr(generation, name) for name in of_generate}
    own = {name: _NEUTRAL.get(name) if value is None else value for name, value in given.items()}
    if own["repetition_penalty"] == 1:
        del own["repetition_penalty"]
    return {name: value for name, value in own.items() if value is not None}


def unapplied_settings(generation: GenerationConfig | None) -> list[str]:
    """Return a note of the settings that would change tokens and that no mode applies, or none."""
    given = generation.to_diff_dict() if generation else {}
    settings = [
        f"{name}={value}"
        for name, value in sorted(given.items())
        if name not in {*_CHANGES_NO_TOKEN, *own_sampling(generation)}
        and not name.startswith("_")
        and value not in (None, [], {}, _NEUTRAL.get(name))
    ]
    if not settings:
        return []
    return [f"the checkpoint's generation settings are not applied, in any mode: {', '.join(settings)}"]


def describe_own_sampling(own: Mapping[str, Any], choice: str) -> list[str]:
    """Return a note of the parameters ``own`` of a checkpoint and of what becomes of them by ``--generation_config``, or
    none if it has none."""
    if not own:
        return []
    named = ", ".join(f"{name}={value}" for name, value in own.items())
    if choice == "checkpoint":
        return [f"parameters that a request leaves at their default are the checkpoint's own: {named}"]
    return [f"the checkpoint's own sampling is not applied: {named}; generation_config checkpoint does"]
