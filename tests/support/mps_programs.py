"""The stand-ins for MPS's daemon and server, as programs."""

import sys
from pathlib import Path


def put_mps_programs(folder: Path) -> None:
    """Make ``folder``, with the stand-ins for MPS's daemon and server in it, under the real ones' names."""
    program = Path(__file__).with_name("stand_in_mps.py").read_text()
    folder.mkdir()
    for name in ("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"):
        (folder / name).write_text(f"#!{sys.executable} -S\n{program}")
        (folder / name).chmod(0o755)
