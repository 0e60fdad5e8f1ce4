"""Worker layouts: how many workers of each role, and their shares of the device's compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from annotated_types import Interval
from pydantic import Strict

from splitwiser.engine.messages import Role, WorkerSpec
from splitwiser.errors import InputError, find_nearest
from splitwiser.files import load_yaml, named_configs
from splitwiser.formats import AtLeastOne, must_be, parse_as
from splitwiser.text import read_text


@dataclass(frozen=True)
class WorkerGroup:
    """``count`` workers of one role. ``share`` is the percentage of the device's compute that each of them may use; with
    None, the rest left by other groups is divided equally."""

    role: Annotated[Role, must_be(f"one of {', '.join(get_args(Role))}")]
    count: AtLeastOne = 1
    share: Annotated[int | None, Strict(), Interval(ge=1, le=100), must_be("a whole percentage from 1 to 100")] = None


@dataclass(frozen=True)
class WorkerLayout:
    """All workers of a run. Raises :class:`InputError` for a combination that cannot serve a request."""

    groups: tuple[WorkerGroup, ...]

    def __post_init__(self) -> None:
        roles = {group.role for group in self.groups}
        if not self.groups:
            raise InputError("--workers: the list is empty; a prefill and a decode worker, or a mixed one, are needed")
        if "mixed" in roles and len(roles) > 1:
            raise InputError("--workers: mixed workers do both phases themselves; list them without prefill or decode")
        for needed in ("prefill", "decode"):
            if "mixed" not in roles and needed not in roles:
                raise InputError(f"--workers: no {needed} worker; list at least one, or mixed workers alone")
        if len(roles) < len(self.groups):
            raise InputError("--workers: a role is listed twice; give it one entry with a count")
        total = sum(group.count * (group.share or 0) for group in self.groups)
        unshared = sum(group.count for group in self.groups if group.share is None)
        if total > 100 or (unshared and total >= 100):
            rest = " and others have none" if unshared else ""
            raise InputError(f"--workers: the shares make {total}%{rest}; together they may be 100% at most")

    @property
    def workers(self) -> tuple[WorkerSpec, ...]:
        """Workers with their names and shares, in the order of the groups."""
        given = sum(group.count * (group.share or 0) for group in self.groups)
        unshared = sum(group.count for group in self.groups if group.share is None)
        return tuple(
            WorkerSpec(
                f"{group.role}-{number}", group.role, (100 - given) / unshared if group.share is None else group.share
            )
            for group in self.groups
            for number in range(group.count)
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{group.count} {group.role}" + ("" if group.share is None else f" at {group.share}%")
            for group in self.groups
        )


ONE_MIXED = WorkerLayout((WorkerGroup("mixed"),))
ONE_OF_EACH = WorkerLayout((WorkerGroup("prefill"), WorkerGroup("decode")))


def parse_layout(given: str | Sequence[dict[str, Any]]) -> WorkerLayout:
    """Return the layout in a YAML file (its path, or its name in ``configs/workers``), in YAML text such as
    ``[{role: mixed, count: 4}]``, or in a list of mappings.

    Raises :class:`InputError` if it is not a valid layout.
    """
    where = "--workers"
    groups: object = given
    if isinstance(given, str):
        text = given
        if not given.lstrip().startswith("["):
            where = f"--workers file {given}"
            try:
                text = read_text(named_configs("workers").get(given, Path(given)))
            except (OSError, UnicodeDecodeError) as error:
                near = "".join(f"; did you mean {name}?" for name in find_nearest(given, named_configs("workers"))[:1])
                raise InputError(
                    f"--workers '{given}': neither a file, a name of configs/workers nor a list such as "
                    f"'[{{role: prefill}}, {{role: decode}}]'{near}"
                ) from error
        try:
            groups = load_yaml(text)
        except yaml.YAMLError as error:
            raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(groups, Sequence) or not all(isinstance(group, dict) for group in groups):
        raise InputError(f"{where}: must be a list of entries such as {{role: prefill, count: 1, share: 50}}")
    numbered = enumerate(groups, start=1)
    return WorkerLayout(tuple(parse_as(WorkerGroup, group, f"{where}, entry {number}") for number, group in numbered))
