"""The configuration of a run: a workload, an engine, and where results go. Each field is an option of ``splitwiser run``."""

from dataclasses import dataclass
from pathlib import Path

from splitwiser import constants
from splitwiser.errors import InputError
from splitwiser.options import option
from splitwiser.placement.config import EngineConfig
from splitwiser.results.goodput import parse_goodput
from splitwiser.workload.config import WorkloadConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig(WorkloadConfig, EngineConfig):
    """What to run and how. Raises :class:`~splitwiser.errors.InputError` on values that make no sense together."""

    goodput: str | None = option(
        None, "targets in ms, such as ttft:200,tpot:50,e2el:5000: report the requests/s that meet all", "results"
    )
    results: str = option(str(constants.DIR_RESULTS), "directory that gets a folder for this run", "results")

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        WorkloadConfig.__post_init__(self)
        check_results(self.results)
        if self.goodput is not None:
            parse_goodput(self.goodput)


def check_results(directory: str) -> None:
    """Raises :class:`InputError` where ``directory``, given as ``--results``, is a file."""
    if Path(directory).exists() and not Path(directory).is_dir():
        raise InputError(f"--results {directory}: is a file; a directory is needed")
