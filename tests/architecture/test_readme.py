"""The README is short, the trees are true, and no page points at nothing or at somebody's machine."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

import pytest

from tests.architecture.sources import LEFT_OUT, PACKAGE, REPOSITORY, files_under

README = (REPOSITORY / "README.md").read_text("utf-8")
ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
PAGES = [file for file in files_under(REPOSITORY) if file.suffix == ".md"]


def tree(page: str = ARCHITECTURE) -> dict[str, str]:
    """Path → description of each line of a page's tree; two spaces of indentation are one level."""
    block = re.search(r"```text\n(dist_trainer/.*?)```", page, re.DOTALL)
    assert block, "no ```text block that begins with dist_trainer/"
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        name, _, description = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        del parents[depth:]
        entries["".join(parents) + name] = description.strip()
        if name.endswith("/"):
            parents.append(name)
    return entries


def product_files() -> set[str]:
    """What a user reads or runs: modules that are not empty, launch files, configs."""
    modules = [file for file in PACKAGE.rglob("*.py") if file.stat().st_size]
    folders = [REPOSITORY / name for name in ("launch", "slurm", "configs")]
    others = [file for folder in folders for file in files_under(folder)]
    return {file.relative_to(REPOSITORY).as_posix() for file in modules + others}


def test_the_tree_names_exactly_the_product_files() -> None:
    named = {path for path in tree() if not path.endswith("/") and not path.startswith(("docs/", "tests/", "benchmarks/"))}
    assert product_files() - named == set(), "these exist, but the tree in docs/architecture.md does not name them"
    assert named - product_files() == set(), "the tree in docs/architecture.md names these, but they do not exist"


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=["README.md", "docs/architecture.md"])
def test_the_tree_names_every_folder_at_the_top(page: str) -> None:
    existing = {f"{p.name}/" for p in REPOSITORY.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in LEFT_OUT}
    assert {path for path in tree(page) if path.count("/") == 1 and path.endswith("/")} == existing


def test_the_short_tree_of_the_readme_names_every_folder_of_the_package() -> None:
    folders = {f"dist_trainer/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    named = {path for path in tree(README) if path.count("/") == 2 and path.endswith("/")}
    assert named == folders
    assert [path for path in tree(README) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=["README.md", "docs/architecture.md"])
def test_every_line_of_the_tree_says_what_the_file_is_for(page: str) -> None:
    assert [path for path, description in tree(page).items() if not description] == []


def test_the_readme_has_less_than_900_words_and_500_of_prose() -> None:
    assert len(README.split()) < 900
    assert len(re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE).split()) < 500


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings: lower case, hyphens for spaces, no punctuation; numbered where one repeats."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        slug = re.sub(r"[^\w -]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in count(1))
        found.add(slug if slug not in found else next(name for name in numbered if name not in found))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        if re.match(r"[a-z]+:", target) is None and not (there.exists() and (not anchor or anchor in anchors(there))):
            broken.append(target)
    assert broken == []


def test_the_index_of_the_docs_names_every_page() -> None:
    for folder in (REPOSITORY / "docs", REPOSITORY / "docs" / "decisions"):
        index = re.findall(r"\]\(([\w/.]+)\)", (folder / "README.md").read_text("utf-8"))
        assert [page.name for page in sorted(folder.glob("*.md")) if page.name != "README.md" and page.name not in index] == []


# Put together here, so that this file does not name them itself.
FORBIDDEN = [
    "/wo" + "rk/",
    "../sha" + "red",
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".",
    "deb.debian" + ".org",
]


def test_no_file_refers_to_a_machine_or_to_a_registry() -> None:
    found = []
    for file in files_under(REPOSITORY):
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(REPOSITORY)}: {word}" for word in FORBIDDEN if word in text]
    assert not found, "\n".join(found)
