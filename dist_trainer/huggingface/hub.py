"""The Hugging Face Hub: whether it answers, and the files of a model there."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dist_trainer.errors import ConfigError

PROBE_SECONDS = 2.5
DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja"]
"""What describes a model and its tokenizer: some megabytes at most."""
WEIGHTS = ["*.safetensors"]
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_reachable: bool | None = None


def hub_is_reachable() -> bool:
    """Whether the Hub answers within a few seconds; asked once. Where it does not, Hugging Face's libraries are told to
    stay offline, or each of their calls would retry for half a minute.
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
    """Whether `endpoint` takes a connection, or the proxy that the way there leads over, which then looks names up for us."""
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
    """Whether `name`, which is no folder here, can be one on the Hub: `owner/model`, or `model` for the oldest ones."""
    return _NAME.fullmatch(name) is not None and not name.startswith((".", "~"))


def is_in_hub_cache(folder: Path) -> bool:
    """Whether `folder` is a model as the Hub's library keeps it: its files are links to others outside, as in no checkpoint
    that is written here, and were checked on their way.
    """
    snapshots = folder.absolute().parent
    return snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")


def model_from_hub(name: str, *, weights: bool, key: str) -> Path:
    """The folder of the Hub model `name` in the local cache, brought there where the Hub can be reached.

    Without `weights` only what describes it. Never code, and no pickles. Raises ConfigError naming `key`, where the name was
    given, and what helps.
    """
    reachable = hub_is_reachable()
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            name, allow_patterns=[*DESCRIPTION, *(WEIGHTS if weights else [])], local_files_only=not reachable
        )
    except Exception as error:  # the library raises many kinds; each ends in one message
        if not reachable:
            raise ConfigError(
                f"{key}: {name!r} is no local folder, the Hub cannot be reached, and the model is not in the local "
                f"cache. On a machine that reaches it, run `hf download {name}` with the same HF_HOME, or give a folder"
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key}: {name!r} is no local folder, and cannot be loaded from the Hub: {first_line}") from error
    return Path(found)
