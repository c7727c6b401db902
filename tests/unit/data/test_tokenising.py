"""Token stores hold the tokenizer's own ids, whatever encoded them, and a build that was killed resumes to the same bytes."""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_trainer.config.schema import DataConfig
from dist_trainer.data import encoding, records, store_building, text_file, text_pieces
from dist_trainer.data.datasets import files_split, open_source
from dist_trainer.data.encoding import FastEncoder, HuggingFaceEncoder, encode, fast_encoder, first_difference
from dist_trainer.data.templates import RecordFormatter, text_formatter
from dist_trainer.data.text_pieces import PieceBatch, TextPiece
from dist_trainer.data.token_store import SECONDS_KEPT, token_store
from dist_trainer.data.tokenizers import load_tokenizer, tokenizer_digest
from dist_trainer.errors import DataError, StoppedError
from tests.unit.data.dying import kill_a_build

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
TEXT = RecordFormatter(text_formatter("text", None), "")


@pytest.fixture(scope="module")
def novels() -> list[str]:
    config = DataConfig(dataset="austen")
    return [record["text"] for _, record in open_source("austen", config).validation.records()]


def wrapped(tokenizer: Tokenizer, **settings):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, **settings)


def byte_level(novels, pre_tokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(novels, trainer)
    return tokenizer


def like_gpt2(novels):
    return wrapped(byte_level(novels, pre_tokenizers.ByteLevel(add_prefix_space=False)))


def like_llama3(novels):
    words = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    return wrapped(byte_level(novels, pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])))


def like_llama2(novels):
    """▁ for a space, bytes for what has no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(novels, trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"], description["pre_tokenizer"] = description["added_tokens"][:2], None
    return wrapped(Tokenizer.from_str(json.dumps(description)), unk_token="<unk>")


def of_word_pieces(novels):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=["[UNK]", END], show_progress=False)
    tokenizer.train_from_iterator(novels, trainer)
    return wrapped(tokenizer, unk_token="[UNK]")


def that_knows_no_words(novels):
    return wrapped(byte_level(novels, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)))


def that_lets_special_tokens_be_text(novels):
    return wrapped(byte_level(novels, pre_tokenizers.ByteLevel(add_prefix_space=False)), split_special_tokens=True)


def austen(novels):
    return load_tokenizer("austen")


KINDS = [austen, like_gpt2, like_llama3, like_llama2, of_word_pieces, that_knows_no_words, that_lets_special_tokens_be_text]


def documents(novels) -> list[str]:
    """Real text, and text such as nobody writes."""
    chance = random.Random("not the probe's")
    ranges = ((1, 0xD800), (1, 0x250), (0xE000, 0x110000))
    odd = ["".join(chr(chance.randrange(*chance.choice(ranges))) for _ in range(300)) for _ in range(30)]
    special = [f"one {END} two{END}", "I'll  say:\r\n\r\n\tit's 12345", "\U0001f469\u200d\U0001f467 \u4e2d\u6587 \x00\x07", " "]
    return [*novels[:4], *odd, *special]


def written(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def stored(path: Path, tokenizer, cache: Path):
    split = files_split([path], DataConfig())
    return token_store(split, tokenizer, TEXT, cache_dir=cache)


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache / "tokens")): path.read_bytes() for path in (cache / "tokens").glob("*/*")}


@pytest.fixture
def without_gigatoken(monkeypatch):
    def begin():
        monkeypatch.setitem(sys.modules, "gigatoken", None)

    return begin


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_is_the_same_bytes_with_and_without_gigatoken(tmp_path, novels, kind, without_gigatoken):
    tokenizer = kind(novels)
    texts = documents(novels)
    path = written(tmp_path / "x.jsonl", texts)
    store = stored(path, tokenizer, tmp_path / "one")
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    assert store.tokens.tolist() == [i for document in ids for i in document]
    assert np.diff(store.offsets).tolist() == [len(document) for document in ids]
    without_gigatoken()
    assert stored(path, tokenizer, tmp_path / "two").key == store.key
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_spelling_of_the_end_token_in_a_text_becomes_that_token(tmp_path):
    tokenizer = load_tokenizer("austen")
    store = stored(written(tmp_path / "x.jsonl", [f"one{END}two"]), tokenizer, tmp_path)
    assert (store.tokens == tokenizer.eos_token_id).sum() == 2
    assert len(store.offsets) == 2


@pytest.mark.parametrize("kind", [austen, like_gpt2, like_llama3])
def test_gigatoken_is_used_for_byte_level_bpe(novels, kind):
    pytest.importorskip("gigatoken")
    tokenizer = kind(novels)
    fast = fast_encoder(tokenizer)
    assert fast is not None
    assert first_difference(fast, HuggingFaceEncoder(tokenizer), [*novels, *documents(novels)]) is None


@pytest.mark.parametrize("kind", [of_word_pieces, that_lets_special_tokens_be_text])
def test_gigatoken_is_not_used_for_what_it_does_not_know_or_does_otherwise(novels, kind, caplog):
    with caplog.at_level(logging.INFO):
        assert fast_encoder(kind(novels)) is None
    assert "gigatoken" in caplog.text


class Panic(BaseException):
    """As the library's own, which are no Exceptions either."""


