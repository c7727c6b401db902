"""Limits on what rendering a chat template may take: a template is a program, and may come from a stranger."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

from dist_trainer.errors import DataError, type_named

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MOST_SECONDS = 5.0
"""Of CPU time. A conversation takes milliseconds."""
MOST_BYTES = 1 << 30
"""Of memory beyond what the process has when rendering starts."""
MOST_CHARACTERS = 1 << 26
"""Of the text that comes out."""
_MEMORY_IN_USE = Path("/proc/self/statm")
Result = TypeVar("Result")


class TemplateLimitError(DataError):
    """A chat template takes more time or memory than any conversation needs."""


def check_template(template: object, name: str) -> None:
    """Raises DataError where `template`, which messages call `name`, is no text, or raises numbers to powers, which cannot be
    interrupted. Errors of syntax are left to rendering.
    """
    import jinja2

    if not isinstance(template, str):
        raise DataError(f"{name} is {type_named(template)}, not the text of a Jinja template")
    before = ""
    with contextlib.suppress(jinja2.TemplateSyntaxError):
        for _, kind, value in jinja2.Environment().lex(template):
            if kind == "operator" and value == "**" and before not in ("(", ","):  # behind these it unpacks arguments
                raise DataError(f"{name} raises a number to a power (**), which can take without end; use a template without")
            before = before if kind == "whitespace" else value


def within_limits(render: Callable[[], Result]) -> Result:
    """What `render` gives. Raises TemplateLimitError where that takes more than any conversation needs.

    Time is limited in the main thread only, memory where the system can limit it (Linux).
    """
    try:
        with _limited_memory(), _limited_time():
            return render()
    except MemoryError:
        raise TemplateLimitError(f"it takes more than {MOST_BYTES >> 20:,} MiB of memory") from None


def check_length(text: str) -> str:
    """`text`, which a template wrote. Raises TemplateLimitError where it is longer than any conversation."""
    if len(text) > MOST_CHARACTERS:
        raise TemplateLimitError(f"it writes {len(text):,} characters, more than {MOST_CHARACTERS:,}")
    return text


@contextlib.contextmanager
def _limited_time() -> Generator[None]:
    """By processor time, which a busy machine does not lengthen."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TemplateLimitError(f"it takes more than {MOST_SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    try:
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited_memory() -> Generator[None]:
    """By the size of the address space: an allocation beyond it fails, whatever asks for it."""
    if resource is None or not _MEMORY_IN_USE.exists():
        yield
        return
    in_use = int(_MEMORY_IN_USE.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (soft, hard, in_use + MOST_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
