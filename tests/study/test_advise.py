"""What is advised: on recorded profiles where it is plain which way is better, and end to end on a tiny model."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from splitwiser import constants
from splitwiser.config import RunConfig
from splitwiser.request import Request, SamplingParams
from splitwiser.results.schema import OBJECTIVES, names
from splitwiser.study.advise import advise
from splitwiser.study.candidates import (
    CANDIDATE,
    PLACEMENTS,
    SCHEDULES,
    Candidate,
    budgets_of,
    placements,
    short_profile,
)
from splitwiser.study.config import AdviseConfig
from splitwiser.study.recommend import (
    AIM,
    CHECKS,
    PREDICTED,
    WORTH,
    Advice,
    advice_summary,
    choose_checks,
    recommend,
    relative_error,
    run_options,
)
from splitwiser.study.step_times import StepCosts
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke

Tiny = Callable[[str], Path]
SPLIT = "[{role: prefill, share: 25}, {role: decode, share: 75}]"


def write_workload(path: Path, prompts: int = 24, new_tokens: int = 20) -> Path:
    content = {"max_new_tokens": new_tokens, "prompts": [[5 + n % 7] * (20 + 5 * (n % 10)) for n in range(prompts)]}
    path.write_text(json.dumps(content))
    return path


def recorded(directory: Path, model: str, *, beside: float, busy: bool = False, **changes: Any) -> Path:
    """A profile of a device where a prompt token takes 1 ms and a decode step 20 ms, and where steps side by side take
    ``beside`` times as long; ``busy`` says whether others used the machine meanwhile."""
    directory.mkdir()
    prefill = [(1, 1, 0, n, 2.0 + n) for n in (16, 64, 256)] + [(1, 4, 0, n, 2.0 + 4 * n) for n in (16, 64)]
    columns = ["threads", "prompts", "start_tokens", "prompt_tokens", "ms"]
    pd.DataFrame(prefill, columns=columns).to_csv(directory / "prefill.csv", index=False)
    decode = [(1, batch, context, 20.0) for batch in (1, 64) for context in (64, 256)]
    pd.DataFrame(decode, columns=["threads", "batch", "context", "ms"]).to_csv(directory / "decode.csv", index=False)
    one = {"mode": "sequential", "workers": "", "blocks": 1000, "prefill_alone": 1, "decode_alone": 1,
           "prefill_beside": 1, "decode_beside": 1, "gap_s": 0, "steps": 9}  # fmt: skip
    two = one | {"mode": "mp", "prefill_beside": beside, "decode_beside": beside}
    gone = {"mode": "mps", "workers": "", "not_possible": "needs an NVIDIA GPU; the device is a CPU"}
    rows = pd.DataFrame([one, two, gone], columns=list(names(PLACEMENTS)))
    rows.assign(**changes).to_csv(directory / "placements.csv", index=False)
    record = {
        "model": {"name": model, "dtype": "float32"},
        "configuration": {"device": "cuda:0"},
        "machine": {"cores": 8},
        "load": {"busy": busy},
    }
    (directory / "profile.yaml").write_text(yaml.safe_dump(record))
    return directory


@pytest.fixture
def on_record(tiny: Tiny, tmp_path: Path) -> Callable[..., Advice]:
    def run(beside: float, **options: Any) -> Advice:
        model = tiny("opt")
        profile = recorded(tmp_path / f"profile-{len(list(tmp_path.iterdir()))}", model.name, beside=beside)
        workload = write_workload(tmp_path / "work.json")
        settings = {"checks": 0, "ignore_eos": True, "prefill_tokens": 128, **options}
        return advise(
            AdviseConfig(
                model=str(model), workload=str(workload), profile=str(profile), results=str(tmp_path), **settings
            )
        )

    return run


def advised(advice: Advice) -> Candidate:
    assert advice.best is not None, advice.reasons
    return advice.best


def predicted(advice: Advice, figure: str) -> dict[str, float]:
    rows = advice.table[advice.table.schedule != "hybrid"]
    return {str(row["mode"]): float(row[figure]) for row in rows.to_dict("records")}


def test_where_phases_do_not_hinder_each_other_they_are_split(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=1.0)
    assert advice.split
    assert advised(advice).splits
    assert advised(advice).mode == "mp"
    assert "--mode=mp" in str(advice.command)


def test_where_side_by_side_is_slower_than_in_turns_they_are_not(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=2.5)
    assert not advice.split
    assert advised(advice).mode == "sequential"
    assert_says(" ".join(advice.reasons), "Output throughput", "worse", "ITL p99", "(predicted)")
    said = advice_summary(advice)
    assert_says(said, "Advice: do not split the phases", "mps is not possible here", str(advice.command))


def test_hybrid_steps_are_predicted_beside_steps_in_turn(on_record: Callable[..., Advice]) -> None:
    # a prompt token takes 1 ms, a decode step 20 ms however many requests: beside a chunk of 20 tokens or more it is free
    advice = on_record(beside=2.5)
    of_schedule = advice.table[advice.table["mode"] == "sequential"].set_index("schedule")["output_throughput"]
    assert of_schedule["hybrid"] > 1.03 * of_schedule["alternate"]
    assert advised(advice).schedule == "hybrid"


def test_what_is_best_depends_on_what_for(on_record: Callable[..., Advice]) -> None:
    # a token waits for a prefill step of up to 130 ms and its own of 20, or takes 50 ms beside one
    advice = on_record(beside=2.5, objective="itl")
    assert advice.split
    figures = predicted(advice, "p99_itl_ms")
    assert figures["sequential"] == pytest.approx(140, abs=10)
    assert 50 <= figures["mp"] < 100
    assert_says(advice.reasons[0], f"ITL p99 is {figures['mp']:,.1f} ms with split phases", "better")


def test_goodput_counts_the_requests_that_meet_their_targets(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=1.2, objective="goodput", goodput="tpot:40")
    assert advice.split  # beside prefill a token takes 24 ms; behind a step of it, 100 and more
    assert predicted(advice, "request_goodput")["mp"] > predicted(advice, "request_goodput")["sequential"]
    assert_says(advice.reasons[0], "Goodput is", "requests/s")
    assert "--goodput=tpot:40" in str(advice.command)


def test_requests_that_arrive_as_others_finish_are_predicted_so(on_record: Callable[..., Advice]) -> None:
    one, all_at_once = on_record(beside=1.0, max_concurrency=1), on_record(beside=1.0)
    ttft = [predicted(advice, "p99_ttft_ms")["mp"] for advice in (one, all_at_once)]
    assert ttft[0] == pytest.approx(2 + 65, abs=1)  # nobody waits: a prompt of 65 tokens
    assert ttft[1] > 10 * ttft[0]


def test_a_smaller_budget_that_is_no_better_is_not_advised(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=1.0, prefill_tokens=600, limit=8)  # 340 prompt tokens at most in a step
    rates = advice.table.dropna(subset="prefill_tokens").query("mode == 'mp'")
    assert rates.set_index("prefill_tokens")["output_throughput"].to_dict()[600] == pytest.approx(
        rates["output_throughput"].max()
    )
    assert advised(advice).prefill_tokens == 600


def test_answers_end_as_a_sample_of_them_did(tiny: Tiny, tmp_path: Path, on_record: Callable[..., Advice]) -> None:
    longest = on_record(beside=1.0, ignore_eos=False)
    (profile,) = tmp_path.glob("profile-*")
    pd.DataFrame({"output_tokens": [5]}).to_csv(profile / "output_tokens.csv", index=False)
    options = {
        "model": str(tiny("opt")),
        "workload": str(tmp_path / "work.json"),
        "results": str(tmp_path),
        "checks": 0,
    }
    shorter = advise(AdviseConfig(profile=str(profile), prefill_tokens=128, **options))  # type: ignore[arg-type]
    rates = [predicted(advice, "p99_e2el_ms")["sequential"] for advice in (longest, shorter)]
    assert rates[0] - rates[1] >= 12 * 20  # of 20 tokens, the last 15 are not made, most of them 20 ms each
    record = yaml.safe_load((shorter.directory / "advice.yaml").read_text())
    assert record["answers_end"] == "as a sample of them did"


def test_the_files_of_an_advice(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=1.0)
    assert advice.directory.name.startswith("advise_tiny-opt_")
    predictions = pd.read_csv(advice.directory / "predictions.csv", keep_default_na=False)
    assert predictions["mode"].tolist() == ["sequential", "sequential", "mp", "mps"]
    assert predictions["schedule"].fillna("").tolist() == [*SCHEDULES, "", ""]
    assert predictions["not_possible"].tolist()[-1].startswith("needs an NVIDIA GPU")
    record = yaml.safe_load((advice.directory / "advice.yaml").read_text())
    assert (record["status"], record["split"], record["command"]) == ("finished", True, advice.command)
    assert record["reasons"] == advice.reasons
    assert record["requests"]["count"] == 24
    assert pd.read_csv(advice.directory / "advice.csv")["mode"].tolist() == predictions["mode"].tolist()


def test_smaller_prefill_budgets_are_predicted_too(on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=1.0, prefill_tokens=600)
    budgets = advice.table.dropna(subset="prefill_tokens").groupby("mode")["prefill_tokens"].apply(sorted).to_dict()
    assert budgets == {"sequential": sorted([256, 512, 600] * len(SCHEDULES)), "mp": [256, 512, 600]}


NO_CHECKS = pd.DataFrame(columns=list(names(CHECKS)))
CANDIDATES = [
    ("sequential", "", 128, "alternate"), ("mp", "", 128, ""), ("mp", SPLIT, 128, ""), ("sequential", "", 256, "hybrid")
]  # fmt: skip


def table(values: list[float], figure: str = "output_throughput") -> pd.DataFrame:
    rows = pd.DataFrame(CANDIDATES, columns=list(names(CANDIDATE)))
    return rows.assign(**dict.fromkeys(names(PREDICTED), 1.0), not_possible=None).assign(**{figure: values})


def checks(values: dict[int, list[float]], predictions: pd.DataFrame, busy: object = None) -> pd.DataFrame:
    rows = []
    for place, measured in values.items():
        for number, value in enumerate(measured):
            for figure in names(PREDICTED):
                predicted = predictions[figure].iloc[place]
                of_figure = value if figure == "output_throughput" else predicted
                rows.append(
                    dict(zip(names(CANDIDATE), CANDIDATES[place], strict=True))
                    | {"round": number, "figure": figure, "predicted": predicted, "measured": of_figure,
                       "error": relative_error(predicted, of_figure), "run_id": f"{place}-{number}",
                       "machine_busy": busy if number else False}
                )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("split", "advised"), [(110.0, True), (104.0, False), (100.0, False), (50.0, False)], ids=str)
def test_a_gain_too_small_is_not_worth_splitting(split: float, advised: bool) -> None:
    advice = recommend(AdviseConfig(), table([100, split, 0, 0]), NO_CHECKS, Path())
    assert advice.split is advised
    assert advice.best == Candidate(*CANDIDATES[1 if advised else 0])


def test_what_was_measured_decides() -> None:
    predictions = table([100, 95, 50, 50])
    advice = recommend(AdviseConfig(), predictions, checks({0: [100, 120, 90], 1: [80, 90, 85]}, predictions), Path())
    assert advice.split is False
    # medians of 100 and 85; errors of the six runs: 0, -1/6, 1/9 and 3/16, 1/18, 2/17
    assert_says(advice.reasons[0], "85.0 tokens/s with split phases and 100.0", "(measured)", "15% worse")
    assert advice.errors["output_throughput"] == pytest.approx((1 / 9 + 2 / 17) / 2)
    assert_says(advice.reasons[-1], "off by 11%", "6 runs", "within the aim of 20%")


def assert_nothing_is_advised(advice: Advice, *parts: str) -> None:
    assert (advice.best, advice.split, advice.command) == (None, None, None)
    said = advice_summary(advice)
    assert_says(said, "Advice: none. Output throughput is ", "tokens/s with split phases and", *parts)
    assert "better" not in said
    assert "splitwiser run" not in said


def test_where_predictions_missed_the_checks_nothing_is_advised() -> None:
    predictions = table([100, 200, 50, 50])
    advice = recommend(AdviseConfig(), predictions, checks({0: [100, 120, 90], 1: [80, 90, 70]}, predictions), Path())
    # errors of the six runs: 0, -1/6, 1/9 and 1.5, 11/9, 13/7
    assert advice.errors["output_throughput"] == pytest.approx((1 / 6 + 11 / 9) / 2)
    assert_nothing_is_advised(advice, "off by 69% (median of 6 runs), outside the aim of 20%", "--repeats 3", "compare")


def test_a_miss_of_the_one_that_would_be_advised_is_enough() -> None:
    predictions = table([100, 200, 50, 50])
    measured = checks({0: [100], 1: [130], 3: [50]}, predictions)  # errors of 0, 54% and 0
    advice = recommend(AdviseConfig(), predictions, measured, Path())
    assert_nothing_is_advised(
        advice, "off by 0% (median of 3 runs), but by 54% for mp, 128 prefill tokens a step, outside"
    )


def test_a_miss_of_another_figure_does_not_matter() -> None:
    predictions = table([100, 200, 50, 50])
    measured = checks({0: [100], 1: [130]}, predictions)
    advice = recommend(AdviseConfig(objective="itl"), predictions, measured, Path())
    assert advice.best == Candidate(*CANDIDATES[0])


@pytest.mark.parametrize("busy", [True, "True"])
def test_where_the_machine_was_busy_during_a_check_nothing_is_advised(busy: object) -> None:
    predictions = table([100, 95, 50, 50])
    measured = checks({0: [100], 1: [90, 90]}, predictions, busy)
    advice = recommend(AdviseConfig(), predictions, measured, Path())
    during = "The machine was busy during the check of mp, 128 prefill tokens a step in round 2: "
    assert_nothing_is_advised(advice, during, "Run this again while nothing else runs.")


def test_where_the_machine_was_busy_before_the_checks_nothing_is_advised() -> None:
    advice = recommend(AdviseConfig(), table([100, 200, 50, 50]), NO_CHECKS, Path(), ["the profile"])
    assert_nothing_is_advised(advice, "The machine was busy during the profile: ")


def test_a_profile_of_a_busy_machine_is_no_basis(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("opt")
    profile = recorded(tmp_path / "profile", model.name, beside=1, busy=True, machine_busy=[False, True, None])
    workload = write_workload(tmp_path / "work.json")
    options = {"model": str(model), "workload": str(workload), "profile": str(profile), "results": str(tmp_path)}
    advice = advise(AdviseConfig(checks=0, ignore_eos=True, prefill_tokens=128, **options))  # type: ignore[arg-type]
    assert_nothing_is_advised(advice, "busy during the profile, the sample in mode mp: ", "(without --profile)")
    record = yaml.safe_load((advice.directory / "advice.yaml").read_text())
    assert (record["status"], record["recommended"], record["split"], record["command"]) == (
        "finished",
        None,
        None,
        None,
    )
    assert record["reasons"] == advice.reasons


def test_latency_is_better_when_less() -> None:
    advice = recommend(AdviseConfig(objective="ttft"), table([100, 50, 20, 80], "p99_ttft_ms"), NO_CHECKS, Path())
    assert advice.best == Candidate(*CANDIDATES[2])
    assert_says(advice.reasons[0], "TTFT p99 is 20.0 ms with split phases and 80.0 ms without", "300% better")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([100, 90, 80, 95], [0, 1, 3]),  # the best of each kind, then the next
        ([100, 50, 40, 95], [0, 1, 3]),
        ([60, 100, 90, 50], [1, 0, 2]),
    ],
)
def test_the_best_of_each_kind_is_checked_first(values: list[float], wanted: list[int]) -> None:
    chosen = choose_checks(AdviseConfig(), table(values))
    assert chosen == [Candidate(*CANDIDATES[place]) for place in wanted]


def test_every_objective_is_predicted() -> None:
    assert set(names(OBJECTIVES.values())) <= set(names(PREDICTED))


def test_the_options_of_a_run_say_what_differs_from_its_defaults() -> None:
    config = AdviseConfig(model="m", workload="w x.json", ignore_eos=True, lend=False, limit=5, checks=1)
    assert run_options(config, Candidate("mp", SPLIT, 256)) == {
        "model": "m", "mode": "mp", "workers": SPLIT, "lend": False, "second_lane": False, "workload": "w x.json",
        "limit": 5, "ignore_eos": True, "prefill_tokens": 256,
    }  # fmt: skip
    other = next(name for name in SCHEDULES if name != constants.SCHEDULE)
    assert run_options(config, Candidate("sequential", "", 256, other))["schedule"] == other
    assert run_options(AdviseConfig(), Candidate("sequential", "", RunConfig().step_tokens)) == {"mode": "sequential"}


def test_hybrid_steps_are_predicted_with_the_budget_that_a_run_would_measure() -> None:
    requests = [Request(0, (5,) * 3000, SamplingParams(max_tokens=4), 0)]
    costs = StepCosts((0.012, 0.0002, 0.0, 0.0, 0.0), ((1, 0.01, 0.0),))  # 12 ms are 5% of 240
    assert budgets_of(AdviseConfig(), requests, costs) == {
        "alternate": [2048, 256, 512, 1024],
        "hybrid": [1140, 256, 512, 1024],
    }
    assert set(map(tuple, budgets_of(AdviseConfig(prefill_tokens=600), requests, costs).values())) == {(600, 256, 512)}


def test_shares_that_come_to_the_same_threads_are_one() -> None:
    assert placements("cpu", 2) == [("sequential", ""), ("mp", "")]
    assert [workers for _, workers in placements("cpu", 4)] == [
        "", "", SPLIT, "[{role: prefill, share: 75}, {role: decode, share: 25}]",
    ]  # fmt: skip


def test_on_a_gpu_shares_belong_to_its_own_modes() -> None:
    found = placements("cuda", 8)
    assert found[:2] == [("sequential", ""), ("mp", "")]
    assert {mode for mode, workers in found if workers} == {"mps", "green"}


def test_the_short_profile_spans_the_workload() -> None:
    params = SamplingParams(max_tokens=11)
    requests = [Request(n, (1,) * length, params, 0) for n, length in enumerate((10, 40, 200))]
    profile = short_profile(AdviseConfig(device="cpu"), requests)
    assert profile.prompt_lengths == "5,10,40,200"
    assert (profile.batch_sizes, profile.contexts) == ("1,3", "11,210")
    assert str(len(os.sched_getaffinity(0))) in profile.threads.split(",")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"objective": "speed"}, ["unknown objective 'speed'", "goodput, throughput, ttft, itl, e2el"]),
        ({"objective": "goodput"}, ["--objective goodput needs targets", "--goodput"]),
        ({"checks": -1}, ["--checks must be 0 or more, not -1"]),
        ({"repeats": 0}, ["--repeats must be 1 or more, not 0"]),
        ({"profile": "/nowhere"}, ["--profile /nowhere: no profile.yaml in it"]),
    ],
)
def test_a_wrong_option_is_refused(changes: dict[str, Any], parts: list[str]) -> None:
    assert_says(refusal(AdviseConfig, **changes), *parts)


def refused(tiny: Tiny, tmp_path: Path, profile: Path, **options: Any) -> str:
    settings = {"model": str(tiny("opt")), "workload": str(write_workload(tmp_path / "work.json")), **options}
    message = refusal(advise, AdviseConfig(profile=str(profile), checks=0, results=str(tmp_path / "out"), **settings))
    assert not (tmp_path / "out").exists()
    return message


def test_a_profile_of_another_model_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    profile = recorded(tmp_path / "profile", "another", beside=1)
    assert_says(refused(tiny, tmp_path, profile), "was measured on another in float32, not on tiny-opt in float32")


def test_a_profile_without_placements_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    profile = recorded(tmp_path / "profile", "tiny-opt", beside=1)
    (profile / "placements.csv").unlink()
    assert_says(refused(tiny, tmp_path, profile), "no placements.csv in it", "the folder of an earlier advise")


def test_a_request_that_is_too_long_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    profile = recorded(tmp_path / "profile", "tiny-opt", beside=1)
    message = refused(tiny, tmp_path, profile, max_new_tokens=500)
    assert_says(message, "request 0", "tiny-opt has 256")


def test_a_case_of_adapters_is_refused(tmp_path: Path) -> None:
    message = refusal(advise, AdviseConfig(case_id=200, results=str(tmp_path / "out")))
    assert_says(message, "advise predicts the model alone", "--adapter")


def test_a_pool_that_is_too_small_is_said(tiny: Tiny, tmp_path: Path) -> None:
    profile = recorded(tmp_path / "profile", "tiny-opt", beside=1, blocks=2)
    workload = write_workload(tmp_path / "work.json")
    config = AdviseConfig(
        model=str(tiny("opt")), workload=str(workload), profile=str(profile), results=str(tmp_path), checks=0
    )
    assert_says(refusal(advise, config), "needs room for 84 tokens", "raise kv_memory")


@pytest.mark.parametrize("beside", [1.0, 2.5])
def test_answers_of_one_token_have_no_gap_to_tell_of(beside: float, on_record: Callable[..., Advice]) -> None:
    advice = on_record(beside=beside, prompt_tokens=None, max_new_tokens=1)
    assert advice.table["p99_itl_ms"].isna().all()
    summary = advice_summary(advice)
    assert not re.search(r"\bnan\b", summary, re.IGNORECASE)
    assert "TTFT p99" in advice.reasons[1]
    assert "ITL" not in " ".join(advice.reasons)


@pytest.mark.slow
@pytest.mark.usefixtures("runs_here")
def test_advice_on_a_real_model(tiny: Tiny, tmp_path: Path) -> None:
    workload = write_workload(tmp_path / "work.json", prompts=8, new_tokens=6)
    common = ["--model", str(tiny("opt")), "--workload", str(workload), "--kv_memory", "4MiB", "--prefill_tokens", "128",
              "--results", str(tmp_path / "out")]  # fmt: skip
    done = invoke("advise", *common, "--checks", "2")
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "out").iterdir()
    placements_made = pd.read_csv(directory / "placements.csv", keep_default_na=False)
    assert set(placements_made["mode"]) == {"sequential", "mp", "mps", "green"}
    made = pd.read_csv(directory / "checks.csv", keep_default_na=False)
    assert set(made["mode"]) == {"sequential", "mp"}
    for run_id, rows in made.groupby("run_id"):
        written = pd.read_csv(directory / "runs" / str(run_id) / "throughput.csv").iloc[0]
        for row in rows.itertuples():
            assert float(str(row.measured)) == pytest.approx(written[str(row.figure)])
            assert float(str(row.error)) == pytest.approx(float(str(row.predicted)) / float(str(row.measured)) - 1)
    record = yaml.safe_load((directory / "advice.yaml").read_text())
    assert record["status"] == "finished"
    of_objective = (
        made[made["figure"] == "output_throughput"].set_index("mode").astype({"measured": float, "error": float})
    )
    sampled = pd.concat([made["machine_busy"], placements_made["machine_busy"]]).astype(str)
    busy = "True" in [*sampled, str(yaml.safe_load((directory / "profile.yaml").read_text())["load"]["busy"])]
    if busy or (of_objective["error"].abs() > AIM).any():  # on a machine that has other things to do
        assert (record["recommended"], record["split"]) == (None, None)
        assert "Advice: none." in done.stdout
    else:
        measured = of_objective["measured"]
        assert record["split"] is bool(measured["mp"] > (1 + WORTH) * measured["sequential"])
        assert record["recommended"]["mode"] == ("mp" if record["split"] else "sequential")
        assert record["command"] in done.stdout
    assert record["reasons"][0] in done.stdout
    assert (directory / "roofline.png").exists()
    lengths = pd.read_csv(directory / "output_tokens.csv")["output_tokens"]
    assert len(lengths) == 8
    assert lengths.between(1, 6).all()

    again = invoke("advise", *common, "--profile", directory, "--checks", "0")
    assert again.returncode == 0, again.stderr
    second = max((tmp_path / "out").iterdir(), key=lambda path: path.stat().st_mtime)
    pd.testing.assert_frame_equal(pd.read_csv(directory / "predictions.csv"), pd.read_csv(second / "predictions.csv"))
