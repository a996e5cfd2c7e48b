"""The journal: what a sweep knows is the fold of it, whenever the sweep was killed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_lora.config.compose import compose
from raytune_lora.errors import UserError
from raytune_lora.tuning.folder import SweepFolder, create
from raytune_lora.tuning.trials import ENDED_BADLY, MEASURED, Journal, Record, Trial, trial_name

PARAMS = {"method.r": 8, "training.learning_rate": 1e-3}


def result(samples_seen: int, eval_loss: float) -> dict[str, Any]:
    return {
        "samples_seen": samples_seen,
        "eval_loss": eval_loss,
        "train_loss": eval_loss + 0.1,
        "training_seconds": samples_seen / 10,
        "trainable_parameters": 100,
        "peak_memory_bytes": 2**20,
        "micro_batch": 4,
        "last": samples_seen == 24,
        "checkpoint": f"/checkpoint-{samples_seen}",
    }


def write(journal: Journal, trial_id: str, *losses: float, status: str | None = None, start: int = 1) -> None:
    """A trial that measured these losses at 8, 16, … samples, and how it ended."""
    journal.append("trial_started", trial_id=trial_id, params=PARAMS)
    for number, loss in enumerate(losses, start):
        journal.append("trial_result", trial_id=trial_id, **result(8 * number, loss))
    if status is not None:
        error = "it broke" if status in ENDED_BADLY else None
        journal.append("trial_ended", trial_id=trial_id, status=status, error=error, seconds=1.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def curve(trial: Trial) -> list[tuple[float, float]]:
    return [(point["samples_seen"], point["eval_loss"]) for point in trial.curve]


# ------------------------------------------------------------------------------------------------------------- the fold


def test_a_trial_is_the_fold_of_its_events(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 3.0, 1.0, 2.0, status="completed")
    trial = journal.record.trials["0000"]
    assert (trial.status, trial.params, trial.ended, trial.error) == ("completed", PARAMS, True, None)
    assert (trial.samples_seen, trial.training_seconds, trial.seconds) == (24, 2.4, 1.5)
    assert (trial.eval_loss, trial.checkpoint) == (1.0, "/checkpoint-16")
    assert (trial.trainable_parameters, trial.peak_memory_bytes) == (100, 2**20)
    assert (trial.micro_batch, trial.last) == (4, True)
    assert curve(trial) == [(8, 3.0), (16, 1.0), (24, 2.0)]


def test_a_journal_read_again_says_the_same(path: Path) -> None:
    journal = Journal(path)
    journal.append("phase", name="baseline", seconds=1.0, eval_loss=4.0)
    write(journal, "0000", 3.0, status="stopped")
    write(journal, "0001", 2.0, math.nan, status="diverged")
    write(journal, "0002", 1.0)
    again = Journal(path).record
    assert repr(again) == repr(journal.record)
    assert again.phases["baseline"]["eval_loss"] == 4.0
    assert [trial.ended for trial in again.trials.values()] == [True, True, False]


def test_an_event_is_on_disk_before_it_is_told_of(path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def watch(event: dict[str, Any], record: Record) -> None:
        seen.append((event["event"], len(path.read_bytes().splitlines()), len(record.trials)))

    write(Journal(path, watch), "0000", 1.0, status="completed")
    assert seen == [("trial_started", 1, 1), ("trial_result", 2, 1), ("trial_ended", 3, 1)]


def test_what_was_read_is_not_told_again(path: Path) -> None:
    write(Journal(path), "0000", 1.0)
    Journal(path, lambda event, record: pytest.fail("told of the past"))


def test_a_trial_that_goes_on_replaces_what_it_measures_again(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 5.0, 4.0, 3.0)
    write(journal, "0000", 4.0, 2.9, 2.0, start=2, status="completed")
    trial = journal.record.trials["0000"]
    assert curve(trial) == [(8, 5.0), (16, 4.0), (24, 2.9), (32, 2.0)]
    assert (trial.eval_loss, trial.checkpoint, trial.samples_seen) == (2.0, "/checkpoint-32", 32)


def test_what_a_trial_says_again_is_not_recorded_again(path: Path) -> None:
    """It says all that its checkpoints tell, of which the journal may know any part."""
    journal = Journal(path)
    write(journal, "0000", 5.0, 3.0, 4.0)
    lines = path.read_bytes()
    for number, loss in ((1, 5.0), (3, 4.0)):
        journal.report("0000", result(8 * number, loss))
    assert path.read_bytes() == lines
    journal.report("0000", result(32, 2.0))
    assert curve(journal.record.trials["0000"]) == [(8, 5.0), (16, 3.0), (24, 4.0), (32, 2.0)]


def test_the_clock_of_the_first_start_is_kept(path: Path) -> None:
    journal = Journal(path, began=time.monotonic() - 100)
    write(journal, "0000", 5.0, status="completed")
    write(journal, "0001", 4.0, status="completed")
    for record in (journal.record, Journal(path).record):
        assert record.began == pytest.approx(100, abs=10)


def test_the_seconds_of_all_starts_add_up(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 5.0, status="failed")
    write(journal, "0000", 4.0, start=2, status="completed")
    trial = journal.record.trials["0000"]
    assert (trial.seconds, trial.status, trial.error) == (3.0, "completed", None)


def test_a_stopped_trial_that_goes_on_is_one_trial_that_ended(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", 2.0, status="completed")
    write(journal, "0001", 3.0, status="stopped")
    assert (journal.record.ended, journal.record.in_vain) == (2, 1)
    write(journal, "0001", 3.0)
    assert (journal.record.ended, journal.record.trials["0001"].resumed) == (1, 1)
    write(journal, "0001", 2.5, start=2, status="stopped")
    assert (journal.record.ended, journal.record.in_vain) == (2, 1), "it does not count against budget.patience twice"
    write(journal, "0001", 1.0, start=3, status="completed")
    assert (journal.record.ended, journal.record.in_vain) == (2, 0)
    assert repr(Journal(path).record) == repr(journal.record)


def test_a_member_of_a_population_pauses_and_ends_where_a_child_takes_its_place(path: Path) -> None:
    journal = Journal(path)
    for name, loss in (("0000", 1.0), ("0001", 2.0)):
        write(journal, name, loss)
        journal.append("trial_paused", trial_id=name, seconds=1.5)
    parent, loser = journal.record.trials.values()
    assert (loser.status, loser.ended, loser.seconds, journal.record.ended) == ("paused", False, 1.5, 0)
    journal.append("trial_started", trial_id="0002", params=PARAMS, parent="0000", born=8, replaces="0001", until=16)
    child = journal.record.trials["0002"]
    assert (loser.status, loser.seconds, journal.record.ended) == ("stopped", 1.5, 1)
    assert (child.samples_seen, child.until, parent.status) == (8, 16, "paused")
    assert [trial.trial_id for trial in journal.record.lineage(child)] == ["0000", "0002"]
    assert repr(Journal(path).record) == repr(journal.record)


def test_a_loss_that_is_no_number_is_never_the_best(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000", math.nan, 2.0, math.inf, math.nan)
    trial = journal.record.trials["0000"]
    assert (trial.eval_loss, trial.checkpoint) == (2.0, "/checkpoint-16")


# --------------------------------------------------------------------------------------------------------------- a kill


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_short_is_dropped_and_the_next_is_whole(path: Path, cut: int) -> None:
    journal = Journal(path)
    write(journal, "0000", 3.0)
    whole = path.read_bytes()
    write(journal, "0001", 2.0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole + lines[2][:-cut])
    again = Journal(path)
    assert list(again.record.trials) == ["0000"]
    assert path.read_bytes() == whole
    write(again, "0001", 1.0, status="completed")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
        *("trial_started", "trial_result") * 2,
        "trial_ended",
    ]
    assert repr(Journal(path).record) == repr(again.record)


@pytest.mark.parametrize("content", [b"", b'{"event": "tri'])
def test_a_journal_without_a_whole_line_is_empty(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Journal(path).record == Record()
    assert path.read_bytes() == b""


def test_text_of_any_kind_is_kept(path: Path) -> None:
    journal = Journal(path)
    write(journal, "0000")
    error = "줄\n바꿈 \u2028 \x85 \r \ud83d"
    journal.append("trial_ended", trial_id="0000", status="failed", error=error, seconds=0.0)
    assert Journal(path).record.trials["0000"].error == error


def test_a_folder_is_one_process_s_until_that_ends_however_it_does(tmp_path: Path) -> None:
    """Also where it is killed, and cannot give the lock back."""
    folder = SweepFolder(tmp_path)
    imports = "import time; from pathlib import Path; from raytune_lora.tuning.folder import SweepFolder"
    hold = f"lock = SweepFolder(Path({str(tmp_path)!r})).lock(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", f"{imports}; {hold}"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is working"):
            folder.lock()
        other.kill()
    folder.lock().release()


def test_of_two_that_make_the_same_folder_one_is_refused(tmp_path: Path) -> None:
    cfg = compose(["experiment=tiny"])
    folder = create(tmp_path / "sweep", cfg, "sweep")
    written = folder.config.read_bytes()
    with pytest.raises(UserError, match="holds a sweep"):
        create(tmp_path / "sweep", compose(["experiment=quickstart"]), "sweep")
    assert folder.config.read_bytes() == written
    (tmp_path / "begun").mkdir()
    held = SweepFolder(tmp_path / "begun").lock()  # the other has not written its config yet
    with pytest.raises(UserError, match="another process is working"):
        create(tmp_path / "begun", cfg, "sweep")
    held.release()


# ------------------------------------------------------------------------------------------------------------- the best


def test_the_best_is_the_lowest_that_did_not_end_badly(path: Path) -> None:
    journal = Journal(path)
    assert journal.record.best() is None
    for number, (loss, status) in enumerate(
        [(1.0, "failed"), (1.1, "diverged"), (1.2, "oom"), (2.0, "completed"), (1.5, "stopped"), (1.5, "completed")]
    ):
        write(journal, trial_name(number), loss, status=status)
    write(journal, "0006")
    best = journal.record.best()
    assert best is not None
    assert best.trial_id == "0004"


def test_there_is_no_best_where_all_failed(path: Path) -> None:
    journal = Journal(path)
    for number, status in enumerate(ENDED_BADLY):
        write(journal, trial_name(number), 1.0, status=status)
    assert journal.record.best() is None


def test_a_report_has_all_that_the_record_takes() -> None:
    assert set(result(8, 1.0)) == set(MEASURED)


def test_names_sort_as_their_numbers_do() -> None:
    names = [trial_name(number) for number in (0, 9, 10, 999, 9999)]
    assert names == sorted(names) == ["0000", "0009", "0010", "0999", "9999"]


def test_new_attempts_are_counted_and_measures_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    write(journal, "0000", 0.5)
    journal.report("0000", {"attempt": 1, "kind": "lost", "error": "gone", "pid": 7})
    journal.report("0000", {**result(16, 0.4), "pid": 7})
    for record in (journal.record, Journal(tmp_path / "journal.jsonl").record):
        trial = record.trials["0000"]
        assert (trial.retries, trial.samples_seen, trial.eval_loss) == (1, 16, 0.4)
    assert "pid" not in (tmp_path / "journal.jsonl").read_text()
