"""Parses the latency targets of ``--goodput``."""

import re

from splitwiser.errors import InputError, unknown_name
from splitwiser.results.schema import TARGETS


def parse_goodput(text: str) -> dict[str, float]:
    """Read targets such as ``ttft:200,tpot:50,e2el:5000`` (milliseconds), separated by commas or spaces.

    Raises :class:`InputError`.
    """
    targets: dict[str, float] = {}
    for part in text.replace(",", " ").split():
        name, colon, limit = part.partition(":")
        if not colon:
            pieces = re.findall(r"[a-z]\w*|[\d.]+", part)
            right = ":".join(pieces) if len(pieces) == 2 and pieces[0] in TARGETS else "tpot:50"
            raise InputError(f"--goodput '{text}': write a metric, a colon and milliseconds, such as {right}")
        if name not in TARGETS:
            raise unknown_name("target of --goodput", name, TARGETS)
        if name in targets:
            raise InputError(f"--goodput '{text}': {name} is given twice")
        try:
            targets[name] = float(limit)
        except ValueError:
            targets[name] = -1.0
        if not targets[name] >= 0:
            raise InputError(f"--goodput '{text}': {name} must be 0 or more milliseconds, such as {name}:200")
    if not targets:
        raise InputError("--goodput: needs at least one target, such as ttft:200,tpot:50,e2el:5000")
    return targets
