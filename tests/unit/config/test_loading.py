"""A config is whole or refused, and refused with every reason at once."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dist_trainer.config.aliases import NOT_KEYS, OTHER_NAMES, OTHER_VALUES
from dist_trainer.config.keys import PATH_KEYS, descriptions, key_types
from dist_trainer.config.loading import config_differences, dump_config
from dist_trainer.config.paths import default_cache_dir
from dist_trainer.config.registry import ENTRY_NAMES, build, resolve
from dist_trainer.config.rules import check_config
from dist_trainer.config.schema import BatchConfig, DataConfig, ModelConfig, TrainConfig, TrainingConfig
from dist_trainer.config.values import choices_of
from dist_trainer.data.datasets import Source
from dist_trainer.errors import ConfigError
from dist_trainer.models.registry import MODELS
from dist_trainer.optim.registry import OPTIMIZERS
from dist_trainer.optim.schedules import SCHEDULES
from dist_trainer.parallel.reduction import REDUCTIONS
from dist_trainer.parallel.registry import STRATEGIES
from dist_trainer.run.build import check_registry_names
from dist_trainer.run.configure import load_config
from tests.unit.config.refusals import refused

ROOT = Path(__file__).resolve().parents[3]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_without_arguments_it_is_the_default():
    assert load_config([]) == TrainingConfig()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_published_config_loads(path):
    assert load_config(["--config", str(path)]).run_name


def test_default_yaml_and_the_docs_are_what_the_dataclasses_say():
    assert load_config(["--config", str(ROOT / "configs" / "default.yaml")]) == TrainingConfig()
    code = """
import sys; sys.path.insert(0, "docs")
import generate_configuration as g
assert g.MARKDOWN.read_text() == g.markdown() and g.YAML.read_text() == g.default_yaml(), "run docs/generate_configuration.py"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_key_has_a_sentence():
    assert descriptions().keys() == key_types().keys()
    assert all(text.endswith((".", '"')) for text in descriptions().values())


def test_files_and_arguments_are_laid_over_one_another(tmp_path):
    one = write(tmp_path / "one.yaml", "seed: 1\noptim:\n  learning_rate: 1e-4\n  betas: [0.8, 0.9]\n")
    two = write(tmp_path / "two.yaml", "seed: 2\nmodel:\n")
    config = load_config(["--config", one, f"--config={two}", "--optim.eps=1e-6", "--data.packing", "false"])
    assert (config.seed, config.optim.learning_rate, config.optim.eps) == (2, 1e-4, 1e-6)
    assert config.optim.betas == (0.8, 0.9)
    assert config.data.packing is False


def test_values_keep_their_meaning():
    config = load_config(["--run_name", "12", "--data.template", "{question}", "--precision.compile", "true"])
    assert config.run_name == "12"
    assert config.data.template == "{question}"
    assert config.precision.compile is True
    assert load_config(["--data.template", "null"]).data.template is None
    assert load_config(["--profile.steps", "5-8"]).profile.steps == "5-8"
    assert load_config(["--tracking.sample_prompt", ""]).tracking.sample_prompt == ""
    assert load_config(["--train.callbacks", "a.b:c"]).train.callbacks == ("a.b:c",)
    assert load_config(["--train.callbacks", "[a.b:c, d:e]"]).train.callbacks == ("a.b:c", "d:e")
    assert load_config(["--train.callbacks", "[]"]).train.callbacks == ()


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "mine.yaml", "output_dir: ~/runs\n")
    (tmp_path / "runs/first/checkpoints").mkdir(parents=True)
    config = load_config(["--config=~/mine.yaml", "--checkpoint.resume=~/runs/first", "--run_name=second"])
    assert config.output_dir == "~/runs", "so the config is good on another machine too"
    assert config.run_folder == tmp_path / "runs" / "second"
    monkeypatch.setenv("DIST_TRAINER_CACHE", "~/cache")
    assert default_cache_dir() == tmp_path / "cache"
    for key in PATH_KEYS:
        assert f"command line: {key}: '~no one/x': the home folder ~no one is not known" in refused(f"--{key}=~no one/x")


