"""The real `verify`, which starts ranks by itself."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.end_to_end.commands import ROOT, SMALL, command, environment, torchrun


@pytest.mark.slow  # several launches of torchrun; tests/distributed/test_verifying.py has the same on forked ranks
def test_a_run_of_two_ranks_is_the_same_on_one_and_on_two_that_verify_starts(tmp_path):
    trained = torchrun(2, *SMALL, "--output_dir", str(tmp_path), "--run_name", "run")
    assert trained.returncode == 0, trained.stderr
    done = command(str(tmp_path / "run"), "--ranks", "1,2", module="dist_trainer.verify")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 and 2 ranks" in done.stdout
    assert done.stdout.endswith("equal\n")
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert (certificate["ranks"], certificate["run_ranks"], certificate["threads"]) == ([1, 2], 2, {"1": 1, "2": 1})
    refused = command(str(tmp_path / "run"), "--ranks", "3", module="dist_trainer.verify")
    assert refused.returncode == 2
    assert "3 ranks cannot share" in refused.stderr


@pytest.mark.slow
def test_a_stopped_verify_leaves_no_rank_and_no_scratch_folder(tmp_path):
    words = [*SMALL, "--train.max_steps", "100000", "--ranks", "2", "--steps", "1-90000", "--output", str(tmp_path / "c.json")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_trainer.verify", *words],
        cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path)),
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stderr is not None
    while "replaying steps" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    process.stderr.close()
    assert not list(tmp_path.glob("dist_trainer-verify-*"))
    assert not (tmp_path / "c.json").exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
