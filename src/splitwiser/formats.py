"""Validation of file contents against the annotations of a dataclass, by pydantic, with one-line error messages.

A dataclass that is read from a file has fields of the types here, or of other types with a :func:`must_be`.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, TypeVar

from annotated_types import Ge
from pydantic import Strict, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import ErrorDetails, PydanticCustomError

from splitwiser.errors import InputError, unknown_name

T = TypeVar("T")


def must_be(what: str, *, itself: bool = False) -> WrapValidator:
    """Return a validator for an annotation, with the message "must be ``what``" for values that do not fit it. With
    ``itself``, an error inside of a value keeps its own message."""

    def check(value: object, validate: ValidatorFunctionWrapHandler) -> object:
        try:
            return validate(value)
        except ValidationError as error:
            if itself and any(each["loc"] for each in error.errors()):
                raise
            raise PydanticCustomError("must_be", "must be {what}", {"what": what}) from error

    return WrapValidator(check)


Text = Annotated[str, Strict(), must_be("text")]
Whole = Annotated[int, Strict(), must_be("a whole number")]
AtLeastZero = Annotated[int, Strict(), Ge(0), must_be("a whole number of 0 or more")]
AtLeastOne = Annotated[int, Strict(), Ge(1), must_be("a whole number of 1 or more")]


_validators: dict[type, TypeAdapter[Any]] = {}  # each takes longer to make than to use


def parse_as(kind: type[T], content: Mapping[Any, Any], where: str, **more: object) -> T:
    """Return ``content``, with the fields ``more``, as an instance of the dataclass ``kind``.

    Raises :class:`InputError` that begins with ``where`` and names the first invalid field.
    """
    known = [each.name for each in fields(kind) if each.name not in more] if is_dataclass(kind) else []
    for key in content:
        if key not in known:
            raise InputError(f"{where}: {unknown_name('key', key, known)}")
    try:
        validator = _validators.get(kind) or _validators.setdefault(kind, TypeAdapter(kind))
        read: T = validator.validate_python({**content, **more})
        return read
    except ValidationError as error:
        errors = error.errors(include_url=False)
        of_first_field = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
        raise InputError(f"{where}: {_describe(max(of_first_field, key=lambda each: len(each['loc'])))}") from error


def _describe(error: ErrorDetails) -> str:
    name, *inner = error["loc"] or ("content",)
    if error["type"] == "missing":
        return f"'{name}' is missing"
    place = f"'{name}'" + "".join(f", entry {each}" for each in inner if isinstance(each, int))
    return f"{place} {error['msg'].replace('Input should be', 'must be')}, not {error['input']!r}"
