"""What whole test modules need: tiny random models, saved once a test session as checkpoints, and a stand-in for a GPU."""

import gc
import os
import pwd
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# before torch is loaded: test files run side by side, and their threads and their processes' must not spin at each other
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from splitwiser.engine.decode import Decoder
from splitwiser.engine.steps import SequenceState
from splitwiser.errors import InputError
from splitwiser.study import fresh_runs
from splitwiser.vllm_backend.environment import find_environment
from tests.support.commands import run_here
from tests.support.models import make_chatty, make_tiny
from tests.support.stand_in.build import StandIn, build, find_problem

# a shell's background jobs ignore Ctrl-C, and so would the children that tests send it to
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # for models this small, more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {
        "stand_in": find_problem(),
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device, and there is none",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    # those that take longest begin first: no worker is then left with one of them at the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="module", autouse=True)
def _leave_imports_out_of_garbage_collection() -> None:
    """The garbage collector leaves out what is there before a module's tests, most of it imported: to look through it each
    time that an engine is closed would take a third of many tests' time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def on_stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Runs a command on a stand-in for a GPU; for tests marked ``stand_in``."""
    libraries = tmp_path_factory.mktemp("stand_in")
    build(libraries)
    return StandIn(libraries, tmp_path_factory.mktemp("on_stand_in"))


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python of the environment of the back end vLLM: SPLITWISER_VLLM_PYTHON, or the default place; skips without it."""
    try:
        return str(find_environment(os.environ.get("SPLITWISER_VLLM_PYTHON")).python)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """This user has neither HOME nor an entry in passwd, as user ids of containers."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.fixture
def preempt_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each decode step, requests lose their blocks with a chance of one in eight each, all but one at most."""
    rng, batch = random.Random(0), Decoder.batch

    def disturbed(decoder: Decoder) -> list[SequenceState]:
        running = list(decoder._running)
        for number in rng.sample(running, len(running))[1:]:
            if rng.random() < 1 / 8:
                decoder._preempt(number)
        return batch(decoder)

    monkeypatch.setattr(Decoder, "batch", disturbed)


@pytest.fixture(scope="module")
def runs_here() -> Iterator[None]:
    """Runs that a comparison, a sweep or an advice would start in processes of their own are executed in this one, which
    has imported torch and transformers already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh_runs, "_in_own_process", run_here)
        yield


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with a chat template."""
    return make_chatty(tmp_path_factory.mktemp("chatty") / "chatty")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint directory of a tiny random model by architecture, made on first use."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_tiny(name, tmp_path_factory.mktemp("tiny") / f"tiny-{name}")
        return made[name]

    return get
