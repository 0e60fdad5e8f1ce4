"""The parent's side of vLLM's engines: starts them one after another, routes requests to them and supervises them."""

from collections.abc import Mapping, Sequence
from itertools import cycle

from splitwiser.engine.messages import Cancel, Message, Progress, Ready, Submit, WorkerSpec
from splitwiser.engine.policy import Router
from splitwiser.errors import InputError, UnsupportedModelError, WorkerLostError
from splitwiser.machine.process import uninterrupted
from splitwiser.placement.mailbox import Pipe, PipeInbox
from splitwiser.placement.mps_daemon import MpsDaemon
from splitwiser.placement.processes import SupervisedPlacement
from splitwiser.placement.shares import Board
from splitwiser.request import Request
from splitwiser.vllm_backend.messages import CancelPrefill, EngineReady, Refused, StartEngine, SubmitPrefill
from splitwiser.vllm_backend.spawned import SpawnedProcess


class EnginePlacement(SupervisedPlacement):
    """Processes with an engine of vLLM each, clients of ``daemon`` if there is one; see
    :class:`splitwiser.engine.engine.Placement`."""

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        processes: Sequence[SpawnedProcess],
        send_ends: Mapping[str, Pipe],
        inbox: PipeInbox,
        board: Board,
        daemon: MpsDaemon | None,
    ) -> None:
        super().__init__(processes, send_ends, inbox, board)
        self._spawned = processes
        self._daemon = daemon
        self._waiting = [spec.name for spec in specs]
        self._specs = specs
        self._prefill_workers = cycle([spec.name for spec in specs if spec.role == "prefill"] or [""])
        self._prefilled_by: dict[int, str] = {}  # prefill workers of requests that have not finished
        self._router = Router({}, 1)
        self.engines: dict[str, EngineReady] = {}

    def wait_ready(self) -> None:
        """See :meth:`SupervisedPlacement.wait_ready`.

        Raises :class:`UnsupportedModelError` for a model that an engine cannot serve in its role, :class:`InputError` if the
        KV cache is too small."""
        self._start_next()
        super().wait_ready()
        if self._daemon:
            self._daemon.wait_for_clients(self.pids)
        blocks = {spec.name: self.engines[spec.name].blocks for spec in self._specs if spec.role != "prefill"}
        if not all(each.blocks for each in self.engines.values()):
            raise InputError(f"--kv_memory leaves {min(blocks.values())} blocks of vLLM's to an engine; give more")
        self._router = Router(blocks, next(iter(self.engines.values())).block_tokens)

    def submit(self, request: Request, arrival_ns: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.submit`: to the decode engine with the most free blocks, by way of
        the next prefill engine if there are any."""
        decode = self._router.choose(request)
        prefill = next(self._prefill_workers)
        if prefill:
            self._prefilled_by[request.request_id] = prefill
            self._send(prefill, SubmitPrefill(request, arrival_ns, decode))
        else:
            self._send(decode, Submit(request, arrival_ns))

    def cancel(self, request_id: int) -> None:
        """See :meth:`splitwiser.engine.engine.Placement.cancel`."""
        decode, prefill = self._router.owner(request_id), self._prefilled_by.get(request_id)
        if prefill:
            self._send(prefill, CancelPrefill(request_id, decode))
        else:
            self._send(decode, Cancel(request_id))

    @uninterrupted()
    def close(self) -> None:
        """See :meth:`SupervisedPlacement.close`. On a GPU an engine uses memory of those that started before it, so they end
        in reverse order."""
        for process in reversed(self._spawned):
            self._end([process])
        super().close()
        for process in self._spawned:
            process.close()

    def _start_next(self) -> None:
        if self._waiting:
            self._send(self._waiting.pop(0), StartEngine())

    def _handle(self, message: Message) -> None:
        if isinstance(message, Refused):
            raise UnsupportedModelError(message.reason)
        if isinstance(message, Progress):
            for request_id, _ in message.finished:
                self._router.release(request_id)
                self._prefilled_by.pop(request_id, None)

    def _handle_ready(self, message: Ready) -> None:
        assert isinstance(message, EngineReady)
        self.engines[message.worker] = message
        self._start_next()

    def _find_fault(self) -> str | None:
        return self._daemon.find_fault() if self._daemon else None

    def _find_lost_worker(self) -> WorkerLostError | None:
        lost = super()._find_lost_worker()
        if lost:
            for process in self._spawned:
                if process.exitcode is not None and (said := process.last_output()):
                    lost.add_note(f"{process.name} printed last:\n{said}")
        return lost
