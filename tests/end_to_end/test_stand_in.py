"""What runs on a GPU, on the stand-in for one: every mode with real tokens, the tests that are marked ``gpu``, and what the
stand-in itself refuses, counts and delays.

Of the tests marked ``gpu``, those in test_gpu_attention.py are left out, since the emulator computes what the Triton kernels
would, and that of the memory of llama-3.2-1b, whose 1.2 billion weights are slow on a CPU.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from splitwiser.results.report import STAND_IN_WARNING, write_report
from tests.support.adapters import make_adapter, peft_tokens
from tests.support.assertions import assert_says
from tests.support.commands import only_run, write_workload
from tests.support.stand_in.build import Ran, StandIn
from tests.support.tokens import LENGTHS, prompts_of, references
from tests.support.vllm_worker import put_python

pytestmark = pytest.mark.stand_in

TESTS = Path(__file__).parents[1]
NEW_TOKENS = 24
GENERATE = """
import json, sys
from splitwiser import LLM, SamplingParams
asked = json.loads(sys.argv[1])
with LLM(asked["model"], dtype="float32", **asked["settings"]) as llm:
    params = SamplingParams(max_tokens=asked["new_tokens"], ignore_eos="adapter" in asked)
    outputs = llm.generate(asked["prompts"], params, adapter=asked.get("adapter"))
    print(json.dumps({"tokens": [output.token_ids for output in outputs], "kernels": llm.started.kernels}))
"""


def run_script(on_stand_in: StandIn, script: str, *arguments: object, **settings: Any) -> Ran:
    ran = on_stand_in([sys.executable, "-c", script, *map(str, arguments)], **settings)
    assert ran.returncode == 0, ran.stderr
    return ran


def printed(ran: Ran) -> Any:
    """The JSON that a script prints last."""
    return json.loads(ran.stdout.splitlines()[-1])


def failure(on_stand_in: StandIn, script: str, **settings: Any) -> str:
    """What a script that fails says last."""
    ran = on_stand_in([sys.executable, "-c", script], **settings)
    assert ran.returncode == 1, ran.stderr
    return next(line for line in reversed(ran.stderr.splitlines()) if re.match(r"[\w.]*(Error|Exception)\b", line))


# -- the modes


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "generate"},
        {"mode": "sequential"},
        {"mode": "mp"},
        {"mode": "mps"},
        {"mode": "green", "share": "fixed"},
        {"mode": "green", "share": "none"},
        {"mode": "green", "share": "auto", "itl_target_ms": 1.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_mode_makes_the_tokens_of_generate(
    settings: dict[str, Any], on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    model, prompts = tiny("llama"), prompts_of(LENGTHS)
    asked = {"model": str(model), "settings": {"device": "cuda", "max_batch": 8, **settings}, "prompts": prompts}
    ran = run_script(on_stand_in, GENERATE, json.dumps({**asked, "new_tokens": NEW_TOKENS}))
    made = printed(ran)
    assert made["tokens"] == references(model, prompts, NEW_TOKENS)
    if settings["mode"] != "generate":
        assert made["kernels"]["decode_graphs"] == "for 1, 2, 4, 8 requests"
        assert "captured" in ran.log


@pytest.mark.parametrize(("architecture", "mode"), [("t5", "sequential"), ("bart", "mp"), ("t5", "mps")])
def test_an_encoder_decoder_makes_the_tokens_of_generate(
    architecture: str, mode: str, on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    model, prompts = tiny(architecture), prompts_of(LENGTHS)
    asked = {"model": str(model), "settings": {"device": "cuda", "max_batch": 8, "mode": mode}, "prompts": prompts}
    made = printed(run_script(on_stand_in, GENERATE, json.dumps({**asked, "new_tokens": NEW_TOKENS})))
    assert made["tokens"] == references(model, prompts, NEW_TOKENS)
    assert made["kernels"]["decode_graphs"] == "for 1, 2, 4, 8 requests"


@pytest.mark.parametrize("architecture", ["llama", "t5"])
@pytest.mark.parametrize("mode", ["sequential", "mp", "mps"])  # green is marked gpu, see below
def test_adapters_of_one_step_make_the_tokens_of_peft(
    architecture: str, mode: str, on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    adapters = ["lora", "rslora", "none"] if architecture == "t5" else ["lora", "prefix", "prompt", "none"]
    model, prompts = tiny(architecture), prompts_of([5, 40, 1])
    given = {name: str(make_adapter(name, model)) for name in adapters if name != "none"}
    asked = {
        "model": str(model),
        "settings": {"device": "cuda", "max_batch": 8, "mode": mode, "adapters": given},
        "prompts": prompts * len(adapters),
        "adapter": [name for name in adapters for _ in prompts],
        "new_tokens": 6,
    }
    made = printed(run_script(on_stand_in, GENERATE, json.dumps(asked)))
    assert made["tokens"] == [tokens for name in adapters for tokens in peft_tokens(name, model, prompts, 6)]
    assert made["kernels"]["decode_graphs"] == "for 1, 2, 4, 8 requests"


STEPS = """
import json, sys
from splitwiser import LLM, SamplingParams
asked = json.loads(sys.argv[1])
with LLM(asked["model"], device="cuda", max_batch=8, **asked["settings"]) as llm:
    outputs = llm.generate(asked["prompts"], SamplingParams(max_tokens=asked["new_tokens"]))
    metrics = [output.metrics for output in outputs]
    print(json.dumps({
        "tokens": [output.token_ids for output in outputs], "preemptions": sum(each.preemptions for each in metrics),
        "cached": sum(each.cached_tokens for each in metrics), "graphs": llm.started.kernels["decode_graphs"],
    }))
