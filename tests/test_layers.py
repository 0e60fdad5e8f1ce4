"""Imports go downwards only: which package may use which, and no folder that nobody finds their way in."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitwiser import constants

SOURCE = constants.DIR_PROJECT / "src" / "splitwiser"
MOST_MODULES = 20
SHARED = {"constants", "errors", "files", "formats", "options", "request", "text"}  # everybody may use these
MAY_USE = {  # a package, or a module beside them: what it may use besides
    "machine": set(),
    "workload": set(),
    "model": {"machine"},
    "engine": {"model", "machine"},
    "placement": {"engine", "model", "machine"},
    "results": {"engine", "workload", "machine"},
    "config": {"placement", "workload", "results"},
    "llm": {"placement", "engine", "model", "workload", "machine"},
    "check": {"config", "placement", "model", "workload"},
    "doctor": {"placement", "workload", "model", "machine", "results"},
    "study": {"check", "llm", "config", "results", "placement", "engine", "workload", "model", "machine"},
    "run": {"llm", "config", "results", "engine", "workload", "machine"},
    "commands": {"run", "study", "doctor", "config", "results", "model", "workload"},
    "cli": {"commands"},
    "run_server": {"cli"},
    "__main__": {"cli"},
    "__init__": {"llm", "config", "placement"},
}


def modules() -> dict[str, Path]:
    """Every module by its name below the package, such as ``engine.worker``; a package by its own."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(path: Path) -> Iterator[str]:
    """The modules below the package that ``path`` imports anywhere."""
    known = modules()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "splitwiser" and rest in known:
                yield rest


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_uses_only_what_lies_below_it(name: str) -> None:
    room = name.partition(".")[0]
    allowed = SHARED | {room} | (set() if room in SHARED else MAY_USE[room])
    used = {each.partition(".")[0] for each in imports(modules()[name])}
    assert used <= allowed, f"{name} imports {sorted(used - allowed)}"


def test_no_two_modules_need_each_other() -> None:
    graph = {name: set(imports(path)) - {name} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a cycle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for each in graph[name]:
                visit(each, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_folder_has_more_modules_than_one_takes_in() -> None:
    folders: dict[Path, int] = defaultdict(int)
    for path in modules().values():
        folders[path.parent] += path.name != "__init__.py"
    assert {str(folder): count for folder, count in folders.items() if count > MOST_MODULES} == {}
