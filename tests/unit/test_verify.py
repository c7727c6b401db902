"""What a command line of dist_trainer.verify is refused for: one clear sentence, exit code 2."""

import pytest

from dist_trainer.verify import main, ranks_of, steps_of


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a run's folder, such as runs/default, or --config FILE and --ranks N,M"),
        (["nowhere"], "nowhere is not a run's folder: it has no config.yaml; give one such as runs/default"),
        (["nowhere", "--seed", "3"], "--seed: a run is verified with its own config; leave it out"),
        (["--seed", "3"], "--ranks: is needed to verify a config; give numbers of ranks to compare, such as 1,2,4"),
        (["--seed", "x", "--ranks", "1,2"], "command line: seed: 'x' is not a whole number"),
    ],
)
def test_wrong_use_is_refused_in_a_sentence(capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["run", "--steps", "8-5"], ["run", "--steps", "0"], ["run", "--ranks", "1,,2"], ["run", "--ranks=0"]]
)
def test_steps_and_ranks_that_are_none_are_refused(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "write " in capsys.readouterr().err


def test_under_torchrun_it_starts_no_ranks(capsys, monkeypatch, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert main([str(tmp_path), "--ranks", "1,2"]) == 2
    assert "--ranks: starts ranks itself; start this without torchrun, or leave --ranks out" in capsys.readouterr().err


def test_steps_and_ranks():
    assert (steps_of("5"), steps_of("5-8"), ranks_of("1, 2,4,2")) == ((5, 5), (5, 8), (1, 2, 4))
