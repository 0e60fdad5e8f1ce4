"""The YAML file of a command: when and how it was run, from which commit, on what machine, and how it ended."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from splitwiser.files import Status, write_yaml
from splitwiser.machine.describe import describe_machine, describe_versions, git_commit

ENVIRONMENT = ("commit", "machine", "versions")


class Record:
    """The YAML record of a command, rewritten as more becomes known.

    ``sections`` are the command's own. Those of :data:`ENVIRONMENT` describe ``device`` and are left out without one: for
    commands that do not use a device themselves. Callers add to ``content`` and call :meth:`write`.
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
        """Replace the file with ``status`` and ``content``."""
        write_yaml(self._path, {"status": status, **self.content})


def read_environment(path: Path) -> dict[str, Any]:
    """Return the sections of :data:`ENVIRONMENT` from a run's record."""
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: record[name] for name in ENVIRONMENT}
