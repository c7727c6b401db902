"""`python -m dist_trainer.verify RUN`: replays steps of a run, or of a config on several numbers of ranks; compares bits."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dist_trainer.config.paths import RUN_CONFIG, user_path
from dist_trainer.distributed.launch_env import begin_as_rank, is_launched
from dist_trainer.distributed.signals import StopRequest
from dist_trainer.errors import ConfigError
from dist_trainer.run.cli import end_process, run_cli
from dist_trainer.version import VERSION_LINE

DESCRIPTION = (
    "Replay steps of a run from the checkpoint before them, and compare losses, gradient norms and weights with the run's, bit "
    "by bit; or replay the first steps of a config on several numbers of ranks, and compare these. Prints `equal`, or the "
    "first step and tensor that differ. Exit code 0: equal; 1: something differs; 2: this cannot be verified."
)
EPILOG = "Without RUN, other arguments are training's: --config FILE, --preset NAME, --section.key VALUE."
FLAGS = {"--help", "-h", "--version"}
OWN_OPTIONS = {"--steps", "--ranks", "--output", "--replay"} | FLAGS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""

    def command() -> int:
        with StopRequest().listen(for_good=True) as stop_request:
            begin_as_rank()
            return run(sys.argv[1:] if argv is None else argv, stop_request)

    return run_cli(command)


def argument_parser() -> argparse.ArgumentParser:
    """The parser of this command's own options."""
    parser = argparse.ArgumentParser(
        prog="python -m dist_trainer.verify",
        usage="%(prog)s RUN [--steps A-B] [--ranks N,M]\n"
        "       %(prog)s --config FILE [--section.key VALUE]... --ranks N,M [--steps 1-B]",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", nargs="?", type=user_path, help="a run's folder, such as runs/default")
    parser.add_argument(
        "--steps",
        metavar="A-B",
        type=steps_of,
        help="the steps to replay (default: from the newest checkpoint but one to the newest; of a config: 1-20)",
    )
    parser.add_argument(
        "--ranks",
        metavar="N,M",
        type=ranks_of,
        default=(),
        help="numbers of ranks to start on this machine, one after the other (default: the ranks that run this command)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=user_path,
        help="the certificate (default: certificate.json in the run's folder; of a config: in the current folder)",
    )
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)  # of the ranks that --ranks starts
    parser.add_argument("--version", action="version", version=VERSION_LINE)
    return parser


def steps_of(text: str) -> tuple[int, int]:
    """First and last of `5-8` or `5`."""
    found = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r} are no steps; write a step such as 5, or a range such as 5-8")
    return first, last


def ranks_of(text: str) -> tuple[int, ...]:
    """The numbers in `1,2,4`, each once."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d{0,5}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers of ranks; write such as 1,2,4")
    return tuple(dict.fromkeys(map(int, words)))


def run(argv: Sequence[str], stop_request: StopRequest) -> int:
    """Verify; the exit code. Raises ConfigError for arguments that contradict each other."""
    from dist_trainer.config.command_line import split_off_keys

    own_words, key_words = split_off_keys(argv, own=OWN_OPTIONS, flags=FLAGS)
    arguments = argument_parser().parse_args(own_words)
    if arguments.replay is not None:
        with stop_request.interruptible():
            from dist_trainer.run.replay_ranks import replay_as_rank
        return replay_as_rank(arguments.replay, stop_request=stop_request)
    config = None
    if arguments.run is not None:
        check_run(arguments.run, key_words)
    elif not key_words:
        raise ConfigError("give a run's folder, such as runs/default, or --config FILE and --ranks N,M")
    elif not arguments.ranks:
        raise ConfigError("--ranks: is needed to verify a config; give numbers of ranks to compare, such as 1,2,4")
    else:
        from dist_trainer.run.configure import load_config

        config = load_config(key_words, trains=False)
    if arguments.ranks and is_launched():
        raise ConfigError("--ranks: starts ranks itself; start this without torchrun, or leave --ranks out")
    with stop_request.interruptible():
        from dist_trainer.run.verification import Request, verify
    request = Request(arguments.run, config, arguments.steps, arguments.ranks, arguments.output)
    return verify(request, stop_request=stop_request)


def check_run(run: Path, key_words: Sequence[str]) -> None:
    """Raises ConfigError if `run` is not a run, or if keys are given as well."""
    if key_words:
        raise ConfigError(
            f"{key_words[0]}: a run is verified with its own config; leave it out, or give a config without a run"
        )
    if not (run / RUN_CONFIG).is_file():
        raise ConfigError(f"{run} is not a run's folder: it has no {RUN_CONFIG}; give one such as runs/default")


if __name__ == "__main__":
    end_process(main())
