"""The commands and the Python of docs/fine_tuning.md run, as a test can afford them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from dist_trainer.data.datasets import CORPUS
from tests.end_to_end.commands import ROOT
from tests.end_to_end.forked_commands import quick_command

PAGE = (ROOT / "docs" / "fine_tuning.md").read_text("utf-8")
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
CHEAP = ["--train.max_steps", "3", "--batch.global_batch_size", "2", "--validation.max_global_batches", "2"]
CHEAP += ["--tracking.wandb", "disabled", "--tracking.sample_tokens", "0"]


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: a model from elsewhere, a config.json, texts, prompts."""
    folder = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=4096, max_position_embeddings=1024)).save_pretrained(folder / "model")
    for file in (CORPUS / "tokenizer").iterdir():
        shutil.copy(file, folder / "model")
    AutoConfig.for_model("gpt2", vocab_size=4096, n_embd=32, n_layer=1, n_head=2).save_pretrained(folder / "my_gpt2")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "letters.txt").write_text("My dear Mr. Darcy, all is well here.\n" * 600)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "All is well", "id": 1}) + "\n")
    return folder


def run(words: list[str], folder: Path) -> None:
    module, *arguments = words
    done = quick_command(*arguments, module=module, cwd=folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"


def test_every_command_runs(folder: Path) -> None:
    for command in commands():
        words = shlex.split(command, comments=True)
        assert words[:2] == ["python", "-m"]
        words = ["model" if "/" in word and word.startswith("HuggingFaceTB") else word for word in words[2:]]
        run([*words, *(CHEAP if words[0] == "dist_trainer.train" else ["--max_new_tokens", "4"])], folder)
    assert json.loads((folder / "texts.jsonl").read_text())["id"] == 1


@pytest.mark.slow
def test_a_model_that_was_given_more_tokens_is_one_to_start_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    exec(snippet, {})
    words = shlex.split("--run_name larger --model.init_from larger --data.dataset my_texts/ --data.sequence_length 64")
    run(["dist_trainer.train", *words, *CHEAP], folder)
    saved = json.loads((folder / "runs" / "larger" / "checkpoints" / "best" / "config.json").read_text())
    assert saved["vocab_size"] == 4098
