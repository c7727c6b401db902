"""Progress for people: a bar on a terminal, a plain line per logged step in log files, and the next steps at the end."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_trainer.config.command_line import command_path
from dist_trainer.config.secrets import masked
from dist_trainer.errors import counted
from dist_trainer.tracking.formatting import duration, printable, quantity, significant
from dist_trainer.tracking.goodput import Goodput, goodput
from dist_trainer.tracking.run_log import PROGRESS_LOGGER
from dist_trainer.tracking.run_reader import is_number, read_run, read_status, was_validated

log = logging.getLogger(__name__)
progress = logging.getLogger(PROGRESS_LOGGER)

_SAMPLE_CHARACTERS = 800
_BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_BAR_CHARACTERS = 36
"""Columns it takes without name, step numbers and postfix: 10 for the bar itself and 5 for each of the two times."""


class ConsoleTracker:
    """Shows training lines on a progress bar if stderr is a terminal, and as plain lines in the log."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        start_step: int,
        max_steps: int,
        trains_on_conversations: bool = False,
        can_open: Callable[[Path], bool] = lambda folder: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`can_open`: whether `generate` and `evaluate` can open the model in the run's folder, asked at the end."""
        self._folder, self._step, self._max_steps = folder, start_step, max_steps
        self._trains_on_conversations, self._can_open, self._clock = trains_on_conversations, can_open, clock
        self._first: tuple[int, float] | None = None
        """Step and time of the first line, which includes compilation."""
        self._is_validated = start_step > 0 and was_validated(folder)
        kind: dict[str, Any] = {"bar_format": _BAR_FORMAT, "disable": None, **_width()}  # disabled unless a terminal
        self._bar = tqdm(desc=masked(name), total=max_steps, initial=start_step, file=sys.stderr, **kind)

    def log(self, line: dict[str, Any]) -> None:
        """Show a line, depending on its kind."""
        kind = line.get("kind")
        if kind == "train":
            self._show_training(line)
        elif kind == "validation":
            self._show_validation(line)
        elif kind == "sample":
            self._show_sample(line)

    def close(self, *, state: str, reason: str | None) -> None:
        """Remove the bar; log how the run ended, its best checkpoint, and which commands come next."""
        self._bar.close()
        status = read_status(self._folder)
        step = max(self._step, status.get("step", 0))  # not every step has a line
        best = "no best checkpoint was saved" if self._is_validated else "no best checkpoint (never validated)"
        if is_number(best_step := status.get("best_step")) and is_number(loss := status.get("best_loss")):
            best = f"best checkpoint step {best_step}, validation loss {loss:.4f}"
        because = f" ({'Ctrl-C' if reason == 'SIGINT' else reason})" if reason else ""
        if step > self._max_steps:
            ending = f"{state}: {counted(step, 'step')}, past the {self._max_steps} planned"
        elif state == "finished":
            ending = f"finished: {step} of {counted(self._max_steps, 'step')}{because}"
        elif state == "preempted":
            ending = f"stopped at step {step} of {self._max_steps}{because}, saved"
        else:
            ending = f"{state} at step {step} of {self._max_steps}{because}"
        log.info("%s; %s; %s", ending, best, format_goodput(goodput(read_run(self._folder), now=time.time())))
        if state == "preempted":
            log.info("rerun the same command to continue")
        if state == "finished":
            can_open = self._can_open(self._folder)
            log.info("next steps: %s", next_steps(self._folder, can_open=can_open, chats=self._trains_on_conversations))

    def _show_training(self, line: dict[str, Any]) -> None:
        self._step, now = line["step"], self._clock()
        if self._first is None:
            self._first = (self._step, now)
            if not self._bar.disable:  # its estimate of the time left also excludes the first line
                self._bar.n = self._bar.initial = self._bar.last_print_n = self._step
                self._bar.unpause()
        if not self._bar.disable:
            self._bar.set_postfix_str(self._fields_that_fit(line), refresh=False)
            self._bar.update(self._step - self._bar.n)
        progress.info("%s", self._format_line(line, now))

    def _fields_that_fit(self, line: dict[str, Any]) -> str:
        """What follows the bar. On its own, tqdm would shorten the bar to one character and cut off the last field."""
        columns = self._bar.format_dict["ncols"] or 0  # 0: the terminal is gone
        room = columns - _BAR_CHARACTERS - len(self._bar.desc) - 2 * len(str(self._max_steps))
        text = f"loss {line['loss']:.4f}"
        fields = [f"{quantity(line['tokens_per_second'])} tokens/s", f"lr {line['lr']:.2e}"]
        for field in [*fields, f"{significant(line['step_seconds'], 3)} s per step"]:
            if len(text) + 2 + len(field) > room:
                break
            text = f"{text}, {field}"
        return text if len(text) <= room else ""

    def _format_line(self, line: dict[str, Any], now: float) -> str:
        parts = [
            f"step {self._step:{len(str(self._max_steps))}d}/{self._max_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['lr']:.2e}",
            f"grad norm {significant(line['grad_norm'], 3)}",
            f"{quantity(line['tokens_per_second'])} tokens/s",
        ]
        if line.get("mfu") is not None:
            parts.append(f"MFU {line['mfu']:.1%}")
        if line.get("skipped"):
            parts.append("update skipped (NaN/Inf)")
        first_step, first_time = self._first or (self._step, now)
        steps_left = self._max_steps - self._step
        if self._step > first_step and steps_left > 0:  # at the pace so far, validation and saving included
            parts.append(f"{duration(steps_left * (now - first_time) / (self._step - first_step))} left")
        return "  ".join(parts)

    def _show_validation(self, line: dict[str, Any]) -> None:
        self._is_validated = True
        parts = [f"validation loss {line['loss']:.4f}", f"perplexity {significant(line['perplexity'])}"]
        if line.get("bits_per_byte") is not None:
            parts.append(f"{line['bits_per_byte']:.3f} bits per byte")
        if line.get("best"):
            parts.append("best so far")
        log.info("step %d  %s", line["step"], ", ".join(parts))

    def _show_sample(self, line: dict[str, Any]) -> None:
        prompt, text = printable(str(line.get("prompt", ""))), printable(str(line.get("text", "")))
        shown = textwrap.shorten(f"{prompt} | {text}", _SAMPLE_CHARACTERS, placeholder=" ...")
        wrapped = textwrap.fill(shown, 100, initial_indent="    ", subsequent_indent="    ")
        log.info("step %d  sample (prompt | continuation):\n%s", line["step"], wrapped)


