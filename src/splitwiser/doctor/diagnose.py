"""``splitwiser doctor``: what this machine has, which modes work on it for a model, and why each other one does not.

Every check gives a finding; a check that fails gives one with the reason. PyTorch and transformers are imported only where
a check needs them, so that all other checks still run where they are broken.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from splitwiser.doctor import survey
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.probe import ProbeError, ask, ask_ahead, stopping_probes
from splitwiser.errors import InputError, first_line
from splitwiser.model.checkpoints.catalog import resolve_model
from splitwiser.placement.modes import MODES
from splitwiser.results.terminal import columns

if TYPE_CHECKING:
    from splitwiser.doctor.needs import Needs

SECTIONS = ("software", "gpu", "processor", "memory", "hub", "model")
MODE_S = 60.0  # longest that a probe may take to check a mode


@dataclass(frozen=True)
class Finding:
    """Result of one check. ``ok`` is False if something is missing or prevents a run, None if the check does not apply or
    was not tried. ``figures`` are machine-readable: bytes, counts, names."""

    section: str
    name: str
    ok: bool | None
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModeFinding:
    """Whether ``mode`` works, with the reason if it does not, or a note if it does."""

    mode: str
    works: bool
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and which modes work."""

    model: str
    device: str | None
    findings: list[Finding]
    modes: list[ModeFinding]

    @property
    def works(self) -> bool:
        """Whether at least one mode works."""
        return any(mode.works for mode in self.modes)

    def as_dict(self) -> dict[str, Any]:
        """Return the content for ``--json``: ``works``, ``model``, ``device``, and ``findings`` and ``modes``, lists of the
        fields of :class:`Finding` and :class:`ModeFinding`."""
        return {"works": self.works, **asdict(self)}

    def __str__(self) -> str:
        marks = {True: "ok", False: "NO", None: "-"}
        lines = []
        for section in SECTIONS:
            rows = [(f"  {each.name}", marks[each.ok], each.text) for each in self.findings if each.section == section]
            lines += [section, columns(rows), ""]
        table = [(each.mode, "yes" if each.works else "no", each.note) for each in self.modes]
        return "\n".join([*lines, columns([("mode", "works", "why not / note"), *table])])


@stopping_probes()
def diagnose(config: DoctorConfig) -> Diagnosis:
    """Run all checks. Raises :class:`InputError` for an unknown model, or an invalid type, device or size."""
    entry = resolve_model(config.model, config.models)
    check = _Checks()
    check("software", "python", lambda: (True, f"{sys.version.split()[0]} at {sys.executable}", {}))
    pytorch = check("software", "pytorch", survey.find_pytorch).ok
    if pytorch:
        survey.ask_for_gpus_ahead()
    transformers = check("software", "transformers", survey.find_transformers).ok
    if pytorch:
        _check_syntax(config)
    gpus: list[dict[str, Any]] = check("gpu", "devices", survey.find_gpus).figures.get("devices", [])
    place: str | None = check("gpu", "device", survey.find_device, config.device, len(gpus)).figures.get("device")
    if pytorch and place:
        survey.ask_for_sharing_ahead(place)
        for mode in _probed_modes(place):
            ask_ahead("mode", mode, place, deadline_s=MODE_S)
    gpu = gpus[int(place.removeprefix("cuda:"))] if place and place != "cpu" else None
    memory = check("memory", "main_memory", survey.find_main_memory)
    hub = check("hub", "hub", survey.find_hub, entry.hub, config.hub)
    free: int | None = gpu["free_bytes"] if gpu else memory.figures.get("free_bytes")
    needs = None
    if pytorch and transformers and place and free is not None:
        needs = _find_needs(config, place, free, hub)
    check("model", "model", needs.find_model if needs else _unknown)
    check("model", "weights_and_pool", needs.find_memory if needs else _unknown)
    check("memory", "shared_memory", survey.find_shared_memory)
    check("memory", "dev_shm", survey.find_dev_shm, gpu is not None)
    check("memory", "open_files", survey.find_open_files)
    refused = {mode: _find_mode_problem(mode, place) for mode in MODES} if pytorch and place else {}
    check("software", "vllm", survey.find_vllm, config.backend_python, place, refused)
    check("gpu", "driver", survey.find_driver)
    check("gpu", "cuda_ipc", survey.find_cuda_ipc, place if gpu else None)
    check("gpu", "green_contexts", survey.find_green_contexts, gpu is not None, refused.get("green"))
    check("gpu", "mps_binary", survey.find_mps_binary)
    check("gpu", "mps_daemon", survey.find_mps_daemon)
    check("processor", "processor", survey.find_processor)
    check("processor", "cores", survey.find_cores)
    check("processor", "load", survey.find_load)
    check("processor", "compiler", survey.find_compiler)
    check("processor", "kernel", survey.find_kernel, place)
    check.close()
    modes = [_judge_mode(mode, check.findings, refused.get(mode), needs) for mode in MODES]
    return Diagnosis(entry.name, place, list(check.findings.values()), modes)