"""


@pytest.mark.parametrize(
    ("settings", "happened"),
    [
        ({"schedule": "hybrid", "prefill_tokens": 24}, ""),
        ({"mode": "mp", "kv_memory": f"{8 * 16 * 3 * 2 * 2 * 12 * 4}B"}, "preemptions"),  # eight blocks
        ({"mode": "mp", "prefix_caching": True}, "cached"),
    ],
    ids=["hybrid", "blocks on demand", "prefix caching"],
)
def test_blocks_and_tables_that_change_from_step_to_step(
    settings: dict[str, Any], happened: str, on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    beginning = prompts_of([40])[0]
    model, prompts = tiny("llama"), [[*beginning, *prompt] for prompt in prompts_of([1, 5, 9, 3, 20])]
    asked = {"model": str(model), "settings": {"dtype": "float32", **settings}, "prompts": prompts}
    made = printed(run_script(on_stand_in, STEPS, json.dumps({**asked, "new_tokens": NEW_TOKENS})))
    assert made["tokens"] == references(model, prompts, NEW_TOKENS)
    assert made["graphs"] == "for 1, 2, 4, 8 requests"
    assert not happened or made[happened]


VLLM = """
import json, sys
from splitwiser import LLM, SamplingParams
asked = json.loads(sys.argv[1])
with LLM(asked["model"], backend="vllm", kv_memory="1MiB", **asked["settings"]) as llm:
    output, = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
    print(json.dumps({"tokens": output.token_ids, "started": [llm.started.backend["engines"], llm.started.mps]}))
