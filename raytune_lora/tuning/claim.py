"""Who may write to a sweep in an object store: one driver, for as long as it shows that it lives.

The driver puts an object into the store that names it, and changes it every few seconds. Another driver watches the
object: where it changes, its owner lives, and the other is refused; where it does not for as long as its owner
promised, the owner is given up. No clock is compared with another. An owner that could not change its object in time
stops, before anybody gives it up. pyarrow's clients cannot put an object only where there is none, so that two drivers
that come at once put theirs, wait and look whose is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from raytune_lora import storage
from raytune_lora.errors import JobFailed, Passing, StorageError
from raytune_lora.working_copy import as_trouble

OWNER = "owner.json"
_BEATS = 8  # within the time after which an owner is given up
_SAFE = 0.75  # of that time: without a beat for so long, an owner stops
_SETTLES = 1.0  # seconds until what two drivers put at once is one of theirs, for both


class Claim:
    """A driver's claim to a sweep."""

    def __init__(
        self,
        uri: str,
        copy: str,
        lease: float,
        tell: Callable[[str], None],
        lost: Callable[[Exception], None] = lambda _why: None,
    ) -> None:
        """
        Args:
            uri: of the sweep.
            copy: stands for this node's working copy, whose lock is held.
            lease: seconds without a sign of life after which others may give this driver up.
            tell: called with what people should know.
            lost: called once with what ``check`` would raise, whether or not anybody checks.
        """
        self._uri = uri
        self._at = storage.join(uri, OWNER)
        self._tell = tell
        self._say_lost = lost
        self._facts: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.time(),  # by this machine's clock: for people
            "copy": copy,
            "lease": lease,
            "beat": 0,
        }
        self._lost: Exception | None = None
        self._sign = 0.0  # when the last beat that arrived was begun
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._see)]

    @property
    def label(self) -> str:
        """Sorts after those of all drivers before."""
        return f"{self._facts['number']:06d}-{self._facts['token']}"

    def take(self) -> None:
        """Claim the sweep.

        Raises:
            Passing: another driver works on it.
            StorageError: the store refuses or does not answer.
        """
        known = _owner(self._uri)
        # the lock of the same working copy is held here, so that its owner of then has died
        if known is not None and not known.get("released") and known["copy"] != self._facts["copy"]:
            self._watch(known)
        self._facts["number"] = 1 + (known["number"] if known is not None else 0)
        self._sign = time.monotonic()
        self._put()
        time.sleep(_SETTLES)
        if (now := _owner(self._uri)) is None or now["token"] != self._facts["token"]:
            raise Passing(self._refusal(now or self._facts))
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """See that the sweep is still this driver's.

        Raises:
            StorageError: the store takes no sign of life, so that another driver may soon have it.
            JobFailed: another driver has it.
        """
        silent = time.monotonic() - self._sign
        if self._lost is None and silent > _SAFE * self._facts["lease"]:
            self._lost = StorageError(
                f"{storage.shown(self._uri)} has taken no sign of life for {silent:.0f} s (cluster.lease="
                f"{self._facts['lease']:g}), so that another driver may go on with the sweep"
            )
        if self._lost is not None:
            raise self._lost

    def release(self) -> None:
        """Let others have the sweep at once."""
        self._ending.set()
        if self._threads[0].ident is not None:
            for thread in self._threads:
                thread.join()
            if self._lost is None:
                with contextlib.suppress(StorageError):
                    self._facts["released"] = True
                    self._put()

    def _put(self, patience: storage.Patience = storage.PATIENT) -> None:
        with as_trouble():
            storage.write(self._at, json.dumps(self._facts, indent=2).encode(), patience)

    def _beat(self) -> None:
        while not self._ending.wait(self._facts["lease"] / _BEATS):
            began = time.monotonic()
            with contextlib.suppress(StorageError):  # ``check`` sees how long there was none
                now = _owner(self._uri, storage.QUICK)
                if now is not None and now["token"] != self._facts["token"]:
                    self._lost = JobFailed(f"another driver has taken over {storage.shown(self._uri)}: {_named(now)}")
                if self._lost is not None:
                    return
                self._facts["beat"] += 1
                self._put(storage.QUICK)
                self._sign = began

    def _see(self) -> None:
        """Notice a loss while nothing is written: the store may not even refuse."""
        while not self._ending.wait(self._facts["lease"] / _BEATS):
            try:
                self.check()
            except (StorageError, JobFailed) as why:
                self._say_lost(why)
                return

    def _watch(self, known: dict[str, Any]) -> None:
        """Wait until it is plain whether an owner lives.

        Raises:
            Passing: it does.
        """
        self._tell(f"waiting up to {known['lease']:.0f} s to see whether {_named(known)} still works on it")
        deadline = time.monotonic() + known["lease"]
        while time.monotonic() < deadline:
            time.sleep(min(1.0, known["lease"] / _BEATS))
            now = _owner(self._uri)
            if now is None or now.get("released"):
                return
            if (now["token"], now["beat"]) != (known["token"], known["beat"]):
                raise Passing(self._refusal(now))

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"output: {_named(owner)} is working in {storage.shown(self._uri)}; wait for it, or use another folder "
            f"(one that dies is given up after {owner['lease']:g} s)"
        )


def lives(uri: str) -> bool | None:
    """Whether a driver works on a sweep, found by watching; None where the store does not say."""
    try:
        known = now = _owner(uri, storage.QUICK)
        deadline = time.monotonic() + (2 * known["lease"] / _BEATS if known else 0)
        while now is not None and known is not None and not now.get("released"):
            if (now["token"], now["beat"]) != (known["token"], known["beat"]):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(min(1.0, known["lease"] / _BEATS))
            now = _owner(uri, storage.QUICK)
    except StorageError:
        return None
    return False


def _named(owner: dict[str, Any]) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["since"]))
    return f"process {owner['pid']} on {owner['host']} (since {since} by its clock)"


def _owner(uri: str, patience: storage.Patience = storage.PATIENT) -> dict[str, Any] | None:
    with as_trouble():
        content = storage.read(storage.join(uri, OWNER), patience)
    return None if content is None else json.loads(content)
