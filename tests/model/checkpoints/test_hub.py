"""Whether the hub can be reached is known at once, and not after the half minute that its library tries."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from splitwiser.errors import InputError
from splitwiser.model.checkpoints import hub
from splitwiser.model.checkpoints.catalog import CatalogEntry
from splitwiser.model.checkpoints.configuration import plan_model
from splitwiser.model.checkpoints.hub import check_hub

ENTRY = CatalogEntry("model", hub="nobody/no-such-model")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_hub_that_answers_is_asked(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening}")
    check_hub(ENTRY)


def test_no_network_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    began = time.monotonic()
    with pytest.raises(
        InputError, match=r"nor available from the hub.*127\.0\.0\.1 cannot be reached: Connection refused"
    ):
        plan_model(ENTRY.hub, dtype="auto", device="cpu", load_format="auto")
    assert time.monotonic() - began < 3


def test_a_name_server_that_does_not_answer_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(hub, "CONNECT_S", 0.1)
    monkeypatch.setattr(socket, "create_connection", lambda *_: ended.wait() and socket.create_server(("127.0.0.1", 0)))
    with pytest.raises(InputError, match=r"no answer within 0\.1 s"):
        check_hub(ENTRY)
    ended.set()


def test_behind_a_proxy_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "getproxies", lambda: {"all": "socks5://proxy:1080"})
    monkeypatch.setattr(socket, "create_connection", None)
    check_hub(ENTRY)


def test_offline_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_hub(ENTRY)
