"""The YAML file of a command: when and how it was run, from which commit, on what machine, and how it ended."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from splitwiser.files import Status, write_yaml

if TYPE_CHECKING:
    import torch  # takes seconds to import, so at run time only once a command's input is right

ENVIRONMENT = ("commit", "machine", "versions")


class Record:
    """The YAML record of a command, rewritten as more becomes known.

    ``sections`` are the command's own. Those of :data:`ENVIRONMENT` describe ``device`` and are left out without one: for
    commands that do not use a device themselves. Callers add to ``content`` and call :meth:`write`, or let
    :meth:`running` do it.
    """

    def __init__(self, path: Path, sections: Mapping[str, Any], device: "torch.device | None" = None) -> None:
        self._path = path
        self.content: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        if device is None:
            self.content |= sections
            return
        from splitwiser.machine.describe import describe_machine, describe_versions, git_commit

        self.content |= {"commit": git_commit(), **sections}
        self.content |= {"machine": describe_machine(device), "versions": describe_versions()}

    def write(self, status: Status) -> None:
        """Replace the file with ``status`` and ``content``."""
        write_yaml(self._path, {"status": status, **self.content})

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write status ``running``, and at the end of the block whether it finished, failed or was interrupted. A block that
        does not finish is also named on stderr, with the folder of the results so far."""
        status: Status = "failed"
        self.write("running")
        try:
            yield
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.write(status)
            if status != "finished":
                print(f"{status}; the results so far are in {self._path.parent}", file=sys.stderr)


def read_environment(path: Path) -> dict[str, Any]:
    """Return the sections of :data:`ENVIRONMENT` from a run's record."""
    record = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: record[name] for name in ENVIRONMENT}
