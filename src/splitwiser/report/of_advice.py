"""What the report says of an advice."""

from splitwiser.report.common import MOST_ROWS, flat, record_section, status_warnings
from splitwiser.report.folders import Advice
from splitwiser.report.page import Part, Section, frame_table


def advice_part(advice: Advice, name: str) -> Part:
    """The recommendation, what it rests on, and the record."""
    sections = [record_section(advice.record, f"{name}-record", "advice.yaml")]
    for title, frame in (("predictions", advice.predictions), ("checks", advice.checks)):
        if len(frame):
            table = frame_table(f"{name}-{title}", f"{title}.csv.", frame, most=MOST_ROWS)
            sections.insert(-1, Section(title.capitalize(), [table]))
    recommended = advice.record.get("recommendation")
    verdict = (
        ", ".join(f"{key} {value}" for key, value in flat(recommended))
        if isinstance(recommended, dict)
        else recommended
    )
    return Part(
        name, advice.path.resolve().name, str(verdict or ""), sections, status_warnings(advice.record, "advice.yaml")
    )
