"""The driver's settings and the monitor's means, from a stand-in for NVIDIA's library: tests run where there is no GPU."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from splitwiser.machine.nvml import ACTIVITY_COLUMNS, NO_ACTIVITY, Monitor, describe_gpus, open_monitor
from tests.support.assertions import assert_says
from tests.support.processes import wait_for


class Library:
    """As much of pynvml as is asked for, with the answers that a test wants."""

    NVML_SUCCESS = 0
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_DRAM_BW_UTIL = 10
    NVML_GPM_METRICS_GET_VERSION = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, gpm: bool, power_mw: int | None = 90_000) -> None:
        self.gpm = gpm
        self.power_mw = power_mw
        self.samples: set[int] = set()
        self.calls = 0
        self.open = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetComputeMode(self, handle: int) -> int:  # noqa: N802
        return 3 * handle

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:  # noqa: N802
        if handle:
            raise self.NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetUtilizationRates(self, handle: object) -> Any:  # noqa: N802
        self.calls += 1
        return SimpleNamespace(gpu=40 + 20 * (self.calls % 2), memory=30)

    def nvmlDeviceGetPowerUsage(self, handle: object) -> int:  # noqa: N802
        if self.power_mw is None:
            raise self.NVMLError("Not Supported")
        return self.power_mw

    def nvmlGpmQueryDeviceSupport(self, handle: object) -> Any:  # noqa: N802
        if not self.gpm:
            raise self.NVMLError("Function Not Found")
        return SimpleNamespace(isSupportedDevice=1)

    def nvmlGpmSampleAlloc(self) -> int:  # noqa: N802
        self.samples.add(len(self.samples) + 1)
        return len(self.samples)

    def nvmlGpmSampleGet(self, handle: object, sample: int) -> int:  # noqa: N802
        return sample

    def nvmlGpmSampleFree(self, sample: int) -> None:  # noqa: N802
        self.samples.remove(sample)

    def c_nvmlGpmMetricsGet_t(self) -> Any:  # noqa: N802
        metrics = [SimpleNamespace(metricId=0, value=0.0, nvmlReturn=0) for _ in range(4)]
        return SimpleNamespace(metrics=metrics)

    def nvmlGpmMetricsGet(self, asked: Any) -> None:  # noqa: N802
        assert (asked.sample1, asked.sample2, asked.numMetrics) == (1, 2, 2)
        for metric in asked.metrics[:2]:
            metric.value = {2: 71.5, 10: 22.5}[metric.metricId]


def watched(library: Library) -> dict[str, float | None]:
    with Monitor(library, object()).watch() as activity:
        wait_for(lambda: library.calls >= 4, "samples")
    return activity


def test_the_means_of_what_was_sampled() -> None:
    library = Library(gpm=True)
    activity = watched(library)
    assert tuple(activity) == ACTIVITY_COLUMNS
    assert activity["gpu_util_percent"] == pytest.approx(50, abs=5)
    assert (activity["memory_util_percent"], activity["power_w"]) == (30, 90)
    assert (activity["sm_activity_percent"], activity["dram_activity_percent"]) == (71.5, 22.5)
    assert not library.samples


def test_a_gpu_without_gpm_leaves_those_columns_empty() -> None:
    activity = watched(Library(gpm=False))
    assert (activity["sm_activity_percent"], activity["dram_activity_percent"]) == (None, None)
    assert activity["memory_util_percent"] == 30


def test_a_gpu_that_does_not_tell_leaves_the_rest_empty() -> None:
    library = Library(gpm=True, power_mw=None)
    library.calls = 4  # nothing to wait for
    activity = watched(library)
    assert activity["power_w"] is None
    assert activity["sm_activity_percent"] == 71.5


def test_without_a_gpu_there_is_no_monitor_and_a_reason() -> None:
    monitor, reason = open_monitor(torch.device("cpu"))
    assert monitor is None
    assert_says(reason, "no GPU", "power")
    assert set(NO_ACTIVITY.values()) == {None}


def test_the_drivers_settings_of_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(gpm=True)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    described = describe_gpus()
    assert described["problem"] is None
    assert [tuple(gpu.values()) for gpu in described["gpus"]] == [
        (0, "580.65.06", "DEFAULT", "enabled"),
        (1, "580.65.06", "EXCLUSIVE_PROCESS", None),
    ]
    assert not library.open


@pytest.mark.parametrize(
    ("library", "reason"),
    [(None, "pynvml is not installed (pip install nvidia-ml-py)"), ("broken", "NVML says 'no driver'")],
)
def test_without_a_driver_there_is_a_reason(library: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise broken.NVMLError("no driver")

    broken = Library(gpm=True)
    monkeypatch.setattr(broken, "nvmlInit", fail)
    monkeypatch.setitem(sys.modules, "pynvml", broken if library else None)
    assert describe_gpus() == {"gpus": [], "problem": reason}


def test_the_driver_is_asked_without_pytorch() -> None:
    code = "import sys; from splitwiser.machine.nvml import describe_gpus; describe_gpus(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
