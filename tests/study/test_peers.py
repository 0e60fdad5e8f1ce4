"""Other engines in a comparison, with stand-ins for their environments, and what the process of a peer does."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
import yaml
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from splitwiser.cli import main
from splitwiser.config import RunConfig
from splitwiser.elsewhere import PROGRAM
from splitwiser.study.compare import compare, make_variants
from splitwiser.study.peers.checkpoint import with_tokenizer
from splitwiser.study.peers.engine import Answer, Asked
from splitwiser.study.peers.llama_cpp import convert
from splitwiser.study.peers.program import ENGINES, serve
from splitwiser.study.peers.run import Peer, check_peer, read_peer, share_with_peers
from splitwiser.workload.job import Job, prepare_job
from splitwiser.workload.planned import PlannedRequest
from tests.support.assertions import assert_says, refusal
from tests.support.commands import only_run, write_workload
from tests.support.models import make_tiny

PROMPTS = [[5, 6, 7], [8], [9, 10]]

# asked as elsewhere.py is: the module and the engine, then --name=value; what a stand-in was asked is its version
ANSWERS = """
import json, pathlib, sys
asked = dict(each.removeprefix("--").split("=", 1) for each in sys.argv[5:])
work = json.loads(pathlib.Path(asked["workload"]).read_text())
config = json.loads((pathlib.Path(asked["model"]) / "config.json").read_text())
answers = {
    "device": "cpu", "output_throughput": 100.0, "p99_itl_ms": None,
    "version": json.dumps({**asked, "architecture": config["architectures"][0]}),
    "token_ids": [[7] * new for new in work["max_new_tokens"]],
}
pathlib.Path(asked["output"]).write_text(json.dumps(answers))
"""
FAILS = """
import sys
print("something on the way", file=sys.stderr)
print("ValueError: it has no heart", file=sys.stderr)
sys.exit(1)
"""


def make_environment(directory: Path, program: str) -> Path:
    """A stand-in for a peer's environment, whose interpreter does what ``program`` says."""
    python = directory / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{sys.executable}\n{program}", encoding="utf-8")
    python.chmod(0o755)
    return directory


# -- what is refused


def test_an_encoder_decoder_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    config = RunConfig(model=str(tiny("t5")), workload=str(write_workload(tmp_path / "mine.json", PROMPTS)))
    message = refusal(share_with_peers, config, prepare_job(config, 0), tmp_path, [])
    assert message == "model tiny-t5 is an encoder-decoder, which no peer serves; leave --peer out"


