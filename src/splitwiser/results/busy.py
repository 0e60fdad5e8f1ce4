"""Finds the runs during which the machine was busy, from their rows of ``throughput.csv``."""

import pandas as pd


def busy_runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Return those of ``rows``, which have the columns of ``throughput.csv``, that ran while the machine was busy."""
    return rows[rows["machine_busy"].astype(str) == "True"] if "machine_busy" in rows else rows.head(0)


def describe_busy(rows: pd.DataFrame, by: str) -> str | None:
    """Return a line that names the busy runs among ``rows`` by column ``by`` and round, unless all were; None if there are
    none."""
    found = busy_runs(rows)
    if found.empty:
        return None
    named = [f"{by} {what} in round {number}" for what, number in zip(found[by], found["round"], strict=True)]
    others, cores = (pd.to_numeric(found[name]).max() for name in ("others_cores", "cores"))
    which = (
        f"{len(found)} of {len(rows)} runs: {', '.join(named)}" if len(found) < len(rows) else f"all {len(rows)} runs"
    )
    return f"the machine was busy in {which}; other processes used up to {others:.1f} of {cores:g} cores"
