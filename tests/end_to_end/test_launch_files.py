"""The launch files say what they should to torchrun, srun and SLURM; stand-ins on PATH take the commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_trainer.distributed.machine import usable_cpus

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = [*(path for name in ("launch", "slurm") for path in sorted((REPOSITORY / name).glob("*.sh"))), REPOSITORY / ".ci/run"]

# A python that prints what it should run with ranks, answers for the config, and is the real one for everything else.
STAND_IN = """#!/bin/bash
case "$*" in
  *--reject*) echo bad >&2; exit 2 ;;
  *--preset*--print_config*) exec {python} "$@" ;;
  *--print_config*) micro=${{MICRO:-null}}
    ((16 % (${{WORLD_SIZE:-1}} * ${{micro/null/1}}))) && exit 2
    printf 'run_name: demo\\noutput_dir: {runs}\\ncheckpoint: {{resume: %s}}\\n' "${{RESUME:-auto}}"
    printf 'batch:\\n  global_batch_size: 16\\n  micro_batch_size: %s\\n' "${{MICRO:-null}}" ;;
  *torch.cuda.device_count*) echo "${{GPUS:-0}}" ;;
  "-m torch.distributed.run"* | "-m dist_trainer.train"*) echo "RUN OMP_NUM_THREADS=$OMP_NUM_THREADS $*" ;;
  *) exec {python} "$@" ;;
