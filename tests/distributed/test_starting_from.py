"""Runs that start from a model that is there: what follows from it, what is refused, what a checkpoint is then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dist_trainer import evaluate, generate
from dist_trainer.config.loading import as_dict, dump_config
from dist_trainer.data.datasets import CORPUS
from dist_trainer.errors import ConfigError
from dist_trainer.huggingface.model_files import find_valid_model
from dist_trainer.models.decoder_lm import DecoderLM
from dist_trainer.run.configure import load_config
from tests.distributed.small_runs import (
    changed,
    command,
    folder,
    losses,
    metrics,
    put_into_hub_cache,
    run,
    same_weights,
    stop_after,
)
from tests.end_to_end.forked_commands import quick_command

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = LlamaConfig(
    **SHAPE,
    head_dim=20,
    attention_bias=True,
    rope_parameters={"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
    bos_token_id=0,
    eos_token_id=0,
)
OF_TRANSFORMERS = {
    "gpt2": {"vocab_size": 4096, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {**SHAPE, "head_dim": 16},
    "phi": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 16},
}


def copy_tokenizer(path: Path) -> None:
    for file in (CORPUS / "tokenizer").iterdir():
        shutil.copy(file, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama with a tokenizer beside it."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LLAMA).save_pretrained(path)
    copy_tokenizer(path)
    return path


def arguments(stories: Path, output_dir: Path, init_from: Path | str, *more: str) -> list[str]:
    return [
        *("--output_dir", str(output_dir), "--run_name", "small", "--data.dataset", str(stories)),
        *("--data.sequence_length", "32", "--data.validation_fraction", "0.1", "--model.init_from", str(init_from)),
        *("--batch.global_batch_size", "8", "--batch.micro_batch_size", "2", "--optim.learning_rate", "1e-3"),
        *("--schedule.warmup_steps", "2", "--train.max_steps", "6", "--validation.every_steps", "3"),
        *("--precision.dtype", "fp32", "--checkpoint.every_steps", "2", "--checkpoint.keep_last", "9"),
        *("--tracking.wandb", "disabled", "--tracking.log_every_steps", "1", "--tracking.sample_tokens", "4", *more),
    ]


def test_the_shape_and_the_tokenizer_follow_the_folder_and_the_config_says_so(stories, tmp_path, llama):
    config = load_config(arguments(stories, tmp_path, llama))
    assert (config.model.hidden_size, config.model.head_dim, config.model.attention_bias) == (48, 20, True)
    assert (config.model.rope_type, config.model.rope_factor, config.model.tie_word_embeddings) == ("linear", 2.0, False)
    assert config.data.tokenizer == str(llama)
    assert run(config, 1) == [0]
    written = folder(config) / "config.yaml"
    assert yaml.safe_load(written.read_text())["model"]["hidden_size"] == 48
    assert load_config(["--config", str(written)]) == config
    assert command(load_config(arguments(stories, tmp_path, llama)), 1) == [0]  # finished; the same command says so


def test_the_run_starts_with_the_folder_s_loss_and_its_checkpoint_loads_in_transformers(stories, tmp_path, llama):
    config = load_config(arguments(stories, tmp_path, llama, "--optim.learning_rate", "1e-12", "--train.max_steps", "2"))
    assert run(config, 1) == [0]
    best = folder(config) / "checkpoints" / "best"
    before, after = LlamaForCausalLM.from_pretrained(llama).eval(), AutoModelForCausalLM.from_pretrained(best).eval()
    row = torch.randint(0, 4096, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(after(row).logits, before(row).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(DecoderLM.from_pretrained(best)(row), after(row).logits, atol=1e-5, rtol=0)


def test_a_run_resumes_exactly_even_if_the_folder_is_gone(stories, tmp_path, llama):
    start = tmp_path / "start"
    shutil.copytree(llama, start)
    undisturbed = load_config(arguments(stories, tmp_path / "undisturbed", start))
    run(undisturbed, 1)
    words = arguments(stories, tmp_path / "stopped", start)
    run(load_config(words), 1, before=stop_after(3))
    shutil.rmtree(start)
    config = load_config(words)
    assert config.model == undisturbed.model
    assert run(config, 1) == [0]
    assert losses(config) == losses(undisturbed)
    assert same_weights(config, undisturbed)


@pytest.mark.parametrize("name", ["decoder_lm", "hf"])
def test_a_run_that_resumes_reads_weights_once_and_those_of_its_checkpoint_alone(stories, tmp_path, llama, name, monkeypatch):
    words = arguments(stories, tmp_path, llama, "--model.name", name)
    run(load_config(words), 1, before=stop_after(3))

    def only_the_shape(path, *, weights=True):
        assert not weights, f"{path} is opened to be built"
        return find_valid_model(path, weights=False)

    monkeypatch.setattr("dist_trainer.models.registry.find_valid_model", only_the_shape)
    assert run(load_config(words), 1) == [0]
    assert len(losses(load_config(words))) == 6


CONTRADICTIONS = {
    "hidden_size": ("64", "model.hidden_size: is 64, but the model in {llama} has 48; leave the key out"),
    "head_dim": ("12", "model.head_dim: is 12, but the model in {llama} has 20"),
    "rope_type": ("default", "model.rope_type: is 'default', but the model in {llama} has 'linear'"),
    "num_hidden_layers": ("4", "model.num_hidden_layers: is 4, but"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_key_that_contradicts_the_folder_is_rejected_with_its_place(stories, tmp_path, llama, name):
    value, said = CONTRADICTIONS[name]
    with pytest.raises(ConfigError) as refused:
        load_config(arguments(stories, tmp_path, llama, f"--model.{name}", value))
    assert f"command line: {said.format(llama=llama)}" in str(refused.value)


def test_a_file_of_all_keys_at_their_defaults_sets_no_shape_and_no_tokenizer(tmp_path, llama):
    default = Path(__file__).parents[2] / "configs" / "default.yaml"
    start = ["--model.init_from", str(llama), "--data.sequence_length", "32"]
    assert load_config(["--config", str(default), *start]) == load_config(start)
    dropping = tmp_path / "copy.yaml"
    dropping.write_text(default.read_text().replace("dropout: 0.0", "dropout: 0.5"))
    assert load_config(["--config", str(dropping), *start]) == load_config([*start, "--model.dropout", "0.5"])


def test_a_file_of_all_keys_that_changes_the_shape_is_rejected_with_the_contradicting_lines(tmp_path, llama):
    default = Path(__file__).parents[2] / "configs" / "default.yaml"
    changed = tmp_path / "changed.yaml"
    changed.write_text(default.read_text().replace("num_hidden_layers: 4", "num_hidden_layers: 5"))
    with pytest.raises(ConfigError, match=r"changed\.yaml:\d+: model\.hidden_size: is 192, but the model in"):
        load_config(["--config", str(changed), "--model.init_from", str(llama)])
    with pytest.raises(ConfigError, match=r"command line: model\.hidden_size: is 192, but the model in"):
        load_config(["--config", str(default), "--model.init_from", str(llama), "--model.hidden_size", "192"])


@pytest.mark.parametrize("name", ["decoder_lm", "hf"])
def test_a_folder_without_a_model_is_rejected_before_data_are_read(stories, tmp_path, name):
    with pytest.raises(ConfigError, match=r"model\.init_from: .* is neither a run with checkpoints"):
        load_config(arguments(stories, tmp_path, tmp_path, "--model.name", name))


def test_a_key_that_agrees_with_the_folder_is_accepted(stories, tmp_path, llama):
    agreeing = load_config(arguments(stories, tmp_path, llama, "--model.hidden_size", "48", "--model.head_dim", "20"))
    assert agreeing.model == load_config(arguments(stories, tmp_path, llama)).model


def test_dropout_is_the_user_s_own_choice(stories, tmp_path, llama):
    plain = load_config(arguments(stories, tmp_path / "plain", llama))
    dropping = load_config(arguments(stories, tmp_path / "dropping", llama, "--model.dropout", "0.5"))
    run(plain, 1)
    run(dropping, 1)
    assert losses(plain)[0] != losses(dropping)[0]


def test_a_larger_vocabulary_and_a_longer_context_are_rejected_with_what_helps(stories, tmp_path, capfd):
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": 100, "max_position_embeddings": 16})).save_pretrained(tmp_path / "m")
    for name in ("decoder_lm", "hf"):
        assert command(load_config(arguments(stories, tmp_path, tmp_path / "m", "--model.name", name)), 1) == [2]
        said = capfd.readouterr().err
        assert "data.tokenizer: has 4096 tokens, the model knows 100; use the model's own tokenizer" in said
        assert "made for at most 16 positions; set it to 16 or less (--data.sequence_length 16)" in said


def test_what_decoder_lm_cannot_represent_is_rejected_before_anything_is_built(stories, tmp_path):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **OF_TRANSFORMERS["gpt2"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model_type is 'gpt2'; .*--model\.name hf trains"):
        load_config(arguments(stories, tmp_path, tmp_path))


def test_names_on_the_hub_come_from_the_cache_or_end_in_a_sentence(stories, tmp_path, llama, monkeypatch):
    from huggingface_hub import constants

    with pytest.raises(
        ConfigError, match=r"'owner/model' is not a local path, and it is neither on disk.*hf download owner/model"
    ):
        load_config(arguments(stories, tmp_path, "owner/model"))
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_config(arguments(stories, tmp_path, "./nowhere"))
    put_into_hub_cache(tmp_path / "hub", "owner/model", llama.iterdir())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config(arguments(stories, tmp_path, "owner/model", "--data.tokenizer", str(llama)))
    assert config.model.hidden_size == 48
    assert run(config, 1) == [0]


# --------------------------------------------------------------------------------------- models of transformers


def words_for(stories: Path, tmp_path: Path, init_from: Path, *more: str) -> list[str]:
    return arguments(stories, tmp_path, init_from, "--model.name", "hf", *more)


@pytest.fixture
def described(tmp_path) -> Path:
    """A folder with a config.json alone."""
    path = tmp_path / "described"
    AutoConfig.for_model("gpt2", **OF_TRANSFORMERS["gpt2"]).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind", [kind if kind in ("gpt2", "qwen3") else pytest.param(kind, marks=pytest.mark.slow) for kind in OF_TRANSFORMERS]
)
def test_models_of_transformers_train_resume_exactly_and_load_again(stories, tmp_path, kind, capsys):
    torch.manual_seed(0)
    start = tmp_path / "start"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OF_TRANSFORMERS[kind])).save_pretrained(start)
    copy_tokenizer(start)
    undisturbed = load_config(words_for(stories, tmp_path / "undisturbed", start))
    run(undisturbed, 1)
    config = load_config(words_for(stories, tmp_path / "stopped", start))
    run(config, 1, before=stop_after(3))
    shutil.rmtree(start)
    assert run(load_config(words_for(stories, tmp_path / "stopped", start)), 1) == [0]
    assert losses(config) == losses(undisturbed)
    assert same_weights(config, undisturbed)
    assert losses(config)[-1] < losses(config)[0]
    assert metrics(config, "sample")

    best = folder(config) / "checkpoints" / "best"
    model, said = AutoModelForCausalLM.from_pretrained(best, output_loading_info=True)
    assert model.config.model_type == kind
    assert not said["missing_keys"]
    prompt = "It was a truth"
    assert generate.main([str(folder(config)), "--prompt", prompt, "--temperature", "0", "--max_new_tokens", "12"]) == 0
    from dist_trainer.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(best))
    ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    ends = [tokenizer.eos_token_id]
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=ends, pad_token_id=0
    )
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0], skip_special_tokens=True).strip()

    assert evaluate.main([str(folder(config))]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])["loss"]
    assert measured == pytest.approx(min(losses(config, "validation")), abs=1e-9)


def test_a_config_alone_is_drawn_by_the_seed_alike_on_all_ranks(stories, tmp_path, described, capfd):
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    alone = load_config(words_for(stories, one, described))
    together = load_config(words_for(stories, two, described))
    run(alone, 1)
    assert re.search(r"model +hf, \S+ parameters, random weights\n", capfd.readouterr().err)
    run(together, 2)
    assert losses(alone) == pytest.approx(losses(together), abs=1e-5)
    seeded = load_config(words_for(stories, other, described, "--seed", "1"))
    run(seeded, 1)
    assert abs(losses(seeded)[0] - losses(alone)[0]) > 1e-5


def test_the_config_of_such_a_run_claims_no_shape(stories, tmp_path, described):
    config = load_config(words_for(stories, tmp_path, described))
    assert as_dict(config)["model"] == {"name": "hf", "init_from": str(described)}
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(["--config", str(again)]) == config
    for key, value in (("hidden_size", "64"), ("dropout", "0.1")):
        with pytest.raises(ConfigError, match=rf"model\.{key}: has no effect with model\.name hf"):
            load_config(words_for(stories, tmp_path, described, f"--model.{key}", value))
    with pytest.raises(ConfigError, match=r"model\.init_from: must name a folder"):
        load_config(["--model.name", "hf"])


REFUSED = {
    "pickles": "has weights in pytorch_model.bin, but neither model.safetensors",
    "code of its own": "transformers cannot build a causal language model from it",
    "no language model": "transformers cannot build a causal language model from it",
    "gaps": "is missing, or has another shape",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_incomplete_model_ends_in_one_sentence_and_runs_no_code(stories, tmp_path, described, kind, capfd):
    harm, path = tmp_path / "harm", described / "config.json"
    raw = json.loads(path.read_text())
    if kind == "pickles":
        (described / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    elif kind == "code of its own":
        (described / "evil.py").write_text(f"open({str(harm)!r}, 'w')\nclass Evil: pass\n")
        raw = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    elif kind == "no language model":
        raw = {"model_type": "clip_vision_model"}
    else:
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **OF_TRANSFORMERS["gpt2"])).save_pretrained(described)
        weights = load_file(described / "model.safetensors")
        del weights["transformer.h.0.mlp.c_fc.weight"]
        from safetensors.torch import save_file

        save_file(weights, described / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(raw))
    assert command(load_config(words_for(stories, tmp_path, described)), 1) == [2]
    assert REFUSED[kind] in capfd.readouterr().err
    assert not harm.exists()


def test_training_decoder_lm_imports_no_model_code_of_transformers(stories, tmp_path, llama):
    words = arguments(stories, tmp_path, llama, "--train.max_steps", "1")
    done = quick_command(*words, module="tests.distributed.run_without_model_code")
    assert done.returncode == 0, done.stderr
    assert losses(load_config(words))


def test_a_finished_run_is_a_model_to_start_from(stories, tmp_path, llama):
    first = load_config(arguments(stories, tmp_path / "first", llama))
    run(first, 1)
    second = load_config(arguments(stories, tmp_path / "second", folder(first)))
    assert second.model == changed(first, model__init_from=str(folder(first))).model
    assert run(second, 1) == [0]
    assert losses(second)[0] < losses(first)[0]
