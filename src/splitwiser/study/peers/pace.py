"""AMD PACE."""

import ctypes
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitwiser.study.peers.checkpoint import with_tokenizer
from splitwiser.study.peers.engine import KV_GIB, STEP_TOKENS, Answer, Asked, cores, describe

LOOK_S = 0.2  # between two looks whether a server answers, and whether both still run
START_S = 300.0  # until a server must answer
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_libc = ctypes.CDLL(None)  # loaded here: between fork and exec only the call itself is safe


class Pace:
    """PACE's engine, driven in this process as its own router does over HTTP: a step takes the next token of every running
    request and, up to the tokens of a step, as much as fits of the prompts."""

    def __init__(self, asked: Asked) -> None:
        model = _prepare(asked)
        import pace
        from pace.server.engine import frontend
        from pace.server.engine.utils import MixedStepRequest, ModelConfig, ServerConfig

        self.began_s = time.perf_counter()
        self.version = describe(
            pace.__version__, asked.dtype, asked.dtype, f"{STEP_TOKENS:,} tokens a step", cores(), "SLAB_POOL",
            "in this process alone",
        )  # fmt: skip
        frontend.config_server(
            ServerConfig(
                modelConfig=ModelConfig(modelId=str(model), dataType=asked.dtype, kv_cache_memory_gb=float(KV_GIB))
            )
        )
        self._step, self._request = frontend.step_auto_mixed, MixedStepRequest
        self._waiting: deque[tuple[str, Sequence[int], int]] = deque()  # name, prompt, new tokens
        self._read: dict[str, int] = {}  # tokens of a prompt that were read so far, of one that is longer than a step
        self._running = 0  # requests whose prompt was read
        self._answers: dict[str, Answer] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request."""
        name = str(uuid.uuid4())  # PACE wants one
        self._waiting.append((name, prompt, new_tokens))
        self._answers[name] = number, [], []

    def collect(self) -> Iterator[Answer]:
        """Run a step; yields the answers that it completed."""
        left, chunks, prompts = STEP_TOKENS - self._running, {}, []
        for name, prompt, new_tokens in self._waiting:
            start = self._read.get(name, 0)
            size = min(left, len(prompt) - start)
            if size <= 0:
                break
            left -= size
            chunks[name] = [start, size]
            config = {"max_new_tokens": new_tokens, "ignore_eos": True, "do_sample": False}
            prompts.append({"req_id": name, "prompt": [] if start else list(prompt), "generation_config": config})
        result = self._step(self._request(prefill_batch=prompts, chunk_info_map=chunks))
        now = time.perf_counter_ns()
        for name, made in (result["prefill_result"] | result["decode_result"]).items():
            if "error" in made:
                raise RuntimeError(f"request {self._answers[name][0]}: {made['error']}")
            if made["status"] == "PREFILL_IN_PROGRESS":
                self._read[name] = made["num_computed_tokens"]
                continue
            if name in chunks:
                self._waiting.popleft()  # prompts are read in order
                self._read.pop(name, None)
                self._running += 1
            _, token_ids, token_ns = self._answers[name]
            token_ids += made["token_ids"]
            token_ns += [now] * len(made["token_ids"])
            if made["status"] == "COMPLETED":
                self._running -= 1
                yield self._answers.pop(name)

    def close(self) -> None:
        """Do nothing: the engine has no other process."""


class PaceServer:
    """PACE as its users get it: an engine and a router, each a process of its own, which answer by HTTP; with the settings
    that its documentation gives. They are started without PACE's launcher, which needs numactl to keep an engine on its
    cores."""

    def __init__(self, asked: Asked) -> None:
        self._model = str(_prepare(asked))
        import pace

        self.began_s = time.perf_counter()
        self.version = describe(
            pace.__version__, asked.dtype, asked.dtype, f"{STEP_TOKENS:,} tokens a step", cores(), "SLAB_POOL",
            "a router and an engine by HTTP",
        )  # fmt: skip
        engine_port, self._port = _free_port(), _free_port()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        self._start("pace.server.engine.frontend", host="127.0.0.1", port=engine_port)
        self._wait_for(engine_port, "/get_models")
        self._start(
            "pace.server.router.frontend", router_host="127.0.0.1", router_port=self._port, server_host="127.0.0.1",
            server_port=engine_port, model=self._model, dtype=asked.dtype, kv_cache_type="SLAB_POOL",
            serve_type="continuous_batch", kv_cache_memory_gb=KV_GIB, op_config="{}", spec_config="{}",
            scheduler_metrics_enabled="False", fastapi_log_level="warning",
        )  # fmt: skip
        self._wait_for(self._port, "/v1/health")

    def _start(self, module: str, **options: object) -> None:
        command = [sys.executable, "-m", module, *(f"--{name}={value}" for name, value in options.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": str(cores())}
        self._processes.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_this_process))

    def _wait_for(self, port: int, path: str) -> None:
        """Wait until the process that was started last answers. Raises RuntimeError if it ends, or does not in time."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            self._check()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return
            except OSError:
                time.sleep(LOOK_S)
            finally:
                connection.close()
        raise RuntimeError(f"PACE's server did not answer on port {port} within {START_S:.0f} s")

    def _check(self) -> None:
        """Raise RuntimeError if one of the two processes has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"PACE's server ended with exit code {process.returncode}")

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        """Add a request, in a thread of its own."""
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": new_tokens, "min_tokens": new_tokens,
            "ignore_eos": True, "temperature": 0, "stream": True, "mlperf_mode": True,
        }  # fmt: skip
        threading.Thread(target=self._stream, args=(number, json.dumps(body)), daemon=True).start()

    def _stream(self, number: int, body: str) -> None:
        """Queue the answer to a request, of which a line of token ids (``mlperf_mode``) comes as they are made."""
        token_ids: list[int] = []
        token_ns: list[int] = []
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"request {number}: {response.read().decode()}")
            for line in response:
                made = line.split()
                if made == [b"[DONE]"]:
                    break
                token_ids += map(int, made)
                token_ns += [time.perf_counter_ns()] * len(made)
            self._answers.put((number, token_ids, token_ns))
        except Exception as error:
            self._answers.put(error)
        finally:
            connection.close()

    def collect(self) -> Iterator[Answer]:
        """Wait a short time for the next answer and yield it. Raises RuntimeError if one of the two processes has ended."""
        try:
            answer = self._answers.get(timeout=LOOK_S)
        except queue.Empty:
            self._check()
            return
        if isinstance(answer, Exception):
            raise answer
        yield answer

    def close(self) -> None:
        """End the two processes."""
        for process in self._processes:
            process.kill()
            process.wait()


def _prepare(asked: Asked) -> Path:
    """Set the environment as PACE's launcher does, with prefix caching off; returns the folder of the checkpoint with a
    tokenizer."""
    os.environ.setdefault("OMP_WAIT_POLICY", "active")
    os.environ["PACE_PREFIX_CACHE"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = asked.scratch / "pace-input"
    if not folder.exists():
        with_tokenizer(Path(asked.model), folder)
    return folder


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_this_process() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
