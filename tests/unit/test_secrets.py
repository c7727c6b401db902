"""What sounds or looks like a key is written nowhere, and what does not is left alone."""

import json

import pytest

from dist_trainer.secrets import MASK, masked, masked_command

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