esac
"""


def torchrun_source() -> str:
    """Read, not imported: that would take seconds."""
    import_path = next(p for p in map(Path, sys.path) if (p / "torch/distributed/run.py").is_file())
    return (import_path / "torch/distributed/run.py").read_text()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    return stand_in_under(tmp_path)


def stand_in_under(tmp_path: Path) -> Path:
    """A folder for PATH, with a `python` in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_program(folder / "python", STAND_IN.format(runs=tmp_path / "runs", python=sys.executable))
    return folder


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def launch(script: str, *arguments: str, stand_in: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a launch file with nothing of the surrounding job or machine in its environment."""
    clean = {name: os.environ[name] for name in ("HOME", "LANG", "DIST_TRAINER_CACHE") if name in os.environ}
    path = f"{stand_in}:/usr/bin:/bin"
    return subprocess.run(
        [REPOSITORY / script, *arguments],
        env={**clean, "PATH": path, "PYTHON": str(stand_in / "python"), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_bash_and_can_be_executed(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    is_command = script.read_text().startswith("#!")  # the others are read by these
    assert os.access(script, os.X_OK) == is_command


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_scripts_please_shellcheck() -> None:
    """Above the level of its hints, which differ between its versions."""
    scripts = [*SCRIPTS, *sorted((REPOSITORY / "tests/slurm").glob("*.sh"))]
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--severity=warning", *scripts], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_machine_without_gpu_trains_in_one_process_with_all_cores(stand_in: Path) -> None:
    done = launch("launch/local.sh", "--train.max_steps", "3", stand_in=stand_in)
    assert done.returncode == 0, done.stderr
    assert f"RUN OMP_NUM_THREADS={usable_cpus()} -m dist_trainer.train --train.max_steps 3" in done.stdout


@pytest.mark.usefixtures("not_under_nohup")
def test_several_ranks_share_the_cores_under_torchrun(stand_in: Path) -> None:
    done = launch("launch/local.sh", "--seed", "1", stand_in=stand_in, NPROC="2", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    run = done.stdout.splitlines()[-1]
    assert run.startswith("RUN OMP_NUM_THREADS=3 -m torch.distributed.run --max-restarts=0")
    assert run.endswith("--nproc-per-node=2 --standalone -m dist_trainer.train --seed 1")
    assert "SIGUSR1,SIGHUP" in run or "signals-to-handle" not in torchrun_source()


@pytest.mark.skipif("signals-to-handle" not in torchrun_source(), reason="this torchrun takes the signals it likes")
def test_under_nohup_torchrun_leaves_the_hang_up_ignored(stand_in: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = launch("launch/local.sh", stand_in=stand_in, NPROC="2")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT,SIGUSR1 " in done.stdout, done.stderr


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_the_command_is_printed_without_secrets(stand_in: Path, ranks: str) -> None:
    secret = "sesame-open-up-now"
    words = ["--hub.token", secret, "--data.dataset", f"https://me:{secret}@host/x", "--run_name", f"x-{secret}-x"]
    done = launch("launch/local.sh", *words, stand_in=stand_in, NPROC=ranks, PGPASSWORD=secret)
    said, run = done.stdout.splitlines()[-2:]
    assert said.startswith("OMP_NUM_THREADS=")
    assert said.endswith("--hub.token *** --data.dataset https://***@host/x --run_name x-***-x")
    assert run.count(secret) == 3, "which is what is run"


@pytest.mark.parametrize(("gpus", "micro", "ranks"), [("8", "null", 8), ("7", "null", 4), ("3", "null", 2), ("6", "8", 2)])
def test_gpus_that_cannot_share_the_global_batch_evenly_are_left_alone(
    stand_in: Path, gpus: str, micro: str, ranks: int
) -> None:
    write_program(stand_in / "nvidia-smi", "#!/bin/bash\n")
    done = launch("launch/local.sh", stand_in=stand_in, GPUS=gpus, MICRO=micro)
    assert f"--nproc-per-node={ranks} --standalone" in done.stdout, done.stderr
    assert (f"training on {ranks} of {gpus} GPUs" in done.stderr) == (ranks < int(gpus))


def test_all_gpus_train_a_preset_whose_micro_batch_follows_from_their_number(stand_in: Path) -> None:
    write_program(stand_in / "nvidia-smi", "#!/bin/bash\n")
    done = launch("launch/local.sh", "--preset", "10m", stand_in=stand_in, GPUS="8")
    assert "--nproc-per-node=8 --standalone" in done.stdout, done.stderr


def test_a_number_of_ranks_that_was_asked_for_is_not_changed(stand_in: Path) -> None:
    assert "--nproc-per-node=3" in launch("launch/local.sh", stand_in=stand_in, NPROC="3").stdout


def test_arguments_with_spaces_arrive_unsplit(stand_in: Path) -> None:
    write_program(stand_in / "python", f'#!/bin/bash\n[[ $1 == -m ]] || exec {sys.executable} "$@"\nprintf "<%s>" "$@"\n')
    done = launch("launch/local.sh", "--data.template", "{context} and {question}", stand_in=stand_in)
    assert "<--data.template><{context} and {question}>" in done.stdout


def test_a_config_error_comes_once_and_before_the_ranks(stand_in: Path) -> None:
    done = launch("launch/local.sh", "--reject", stand_in=stand_in, NPROC="2")
    assert (done.returncode, done.stderr.strip()) == (2, "bad")
    assert "RUN" not in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--preset", "list"]])
def test_help_needs_no_ranks_but_a_prompt_that_contains_it_does(stand_in: Path, words: list[str]) -> None:
    alone = launch("launch/local.sh", *words, stand_in=stand_in, NPROC="2").stdout
    assert f"-m dist_trainer.train {' '.join(words)}" in alone
    assert "torch.distributed.run" not in alone
    prompt = launch("launch/local.sh", "--tracking.sample_prompt", f"so {' '.join(words)} or", stand_in=stand_in, NPROC="2")
    assert "-m torch.distributed.run" in prompt.stdout


def test_multinode_names_what_is_not_set(stand_in: Path) -> None:
    done = launch("launch/multinode.sh", stand_in=stand_in, NODES="2", MASTER_ADDR="node1")
    assert done.returncode == 2
    assert "not set: NODE_RANK MASTER_PORT" in done.stderr


def test_multinode_rejects_a_rank_outside_the_nodes(stand_in: Path) -> None:
    variables = {"NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29501"}
    done = launch("launch/multinode.sh", stand_in=stand_in, **variables)
    assert done.returncode == 2
    assert "NODE_RANK (2) must be from 0 to NODES - 1 (1)" in done.stderr


@pytest.mark.parametrize("node_rank", ["0", "1"])
def test_multinode_meets_at_the_first_machine(stand_in: Path, node_rank: str) -> None:
    variables = {"NODES": "2", "NODE_RANK": node_rank, "MASTER_ADDR": "node1", "MASTER_PORT": "29501", "NPROC": "4"}
    run = launch("launch/multinode.sh", "--seed", "1", stand_in=stand_in, **variables).stdout.splitlines()[-1]
    assert "--nproc-per-node=4" in run
    assert "--nnodes=2 --rdzv-backend=c10d" in run
    assert "--rdzv-endpoint=node1:29501" in run
    assert f"--rdzv-conf=is_host={int(node_rank == '0')} -m dist_trainer.train --seed 1" in run


def test_torchrun_gives_rank_0_to_machine_0_and_an_address_of_it_that_all_reach(stand_in: Path) -> None:
    """It sorts the machines by these, as text, and has the ranks meet at the first one's."""
    meeting = {"NODES": "12", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "NPROC": "1"}
    found = []
    for node_rank in ("0", "2", "10"):
        said = launch("launch/multinode.sh", stand_in=stand_in, NODE_RANK=node_rank, **meeting).stdout
        found += re.findall(r"--local-addr=(\S+)", said.splitlines()[-1])
    assert found == ["127.0.0.1", "~00002,127.0.0.1", "~00010,127.0.0.1"]
    assert found == sorted(found)


def test_brackets_around_an_ipv6_address_are_not_part_of_it(stand_in: Path) -> None:
    meeting = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "[fd00::9]", "MASTER_PORT": "29501", "NPROC": "1"}
    run = launch("launch/multinode.sh", stand_in=stand_in, **meeting).stdout.splitlines()[-1]
    assert "--local-addr=fd00::9 " in run
    assert "--rdzv-endpoint=fd00::9:29501 " in run


