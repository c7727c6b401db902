"""`python -m dist_trainer.train`: train a model; see --help. Ends with the exit codes of docs/architecture.md."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from dist_trainer.config.loading import load_config
from dist_trainer.errors import DistTrainerError

EXIT_CRASHED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """The whole command; its exit code."""
    try:
        config = load_config(argv)
        # Only now torch: --help and config errors answer at once.
        from dist_trainer.assembly import run

        return run(config)
    except DistTrainerError as error:
        if _speaks():
            print(f"dist_trainer: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 75
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: with ranks still connected, the interpreter's own clean-up can wait for them for ever.
        os._exit(EXIT_CRASHED)


def _speaks() -> bool:
    """Whether this is the one rank that prints what all of them found."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


if __name__ == "__main__":
    sys.exit(main())
