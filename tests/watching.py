"""The monitoring component's files, for the tests that check and use them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[1] / "k8s" / "components" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana" / "raytune-lora.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]
ALERTS: list[dict[str, Any]] = [rule for group in RULES["groups"] for rule in group["rules"]]
POD_MONITORS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "podmonitors.yaml").read_text()))
GPUS = "GPUs"  # the dashboard's row of what only a GPU has

_METRIC = re.compile(r"\bray_\w+")


def panels() -> list[dict[str, Any]]:
    """All but the titles of rows, each with the row that it is in."""
    found, row = [], ""
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            row = panel["title"]
        else:
            found.append(panel | {"row": row})
    return found


def queries(panel: dict[str, Any], sweep: str = ".*") -> list[str]:
    """A panel's queries, with the variable filled in as Grafana does."""
    return [target["expr"].replace("$sweep", sweep) for target in panel["targets"]]


def metrics(query: str) -> set[str]:
    """The metrics that a query names; a pattern of names stands for its parts."""
    found = set()
    for prefix, choices, suffix in re.findall(r'__name__=~"(\w+)\(([\w|]+)\)(\w+)"', query):
        found |= {f"{prefix}{choice}{suffix}" for choice in choices.split("|")}
    return found | set(_METRIC.findall(re.sub(r'__name__=~"[^"]*"', "", query)))
