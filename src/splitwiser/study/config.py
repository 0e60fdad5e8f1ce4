"""The configurations of ``splitwiser profile`` and ``splitwiser advise``; each field is also an option of its command."""

from dataclasses import dataclass
from pathlib import Path

from splitwiser import constants
from splitwiser.config import RunConfig, check_results
from splitwiser.errors import InputError, unknown_name
from splitwiser.options import check_counts, option, whole_numbers
from splitwiser.placement.config import ModelConfig
from splitwiser.results.schema import OBJECTIVES


@dataclass(frozen=True, kw_only=True, repr=False)
class ProfileConfig(ModelConfig):
    """What to profile. Raises :class:`~splitwiser.errors.InputError` for an invalid list."""

    prompt_lengths: str = option("64,128,256,512,1024,2048", "prefill: tokens of a prompt, one step each", "steps")
    prompts: str = option(
        "4", "prefill: also this many prompts of each length per step, within --prefill_tokens", "steps"
    )
    starts: str = option("512", "prefill: also each length as a chunk after this many tokens of its prompt", "steps")
    batch_sizes: str = option("1,4,16,64", "decode: requests in a step", "steps")
    contexts: str = option("128,512,2048", "decode: tokens of each request in the KV pool", "steps")
    threads: str = option("", "on a CPU: thread counts to profile with; empty: PyTorch's own", "steps")
    repeats: int = option(5, "minimum measured steps per point; together they last at least 0.2 s", "steps")
    results: str = option(str(constants.DIR_RESULTS), "directory that gets a folder for this run", "results")

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "prompts", "starts", "batch_sizes", "contexts", "threads"):
            whole_numbers(name, getattr(self, name))
        for name in ("prompt_lengths", "batch_sizes", "contexts"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty; at least one whole number is needed")
        check_counts(self, "repeats")
        super().__post_init__()
        check_results(self.results)


@dataclass(frozen=True, kw_only=True, repr=False)
class AdviseConfig(RunConfig):
    """What to advise on: the options of a run, except those that the advice determines, and these."""

    mode: str = constants.MODE  # this and the next, up to batch_size, are not options
    backend: str = constants.BACKEND
    backend_python: str | None = None
    workers: str = constants.WORKERS
    share: str = constants.SHARE
    itl_target_ms: float | None = None
    second_lane: bool = False  # which no prediction knows
    schedule: str = constants.SCHEDULE
    batch_size: int = constants.BATCH_SIZE
    objective: str = option("throughput", f"metric to optimise: {', '.join(OBJECTIVES)}", "advice")
    profile: str | None = option(
        None, "folder of an earlier advise: predict from its measurements instead of new ones", "advice"
    )
    checks: int = option(3, "number of predicted placements to run, the best first; 0: none", "advice")
    repeats: int = option(1, "how often to run each of them, in interleaved rounds", "advice")

    def __post_init__(self) -> None:
        check_counts(self, "repeats")
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        if self.objective == "goodput" and self.goodput is None:
            raise InputError("--objective goodput needs targets; give --goodput, such as ttft:200,tpot:50")
        if self.checks < 0:
            raise InputError(f"--checks must be 0 or more, not {self.checks}")
        if self.profile is not None and not (Path(self.profile) / "profile.yaml").is_file():
            raise InputError(f"--profile {self.profile}: no profile.yaml in it; give the folder of an earlier advise")
