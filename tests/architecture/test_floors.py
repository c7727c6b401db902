"""Imports only point down the floors of docs/architecture.md, and heavy libraries come in through one door."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.architecture.sources import PACKAGE, REPOSITORY, imports_of_the_package, loaded_by_importing

FLOORS = [
    {"config", "storage", "errors", "version"},
    {"distributed", "huggingface"},
    {"models", "data", "optim", "parallel", "checkpoint", "tracking"},
    {"training", "generation", "html_report"},
    {"run"},
    {"train", "evaluate", "generate", "report", "verify"},
    {"__init__"},
]
COMMANDS = FLOORS[5]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

WITHOUT_TORCH = FLOORS[0] | COMMANDS | {"__init__"}
HEAVY = {"torch", "transformers", "datasets", "tokenizers", "pyarrow", "wandb", "numpy", "safetensors"}
# The only files that may import these, and only inside functions: who does not use them does not wait for them.
DOORS = {
    "wandb": {"tracking/wandb_sink.py"},
    "tensorboard": {"tracking/tensorboard_sink.py"},
    "trackio": {"tracking/trackio_sink.py"},
    "datasets": {"data/hub.py"},
    "huggingface_hub": {"huggingface/hub.py"},
    "pyarrow": {"data/records.py", "data/text_file.py"},
    "transformers": {"huggingface/tokenizer_files.py", "data/packing.py", "data/chat.py", "huggingface/transformers_models.py"},
    "tokenizers": {"data/tokenizers.py"},
    "gigatoken": {"data/encoding.py"},
    "jinja2": {"data/chat.py"},
    "lm_eval": {"run/evaluation.py"},
    "shtab": {"config/help.py"},
    "torch.cuda": {"distributed/machine.py"},
    "torch.utils._triton": {"distributed/machine.py"},
    "torch.nn.attention.flex_attention": {"models/attention.py"},
}

# Private names of torch, each in one file, which does without those that a torch lacks or asserts that it has them.
PRIVATE_NAMES = {
    "distributed/machine.py": {"_triton"},
    "parallel/compile.py": {"_functorch"},
    "parallel/ddp.py": {"_run_ddp_forward", "_inside_ddp_forward"},
    "training/nonfinite.py": {"_step_supports_amp_scaling"},
    "training/profiler.py": {"_dump_snapshot", "_record_memory_history"},
    "training/step.py": {"_profiler_enabled"},
}
NAMED_BY_TESTS_AS = {"_triton": "_has_triton", "_functorch": "functorch_config"}
PRIVATE_USE = re.compile(
    r"""torch(?:\.\w+)*\.(_[a-z]\w*)|(?:get|has)attr\((?:[^()"]|\([^()]*\))*"(_[a-z]\w*)"|def (_run_\w*forward)"""
)


def part_of(file: Path) -> str:
    """`models` for dist_trainer/models/loss.py, `trainer` for dist_trainer/training/trainer.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_of_the_package_is_on_a_floor() -> None:
    parts = {part_of(file) for file in PACKAGE.rglob("*.py")}
    assert parts <= FLOOR_OF.keys(), "give these a floor here and in docs/architecture.md"


def test_the_page_has_the_same_floors() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| ((?:`\w+` ?)+)\|", page, re.MULTILINE)
    assert [set(re.findall(r"\w+", row)) for row in reversed(rows)] == FLOORS[:-1]


def test_imports_only_point_down() -> None:
    wrong = []
    for found in imports_of_the_package():
        package, _, rest = found.module.partition(".")
        if package != "dist_trainer":
            continue
        here, there = part_of(found.file), rest.split(".")[0]
        if here != there and there not in {"errors", "version"} and FLOOR_OF[there] >= FLOOR_OF[here]:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_the_config_travels_by_section() -> None:
    whole = set()
    for file in PACKAGE.rglob("*.py"):
        if part_of(file) in {"config", "run"}:
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and "TrainingConfig" in ast.unparse(node.args):
                whole.add(f"{file.relative_to(PACKAGE)}: {node.name}")
    assert whole == {
        "training/trainer.py: __init__",
        "training/callbacks.py: build_callbacks",
        "data/loader.py: create_dataloaders",
        "data/loader.py: create_validation_loader",
    }, "a part takes its own section"


def test_config_errors_and_help_need_no_heavy_library() -> None:
    light = [file for file in PACKAGE.rglob("*.py") if part_of(file) in WITHOUT_TORCH]
    light.append(PACKAGE / "run" / "configure.py")
    heavy = {file.name: found for file in light if (found := HEAVY & {m.split(".")[0] for m in loaded_by_importing(file)})}
    assert not heavy


def test_functions_import_only_heavy_libraries_in_the_listed_files() -> None:
    wrong = []
    for found in imports_of_the_package():
        name = found.file.relative_to(PACKAGE).as_posix()
        doors = DOORS.get(found.module, DOORS.get(found.module.split(".")[0]))
        if doors is not None:
            allowed = (found.inside_function or found.for_types_only) and name in doors
        else:
            # Commands come back with --help or a config error before they import what is below them.
            allowed = not found.inside_function or part_of(found.file) in COMMANDS
        if not allowed:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_private_names_of_torch_have_one_place_and_a_test() -> None:
    used: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        names = {name for match in PRIVATE_USE.findall(file.read_text("utf-8")) for name in match if name}
        if names and file.name != "cli.py":  # that one is atexit's
            used[file.relative_to(PACKAGE).as_posix()] = names
    assert used == PRIVATE_NAMES
    tests = "".join(file.read_text("utf-8") for file in (REPOSITORY / "tests" / "unit").rglob("*.py"))
    private = {name for names in PRIVATE_NAMES.values() for name in names}
    assert {name for name in private if NAMED_BY_TESTS_AS.get(name, name) not in tests} == set()


def test_no_module_has_a_vague_name() -> None:
    names = {part.removesuffix(".py") for file in PACKAGE.rglob("*.py") for part in file.relative_to(PACKAGE).parts}
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_no_file_has_two_subjects() -> None:
    long = {str(f): n for f in PACKAGE.rglob("*.py") if (n := len(f.read_text("utf-8").splitlines())) > 350}
    assert not long, "split these, or shorten them"
