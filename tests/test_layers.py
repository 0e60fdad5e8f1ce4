"""Imports go downwards only, as pyproject.toml lays down, and no folder is one that nobody finds their way in."""

from collections import Counter

import pytest
from importlinter.cli import lint_imports

from splitwiser import constants

MOST_MODULES = 20


def test_imports_keep_to_the_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code = lint_imports(str(constants.DIR_PROJECT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert exit_code == 0, capsys.readouterr().out


def test_no_folder_has_more_modules_than_one_takes_in() -> None:
    modules = (constants.DIR_PROJECT / "src" / "splitwiser").rglob("*.py")
    folders = Counter(str(path.parent) for path in modules if path.name != "__init__.py")
    assert {folder: count for folder, count in folders.items() if count > MOST_MODULES} == {}
