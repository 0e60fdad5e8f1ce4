"""Proves that the engine gives the tokens of transformers' ``generate``, on a tiny model with random weights of the same
architecture."""

import itertools
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from splitwiser import constants
from splitwiser.errors import SplitwiserError, UnsupportedModelError, first_line, unknown_name
from splitwiser.llm import LLM
from splitwiser.model.checkpoints.catalog import load_catalog
from splitwiser.model.checkpoints.configuration import plan_model
from splitwiser.model.kernels.packed_linear import find_packing_problem
from splitwiser.model.loading import LoadedModel, LoadFormat, load_model
from splitwiser.model.overview import find_route
from splitwiser.model.routes import ROUTES
from splitwiser.model.tiny import VOCABULARY, save_tiny, shrink, tiny_config
from splitwiser.request import SamplingParams

LENGTHS = (1, 5, 40, 100, 17, 2, 63)  # of prompts
ARRIVAL_GAP_S = 0.01
NEW_TOKENS = 24  # of each, so that some grow beyond the 64 positions at which rotary scaling begins
CHUNK = 24  # tokens in a prefill step, so that most prompts are split

# Each is a run of all prompts, with prefix caching two of them. Arrivals are staggered so that the last prompt comes first.
RUNS: dict[str, dict[str, Any]] = {
    "packed": {"mode": "sequential"},
    "chunked and staggered": {"mode": "sequential", "prefill_tokens": CHUNK},
    "mp": {"mode": "mp", "prefill_tokens": CHUNK},
    "hybrid and prefix caching": {
        "mode": "sequential",
        "schedule": "hybrid",
        "prefill_tokens": CHUNK,
        "prefix_caching": True,
    },
}


@dataclass(frozen=True)
class Proof:
    """What was found of one architecture (its ``model_type`` and the class of its model): the ``route`` that it takes, the
    runs that gave the tokens of ``generate`` (``shown``), and why it is not served (``problem``) or not taken on in bfloat16
    (``half_problem``), in one line each, or empty."""

    model_type: str
    class_name: str = ""
    route: str = ""
    shown: tuple[str, ...] = ()
    problem: str = ""
    half_problem: str = ""


def find_config(model: str | Path, models: str | Path = constants.MODELS) -> PreTrainedConfig:
    """Return the tiny configuration for a model (a name, a checkpoint directory or a hub id) or an architecture (a
    ``model_type`` of transformers). Raises :class:`~splitwiser.errors.InputError` for an unknown name."""
    name, catalog = str(model), load_catalog(Path(models))
    if name not in catalog and "/" not in name and not Path(name).is_dir():
        if name not in CONFIG_MAPPING:
            raise unknown_name("model or architecture", name, [*catalog, *CONFIG_MAPPING])
        return tiny_config(name)
    load_format = "dummy" if name in catalog and catalog[name].config else "auto"
    _, _, config, _ = plan_model(name, models=models, dtype="float32", device="cpu", load_format=load_format)
    return shrink(config)


def prove(config: PreTrainedConfig, runs: Sequence[str] = tuple(RUNS)) -> Proof:
    """Build a model of the tiny ``config`` and compare the tokens of ``runs`` (names of :data:`RUNS`), in float32 and
    greedy, with those of mode ``generate`` for each prompt alone."""
    proof = Proof(config.model_type)
    with tempfile.TemporaryDirectory() as folder:
        try:
            directory = save_tiny(config, Path(folder) / config.model_type)
            model = _load(directory, "float32")
            proof = replace(proof, class_name=type(model.module).__name__)
        except Exception as error:  # whatever building the model raises
            return replace(proof, problem=f"cannot be tried: {type(error).__name__}: {first_line(error)}")
        try:
            proof = replace(proof, route=find_route(model.module))
            ROUTES[model.kind].attach(_load(directory, "float32"))  # before the reference, which takes longer
            prompts = _prompts(model)
            expected = _tokens(directory, prompts, mode="generate", batch_size=1)
            for name in runs:
                if difference := _find_difference(prompts, _tokens(directory, prompts, **RUNS[name]), expected):
                    return replace(proof, problem=f"{name}: {difference}")
                proof = replace(proof, shown=(*proof.shown, name))
        except SplitwiserError as error:
            return replace(proof, problem=error.cli_message)
        return replace(proof, half_problem=_find_half_problem(directory))


def _load(directory: Path, dtype: str, load_format: LoadFormat = "auto") -> LoadedModel:
    return load_model(directory, dtype=dtype, device="cpu", load_format=load_format)


def _prompts(model: LoadedModel) -> list[list[int]]:
    """Return prompts of :data:`LENGTHS`, of those for which the model has positions enough."""
    rng = random.Random(0)
    lengths = [length for length in LENGTHS if length + NEW_TOKENS <= (model.max_positions or sys.maxsize)]
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def _tokens(directory: Path, prompts: Sequence[list[int]], **settings: Any) -> list[list[int]]:  # noqa: ANN401  # LLM's options
    arrivals = [ARRIVAL_GAP_S * number for number in reversed(range(len(prompts)))]
    staggered = "prefill_tokens" in settings
    with LLM(directory, dtype="float32", device="cpu", **settings) as llm:
        times = 2 if settings.get("prefix_caching") else 1  # the second time finds what the first has computed
        for _ in range(times):
            outputs = llm.generate(
                prompts, SamplingParams(max_tokens=NEW_TOKENS), arrival_s=arrivals if staggered else None
            )
    return [output.token_ids for output in outputs]


def _find_difference(
    prompts: Sequence[list[int]], given: Sequence[list[int]], expected: Sequence[list[int]]
) -> str | None:
    """Return where the tokens of the first request that differs do, in one line; None if all are equal."""
    for prompt, own, reference in zip(prompts, given, expected, strict=True):
        if own != reference:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, reference, strict=False))
            at = sum(1 for _ in same)
            tokens = " and not ".join(str((*each, "the end")[at]) for each in (own, reference))
            return f"of a prompt of {len(prompt)} tokens, new token {at + 1} is {tokens}"
    return None


def _find_half_problem(directory: Path) -> str:
    """Return why the engine does not take the model on in bfloat16, with its own modules or with fused ones; else empty.
    Its weights are those of its own initialisation: of the wide ones it would make more of rounding than trained ones do."""
    for pack in (False, True) if find_packing_problem() is None else (False,):
        try:
            model = _load(directory, "bfloat16", "dummy")
            ROUTES[model.kind].attach(model, pack=pack)
        except UnsupportedModelError as error:
            return error.cli_message
    return ""
