"""What runs were told to do and ran on: config beside its defaults, what differs between runs, versions and machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_trainer.config.loading import as_dict
from dist_trainer.config.schema import TrainingConfig
from dist_trainer.errors import counted
from dist_trainer.html_report.markup import folded, section, table
from dist_trainer.tracking.run_reader import RunHistory

NAMES_OF_RUNS = ("run_name", "output_dir")
"""Keys that always differ, and say nothing."""
COMPARED_FACTS = ("device", "world_size", "torch", "dist_trainer", "git_commit", "dist_trainer_git_commit", "hostname")


def differences(runs: Sequence[RunHistory], labels: Sequence[str]) -> str:
    """Keys that are not the same in all of several runs, side by side, and what else they ran on."""
    if len(runs) < 2:
        return ""
    configs = [dict(flat(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for config in configs for key in config) if key not in NAMES_OF_RUNS]
    rows = [[key, *(shown(config.get(key, "")) for config in configs)] for key in keys]
    rows += [[name, *(shown(run.environment.get(name, "")) for run in runs)] for name in COMPARED_FACTS]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return section("What differs", "<p>Nothing: these runs have the same config, and ran on the same.</p>")
    return section("What differs", table("Keys that differ between the runs", ["key", *labels], differing))


def config(run: RunHistory, title: str) -> str:
    """The config, what differs from the defaults first."""
    if not run.config:
        return ""
    defaults = dict(flat(as_dict(TrainingConfig())))
    rows = []
    for key, value in flat(run.config):
        same = key in defaults and defaults[key] == value
        rows.append((same, [key, shown(value), "" if same else shown(defaults.get(key, ""))]))
    changed, kept = [row for same, row in rows if not same], [row[:2] for same, row in rows if same]
    parts = [table("Keys that differ from the default", ["key", "value", "default"], changed)] if changed else []
    if kept:
        words = f"{counted(len(kept), 'key')} at the default"
        parts.append(folded(words, table("Keys with their default", ["key", "value"], kept)))
    return section(title, "".join(parts))


def environment(run: RunHistory, title: str) -> str:
    """Versions and machine of the latest start."""
    if not run.environment:
        return ""
    rows = [[name, shown(value)] for name, value in run.environment.items()]
    return section(title, folded("versions, machine, command", table("What it ran on", ["", ""], rows)))


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in nested.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def shown(value: Any) -> str:
    """As YAML has it."""
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool | None) else str(value)
