"""Writes a run's files as its results come, so that a killed run leaves what it had finished."""

import contextlib
import csv
import fcntl
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from tqdm import tqdm

from splitwiser.engine.engine import Observer
from splitwiser.engine.messages import StepRecord
from splitwiser.errors import InputError, RunError, first_line
from splitwiser.machine.load import Load, LoadMeter, MachineLoad
from splitwiser.request import RequestOutput
from splitwiser.results.metrics import LATENCY_COLUMNS, latency_row, throughput_figures
from splitwiser.results.rouge import ROUGE, rouge
from splitwiser.results.timeline import draw_timeline, write_trace
from splitwiser.workload.reports import Report

Status = Literal["running", "finished", "failed", "interrupted"]

STEP_COLUMNS = ("worker", "role", "phase", "start_s", "end_s", "requests", "tokens")
GENERATION_COLUMNS = ("request_id", "finding", "summary_ref", "summary_gen")
TOKEN_COLUMNS = ("request_id", "prompt_token_ids", "token_ids")
FLUSH_S = 0.5  # rows reach the disk at most this much later than they came


class _Table:
    """A CSV that grows: rows are kept until :meth:`flush`, which another thread may call, appends them."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = list(columns)
        self._rows: deque[dict[str, Any]] = deque()
        path.write_text(f"{','.join(columns)}\n", encoding="ascii")
        self._nbytes = path.stat().st_size

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)

    def flush(self) -> None:
        rows = [self._rows.popleft() for _ in range(len(self._rows))]
        if not rows:
            return
        try:
            # text is quoted: a bare carriage return would end its row
            table = pd.DataFrame(rows, columns=self._columns, dtype=object)  # its strings may hold any character
            text = table.to_csv(header=False, index=False, quoting=csv.QUOTE_NONNUMERIC)
            with self._path.open("r+b") as file:
                file.truncate(self._nbytes)  # what an attempt that failed has left
                file.seek(self._nbytes)
                file.write(text.encode(errors="backslashreplace"))  # half of a surrogate pair is spelt out
                file.flush()
                self._nbytes = file.tell()
        except BaseException:
            self._rows.extendleft(reversed(rows))
            raise


def make_run_directory(results: Path, model: str, case: str, mode: str) -> Path:
    """A new folder ``<model>_case<id>_<mode>_<UTC time>`` under ``results``; a number is added if two runs start in the
    same second."""
    return make_directory(results, f"{model}_{case}_{mode}")


def make_directory(results: Path, kind: str) -> Path:
    """A new folder ``<kind>_<UTC time>`` under ``results``; see :func:`make_run_directory`. Raises :class:`InputError` where
    none can be made."""
    name = f"{kind}_{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        results.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            directory = results / (name if attempt == 1 else f"{name}-{attempt}")
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                return directory
    except OSError as error:
        raise InputError(
            f"--results {results}: no folder can be made there: {error.strerror}; give one that can be written"
        ) from error
    raise FileExistsError(f"{results / name} and 999 numbered ones exist")


class RunRecorder(Observer):
    """Records one run in ``directory``. ``record`` goes into ``run.yaml`` whole; ``labels`` are the columns of
    ``throughput.csv`` before its figures. ``targets`` are those of goodput; ``scored`` says whether a finished run's texts
    are compared with the references; ``before`` is what the machine did before the run."""

    def __init__(
        self,
        directory: Path,
        record: dict[str, Any],
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
        self._latency = _Table(directory / "latency.csv", LATENCY_COLUMNS)
        self._step_table = _Table(directory / "steps.csv", STEP_COLUMNS)
        self._generations = _Table(directory / "generations.csv", GENERATION_COLUMNS)
        self._tokens = _Table(directory / "tokens.csv", TOKEN_COLUMNS)
        self._unwritten: str | None = None  # why the last rows are not on disk
        self._ended = threading.Event()
        # a thread, since what has finished must reach the disk while the engine waits for an arrival or runs a long step
        self._flusher = threading.Thread(target=self._flush_regularly, name="flush results", daemon=True)
        self._write_record("running", {})

    def begin(self) -> int:
        """Start the run's clock: the moment of ``time.perf_counter_ns`` that its times count from."""
        self._flusher.start()
        self._stretch = LoadMeter()
        self._start_ns = time.perf_counter_ns()
        return self._start_ns

    def on_step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        self._steps.append(record)
        row = asdict(record)
        row["start_s"] = (record.start_ns - self._start_ns) / 1e9
        row["end_s"] = (record.end_ns - self._start_ns) / 1e9
        self._step_table.add(row)

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
            }
        )

    def end(self, status: Status, error: str | None = None) -> None:
        """Write the tables' last rows and the outcome, which takes a moment only. A run whose rows cannot be written has
        failed."""
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
        self._write_record(status, {} if error is None else {"error": error, "unanswered": self._unanswered})

    def finish(self, status: Status, memory: Mapping[str, float | None], error: str | None = None) -> dict[str, Any]:
        """:meth:`end` the run, then write the figures and the timeline. A run that was not finished does not enter
        ``runs.csv``. Returns the row of ``throughput.csv``; raises :class:`RunError` if rows of a run that finished could
        not be written."""
        self.end(status, error)
        figures: dict[str, Any] = {
            **self._labels,
            **throughput_figures(self.outputs, len(self._unanswered), self._start_ns, self._targets),
            **dict.fromkeys(ROUGE),
            **memory,
            **self._load.columns,
        }
        self._write_figures(figures)
        if status == "finished" and self._unwritten is None:
            if self._scored:  # may take a while: what is there has been written
                try:
                    figures |= self._rouge()
                except Exception as fault:  # figures of quality are no reason to call a run failed
                    tqdm.write(f"note: no ROUGE: {type(fault).__name__}: {first_line(fault)}", file=sys.stderr)
                self._write_figures(figures)
            append_row(self.directory.parent / "runs.csv", figures)
        try:
            with _whole(self.directory / "trace.json") as path:
                write_trace(path, self._steps, self._start_ns)
            with _whole(self.directory / "timeline.png") as path:
                draw_timeline(path, self._steps, self._start_ns, self.directory.name)
        except Exception as fault:  # a picture is no reason to call a run failed
            tqdm.write(f"note: no timeline: {type(fault).__name__}: {first_line(fault)}", file=sys.stderr)
        if status == "finished" and self._unwritten is not None:
            raise RunError(f"{self._unwritten}; what could be is in {self.directory}")
        return figures

    @property
    def _unanswered(self) -> list[int]:
        answered = {output.request_id for output in self.outputs}
        return [number for number in range(len(self._reports)) if number not in answered]

    def _rouge(self) -> dict[str, float | None]:
        pairs = [(self._reports[output.request_id].impression, output.text) for output in self.outputs]
        references, texts = zip(*(pair for pair in pairs if pair[0]), strict=True)
        return rouge(references, texts)

    def _write_figures(self, figures: dict[str, Any]) -> None:
        replace(self.directory / "throughput.csv", pd.DataFrame([figures], dtype=object).to_csv(index=False))

    def _write_record(self, status: Status, outcome: Mapping[str, Any]) -> None:
        content = {"status": status, **self._record, "load": self._load.record, **outcome}
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        replace(self.directory / "run.yaml", text)

    def _flush_regularly(self) -> None:
        while not self._ended.wait(FLUSH_S):
            with contextlib.suppress(Exception):  # the rows are kept: the next flush writes them, or the last one fails
                self._flush()

    def _flush(self) -> None:
        with contextlib.ExitStack() as each:  # so that no table's fault is another's
            for table in (self._tokens, self._generations, self._step_table, self._latency):
                each.callback(table.flush)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add ``row`` to the CSV at ``path``; columns that only one side has stay empty in the other. Several runs may do so at
    once: a lock file keeps them apart, and the CSV is replaced as a whole."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = [pd.read_csv(path, dtype=object, keep_default_na=False)] if path.exists() and path.stat().st_size else []
        replace(path, pd.concat([*rows, pd.DataFrame([row], dtype=object)]).to_csv(index=False))


def replace(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader, or a run killed half-way, finds the old content or the new."""
    with _whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Where to write what becomes the file ``path`` once the block has ended well. An OSError names ``path``."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:  # of a full disk no file is named
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
