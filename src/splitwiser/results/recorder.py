"""Writes a run's files while it runs, so that a killed run keeps the results of its finished requests."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import StepRecord
from splitwiser.errors import RunError, first_line
from splitwiser.files import CsvTable, Status, append_row, replaced_atomically, write_rows
from splitwiser.machine.load import Load, LoadMeter, MachineLoad
from splitwiser.request import RequestOutput, TokenChoices
from splitwiser.results.metrics import latency_row
from splitwiser.results.record import Record
from splitwiser.results.rouge import rouge
from splitwiser.results.schema import GENERATIONS, LATENCY, STEPS, THROUGHPUT, TOKENS, names, throughput_figures
from splitwiser.results.timeline import step_row, write_trace
from splitwiser.workload.reports import Report

FLUSH_S = 0.5  # seconds between two writes to disk


class RunRecorder(Observer):
    """Records one run in ``directory``. ``record`` is the one of ``run.yaml``; ``labels`` are the columns of
    ``throughput.csv`` before its metrics. ``targets`` are the goodput targets; ``scored`` says whether the texts of a
    finished run are scored against the references; ``before`` is the load of the machine before the run."""

    def __init__(
        self,
        directory: Path,
        record: Record,
        labels: dict[str, Any],
        reports: Sequence[Report],
        *,
        targets: Mapping[str, float] | None = None,
        scored: bool = False,
        before: Load | None = None,
    ) -> None:
        self.directory = directory
        self.outputs: list[RequestOutput] = []
        self._record = record
        self._labels = labels
        self._reports = reports
        self._targets = targets
        self._scored = scored
        self._stretch: LoadMeter | None = None
        self._load = MachineLoad(before)
        self._start_ns = 0
        self._steps: list[StepRecord] = []
        self._latency = CsvTable(directory / "latency.csv", names(LATENCY))
        self._step_table = CsvTable(directory / "steps.csv", names(STEPS))
        self._generations = CsvTable(directory / "generations.csv", names(GENERATIONS))
        self._tokens = CsvTable(directory / "tokens.csv", names(TOKENS))
        self._unwritten: str | None = None  # why the last rows are not on disk
        self._ended = threading.Event()
        # a thread, so that rows are written while the engine waits for an arrival or runs a long step
        self._flusher = threading.Thread(target=self._flush_regularly, name="flush results", daemon=True)
        self._write_record("running")

    def begin(self) -> int:
        """Start the run's clock; returns the start by ``time.perf_counter_ns``."""
        self._flusher.start()
        self._stretch = LoadMeter()
        self._start_ns = time.perf_counter_ns()
        return self._start_ns

    def on_step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._steps.append(record)
        self._step_table.add(step_row(record, self._start_ns))

    def on_output(self, output: RequestOutput) -> None:
        """See :class:`Observer`."""
        self.outputs.append(output)
        report = self._reports[output.request_id]
        self._latency.add(latency_row(output, self._start_ns))
        self._generations.add(
            {
                "request_id": output.request_id,
                "finding": report.finding,
                "summary_ref": report.impression,
                "summary_gen": output.text,
            }
        )
        self._tokens.add(
            {
                "request_id": output.request_id,
                "prompt_token_ids": " ".join(map(str, output.prompt_token_ids)),
                "token_ids": " ".join(map(str, output.token_ids)),
                "logprobs": _as_json(output.logprobs),
                "prompt_logprobs": _as_json(output.prompt_logprobs),
            }
        )

    def end(self, status: Status, error: str | None = None) -> None:
        """Write the last rows of the tables and the outcome, which takes little time. A run whose rows cannot be written
        counts as failed."""
        if self._stretch is not None and self._load.during is None:
            self._load = MachineLoad(self._load.before, self._stretch.end())
        self._ended.set()
        if self._flusher.ident is not None:
            self._flusher.join()
        self._unwritten = None
        try:
            self._flush()
        except Exception as fault:
            self._unwritten = f"rows could not be written: {type(fault).__name__}: {first_line(fault)}"
            status, error = "failed" if status == "finished" else status, error or self._unwritten
        if error is not None:
            self._record.content |= {"error": error, "unanswered": self._unanswered}
        self._write_record(status)

    def finish(self, status: Status, memory: Mapping[str, float | None], error: str | None = None) -> dict[str, Any]:
        """:meth:`end` the run, then write the metrics and the timeline. Only finished runs are added to ``runs.csv``.
        Returns the row of ``throughput.csv``; raises :class:`RunError` if rows of a run that finished could
        not be written."""
        self.end(status, error)
        figures: dict[str, Any] = dict.fromkeys(names(THROUGHPUT)) | {
            **self._labels,
            **throughput_figures(self.outputs, len(self._unanswered), self._start_ns, self._targets),
            **memory,
            **self._load.columns,
        }
        self._write_figures(figures)
        if status == "finished" and self._unwritten is None:
            if self._scored:  # may take a while, so the other metrics have been written before
                try:
                    figures |= self._rouge()
                except Exception as fault:  # a run without quality scores has not failed
                    tqdm.write(f"note: no ROUGE: {type(fault).__name__}: {first_line(fault)}", file=sys.stderr)
                self._write_figures(figures)
            append_row(self.directory.parent / "runs.csv", figures)
        try:
            with replaced_atomically(self.directory / "trace.json") as path:
                write_trace(path, self._steps, self._start_ns)
            with replaced_atomically(self.directory / "timeline.png") as path:
                self._draw_timeline(path)
        except Exception as fault:  # a run without a timeline has not failed
            tqdm.write(f"note: no timeline: {type(fault).__name__}: {first_line(fault)}", file=sys.stderr)
        if status == "finished" and self._unwritten is not None:
            raise RunError(f"{self._unwritten}; all other results are in {self.directory}")
        return figures

    def _draw_timeline(self, path: Path) -> None:
        # slow to import, so not at start-up
        import pandas as pd

        from splitwiser.results.report.plots import save_timeline

        rows = [step_row(step, self._start_ns) for step in self._steps]
        save_timeline(path, pd.DataFrame(rows, columns=list(names(STEPS))), self.directory.name)

    @property
    def _unanswered(self) -> list[int]:
        answered = {output.request_id for output in self.outputs}
        return [number for number in range(len(self._reports)) if number not in answered]

    def _rouge(self) -> dict[str, float | None]:
        pairs = [(self._reports[output.request_id].impression, output.text) for output in self.outputs]
        references, texts = zip(*(pair for pair in pairs if pair[0]), strict=True)
        return rouge(references, texts)

    def _write_figures(self, figures: dict[str, Any]) -> None:
        write_rows(self.directory / "throughput.csv", names(THROUGHPUT), [figures])

    def _write_record(self, status: Status) -> None:
        self._record.content["load"] = self._load.record
        self._record.write(status)

    def _flush_regularly(self) -> None:
        while not self._ended.wait(FLUSH_S):
            with contextlib.suppress(Exception):  # the rows are kept; the next flush tries again, and end() reports
                self._flush()

    def _flush(self) -> None:
        with contextlib.ExitStack() as each:  # so that an error in one table does not stop the others
            for table in (self._tokens, self._generations, self._step_table, self._latency):
                each.callback(table.flush)


def _as_json(logprobs: Sequence[TokenChoices | None] | None) -> str | None:
    """Return log-probabilities as ``tokens.csv`` has them: a list of an object for each token, by token id."""
    if logprobs is None:
        return None
    return json.dumps([each and {token: round(one.logprob, 6) for token, one in each.items()} for each in logprobs])