def test_a_printed_config_loads_to_the_same(tmp_path, capsys):
    words = ["--optim.learning_rate", "0.1234567890123", "--train.epochs", "2.5", "--data.template", "{a}\n{b}: #x"]
    config = load_config(words)
    assert config.train == TrainConfig(epochs=2.5)
    assert load_config(["--config", write(tmp_path / "c.yaml", dump_config(config))]) == config
    with pytest.raises(SystemExit) as stopped:
        load_config([*words, "--print_config"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == dump_config(config)


def test_all_problems_come_in_one_message_with_file_and_line(tmp_path):
    path = write(tmp_path / "bad.yaml", "seed: one\nschedule:\n  warmpup_steps: 3\nmodel:\n  num_attention_heads: 7\n")
    message = refused("--config", path, "--batch.micro_batch_size", "5", "--train.max_steps", "-1")
    assert message.startswith("6 problems")
    assert f"{path}:1: seed: 'one' is not a whole number" in message
    assert f"{path}:3: schedule.warmpup_steps: no such key; did you mean schedule.warmup_steps?" in message
    assert f"{path}:5: model.num_attention_heads: model.hidden_size (192) is not divisible by 7" in message
    assert "batch.global_batch_size: 16 must be a multiple of batch.micro_batch_size (5)" in message
    assert "command line: train.max_steps: -1 must be more than 0" in message


REFUSED = {
    "--seed x": "command line: seed: 'x' is not a whole number",
    "--seed 9223372036854775808": "command line: seed: 9223372036854775808 must be less than 2^63",
    "--model.hidden_size 100": "command line: model.num_attention_heads: model.hidden_size (100) is not divisible by 6",
    "--seed 1.5": "seed: '1.5' is not a whole number",
    "--optim.betas [0.9]": "optim.betas: '[0.9]' is not a list of 2 numbers",
    "--optim.betas [0.9,1.0]": "optim.betas: [0.9, 1.0] must each be 0 or more, and less than 1",
    "--optim.learning_rate 0": "optim.learning_rate: 0.0 must be more than 0",
    "--optim.learning_rate inf": "optim.learning_rate: 'inf' is not a number",
    "--optim.learning_rate nan": "optim.learning_rate: 'nan' is not a number",
    "--model.dropout 1": "model.dropout: 1.0 must be 0 or more, and less than 1",
    "--model.num_key_value_heads 4": "model.num_key_value_heads: model.num_attention_heads (6) is not divisible by 4",
    "--model.hidden_size 18 --model.num_key_value_heads 6": "rotary positions need an even number",
    "--precision.dtype fp8": "precision.dtype: 'fp8' is not one of auto, fp32, bf16, fp16",
    "--train.callbacks [a.b:c,early_stopping]": "train.callbacks: 'early_stopping' is not of the form package.module:function",
    "--train.callbacks [1]": "train.callbacks: '[1]' is not a list of texts",
    "--precision.compile maybe": "precision.compile: 'maybe' is not true or false or auto",
    "--tracking.wandb yes": "tracking.wandb: 'yes' is not one of offline, online, disabled",
    "--data.packing maybe": "data.packing: 'maybe' is not true or false",
    "--data.validation_fraction 1": "data.validation_fraction: 1.0 must be 0 or more",
    "--run_name ../x": "run_name: '../x' must be a plain folder name",
    "--run_name ..": "run_name: '..' must be a plain folder name",
    "--checkpoint.resume nowhere": "checkpoint.resume: 'nowhere' is neither auto, never, nor an existing folder",
    "--schedule.min_lr_ratio 2": "schedule.min_lr_ratio: 2.0 must be from 0 to 1",
    "--model 3": "model: is a section; set its keys, such as model.name",
    "--seed": "command line: --seed needs a value",
    "--learning_rate 1": "learning_rate: no such key; did you mean optim.learning_rate?",
    "--optim.lr 1": "optim.lr: no such key; did you mean optim.learning_rate?",
    "--lr 1": "lr: no such key; did you mean optim.learning_rate?",
    "--batch_size 8": "batch_size: no such key; did you mean batch.global_batch_size?",
    "--per-device-train-batch-size 8": "no such key; did you mean batch.micro_batch_size?",
    "--gradient_accumulation_steps 4": "no such key: it is batch.global_batch_size / (batch.micro_batch_size",
    "--resume never": "resume: no such key: rerunning the same command resumes a run; did you mean checkpoint.resume",
    "--resume": "resume: no such key: rerunning the same command resumes a run",
    "--resume_from_checkpoint x": "no such key; did you mean checkpoint.resume?",
    "--steps 5": "steps: no such key; did you mean train.max_steps?",
    "--profil.steps 5": "profil.steps: no such key; did you mean profile.steps?",
    "--model_name_or_path x": "no such key; did you mean model.init_from?",
    "--vocab_size 5": "vocab_size: no such key: it is determined by data.tokenizer",
    "--tracking.wandb none": "tracking.wandb: 'none' is not one of offline, online, disabled; did you mean disabled?",
    "--tracking.wandb ofline": "did you mean offline?",
    "--precision.dtype bfloat16": "precision.dtype: 'bfloat16' is not one of auto, fp32, bf16, fp16; did you mean bf16?",
    "--precision.dtype zzz": "precision.dtype: 'zzz' is not one of auto, fp32, bf16, fp16",
    "--deterministic true": "deterministic: no such key; did you mean distributed.reduction?",
    "--distributed.reduction exakt": "distributed.reduction: unknown name 'exakt'; did you mean 'exact'?",
    "--distributed.timeout_minutes 5": "no such key; it was renamed to distributed.hang_timeout_minutes",
    "--validation.max_batches 5": "no such key; it was renamed to validation.max_global_batches",
    "--max_batches 5": "no such key; did you mean validation.max_global_batches?",
    "--zzz 1": "zzz: no such key; --help all lists them all",
    "stray": "command line: unexpected argument 'stray'; write --stray",
    "train.max_steps=3": "command line: unexpected argument 'train.max_steps=3'; write --train.max_steps 3",
    "--optim.name adam": "command line: optim.name: unknown name 'adam'; did you mean 'adamw'? Choose from auto, adamw, muon,",
    "--schedule.name foo": "schedule.name: unknown name 'foo'; choose from cosine, linear, constant, wsd, or use your own",
    "--model.name my_project:": "model.name: 'my_project:' is not of the form package.module:function",
    "--distributed.strategy fsdp --data.template {a!r} --optim.name sgd": "3 problems",
    "--data.template {": "command line: data.template: '{' is not a template",
    "--seed null": "seed: 'null' is not a whole number",
    "--profile.steps 5-": "command line: profile.steps: '5-' is neither a step such as 5 nor a range of steps such as 5-8",
    "--profile.steps 0-3": "profile.steps: '0-3' is neither a step",
    "--profile.steps 8-5": "profile.steps: '8-5' ends before it starts; write 5-8",
    "--profile.steps 5-500": "profile.steps: '5-500' are 496 steps, too many for a trace; at most 5-54",
    "--distributed.hang_timeout_minutes 0": "distributed.hang_timeout_minutes: 0.0 must be more than 0",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_bad_argument_is_rejected_by_key_value_and_remedy(words, tmp_path):
    """In a folder of runs without one: where one stands, some of it is not looked at any more."""
    assert REFUSED[words] in refused("--output_dir", str(tmp_path), *words.split())


BAD_FILES = {
    "seed: 1\nseed: 2\n": ":2: duplicate key seed (first set on line 1)",
    "optim:\n  eps: 1\n  eps: 2\n": ":3: duplicate key optim.eps",
    "model.hidden_size: 96\nmodel:\n  hidden_size: 192\n": ":3: duplicate key model.hidden_size (first set on line 1)",
    "{seed: 1, seed: 2}": ":1: duplicate key seed",
    "- 1\n": ":1: is not a mapping",
    "seed: [1\n": "is not valid YAML",
    "a:\n\tb: 1\n": ":2: is not valid YAML",
    "seed: !!python/object/apply:os.system ['touch /tmp/hostile']\n": ":1: tag:yaml.org,2002:python/object/apply:os.system",
    "run_name: 5\n": ":1: run_name: 5 is not text (put it in quotes)",
    "model: 3\n": ":1: model: is a section",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_rejected_with_its_line(tmp_path, text):
    path = write(tmp_path / "bad.yaml", text)
    message = refused("--config", path)
    assert path in message
    assert BAD_FILES[text] in message


def test_a_duplicate_key_hides_no_other_problem_of_its_file(tmp_path):
    text = "seed: 1\nseed: two\nzzz: 1\nmodel:\n  dropout: !!python/name:os.sep\n  hiden_size: 3\n  dropout: 1\n"
    path = write(tmp_path / "bad.yaml", text)
    message = refused("--config", path)
    assert message.startswith("7 problems")
    for line in (
        ":2: duplicate key seed (first set on line 1)",
        ":2: seed: 'two' is not",
        ":3: zzz: no such key",
        ":5: tag:",
        ":6: model.hiden_size: no such key",
        ":7: duplicate key model.dropout (first set on line 5)",
        ":7: model.dropout: 1.0 must be",
    ):
        assert path + line in message


def test_the_error_for_null_and_false_in_a_file_names_the_value_they_may_mean(tmp_path):
    for value in ("null", "false", "off", "none"):
        path = write(tmp_path / "c.yaml", f"tracking:\n  wandb: {value}\n")
        assert f"{path}:2: tracking.wandb: " in (said := refused("--config", path))
        assert said.endswith("one of offline, online, disabled; did you mean disabled?")


def test_names_of_other_trainers_lead_to_existing_keys_and_each_to_one():
    assert OTHER_NAMES.keys() <= key_types().keys()
    names = [name for words in (*OTHER_NAMES.values(), *NOT_KEYS) for name in words.split()]
    assert len(set(names)) == len(names)
    assert not set(names) & key_types().keys(), "this is a key"
    values = {value for kind in key_types().values() for value in choices_of(kind)}
    assert OTHER_VALUES.keys() <= values


def test_integers_may_be_written_with_a_point_or_an_exponent(tmp_path):
    assert load_config(["--train.max_steps", "1e3", "--seed", "5.0"]).train.max_steps == 1000
    path = write(tmp_path / "c.yaml", "train: {max_steps: 1.5e+3}\nseed: 9007199254740993.0e0\nmodel: {hidden_size: 192.0}\n")
    config = load_config(["--config", path])
    assert (config.train.max_steps, config.model.hidden_size, config.seed) == (1500, 192, 9007199254740993)
    for wrong in ("1.5", "15e-1", "1e-3", "1e999", "true"):
        assert f"seed: '{wrong}' is not a whole number" in refused("--seed", wrong)


def test_missing_and_empty_files(tmp_path):
    assert "--config nowhere.yaml: cannot be read" in refused("--config", "nowhere.yaml")
    assert load_config(["--config", write(tmp_path / "empty.yaml", "# nothing\n")]) == TrainingConfig()


def test_the_number_of_ranks_is_checked_once_it_is_known(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert load_config([]) == TrainingConfig(), "without RANK this is one process"
    for name, value in {"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert "16 must be a multiple of the number of ranks (3)" in refused()
    assert "(8) x ranks (3) = 24 sequences" in refused("--batch.micro_batch_size", "8")


def test_the_names_that_are_checked_without_torch_are_the_registry_entries():
    assert {key: set(names) for key, names in ENTRY_NAMES.items()} == {
        "model.name": set(MODELS),
        "optim.name": {"auto", *OPTIMIZERS},
        "schedule.name": set(SCHEDULES),
        "distributed.strategy": {"auto", *STRATEGIES},
        "distributed.reduction": set(REDUCTIONS),
    }
    assert load_config(["--optim.name", "my_project.lion:build_lion"]).optim.name == "my_project.lion:build_lion"


def test_a_function_of_ones_own_that_cannot_be_imported_is_rejected_before_data_are_read():
    config = load_config(["--schedule.name", "nowhere_at_all:f"])
    with pytest.raises(ConfigError, match=r"schedule\.name: 'nowhere_at_all:f' cannot be imported"):
        check_registry_names(config)


def test_the_import_error_names_where_python_looks_for_modules(tmp_path, monkeypatch):
    """`python -m` looks in the current folder, `dist-train` does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "needs_more.py").write_text("import no_such_package")

    def said(name: str) -> str:
        with pytest.raises(ConfigError) as refusal:
            resolve({}, name, "schedule.name")
        return str(refusal.value)

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert said("nowhere_at_all:f").endswith("must be in the current folder, installed, or in a folder on PYTHONPATH")
    assert said("needs_more:f").endswith("cannot be imported (No module named 'no_such_package')")
    monkeypatch.setattr(sys, "path", ["/usr/local/bin", *sys.path[1:]])
    assert f"; the current folder is not searched: set PYTHONPATH={tmp_path}, or start with" in said("nowhere_at_all:f")


def test_a_config_made_in_python_is_checked_too_and_cannot_change():
    with pytest.raises(ConfigError, match="2 problems"):
        check_config(TrainingConfig(batch=BatchConfig(7, 2), model=ModelConfig(dropout=-1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("builtins:repr", "returned a str, not a Source"),
        ("os:getcwd", "cannot be called with \\(DataConfig\\)"),
        ("os:sep", "is a str, not a function"),
        ("os:nowhere", "cannot be imported"),
    ],
)
def test_a_function_of_ones_own_that_does_not_fit_is_rejected(row, complaint):
    with pytest.raises(ConfigError, match=rf"data\.dataset: '{row}' {complaint}"):
        build({}, row, "data.dataset", DataConfig(), kind=Source)


def test_differences_are_named_by_key():
    changed = load_config(["--seed", "4", "--optim.betas", "[0.9, 0.99]"])
    assert config_differences(TrainingConfig(), changed) == [
        ("seed", 0, 4),
        ("optim.betas", [0.9, 0.95], [0.9, 0.99]),
    ]


def test_keys_that_were_renamed_are_read_from_the_config_that_a_run_wrote(tmp_path):
    old = "validation:\n  max_batches: 4\ndistributed:\n  timeout_minutes: 3\n"
    path = write(tmp_path / "config.yaml", old)
    message = refused("--config", path)
    assert f"{path}:2: validation.max_batches: no such key; it was renamed to validation.max_global_batches" in message
    (tmp_path / "checkpoints").mkdir()
    config = load_config(["--config", path])
    assert config.validation.max_global_batches == 4
    assert config.distributed.hang_timeout_minutes == 3
    assert config_differences({"validation": {"max_batches": 4}, "distributed": {"timeout_minutes": 3.0}}, config) == []


def test_the_contract_s_keys_are_there():
    expected = "seed run_name output_dir model.hidden_size model.init_from data.template data.cache_dir batch.micro_batch_size"
    expected += (
        " optim.betas schedule.min_lr_ratio train.epochs precision.compile validation.max_global_batches checkpoint.resume"
    )
    expected += " tracking.wandb_project distributed.hang_timeout_minutes"
    assert set(expected.split()) <= set(key_types())


def test_the_run_that_another_began_from_may_be_gone_once_that_one_has_checkpoints(tmp_path):
    words = ["--output_dir", str(tmp_path), "--run_name", "second", "--checkpoint.resume", str(tmp_path / "first")]
    assert "checkpoint.resume" in refused(*words)
    (tmp_path / "second" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert load_config(words).checkpoint.resume == str(tmp_path / "first")


def test_keys_that_have_no_meaning_for_the_model_are_only_reported_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    message = refused("--model.name", "hf", "--model.init_from", str(tmp_path), "--model.hidden_size", "100")
    assert message == (
        "command line: model.hidden_size: has no effect with model.name hf, whose config.json determines it; leave the key out"
    )