"""


@pytest.mark.parametrize(("mode", "transfer"), [("mp", "shared"), ("mp", "copy"), ("mps", "shared")])
def test_engines_of_vllm_reach_each_others_pools_on_a_gpu(
    mode: str, transfer: str, on_stand_in: StandIn, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    layout = [{"role": "prefill", "share": 30}, {"role": "decode", "share": 70}]
    python = str(put_python(tmp_path / "vllm"))
    settings = {"device": "cuda", "mode": mode, "kv_transfer": transfer, "workers": layout, "backend_python": python}
    ran = run_script(on_stand_in, VLLM, json.dumps({"model": str(tiny("llama")), "settings": settings}))
    made = printed(ran)
    engines, mps = made["started"]
    assert made["tokens"] == [3, 18]  # decode's is what prefill wrote to the pool
    for engine in engines.values():
        assert engine["pool"] == ["cuda:0", (1 << 20) // (1 if transfer == "shared" else 2)]
        assert (engine["OMP_NUM_THREADS"], engine["VLLM_ENABLE_V1_MULTIPROCESSING"]) == (None, "0")
    shares = [engines[name]["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for name in ("prefill-0", "decode-0")]
    if mode == "mp":
        assert (shares, mps) == ([None, None], None)
    else:
        assert shares == ["30", "70"]
        assert mps["active_thread_percentages"] == {"prefill-0": 30, "decode-0": 70}
        assert all(engine["CUDA_VISIBLE_DEVICES"].startswith("GPU-") for engine in engines.values())
        assert [engines[name]["CUDA_MPS_CLIENT_PRIORITY"] for name in ("prefill-0", "decode-0")] == ["1", "0"]


def test_workers_of_mode_mps_know_daemon_and_share_when_cuda_starts(
    on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    settings = {"device": "cuda", "mode": "mps", "workers": "[{role: prefill, share: 40}, {role: decode, share: 60}]"}
    asked = {"model": str(tiny("opt")), "settings": settings, "prompts": [[5, 6, 7]], "new_tokens": 2}
    ran = run_script(on_stand_in, GENERATE, json.dumps(asked))
    starts = [line for line in ran.log.splitlines() if "cuInit" in line]
    for worker, percentage in (("prefill-0", 40), ("decode-0", 60)):
        (start,) = (line for line in starts if f" {worker} " in line)
        assert_says(start, f"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE={percentage}", "CUDA_VISIBLE_DEVICES=GPU-")
        assert "CUDA_MPS_PIPE_DIRECTORY= " not in start


@pytest.mark.parametrize("mode", ["sequential", "mp", "green"])
def test_a_device_other_than_the_first(mode: str, on_stand_in: StandIn, tiny: Callable[[str], Path]) -> None:
    model, prompts = tiny("llama"), prompts_of(LENGTHS[:4])
    settings = {"device": "cuda:1", "max_batch": 4, "mode": mode}
    asked = {"model": str(model), "settings": settings, "prompts": prompts, "new_tokens": 6}
    ran = run_script(on_stand_in, GENERATE, json.dumps(asked), devices=2)
    assert printed(ran)["tokens"] == references(model, prompts, 6)


def test_workers_are_not_lost_while_cuda_starts(on_stand_in: StandIn, tiny: Callable[[str], Path]) -> None:
    model, prompts = tiny("opt"), prompts_of(LENGTHS[:3])
    asked = {"model": str(model), "settings": {"device": "cuda", "mode": "mp"}, "prompts": prompts, "new_tokens": 3}
    # the interpreter's lock is held meanwhile, so that no heartbeat comes
    ran = run_script(on_stand_in, GENERATE, json.dumps(asked), delays={"context": 2.5})
    assert printed(ran)["tokens"] == references(model, prompts, 3)


def test_half_precision_prefills_whole_prompts_by_a_graph_and_others_in_one_call_a_layer(
    on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    script = """
import json, sys
import torch
from splitwiser import LLM, SamplingParams
from splitwiser.model.kernels.varlen_attention import VarlenAttention
calls, call = [], VarlenAttention.__call__
def counted(*given, **named):
    calls.append(len(given[1]))
    return call(*given, **named)
VarlenAttention.__call__ = counted
with LLM(sys.argv[1], mode="sequential", device="cuda", dtype="bfloat16", max_batch=32) as llm:
    counts, params = [], SamplingParams(max_tokens=1)
    for prompts in ([[5] * 20, [6] * 30, [7] * 40], [[5] * 5] * 17):
        calls.clear()
        llm.generate(prompts, params)
        counts.append(list(calls))
    print(json.dumps([counts, llm.started.kernels["prefill_attention"], llm.started.kernels["prefill_graphs"]]))
"""
    counts, described, graphs = printed(run_script(on_stand_in, script, tiny("qwen3")))  # three layers of heads of 16
    assert counts == [[], [85, 85, 85]]  # a replay calls nothing; seventeen prompts are more than a graph takes
    assert graphs.startswith("for 128, 256,")
    assert described == "torch.nn.attention.varlen, one call a layer"


def test_no_step_is_too_large_to_warm_up_with(on_stand_in: StandIn, tiny: Callable[[str], Path]) -> None:
    script = STREAMS.replace("prefill_tokens=300", "prefill_tokens=1 << 20")
    ran, _ = printed(run_script(on_stand_in, script, tiny("opt"), json.dumps({"share": "none"})))
    assert ran[0][-1] == 8192


STREAMS = """
import json, sys
import torch
from splitwiser import LLM
from splitwiser.engine import steps
ran, step = [], steps.prefill_step
def noted(model, pool, chunks, *graphs):
    stream = torch.cuda.current_stream(model.device)
    ran.append([stream.cuda_stream, stream.priority, sum(chunk.tokens for chunk in chunks)])
    return step(model, pool, chunks, *graphs)
