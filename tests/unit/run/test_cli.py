"""A refusal reaches the user whatever the launcher does meanwhile; the exit code is true whoever reads what is printed."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from dist_trainer.errors import ConfigError, StoppedError, TrainingDivergedError
from dist_trainer.run.cli import missing_package, run_cli
from tests.architecture.sources import REPOSITORY
from tests.pace import allowed

RANKS = 3
# As each rank of one machine; the slow one is still loading when the others have found the error.
CODE = """
import sys, time
from dist_trainer.run import configure
from dist_trainer.train import main
load = configure.load_config
def slowly(argv):
    print("loading", flush=True)
    time.sleep(float(sys.argv[1]))
    return load(argv)
configure.load_config = slowly
sys.exit(main(["--seed", "x"]))
"""


def start(rank: int, *, seconds: float = 0.0, local_rank: int | None = None) -> subprocess.Popen[str]:
    local_rank = rank if local_rank is None else local_rank
    settings = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(seconds)],
        env={**os.environ, **settings, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    return process


def test_a_config_error_is_reported_once_though_the_first_rank_to_exit_stops_the_others():
    ranks = [start(rank, seconds=0.5 if rank == 0 else 0.0) for rank in range(RANKS)]
    while all(rank.poll() is None for rank in ranks):
        time.sleep(0.01)
    for rank in ranks:  # as torchrun does
        rank.terminate()
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2, 2]
    assert said[0].count("seed: 'x' is not a whole number") == 1
    assert said[1:] == ["", ""]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_config_error_wins_over_a_signal_while_loading(number):
    rank = start(0, seconds=1.0)
    rank.send_signal(number)
    assert "seed: 'x' is not a whole number" in rank.communicate()[1]
    assert rank.returncode == 2


def test_the_first_rank_of_a_second_machine_says_it_too():
    rank = start(2, local_rank=0)
    assert "seed: 'x' is not a whole number" in rank.communicate()[1]
    assert rank.returncode == 2


def test_a_rank_that_holds_back_leaves_at_once_at_a_signal_and_in_a_while_without():
    hurried, patient = start(1), start(2)
    time.sleep(0.5)
    assert hurried.poll() is None
    hurried.terminate()
    for rank, seconds in ((hurried, 3), (patient, 30)):
        assert rank.communicate(timeout=allowed(seconds)) == ("", "")
        assert rank.returncode == 2


def run_module(name: str, *words: str, more: str = "", without_packages: bool = False) -> subprocess.CompletedProcess[str]:
    """A command as a shell runs it, with `more` (redirections) after it."""
    flags = "-S" if without_packages else ""
    line = f"{shlex.quote(sys.executable)} {flags} -m dist_trainer.{name} {shlex.join(words)} {more}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=100, env=environment)


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "report"])
def test_a_missing_package_is_a_sentence_with_the_python_that_has_it(command):
    done = run_module(command, *([] if command == "train" else ["runs/default"]), without_packages=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"dist_trainer: the package \w+ is not installed for {re.escape(sys.executable)}; .*\n", done.stderr)


def test_a_package_that_the_user_s_own_code_lacks_is_not_taken_for_ours():
    with pytest.raises(ModuleNotFoundError) as found:
        import no_such_package  # type: ignore[import-not-found] # noqa: F401
    assert missing_package(found.value) is None


@pytest.mark.parametrize("more", ["2>&-", ">&-", "<&- >&- 2>&-", "2> >(true)", "2>/dev/full"])
def test_if_nobody_reads_what_is_printed_the_exit_code_is_the_same(more):
    assert run_module("train", "--seed", "x", more=more).returncode == 2


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("more", [">&-", "| head -c 1", "| true", "2>&-"])
def test_who_has_read_enough_of_the_output_sees_no_error(monkeypatch, more, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = run_module("train", "--print_config", more=f"{more}; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, "")


def test_what_any_library_prints_to_stderr_is_masked_while_a_command_runs(capsys, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a-secret-of-mine")
    before = sys.stderr

    def act() -> int:
        print("using a-secret-of-mine", file=sys.stderr)
        return 0

    assert run_cli(act) == 0
    assert capsys.readouterr().err == "using ***\n"
    assert sys.stderr is before


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 75), (ConfigError("x"), 2), (TrainingDivergedError("x"), 3), (StoppedError(15), 75)],
)
def test_each_error_has_its_exit_code(monkeypatch, error, code):
    """One process, so that the command returns it; Ctrl-C before a handler is installed is a preemption as later."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def act() -> int:
        raise error

    assert run_cli(act) == code


ENDS = """
import atexit, ctypes, sys, threading, time
atexit.register(print, "registered before")
from dist_trainer.run.cli import end_process
if {without}:
    del atexit._run_exitfuncs
class CleanedUp:
    def __del__(self):
        print("cleaned up")
kept = CleanedUp()
kept.itself = kept
atexit.register(print, "registered after")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread done"))).start()
ctypes.CDLL(None).puts(b"printed by C")
print("printed", end=" ")
end_process(75)
"""


@pytest.mark.parametrize("without", [False, True])
def test_a_command_leaves_nothing_undone_but_the_interpreter_s_own_clean_up(without):
    """With the private function of atexit that skips it, and without, should a later Python lack it."""
    done = subprocess.run([sys.executable, "-c", ENDS.format(without=without)], capture_output=True, text=True, timeout=60)
    lines = ["printed thread done", "registered after", "registered before"]
    assert [line for line in done.stdout.splitlines() if line in lines] == lines
    assert "printed by C" in done.stdout
    assert ("cleaned up" in done.stdout) is without
    assert (done.returncode, done.stderr) == (75, "")
