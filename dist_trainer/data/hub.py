"""Datasets of the Hugging Face Hub, and folders in the formats of the `datasets` library."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dist_trainer.config.schema import DataConfig
from dist_trainer.data.records import Record
from dist_trainer.data.split import Split
from dist_trainer.data.templates import missing_column, optional_columns, required_columns
from dist_trainer.errors import DataError, first_line
from dist_trainer.huggingface.hub import is_hub_reachable, not_loaded_message

log = logging.getLogger(__name__)

BATCH_ROWS = 1000


def hub_splits(name: str, config: DataConfig) -> dict[str, Split]:
    """The splits of the Hub dataset `name`, from the local cache if the Hub is unreachable."""
    reachable = is_hub_reachable()
    import datasets

    datasets.config.HF_HUB_OFFLINE = not reachable
    try:
        loaded = _load_inside("hf://datasets", name, config)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; each ends in one message
        remedy = "give a path to text, JSONL, Parquet or a save_to_disk folder, or the built-in corpus (--data.dataset austen)"
        raise DataError(not_loaded_message(name, _reason(error), remedy=remedy)) from error
    return _splits(name, loaded, config)


def is_arrow_folder(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote it."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def arrow_folder_splits(folder: Path, config: DataConfig) -> dict[str, Split]:
    """The splits of a save_to_disk folder, or of a folder whose README.md declares them as Hub datasets do."""
    import datasets

    try:
        if is_arrow_folder(folder):
            loaded = datasets.load_from_disk(str(folder))
            tables = loaded.values() if isinstance(loaded, dict) else [loaded]
            _check_inside(os.path.abspath(folder), (file["filename"] for table in tables for file in table.cache_files))
        else:
            loaded = _load_inside(str(folder.resolve()), str(folder.resolve()), config)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; each ends in one message
        raise DataError(f"{folder} cannot be loaded: {_reason(error)}") from error
    return _splits(str(folder), loaded, config)


def _load_inside(root: str, name: str, config: DataConfig) -> Any:
    """`datasets.load_dataset`, restricted to files under `root`. Raises DataError."""
    import datasets

    builder = datasets.load_dataset_builder(name, config.dataset_config)
    _check_inside(root, (str(file) for files in (builder.config.data_files or {}).values() for file in files))
    builder.download_and_prepare()
    return builder.as_dataset()


def _check_inside(root: str, files: Iterable[str]) -> None:
    """Raises DataError if the dataset's description, which is untrusted, names files outside `root`."""
    for file in files:
        path = file if "://" in file else os.path.abspath(file)
        if not path.startswith(f"{root}/"):
            raise DataError(f"{root} names {file}, a file outside it, which is not read; put the file there")


def _splits(name: str, loaded: Any, config: DataConfig) -> dict[str, Split]:
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {split: _split(f"{name} ({split})", table, config) for split, table in tables.items()}


def _split(where: str, table: Any, config: DataConfig) -> Split:
    required = required_columns(config)
    columns = [*required, *(column for column in optional_columns(config) if column in table.column_names)]

    def records() -> Iterator[tuple[str, Record]]:
        for column in required:
            if column not in table.column_names:
                raise missing_column(column, table.column_names, where)
        row = 0
        for batch in table.select_columns(columns).iter(batch_size=BATCH_ROWS):
            for values in zip(*(batch[column] for column in columns), strict=True):
                row += 1
                yield f"{where} row {row}", dict(zip(columns, values, strict=True))

    # The library's fingerprint is no substitute: it does not change with the function that made the table.
    files = [Path(file["filename"]) for file in table.cache_files]
    return Split(
        where,
        records,
        files,
        content_digest=lambda: digest_records(record for _, record in records()),
        content_name=json.dumps([where, columns]),
        column_names=lambda: table.column_names,
    )


def digest_records(records: Iterable[Record]) -> str:
    """Digest of the records' representations, in order."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(repr(sorted(record.items())).encode())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    text = str(error)
    if text.startswith("Config name is missing"):
        names = re.search(r"\[(.*?)\]", text)
        choices = f": {names[1]}" if names else ""
        return f"it has several configurations; choose one with --data.dataset_config{choices}"
    return first_line(error)