def test_a_model_that_a_peer_cannot_be_given_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    config = RunConfig(model=str(tiny("opt")), workload=str(write_workload(tmp_path / "mine.json", PROMPTS)))
    message = refusal(share_with_peers, config, prepare_job(config, 0), tmp_path, ["vllm", "llama.cpp"])
    assert_says(message, "peer llama.cpp serves LlamaForCausalLM here, and model tiny-opt is OPTForCausalLM")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vlm=/x", ["unknown peer 'vlm'", "vllm"]),
        ("vllm=/none", ["--peer vllm=/none", "no bin/python", "install_peer.sh"]),
        ("vllm", ["--peer vllm", "no bin/python"]),
    ],
)
def test_a_peer_that_is_none_is_refused(
    text: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_says(refusal(read_peer, text), *parts)


def test_a_peer_may_be_given_by_its_interpreter() -> None:
    assert read_peer(f"hf-continuous={sys.executable}") == Peer("hf-continuous", Path(sys.executable))


@pytest.mark.parametrize(
    ("options", "settings", "parts"),
    [
        (
            {"adapters": "lora", "model": "radiology-opt"},
            {},
            ["variant vllm: a peer runs the model alone", "--adapter"],
        ),
        (
            {"quantization": "int8", "dtype": "bf16"},
            {},
            ["variant vllm: a peer runs the model in --dtype", "--variant"],
        ),
        (
            {"kv_dtype": "int8"},
            {},
            ["variant vllm: a peer runs the model in --dtype", "give --kv_dtype in a --variant"],
        ),
        ({"temperature": 0.5}, {}, ["variant vllm: a peer chooses tokens greedily"]),
        (
            {"generation_config": "checkpoint"},
            {},
            ["variant vllm: a peer chooses tokens greedily", "--generation_config"],
        ),
        ({"presence_penalty": 0.5}, {}, ["variant vllm: a peer chooses tokens by the model's own logits"]),
        ({"n": 2}, {}, ["variant vllm: a peer gives one sample of a prompt", "--n"]),
        ({"logprobs": 0}, {}, ["variant vllm: a peer gives one sample of a prompt", "--logprobs"]),
        ({"stop_token_ids": "7"}, {}, ["variant vllm: a peer generates a fixed number", "--stop_token_ids"]),
        ({"request_rate": 2.0}, {}, ["variant vllm: a peer takes requests that arrive at once", "--max_concurrency"]),
        ({"ignore_eos": False}, {}, ["variant vllm: a peer generates a fixed number", "--ignore_eos"]),
        ({}, {"load": 0.5}, ["--peer", "--load"]),
        ({}, {"one_process": True}, ["--peer", "--one_process"]),
    ],
)
def test_what_a_peer_cannot_do_is_refused_before_anything_runs(
    options: dict[str, Any], settings: dict[str, Any], parts: list[str], tmp_path: Path, tiny: Callable[[str], Path]
) -> None:
    workload = write_workload(tmp_path / "three.json", PROMPTS)
    base = {"model": str(tiny("opt")), "workload": str(workload), "ignore_eos": True, "results": str(tmp_path / "out")}
    environment = make_environment(tmp_path / "env", ANSWERS)
    variants = make_variants({**base, **options}, ["sequential"], [], [f"vllm={environment}"])
    assert_says(refusal(compare, variants, 1, **settings), *parts)
    assert not (tmp_path / "out").exists()


def test_requests_with_an_order_of_their_own_are_not_a_peers() -> None:
    job = Job("urgent", [PlannedRequest((5,), 0, 4, priority=1)])
    assert_says(refusal(check_peer, RunConfig(ignore_eos=True), job), "a peer takes requests in an order of its own")


# -- comparisons


def run_compare(tmp_path: Path, *arguments: object) -> tuple[int, Path]:
    """The exit code of a comparison, and its folder."""
    code = main(["compare", "--repeats", "1", "--results", str(tmp_path / "out"), *map(str, arguments)])
    return code, only_run(tmp_path / "out")


@pytest.mark.usefixtures("runs_here")
def test_a_peer_is_asked_what_the_variants_are(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    peers = [f"vllm={make_environment(tmp_path / 'env', ANSWERS)}"]
    workload = write_workload(tmp_path / "three.json", PROMPTS, 6)
    code, folder = run_compare(
        tmp_path, "--modes", "sequential", "--peer", *peers, "--model", tiny("opt"), "--workload", workload,
        "--ignore_eos", "--dtype", "bfloat16", "--max_concurrency", "2", "--goodput", "ttft:200", "--repeats", "2",
    )  # fmt: skip
    assert code == 0
    rows = pd.read_csv(folder / "comparison.csv")
    assert rows["variant"].tolist() == ["sequential", "vllm", "vllm", "sequential"]
    assert rows["model"].unique().tolist() == ["tiny-opt"]
    assert rows["status"].unique().tolist() == ["finished"]
    asked = json.loads(rows["version"][1])
    assert (asked["model"], asked["dtype"], asked["max_concurrency"], asked["goodput"]) == (
        str(tiny("opt")), "bfloat16", "2", "ttft:200",
    )  # fmt: skip
    tokens = pd.read_csv(folder / "comparison_tokens.csv")
    assert tokens["variant"].tolist() == rows["variant"].tolist()
    assert tokens["other_prompts"].unique().tolist() == [0]
    assert json.loads(Path(asked["workload"]).read_text()) == {"max_new_tokens": [6] * 3, "prompts": PROMPTS}
    record = yaml.safe_load((folder / "compare.yaml").read_text())
    assert record["variants"]["vllm"] == {"peer": f"vllm={tmp_path / 'env' / 'bin' / 'python'}"}
    assert record["machine"]["cores"] >= 1
    summary = pd.read_csv(folder / "comparison_summary.csv").set_index(["metric", "variant"])
    assert summary.at[("output_throughput", "vllm"), "median"] == 100


@pytest.mark.usefixtures("runs_here")
def test_the_record_repeats_a_comparison_with_peers(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = [f"vllm={make_environment(tmp_path / 'env', ANSWERS)}"]
    workload = write_workload(tmp_path / "three.json", PROMPTS)
    base = {"model": str(tiny("opt")), "workload": str(workload), "ignore_eos": True, "results": str(tmp_path / "out")}
    variants = make_variants(base, ["sequential"], [], peers)
    folder = compare(variants, 1)
    given: list[Any] = []
    monkeypatch.setattr("splitwiser.study.compare.compare", lambda *arguments, **_: given.extend(arguments))
    command = yaml.safe_load((folder / "compare.yaml").read_text())["command"]
    assert main(shlex.split(command)[1:]) == 0
    assert [(each.name, each.config, each.peer) for each in given[0]] == [
        (each.name, each.config, each.peer) for each in variants
    ]


def test_a_peer_that_fails_is_named_and_the_others_go_on(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, works = make_environment(tmp_path / "broken", FAILS), make_environment(tmp_path / "works", ANSWERS)
    workload = write_workload(tmp_path / "three.json", PROMPTS)
    code, folder = run_compare(
        tmp_path, "--peer", f"vllm={broken}", "--peer", f"hf-continuous={works}", "--model", tiny("opt"),
        "--workload", workload, "--ignore_eos",
    )  # fmt: skip
    assert code == 1
    assert_says(
        capsys.readouterr().err,
        "round 1/1, vllm: failed: exit code 1: ValueError: it has no heart",
        "1 of 2 runs failed",
    )
    rows = pd.read_csv(folder / "comparison.csv")
    assert rows[["variant", "status"]].values.tolist() == [["vllm", "failed"], ["hf-continuous", "finished"]]


def test_a_peer_that_writes_nothing_has_failed(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    silent, works = make_environment(tmp_path / "silent", ""), make_environment(tmp_path / "works", ANSWERS)
    workload = write_workload(tmp_path / "three.json", PROMPTS)
    code, folder = run_compare(
        tmp_path, "--peer", f"vllm={silent}", "--peer", f"hf-continuous={works}", "--model", tiny("opt"),
        "--workload", workload, "--ignore_eos",
    )  # fmt: skip
    assert code == 1
    assert pd.read_csv(folder / "comparison.csv")["error"][0] == "exit code 0: no output"


@pytest.mark.usefixtures("runs_here")
def test_modes_and_peers_load_one_checkpoint_of_random_weights(tmp_path: Path) -> None:
    model = make_tiny("opt", tmp_path / "wide", vocab_size=999)
    code, folder = run_compare(
        tmp_path, "--modes", "sequential", "--peer", f"vllm={make_environment(tmp_path / 'env', ANSWERS)}",
        "--model", model, "--load_format", "dummy", "--workload", "single", "--requests", "2", "--prompt_tokens", "20",
        "--output_tokens", "3", "--kernels", "plain",
    )  # fmt: skip
    assert code == 0
    rows = pd.read_csv(folder / "comparison.csv").set_index("variant")
    own, other = rows.loc["sequential"], rows.loc["vllm"]
    asked = json.loads(str(other["version"]))
    assert asked["architecture"] == "OPTForCausalLM"
    assert (asked["model"], asked["max_concurrency"]) == (str(folder / "models" / "wide"), "1")
    assert (own["model"], own["load_format"], own["max_concurrency"]) == ("wide", "auto", 1)
    assert own["total_output_tokens"] == 6
    configuration = yaml.safe_load((folder / "runs" / own["run_id"] / "run.yaml").read_text())["configuration"]
    assert configuration["model"] == asked["model"]
    assert configuration["workload"] == asked["workload"]
    assert not (folder / "models").exists()  # which may be large


# -- what a peer's process does


class OneTokenAStep:
    """An engine that gives every request a token a step and notes how many it had at most."""

    began_s = 0.0
    version = "0"

    def __init__(self, short: int = 0) -> None:
        self.running: dict[int, int] = {}
        self.most = 0
        self.order: list[int] = []
        self._moment = 0
        self._short = short
        self._asked: dict[int, int] = {}

    def add(self, number: int, prompt: Sequence[int], new_tokens: int) -> None:
        self.order.append(number)
        self.running[number] = 0
        self._asked[number] = new_tokens - self._short
        self.most = max(self.most, len(self.running))

    def collect(self) -> Iterator[Answer]:
        for number in list(self.running):
            self.running[number] += 1
            if self.running[number] == self._asked[number]:
                made = self.running.pop(number)
                yield number, [7] * made, list(range(made))

    def close(self) -> None:
        pass


def test_the_program_needs_nothing_but_numpy_until_its_engine_starts() -> None:
    others = ("torch", "transformers", "pandas", "yaml", "tqdm", "pydantic", "psutil", "matplotlib")
    code = f"""
import runpy, sys
sys.modules |= dict.fromkeys({others})
sys.argv[1:] = ["splitwiser.study.peers.program"]
runpy.run_path("{PROGRAM}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("concurrency", [1, 2, 5])
def test_requests_in_flight_are_as_many_as_asked_for(concurrency: int) -> None:
    engine = OneTokenAStep()
    outputs = serve(engine, [[1], [2, 3], [4], [5], [6]], [3, 1, 4, 1, 5], concurrency)
    assert engine.most == concurrency
    assert engine.order == [0, 1, 2, 3, 4]
    made = {output.request_id: (output.prompt_token_ids, len(output.token_ids)) for output in outputs}
    assert made == {0: ((1,), 3), 1: ((2, 3), 1), 2: ((4,), 4), 3: ((5,), 1), 4: ((6,), 5)}


def test_requests_that_come_at_once_have_one_arrival() -> None:
    outputs = serve(OneTokenAStep(), [[1], [2], [3]], [2, 2, 2], 3)
    assert len({output.metrics.arrival_ns for output in outputs}) == 1


def test_in_the_closed_loop_a_request_arrives_when_the_last_has_ended() -> None:
    arrivals = [output.metrics.arrival_ns for output in serve(OneTokenAStep(), [[1], [2], [3]], [2, 2, 2], 1)]
    assert arrivals == sorted(set(arrivals))
    assert len(arrivals) == 3


def test_answer_of_another_length_is_a_fault() -> None:
    with pytest.raises(RuntimeError, match="request 0 has 2 tokens instead of 3"):
        serve(OneTokenAStep(short=1), [[1]], [3], 1)


@pytest.mark.parametrize(
    ("engine", "says"), [("vllm-zentorch", "zentorch is not installed"), ("vllm", "zentorch is installed")]
)
def test_vllm_runs_with_zentorch_only_where_it_is_meant_to(
    engine: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None if engine == "vllm-zentorch" else object())
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # which it sets
    with pytest.raises(RuntimeError, match=says):
        ENGINES[engine](Asked("model", "bfloat16", 10, 1, tmp_path))


def test_transformers_generates_batches_of_its_own(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitwiser.study.peers.hf.BATCH", 2)
    prompts, new_tokens = [[5, 6, 7, 8], [9], [10, 11]], [3, 5, 2]
    engine = ENGINES["hf-generate"](Asked(str(tiny("llama")), "float32", 10, 3, tmp_path))
    outputs = serve(engine, prompts, new_tokens, 3)
    module = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype="float32")
    for output in outputs:
        prompt = torch.tensor([prompts[output.request_id]])
        alone = module.generate(prompt, max_new_tokens=new_tokens[output.request_id], do_sample=False, eos_token_id=-1)
        assert output.token_ids == alone[0, prompt.shape[1] :].tolist()
    assert engine.version.startswith(f"{transformers.__version__} (float32, K and V float32, batches of 2, ")


def test_llama_cpp_gets_the_weights_of_the_checkpoint(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    convert(tiny("llama"), tmp_path / "tiny.gguf", "F32")
    expected = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype="float32")
    config = GGUFReader(tmp_path / "tiny.gguf")
    fields = {name: each.contents() for name, each in config.fields.items()}
    assert fields["llama.attention.head_count_kv"] == expected.config.num_key_value_heads
    assert fields["llama.vocab_size"] == expected.config.vocab_size
    tensors = {each.name: each.data for each in config.tensors}
    layer = expected.model.layers[0]
    assert np.array_equal(tensors["token_embd.weight"], expected.model.embed_tokens.weight.detach().numpy())
    assert np.array_equal(tensors["blk.0.ffn_down.weight"], layer.mlp.down_proj.weight.detach().numpy())
    # the rows of a head: transformers rotates row i with row i + half, GGUF row 2 i with row 2 i + 1
    rows, heads = layer.self_attn.k_proj.weight.detach().numpy(), expected.config.num_key_value_heads
    half = rows.shape[0] // heads // 2
    assert np.array_equal(tensors["blk.0.attn_k.weight"][: 2 * half : 2], rows[:half])
    assert np.array_equal(tensors["blk.0.attn_k.weight"][1 : 2 * half : 2], rows[half : 2 * half])


def test_llama_cpp_gets_no_other_architecture(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OPTForCausalLM cannot be converted"):
        convert(tiny("opt"), tmp_path / "tiny.gguf", "BF16")


def test_llama_cpp_gets_no_scaled_rotary_embedding(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny("llama"), tmp_path / "scaled")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}))
    with pytest.raises(ValueError, match="scaled scales its rotary embedding"):
        convert(copy, tmp_path / "tiny.gguf", "BF16")


def test_openvino_gets_a_checkpoint_with_a_word_for_each_token(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    with_tokenizer(tiny("llama"), tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert tokenizer("t5 t17").input_ids == [5, 17]
    assert len(tokenizer) == AutoConfig.from_pretrained(tmp_path / "copy").vocab_size
    assert (tmp_path / "copy" / "model.safetensors").samefile(tiny("llama") / "model.safetensors")
