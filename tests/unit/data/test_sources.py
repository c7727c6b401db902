"""Every kind of dataset, and every way in which one can be wrong."""

import bz2
import csv
import errno
import gzip
import json
import lzma
import multiprocessing
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from dist_trainer.config.schema import BatchConfig, DataConfig, TrainingConfig
from dist_trainer.data import build_datasets as rows
from dist_trainer.data import text_pieces as text_pieces_module
from dist_trainer.data import token_store as token_store_module
from dist_trainer.data.datasets import open_source
from dist_trainer.data.loader import create_dataloaders, create_validation_loader
from dist_trainer.data.templates import text_formatter
from dist_trainer.data.tokenizers import load_tokenizer, tokenizer_digest, vocabulary_size
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, DataError

STORIES = [f"Story {number}. " + "It is a truth universally acknowledged. " * (number + 3) for number in range(12)]


def jsonl(rows=STORIES, column: str = "text") -> str:
    return "".join(json.dumps({column: row, "number": number}) + "\n" for number, row in enumerate(rows))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts(path: Path | str, **data) -> tuple[list[str], list[str] | None]:
    config = DataConfig(dataset=str(path), **data)
    source = open_source(config.dataset, config)
    read = text_formatter(config.text_column, config.template)

    def all_of(split):
        return None if split is None else [read(where, record) for where, record in split.records()]

    return all_of(source.train) or [], all_of(source.validation)


def test_the_corpus_inside_the_package_has_both_splits():
    train, validation = texts("austen")
    assert len(train) == 256
    assert validation is not None
    assert len(validation) == 13


def test_jsonl_plain_and_compressed(tmp_path):
    for name, content in {
        "a.jsonl": jsonl().encode(),
        "b.jsonl.gz": gzip.compress(jsonl().encode()),
        "c.jsonl.xz": lzma.compress(jsonl().encode()),
        "d.json": json.dumps([{"text": story} for story in STORIES]).encode(),
        "e.jsonl.bz2": bz2.compress(jsonl().encode()),
        "f.jsonl.zst": pa.compress(jsonl().encode(), codec="zstd", asbytes=True),
        "g.jsonl.zst": b"".join(pa.compress(line, codec="zstd", asbytes=True) for line in jsonl().encode().splitlines(True)),
        "h.csv.gz": gzip.compress(("\ufefftext,number\r\n" + "".join(f"{story},1\r\n" for story in STORIES)).encode()),
    }.items():
        assert texts(write(tmp_path / name, content))[0] == STORIES


def test_csv_and_tsv_with_quotes_and_lines_in_values(tmp_path):
    rows = [{"text": 'He said "no",\nand left.\t', "label": "1"}, {"text": "caf\u00e9", "label": ""}]
    for name, dialect in {"a.csv": "excel", "b.tsv": "excel-tab"}.items():
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)
        assert texts(tmp_path / name)[0] == [row["text"] for row in rows]
        assert texts(tmp_path / name, template="{label}: {text}")[0] == [f"{row['label']}: {row['text']}" for row in rows]


def test_a_text_file_is_one_document(tmp_path):
    assert texts(write(tmp_path / "novel.txt", "One\n\nTwo\n"))[0] == ["One\n\nTwo\n"]
    assert texts(write(tmp_path / "notes.tex", "three"))[0] == ["three"]


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pa.table({"body": STORIES}), tmp_path / "s.parquet", row_group_size=5)
    assert texts(tmp_path / "s.parquet", text_column="body")[0] == STORIES


def test_only_the_requested_columns_of_a_parquet_file_are_read(tmp_path):
    pyarrow.parquet.write_table(pa.table({"body": STORIES, "picture": [b"\xff" * 9] * 12}), tmp_path / "s.parquet")
    [(_, first), *_] = open_source(str(tmp_path / "s.parquet"), DataConfig(text_column="body")).train.records()
    assert first == {"body": STORIES[0]}
    with pytest.raises(DataError, match=r"s\.parquet: there is no column 'text', only 'body', 'picture'"):
        texts(tmp_path / "s.parquet")


