"""AMD PACE as a peer, with stand-ins for its engine and its servers."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from splitwiser.study.peers.engine import Asked
from splitwiser.study.peers.pace import Pace, PaceServer
from splitwiser.study.peers.program import serve

PROMPTS, NEW_TOKENS = [[5] * 30, [6] * 50, [7] * 8], [3, 1, 2]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "PACE_PREFIX_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # which the engines set


class Engine:
    """Steps as PACE's: of each prompt the chunk that it is told, and a token for each request whose prompt was read."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], int]] = []  # sizes of the chunks, and running requests
        self.left: dict[str, int] = {}
        self.lengths: dict[str, int] = {}

    def step(self, request: Any) -> dict[str, Any]:
        running = list(self.left)
        self.steps.append(([size for _, size in request.chunk_info_map.values()], len(running)))
        read = {}
        for each in request.prefill_batch:
            name = each["req_id"]
            start, size = request.chunk_info_map[name]
            self.lengths.setdefault(name, len(each["prompt"]))
            if start + size < self.lengths[name]:
                read[name] = {"status": "PREFILL_IN_PROGRESS", "num_computed_tokens": start + size}
            else:
                self.left[name] = each["generation_config"]["max_new_tokens"]
                read[name] = self._token(name, "PREFILL_COMPLETED")
        made = {name: self._token(name, "DECODING_IN_PROGRESS") for name in running}
        return {"prefill_result": read, "decode_result": made}

    def _token(self, name: str, status: str) -> dict[str, Any]:
        self.left[name] -= 1
        if not self.left[name]:
            del self.left[name]
            status = "COMPLETED"
        return {"token_ids": [9], "status": status}


def test_a_step_has_as_many_tokens_as_allowed(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    frontend = {"config_server": lambda _: None, "step_auto_mixed": engine.step}
    kinds = dict.fromkeys(("MixedStepRequest", "ModelConfig", "ServerConfig"), SimpleNamespace)
    modules: dict[str, dict[str, Any]] = {
        "pace": {"__version__": "1.0"}, "pace.server": {}, "pace.server.engine": {"frontend": SimpleNamespace(**frontend)},
        "pace.server.engine.utils": kinds,
    }  # fmt: skip
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("splitwiser.study.peers.pace.STEP_TOKENS", 40)
    outputs = serve(Pace(Asked(str(tiny("llama")), "bfloat16", 60, 3, tmp_path)), PROMPTS, NEW_TOKENS, 3)
    assert {output.request_id: len(output.token_ids) for output in outputs} == dict(enumerate(NEW_TOKENS))
    assert engine.steps == [([30, 10], 0), ([39], 1), ([1, 8], 1), ([], 1)]


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200 if asked["ignore_eos"] else 400)
        self.end_headers()
        self.wfile.write(f"{asked['prompt'][0]}\\n".encode() * asked["max_tokens"] + b"[DONE]\\n")

options = dict(each.removeprefix("--").split("=", 1) for each in sys.argv[1:])
ThreadingHTTPServer(("127.0.0.1", int(options.get("router_port") or options["port"])), Handler).serve_forever()
"""


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package ``pace`` whose engine and router are :data:`SERVER`; returns the engine's file."""
    for part in ("engine", "router"):
        folder = tmp_path / "package" / "pace" / "server" / part
        folder.mkdir(parents=True)
        (folder / "frontend.py").write_text(SERVER, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "package"))
    known = ModuleType("pace")
    known.__dict__["__version__"] = "1.0"
    monkeypatch.setitem(sys.modules, "pace", known)
    return tmp_path / "package" / "pace" / "server" / "engine" / "frontend.py"


@pytest.mark.usefixtures("servers")
def test_its_servers_are_asked_and_ended(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = PaceServer(Asked(str(tiny("llama")), "bfloat16", 60, 3, tmp_path))
    outputs = serve(engine, PROMPTS, NEW_TOKENS, 3)
    engine.close()
    assert {output.request_id: output.token_ids for output in outputs} == {0: [5, 5, 5], 1: [6], 2: [7, 7]}
    assert [process.poll() for process in engine._processes] == [-9, -9]


def test_a_server_that_ends_is_a_fault(servers: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    servers.write_text("import sys; sys.exit(3)", encoding="utf-8")
    with pytest.raises(RuntimeError, match="PACE's server ended with exit code 3"):
        PaceServer(Asked(str(tiny("llama")), "bfloat16", 60, 3, tmp_path))


@pytest.mark.usefixtures("servers")
def test_a_server_that_ends_with_requests_open_is_a_fault(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    engine = PaceServer(Asked(str(tiny("llama")), "bfloat16", 60, 3, tmp_path))
    engine._processes[0].kill()
    engine._processes[0].wait()
    with pytest.raises(RuntimeError, match="PACE's server ended with exit code -9"):
        list(engine.collect())
    engine.close()