def flawed(monkeypatch, word: str, *, panics: bool = False) -> list[str]:
    """Let gigatoken err for texts with `word` in them; gives the texts that it got."""
    pytest.importorskip("gigatoken")
    seen, real = [], FastEncoder.__call__

    def call(self, texts):
        seen.extend(texts)
        if panics and any(word in text for text in texts):
            raise Panic("index out of bounds")
        return [ids + 1 if word in text else ids for text, ids in zip(texts, real(self, texts), strict=True)]

    monkeypatch.setattr(FastEncoder, "__call__", call)
    return seen


@pytest.mark.parametrize("panics", [False, True])
def test_a_difference_in_the_probe_leaves_the_tokenizer_to_itself(monkeypatch, panics):
    flawed(monkeypatch, "\u4e2d", panics=panics)
    assert fast_encoder(load_tokenizer("austen")) is None


@pytest.mark.parametrize("panics", [False, True])
def test_a_difference_found_later_on_rebuilds_the_store(tmp_path, monkeypatch, panics, caplog, without_gigatoken):
    monkeypatch.setattr(text_pieces, "BATCH_PIECES", 1)
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 20)
    path = written(tmp_path / "x.jsonl", [*(f"text {n}" for n in range(20)), "here is xyzzy", "and more"])
    tokenizer = load_tokenizer("austen")
    seen = flawed(monkeypatch, "xyzzy", panics=panics)
    stored(path, tokenizer, tmp_path / "one")
    assert "text 3" in seen
    assert "again, with the tokenizer itself" in caplog.text
    without_gigatoken()
    stored(path, tokenizer, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_build_that_found_gigatoken_wrong_does_not_resume_with_it_or_its_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(text_pieces, "BATCH_PIECES", 1)
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 20)
    path, tokenizer = written(tmp_path / "x.jsonl", [*(f"text {n}" for n in range(20)), "xyzzy"]), load_tokenizer("austen")
    seen, built = flawed(monkeypatch, "xyzzy", panics=True), built_shards(monkeypatch)
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Path, "touch", lambda path: os.mknod(path) or signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            stored(path, tokenizer, tmp_path)
    assert len(built) > 3
    assert not list((tmp_path / "tokens").glob(".building-*/shard-*"))
    seen.clear()
    stored(path, tokenizer, tmp_path)
    assert seen == []


def test_a_fresh_gigatoken_takes_over_before_its_memory_grows_large(novels, monkeypatch):
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(encoding, "CHARACTERS_PER_CACHE", 10_000)
    tokenizer = load_tokenizer("austen")
    fast = FastEncoder(tokenizer)
    first = fast._encode
    assert (
        first_difference(lambda texts: [fast([text])[0] for text in texts], HuggingFaceEncoder(tokenizer), novels[:4]) is None
    )
    assert fast._encode is not first