def test_save_to_disk_folders_with_and_without_splits(tmp_path):
    table = datasets.Dataset.from_dict({"text": STORIES})
    table.save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "one") == (STORIES, None)
    both = datasets.DatasetDict({"train": table.select(range(8)), "validation": table.select(range(8, 12))})
    both.save_to_disk(str(tmp_path / "two"))
    assert texts(tmp_path / "two") == (STORIES[:8], STORIES[8:])


def test_folders_with_splits_in_their_file_names_lose_no_file(tmp_path):
    for name, part in {
        "data/train-00000-of-00002.jsonl": STORIES[:4],
        "data/train-00001-of-00002.jsonl": STORIES[4:8],
        "data/validation-00000-of-00001.jsonl": STORIES[8:10],
        "data/test-00000-of-00001.jsonl": STORIES[10:],
    }.items():
        write(tmp_path / "hub" / name, jsonl(part))
    write(tmp_path / "hub" / "README.md", "A dataset")
    assert texts(tmp_path / "hub") == (STORIES[:8], STORIES[8:10])
    for number, story in enumerate(STORIES):
        write(tmp_path / "plain" / f"chapter{number:02}.txt", story)
    assert texts(tmp_path / "plain") == (STORIES, None)


def test_the_log_says_how_many_files_of_a_folder_were_read_and_what_was_skipped(tmp_path, caplog):
    folder = tmp_path / "docs"
    for name in ("guide.md", "more/story.txt", "README.md", "more/License.txt", "picture.png", ".git/HEAD.md", "test/a.txt"):
        write(folder / name, f"It is {name}.")
    caplog.set_level("INFO", "dist_trainer")
    assert texts(folder) == (["It is guide.md.", "It is more/story.txt."], None)
    assert caplog.messages == [
        f"read 2 files from {folder}; skipped (not data): README.md, more/License.txt, picture.png; "
        "skipped (test split): test/a.txt; skipped (hidden): 1 file"
    ]
    assert caplog.records[0].levelname == "INFO"
    for number in range(9):
        write(folder / f"{number}.pdf", "")
    texts(folder)
    assert caplog.records[1].levelname == "WARNING"
    assert "0.pdf, 1.pdf, 2.pdf, 3.pdf, 4.pdf, 5.pdf, 6.pdf, 7.pdf and 4 files more" in caplog.messages[1]
    write(tmp_path / "one" / "story.txt", "A story.")
    texts(tmp_path / "one")
    assert caplog.messages[2] == f"read 1 file from {tmp_path / 'one'}"


def test_links_are_followed_at_any_depth_and_no_folder_is_read_twice(tmp_path, caplog):
    write(tmp_path / "elsewhere" / "deep" / "b.txt", "b")
    write(tmp_path / "one.txt", "c")
    folder = tmp_path / "data"
    write(folder / "sub" / "a.txt", "a")
    (folder / "sub" / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "sub" / "c.txt").symlink_to(tmp_path / "one.txt")
    (folder / "again").symlink_to(folder / "sub")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "itself").symlink_to("itself")
    assert texts(folder) == (["a", "c", "b"], None)
    (tmp_path / "to_data").symlink_to(folder)
    assert texts(tmp_path / "to_data") == (["a", "c", "b"], None)
    (tmp_path / "one.txt").unlink()
    with pytest.raises(DataError, match=r"sub/c\.txt: cannot be read \(No such file or directory\)"):
        texts(folder)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, caplog, monkeypatch):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "secret" / "b.txt", "b")
    scandir = os.scandir

    def refusing(path):
        if str(path) == str(refused):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused = tmp_path / "secret"
    assert texts(tmp_path) == (["a"], None)
    assert caplog.messages == [f"read 1 file from {tmp_path}; skipped (no permission): secret"]
    refused = tmp_path
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        texts(tmp_path)


def test_a_folder_that_declares_its_splits_in_readme(tmp_path):
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: validation\n    path: b.jsonl\n---\n",
    )
    write(tmp_path / "a.jsonl", jsonl(STORIES[:8]))
    write(tmp_path / "b.jsonl", jsonl(STORIES[8:]))
    assert texts(tmp_path, cache_dir=str(tmp_path / "cache")) == (STORIES[:8], STORIES[8:])


