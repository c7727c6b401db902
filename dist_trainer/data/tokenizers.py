"""Tokenizers by name or path, what identifies them, and texts that reveal differences between two of them."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections.abc import Sequence
from typing import Any

from dist_trainer.config.paths import user_path
from dist_trainer.config.schema import DataConfig
from dist_trainer.data.datasets import CORPUS
from dist_trainer.errors import DataError
from dist_trainer.huggingface.hub import is_hub_name
from dist_trainer.huggingface.model_files import TOKENIZER_FILE, find_tokenizer
from dist_trainer.huggingface.tokenizer_files import tokenizer_from_folder, tokenizer_from_hub

log = logging.getLogger(__name__)

Tokenizer = Any
"""A transformers.PreTrainedTokenizerBase; importing transformers only for the type would be slow."""

TOKENIZER_KEY = "data.tokenizer"
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "[EOS]")
PROBE = (
    ("It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife."),
    (
        "I'm, you're, he's, we'll, they'd, I've, can't; I'M, YOU'RE, HE'S, WE'LL; the dogs' \u2018it\u2019s\u2019 "
        "'tis o'clock ' s 'sx''d"
    ),
    (
        "0 1 22 333 4444 55555 1234567890 3.14159 1,000,000 1e-5 0x7f 12th v2.0.1 \u0661\u0662\u0663 \u216b "
        "\u00b2\u00b3 \u00bd \u2460 x1y22z333"
    ),
    " a  b   c    d\te\t\tf \t g\n\nh\n \n i\r\nj\r\rk \n\n\n  l\n\n\n",
    (
        "\x0b\x0c \x1c\x1d\x1e\x1f\x85 \u00a0\u00a0 \u1680 \u2003\u2009 \u2028 \u2029 \u202f \u205f \u3000 \ufeff "
        "\u200b\u200c\u200d \u180e end  "
    ),
    "\x00\x01\x02 \x07\x08 \x1b[31m\x7f \x80\x9f \u00ad \ufffd \ufffe \uffff \ue000 \U000f0000 \U0010ffff \u0378",
    (
        "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m A\u030angstr\u00f6m \u00df \u1e9e \u01c5 \ufb01 "
        "\u0130\u0131 \u212a \u2126 \u017f"
    ),
    (
        "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u0420\u0443\u0441\u0441\u043a\u0438\u0439 "
        "\u05e2\u05d1\u05e8\u05d9\u05ea \u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c "
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u10e5\u10d0\u10e0\u10d7"
    ),
    (
        "\u4e2d\u6587\uff0c\u6c49\u5b57\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\ud55c\uad6d"
        "\uc5b4 \u1112\u1161\u11ab \uff21\uff22\uff23 \uff11\uff12 \uff76\uff9e \U00020000\U0002a6d6"
    ),
    (
        "\U0001f600\U0001f680 \U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea "
        "\u2764\ufe0f \U0001f44d\U0001f3fd #\ufe0f\u20e3 \u2603\u2192\u221e \u20ac\u00a3 \u00ab\u2026\u00bb "
        "\u201ca\u201d \u2014 \u2013"
    ),
    (
        "def f(x):\n    return {'a': [x**2, ~x], \"b\": None}  # ok?\n\tif x!=0 and y>=1: pass;;\n<div "
        'class="a-b_c">&amp;</div>\n'
    ),
    ("https://example.org/a%20b?c=d&e=f#g user@example.org C:\\temp\\new ________ ------ ====== ...... !!!??? $$$ @@@ ###"),
    (
        "\u2581\u2581a \u2581b c\u2581d \u0120\u0120a \u0120b \u010a <0x41> <0x0A> <s> </s> <unk> <pad> [CLS] [SEP] "
        "<|im_start|> <|endoftext|"
    ),
    "Aa" * 300 + " " * 300 + "\n" * 150 + "9" * 300 + "!" * 300 + "\u00e9" * 150 + "\U0001f600" * 80,
    ("antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis camelCaseWord snake_case_word UPPERlower"),
    "",
    " ",
    "\n",
    "x",
)
"""Texts that reveal differences between tokenizers."""
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ",
    "0123456789",
    " \t\n\r",
    "'\u2019.,;:!?-_()[]{}<>|/\\@#$%^&*+=~`\"",
    "".join(map(chr, range(0xA0, 0x250))),
    "".join(map(chr, range(0x300, 0x3F0))),
    "".join(map(chr, range(0x2000, 0x2070))),
    "".join(map(chr, range(0x3000, 0x3100))),
    "".join(map(chr, range(0x1F300, 0x1F400))),
)


def load_tokenizer(name: str, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """The tokenizer `austen` (included in the package), of a folder (a run's, a checkpoint's or any other), or of a Hub name.

    If it has no EOS token (or padding token), one is set; its separator may serve as EOS. Raises DataError with the remedy,
    naming the `key` (or command-line option) that gave the name.
    """
    path = CORPUS / "tokenizer" if name == "austen" else user_path(name)
    if path.is_file() and path.name == TOKENIZER_FILE:
        path = path.parent
    if not path.exists() and is_hub_name(name):
        tokenizer = tokenizer_from_hub(name, key)
    elif (folder := find_tokenizer(path)) is not None:
        tokenizer = tokenizer_from_folder(folder, key)
    else:
        state = "has no tokenizer in it" if path.exists() else "does not exist"
        others = ", a Hub name, or austen" if key == TOKENIZER_KEY else ""  # other keys take folders of models
        raise DataError(f"{key}: {path} {state}; give a folder with {TOKENIZER_FILE}{others}")
    return _with_eos_and_padding(tokenizer, name)


def configured_tokenizer(config: DataConfig, *, key: str = TOKENIZER_KEY) -> Tokenizer:
    """The tokenizer data.tokenizer, with the template data.chat_template (if set), so that both are saved together.

    Raises DataError, which names `key` for the tokenizer.
    """
    tokenizer = load_tokenizer(config.tokenizer, key=key)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return tokenizer


def read_chat_template(name: str) -> str:
    """The Jinja template in the file `name`. Raises DataError if there is none."""
    path = user_path(name)
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"data.chat_template: {path} cannot be read ({reason}); give a file that holds a Jinja template"
        ) from error
    if not template.strip():
        raise DataError(f"data.chat_template: {path} is empty; give a file that holds a Jinja template")
    return template


def _with_eos_and_padding(tokenizer: Tokenizer, name: str) -> Tokenizer:
    templates = getattr(tokenizer, "chat_template", None)
    # Checkpoints save each template in a file of that name.
    if isinstance(templates, dict) and not all(re.fullmatch(r"\w[\w.-]*", str(template)) for template in templates):
        names = sorted(map(str, templates))
        raise DataError(f"data.tokenizer: {name} has a chat template whose name is not a file name: {names}")
    if tokenizer.eos_token_id is None:
        known = tokenizer.get_added_vocab()
        eos = tokenizer.sep_token or next((token for token in EOS_NAMES if token in known), None)
        if eos is None:
            raise DataError(
                f"data.tokenizer: {name} has no end-of-text token to end documents with; "
                'set "eos_token" in its tokenizer_config.json'
            )
        log.info("data.tokenizer: %s names no EOS token; using %s", name, eos)
        tokenizer.eos_token = eos
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def tokenizer_description(tokenizer: Tokenizer) -> str:
    """JSON of everything that determines the ids of a text, except truncation and padding, which each call sets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return json.dumps({**json.loads(backend.to_str()), "truncation": None, "padding": None})
    return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])


