"""Fields of a configuration as options: for a parser, from text or YAML, and back to command-line arguments.

A configuration is a frozen dataclass whose options are fields made by :func:`option`; other fields are not options.
"""

import argparse
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any, ClassVar, NoReturn, Self, get_args

from splitwiser.errors import InputError, check_keywords, unknown_name
from splitwiser.text import shorten

GROUPS = ("advice", "steps", "requests", "arrivals", "model and placement", "sampling", "results")


def option(default: object, help_text: str, group: str = "model and placement", singular: str = "") -> Any:  # noqa: ANN401  # as dataclasses.field
    """Return a dataclass field that is also an option, listed under ``group`` of :data:`GROUPS`. The type of the option's
    values follows from the field's annotation. An option with a ``singular``, which is another spelling of it, takes several
    values: with commas between them, or given several times."""
    return field(default=default, metadata={"help": help_text, "group": group, "singular": singular})


def option_fields(kind: type) -> dict[str, Field[Any]]:
    """Return the fields of the dataclass ``kind`` that are options, by name."""
    return {each.name: each for each in fields(kind) if each.metadata}


class Options:
    """Base class of dataclasses that users fill in. Raises :class:`InputError` for a keyword that is none of their fields,
    with its reason in ``NOT_TAKEN`` if another library has it. ``repr`` has the options that differ from their defaults."""

    NOT_TAKEN: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, **given: object) -> Self:
        """Refuse unknown keywords, of which ``__init__`` would raise a TypeError."""
        check_keywords(f"option of {cls.__name__}", given, _field_names(cls), cls.NOT_TAKEN)
        return super().__new__(cls)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in option_fields(type(self))}
        defaults = {name: each.default for name, each in option_fields(type(self)).items()}
        changed = (f"{name}={shorten(value)}" for name, value in given.items() if value != defaults[name])
        return f"{type(self).__name__}({', '.join(changed)})"


def _field_names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


def option_type(of: Field[Any]) -> type:
    """Return the type of an option's values on the command line: bool, int, float or str, as the annotation names first."""
    named = get_args(of.type) or (of.type,)
    return next((kind for kind in (bool, int, float) if kind in named), str)


class UsageError(InputError):
    """Arguments that cannot be parsed; ``usage`` shows how the command is called."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class OptionParser(argparse.ArgumentParser):
    """Raises :class:`UsageError` where argparse prints its usage and exits, and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401  # argparse's, of various types
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UsageError`, naming an option by its first spelling."""
        message = re.sub(r"^argument (--\w+)[^:]*: ", r"\1: ", message)
        message = re.sub(
            r": invalid (int|float) value: ", lambda found: f" must be {_NUMBERS[found[1]]}, not ", message
        )
        raise UsageError(message, self.format_usage())

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Raise :class:`UsageError` for the arguments that were not parsed, with the options most similar to the first."""
        given = next((each.partition("=")[0] for each in rest if each.startswith("-")), None)
        if given is None:
            self.error(f"unexpected argument '{rest[0]}'; a value with spaces needs quotation marks")
        known = [each for each in self._option_string_actions if re.fullmatch(r"--(no-)?\w+", each)]
        self.error(unknown_name("option", given, known).cli_message)


class _Join(argparse.Action):
    """Joins the values of an option that is given several times by commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,  # noqa: ANN401  # as argparse.Action
        option_string: str | None = None,
    ) -> None:
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, f"{earlier},{values}" if earlier else values)


_NUMBERS = {"int": "a whole number", "float": "a number"}


def add_options(
    parser: argparse.ArgumentParser, kind: type, names: Collection[str] | None = None, *, defaults: bool = True
) -> None:
    """Add an option for each field of ``kind`` (or only those in ``names``), in the field's group, spelt with underscores or
    hyphens. Without ``defaults``, the namespace has only options that are given."""
    selected = [each for each in option_fields(kind).values() if names is None or each.name in names]
    used = {each.metadata["group"] for each in selected}
    groups = {name: parser.add_argument_group(name) for name in GROUPS if name in used}
    for each in selected:
        group = groups[each.metadata["group"]]
        singular = each.metadata["singular"]
        spellings = [singular, each.name] if singular else [each.name]
        flags = dict.fromkeys(f"--{form}" for name in spellings for form in (name, name.replace("_", "-")))
        default = each.default if defaults else argparse.SUPPRESS
        help_text, kind_of_value = each.metadata["help"], option_type(each)
        if kind_of_value is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=help_text, default=default)
        else:
            metavar = (singular or each.name).upper()
            group.add_argument(
                *flags, dest=each.name, action=_Join if singular else "store", type=kind_of_value, help=help_text,
                default=default, metavar=metavar,
            )  # fmt: skip


def given_options(namespace: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Return the options of ``kind`` that are in ``namespace``."""
    return {name: value for name, value in vars(namespace).items() if name in option_fields(kind)}


def parse_options(arguments: Sequence[str], kind: type) -> dict[str, Any]:
    """Return the options of ``kind`` in ``arguments``. Raises :class:`InputError` for any other argument."""
    parser = OptionParser(add_help=False)
    add_options(parser, kind, defaults=False)
    namespace, rest = parser.parse_known_args(arguments)
    if rest:
        parser.refuse(rest)
    return given_options(namespace, kind)


def split_options(text: str, kind: type) -> dict[str, Any]:
    """Return the options of ``kind`` in ``text``, quoted as for a shell. Raises :class:`InputError`."""
    try:
        return parse_options(shlex.split(text), kind)
    except ValueError as error:
        raise InputError(f"{error} in '{text}'") from error


def typed_options(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return ``options`` (from YAML) with each value converted to the type of its field of ``kind``, as on a command line.

    An option with the value None is left out. Raises :class:`InputError` for an unknown option or an invalid value.
    """
    known = option_fields(kind)
    check_keywords("option", options, known)
    for name, value in options.items():
        wants_bool = option_type(known[name]) is bool
        if value is not None and isinstance(value, bool) != wants_bool:
            raise InputError(f"option '{name}' {'must' if wants_bool else 'cannot'} be true or false; it is {value!r}")
        if isinstance(value, (list, dict)):
            raise InputError(f"option '{name}' must be one value, in quotation marks if it is a list, not {value!r}")
    return parse_options(to_arguments(options), kind)


def to_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return ``options`` as command-line arguments; those that are None are left out."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """Return the numbers in ``text``, such as ``64,128``, of option ``name``, sorted and without duplicates. Raises
    :class:`InputError`."""
    numbers = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        if not part.isdecimal() or int(part) < 1:
            raise InputError(
                f"--{name} '{text}': '{part}' is not a whole number of 1 or more; write, for example, 64,128"
            )
        numbers.add(int(part))
    return tuple(sorted(numbers))


def check_counts(config: object, *names: str) -> None:
    """Raise :class:`InputError` unless each of ``config``'s options ``names`` is None, or 1 or more."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be 1 or more, not {value}")
