"""Which rows ``scripts/cpu_benchmarks.py`` keeps, and the tables that it makes of two kinds of processor."""

import json
from collections.abc import Mapping
from pathlib import Path

import cpu_benchmarks
import pandas as pd
import pytest

STANDARD, SINGLE = "standard-opt-125m", "single-opt-125m"
RATES = {  # tokens/s of each variant, round by round
    "sequential": (110.0, 120.0),
    "int8": (200.0, 240.0),
    "int8-kv": (210.0, 250.0),
    "openvino": (100.0, 100.0),
    "openvino-int8": (150.0, 160.0),
    "vllm-installed": (50.0, 60.0),
}


AMD = {"processor": "AMD EPYC", "generation": "Zen 5", "instructions": "avx512-bf16"}
INTEL = {"processor": "Intel Xeon", "generation": "Granite Rapids", "instructions": "amx"}


def keep(
    project: Path, kind: str, machine: Mapping[str, str], name: str, rates: Mapping[str, tuple[float, ...]]
) -> Path:
    """Keep a benchmark's rows as a run of it would; returns the folder."""
    folder = project / "results" / "reference" / kind
    folder.mkdir(parents=True, exist_ok=True)
    figures = dict.fromkeys(cpu_benchmarks.FIGURES, 1.0)
    rows = [
        {"variant": variant, "round": number, "status": "finished", "machine_busy": False, "version": None, **figures}
        | {"output_throughput": rate}
        for variant, own in rates.items()
        for number, rate in enumerate(own, 1)
    ]
    pd.DataFrame(rows).to_csv(folder / f"{name}.csv", index=False)
    record = {
        "started": "2026-11-27T10:00:00+00:00",
        "commit": "abcdef",
        "machine": {**machine, "cores": 2, "memory_gib": 23.5},
        "versions": {"python": "3.11", "torch": "2.13", "transformers": "5.24"},
    }
    cpu_benchmarks._keep(folder, name, "the command", record)
    return folder


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(cpu_benchmarks, "PROJECT", tmp_path)
    monkeypatch.setattr(cpu_benchmarks, "REFERENCE", tmp_path / "results" / "reference")
    keep(tmp_path, "cpu-intel-graniterapids-amx-2-cores", INTEL, STANDARD, {**RATES, "openvino": (130.0, 140.0)})
    keep(tmp_path, "cpu-amd-zen5-avx512-bf16-2-cores", AMD, STANDARD, RATES)
    return cpu_benchmarks.kinds()


def test_each_kind_of_processor_keeps_its_own_rows(kinds: list[Path], tmp_path: Path) -> None:
    assert [kind.name for kind in kinds] == ["cpu-amd-zen5-avx512-bf16-2-cores", "cpu-intel-graniterapids-amx-2-cores"]
    amd, intel = kinds
    before = (amd / cpu_benchmarks.RECORD).read_text()
    keep(tmp_path, intel.name, INTEL, SINGLE, RATES)
    assert list(json.loads((intel / cpu_benchmarks.RECORD).read_text())) == [STANDARD, SINGLE]
    assert (amd / cpu_benchmarks.RECORD).read_text() == before


def test_a_part_says_what_it_was_measured_on(kinds: list[Path]) -> None:
    amd, intel = map(cpu_benchmarks.section, kinds)
    assert amd.startswith("### AMD EPYC (Zen 5) with avx512-bf16, 2 cores\n")
    assert intel.startswith("### Intel Xeon (Granite Rapids) with amx, 2 cores\n")
    assert (
        "[results/reference/cpu-intel-graniterapids-amx-2-cores](../results/reference/cpu-intel-graniterapids-amx-2-cores)"
        in intel
    )
    assert "| openvino | 2 | 135 (130 to 140) |" in intel


@pytest.mark.parametrize(
    ("openvino", "said"),
    [
        ((100.0, 100.0), "| openvino | 1.15 (1.10 to 1.20) | sequential |"),
        ((130.0, 140.0), "| openvino | 0.85 (0.85 to 0.86) | openvino |"),
        ((100.0, 130.0), "| openvino | 1.01 (0.92 to 1.10) | neither |"),
        (
            (40.0, 50.0),
            "| vllm-installed | 2.10 (2.00 to 2.20) | sequential |",
        ),  # its best setting is the one as installed
    ],
)
def test_who_is_ahead_is_told_from_all_rounds_and_all_settings_of_the_dtype(
    openvino: tuple[float, float], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_benchmarks, "PROJECT", tmp_path)
    kind = keep(tmp_path, "cpu-amd-avx2-2-cores", AMD, STANDARD, {**RATES, "openvino": openvino})
    assert said in cpu_benchmarks.ahead(kind)
    assert "| int8-kv | 1.48 (1.40 to 1.56) | 2.00 (1.91 to 2.08) |" in cpu_benchmarks.ahead(kind)  # the faster one


def test_whole_numbers_are_compared_where_no_peer_has_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_benchmarks, "PROJECT", tmp_path)
    integers = {variant: own for variant, own in RATES.items() if variant not in ("openvino", "vllm-installed")}
    kind = keep(tmp_path, "cpu-amd-avx2-2-cores", AMD, "int8-opt-125m", integers)
    assert "| int8-opt-125m | - | - | - | int8-kv | 1.48 (1.40 to 1.56) |" in cpu_benchmarks.ahead(kind)


def test_the_readme_has_columns_for_each_kind_and_no_peers_as_installed(kinds: list[Path]) -> None:
    (_, _, *both), (about, _, *one) = (cpu_benchmarks.best(shown).splitlines() for shown in (kinds, kinds[:1]))
    assert about.startswith("OPT-125m in bf16 on AMD EPYC (Zen 5) with avx512-bf16, 2 cores, 64 requests at once;")
    assert one[0] == "| variant | tokens/s | TTFT p50 ms | ITL p99 ms |"
    assert both[0].count("(Zen 5, 2 cores)") == both[0].count("(Granite Rapids, 2 cores)") == 3
    assert both[5] == "| openvino | 100 (100 to 100) | 1.00 | 1.00 | 135 (130 to 140) | 1.00 | 1.00 |"
    assert not any("installed" in line for line in both)


def test_a_kind_of_which_little_was_measured_is_no_error(kinds: list[Path], tmp_path: Path) -> None:
    new = keep(tmp_path, "cpu-intel-avx2-4-cores", INTEL, "embedded", {"sequential": (10.0,)})
    assert cpu_benchmarks.best([*kinds, new]) == cpu_benchmarks.best(kinds)
    assert cpu_benchmarks.ahead(new).endswith("no comparison with peers yet.")
    assert "**embedded.**" in cpu_benchmarks.section(new)
