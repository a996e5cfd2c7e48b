"""Sweeps as jobs of a Ray cluster, found again by their names: a thin layer over Ray's job API.

A sweep's jobs carry its name and its command in their metadata, so that any machine that reaches the dashboard can
follow, stop or resume it. The metadata, the entrypoint and ``runtime_env`` are no place for secrets: whoever holds the
cluster's token can read them (Ray 2.60 hides the values of ``env_vars`` from browsers alone).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from raytune_lora.cluster.addresses import VARIABLES, dashboard, token_refused
from raytune_lora.errors import UserError
from raytune_lora.names import plain

_PREFIX = "raytune-lora"  # of job ids, and the metadata's key of the sweep's name
_TIMES = (5.0, 60.0)  # seconds to connect, and between two bytes of an answer: a lid may be closed at any time
_WAITS = (1.0, 30.0)  # seconds before the first and the later tries to reach the dashboard again
# Ctrl-C, at which a sweep ends in order, rather than an end after three seconds; read by Ray where the driver starts
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
# of a custom resource: it says where drivers run, and how many at once; a little is left for small jobs beside them
_DRIVER, _SMALL = 0.99, 0.001
_FACTS: dict[str, type | tuple[type, ...]] = {
    "overrides": list,
    "output": str,
    "env": list,
    "resource": (str, type(None)),
    "trials": int,
}

T = TypeVar("T")


@dataclass(frozen=True)
class Submission:
    """What a sweep's job is made of."""

    name: str
    entrypoint: str
    overrides: list[str]  # as typed, to resume by
    output: str  # the sweep's folder, as the cluster sees it
    env: dict[str, str]  # secrets among them: they go into the driver's and the workers' environment
    resource: str | None = None  # custom resource of the nodes that may run the driver, which takes one; None: the head
    trials: int = 0


@dataclass(frozen=True)
class SweepJob:
    """A job of the cluster that runs, or ran, a sweep."""

    id: str
    name: str
    status: JobStatus
    message: str
    began: float  # seconds since 1970, by the cluster's clock
    finished: float | None
    exit_code: int | None
    facts: dict[str, Any]  # ``overrides``, ``output``, ``resource``, ``trials``, ``env`` (names)

    @property
    def ended(self) -> bool:
        return self.status.is_terminal()


def waits() -> Iterator[float]:
    """Seconds to wait before each new try: twice as long each time, up to half a minute, without end."""
    wait = _WAITS[0]
    while True:
        yield wait
        wait = min(2 * wait, _WAITS[1])


class Unreachable(Exception):
    """The dashboard did not answer this time."""


class Forgotten(UserError):
    """The cluster has no such job: its head was started again."""


class _Client(JobSubmissionClient):
    """Ray's client, which would wait for ever for an answer that a network lost."""

    def _do_request(self, *arguments: Any, **settings: Any) -> requests.Response:
        settings.setdefault("timeout", _TIMES)
        return super()._do_request(*arguments, **settings)


