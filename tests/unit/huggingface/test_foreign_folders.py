"""Of a folder from a stranger only its own files are read, no pickle is opened, and no code is fetched or run."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dist_trainer.config.schema import DataConfig, PrecisionConfig
from dist_trainer.data.datasets import CORPUS, open_source
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.errors import CheckpointError, DataError, RefusedError
from dist_trainer.huggingface import transformers_models
from dist_trainer.huggingface.model_files import find_config, find_model, model_folders
from dist_trainer.models.weights import can_open, load_weights, open_model
from dist_trainer.run.configure import load_config
from dist_trainer.run.evaluation import HarnessOptions, open_for_harness
from tests.distributed.small_runs import put_into_hub_cache

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


OTHER = "../outside/tokenizer.4.json"
"""A tokenizer outside of the folder; transformers looks for such names, with a version in them."""


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def model(request, tmp_path_factory) -> Path:
    """A model with its tokenizer, in two shards."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **SHAPE))
    made.save_pretrained(path, max_shard_size="300KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    shutil.copytree(CORPUS / "tokenizer", path, dirs_exist_ok=True)
    return path


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def name_in_index(folder: Path, name: str) -> None:
    index = folder / "model.safetensors.index.json"
    change(index, weight_map={**json.loads(index.read_text())["weight_map"], "model.norm.weight": name})


def a_pickle(folder: Path, outside: Path) -> None:
    (folder / "harm.bin").write_bytes(pickle.dumps(Harm(outside / "harm")))
    name_in_index(folder, "harm.bin")


def a_pickle_elsewhere(folder: Path, outside: Path) -> None:
    (outside / "harm.bin").write_bytes(pickle.dumps(Harm(outside / "harm")))
    name_in_index(folder, str(outside / "harm.bin"))


def a_file_elsewhere(folder: Path, outside: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    shutil.copy(shard, outside / "other.safetensors")
    name_in_index(folder, "../outside/other.safetensors")


def a_linked_shard(folder: Path, outside: Path) -> None:
    shard = next(folder.glob("model-00001*"))
    shard.rename(outside / shard.name)
    shard.symlink_to(outside / shard.name)


def a_linked_config(folder: Path, outside: Path) -> None:
    (folder / "config.json").rename(outside / "config.json")
    (folder / "config.json").symlink_to(outside / "config.json")


def an_adapter(folder: Path, outside: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(outside), "peft_type": "LORA"}))


def weights_under_another_name(folder: Path, outside: Path) -> None:
    a_pickle(folder, outside)
    (folder / "model.safetensors.index.json").rename(folder / "harm.safetensors.index.json")
    change(folder / "config.json", transformers_weights="harm.safetensors.index.json")


def a_kernel_of_the_hub(folder: Path, outside: Path) -> None:
    change(folder / "config.json", attn_implementation="someone/kernel")


def linked_chat_templates(folder: Path, outside: Path) -> None:
    (outside / "other.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").symlink_to(outside)


def an_end_token_that_is_none(folder: Path, outside: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[0, ["</s>"]])


HARM = {
    an_end_token_that_is_none: r"generation_config\.json: eos_token_id is \[0, \['</s>'\]\], not a token id",
    a_pickle: r"index\.json names 'harm\.bin'; weights are read from safetensors files in the same folder only",
    a_pickle_elsewhere: r"names '.*outside/harm\.bin'; weights are read from safetensors files in the same folder only",
    a_file_elsewhere: r"names '\.\./outside/other\.safetensors'; weights are read",
    a_linked_shard: r"model-00001\S+ is a link out of its folder, which is not followed",
    a_linked_config: r"config\.json is a link out of its folder, which is not followed",
    linked_chat_templates: r"additional_chat_templates is a link out of its folder, which is not followed",
    an_adapter: r"holds an adapter \(adapter_config\.json\), which is not read; merge it into its model",
    weights_under_another_name: r"transformers_weights is 'harm\.safetensors\.index\.json', but weights are read from",
    a_kernel_of_the_hub: r"attn_implementation is 'someone/kernel', which is code on the Hub and is never run",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_hostile_folder_is_rejected_whoever_reads_it(model, tmp_path, harm):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    shutil.copytree(model, folder)
    outside.mkdir()
    skeleton = transformers_models.build_without_weights(folder)
    harm(folder, outside)
    name = "decoder_lm" if "llama" in str(model) else "hf"
    for read in (
        lambda: open_model(folder),
        lambda: transformers_models.load_model(folder),
        lambda: transformers_models.build_without_weights(folder),
        lambda: load_weights(skeleton, folder),
        lambda: load_config(["--model.name", name, "--model.init_from", str(folder), "--data.sequence_length", "32"]),
        lambda: open_for_harness(dict, folder, load_tokenizer("austen"), HarnessOptions(tasks=()), PrecisionConfig()),
    ):
        with pytest.raises(RefusedError, match=HARM[harm]):
            read()
    if harm in (a_linked_shard, a_linked_config, linked_chat_templates):
        with pytest.raises(DataError, match=HARM[harm]):
            load_tokenizer(str(folder))
    else:  # such as that of an adapter, which lies beside it
        assert len(load_tokenizer(str(folder))) == 4096
    assert not can_open(folder)
    assert not (outside / "harm").exists()


@pytest.mark.parametrize(
    "named", [{"gguf_file": OTHER}, {"fast_tokenizer_files": ["tokenizer.json", OTHER]}, {"fast_tokenizer_files": 3}]
)
def test_a_tokenizer_s_config_names_no_files_to_read(tmp_path, named):
    folder = tmp_path / "model"
    shutil.copytree(CORPUS / "tokenizer", folder)
    (tmp_path / "outside").mkdir()
    shutil.copy(folder / "tokenizer.json", folder / OTHER)
    change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **named)
    with pytest.raises(DataError, match=r"tokenizer_config\.json: \w+ names .*; remove the field"):
        load_tokenizer(str(folder))


