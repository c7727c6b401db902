"""Progress for people: a bar on a terminal, a plain line a logged step in log files, and what to do next at the end."""

from __future__ import annotations

import logging
import shlex
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_trainer.config.cli import in_this_shell
from dist_trainer.config.secrets import masked
from dist_trainer.errors import counted
from dist_trainer.models.registry import can_open
from dist_trainer.tracking.formatting import duration, printable, quantity, significant
from dist_trainer.tracking.goodput import Goodput, goodput_of
from dist_trainer.tracking.lenient_json import is_number
from dist_trainer.tracking.progress_bar import ProgressBar
from dist_trainer.tracking.run_context import RunContext
from dist_trainer.tracking.run_log import PROGRESS_LOGGER, configure_logging
from dist_trainer.tracking.run_reader import was_validated
from dist_trainer.tracking.status import read_status

__all__ = ["ConsoleTracker", "configure_logging"]

log = logging.getLogger(__name__)
progress = logging.getLogger(PROGRESS_LOGGER)

_SAMPLE_CHARACTERS = 800


class ConsoleTracker:
    """Shows training lines on a tqdm bar where stderr is a terminal, and as a plain line each in the log."""

    def __init__(self, context: RunContext, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = context
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._step = context.start_step
        self._is_validated = context.start_step > 0 and was_validated(context.folder)
        name = masked(context.config.run_name)
        self._bar = ProgressBar(name, total=context.max_steps, initial=context.start_step)

    def log(self, line: dict[str, Any]) -> None:
        """Show a line in its kind's form."""
        kind = line.get("kind")
        if kind == "train":
            self._show_training(line)
        elif kind == "validation":
            self._show_validation(line)
        elif kind == "sample":
            self._show_sample(line)

    def sync(self) -> None:
        """Nothing to make durable."""

    def close(self, *, state: str, reason: str | None) -> None:
        """Take the bar down; say how the run ended, how good it got, and which commands come next."""
        self._bar.close()
        context, status = self._context, read_status(self._context.folder)
        self._step = max(self._step, status.get("step", 0))  # lines come every so many steps
        best = "no best checkpoint was saved" if self._is_validated else "no best checkpoint, as nothing was validated"
        if is_number(step := status.get("best_step")) and is_number(loss := status.get("best_loss")):
            best = f"best checkpoint step {step}, validation loss {loss:.4f}"
        because = f" ({reason})" if reason else ""
        spent = goodput_in_words(goodput_of(context.folder, now=time.time()))
        log.info("%s at %s%s; %s; %s", state, self._place(), because, best, spent)
        if state == "preempted":
            log.info("the same command goes on from here")
        if state == "finished":
            log.info("next steps: %s", next_steps(context.folder, chats=context.chats))

    def _place(self) -> str:
        most = self._context.max_steps
        return f"step {self._step} of {most}" if self._step <= most else f"step {self._step}, past the {most} it is to do now"

    def _show_training(self, line: dict[str, Any]) -> None:
        self._step, now = line["step"], self._clock()
        if self._first is None:
            self._first = (self._step, now)
            self._start_bar()
        if not self._bar.disable:
            self._bar.shown = {
                "loss": f"loss {line['loss']:.4f}",
                "learning rate": f"lr {line['lr']:.2e}",
                "throughput": f"{quantity(line['tokens_per_second'])} tokens/s",
            }
            self._bar.update(self._step - self._bar.n)
        progress.info("%s", self._plain(line, now))

    def _start_bar(self) -> None:
        """Let the bar's time left follow from what comes after the first line, which has seen compilation."""
        if not self._bar.disable:
            self._bar.n = self._bar.initial = self._bar.last_print_n = self._step
            self._bar.unpause()

    def _plain(self, line: dict[str, Any], now: float) -> str:
        parts = [
            f"step {self._step:{len(str(self._context.max_steps))}d}/{self._context.max_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['lr']:.2e}",
            f"grad norm {significant(line['grad_norm'], 3)}",
            f"{quantity(line['tokens_per_second'])} tokens/s",
        ]
        if line.get("mfu") is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if line.get("skipped"):
            parts.append("update skipped, not finite")
        left = self._seconds_left(now)
        if left is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _seconds_left(self, now: float) -> float | None:
        """At the pace since the first line, which has seen compilation; validation and saving are part of the pace."""
        first_step, first_time = self._first or (self._step, now)
        steps_left = self._context.max_steps - self._step
        if self._step <= first_step or steps_left <= 0:
            return None
        return steps_left * (now - first_time) / (self._step - first_step)

    def _show_validation(self, line: dict[str, Any]) -> None:
        self._is_validated = True
        parts = [f"validation loss {line['loss']:.4f}", f"perplexity {significant(line['perplexity'])}"]
        if line.get("bits_per_byte") is not None:
            parts.append(f"{line['bits_per_byte']:.3f} bits per byte")
        if line.get("best"):
            parts.append("the best so far")
        log.info("step %d  %s", line["step"], ", ".join(parts))

    def _show_sample(self, line: dict[str, Any]) -> None:
        prompt, text = printable(str(line.get("prompt", ""))), printable(str(line.get("text", "")))
        shown = textwrap.shorten(f"{prompt} | {text}", _SAMPLE_CHARACTERS, placeholder=" ...")
        wrapped = textwrap.fill(shown, 100, initial_indent="    ", subsequent_indent="    ")
        log.info("step %d  sample (prompt | what the model makes of it):\n%s", line["step"], wrapped)


def goodput_in_words(spent: Goodput) -> str:
    """`92% of its 5 min 20 s went into steps and validation; 2 restarts, 13 steps lost to them`: of all its lives together."""
    restarts = f"{counted(spent.restarts, 'restart')}, {counted(spent.lost_steps, 'step')} lost to them"
    return f"{spent.share:.0%} of its {duration(spent.wall_seconds)} went into steps and validation; {restarts}"


def next_steps(folder: Path, *, chats: bool = False) -> str:
    """What to do with a finished run's folder. The indented lines can be pasted into the shell that ran it, and name nothing
    that its model, one of the user's own perhaps, would be refused for. `chats`: whether it was trained on conversations.
    """
    named = shlex.quote(str(folder))
    commands = {f"report {named}": "rebuild the report"}
    if can_open(folder):
        generate = {f"generate {named} --chat": "chat"} if chats else {f"generate {named}": "generate text"}
        commands = generate | {f"evaluate {named}": "measure the validation loss again"} | commands
    width = max(map(len, commands))
    lines = (f"  {in_this_shell()} -m dist_trainer.{words:<{width}}   # {note}" for words, note in commands.items())
    return "\n".join([f"open {folder / 'report.html'} in a browser, or run", *lines])
