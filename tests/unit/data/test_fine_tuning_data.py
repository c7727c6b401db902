"""Which tokens are trained on when only answers are, found by decoding exactly these tokens."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_trainer.config.schema import BatchConfig, DataConfig, TrainingConfig
from dist_trainer.data import store_building, text_pieces
from dist_trainer.data.batch import IGNORED_TARGET
from dist_trainer.data.build_datasets import SPLIT_KEY, build_datasets, record_formatter
from dist_trainer.data.chat import ChatTemplate
from dist_trainer.data.datasets import open_source
from dist_trainer.data.encoding import tokens_in_spans
from dist_trainer.data.loader import are_conversations, create_dataloaders, create_validation_loader
from dist_trainer.data.packing import BestFitPackedDataset, best_fit_decreasing, truncate_and_filter
from dist_trainer.data.records import column_names
from dist_trainer.data.sampler import FeistelPermutation
from dist_trainer.data.token_store import TokenStore, token_store
from dist_trainer.data.tokenizers import configured_tokenizer, load_tokenizer
from dist_trainer.distributed.context import DistributedContext
from dist_trainer.errors import ConfigError, DataError
from dist_trainer.run.configure import load_config
from tests.unit.data.dying import kill_a_build

ROOT = Path(__file__).resolve().parents[3]
PLAIN = str(ROOT / "configs" / "plain_chat.jinja")

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] + "
    "'\n\n' %}{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}{{ bos_token }}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate "
    "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MARKED_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
# As Qwen 3's: what was thought in earlier turns is dropped.
FORGETS = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +"
)
WITHOUT_GENERATION_PROMPT = CHATML.split("{% if add_generation_prompt")[0]

KINDS = {
    "ChatML": (CHATML, "<|im_end|>", "{}<|im_end|>"),
    "ChatML with marks": (MARKED_CHATML, "<|im_end|>", "{}<|im_end|>"),
    "Llama 3": (LLAMA_3, "<|eot_id|>", "{}<|eot_id|>"),
    "Mistral": (MISTRAL, "</s>", " {}</s>"),
    "Gemma": (GEMMA, "<end_of_turn>", "{}<end_of_turn>"),
}
SPECIAL = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    *("<s>", "</s>", "[INST]", "[/INST]"),
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Speak as Miss Austen would."}
CONVERSATIONS = [
    [user("Who is Emma?"), assistant("A young lady, handsome and clever.")],
    [
        user("And?"),
        assistant("She is rich."),
        user("Is that\n\nall?\n"),
        assistant("No:\n\n  she errs, caf\u00e9 \U0001f469\u200d\U0001f467."),
    ],
    [
        user("\u4e2d\u6587?"),
        assistant("\u597d\u3002"),
        user("1,234.5"),
        assistant("x" * 40),
        user("End?"),
        assistant("Yes!\n\nYes"),
    ],
]


def byte_level(template: str | None, end: str):
    """The bundled tokenizer with more special tokens."""
    tokenizer = load_tokenizer("austen")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = "<s>", end, template
    return tokenizer


def like_llama2(template: str | None, end: str):
    """A \u2581 before every text and behind every special token, bytes for what has no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    words = ["A young lady, handsome and clever. She is rich. No: she errs. Who is Emma? user assistant model system"] * 3
    special = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(words, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False))
    description = json.loads(tokenizer.to_str())
    description["added_tokens"], description["pre_tokenizer"] = description["added_tokens"][: len(SPECIAL) + 1], None
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), bos_token="<s>", eos_token=end, unk_token="<unk>"
    )
    made.pad_token, made.chat_template = end, template
    return made


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def chats(path: Path, conversations=CONVERSATIONS) -> Path:
    return write(path, [{"messages": messages} for messages in conversations])


def small(path: Path, tmp_path: Path, **data) -> DataConfig:
    defaults = {"dataset": str(path), "sequence_length": 256, "cache_dir": str(tmp_path / "cache"), "validation_fraction": 0.0}
    return DataConfig(**{**defaults, **data})


def stored(config: DataConfig, tokenizer) -> TokenStore:
    split = open_source(config.dataset, config).train
    return token_store(split, tokenizer, record_formatter(config, tokenizer), cache_dir=Path(config.cache_dir))


def learnt(store: TokenStore, tokenizer) -> list[list[str]]:
    """The runs of tokens that are trained on in each document, decoded."""
    found = []
    for start, end in zip(store.offsets, store.offsets[1:], strict=False):
        runs, inside = [], False
        for token, is_trained_on in zip(store.tokens[start:end].tolist(), store.loss_mask[start:end].tolist(), strict=True):
            if is_trained_on:
                runs = [*runs[:-1], [*runs[-1], token]] if inside else [*runs, [token]]
            inside = is_trained_on
        found.append([tokenizer.decode(run) for run in runs])
    return found


