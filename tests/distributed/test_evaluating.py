"""What `evaluate` measures: one number on any number of ranks, and bits over the bytes of the tokens that are trained on."""

import contextlib
import io
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from dist_trainer import evaluate
from dist_trainer.data.tokenizers import load_tokenizer
from dist_trainer.errors import CheckpointError, ConfigError
from dist_trainer.run.evaluation import evaluate_model
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import changed, folder, metrics, run, small_config
from tests.unit.data.test_tokenising import of_word_pieces

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluating.md").read_text("utf-8")
TEXTS = ["It was a truth – acknowledged by all. " * 30, "Emma, naïve as ever: “Indeed!” " * 20]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Where the reader of the page stands: a run of 2 steps, texts of their own."""
    here = tmp_path_factory.mktemp("reader")
    (here / "my_texts").mkdir()
    for number, text in enumerate(TEXTS):
        (here / "my_texts" / f"{number}.txt").write_text(text, encoding="utf-8")
    changes = {"run_name": "default", "train__max_steps": 2, "data__validation_fraction": 0.5}
    config = small_config(here / "my_texts", here / "runs", **changes)
    assert run(config, 1) == [0]
    load_tokenizer(str(folder(config)))  # what it imports of transformers is imported once, before ranks are forked
    return here, config


@pytest.fixture(scope="module")
def measured(reader):
    """What `evaluate` finds of that run's model on all of the texts, or on other data, with other keys."""
    here, config = reader

    def measure(data=here / "my_texts", **changes):
        config_of_data = changed(config, data__validation_dataset=str(data), **changes)
        return evaluate_model(folder(config), config_of_data)

    return measure


def printed(asked: evaluate.EvaluationRequest) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate.run(asked) == 0
    return out.getvalue()


def test_the_commands_of_the_page_give_the_same_number_on_any_number_of_ranks(reader, monkeypatch):
    here, config = reader
    monkeypatch.chdir(here)
    found, parsed = [], {}
    for command in re.search(r"```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines():
        launcher, words = command.partition(" #")[0].strip().split("-m dist_trainer.evaluate ")
        ranks = 1 if launcher == "python " else int(re.fullmatch(r"torchrun --nproc_per_node=(\d+) ", launcher)[1])
        asked = parsed[words] = parsed.get(words) or evaluate.parse_arguments(shlex.split(words))
        said, *by_others = run_ranks(ranks, lambda asked=asked: printed(asked))
        assert not any(by_others)
        found.append(json.loads(said))
    alone, on_other_data, on_two_ranks = found
    assert alone == on_two_ranks == json.loads(run_ranks(4, lambda: printed(asked))[0])
    assert on_other_data["bytes"] > alone["bytes"]
    in_training = metrics(config, "validation")[-1]
    assert {name: in_training[name] for name in alone.keys() - {"data"}} == {n: alone[n] for n in alone.keys() - {"data"}}


def test_ranks_that_could_not_share_the_training_batch_evenly_evaluate_all_the_same(reader):
    _, config = reader
    assert config.batch.global_batch_size % 3
    said, *by_others = run_ranks(3, lambda: printed(evaluate.parse_arguments([str(folder(config))])))
    assert not any(by_others)
    assert json.loads(said)["loss"] == metrics(config, "validation")[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "without_their_first"),
    [({}, TEXTS[:1]), ({"data__document_mask": True}, TEXTS), ({"data__packing": False}, TEXTS)],
    ids=["packed", "kept apart", "one a row"],
)
def test_all_bytes_count_but_those_of_first_tokens(measured, changes, without_their_first):
    tokenizer = load_tokenizer("austen")
    first_tokens = [tokenizer.decode(tokenizer(text)["input_ids"][0]) for text in without_their_first]
    counted = len("".join(TEXTS).encode()) - len("".join(first_tokens).encode())
    found = measured(**changes)
    assert found["bytes"] == counted
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / counted, rel=1e-12)


def test_only_sequences_that_were_read_count(measured):
    found = measured(validation__max_global_batches=1)
    assert found["tokens"] == 8 * 32
    tokenizer = load_tokenizer("austen")
    ids = tokenizer(TEXTS[0])["input_ids"]
    assert len(ids) > 8 * 32
    assert found["bytes"] == len(tokenizer.decode(ids[1 : 8 * 32 + 1]).encode())


def test_of_answers_alone_only_their_bytes_count(measured, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"q": f"Who is {n}?", "a": " Nobody but you."}) + "\n" for n in range(20)))
    found = measured(data, data__template="{q}", data__completion_template="{a}")
    assert found["bytes"] == 20 * len(" Nobody but you.")


def test_if_tokens_do_not_spell_the_text_bits_per_byte_are_null_and_a_sentence_says_why(measured, tmp_path, capfd):
    of_word_pieces(TEXTS).save_pretrained(tmp_path)
    found = measured(data__tokenizer=str(tmp_path))
    assert (found["bits_per_byte"], found["bytes"]) == (None, None)
    assert found["loss"] > 0
    assert "bits per byte are null: this tokenizer's tokens do not decode to exactly" in capfd.readouterr().err


def test_sequences_longer_than_the_model_s_context_are_rejected_instead_of_measured(measured):
    with pytest.raises(ConfigError, match="is 64, but the model was made for at most 32 positions"):
        measured(data__sequence_length=64)


def test_a_folder_without_a_model_is_reported_as_such(reader, tmp_path):
    with pytest.raises(CheckpointError, match="is neither a run folder with checkpoints"):
        evaluate.run(evaluate.parse_arguments([str(tmp_path)]))


def test_without_lm_eval_a_sentence_says_how_to_install_it(reader, monkeypatch):
    _, config = reader
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"install it with `EXTRAS=harness launch/setup\.sh`"):
        evaluate.run(evaluate.EvaluationRequest(folder(config), config, {"tasks": ("letters",)}))
    assert not (folder(config) / "evaluations").exists()
