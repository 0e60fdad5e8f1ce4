"""The pages of docs/extending are carried out, word by word, on a copy of the project: files, rows, tests, commands."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitwiser import constants

PROJECT = constants.DIR_PROJECT
PAGES = sorted((PROJECT / "docs" / "extending").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The page's code blocks: language, file (empty for none), text."""
    return [(match[1], match[2] or "", match[3]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]


def apply_hunk(path: Path, hunk: str) -> None:
    """Replace the lines of a diff without line numbers, which must be in the file once."""
    before = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " -")
    after = "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in " +")
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{path} has these lines {text.count(before)} times, not once:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that has been extended as all pages say."""
    copy = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests", "scripts", "configs", "models", "docs"):
        shutil.copytree(PROJECT / folder, copy / folder, ignore=ignored)
    shutil.copy(PROJECT / "pyproject.toml", copy)
    for page in PAGES:
        for language, file, text in blocks(page):
            if file and language == "diff":
                for hunk in text.split("@@\n"):
                    apply_hunk(copy / file, hunk)
            elif file:
                assert not (copy / file).exists()
                (copy / file).write_text(text, encoding="utf-8")
    return copy


@pytest.fixture
def environment(extended: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(extended / "src"))
    monkeypatch.chdir(extended)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_adds_a_file_a_row_and_a_test(page: Path) -> None:
    files = [(language, file.split("/")[0]) for language, file, _ in blocks(page) if file]
    assert ("diff", "src") in files
    assert ("python", "tests") in files
    assert files.count(("python", "src")) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_pages_tests_pass() -> None:
    tests = [file for page in PAGES for _, file, _ in blocks(page) if file.startswith("tests/")]
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_extended_code_is_as_clean_as_ours() -> None:
    for tool in (["ruff", "check", "src", "tests"], ["ruff", "format", "--check", "src", "tests"]):
        done = subprocess.run([sys.executable, "-m", *tool], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_the_pages_commands_run(extended: Path, tmp_path: Path) -> None:
    lines = [
        line for page in PAGES for language, _, text in blocks(page) if language == "bash" for line in text.splitlines()
    ]
    given = [
        [*shlex.split(line, comments=True)[1:], "--results", str(tmp_path)] for line in lines if "splitwiser" in line
    ]
    assert len(given) == len(PAGES)
    for line in lines:
        if "splitwiser" not in line:
            subprocess.run(line, shell=True, cwd=extended, check=True)
    program = f"from splitwiser.cli import main\nassert [main(each) for each in {given}] == [0] * {len(given)}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
