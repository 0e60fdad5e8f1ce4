"""What of mode ``green`` can be told without a GPU: the plan of the cut, and the refusals."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from splitwiser import LLM
from splitwiser.placement.config import EngineConfig
from splitwiser.placement.green import AUTO_PREFILL_PERCENT, GreenDivision, plan_prefill_sms
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke

FORTY = "[{role: prefill, share: 40}, {role: decode, share: 60}]"


@pytest.mark.parametrize(
    ("workers", "share", "total", "sms"),
    [
        ("", "none", 132, []),
        ("", "fixed", 132, [66]),
        (FORTY, "fixed", 132, [53]),
        ("[{role: prefill, share: 99}, {role: decode, share: 1}]", "fixed", 8, [7]),
        ("", "auto", 132, [116, 99, 82, 66, 50, 33, 16]),
    ],
)
def test_shares_become_multiprocessors(workers: str, share: str, total: int, sms: list[int]) -> None:
    assert plan_prefill_sms(total, EngineConfig(mode="green", workers=workers, share=share)) == sms


def test_auto_starts_with_the_least_for_decode() -> None:
    assert list(AUTO_PREFILL_PERCENT) == sorted(AUTO_PREFILL_PERCENT, reverse=True)


def test_a_cpu_is_refused_with_the_reason_and_another_mode(tiny: Callable[[str], Path]) -> None:
    assert_says(refusal(LLM, tiny("opt"), mode="green", device="cpu"), "mode green", "NVIDIA GPU", "cpu", "use mode mp")


def test_the_command_refuses_with_exit_code_2() -> None:
    done = invoke("run", "--mode", "green", "--device", "cpu")
    assert done.returncode == 2
    assert_says(done.stderr, "mode green:", "use mode mp")


@pytest.mark.gpu
def test_the_pieces_are_all_of_the_device() -> None:
    device = torch.device("cuda", 0)
    (units,) = GreenDivision(device, EngineConfig(mode="green", workers=FORTY)).units
    assert sum(units.values()) == torch.cuda.get_device_properties(device).multi_processor_count
    assert 0 < units["prefill-0"] < units["decode-0"]


@pytest.mark.gpu
def test_share_none_cuts_nothing() -> None:
    assert GreenDivision(torch.device("cuda", 0), EngineConfig(mode="green", share="none")).units == []


@pytest.mark.gpu
def test_auto_has_a_choice_of_splits() -> None:
    division = GreenDivision(torch.device("cuda", 0), EngineConfig(mode="green", share="auto"))
    decode = [units["decode-0"] for units in division.units]
    assert len(decode) >= 3
    assert decode == sorted(decode)
