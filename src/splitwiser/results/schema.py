"""The metrics of a run and the columns of its files: what each means, its unit, and where it is shown.

A new metric needs a function of :class:`~splitwiser.results.metrics.Served` and an entry in :data:`METRICS`:
``throughput.csv``, the tables made from it, the terminal, the report and the verdicts of a comparison all follow from these.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, Literal

from splitwiser.request import RequestOutput
from splitwiser.results import metrics
from splitwiser.results.metrics import Samples, Served, statistic

Place = Literal["run", "compare", "sweep", "advise", "report", "answer"]
"""Where a metric is shown: a command's table in the terminal (and the summaries that it writes), the report, or the sentence
that answers a comparison."""
UNIT_ENDINGS = {"ms": "_ms", "s": "_s", "MB": "_mb", "W": "_w", "%": "_percent"}  # of the names of columns


@dataclass(frozen=True)
class Column:
    """A column of a CSV file. The report requires those that are ``needed``; a needed column with a unit holds numbers, in
    every row unless it ``may_be_empty``. ``short_name`` names it in a sentence if the column's name does not."""

    name: str
    description: str
    unit: str = ""
    needed: bool = False
    short_name: str = ""
    may_be_empty: bool = False

    @property
    def subject(self) -> str:
        """What it holds, as it stands in a sentence."""
        return self.short_name or self.name.removesuffix(UNIT_ENDINGS.get(self.unit, "")).replace("_", " ")

    @property
    def label(self) -> str:
        """Its name as it stands in a sentence."""
        return self.subject

    @property
    def title(self) -> str:
        """Its name at the start of a sentence or above a plot."""
        return _capitalised(self.label)

    @property
    def title_with_unit(self) -> str:
        """Its name and unit as the heading of a row or column."""
        in_title = not self.unit or self.unit in self.title.lower().split()
        return self.title if in_title else f"{self.title}, {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Metric(Column):
    """A metric of a run.

    ``statistic`` says which statistic of its subject it is. ``compute`` computes it from the run's outputs; None means that
    the recorder of the run supplies the value. ``objective`` is its name in ``advise --objective``. A metric that is not
    ``timed`` does not depend on the load of the machine.
    """

    statistic: str = ""
    compute: Callable[[Served], float | None] | None = None
    more_is_better: bool = False
    shown: Sequence[Place] = ()
    objective: str = ""
    timed: bool = True

    @property
    def label(self) -> str:
        """Its name as it stands in a sentence."""
        return f"{self.subject} {self.statistic}".strip()

    @property
    def axis_label(self) -> str:
        """Its unit, and which end of an axis is the better one."""
        better = f"{'more' if self.more_is_better else 'less'} is better"
        return f"{self.unit}, {better}" if self.unit else better

    @property
    def heading(self) -> str:
        """Its name above a narrow column; for a rate the unit alone is enough."""
        return f"{self.label} {self.unit}" if self.statistic else self.unit


@dataclass(frozen=True)
class Latency:
    """A latency of requests; ``throughput.csv`` has one column per statistic. ``samples`` returns the values of one
    request, ``shown`` says where each statistic is shown, ``is_target`` whether ``--goodput`` may limit it."""

    name: str
    subject: str
    description: str
    samples: Samples
    shown: Mapping[str, Sequence[Place]] = field(default_factory=dict)
    is_objective: bool = False
    is_target: bool = False

    def column(self, statistic: str) -> str:
        """Return the name of the column of ``throughput.csv`` for ``statistic``, a key of :data:`STATISTICS`."""
        return f"{statistic}_{self.name}_ms"

    @property
    def title(self) -> str:
        """Its name as a row heading."""
        return _capitalised(self.subject)

    @property
    def metrics(self) -> list[Metric]:
        """One metric for each statistic."""
        return [
            Metric(
                self.column(name),
                f"{words} of {self.description}",
                "ms",
                short_name=self.subject,
                statistic="p50" if name == "median" else name,
                compute=partial(_statistic, name, self.samples),
                shown=self.shown.get(name, ()),
                objective=self.name if self.is_objective and name == "p99" else "",
            )
            for name, words in STATISTICS.items()
        ]


