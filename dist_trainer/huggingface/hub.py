"""The Hugging Face Hub: whether it is reachable, which names it has, and downloads of models."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dist_trainer.errors import ConfigError, first_line

PROBE_SECONDS = 2.5
DESCRIPTION_PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja"]
"""The files that describe a model and its tokenizer, a few megabytes at most."""
WEIGHTS_PATTERNS = ["*.safetensors"]
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_reachable: bool | None = None


def is_hub_reachable() -> bool:
    """Whether the Hub answers within a few seconds; checked once. If it does not, Hugging Face's libraries are set to offline
    mode, as each of their calls would retry for half a minute.
    """
    global _reachable
    if _reachable is None:
        from huggingface_hub import constants

        _reachable = not constants.HF_HUB_OFFLINE and _answers(constants.ENDPOINT)
        if not _reachable:
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
    return _reachable


def _answers(endpoint: str) -> bool:
    """Whether `endpoint`, or the proxy for it, which then resolves names, accepts a connection."""
    url = urlsplit(endpoint)
    proxies = {} if proxy_bypass(url.hostname or "") else getproxies()
    if proxy := proxies.get(url.scheme) or proxies.get("all"):
        url = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (url.hostname or "", url.port or (443 if url.scheme == "https" else 80))
    try:
        with socket.create_connection(address, timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False


def is_hub_name(name: str) -> bool:
    """Whether `name`, which is not a local path, may be one on the Hub: `owner/model`, or `model` for the oldest ones."""
    return _NAME.fullmatch(name) is not None and not name.startswith((".", "~"))


def is_in_hub_cache(folder: Path) -> bool:
    """Whether `folder` is a model in the cache of the Hub's library, whose files are links out of it, unlike those of our
    checkpoints, and were verified when downloaded.
    """
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def download_model(name: str, *, weights: bool, key: str) -> Path:
    """The folder of the Hub model `name` in the local cache, downloaded if the Hub is reachable.

    Without `weights`, only the files that describe it. Never downloads code or pickles. Raises ConfigError that names `key`,
    which gave the name, and the remedy.
    """
    reachable = is_hub_reachable()
    import huggingface_hub

    patterns = [*DESCRIPTION_PATTERNS, *(WEIGHTS_PATTERNS if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=not reachable))
    except Exception as error:  # the library raises many kinds; each ends in one message
        remedy = f"on a machine with network access, run `hf download {name}` with the same HF_HOME, or give a folder"
        raise ConfigError(f"{key}: {not_loaded_message(name, first_line(error), remedy=remedy)}") from error


def not_loaded_message(name: str, reason: str, *, remedy: str) -> str:
    """Why `name` could not be loaded: the library's `reason`, or that the Hub is unreachable, and the `remedy` for that."""
    if not is_hub_reachable():
        return f"{name!r} is not a local path, and it is neither on disk in the Hub cache nor reachable on the Hub; {remedy}"
    return f"{name!r} is not a local path, and cannot be loaded from the Hub: {reason}"