def test_of_several_configurations_in_readme_one_must_be_chosen(tmp_path):
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    write(tmp_path / "README.md", f"---\nconfigs:\n{configs}---\n")
    write(tmp_path / "a.jsonl", jsonl(STORIES[:8]))
    write(tmp_path / "b.jsonl", jsonl(STORIES[8:]))
    with pytest.raises(DataError, match=r"several configurations; choose one with --data\.dataset_config: 'a', 'b'"):
        texts(tmp_path)
    with pytest.raises(DataError, match=r"cannot be loaded: .*'c'.*'a', 'b'"):
        texts(tmp_path, dataset_config="c")
    assert texts(tmp_path, dataset_config="b")[0] == STORIES[8:]


def test_a_dataset_configuration_that_nothing_reads_is_rejected(tmp_path):
    file, folder = write(tmp_path / "s.jsonl", jsonl()), write(tmp_path / "plain" / "t.jsonl", jsonl()).parent
    for path in (file, folder):
        with pytest.raises(ConfigError, match=r"data\.dataset_config: 'b' is set, but .* has no configurations"):
            texts(path, dataset_config="b")
    assert texts(file, dataset_config="plain_text", validation_dataset="squad")[0] == STORIES, "which is for the other one"


SQUAD_ROW = {"context": "A {b}", "question": "Why?", "answers": {"text": ["So", "Thus"], "answer_start": [0, 4]}}


def test_a_template_joins_columns_and_looks_into_them(tmp_path):
    write(tmp_path / "s.jsonl", json.dumps(SQUAD_ROW) + "\n")
    template = "{context}\n{{{question}}}\n{answers[text][1]}"
    assert texts(tmp_path / "s.jsonl", template=template)[0] == ["A {b}\n{Why?}\nThus"]
    assert texts(tmp_path / "s.jsonl", template="x{answers[text][7]}y")[0] == ["xy"]


@pytest.mark.parametrize("template", ["{context.upper}", "{context!r}", "{context:>10}", "none", "{", "{0[__class__}"])
def test_templates_only_look_up(template):
    with pytest.raises(ConfigError, match=r"data\.template"):
        text_formatter("text", template)


BAD = {
    "malformed line": ("x.jsonl", '{"text": "a"}\n{"text": \n', r"x\.jsonl:2: not a JSON object"),
    "a number a line": ("x.jsonl", "1\n", r"x\.jsonl:1: a JSON int"),
    "columns of prompts and completions": (
        "x.jsonl",
        '{"context": "a", "question": "b", "answer": "c"}\n',
        r'only .* set --data.template "{context}\\n{question}\\n" and --data.completion_template "{answer}" to train on',
    ),
    "no such column": ("x.jsonl", '{"body": "a"}\n', r"x\.jsonl:1: there is no column 'text', only 'body'"),
    "not text": ("x.jsonl", '{"text": "a"}\n{"text": 3}\n', r"x\.jsonl:2: the column 'text' holds an int"),
    "null": ("x.jsonl", '{"text": null}\n', r"x\.jsonl:1: .* nothing \(null\)"),
    "not UTF-8": ("x.txt", b"one\ntw\xff\n", r"x\.txt:2: not UTF-8 text \(byte 0xff\)"),
    "not gzip": ("x.jsonl.gz", b"plain", r"x\.jsonl\.gz: cannot be read"),
    "cut off": ("x.jsonl.xz", lzma.compress(b"text" * 1000)[:-20], r"x\.jsonl\.xz"),
    "damaged gzip": ("x.jsonl.gz", gzip.compress(b"text" * 1000)[:12] + b"\xff" * 40, r"x\.jsonl\.gz: cannot be read"),
    "half a character": (
        "x.jsonl",
        '{"text": "a"}\n{"text": "b\\ud83d"}\n',
        r"x\.jsonl:2: half of a character .* position 1",
    ),
    "nested without end": ("x.jsonl", "[" * 200_000, r"x\.jsonl: not a JSON array"),
    "an array after a BOM": ("x.json", b"\xef\xbb\xbf[1]", r"x\.json element 1: a JSON int"),
    "empty": ("x.jsonl", "", r"x\.jsonl: contains no text"),
    "only blanks": ("x.txt", " \n ", r"x\.txt: contains no text"),
    "not Parquet": ("x.parquet", "text", r"x\.parquet: cannot be read"),
    "another format": ("x.pdf", "text", r"files of type \.pdf are not read"),
    "values beyond the columns": ("x.csv", 'text\n"a\nb"\nc,d\n', r"x\.csv:4: 2 values, but line 1 names 1 column"),
    "a quote that is not closed": ("x.csv", 'text\na\n"b\nc\n', r"x\.csv:3: not CSV"),
    "CSV that is not UTF-8": ("x.csv", b"text\na\n\xff\n", r"x\.csv:3: not UTF-8 \(byte 0xff\)"),
    "a CSV header that is not UTF-8": ("x.csv", b"te\xffxt\ntext\na\n", r"x\.csv:1: not UTF-8 \(byte 0xff\)"),
    "two columns of one name": ("x.tsv", "text\ttext\n", r"x\.tsv:1: two columns are named 'text'"),
    "no such column in CSV": ("x.csv", "body\na\n", r"x\.csv:2: there is no column 'text', only 'body'"),
    "cut off zstd": ("x.txt.zst", pa.compress(bytes(range(256)) * 9, codec="zstd", asbytes=True)[:-9], r"x\.txt\.zst: cannot"),
    "cut off bzip2": ("x.txt.bz2", bz2.compress(b"text" * 1000)[:-9], r"x\.txt\.bz2: cannot be read"),
    "not zstd": ("x.txt.zst", b"text" * 1000, r"x\.txt\.zst: cannot be read"),
    "too little": ("x.txt", "a few words only", r"gives 1 training sequence of 16 tokens, fewer than one global batch \(4\)"),
}


