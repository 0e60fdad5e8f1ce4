"""Formats the tables that the commands print."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from splitwiser.machine.load import busy_note
from splitwiser.results.schema import METRIC, ROUGE, shown_in


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return ``rows`` as text with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def run_summary(figures: dict[str, Any], directory: Path) -> str:
    """Return the summary of a finished run: its main metrics and its folder."""

    def number(key: str, unit: str) -> str:
        value = figures[key]
        return "-" if value is None else f"{value:,.1f} {unit}"

    def optional() -> Iterator[tuple[str, str]]:
        if figures["request_goodput"] is not None:
            asked, met = (f"{figures[key]:,.2f}" for key in ("request_throughput", "request_goodput"))
            yield "goodput", f"{met} of {asked} requests/s meet every target"
        if figures["rougeL"] is not None:
            yield "quality", ", ".join(f"{METRIC[name].label} {figures[name]:.3f}" for name in ROUGE)
        if note := busy_note(figures):
            yield "machine", f"busy: {note}"

    def shown() -> Iterator[tuple[str, str]]:
        for subject, group in itertools.groupby(shown_in("run"), key=lambda metric: metric.subject):
            yield subject, ", ".join(f"{each.statistic} {number(each.name, each.unit)}".strip() for each in group)

    over = "" if figures["backend"] == "hf" else f" over {figures['backend']}"
    dummy = " (dummy weights)" if figures["load_format"] == "dummy" else ""
    return columns(
        [
            (
                "model",
                f"{figures['model']}{dummy}, {figures['dtype']} on {figures['device']}, mode {figures['mode']}{over}",
            ),
            ("requests", f"{figures['completed']} in {figures['duration']:.2f} s"),
            ("tokens", f"{figures['total_input_tokens']:,} in, {figures['total_output_tokens']:,} out"),
            *shown(),
            (
                "throughput",
                f"{number('output_throughput', 'tokens/s out')}, {number('total_token_throughput', 'in and out')}",
            ),
            *optional(),
            ("results", str(directory)),
        ]
    )
