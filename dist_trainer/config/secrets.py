"""Masks keys, tokens and passwords in everything that a run writes or prints."""

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
"""Shorter values are unlikely to be secrets, and occur in too many words."""
_ANYWHERE = r"[a-z0-9_-]*(?:api_?key|token|secret|passw(?:or)?d|passphrase|credentials?)"
"""Unambiguous words, even as part of longer ones: PGPASSWORD."""
_AS_A_WORD = r"(?:[a-z0-9]+[_-])*(?:key|pass|pat)|(?:[a-z0-9]+[_-])+pwd"
"""Words that also end other words (monkey, compass), and PWD, which by itself is the working folder."""
_SECRET_NAME = re.compile(rf"(?:{_ANYWHERE}|{_AS_A_WORD})(?:[_-](?:id|value|base))?", re.IGNORECASE)
_USER_IN_URL = re.compile(r"([a-z][a-z0-9+.-]*://)[^/\s'\"]+@", re.IGNORECASE)
_QUERY = re.compile(r"([?&;]([\w.-]+)=)[^&;#\s'\"]+")
"""A parameter in a URL: ?name=value."""
_SIGNATURES = frozenset({"sig", "signature", "x-amz-signature", "x-goog-signature"})
"""Parameters that give access to anyone who has the URL."""
_KNOWN_FORM = re.compile(
    r"\b(?:hf_\w{16,}|api_org_\w{16,}|wandb_v\d_\w{16,}|gh[oprsu]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}\b|AIza[\w-]{35})"
)
"""Hugging Face, W&B, GitHub, GitLab, OpenAI and Anthropic, Slack, AWS, Google."""


def masked(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with these masked: values of environment variables with secret-sounding names, users and passwords in URLs, URL
    parameters with secret-sounding names, and tokens in well-known formats.
    """
    secrets = {value for name, value in environment.items() if len(value) >= _SHORTEST and _sounds_secret(name)}
    for value in sorted(secrets, key=len, reverse=True):  # one may be the start of another
        for form in (value, json.dumps(value)[1:-1], repr(value)[1:-1]):
            text = text.replace(form, MASK)
    text = _USER_IN_URL.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(lambda match: f"{match[1]}{MASK}" if _sounds_secret(match[2]) else match[0], text)
    return _KNOWN_FORM.sub(MASK, text)


def masked_within(value: Any, environment: Mapping[str, str] = os.environ) -> Any:
    """`value` with every string in it masked: dictionary values and list elements. For output whose format (HTML, YAML, a
    table) would change how a secret looks.
    """
    if isinstance(value, str):
        return masked(value, environment)
    if isinstance(value, Mapping):
        return {key: masked_within(inner, environment) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [masked_within(inner, environment) for inner in value]
    return value


class MaskedStream:
    """A text stream that masks whatever is written to it, even by other libraries. Errors are ignored: the stream may be
    closed, or its disk full.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text` with its secrets masked; returns the number of its characters."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(masked(text))
        return len(text)

    def flush(self) -> None:
        """Flush the underlying stream."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def masked_command(words: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """The words of a command line, with secret values masked."""
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
    """Whether a variable, option or URL parameter of this name holds a secret. Cached, as each logged line asks for each
    variable.
    """
    return _SECRET_NAME.fullmatch(name) is not None or name.lower() in _SIGNATURES
