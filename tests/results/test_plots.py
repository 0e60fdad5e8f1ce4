"""The geometry of the plots: nothing is cut, nothing covers data, and colours are explained in the picture."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.transforms import Bbox

from splitwiser.results.report import plots
from splitwiser.results.report.plots import (
    MARKED,
    Spread,
    colours_of,
    draw_bars,
    draw_distributions,
    draw_lines,
    draw_predictions,
    draw_progress,
    draw_roofline,
    draw_timeline,
    error_in_words,
    save_roofline,
    save_timeline,
)

RNG = np.random.default_rng(0)
STEPS = pd.DataFrame(
    [
        ("prefill-0", "prefill", 0.0, 2.0, 2, 100),
        ("decode-0", "decode", 2.0, 3.0, 2, 2),
        ("decode-1", "decode", 2.0, 6.0, 40, 2),
    ],
    columns=["worker", "phase", "start_s", "end_s", "requests", "tokens"],
)
LATENCY = pd.DataFrame(
    {"arrival_s": [0.0, 0.5], "prefill_start_s": [0.0, 2.5], "first_token_s": [2.0, 4.5], "finish_s": [4.0, 6.0]}
)
HYBRID = pd.DataFrame(
    [
        ("mixed-0", "prefill", 0.0, 2.0, 2, 100, 0),
        ("mixed-0", "hybrid", 2.0, 3.0, 6, 60, 5),
        ("mixed-0", "decode", 3.0, 6.0, 40, 40, 40),
    ],
    columns=[*STEPS.columns, "decode_tokens"],
)
POINTS = pd.DataFrame(
    [
        ("prefill", "prefill", "2048", 300.0, 0.9),
        ("prefill", "prefill", "64", 20.0, 2.5),
        ("decode", "decode 128", "1 x 128", 0.5, 0.0005),
        ("decode", "decode 512", "64 x 512", 30.0, 0.003),
    ],
    columns=["phase", "series", "label", "arithmetic_intensity", "tflops"],
)
LONG = "mps, 1 prefill at 40%, 1 decode at 60%"
SPREADS = {"sequential": Spread(123_456.7, 9.0, 234_567.8), LONG: Spread(0.0, 0.0, 0.0), "mp": Spread(3.0, 2.0, 4.0)}
COLOURS = colours_of(["sequential", "generate", LONG, "mp"])
MANY = [f"{LONG}, {number}" for number in range(8)]
DRAWN: dict[str, Callable[[Path], object]] = {
    "timeline": lambda _: draw_timeline({"sequential": STEPS, "mp": STEPS}, (0.0, 6.0), titled=True),
    "timeline of hybrid steps": lambda _: draw_timeline({"sequential": HYBRID}, (0.0, 6.0)),
    "progress of hybrid steps": lambda _: draw_progress(HYBRID, LATENCY),
    "progress": lambda _: draw_progress(STEPS, LATENCY),
    "distributions": lambda _: draw_distributions(
        {"mp": 1e3 + RNG.random(3), "generate": RNG.random(900) * 1500, LONG: np.array([4.0])}, "ms", "TTFT", COLOURS
    ),
    "logarithmic distributions": lambda _: draw_distributions(
        {"mp": np.array([1.0, 2.0]), "generate": np.array([5.0, 99.0])}, "ms", "ITL", COLOURS, log=True
    ),
    "bars": lambda _: draw_bars("Output throughput", "tokens/s", SPREADS, COLOURS, {LONG: "undecided"}),
    "predictions": lambda _: draw_predictions(
        "Output throughput", "tokens/s", {"sequential": (123_456.7, 30_000.0), LONG: (2.0, 123.0), "mp": (5.0, 5.0)}
    ),
    "lines": lambda _: draw_lines(
        "ROUGE-L", "case", "more is better",
        {name: {0.0: Spread(0.988, 0.988, 0.99), 1.0: Spread(0.99, 0.1, 0.99)} for name in MANY}, colours_of(MANY),
    ),
    "roofline": lambda _: draw_roofline(POINTS, 1.2, 17.0),
    "saved roofline": lambda folder: save_roofline(folder / "roofline.png", POINTS, 1.2, 17.0, "opt-125m"),
    "saved timeline": lambda folder: save_timeline(folder / "timeline.png", STEPS, "a run"),
    "saved timeline of hybrid steps": lambda folder: save_timeline(folder / "timeline.png", HYBRID, "a run"),
}  # fmt: skip


@pytest.fixture(params=DRAWN)
def figure(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """Each plot, laid out as it is drawn."""
    return drawn(request.param, tmp_path, monkeypatch)


def drawn(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure behind a plot of :data:`DRAWN`."""
    kept: list[Figure] = []

    def keep(figure: Figure, *_: object) -> str:
        figure.draw_without_rendering()
        kept.append(figure)
        return ""

    monkeypatch.setattr(plots, "_svg", keep)
    monkeypatch.setattr(plots, "_save", keep)
    DRAWN[name](folder)
    return kept[0]


