"""The part of the report about an advice."""

from splitwiser.results.report.common import MOST_ROWS, flat, record_section, status_warnings
from splitwiser.results.report.folders import Advice
from splitwiser.results.report.of_profile import profile_part
from splitwiser.results.report.page import Part, Section, Text, frame_table


def advice_part(advice: Advice, name: str) -> list[Part]:
    """Return the parts about an advice: the recommendation with its reasons, the predictions, and the underlying profile."""
    record = advice.record
    placement = record.get("recommended")
    recommended = [f"{key} {value}" for key, value in flat(placement) if value not in (None, "")] if placement else []
    verdict = f"Recommended: {', '.join(recommended)}." if recommended else "Nothing is recommended."
    said = [*record.get("reasons", []), *([f"Run it with: {record['command']}"] if record.get("command") else [])]
    sections = [Section("Why", [Text(str(reason)) for reason in said])] if said else []
    for title, frame in (("predictions", advice.predictions), ("checks", advice.checks)):
        if len(frame):
            table = frame_table(f"{name}-{title}", f"{title}.csv.", frame, most=MOST_ROWS, drop_empty=True)
            sections.append(Section(title.capitalize(), [table]))
    sections.append(record_section(record, f"{name}-record", "advice.yaml"))
    part = Part(name, advice.path.resolve().name, verdict, sections, status_warnings(record, "advice.yaml"))
    basis = (
        [] if advice.profile is None else [profile_part(advice.profile, f"{name}-profile", "The underlying profile")]
    )
    return [part, *basis]