@pytest.mark.parametrize("make", [byte_level, like_llama2])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_answers_carry_loss_each_with_what_ends_its_turn(tmp_path, kind, make):
    template, end, format_value = KINDS[kind]
    tokenizer = make(template, end)
    conversations = CONVERSATIONS if kind == "Gemma" else [[SYSTEM, *CONVERSATIONS[0]], *CONVERSATIONS]
    config = small(chats(tmp_path / "x.jsonl", conversations), tmp_path, messages_column="messages")
    store = stored(config, tokenizer)
    expected = [[format_value.format(m["content"]) for m in c if m["role"] == "assistant"] for c in conversations]
    if make is like_llama2:  # it puts a space of its own behind each special token
        found = [[run.replace(" ", "") for run in runs] for runs in learnt(store, tokenizer)]
        assert found == [[run.replace(" ", "") for run in runs] for runs in expected]
    else:
        assert learnt(store, tokenizer) == expected


@pytest.mark.parametrize("make", [byte_level, like_llama2])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_complete_conversation(tmp_path, kind, make):
    template, end, _ = KINDS[kind]
    tokenizer = make(template, end)
    store = stored(small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages"), tokenizer)
    whole = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in CONVERSATIONS]
    assert store.tokens.tolist() == [token for ids in whole for token in ids]
    assert np.diff(store.offsets).tolist() == [len(ids) for ids in whole]


