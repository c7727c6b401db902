"""The commands that README.md and the pages of docs/ show, as a reader would type them and a test can afford them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.end_to_end.commands import ROOT
from tests.end_to_end.forked_commands import quick_command

NEEDS = re.compile(
    r"\bneeds (GPUs|SLURM|lm_eval|several machines|a (cluster|network|cloud account|W&B account))(?!\w)",
)
"""What a remark behind a command says where it cannot be run here; docs/README.md tells readers."""
SMALL = shlex.split(
    "--model.hidden_size 16 --model.intermediate_size 32 --model.num_hidden_layers 1 --model.num_attention_heads 2 "
    "--model.num_key_value_heads 1 --data.tokenizer austen --data.sequence_length 16 --batch.global_batch_size 2 "
    "--batch.micro_batch_size 2 --train.max_steps 2 --validation.max_global_batches 1 --tracking.sample_tokens 4 "
    "--tracking.wandb disabled --precision.compile false"
)
LOOKING = {"cat", "cmp", "head", "ls", "mkdir", "tail"}
"""Commands that run as they stand."""


def commands_of(page: Path) -> list[tuple[str, str]]:
    """(command, remark) for each line of the page's ```bash blocks; a block's first line may be a remark for all of it."""
    commands = []
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE):
        lines = [line.partition(" #") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
        of_all = " ".join(lines.pop(0)) if lines[0][0].startswith("#") else ""
        commands += [(command.strip(), f"{remark} {of_all}".strip()) for command, _, remark in lines]
    return commands


def runnable(commands: Iterable[tuple[str, str]]) -> list[str]:
    """Those that no remark takes out."""
    return [command for command, remark in commands if not NEEDS.search(remark)]


def stand_in(folder: Path) -> Path:
    """`folder` as the repository's folder with texts of the reader's own in it, and no run yet."""
    for name in ("configs", "dist_trainer", "docs", "launch", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_texts").mkdir()
    for number in range(8):
        (folder / "my_texts" / f"{number}.txt").write_text(f"Letter {number}. " + "All is well here. " * 40)
    return folder


def have_runs_of(command: str, folder: Path, origin: Path) -> None:
    """Where the command reads runs that no command of its page has made: `origin`, by their names."""
    for name in re.findall(r"\bruns/(\w+)", command):
        if not (folder / "runs" / name).exists():
            shutil.copytree(origin, folder / "runs" / name, symlinks=True)


def cheap(command: str) -> list[str]:
    """The command as a test can afford it: a tiny model, one process, two steps (test_profile.py records some)."""
    words = shlex.split(command.partition(" > ")[0])
    match words:
        case ["dist-train", *arguments]:
            return cheap(shlex.join(["python", "-m", "dist_trainer.train", *arguments]))
        case ["make", "train"]:
            return ["launch/local.sh", *SMALL]
        case ["make", *_]:
            return ["make", "--dry-run", "-C", str(ROOT), *words[1:]]
        case ["launch/local.sh", *_]:
            data = ["--data.dataset", "austen", "--data.dataset_config", "null"]  # the preset's is on the Hub
            return [*words, *SMALL, *data, "--run_name", "launched"]
        case ["torchrun", _, "-m", "dist_trainer.train", *arguments]:  # test_train.py has torchrun itself
            return cheap(shlex.join(["python", "-m", "dist_trainer.train", *arguments]))
        case ["python", "-m", "dist_trainer.train", *_, "--print_completion", _]:
            return words
        case ["python", "-m", "dist_trainer.train", *_]:
            return [*words, *SMALL]
        case ["torchrun", _, "-m", "dist_trainer.verify", *arguments]:
            return ["python", "-m", "dist_trainer.verify", *arguments]
        case ["python", "-m", "dist_trainer.verify", *_] if "--ranks" in words:  # test_verify.py has the real ranks
            return [*words, "--help"]
        case ["python", "-m", "dist_trainer.verify", *_]:
            return words
        case ["python", "-m", "dist_trainer.evaluate" | "dist_trainer.generate" | "dist_trainer.report", *_]:
            return words
        case [first, *_] if first in LOOKING:
            return words
    raise AssertionError(f"how is `{command}` run cheaply? Say it here, or mark it with what it needs: {NEEDS.pattern}")


def run(words: list[str], folder: Path) -> str:
    """What it prints, run in `folder`."""
    if words[:2] == ["python", "-m"]:
        quick = quick_command(*words[3:], module=words[2], cwd=folder)
        assert quick.returncode == 0, f"{shlex.join(words)}\n{quick.stdout}\n{quick.stderr}"
        return quick.stdout
    not_from_make = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(
        words,
        cwd=folder,
        env={**not_from_make, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