steps.prefill_step = noted
with LLM(sys.argv[1], mode="green", device="cuda", prefill_tokens=300, max_batch=2, **json.loads(sys.argv[2])) as llm:
    print(json.dumps([ran, len(llm.started.division)]))
"""


def test_every_stream_of_prefill_is_warmed_up_by_a_whole_step(
    on_stand_in: StandIn, tiny: Callable[[str], Path]
) -> None:
    model = tiny("opt")  # of 256 positions: a step of 300 tokens is one whole prompt
    ran, levels = printed(run_script(on_stand_in, STREAMS, model, json.dumps({"share": "auto"})))
    assert levels == 7
    assert len({stream for stream, *_ in ran}) == 1 + levels
    assert {tokens for *_, tokens in ran[: 1 + levels]} == {256}  # what follows is the first request, on streams seen
    assert {priority for _, priority, _ in ran} == {0}


@pytest.mark.parametrize(("decode_priority", "above"), [(True, True), (False, False)])
def test_decode_runs_on_streams_of_a_higher_priority(decode_priority: bool, above: bool, on_stand_in: StandIn) -> None:
    script = f"""
import json
import torch
from splitwiser.placement.green import GreenDivision
from splitwiser.placement.config import EngineConfig
config = EngineConfig(mode="green", decode_priority={decode_priority})
division = GreenDivision(torch.device("cuda", 0), config)
print(json.dumps([[stream.priority for stream in division.streams(name)] for name in ("prefill-0", "decode-0")]))
"""
    prefill, decode = printed(run_script(on_stand_in, script))
    assert prefill == [0, 0]
    assert [priority < 0 for priority in decode] == [above, above]


def test_cuda_starts_with_a_queue_for_every_stream_of_mode_green(on_stand_in: StandIn) -> None:
    look = "print(find_mode_problem('green', 'cuda'))"
    ran = run_script(on_stand_in, f"import torch; from splitwiser.placement.checks import find_mode_problem; {look}")
    assert ran.stdout.split() == ["None"]
    assert "CUDA_DEVICE_MAX_CONNECTIONS=32" in ran.log
    assert "green context 1 of 72 multiprocessors" in ran.log  # one cut, which is given up again
    assert ran.log.count("is given up") == 2


def test_green_contexts_that_are_not_permitted_are_told_before_a_run(on_stand_in: StandIn) -> None:
    environment = {"SPLITWISER_STAND_IN_REFUSED": "cuGreenCtxCreate"}
    ran = on_stand_in([sys.executable, "-m", "splitwiser", "doctor", "--json"], environment=environment)
    modes = {mode["mode"]: mode for mode in json.loads(ran.stdout)["modes"]}
    assert modes["sequential"]["works"]
    assert not modes["green"]["works"]
    assert_says(modes["green"]["note"], "cuGreenCtxCreate", "NOT_PERMITTED")


# -- the tests that need a GPU


@pytest.mark.parametrize(
    "tests",
    [
        "engine/test_decode_graphs.py",
        "engine/test_prefill_graphs.py",
        "model/test_fusing.py",
        "placement/test_green.py",
        "placement/test_processes.py -k not_depend_on_the_workers",
        "placement/test_mps_daemon.py",
        "test_llm.py",
        "end_to_end/test_adapters.py",
        "end_to_end/test_token_identity.py -k green",
    ],
)
def test_what_needs_a_gpu_passes(tests: str, on_stand_in: StandIn) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *tests.split()]
    ran = on_stand_in(command, directory=TESTS)
    assert ran.returncode == 0, ran.stdout
    assert re.search(r"\d+ passed", ran.stdout), ran.stdout


# -- the check of a GPU


@pytest.mark.parametrize(
    "stage",
    [
        "doctor",
        "tokens",
        "tokens-t5",
        "tokens-adapters",
        "tests",
        "tests-processes",
        "compare-125m",
        "compare-125m-60",
        "interference",
        "paper",
    ],
)
def test_a_stage_of_the_check_ends_with_its_results(stage: str, on_stand_in: StandIn, tmp_path: Path) -> None:
    """All but the probes, which are of a device's physics, and the peers, whose processes do without the emulator."""
    command: list[str | Path] = ["scripts/gpu_check.sh", "--quick", "--seconds", "270", "--results", tmp_path, stage]
    ran = on_stand_in(command, directory=TESTS.parent, environment={"PYTHON": sys.executable}, timeout_s=290)
    assert ran.returncode == 0, ran.stdout
    assert f"  {stage}: passed" in ran.stdout
    assert (tmp_path / "results.tar.gz").exists()
    assert "NVIDIA H200 (stand-in)" in (tmp_path / "summary.txt").read_text()