def test_marks_of_a_template_and_growing_prefixes_give_the_same_mask(tmp_path):
    masks = []
    for template in (CHATML, MARKED_CHATML):
        tokenizer = byte_level(template, "<|im_end|>")
        store = stored(small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages"), tokenizer)
        theirs = [
            tokenizer.apply_chat_template(m, chat_template=MARKED_CHATML, return_assistant_tokens_mask=True)["assistant_masks"]
            for m in CONVERSATIONS
        ]
        assert store.loss_mask.tolist() == [bool(is_trained_on) for mask in theirs for is_trained_on in mask]
        masks.append(store.loss_mask.tolist())
    assert masks[0] == masks[1]


def test_a_byte_order_mark_is_no_part_of_a_template(tmp_path):
    marked = tmp_path / "marked.jinja"
    marked.write_text(Path(PLAIN).read_text(), encoding="utf-8-sig")
    first, second = (
        stored(config, configured_tokenizer(config))
        for template in (PLAIN, str(marked))
        for config in [small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages", chat_template=template)]
    )
    assert first.key == second.key


def test_the_plain_template_needs_no_new_tokens(tmp_path):
    config = small(
        chats(tmp_path / "x.jsonl", [[SYSTEM, *CONVERSATIONS[1]]]), tmp_path, messages_column="messages", chat_template=PLAIN
    )
    tokenizer = configured_tokenizer(config)
    store = stored(config, tokenizer)
    assert learnt(store, tokenizer) == [["She is rich.<|endoftext|>", f"{CONVERSATIONS[1][3]['content']}<|endoftext|>"]]
    assert tokenizer.decode(store.tokens).startswith(
        "### System\nSpeak as Miss Austen would.\n\n### User\nAnd?\n\n### Assistant\nShe"
    )
    prompt = tokenizer.apply_chat_template([user("And?")], add_generation_prompt=True, tokenize=False)
    assert prompt == "### User\nAnd?\n\n### Assistant\n"


QUESTIONS = [
    {"context": "Emma lives at Hartfield.", "question": "Where?", "answers": {"text": ["at Hartfield"]}},
    {"context": "She is twenty-one.", "question": "How old?", "answers": {"text": []}},
]
SQUAD = "{context}\nQuestion: {question}\nAnswer:"


def test_of_a_prompt_and_its_completion_only_the_completion_and_its_end_are_trained_on(tmp_path):
    tokenizer = load_tokenizer("austen")
    config = small(write(tmp_path / "x.jsonl", QUESTIONS), tmp_path, template=SQUAD, completion_template=" {answers[text][0]}")
    store = stored(config, tokenizer)
    assert learnt(store, tokenizer) == [[" at Hartfield<|endoftext|>"], []], "a blank answer is none"
    assert tokenizer.decode(store.tokens[: store.offsets[1]]) == (
        "Emma lives at Hartfield.\nQuestion: Where?\nAnswer: at Hartfield<|endoftext|>"
    )


def test_two_columns_are_a_prompt_and_its_completion(tmp_path):
    tokenizer = load_tokenizer("austen")
    path = write(tmp_path / "x.jsonl", [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "", "completion": "Yes, it is"}])
    config = small(path, tmp_path, text_column="prompt", completion_template="{completion}")
    store = stored(config, tokenizer)
    first, second = learnt(store, tokenizer)
    assert first == [" 4<|endoftext|>"]
    assert second == [", it is<|endoftext|>"], "nothing comes before a document's first token to tell it from"


def test_the_same_text_without_the_key_is_plain_text_in_the_store_it_always_had(tmp_path):
    path = write(tmp_path / "x.jsonl", QUESTIONS)
    config = small(path, tmp_path, template=SQUAD + " {answers[text][0]}")
    store = stored(config, load_tokenizer("austen"))
    assert store.loss_mask is None
    assert record_formatter(config, None).identity == json.dumps(["text", config.template])
    [index] = (tmp_path / "cache" / "tokens").glob("*/index.json")
    assert sorted(json.loads(index.read_text())["digests"]) == ["offsets.npy", "tokens.bin"]


def test_a_space_at_the_end_of_prompts_gives_a_warning(tmp_path, caplog):
    path = write(tmp_path / "x.jsonl", QUESTIONS)
    config = small(path, tmp_path, template=SQUAD + " ", completion_template="{answers[text][0]}")
    store = stored(config, load_tokenizer("austen"))
    assert learnt(store, load_tokenizer("austen"))[0] == [" at Hartfield<|endoftext|>"]
    assert "in 1 of 2 documents one token spans the end of the prompt and the beginning of the answer" in caplog.text


def test_conversations_come_from_every_kind_of_file(tmp_path):
    tokenizer = byte_level(CHATML, "<|im_end|>")
    expected = stored(small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages"), tokenizer)
    records = [{"messages": messages, "id": number} for number, messages in enumerate(CONVERSATIONS)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    text = datasets.Value("string")
    features = datasets.Features(
        {"messages": datasets.Sequence({"role": text, "content": text}), "id": datasets.Value("int64")}
    )
    fields = [{key: [message[key] for message in messages] for key in ("role", "content")} for messages in CONVERSATIONS]
    declared = datasets.Dataset.from_dict({"messages": fields, "id": [0, 1, 2]}, features=features)
    declared.save_to_disk(str(tmp_path / "sequence"))
    for name in ("x.parquet", "saved", "sequence"):
        store = stored(small(tmp_path / name, tmp_path, messages_column="messages"), tokenizer)
        assert store.tokens.tolist() == expected.tokens.tolist()
        assert store.loss_mask.tolist() == expected.loss_mask.tolist()


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bath"}}}
WITH_CALLS = CHATML.replace(
    "message['content'] +",
    "(message['reasoning_content'] | default('')) + message['content'] + "
    "(message['tool_calls'] | map(attribute='function') | list | tojson if message['tool_calls'] else '') +",
)


def test_sharegpt_s_conversations_are_read_without_conversion(tmp_path):
    tokenizer = byte_level(CHATML, "<|im_end|>")
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    conversations = [[SYSTEM, *CONVERSATIONS[0]], *CONVERSATIONS[1:]]
    records = [
        {"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]}
        for messages in conversations
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    expected = stored(small(chats(tmp_path / "a.jsonl", conversations), tmp_path, messages_column="messages"), tokenizer)
    for path in (write(tmp_path / "x.jsonl", records), tmp_path / "x.parquet"):
        store = stored(small(path, tmp_path, messages_column="conversations"), tokenizer)
        assert store.tokens.tolist() == expected.tokens.tolist()
        assert store.loss_mask.tolist() == expected.loss_mask.tolist()


ALPACA = [
    {"instruction": "Name a novel.", "input": "", "output": "Emma"},
    {"instruction": "Who wrote it?", "input": "Persuasion", "output": "Jane Austen"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]


def loss_of_first_row(config: DataConfig, tokenizer) -> str:
    rows = build_datasets(config, tokenizer)[0].dataset
    targets = rows[0].targets[0]
    return tokenizer.decode([token for token in targets.tolist() if token >= 0])


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet", "saved"])
def test_alpaca_s_columns_are_read_without_conversion(tmp_path, name, caplog):
    caplog.set_level("INFO", "dist_trainer")
    table = pa.Table.from_pylist(ALPACA)
    write(tmp_path / "x.jsonl", ALPACA)
    (tmp_path / "x.json").write_text(json.dumps(ALPACA, indent=2))
    pyarrow.csv.write_csv(table, tmp_path / "x.csv")
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    datasets.Dataset.from_list(ALPACA).save_to_disk(str(tmp_path / "saved"))
    tokenizer = load_tokenizer("austen")
    config = small(tmp_path / name, tmp_path)
    assert loss_of_first_row(config, tokenizer) == "Emma<|endoftext|>Jane Austen<|endoftext|>"
    assert "is read by its column names, as with data.template alpaca" in caplog.text
    store = stored(replace(config, template="alpaca"), tokenizer)
    first, second, _ = (
        tokenizer.decode(store.tokens[slice(*span)]) for span in zip(store.offsets, store.offsets[1:], strict=False)
    )
    assert first == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a novel.\n\n### Response:\nEmma<|endoftext|>"
    )
    assert second.endswith("### Input:\nPersuasion\n\n### Response:\nJane Austen<|endoftext|>")


def test_what_alpaca_s_prompt_has_no_place_for_is_rejected(tmp_path):
    path = write(tmp_path / "x.jsonl", [ALPACA[0], ALPACA[1] | {"history": [["Hi", "Ho"]]}])
    with pytest.raises(DataError, match=r"x\.jsonl:2: the column 'history' has content that Alpaca's prompt"):
        build_datasets(small(path, tmp_path), load_tokenizer("austen"))


def test_a_template_is_for_conversations_that_are_found_by_their_column_too(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"messages": messages} for messages in CONVERSATIONS * 4])
    config, tokenizer = small(path, tmp_path, chat_template=PLAIN), load_tokenizer("austen")
    train, _ = build_datasets(config, tokenizer)
    named, _ = build_datasets(replace(config, messages_column="messages"), tokenizer)
    assert train.dataset.fingerprint == named.dataset.fingerprint
    assert are_conversations(train.dataset)
    text = write(tmp_path / "text.jsonl", [{"text": "Emma"}])
    with pytest.raises(ConfigError, match=r"data\.chat_template: .* is set, but .*text\.jsonl has no column named messages"):
        build_datasets(replace(config, dataset=str(text)), tokenizer)
    pairs, _ = build_datasets(small(write(tmp_path / "pairs.jsonl", ALPACA * 4), tmp_path), tokenizer)
    assert not are_conversations(pairs.dataset)


def test_a_long_first_conversation_is_known_by_its_column_too(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"id": "x" * 2_000_000, "messages": CONVERSATIONS[0]}])
    assert "messages" in column_names(path)


def test_columns_are_read_by_their_names_only_without_a_template(tmp_path):
    tokenizer = byte_level(CHATML, "<|im_end|>")
    assert loss_of_first_row(small(chats(tmp_path / "x.jsonl", CONVERSATIONS[:1]), tmp_path), tokenizer) == (
        "A young lady, handsome and clever.<|im_end|>"
    )
    text = write(tmp_path / "y.jsonl", [record | {"text": "All of it."} for record in ALPACA[:1]])
    assert stored(small(text, tmp_path), tokenizer).loss_mask is None
    path = write(tmp_path / "z.jsonl", ALPACA)
    with pytest.raises(DataError, match="there is no column 'body'"):
        build_datasets(small(path, tmp_path, text_column="body"), tokenizer)
    own = small(path, tmp_path, template="{instruction}", completion_template=" {output}")
    assert loss_of_first_row(own, tokenizer).startswith(" Emma<|im_end|>")


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["plain", "with marks"])
def test_flagged_and_empty_answers_are_not_trained_on(tmp_path, template):
    flags = [{"weight": 0}, {"weight": 1}, {"train": False}, {"training": True}, {"weight": None}]
    messages = [m for n, flag in enumerate(flags) for m in (user(f"Q{n}") | {"weight": 0}, assistant(f"A{n}") | flag)]
    path = chats(tmp_path / "x.jsonl", [[assistant("Hello") | {"weight": 0}, *messages, user("?"), assistant(" \n")]])
    tokenizer = byte_level(template, "<|im_end|>")
    store = stored(small(path, tmp_path, messages_column="messages"), tokenizer)
    assert learnt(store, tokenizer) == [["A1<|im_end|>", "A3<|im_end|>", "A4<|im_end|>"]]
    assert "A0<|im_end|>" in tokenizer.decode(store.tokens)


