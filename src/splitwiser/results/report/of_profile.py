"""The part of the report about a profile."""

from collections.abc import Sequence

import pandas as pd

from splitwiser.results.report.common import MOST_LINES, MOST_ROWS, record_section, setting, status_warnings
from splitwiser.results.report.folders import Profile
from splitwiser.results.report.page import Part, Picture, Pictures, Section, frame_table, picture
from splitwiser.results.report.plots import Spread, colours_of, draw_lines, draw_roofline, shown
from splitwiser.results.schema import CEILINGS, DECODE, PREFILL, Column


def profile_part(profile: Profile, name: str, title: str) -> Part:
    """Return the part about a profile: the roofline, times by prompt length, batch and context, and the tables."""
    prefill, decode, ceilings = profile.prefill, profile.decode, profile.ceilings
    best = _ceilings(ceilings)
    pictures = []
    if best and len(prefill) + len(decode):
        pictures.append(Section("Roofline", [_roofline(prefill, decode, *best)]))
    if len(prefill):
        lines = _profile_lines(prefill, PREFILL, "prompt_tokens", ("prompts", "start_tokens"))
        pictures.append(Section("Prefill by prompt length", [Pictures(lines)]))
    if len(decode):
        lines = _profile_lines(decode, DECODE, "batch", ("context",))
        lines += _profile_lines(decode, DECODE, "context", ("batch",))
        pictures.append(Section("Decode by batch and context", [Pictures(lines)]))
    tables = [
        Section(title, [frame_table(f"{name}-{file}", caption, frame, columns, most=MOST_ROWS)], closed=True)
        for title, file, caption, frame, columns in (
            ("Prefill steps", "prefill", "One row per prefill step, from prefill.csv.", prefill, PREFILL),
            ("Decode steps", "decode", "One row per decode step, from decode.csv.", decode, DECODE),
            ("Ceilings", "ceilings", "What the machine reached, from ceilings.csv.", ceilings, CEILINGS),
        )
        if len(frame)
    ]
    return Part(
        name,
        title,
        _answer(profile, best),
        pictures,
        tables,
        record_section(profile.record, f"{name}-record", "profile.yaml"),
        warnings=status_warnings(profile.record, "profile.yaml")
        + [f"Note: {note}." for note in profile.record.get("notes") or []],
    )


def _answer(profile: Profile, best: tuple[float, float] | None) -> str:
    model = profile.record.get("model")
    who = f"{model.get('name')} in {model.get('dtype')}" if isinstance(model, dict) else "A model"
    reached = [
        f"{phase} computes up to {shown(float(frame.tokens_per_s.max()))} tokens/s"
        for phase, frame in (("prefill", profile.prefill), ("decode", profile.decode))
        if "tokens_per_s" in frame and len(frame)
    ]
    limits = [f"the machine reaches {shown(best[0])} TFLOP/s and {shown(best[1])} GB/s of memory"] if best else []
    return f"{who}: {', '.join([*reached, *limits]) or 'nothing has been measured yet'}."


def _ceilings(ceilings: pd.DataFrame) -> tuple[float, float] | None:
    """Return the best measured rates, compute in TFLOP/s and memory in GB/s, with the highest thread count."""
    most = _of_most_threads(ceilings)
    rates = {kind: most[most.kind == kind].rate.max() for kind in ("compute", "memory")}
    return None if any(rate != rate for rate in rates.values()) else (float(rates["compute"]), float(rates["memory"]))


def _of_most_threads(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame.threads == frame.threads.max()] if "threads" in frame else frame


def _roofline(prefill: pd.DataFrame, decode: pd.DataFrame, compute: float, memory: float) -> Picture:
    points = []
    for phase, frame in (("prefill", prefill), ("decode", decode)):
        sizes = [name for name in ("prompts", "start_tokens", "prompt_tokens", "batch", "context") if name in frame]
        for row in _of_most_threads(frame).to_dict("records"):
            label = f"{phase}, {setting(sizes, tuple(row[name] for name in sizes))}"
            points.append(
                {"phase": phase, "label": label, **{key: row[key] for key in ("arithmetic_intensity", "tflops")}}
            )
    words = (
        f"Roofline: {len(points)} steps under {shown(compute)} TFLOP/s of compute and {shown(memory)} GB/s of memory"
    )
    caption = (
        "Each mark is a step; hover over it to see which. The line is the highest rate that this machine reached in the "
        "same profile. A step above the slope has its operands in a cache."
    )
    return picture(draw_roofline(pd.DataFrame(points), compute, memory), words, caption)


def _profile_lines(frame: pd.DataFrame, columns: Sequence[Column], along: str, by: Sequence[str]) -> list[Picture]:
    """Return plots of time and tokens per second over ``along``, one line per setting of ``by`` and threads; ``columns``
    are those of ``frame``."""
    place_title = next(column.title_with_unit for column in columns if column.name == along)
    varied = [name for name in (*by, "threads") if name in frame and frame[name].nunique() > 1]
    pictures = []
    for column, label, unit in (("ms", "Time of a step", "ms"), ("tokens_per_s", "Tokens per second", "tokens/s")):
        if column not in frame:
            continue
        groups = list(frame.groupby(varied, sort=True)) if varied else [((), frame)]
        lines = {
            setting(varied, values): {float(place): Spread.of(at[column].tolist()) for place, at in of.groupby(along)}  # type: ignore[arg-type]
            for values, of in groups[:MOST_LINES]
        }
        left = len(groups) - len(lines)
        title = f"{label}{f' ({left} more settings in the table)' if left else ''}"
        words = f"{label} in {unit} by {along.replace('_', ' ')}"
        pictures.append(picture(draw_lines(title, place_title, unit, lines, colours_of(lines)), words, wide=False))
    return pictures
