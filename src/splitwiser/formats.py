"""Checks what a file holds against the annotations of a dataclass, by pydantic, and says in one line what is wrong.

A dataclass that is read from a file has fields of the types here, or of others with a :func:`must_be`.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge
from pydantic import Strict, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from splitwiser.errors import InputError, unknown

T = TypeVar("T")


def must_be(what: str, *, itself: bool = False) -> WrapValidator:
    """Return a mark for an annotation: whatever does not fit it "must be ``what``". With ``itself``, what is wrong inside of
    a value is said of that instead."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError as error:
            if itself and any(fault["loc"] for fault in error.errors()):
                raise
            raise PydanticCustomError("must_be", "must be {what}", {"what": what}) from error

    return WrapValidator(check)


Text = Annotated[str, Strict(), must_be("text")]
Whole = Annotated[int, Strict(), must_be("a whole number")]
AtLeastZero = Annotated[int, Strict(), Ge(0), must_be("a whole number of 0 or more")]
AtLeastOne = Annotated[int, Strict(), Ge(1), must_be("a whole number of 1 or more")]


def parse_as(kind: type[T], content: Mapping[Any, Any], where: str, **more: object) -> T:
    """Return ``content``, with the fields ``more``, as an instance of the dataclass ``kind``.

    Raises :class:`InputError` that begins with ``where`` and names the first field at fault.
    """
    known = [each.name for each in fields(kind) if each.name not in more] if is_dataclass(kind) else []
    for key in content:
        if key not in known:
            raise InputError(f"{where}: {unknown('key', key, known)}")
    try:
        return TypeAdapter(kind).validate_python({**content, **more})
    except ValidationError as error:
        faults = error.errors(include_url=False)
        of_first_field = [each for each in faults if each["loc"][:1] == faults[0]["loc"][:1]]
        raise InputError(f"{where}: {_describe(max(of_first_field, key=lambda each: len(each['loc'])))}") from error


def _describe(fault: ErrorDetails) -> str:
    name, *inner = fault["loc"] or ("content",)
    if fault["type"] == "missing":
        return f"'{name}' is missing"
    place = f"'{name}'" + "".join(f", entry {each}" for each in inner if isinstance(each, int))
    return f"{place} {fault['msg'].replace('Input should be', 'must be')}, not {fault['input']!r}"
