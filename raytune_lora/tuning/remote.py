"""``raytune-lora submit``: a sweep on a cluster by one command from a laptop, and the way back to it by its name."""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus
from rich.console import Console

from raytune_lora import shadows
from raytune_lora.cluster.bring import bring
from raytune_lora.cluster.pack import LIMIT, collect, listing
from raytune_lora.cluster.submit import Cluster, Forgotten, Submission, SweepJob, Unreachable, waits
from raytune_lora.config.compose import compose
from raytune_lora.config.groups import OWN, own_dir
from raytune_lora.errors import UserError
from raytune_lora.tuning import secrets
from raytune_lora.tuning.elsewhere import check_elsewhere
from raytune_lora.tuning.interrupt import INTERRUPTED
from raytune_lora.tuning.progress import Tally, clock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_SCRIPT = Path("jobs/sweep.py")  # with the package beside it: the code of the working folder is what runs
_LOOKS = 2.0  # seconds between two looks at a job
_RATE = 50_000  # characters a second: each look fetches the whole log


@dataclass(frozen=True)
class Options:
    """What the command line asks for, beside the sweep's own overrides."""

    overrides: list[str] = field(default_factory=list)
    address: str | None = None
    name: str | None = None
    detach: bool = False
    resume: str | None = None  # names of sweeps
    stop: str | None = None
    status: str | None = None
    logs: str | None = None
    all: bool = False  # list them
    dry_run: bool = False
    env: list[str] = field(default_factory=list)  # names of variables that go along
    driver_resource: str | None = None
    limit: int = LIMIT  # megabytes of the working folder
    to: str | None = None  # local folder for the results; None: sweeps/<name>


def remote(options: Options, program: str) -> int:
    """Do what the options ask for.

    Args:
        options: as typed.
        program: as typed, to say how to come back.

    Returns:
        The exit status: 0 well or detached, 1 the sweep failed, 2 it was the user's mistake, 130 it was stopped, or its
        machine taken away.

    Raises:
        UserError: it cannot be done; nothing was started.
    """
    found = [name for name in (options.stop, options.status, options.logs) if name is not None]
    if len(found) + (options.resume is not None) + options.all > 1:
        raise UserError("--resume, --stop, --status, --logs and --list: take one of them")
    if (found or options.all) and options.overrides:
        raise UserError(f"{options.overrides[0]}: --stop, --status, --logs and --list take no overrides")
    if not (found or options.all):
        return _submit(options, program)
    cluster = Cluster(options.address)
    if options.all:
        _list(cluster)
        return 0
    job = cluster.get(found[0])
    if options.stop is not None:
        return _stop(cluster, job, program)
    if options.status is not None:
        print(_in_short(job, Tally(job.facts["trials"], cluster.log(job))))
        return 0
    return _follow(cluster, job, options, program)


def _submit(options: Options, program: str) -> int:
    root = Path.cwd()
    cluster, overrides = None, options.overrides
    if options.resume is not None:
        cluster = Cluster(options.address)
        if not overrides:
            options = _as_before(options, cluster.get(options.resume).facts)
            overrides = options.overrides
    if given := [o for o in overrides if o.partition("=")[0].lstrip("+") == "resume"]:
        raise UserError(f"{given[0]}: to go on with a sweep by its name, --resume <name>")
    if any(secrets.looks_secret(override) for override in overrides):
        keys = ", ".join(o.partition("=")[0] for o in overrides if secrets.looks_secret(o))
        raise UserError(f"{keys}: a secret in the command would be shown by the dashboard; pass it by --env NAME")
    cfg = compose(overrides)
    if found := shadows.problems(str(root), [str(root), *sys.path]):  # a job finds modules in its working folder first
        raise UserError(found)
    files = check_elsewhere(cfg, root)
    name = _name(options, str(cfg.output))
    env = _environment(options.env, root)
    package = collect(root, files, options.limit)
    if not options.detach and not options.dry_run:
        _target(options, name)
    command = [*_command(root), *overrides, *(["resume=auto"] if options.resume is not None else [])]
    sweep = Submission(
        name, shlex.join(command), overrides, str(cfg.output), env, options.driver_resource, cfg.search.trials
    )
    if options.dry_run:
        print(listing(package), f"command: {sweep.entrypoint}", f"name:    {name}", sep="\n")
        return 0
    cluster = cluster or Cluster(options.address)
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder) / "package.zip"
        package.write(packed)
        job = cluster.submit(sweep, packed)
    print(f"{name}: submitted as job {job.id} to {cluster.address}; {len(package.files)} files, {package.size:,} bytes")
    if options.detach:
        print(_way_back(cluster, name, program))
        return 0
    return _follow(cluster, job, options, program)


def _as_before(options: Options, facts: dict[str, Any]) -> Options:
    """What a sweep was submitted with; the values of the variables that went along are taken from here."""
    return replace(
        options,
        overrides=facts["overrides"],
        env=options.env or [name for name in facts["env"] if name != OWN],
        driver_resource=options.driver_resource or facts["resource"],
    )


def _command(root: Path) -> list[str]:
    own = (root / _SCRIPT).is_file() and (root / "raytune_lora").is_dir()
    return ["python", str(_SCRIPT)] if own else ["raytune-lora", "sweep"]


def _name(options: Options, output: str) -> str:
    name = options.resume or options.name or output.rstrip("/").rpartition("/")[2]
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name}: a name has letters, digits, and . _ - within, at most 63 of them")
    return name


