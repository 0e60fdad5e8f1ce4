"""The part of the report about an advice."""

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd

from splitwiser.results.report.common import MOST_ROWS, flat, record_section, setting, status_warnings
from splitwiser.results.report.folders import Advice
from splitwiser.results.report.of_profile import profile_part
from splitwiser.results.report.page import NOTHING, Part, Pictures, Section, Text, frame_table, picture
from splitwiser.results.report.plots import draw_predictions, error_in_words, shown
from splitwiser.results.schema import METRIC, METRICS

CANDIDATE = ("mode", "workers", "prefill_tokens", "schedule")  # the columns that name a placement


def advice_part(advice: Advice, name: str) -> list[Part]:
    """Return the parts about an advice: the recommendation with its reasons, the predictions against what was measured, and
    the underlying profile."""
    record = advice.record
    reasons = [str(reason) for reason in record.get("reasons", [])]
    about = [Text(reason) for reason in reasons[1:]]
    about += [Text(f"Run it with: {record['command']}")] if record.get("command") else []
    tables = []
    possible, impossible = _predictions(advice.predictions)
    for title, caption, frame in (
        ("Predictions", "What is predicted for each placement, from predictions.csv.", possible),
        ("Checks", "What was predicted and what a run measured, from checks.csv.", _checks(advice.checks)),
        ("Not possible here", "Placements that this machine cannot run, from predictions.csv.", impossible),
    ):
        if len(frame):
            table = frame_table(f"{name}-{title.split()[0].lower()}", caption, frame, METRICS, most=MOST_ROWS)
            tables.append(Section(title, [table]))
    part = Part(
        name,
        advice.path.resolve().name,
        " ".join([_recommendation(record), *reasons[:1]]),
        _pictures(advice.checks),
        tables,
        record_section(record, f"{name}-record", "advice.yaml"),
        about,
        status_warnings(record, "advice.yaml"),
    )
    basis = (
        [] if advice.profile is None else [profile_part(advice.profile, f"{name}-profile", "The underlying profile")]
    )
    return [part, *basis]


def _recommendation(record: dict[str, Any]) -> str:
    placement = record.get("recommended")
    if not placement:
        return "Nothing is recommended."
    told = dict(flat(placement))
    split = record.get("split")
    said = "Recommended" if split is None else "Split the phases" if split else "Do not split the phases"
    return f"{said}: {setting(list(told), tuple(told.values()))}."


def _predictions(predictions: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows with figures, and those of placements that this machine cannot run."""
    if "not_possible" not in predictions:
        return predictions, predictions.head(0)
    possible = predictions["not_possible"].isna()
    return predictions[possible], predictions[~possible]


def _checks(checks: pd.DataFrame) -> pd.DataFrame:
    """Return ``checks`` with figures named and errors told in words."""
    if checks.empty:
        return checks
    named = [METRIC[str(figure)].title_with_unit for figure in checks["figure"]]
    errors = [NOTHING if pd.isna(error) else error_in_words(error) for error in checks["error"]]
    return checks.assign(figure=named, error=errors)


def _pictures(checks: pd.DataFrame) -> list[Section]:
    """Return a picture for each figure: its prediction and the median of what was measured, by placement."""
    if checks.empty:
        return []
    pictures = []
    known = checks.dropna(subset=["predicted", "measured"])
    known = known.assign(placement=[_placement(row) for row in known.to_dict("records")])
    for figure, rows in known.groupby("figure", sort=False):
        metric = METRIC[str(figure)]
        medians = rows.groupby("placement", sort=False)[["predicted", "measured"]].median()
        values = {str(name): (float(row.predicted), float(row.measured)) for name, row in medians.iterrows()}
        words = "; ".join(
            f"{name} predicted {shown(predicted)}, measured {shown(measured)}, {error_in_words(predicted / measured - 1)}"
            for name, (predicted, measured) in values.items()
        )
        svg = draw_predictions(metric.title, metric.unit, values)
        pictures.append(picture(svg, f"{metric.title} in {metric.unit}: {words}", wide=False))
    said = "Beside each pair: how far the prediction lies from the median of what was measured."
    return [Section("Predicted against measured", [Pictures(pictures), Text(said)])]


def _placement(row: Mapping[Hashable, Any]) -> str:
    return setting(CANDIDATE, tuple(row.get(column) for column in CANDIDATE))
