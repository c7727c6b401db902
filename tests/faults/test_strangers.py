"""Other jobs, other people: a folder has one owner, a stranger's file does nothing, secrets are not written down."""

import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
import socket
import sys
import time

import numpy as np
import pytest

from dist_trainer.errors import ConfigError
from dist_trainer.run.configure import load_config
from dist_trainer.storage.manifest import MANIFEST, describe_files, digest_of_file, read_manifest
from tests.faults.conftest import a_run
from tests.faults.damage import contents
from tests.faults.faults import do, kill
from tests.faults.processes import wait_until
from tests.pace import allowed

SECONDS_TO_REFUSE = 10.0


# ------------------------------------------------------------------------------------------------ two jobs


def test_a_second_job_is_rejected_by_host_pid_and_start_of_the_first_which_is_unharmed(run, undisturbed):
    waiting, go_on = os.pipe()
    first = run.begin(do(lambda _: os.read(waiting, 1), at_step=7))
    wait_until(lambda: run.logged_steps() >= 6, of=first)
    owner = (
        rf"in use by another job \(host {re.escape(socket.gethostname())}, pid {first.pid}, since \d{{4}}-\d\d-\d\d [\d:]+\)"
    )
    for resume in ("auto", "never"):
        began = time.monotonic()
        second = run.start(config=run.but(checkpoint__resume=resume))
        assert time.monotonic() - began < allowed(SECONDS_TO_REFUSE)
        assert second.code == 2
        assert re.search(owner, second.said), second.said
    os.write(go_on, b"!")
    assert first.wait().code == 0
    run.equals(undisturbed)


def test_the_lock_of_a_dead_job_blocks_no_one(run, undisturbed):
    for step in (4, 7):
        assert run.start(kill(at_step=step)).was_killed
        assert f"host {socket.gethostname()}, pid " in (run.folder / ".lock").read_text()
    # Its number may be another process's by now, or the file anything.
    (run.folder / ".lock").write_text(f"host {socket.gethostname()}, pid {os.getpid()}, since 2020-01-01 00:00:00\n")
    assert run.start(kill(at_step=10)).was_killed
    (run.folder / ".lock").write_bytes(b"\xff\0 of no one")
    run.finish()
    run.equals(undisturbed)


# ------------------------------------------------------------------------------------- files from strangers


class Touch:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def seal(checkpoint):
    """A manifest that fits what stands there now, as a stranger would make it."""
    metadata = {key: value for key, value in read_manifest(checkpoint).items() if key not in ("files", "manifest_sha256")}
    (checkpoint / MANIFEST).unlink()
    (checkpoint / MANIFEST).write_text(describe_files(checkpoint, metadata))


@pytest.fixture
def checkpoint(undisturbed, tmp_path):
    """A copy of one that is intact."""
    return shutil.copytree(undisturbed.checkpoints / "step-00000010", tmp_path / "strangers" / "checkpoint")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json"])
def test_a_pickle_in_a_checkpoint_is_not_opened(checkpoint, text, tmp_path, name):
    harm = tmp_path / "harm"
    (checkpoint / name).write_bytes(pickle.dumps(Touch(harm)))
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(harm)))
    seal(checkpoint)
    heir = a_run(text, tmp_path / "heirs")
    for config in (
        heir.but(checkpoint__resume=str(checkpoint)),
        heir.but(model__init_from=str(checkpoint), data__tokenizer=str(checkpoint)),
    ):
        ended = heir.start(config=config)
        assert ended.code in (0, 2), ended.said
        assert "Traceback" not in ended.said
        assert not harm.exists()