class _Checks:
    """Runs checks, keeps their findings by name and shows the current check on a terminal."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self._line = tqdm(total=0, bar_format="checking {desc}", disable=None, leave=False)

    def __call__(self, section: str, name: str, find: Callable[..., survey.Found], *arguments: object) -> Finding:
        self._line.set_description_str(name)
        try:
            found = find(*arguments)
        except InputError as error:
            found = False, error.cli_message, {}
        except ProbeError as error:
            found = False, str(error), {}
        except Exception as error:
            found = False, f"cannot be determined ({type(error).__name__}: {first_line(error)})", {}
        self.findings[name] = Finding(section, name, *found)
        return self.findings[name]

    def close(self) -> None:
        """Remove the line from the terminal."""
        self._line.close()


def _check_syntax(config: DoctorConfig) -> None:
    """Raise :class:`InputError` for an invalid device name or size; whether the device exists is a finding."""
    from splitwiser.machine.device import resolve_device
    from splitwiser.model.kv_pool import find_pool_problem

    resolve_device(config.device, gpus=sys.maxsize)
    find_pool_problem(config.kv_memory, sys.maxsize)


def _find_needs(config: DoctorConfig, place: str, free: int, hub: Finding) -> "Needs":
    import torch

    from splitwiser.doctor.needs import find_needs

    unreachable = hub.figures.get("problem") or (hub.text if hub.ok is False else None)
    return find_needs(config, torch.device(place), free, unreachable)


def _unknown() -> survey.Found:
    return None, "cannot be determined without PyTorch, transformers and a device", {}


# the modes


def _judge_mode(mode: str, found: dict[str, Finding], refused: str | None, needs: "Needs | None") -> ModeFinding:
    problem = next((problem for problem in _problems(mode, found, refused, needs) if problem), None)
    if problem:
        return ModeFinding(mode, False, problem)
    notes = [needs.note if needs else ""]
    if MODES[mode].layout is not None and found["kernel"].ok is False:
        notes.append(f"decode attention: {found['kernel'].figures.get('kernel', found['kernel'].text)}")
    if mode == "mp" and found["device"].figures["device"] == "cpu" and found["cores"].figures.get("cores") == 1:
        notes.append("prefill and decode share one core")
    return ModeFinding(mode, True, "; ".join(filter(None, notes)))


def _problems(mode: str, found: dict[str, Finding], refused: str | None, needs: "Needs | None") -> Iterator[str | None]:
    """Yield what prevents ``mode`` from working, in the order in which a run would encounter it; None for no problem."""
    for name in ("pytorch", "transformers"):
        if not found[name].ok:
            yield f"{name}: {found[name].text}"
    if not found["device"].ok:
        yield found["device"].text
    yield refused
    if MODES[mode].shares_memory:
        for name in ("shared_memory", "cuda_ipc"):
            if found[name].ok is False:
                yield f"cannot share memory between processes: {found[name].text}"
    if needs:
        yield needs.problem
        if MODES[mode].layout is not None:
            yield needs.dispatch
        yield needs.memory_alone if MODES[mode].layout is None else needs.memory_with_pool
        yield needs.text


def _probed_modes(place: str) -> tuple[str, ...]:
    """Return the modes that are checked in another process, since the check may initialise CUDA."""
    return () if place == "cpu" else tuple(mode.name for mode in MODES.values() if mode.needs_gpu)


def _find_mode_problem(mode: str, place: str) -> str | None:
    """Return the result of :func:`splitwiser.placement.checks.find_mode_problem`, from a probe if it may initialise CUDA."""
    if mode not in _probed_modes(place):
        from splitwiser.placement.checks import find_mode_problem

        return find_mode_problem(mode, place)
    try:
        answer: str | None = ask("mode", mode, place, deadline_s=MODE_S)
    except ProbeError as error:
        return str(error)
    return answer
