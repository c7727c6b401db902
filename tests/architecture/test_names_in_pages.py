"""Names of Python things in the documentation are names that the code has, in the file that the documentation says, and
attributes of a user's model those that it reads.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.architecture.sources import PACKAGE, REPOSITORY

TREES = [ast.parse(file.read_text("utf-8")) for file in PACKAGE.rglob("*.py")]
PAGES = {name: (REPOSITORY / "docs" / name).read_text("utf-8") for name in ("extending.md", "library.md")}
"""The pages for people who write Python."""
OF_A_MODEL = {"model", "module"}
NOT_OF_THE_USERS = {
    "module": "DistributedDataParallel's",
    "find_unused_parameters": "DistributedDataParallel's",
    "weight": "torch's own modules'",
    "get_output_embeddings": "transformers' models'",
    "generation_config": "transformers' models'",
}

NOT_DEFINED_THERE = {
    "model.init_from": "a key",
    "metrics.jsonl": "a file",
    "status.json": "a file",
    "StoppedError": "of errors.py",
}
"""In the prose of "Where things happen"."""


def nodes() -> Iterator[ast.AST]:
    for tree in TREES:
        yield from ast.walk(tree)


def names_in_the_code() -> set[str]:
    """Of modules, classes, functions, arguments, attributes, variables; and texts that are names, as `getattr` takes them."""
    found = {file.stem for file in PACKAGE.rglob("*.py")}
    for node in nodes():
        values = (getattr(node, field, None) for field in ("id", "attr", "arg", "name", "value", "module"))
        found |= {part for value in values if isinstance(value, str) and " " not in value for part in re.findall(r"\w+", value)}
    return found


def read_of_a_model() -> set[str]:
    """The attributes that are asked for of something named model or module, which may lack them."""
    found = set()
    for node in nodes():
        match node:
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"), args=[ast.Name(id=owner), ast.Constant(value=str(name)), *_]
            ):
                found |= {name} if owner in OF_A_MODEL else set()
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr"),
                args=[ast.Call(args=[ast.Attribute(attr=owner)]), ast.Constant(value=str(name)), *_],
            ):
                found |= {name} if owner in OF_A_MODEL else set()
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_python_name_in_a_page_is_one_of_the_code(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    named = {code for code in re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", prose) if not code.endswith((".md", ".py"))}
    known = names_in_the_code()
    assert len(named) > 10
    assert {code for code in named if not known.issuperset(code.split("."))} == set()


def test_the_optional_attributes_of_a_model_are_those_that_are_read() -> None:
    table = re.search(
        r"^\| optional attribute of a model .*?\n\|---\|---\|\n((?:\|.*\n)+)", PAGES["extending.md"], re.MULTILINE
    )
    assert table is not None
    documented = re.findall(r"^\| `(\w+)` \|", table[1], re.MULTILINE)
    assert set(documented) == read_of_a_model() - NOT_OF_THE_USERS.keys()


def test_what_nothing_reads_would_be_found() -> None:
    assert not {"blocks", "no_such_attribute"} & read_of_a_model()
    assert "no_such_attribute" not in names_in_the_code()


def definitions(tree: ast.Module) -> set[str]:
    """`name` of each function, class and constant of a module, and `Class.name` of each method."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def places_named() -> list[tuple[str, str]]:
    """(file, name in it) of each place in "Where things happen" of docs/architecture.md; the name is empty for a file alone."""
    page = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    section = page.partition("## Where things happen\n")[2].partition("\n## ")[0]
    places, file = [], ""
    for code in re.findall(r"`([\w./]+)`", re.sub(r"^\| [^|]+ \|", "|", section, flags=re.MULTILINE)):
        if code.endswith(".py"):
            file = code
            places.append((file, ""))
        elif code not in NOT_DEFINED_THERE:
            places.append((file, code))
    return places


def test_things_happen_where_the_page_says() -> None:
    places = places_named()
    assert len(places) > 80
    wrong = []
    for file, name in places:
        path = PACKAGE / file
        known = definitions(ast.parse(path.read_text("utf-8"))) if path.is_file() else set()
        if not path.is_file() or (name and name not in known):
            wrong.append(f"{file}: {name}")
    assert not wrong, "\n".join(wrong)
