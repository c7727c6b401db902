"""`DATASETS`: the names that data.dataset accepts. A source has splits; a split has records and a digest of its content."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_trainer.config.paths import user_path
from dist_trainer.config.registry import build
from dist_trainer.config.schema import DataConfig
from dist_trainer.data.hub import arrow_folder_splits, hub_splits, is_arrow_folder
from dist_trainer.data.records import (
    ALL_SUFFIXES,
    DATA_SUFFIXES,
    OTHER_FORMATS,
    Records,
    column_names,
    format_suffix,
    read_file,
)
from dist_trainer.data.split import Split
from dist_trainer.data.templates import optional_columns, required_columns
from dist_trainer.data.text_file import COMPRESSIONS
from dist_trainer.errors import ConfigError, DataError, counted
from dist_trainer.huggingface.hub import is_hub_name

log = logging.getLogger(__name__)

CORPUS = Path(__file__).parent / "corpus"

TRAIN_WORDS = ("train", "training")
VALIDATION_WORDS = ("validation", "valid", "val", "dev", "eval")
TEST_WORDS = ("test", "testing")
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""What the `datasets` library writes next to the data."""
BESIDE_DATA = ("readme", "license", "licence", "notice", "citation", "changelog", "requirements")
"""Name prefixes of files that describe the data."""
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Source:
    """The splits of a dataset."""

    name: str
    train: Split
    validation: Split | None = None
    others: Mapping[str, Split] = field(default_factory=dict)
    """Other splits by name, such as test, which are read only if data.validation_split names them."""

    def held_out(self, name: str | None) -> Split | None:
        """The split `name` (data.validation_split); None: the validation split, if there is one. Raises DataError."""
        if name is None:
            return self.validation
        splits = (
            {"train": self.train} | ({} if self.validation is None else {"validation": self.validation}) | dict(self.others)
        )
        if name not in splits:
            raise DataError(f"data.validation_split: {self.name} has no split {name!r}; choose from {', '.join(splits)}")
        return splits[name]


def austen(config: DataConfig) -> Source:
    """Six novels by Jane Austen, included in the package; see corpus/LICENSE.txt."""
    train, validation = (files_split([CORPUS / f"austen_{name}.jsonl.gz"], config) for name in ("train", "validation"))
    return Source("austen", train, validation)


DATASETS: dict[str, Callable[[DataConfig], Source]] = {"austen": austen}


def open_source(name: str, config: DataConfig, *, key: str = "data.dataset") -> Source:
    """The source called `name`: an entry of DATASETS, "package.module:function", a local path, or a Hub dataset.

    Raises DataError that names the config key `key`, the path or dataset, and the remedy.
    """
    if name in DATASETS or (":" in name and not user_path(name).exists()):
        return build(DATASETS, name, key, config, kind=Source)
    try:
        return _path_or_hub_source(name, config, key)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def _path_or_hub_source(name: str, config: DataConfig, key: str) -> Source:
    path = user_path(name)
    if _is_path(name) or (path.exists() and config.dataset_config is None):
        if not path.exists():
            raise DataError(f"{name} does not exist; give a file, a folder, a Hub name, or austen")
        if not _is_path(name) and not path.suffix:
            log.warning("%s: %s is taken as the local path ./%s, not as a Hub dataset", key, name, name)
        return _local_source(path, config)
    return _from_splits(name, hub_splits(name, config))


def _is_path(name: str) -> bool:
    return not is_hub_name(name) or format_suffix(Path(name)) in DATA_SUFFIXES or name.endswith(COMPRESSIONS)


def _local_source(path: Path, config: DataConfig) -> Source:
    is_saved = is_arrow_folder(path)
    declares_configs = not is_saved and _declares_configs(path)
    if not declares_configs:
        _check_config_name(str(path), config)
    if path.is_file():
        return Source(str(path), files_split([path], config))
    if is_saved or declares_configs:
        return _from_splits(str(path), arrow_folder_splits(path, config))
    by_split, test_files = _files_by_split(path, reads_test=config.validation_split == "test")
    source = _from_splits(str(path), {name: files_split(files, config) for name, files in by_split.items()})
    return replace(source, others={**source.others, "test": files_split(test_files, config)}) if test_files else source


def _check_config_name(name: str, config: DataConfig) -> None:
    """Raises ConfigError if data.dataset_config is set and none of the datasets in the config has configurations."""
    others = {config.dataset, config.validation_dataset or name} - {name}
    if config.dataset_config is not None and all(user_path(other).exists() for other in others):
        raise ConfigError(
            f"data.dataset_config: {config.dataset_config!r} is set, but {name} has no configurations to choose from; "
            "remove the key, or set it to null"
        )


