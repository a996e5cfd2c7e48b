"""A sweep under kills (SIGKILL) of one kind, and what each kill costs.

    python jobs/bench/kills.py driver --kills 10
    python jobs/bench/kills.py worker --trials 20 --every 20    # the process that trains
    python jobs/bench/kills.py machine --trials 20 --every 20   # all processes of a machine; another one comes
    python jobs/bench/kills.py pause --trials 20 --every 40     # SIGSTOP to all processes of a machine, for a while
    python jobs/bench/kills.py head --kills 3                   # head and driver, as of a RayJob; all are started again

All but the first have a cluster on this machine: a head without CPUs, and machines that are a ``ray start`` each. With
``--skew 3600`` the machines' clocks are wrong by as many seconds, ahead and behind in turn (libfaketime).

Where the sweep's own process dies, the moments are drawn over the journal's events, so that each sitting gets somewhere
on a fast machine and on a slow one: after a few events, and then after a random part of the time between two of them.
Nothing is waited for between such a kill and the next start. The other kills come every so many seconds, whatever the
sweep does then. At the end the sweep is let through, and its journal is compared with what was asked for.

What a kill costs: ``lost`` are seconds of steps that were done again, over all kills; ``recovery`` are seconds until
the trials that a kill hit were training again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

JOB = Path(__file__).resolve().parents[1] / "sweep.py"
RAY = str(Path(sys.executable).parent / "ray")
DRIVER, WORKER, MACHINE, PAUSE, HEAD = KINDS = "driver", "worker", "machine", "pause", "head"
SWEEP = (
    "experiment=tiny",
    "scheduler=none",
    "training.patience=null",
    "training.global_batch=8",
    "training.max_steps=60",
    "evaluation.every=80",
    "evaluation.loss_rows=8",
    "evaluation.generate_rows=0",
    "cluster.retries=1000",
)
LIMIT = 300  # seconds in which something must happen to the sweep
PAUSED = 15.0  # seconds; the cluster gives a machine up after six
NOTICING = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 5,
    "health_check_timeout_ms": 1000,
}


# ------------------------------------------------------------------------------------------------------ what is known


def events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal that are about trials."""
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [event for event in map(json.loads, lines) if event["event"].startswith("trial_")]


def running(folder: Path) -> list[str]:
    """The trials that have started and not ended."""
    found = dict.fromkeys(event["trial_id"] for event in events(folder) if event["event"] == "trial_started")
    for event in events(folder):
        if event["event"] == "trial_ended":
            found.pop(event["trial_id"], None)
    return list(found)


def steps(folder: Path, trial: str) -> list[dict[str, Any]]:
    """All that a trial did, what it did again too; a line that a kill cut is none."""
    file, found = folder / "trials" / trial / "steps.jsonl", []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def redone(folder: Path) -> float:
    """Seconds of the steps that had been done before."""
    lost = 0.0
    for trial in (folder / "trials").iterdir():
        seen = set()
        for step in steps(folder, trial.name):
            lost += (step.get("step_seconds") or 0.0) if step["step"] in seen else 0.0
            seen.add(step["step"])
    return lost


def trainer(folder: Path, trial: str) -> int:
    """The process that trains a trial, by its log; 0 where none does yet."""
    log = folder / "trials" / trial / "logs" / "worker-0.log"
    found = re.findall(r"^worker 0 of \d+, process (\d+)$", log.read_text(), re.MULTILINE) if log.exists() else []
    return int(found[-1]) if found else 0


@dataclass
class Kill:
    """One kill, and what came of the trials that it hit."""

    hit: dict[str, int]  # by trial, the steps that were known of it
    moment: float = field(default_factory=time.monotonic)
    recovery: float | None = None  # seconds until all of them trained again; None: one of them never did

    def look(self, folder: Path) -> None:
        """See whether they train again."""
        if self.hit and self.recovery is None and all(len(steps(folder, t)) > known for t, known in self.hit.items()):
            self.recovery = round(time.monotonic() - self.moment, 2)


# ---------------------------------------------------------------------------------------------------------- processes


class Tree:
    """A process and all that it started."""

    def __init__(self, *command: str, **settings: Any) -> None:
        self.process = subprocess.Popen(command, start_new_session=True, **settings)

    def send(self, number: signal.Signals) -> set[int]:
        """Signal all of it; the processes that were there."""
        return {process.pid for process in self._signal(number)}

    def end(self) -> set[int]:
        """Kill all of it, and wait until it is gone; the processes that were there."""
        self._signal(signal.SIGSTOP)  # so that none of them starts another one meanwhile
        tree = self._signal(signal.SIGKILL)
        self.process.wait()
        until = time.monotonic() + 30
        while any(map(lives, tree)) and time.monotonic() < until:
            time.sleep(0.02)
        return {process.pid for process in tree}

    def _signal(self, number: signal.Signals) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            tree = [root, *root.children(recursive=True)]
            for process in tree:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)
            return tree
        return []


