"""The repository's files, and what each module imports."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "dist_trainer"
LEFT_OUT = {".git", ".venv", "runs", "dist", "__pycache__", ".pytest_cache", ".ruff_cache", "wandb"}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    module: str
    inside_function: bool
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def files_under(folder: Path) -> list[Path]:
    """Every file below `folder` that belongs to the project, sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(parent, name) for name in names if name not in LEFT_OUT]  # .git is a file in a worktree
    return sorted(found)


@cache
def imports_of_the_package() -> tuple[Import, ...]:
    return tuple(i for file in sorted(PACKAGE.rglob("*.py")) for i in _imports(file))


def _imports(file: Path) -> Iterator[Import]:
    def visit(node: ast.AST, inside_function: bool, for_types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, inside_function, for_types_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports from the package's root"
            yield Import(file, node.lineno, node.module or "", inside_function, for_types_only)
        inside_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types_only |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside_function, for_types_only)

    yield from visit(ast.parse(file.read_text("utf-8")), False, False)


def loaded_by_importing(file: Path) -> set[str]:
    """The modules, ours and others', that importing `file` loads at once, as far as our own files tell."""
    loaded: set[str] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        for found in imports_of_the_package():
            if found.file == current and not (found.inside_function or found.for_types_only) and found.module not in loaded:
                loaded.add(found.module)
                ours = REPOSITORY / (found.module.replace(".", "/") + ".py")
                if ours.is_file():
                    waiting.append(ours)
    return loaded