# -- records of it


def test_a_run_says_that_it_was_on_a_stand_in(
    on_stand_in: StandIn, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    workload = write_workload(tmp_path / "two.json", [[5, 6], [7]])
    command = [sys.executable, "-m", "splitwiser", "run", "--model", str(tiny("opt")), "--workload", str(workload)]
    ran = on_stand_in([*command, "--ignore_eos", "--results", str(tmp_path / "out")])
    assert ran.returncode == 0, ran.stderr
    folder = only_run(tmp_path / "out")
    assert yaml.safe_load((folder / "run.yaml").read_text())["machine"]["gpu"] == "NVIDIA H200 (stand-in)"
    assert "cuda:0 (stand-in)" in (folder / "throughput.csv").read_text()
    assert STAND_IN_WARNING.replace("'", "&#39;") in write_report([folder]).read_text()


# -- what it refuses, counts and delays


CAPTURE = """
import torch
tensor = torch.ones(4, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    made = tensor * 2
    {inside}
tensor.fill_(5)
graph.replay()
print(made.sum().item())
"""


def test_a_graph_computes_with_what_is_there_when_it_is_replayed(on_stand_in: StandIn) -> None:
    assert printed(run_script(on_stand_in, CAPTURE.format(inside="made += 1"))) == 44.0


@pytest.mark.parametrize("inside", ["made.sum().item()", "made.nonzero()", "torch.cuda.synchronize()"])
def test_a_capture_that_waits_for_the_device_is_spoilt(inside: str, on_stand_in: StandIn) -> None:
    ran = on_stand_in([sys.executable, "-c", CAPTURE.format(inside=inside)])
    assert ran.returncode == 1
    assert "operation not permitted when stream is capturing" in ran.stderr
    assert "FORBIDDEN DURING CAPTURE" in ran.log


def test_a_copy_into_a_capture_is_from_pinned_memory(on_stand_in: StandIn) -> None:
    said = failure(on_stand_in, CAPTURE.format(inside="tensor.copy_(torch.ones(4))"))
    assert_says(said, "CUDA graph capture", "pinned")


VARLEN = """
import json, sys, torch
from splitwiser.model.attention import AttentionOptions, attend
from splitwiser.model.kernels.varlen_attention import VarlenAttention
torch.manual_seed(0)
queries, contexts = [5, 1, 7], [5, 9, 12]
def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
errors = []
for heads, kv_heads, size, left in json.loads(sys.argv[1]):
    query = torch.randn(sum(queries), heads, size).to("cuda", torch.bfloat16)
    key, value = (torch.randn(sum(contexts), kv_heads, size).to("cuda", torch.bfloat16) for _ in range(2))
    window = None if left == -1 else left + 1
    made = VarlenAttention()(query, key, value, (offsets(queries), offsets(contexts)), (7, 12), window, 0.3)
    rows = zip(*(part.cpu().split(lengths) for part, lengths in zip((query, key, value, made),
               (queries, contexts, contexts, queries))))
    for row in rows:
        q, k, v, got = (part.float().transpose(0, 1)[None] for part in row)
        distance = torch.arange(k.shape[2])[None] - torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
        seen = (distance <= 0) & (distance >= (-left if left >= 0 else -1000))
        errors.append((attend(q, k, v, seen[None, None], AttentionOptions(0.3)) - got).abs().max().item())
print(errors)
"""


def test_flash_attention_of_sequences_laid_end_to_end(on_stand_in: StandIn) -> None:
    heads_kv_heads_size_window = [(4, 4, 64, -1), (8, 2, 64, -1), (4, 1, 40, 3)]
    errors = printed(run_script(on_stand_in, VARLEN, json.dumps(heads_kv_heads_size_window)))
    assert len(errors) == 9
    assert max(errors) < 2e-2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("query, key, value = query.float(), key.float(), value.float()", "only support fp16 and bf16"),
        ("query, key, value = (each[..., :12].contiguous() for each in (query, key, value))", "multiple of 8"),
        ("offsets = offsets.long()", "int32"),
    ],
)
def test_flash_attention_refuses_what_the_real_one_refuses(change: str, said: str, on_stand_in: StandIn) -> None:
    script = f"""
import torch
from torch.nn.attention.varlen import varlen_attn
query, key, value = torch.zeros(3, 6, 4, 16, device="cuda", dtype=torch.bfloat16)
offsets = torch.tensor([0, 6], device="cuda", dtype=torch.int32)
{change}
varlen_attn(query, key, value, offsets, offsets, 6, 6)
"""
    assert said in failure(on_stand_in, script)


