"""The prompts that each shipped case makes, their in-context examples, and the line that each wrong file gets."""

from pathlib import Path

import pytest

from splitwiser import constants
from splitwiser.workload.cases import Case, get_case, load_cases
from splitwiser.workload.reports import Report
from tests.support.assertions import assert_says, refusal

CASES = constants.CASES
TRAINING = [Report("First Lungs  clear.", "Normal  chest."), Report("Heart\tLARGE.", "Cardiomegaly.")]
MANY = [Report(f"finding {number}", f"impression {number}") for number in range(50)]
ASKED = [Report(f"asked {number}") for number in range(20)]


def write(directory: Path, text: str) -> Path:
    path = directory / "cases.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def numbers_drawn(prompt: str) -> list[int]:
    """Numbers of the reports of ``MANY`` that stand in ``prompt`` as examples, in its order."""
    findings = [line for line in prompt.split("\n") if line.startswith("### findings: finding")]
    return [int(line.split()[3]) for line in findings]


@pytest.mark.parametrize(
    ("case_id", "prompt"),
    [
        (0, "### findings: small left effusion. ### impressions:"),
        (
            5,
            "summarize the present illness history of the patient.\n"
            "### findings: small left effusion. ### impressions:",
        ),
    ],
)
def test_prompt_without_examples(case_id: int, prompt: str) -> None:
    assert get_case(CASES, case_id).prompts([Report(" Small LEFT\n effusion. ")], [], seed=0) == [prompt]


@pytest.mark.parametrize(
    ("case_id", "prompt"),
    [
        (0, "summarize: small left effusion."),
        (1, "summarize: first lungs clear. ### summary: normal chest.\nsummarize: small left effusion. ### summary:"),
        (5, "summarize the present illness history of the patient.\nsummarize: small left effusion."),
    ],
)
def test_an_encoder_decoder_is_asked_in_its_own_words(case_id: int, prompt: str) -> None:
    case = get_case(CASES, case_id).for_encoder
    assert case.prompts([Report(" Small LEFT\n effusion. ")], TRAINING[:1], seed=0) == [prompt]


FIRST = "### findings: first lungs clear. ### summary: normal chest."
SECOND = "### findings: heart large. ### summary: cardiomegaly."
QUESTION = "### findings: small left effusion. ### summary:"


@pytest.mark.parametrize(
    ("case_id", "training", "prompt"),
    [
        (1, TRAINING[:1], f"{FIRST}\n{QUESTION}"),
        (2, TRAINING[:1] * 2, f"{FIRST}\n\n{FIRST}\n{QUESTION}"),
        (4, TRAINING[1:] * 4, f"{SECOND}\n\n{SECOND}\n\n{SECOND}\n\n{SECOND}\n{QUESTION}"),
    ],
)
def test_prompt_with_examples(case_id: int, training: list[Report], prompt: str) -> None:
    assert get_case(CASES, case_id).prompts([Report("Small left effusion.")], training, seed=0) == [prompt]


def test_examples_stand_in_the_order_given() -> None:
    assert get_case(CASES, 2).prompt_text("Small left effusion.", TRAINING) == f"{FIRST}\n\n{SECOND}\n{QUESTION}"


def test_start_prefix_stands_before_examples() -> None:
    case = Case(7, "both", examples=1, start_prefix="Read This.", insert_prefix="Q:", prompt="A:")
    assert case.prompt_text("X", [Report("E", "F")]) == "Read This.\nq: e a: f\nq: x a:"


@pytest.mark.parametrize(("case_id", "examples"), [(0, 0), (1, 1), (2, 2), (4, 4), (5, 0)])
def test_shipped_case_draws_its_number_of_examples(case_id: int, examples: int) -> None:
    prompts = get_case(CASES, case_id).prompts(ASKED, MANY, seed=0)
    assert [len(numbers_drawn(prompt)) for prompt in prompts] == [examples] * len(ASKED)


@pytest.mark.parametrize("case_id", [0, 1, 2, 4, 5])
def test_prompts_keep_the_order_of_the_reports(case_id: int) -> None:
    prompts = get_case(CASES, case_id).prompts(ASKED, MANY, seed=3)
    asked = [prompt.rpartition("### findings: ")[2].split(" ###")[0] for prompt in prompts]
    assert asked == [report.finding for report in ASKED]


def test_same_seed_draws_the_same_examples() -> None:
    case = get_case(CASES, 4)
    assert case.prompts(ASKED, MANY, seed=5) == case.prompts(ASKED, MANY, seed=5)


def test_another_seed_draws_other_examples() -> None:
    case = get_case(CASES, 4)
    assert case.prompts(ASKED, MANY, seed=5) != case.prompts(ASKED, MANY, seed=6)


def test_no_example_stands_twice_in_a_prompt() -> None:
    for prompt in get_case(CASES, 4).prompts(ASKED, MANY[:5], seed=0):
        drawn = numbers_drawn(prompt)
        assert len(set(drawn)) == 4, drawn


def test_examples_are_drawn_afresh_for_each_report() -> None:
    prompts = get_case(CASES, 2).prompts(ASKED, MANY, seed=0)
    assert len({tuple(numbers_drawn(prompt)) for prompt in prompts}) > 15


