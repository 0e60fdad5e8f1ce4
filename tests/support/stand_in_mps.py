"""A stand-in for ``nvidia-cuda-mps-control``, which tests put on PATH under that name.

Like the real one it is daemon (``-d``) and front end (commands on stdin), keeps a socket and a pid file in
``CUDA_MPS_PIPE_DIRECTORY`` and logs in ``CUDA_MPS_LOG_DIRECTORY``, and starts a server process. Its clients are the
worker processes below the process that started it. Beside the program lie ``behaviour``, words that tell it to misbehave,
and ``commands``, to which it writes each command that arrives with the clients of that moment:

    refuse (to start)   hang (at the start)   dead (after the start)   mute (never answers)   clientless (lists no client)
    stubborn (does not quit)   immortal (nor ends on SIGTERM)
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIPES = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
BEHAVIOUR = (HERE / "behaviour").read_text().split() if (HERE / "behaviour").exists() else []
ROLES = ("prefill-", "decode-", "mixed-")


def log(name: str, line: str) -> None:
    with (Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / name).open("a") as file:
        file.write(f"{line}\n")


def clients_below(owner: int) -> list[int]:
    parents, names = {}, {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            before, _, after = (entry / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if after.split()[0] not in "ZX":
            parents[int(entry.name)] = int(after.split()[1])
            names[int(entry.name)] = before.partition("(")[2]
    found = []
    for pid, name in names.items():
        above = pid
        while above in parents and above != owner:
            above = parents[above]
        if above == owner and name.startswith(ROLES):
            found.append(pid)
    return sorted(found)


def answer(command: str, owner: int, server: int) -> str:
    match command.split():
        case ["get_server_list"]:
            return f"{server}\n"
        case ["get_client_list", number] if int(number) == server:
            return "".join(f"{pid}\n" for pid in clients_below(owner)) if "clientless" not in BEHAVIOUR else ""
        case ["quit", *_] if "stubborn" not in BEHAVIOUR:
            return "bye"
    return ""


def serve(owner: int) -> None:
    if "immortal" in BEHAVIOUR:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server = subprocess.Popen([sys.executable, "-S", HERE / "nvidia-cuda-mps-server"])
    (PIPES / "nvidia-cuda-mps-control.pid").write_text(f"{os.getpid()}\n")
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.bind(str(PIPES / "control"))
    control.listen()
    unanswered = []  # an open connection each
    log("control.log", "Starting control daemon")
    while True:
        connection, _ = control.accept()
        command = connection.recv(1000).decode().strip()
        log("control.log", f"Accepting command {command}")
        with (HERE / "commands").open("a") as file:
            record = {"command": command, "clients": clients_below(owner), "environment": dict(os.environ)}
            file.write(json.dumps(record) + "\n")
        said = answer(command, owner, server.pid)
        if "mute" in BEHAVIOUR or ("stubborn" in BEHAVIOUR and command.startswith("quit")):
            unanswered.append(connection)
            continue
        if said == "bye":
            server.kill()
            server.wait()
            (PIPES / "nvidia-cuda-mps-control.pid").unlink()
        connection.sendall(said.encode())
        connection.close()
        if said == "bye":
            return


def start() -> None:
    if "refuse" in BEHAVIOUR:
        print("Cannot start: no permission")
        sys.exit(1)
    if "hang" in BEHAVIOUR:
        time.sleep(600)
    owner = os.getppid()
    if os.fork():
        return
    os.setsid()
    if "dead" in BEHAVIOUR:
        log("control.log", "Failed to bind")
        return
    serve(owner)


def ask() -> None:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        control.connect(str(PIPES / "control"))
    except OSError:
        print("Cannot find MPS control daemon process")
        sys.exit(1)
    control.sendall(sys.stdin.read().encode())
    while said := control.recv(10_000):
        sys.stdout.write(said.decode())


if Path(sys.argv[0]).name == "nvidia-cuda-mps-server":
    if "immortal" in BEHAVIOUR:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log("server.log", "Startup")
    time.sleep(600)
elif sys.argv[1:] == ["-d"]:
    start()
else:
    ask()