def format_goodput(spent: Goodput) -> str:
    """`92% of 5 min 20 s spent training and validating; 2 restarts, 13 steps lost`, over all attempts."""
    lost = f", {counted(spent.lost_steps, 'step')} lost" if spent.lost_steps else ""
    restarts = f"{counted(spent.restarts, 'restart')}{lost}" if spent.restarts else "no restarts"
    return f"{spent.share:.0%} of {duration(spent.wall_seconds)} spent training and validating; {restarts}"


def next_steps(folder: Path, *, can_open: bool, chats: bool = False) -> str:
    """What to do with a finished run's folder; the indented lines can be pasted into the shell that ran it.

    `can_open`: whether `generate` and `evaluate` can open its model. `chats`: whether it was trained on conversations.
    """
    run = shlex.quote(str(folder))
    commands = {f"report {run}": "rebuild the report"}
    if can_open:
        generate = {f"generate {run} --chat": "chat"} if chats else {f"generate {run}": "generate text"}
        commands = generate | {f"evaluate {run}": "re-run validation"} | commands
    width = max(map(len, commands))
    lines = (f"  {command_path()} -m dist_trainer.{words:<{width}}   # {note}" for words, note in commands.items())
    return "\n".join([f"open {folder / 'report.html'} in a browser, or run", *lines])


def _width() -> dict[str, Any]:
    """tqdm's arguments for its width: that of the terminal, even as it changes. A terminal that reports 0 columns or rows (a
    serial line, a container without a window) would get no bar, so $COLUMNS or 80, and $LINES or 24, are used instead.
    """
    try:
        known = min(os.get_terminal_size(sys.stderr.fileno())) > 0
    except (OSError, ValueError):  # no terminal: no bar
        known = True
    columns, rows = shutil.get_terminal_size()
    return {"dynamic_ncols": True} if known else {"ncols": columns, "nrows": rows}
