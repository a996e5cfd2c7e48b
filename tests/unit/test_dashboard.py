"""The dashboard, the alerts and what is scraped: of metrics that exist, in forms that Grafana and Prometheus read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_lora.training.tracking.series import SERIES
from tests.watching import ALERTS, DASHBOARD, FOLDER, GPUS, POD_MONITORS, RULES, metrics, panels, queries

OURS = {series.exported: series for series in SERIES.values()}
PROMTOOL = shutil.which("promtool")
promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)")


def rays_own(name: str) -> set[str]:
    """The labels of a metric that Ray's agent exports of each node.

    Raises:
        KeyError: this version of Ray has no such metric.
    """
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {str(tag) for tag in METRICS_GAUGES[name.removeprefix("ray_")].view.columns}


def labels_used(query: str) -> set[str]:
    grouped = re.findall(r"\b(?:by|on) \(([\w, ]+)\)", query)
    return {label for group in grouped for label in group.split(", ")} | set(re.findall(r'[{,](\w+)=~?"', query))


def known_labels(query: str) -> set[str]:
    """Of the metrics that a query names, and the one that Ray gives to all."""
    found = {"SessionName", "__name__"}
    for name in metrics(query):
        found |= set(OURS[name].labels) if name in OURS else rays_own(name)
    return found


# ------------------------------------------------------------------------------------------------------------ dashboard


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_grafanas_own_schema_has_a_place_for_each_field() -> None:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    known = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))

    def lost(mine: Any, theirs: Any, path: str = "") -> list[str]:
        if isinstance(mine, dict):
            return [p for key, value in mine.items() for p in lost(value, theirs.get(key), f"{path}/{key}")]
        if isinstance(mine, list):
            return [p for n, value in enumerate(mine) for p in lost(value, theirs[n], f"{path}/{n}")]
        return [] if mine == theirs else [path]

    assert lost(DASHBOARD, known) == []
    assert lost(DASHBOARD | {"titel": "x"}, known) == ["/titel"]


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_is_whole_and_asks_for_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
    for target, query in zip(panel["targets"], queries(panel), strict=True):
        assert target["legendFormat"]
        assert labels_used(query) <= known_labels(query)
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels_used(query)


def test_panels_have_their_own_place_and_number() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    taken = set()
    for place in (panel["gridPos"] for panel in DASHBOARD["panels"]):
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_each_of_our_metrics_is_shown_or_watched() -> None:
    asked = [query for panel in panels() for query in queries(panel)] + [alert["expr"] for alert in ALERTS]
    assert {name for query in asked for name in metrics(query)} >= set(OURS)


def test_names_follow_prometheus() -> None:
    """https://prometheus.io/docs/practices/naming/: base units, in the plural, at the end."""
    for name, series in SERIES.items():
        assert re.fullmatch(r"(trial|sweep)_[a-z_]+", name)
        assert series.labels[0] == "sweep"
        assert not re.search(r"_(ms|milliseconds|minutes|hours|kb|mb|gb|percent|percentage|count)$", name)
        assert series.meaning


# --------------------------------------------------------------------------------------------------------------- alerts


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(alert: dict[str, Any]) -> None:
    assert set(alert) == {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert set(alert["annotations"]) == {"summary", "runbook"}
    assert labels_used(alert["expr"]) <= known_labels(alert["expr"])
    named = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
    assert named <= labels_used(alert["expr"])


@promtool
def test_alerts_fire_when_they_should_and_not_else(tmp_path: Path) -> None:
    cases = Path(__file__).with_name("alerts.yaml")
    tested = yaml.safe_load(cases.read_text())
    for alert in ALERTS:
        expected = [
            bool(check["exp_alerts"])
            for test in tested["tests"]
            for check in test["alert_rule_test"]
            if check["alertname"] == alert["alert"]
        ]
        assert {True, False} == set(expected), f"{alert['alert']}: one case that fires, and one that does not"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(cases, tmp_path)
    run(tmp_path, "check", "rules", "rules.yaml")
    run(tmp_path, "test", "rules", "alerts.yaml")


@promtool
def test_the_panels_of_gpus_show_what_gpus_would_give(tmp_path: Path) -> None:
    """No machine of the tests needs a GPU: the numbers are made up, with the labels that Ray gives to its own."""
    session, gpu = 'SessionName="s"', 'SessionName="s", ip="10.0.0.1", GpuIndex="3"'
    known = {
        "ray_raytune_lora_trial_mfu_ratio": (f'{{{session}, sweep="mine", slot="0"}}', 0.5),
        "ray_node_gpus_utilization": (f"{{{gpu}}}", 75.0),
        "ray_node_gram_used": (f"{{{gpu}}}", 2.0),
    }
    expected = {
        "Model FLOPs utilization": ('{sweep="mine", slot="0"}', 0.5),
        "GPU utilization": ('{ip="10.0.0.1", GpuIndex="3"}', 75.0),
        "GPU memory": ('{ip="10.0.0.1", GpuIndex="3"}', 2 * 2**20),
    }
    shown = {panel["title"]: query for panel in panels() if panel["row"] == GPUS for query in queries(panel, "mine")}
    assert set(shown) == set(expected)
    values = {f"{name}{labels}": value for name, (labels, value) in known.items()}
    values[f'ray_raytune_lora_sweep_elapsed_seconds{{{session}, sweep="mine"}}'] = 60.0
    values['ray_node_gpus_utilization{SessionName="other", ip="10.0.0.2", GpuIndex="0"}'] = 1.0  # of another cluster
    test = {
        "interval": "1m",
        "input_series": [{"series": series, "values": f"{value}x5"} for series, value in values.items()],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "2m",
                "exp_samples": [dict(zip(("labels", "value"), expected[title], strict=True))],
            }
            for title, query in shown.items()
        ],
    }
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "gpus.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    run(tmp_path, "test", "rules", "gpus.yaml")


def run(folder: Path, *arguments: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run([PROMTOOL, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ component


def test_the_component_names_files_that_are_there() -> None:
    component = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    own = list(component["resources"])
    own += [name for generated in component["configMapGenerator"] for name in generated["files"]]
    there = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert set(own) == there - {"kustomization.yaml"}
    sources = yaml.safe_load((FOLDER / "grafana" / "datasources.yaml").read_text())["datasources"]
    assert [source["type"] for source in sources] == ["prometheus"]


def test_what_is_scraped_is_let_in() -> None:
    policy = yaml.safe_load((FOLDER / "networkpolicy.yaml").read_text())["spec"]
    ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert {endpoint["port"] for m in POD_MONITORS for endpoint in m["spec"]["podMetricsEndpoints"]} == ports
    for monitor in POD_MONITORS:
        assert policy["podSelector"]["matchLabels"].items() <= monitor["spec"]["selector"]["matchLabels"].items()