@pytest.mark.parametrize(("node_rank", "local_address"), [("0", "no-such-machine.invalid"), ("1", "~00001,unknown")])
def test_an_unresolvable_machine_0_is_reported_before_torchrun_tries(
    stand_in: Path, node_rank: str, local_address: str
) -> None:
    """Only that: in a cluster that starts its machines together, names may be known a moment later."""
    meeting = {
        "NODES": "2",
        "NODE_RANK": node_rank,
        "MASTER_ADDR": "no-such-machine.invalid",
        "MASTER_PORT": "29501",
        "NPROC": "1",
    }
    done = launch("launch/multinode.sh", stand_in=stand_in, **meeting)
    assert "WARNING: this machine cannot resolve MASTER_ADDR (no-such-machine.invalid), or has no route to it" in done.stderr
    assert f"--local-addr={local_address} " in done.stdout


def test_a_gpu_that_torch_cannot_use_is_reported_with_the_remedy(stand_in: Path) -> None:
    table = 'echo "| Driver Version: 550.54   CUDA Version: 12.4  |"'
    nvidia = f'#!/bin/bash\nif [[ ${{1:-}} == -L ]]; then echo "GPU 0: A"; else {table}; fi\n'
    write_program(stand_in / "nvidia-smi", nvidia)
    done = launch("launch/local.sh", stand_in=stand_in)
    assert "WARNING: this machine has a GPU, but the torch of" in done.stderr
    assert "such as make setup TORCH=cu126 (the driver supports CUDA 12.4 and older)" in done.stderr
    hidden = launch("launch/local.sh", stand_in=stand_in, CUDA_VISIBLE_DEVICES="")
    assert "WARNING" not in hidden.stderr, "which was asked for"
    assert "WARNING" not in launch("launch/local.sh", stand_in=stand_in, GPUS="1").stderr