def test_marks_that_are_not_one_to_an_answer_cannot_tell_which_one_is_flagged(tmp_path):
    path = chats(tmp_path / "x.jsonl", [[user("a"), assistant("b") | {"weight": 0}, user("c"), assistant("d")]])
    twice = MARKED_CHATML.replace("{% endgeneration %}", "{% endgeneration %}{% generation %}!{% endgeneration %}")
    with pytest.raises(DataError, match=r"x\.jsonl:1: .* marks 4 parts of a conversation with 2 answers"):
        stored(small(path, tmp_path, messages_column="messages"), byte_level(twice, "<|im_end|>"))


def test_a_template_that_writes_tool_calls_and_thoughts_learns_them(tmp_path):
    as_text = CALL | {"function": CALL["function"] | {"arguments": '{"city": "Bath"}'}}
    conversations = [
        [user("Weather?"), {"role": "assistant", "content": content, "tool_calls": [call]}, {"role": "tool", "content": "Rain"}]
        for content, call in ((None, CALL), ("", as_text))
    ]
    path = chats(tmp_path / "x.jsonl", [*conversations, [user("Hi"), assistant("Ho") | {"reasoning_content": "Hm. "}]])
    tokenizer = byte_level(WITH_CALLS, "<|im_end|>")
    called = '[{"name": "weather", "arguments": {"city": "Bath"}}]<|im_end|>'
    assert learnt(stored(small(path, tmp_path, messages_column="messages"), tokenizer), tokenizer) == [
        [called],
        [called],
        ["Hm. Ho<|im_end|>"],
    ]


