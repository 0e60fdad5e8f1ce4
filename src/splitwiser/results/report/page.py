"""What a page of the report is made of, and how it becomes one HTML file that needs nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jinja2 import Environment
from markupsafe import Markup

from splitwiser.results.report.plots import shown

NOTHING = "-"


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what it sorts by: the value unrounded."""

    text: str
    value: str
    numeric: bool


@dataclass(frozen=True)
class Table:
    """Rows under headings. ``name`` is the id that the page gives it; ``long`` text is wrapped, not set in one line."""

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    long: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures."""
        return [any(row[place].numeric for row in self.rows) for place in range(len(self.headings))]


@dataclass(frozen=True)
class Picture:
    """An SVG element, what it shows in words (for those who do not see it), and a line below it."""

    kind: ClassVar[str] = "picture"
    svg: Markup
    alternative: str
    caption: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Pictures:
    """Small pictures side by side, as many as the page's width takes."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Figures:
    """The headline figures: name, value, unit, and what more there is to say."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Example:
    """Texts that belong together, each under a name: a finding, its reference, what was generated."""

    kind: ClassVar[str] = "example"
    title: str
    texts: Sequence[tuple[str, str]]


Block = Table | Picture | Pictures | Figures | Text | Example


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; ``closed`` ones open on a click."""

    title: str
    blocks: Sequence[Block]
    closed: bool = False


@dataclass(frozen=True)
class Part:
    """What one folder, or several against each other, come to: a title, a verdict in one line, warnings and sections."""

    name: str
    title: str
    verdict: str
    sections: Sequence[Section]
    warnings: Sequence[str] = field(default_factory=list)
    closed: bool = False


def frame_table(
    name: str,
    caption: str,
    frame: pd.DataFrame,
    *,
    most: int | None = None,
    long: bool = False,
    drop_empty: bool = False,
) -> Table:
    """``frame`` as a table under its own column names; only the first ``most`` rows, and then the caption says so."""
    if drop_empty:
        frame = frame.dropna(axis="columns", how="all")
    if most is not None and len(frame) > most:
        caption = f"{caption} The first {most:,} of {len(frame):,} rows; the file has them all."
        frame = frame.head(most)
    columns = [[cell(value) for value in frame.iloc[:, place]] for place in range(len(frame.columns))]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Table(name, caption, [str(column) for column in frame.columns], rows, long)


def pairs_table(name: str, caption: str, pairs: Mapping[str, Any]) -> Table:
    """A row a name and value."""
    return Table(name, caption, ("", "value"), [[cell(key), cell(value)] for key, value in pairs.items()], long=True)


def cell(value: object) -> Cell:
    """A value as a table shows it: figures rounded, nothing as a dash, anything else as it is."""
    if value is None or (isinstance(value, float) and value != value):
        return Cell(NOTHING, "", False)
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__float__") or isinstance(value, str):
        return Cell(str(value), str(value), False)
    number = float(value)
    finite = number - number == 0
    return Cell(shown(number) if finite else str(number), repr(number), True)


def picture(svg: str, alternative: str, caption: str = "", *, wide: bool = True) -> Picture:
    """An SVG that this program drew, and so may stand in the page as it is."""
    return Picture(Markup(svg), alternative, caption, wide)


def render(title: str, parts: Sequence[Part], made: str) -> str:
    """The page; every text in it is escaped. ``made`` says by what and when."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    template = files("splitwiser.results.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(title=title, parts=parts, made=made)
