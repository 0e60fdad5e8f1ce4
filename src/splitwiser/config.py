"""Configuration of a run: workload, engine and results folder. Each field is an option of ``splitwiser run``."""

from dataclasses import dataclass
from pathlib import Path

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.options import option
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.modes import find_backend, find_mode
from splitwiser.results.goodput import parse_goodput
from splitwiser.workload.cases import Case, get_case
from splitwiser.workload.config import WorkloadConfig


@dataclass(frozen=True, kw_only=True, repr=False)
class RunConfig(WorkloadConfig, EngineConfig):
    """Workload, engine and results of a run. Raises :class:`~splitwiser.errors.InputError` for invalid combinations."""

    goodput: str | None = option(
        None, "targets in ms, such as ttft:200,tpot:50,e2el:5000: report the requests/s that meet all", "results"
    )
    results: str = option(str(constants.DIR_RESULTS), "directory that gets a folder for this run", "results")

    def __post_init__(self) -> None:
        WorkloadConfig.__post_init__(self)
        case = get_case(Path(self.cases), self.case_id) if self.source == "case" else None
        if case is not None and case.kind is not None and not self.adapters:
            own = [name for name, files in self.own_adapters.items() if files.kind == case.kind]
            object.__setattr__(self, "adapters", own[0] if own else "")
        EngineConfig.__post_init__(self)
        if case is not None:
            self._check_case(case)
        copies = find_backend(self.backend).copies_kept
        may_find = self.same_examples or (case is not None and case.examples and not copies)
        if self.prefix_caching is None and may_find and find_mode(self.mode).layout is not None:
            object.__setattr__(self, "prefix_caching", True)
        check_results(self.results)
        if self.goodput is not None:
            parse_goodput(self.goodput)

    def _check_case(self, case: Case) -> None:
        """Raise :class:`InputError` for options that ``case`` does not go with, and unless requests have an adapter of its
        kind if it runs with one."""
        if self.same_examples and not case.examples:
            raise InputError(f"--same_examples: case {case.case_id} ({case.description}) has no in-context examples")
        files = self.adapter_files.get(self.default_adapter)
        if case.kind is not None and (files is None or files.kind != case.kind):
            given = f"adapter {files.name} is {files.kind_name}" if files else f"model {self.model} runs without one"
            raise InputError(
                f"case {case.case_id} ({case.description}) needs an adapter of that kind, and {given}; give one with "
                "--adapter NAME=DIRECTORY, and name it by --use_adapter if it is not the only one"
            )


def check_results(directory: str) -> None:
    """Raise :class:`InputError` if ``directory``, given as ``--results``, is empty or a file."""
    if not directory:
        raise InputError("--results is empty; a directory is needed, or . for the current one")
    if Path(directory).exists() and not Path(directory).is_dir():
        raise InputError(f"--results {directory}: is a file; a directory is needed")