@pytest.mark.parametrize("column", ["tools", "functions", "system"])
def test_columns_next_to_the_messages_are_rejected_from_every_kind_of_file(tmp_path, column):
    nothing = [{"messages": CONVERSATIONS[0], column: empty} for empty in (None, "", "[]")]
    records = [*nothing, {"messages": CONVERSATIONS[0], column: json.dumps([CALL])}]
    write(tmp_path / "x.jsonl", records)
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    datasets.Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    for name in ("x.jsonl", "x.parquet", "saved"):
        with pytest.raises(DataError, match=rf"{name}.*4: the column '{column}' has content"):
            stored(small(tmp_path / name, tmp_path, messages_column="messages"), byte_level(CHATML, "<|im_end|>"))


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["plain", "with marks"])
def test_a_template_that_asks_for_the_date_is_rejected_and_one_with_a_date_is_not(tmp_path, template):
    dated = "{% if date is not defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}: " + template
    config = small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages")
    with pytest.raises(DataError, match=r"x\.jsonl:1: the chat template of .* asks for today's date \(strftime_now\)"):
        stored(config, byte_level(dated, "<|im_end|>"))
    tokenizer = byte_level("{% set date = '1 May 1816' %}" + dated, "<|im_end|>")
    assert tokenizer.decode(stored(config, tokenizer).tokens).startswith("1 May 1816: ")
    prompt = ChatTemplate(config, byte_level(dated, "<|im_end|>")).prompt("--chat", CONVERSATIONS[0][:1])
    assert re.match(r"\d\d \w+ \d{4}: ", prompt), "a question is asked today"


BAD = {
    "no role": ([{"content": "Hi"}], r'x\.jsonl:2: "role" of message 1 in \'messages\' is missing \(content\)'),
    "a speaker whose role is unknown": (
        [{"from": "function_call", "value": "{}"}],
        r"x\.jsonl:2: message 1 in 'messages' is \"from\" 'function_call'; known are human, user, gpt",
    ),
    "a speaker that is no text": (
        [{"from": ["human"], "value": "Hi"}],
        r"message 1 in 'messages' is \"from\" \['human'\]; known",
    ),
    "tool calls": (
        [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        r'x\.jsonl:2: message 2 has "tool_c',
    ),
    "tool calls and no content": (
        [user("Hi"), {"role": "assistant", "tool_calls": [CALL]}],
        r'message 2 has "tool_calls", which',
    ),
    "thoughts": (
        [user("Hi"), assistant("Ho") | {"reasoning_content": "Hm"}],
        r"the chat template of .* does not render, so it w",
    ),
    "half a weight": (
        [user("Hi"), assistant("Ho") | {"weight": 0.5}],
        r'"weight" of message 2 in \'messages\' is 0\.5; it must',
    ),
    "a weight of a question": ([user("Hi") | {"train": True}, assistant("Ho")], r'"train" of message 1 .* message of the user'),
    "no text": (
        [user("Hi"), {"role": "assistant", "content": None}],
        r'"content" of message 2 .* holds nothing \(null\), not text',
    ),
    "no object": (["Hi"], r"x\.jsonl:2: message 1 in 'messages' is a str, not an object"),
    "no list": ("Hi", r"x\.jsonl:2: the column 'messages' holds a str, not a list"),
    "nothing": ([], r"x\.jsonl:2: the conversation in 'messages' has no message"),
    "roles in an order that the template refuses": (
        [user("Hi"), user("Hi?"), assistant("Ho")],
        r"x\.jsonl:2: the chat template of .* refuses the messages \(roles user, user, assistant\): Conversation roles must"
        r" alternate.*; change the messages",
    ),
    "half a character": ([user("Hi"), assistant("b\ud83d")], r"x\.jsonl:2: half of a character"),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_conversations_are_named_by_line_with_the_remedy(tmp_path, case):
    messages, message = BAD[case]
    path = write(tmp_path / "x.jsonl", [{"messages": CONVERSATIONS[0]}, {"messages": messages}])
    with pytest.raises(DataError, match=message):
        stored(small(path, tmp_path, messages_column="messages"), byte_level(MISTRAL, "</s>"))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (
            FORGETS,
            [user("a"), assistant("t</think>b"), user("c"), assistant("d")],
            r"once later turns follow \(message 2 of 4\)",
        ),
        (WITHOUT_GENERATION_PROMPT, CONVERSATIONS[0], r"ignores add_generation_prompt"),
        (CHATML, [assistant("Hi"), user("Ho")], r"begins with the assistant's message"),
    ],
    ids=["earlier turns rewritten", "no generation prompt", "the assistant first"],
)
def test_if_a_template_does_not_mark_answers_nothing_is_guessed(tmp_path, template, messages, message):
    path = chats(tmp_path / "x.jsonl", [messages])
    with pytest.raises(DataError, match=rf"x\.jsonl:1: .*the chat template of austen.*{message}|{message}.*generation"):
        stored(small(path, tmp_path, messages_column="messages"), byte_level(template, "<|im_end|>"))


