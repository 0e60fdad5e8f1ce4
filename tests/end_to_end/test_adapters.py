"""Requests with adapters get the tokens that peft's own model gives, whatever adapters the others of a step have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from splitwiser import LLM, SamplingParams
from splitwiser.model.adapters.lora import LoraLinear
from splitwiser.model.kernels.packed_linear import PackedLinear, find_packing_problem
from splitwiser.request import RequestOutput
from tests.support.adapters import ADAPTERS, DECODERS, DIFFERENT, ENCODER_DECODERS, make_adapter, peft_tokens
from tests.support.assertions import refusal
from tests.support.commands import invoke, only_run, write_workload
from tests.support.models import POSITIONS, make_tiny
from tests.support.tokens import prompts_of

PROMPTS = prompts_of([5, 40, 1])
NEW = 10
EACH = [*ADAPTERS, "none"]


def ask(model: Path, adapters: list[str], named: list[str | None], **options: Any) -> list[RequestOutput]:
    """The outputs of all prompts with each of the ``named`` adapters, one after the other."""
    given = {name: make_adapter(name, model) for name in adapters}
    # a budget that splits the longest prompt
    with LLM(model, adapters=given, prefill_tokens=24, **options) as llm:
        return llm.generate(
            PROMPTS * len(named),
            SamplingParams(max_tokens=NEW, ignore_eos=True),
            adapter=[name for name in named for _ in PROMPTS],
        )


def tokens_of(outputs: list[RequestOutput]) -> dict[str | None, list[list[int]]]:
    found: dict[str | None, list[list[int]]] = {}
    for output in outputs:
        found.setdefault(output.adapter, []).append(output.token_ids)
    return found


def expected(model: Path, names: list[str]) -> dict[str | None, list[list[int]]]:
    return {None if name == "none" else name: peft_tokens(name, model, PROMPTS, NEW) for name in names}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_alone(adapter: str, tiny: Callable[[str], Path]) -> None:
    model = tiny("llama")
    outputs = ask(model, [adapter], [None])  # the only one is the default
    assert tokens_of(outputs) == expected(model, [adapter])
    assert expected(model, [adapter])[adapter] != peft_tokens("none", model, PROMPTS, NEW)


@pytest.mark.parametrize("architecture", DECODERS)
def test_all_adapters_and_none_in_one_step(architecture: str, tiny: Callable[[str], Path]) -> None:
    outputs = ask(tiny(architecture), ADAPTERS, list(EACH))
    assert tokens_of(outputs) == expected(tiny(architecture), EACH)


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_loras_and_none_in_one_step_of_an_encoder_decoder(architecture: str, tiny: Callable[[str], Path]) -> None:
    names = ["lora", "rslora", "none"]
    outputs = ask(tiny(architecture), names[:2], list(names))
    assert tokens_of(outputs) == expected(tiny(architecture), names)
    assert len({str(tokens) for tokens in expected(tiny(architecture), names).values()}) == 3


@pytest.mark.parametrize(
    ("mode", "merged"),
    [
        ("generate", False),
        ("generate", True),
        ("sequential", True),
        pytest.param("mp", False, marks=pytest.mark.slow),
        pytest.param("green", False, marks=pytest.mark.gpu),
    ],
)
def test_a_lora_of_an_encoder_decoder_in_other_modes(mode: str, merged: bool, tiny: Callable[[str], Path]) -> None:
    outputs = ask(tiny("t5"), ["lora"], ["lora"] if merged else ["lora", "none"], mode=mode, merge_adapter=merged)
    assert tokens_of(outputs) == expected(tiny("t5"), ["lora"] if merged else ["lora", "none"])


def test_sources_of_one_token_alone_have_their_own_adapters(tiny: Callable[[str], Path]) -> None:
    model, prompts = tiny("t5"), [[5], [6], [7]]  # then a step has as many answers as tokens of sources
    names = ["lora", "none", "rslora"]
    with LLM(model, adapters={name: make_adapter(name, model) for name in ("lora", "rslora")}) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=NEW, ignore_eos=True), adapter=names)
    pairs = zip(names, prompts, strict=True)
    assert [each.token_ids for each in outputs] == [peft_tokens(name, model, [each], NEW)[0] for name, each in pairs]


@pytest.mark.parametrize(
    "mode",
    ["generate", pytest.param("mp", marks=pytest.mark.slow), pytest.param("green", marks=pytest.mark.gpu)],
)
def test_all_adapters_and_none_in_other_modes(mode: str, tiny: Callable[[str], Path]) -> None:
    outputs = ask(tiny("opt"), ADAPTERS, list(EACH), mode=mode)
    assert tokens_of(outputs) == expected(tiny("opt"), EACH)


@pytest.mark.parametrize("budget", [1, 24])
def test_all_adapters_and_none_in_hybrid_steps(budget: int, tiny: Callable[[str], Path]) -> None:
    given = {name: make_adapter(name, tiny("llama")) for name in ADAPTERS}
    with LLM(tiny("llama"), adapters=given, schedule="hybrid", prefill_tokens=budget) as llm:
        outputs = llm.generate(
            PROMPTS * len(EACH),
            SamplingParams(max_tokens=NEW, ignore_eos=True),
            adapter=[name for name in EACH for _ in PROMPTS],
        )
    assert tokens_of(outputs) == expected(tiny("llama"), EACH)


@pytest.mark.usefixtures("preempt_at_random")
def test_each_adapter_has_its_own_beginnings(tiny: Callable[[str], Path]) -> None:
    model, names = tiny("llama"), ["lora", "prefix", "prompt", "none"]  # 10 and 37 virtual tokens
    common, *ends = prompts_of([50, 1, 2, 30])
    prompts = [[*common, *end] for end in ends]
    with LLM(
        model,
        adapters={name: make_adapter(name, model) for name in names[:-1]},
        use_adapter="none",
        prefix_caching=True,
        prefill_tokens=24,
    ) as llm:
        outputs = llm.generate(
            prompts * len(names),
            SamplingParams(max_tokens=10, ignore_eos=True),
            adapter=[name for name in names for _ in prompts],
        )
    expected = [tokens for name in names for tokens in peft_tokens(name, model, prompts, 10)]
    assert [output.token_ids for output in outputs] == expected
    # own blocks begin with what of the virtual tokens fills none: 0, 10, 5 and 0 of 16
    cached = [output.metrics.cached_tokens for output in outputs]
    assert cached == [0, 48, 48, 0, 38, 38, 0, 43, 43, 0, 48, 48]


def test_without_compiled_kernels(tiny: Callable[[str], Path]) -> None:
    outputs = ask(tiny("llama"), ADAPTERS, list(EACH), kernels="plain")
    assert tokens_of(outputs) == expected(tiny("llama"), EACH)


@pytest.mark.slow
def test_workers_that_own_parts_of_the_pool_share_the_virtual_tokens(tiny: Callable[[str], Path]) -> None:
    workers = [{"role": "prefill"}, {"role": "decode", "count": 2}]
    outputs = ask(tiny("llama"), ["prompt", "prefix"], ["prompt", "prefix", "none"], mode="mp", workers=workers)
    assert tokens_of(outputs) == expected(tiny("llama"), ["prompt", "prefix", "none"])
    assert len({output.metrics.decode_worker for output in outputs}) == 2


@pytest.mark.parametrize("adapter", ["lora", *DIFFERENT])
def test_merged_into_the_weights(adapter: str, tiny: Callable[[str], Path]) -> None:
    architecture = "opt" if adapter == "bias" else "llama"  # whose layers have biases
    outputs = ask(tiny(architecture), [adapter], [None], merge_adapter=True)
    assert tokens_of(outputs) == expected(tiny(architecture), [adapter])


def test_mode_generate_needs_no_merging(tiny: Callable[[str], Path]) -> None:
    outputs = ask(tiny("llama"), ["dora", "modules_to_save"], ["dora", "modules_to_save", "none"], mode="generate")
    assert tokens_of(outputs) == expected(tiny("llama"), ["dora", "modules_to_save", "none"])


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ("dora", "it changes model.layers.0.self_attn.q_proj by more than the product of two matrices"),
        ("modules_to_save", "it replaces weights of lm_head"),
        ("bias", "it changes the biases of layers (bias: lora_only)"),
    ],
)
def test_what_cannot_be_done_for_single_requests_is_refused(
    adapter: str, why: str, tiny: Callable[[str], Path]
) -> None:
    model = tiny("opt" if adapter == "bias" else "llama")
    message = refusal(LLM, model, adapters={"a": make_adapter(adapter, model)})
    assert message == f"--adapter a: {why}, which cannot be done for single requests; --merge_adapter does it for all"


@pytest.mark.skipif(find_packing_problem() is not None, reason="linear layers cannot be packed here")
def test_packed_layers_keep_their_adapters_and_others_stay_fused(tiny: Callable[[str], Path]) -> None:
    model = tiny("llama")
    with LLM(model, adapters={"rslora": make_adapter("rslora", model)}, dtype="bfloat16") as llm:
        parts = list(llm.model.module.modules())
        described = llm.started.kernels["fused_parts"]
        with_it, without = (
            llm.generate([PROMPTS[1]], SamplingParams(max_tokens=NEW, ignore_eos=True), adapter=name)
            for name in ("rslora", "none")
        )
    wrapped = [type(part.base) for part in parts if isinstance(part, LoraLinear)]
    assert wrapped == [PackedLinear] * 6  # o_proj and gate_proj of three layers
    assert described.startswith("rms_norm ")
    assert with_it[0].token_ids != without[0].token_ids


def test_an_adapter_that_is_lost_on_the_way_is_noticed(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraLinear, "forward", lambda layer, inputs: layer.base(inputs))
    message = refusal(LLM, tiny("llama"), adapters={"a": make_adapter("lora", tiny("llama"))})
    assert message.startswith("--adapter a cannot be served by the engine: it gives other logits than peft's own model")


def test_virtual_tokens_count_as_positions_and_in_the_pool(tiny: Callable[[str], Path]) -> None:
    model = tiny("opt")
    with LLM(model, adapters={"prompt": make_adapter("prompt", model)}, kv_memory="128KiB") as llm:
        pool = llm.started.pool
        assert pool is not None
        assert pool.nbytes <= 128 << 10
        room = pool.blocks * pool.block_tokens - 37 % pool.block_tokens
        needed = f"37 virtual tokens, {room} prompt tokens and 2 new ones need room for {room + 6} tokens"
        assert needed in refusal(llm.generate, [[5] * room], SamplingParams(max_tokens=2))
        (output,) = llm.generate([[5] * (room - 1)], SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(output.token_ids) == 2
    with LLM(model, adapters={"prompt": make_adapter("prompt", model)}) as llm:
        longest = POSITIONS - 37
        message = refusal(llm.generate, [[5] * longest], SamplingParams(max_tokens=2))
        assert f"need {POSITIONS + 1} positions" in message
        (output,) = llm.generate([[5] * longest], SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(output.token_ids) == 1


def test_virtual_tokens_before_positions_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = make_tiny("llama", tmp_path / "tiny-llama", rope_parameters=rope)
    message = refusal(LLM, model, adapters={"a": make_adapter("prefix", model)})
    assert message.startswith(
        "--adapter a: virtual tokens are not served in a model that rotates positions by the length"
    )


@pytest.mark.parametrize("mode", ["generate", "sequential"])
@pytest.mark.parametrize("adapter", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_of_an_encoder_decoder_are_refused(mode: str, adapter: str, tiny: Callable[[str], Path]) -> None:
    message = refusal(LLM, tiny("t5"), mode=mode, adapters={"a": make_adapter(adapter, tiny("t5"))})
    kind = {"prefix": "prefix tuning", "prompt": "prompt tuning"}.get(adapter, adapter)
    assert message.startswith(f"--adapter a: {kind} is not served with encoder-decoders")


@pytest.mark.parametrize(("made_for", "needed"), [("llama", "t5"), ("t5", "llama")])
def test_an_adapter_for_another_kind_of_model_is_refused(
    made_for: str, needed: str, tiny: Callable[[str], Path]
) -> None:
    message = refusal(LLM, tiny(needed), adapters={"a": make_adapter("lora", tiny(made_for))})
    tasks = {"llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
    assert f"is made for the task {tasks[made_for]}" in message
    assert message.endswith(f"one for {tasks[needed]} is needed")


def test_an_unknown_name_is_refused(tiny: Callable[[str], Path]) -> None:
    with LLM(tiny("opt"), adapters={"a": make_adapter("lora", tiny("opt"))}) as llm:
        assert refusal(llm.generate, [[5]], adapter="b") == "unknown adapter 'b'; known: a, none"
        assert refusal(llm.generate, [[5], [6]], adapter=["a"]) == (
            "adapter has 1 entries for 2 prompts; give one each"
        )


def test_an_adapter_of_another_model_is_refused(tiny: Callable[[str], Path]) -> None:
    for name in ("lora", "prefix", "prompt"):
        directory = make_adapter(name, tiny("opt"))
        message = refusal(LLM, "radiology-opt", adapters={"a": directory})
        assert message.startswith(f"--adapter a: {directory} does not fit model radiology-opt: ")


def test_a_workload_names_adapters(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    model = tiny("opt")
    workload = write_workload(tmp_path / "w.json", PROMPTS, NEW, adapter=["lora", None, "none"])
    given = [f"--adapter={name}={make_adapter(name, model)}" for name in ("lora", "prefix", "prompt")]
    done = invoke(
        "run", "--model", model, "--workload", workload, *given, "--use_adapter", "prefix", "--ignore_eos",
        "--results", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "out")
    rows = pd.read_csv(run / "latency.csv", keep_default_na=False).sort_values("request_id")
    assert list(rows.adapter) == ["lora", "prefix", ""]
    record = yaml.safe_load((run / "run.yaml").read_text())
    assert record["adapters"]["lora"].startswith("LoRA, rank 4, from ")
    assert record["requests"]["notes"] == ["no request uses adapter prompt"]
    assert "note: no request uses adapter prompt" in done.stdout
    tokens = pd.read_csv(run / "tokens.csv").sort_values("request_id").token_ids
    made = [[*map(int, text.split())] for text in tokens]
    assert made == [
        peft_tokens(name, model, [prompt], NEW)[0]
        for name, prompt in zip(("lora", "prefix", "none"), PROMPTS, strict=True)
    ]


@pytest.mark.parametrize(("case_id", "adapter"), [(100, "prefix"), (200, "lora")])
def test_cases_of_adapters_run_out_of_the_box_and_in_their_style(case_id: int, adapter: str, tmp_path: Path) -> None:
    done = invoke("run", "--case_id", str(case_id), "--limit", "8", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert set(pd.read_csv(run / "latency.csv").adapter) == {adapter}
    texts = pd.read_csv(run / "generations.csv").summary_gen
    assert all(text.strip().startswith("1. ") for text in texts)


def test_an_adapter_with_missing_weights_is_refused(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    directory = tmp_path / "more"
    shutil.copytree(make_adapter("lora", tiny("llama")), directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["target_modules"].append("k_proj")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    for mode in ("sequential", "generate"):
        message = refusal(LLM, tiny("llama"), mode=mode, adapters={"a": directory})
        assert "k_proj.lora_A" in message