def lives(process: psutil.Process) -> bool:
    """Whether a process still does anything; one that nobody has asked about since its end does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Cluster:
    """A head without CPUs, and machines, whose clocks may be wrong."""

    def __init__(self, home: Path, machines: int, skew: int = 0) -> None:
        self._home, self._port, self._count, self._skew = home, free_port(), machines, skew
        self.address = f"127.0.0.1:{self._port}"
        self.machines: list[Tree] = []
        self._changes = threading.Lock()  # held while a machine starts or the cluster ends
        self._closed = False
        self.start()

    def start(self) -> None:
        """The head, and its machines."""
        self._closed = False
        head = ("--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false")
        self.head = self._node(*head, f"--temp-dir={self._home}", f"--system-config={json.dumps(NOTICING)}")
        self.machines = []
        while len(self.machines) < self._count:
            self.machines.append(self._add(len(self.machines)))

    def _add(self, place: int) -> Tree:
        clock = wrong_clock(self._skew if place % 2 else -self._skew) if self._skew else {}
        return self._node(f"--address={self.address}", "--num-cpus=1", **clock)

    def _node(self, *arguments: str, **clock: str) -> Tree:
        common = ("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={free_port()}")
        ports = ("--min-worker-port=0", "--max-worker-port=0")
        command = (RAY, "start", "--block", *arguments, *common, *ports, f"--object-store-memory={100 * 2**20}")
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"} | clock
        node = Tree(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert node.process.stdout is not None
        said = []
        for line in node.process.stdout:
            said.append(line.decode())
            if "Ray runtime started" in said[-1]:
                break
        else:
            raise SystemExit("a machine of the cluster did not start:\n" + "".join(said))
        threading.Thread(target=node.process.stdout.read, daemon=True).start()
        return node

    def replace(self, machine: Tree) -> None:
        """Another machine in the place of one that is gone; none where the cluster itself is gone."""
        with self._changes:
            if not self._closed:
                place = self.machines.index(machine)
                self.machines[place] = self._add(place)

    def close(self) -> None:
        """End every machine, also one that is only starting: nothing is left that writes to the cluster's folder."""
        with self._changes:
            self._closed = True
            for tree in (*self.machines, self.head):
                tree.end()


