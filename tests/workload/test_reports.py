"""Reports from every kind of source, and the line that each wrong source gets."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from splitwiser import constants
from splitwiser.workload.reports import SPLITS, Report, load_reports, load_tok
from tests.support.assertions import assert_says, refusal

datasets = pytest.importorskip("datasets")

FINDINGS = ["the lungs are clear, both of them.", 'a "nodule" in the left lung', "größe 3 mm"]
IMPRESSIONS = ["no acute process", "nodule", "unverändert"]
REPORTS = [Report(finding, impression) for finding, impression in zip(FINDINGS, IMPRESSIONS, strict=True)]
TABLE: dict[str, list[Any]] = {"study": [1, 2, 3], "findings": list(FINDINGS), "impression": list(IMPRESSIONS)}


def write_tok(directory: Path, findings: str | bytes, impressions: str | bytes, split: str = "test") -> Path:
    directory.mkdir(exist_ok=True)
    for part, content in (("findings", findings), ("impression", impressions)):
        raw = content if isinstance(content, bytes) else content.encode()
        (directory / f"{split}.{part}.tok").write_bytes(raw)
    return directory


def lines(texts: Sequence[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def write_table(path: Path, table: Mapping[str, Sequence[Any]]) -> Path:
    frame = pd.DataFrame(table)
    match path.suffix:
        case ".csv":
            frame.to_csv(path, index=False)
        case ".parquet":
            frame.to_parquet(path, index=False)
        case _:
            rows = frame.to_dict("records")
            path.write_text(lines([json.dumps(row, ensure_ascii=False) for row in rows]), encoding="utf-8")
    return path


def save_dataset(path: Path, table: Mapping[str, Sequence[Any]]) -> Path:
    datasets.Dataset.from_dict(dict(table)).save_to_disk(path)
    return path


def write_any(path: Path, table: Mapping[str, Sequence[Any]]) -> Path:
    return write_table(path, table) if path.suffix else save_dataset(path, table)


NAMES = ["reports.csv", "reports.jsonl", "reports.parquet", "reports"]
tables = pytest.mark.parametrize("name", NAMES, ids=["csv", "jsonl", "parquet", "datasets"])


# .tok sets


@pytest.mark.parametrize("split", SPLITS)
def test_tok_set_pairs_the_lines_of_its_split(split: str, tmp_path: Path) -> None:
    for each in SPLITS:
        write_tok(tmp_path, f"finding of {each}\nsecond\n", f"impression of {each}\nother\n", each)
    expected = [Report(f"finding of {split}", f"impression of {split}"), Report("second", "other")]
    assert load_tok(tmp_path, split) == expected
    assert load_reports(tmp_path, split) == expected
    assert load_reports(str(tmp_path), split) == expected


@pytest.mark.parametrize(
    ("findings", "impressions"),
    [
        pytest.param("  a b \nc", "x\n y\t", id="spaces around a line and no last newline"),
        pytest.param("a b\r\nc\r\n", "x\r\ny\r\n", id="Windows line ends"),
    ],
)
def test_tok_lines_are_stripped(findings: str, impressions: str, tmp_path: Path) -> None:
    assert load_tok(write_tok(tmp_path, findings, impressions), "test") == [Report("a b", "x"), Report("c", "y")]


def test_tok_reference_may_be_empty(tmp_path: Path) -> None:
    assert load_tok(write_tok(tmp_path, "a\nb\n", "\ny\n"), "test") == [Report("a", ""), Report("b", "y")]


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"], ids=ascii)
def test_only_a_newline_ends_a_tok_line(character: str, tmp_path: Path) -> None:
    finding = f"lungs{character}clear"
    assert load_tok(write_tok(tmp_path, f"{finding}\nb\n", "x\ny\n"), "test") == [
        Report(finding, "x"),
        Report("b", "y"),
    ]


@pytest.mark.parametrize("part", ["findings", "impression"])
def test_missing_tok_file_is_named(part: str, tmp_path: Path) -> None:
    write_tok(tmp_path, "a\n", "x\n")
    missing = tmp_path / f"test.{part}.tok"
    missing.unlink()
    assert_says(
        refusal(load_tok, tmp_path, "test"), f"{missing}: no such file", "test.findings.tok", "test.impression.tok"
    )


def test_directory_without_a_set_says_what_a_set_needs(tmp_path: Path) -> None:
    assert_says(refusal(load_reports, tmp_path, "train"), "train.findings.tok: no such file", "a .tok set needs")


def test_differing_line_counts_are_given(tmp_path: Path) -> None:
    message = refusal(load_tok, write_tok(tmp_path, "a\nb\nc\n", "x\ny\n"), "test")
    assert_says(message, "test.findings.tok has 3 lines", "test.impression.tok has 2", "one report per line")


def test_empty_finding_is_named_by_its_line(tmp_path: Path) -> None:
    message = refusal(load_tok, write_tok(tmp_path, "a\n \t\nc\n", "x\ny\nz\n"), "test")
    assert_says(message, "test.findings.tok, line 2: empty", "every line holds one report's findings")


@pytest.mark.parametrize("load", [load_tok, load_reports])
def test_unknown_tok_split_lists_the_splits(load: Callable[..., object], tmp_path: Path) -> None:
    assert (
        refusal(load, tmp_path, "valid") == "unknown split 'valid'; did you mean validate? known: train, validate, test"
    )


def test_tok_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    message = refusal(load_tok, write_tok(tmp_path, "lungs clear ä\n".encode("latin-1"), "x\n"), "test")
    assert_says(message, "test.findings.tok", "utf-8")


# tables and datasets


@tables
def test_table_gives_its_reports_in_order(name: str, tmp_path: Path) -> None:
    assert load_reports(write_any(tmp_path / name, TABLE), "test") == REPORTS


@tables
def test_columns_may_have_other_names(name: str, tmp_path: Path) -> None:
    table = {"findings": ["not this"] * 3, "Text in": FINDINGS, "summary": IMPRESSIONS}
    assert load_reports(write_any(tmp_path / name, table), "test", "Text in", "summary") == REPORTS


@tables
def test_reference_column_may_be_missing(name: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, {"study": [1, 2, 3], "findings": FINDINGS})
    assert load_reports(source, "test") == [Report(finding) for finding in FINDINGS]


@tables
def test_single_references_may_be_missing(name: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, {"findings": ["a", "b"], "impression": ["x", None]})
    assert load_reports(source, "test") == [Report("a", "x"), Report("b", "")]


@tables
def test_text_is_stripped_at_its_ends_only(name: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, {"findings": [" a\n\nb "], "impression": ["\tx y\n"]})
    assert load_reports(source, "test") == [Report("a\n\nb", "x y")]


@tables
@pytest.mark.parametrize("text", ["None", "NA", "null", "12", "1e5", "2024-01-05", "True"])
def test_text_stays_text_whatever_it_looks_like(name: str, text: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, {"findings": [text, text], "impression": [text, text]})
    assert load_reports(source, "test") == [Report(text, text)] * 2


@tables
def test_missing_column_is_named_with_those_there(name: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, TABLE)
    message = refusal(load_reports, source, "test", "finding")
    assert_says(
        message,
        f"--data {source}: unknown column of --finding_column 'finding'; did you mean findings?",
        "study, findings, impression",
    )


@tables
@pytest.mark.parametrize("empty", ["  ", None], ids=["blank", "none"])
def test_finding_without_text_is_named_by_its_row(name: str, empty: str | None, tmp_path: Path) -> None:
    source = write_any(tmp_path / name, {"findings": ["a", empty, "c"], "impression": ["x", "y", "z"]})
    assert refusal(load_reports, source, "test") == f"--data {source}, row 2: column 'findings' holds no text"


@pytest.mark.parametrize("name", ["reports.jsonl", "reports.parquet"])
def test_findings_that_are_numbers_are_refused(name: str, tmp_path: Path) -> None:
    source = write_table(tmp_path / name, {"findings": [1.5, 2.5]})
    assert_says(refusal(load_reports, source, "test"), f"{source}, row 1", "'findings' holds no text")


@pytest.mark.parametrize("name", ["reports.csv", "reports.jsonl", "reports.parquet"])
def test_table_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    source = write_table(tmp_path / name, {"findings": [], "impression": []})
    assert refusal(load_reports, source, "test") == f"--data {source}: no reports in it; at least one is needed"


@pytest.mark.parametrize("content", ["", "\n"], ids=["no byte", "a blank line"])
@pytest.mark.parametrize("name", ["reports.csv", "reports.jsonl"])
def test_empty_file_is_refused_as_empty(name: str, content: str, tmp_path: Path) -> None:
    source = tmp_path / name
    source.write_text(content, encoding="utf-8")
    assert refusal(load_reports, source, "test") == f"--data {source}: no reports in it; at least one is needed"


def test_empty_tok_set_is_refused(tmp_path: Path) -> None:
    source = write_tok(tmp_path, "", "")
    assert refusal(load_reports, source, "test") == f"--data {source}: no reports in it; at least one is needed"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("reports.jsonl", b'{"findings": "a"\n'),
        ("reports.jsonl", b'{"findings": "a"} and more\n'),
        ("reports.jsonl", b'{"findings": "\xff"}\n'),
        ("reports.csv", b'findings\n"a\n'),
        ("reports.csv", b"findings,impression\na,x\nb,y,z\n"),
        ("reports.csv", b"findings\n\xff\n"),
        ("reports.parquet", b"no parquet at all"),
        ("reports.parquet", b""),
    ],
)
def test_broken_file_is_named_with_what_it_should_be(name: str, content: bytes, tmp_path: Path) -> None:
    source = tmp_path / name
    source.write_bytes(content)
    assert_says(refusal(load_reports, source, "test"), f"--data {source}: cannot be read as {source.suffix[1:]}: ")


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    source = tmp_path / "reports.jsonl"
    source.write_text('{"findings": "a"}\n\n{"findings": "b"}\n{"findings": "c" "d"}\n', encoding="utf-8")
    assert_says(refusal(load_reports, source, "test"), "line 4: ", "column 18")


@pytest.mark.parametrize("name", ["reports.csv", "reports.jsonl", "test.findings.tok"])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    if name.endswith(".tok"):
        source = write_tok(tmp_path, lines(FINDINGS), lines(IMPRESSIONS))
    else:
        source = write_table(tmp_path / name, TABLE)
    marked = tmp_path / name
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes())
    assert load_reports(source, "test") == REPORTS


def test_csv_rows_longer_than_the_header_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "reports.csv"
    source.write_text("findings,impression\nlungs clear, no effusion,normal\n", encoding="utf-8")
    assert_says(refusal(load_reports, source, "test"), str(source))


@pytest.mark.parametrize("column", ["findings", "impression"])
def test_half_of_a_surrogate_pair_is_named_by_its_row(column: str, tmp_path: Path) -> None:
    source = tmp_path / "reports.jsonl"
    cut = {"findings": "clear", "impression": "normal"} | {column: "seen \ud83d"}
    source.write_text(f'{{"findings": "a", "impression": "b"}}\n{json.dumps(cut)}\n', encoding="utf-8")
    assert_says(
        refusal(load_reports, source, "test"), f"--data {source}, row 2: column '{column}': character 6", "U+D83D"
    )


@pytest.mark.parametrize("line", ['["a", "b"]', '"a"', "3", "null"])
def test_jsonl_lines_that_are_no_objects_are_refused(line: str, tmp_path: Path) -> None:
    source = tmp_path / "reports.jsonl"
    source.write_text(f"{line}\n", encoding="utf-8")
    assert_says(refusal(load_reports, source, "test"), str(source))


@pytest.mark.parametrize("name", ["reports.txt", "reports"])
def test_unknown_ending_lists_the_known(name: str, tmp_path: Path) -> None:
    source = tmp_path / name
    source.write_text("a\n", encoding="utf-8")
    message = refusal(load_reports, source, "test")
    assert message == f"--data {source}: unknown ending '{source.suffix}'; known: .jsonl, .csv, .parquet"


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "nowhere.csv", "../nowhere/reports.jsonl"])
def test_missing_path_is_no_name_of_a_dataset(source: str) -> None:
    assert refusal(load_reports, source, "test") == f"--data {source}: no such file or directory"


def test_saved_dataset_dict_gives_the_split(tmp_path: Path) -> None:
    sets = {split: datasets.Dataset.from_dict({"findings": [f"of {split}"]}) for split in SPLITS}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    assert load_reports(tmp_path / "saved", "validate") == [Report("of validate")]


def test_missing_split_of_a_saved_dataset_lists_those_there(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"findings": ["a"]})}).save_to_disk(tmp_path / "saved")
    message = refusal(load_reports, tmp_path / "saved", "test")
    assert message == f"unknown split of --data {tmp_path / 'saved'} 'test'; known: train"


def test_damaged_saved_dataset_is_named(tmp_path: Path) -> None:
    source = save_dataset(tmp_path / "saved", TABLE)
    (source / "state.json").write_text("{", encoding="utf-8")
    assert_says(refusal(load_reports, source, "test"), f"--data {source}", "'datasets' cannot load it")


def test_name_is_asked_of_the_hub_with_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_dict(TABLE)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_reports("someone/reports", "validate") == REPORTS
    assert asked == [("someone/reports", "validate")]


def test_hub_set_without_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"findings": []}))
    assert refusal(load_reports, "a/b", "test") == "--data a/b: no reports in it; at least one is needed"


def test_name_that_the_hub_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: str) -> Any:
        raise ConnectionError(f"cannot reach the hub for {name}\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal(load_reports, "someone/reports", "test")
    assert_says(message, "--data someone/reports: not a file", "'datasets' cannot load it", "cannot reach the hub")


def test_missing_datasets_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_says(refusal(load_reports, "someone/reports", "test"), "--data someone/reports", "pip install datasets")


# the shipped sets


def test_shipped_sets_have_their_sizes() -> None:
    sizes = {split: len(load_tok(constants.DIR_DATA, split)) for split in SPLITS}
    assert sizes == {"train": 2000, "validate": 200, "test": 200}


def test_every_shipped_report_has_a_reference() -> None:
    assert all(report.impression for split in SPLITS for report in load_tok(constants.DIR_DATA, split))


@pytest.mark.parametrize(("one", "other"), [("train", "validate"), ("train", "test"), ("validate", "test")])
def test_shipped_sets_share_no_finding(one: str, other: str) -> None:
    first, second = ({report.finding for report in load_tok(constants.DIR_DATA, split)} for split in (one, other))
    assert not first & second