def test_memory_in_use_is_that_of_every_living_process(on_stand_in: StandIn) -> None:
    script = """
import os, signal, subprocess, sys, torch
MIB = 2**20
def used():
    free, total = torch.cuda.mem_get_info()
    return (total - free) // MIB
before = used()
tensor = torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
own = used() - before
script = '''
import time, torch
tensor = torch.empty(32 * 2**20, dtype=torch.uint8, device="cuda")
print(flush=True)
time.sleep(600)
'''
other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
other.stdout.readline()
both = used() - before
other.kill()
other.wait()
killed = used() - before
del tensor
torch.cuda.empty_cache()
print([before, own, both, killed, used() - before])
"""
    assert printed(run_script(on_stand_in, script)) == [512, 64, 64 + 512 + 32, 64, 0]


def test_a_delay_is_that_of_the_function_it_names(on_stand_in: StandIn) -> None:
    script = """
import time, torch
torch.cuda.is_available()
began = time.monotonic()
torch.cuda.synchronize()
print(time.monotonic() - began)
"""
    assert 1.5 <= printed(run_script(on_stand_in, script, delays={"context": 1.5})) < 10
    assert printed(run_script(on_stand_in, script, delays={"cudaIpcOpenMemHandle": 60})) < 10


def test_there_are_as_many_devices_as_asked_for(on_stand_in: StandIn) -> None:
    script = """
import json, torch
made = torch.arange(4, device="cuda:1") * 2
ids = {str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())}
print(json.dumps([made.tolist(), str(made.device), len(ids)]))
"""
    assert printed(run_script(on_stand_in, script, devices=2)) == [[0, 2, 4, 6], "cuda:1", 2]


def test_triton_launches_on_the_current_device(on_stand_in: StandIn) -> None:
    script = """
import torch
from splitwiser.model.kernels.gpu_attention import GpuDecodeAttention
device = torch.device("cuda", 1)
rows = torch.ones(1, dtype=torch.int64, device=device)
query, keys = torch.ones(1, 2, 16, device=device), torch.ones(1, 16, 2, 16, device=device)
GpuDecodeAttention()(query, keys, keys, torch.zeros(1, 1, dtype=torch.int64, device=device), rows * 0, rows, rows, 1.0)
"""
    assert_says(failure(on_stand_in, script, devices=2), "illegal memory access", "cuda:0, not cuda:1")


def test_visible_devices_are_named_by_number_or_uuid(on_stand_in: StandIn) -> None:
    script = """
import json, torch
print(json.dumps([str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]))
"""
    first, second = printed(run_script(on_stand_in, script, devices=2))
    for named, seen in (("1", [second]), (f"GPU-{second},GPU-{first}", [second, first])):
        environment = {"CUDA_VISIBLE_DEVICES": named}
        assert printed(run_script(on_stand_in, script, devices=2, environment=environment)) == seen