def test_a_template_that_rewrites_earlier_turns_serves_for_conversations_of_one_answer(tmp_path):
    tokenizer = byte_level(FORGETS, "<|im_end|>")
    store = stored(small(chats(tmp_path / "x.jsonl", CONVERSATIONS[:1]), tmp_path, messages_column="messages"), tokenizer)
    assert learnt(store, tokenizer) == [["A young lady, handsome and clever.<|im_end|>"]]


def test_a_tokenizer_without_a_template_is_rejected_with_the_remedy(tmp_path):
    config = small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages")
    with pytest.raises(DataError, match=r"data\.messages_column: .*tokenizer austen has no chat template.*data\.chat_template"):
        stored(config, load_tokenizer("austen"))
    for name, content, reason in (("none.jinja", None, "cannot be read"), ("empty.jinja", " \n", "is empty")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=rf"data\.chat_template: .*{name} {reason}"):
            configured_tokenizer(replace(config, chat_template=str(tmp_path / name)))


def test_an_end_of_turn_at_which_generation_does_not_stop_gives_a_warning(tmp_path, caplog):
    config = small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages")
    stored(config, byte_level(CHATML, "<|im_end|>"))
    assert caplog.text == ""
    stored(config, byte_level(CHATML, "</s>"))
    assert "not with the tokenizer's end-of-text token (</s>)" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data.messages_column", "m", "--data.template", "{a}"],
            "data.messages_column: 'm' is set, and so is data.template",
        ),
        (["--data.messages_column", "m", "--data.completion_template", "{a}"], "so is data.completion_template"),
        (["--data.messages_column", ""], "data.messages_column: must not be empty"),
        (["--data.chat_template", PLAIN, "--data.template", "{a}"], "is set, and so is data.template; records are either"),
        (["--data.completion_template", "{a.b}"], "data.completion_template: {a.b} is not a column"),
        (["--data.completion_template", "yes"], "data.completion_template: 'yes' names no column"),
    ],
)
def test_contradictions_are_rejected_before_anything_is_read(arguments, message):
    with pytest.raises(ConfigError) as refused:
        load_config(arguments)
    assert message in str(refused.value)


# ------------------------------------------------------------------------------------------------------ rows


def marked_store(lengths: list[int], prompts: list[int]) -> tuple[TokenStore, np.ndarray]:
    """Documents of tokens 1, 2, 3, ... over the whole store; the first `prompts[i]` of document i carry no loss."""
    offsets = np.cumsum([0, *lengths])
    mask = np.ones(offsets[-1], dtype=bool)
    for start, prompt in zip(offsets, prompts, strict=False):
        mask[start : start + prompt] = False
    spans = np.stack([offsets[:-1], offsets[1:]], axis=1)
    return TokenStore(np.arange(1, offsets[-1] + 1, dtype=np.uint16), offsets, "key", mask), spans


def random_documents(seed: int, count: int = 60) -> tuple[list[int], list[int]]:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 40, count)
    return lengths.tolist(), random.integers(1, lengths).tolist()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [8, 39, 64, 500])
def test_every_answer_is_trained_on_exactly_once_after_its_own_prompt(packing, length):
    lengths, prompts = random_documents(3)
    store, spans = marked_store(lengths, prompts)
    found = truncate_and_filter(store, spans, length)
    rows = BestFitPackedDataset(store, found.spans, length, padding=0, packing=packing, document_mask=True)
    batch = rows.__getitems__(list(range(len(rows))))
    targets = batch.targets
    counted = targets != IGNORED_TARGET
    assert (targets == batch.input_ids + 1)[counted].all(), "each follows the token before it"
    expected = [
        int(store.tokens[place])
        for start, end in spans
        for place in range(start, min(end, start + length + 1))
        if store.loss_mask[place]
    ]
    assert sorted(targets[counted].tolist()) == expected
    assert counted.any(dim=1).all()
    if not packing:
        assert batch.document_ids is None
        return
    assert batch.input_ids.shape == (len(rows), length)
    document_of = np.searchsorted(store.offsets, np.arange(len(store.tokens)), side="right") - 1
    for tokens, numbers in zip(batch.input_ids.tolist(), batch.document_ids.tolist(), strict=True):
        real = [(document_of[token - 1], number) for token, number in zip(tokens, numbers, strict=True) if token]
        assert len(set(real)) == len({document for document, _ in real}) == len({number for _, number in real})
        assert numbers == sorted(numbers)


def test_sequences_do_not_depend_on_what_they_are_read_with():
    store, spans = marked_store(*random_documents(5))
    rows = BestFitPackedDataset(store, spans, 50, padding=0, packing=True)
    together = rows.__getitems__([3, 0, 3])
    for number, index in enumerate((3, 0, 3)):
        assert rows[index].input_ids[0].equal(together.input_ids[number])
        assert rows[index].targets[0].equal(together.targets[number])
    assert together.document_ids is None
    assert together.input_ids.is_contiguous()
    assert together.targets.is_contiguous()