class Cluster:
    """The jobs of a Ray cluster, through its dashboard."""

    def __init__(self, address: str | None) -> None:
        """
        Args:
            address: as ``addresses.dashboard`` takes it.

        Raises:
            UserError: it is none, nothing answers there, or it wants another token.
        """
        self.address = dashboard(address)
        logging.getLogger("ray").setLevel(logging.ERROR)
        for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.authentication.http_token_authentication"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with _unset(VARIABLES):  # Ray would go where they say
                self._client = self._ask(lambda: _Client(self.address))
        except Unreachable as error:
            raise UserError(
                f"--address {self.address}: no Ray dashboard answers there ({error}); is the cluster up, and forwarded "
                "(kubectl port-forward service/<cluster>-head-svc 8265:8265)?"
            ) from error

    def submit(self, sweep: Submission, package: Path) -> SweepJob:
        """Start a sweep's job.

        Args:
            sweep: what it is.
            package: zip file of its working folder.

        Raises:
            UserError: a sweep of that name is running, or the cluster refuses the job.
        """
        facts = {
            "env": sorted(sweep.env),
            "overrides": sweep.overrides,
            "output": sweep.output,
            "resource": sweep.resource,
            "trials": sweep.trials,
        }
        earlier = self.find(sweep.name)
        if running := next((job for job in earlier if not job.ended), None):
            raise UserError(_twice(sweep.name, running.status.value.lower()))
        number = 1 + max((int(job.id.rpartition(".")[2]) for job in earlier), default=0)
        environment = {"working_dir": str(package), "env_vars": {**_STOPPING, **sweep.env}}
        metadata = {_PREFIX: sweep.name, "facts": json.dumps(facts)}
        job_id = f"{_PREFIX}-{sweep.name}.{number}"
        try:
            self._start(job_id, sweep.entrypoint, environment, metadata, _share(sweep.resource, _DRIVER))
        except UserError as error:
            if "already exists" in str(error):  # another took the same number at the same moment
                raise UserError(_twice(sweep.name, "pending")) from None
            raise
        return self.get(sweep.name)

    def run(self, name: str, entrypoint: str, resource: str | None) -> str:
        """Run a small job to its end and return its log; it is not one of a sweep's.

        Raises:
            UserError: it failed.
        """
        job_id = f"{_PREFIX}-{name}-{time.time_ns()}"
        self._start(job_id, entrypoint, {}, {}, _share(resource, _SMALL))
        while not (status := self.patiently(lambda: self._client.get_job_status(job_id))).is_terminal():
            time.sleep(_WAITS[0])
        log: str = self.patiently(lambda: self._client.get_job_logs(job_id))
        self.patiently(lambda: self._client.delete_job(job_id))
        if status is not JobStatus.SUCCEEDED:
            raise UserError(f"the job {job_id} failed: {log.strip().splitlines()[-1] if log.strip() else status.value}")
        return log

    def find(self, name: str) -> list[SweepJob]:
        """The jobs of a sweep, the newest first."""
        return [job for job in self._jobs() if job.name == name]

    def sweeps(self) -> list[SweepJob]:
        """The newest job of each sweep, the newest first."""
        found: dict[str, SweepJob] = {}
        for job in self._jobs():
            found.setdefault(job.name, job)
        return list(found.values())

    def _jobs(self) -> list[SweepJob]:
        """The jobs of all sweeps, the newest first."""
        jobs = map(sweep_job, self.patiently(self._client.list_jobs))
        return sorted((job for job in jobs if job is not None), key=lambda job: job.began, reverse=True)

    def get(self, name: str) -> SweepJob:
        """The newest job of a sweep.

        Raises:
            UserError: there is none.
        """
        if found := self.find(name):
            return found[0]
        names = sorted(job.name for job in self.sweeps())
        raise UserError(f"there is no sweep {name} at {self.address}; there are: {', '.join(names) or 'none'}")

    def look(self, job: SweepJob) -> tuple[SweepJob, str]:
        """A job as it is now, and its whole log.

        Raises:
            Unreachable: the dashboard does not answer.
            Forgotten: the cluster has no such job.
            UserError: the token is refused.
        """
        # the log after the status: of a job that has ended it is whole
        now = sweep_job(self._ask(lambda: self._client.get_job_info(job.id)))
        if now is None:
            raise Forgotten(f"{self.address} has another job by the name {job.id}")
        return now, self._ask(lambda: self._client.get_job_logs(job.id))

    def log(self, job: SweepJob) -> str:
        """All that a job has printed."""
        return self.patiently(lambda: self._client.get_job_logs(job.id))

    def stop(self, job: SweepJob) -> None:
        """Ask a job to end in order."""
        self.patiently(lambda: self._client.stop_job(job.id))

    def patiently(self, ask: Callable[[], T], tries: int = 5) -> T:
        """Ask the dashboard, and again where it does not answer.

        Raises:
            UserError: it did not in all the tries, or refuses the question.
        """
        for wait in waits():
            try:
                return self._ask(ask)
            except Unreachable as error:
                tries -= 1
                if not tries:
                    raise UserError(f"{self.address} does not answer any more ({error}); try again later") from error
                time.sleep(wait)
        raise AssertionError("the waits have no end")

    def _start(
        self,
        job_id: str,
        entrypoint: str,
        environment: Mapping[str, Any],
        metadata: Mapping[str, str],
        resources: dict[str, float] | None,
    ) -> None:
        try:
            self._ask(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=dict(environment),
                    metadata=dict(metadata),
                    entrypoint_num_cpus=0,
                    entrypoint_resources=resources,
                )
            )
        except Unreachable as error:
            raise UserError(
                f"{self.address} did not answer when the job was handed over ({error}); --status tells whether it runs"
            ) from error

    def _ask(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except AuthenticationError as error:
            sent = "invalid" in str(error).lower()
            raise UserError(token_refused(f"--address {self.address}", sent=sent)) from None
        except (ConnectionError, requests.RequestException) as error:
            raise Unreachable(type(error).__name__) from None
        except RuntimeError as error:
            # a gateway before the dashboard, or the dashboard while its head starts again
            if any(f"status code {code}" in str(error) for code in (502, 503, 504)):
                raise Unreachable(str(error).splitlines()[0]) from None
            if "status code 404" in str(error):
                raise Forgotten(f"{self.address} knows of no such job") from None
            raise UserError(f"{self.address}: {str(error).strip().splitlines()[-1]}") from error


def _share(resource: str | None, share: float) -> dict[str, float] | None:
    return None if resource is None else {resource: share}


@contextlib.contextmanager
def _unset(variables: Iterable[str]) -> Iterator[None]:
    held = {name: os.environ.pop(name) for name in variables if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(held)


def sweep_job(job: Any) -> SweepJob | None:
    """A job of Ray's as one of a sweep; None where it is none, as whoever uses the cluster may give a job our keys.

    Args:
        job: ``ray.job_submission.JobDetails``.
    """
    metadata = job.metadata or {}
    name: str | None = metadata.get(_PREFIX)  # results go to a folder of that name
    try:
        facts = json.loads(metadata.get("facts", ""))
        known = isinstance(facts, dict) and all(isinstance(facts.get(key), kind) for key, kind in _FACTS.items())
    except ValueError:
        known = False
    if not (known and job.submission_id and plain(name)):
        return None
    return SweepJob(
        id=job.submission_id,
        name=str(name),
        status=job.status,
        message=job.message or "",
        began=(job.start_time or 0) / 1000,
        finished=job.end_time / 1000 if job.end_time else None,
        exit_code=job.driver_exit_code,
        facts=facts,
    )


def _twice(name: str, state: str) -> str:
    return (
        f"--name {name}: a sweep of that name is {state}; follow it with --logs {name}, stop it with --stop {name}, or "
        "take another --name"
    )
