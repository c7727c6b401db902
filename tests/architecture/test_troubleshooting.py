"""docs/troubleshooting.md quotes only messages that the program still says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from dist_trainer import errors
from tests.architecture.sources import PACKAGE, REPOSITORY, files_under

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
TABLES = re.findall(r"^\| message \|.*?\n\|---\|---\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
MESSAGES = [message for table in TABLES for message in re.findall(r"^\| `(.*?)` \| ", table, re.MULTILINE)]


def strings(node: ast.AST, *, things: bool = True) -> Iterator[str]:
    """Each text in a module but docstrings; what is filled in stands as an ellipsis, and of what `counted` fills in, where
    `things` are asked for, its things follow: `... rows`.
    """
    docstrings = {id(part.value) for part in ast.walk(node) if isinstance(part, ast.Expr)}
    for part in ast.walk(node):
        if id(part) in docstrings:
            continue
        if isinstance(part, ast.JoinedStr):
            yield "".join(
                str(value.value) if isinstance(value, ast.Constant) else "..." + (_thing(value) if things else "")
                for value in part.values
            )
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def _thing(filled_in: ast.AST) -> str:
    match filled_in:
        case ast.FormattedValue(value=ast.Call(func=ast.Name(id="counted"), args=[_, ast.Constant(value=thing), *_])):
            return f" {thing}s"
    return ""


@cache
def said() -> str:
    """All that the package and its scripts can say, a text a line."""
    texts = [text for file in PACKAGE.rglob("*.py") for text in strings(ast.parse(file.read_text("utf-8")))]
    scripts = [file for name in ("launch", "slurm") for file in files_under(REPOSITORY / name) if file.suffix == ".sh"]
    for script in scripts:
        texts += re.sub(r'" ?\\\n\s*"', " ", script.read_text("utf-8")).splitlines()
    return "\n".join(text.replace("\n", " ") for text in texts)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_still_contains_it(message: str) -> None:
    assert re.search(".*?".join(map(re.escape, message.split("..."))), said()), "no string in the source is like this"


def test_every_row_quotes_a_message_and_none_appears_twice() -> None:
    assert len(MESSAGES) == sum(table.count("\n") for table in TABLES) > 50
    assert len(set(MESSAGES)) == len(MESSAGES)


def test_every_exit_code_is_explained() -> None:
    codes = {error.exit_code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, Exception)}
    assert codes == {1, 2, 3, 75}
    assert {int(code) for code in re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)} == codes | {0}
