"""The manifests in k8s/ as Kubernetes and KubeRay would see them, for the tests that check them."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tests.readme import ROOT

K8S = ROOT / "k8s"
Object = dict[str, Any]
_FOUND = sorted(K8S.rglob("kustomization.yaml"))
APPLIED = [  # what a user applies; components and steps of an overlay are rendered with what uses them
    path.parent.relative_to(K8S).as_posix() for path in _FOUND if "kubectl apply" in path.read_text()
]
SPACES = [folder for folder in APPLIED if Path(folder).name == "namespace"]  # what sweeps share, before the first one
_UNITS = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "": 1.0}


@dataclass(frozen=True)
class Pod:
    """The pods of one template."""

    role: str  # head, worker or submitter
    group: str
    template: Object
    low: int
    high: int
    resources: Object  # what the group tells Ray that it has, where that is not what its container has

    @property
    def spec(self) -> Object:
        return dict(self.template["spec"])

    @property
    def main(self) -> Object:
        """The first container, which is Ray's."""
        return dict(self.spec["containers"][0])

    @property
    def labels(self) -> dict[str, str]:
        """With those that KubeRay adds."""
        own = dict(self.template["metadata"]["labels"])
        return own if self.role == "submitter" else own | {"ray.io/node-type": self.role, "ray.io/group": self.group}

    def limit(self, resource: str) -> float:
        """Of all its containers; bytes, cores or devices."""
        limits = [container["resources"]["limits"].get(resource, 0) for container in self.spec["containers"]]
        return sum(map(quantity, limits))


@lru_cache
def _rendered(folder: str) -> list[Object]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render(folder: str) -> list[Object]:
    """All objects of a kustomization below k8s/."""
    return copy.deepcopy(_rendered(folder))


def together(folder: str, space: str | None = None) -> list[Object]:
    """The objects of a sweep or cluster with those of the namespace that it is applied to.

    Args:
        folder: of the sweep.
        space: of the namespace; None: the overlay's own, or the one that most share.
    """
    if folder in SPACES or folder.endswith("queues"):
        return render(folder)
    own = f"{folder}/namespace"
    return render(space or (own if own in SPACES else "namespace")) + render(folder)


def kind(objects: list[Object], *names: str) -> list[Object]:
    return [item for item in objects if item["kind"] in names]


def jobs(objects: list[Object]) -> Iterator[Object]:
    """The spec of each RayJob, that of a RayCronJob's template too."""
    for item in kind(objects, "RayJob", "RayCronJob"):
        yield item["spec"]["jobTemplate"] if item["kind"] == "RayCronJob" else item["spec"]


def clusters(objects: list[Object]) -> list[Object]:
    """The spec of each Ray cluster."""
    return [job["rayClusterSpec"] for job in jobs(objects)] + [c["spec"] for c in kind(objects, "RayCluster")]


def pods(objects: list[Object]) -> list[Pod]:
    """All pods of Ray, in the order submitter, head, workers."""
    found = [Pod("submitter", "", job["submitterPodTemplate"], 1, 1, {}) for job in jobs(objects)]
    for cluster in clusters(objects):
        head = cluster["headGroupSpec"]
        found.append(Pod("head", "headgroup", head["template"], 1, 1, head.get("resources", {})))
        for group in cluster["workerGroupSpecs"]:
            sizes = group["minReplicas"], group["maxReplicas"]
            found.append(Pod("worker", group["groupName"], group["template"], *sizes, group.get("resources", {})))
    return found


def workers(objects: list[Object]) -> list[Pod]:
    return [pod for pod in pods(objects) if pod.role == "worker"]


def quantity(value: str | float) -> float:
    """A Kubernetes quantity as a number of bytes, cores or devices."""
    text = str(value)
    number = text.rstrip("mKMGTi")
    return float(number) * _UNITS[text[len(number) :]]


def autoscaled(cluster: Object) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling"))


# -------------------------------------------------------------------------------------------------- faults, to be found

GONE = object()


def changed(objects: list[Object], where: str, value: Any) -> list[Object]:
    """A copy in which one thing is another, or gone.

    Args:
        objects: rendered.
        where: a kind, and the path in its first object: ``RayJob spec/rayClusterSpec/rayVersion``.
        value: the new one; ``GONE`` removes it.
    """
    new = copy.deepcopy(objects)
    name, _, path = where.partition(" ")
    *steps, last = [int(step) if step.isdigit() else step.replace("~1", "/") for step in path.split("/")]
    section: Any = kind(new, name)[0]
    for step in steps:
        section = section[step] if isinstance(step, int) else section.setdefault(step, {})
    if value is GONE:
        del section[last]
    elif isinstance(last, int) and last == len(section):
        section.append(value)
    else:
        section[last] = value
    return new