def test_no_more_batches_are_read_than_can_be_worked_on():
    read = []

    class Slow:
        name, threads = "slow", 2

        def __call__(self, texts):
            return [np.zeros(len(text)) for text in texts]

    def batches():
        for number in range(20):
            read.append(number)
            yield PieceBatch(0, [TextPiece("x" * number, ends_document=True)])

    encoder = Slow()
    for number, batch in enumerate(encode(batches(), encoder, encoder)):
        assert [len(ids) for ids in batch.ids] == [number]
        assert len(read) <= number + encoder.threads + 1


def text_in(path: Path):
    [(_, record)] = records.read_text(path)
    return record["text"]


@pytest.mark.parametrize("border", ["with the next", "dropped", "none"])
@pytest.mark.parametrize("part_bytes", [1, 7, 100, 997])
def test_a_long_file_is_cut_as_if_it_were_read_at_once(tmp_path, monkeypatch, border, part_bytes):
    text = "\ufeff" + "na\u00efve caf\u00e9 \U0001f600 and\n more  words; " * 40 + "x" * 300 + " y z" * 50
    path = tmp_path / "x.txt"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 64)
    whole = text_in(path)
    assert whole == text[1:]
    monkeypatch.setattr(text_file, "PART_BYTES", part_bytes)
    long = text_in(path)
    assert isinstance(long, text_file.LongText)
    assert list(text_pieces.pieces_of(long, border)) == list(text_pieces.pieces_of(whole, border))


def test_a_long_file_makes_the_store_that_it_makes_when_read_at_once(tmp_path, monkeypatch, novels):
    path = tmp_path / "x.txt"
    path.write_text(novels[0], encoding="utf-8")
    tokenizer = load_tokenizer("austen")
    stored(path, tokenizer, tmp_path / "at once")
    monkeypatch.setattr(text_file, "PART_BYTES", 1000)
    stored(path, tokenizer, tmp_path / "in parts")
    assert files_of(tmp_path / "in parts") == files_of(tmp_path / "at once")
    assert str(text_formatter("text", "<{text}>")("here", {"text": text_file.LongText(path)})) == f"<{novels[0]}>"


@pytest.mark.parametrize(("content", "line"), [(b"one\ntwo\nthr\xffe\n", 3), (b"one\ntwo\nthree\xc3", 3)])
@pytest.mark.parametrize("part_bytes", [1, 4, 1 << 20])
def test_what_is_not_utf8_is_found_in_any_part(tmp_path, monkeypatch, content, line, part_bytes):
    monkeypatch.setattr(text_file, "PART_BYTES", part_bytes)
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.txt:{line}: not UTF-8 text \(byte 0x"):
        stored(path, load_tokenizer("austen"), tmp_path)


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_a_finished_store_with_a_flipped_bit_is_built_again(tmp_path, novels, name):
    path, tokenizer = written(tmp_path / "x.jsonl", novels[:2]), load_tokenizer("austen")
    stored(path, tokenizer, tmp_path)
    before = files_of(tmp_path)
    [file] = (tmp_path / "tokens").glob(f"*/{name}")
    content = bytearray(file.read_bytes())
    content[-16] ^= 1  # in offsets.npy where the last document begins, which nothing but the digest can show
    file.write_bytes(content)
    store = stored(path, tokenizer, tmp_path)
    assert files_of(tmp_path) == before
    assert store.tokens.tobytes() == file.with_name("tokens.bin").read_bytes()


def link(shard: Path) -> None:
    shard.rename(shard.with_name("elsewhere"))
    shard.symlink_to("elsewhere")


HARMS = {
    "none": lambda shard: None,
    "a flipped bit": flip,
    "an end cut off": lambda shard: os.truncate(shard, shard.stat().st_size - 100),
    "empty": lambda shard: os.truncate(shard, 0),
    "a link": link,
    "missing": Path.unlink,
}


def make_shards_small(monkeypatch) -> None:
    monkeypatch.setattr(text_pieces, "BATCH_PIECES", 2)
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 500)  # shards end within documents, too
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 2000)


@pytest.fixture
def small_shards(monkeypatch):
    make_shards_small(monkeypatch)


