"""Imports go downwards only, as pyproject.toml lays down, and no folder is one that nobody finds their way in."""

import re
import subprocess
import sys
from collections import Counter

from splitwiser import constants

MOST_MODULES = 20
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_imports_keep_to_the_contracts() -> None:
    # in a process of its own, since it sets up Python's logging anew
    command = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    linted = subprocess.run(command, cwd=constants.DIR_PROJECT, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout


def test_no_folder_has_more_modules_than_one_takes_in() -> None:
    modules = (constants.DIR_PROJECT / "src" / "splitwiser").rglob("*.py")
    folders = Counter(str(path.parent) for path in modules if path.name != "__init__.py")
    assert {folder: count for folder, count in folders.items() if count > MOST_MODULES} == {}


def test_vllm_is_imported_only_where_its_own_environment_runs() -> None:
    source = constants.DIR_PROJECT / "src" / "splitwiser"
    imports = re.compile(r"^\s*(import|from) vllm\b", re.MULTILINE)
    found = {str(path.relative_to(source)) for path in source.rglob("*.py") if imports.search(path.read_text())}
    theirs = {f"vllm_backend/{name}.py" for name in ("connector", "engine", "loader")}
    assert found == theirs | {"study/peers/vllm.py"}
