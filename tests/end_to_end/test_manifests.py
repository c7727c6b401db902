"""launch/kubeflow.yaml and launch/skypilot.yaml: valid by their own schemas, and what they run is what it should be."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_trainer.run.configure import load_config
from tests.end_to_end.test_launch_files import REPOSITORY, stand_in_under

KUBEFLOW = list(yaml.safe_load_all((REPOSITORY / "launch/kubeflow.yaml").read_text()))
RUNTIME, JOB = KUBEFLOW
SKYPILOT = yaml.safe_load((REPOSITORY / "launch/skypilot.yaml").read_text())


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    return stand_in_under(tmp_path)


def bash(words: list[str], stand_in: Path, **environment: str) -> str:
    """The command that `words` end in, as the stand-in for torchrun prints it."""
    clean = {name: os.environ[name] for name in ("HOME", "LANG", "DIST_TRAINER_CACHE") if name in os.environ}
    done = subprocess.run(
        words,
        env={**clean, "PATH": f"{stand_in}:/usr/bin:/bin", "PYTHON": str(stand_in / "python"), **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def pod(runtime: dict[str, Any] = RUNTIME) -> dict[str, Any]:
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimit"] == 0, "a pod that restarts alone would wait for the others in vain"
    return job["template"]["spec"]["template"]["spec"]


def with_rdma() -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime and the job without the comment signs that RDMA takes away."""
    text = (REPOSITORY / "launch/kubeflow.yaml").read_text()
    runtime, job = yaml.safe_load_all(
        re.sub(r"^( *)# (?=securityContext:| +capabilities:| +add:|rdma/)", r"\1", text, flags=re.M)
    )
    return runtime, job


def test_kubeflow_s_pods_may_lock_memory_and_have_the_device_if_rdma_is_wanted() -> None:
    runtime, job = with_rdma()
    (container,) = pod(runtime)["containers"]
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    limits = job["spec"]["trainer"]["resourcesPerNode"]["limits"]
    assert sorted(name.partition("/")[0] for name in limits) == ["nvidia.com", "rdma"]


def test_kubeflow_s_manifest_is_what_its_schema_says() -> None:
    """Its models pass over keys that they do not know: only what comes back whole was understood."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    kinds = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}
    for document in [*KUBEFLOW, *with_rdma()]:
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert kinds[document["kind"]].from_dict(document).to_dict() == document
    mistaken = copy.deepcopy(JOB)
    mistaken["spec"]["trainer"]["numNode"] = mistaken["spec"]["trainer"].pop("numNodes")
    assert kinds["TrainJob"].from_dict(mistaken).to_dict() != mistaken
    with pytest.raises(ValueError, match="numNodes"):
        kinds["TrainJob"].from_dict({**JOB, "spec": {**JOB["spec"], "trainer": {"numNodes": "two"}}})


def test_kubeflow_s_job_fits_its_runtime() -> None:
    assert JOB["spec"]["runtimeRef"] == {"kind": RUNTIME["kind"], "name": RUNTIME["metadata"]["name"]}
    (container,) = pod()["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert int(variables["SHUTDOWN_TIMEOUT"]) < pod()["terminationGracePeriodSeconds"], (
        "ranks may save until torchrun ends them, and it until SIGKILL"
    )
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod()["volumes"]}
    config = load_config(JOB["spec"]["trainer"]["args"])
    places = [config.output_dir, variables["DIST_TRAINER_CACHE"], variables["HF_HOME"]]
    assert all(Path(place).is_relative_to(mounts["runs"]) for place in places), "what is written elsewhere goes with the pod"


def test_kubeflow_s_pods_meet_at_the_first_one(stand_in: Path) -> None:
    trainer = JOB["spec"]["trainer"]
    given = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "dist-trainer-node-0-0.x", "PET_MASTER_PORT": "29400"}
    run = bash(trainer["command"] + trainer["args"], stand_in, **given, PET_NPROC_PER_NODE="auto", NPROC="8")
    assert "--nproc-per-node=8 --nnodes=2 --rdzv-backend=c10d" in run
    assert "--rdzv-endpoint=dist-trainer-node-0-0.x:29400 --rdzv-conf=is_host=0" in run
    assert run.endswith("-m dist_trainer.train --config=configs/gpt2_124m.yaml --run_name=gpt2 --output_dir=/runs")


@pytest.mark.slow  # importing SkyPilot takes long
def test_skypilot_s_file_is_what_its_schema_says() -> None:
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(REPOSITORY / "launch/skypilot.yaml"))
    (resources,) = task.resources
    assert (resources.use_spot, resources.accelerators, task.num_nodes) == (True, {"H100": 8}, 1)
    assert list(task.volumes) == ["/runs"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_starts_one_machine_or_several(stand_in: Path, nodes: int) -> None:
    given = {"SKYPILOT_NUM_NODES": str(nodes), "SKYPILOT_NODE_RANK": str(nodes - 1), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    run = bash(["bash", "-c", SKYPILOT["run"]], stand_in, **{**SKYPILOT["envs"], **given, "NPROC": "8"})
    meeting = "--standalone" if nodes == 1 else "--rdzv-endpoint=10.0.0.1:29501 --rdzv-conf=is_host=0"
    words = "--config configs/gpt2_124m.yaml --run_name gpt2 --output_dir /runs"
    assert run.endswith(f"{meeting} -m dist_trainer.train {words}")
    load_config(words.split())


def test_skypilot_keeps_runs_on_a_volume_and_knows_the_code_of_a_stopped_run() -> None:
    assert list(SKYPILOT["volumes"]) == ["/runs"]
    assert SKYPILOT["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