def built_shards(monkeypatch) -> list[int]:
    """The numbers of shards, as they are built from here on."""
    built, real = [], store_building.replace_file

    def write(path, *arguments, **named):
        built.append(int(path.stem.removeprefix("shard-")))
        real(path, *arguments, **named)

    monkeypatch.setattr(store_building, "replace_file", write)
    return built


def built_at_once_and_killed(folder: Path, novels) -> tuple[Path, int]:
    """A text and its number of shards: its store is in `at once`, what a build left that was killed after 5 in `killed`."""
    path, tokenizer = written(folder / "x.jsonl", ["a short one", "", "another", *novels[:5]]), load_tokenizer("austen")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_shards_small(monkeypatch)
        built = built_shards(monkeypatch)
        stored(path, tokenizer, folder / "at once")
        assert built == list(range(len(built)))
        assert len(built) > 10
        kill_a_build(lambda: stored(path, load_tokenizer("austen"), folder / "killed"), folder / "killed", shards=5)
        return path, len(built)


@pytest.fixture(scope="module")
def killed_build(tmp_path_factory, novels) -> tuple[Path, int]:
    return built_at_once_and_killed(tmp_path_factory.mktemp("killed build"), novels)


def resumes_to_the_same_bytes(path: Path, cache: Path, count: int, harm: str, monkeypatch) -> None:
    built = built_shards(monkeypatch)
    [left] = (cache / "tokens").glob(".building-*")
    HARMS[harm](left / "shard-000003.npz")
    stored(path, load_tokenizer("austen"), cache)
    assert built == [*([] if harm == "none" else [3]), *range(5, count)]
    assert files_of(cache) == files_of(path.parent / "at once")
    assert not left.exists()


@pytest.mark.parametrize("harm", HARMS)
def test_a_build_that_was_killed_resumes_to_the_same_bytes(tmp_path, monkeypatch, killed_build, harm, small_shards):
    path, count = killed_build
    cache = shutil.copytree(path.parent / "killed", tmp_path / "killed")
    resumes_to_the_same_bytes(path, cache, count, harm, monkeypatch)


def test_a_build_without_gigatoken_that_was_killed_resumes_to_the_same_bytes(
    tmp_path, monkeypatch, novels, without_gigatoken, small_shards
):
    without_gigatoken()
    path, count = built_at_once_and_killed(tmp_path, novels)
    resumes_to_the_same_bytes(path, tmp_path / "killed", count, "none", monkeypatch)


def test_a_build_that_was_killed_while_it_joined_its_shards_builds_none_again(tmp_path, monkeypatch, novels, small_shards):
    path = written(tmp_path / "x.jsonl", novels[:2])
    built = built_shards(monkeypatch)
    stored(path, load_tokenizer("austen"), tmp_path / "at once")
    count, built[:] = len(built), []
    build = lambda: stored(path, load_tokenizer("austen"), tmp_path / "killed")  # noqa: E731
    left = kill_a_build(build, tmp_path / "killed", shards=count, joining=True)
    assert (left / "store" / "tokens.bin").exists()
    build()
    assert built == []
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "at once")


def test_shards_of_text_divided_differently_are_built_again(tmp_path, monkeypatch, novels, small_shards):
    path = written(tmp_path / "x.jsonl", novels[:3])
    kill_a_build(lambda: stored(path, load_tokenizer("austen"), tmp_path / "killed"), tmp_path / "killed", shards=2)
    monkeypatch.setattr(text_pieces, "PIECE_CHARACTERS", 1 << 20)
    stored(path, load_tokenizer("austen"), tmp_path / "at once")
    stored(path, load_tokenizer("austen"), tmp_path / "killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "at once")


def test_a_store_and_its_shards_are_synced_before_they_get_their_names(tmp_path, trail):
    path = written(tmp_path / "x.jsonl", ["a text"])
    key = stored(path, load_tokenizer("austen"), tmp_path).key
    shard = trail.index("rename shard-000000.npz")
    assert trail[shard - 1] == "fsync .staging-shard-000000.npz"
    named = trail.index(f"rename {key}")
    assert {f"fsync {name}" for name in ("tokens.bin", "offsets.npy", "index.json", "store")} <= set(trail[shard:named])
    assert "fsync tokens" in trail[named:]


def test_a_store_does_not_depend_on_the_size_of_its_shards(tmp_path, novels, small_shards, monkeypatch):
    path = written(tmp_path / "x.jsonl", [novels[0], "a short one", *novels[1:3]])
    stored(path, load_tokenizer("austen"), tmp_path / "small")
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 1 << 26)
    stored(path, load_tokenizer("austen"), tmp_path / "large")
    assert files_of(tmp_path / "small") == files_of(tmp_path / "large")


