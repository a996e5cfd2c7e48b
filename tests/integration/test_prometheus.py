"""A real Prometheus reads a real sweep: every panel shows something, every alert can be computed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from raytune_lora.config.compose import compose
from raytune_lora.training.tracking.series import SERIES, most_series
from raytune_lora.tuning import budget
from raytune_lora.tuning.sweep import run_sweep
from tests.integration.conftest import TINY
from tests.watching import ALERTS, GPUS, POD_MONITORS, RULES, panels, queries

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.timeout(300),
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"),
]
LONGEST = 150  # seconds of the sweep; it ends as soon as every panel has shown something


class Prometheus:
    """One that scrapes this Ray node every second, relabels as a PodMonitor does, and has its alerts."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"127.0.0.1:{probe.getsockname()[1]}"
        endpoint = next(e for e in POD_MONITORS[0]["spec"]["podMetricsEndpoints"] if e["port"] == "metrics")
        snake = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
        relabelings = [{snake.get(key, key): value for key, value in r.items()} for r in endpoint["metricRelabelings"]]
        job = {
            "job_name": "ray",
            "static_configs": [{"targets": [f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"]}],
            "metric_relabel_configs": relabelings,
        }
        every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config = {"global": every, "rule_files": ["rules.yaml"], "scrape_configs": [job]}
        (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = [str(PROMETHEUS), f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder}/tsdb"]
        self._log = (folder / "prometheus.log").open("w")
        self._process = subprocess.Popen(
            [*command, f"--web.listen-address={self._address}"], stdout=self._log, stderr=self._log
        )

    def ask(self, path: str, **arguments: str) -> Any:
        """What its HTTP API answers.

        Raises:
            OSError: it is not up, or refuses the question.
        """
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def query(self, text: str) -> list[dict[str, Any]]:
        """The series of a query, now."""
        found: list[dict[str, Any]] = self.ask("query", query=text)["result"]
        return found

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@pytest.fixture
def prometheus(ray_instance: None, tmp_path: Path) -> Iterator[Prometheus]:
    started = Prometheus(tmp_path)
    yield started
    started.end()


class Watcher(threading.Thread):
    """Asks each panel's queries until every one has had an answer with data."""

    def __init__(self, prometheus: Prometheus, sweep: str) -> None:
        super().__init__(daemon=True)
        self._prometheus = prometheus
        asked = {(p["title"], query) for p in panels() if p["row"] != GPUS for query in queries(p, sweep)}
        self.unanswered = asked
        self.done = threading.Event()
        self._deadline = time.monotonic() + LONGEST

    def run(self) -> None:
        while self.unanswered and time.monotonic() < self._deadline:
            time.sleep(1)
            try:
                self.unanswered = {(t, query) for t, query in self.unanswered if not self._prometheus.query(query)}
            except OSError:  # it is starting
                continue
        self.done.set()


def test_every_panel_shows_a_sweep_and_every_alert_is_computed(
    prometheus: Prometheus, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher(prometheus, "mine")
    watcher.start()
    enough = ("hours", "every panel has shown something")
    monkeypatch.setattr(budget, "reached", lambda *_: enough if watcher.done.is_set() else None)
    settings = ("tracking=ray", "training.max_steps=100000", "evaluation.every=64", "training.patience=null")
    small = ("search.trials=3", "scheduler=none", "evaluation.loss_rows=8", "evaluation.generate_rows=0")
    run_sweep(compose([*TINY, "space=simple", *settings, *small, f"cache={cache}", f"output={tmp_path / 'mine'}"]))
    assert watcher.unanswered == set()

    (group,) = prometheus.ask("rules")["groups"]
    computed = {rule["name"]: (rule["health"], rule["state"]) for rule in group["rules"]}
    assert computed == {alert["alert"]: ("ok", "inactive") for alert in ALERTS}

    series = prometheus.ask("series", **{"match[]": '{__name__=~"ray_raytune_lora_.+", sweep="mine"}'})
    assert not any("WorkerId" in one for one in series)
    assert len({json.dumps(one, sort_keys=True) for one in series}) <= most_series(1)
    known = {one.exported for one in SERIES.values()}
    assert {one["__name__"] for one in series} <= known
    assert not re.search("duplicate", (tmp_path / "prometheus.log").read_text(), re.I)
