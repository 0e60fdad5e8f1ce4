"""A real profile of a tiny model, its files, and what follows from a measured time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

from splitwiser.machine.load import Load, LoadMeter
from splitwiser.model.kernels.packed_linear import find_packing_problem
from splitwiser.results.schema import CEILINGS, DECODE, PREFILL, names
from splitwiser.study.ceilings import CeilingProbe, Ceilings, ceilings_of, measure_ceilings
from splitwiser.study.config import ProfileConfig
from splitwiser.study.operations import StepWork
from splitwiser.study.profile import (
    SUMMARY,
    Bench,
    DecodePoint,
    PrefillPoint,
    above_ceilings,
    figures,
    profile,
    unsteady,
)
from tests.support.assertions import assert_says, refusal
from tests.support.processes import wait_for

pytestmark = pytest.mark.slow

Tiny = Callable[[str], Path]
FILES = {"prefill.csv", "decode.csv", "ceilings.csv", "summary.csv", "profile.yaml", "roofline.png"}


def small(model: Path, results: Path, **changes: object) -> ProfileConfig:
    settings: dict[str, object] = {
        "model": str(model), "results": str(results), "prompt_lengths": "8,32", "prompts": "3", "starts": "16",
        "batch_sizes": "1,3", "contexts": "5,40", "repeats": 2, "kv_memory": "4MiB",
    }  # fmt: skip
    return ProfileConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def directory(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return profile(small(tiny("llama"), tmp_path_factory.mktemp("profile"), threads="1")).directory


def test_every_file_is_written(directory: Path) -> None:
    assert directory.name.startswith("profile_tiny-llama_")
    assert {path.name for path in directory.iterdir()} == FILES
    with Image.open(directory / "roofline.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000


def test_every_point_has_a_row(directory: Path) -> None:
    prefill, decode = (pd.read_csv(directory / f"{phase}.csv") for phase in ("prefill", "decode"))
    assert (tuple(prefill.columns), tuple(decode.columns)) == (names(PREFILL), names(DECODE))
    sizes = prefill[["prompts", "start_tokens", "prompt_tokens"]].to_numpy().tolist()
    assert sizes == [[1, 0, 8], [1, 0, 32], [3, 0, 8], [3, 0, 32], [1, 16, 8], [1, 16, 32]]
    assert decode[["batch", "context"]].to_numpy().tolist() == [[1, 5], [1, 40], [3, 5], [3, 40]]
    summary = pd.read_csv(directory / "summary.csv")
    assert tuple(summary.columns) == names(SUMMARY)
    assert summary.step.tolist()[-6:] == ["8 after 16", "32 after 16", "1 x 5", "1 x 40", "3 x 5", "3 x 40"]


@pytest.mark.skipif(find_packing_problem() is not None, reason="this processor packs no weights")
def test_int8_weights_are_profiled_beside_products_of_int8(tiny: Tiny, tmp_path: Path) -> None:
    config = small(tiny("opt"), tmp_path, dtype="bfloat16", quantization="int8", prompts="", starts="")
    directory = profile(config).directory
    assert pd.read_csv(directory / "ceilings.csv").what.unique().tolist() == [
        "matrix product", "product of int8 matrices", "copy", "sum",
    ]  # fmt: skip
    record = yaml.safe_load((directory / "profile.yaml").read_text())
    assert record["configuration"]["quantization"] == "int8"
    assert "int8" in record["kernels"]["linear_layers"]
    assert (pd.read_csv(directory / "decode.csv").flops > 0).all()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_is_profiled_without_chunks(name: str, tiny: Tiny, tmp_path: Path) -> None:
    made = profile(small(tiny(name), tmp_path, contexts="2,5,40")).directory
    prefill, decode = (pd.read_csv(made / f"{phase}.csv") for phase in ("prefill", "decode"))
    assert prefill[["prompts", "start_tokens", "prompt_tokens"]].to_numpy().tolist() == [
        [1, 0, 8], [1, 0, 32], [3, 0, 8], [3, 0, 32],
    ]  # fmt: skip
    # of a source of one token, the token with which answers begin and another are three
    assert decode[["batch", "context"]].to_numpy().tolist() == [[1, 5], [1, 40], [3, 5], [3, 40]]
    notes = yaml.safe_load((made / "profile.yaml").read_text())["notes"]
    assert any("an encoder reads a source at once" in note for note in notes)


def test_the_figures_of_a_row_agree(directory: Path) -> None:
    ceilings = pd.read_csv(directory / "ceilings.csv")
    assert tuple(ceilings.columns) == names(CEILINGS)
    compute = ceilings[ceilings.kind == "compute"].rate.max()
    memory = ceilings[ceilings.kind == "memory"].rate.max()
    prefill, decode = (pd.read_csv(directory / f"{phase}.csv") for phase in ("prefill", "decode"))
    for table, tokens in ((prefill, prefill.prompts * prefill.prompt_tokens), (decode, decode.batch)):
        assert (table.ms_least <= table.ms).all()
        assert (table.ms <= table.ms_greatest).all()
        assert (table.repeats >= 2).all()
        assert (table.peak_memory_mb > 1).all()
        np.testing.assert_allclose(table.tokens_per_s, tokens / table.ms * 1e3)
        np.testing.assert_allclose(table.tflops, table.flops / table.ms / 1e9)
        np.testing.assert_allclose(table.gb_s, table.bytes / table.ms / 1e6)
        np.testing.assert_allclose(table.arithmetic_intensity, table.flops / table.bytes)
        np.testing.assert_allclose(table.share_of_compute, table.tflops / compute)
        np.testing.assert_allclose(table.share_of_bandwidth, table.gb_s / memory)
    np.testing.assert_allclose(decode.itl_ms, decode.ms)
    assert prefill.gpu_util_percent.isna().all()


def test_the_record_says_what_was_measured_and_on_what(directory: Path) -> None:
    record = yaml.safe_load((directory / "profile.yaml").read_text())
    assert record["status"] == "finished"
    assert record["configuration"]["prompt_lengths"] == "8,32"
    assert record["model"]["class"] == "LlamaForCausalLM"
    assert record["kv_pool"]["block_tokens"] == 16
    assert record["machine"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert any(note.startswith("no GPU") for note in record["notes"])


def test_each_thread_count_is_profiled_against_its_own_ceilings(tiny: Tiny, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    config = small(
        tiny("opt"), tmp_path, threads="2,1", prompt_lengths="8", prompts="", starts="", batch_sizes="1", contexts="5"
    )
    directory = profile(config).directory
    assert pd.read_csv(directory / "prefill.csv").threads.tolist() == [1, 2]
    assert pd.read_csv(directory / "decode.csv").threads.tolist() == [1, 2]
    assert set(pd.read_csv(directory / "ceilings.csv").threads) == {1, 2}
    assert torch.get_num_threads() == before


def test_points_that_do_not_fit_are_left_out_and_named(tiny: Tiny, tmp_path: Path) -> None:
    config = small(tiny("llama"), tmp_path, prompt_lengths="250,8", starts="16", contexts="1,5,300", batch_sizes="1,200",
                   kv_memory="300KiB")  # fmt: skip
    bench = Bench(config)  # 256 positions; 25 blocks of 16 tokens, 3 layers x 48 numbers x 4 bytes a token
    assert bench.pool.blocks == 300 * 1024 // (16 * 576)
    assert [str(point) for point in bench.points] == ["8", "250", "3 x 8", "8 after 16", "1 x 5"]
    (note,) = [each for each in bench.notes if each.startswith("left out")]
    for named in ("256 positions", "prefill 3 x 250", "prefill 250 after 16", "decode 1 x 300", "decode 200 x 5"):
        assert named in note


def test_what_is_read_was_written_before(tiny: Tiny, tmp_path: Path) -> None:
    bench = Bench(small(tiny("opt"), tmp_path, prompt_lengths="8", starts="", batch_sizes="3", contexts="40"))
    bench.measure(tmp_path)
    needed = 3 * 3  # blocks
    assert all(bool((tensor[:needed] != 0).any(dim=-1).all()) for tensor in [*bench.pool.keys, *bench.pool.values])


def test_figures_of_a_hand_worked_step() -> None:
    ceilings = Ceilings(flops_per_s=4e12, bytes_per_s=1e12)
    row = figures(StepWork(flops=2e9, nbytes=1e9), 10, [0.004, 0.002, 0.001], ceilings)
    assert row["ms"] == 2
    assert (row["ms_least"], row["ms_greatest"], row["repeats"]) == (1, 4, 3)
    assert row["tokens_per_s"] == 5000
    assert row["tflops"] == 1
    assert row["gb_s"] == 500
    assert row["arithmetic_intensity"] == 2
    assert row["share_of_compute"] == 0.25
    assert row["share_of_bandwidth"] == 0.5
    assert row["share_of_roofline"] == 0.5  # at 2 operations a byte memory allows 2e12


def test_the_roofline_bends_at_the_ridge() -> None:
    ceilings = Ceilings(flops_per_s=4e12, bytes_per_s=1e12)
    assert ceilings.ridge == 4
    assert [ceilings.attainable(each) for each in (1, 4, 100)] == [1e12, 4e12, 4e12]


def test_the_best_probe_of_each_kind_is_the_ceiling() -> None:
    probes = [
        CeilingProbe("compute", "matrix product", 8, 2.0, 100),
        CeilingProbe("compute", "matrix product", 16, 1.0, 300),
        CeilingProbe("memory", "copy", 8, 1.0, 50),
        CeilingProbe("memory", "sum", 8, 0.5, 20),
    ]
    assert ceilings_of(probes) == Ceilings(300, 50)


def test_a_copy_moves_twice_and_a_sum_once_what_it_holds() -> None:
    probes = {probe.what: probe for probe in measure_ceilings(torch.bfloat16, torch.device("cpu"))}
    assert probes["copy"].amount == 2 * probes["sum"].amount == 2 * probes["sum"].size
    assert probes["matrix product"].amount == 2 * probes["matrix product"].size ** 3


def test_points_above_the_ceilings_are_named() -> None:
    point = DecodePoint(2, 4, 128)
    below, above = ({"share_of_roofline": share} for share in (1.0, 1.3))
    assert above_ceilings([(point, below)]) == []
    (note,) = above_ceilings([(point, below), (point, above)])
    assert note.startswith("1 of 2 points were faster than the roofline")
    assert note.endswith("(decode 4 x 128)")


def test_unsteady_points_are_named() -> None:
    point = PrefillPoint(1, 1, 0, 64)
    steady, not_steady = {"ms": 2.0, "ms_greatest": 2.9}, {"ms": 2.0, "ms_greatest": 3.1}
    assert unsteady([(point, steady)]) == []
    (note,) = unsteady([(point, steady), (point, not_steady)])
    assert_says(note, "1 of 2 points", "prefill 64")


QUIET = Load(9.0, 0.5, 2.0, 1.9, 0.05, 0.1)


def profiled(tiny: Tiny, tmp_path: Path, during: Load, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """The folder of a profile on a machine that did ``during``, and its notes."""
    monkeypatch.setattr(LoadMeter, "end", lambda _: during)
    probes = [CeilingProbe(kind, "given", 8, 1.0, 1e9) for kind in ("compute", "memory")]
    monkeypatch.setattr("splitwiser.study.profile.measure_ceilings", lambda *_, **__: probes)
    monkeypatch.setattr("splitwiser.study.profile._LEAST_S", 0.0)
    config = small(tiny("opt"), tmp_path, prompt_lengths="8", prompts="", starts="", batch_sizes="1", contexts="5")
    directory = profile(config).directory
    notes: list[str] = yaml.safe_load((directory / "profile.yaml").read_text())["notes"]
    return directory, notes


def test_a_machine_that_was_busy_all_along_is_noticed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, notes = profiled(tiny, tmp_path, Load(9.0, 8.0, 2.0, 0.4, 1.6, 0.9), monkeypatch)
    said = "other processes used 1.6 of 2 cores while this ran; figures are not this machine's own"
    assert notes[-1] == said
    assert f"note: {said}" in capsys.readouterr().err
    assert yaml.safe_load((directory / "profile.yaml").read_text())["load"]["busy"] is True


def test_a_quiet_machine_is_recorded_and_not_talked_about(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, notes = profiled(tiny, tmp_path, QUIET, monkeypatch)
    assert not any("other processes" in note for note in notes)
    load = yaml.safe_load((directory / "profile.yaml").read_text())["load"]
    assert (load["busy"], load["during"], load["note"]) == (False, QUIET.record, None)


def test_unsteady_points_are_said_in_the_terminal_and_the_record(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("splitwiser.study.profile._UNSTEADY", 0.0)
    _, notes = profiled(tiny, tmp_path, QUIET, monkeypatch)
    assert_says(notes[-1], "2 of 2 points had steps of more than 0.0 times the median")
    assert f"note: {notes[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompt_lengths": "64,many"}, ["--prompt_lengths '64,many'", "'many' is not a whole number", "64,128"]),
        ({"batch_sizes": "0"}, ["--batch_sizes '0'", "'0' is not a whole number of 1 or more"]),
        ({"contexts": " "}, ["--contexts is empty"]),
        ({"repeats": 0}, ["--repeats must be 1 or more, not 0"]),
        ({"device": "cpu", "gpu_id": 1}, ["--gpu_id 1 and --device cpu disagree"]),
    ],
)
def test_a_wrong_option_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    assert_says(refusal(ProfileConfig, **changes), *parts)


def test_a_profile_without_a_point_that_fits_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    message = refusal(profile, small(tiny("opt"), tmp_path / "out", contexts="5000"))
    assert_says(message, "no decode step", "256 positions", "--kv_memory")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_was_measured(tiny: Tiny, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "splitwiser", "profile", "--model", str(tiny("opt")), "--results", str(tmp_path),
         "--threads", "1", "--prompt_lengths", "8,16", "--repeats", "1000000", "--prompts", ""],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    wait_for(lambda: sum(1 for path in tmp_path.glob("*/ceilings.csv") for _ in path.open()) >= 5, "ceilings")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (directory,) = tmp_path.iterdir()
    assert yaml.safe_load((directory / "profile.yaml").read_text())["status"] == "interrupted"
    assert len(pd.read_csv(directory / "ceilings.csv")) == 4
