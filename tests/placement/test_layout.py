"""Worker layouts: what they are made from, what they come to, and which are refused."""

from pathlib import Path

import pytest

from splitwiser.engine.messages import WorkerSpec
from splitwiser.errors import InputError
from splitwiser.placement.layout import ONE_OF_EACH, WorkerGroup, WorkerLayout, parse_layout
from tests.support.assertions import refusal


def test_workers_are_numbered_by_role_and_share_what_is_left() -> None:
    layout = parse_layout("[{role: prefill, count: 2, share: 20}, {role: decode, count: 2}]")
    assert layout.workers == (
        WorkerSpec("prefill-0", "prefill", 20),
        WorkerSpec("prefill-1", "prefill", 20),
        WorkerSpec("decode-0", "decode", 30),
        WorkerSpec("decode-1", "decode", 30),
    )
    assert str(layout) == "2 prefill at 20%, 2 decode"


def test_a_file_a_text_and_a_list_mean_the_same(tmp_path: Path) -> None:
    (tmp_path / "workers.yaml").write_text("- role: prefill\n- {role: decode}\n")
    layouts = [
        parse_layout(str(tmp_path / "workers.yaml")),
        parse_layout("[{role: prefill}, {role: decode}]"),
        parse_layout([{"role": "prefill"}, {"role": "decode"}]),
    ]
    assert layouts == [ONE_OF_EACH] * 3


def test_a_layout_may_be_named() -> None:
    assert str(parse_layout("two_and_two")) == "2 prefill, 2 decode"


def test_shares_may_leave_some_of_the_device_unused() -> None:
    layout = WorkerLayout((WorkerGroup("prefill", share=30), WorkerGroup("decode", share=40)))
    assert [worker.share for worker in layout.workers] == [30, 40]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("[]", "workers: the list is empty"),
        ("[{role: prefill}]", "workers: no decode worker; list at least one, or mixed workers alone"),
        ("[{role: decode}]", "workers: no prefill worker"),
        ("[{role: mixed}, {role: decode}]", "workers: mixed workers do both phases themselves"),
        ("[{role: mixed}, {role: mixed}]", "workers: a role is listed twice"),
        ("[{role: prefill, share: 60}, {role: decode, share: 41}]", "workers: the shares make 101%; together"),
        ("[{role: mixed, count: 3, share: 34}]", "workers: the shares make 102%"),
        ("[{role: prefill, share: 100}, {role: decode}]", "workers: the shares make 100% and others have none"),
        ("[{role: decod}]", "workers, entry 1: 'role' must be one of prefill, decode, mixed, not 'decod'"),
        ("[{role: mixed, count: 0}]", "workers, entry 1: 'count' must be a whole number of 1 or more, not 0"),
        ("[{role: mixed, count: two}]", "workers, entry 1: 'count' must be a whole number of 1 or more, not 'two'"),
        ("[{role: mixed, share: 0}]", "workers, entry 1: 'share' must be a whole percentage from 1 to 100, not 0"),
        ("[{role: mixed, number: 2}]", "workers, entry 1: unknown key 'number'; known: role, count, share"),
        ("[{count: 2}]", "workers, entry 1: 'role' is missing"),
        ("[mixed]", "workers: must be a list of entries such as"),
        ("[{role: mixed]", "workers: not valid YAML"),
        ("nowhere.yaml", "workers 'nowhere.yaml': neither a file, a name of configs/workers nor a list"),
    ],
)
def test_a_layout_that_makes_no_sense_gets_one_line(given: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_layout(given)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_a_mistyped_name_of_a_layout_gets_the_nearest() -> None:
    assert refusal(parse_layout, "four_mixd").endswith("{role: decode}]'; did you mean four_mixed?")
