"""`python -m dist_trainer.report RUN [RUN ...]`: the report of one or several runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dist_trainer.config.paths import user_path
from dist_trainer.errors import EXIT_FINISHED, ConfigError
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.version import VERSION_LINE

DESCRIPTION = "Write the report of one or several runs as one HTML file."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    return run_cli(lambda: run(argv))


def run(argv: Sequence[str] | None) -> int:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(prog="python -m dist_trainer.report", description=DESCRIPTION)
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=user_path, help="a run's folder, such as runs/default, or a checkpoint in it"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=user_path,
        help="the file to write (default: report.html in the run's folder, or compared.html in the first run's)",
    )
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    arguments = parser.parse_args(argv)
    from dist_trainer.html_report.charts import MAX_RUNS
    from dist_trainer.html_report.page import REPORT_FILE, html_report
    from dist_trainer.storage.files import replace_file
    from dist_trainer.tracking.run_reader import read_run

    runs = list({folder.resolve(): folder for folder in map(_run_of, arguments.runs)}.values())
    if len(runs) > MAX_RUNS:
        raise ConfigError(
            f"{len(runs)} runs: one page shows at most {MAX_RUNS}, since more lines cannot be told apart; give fewer"
        )
    # Not over the first run's own report.
    output = arguments.output or runs[0] / (REPORT_FILE if len(runs) == 1 else "compared.html")
    page = html_report([read_run(folder) for folder in runs])
    try:
        replace_file(output, [page.encode()], durable=False)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error.strerror})") from error
    print(output)
    return EXIT_FINISHED


def _run_of(path: Path) -> Path:
    from dist_trainer.tracking.run_reader import run_folder_of

    folder = run_folder_of(path)
    if folder is None:
        raise ConfigError(
            f"{path} is not a run's folder: it has no metrics.jsonl; give one such as runs/default, or a checkpoint in it"
        )
    return folder


if __name__ == "__main__":
    end_process(main())
