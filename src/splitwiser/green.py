"""Mode ``green``: two lanes in one process, each on a stream in a CUDA green context that owns part of the device's SMs.

Contexts are made through the CUDA driver's Python bindings, which PyTorch's CUDA builds bring along, and not through
``torch.cuda.green_contexts``: that takes each context's SMs from the front of the whole device, so two of its contexts
overlap, and it does not tell how many were granted. Here the device is cut once a split, and the lanes get the two pieces
(CUDA driver API, "Green Contexts"). Streams of green contexts go into PyTorch as external ones.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from splitwiser.board import Board
from splitwiser.engine import EngineSettings, Started
from splitwiser.errors import InputError, RunError, first_line
from splitwiser.lanes import start_lanes
from splitwiser.layout import WorkerLayout
from splitwiser.model import LoadedModel
from splitwiser.shares import AutoLevel, Part, ShareSettings

AUTO_PREFILL_PERCENT = (88, 75, 62, 50, 38, 25, 12)  # the splits between which share auto chooses
OLDEST_DRIVER = 12050  # CUDA 12.5, which has streams of green contexts
QUEUES = 32  # most that the driver makes between host and device; share auto has 16 streams

PREFILL, DECODE = 0, 1  # the lanes' places on the board


def find_problem(device: torch.device) -> str | None:
    """Why green contexts cannot be had on ``device``, in a line; None if they can."""
    if device.type != "cuda":
        return f"green contexts divide an NVIDIA GPU's multiprocessors, and the device is {device}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the CUDA driver's Python bindings are not installed; pip install cuda-bindings"
    try:
        from cuda.bindings import driver

        version = _call(driver.cuDriverGetVersion)
        if version < OLDEST_DRIVER:
            return f"the GPU driver supports CUDA {version // 1000}.{version % 1000 // 10}, and 12.5 is needed"
        # read as CUDA starts; of 8 queues, the default, several streams share one, and decode's launches then wait behind
        # prefill's (cuda.h, "Green Contexts")
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(QUEUES))
        torch.cuda.init()
        for context in _contexts(device, max(1, _sm_count(device) // 2)):
            _call(driver.cuGreenCtxDestroy, context.handle)
    except (ImportError, RuntimeError, RunError, InputError) as error:
        return f"the CUDA driver makes no green contexts: {first_line(error)}"
    return None


def start_green(model: LoadedModel, layout: WorkerLayout, settings: EngineSettings) -> Started:
    """An engine over one prefill and one decode lane in green contexts."""
    return start_lanes(model, layout, settings, GreenDivision(model.device, layout, settings.shares))


def check_layout(layout: WorkerLayout) -> None:
    """Refuse a layout other than one prefill and one decode worker. Raises :class:`InputError`."""
    if sorted(spec.role for spec in layout.workers) != ["decode", "prefill"]:
        raise InputError(f"mode green has one prefill and one decode worker, not {layout}; use mode mp for others")


class GreenDivision:
    """The device's multiprocessors between a prefill and a decode lane; see :class:`splitwiser.lanes.Division`.

    With share ``none`` both lanes use the whole device through plain streams, and the device's own scheduling decides.
    """

    def __init__(self, device: torch.device, layout: WorkerLayout, shares: ShareSettings) -> None:
        names = {spec.role: spec.name for spec in layout.workers}
        self._index = {names["prefill"]: PREFILL, names["decode"]: DECODE}
        _, highest = torch.cuda.Stream(device).priority_range()
        priorities = (0, highest if shares.decode_priority else 0)
        wanted = plan_prefill_sms(_sm_count(device), layout, shares)
        cuts = _distinct([_cut(device, sms, priorities) for sms in wanted])
        self._whole = [torch.cuda.Stream(device, priority=priority) for priority in priorities]
        self._streams = [streams for _, streams in cuts]
        self.units = [{names["prefill"]: granted[PREFILL], names["decode"]: granted[DECODE]} for granted, _ in cuts]
        board = Board.over(torch.zeros(Board.nbytes(2), dtype=torch.uint8))
        board.level = len(cuts) // 2
        auto = None
        if shares.share == "auto":
            units = [granted[DECODE] for granted, _ in cuts]
            auto = AutoLevel(units, board.level, shares.itl_target_ms / 1e3)
        self._parts = [Part(board, PREFILL, shares.lend), Part(board, DECODE, shares.lend, auto, [PREFILL])]

    def streams(self, worker: str) -> Sequence[torch.cuda.Stream]:
        """See :class:`splitwiser.lanes.Division`."""
        index = self._index[worker]
        return [self._whole[index], *(streams[index] for streams in self._streams)]

    def lane(self, worker: str) -> "GreenLane":
        """See :class:`splitwiser.lanes.Division`."""
        index = self._index[worker]
        return GreenLane(self._parts[index], self._whole[index], [streams[index] for streams in self._streams])

    def observe(self, gap_s: float) -> None:
        """See :class:`splitwiser.lanes.Division`."""
        self._parts[DECODE].observe(gap_s)


class GreenLane:
    """Runs each turn on the stream of the split that holds, or of the whole device while the other lane has no work."""

    def __init__(self, part: Part, whole: torch.cuda.Stream, streams: Sequence[torch.cuda.Stream]) -> None:
        self._part = part
        self._whole = whole
        self._streams = streams

    def turn(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.worker.Lane.turn`."""
        level, lent = self._part.take()
        undivided = any(lent) or not self._streams
        return torch.cuda.stream(self._whole if undivided else self._streams[level])

    def leave(self) -> None:
        """See :meth:`splitwiser.worker.Lane.leave`."""
        self._part.leave()