def _capitalised(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def _statistic(name: str, samples: Samples, run: Served) -> float | None:
    return statistic(name, run.pool(samples))


STATISTICS = {
    "mean": "Mean",
    "median": "Median",
    "std": "Standard deviation",
    "p90": "90th percentile",
    "p99": "99th percentile",
}
LATENCIES = (
    Latency(
        "ttft",
        "TTFT",
        "the time from a request's arrival to its first token, over requests.",
        metrics.ttft,
        {"median": ("run", "compare", "sweep", "report"), "p99": ("run", "compare", "advise", "report", "answer")},
        is_objective=True,
        is_target=True,
    ),
    Latency(
        "tpot",
        "TPOT",
        "the mean time per token after a request's first, over requests of two tokens or more.",
        metrics.tpot,
        {"median": ("compare",)},
        is_target=True,
    ),
    Latency(
        "itl",
        "ITL",
        "the time between two tokens of a request, over every gap of every request.",
        metrics.itl,
        {
            "median": ("run", "compare", "sweep", "advise", "report"),
            "p99": ("run", "compare", "advise", "report", "answer"),
        },
        is_objective=True,
    ),
    Latency(
        "e2el",
        "E2E",
        "the time from a request's arrival to its last token, over requests.",
        metrics.e2el,
        {"median": ("run", "compare", "sweep", "report"), "p99": ("run", "compare", "report")},
        is_objective=True,
        is_target=True,
    ),
    Latency(
        "handoff",
        "handoff",
        "the time from a request's first token to the start of its first decode step, over requests of two tokens or more.",
        metrics.handoff,
    ),
)
TARGETS = tuple(latency.name for latency in LATENCIES if latency.is_target)
ROUGE = ("rouge1", "rouge2", "rougeL")

METRICS: tuple[Metric, ...] = (
    Metric("duration", "Time from the run's start to its last token.", "s", compute=metrics.duration),
    Metric("completed", "Requests that were answered.", "requests", compute=metrics.completed),
    Metric("failed", "Requests that were not answered.", "requests", compute=metrics.failed),
    Metric("cancelled", "Requests that were cancelled, which are neither.", "requests", compute=metrics.cancelled),
    Metric(
        "total_input_tokens", "Prompt tokens of all answered requests.", "tokens", compute=metrics.total_input_tokens
    ),
    Metric(
        "total_output_tokens",
        "Generated tokens of all requests, cancelled ones included.",
        "tokens",
        compute=metrics.total_output_tokens,
    ),
    Metric(
        "request_throughput",
        "Answered requests per second of the duration.",
        "requests/s",
        compute=metrics.request_throughput,
        more_is_better=True,
    ),
    Metric(
        "request_goodput",
        "Requests per second of the duration that meet every target of --goodput; empty without targets.",
        "requests/s",
        short_name="goodput",
        compute=metrics.request_goodput,
        more_is_better=True,
        shown=("compare", "report", "answer"),
        objective="goodput",
    ),
    Metric(
        "requests_in_flight",
        "Requests between their first token and their last, on average over the duration.",
        "requests",
        compute=metrics.requests_in_flight,
        more_is_better=True,
    ),
    Metric(
        "full_batch_itl_ms",
        "Median time between two tokens of a request while every request was generating; empty if they never all were.",
        "ms",
        short_name="ITL at the full batch",
        compute=metrics.full_batch_itl,
    ),
    Metric(
        "output_throughput",
        "Generated tokens per second of the duration.",
        "tokens/s",
        compute=metrics.output_throughput,
        more_is_better=True,
        shown=("compare", "sweep", "advise", "report", "answer"),
        objective="throughput",
    ),
    Metric(
        "total_token_throughput",
        "Prompt and generated tokens per second of the duration.",
        "tokens/s",
        compute=metrics.total_token_throughput,
        more_is_better=True,
        shown=("compare",),
    ),
    *(metric for latency in LATENCIES for metric in latency.metrics),
    *(
        Metric(
            name,
            "Mean F-measure of this ROUGE score of the answers against the references; empty without references.",
            short_name=name.replace("rouge", "ROUGE-"),
            more_is_better=True,
            shown=("compare", "report") if name == "rougeL" else ("compare",),
            timed=False,
        )
        for name in ROUGE
    ),
    Metric(
        "peak_memory_mb",
        "Peak memory: everything in use on the GPU or, on a CPU, the resident memory of the run's processes.",
        "MB",
        short_name="peak memory",
        shown=("compare", "report"),
        timed=False,
    ),
    Metric("load_s", "Time to load the model.", "s", short_name="time to load"),
    Metric(
        "ready_s",
        "Time until the engine could accept requests.",
        "s",
        short_name="time to be ready",
        shown=("compare",),
    ),
    Metric("load_before", "Load average of the last minute before the run.", "processes"),
    Metric("cores", "Processors that the run may use; a container's quota counts as a fraction of them.", "cores"),
    Metric("own_cores", "Processor time that the run used, per second.", "cores"),
    Metric(
        "others_cores",
        "Processor time that all other processes used, per second.",
        "cores",
        short_name="cores of other processes",
    ),
    Metric(
        "cpu_pressure",
        "Share of the time in which at least one process waited for a processor.",
        short_name="CPU pressure",
    ),
    Metric("machine_busy", "Whether other processes used processor time that the run could have used."),
)
METRIC = {metric.name: metric for metric in METRICS}
OBJECTIVES = {metric.objective: metric for metric in METRICS if metric.objective}

LABELS = (
    Column("run_id", "Name of the run's folder.", short_name="run"),
    Column("model", "Name of the model."),
    Column("case_id", "Prompting recipe of configs/cases.yaml; empty for other requests.", short_name="case"),
    Column("backend", "What computes: hf, this project's own engine, or vllm."),
    Column("mode", "Placement of the two phases."),
    Column("workers", "The workers and their roles."),
    Column("device", "The device that the model was on."),
    Column("dtype", "Number format of the model.", short_name="number format"),
    Column("quantization", "int8 if linear layers computed in whole numbers, none if in the model's number format."),
    Column("kv_dtype", "Number format of K and V in the KV pool: bfloat16, int8, or auto for the model's."),
    Column("load_format", "auto for a checkpoint's weights, dummy for random ones.", short_name="weights"),
    Column("request_rate", "Arrival rate of --request_rate; empty without.", "requests/s"),
    Column("burstiness", "Burstiness of --request_rate; empty without."),
    Column("max_concurrency", "Concurrent requests of a closed loop; empty without.", "requests"),
)
THROUGHPUT = (*LABELS, *METRICS)
LATENCY = (
    Column("request_id", "Number of the request.", needed=True, short_name="request"),
    Column("prompt_id", "Number of its prompt; each of a prompt's samples is a request.", short_name="prompt"),
    Column("sample", "Number of the request among its prompt's samples."),
    Column("prompt_tokens", "Tokens of the prompt.", "tokens"),
    Column("cached_tokens", "Prompt tokens whose keys and values were found in the KV pool.", "tokens"),
    Column("output_tokens", "Tokens of the answer.", "tokens", needed=True),
    Column("preemptions", "How often the request lost its KV blocks to another and was recomputed."),
    Column("adapter", "Adapter that the request ran with; empty for the model alone."),
    Column("priority", "The request's own priority, of which the lowest goes first under policy priority."),
    Column("arrival_s", "Time of arrival, from the run's start.", "s", needed=True),
    Column(
        "prefill_start_s",
        "Start of the first prefill step, from the run's start; this and all that follows from tokens is empty for a "
        "request that was cancelled before it had one.",
        "s",
        needed=True,
        may_be_empty=True,
    ),
    Column("first_token_s", "Time of the first token, from the run's start.", "s", needed=True, may_be_empty=True),
    Column("finish_s", "Time of the last token or of the cancel, from the run's start.", "s", needed=True),
    Column("queue_ms", "Time from arrival to the first prefill step.", "ms"),
    Column("ttft_ms", "Time from arrival to the first token.", "ms", needed=True, short_name="TTFT", may_be_empty=True),
    Column("handoff_ms", "Time from the first token to the first decode step; empty for one token.", "ms"),
    Column("tpot_ms", "Mean time per token after the first; empty for one token.", "ms", short_name="TPOT"),
    Column("itl_p50_ms", "Median time between two tokens; empty for one token.", "ms", short_name="ITL p50"),
    Column(
        "itl_p99_ms", "99th percentile of the time between two tokens; empty for one token.", "ms", short_name="ITL p99"
    ),
    Column("e2el_ms", "Time from arrival to the last token; empty for a cancelled request.", "ms", short_name="E2E"),
    Column("finish_reason", "Why the answer ended: stop (an end-of-sequence token), length or cancelled."),
    Column("prefill_worker", "Worker that ran the prompt."),
    Column("decode_worker", "Worker that generated the tokens after the first."),
)
STEPS = (
    Column("worker", "Name of the worker.", needed=True),
    Column("role", "Role of the worker: prefill, decode or mixed."),
    Column("phase", "prefill, decode, or hybrid: both in one forward.", needed=True),
    Column("start_s", "Start of the step, from the run's start.", "s", needed=True),
    Column("end_s", "End of the step, from the run's start.", "s", needed=True),
    Column("requests", "Requests in the step.", "requests", needed=True),
    Column("tokens", "Tokens whose keys and values the step computed.", "tokens", needed=True),
    Column("decode_tokens", "Those of them that are of requests in decode; the others are of prompts.", "tokens"),
)
GENERATIONS = (
    Column("request_id", "Number of the request.", needed=True, short_name="request"),
    Column(
        "finding", "The report's findings; of a request that is no report its prompt, or the last message of its chat."
    ),
    Column("summary_ref", "The reference, where there is one.", short_name="reference"),
    Column("summary_gen", "The generated text.", needed=True, short_name="generated text"),
)
TOKENS = (
    Column("request_id", "Number of the request.", short_name="request"),
    Column("prompt_token_ids", "Token ids of the prompt, separated by spaces."),
    Column("token_ids", "Token ids of the answer, separated by spaces."),
    Column(
        "logprobs",
        "Log-probabilities at each token of the answer, as a JSON list of objects by token id: first the token's own, then "
        "those of the likeliest; empty without --logprobs.",
    ),
    Column("prompt_logprobs", "The same for the prompt, whose first token has none; empty without --prompt_logprobs."),
)
_STEP_FIGURES = (
    Column("ms", "Median time of the step.", "ms", needed=True, short_name="time"),
    Column("ms_least", "Shortest time of the step.", "ms", short_name="shortest time"),
    Column("ms_greatest", "Longest time of the step.", "ms", short_name="longest time"),
    Column("repeats", "Number of measured steps.", "steps"),
    Column("tokens_per_s", "Tokens that the step computes, per second.", "tokens/s", short_name="throughput"),
    Column(
        "flops",
        "Floating-point operations of the step, counted from the architecture.",
        "operations",
        short_name="arithmetic",
    ),
    Column(
        "bytes",
        "Bytes that the step moves to and from memory, counted from the architecture.",
        "bytes",
        short_name="memory traffic",
    ),
    Column("arithmetic_intensity", "Operations per byte.", "operations/byte", needed=True),
    Column("tflops", "Operations per second, in 10^12.", "TFLOP/s", needed=True, short_name="arithmetic rate"),
    Column("gb_s", "Bytes per second, in 10^9.", "GB/s", short_name="memory rate"),
    Column("share_of_compute", "Operations per second over the highest measured rate."),
    Column("share_of_bandwidth", "Bytes per second over the highest measured rate; above 1 where a cache helped."),
    Column("share_of_roofline", "Operations per second over what the roofline allows at this intensity."),
    Column("peak_memory_mb", "Peak memory: of this step on a GPU, of the process so far on a CPU.", "MB"),
    Column(
        "gpu_util_percent",
        "Share of the time in which any kernel ran (NVML); empty without a GPU.",
        "%",
        short_name="GPU in use",
    ),
    Column(
        "memory_util_percent",
        "Share of the time in which GPU memory was read or written (NVML).",
        "%",
        short_name="memory in use",
    ),
    Column(
        "sm_activity_percent",
        "Share of the multiprocessors that were busy (GPM; Hopper and newer).",
        "%",
        short_name="multiprocessors in use",
    ),
    Column(
        "dram_activity_percent",
        "Share of the memory's bandwidth that was used (GPM; Hopper and newer).",
        "%",
        short_name="bandwidth in use",
    ),
    Column("power_w", "Power of the GPU.", "W", short_name="power"),
)
_THREADS = Column("threads", "Number of PyTorch threads.", "threads")
PREFILL = (
    _THREADS,
    Column("prompts", "Prompts in the step.", "requests"),
    Column("start_tokens", "Tokens of each prompt computed by earlier steps.", "tokens"),
    Column("prompt_tokens", "Tokens of each prompt computed by this step.", "tokens", needed=True),
    *_STEP_FIGURES,
)
DECODE = (
    _THREADS,
    Column("batch", "Requests in the step.", "requests", needed=True),
    Column("context", "Tokens of each request in the KV pool after the step.", "tokens", needed=True),
    Column("itl_ms", "The step's median time, which is the time between two tokens.", "ms", short_name="ITL"),
    *_STEP_FIGURES,
)
CEILINGS = (
    _THREADS,
    Column("kind", "compute or memory.", needed=True),
    Column("what", "What was measured: a matrix product, a copy or a sum."),
    Column("size", "Rows of the square matrices, or bytes of the buffer.", "rows or bytes"),
    Column("ms", "Shortest time of a pass.", "ms", short_name="time"),
    Column("amount", "Operations or bytes of a pass.", "operations or bytes"),
    Column("rate", "The amount per second, in the unit of the next column.", "TFLOP/s or GB/s", needed=True),
    Column("unit", "Unit of the rate.", needed=True),
)
TABLES: dict[str, Sequence[Column]] = {
    "throughput.csv": THROUGHPUT,
    "latency.csv": LATENCY,
    "steps.csv": STEPS,
    "generations.csv": GENERATIONS,
    "tokens.csv": TOKENS,
}
"""Tables of a run; the commands that start runs declare their own."""


def throughput_figures(
    outputs: Sequence[RequestOutput], failed: int, start_ns: int, targets: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Return those of :data:`METRICS` that follow from ``outputs``, named as in ``vllm bench serve``; None without samples.

    ``failed`` is the number of unanswered requests; ``start_ns`` is the run's start by ``time.perf_counter_ns``;
    ``targets`` are the goodput targets in milliseconds.
    """
    run = Served(outputs, failed, start_ns, targets)
    return {metric.name: metric.compute(run) for metric in METRICS if metric.compute is not None}


def shown_in(place: Place) -> list[Metric]:
    """Return the metrics that are shown in ``place``, in the order of ``throughput.csv``."""
    return [metric for metric in METRICS if place in metric.shown]


def names(columns: Iterable[Column]) -> tuple[str, ...]:
    """Return the names of ``columns``."""
    return tuple(column.name for column in columns)


def column(description: str, unit: str = "", *, default: object = None) -> Any:  # noqa: ANN401  # as dataclasses.field
    """Return a field for a dataclass whose instances are rows of a CSV file (:func:`columns_of`)."""
    metadata = {"column": (description, unit)}
    return field(metadata=metadata) if default is None else field(default=default, metadata=metadata)


def columns_of(row: type) -> tuple[Column, ...]:
    """Return the CSV columns of a dataclass whose fields were made by :func:`column`."""

    def column_of(each: Field[Any]) -> Column:
        description, unit = each.metadata["column"]
        return Column(each.name, description, unit)

    return tuple(column_of(each) for each in fields(row))


def describe_columns(tables: Mapping[str, Sequence[Column]]) -> str:
    """Return a table in Markdown for each of ``tables``: the columns, their units and what they mean."""
    parts = []
    for file, columns in tables.items():
        rows = [f"| `{each.name}` | {each.unit or '-'} | {each.description} |" for each in columns]
        parts.append("\n".join([f"### {file}", "", "| column | unit | meaning |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"