def _from_splits(name: str, splits: dict[str, Split]) -> Source:
    validation = next((splits[word] for word in VALIDATION_WORDS if word in splits), None)
    train = next((splits[word] for word in TRAIN_WORDS if word in splits), None)
    if train is None and len(splits) == 1:
        train, validation = next(iter(splits.values())), None
    if train is None:
        raise DataError(f"{name} has no split named train, only {', '.join(splits) or 'nothing'}")
    return Source(name, train, validation, splits)


def files_split(files: Iterable[Path], config: DataConfig) -> Split:
    """The records of local files, in order of their paths."""
    paths = sorted(files)
    columns, optional = required_columns(config), optional_columns(config)

    def records() -> Records:
        for path in paths:
            yield from read_file(path, columns, optional)

    description = ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")
    return Split(description, records, files=paths, column_names=lambda: column_names(paths[0]))


def _files_by_split(folder: Path, *, reads_test: bool) -> tuple[dict[str, list[Path]], list[Path]]:
    """The data files under `folder` by split; separately, those of the test split if there are other splits.

    Logs how many files are read (including the test split if `reads_test`), and what is skipped.
    """
    all_files, unreadable = _files_under(folder)
    visible = [path for path in all_files if not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)]
    files = [
        path
        for path in visible
        if format_suffix(path) in DATA_SUFFIXES and path.name not in METADATA and not path.name.lower().startswith(BESIDE_DATA)
    ]
    if not files:
        seen = f"; it contains {', '.join(path.name for path in visible[:4])}" if visible else "; it is empty"
        raise DataError(f"{folder} has no file of type {ALL_SUFFIXES}{seen}")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_word(path.relative_to(folder)), []).append(path)
    test_files = by_split.pop("test") if "test" in by_split and len(by_split) > 1 else []
    ignored = sorted(set(visible) - set(files))
    num_hidden = len(all_files) - len(visible)
    skipped = {
        "not data": _format_names(ignored, folder),
        "test split": "" if reads_test else _format_names(test_files, folder),
        "hidden": counted(num_hidden, "file") if num_hidden else "",
        "no permission": _format_names(unreadable, folder),
    }
    is_suspicious = unreadable or any(format_suffix(path) in OTHER_FORMATS for path in ignored)
    log.log(
        logging.WARNING if is_suspicious else logging.INFO,
        "read %s from %s%s",
        counted(len(files) - (0 if reads_test else len(test_files)), "file"),
        folder,
        "".join(f"; skipped ({why}): {names}" for why, names in skipped.items() if names),
    )
    return by_split, test_files


def _files_under(folder: Path) -> tuple[list[Path], list[Path]]:
    """All files under `folder`, sorted, including those in linked folders; and the folders that cannot be listed.

    A folder that several paths lead to is read once, so cycles of links end. A broken link counts as an unreadable file.
    Raises DataError if `folder` itself cannot be listed.
    """
    files: list[Path] = []
    errors: list[OSError] = []
    seen: set[str] = set()
    waiting = [folder]  # linked folders are added at the end
    for top in waiting:
        for path, folders, names in os.walk(top, onerror=errors.append):
            real = os.path.realpath(path)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            waiting += sorted(link for name in folders if (link := Path(path, name)).is_symlink())
            files += [file for name in names if (file := Path(path, name)).is_file() or file.is_symlink()]
    unreadable = [Path(error.filename) for error in errors]
    if folder in unreadable:
        raise DataError(f"{folder}: cannot be read ({errors[0].strerror})") from errors[0]
    return sorted(files), unreadable


def _format_names(paths: list[Path], folder: Path) -> str:
    """The first names, and how many more there are."""
    more = f" and {counted(len(paths) - NAMES_SHOWN, 'file')} more" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(str(path.relative_to(folder)) for path in paths[:NAMES_SHOWN]) + more


def _split_word(path: Path) -> str:
    """train, validation or test, by words in the file's name, else in its folders' names; train if there are none."""
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for name, synonyms in (("validation", VALIDATION_WORDS), ("test", TEST_WORDS), ("train", TRAIN_WORDS)):
            if words & set(synonyms):
                return name
    return "train"


def _declares_configs(folder: Path) -> bool:
    """Whether README.md declares the files of each split, as datasets on the Hub do."""
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    head = readme.read_text(encoding="utf-8", errors="replace")
    return head.startswith("---") and re.search(r"^configs:", head.split("\n---", 1)[0], re.MULTILINE) is not None
