"""How far W&B has come in metrics.jsonl, kept in RUN/wandb/ so that no step is logged there twice."""

from __future__ import annotations

import json
import re
import secrets
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_trainer.tracking.atomic_file import replace_file

POSITION_FILE = "wandb/logged.json"
RUN_ID_FILE = "wandb/run_id"
_MADE = re.compile(r"[a-z0-9]{8}")


@dataclass
class Position:
    """The last step that was logged, and the kinds of lines that were logged of it."""

    step: int = -1
    kinds: list[str] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> Position:
        """The position kept in `folder`; the beginning where there is none."""
        try:
            kept = json.loads((folder / POSITION_FILE).read_text(encoding="utf-8"))
            return Position(int(kept["step"]), [str(kind) for kind in kept["kinds"]])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return Position()

    def passes(self, line: dict[str, Any]) -> bool:
        """Whether `line` has been logged, in this life of the run or in an earlier one."""
        return line["step"] < self.step or (line["step"] == self.step and line["kind"] in self.kinds)

    def advance(self, line: dict[str, Any], folder: Path) -> None:
        """Note `line` as logged. Called before it is: a line lost to a kill is better than a step that stands twice."""
        if line["step"] != self.step:
            self.step, self.kinds = line["step"], []
        self.kinds.append(line["kind"])
        text = json.dumps({"step": self.step, "kinds": self.kinds})
        replace_file(folder / POSITION_FILE, [text.encode()], durable=False)

    def in_words(self) -> str:
        """For messages."""
        return f"everything up to step {self.step}" if self.step >= 0 else "nothing yet"


def run_id(folder: Path) -> str:
    """The W&B id of the run in `folder`: made up once, the same ever after."""
    path = folder / RUN_ID_FILE
    try:
        kept = path.read_text(encoding="utf-8").strip()
        if _MADE.fullmatch(kept):  # W&B makes names of folders of it
            return kept
    except (OSError, ValueError):
        pass
    made = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, [made.encode() + b"\n"], durable=True)
    return made
