"""What goes together in an engine's configuration, whatever the machine."""

from typing import Any

import pytest

from splitwiser import constants
from splitwiser.placement.config import EngineConfig
from tests.support.assertions import assert_says, refusal


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mode": "both"}, ["unknown mode 'both'", "sequential"]),
        ({"share": "fair"}, ["fair", "fixed", "auto", "none"]),
        ({"itl_target_ms": 0.0}, ["itl_target_ms", "0"]),
        ({"share": "auto", "itl_target_ms": float("nan")}, ["itl_target_ms"]),
        ({"max_batch": 0}, ["max_batch must be 1 or more, not 0"]),
        ({"kv_memory": "much"}, ["kv_memory 'much' is not a size"]),
        ({"mps": "shared"}, ["unknown --mps 'shared'", "private", "existing"]),
        ({"mode": "generate", "policy": "priority"}, ["mode generate", "policy priority applies to other modes"]),
        (
            {"mode": "generate", "reserve": True},
            ["mode generate runs transformers' own engine; --reserve applies to other"],
        ),
        ({"mode": "generate", "prefix_caching": True}, ["mode generate", "--prefix_caching applies to other modes"]),
        ({"policy": "priority:age=5"}, ["policy priority:age=5: unknown parameter 'age'; did you mean ageing_s?"]),
        ({"schedule": "hybird"}, ["unknown schedule 'hybird'; did you mean hybrid?"]),
        (
            {"schedule": "prefill_first", "mode": "mp"},
            ["schedule prefill_first is for mixed workers", "mode mp has none"],
        ),
        ({"schedule": "decode_first", "mode": "generate"}, ["schedule decode_first is for mixed workers", "generate"]),
        ({"itl_target_ms": 20, "schedule": "prefill_first"}, ["itl_target_ms 20 is kept by --share auto or by --sch"]),
        (
            {"itl_target_ms": 20, "mode": "mp", "lend": False},
            ["itl_target_ms 20 is kept by --share auto or by --schedule hybrid, and in mode mp with a second lane"],
        ),
        ({"quantization": "int4"}, ["unknown --quantization 'int4'", "int8"]),
        ({"quantization": "int8"}, ["quantization int8 needs", "dtype bfloat16 for the rest, not float32"]),
        ({"quantization": "int8", "dtype": "bf16", "kernels": "plain"}, ["quantization int8 needs", "kernels auto"]),
        ({"quantization": "int8", "dtype": "bf16", "mode": "generate"}, ["mode generate", "applies to other modes"]),
        ({"kv_dtype": "float8"}, ["unknown --kv_dtype 'float8'", "bfloat16", "int8"]),
        ({"kv_dtype": "int8", "mode": "generate"}, ["mode generate", "--kv_dtype applies to other modes"]),
        ({"kv_dtype": "int8", "backend": "vllm"}, ["--kv_dtype does not go with backend vllm"]),
        ({"mps": "existing"}, ["mps existing goes with mode mps, not with mode sequential"]),
        ({"exclusive": True}, ["exclusive goes with mode mps"]),
        ({"workers": "[{role: mixed}]"}, ["workers are laid out in modes mp, mps, green, not in mode sequential"]),
        ({"mode": "mp", "workers": [{"role": "cook"}]}, ["'role' must be one of prefill, decode, mixed, not 'cook'"]),
        ({"mode": "green", "workers": "[{role: mixed}]"}, ["mode green has one prefill and one decode worker", "mp"]),
        ({"backend": "vlm"}, ["unknown backend 'vlm'; did you mean vllm?"]),
        (
            {"backend": "vllm", "mode": "generate"},
            ["backend vllm runs in modes sequential, mp, mps, not in mode generate"],
        ),
        ({"kv_transfer": "copy", "mode": "mp"}, ["kv_transfer copy goes with --backend vllm and prefill and decode"]),
        (
            {"backend": "vllm", "kv_transfer": "copy"},
            ["kv_transfer copy goes with --backend vllm and prefill and decode"],
        ),
        ({"kv_transfer": "copies"}, ["unknown --kv_transfer 'copies'; did you mean copy?"]),
        ({"backend": "vllm", "policy": "priority"}, ["policy does not go with backend vllm: vLLM schedules by itself"]),
        ({"backend": "vllm", "use_adapter": "none"}, ["use_adapter does not go with backend vllm: its engines serve"]),
        ({"backend": "vllm", "mode": "mp", "share": "auto"}, ["share auto does not go with backend vllm"]),
        ({"backend_python": "x"}, ["backend_python goes with another back end than hf"]),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], said: list[str]) -> None:
    assert_says(refusal(EngineConfig, **settings), *said)


