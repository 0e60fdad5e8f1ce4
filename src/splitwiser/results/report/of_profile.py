"""The part of the report about a profile."""

from collections.abc import Sequence

import pandas as pd

from splitwiser.results.report.common import MOST_LINES, MOST_ROWS, record_section, setting, status_warnings
from splitwiser.results.report.folders import Profile
from splitwiser.results.report.page import Part, Picture, Pictures, Section, cell, frame_table, picture
from splitwiser.results.report.plots import Spread, draw_lines, draw_roofline, shown


def profile_part(profile: Profile, name: str, title: str) -> Part:
    """Return the part about a profile: the roofline, times by prompt length, batch and context, and the tables."""
    sections = []
    prefill, decode, ceilings = profile.prefill, profile.decode, profile.ceilings
    best = _ceilings(ceilings)
    if best and len(prefill) + len(decode):
        sections.append(Section("Roofline", [_roofline(prefill, decode, *best)]))
    if len(prefill):
        sections.append(
            Section(
                "Prefill by prompt length",
                [Pictures(_profile_lines(prefill, "prompt_tokens", ("prompts", "start_tokens")))],
            )
        )
    if len(decode):
        by_batch = _profile_lines(decode, "batch", ("context",))
        sections.append(
            Section("Decode by batch and context", [Pictures(by_batch + _profile_lines(decode, "context", ("batch",)))])
        )
    for file, frame in (("prefill", prefill), ("decode", decode), ("ceilings", ceilings)):
        table = frame_table(f"{name}-{file}", f"{file}.csv.", frame, most=MOST_ROWS, drop_empty=True)
        sections.append(Section(f"{file}.csv", [table], closed=True))
    sections.append(record_section(profile.record, f"{name}-record", "profile.yaml"))
    model = profile.record.get("model")
    who = f"{model.get('name')} in {model.get('dtype')}" if isinstance(model, dict) else "A model"
    measured = f"{len(prefill)} prefill steps and {len(decode)} decode steps measured"
    limits = f"; compute reaches {shown(best[0])} TFLOP/s, memory {shown(best[1])} GB/s" if best else ""
    warnings = status_warnings(profile.record, "profile.yaml") + [
        f"Note: {note}." for note in profile.record.get("notes") or []
    ]
    return Part(name, title, f"{who}: {measured}{limits}.", sections, warnings)


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
            label = f"{phase}, {', '.join(f'{name} {cell(row[name]).text}' for name in sizes)}"
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


def _profile_lines(frame: pd.DataFrame, along: str, by: Sequence[str]) -> list[Picture]:
    """Return plots of time and tokens per second over ``along``, one line per setting of ``by`` and threads."""
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
        title = f"{label} by {along}" + (f" ({left} more settings in the table)" if left else "")
        pictures.append(picture(draw_lines(title, along, unit, lines), f"{label} in {unit} by {along}", wide=False))
    return pictures
