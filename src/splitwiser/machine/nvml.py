"""NVIDIA's management library (NVML): the driver's settings of each GPU, and sampling of a GPU's utilisation, memory
activity, SM activity and power.

It needs no PyTorch until a GPU is sampled, so that the doctor's process that asks for the settings starts at once.
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any

from splitwiser.machine.cuda_probe import COMPUTE_MODES

if TYPE_CHECKING:
    import torch

ACTIVITY_COLUMNS = (
    "gpu_util_percent",
    "memory_util_percent",
    "sm_activity_percent",
    "dram_activity_percent",
    "power_w",
)
SAMPLE_S = 0.02
NO_ACTIVITY: dict[str, float | None] = dict.fromkeys(ACTIVITY_COLUMNS)


class Monitor:
    """Samples one GPU; ``nvml`` is the initialised module ``pynvml``, ``handle`` its handle of the GPU.

    ``gpu_util_percent`` and ``memory_util_percent`` are from NVML: the part of the time in which any kernel ran, and in
    which memory was read or written. ``sm_activity_percent`` and ``dram_activity_percent`` are from GPM (Hopper and newer):
    the part of the SMs that was busy, and of the memory's bandwidth that was used. ``power_w`` is in watts.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:  # noqa: ANN401  # a module without types
        self._nvml = nvml
        self._handle = handle
        self._has_gpm = self._supports_gpm()

    @contextmanager
    def watch(self) -> Iterator[dict[str, float | None]]:
        """Sample in a thread during the block; the mapping that it yields has the means by column afterwards."""
        means = dict(NO_ACTIVITY)
        samples: list[tuple[float, float, float]] = []
        ended = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(samples, ended), name="nvml", daemon=True)
        before = self._gpm_sample()
        sampler.start()
        try:
            yield means
        finally:
            ended.set()
            sampler.join()
            after = self._gpm_sample()
            if samples:
                gpu, memory, watts = (fmean(column) for column in zip(*samples, strict=True))
                means |= {"gpu_util_percent": gpu, "memory_util_percent": memory, "power_w": watts}
            means |= self._gpm_between(before, after)

    def close(self) -> None:
        """Shut NVML down."""
        self._nvml.nvmlShutdown()

    def _sample(self, samples: list[tuple[float, float, float]], ended: threading.Event) -> None:
        while not ended.wait(SAMPLE_S):
            try:
                rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
                milliwatts = self._nvml.nvmlDeviceGetPowerUsage(self._handle)
            except self._nvml.NVMLError:  # not supported on this GPU
                return
            samples.append((rates.gpu, rates.memory, milliwatts / 1e3))

    def _supports_gpm(self) -> bool:
        try:
            return bool(self._nvml.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice)
        except self._nvml.NVMLError:
            return False

    def _gpm_sample(self) -> Any:  # noqa: ANN401  # a pointer of the library
        if not self._has_gpm:
            return None
        sample = self._nvml.nvmlGpmSampleAlloc()
        try:
            return self._nvml.nvmlGpmSampleGet(self._handle, sample)
        except self._nvml.NVMLError:
            self._nvml.nvmlGpmSampleFree(sample)
            return None

    def _gpm_between(self, before: Any, after: Any) -> dict[str, float]:  # noqa: ANN401  # as above
        nvml = self._nvml
        metrics: Sequence[tuple[str, int]] = (
            ("sm_activity_percent", nvml.NVML_GPM_METRIC_SM_UTIL),
            ("dram_activity_percent", nvml.NVML_GPM_METRIC_DRAM_BW_UTIL),
        )
        try:
            if before is None or after is None:
                return {}
            asked = nvml.c_nvmlGpmMetricsGet_t()
            asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
            asked.numMetrics = len(metrics)
            asked.sample1, asked.sample2 = before, after
            for place, (_, metric) in enumerate(metrics):
                asked.metrics[place].metricId = metric
            nvml.nvmlGpmMetricsGet(asked)
            return {
                name: asked.metrics[place].value
                for place, (name, _) in enumerate(metrics)
                if asked.metrics[place].nvmlReturn == nvml.NVML_SUCCESS
            }
        except nvml.NVMLError:
            return {}
        finally:
            for sample in (before, after):
                if sample is not None:
                    nvml.nvmlGpmSampleFree(sample)


def describe_gpus() -> dict[str, Any]:
    """Return ``gpus``, a list with the ``index``, ``driver_version``, ``compute_mode`` and ``mig_mode`` of each GPU (None if
    it cannot be divided by MIG), and ``problem``, the reason why the list is empty."""
    nvml, problem = _open()
    if nvml is None:
        return {"gpus": [], "problem": problem}
    try:
        version = nvml.nvmlSystemGetDriverVersion()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = [
            {
                "index": index,
                "driver_version": version,
                "compute_mode": COMPUTE_MODES.get(nvml.nvmlDeviceGetComputeMode(handle), "unknown"),
                "mig_mode": _mig_mode(nvml, handle),
            }
            for index, handle in enumerate(handles)
        ]
        return {"gpus": gpus, "problem": None if gpus else "the driver has no GPU"}
    finally:
        nvml.nvmlShutdown()


def _mig_mode(nvml: Any, handle: Any) -> str | None:  # noqa: ANN401  # as Monitor
    try:
        return "enabled" if nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE else "disabled"
    except nvml.NVMLError:  # not supported on this GPU
        return None


def _open() -> tuple[Any, str]:
    """Return the module ``pynvml``, initialised, and an empty text, or None and the reason why it cannot be used."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "pynvml is not installed (pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML says '{error}'"
    return nvml, ""


def open_monitor(device: "torch.device") -> tuple[Monitor | None, str]:
    """Return a monitor of ``device`` and a description, or None and the reason why its columns stay empty."""
    if device.type != "cuda":
        return None, "no GPU: utilisation, SM and memory activity and power are not measured"
    import torch

    nvml, problem = _open()
    if nvml is None:
        return None, f"utilisation and power are not measured: {problem}"
    try:  # by UUID: CUDA_VISIBLE_DEVICES renumbers the devices for PyTorch, but not for NVML
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except nvml.NVMLError as error:
        return None, f"utilisation and power are not measured: NVML says '{error}'"
    return Monitor(nvml, handle), "sampled through NVML"
