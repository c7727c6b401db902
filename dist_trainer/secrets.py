"""Keeps keys, tokens and passwords out of what a run writes and says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache

MASK = "***"
_SHORTEST = 8
"""A shorter value is none that anyone would call secret, and stands in too many words."""
_ANYWHERE = r"[a-z0-9_-]*(?:api_?key|token|secret|passw(?:or)?d|passphrase|credentials?)"
"""Words that mean nothing else, also where they are glued to others: PGPASSWORD."""
_AS_A_WORD = r"(?:[a-z0-9]+[_-])*(?:key|pass|pat)|(?:[a-z0-9]+[_-])+pwd"
"""Words that end others too (monkey, compass), and PWD, which is the working folder."""
_SECRET_NAME = re.compile(rf"(?:{_ANYWHERE}|{_AS_A_WORD})(?:[_-](?:id|value|base))?", re.IGNORECASE)
_USER_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_KNOWN_FORM = re.compile(r"\b(?:hf_\w{16,}|wandb_v\d_\w{16,}|gh[opsu]_\w{20,}|sk-[\w-]{20,})")


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of arguments and of this process's variables whose names sound secret, without the user and
    password in addresses, and without what has the form of a well-known kind of token.
    """
    for name, value in environment.items():
        if len(value) >= _SHORTEST and _sounds_secret(name):
            text = text.replace(value, MASK).replace(json.dumps(value)[1:-1], MASK)
    text = _USER_IN_URL.sub(rf"\1{MASK}@", text)
    return _KNOWN_FORM.sub(MASK, text)


def masked_command(words: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """A command line, word by word."""
    shown: list[str] = []
    follows_secret = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = word.startswith("-") and _sounds_secret(name.lstrip("-").rpartition(".")[2])
        if is_secret and equals:
            word = f"{name}={MASK}"
        elif follows_secret and not word.startswith("--"):
            word = MASK
        follows_secret = is_secret and not equals
        shown.append(masked(word, environment))
    return shown


@lru_cache(maxsize=1024)
def _sounds_secret(name: str) -> bool:
    """Remembered, since every line that is logged asks it of every variable."""
    return _SECRET_NAME.fullmatch(name) is not None