def test_a_batch_of_one_document_per_sequence_is_as_long_as_its_longest():
    rows = BestFitPackedDataset(*marked_store([5, 9, 3], [1, 1, 1]), 64, padding=0, packing=False)
    assert rows.__getitems__([0, 2]).input_ids.tolist() == [[1, 2, 3, 4], [15, 16, 17, 0]]
    assert rows.__getitems__([0, 2]).targets.tolist() == [[2, 3, 4, 5], [16, 17, IGNORED_TARGET, IGNORED_TARGET]]


def test_best_fit_decreasing_fills_sequences_and_overfills_none():
    lengths = np.random.default_rng(0).integers(2, 1025, 5000)
    rows = best_fit_decreasing(lengths, 1025)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 1025
    assert filled.mean() > 0.98 * 1025
    firsts = [int(np.argmax(rows == row)) for row in range(rows.max() + 1)]
    assert firsts == sorted(firsts)
    assert best_fit_decreasing(np.array([4, 3, 5, 2]), 7).tolist() == [0, 0, 1, 1]


def test_what_is_cut_or_left_out_is_counted():
    #  fits, cut within the answer, cut before it, no answer
    store, spans = marked_store([5, 20, 20, 6], [2, 4, 15, 6])
    found = truncate_and_filter(store, spans, 9)
    assert found.spans.tolist() == [[0, 5], [5, 15]]
    assert found[1:] == (1, 1, 1)


def test_one_warning_reports_what_was_cut_or_skipped(tmp_path, caplog):
    conversations = [
        *([user("Hi"), assistant("Ho")] for _ in range(4)),
        [user("Hi"), assistant("Ho " * 300)],
        [user("Hi " * 300), assistant("Ho")],
        [user("Hi")],
    ]
    config = small(chats(tmp_path / "x.jsonl", conversations), tmp_path, messages_column="messages", chat_template=PLAIN)
    config = replace(config, sequence_length=64)
    create_dataloaders(TrainingConfig(data=config, batch=BatchConfig(1, 1)))
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == (
        "training data: 1 of 7 documents truncated to 64 tokens (data.sequence_length); 1 of 7 documents skipped: the answer "
        "starts after token 64; 1 of 7 documents skipped: no answer"
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [user("Hi")],
            'x.jsonl: no document has an answer to train on (of 1: 1 without a message of the role "assistant" that has text '
            "and is not excluded by its flag)",
        ),
        (
            [user("Hi " * 99), assistant("Ho")],
            "(of 1: 1 with answers that start after token 32 (data.sequence_length))",
        ),
    ],
)
def test_data_in_which_there_is_nothing_to_learn_are_rejected(tmp_path, messages, message):
    config = small(chats(tmp_path / "x.jsonl", [messages]), tmp_path, messages_column="messages", chat_template=PLAIN)
    config = replace(config, sequence_length=32, validation_fraction=0.5)
    with pytest.raises(DataError, match=r"^data\.dataset: .*" + re.escape(message)):
        create_dataloaders(TrainingConfig(data=config, batch=BatchConfig(1, 1)))
    by_its_columns = replace(config, messages_column=None)  # the answers are those of conversations then, too
    with pytest.raises(DataError, match=r"^data\.dataset: .*" + re.escape(message)):
        build_datasets(by_its_columns, byte_level(CHATML, "<|im_end|>"))
    good = str(chats(tmp_path / "good.jsonl", [[user("Hi"), assistant("Ho")]]))
    config = replace(config, dataset=good, validation_dataset=config.dataset)
    with pytest.raises(DataError, match=r"^data\.validation_dataset: .*" + re.escape(message)):
        create_dataloaders(TrainingConfig(data=config, batch=BatchConfig(1, 1)))


@pytest.mark.parametrize("unusable", [[user("Hi")], [user("Hi " * 99), assistant("Ho")], [user("Hi"), assistant(" ")]])
def test_validation_data_are_held_out_of_the_documents_that_have_an_answer(tmp_path, unusable):
    first, second, third = FeistelPermutation(40, SPLIT_KEY)(np.arange(3)).tolist()
    conversations = [[user("Hi"), assistant(f"Answer {number}.")] for number in range(40)]
    conversations[first] = unusable
    path = chats(tmp_path / "x.jsonl", conversations)
    config = small(path, tmp_path, messages_column="messages", chat_template=PLAIN, document_mask=True)
    tokenizer = configured_tokenizer(config)
    held_out = build_datasets(replace(config, sequence_length=32, validation_fraction=0.05), tokenizer)[1]
    targets = [t for i in range(len(held_out.dataset)) for t in held_out.dataset[i].targets[0].tolist() if t >= 0]
    decoded = tokenizer.decode(targets).split("<|endoftext|>")[:-1]
    assert sorted(decoded) == sorted([f"Answer {second}.", f"Answer {third}."])