def test_ranks_of_one_machine_do_not_depend_on_its_name(stand_in: Path) -> None:
    assert "--local-addr=localhost " in launch("launch/local.sh", stand_in=stand_in, NPROC="2").stdout


@pytest.mark.parametrize(
    ("script", "name", "value"),
    [
        ("launch/local.sh", "NPROC", "auto"),
        ("launch/local.sh", "NPROC", "0"),
        ("launch/local.sh", "NPROC", "-1"),
        ("launch/local.sh", "NPROC", "08"),
        ("launch/local.sh", "MAX_RESTARTS", "often"),
        ("launch/local.sh", "SHUTDOWN_TIMEOUT", "2m"),
        ("launch/multinode.sh", "NPROC", "gpu"),
        ("launch/multinode.sh", "NODES", "1:2"),
        ("launch/multinode.sh", "NODE_RANK", "first"),
        ("launch/multinode.sh", "MASTER_PORT", "65534"),
        ("slurm/train.sh", "NPROC", "auto"),
        ("slurm/train.sh", "MAX_TRIES", "0"),
    ],
)
def test_an_impossible_number_is_rejected_in_one_sentence(
    stand_in: Path, slurm: dict[str, str], script: str, name: str, value: str
) -> None:
    meeting = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    done = launch(script, stand_in=stand_in, **{**meeting, **slurm, name: value})
    assert done.returncode == 2
    (said,) = (done.stdout + done.stderr).splitlines()
    assert f"{name} is '{value}', but must be a whole number from " in said


# --------------------------------------------------------------------------------------------------- SLURM

# srun runs its command once, as the first of the nodes; what the run leaves in its status comes from $STATE, what SLURM
# says of the job from $FACTS.
FAKE_SLURM = {
    "scontrol": """case "$*" in
  "show job "*) echo "${FACTS:-}" ;;
  show*) echo node1 ;;
  *) echo "SCONTROL $*" ;;
esac""",
    "scancel": 'echo "SCANCEL $*"',
    "squeue": 'echo "$SLURM_JOB_ID.0"',
    "sleep": "exit 0",
    "getent": "echo 10.0.0.1 node1",
    "srun": """echo "SRUN $*"
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@"
[[ -z ${STATE:-} ]] || printf '{"state": "%s", "time": %s}' "$STATE" "$RANDOM" >"$RUN/status.json"
[[ -z ${CHECKPOINT:-} ]] || { mkdir "$RUN/checkpoints"; ln -s "step-$CHECKPOINT" "$RUN/checkpoints/latest"; }
[[ -z ${SIGNAL:-} ]] || { kill -"$SIGNAL" $PPID; /bin/sleep 0.3; }
exit ${SRUN_CODE:-0}""",
}