def small(path: Path | str, tmp_path: Path, **data) -> TrainingConfig:
    section = DataConfig(**{"dataset": str(path), "sequence_length": 16, "cache_dir": str(tmp_path / "cache"), **data})
    return TrainingConfig(data=section, batch=BatchConfig(4, 2))


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_a_message_with_path_line_and_remedy(tmp_path, case):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        create_dataloaders(small(path, tmp_path))


def test_missing_paths_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        create_dataloaders(small(tmp_path / "nowhere.txt", tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="it is empty"):
        create_dataloaders(small(tmp_path / "empty", tmp_path))
    write(tmp_path / "broken" / "dataset_dict.json", "{")
    with pytest.raises(DataError, match="broken cannot be loaded"):
        create_dataloaders(small(tmp_path / "broken", tmp_path))


def test_a_trailing_slash_is_a_path_and_no_name_on_the_hub(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "texts" / "a.txt", "one")
    assert texts("texts/") == (["one"], None)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(DataError, match="nowhere/ does not exist"):
        texts("nowhere/")
    with pytest.raises(DataError, match=r"data\.tokenizer: nowhere does not exist"):
        load_tokenizer("nowhere/")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/texts") == (["one"], None)


def test_messages_name_the_key_that_is_wrong(tmp_path):
    here, austen = str(write(tmp_path / "x.jsonl", jsonl())), load_tokenizer("austen")
    with pytest.raises(DataError, match=r"^data\.validation_dataset: .*nowhere\.jsonl does not exist"):
        create_dataloaders(small(here, tmp_path, validation_dataset=str(tmp_path / "nowhere.jsonl")))
    assert not list((tmp_path / "cache").glob("tokens/*")), "before anything is tokenised"
    with pytest.raises(DataError, match=r"^--data: .*nowhere\.jsonl does not exist"):
        create_validation_loader(
            small(here, tmp_path, validation_dataset="./nowhere.jsonl"),
            DistributedContext.single(),
            tokenizer=austen,
            key="--data",
        )
    empty = str(write(tmp_path / "none.jsonl", ""))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        create_validation_loader(
            small(here, tmp_path, validation_dataset=empty), DistributedContext.single(), tokenizer=austen, key="--data"
        )
    with pytest.raises(DataError, match=r"^train_dataset gives 1 training sequence of"):
        create_dataloaders(small(here, tmp_path), train_dataset=[(np.array([1, 2]), np.array([2, 3]))])


def test_a_split_can_be_validated_on_by_name(tmp_path, caplog):
    caplog.set_level("INFO")
    for number, name in enumerate(("train", "val", "test"), start=1):
        words = "".join(json.dumps({"text": f"{name} {number} " * 40}) + "\n" for _ in range(2))
        write(tmp_path / "texts" / f"{name}.jsonl", words)
    here, elsewhere = tmp_path / "texts", write(tmp_path / "x.jsonl", jsonl())

    def begins(**data) -> str:
        config = small(here, tmp_path, **data)
        tokenizer = load_tokenizer("austen")
        found = rows.build_validation_dataset(config.data, tokenizer)
        assert found is not None
        return tokenizer.decode(found.dataset[0].input_ids[0].tolist()).split()[0]

    assert begins() == "val"
    assert "skipped (test split): test.jsonl" in caplog.text
    caplog.clear()
    assert begins(validation_split="test") == "test"
    assert begins(validation_split="train") == "train"
    assert "read 3 files from" in caplog.text
    assert begins(dataset=str(elsewhere), validation_dataset=str(here), validation_split="test") == "test"
    with pytest.raises(DataError, match=r"data\.validation_split: .*texts has no split 'dev'; choose from .*test"):
        begins(validation_split="dev")
    with pytest.raises(DataError, match=r"x\.jsonl has no split 'test'; choose from train"):
        begins(dataset=str(elsewhere), validation_split="test")


def test_the_log_says_which_file_became_validation(tmp_path, caplog):
    caplog.set_level("INFO")
    texts = write(tmp_path / "texts" / "train.jsonl", jsonl())
    create_dataloaders(small(texts, tmp_path))
    assert re.search(
        r"data .*: training on 11 documents \(\d+ tokens\); validating on 1 document \(\d+ tokens\), held out from these",
        caplog.text,
    )
    write(tmp_path / "texts" / "dev.jsonl", jsonl())
    create_dataloaders(small(texts.parent, tmp_path))
    assert f"tokens), from {tmp_path}/texts/dev.jsonl" in caplog.text


def test_a_source_is_opened_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(rows, "open_source", lambda *names, **keys: opened.append(names[0]) or open_source(*names, **keys))
    create_dataloaders(small(write(tmp_path / "x.jsonl", jsonl()), tmp_path))
    assert len(opened) == 1


def test_an_unreachable_hub_names_the_offline_choice(tmp_path, monkeypatch):
    from dist_trainer.huggingface import hub

    monkeypatch.setattr(hub, "_reachable", False)
    with pytest.raises(DataError, match=r"squad.*nor reachable on the Hub.*--data\.dataset austen"):
        create_dataloaders(small("squad", tmp_path))
    with pytest.raises(DataError, match=r"gpt2.*nor reachable on the Hub.*--data\.tokenizer austen"):
        load_tokenizer("gpt2")


def test_a_hub_behind_a_dead_proxy_is_unreachable_at_once(monkeypatch):
    from dist_trainer.huggingface import hub

    for name in ("HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"127.0.0.1:{proxy.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://{address}")
        assert hub._answers("https://hub.invalid")
    assert not hub._answers("https://hub.invalid")
    monkeypatch.setenv("HTTPS_PROXY", address)
    assert not hub._answers("https://hub.invalid")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    path = write(tmp_path / "x.jsonl", jsonl())
    blocked = write(tmp_path / "file", "")
    with pytest.raises(DataError, match=r"data\.cache_dir: .*file cannot be used"):
        create_dataloaders(small(path, tmp_path, cache_dir=str(blocked)))


def test_tokenizers_from_folders(tmp_path):
    bundled = load_tokenizer("austen")
    assert vocabulary_size(bundled) == 4096
    bundled.save_pretrained(tmp_path / "run" / "checkpoints" / "step-00000007")
    assert load_tokenizer(str(tmp_path / "run")).get_vocab() == bundled.get_vocab()
    write(tmp_path / "bare" / "tokenizer.json", bundled.backend_tokenizer.to_str())
    assert load_tokenizer(str(tmp_path / "bare")).eos_token == "<|endoftext|>"
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match="has no tokenizer in it"):
        load_tokenizer(str(tmp_path))


def test_text_is_tokenised_once_per_content_and_again_when_it_changes(tmp_path, monkeypatch):
    builds = []
    real = token_store_module._build
    monkeypatch.setattr(token_store_module, "_build", lambda *a: (builds.append(1), real(*a)))
    path = write(tmp_path / "x.jsonl", jsonl())
    config = small(path, tmp_path)
    first = create_dataloaders(config).train.dataset.fingerprint
    assert create_dataloaders(config).train.dataset.fingerprint == first
    copy = write(tmp_path / "elsewhere" / "y.jsonl", jsonl())
    assert create_dataloaders(small(copy, tmp_path)).train.dataset.fingerprint == first
    assert len(builds) == 1
    write(path, jsonl(reversed(STORIES)))
    assert create_dataloaders(config).train.dataset.fingerprint != first
    assert len(builds) == 2
    for damaged in (tmp_path / "cache" / "tokens").glob("*/tokens.bin"):
        damaged.write_bytes(damaged.read_bytes()[:-2])
    create_dataloaders(config)
    assert len(builds) == 3


def test_the_same_bytes_read_in_another_way_are_other_documents(tmp_path):
    packed = gzip.compress(jsonl().encode())
    fingerprints = {}
    for name in ("data.gz", "data.jsonl.gz", "data.txt.gz", "data.ndjson.gz", "data.JSONL.GZ"):
        config = small(write(tmp_path / name, packed), tmp_path)
        fingerprints[name] = create_dataloaders(config).train.dataset.fingerprint
    assert fingerprints["data.gz"] == fingerprints["data.txt.gz"]
    assert fingerprints["data.jsonl.gz"] == fingerprints["data.ndjson.gz"] == fingerprints["data.JSONL.GZ"]
    assert fingerprints["data.gz"] != fingerprints["data.jsonl.gz"]
    table = "text\ttext2\n" + "".join(f"{story}\t,\n" for story in STORIES)
    write(tmp_path / "a.csv", table)
    write(tmp_path / "a.tsv", table)
    reading = {name: open_source(str(tmp_path / name), DataConfig()).train.digest(tmp_path) for name in ("a.csv", "a.tsv")}
    assert reading["a.csv"] != reading["a.tsv"]


BROKEN = [
    ('{"text": "a"', "x.jsonl:13: not a JSON object"),
    ('{"body": "a"}', "x.jsonl:14: there is no column 'text'"),
    ("[1]", "x.jsonl:15: a JSON list, not an object"),
    ('{"text": "\\ud83d"}', "x.jsonl:16: half of a character"),
]


def test_bad_records_are_skipped_up_to_a_limit_and_each_is_named(tmp_path, caplog):
    whole = write(tmp_path / "whole.jsonl", jsonl())
    path = write(tmp_path / "x.jsonl", jsonl() + "".join(line + "\n" for line, _ in BROKEN))
    with pytest.raises(DataError, match=r"x\.jsonl:13: not a JSON object"):
        create_dataloaders(small(path, tmp_path))
    with pytest.raises(DataError, match=r"x\.jsonl:16: half of a character.*data\.bad_records allows 3 such records"):
        create_dataloaders(small(path, tmp_path, bad_records=3))
    caplog.clear()
    rows = create_dataloaders(small(path, tmp_path, bad_records=4)).train.dataset
    expected = create_dataloaders(small(whole, tmp_path)).train.dataset
    assert torch.equal(rows[0].input_ids, expected[0].input_ids)
    assert len(rows) == len(expected)
    skipped = [message for message in caplog.messages if "skipped" in message]
    assert len(skipped) == 4
    for (_, message), line in zip(BROKEN, skipped, strict=True):
        assert message in line
        assert "at most 4 records (data.bad_records)" in line
    caplog.clear()
    create_dataloaders(small(path, tmp_path, bad_records=4))
    assert [f"{path}: 4 records skipped when it was tokenised (data.bad_records)"] == caplog.messages
    headless = write(tmp_path / "headless.csv", b"te\xffxt,n\ntext,n\n" + b"a,1\n" * 40)
    with pytest.raises(DataError, match=r"headless\.csv:1: not UTF-8"):  # nor does the next line name the columns instead
        create_dataloaders(small(headless, tmp_path, bad_records=2))
    table = write(tmp_path / "x.csv", 'text,n\nbefore,1\nb,2,3\n"c"d,1\n' + "".join(f"{story},0\n" for story in STORIES))
    caplog.clear()
    create_dataloaders(small(table, tmp_path, bad_records=2))
    assert [message.split(": ")[0] for message in caplog.messages if "skipped" in message] == [f"{table}:3", f"{table}:4"]


@pytest.mark.parametrize(
    "text", ["one two, three.\n\n  Four\r\nfive" * 40, "x" * 900, "\n\n" * 500], ids=["prose", "x", "lines"]
)
def test_a_long_document_is_tokenised_in_pieces_and_stays_one(tmp_path, monkeypatch, text):
    config = small(write(tmp_path / "x.txt", f"{text} end"), tmp_path, validation_fraction=0.0, sequence_length=4)
    [whole, *more] = text_pieces_module.pieces_of(f"{text} end")
    assert more == []
    monkeypatch.setattr(text_pieces_module, "PIECE_CHARACTERS", 64)
    store = create_dataloaders(config).train.dataset.stream
    tokenizer = load_tokenizer("austen")
    [tokens] = store.gather(np.array([0]), len(store))
    assert tokenizer.decode(tokens[:-1]) == whole.text
    assert tokens.tolist().index(tokenizer.eos_token_id) == len(tokens) - 1
    if "two" in text:
        assert tokens[:-1].tolist() == tokenizer(whole.text)["input_ids"]


def llama_like_tokenizer(folder):
    """As Llama 2 has it: a normalizer puts a ▁ before every text, and ▁ for every space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # tokens do not reach over words
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator([" ".join(STORIES)] * 3, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return folder


def test_pieces_of_a_long_document_do_not_show_where_the_tokenizer_puts_a_space_before_each(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(llama_like_tokenizer(tmp_path / "tokenizer")))
    assert text_pieces_module.detect_border(tokenizer) == "dropped"
    assert text_pieces_module.detect_border(load_tokenizer("austen")) == "with the next"
    document = " ".join(STORIES * 5)
    monkeypatch.setattr(text_pieces_module, "PIECE_CHARACTERS", 64)
    pieces = list(text_pieces_module.pieces_of(document, "dropped"))
    assert len(pieces) > 3
    ids = [i for piece in pieces for i in tokenizer(piece.text, add_special_tokens=False)["input_ids"]]
    assert ids == tokenizer(document, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_that_truncates_and_pads_stays_the_same_one_when_it_is_used(tmp_path):
    folder = llama_like_tokenizer(tmp_path / "tokenizer")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    before = tokenizer_digest(tokenizer)
    assert len(tokenizer("word " * 99, add_special_tokens=False)["input_ids"]) > 16
    assert tokenizer_digest(tokenizer) == before


def test_a_table_is_recognised_by_its_content(tmp_path):
    """Not by the library's fingerprint, which stays as it is where only a function that made it has changed."""
    digests = []
    for word in ("cherry", "banana"):
        table = datasets.Dataset.from_dict({"text": [f"{word} {story}" for story in STORIES], "other": range(len(STORIES))})
        shutil.rmtree(tmp_path / "table", ignore_errors=True)
        table.save_to_disk(str(tmp_path / "table"))
        state = json.loads((tmp_path / "table" / "state.json").read_text())
        write(tmp_path / "table" / "state.json", json.dumps({**state, "_fingerprint": "0123456789abcdef"}))
        digests.append(create_dataloaders(small(tmp_path / "table", tmp_path)).train.dataset.fingerprint)
    assert digests[0] != digests[1]


def test_files_that_tell_of_the_data_are_not_data(tmp_path):
    write(tmp_path / "d" / "data" / "train.jsonl", jsonl())
    write(tmp_path / "d" / "dataset_infos.json", '{"default": {}}')
    write(tmp_path / "d" / "LICENSE.txt", "Permission is granted")
    write(tmp_path / "d" / "requirements.txt", "torch")
    config = small(tmp_path / "d", tmp_path)
    assert len(open_source(config.data.dataset, config.data).train.files) == 1


def _load(config: TrainingConfig, built) -> None:
    real = token_store_module._build

    def counted(*arguments):
        with built.get_lock():
            built.value += 1
        real(*arguments)

    token_store_module._build = counted
    create_dataloaders(config)


def test_processes_that_start_together_tokenise_once(tmp_path):
    config = small(write(tmp_path / "x.jsonl", jsonl()), tmp_path)
    context = multiprocessing.get_context("fork")
    built = context.Value("i", 0)
    processes = [context.Process(target=_load, args=(config, built)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert built.value == 1


def test_the_loaders_carry_the_text_and_all_of_it(tmp_path):
    config = small(write(tmp_path / "x.jsonl", jsonl()), tmp_path, validation_fraction=0.0)
    loaders = create_dataloaders(config)
    assert loaders.validation is None
    tokenizer = load_tokenizer("austen")
    expected = [i for story in STORIES for i in [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]]
    rows = loaders.train.dataset
    assert [int(rows[0].input_ids[0, 0])] + [
        t for index in range(len(rows)) for t in rows[index].targets[0].tolist() if t >= 0
    ] == expected


@pytest.mark.parametrize("packing", [True, False])
def test_worker_processes_change_nothing(tmp_path, packing):
    config = small(write(tmp_path / "x.jsonl", jsonl()), tmp_path, packing=packing)
    here, there = (
        iter(create_dataloaders(replace(config, data=replace(config.data, num_workers=workers))).train) for workers in (0, 2)
    )
    for _ in range(5):
        ours, theirs = next(here), next(there)
        assert ours.input_ids.equal(theirs.input_ids)
        assert ours.targets.equal(theirs.targets)


def test_validating_alone_does_not_read_the_text_to_train_on(tmp_path):
    write(tmp_path / "both" / "train.jsonl", "no JSON")
    write(tmp_path / "both" / "validation.jsonl", jsonl())
    loader = create_validation_loader(
        small(tmp_path / "both", tmp_path), DistributedContext.single(), tokenizer=load_tokenizer("austen")
    )
    assert sum(batch.num_targets() for batch in loader) == len(loader.dataset.stream) - 1


def test_data_sets_of_ones_own_are_paired_into_batches():
    pairs = [(np.full(3, number, dtype=np.float32), number) for number in range(8)]
    loaders = create_dataloaders(TrainingConfig(batch=BatchConfig(4, 2)), train_dataset=pairs, validation_dataset=pairs)
    batch = next(iter(loaders.validation))
    assert batch.targets.tolist() == [0, 1]
    assert batch.input_ids.shape == (2, 3)


def test_a_data_set_to_validate_on_gives_its_validation_split_or_all_of_itself(tmp_path):
    words = {"train": "one " * 400, "validation": "two " * 200}
    both, alone = tmp_path / "both", tmp_path / "alone.jsonl"
    both.mkdir()
    for name, text in words.items():
        (both / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    alone.write_text(json.dumps({"text": words["train"]}) + "\n")
    tokenizer = load_tokenizer("austen")
    for dataset, word in ((both, "two"), (alone, "one")):
        config = TrainingConfig(
            data=DataConfig(
                dataset=str(alone), validation_dataset=str(dataset), sequence_length=8, cache_dir=str(tmp_path / "cache")
            )
        )
        _, validation = create_dataloaders(config, tokenizer=tokenizer)
        assert tokenizer.decode(next(iter(validation)).input_ids[0]).split()[:2] == [word, word]


def test_document_mask_does_not_apply_to_data_sets_of_ones_own():
    config = TrainingConfig(data=DataConfig(document_mask=True), batch=BatchConfig(2, 2))
    with pytest.raises(ConfigError, match=r"data\.document_mask.*train_dataset"):
        create_dataloaders(config, train_dataset=[(np.zeros(3), 0)] * 4)
