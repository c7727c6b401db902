"""Keeps keys, tokens and passwords out of what a run writes and says."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TextIO

MASK = "***"
_SHORTEST = 8
"""A shorter value is none that anyone would call secret, and stands in too many words."""
_ANYWHERE = r"[a-z0-9_-]*(?:api_?key|token|secret|passw(?:or)?d|passphrase|credentials?)"
"""Words that mean nothing else, also where they are glued to others: PGPASSWORD."""
_AS_A_WORD = r"(?:[a-z0-9]+[_-])*(?:key|pass|pat)|(?:[a-z0-9]+[_-])+pwd"
"""Words that end others too (monkey, compass), and PWD, which is the working folder."""
_SECRET_NAME = re.compile(rf"(?:{_ANYWHERE}|{_AS_A_WORD})(?:[_-](?:id|value|base))?", re.IGNORECASE)
_USER_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"([?&;]([\w.-]+)=)[^&;#\s'\"]+")
"""A parameter in an address: ?name=value."""
_SIGNATURES = frozenset({"sig", "signature", "x-amz-signature", "x-goog-signature"})
"""Names of parameters that give access to whoever has the address."""
_KNOWN_FORM = re.compile(
    r"\b(?:hf_\w{16,}|api_org_\w{16,}|wandb_v\d_\w{16,}|gh[oprsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}\b|AIza[\w-]{35})"
)
"""Hugging Face, W&B, GitHub, GitLab, OpenAI and Anthropic, Slack, AWS, Google."""


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` without the values of this process's variables whose names sound secret, without the user and password in
    addresses and the parameters whose names sound secret, and without what has the form of a well-known kind of token.
    """
    secrets = {value for name, value in environment.items() if len(value) >= _SHORTEST and _sounds_secret(name)}
    for value in sorted(secrets, key=len, reverse=True):  # one may begin with another
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1]):
            text = text.replace(form, MASK)
    text = _USER_IN_URL.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(lambda found: f"{found[1]}{MASK}" if _is_secret_parameter(found[2]) else found[0], text)
    return _KNOWN_FORM.sub(MASK, text)


def masked_within(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` with every text in it masked: of dictionaries the values, of lists the elements. For what is written in a form
    (HTML, YAML, a table) in which a secret would no longer look the same.
    """
    if isinstance(value, str):
        return masked(value, environment)
    if isinstance(value, Mapping):
        return {key: masked_within(inner, environment) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_within(inner, environment) for inner in value]
    return value


class MaskedStream:
    """A text stream that masks what is written to it, also by other libraries. Errors are ignored: nobody may read it any more,
    or its disk may be full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` without its secrets; the number of its characters."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(masked(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream underneath."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


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


def _is_secret_parameter(name: str) -> bool:
    return _sounds_secret(name) or name.lower() in _SIGNATURES


@lru_cache(maxsize=1024)
def _sounds_secret(name: str) -> bool:
    """Remembered, since every line that is logged asks it of every variable."""
    return _SECRET_NAME.fullmatch(name) is not None