@pytest.fixture
def slurm(stand_in: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a two-node job with eight GPUs a node."""
    for name, text in FAKE_SLURM.items():
        write_program(stand_in / name, f"#!/bin/bash\n{text}\n")
    (tmp_path / "runs/demo").mkdir(parents=True)
    return {
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "12345",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_CPUS_PER_TASK": "32",
        "NPROC": "8",
        "RUN": str(tmp_path / "runs/demo"),
    }


def test_sbatch_starts_torchrun_on_every_node(stand_in: Path, slurm: dict[str, str]) -> None:
    done = launch("slurm/train.sh", "--config", "configs/x.yaml", stand_in=stand_in, **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    logs = f"{slurm['RUN']}/logs/job-12345-try-0-%N.log"
    assert f"SRUN --ntasks-per-node=1 --kill-on-bad-exit=1 --output={logs} launch/multinode.sh" in done.stdout
    assert re.search(r"OMP_NUM_THREADS=4 -m torch\.distributed\.run .*--nproc-per-node=8 --nnodes=2 ", done.stdout)
    assert "--nnodes=2 --rdzv-backend=c10d --rdzv-id=12345-0 --rdzv-endpoint=node1:21035" in done.stdout
    assert "-m dist_trainer.train --config configs/x.yaml" in done.stdout
    assert "requeue" not in done.stdout


def test_a_run_in_the_home_folder_has_its_logs_there(stand_in: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    program = stand_in / "python"
    write_program(program, program.read_text().replace(f"output_dir: {tmp_path}/runs", "output_dir: ~/runs"))
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "runs" / "demo" / "logs").is_dir()
    assert not (REPOSITORY / "~").exists()


def test_sbatch_can_start_each_rank_by_srun(stand_in: Path, slurm: dict[str, str]) -> None:
    done = launch("slurm/train.sh", stand_in=stand_in, LAUNCHER="srun", **slurm)
    assert "SRUN --ntasks=16 --ntasks-per-node=8 --cpus-per-task=4" in done.stdout
    assert "torch.distributed.run" not in done.stdout


@pytest.mark.parametrize("word", ["--help", "-h", "--version", "--print_config", "--print_completion=bash", "--preset=list"])
def test_sbatch_leaves_no_files_if_no_ranks_are_requested(stand_in: Path, slurm: dict[str, str], word: str) -> None:
    run = Path(slurm["RUN"])
    run.rmdir()
    done = launch("slurm/train.sh", "--seed", "1", word, stand_in=stand_in, **slurm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("run_name: demo" if word == "--print_config" else f"-m dist_trainer.train --seed 1 {word}") in done.stdout
    assert "SRUN" not in done.stdout
    assert not run.exists()


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_dry_run_by_sbatch_speaks_into_the_job_s_log_alone(stand_in: Path, slurm: dict[str, str], launcher: str) -> None:
    run = Path(slurm["RUN"])
    run.rmdir()
    done = launch("slurm/train.sh", "--dry_run", stand_in=stand_in, LAUNCHER=launcher, **{**slurm, "RUN": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    (started,) = [line for line in done.stdout.splitlines() if line.startswith("SRUN ")]
    assert started.endswith(" --dry_run")
    assert "--output" not in started
    assert "logs are in" not in done.stdout
    assert not run.exists()


@pytest.mark.parametrize(
    ("environment", "requeued", "code"),
    [
        ({"STATE": "preempted", "SRUN_CODE": "1"}, True, 1),  # saved and left in time: ours to requeue
        ({"STATE": "preempted", "SIGNAL": "USR1"}, True, 1),  # the same, asked by this script before the time limit
        ({"STATE": "preempted", "SRUN_CODE": "143", "SIGNAL": "TERM"}, False, 143),  # scancel, or SLURM's own requeue
        ({"STATE": "preempted", "SLURM_RESTART_COUNT": "4", "MAX_TRIES": "5"}, False, 1),
        ({"SLURM_RESTART_COUNT": "5", "MAX_TRIES": "5"}, False, 2),  # SLURM itself requeued it once more
        ({"SRUN_CODE": "143", "SIGNAL": "USR1"}, True, 1),  # asked to leave before it had anything to save
        ({"SRUN_CODE": "143", "FACTS": "JobId=12345 PreemptTime=2026-11-25T03:44:29"}, True, 1),  # the same, by SLURM
        ({"SRUN_CODE": "9", "FACTS": "JobId=12345 PreemptTime=None"}, False, 9),
        ({"STATE": "failed", "SRUN_CODE": "3", "SIGNAL": "USR1"}, False, 3),
        ({"STATE": "finished", "SIGNAL": "USR1"}, False, 0),
        ({"SRUN_CODE": "143", "SIGNAL": "TERM", "FACTS": "Reason=TimeLimit"}, False, 143),  # no checkpoint was made
        ({"SRUN_CODE": "143", "SIGNAL": "TERM", "FACTS": "Reason=TimeLimit", "CHECKPOINT": "5"}, True, 143),
        ({"STATE": "failed", "SRUN_CODE": "3"}, False, 3),
        ({"STATE": "finished"}, False, 0),
        ({"SRUN_CODE": "9"}, False, 9),  # died before it said anything
    ],
)
def test_only_a_run_that_saved_and_left_goes_back_to_the_queue(
    stand_in: Path, slurm: dict[str, str], environment: dict[str, str], requeued: bool, code: int
) -> None:
    (Path(slurm["RUN"]) / "status.json").write_text('{"state": "preempted"}')  # of an earlier life
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, **environment)
    assert ("SCONTROL requeue 12345" in done.stdout) == requeued, done.stdout + done.stderr
    assert done.returncode == code  # after a requeue SLURM ends the script; here it runs to its end
    assert ("SCANCEL --signal=TERM 12345" in done.stdout) == (environment.get("SIGNAL") == "USR1")


def test_a_task_of_an_array_means_itself_and_not_the_entire_array(stand_in: Path, slurm: dict[str, str]) -> None:
    """The last task bears the array's own number."""
    task = {"SLURM_ARRAY_JOB_ID": "12345", "SLURM_ARRAY_TASK_ID": "3", "STATE": "preempted", "SIGNAL": "USR1"}
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, **task)
    assert "SCANCEL --signal=TERM 12345_3\n" in done.stdout
    assert "SCONTROL requeue 12345_3\n" in done.stdout


