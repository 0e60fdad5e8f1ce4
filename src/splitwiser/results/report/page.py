"""The elements of a report page, and their rendering as one self-contained HTML file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from splitwiser.results.report.plots import shown
from splitwiser.results.schema import Column

NOTHING = "-"


@dataclass(frozen=True)
class Cell:
    """A table cell: the text shown, and the unrounded value that the table sorts by."""

    text: str
    value: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """A table. ``name`` is its id on the page; text in a ``long`` table is wrapped."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    long: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [any(row[place].numeric for row in self.rows) for place in range(len(self.headings))]


@dataclass(frozen=True)
class Picture:
    """An SVG element with its alternative text for screen readers and a caption."""

    kind: ClassVar[str] = "picture"
    svg: Markup
    alternative: str
    caption: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Pictures:
    """Small pictures side by side, as many as fit the width of the page."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Figures:
    """Headline metrics: name, value, unit and a remark."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Example:
    """Related texts, each under a name: a prompt, its reference, the generated text."""

    kind: ClassVar[str] = "example"
    title: str
    texts: Sequence[tuple[str, str]]


Block = Table | Picture | Pictures | Figures | Text | Example


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; a ``closed`` section opens on a click."""

    title: str
    blocks: Sequence[Block]
    closed: bool = False


@dataclass(frozen=True)
class Part:
    """The part of a page about one folder or one comparison. Every part has the same order: the title, the ``answer`` in a
    sentence, warnings, what belongs to the answer (``about``), pictures, tables, and the ``record`` at the end."""

    name: str
    title: str
    answer: str
    pictures: Sequence[Section]
    tables: Sequence[Section]
    record: Section | None = None
    about: Sequence[Block] = ()
    warnings: Sequence[str] = ()
    closed: bool = False


def frame_table(
    name: str, caption: str, frame: pd.DataFrame, columns: Sequence[Column] = (), *, most: int | None = None
) -> Table:
    """Return ``frame`` as a table without empty columns, under the titles and units of ``columns``; a column that is not
    among these is headed by its name. If ``frame`` has over ``most`` rows, only these are kept and the caption says so."""
    frame = frame.dropna(axis="columns", how="all")
    if most is not None and len(frame) > most:
        caption = f"{caption} The first {most:,} of {len(frame):,} rows; the file has all."
        frame = frame.head(most)
    known = {column.name: column for column in columns}
    headings = [known.get(str(name), Column(str(name), "")).title_with_unit for name in frame.columns]
    cells = [[cell(value) for value in frame.iloc[:, place]] for place in range(len(frame.columns))]
    return Table(name, caption, headings, [list(row) for row in zip(*cells, strict=True)])


def pairs_table(name: str, caption: str, pairs: Mapping[str, Any]) -> Table:
    """Return a table with one row per name and value."""
    rows = [[cell(key), cell(value)] for key, value in pairs.items()]
    return Table(name, caption, ("Name", "Value"), rows, long=True)


def cell(value: object) -> Cell:
    """Return ``value`` as a table cell: numbers rounded, missing values as a dash, anything else as text."""
    if value is None or (isinstance(value, float) and value != value):
        return Cell(NOTHING, "", False)
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__float__") or isinstance(value, str):
        return Cell(str(value), str(value), False)
    number = float(value)
    finite = number - number == 0
    return Cell(shown(number) if finite else str(number), repr(number), True)


def picture(svg: str, alternative: str, caption: str = "", *, wide: bool = True) -> Picture:
    """Return a picture from ``svg``, which this program drew, so that it needs no escaping."""
    return Picture(Markup(svg), alternative, caption, wide)


def render(title: str, parts: Sequence[Part], made: str) -> str:
    """Return the page as HTML with all text escaped. ``made`` is the footer."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = files("splitwiser.results.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, parts=parts, made=made)
