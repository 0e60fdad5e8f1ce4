"""The pages under docs/: those that follow from the code, and the site that is built from all."""

import subprocess
import sys
from pathlib import Path

import pytest
import write_docs

from splitwiser import constants


@pytest.mark.parametrize("page", write_docs.PAGES)
def test_a_page_is_what_the_code_writes(page: str) -> None:
    assert (write_docs.DOCS / page).read_text(encoding="utf-8") == write_docs.PAGES[page](), "run scripts/write_docs.py"


def test_every_column_is_described() -> None:
    described = [each for tables in write_docs.TABLES.values() for columns in tables.values() for each in columns]
    assert len(described) > 100
    assert [each.name for each in described if not each.description.endswith(".")] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="building the pages needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=constants.DIR_PROJECT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "results/reference/cpu-amd-zen5-avx512-bf16-2-cores/report.png" in (
        tmp_path / "studies" / "index.html"
    ).read_text(encoding="utf-8")
