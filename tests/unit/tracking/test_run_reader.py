"""A history that is refreshed while its run writes has each line once."""

from __future__ import annotations

from pathlib import Path

from dist_trainer.tracking.jsonl import encode_line
from dist_trainer.tracking.run_reader import RunHistory, read_run
from tests.unit.tracking.runs import sample_line, train_line, validation_line


def test_a_refresh_reads_what_was_added_since_the_last_one_and_each_line_once(tmp_path: Path) -> None:
    history = RunHistory(tmp_path)
    written = b"".join(
        encode_line(line)
        for step in range(1, 5)
        for line in (train_line(step, loss=float("nan") if step == 2 else 3.0), validation_line(step), sample_line(step, "x"))
    )
    cut = len(written) // 2 - 7  # within a line
    assert not written[:cut].endswith(b"\n")
    for part in (written[:cut], written[:cut], written, written):
        (tmp_path / "metrics.jsonl").write_bytes(part)
        history.refresh()
    assert list(history.train["step"]) == list(history.validation["step"]) == [1, 2, 3, 4]
    assert [sample.step for sample in history.samples] == [1, 2, 3, 4]
    assert history.skipped == read_run(tmp_path).skipped == [2]
