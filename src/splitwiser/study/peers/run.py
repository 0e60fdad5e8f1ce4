"""Runs other engines as variants of a comparison, by :mod:`splitwiser.study.peers.program` in the engine's own
environment."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitwiser.config import RunConfig
from splitwiser.elsewhere import PROGRAM
from splitwiser.engine.policy import READ_BY
from splitwiser.errors import InputError, UnsupportedModelError, unknown_name
from splitwiser.files import write_rows
from splitwiser.machine.load import LoadMeter, MachineLoad
from splitwiser.model.checkpoints.catalog import resolve_model
from splitwiser.options import option_fields
from splitwiser.results.schema import TOKENS, names
from splitwiser.study.fresh_runs import Outcome, run_process
from splitwiser.study.peers.program import ENGINES, ONLY
from splitwiser.workload.config import WorkloadConfig
from splitwiser.workload.job import Job

MODELS = "models"  # a comparison's folder for the checkpoint and peers' forms of it, while it runs


@dataclass(frozen=True)
class Peer:
    """Another engine, and the Python executable of its environment."""

    engine: str
    python: Path

    def __str__(self) -> str:
        return f"{self.engine}={self.python}"


def read_peer(text: str) -> Peer:
    """Read ``ENGINE=ENVIRONMENT``, a folder with ``bin/python`` or a Python executable. Raises :class:`InputError`."""
    engine, _, where = text.partition("=")
    if engine not in ENGINES:
        raise unknown_name("peer", engine, list(ENGINES))
    python = Path(where) if Path(where).is_file() else Path(where) / "bin" / "python"
    if not python.exists():
        raise InputError(f"--peer {text}: no bin/python there; scripts/install_peer.sh creates an environment")
    return Peer(engine, python.absolute())


def check_peer(config: RunConfig, job: Job) -> None:
    """Raise :class:`InputError` if peers cannot run ``job`` as ``config`` requires."""
    if config.adapters or any(job.adapters):
        raise InputError("a peer runs the model alone; leave --adapter, and cases that need one, out")
    for name, own in (("quantization", "none"), ("kv_dtype", "auto")):
        if getattr(config, name) != own:
            raise InputError(f"a peer runs the model in --dtype; give --{name} in a --variant of its own")
    params = job.sampling_params(config)
    if config.generation_config != "none":
        raise InputError("a peer chooses tokens greedily by the model's own logits; leave --generation_config out")
    if any(each.temperature for each in params):
        raise InputError("a peer chooses tokens greedily; leave --temperature out")
    if any(each.changes_logits for each in params):
        raise InputError(
            "a peer chooses tokens by the model's own logits; leave penalties, --logit_bias and --min_tokens out"
        )
    if any(each.n > 1 or each.logprobs is not None or each.prompt_logprobs is not None for each in params):
        raise InputError(
            "a peer gives one sample of a prompt, and its tokens alone; leave --n, --logprobs and --prompt_logprobs out"
        )
    if any(each.stop or each.stop_token_ids for each in params):
        raise InputError("a peer generates a fixed number of tokens per request; leave --stop and --stop_token_ids out")
    if config.max_concurrency is None and any(job.arrival_s):
        raise InputError(
            "a peer takes requests that arrive at once or as others finish, not at given times; give --request_rate inf or "
            "--max_concurrency"
        )
    if any(any(getattr(job, name)) for name in READ_BY):
        raise InputError(f"a peer takes requests in an order of its own; leave {', '.join(READ_BY)} out")
    if not all(each.ignore_eos for each in params):
        raise InputError("a peer generates a fixed number of tokens per request; give --ignore_eos or --output_tokens")


def share_with_peers(config: RunConfig, job: Job, folder: Path, engines: Sequence[str]) -> dict[str, Any]:
    """Write the requests of ``job``, as token ids, into ``folder``, and a checkpoint of the model where its weights are
    random or a GGUF file's. Returns the run options that refer to both. Raises :class:`InputError` for a request that cannot
    be served, and for a model that one of ``engines`` cannot serve."""
    from splitwiser.llm import make_requests  # these import PyTorch
    from splitwiser.model.loading import load_model

    entry = resolve_model(config.model, config.models)
    written = config.load_format == "dummy" or entry.gguf is not None
    device = "cpu" if written else config.device_name
    model = load_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device=device,
        load_format=config.load_format,
        seed=config.seed,
        weights=written,
    )
    if model.encodes:
        raise UnsupportedModelError(f"model {model.name} is an encoder-decoder, which no peer serves; leave --peer out")
    architecture = type(model.module).__name__
    for engine in engines:
        if architecture not in ONLY.get(engine, (architecture,)):
            known = ", ".join(ONLY[engine])
            raise UnsupportedModelError(
                f"peer {engine} serves {known} here, and model {model.name} is {architecture}; leave this peer out"
            )
    prompts, params = job.make_prompts(model, config.seed), job.sampling_params(config)
    requests = make_requests(model, prompts, params, [0.0] * len(prompts), config.seed)
    workload = folder / f"{job.label}.json"
    content = {
        "max_new_tokens": [request.max_tokens for request in requests],
        "prompts": [request.prompt_token_ids for request in requests],
    }
    workload.write_text(json.dumps(content), encoding="utf-8")
    location = entry.location
    if written:
        location = str(folder / MODELS / model.name)
        model.module.save_pretrained(location)
    return {
        "model": location,
        "load_format": "auto",
        "workload": str(workload),
        "max_concurrency": config.max_concurrency,
        "ignore_eos": True,
    }


def without_requests(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return run ``options`` without those that define its requests and their arrivals."""
    named = {name for name, each in option_fields(WorkloadConfig).items() if each.metadata["group"] != "sampling"}
    return {name: value for name, value in options.items() if name not in named}


