"""``splitwiser report``: writes one self-contained HTML page about folders of results."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from splitwiser.errors import InputError, first_line
from splitwiser.results.report.folders import (
    Advice,
    Comparison,
    Folder,
    Profile,
    Run,
    Sweep,
    are_stand_ins,
    read_folder,
)
from splitwiser.results.report.of_advice import advice_part
from splitwiser.results.report.of_comparison import comparison_part, runs_part
from splitwiser.results.report.of_profile import profile_part
from splitwiser.results.report.of_run import run_part
from splitwiser.results.report.of_sweep import sweep_part
from splitwiser.results.report.page import Part, render

STAND_IN_WARNING = "Made on a stand-in for a GPU: the times, rates and memory on this page are not those of a GPU."


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page about ``folders`` to ``output``, or to ``report.html`` in the first of them; returns its path.

    Several runs are also compared with each other. Raises :class:`InputError` if a folder cannot be read, or if some
    runs used a stand-in for a GPU and others did not.
    """
    path = output or folders[0] / "report.html"
    read = [read_folder(folder) for folder in folders]
    stand_ins = {each for folder in read for each in are_stand_ins(folder)}
    if len(stand_ins) > 1:
        raise InputError(
            f"{', '.join(map(str, folders))}: some of these runs used a stand-in for a GPU, whose times mean nothing; "
            "report them separately"
        )
    runs = [each for each in read if isinstance(each, Run)]
    parts = [runs_part(runs, "against")] if len(runs) > 1 else []
    for number, each in enumerate(read, start=1):
        parts += _parts(each, f"part{number}", closed=len(runs) > 1)
    if stand_ins == {True}:
        parts[0] = replace(parts[0], warnings=[STAND_IN_WARNING, *parts[0].warnings])
    title = parts[0].title if len(folders) == 1 or len(runs) == len(folders) else f"{len(folders)} folders of results"
    made = f"Made by splitwiser report on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC from {', '.join(map(str, folders))}."
    try:
        path.write_text(render(title, parts, made), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {first_line(error)}") from error
    return path


def _parts(folder: Folder, name: str, *, closed: bool) -> list[Part]:
    match folder:
        case Run():
            return [run_part(folder, name, folder.path.resolve().name, closed=closed)]
        case Comparison():
            return comparison_part(folder, name)
        case Sweep():
            return [sweep_part(folder, name)]
        case Profile():
            return [profile_part(folder, name, folder.path.resolve().name)]
        case Advice():
            return advice_part(folder, name)
