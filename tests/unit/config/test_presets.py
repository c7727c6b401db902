"""Sizes by name: what they say of themselves is true, and what is asked for beside them wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_trainer.config.presets import PRESETS
from dist_trainer.config.schema import ModelConfig
from dist_trainer.huggingface.weights import meta_init
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.run.configure import load_config

DEFAULT = Path(__file__).parents[3] / "configs" / "default.yaml"
BY_COMPUTE = ("1m", "10m", "30m")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_it_names_excluding_the_embedding(name):
    preset = PRESETS[name]
    with meta_init():
        model = DecoderLM(ModelConfig(**preset.model), 1000, 256)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == preset.parameters + 1000 * preset.model["hidden_size"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_docs_say_the_same(name):
    preset = PRESETS[name]
    layers, width, heads = (preset.model[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    row = f"| `{name}` | {layers} x {width} | {heads} | {preset.parameters / 1e6:.3g}M | {preset.learning_rate} | "
    assert (
        f"{row}{preset.batch_tokens:,} | {preset.warmup_steps} |" in (DEFAULT.parents[1] / "docs" / "commands.md").read_text()
    )


def test_the_sizes_are_those_that_their_names_say_with_the_vocabulary_they_are_known_by():
    vocabularies = {"124m": 50_257, "350m": 50_257, "1b": 128_256}
    sizes = {n: p.parameters + vocabularies.get(n, 4096) * p.model["hidden_size"] for n, p in PRESETS.items()}
    said = {n: float(n[:-1]) * {"m": 1e6, "b": 1e9}[n[-1]] for n in PRESETS}
    assert all(said[n] / 1.25 < sizes[n] < said[n] * 1.55 for n in PRESETS), sizes
    assert list(sizes.values()) == sorted(sizes.values())


@pytest.mark.parametrize("name", BY_COMPUTE)
def test_learning_rate_and_batch_of_small_sizes_follow_from_compute_as_deepseek_fitted_them(name):
    preset = PRESETS[name]
    compute = 6 * preset.parameters * 20 * preset.parameters
    assert preset.learning_rate == pytest.approx(0.3118 * compute**-0.1250, rel=0.02)
    assert preset.batch_tokens == pytest.approx(0.2920 * compute**0.3271, rel=0.45)  # to the next power of two


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", [1, 100, 256, 1024, 4096, 10_000_000])
def test_a_step_has_the_preset_s_tokens_for_any_sequence_length(name, length):
    config = load_config(["--preset", name, "--data.sequence_length", str(length)])
    tokens = config.batch.global_batch_size * length
    assert PRESETS[name].batch_tokens / 2 < tokens <= max(PRESETS[name].batch_tokens, length)


def test_a_preset_changes_model_batch_rate_and_warmup_alone():
    before, after = load_config([]), load_config(["--preset", "124m", "--data.sequence_length", "1024"])
    assert (before.train, before.precision, before.validation) == (after.train, after.precision, after.validation)
    assert after.data.tokenizer == "austen"
    assert (after.batch.global_batch_size, after.batch.micro_batch_size) == (512, 32)
    assert (after.optim.learning_rate, after.schedule.warmup_steps) == (6e-4, 715)


def test_files_and_keys_win_over_a_preset_wherever_it_is_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  learning_rate: 1e-4\nbatch:\n  global_batch_size: 24\n")
    config = load_config(["--config", str(file), "--model.num_hidden_layers", "3", "--preset", "30m"])
    assert (config.optim.learning_rate, config.model.num_hidden_layers, config.model.hidden_size) == (1e-4, 3, 512)
    assert (config.batch.global_batch_size, config.batch.micro_batch_size) == (24, 3)  # an eighth


@pytest.mark.parametrize(
    ("preset", "ranks", "expected"),
    [
        *(("10m", ranks, 32) for ranks in (1, 2, 4, 8)),  # an eighth: the same curve on these
        ("10m", 16, 16),
        *(("124m", ranks, 128) for ranks in (1, 2, 4, 8, 16)),  # the most that fits a GPU
        ("124m", 64, 32),
        *(("30m --data.sequence_length 4096 --batch.global_batch_size 72", ranks, 3) for ranks in (1, 3)),  # of an eighth, 9
    ],
)
def test_a_micro_batch_of_a_preset_depends_on_the_ranks_only_if_they_cannot_share_it_out(preset, ranks, expected, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert load_config(["--preset", *preset.split()]).batch.micro_batch_size == expected


def test_the_default_file_asks_for_nothing_that_a_preset_says():
    assert load_config(["--config", str(DEFAULT), "--preset", "10m"]) == load_config(["--preset", "10m"])


@pytest.mark.parametrize(("name", "tokens"), [("gpt2_124m", 10e9), ("llama_1b", 100e9)])
def test_a_large_run_validates_on_a_part_of_what_it_holds_out(name, tokens):
    """A large number of global batches would be all there are, and mean nothing."""
    config = load_config(["--config", str(DEFAULT.with_name(f"{name}.yaml"))])
    assert config.data.dataset_config == f"sample-{tokens / 1e9:.0f}BT"
    batch_tokens = config.batch.global_batch_size * config.data.sequence_length
    validated = config.validation.max_global_batches * batch_tokens
    assert 1e6 < validated < 0.75 * config.data.validation_fraction * tokens
    # A forward pass takes a third of a step.
    assert validated / 3 < 0.05 * config.validation.every_steps * batch_tokens


def test_the_list_of_presets_has_the_sizes_of_each_and_what_follows(capsys):
    with pytest.raises(SystemExit) as stopped:
        load_config(["--preset", "list"])
    assert stopped.value.code == 0
    head, *rows, note = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == list(PRESETS)
    assert "parameters" in head
    assert rows[1].split() == ["10m", "10.6M", "6", "x", "384", "0.003", "65536", "100"]
    assert "exclude the embedding" in note
