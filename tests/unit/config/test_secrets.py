"""What sounds or looks like a key is written nowhere, and what does not is left alone."""

import io
import json

import pytest

from dist_trainer.config.secrets import MASK, MaskedStream, masked, masked_command, masked_within

SECRET = "s3cr3t-v4lue-0123456789"


SECRET_NAMES = """
WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN MY_PASSWORD DB_PASSWD token API_KEY APIKEY
GOOGLE_CREDENTIALS OPENAI_API_KEY CLIENT_SECRET_ID GITHUB_TOKEN PGPASSWORD SMTP_PASS GITHUB_PAT SECRET_KEY_BASE MYSQL_PWD
GITHUBTOKEN SSH_PASSPHRASE
"""


@pytest.mark.parametrize("name", SECRET_NAMES.split())
def test_values_of_variables_that_sound_secret_are_masked(name):
    assert masked(f"connecting with {SECRET}!", {name: SECRET}) == f"connecting with {MASK}!"


OTHER_NAMES = "PATH HOME TOKENIZERS_PARALLELISM KEYBOARD MONKEY SECRETARY PWD OLDPWD COMPAT COMPASS"


@pytest.mark.parametrize("name", OTHER_NAMES.split())
def test_other_variables_are_not(name):
    assert masked(f"in {SECRET}", {name: SECRET}) == f"in {SECRET}"


def test_they_are_masked_in_json_too_where_quotes_look_different():
    secret = 'quote" and \\ and é and more'
    assert masked(json.dumps({"reason": f"it said {secret}"}), {"PASSWORD": secret}) == f'{{"reason": "it said {MASK}"}}'


def test_short_values_are_none():
    assert masked("step 1 of 12", {"HF_TOKEN": "1"}) == "step 1 of 12"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/x", f"https://{MASK}@host/x"),
        ("postgres://me:p@ss:w@host:5432/x", f"postgres://{MASK}@host:5432/x"),
        ("https://ghp_abc@github.com/a/b.git", f"https://{MASK}@github.com/a/b.git"),
        ("see https://host/a@b and me@host", "see https://host/a@b and me@host"),
        ("hf_" + "a" * 34, MASK),
        ("ghp_" + "A1" * 18, MASK),
        ("sk-" + "x" * 40, MASK),
        ("github_pat_" + "A1" * 18, MASK),
        ("glpat-" + "x" * 20, MASK),
        ("xoxb-1234567890-abc", MASK),
        ("AKIAIOSFODNN7EXAMPLE", MASK),
        ("https://host/x?user=me&token=abc#end", f"https://host/x?user=me&token={MASK}#end"),
        ("https://host/x?sig=a%2Fb&se=2027", f"https://host/x?sig={MASK}&se=2027"),
        ("https://host/x?X-Amz-Signature=0123", f"https://host/x?X-Amz-Signature={MASK}"),
        ("is tokens=5? no; key?", "is tokens=5? no; key?"),
        ("hf_short and risk-averse", "hf_short and risk-averse"),
    ],
)
def test_passwords_in_addresses_and_tokens_of_known_forms_are_masked(text, shown):
    assert masked(text, {}) == shown


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["train", "--api_key", "abc", "--seed", "1"], ["train", "--api_key", MASK, "--seed", "1"]),
        (["train", "--hub.token=abc"], ["train", f"--hub.token={MASK}"]),
        (["train", "--token", "--seed", "1"], ["train", "--token", "--seed", "1"]),
        (["train", "--token", "-1abc"], ["train", "--token", MASK]),
        (["train", "--data.tokenizer", "austen"], ["train", "--data.tokenizer", "austen"]),
        (["train", "--password=a=b"], ["train", f"--password={MASK}"]),
        (["x", "https://u:p@h/"], ["x", f"https://{MASK}@h/"]),
    ],
)
def test_commands_are_shown_without_secret_arguments(words, shown):
    assert masked_command(words, {}) == shown


def test_two_secrets_of_which_one_starts_with_the_other_are_both_masked():
    assert masked(f"with {SECRET}-and-more", {"A_TOKEN": SECRET, "B_TOKEN": f"{SECRET}-and-more"}) == f"with {MASK}"


def test_within_a_config_every_text_is_masked_and_all_else_is_left_alone():
    config = {
        "tags": [SECRET, "good"],
        "data": {"dataset": f"x {SECRET}", "length": 256, "ratio": 0.1, "none": None, "on": True},
    }
    shown = {"tags": [MASK, "good"], "data": {"dataset": f"x {MASK}", "length": 256, "ratio": 0.1, "none": None, "on": True}}
    assert masked_within(config, {"A_TOKEN": SECRET}) == shown


def test_what_other_libraries_print_into_a_masked_stream_is_masked(monkeypatch):
    monkeypatch.setenv("A_TOKEN", SECRET)
    shown = io.StringIO()
    print("with", SECRET, file=MaskedStream(shown))
    assert shown.getvalue() == f"with {MASK}\n"