def data_points(axes: Axes) -> Iterator[tuple[float, float, float]]:
    """The points of lines and marks in pixels: x, y and how much room the axes must leave around them, which is none for a
    line without marks, and for marks that may be drawn across the edge."""
    pixels = axes.figure.dpi / 72
    for line in axes.get_lines():
        radius = line.get_markersize() / 2 * pixels if line.get_marker() != "None" and line.get_clip_on() else -1.0
        yield from ((x, y, radius) for x, y in axes.transData.transform(line.get_xydata()))
    for marks in axes.collections:
        if isinstance(marks, PathCollection):
            radius = float(np.sqrt(marks.get_sizes()[0])) / 2 * pixels
            yield from ((x, y, radius) for x, y in axes.transData.transform(marks.get_offsets()))


def legends_of(figure: Figure) -> list[Bbox]:
    legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
    return [legend.get_window_extent() for legend in legends]


def test_nothing_is_cut_by_the_edge_of_the_picture(figure: Figure) -> None:
    drawn, picture = figure.get_tightbbox(), figure.bbox_inches.padded(0.01)
    assert drawn.x0 >= picture.x0
    assert drawn.x1 <= picture.x1
    assert drawn.y0 >= picture.y0
    assert drawn.y1 <= picture.y1


def test_no_axis_cuts_a_point(figure: Figure) -> None:
    for axes in figure.axes:
        box = axes.get_window_extent()
        assert all(box.padded(-room).contains(x, y) for x, y, room in data_points(axes))


def test_no_legend_covers_a_plot(figure: Figure) -> None:
    for legend in legends_of(figure):
        assert not any(legend.padded(-1).overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_axes_leave_room_for_themselves(figure: Figure) -> None:
    """A long legend or label does not squeeze a plot."""
    for axes in figure.axes:
        assert axes.get_window_extent().height > 0.35 * figure.dpi
        assert axes.get_window_extent().width > 0.35 * figure.bbox.width


@pytest.mark.parametrize("name", ["timeline", "saved timeline"])
def test_a_timeline_explains_its_colours(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(name, tmp_path, monkeypatch)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["prefill step", "decode step"]


@pytest.mark.parametrize("name", ["distributions", "logarithmic distributions"])
def test_dots_lie_on_their_curves(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (axes,) = drawn(name, tmp_path, monkeypatch).axes
    lines = axes.get_lines()
    for curve, dots in zip(lines[::2], lines[1::2], strict=True):
        points = {tuple(point) for point in np.asarray(curve.get_xydata())}
        assert np.asarray(dots.get_ydata()).tolist() == list(MARKED)
        assert all(tuple(point) in points for point in np.asarray(dots.get_xydata()))


@pytest.mark.parametrize(
    ("error", "words"),
    [(0.124, "12% too high"), (-0.5, "50% too low"), (0.004, "as measured"), (1.5, "150% too high")],
)
def test_an_error_is_told_in_words(error: float, words: str) -> None:
    assert error_in_words(error) == words


def test_a_variant_has_one_colour_in_every_picture() -> None:
    """Also where another variant has no value."""
    colours = colours_of(["sequential", "mp"])
    both = draw_bars("TTFT", "ms", {"sequential": Spread(1, 1, 1), "mp": Spread(2, 2, 2)}, colours)
    alone = draw_bars("ROUGE-L", "", {"mp": Spread(2, 2, 2)}, colours)
    assert colours["mp"] != colours["sequential"]
    assert colours["sequential"] in both
    assert colours["sequential"] not in alone
    assert colours["mp"] in alone


def test_progress_divides_the_tokens_of_hybrid_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, prefill, _ = drawn("progress of hybrid steps", tmp_path, monkeypatch).axes
    made = []
    for axes in (decode, prefill):
        (bars,) = axes.patches
        assert isinstance(bars, StepPatch)
        values, edges, _ = bars.get_data()
        made.append(round(float((values * np.diff(edges)).sum()), 6))
    assert made == [5 + 40, 100 + 55]


def test_the_saved_timeline_shows_the_requests_in_decode_of_hybrid_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes, batches = drawn("saved timeline of hybrid steps", tmp_path, monkeypatch).axes
    assert [label.get_text() for label in lanes.get_yticklabels()] == [
        "mixed-0\nprefill", "mixed-0\nhybrid", "mixed-0\ndecode"
    ]  # fmt: skip
    assert list(np.asarray(batches.get_lines()[0].get_ydata())) == [5, 40]
