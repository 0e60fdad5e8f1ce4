"""Errors that users see, each as one clear line: invalid input (exit code 2) and failures (exit code 1)."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

_OPTION = re.compile(r"(?<![\w-])--(?=[a-z_]+(?![\w=-]))")
_FEW = 8  # names that an error message lists even if one of them is like the given one
_MOST = 30  # names that it lists at most


class SplitwiserError(Exception):
    """Base class of errors that are reported as one line, without a traceback.

    Messages are written with options as on the command line, ``--max_batch``, which :attr:`cli_message` keeps. ``str`` has
    them without the dashes, as Python's arguments and the keys of YAML files are spelt.
    """

    exit_code = 1

    @property
    def cli_message(self) -> str:
        """The message with options spelt as on the command line."""
        return super().__str__()

    def __str__(self) -> str:
        return _OPTION.sub("", self.cli_message)


class InputError(SplitwiserError):
    """Invalid input of the user: the message names the file or option, what is wrong and what would be right."""

    exit_code = 2


class UnsupportedModelError(InputError):
    """The engine cannot serve this architecture exactly; the message names the class and the reason."""


class RunError(SplitwiserError):
    """A failure during a run; results finished before it are kept."""


class WorkerLostError(RunError):
    """A worker or the MPS daemon died, failed or does not answer; the message names it and the cause."""


def find_nearest(given: object, known: Iterable[object]) -> list[str]:
    """Return up to three of ``known`` that are spelt like ``given``, the most similar first. Case does not matter."""
    names = {str(name).casefold(): str(name) for name in known}
    folded = str(given).casefold()

    def similarity(name: str) -> float:
        return difflib.SequenceMatcher(None, name, folded).ratio()

    near = difflib.get_close_matches(folded, names, n=3, cutoff=0.55)
    return [names[name] for name in near if similarity(name) > similarity(near[0]) - 0.15]


def unknown_name(kind: str, given: object, known: Iterable[object]) -> InputError:
    """Return an :class:`InputError` for an unknown name, with the most similar valid names, and all of them if they are few
    or none is similar."""
    names = [str(name) for name in known]
    near = find_nearest(given, names)
    hints = [f"did you mean {' or '.join(near)}?"] if near else []
    if not near or len(names) <= _FEW:
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        hints.append(f"known: {', '.join(names[:_MOST])}{more}")
    return InputError(f"unknown {kind} '{given}'; {' '.join(hints)}")


def check_keywords(
    kind: str, given: Iterable[str], known: Collection[str], not_taken: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Raise :class:`InputError` for the first keyword in ``given`` that is not ``known``: with its reason in ``not_taken``,
    which has keywords of other libraries, or else with the most similar names."""
    for name in given:
        if name in not_taken:
            raise InputError(f"'{name}' is no {kind}: {not_taken[name]}")
        if name not in known:
            raise unknown_name(kind, name, known)


def first_line(error: BaseException) -> str:
    """Return the first line of ``error``'s message, with the next one if it ends with a colon, or its type's name if it has
    none."""
    line, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{line} {more[0].strip()}" if more and line.endswith(":") else line
