"""The folder that keeps this user's compiled functions from run to run. They are loaded as code, so nobody else may be able
to put a file there."""

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from splitwiser.machine.process import home_folder

_ROOT = 0
_UNMAPPED = (
    65534  # what root looks like from a user namespace that does not map it, such as an unprivileged container's
)


def cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/splitwiser`` or ``~/.cache/splitwiser``, created if it is missing.

    Raises OSError, in one line that says what helps, for a user without a home folder, if the folder cannot be created, and
    if a user other than this one and root could write to it or put another in its place.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = given if given.is_absolute() else home_folder("XDG_CACHE_HOME") / ".cache"
    folder = base / "splitwiser"
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = base.resolve() / "splitwiser"
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        problem = _find_problem(folder)
    except OSError as error:
        problem = f"{folder}: {error.strerror}"
    if problem:
        raise PermissionError(f"{problem}; set XDG_CACHE_HOME to a folder of your own")
    return folder


def _find_problem(folder: Path) -> str | None:
    """Return how a user other than this one and root could write to ``folder`` or replace it, or None if none could. Its
    parents must not be symbolic links."""
    own = os.geteuid()
    for place in (folder, *folder.parents):
        found, is_parent = place.lstat(), place != folder
        if not stat.S_ISDIR(found.st_mode):
            return f"{place} is not a directory"
        if found.st_uid not in (own, _ROOT, *([_UNMAPPED] if is_parent else [])):
            return f"{place} belongs to {_user(found.st_uid)}"
        if is_parent and found.st_mode & stat.S_ISVTX:
            continue  # as /tmp: others may add files, and neither rename nor remove this user's
        others = (
            stat.S_IWOTH if found.st_gid == found.st_uid else stat.S_IWOTH | stat.S_IWGRP
        )  # a user's own group is equal
        if found.st_mode & others:
            return f"{place} can be written to by other users"
    return None


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
