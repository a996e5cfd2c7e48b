"""The journal in a store: its parts, who may write them, and what a driver that was given up leaves."""

from __future__ import annotations

import json
import secrets
import threading
import time
from pathlib import Path

import pytest

from raytune_lora import storage
from raytune_lora.errors import JobFailed, StorageError, UserError
from raytune_lora.tuning import claim, parts
from raytune_lora.tuning.claim import OWNER, Claim, lives
from raytune_lora.tuning.parts import Parts, read
from raytune_lora.tuning.trials import Journal

LEASE = 1.6  # seconds


@pytest.fixture
def uri() -> str:
    return f"memory://{secrets.token_hex(4)}/sweep"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "_SETTLES", 0.05)


def names(uri: str) -> list[str]:
    return [name.partition(".")[0] for name in storage.sizes(uri)]


def fill(journal: Parts, first: int, count: int) -> None:
    for number in range(first, first + count):
        journal.append(b"%d\n" % number)


def numbers(uri: str) -> list[int]:
    return [int(line) for line in read(uri).splitlines()]


# ---------------------------------------------------------------------------------------------------------------- parts


def test_events_are_objects_and_become_one_when_a_sweep_goes_on(uri: str) -> None:
    first = Parts(uri, "000001-a")
    assert first.open() == b""
    fill(first, 0, 3)
    assert names(uri) == ["00000000-00000000", "00000001-00000001", "00000002-00000002"]
    second = Parts(uri, "000002-b")
    assert second.open() == b"0\n1\n2\n"
    second.cleaning.join(20)
    assert names(uri) == ["00000000-00000002"]
    fill(second, 3, 2)
    assert numbers(uri) == list(range(5))
    third = Parts(uri, "000003-c")
    third.open()
    third.cleaning.join(20)
    assert names(uri) == ["00000000-00000002", "00000003-00000004"]


