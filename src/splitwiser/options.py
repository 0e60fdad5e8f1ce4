"""The fields of :class:`~splitwiser.config.RunConfig` as options: of a parser, from text or YAML, and back to arguments."""

import argparse
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field
from typing import Any, NoReturn

from splitwiser.config import ProfileConfig, RunConfig, option_fields
from splitwiser.errors import InputError, unknown

GROUPS = ("advice", "steps", "requests", "arrivals", "model and placement", "sampling", "results")
_FIELDS = {each.name: each for each in option_fields(RunConfig)}


class _Parser(argparse.ArgumentParser):
    """Raises :class:`InputError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def add_run_options(
    parser: argparse.ArgumentParser, names: Collection[str] = tuple(_FIELDS), *, defaults: bool = True
) -> None:
    """An option for each of the fields ``names``, in the field's group, spelt with underscores or hyphens. Without
    ``defaults``, only those given are in the namespace."""
    _add_options(parser, [each for each in _FIELDS.values() if each.name in names], defaults)


def add_options(parser: argparse.ArgumentParser, kind: type[RunConfig] | type[ProfileConfig]) -> None:
    """An option for each field of ``kind`` that is one; see :func:`add_run_options`."""
    _add_options(parser, option_fields(kind), defaults=True)


def _add_options(parser: argparse.ArgumentParser, chosen: Sequence[Field[Any]], defaults: bool) -> None:
    used = {each.metadata["group"] for each in chosen}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    for each in chosen:
        group = groups[each.metadata["group"]]
        flags = dict.fromkeys([f"--{each.name}", f"--{each.name.replace('_', '-')}"])
        default = each.default if defaults else argparse.SUPPRESS
        help_text, option_type = each.metadata["help"], each.metadata["type"]
        if option_type is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=help_text, default=default)
        else:
            group.add_argument(*flags, type=option_type, help=help_text, default=default, metavar=each.name.upper())


def given_options(
    namespace: argparse.Namespace, kind: type[RunConfig] | type[ProfileConfig] = RunConfig
) -> dict[str, Any]:
    """The options of ``kind`` that ``namespace`` holds."""
    known = {each.name for each in option_fields(kind)}
    return {name: value for name, value in vars(namespace).items() if name in known}


def parse_options(arguments: Sequence[str]) -> dict[str, Any]:
    """The run options among ``arguments``, all of which must be such. Raises :class:`InputError`."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_run_options(parser, defaults=False)
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        raise unknown("option", rest[0], [f"--{name}" for name in _FIELDS])
    return given_options(namespace)


def split_options(text: str) -> dict[str, Any]:
    """The run options in ``text``, quoted as for a shell. Raises :class:`InputError`."""
    try:
        return parse_options(shlex.split(text))
    except ValueError as error:
        raise InputError(f"{error} in '{text}'") from error


def typed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` (from YAML) with each value as its field has it: what the command line makes of the same text.

    A value of None leaves its option out. Raises :class:`InputError`.
    """
    for name, value in options.items():
        if name not in _FIELDS:
            raise unknown("option", name, _FIELDS)
        wants_bool = _FIELDS[name].metadata["type"] is bool
        if value is not None and isinstance(value, bool) != wants_bool:
            raise InputError(f"option '{name}' {'must' if wants_bool else 'cannot'} be true or false; it is {value!r}")
        if isinstance(value, (list, dict)):
            raise InputError(f"option '{name}' must be one value, in quotation marks if it is a list, not {value!r}")
    return parse_options(to_arguments(options))


def to_arguments(options: Mapping[str, Any]) -> list[str]:
    """``options`` as arguments of ``splitwiser run``; those that are None are left out."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments
