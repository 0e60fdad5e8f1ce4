"""How threads wait is set before torch is loaded, in every entry, and a user's own setting wins."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from splitwiser.waiting import LATE, SPINS

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def said(code: str, **variables: str) -> str:
    """What ``code`` prints in a process of its own that only ``variables`` tell how threads wait."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | variables
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip() + done.stderr.strip()


SEEN = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
DESCRIBED = "from splitwiser import waiting; print(waiting.describe())"


def test_importing_the_package_bounds_the_spinning() -> None:
    assert said(f"import splitwiser, sys; assert 'torch' not in sys.modules; {SEEN}") == SPINS
    assert said(DESCRIBED) == "20,000 spins, then asleep"


def test_the_command_loads_torch_with_the_bound(tmp_path: Path) -> None:
    """OpenMP prints what it has read as it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    done = subprocess.run(
        [sys.executable, "-m", "splitwiser", "run", "--workload", str(tmp_path / "none.json")], capture_output=True,
        text=True, check=False, env={**environment, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "passive"), ("GOMP_SPINCOUNT", "7")])
def test_the_users_own_setting_wins(name: str, value: str) -> None:
    assert said(f"import splitwiser; {SEEN}", **{name: value}) == ("7" if name == "GOMP_SPINCOUNT" else "None")
    assert said(DESCRIBED, **{name: value}) == f"as {name}={value} says"


def test_a_child_of_ours_is_not_taken_for_the_users_own() -> None:
    assert said(DESCRIBED, GOMP_SPINCOUNT=SPINS) == "20,000 spins, then asleep"


def test_another_engine_waits_as_it_is_made_to() -> None:
    undo = f"from splitwiser import waiting; waiting.undo_bound(); {SEEN}"
    assert said(undo) == said(undo, GOMP_SPINCOUNT=SPINS) == "None"
    assert said(undo, GOMP_SPINCOUNT="7") == "7"


def test_torch_loaded_before_is_said_once(tiny: Callable[[str], Path]) -> None:
    load = f"LLM({str(tiny('llama'))!r}).close()"
    warned = said(f"import torch; from splitwiser import LLM\nfor _ in range(2): {load}")
    assert warned.count(LATE) == 1
    assert said(f"import torch; {DESCRIBED}") == "as OpenMP does by default (torch was imported before splitwiser)"


def test_workers_wait_as_their_parent_is_meant_to(tiny: Callable[[str], Path]) -> None:
    code = f"""
import torch
from pathlib import Path
from splitwiser import LLM
with LLM({str(tiny("llama"))!r}, mode="mp") as llm:
    for pid in llm.pids.values():
        parent = Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[1]
        print("GOMP_SPINCOUNT={SPINS}" in Path(f"/proc/{{parent}}/environ").read_text().split(chr(0)))
"""
    assert said(code).count("True") == 2
