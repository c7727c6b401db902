"""`python -m dist_trainer.train`: train a model; see --help. Ends with the exit codes of docs/architecture.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NoReturn

from dist_trainer.distributed.launch_env import begin_as_rank
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.run.cli import end_process, run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    began = time.time()

    def command() -> int:
        # Handle signals first, because everything else takes time. Loading the config is not interruptible: another rank with
        # the same config error may have exited already, and torchrun's SIGTERM must not keep this one from printing it.
        with StopRequest().listen(for_good=True) as stop_request:
            begin_as_rank()
            from dist_trainer.config.command_line import pop_dry_run
            from dist_trainer.run.configure import load_config

            arguments, is_dry_run = pop_dry_run(argv)
            config = load_config(arguments)
            with stop_request.interruptible():
                # torch is imported only now, so that --help and config errors appear at once.
                from dist_trainer.run.dry_run import dry_run
                from dist_trainer.run.lifecycle import run
            if is_dry_run:
                return dry_run(config, stop_request=stop_request)
            return run(config, began=began, stop_request=stop_request)

    return run_cli(command)


def console_script() -> NoReturn:
    """`dist-train`."""
    end_process(main())


if __name__ == "__main__":
    end_process(main())