def _environment(names: Sequence[str], root: Path) -> dict[str, str]:
    if wrong := [name for name in names if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
        raise UserError(
            f"--env takes the name of a variable that is set here, and not its value (got {len(wrong)} others)"
        )
    if unset := [name for name in names if name not in os.environ]:
        raise UserError(f"--env {unset[0]}: no such variable is set here")
    if names:
        print(
            f"--env {' '.join(names)}: Ray writes what it is passed into logs of its own on the nodes, and shows it "
            "to whoever has the cluster's token; a Kubernetes Secret in the pods' environment stays out of both"
        )
    return {name: os.environ[name] for name in names} | _own_groups(root)


def _own_groups(root: Path) -> dict[str, str]:
    """The variable that names the user's own config groups, as a job finds them in its working folder."""
    folder = own_dir()
    if folder is None:
        return {}
    if not folder.is_relative_to(root):
        raise UserError(f"{OWN}={folder} lies outside of {root}, which goes to the cluster; move it there")
    return {OWN: str(folder.relative_to(root))}


def _target(options: Options, name: str) -> Path:
    target = Path(options.to or f"sweeps/{name}").expanduser().absolute()
    if target.exists():
        raise UserError(
            f"--to {target}: it is there already, and nothing is overwritten; name another folder for the results, or "
            "--detach and fetch them later"
        )
    return target


def _stop(cluster: Cluster, job: SweepJob, program: str) -> int:
    if job.ended:
        print(f"{job.name}: it has ended already ({job.status.value.lower()})")
        return 0
    cluster.stop(job)
    print(f"{job.name}: asked to stop; it writes its results and ends")
    print(f"to go on with it: {program} --resume {job.name} --address {cluster.address}")
    return 0


# ------------------------------------------------------------------------------------------------------------ following


def _follow(cluster: Cluster, job: SweepJob, options: Options, program: str) -> int:
    """Show a job until it ends, and fetch what it found."""
    target = _target(options, job.name)
    console = Console(highlight=False, markup=False, emoji=False)
    tally = Tally(job.facts["trials"])
    try:
        with console.status(f"{job.name}: {job.status.value.lower()}") as spinner:
            job = _until_ended(cluster, job, tally, console, spinner.update)
        print(_in_short(job, tally))
        if job.status.value != "SUCCEEDED":
            print(f"to go on with it: {program} --resume {job.name} --address {cluster.address}")
            stopped = INTERRUPTED if job.status is JobStatus.STOPPED else 1
            return job.exit_code if job.exit_code in (2, INTERRUPTED) else stopped
        left = bring(cluster, job.name, job.facts, target)
    except KeyboardInterrupt:
        print(_way_back(cluster, job.name, program))
        return 0
    except Forgotten as error:
        print(f"{job.name}: {error}: its head was started again, and the sweep ended with it; {tally}")
        print(f"to go on with it: {_again(cluster, job, program)}")
        return 1
    print(f"results: {target}")
    if left:
        print(f"too big to be fetched: {', '.join(left)}; on the cluster: {job.facts['output']}")
    return 0


def _until_ended(
    cluster: Cluster, job: SweepJob, tally: Tally, console: Console, show: Callable[[str], None]
) -> SweepJob:
    told, waiting = 0, waits()
    while True:
        try:
            job, log = cluster.look(job)
            waiting = waits()
        except Unreachable as error:
            wait = next(waiting)
            said = f"{cluster.address} does not answer ({error}); the sweep goes on; trying again in {wait:.0f} s"
            show(said)
            if not console.is_terminal:
                print(said, flush=True)
            time.sleep(wait)
            continue
        whole = log if job.ended else log[: log.rfind("\n") + 1]
        for words in whole[told:].splitlines():
            tally.add(words)
            console.print(words, soft_wrap=True)
        told = len(whole)
        if job.ended:
            return job
        show(_in_short(job, tally))
        time.sleep(max(_LOOKS, len(log) / _RATE))


def _in_short(job: SweepJob, tally: Tally) -> str:
    seconds = (job.finished or time.time()) - job.began
    why = f"; {job.message.strip().splitlines()[0]}" if job.status.value == "FAILED" and job.message.strip() else ""
    return f"{job.name}: {job.status.value.lower()}, {clock(max(0.0, seconds))}; {tally}{why}"


def _again(cluster: Cluster, job: SweepJob, program: str) -> str:
    """The command that goes on with a sweep of which the cluster knows nothing any more."""
    facts = job.facts
    options = [part for name in facts["env"] if name != OWN for part in ("--env", name)]
    options += ["--driver-resource", facts["resource"]] if facts["resource"] else []
    return f"{program} --resume {job.name} --address {cluster.address} {shlex.join([*facts['overrides'], *options])}"


def _list(cluster: Cluster) -> None:
    """All sweeps of the cluster, a line each, the newest first."""
    jobs = cluster.sweeps()
    for job in jobs:
        print(_in_short(job, Tally(job.facts["trials"], cluster.log(job))))
    if not jobs:
        print(f"{cluster.address} knows of no sweep")


def _way_back(cluster: Cluster, name: str, program: str) -> str:
    back = f"--address {cluster.address}"
    return "\n".join(
        [
            f"{name}: the sweep goes on without this machine",
            f"to follow it, and fetch its results: {program} --logs {name} {back}",
            f"to stop it:                          {program} --stop {name} {back}",
        ]
    )