def run_peer(peer: Peer, config: RunConfig, folder: Path, label: str, show: Callable[[str], None]) -> Outcome:
    """Run ``peer`` on the model and workload file that ``config`` names, in a process with its own environment. Its
    tokens go to ``folder/runs/<label>``, its output to ``folder/logs/<label>.log``; ``show`` is called with its progress.
    The outcome has the columns of ``throughput.csv`` that a peer has values for."""
    from splitwiser.model.checkpoints.configuration import plan_model  # imports PyTorch

    directory, log = folder / "runs" / label, folder / "logs" / f"{label}.log"
    directory.mkdir(parents=True)
    answers = directory / "answers.json"
    _, device, _, dtype = plan_model(
        config.model,
        models=config.models,
        dtype=config.dtype,
        device=config.device_name,
        load_format=config.load_format,
    )
    asked: dict[str, object] = {
        "model": config.model,
        "workload": config.workload,
        "dtype": str(dtype).removeprefix("torch."),
        "max_concurrency": config.max_concurrency,
        "goodput": config.goodput,
        "scratch": folder / MODELS,
        "output": answers,
    }
    command = [
        "env", "-u", "PYTHONPATH", *(["CUDA_VISIBLE_DEVICES="] if device.type == "cpu" else []),
        str(peer.python), "-P", str(PROGRAM), "splitwiser.study.peers.program", peer.engine,
        *(f"--{name}={value}" for name, value in asked.items() if value is not None),
    ]  # fmt: skip
    stretch = LoadMeter()
    code = run_process(command, log, show)
    load = MachineLoad(during=stretch.end())
    if code or not answers.exists():
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Outcome("failed", f"exit code {code}: {said[-1].strip() if said else 'no output'}", directory)
    figures = json.loads(answers.read_text(encoding="utf-8"))
    _write_tokens(directory / "tokens.csv", Path(str(config.workload)), figures.pop("token_ids"))
    answers.unlink()
    row = {
        "run_id": label,
        "model": resolve_model(config.model, config.models).name,
        "backend": peer.engine,
        "mode": peer.engine,
        "dtype": asked["dtype"],
        "load_format": config.load_format,
        "max_concurrency": config.max_concurrency,
        **figures,
        **load.columns,
    }
    return Outcome(
        "finished", "", directory, {name: "" if value is None else str(value) for name, value in row.items()}
    )


def _write_tokens(path: Path, workload: Path, answers: list[list[int]]) -> None:
    """Write the token ids of each request's prompt and answer in the format of a run's ``tokens.csv``."""
    prompts = json.loads(workload.read_text(encoding="utf-8"))["prompts"]
    rows = [
        {
            "request_id": number,
            "prompt_token_ids": " ".join(map(str, prompt)),
            "token_ids": " ".join(map(str, answer)),
        }
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    write_rows(path, names(TOKENS), rows)
