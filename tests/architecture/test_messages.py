"""Messages read well for one of a thing, `1 row`, and for any type, `an int`."""

from __future__ import annotations

import ast
import re

import pytest

from dist_trainer.errors import type_named
from tests.architecture.sources import PACKAGE
from tests.architecture.test_troubleshooting import strings

THINGS = (
    "batches bytes checkpoints columns conversations documents epochs examples files layers lines machines processes questions "
    "ranks records restarts rows runs samples sequences steps tensors times tokens validations values words"
)
NUMBER_AND_THING = re.compile(rf"(%d|\.\.\.)(?: \w+)? (?:{THINGS.replace(' ', '|')})\b(?!/)")
NEVER_ONE = {
    "checkpoint/folders.py: ... has checkpoints": "a folder's name",
    "training/saving.py: ... times": "of the tries, which are several",
    "config/values.py: ... steps": "more than fifty",
    "config/rules.py: ... sequences": "of several ranks",
    "data/build_datasets.py: %d tokens": "two or more",
    "data/sampler.py: ... sequences": "of several ranks",
    "config/yaml_files.py: ... values": "a limit of many thousands",
    "data/token_store.py: ... bad records": "no message, a part of a key",
    "distributed/context.py: ... ranks": "more than there are GPUs",
    "run/summary.py: ... processes": "only said of several",
    "evaluate.py: ... ranks": "only said of several",
    "generate.py: ... ranks": "only said of several",
    "storage/manifest.py: ... bytes": "a limit of millions",
    "run/memory.py: ... tokens": "a product",
    "distributed/launch_env.py: ... ranks": "only said of several",
    "training/profiler.py: %d ranks": "only said of several",
    "report.py: ... runs": "more than fit on a page",
    "run/summary.py: ... epochs": "mostly a fraction",
    "run/summary.py: ... machines": "only said of several",
    "html_report/sections.py: ... runs": "only said of several",
    "html_report/sections.py: ... tokens": "a product",
}


def test_numbers_of_things_that_may_be_one_are_counted() -> None:
    found = {
        f"{file.relative_to(PACKAGE).as_posix()}: {match[0]}"
        for file in PACKAGE.rglob("*.py")
        for text in strings(ast.parse(file.read_text("utf-8")), things=False)
        for match in NUMBER_AND_THING.finditer(text)
    }
    assert found == NEVER_ONE.keys(), "write these with plural.counted, or say here why they are never one"


@pytest.mark.parametrize("text", ["%d documents", "... rows", "... new tokens"])
def test_such_texts_would_be_found(text: str) -> None:
    assert NUMBER_AND_THING.search(f"data: {text} here")
    assert not NUMBER_AND_THING.search("... tokens/s")


def types_after_an_article(tree: ast.AST) -> list[str]:
    """The f-strings that put `a` or `an` before the name of a type, whatever that is."""
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for text, filled_in in zip(node.values, node.values[1:], strict=False)
        if isinstance(text, ast.Constant) and re.search(r"\ban? $", str(text.value))
        if isinstance(filled_in, ast.FormattedValue) and re.search(r"type\(.*\)\.__name__$", ast.unparse(filled_in.value))
    ]


def test_a_type_has_the_article_that_its_name_needs() -> None:
    found = [text for file in PACKAGE.rglob("*.py") for text in types_after_an_article(ast.parse(file.read_text("utf-8")))]
    assert found == [], "write these with plural.type_named: an int, a list"
    assert types_after_an_article(ast.parse('f"it holds a {type(value).__name__}"'))
    assert (type_named(3), type_named([])) == ("an int", "a list")