def test_code_that_comes_with_a_tokenizer_or_a_model_is_not_run(checkpoint, text, tmp_path):
    harm = tmp_path / "harm"
    (checkpoint / "evil.py").write_text(f"open({str(harm)!r}, 'w')\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        path = checkpoint / name
        classes = '["evil.Evil", null]' if key == "AutoTokenizer" else '"evil.Evil"'
        path.write_text(path.read_text().replace("{", f'{{"auto_map": {{"{key}": {classes}}},', 1))
    seal(checkpoint)
    heir = a_run(text, tmp_path / "heirs", data__tokenizer=str(checkpoint), model__init_from=str(checkpoint))
    assert heir.start().code in (0, 2)
    assert not harm.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:builtins.open", "!!python/object/new:builtins.open", "!!python/name:"])
def test_tags_in_a_config_build_nothing(tmp_path, tag):
    (tmp_path / "config.yaml").write_text(f'run_name: {tag}["{tmp_path}/harm", "w"]\n')
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(["--config", str(tmp_path / "config.yaml")])
    assert not (tmp_path / "harm").exists()


def test_a_pickle_in_the_cache_of_tokens_is_not_opened(run, undisturbed, tmp_path):
    harm = tmp_path / "harm"
    config = run.but(data__cache_dir=str(tmp_path / "cache"))
    assert run.start(kill(at_step=7), config=config).was_killed
    stores = list((tmp_path / "cache" / "tokens").glob("*/offsets.npy"))
    assert stores
    for offsets in stores:
        objects = np.empty(1, object)
        objects[0] = Touch(harm)
        np.save(offsets, objects, allow_pickle=True)
        index = json.loads(offsets.with_name("index.json").read_text())
        index["digests"]["offsets.npy"] = digest_of_file(offsets)  # or the store is refused before anything is opened
        offsets.with_name("index.json").write_text(json.dumps(index))
    assert run.start(config=config).code == 0
    assert not harm.exists()
    run.equals(undisturbed)


# ---------------------------------------------------------------------------------------------------- links


@pytest.fixture
def outside(tmp_path):
    """A folder, and a file, that are no business of the run."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_text("ours\n")
    return folder


FILES = ["metrics.jsonl", "status.json", "config.yaml", "report.html", ".lock", "logs/rank-0.log", "logs/events.jsonl"]


@pytest.mark.parametrize("name", ["checkpoints", "logs", "wandb", *FILES, "nowhere"])
def test_a_link_in_place_of_a_file_or_folder_of_the_run_is_rejected_and_not_followed(run, outside, name):
    run.folder.mkdir(parents=True)
    path = run.folder / name.replace("nowhere", "metrics.jsonl")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to({"nowhere": outside / "new"}.get(name, outside / "precious" if name in FILES else outside))
    before = contents(outside)
    ended = run.start()
    assert ended.code == 2
    assert f"{path} is a symbolic link" in ended.said
    assert contents(outside) == before


def test_links_among_the_checkpoints_are_not_followed(run, undisturbed, outside, text, tmp_path):
    assert run.start(do(lambda trainer: trainer.checkpoints.wait(), at_step=8), kill(at_step=8)).was_killed
    stranger = a_run(text, tmp_path / "strangers")
    stranger.finish()
    stranger.newest().rename(outside / "step-00000012")
    before = contents(outside)
    (run.checkpoints / "step-00000012").symlink_to(outside / "step-00000012")
    for name in (".staging-step-00000009", ".trash-step-00000003", ".aside-step-00000003", "../.staging-metrics.jsonl"):
        (run.checkpoints / name).symlink_to(outside)
    for name in ("latest", "best"):
        (run.checkpoints / name).unlink()
        (run.checkpoints / name).symlink_to(outside / "step-00000012")
    ended = run.start()
    assert run.resumed_at()[-1] <= 6
    assert ended.code == 0, ended.said
    run.equals(undisturbed)
    assert contents(outside) == before


@pytest.mark.parametrize("kind", ["named by the manifest", "a link"])
def test_a_checkpoint_cannot_include_files_outside_of_it(run, outside, kind):
    assert run.start(do(lambda trainer: trainer.checkpoints.wait(), at_step=8), kill(at_step=8)).was_killed
    newest = run.newest()
    if kind == "a link":
        (newest / "model.safetensors").rename(outside / "weights")
        (newest / "model.safetensors").symlink_to(outside / "weights")
    else:
        (newest / "more").symlink_to(outside)
        metadata = {"format_version": 1, "step": 6}
        (newest / MANIFEST).write_text(describe_files(newest, metadata).replace('"config.json"', '"more/precious"'))
    before = contents(outside)
    ended = run.finish()
    assert f"invalid checkpoint skipped: {newest}" in ended.said
    assert contents(outside) == before


# -------------------------------------------------------------------------------------------------- secrets

SECRETS = {
    "PGPASSWORD": "a-password-of-postgres",
    "SMTP_PASS": "a-password-for-letters",
    "GITHUB_PAT": "a-token-for-one-person",
    "SECRET_KEY_BASE": "what-cookies-are-signed-with",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_NobodyMayEverReadThisOne1234",
    "MY_DATABASE_PASSWORD": "correct horse battery staple",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
}
SAID = ["--api_key", "sesame-open-up-now", "--token=another-open-sesame", "https://me:hunter2hunter2@example.com/data"]


IN_CONFIG = {
    "tracking__wandb_project": SECRETS["GITHUB_PAT"],
    "tracking__wandb_entity": "glpat-NobodyMayReadThisOne",
    "tracking__wandb_group": "https://gitlab-ci-token:hunter2hunter2@gitlab.example.com/a/b.git",
    "tracking__wandb_tags": f"{SECRETS['SMTP_PASS']},https://example.com/x?user=me&access_token=a-key-in-an-address",
    "tracking__sample_prompt": f"I & <my> {SECRETS['MY_DATABASE_PASSWORD']}",
}
READ_BY_WANDB = {
    "WANDB_NOTES": "by https://me:hunter2hunter2@example.com",
    "WANDB_JOB_TYPE": SECRETS["PGPASSWORD"],
    "WANDB_BASE_URL": "https://me:hunter2hunter2@wandb.example.com",
    "HTTPS_PROXY": "http://me:hunter2hunter2@proxy.example.com:3128",
}


def test_no_secret_of_environment_command_line_or_config_is_written_or_printed(run, tmp_path):
    """By any tracker that is installed here, in any file outside of those that must be loadable."""

    def live_with_secrets():
        os.environ.update(SECRETS | READ_BY_WANDB | {"TRACKIO_DIR": str(tmp_path / "trackio")})
        sys.orig_argv = [*sys.orig_argv[:1], *SAID, *SECRETS.values()]
        sys.argv = [sys.argv[0], *sys.orig_argv[1:]]

    def raise_one(_):
        logging.getLogger("dist_trainer").warning("trying %s", SECRETS["SMTP_PASS"])
        raise RuntimeError(f"cannot reach https://me:hunter2hunter2@example.com with {' '.join(SECRETS.values())}")

    optional = {f"tracking__{row}": importlib.util.find_spec(row) is not None for row in ("tensorboard", "trackio")}
    config = run.but(tracking__wandb="offline", tracking__sample_tokens=4, **optional, **IN_CONFIG)
    ended = run.start(live_with_secrets, do(raise_one, at_step=8), config=config)
    assert ended.code == 1
    assert "cannot reach" in run.status()["reason"]
    assert "RuntimeError: cannot reach https://***@example.com with" in ended.said
    assert "warning: trying ***" in ended.said, "under SLURM the console is a file in the run's folder"
    again = run.start(live_with_secrets, config=config)
    assert again.code == 0
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()}
    kinds = {"config.yaml", "metrics.jsonl", "status.json", "report.html", "events.jsonl", "rank-0.log", "wandb.log"}
    assert kinds <= {path.name for path in written}
    assert [path for path in written if path.suffix == ".wandb"]
    assert optional["tracking__tensorboard"] == any(".tfevents." in path.name for path in written)
    assert optional["tracking__trackio"] == any(path.suffix == ".db" for path in written)
    words = [*SECRETS.values(), "sesame-open-up-now", "another-open-sesame", "hunter2hunter2", "a-key-in-an-address"]
    words.append(IN_CONFIG["tracking__wandb_entity"])
    found = {
        f"{path}: {word}"
        for path, content in written.items()
        for word in words
        if word.encode() in content and not path.is_relative_to(run.checkpoints) and path != run.folder / "config.yaml"
    }
    assert not found
    assert not [word for word in words if word in ended.said + again.said]


def test_an_error_message_contains_no_secret(run):
    address = "https://me:hunter2hunter2@example.com/data.jsonl"
    ended = run.start(config=run.but(data__dataset=address))
    assert ended.code == 2
    assert "***@example.com" in ended.said
    assert "hunter2" not in ended.said
