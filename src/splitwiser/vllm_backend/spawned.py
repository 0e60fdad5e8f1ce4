"""Worker processes that are programs of another Python environment."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence

_LAST = 2000  # bytes of a worker's output that an error quotes


class SpawnedProcess:
    """A running worker; see :class:`splitwiser.placement.processes.WorkerProcess`. What it prints goes to a file without a
    name."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        cores: Collection[int],
        files: Sequence[int],
    ) -> None:
        self.name = name
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # as long as the process

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from the first moment: the parent handles Ctrl-C
            os.sched_setaffinity(0, cores)

        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            pass_fds=files,
            preexec_fn=prepare,
        )

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most ``timeout`` seconds."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return

    def terminate(self) -> None:
        """Ask it to end; does nothing if it has ended."""
        self._process.terminate()

    def kill(self) -> None:
        """End it; does nothing if it has ended."""
        self._process.kill()

    def last_output(self) -> str:
        """Return the end of what it printed."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), _LAST, max(0, size - _LAST)).decode(errors="replace").strip()

    def close(self) -> None:
        """Forget its output."""
        self._output.close()
