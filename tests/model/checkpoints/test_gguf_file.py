"""GGUF files: served as transformers reads them, with what its conversion leaves out, and each bad one told in a line."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import gguf_to_checkpoint
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitwiser import LLM, SamplingParams
from splitwiser.doctor.config import DoctorConfig
from splitwiser.doctor.needs import find_needs
from splitwiser.model.checkpoints import gguf_file
from splitwiser.model.checkpoints.catalog import check_model, resolve_model
from splitwiser.model.checkpoints.checkpoint import describe_files
from splitwiser.model.checkpoints.gguf_file import read_header
from splitwiser.model.loading import LoadedModel, load_model
from tests.support.assertions import assert_says, refusal
from tests.support.commands import invoke
from tests.support.gguf_files import TEMPLATE, TOKENS, write_gguf

pytest.importorskip("gguf", reason="GGUF files need the extra gguf")

PROMPTS = [[5, 30, 60, 90], [7] * 40, [100, 200], list(range(20, 50))]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf")


@pytest.fixture(scope="module")
def model(file: Path) -> LoadedModel:
    return load_model(file, dtype="float32", device="cpu", load_format="auto")


@pytest.mark.parametrize("mode", ["sequential", pytest.param("mp", marks=pytest.mark.slow)])
def test_tokens_are_those_of_transformers(mode: str, file: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    generate = cast("Callable[..., torch.Tensor]", reference.generate)
    with LLM(file, mode=mode) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=20))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        assert output.token_ids == tokens[0, len(prompt) :].tolist()


def test_a_file_goes_by_its_name_and_the_record_says_what_was_converted(file: Path, model: LoadedModel) -> None:
    assert (model.name, resolve_model(file).location) == ("tiny.Q8_0", str(file))
    (note,) = model.notes
    assert_says(note, "the weights are Q8_0 and F32 in a GGUF file", "converted to float32 in")
    assert "tiny.Q8_0.gguf" in describe_files(resolve_model(file))


def test_text_is_split_as_the_file_says_and_special_tokens_are_its_own(model: LoadedModel) -> None:
    tokenizer = model.tokenizer
    assert tokenizer is not None
    # by GPT-2's rule, which transformers takes, the second blank would belong to the number
    assert tokenizer.tokenize("a  12lu") == ["a", "ĠĠ", "1", "2", "lu"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.chat_template, tokenizer.model_max_length) == (TEMPLATE, 256)


def test_files_beside_it_are_not_its_own(file: Path, chatty: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatty, tmp_path / "both")
    shutil.copy(file, folder)
    model = load_model(folder / file.name, dtype="float32", device="cpu", load_format="auto")
    assert model.tokenizer is not None
    assert (len(model.tokenizer), model.tokenizer.chat_template) == (len(TOKENS), TEMPLATE)
    assert model.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


@pytest.mark.parametrize(("metadata", "ends"), [({}, {2}), ({"tokenizer__ggml__eot_token_id": 3}, {2, 3})])
def test_every_token_that_ends_an_answer_is_known(metadata: dict[str, Any], ends: set[int], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "ends.gguf", **metadata)
    for weights in (True, False):
        model = load_model(file, dtype="float32", device="cpu", load_format="auto", weights=weights)
        assert model.eos_token_ids == ends


@pytest.mark.parametrize(
    ("kind", "dtype", "served"),
    [
        ("Q8_0", "bfloat16", torch.bfloat16),
        ("Q4_1", "auto", torch.float32),
        ("F16", "auto", torch.float16),
        ("BF16", "auto", torch.bfloat16),
    ],
)
def test_weights_are_converted_to_the_type_asked_for(
    kind: str, dtype: str, served: torch.dtype, tmp_path: Path
) -> None:
    model = load_model(write_gguf(tmp_path / "x.gguf", kind), dtype=dtype, device="cpu", load_format="auto")
    assert {parameter.dtype for parameter in model.module.parameters()} == {served}


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"pre": "poro-chat"}, "how the file splits text (poro-chat)"),
        ({"llama__rope__scaling__type": "yarn"}, "rotary"),
    ],
)
def test_what_transformers_leaves_out_for_good_is_said(metadata: dict[str, Any], part: str, tmp_path: Path) -> None:
    model = load_model(write_gguf(tmp_path / "x.gguf", **metadata), dtype="float32", device="cpu", load_format="auto")
    assert_says(model.notes[-1], part)


def test_its_shape_can_be_built_with_random_weights(file: Path) -> None:
    model = load_model(file, dtype="float32", device="cpu", load_format="dummy")
    assert (model.weights, model.module.config.num_hidden_layers) == ("drawn with seed 0", 2)


def test_the_doctor_knows_what_it_needs(file: Path) -> None:
    needs = find_needs(DoctorConfig(model=str(file)), torch.device("cpu"), 1 << 34, "no network")
    assert (needs.problem, needs.text, needs.dispatch) == (None, None, None)


def test_a_checkpoint_made_of_it_is_the_same_model(file: Path, model: LoadedModel, tmp_path: Path) -> None:
    gguf_to_checkpoint.convert(file, tmp_path / "made", "float32")
    made = load_model(tmp_path / "made", dtype="float32", device="cpu", load_format="auto")
    weights = zip(made.module.state_dict().values(), model.module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert (made.notes, set(made.eos_token_ids), made.special_token_ids) == ([], {2}, model.special_token_ids)
    assert made.tokenizer is not None
    assert (made.tokenizer.tokenize("a  12"), made.tokenizer.chat_template) == (["a", "ĠĠ", "1", "2"], TEMPLATE)
    assert_says(refusal(gguf_to_checkpoint.convert, file, tmp_path / "made", "float32"), "is not an empty folder")


def test_a_file_cut_anywhere_is_told_by_the_command(file: Path, tmp_path: Path) -> None:
    content, start = file.read_bytes(), read_header(file).data_start
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 10, 30, 500, start - 300, start - 40):
        cut.write_bytes(content[:length])
        assert_says(refusal(check_model, cut), f"model {cut}: not a GGUF file of version 2 or 3, or truncated")
    for length in (start + 5, len(content) - 40):
        cut.write_bytes(content[:length])
        done = invoke("run", "--model", cut, "--results", tmp_path / "out")
        assert done.returncode == 2
        assert_says(done.stderr, f"model {cut}: truncated: it has {length:,} of ")


def test_what_transformers_cannot_read_is_told(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = write_gguf(tmp_path / "other.gguf", architecture="rwkv6")
    wrong = "GGUF model with architecture rwkv6 is not supported"
    assert_says(refusal(load_model, other, dtype="float32", device="cpu", load_format="auto"), "model other: ", wrong)
    part = write_gguf(tmp_path / "part.gguf", split__count=3)
    assert_says(refusal(check_model, part), f"model {part}: is one of 3 parts", "llama-gguf-split --merge")
    assert refusal(check_model, tmp_path / "no.gguf") == f"model {tmp_path}/no.gguf: no such file"
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None if name == "gguf" else importlib.util.find_spec(name))
    assert_says(refusal(check_model, file), f"model {file}: reading it needs the 'gguf' package; pip install gguf")