def test_each_task_of_a_sweep_takes_its_own_line(stand_in: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("--seed 1\n--seed 2 --data.template '{text}  $(id) \"now\"'\n")
    task = {"SLURM_ARRAY_JOB_ID": "12340", "SWEEP": str(sweep)}
    done = launch("slurm/train.sh", "--a", stand_in=stand_in, **slurm, **task, SLURM_ARRAY_TASK_ID="2")
    assert '-m dist_trainer.train --a --seed 2 --data.template {text}  $(id) "now"\n' in done.stdout


@pytest.mark.parametrize(
    ("number", "refusal"),
    [
        ("1", "line 1 of {sweep} has an unclosed quote: --data.template 'a"),
        ("2", "{sweep} has no line 2, or an empty one"),
        ("4", "{sweep} has no line 4, or an empty one"),
        ("0", "{sweep} has no line 0, or an empty one"),
        ("", "SWEEP needs a job array"),
    ],
)
def test_a_task_without_a_line_that_can_be_read_is_rejected(
    stand_in: Path, slurm: dict[str, str], tmp_path: Path, number: str, refusal: str
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_bytes(b"--data.template 'a\n \r\n--seed 3\n")
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, SWEEP=str(sweep), SLURM_ARRAY_TASK_ID=number)
    assert (done.returncode, refusal.format(sweep=sweep) in done.stdout) == (2, True), done.stdout
    assert "xargs" not in done.stderr


def test_a_line_may_have_an_empty_word_and_end_in_a_carriage_return(
    stand_in: Path, slurm: dict[str, str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_bytes(b" \r\n--seed 3 --data.template ''\r\n")
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, SWEEP=str(sweep), SLURM_ARRAY_TASK_ID="2")
    assert "-m dist_trainer.train --seed 3 --data.template \n" in done.stdout, done.stdout


@pytest.mark.parametrize(("save_seconds", "given", "warned"), [(80, "", True), (60, "", False), (60, "B:USR1@100", True)])
def test_a_signal_too_late_for_the_save_that_was_measured_is_warned_of(
    stand_in: Path, slurm: dict[str, str], save_seconds: float, given: str, warned: bool
) -> None:
    """180 s are given by the script's own line; a step, two saves and half a minute must fit in."""
    run = Path(slurm["RUN"])
    (run / "status.json").write_text(json.dumps({"state": "preempted", "checkpoint_seconds": save_seconds}))
    train_line = {"kind": "train", "step_seconds": 2.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (train_line, {"kind": "validation"})))
    signal = {"SBATCH_SIGNAL": given} if given else {}
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, **signal)
    assert (f"WARNING: this run needs {2 * save_seconds + 33} s to save and exit" in done.stdout) == warned, done.stdout


