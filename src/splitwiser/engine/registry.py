"""Objects that an option names: of a class in a table or of one that Python can import, with parameters."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from typing import Any, Generic, TypeVar

from splitwiser.errors import InputError, first_line, unknown_name
from splitwiser.formats import parse_as

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """The classes that the option ``--option`` names, as ``NAME`` or ``NAME:PARAMETER=VALUE,...``.

    A name is a key of ``table``, whose values are ``MODULE:CLASS``, or is itself ``MODULE:CLASS`` for a class that Python
    can import; the parameters are fields of the class, which is then a dataclass. ``spellings`` are other names for keys of
    the table. Objects have the ``methods`` of ``interface``.
    """

    option: str
    table: Mapping[str, str]
    interface: str
    methods: Sequence[str]
    spellings: Mapping[str, str] = field(default_factory=dict)

    def spelt(self, given: str) -> str:
        """Return ``given``, a value of the option, with its name as the table spells it."""
        name, colon, parameters = _split(given)
        return f"{self.spellings.get(name, name)}{colon}{parameters}"

    def name(self, given: str) -> str:
        """Return the name in ``given``, a value of the option, as the table spells it."""
        return _split(self.spelt(given))[0]

    def find(self, given: str) -> T:
        """Return the object that ``given`` names.

        Raises :class:`~splitwiser.errors.InputError` if there is none, if a parameter is unknown or invalid, or if the
        object lacks a method of the interface.
        """
        name, _, parameters = _split(self.spelt(given))
        module, colon, class_name = self.table.get(name, name).partition(":")
        where = f"--{self.option} {given}"
        if not colon:
            raise unknown_name(self.option, name, [*self.table, "MODULE:CLASS"])
        if module in self.table:
            raise InputError(f"{where}: parameters are given as {module}:PARAMETER=VALUE,...")
        try:
            kind = getattr(import_module(module), class_name)
            found: T = _make(kind, parameters, where) if parameters else kind()
        except InputError:
            raise
        except Exception as error:  # a user's module may raise anything
            raise InputError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        for method in self.methods:
            if not callable(getattr(found, method, None)):
                raise InputError(f"{where}: has no method {method}; {self.interface} says what it does")
        return found

    def describe(self, given: str) -> dict[str, object]:
        """Return the class of :meth:`find`'s object and all of its parameters, for the run's record."""
        found = self.find(given)
        kind = type(found)
        return {"class": f"{kind.__module__}:{kind.__qualname__}"} | {
            name: getattr(found, name) for name in _parameter_names(kind)
        }


def _split(given: str) -> tuple[str, str, str]:
    """Return the name, the colon and the parameters of ``NAME:PARAMETER=VALUE,...``, whose name may be ``MODULE:CLASS``."""
    name, *parameters = re.split(r":\s*(?=\w*=)", given, maxsplit=1)
    return name, ":" if parameters else "", "".join(parameters)


def _make(kind: type, parameters: str, where: str) -> Any:  # noqa: ANN401  # a ``kind``
    """Return an instance of ``kind`` with the ``parameters`` of its name. Raises :class:`InputError`, beginning with
    ``where``."""
    values: dict[str, str] = {}
    for each in parameters.split(","):
        name, equals, value = each.strip().partition("=")
        if not equals or name in values:
            raise InputError(f"{where}: '{each}' must be PARAMETER=VALUE, each parameter once")
        values[name] = value
    known = _parameter_names(kind)
    unknown = [name for name in values if name not in known]
    if unknown and not known:
        raise InputError(f"{where}: {kind.__name__} has no parameters")
    if unknown:
        raise InputError(f"{where}: {unknown_name('parameter', unknown[0], known)}")
    return parse_as(kind, values, where)


def _parameter_names(kind: type) -> list[str]:
    return [each.name for each in fields(kind) if each.init] if is_dataclass(kind) else []
