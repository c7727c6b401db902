"""Configs from strangers: however deep, long or odd, they end in a sentence that names the file, at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from dist_trainer.config.yaml_files import load_yaml
from dist_trainer.errors import ConfigError, RefusedError
from dist_trainer.huggingface.llama_config import read_hf_config
from dist_trainer.run.configure import load_config
from dist_trainer.tracking.run_reader import read_run

ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 10)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
TOO_DEEP = r"x\.yaml: is nested too deeply; a config has only sections, keys and values"
TOO_MANY = r"x\.yaml: holds more than 100,000 values with aliases \(\*name\) expanded"
HOSTILE = {
    "brackets": ("seed: " + "[" * 1000 + "]" * 1000, TOO_DEEP),
    "mappings": ("\n".join(" " * depth + "a:" for depth in range(1000)), TOO_DEEP),
    "brackets that can be read": ("optim: {betas: " + "[" * 200 + "]" * 200 + "}", r"x\.yaml:1: optim\.betas: \[\[\[\["),
    "aliases of aliases": (f"{ALIASES}seed: *j\n", TOO_MANY),
    "merged aliases": (f"{MERGES}model: *i\n", TOO_MANY),
    "itself": ("seed: &a [*a]\n", TOO_MANY),
    "a number that Python does not read": ("seed: " + "9" * 5000, r"x\.yaml:1: '9{79} cannot be read"),
    "a number that no machine has": ("seed: " + "9" * 4000, r"x\.yaml:1: seed: 9{80} is too large; it must fit into 64 bits"),
    "a fraction that no machine has": ("optim: {learning_rate: 1" + "0" * 400 + "}", r"x\.yaml:1: optim\.learning_rate: 1000"),
    "an empty number": ('seed: !!int ""', r"x\.yaml:1: '' cannot be read"),
    "no truth": ("seed: !!bool x", r"x\.yaml:1: 'x' cannot be read"),
    "no time": ("seed: !!timestamp x", r"x\.yaml:1: 'x' cannot be read"),
    "a key that is no number": ('!!int "": 3', r"x\.yaml:1: '' cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_ends_in_a_sentence_at_once(tmp_path, case):
    text, said = HOSTILE[case]
    path = tmp_path / "x.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=said) as refused:
        load_config(["--config", str(path)])
    assert len(str(refused.value)) < 600
    assert time.process_time() - began < 5


def test_an_alias_that_is_none_of_these_is_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("validation: {every_steps: &n 7}\ncheckpoint: {every_steps: *n}\n")
    assert load_config(["--config", str(path)]).checkpoint.every_steps == 7


def test_the_config_of_another_s_run_and_a_section_on_the_command_line_are_read_likewise(tmp_path):
    (tmp_path / "config.yaml").write_text(f"{ALIASES}seed: *j\n")
    assert read_run(tmp_path).config == {}
    with pytest.raises(ConfigError, match="is nested too deeply"):
        load_yaml("[" * 1000 + "]" * 1000, "command line")
    with pytest.raises(ConfigError, match=r"command line: optim: is a section; set its keys"):
        load_config(["--optim", '{"betas": ' + "[" * 1000 + "]" * 1000 + "}"])


LLAMA = {
    "model_type": "llama",
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ODD_FIELDS = {
    "rms_norm_eps": (10**400, "rms_norm_eps is 1000000"),
    "rope_theta": (float("inf"), "rope_theta is inf, not a number"),
    "rope_parameters": ({"rope_theta": 10**400}, "rope_parameters.rope_theta is 10"),
    "layer_types": (5, "layer_types is 5"),
    "vocab_size": (10**400, "vocab_size is 10"),
    "num_hidden_layers": (10**9, "num_hidden_layers is 1000000000; a model has 10,000 at most"),
}


@pytest.mark.parametrize("field", ODD_FIELDS)
def test_numbers_that_no_machine_has_are_rejected_by_field(tmp_path: Path, field):
    value, said = ODD_FIELDS[field]
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, field: value}))
    with pytest.raises(RefusedError, match=said):
        read_hf_config(tmp_path)
