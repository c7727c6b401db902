"""certificate.json: what `verify` found, where and of what; and its line in the run's report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_trainer.config.loading import as_dict
from dist_trainer.config.secrets import masked_within
from dist_trainer.errors import ConfigError
from dist_trainer.html_report.page import REPORT_FILE, write_report
from dist_trainer.run.replay import Line, Plan
from dist_trainer.storage.files import replace_file
from dist_trainer.tracking.run_reader import CERTIFICATE_FILE, RunHistory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison."""

    is_equal: bool
    lines: tuple[str, ...]
    """A sentence for each comparison."""
    differences: tuple[str, ...] = ()
    """The sentences that name a difference."""


def write_certificate(
    verdict: Verdict,
    plan: Plan,
    found: Mapping[int, list[Line]],
    *,
    folder: Path,
    output: Path | None,
    run_ranks: int | None,
) -> Path:
    """Write the certificate to `output` (None: into `folder`), and rebuild the report if `folder` has one; returns the file.
    Raises ConfigError if it cannot be written.
    """
    file = folder / CERTIFICATE_FILE if output is None else output
    content = masked_within(describe(verdict, plan, found, run_ranks=run_ranks))
    try:
        replace_file(file, [json.dumps(content, indent=2, ensure_ascii=False).encode(), b"\n"], durable=False)
    except OSError as error:
        raise ConfigError(f"--output: {file} cannot be written ({error.strerror}); name another file") from error
    if output is None and (folder / REPORT_FILE).is_file():
        try:
            write_report(RunHistory(folder))
        except OSError as error:
            log.warning("%s could not be renewed (%s)", folder / REPORT_FILE, error.strerror)
    return file


def describe(verdict: Verdict, plan: Plan, found: Mapping[int, list[Line]], *, run_ranks: int | None) -> dict[str, Any]:
    """The certificate's fields, as in docs/verifying.md."""
    headers = {ranks: next((line for line in lines if line["kind"] == "replay"), {}) for ranks, lines in found.items()}
    environment = next(iter(headers.values())).get("environment", {})
    return {
        "result": "equal" if verdict.is_equal else "differs",
        "first_step": plan.first,
        "last_step": plan.last,
        "checkpoint": None if plan.checkpoint is None else plan.checkpoint.name,
        "ranks": list(found),
        "run_ranks": run_ranks,
        "threads": {str(ranks): header.get("environment", {}).get("threads") for ranks, header in headers.items()},
        "compared": list(verdict.lines),
        "differences": list(verdict.differences),
        "digests": {
            str(ranks): {str(line["step"]): line["digest"] for line in lines if line["kind"] == "digest"}
            for ranks, lines in found.items()
        },
        "time": time.time(),
        "environment": environment,
        "config": as_dict(plan.config),
    }
