"""`verify`: a replay equals its run bit by bit, on any number of ranks, and a sum in another order is found and named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from dist_trainer.distributed import exchange
from dist_trainer.errors import CheckpointError, ConfigError, RefusedError
from dist_trainer.run.replay import Line, Plan
from dist_trainer.run.replay_ranks import found_by, replay_as_rank
from dist_trainer.run.verification import Request, check_ranks, find_subject, verify
from tests.distributed.ranks import run_ranks
from tests.distributed.small_runs import changed, folder, run, small_config, stop_after


@pytest.fixture
def finished(undisturbed, tmp_path):
    """A copy of a run of 12 steps on one process, with checkpoints of steps 4, 8, 12 and of the best ones, 5 and 10."""
    return Path(shutil.copytree(folder(undisturbed(1, {})), tmp_path / "run", symlinks=True))


def verified(request: Request, ranks: int, *, swaps: bool = False) -> tuple[set[int], dict]:
    """The exit codes on so many forked ranks, and the certificate."""
    codes = run_ranks(ranks, lambda: with_one_thread(lambda: verify(request), swaps=swaps))
    return set(codes), json.loads((request.run / "certificate.json").read_text())


def with_one_thread(act, *, swaps: bool):
    torch.set_num_threads(1)
    if swaps:
        swap_the_sums_of_two_ranks()
    return act()


def swap_the_sums_of_two_ranks() -> None:
    """From outside: (a + b) + (c + d) becomes (a + c) + (b + d) between four ranks."""
    for transport in (exchange.SharedMemory, exchange.AllToAll):

        def swapped(self, *arguments, scatter=transport.scatter):
            shards = list(scatter(self, *arguments))
            if len(shards) == 4:
                shards[1], shards[2] = shards[2], shards[1]
            return shards

        transport.scatter = swapped


def forked(*, swaps: bool = False):
    """Starts the ranks that --ranks asks for."""

    def start(plan: Plan, ranks: int) -> list[Line]:
        plan.write()
        run_ranks(ranks, lambda: with_one_thread(lambda: replay_as_rank(plan.scratch), swaps=swaps))
        return found_by(plan.scratch, ranks)

    return start


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_a_run_on_one_process_is_replayed_to_the_bit_on_two_ranks_and_its_folder_is_only_read(finished):
    before = contents(finished)
    codes, certificate = verified(Request(finished, steps=(7, 12)), 2)
    assert codes == {0}
    assert certificate["result"] == "equal"
    assert (certificate["ranks"], certificate["run_ranks"], certificate["checkpoint"]) == ([2], 1, "step-00000005")
    assert list(certificate["digests"]["2"]) == ["7", "8", "9", "10", "11", "12"]
    assert any("equal: " in line for line in certificate["compared"])
    after = contents(finished)
    assert after.pop("certificate.json")
    assert b"verified: steps 7-12 on 2 ranks: equal" in after.pop("report.html")
    before.pop("report.html")
    assert after == before


def test_a_sum_of_four_ranks_in_another_order_is_found_and_its_step_and_tensor_are_named(finished):
    codes, certificate = verified(Request(finished, steps=(5, 8)), 4, swaps=True)
    assert codes == {1}
    [difference] = certificate["differences"]
    first, second = difference.removeprefix("4 ranks, compared with the run on 1 rank: ").split("; ")
    assert first.startswith("step 5: weights differ, first model.embed_tokens.weight, by up to ")
    assert re.match(r"step [67]: (loss|grad_norm) [0-9.]+ and [0-9.]+ \(the run and the replay\)", second)


def test_a_changed_weight_of_a_checkpoint_is_found(finished):
    from safetensors.torch import load_file, save_file

    file = finished / "checkpoints" / "step-00000012" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    codes, certificate = verified(Request(finished, steps=(11, 12)), 1)
    assert codes == {1}
    [difference] = certificate["differences"]
    assert difference.endswith("step 12: weights differ, first model.norm.weight, by up to 0.001")


def test_a_config_is_replayed_on_several_numbers_of_ranks_and_those_that_differ_are_named(stories, tmp_path, capsys):
    certificate = tmp_path / "one.json"
    config = small_config(stories, tmp_path, distributed__sentinel_every_steps=1)
    request = Request(None, config, (1, 1), (1, 2, 4), certificate)
    assert verify(request, start=forked(swaps=True)) == 1, "of four ranks, two were swapped"
    digests = json.loads(certificate.read_text())["digests"]
    assert digests["1"] == digests["2"] != digests["4"]
    said = capsys.readouterr().out
    assert "1 and 2 ranks, 1 step: equal\n" in said
    assert "1 and 4 ranks, 1 step: step 1: weights differ, first model.embed_tokens.weight, by up to " in said
    assert said.endswith("differs\n")


OF_ALL_KINDS = {
    "fp16, muon, dropout": {"precision__dtype": "fp16", "optim__name": "muon", "model__dropout": 0.2},
    "bf16, clipping, documents kept apart": {
        "precision__dtype": "bf16",
        "optim__max_grad_norm": 0.1,
        "data__document_mask": True,
    },
    "padded": {"data__packing": False},
    "micro-batches of three ranks": {"batch__global_batch_size": 12, "batch__micro_batch_size": None},
}


@pytest.mark.slow  # tests/distributed/test_equalities.py holds the runs themselves equal
@pytest.mark.parametrize("changes", OF_ALL_KINDS.values(), ids=OF_ALL_KINDS.keys())
def test_runs_of_all_kinds_that_went_on_with_other_ranks_and_another_end_are_replayed(stories, tmp_path, changes):
    config = small_config(stories, tmp_path, **changes)
    assert run(config, 3 if config.batch.micro_batch_size is None else 2, before=stop_after(6)) != [1]
    longer = changed(config, train__max_steps=16, batch__micro_batch_size=config.batch.micro_batch_size or 4)
    assert run(longer, 1) == [0]
    for steps, ranks in (((1, 6), 1), ((5, 6), 3 if config.batch.micro_batch_size is None else 4), ((9, 16), 1), ((7, 16), 1)):
        codes, certificate = verified(Request(folder(config), steps=steps), ranks)
        assert codes == {0}, certificate["differences"]


@pytest.mark.parametrize(
    ("steps", "ranks", "error", "message"),
    [
        (
            (5, 8),
            (1, 3),
            ConfigError,
            "--ranks: 3 ranks cannot share the 4 micro-batches of a step evenly; choose from 1, 2, 4",
        ),
        ((5, 80), (1,), ConfigError, "--steps: up to 80, but .* has finished 12 steps"),
        (
            (3, 4),
            (1,),
            ConfigError,
            "no checkpoint before step 3 .the first one is of step 4.; give --steps 5-..., or --steps 1",
        ),
    ],
)
def test_what_cannot_be_verified_is_refused(finished, tmp_path, steps, ranks, error, message):
    with pytest.raises(error, match=message):
        check_ranks(find_subject(Request(finished, steps=steps), ranks, tmp_path), ranks, option="--ranks")


def test_the_newest_checkpoint_but_one_is_the_start(finished, tmp_path):
    plan = find_subject(Request(finished), (1,), tmp_path).plan
    *_, before, newest = sorted((finished / "checkpoints").glob("step-*"))
    assert plan.checkpoint == before
    assert plan.saved == (newest,)
    for folder_ in sorted((finished / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(folder_)
    plan = find_subject(Request(finished), (1,), tmp_path).plan
    assert (plan.checkpoint, plan.first, plan.last) == (None, 1, 12)


def test_fast_sums_are_not_compared_on_other_numbers_of_ranks(stories, tmp_path):
    config = changed(small_config(stories, tmp_path), distributed__reduction="fast")
    subject = find_subject(Request(None, config), (1, 2), tmp_path)
    with pytest.raises(
        ConfigError, match=r"distributed\.reduction is fast: sums on 1 and 2 ranks may differ in their last bits"
    ):
        check_ranks(subject, (1, 2), option="--ranks")
    check_ranks(subject, (2,), option="--ranks")


def test_a_run_of_a_time_without_exact_sums_is_refused(finished, tmp_path):
    for file in finished.rglob("trainer_state.json"):
        state = json.loads(file.read_text())
        del state["reduction"]
        file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="was trained before sums had a fixed order"):
        find_subject(Request(finished, steps=(1, 8)), (1,), tmp_path)


def test_a_damaged_checkpoint_is_no_start(finished, tmp_path):
    (finished / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-00000004 is damaged"):
        find_subject(Request(finished, steps=(5, 8)), (1,), tmp_path)


def test_what_a_rank_refuses_is_the_error_of_the_command(stories, tmp_path):
    config = small_config(stories.with_name("nowhere.jsonl"), tmp_path)
    with pytest.raises((RefusedError, AssertionError), match=r"nowhere\.jsonl"):
        verify(Request(None, config, (1, 2), (1,)), start=forked())