def test_the_same_examples_are_drawn_for_all_but_themselves() -> None:
    reports = [*ASKED[:3], *MANY, *ASKED[3:]]
    prompts = get_case(CASES, 4).prompts(reports, MANY, seed=0, same=True)
    drawn = [tuple(numbers_drawn(prompt)[:4]) for prompt in prompts]
    common = drawn[0]
    assert [each for each, report in zip(drawn, reports, strict=True) if report in ASKED] == [common] * len(ASKED)
    others = {number: each for number, each in enumerate(drawn[3:53]) if each != common}
    assert sorted(others) == sorted(common)
    assert all(number not in each for number, each in others.items())


def test_every_training_report_can_be_drawn() -> None:
    prompts = get_case(CASES, 4).prompts(ASKED * 5, MANY, seed=0)
    assert {number for prompt in prompts for number in numbers_drawn(prompt)} == set(range(len(MANY)))


def test_prompts_of_the_first_reports_do_not_depend_on_later_ones() -> None:
    case = get_case(CASES, 2)
    assert case.prompts(ASKED, MANY, seed=0)[:3] == case.prompts(ASKED[:3], MANY, seed=0)


def test_too_few_training_reports_are_counted() -> None:
    message = refusal(get_case(CASES, 4).prompts, ASKED, MANY[:3], 0)
    assert message == "case 4 draws 4 examples, but the training set has 3 reports"


def test_shipped_cases_are_those_of_the_original() -> None:
    assert sorted(load_cases(CASES)) == [0, 1, 2, 4, 5, 100, 200]


def test_a_key_left_out_takes_its_default(tmp_path: Path) -> None:
    cases = load_cases(write(tmp_path, "3: {description: mine}"))
    assert cases == {3: Case(3, "mine", "discrete", 0, "", "### findings:", "### impressions:", 200)}


def test_every_key_can_be_set(tmp_path: Path) -> None:
    first = "description: d, method: discrete, examples: 2, start_prefix: s"
    text = f"3: {{{first}, insert_prefix: i, prompt: p, max_new_tokens: 9, source_prefix: e, source_prompt: q}}"
    assert load_cases(write(tmp_path, text)) == {3: Case(3, "d", "discrete", 2, "s", "i", "p", 9, "e", "q")}


def test_unknown_case_lists_the_known() -> None:
    assert refusal(get_case, CASES, 3) == "unknown case '3'; known: 0, 1, 2, 4, 5, 100, 200"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    message = refusal(load_cases, path)
    assert message == f"{path}: no such file"


@pytest.mark.parametrize("text", ["0: {description: [", "a: b: c", "0: {description: x}\n\tbad"])
def test_broken_yaml_is_named(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_cases, path), f"{path}: not valid YAML: ", "line")


def test_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.yaml"
    path.write_bytes("0: {description: Größe}".encode("latin-1"))
    assert_says(refusal(load_cases, path), str(path))


@pytest.mark.parametrize("text", ["", "- 0\n- 1", "just text", "0: null prompt", "0:"])
def test_file_that_maps_no_recipes_shows_what_it_should(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_cases, path), f"{path}: must map names to entries", "0: {description: null prompt}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one: {description: x}", ["case one", "must be a whole number"]),
        ("1.5: {description: x}", ["case 1.5", "must be a whole number"]),
        ("yes: {description: x}", ["case True", "must be a whole number"]),
        ("0: {examples: 1}", ["case 0", "'description' is missing"]),
        ("0: {description: x, exemples: 1}", ["case 0", "unknown key 'exemples'", "did you mean examples"]),
        ("0: {description: x, case_id: 1}", ["case 0", "unknown key 'case_id'"]),
        ("0: {description: x, 7: 1}", ["case 0", "unknown key '7'"]),
        ("0: {description: 5}", ["case 0", "'description' must be text, not 5"]),
        ("0: {description: x, prompt: [a]}", ["case 0", "'prompt' must be text, not ['a']"]),
        ("0: {description: x, start_prefix: }", ["case 0", "'start_prefix' must be text, not None"]),
        ("0: {description: x, examples: two}", ["case 0", "'examples' must be a whole number of 0 or more, not 'two'"]),
        ("0: {description: x, examples: 1.5}", ["case 0", "'examples' must be a whole number of 0 or more, not 1.5"]),
        ("0: {description: x, examples: yes}", ["case 0", "'examples' must be a whole number of 0 or more, not True"]),
        ("0: {description: x, examples: -1}", ["case 0", "'examples'", "-1"]),
        (
            "0: {description: x, max_new_tokens: 9k}",
            ["'max_new_tokens' must be a whole number of 1 or more, not '9k'"],
        ),
        ("0: {description: x, max_new_tokens: 0}", ["case 0", "'max_new_tokens'", "1 or more", "0"]),
        ("0: {description: x, method: discret}", ["case 0", "method", "'discret'", "discrete"]),
        ("0: {description: fine}\n1: {description: x, examples: a}", ["case 1", "'examples'"]),
    ],
)
def test_wrong_recipe_is_named_with_its_key(text: str, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert_says(refusal(load_cases, path), f"{path}, ", *parts)
