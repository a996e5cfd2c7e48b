"""Room for checkpoints: what is refused before the start, what is deleted first, and storage that is full."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_lora.artifacts import MANIFEST, folder_bytes, remove_folder, write_json
from raytune_lora.cli import job
from raytune_lora.config.compose import compose
from raytune_lora.config.schema import DiskConfig
from raytune_lora.errors import JobFailed
from raytune_lora.tuning import disk
from raytune_lora.tuning.trials import Record, Trial
from raytune_lora.working_copy import WorkingCopy

SIZE = 10_000  # bytes of a checkpoint, the manifest aside


def checkpoint(trials: Path, trial_id: str, step: int) -> Path:
    folder = trials / trial_id / f"checkpoint-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "trained").write_bytes(bytes(SIZE))
    write_json(folder / MANIFEST, {"step": step, "files": {"trained": SIZE}})
    return folder


def trial(trials: Path, trial_id: str, loss: float, status: str, best: int = 1) -> Trial:
    found = Trial(trial_id, {}, status=status, eval_loss=loss)
    found.checkpoint = str(trials / trial_id / f"checkpoint-{best:08d}")
    return found


def left(trials: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{int(path.name.rpartition('-')[2])}" for path in trials.glob("*/checkpoint-*"))


def quota(checkpoints: float, keep_best: int = 1) -> DiskConfig:
    return DiskConfig(sweep_gb=checkpoints * (SIZE + 100) / disk.GB, keep_best=keep_best)


@pytest.fixture
def sweep(tmp_path: Path) -> tuple[Path, Record]:
    """Four trials with two checkpoints each, of which the first is the better one."""
    trials = [
        trial(tmp_path, "0000", 0.1, "failed"),
        trial(tmp_path, "0001", 0.2, "completed"),
        trial(tmp_path, "0002", 0.3, "stopped"),
        trial(tmp_path, "0003", 0.4, "running"),
    ]
    for each in trials:
        for step in (1, 2):
            checkpoint(tmp_path, each.trial_id, step)
    return tmp_path, Record({each.trial_id: each for each in trials})


@pytest.mark.parametrize(
    ("room", "stay"),
    [
        (8, ["0000/1", "0000/2", "0001/1", "0001/2", "0002/1", "0002/2", "0003/1", "0003/2"]),
        (7, ["0000/2", "0001/1", "0001/2", "0002/1", "0002/2", "0003/1", "0003/2"]),
        (6, ["0001/1", "0001/2", "0002/1", "0002/2", "0003/1", "0003/2"]),
        (3, ["0001/1", "0003/1", "0003/2"]),
        (2, ["0001/1", "0003/2"]),
    ],
)
def test_those_that_ended_badly_go_first_and_the_best_and_what_runs_stay(
    room: int, stay: list[str], sweep: tuple[Path, Record]
) -> None:
    trials, record = sweep
    disk.Quota(quota(room), WorkingCopy(trials)).keep(record)
    assert left(trials) == stay
    assert not list(trials.glob("*/.*")), "nothing half deleted"


def test_where_what_must_stay_does_not_fit_that_is_said(sweep: tuple[Path, Record]) -> None:
    trials, record = sweep
    with pytest.raises(JobFailed, match=r"disk\.sweep_gb=.* never deleted.* resume=.* disk\.sweep_gb=<more>"):
        disk.Quota(quota(1), WorkingCopy(trials)).keep(record)
    assert left(trials) == ["0001/1", "0003/2"]


def test_a_checkpoint_of_no_known_trial_stays(sweep: tuple[Path, Record]) -> None:
    trials, record = sweep
    checkpoint(trials, "mine", 1)
    with pytest.raises(JobFailed):
        disk.Quota(quota(1), WorkingCopy(trials)).keep(record)
    assert "mine/1" in left(trials)


def test_checkpoints_that_will_not_fit_are_refused_before_the_start(tmp_path: Path) -> None:
    cfg = compose(["experiment=tiny", "search.trials=4", "search.concurrent=1", "training.keep_checkpoints=2"])
    assert disk.problems(cfg, 10**6, tmp_path, trials=4) == []
    (found,) = disk.problems(cfg, 10**13, tmp_path, trials=4)
    assert "checkpoints will take about 2.08e+06 GB (4 trials, 3 of 1.6e+05 GB each)" in found
    assert f"free for {tmp_path}" in found
    cfg.disk.sweep_gb, cfg.disk.trial_gb = 0.05, 0.02
    assert [text.partition(":")[0] for text in disk.problems(cfg, 10**6, tmp_path, trials=4)] == [
        "disk.trial_gb=0.02",
        "disk.sweep_gb=0.05",
    ]
    cfg.disk.sweep_gb, cfg.disk.trial_gb = 0.1, 0.04
    assert disk.problems(cfg, 10**6, tmp_path, trials=4) == []


def test_trouble_with_storage_ends_a_job_with_what_to_do(tmp_path: Path) -> None:
    said = rf"No space left.*GB are free in {tmp_path}.*go on with resume=x"
    with pytest.raises(JobFailed, match=said), disk.explained(tmp_path, "go on with resume=x"):
        raise OSError(errno.ENOSPC, "No space left on device", "file")
    with pytest.raises(JobFailed, match="is gone"), disk.explained(tmp_path / "away", ""):
        (tmp_path / "away" / "file").write_text("")
    with pytest.raises(KeyError), disk.explained(tmp_path, ""):
        raise KeyError("of another kind")


def test_a_journal_on_a_full_disk_keeps_whole_lines(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: a line is written in part just so."""
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from raytune_lora.tuning.trials import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "journal.append('trial_started', trial_id='0000', params={})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (journal._path.stat().st_size + 20, resource.RLIM_INFINITY))\n"
        "try: journal.append('trial_ended', trial_id='0000', status='failed', error=None, seconds=1)\n"
        "except OSError as error: print(error, journal.record.trials['0000'].status)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "journal.append('trial_ended', trial_id='0000', status='completed', error=None, seconds=1)\n"
    )
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "running" in done.stdout
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["trial_started", "trial_ended"]


def test_a_file_that_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from raytune_lora.artifacts import write_json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))\n"
        "try: write_json(Path(sys.argv[1]), list(range(1000)))\n"
        "except OSError as error: print('refused')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "refused\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_removed_once(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "0000", 1)
    assert 0 < folder_bytes(folder) <= SIZE + 100
    remove_folder(folder)
    remove_folder(folder)
    assert list((tmp_path / "0000").iterdir()) == []


@pytest.mark.parametrize("limit", [100, 5000])
def test_prepare_on_a_full_disk_fails_in_a_sentence(limit: int, tmp_path: Path, cache: Path) -> None:
    """A limit on the size of files stands in for the disk, of the cache or of the reports."""
    code = (
        "import resource, sys\n"
        "from raytune_lora.cli import job\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "sys.exit(job('prepare', sys.argv[2:]))\n"
    )
    where = [f"cache={tmp_path / 'cache'}" if limit == 100 else f"cache={cache}", f"output={tmp_path / 'report'}"]
    command = [sys.executable, "-c", code, str(limit), "model=tiny", "data=fake", *where]
    if limit > 100:
        assert job("prepare", ["model=tiny", "data=fake", where[0]]) == 0
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: storage cannot be written (File too large")
    assert done.stderr.endswith("make room or repair it, then start it again\n")
