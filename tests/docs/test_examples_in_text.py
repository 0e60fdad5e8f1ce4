"""What README and docs tell readers to type, and where they send them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import write_docs

from splitwiser import constants

PROJECT = constants.DIR_PROJECT
README = PROJECT / "README.md"
PAGES = [
    README,
    *sorted((PROJECT / "docs").rglob("*.md")),
    *(PROJECT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
]


def identify(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def code(page: Path, language: str) -> list[str]:
    """The code blocks of a language that are no files."""
    found: list[str] = re.findall(
        rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return found


def commands(page: Path) -> list[list[str]]:
    """Every ``splitwiser`` command in the page's code and tables, without a placeholder for a folder."""
    lines = [line for block in code(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^\| `(splitwiser [^`]*)`", page.read_text(encoding="utf-8"), re.MULTILINE)
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[each.index("splitwiser") :] for each in words if "splitwiser" in each[:4]]


def test_the_readme_is_short_and_its_code_is_fenced() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert 150 <= len(lines) <= 190
    fenced = False
    for line in lines:
        fenced ^= line.startswith("```")
        assert fenced or not line.startswith("    ")


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_commands_have_options_that_exist(page: Path) -> None:
    for _, name, *arguments in commands(page):
        given = [each.replace("$HOME", "/home/me") for each in arguments if each != "|"]
        write_docs.parser_of(name).parse_args(given)


def test_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 40


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links_lead_to_files_of_the_project(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.slow
def test_the_readmes_program_runs(tmp_path: Path) -> None:
    (program,) = code(README, "python")
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\[(\d+(, )?){64}\] length [\d.]+\n", done.stdout)
