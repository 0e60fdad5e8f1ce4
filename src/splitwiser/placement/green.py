"""Mode ``green``: two workers in threads, each on a stream in a CUDA green context that owns part of the device's SMs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

import torch

from splitwiser.placement.checks import refuse_mode_here
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.green_contexts import count_multiprocessors, cut_device
from splitwiser.placement.prepare import StartedEngine, load
from splitwiser.placement.shares import AutoLevel, Board, WorkerShare
from splitwiser.placement.threads import start_threads

AUTO_PREFILL_PERCENT = (88, 75, 62, 50, 38, 25, 12)  # prefill's share in each split that share auto chooses from

PREFILL, DECODE = 0, 1  # the workers' indices on the board


def start(config: EngineConfig, _: ExitStack) -> StartedEngine:
    """See :meth:`splitwiser.placement.start.ModeModule.start`: one prefill and one decode worker in green contexts."""
    refuse_mode_here(config.mode, config.device_name)
    model = load(config)
    return start_threads(model, config, GreenDivision(model.device, config))


class GreenDivision:
    """The :class:`~splitwiser.placement.threads.Division` of the multiprocessors between a prefill and a decode worker.

    With share ``none`` both use the whole device through plain streams, and the device's own scheduler decides.
    """

    def __init__(self, device: torch.device, config: EngineConfig) -> None:
        names = {spec.role: spec.name for spec in config.specs}
        self._index = {names["prefill"]: PREFILL, names["decode"]: DECODE}
        _, highest = torch.cuda.Stream(device).priority_range()
        priorities = (0, highest if config.decode_priority else 0)
        wanted = plan_prefill_sms(count_multiprocessors(device), config)
        cuts = _distinct([_cut(device, sms, priorities) for sms in wanted])
        self._whole = [torch.cuda.Stream(device, priority=priority) for priority in priorities]
        self._streams = [streams for _, streams in cuts]
        self.units = [{names["prefill"]: granted[PREFILL], names["decode"]: granted[DECODE]} for granted, _ in cuts]
        board = Board.over(torch.zeros(Board.nbytes(2), dtype=torch.uint8))
        board.level = len(cuts) // 2
        auto = None
        if config.share == "auto":
            units = [granted[DECODE] for granted, _ in cuts]
            auto = AutoLevel(units, board.level, config.kept_itl_s)
        self._shares = [
            WorkerShare(board, PREFILL, config.lend),
            WorkerShare(board, DECODE, config.lend, auto, [PREFILL]),
        ]

    def streams(self, worker: str) -> Sequence[torch.cuda.Stream]:
        """See :class:`splitwiser.placement.threads.Division`."""
        index = self._index[worker]
        return [self._whole[index], *(streams[index] for streams in self._streams)]

    def share(self, worker: str) -> "GreenShare":
        """See :class:`splitwiser.placement.threads.Division`."""
        index = self._index[worker]
        return GreenShare(self._shares[index], self._whole[index], [streams[index] for streams in self._streams])

    def observe(self, gap_s: float) -> None:
        """See :class:`splitwiser.placement.threads.Division`."""
        self._shares[DECODE].observe(gap_s)


class GreenShare:
    """Runs steps on the stream of the current split, or of the whole device while the other worker is idle and lends its
    share; see :class:`splitwiser.engine.worker.DeviceShare`."""

    def __init__(self, share: WorkerShare, whole: torch.cuda.Stream, streams: Sequence[torch.cuda.Stream]) -> None:
        self._share = share
        self._whole = whole
        self._streams = streams

    def use(self) -> AbstractContextManager[object]:
        """See :meth:`splitwiser.engine.worker.DeviceShare.use`."""
        level, lent = self._share.claim()
        undivided = any(lent) or not self._streams
        return torch.cuda.stream(self._whole if undivided else self._streams[level])

    def release(self) -> None:
        """See :meth:`splitwiser.engine.worker.DeviceShare.release`."""
        self._share.release()


def plan_prefill_sms(total: int, config: EngineConfig) -> list[int]:
    """Return how many of ``total`` multiprocessors to request for prefill at each level, the most first: levels go from
    the fewest units for decode to the most."""
    if config.share == "none":
        return []
    (prefill,) = (spec.share for spec in config.specs if spec.role == "prefill")
    percentages = AUTO_PREFILL_PERCENT if config.share == "auto" else (prefill,)
    return [min(max(1, round(total * percent / 100)), total - 1) for percent in percentages]


Cut = tuple[tuple[int, int], tuple[torch.cuda.Stream, torch.cuda.Stream]]


def _distinct(cuts: Sequence[Cut]) -> list[Cut]:
    """Keep one of the cuts that were rounded to the same counts."""
    return list({granted: (granted, streams) for granted, streams in cuts}.values())


def _cut(device: torch.device, prefill_sms: int, priorities: Sequence[int]) -> Cut:
    """Cut the device in two, at about ``prefill_sms`` multiprocessors for prefill.

    Returns the multiprocessors granted to prefill and to decode, and a stream on each part, with the given priorities.
    """
    prefill, decode = cut_device(device, prefill_sms)
    first, second = (
        context.stream(device, priority) for context, priority in zip((prefill, decode), priorities, strict=True)
    )
    return (prefill.sms, decode.sms), (first, second)