def wrong_clock(seconds: int) -> dict[str, str]:
    """The environment of processes whose time of day is ahead by so many seconds; what measures durations is right."""
    import libfaketime

    _, preload = libfaketime.get_reload_information()
    return {**preload, "FAKETIME": f"{seconds:+d}s"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -------------------------------------------------------------------------------------------------------------- kills


class Trouble:
    """A sweep, and kills of one kind."""

    def __init__(self, kind: str, folder: Path, cluster: Cluster | None, seed: int, *overrides: str) -> None:
        self._kind, self._folder, self._cluster = kind, folder, cluster
        self._draw = random.Random(seed)
        where = () if cluster is None else (f"cluster.address={cluster.address}",)
        self._command = (sys.executable, str(JOB), *overrides, *where, f"output={folder}", "resume=auto")
        self.said = folder.with_name(f"{folder.name}.log")
        self.kills: list[Kill] = []
        self.sweep = self._start()

    def _start(self) -> Tree:
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        with self.said.open("ab") as log:
            return Tree(*self._command, stdout=log, stderr=log, env=environment)

    def run(self, kills: int, every: float) -> int:
        """Let the sweep have its kills, then let it through; its status."""
        moment = self._moment_of_a_sitting if self._kind in (DRIVER, HEAD) else partial(self._moment_in_turn, every)
        while len(self.kills) < kills and moment():
            getattr(self, f"_kill_{self._kind}")()
        self._until(lambda: False, LIMIT * 4)
        return self.sweep.process.wait()

    def _until(self, condition: Callable[[], Any], limit: float = LIMIT) -> bool:
        """Wait, and see what comes of the kills so far; whether the sweep still runs then."""
        began = time.monotonic()
        while self.sweep.process.poll() is None and not condition():
            if time.monotonic() - began > limit:
                self.sweep.end()
                raise SystemExit(f"nothing happened to the sweep in {limit} s")
            for kill in self.kills:
                kill.look(self._folder)
            time.sleep(0.05)
        return self.sweep.process.poll() is None

    def _moment_of_a_sitting(self) -> bool:
        known, wanted, part = len(events(self._folder)), self._draw.randint(1, 6), self._draw.random()
        if not self._until(lambda: len(events(self._folder)) > known):
            return False
        first = time.monotonic()
        if not self._until(lambda: len(events(self._folder)) - known >= wanted):
            return False
        due = time.monotonic() + part * (time.monotonic() - first) / wanted
        return self._until(lambda: time.monotonic() > due)

    def _moment_in_turn(self, every: float) -> bool:
        last = self.kills[-1].moment if self.kills else time.monotonic() - every * self._draw.random()
        return self._until(self._training) and self._until(lambda: time.monotonic() > last + every)

    def _note(self, trials: Iterable[str]) -> None:
        self.kills.append(Kill({trial: len(steps(self._folder, trial)) for trial in trials}))
        print(f"kill {len(self.kills)} at trials {list(self.kills[-1].hit)}", file=sys.stderr)

    def _kill_driver(self) -> None:
        self.sweep.end()
        self._note(running(self._folder))
        self.sweep = self._start()

    def _kill_head(self) -> None:
        """The head, the driver on it, and with them the cluster."""
        assert self._cluster is not None
        self.sweep.end()
        self._cluster.close()
        self._note(running(self._folder))
        self._cluster.start()
        self.sweep = self._start()

    def _kill_worker(self) -> None:
        if not (training := self._training()):
            return
        trial = self._draw.choice(training)
        with contextlib.suppress(ProcessLookupError):  # its group was replaced just now
            os.kill(trainer(self._folder, trial), signal.SIGKILL)
        self._note([trial])

    def _kill_machine(self) -> None:
        assert self._cluster is not None
        machine = self._draw.choice(self._cluster.machines)
        self._note(self._trials_on(machine.end()))
        threading.Thread(target=self._cluster.replace, args=(machine,), daemon=True).start()

    def _kill_pause(self) -> None:
        assert self._cluster is not None
        machine = self._draw.choice(self._cluster.machines)
        self._note(self._trials_on(machine.send(signal.SIGSTOP)))
        threading.Thread(target=self._go_on, args=(machine,), daemon=True).start()

    def _go_on(self, machine: Tree) -> None:
        """A paused machine goes on; where it ends, as it was given up meanwhile, another one comes."""
        assert self._cluster is not None
        time.sleep(PAUSED)
        machine.send(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            machine.process.wait(30)
            self._cluster.replace(machine)

    def _training(self) -> list[str]:
        """The trials that a process has begun to train."""
        return [trial for trial in running(self._folder) if trainer(self._folder, trial)]

    def _trials_on(self, processes: set[int]) -> list[str]:
        return [trial for trial in running(self._folder) if trainer(self._folder, trial) in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--kills", type=int, default=1000, help="as many as there is time for, where it is left out")
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills (worker, machine, pause)")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--skew", type=int, default=0, help="seconds by which the machines' clocks are wrong")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of the sweep; a temporary one is deleted")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="k-") as temporary, contextlib.ExitStack() as stack:
        folder = args.output or Path(temporary) / "sweep"
        cluster = None
        if args.kind != DRIVER:
            cluster = Cluster(Path(temporary) / "ray", args.concurrent + 1, args.skew)
            stack.callback(cluster.close)
        sizes = (f"search.trials={args.trials}", f"search.concurrent={args.concurrent}")
        overrides = (*SWEEP, *sizes, f"cache={temporary}/cache", *args.overrides)
        trouble = Trouble(args.kind, folder, cluster, args.seed, *overrides)
        stack.callback(lambda: trouble.sweep.end())
        status = trouble.run(args.kills, args.every)
        found = summary(folder, trouble.kills, args.trials, status)
        print(json.dumps({"kind": args.kind, **found}, indent=2))
        if not found["fine"]:
            raise SystemExit(trouble.said.read_text()[-3000:])


def summary(folder: Path, kills: list[Kill], trials: int, status: int) -> dict[str, Any]:
    ends = [event["trial_id"] for event in events(folder) if event["event"] == "trial_ended"]
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    known = [trial["status"] for trial in results.get("trials", [])]
    fine = status == 0 and len(ends) == len(set(ends)) == trials and known == ["completed"] * trials
    times = [kill.recovery for kill in kills if kill.recovery is not None]
    return {
        "fine": fine and results["state"] == "finished",
        "kills": [{"hit": list(kill.hit), "recovery": kill.recovery} for kill in kills],
        "trials": {"asked for": trials, "ended": len(ends), "twice": len(ends) - len(set(ends)), "known": len(known)},
        "seconds lost a kill": round(redone(folder) / max(1, len(kills)), 2),
        "seconds to recover, median": round(statistics.median(times), 2) if times else None,
        "seconds to recover, longest": max(times, default=None),
    }


if __name__ == "__main__":
    main()
