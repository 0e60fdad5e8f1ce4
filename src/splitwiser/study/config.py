"""The configurations of ``splitwiser profile`` and ``splitwiser advise``; each field is also an option of its command."""

from dataclasses import dataclass
from pathlib import Path

from splitwiser import constants
from splitwiser.config import RunConfig, check_results
from splitwiser.errors import InputError, unknown
from splitwiser.options import check_counts, option, whole_numbers
from splitwiser.placement.config import ModelConfig
from splitwiser.results.schema import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(ModelConfig):
    """What to profile. Raises :class:`~splitwiser.errors.InputError` for a list that is none."""

    prompt_lengths: str = option("64,128,256,512,1024,2048", "prefill: tokens of a prompt, a step each", "steps")
    prompts: str = option("4", "prefill: also so many prompts of each length a step, within --prefill_tokens", "steps")
    starts: str = option("512", "prefill: also each length as a chunk behind so many tokens of its prompt", "steps")
    batch_sizes: str = option("1,4,16,64", "decode: requests in a step", "steps")
    contexts: str = option("128,512,2048", "decode: tokens that each request has in the pool", "steps")
    threads: str = option("", "on a CPU: thread counts to profile with; empty: PyTorch's own", "steps")
    repeats: int = option(5, "least number of measured steps a point; all together last 0.2 s at least", "steps")
    results: str = option(str(constants.DIR_RESULTS), "directory that gets a folder for this run", "results")

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "prompts", "starts", "batch_sizes", "contexts", "threads"):
            whole_numbers(name, getattr(self, name))
        for name in ("prompt_lengths", "batch_sizes", "contexts"):
            if not getattr(self, name).strip():
                raise InputError(f"--{name} is empty; at least one whole number is needed")
        check_counts(self, "--repeats", "--prefill_tokens")
        super().__post_init__()
        check_results(self.results)


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(RunConfig):
    """What to advise on: the options of a run, but for those that the advice is about, and these."""

    mode: str = constants.MODE  # no option, as those up to batch_size
    workers: str = constants.WORKERS
    share: str = constants.SHARE
    itl_target_ms: float = constants.ITL_TARGET_MS
    batch_size: int = constants.BATCH_SIZE
    objective: str = option("throughput", f"what is to be best: {', '.join(OBJECTIVES)}", "advice")
    profile: str | None = option(
        None, "folder of an earlier advise: predict from what it measured, measure nothing anew", "advice"
    )
    checks: int = option(3, "how many of the predicted placements to run, the best first; 0: none", "advice")
    repeats: int = option(1, "how often to run each of them, in interleaved rounds", "advice")

    def __post_init__(self) -> None:
        check_counts(self, "--repeats", "--prefill_tokens", "--max_batch")
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.objective == "goodput" and self.goodput is None:
            raise InputError("--objective goodput needs targets; give --goodput, such as ttft:200,tpot:50")
        if self.checks < 0:
            raise InputError(f"--checks must be 0 or more, not {self.checks}")
        if self.profile is not None and not (Path(self.profile) / "profile.yaml").is_file():
            raise InputError(
                f"--profile {self.profile}: no profile.yaml in it; give the folder that an advise has made"
            )
