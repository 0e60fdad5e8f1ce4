"""The YAML file of a command: when and how it was run, from which commit, on what machine, and how it ended."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from splitwiser.files import Status, write_yaml
from splitwiser.machine.describe import describe_machine, describe_versions, git_commit

PLACE = ("commit", "machine", "versions")


class Record:
    """What a command's YAML file says, which is written anew as more is known.

    ``sections`` are the command's own; those of :data:`PLACE` are about ``device``, or left out where the command stays away
    from it. Whoever knows more adds it to ``content``.
    """

    def __init__(self, path: Path, sections: Mapping[str, Any], device: torch.device | None = None) -> None:
        self._path = path
        self.content: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        if device is not None:
            self.content["commit"] = git_commit()
        self.content |= sections
        if device is not None:
            self.content |= {"machine": describe_machine(device), "versions": describe_versions()}

    def write(self, status: Status) -> None:
        """Replace the file by ``status`` and the content."""
        write_yaml(self._path, {"status": status, **self.content})


def read_place(path: Path) -> dict[str, Any]:
    """Return the sections of :data:`PLACE` from a run's record."""
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: record[name] for name in PLACE}