def test_conversations_are_held_out_as_a_unit_and_validated_alone(tmp_path):
    conversations = [[user(f"Question {number}?"), assistant(f"Answer {number}.")] for number in range(40)]
    config = small(chats(tmp_path / "x.jsonl", conversations), tmp_path, messages_column="messages", chat_template=PLAIN)
    config = replace(config, validation_fraction=0.1, document_mask=True)
    tokenizer = configured_tokenizer(config)
    train, validation = build_datasets(config, tokenizer)
    decoded = [
        tokenizer.decode([t for i in range(len(r.dataset)) for t in r.dataset[i].targets[0].tolist() if t >= 0])
        for r in (train, validation)
    ]
    answers = [sorted(part.split("<|endoftext|>")[:-1]) for part in decoded]
    assert len(answers[1]) == 4
    assert sorted(answers[0] + answers[1]) == sorted(f"Answer {number}." for number in range(40))
    alone = create_validation_loader(
        TrainingConfig(data=config, batch=BatchConfig(2, 2)), DistributedContext.single(), tokenizer=tokenizer
    )
    assert sum(batch.num_targets() for batch in alone) == sum(len(tokenizer(a)["input_ids"]) + 1 for a in answers[1])
    assert SPLIT_KEY == (0x5917, 0), "which documents these are must not change"


@pytest.mark.parametrize("packing", [True, False])
def test_worker_processes_change_nothing(tmp_path, packing):
    path = chats(tmp_path / "x.jsonl", CONVERSATIONS * 6)
    config = small(path, tmp_path, messages_column="messages", chat_template=PLAIN, packing=packing, document_mask=True)
    here, there = (
        iter(create_dataloaders(TrainingConfig(data=replace(config, num_workers=workers), batch=BatchConfig(2, 2))).train)
        for workers in (0, 2)
    )
    for _ in range(3):
        ours, theirs = next(here), next(there)
        assert ours.input_ids.equal(theirs.input_ids)
        assert ours.targets.equal(theirs.targets)
        assert (ours.document_ids is None) == (theirs.document_ids is None) == (not packing)


def test_a_column_of_messages_that_is_read_as_text_names_the_key_that_reads_them(tmp_path):
    with pytest.raises(DataError, match=r"holds a list, not text; a list of messages is read by --data\.messages_column"):
        stored(small(chats(tmp_path / "x.jsonl"), tmp_path, text_column="messages"), load_tokenizer("austen"))


def test_a_single_conversation_is_not_torn_apart_to_validate_on(tmp_path):
    config = small(chats(tmp_path / "x.jsonl", CONVERSATIONS[:1]), tmp_path, messages_column="messages", chat_template=PLAIN)
    with pytest.raises(DataError, match=r"data\.validation_fraction: there is only one document"):
        build_datasets(replace(config, validation_fraction=0.1), configured_tokenizer(config))


def test_a_token_of_no_characters_belongs_to_what_follows():
    offsets = np.array([[0, 3], [3, 3], [3, 5], [5, 5]])
    assert tokens_in_spans(offsets, [(3, 5)]).tolist() == [False, True, True, False]
    assert tokens_in_spans(offsets, [(0, 1), (4, 5)]).tolist() == [True, False, True, False]


# ------------------------------------------------------------------------------------------------- the store


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_build_with_a_loss_mask_that_was_killed_resumes_to_the_same_bytes(tmp_path, monkeypatch, is_damaged):
    monkeypatch.setattr(text_pieces, "BATCH_PIECES", 3)
    monkeypatch.setattr(text_pieces, "SHARD_CHARACTERS", 900)
    path = chats(tmp_path / "x.jsonl", CONVERSATIONS * 10)
    config = small(path, tmp_path, messages_column="messages", chat_template=PLAIN)
    stored(replace(config, cache_dir=str(tmp_path / "at once")), configured_tokenizer(config))
    left = kill_a_build(lambda: stored(config, configured_tokenizer(config)), tmp_path / "cache", shards=2)
    if is_damaged:
        shard = left / "shard-000001.npz"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    built, real = [], store_building._build_shard
    monkeypatch.setattr(store_building, "_build_shard", lambda *arguments: built.append(1) or real(*arguments))
    stored(config, configured_tokenizer(config))
    total = [p.name for p in (tmp_path / "cache" / "tokens").glob(".building-*")]
    assert total == []
    made = [{p.name: p.read_bytes() for p in (tmp_path / cache / "tokens").glob("*/*")} for cache in ("at once", "cache")]
    assert made[0] == made[1]
    assert sorted(made[0]) == ["index.json", "loss.bin", "offsets.npy", "tokens.bin"]
    built_then, built[:] = len(built), []
    stored(replace(config, cache_dir=str(tmp_path / "again")), configured_tokenizer(config))
    assert built_then == len(built) - (1 if is_damaged else 2)


def test_a_damaged_loss_mask_is_rebuilt(tmp_path):
    config = small(chats(tmp_path / "x.jsonl"), tmp_path, messages_column="messages", chat_template=PLAIN)
    mask = stored(config, configured_tokenizer(config)).loss_mask.tolist()
    [file] = (tmp_path / "cache" / "tokens").glob("*/loss.bin")
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    assert stored(config, configured_tokenizer(config)).loss_mask.tolist() == mask