def test_many_events_become_one_while_they_come(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_MANY", 4)
    journal = Parts(uri, "000001-a")
    journal.open()
    fill(journal, 0, 10)
    journal.cleaning.join(20)
    assert names(uri) == [*("00000000-00000003", "00000004-00000007"), "00000008-00000008", "00000009-00000009"]
    assert numbers(uri) == list(range(10))


def test_a_missing_or_damaged_part_is_told(uri: str) -> None:
    journal = Parts(uri, "000001-a")
    journal.open()
    fill(journal, 0, 3)
    storage.write(f"{uri}/00000001-00000001.000001-a.jsonl", b"1")
    with pytest.raises(StorageError, match=r"00000001-00000001\.000001-a\.jsonl is damaged"):
        read(uri)
    storage.delete(f"{uri}/00000001-00000001.000001-a.jsonl")
    with pytest.raises(StorageError, match="event 1 of the journal is missing"):
        Parts(uri, "000002-b").open()
    assert len(names(uri)) == 2, "nothing is repaired"


def test_a_kill_between_the_whole_and_the_end_of_its_parts_loses_nothing(uri: str) -> None:
    journal = Parts(uri, "000001-a")
    journal.open()
    fill(journal, 0, 4)
    storage.write(f"{uri}/00000000-00000002.000001-a.jsonl", b"0\n1\n2\n")
    storage.delete(f"{uri}/00000001-00000001.000001-a.jsonl")
    assert numbers(uri) == [0, 1, 2, 3]
    again = Parts(uri, "000002-b")
    assert again.open() == b"0\n1\n2\n3\n"
    again.cleaning.join(20)
    assert names(uri) == ["00000000-00000002", "00000003-00000003"]


def test_what_a_driver_writes_after_it_was_given_up_never_happened(uri: str) -> None:
    old, new = Parts(uri, "000001-z"), Parts(uri, "000002-a")
    old.open()
    fill(old, 0, 2)
    new.open()
    old.append(b"77\n")
    fill(new, 2, 2)
    old.append(b"78\n")
    old.append(b"79\n")
    assert numbers(uri) == [0, 1, 2, 3]
    assert Parts(uri, "000003-b").open() == b"0\n1\n2\n3\n"
    assert numbers(uri) == [0, 1, 2, 3]


def test_a_journal_is_that_of_the_store_and_an_event_is_there_before_it_is_known(tmp_path: Path, uri: str) -> None:
    file = tmp_path / "journal.jsonl"
    file.write_text('{"event": "phase", "name": "of another time"}\n')
    journal = Journal(file, parts=Parts(uri, "000001-a"))
    assert journal.record.phases == {}
    journal.append("phase", name="prepare", seconds=1.0)
    assert read(uri) == file.read_bytes()

    lost: list[Exception] = []

    def check() -> None:
        for error in lost:
            raise error

    other = Journal(tmp_path / "other.jsonl", parts=Parts(uri, "000002-b", check))
    assert list(other.record.phases) == ["prepare"]
    lost.append(StorageError("another may write"))
    with pytest.raises(StorageError):
        other.append("phase", name="baseline", seconds=1.0)
    assert list(other.record.phases) == ["prepare"]
    assert read(uri) == file.read_bytes() == (tmp_path / "other.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------------- claim


def taken(uri: str, copy: str = "first") -> Claim:
    made = Claim(uri, copy, LEASE, lambda _line: None)
    made.take()
    return made


def test_a_living_driver_is_alone(uri: str) -> None:
    first = taken(uri)
    time.sleep(LEASE)
    first.check()
    said: list[str] = []
    with pytest.raises(UserError, match=r"process \d+ on .* \(since .* is working in memory.*given up after 1.6 s"):
        Claim(uri, "second", LEASE, said.append).take()
    assert "waiting up to 2 s" in said[0]
    assert lives(uri)
    first.check()
    first.release()
    assert lives(uri) is False
    began = time.monotonic()
    second = taken(uri, "second")
    assert time.monotonic() - began < LEASE / 2, "what was given back is free at once"
    assert second.label > first.label
    second.release()


def test_a_dead_driver_is_given_up_and_stops_by_itself(uri: str) -> None:
    first = taken(uri)
    first._ending.set()  # as where its machine hangs
    second = taken(uri, "second")
    with pytest.raises(StorageError, match="has taken no sign of life"):
        first.check()
    second.check()
    assert json.loads(storage.read(f"{uri}/{OWNER}") or b"")["copy"] == "second"
    second.release()


def test_a_driver_hears_of_a_silent_store_without_asking(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Exception] = []
    claim = Claim(uri, "first", LEASE, lambda _line: None, found.append)
    claim.take()
    time.sleep(LEASE)
    assert not found
    monkeypatch.setattr(storage, "write", lambda *_: time.sleep(3 * LEASE))
    time.sleep(LEASE)
    assert "has taken no sign of life" in str(found[0])
    time.sleep(LEASE)
    assert len(found) == 1
    claim.release()


def test_a_driver_that_died_in_the_same_working_copy_need_not_be_waited_for(uri: str) -> None:
    first = taken(uri)
    first._ending.set()
    began = time.monotonic()
    taken(uri, "first").release()
    assert time.monotonic() - began < LEASE / 2


def test_a_driver_sees_that_another_has_taken_over(uri: str) -> None:
    first = taken(uri)
    storage.write(f"{uri}/{OWNER}", json.dumps(first._facts | {"token": "other", "host": "elsewhere"}).encode())
    time.sleep(LEASE / 2)
    with pytest.raises(JobFailed, match=r"another driver has taken over .* on elsewhere"):
        first.check()
    first.release()
    assert json.loads(storage.read(f"{uri}/{OWNER}") or b"")["token"] == "other"


def test_of_two_that_come_at_once_one_is_refused(uri: str) -> None:
    meet, found = threading.Barrier(2), list[Claim | Exception]()

    def come(copy: str) -> None:
        meet.wait(10)
        try:
            found.append(taken(uri, copy))
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=come, args=(copy,)) for copy in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(one).__name__ for one in found) == ["Claim", "Passing"]
    for one in found:
        if isinstance(one, Claim):
            one.check()
            one.release()