def plan_prefill_sms(total: int, layout: WorkerLayout, shares: ShareSettings) -> list[int]:
    """Multiprocessors to ask for prefill at each level, of ``total``: the most first, since decode then has the least."""
    if shares.share == "none":
        return []
    (prefill,) = (spec.share for spec in layout.workers if spec.role == "prefill")
    percentages = AUTO_PREFILL_PERCENT if shares.share == "auto" else (prefill,)
    return [min(max(1, round(total * percent / 100)), total - 1) for percent in percentages]


Cut = tuple[tuple[int, int], tuple[torch.cuda.Stream, torch.cuda.Stream]]


def _distinct(cuts: Sequence[Cut]) -> list[Cut]:
    """One of the cuts that were rounded to the same counts."""
    return list({granted: (granted, streams) for granted, streams in cuts}.values())


@dataclass(frozen=True)
class _Context:
    """A green context and the multiprocessors that it was granted."""

    handle: Any
    sms: int


def _cut(device: torch.device, prefill_sms: int, priorities: Sequence[int]) -> Cut:
    """Cut the device in two, at about ``prefill_sms``: the multiprocessors granted to prefill and to decode, and a stream on
    each, with its priority. The contexts live as long as the process, as the streams of PyTorch do."""
    from cuda.bindings import driver

    prefill, decode = _contexts(device, prefill_sms)
    flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    first, second = (
        torch.cuda.ExternalStream(int(_call(driver.cuGreenCtxStreamCreate, context.handle, flags, priority)), device)
        for context, priority in zip((prefill, decode), priorities, strict=True)
    )
    return (prefill.sms, decode.sms), (first, second)


def _contexts(device: torch.device, prefill_sms: int) -> tuple[_Context, _Context]:
    """Two green contexts that have the device between them, the first at about ``prefill_sms`` multiprocessors: the driver
    rounds up to what the device can separate. Raises :class:`InputError` if that leaves nothing for the other."""
    from cuda.bindings import driver

    resource = _sm_resource(device)
    pieces, _, rest = _call(driver.cuDevSmResourceSplitByCount, 1, resource, 0, prefill_sms)
    if not rest.sm.smCount:
        raise InputError(
            f"mode green: prefill at {prefill_sms} of {resource.sm.smCount} multiprocessors leaves decode none; the "
            f"device separates them in groups, so give prefill a smaller share"
        )
    flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
    contexts = []
    for piece in (pieces[0], rest):
        description = _call(driver.cuDevResourceGenerateDesc, [piece], 1)
        handle = _call(driver.cuGreenCtxCreate, description, _device(device), flags)
        contexts.append(_Context(handle, int(piece.sm.smCount)))
    return contexts[0], contexts[1]


def _sm_count(device: torch.device) -> int:
    return int(_sm_resource(device).sm.smCount)


def _sm_resource(device: torch.device) -> Any:
    from cuda.bindings import driver

    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    return _call(driver.cuDeviceGetDevResource, _device(device), kind)


def _device(device: torch.device) -> Any:
    from cuda.bindings import driver

    return _call(driver.cuDeviceGet, device.index or 0)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a driver function returns. Raises :class:`RunError` with its name and the driver's."""
    status, *results = function(*arguments)
    if int(status):
        raise RunError(f"CUDA driver: {function.__name__}: {status.name}")
    return results[0] if len(results) == 1 else tuple(results)