@pytest.mark.parametrize(
    ("mode", "workers", "said"),
    [
        ("mps", "", ["mps", "green"]),
        ("mp", "[{role: mixed}]", ["mixed"]),
        ("mp", "[{role: prefill, share: 30}, {role: decode}]", ["shares", "fixed"]),
    ],
)
def test_share_auto_is_refused_where_it_cannot_be(mode: str, workers: str, said: list[str]) -> None:
    assert_says(refusal(EngineConfig, mode=mode, workers=workers, share="auto"), *said)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"mode": "generate"}, []),
        ({}, ["mixed-0"]),
        ({"mode": "mps"}, ["prefill-0", "decode-0"]),
        ({"mode": "mp", "workers": [{"role": "mixed", "count": 2}]}, ["mixed-0", "mixed-1"]),
    ],
)
def test_workers_are_those_laid_out_or_the_modes_own(settings: dict[str, Any], names: list[str]) -> None:
    assert [spec.name for spec in EngineConfig(**settings).specs] == names


@pytest.mark.parametrize(
    ("settings", "has"),
    [
        ({"mode": "mp"}, True),
        ({"mode": "mp", "workers": "[{role: prefill}, {role: decode, count: 2}]"}, True),
        ({"mode": "mp", "workers": "[{role: prefill, count: 2}, {role: decode}]"}, False),
        ({"mode": "mp", "workers": "[{role: mixed, count: 2}]"}, False),
        ({"mode": "mp", "lend": False}, False),
        ({"mode": "mp", "second_lane": False}, False),
        ({"mode": "mp", "share": "none"}, False),
        ({"mode": "mp", "share": "auto"}, False),
        ({"mode": "mp", "backend": "vllm"}, False),
        ({"mode": "mps"}, False),
        ({}, False),
    ],
)
def test_one_prefill_worker_that_lends_has_a_second_lane(settings: dict[str, Any], has: bool) -> None:
    assert EngineConfig(**settings).has_second_lane is has


LANE = "a second lane is for decoders without rotary scaling by length in mode mp on a CPU"


@pytest.mark.parametrize(
    ("settings", "takes_lane", "said"),
    [
        ({"mode": "generate", "batch_size": 3}, True, []),
        ({"mode": "generate", "prefill_tokens": 64}, True, ["--prefill_tokens changes nothing: mode generate runs"]),
        ({"mode": "generate", "max_batch": 3}, True, ["--max_batch changes nothing: mode generate runs transformers'"]),
        ({"mode": "generate", "kv_memory": "4MiB"}, True, ["--kv_memory changes nothing: mode generate runs"]),
        ({"prefill_tokens": 64, "max_batch": 3, "kv_memory": "4MiB"}, True, []),
        ({"batch_size": 3}, True, ["--batch_size changes nothing: it is for mode generate"]),
        ({"second_lane": False}, True, [f"--no-second_lane changes nothing: {LANE}"]),
        ({"mode": "mp", "second_lane": False}, True, []),
        ({"mode": "mp", "second_lane": False}, False, [LANE]),
        ({"mode": "mp", "second_lane": False, "lend": False}, True, [LANE]),
        ({"mode": "mp", "second_lane": False, "backend": "vllm"}, True, [LANE]),
        ({"mode": "mps"}, False, []),
    ],
)
def test_what_was_given_and_changes_nothing_is_noted(
    settings: dict[str, Any], takes_lane: bool, said: list[str]
) -> None:
    notes = EngineConfig(**settings).describe_unused(takes_lane)
    assert len(notes) == len(said)
    assert all(text in note for text, note in zip(said, notes, strict=True))


def test_decode_keeps_a_pace_beside_a_second_lane() -> None:
    paces = [EngineConfig(mode="mp", itl_target_ms=target_ms).kept_itl_s for target_ms in (None, 20)]
    assert paces == [constants.BACKLOG_ITL_MS / 1e3, 0.02]


def test_a_target_is_for_share_auto_or_hybrid_steps() -> None:
    mixed = "[{role: mixed, count: 2}]"
    assert EngineConfig(schedule="hybrid", itl_target_ms=20).mixes
    assert EngineConfig(mode="mp", workers=mixed, schedule="hybrid", itl_target_ms=20).mixes
    auto = [EngineConfig(mode="mp", share="auto", itl_target_ms=target_ms) for target_ms in (None, 20)]
    assert [each.kept_itl_s for each in auto] == [constants.ITL_TARGET_MS / 1e3, 0.02]