def text_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that `tokenizer` puts before every text, such as BOS (Llama, Gemma, Mistral); empty if it puts none."""
    bare, complete = (tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True))
    starts = (start for start in range(len(complete) - len(bare) + 1) if complete[start : start + len(bare)] == bare)
    return complete[: next(starts, 0)]


def with_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """`prefix` followed by `ids`; only `ids` if they already begin with it."""
    return list(ids) if list(ids[: len(prefix)]) == list(prefix) else [*prefix, *ids]


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to continue, starting as texts did in training, with the tokenizer's prefix. For an empty text without a
    prefix: the EOS, which ended the previous text.
    """
    ids = with_prefix(tokenizer.encode(text, add_special_tokens=False), text_prefix(tokenizer))
    return ids or [tokenizer.eos_token_id]


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of `tokenizer_description`, the EOS, and the ids that begin texts, if any."""
    parts = [tokenizer_description(tokenizer), tokenizer.eos_token_id, *text_prefix(tokenizer)]
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """PROBE, random characters, a few thousand entries of the vocabulary, and the spellings of special tokens."""
    chance = random.Random(0)
    random_texts = ["".join(chance.choice(chance.choice(_ALPHABETS)) for _ in range(200)) for _ in range(50)]
    entries = chance.choices(sorted(tokenizer.get_vocab().values()), k=4000)
    from_vocabulary = [tokenizer.decode(entries[i : i + 200]) for i in range(0, len(entries), 200)]
    spellings = list(tokenizer.get_added_vocab())[:64]
    special = [f"{s}a{s} b {s}\n\n{s}{s} {s.upper()} {s[:-1]} \t{s}\u00e9{s}'s{s}" for s in spellings]
    return [*PROBE, *random_texts, *from_vocabulary, *special, *spellings, "".join(PROBE)]