def test_what_a_step_needs_reaches_it_if_sbatch_exports_nothing(stand_in: Path, slurm: dict[str, str]) -> None:
    """There SLURM sets SLURM_EXPORT_ENV=NONE for the sruns of a job; a site's SRUN_EXPORT_ENV would win over it."""
    exports = "${SRUN_EXPORT_ENV:-$SLURM_EXPORT_ENV}"
    write_program(stand_in / "srun", f'#!/bin/bash\necho "EXPORTS {exports}, GPUS ${{SLURM_GPUS_ON_NODE:-its own}}"\n')
    given = {**slurm, "SLURM_EXPORT_ENV": "NONE", "SRUN_EXPORT_ENV": "NONE", "SLURM_GPUS_ON_NODE": "8"}
    assert "EXPORTS ALL, GPUS its own" in launch("slurm/train.sh", stand_in=stand_in, **given).stdout


@pytest.mark.parametrize(
    ("on_node", "ranks"),
    [
        ({"GPUS": "8"}, 8),  # without GRES SLURM knows of no GPUs
        ({"GPUS": "4", "SLURM_GPUS_ON_NODE": "4"}, 4),  # a node with fewer than the first one
        ({"GPUS": "0", "SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"GPUS": "0"}, 1),
        ({"GPUS": "0", "SLURM_GPUS_ON_NODE": "0"}, 1),
    ],
)
def test_each_node_starts_a_rank_on_each_of_its_own_gpus(
    stand_in: Path, slurm: dict[str, str], on_node: dict[str, str], ranks: int
) -> None:
    write_program(stand_in / "nvidia-smi", "#!/bin/bash\n")
    variables = " ".join(f"export {name}={value};" for name, value in on_node.items())
    started = FAKE_SLURM["srun"].replace("SLURM_NODEID=0", f"{variables} SLURM_NODEID=0")
    write_program(stand_in / "srun", f"#!/bin/bash\n{started}\n")
    given = {**slurm, "NPROC": "", "SLURM_GPUS_ON_NODE": "8"}
    done = launch("slurm/train.sh", stand_in=stand_in, **given)
    assert f"--nproc-per-node={ranks} --nnodes=2 " in done.stdout, done.stdout + done.stderr
    assert f"OMP_NUM_THREADS={32 // ranks} " in done.stdout


@pytest.mark.parametrize(("counts", "ranks"), [("4 4", "4"), ("8 4", None)])
def test_srun_starts_as_many_ranks_as_each_node_has_gpus_or_stops_with_an_error(
    stand_in: Path, slurm: dict[str, str], counts: str, ranks: str | None
) -> None:
    counting = f'case "$*" in *ranks.sh*) printf "%s\\n" {counts}; exit ;; esac\n'
    write_program(stand_in / "srun", f"#!/bin/bash\n{counting}{FAKE_SLURM['srun']}\n")
    done = launch("slurm/train.sh", stand_in=stand_in, LAUNCHER="srun", **{**slurm, "NPROC": ""})
    if ranks is None:
        assert done.returncode == 2
        assert "nodes have 4 and 8 GPUs, but LAUNCHER=srun starts the same number of ranks on each: set NPROC" in done.stdout
    else:
        assert f"SRUN --ntasks={2 * int(ranks)} --ntasks-per-node={ranks} --cpus-per-task={32 // int(ranks)} " in done.stdout


def test_a_site_s_file_and_options_of_srun_come_between(stand_in: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text(
        'if [[ -z $NOT_SET ]]; then export FROM_SITE=1; fi\nRANKS_PYTHON=inside\nCONTAINER_COMMAND="env A=1"\n'
        "SRUN_OPTIONS=\"--container-image=x.sqsh --container-mounts='/a b',/c\"\n"
    )
    write_program(stand_in / "inside", '#!/bin/bash\necho "INSIDE FROM_SITE=$FROM_SITE A=$A"; exec python "$@"\n')
    for launcher, command in (("torchrun", "launch/multinode.sh"), ("srun", "inside -m dist_trainer.train")):
        done = launch("slurm/train.sh", stand_in=stand_in, SITE_FILE=str(site), LAUNCHER=launcher, **slurm)
        (started,) = [line for line in done.stdout.splitlines() if line.startswith("SRUN ")]
        assert f" --container-image=x.sqsh --container-mounts=/a b,/c env A=1 {command}" in started
        assert "INSIDE FROM_SITE=1 A=1" in done.stdout, done.stdout + done.stderr
    missing = launch("slurm/train.sh", stand_in=stand_in, SITE_FILE="nowhere.sh", **slurm)
    assert (missing.returncode, "there is no nowhere.sh (SITE_FILE)" in missing.stdout) == (2, True)


@pytest.mark.parametrize(
    ("site", "found", "address"),
    [
        ("", "10.0.0.1 node1", "node1"),
        ("", "127.0.1.1 node1", "10.0.0.7"),
        ("", "::1 node1", "10.0.0.7"),
        ("", "", "10.0.0.7"),
        ("MASTER_ADDR=$(echo node1)-ib0", "10.0.0.1 node1", "node1-ib0"),
    ],
)
def test_the_rendezvous_is_on_the_first_node_at_an_address_that_others_reach_or_where_the_site_says(
    stand_in: Path, slurm: dict[str, str], tmp_path: Path, site: str, found: str, address: str
) -> None:
    write_program(stand_in / "getent", f'#!/bin/bash\n[[ -n "{found}" ]] && echo "{found}"\n')
    node = 'case "$*" in "show node "*) echo "   NodeAddr=10.0.0.7 Version=24"; exit ;; esac\n'
    write_program(stand_in / "scontrol", f"#!/bin/bash\n{node}{FAKE_SLURM['scontrol']}\n")
    (tmp_path / "site.sh").write_text(site)
    stale = {"MASTER_ADDR": "left-by-another-job", "SITE_FILE": str(tmp_path / "site.sh")}
    done = launch("slurm/train.sh", stand_in=stand_in, **slurm, **stale)
    assert f", rendezvous at {address}:21035" in done.stdout, done.stdout + done.stderr
    assert f"--rdzv-endpoint={address}:21035 " in done.stdout


def test_what_is_left_of_the_time_limit_is_checked_when_the_signal_comes(stand_in: Path, slurm: dict[str, str]) -> None:
    (Path(slurm["RUN"]) / "status.json").write_text('{"checkpoint_seconds": 1}')
    (Path(slurm["RUN"]) / "metrics.jsonl").touch()
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 29))
    done = launch(
        "slurm/train.sh", stand_in=stand_in, **slurm, SIGNAL="USR1", FACTS=f"   StartTime=x EndTime={end} Deadline=N/A"
    )
    assert re.search(r"the time limit is near: 2\d s left", done.stdout), done.stdout
    assert "WARNING: this run needs 32 s to save and exit, but has 2" in done.stdout


def test_a_requeued_run_does_not_start_over_again(stand_in: Path, slurm: dict[str, str]) -> None:
    first = launch("slurm/train.sh", stand_in=stand_in, RESUME="never", **slurm)
    again = launch("slurm/train.sh", stand_in=stand_in, RESUME="never", SLURM_RESTART_COUNT="1", **slurm)
    assert "--checkpoint.resume auto" not in first.stdout
    assert "-m dist_trainer.train --checkpoint.resume auto" in again.stdout


def test_a_job_from_the_wrong_folder_is_rejected(stand_in: Path, slurm: dict[str, str], tmp_path: Path) -> None:
    done = launch("slurm/train.sh", stand_in=stand_in, **{**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2
    assert "is not the repository's folder: cd there before sbatch" in done.stdout
