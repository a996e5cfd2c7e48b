"""Every kustomization renders, and every object of KubeRay in it has the form that its custom resource asks for."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import k8s
from tests.k8s import GONE, K8S, changed

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed")

RAY = ("RayCluster", "RayJob", "RayCronJob", "RayService")
PLAIN = {  # the fields without which the API server refuses an object, and its version
    "Namespace": ("v1", "metadata/name"),
    "ServiceAccount": ("v1", "metadata/name"),
    "ConfigMap": ("v1", "data"),
    "PersistentVolumeClaim": ("v1", "spec/accessModes", "spec/resources/requests/storage"),
    "ResourceQuota": ("v1", "spec/hard"),
    "Service": ("v1", "spec/selector", "spec/ports"),
    "Deployment": ("apps/v1", "spec/selector/matchLabels", "spec/template/spec/containers"),
    "NetworkPolicy": ("networking.k8s.io/v1", "spec/podSelector", "spec/policyTypes"),
    "PodDisruptionBudget": ("policy/v1", "spec/selector/matchLabels"),
    "PodMonitor": ("monitoring.coreos.com/v1", "spec/selector/matchLabels", "spec/podMetricsEndpoints"),
    "PrometheusRule": ("monitoring.coreos.com/v1", "spec/groups"),
    "ResourceFlavor": ("kueue.x-k8s.io/v1beta1", "metadata/name"),
    "ClusterQueue": ("kueue.x-k8s.io/v1beta1", "spec/namespaceSelector", "spec/resourceGroups"),
    "LocalQueue": ("kueue.x-k8s.io/v1beta1", "spec/clusterQueue"),
    "WorkloadPriorityClass": ("kueue.x-k8s.io/v1beta1", "value"),
}
CLUSTER_WIDE = ("Namespace", "ResourceFlavor", "ClusterQueue", "WorkloadPriorityClass")


def schema_folder() -> Path:
    """Where KubeRay's schemas are: ``$KUBERAY_SCHEMAS``, or shared/kuberay beside or above the repository."""
    folders = [parent / "shared" / "kuberay" for parent in K8S.parents]
    if named := os.environ.get("KUBERAY_SCHEMAS"):
        folders.insert(0, Path(named))
    for folder in folders:
        if (folder / "rayjob-ray.io-v1.strict.json").is_file():
            return folder
    pytest.skip("KubeRay's schemas are not here: set KUBERAY_SCHEMAS to a folder of <kind>-ray.io-v1.strict.json")


@lru_cache
def validator(name: str) -> Any:
    schema = json.loads((schema_folder() / f"{name.lower()}-ray.io-v1.strict.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def faults(item: k8s.Object) -> list[str]:
    """What KubeRay's schema has against an object."""
    errors = validator(item["kind"]).iter_errors(item)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


def plain_faults(item: k8s.Object) -> list[str]:
    """What is wrong with an object of another kind, as far as it can be known without its schema."""
    if item["kind"] not in PLAIN:
        return [f"unknown kind {item['kind']}"]
    version, *fields = PLAIN[item["kind"]]
    found = [] if item["apiVersion"] == version else [f"apiVersion {item['apiVersion']}, not {version}"]
    if item["kind"] not in CLUSTER_WIDE and item["metadata"].get("namespace") != "raytune-lora":
        found.append("no namespace")
    for path in fields:
        value: Any = item
        for step in path.split("/"):
            value = value.get(step) if isinstance(value, dict) else None
        if value in (None, [], ""):
            found.append(f"no {path}")
    return found


@pytest.mark.parametrize("folder", k8s.APPLIED)
def test_what_kuberay_gets_fits_its_schema(folder: str) -> None:
    objects = k8s.kind(k8s.render(folder), *RAY)
    assert len(objects) == (0 if folder.endswith("queues") or folder in k8s.SPACES else 1)
    assert [fault for item in objects for fault in faults(item)] == []


@pytest.mark.parametrize("folder", k8s.APPLIED)
def test_other_objects_have_what_they_need(folder: str) -> None:
    objects = [item for item in k8s.render(folder) if item["kind"] not in RAY]
    assert [f"{item['kind']}: {fault}" for item in objects for fault in plain_faults(item)] == []
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    assert len(set(names)) == len(names)


def test_every_overlay_that_was_promised_is_there() -> None:
    promised = {"dev", "gpu", "multinode-70b", "spot", "kueue", "nightly", "monitoring", "autoscale", "standing"}
    assert {*k8s.APPLIED} - {*k8s.SPACES} == {
        *("base", "overlays/kueue/queues"),
        *(f"overlays/{name}" for name in promised),
    }
    spaces = {"dev", "multinode-70b", "spot", "autoscale", "monitoring"}
    assert {*k8s.SPACES} == {"namespace", *(f"overlays/{name}/namespace" for name in spaces)}
    kinds = {item["kind"] for folder in k8s.APPLIED for item in k8s.render(folder)}
    assert {"RayJob", "RayCluster", "RayCronJob"} <= kinds
    assert "RayService" not in kinds, "nothing is served here"


@pytest.mark.parametrize(
    ("folder", "where", "value"),
    [
        ("base", "RayJob spec/rayClusterSpecs", {}),
        ("base", "RayJob spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0),
        ("base", "RayJob spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/imagePulPolicy", "Always"),
        ("base", "RayJob spec/backoffLimit", "three"),
        ("base", "RayJob spec/shutdownAfterJobFinishes", "yes"),
        ("overlays/nightly", "RayCronJob spec/cron", "0 20 * * *"),
        ("overlays/nightly", "RayCronJob spec/jobTemplate/rayClusterSpec/authOptions/mode", "tokens"),
        ("overlays/standing", "RayCluster spec/autoscalerOptions/version", "v3"),
    ],
)
def test_the_schemas_find_faults(folder: str, where: str, value: Any) -> None:
    assert [fault for item in k8s.kind(changed(k8s.render(folder), where, value), *RAY) for fault in faults(item)]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("PodDisruptionBudget apiVersion", "policy/v1beta1"),
        ("PersistentVolumeClaim spec/resources/requests/storage", GONE),
        ("ConfigMap metadata/namespace", GONE),
        ("ServiceAccount kind", "Role"),
    ],
)
def test_faults_of_other_objects_are_found(where: str, value: Any) -> None:
    objects = changed(k8s.together("base"), where, value)
    assert [fault for item in objects if item["kind"] not in RAY for fault in plain_faults(item)]


FILES = sorted(K8S.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(K8S).as_posix() for path in FILES])
def test_every_file_says_at_its_top_what_it_is(path: Path) -> None:
    """A kustomization also how it is applied or used, and what to change in it."""
    lines = path.read_text().splitlines()
    header = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    assert len(header) > 20
    folder = path.parent.relative_to(K8S).as_posix()
    if path.name != "kustomization.yaml" or "Used by the" in header:
        return
    used = f"kubectl apply -k k8s/{folder}" if folder in k8s.APPLIED else f"components: [../../{folder}]"
    assert used in header
    assert "Change: " in header