@pytest.mark.parametrize(
    ("error", "expected", "stays"),
    [
        (StoppedError(signal.SIGTERM), StoppedError, True),
        (KeyboardInterrupt(), KeyboardInterrupt, True),
        (DataError("broken"), DataError, False),
        (OSError(28, "No space left on device"), DataError, False),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_signal_keeps_complete_shards_and_an_error_does_not(tmp_path, monkeypatch, error, expected, stays):
    monkeypatch.setattr(text_pieces, "BATCH_PIECES", 1)
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 20)
    real = store_building.replace_file

    def write(path, *arguments, **named):
        if path.name == "shard-000003.npz":
            raise error
        real(path, *arguments, **named)

    monkeypatch.setattr(store_building, "replace_file", write)
    path = written(tmp_path / "x.jsonl", [f"text {n}" for n in range(20)])
    with pytest.raises(expected):
        stored(path, load_tokenizer("austen"), tmp_path)
    assert len(list((tmp_path / "tokens").glob(".building-*/shard-*"))) == (3 if stays else 0)


def test_what_nobody_resumed_for_a_week_is_removed(tmp_path):
    stores = tmp_path / "tokens"
    for name, age in (("old", SECONDS_KEPT + 60), ("recent", SECONDS_KEPT - 60)):
        (stores / f".building-{name}").mkdir(parents=True)
        (stores / f".building-{name}" / "shard-000000.npz").touch()
        os.utime(stores / f".building-{name}", (time.time() - age,) * 2)
    stored(written(tmp_path / "x.jsonl", ["a text"]), load_tokenizer("austen"), tmp_path)
    assert [path.name for path in stores.glob(".building-*")] == [".building-recent"]


def test_a_link_in_place_of_a_shard_is_not_written_through(tmp_path, small_shards, novels):
    path, precious = written(tmp_path / "x.jsonl", novels[:2]), tmp_path / "precious"
    precious.write_bytes(b"kept")
    left = kill_a_build(lambda: stored(path, load_tokenizer("austen"), tmp_path), tmp_path, shards=1)
    for name in ("shard-000001.npz", ".staging-shard-000001.npz"):
        (left / name).symlink_to(precious)
    (left / "store").symlink_to(tmp_path)
    stored(path, load_tokenizer("austen"), tmp_path)
    assert precious.read_bytes() == b"kept"
    assert path.exists()


def test_without_a_terminal_the_log_reports_progress(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_building, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        stored(written(tmp_path / "x.jsonl", ["a text " * 1000]), load_tokenizer("austen"), tmp_path)
    assert "0.0 MB of text, " in caplog.text
    assert " MB/s" in caplog.text


def test_the_bundled_tokenizer_keeps_its_digest():
    """Stores are named after it: another one would make every user tokenise again."""
    assert tokenizer_digest(load_tokenizer("austen")).startswith("38b2d3e0e8497a8d")


@pytest.mark.parametrize(("model_type", "asks"), [("llama", False), (None, False), ("qwen2", True)])
def test_a_checkpoint_s_tokenizer_is_that_of_transformers_without_the_model_s_code(tmp_path, monkeypatch, model_type, asks):
    saved = load_tokenizer("austen")
    saved.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    saved.chat_template = "{{ messages }}"
    saved.save_pretrained(tmp_path)
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    calls = []
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: calls.append(1) or theirs)
    ours = load_tokenizer(str(tmp_path))
    assert bool(calls) is asks
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert (ours.special_tokens_map, ours.chat_template) == (theirs.special_tokens_map, theirs.chat_template)