def test_a_folder_with_an_adapter_alone_says_so(tmp_path):
    an_adapter(tmp_path, tmp_path)
    with pytest.raises(RefusedError, match="holds an adapter"):
        open_model(tmp_path)


def test_a_model_in_the_hub_s_cache_is_made_of_links_and_is_read(model, tmp_path):
    put_into_hub_cache(tmp_path, "owner/model", model.iterdir())
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "0123"
    ours, theirs = open_model(snapshot), open_model(model)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert len(load_tokenizer(str(snapshot))) == 4096
    (tmp_path / "elsewhere.json").write_bytes((model / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(RefusedError, match="is a link out of its folder"):
        open_model(snapshot)


def test_a_link_inside_its_folder_and_a_link_to_a_complete_folder_are_followed(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "config.json").rename(folder / "described.json")
    (folder / "config.json").symlink_to("described.json")
    (tmp_path / "link").symlink_to(folder)
    open_model(tmp_path / "link")
    assert len(load_tokenizer(str(tmp_path / "link"))) == 4096


def test_a_data_set_s_description_names_no_files_outside_its_folder(tmp_path):
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    for pattern in (str(tmp_path / "secret.jsonl"), "../secret.jsonl"):
        readme = f"---\nconfigs:\n- config_name: default\n  data_files: {pattern}\n---\n"
        (folder / "README.md").write_text(readme)
        with pytest.raises(DataError, match=r"names \S*secret\.jsonl, a file outside it, which is not read"):
            open_source(str(folder), DataConfig())


def test_nor_does_a_saved_table(tmp_path):
    for name in ("mine", "other"):
        datasets.Dataset.from_dict({"text": [name]}).save_to_disk(tmp_path / name)
    state = tmp_path / "mine" / "state.json"
    [file] = (tmp_path / "other").glob("*.arrow")
    for named in (str(file), f"../other/{file.name}"):
        change(state, _data_files=[{"filename": named}])
        with pytest.raises(DataError, match=r"names \S*\.arrow, a file outside it, which is not read"):
            open_source(str(tmp_path / "mine"), DataConfig())


@pytest.fixture
def a_stranger_s_run(tmp_path: Path) -> tuple[Path, Path]:
    """A run folder with one model of its own, and a folder with models outside of it."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run / "checkpoints" / "step-00000004", outside / "step-00000008"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    return run, outside


@pytest.mark.parametrize("name", ["best", "latest", "step-00000008"])
def test_a_link_out_of_a_run_is_no_checkpoint_of_it(a_stranger_s_run, name):
    run, outside = a_stranger_s_run
    own = run / "checkpoints" / "step-00000004"
    (run / "checkpoints" / name).symlink_to(outside / "step-00000008")
    assert outside not in [folder.resolve().parent for folder in model_folders(run)]
    assert find_model(run) == own
    assert find_model(run / "checkpoints") == own


def test_a_link_in_place_of_a_run_s_checkpoints_is_not_followed(a_stranger_s_run):
    run, outside = a_stranger_s_run
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").symlink_to(outside)
    assert find_config(run) is None
    with pytest.raises(CheckpointError, match="run is neither a run folder with checkpoints, nor a checkpoint"):
        find_model(run)
