"""The sweeps in the manifests: their commands compose, are well, and fit the cluster that runs them."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_lora.cluster.connect import Node, placement_problems
from raytune_lora.config import validate
from raytune_lora.config.compose import compose
from raytune_lora.config.groups import OWN
from raytune_lora.config.schema import SweepConfig
from raytune_lora.tuning import space
from tests import k8s
from tests.k8s import GONE, ROOT, changed
from tests.unit import k8s_rules

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed")

SWEEPS = [folder for folder in k8s.APPLIED if folder not in ("overlays/standing", "overlays/kueue/queues")]
WORKERS = "RayJob spec/rayClusterSpec/workerGroupSpecs/0"
LIMITS = f"{WORKERS}/template/spec/containers/0/resources/limits"


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a rendered job's command composes, with the ConfigMap where the head has it."""

    def compose_job(objects: list[k8s.Object]) -> SweepConfig:
        (job,), (head,) = k8s.jobs(objects), [pod for pod in k8s.pods(objects) if pod.role == "head"]
        volumes = {v["name"]: v["configMap"]["name"] for v in head.spec["volumes"] if "configMap" in v}
        maps = {item["metadata"]["name"]: item["data"] for item in k8s.kind(objects, "ConfigMap")}
        for mount in head.main["volumeMounts"]:
            if mount["name"] in volumes:
                folder = tmp_path / mount["mountPath"].lstrip("/")
                folder.mkdir(parents=True)
                for name, text in maps[volumes[mount["name"]]].items():
                    (folder / name).write_text(text)
        named = {variable["name"]: variable.get("value") for variable in head.main["env"]}
        monkeypatch.setenv(OWN, str(tmp_path / named[OWN].lstrip("/")))
        return compose(command(job)[2:])

    return compose_job


def command(job: k8s.Object) -> list[str]:
    """As the submitter's shell leaves it: with the job's name in the place of $SWEEP."""
    variables = {v["name"]: v for v in job["submitterPodTemplate"]["spec"]["containers"][0]["env"]}
    field = variables["SWEEP"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.labels['ray.io/originated-from-cr-name']"
    return shlex.split(job["entrypoint"].replace("$SWEEP", "sweep"))


def nodes(objects: list[k8s.Object]) -> list[Node]:
    """The workers that the cluster may grow to, as Ray will see them."""
    found: list[Node] = []
    for pod in k8s.workers(objects):
        cpus = k8s.quantity(pod.resources["CPU"]) if "CPU" in pod.resources else pod.limit("cpu")
        found += [Node(float(int(cpus)), pod.limit("nvidia.com/gpu"))] * pod.high
    return found


def fits(cfg: SweepConfig, objects: list[k8s.Object], more: int = 0) -> bool:
    """Whether all that are to run at once do so on the cluster at its largest."""
    grown = copy.deepcopy(cfg)
    grown.cluster.autoscaler = False
    return not placement_problems(grown, nodes(objects), concurrent=cfg.search.concurrent + more)


@pytest.mark.parametrize("folder", SWEEPS)
def test_the_command_is_one_of_this_project(folder: str, composed: Any) -> None:
    objects = k8s.render(folder)
    (job,) = k8s.jobs(objects)
    python, script, *_ = command(job)
    assert python == "python"
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^WORKDIR (\S+)$", dockerfile, re.MULTILINE) == [str(Path(script).parents[1])] * 2
    assert (ROOT / Path(script).relative_to("/app")).is_file()
    cfg = composed(objects)
    assert validate.problems(cfg) == []
    assert space.problems(cfg.space, cfg) == []
    assert (cfg.resume, cfg.output, cfg.cache) == ("auto", "/shared/sweeps/sweep", "/shared/cache")


@pytest.mark.parametrize("folder", SWEEPS)
def test_the_trials_fit_the_cluster(folder: str, composed: Any) -> None:
    """At the same time, and where the cluster grows by demand, to its last worker."""
    objects = k8s.render(folder)
    cfg = composed(objects)
    assert fits(cfg, objects)
    (cluster,) = k8s.clusters(objects)
    assert cfg.cluster.autoscaler == k8s.autoscaled(cluster)
    assert not fits(cfg, objects, more=1), "workers would be idle"
    memory = sum(pod.limit("memory") * pod.high for pod in k8s.workers(objects))
    assert memory / (cfg.search.concurrent * cfg.workers) >= 2 * 2**30, "what a worker imports, and its model"


@pytest.mark.parametrize(
    ("folder", "where", "value"),
    [
        ("base", f"{WORKERS}/maxReplicas", 0),
        ("base", f"{LIMITS}/cpu", "3500m"),
        ("overlays/gpu", f"{LIMITS}/nvidia.com~1gpu", 3),
        ("overlays/multinode-70b", f"{WORKERS}/maxReplicas", 1),
        ("overlays/spot", f"{WORKERS}/maxReplicas", 1),
    ],
)
def test_a_cluster_that_is_too_small_is_found(folder: str, where: str, value: Any, composed: Any) -> None:
    objects = changed(k8s.render(folder), where, value)
    assert not fits(composed(objects), objects)


def test_no_trial_fits_where_drivers_run() -> None:
    gpu, drivers = k8s.workers(k8s.render("overlays/standing"))
    assert drivers.resources == {"CPU": "0", "driver": "2"}
    assert gpu.resources == {}


@pytest.mark.parametrize("page", ["README.md", "docs/gke.md", "docs/eks.md"])
def test_the_kustomizations_of_the_documentation_work(page: str, composed: Any, tmp_path: Path) -> None:
    """As a folder my-sweep beside k8s/; a page that patches spot nodes leaves the README's other lines as they are."""
    shutil.copytree(k8s.K8S, tmp_path / "k8s")
    kustomization, text = documented("README.md", "kind: Kustomization"), (k8s.K8S / page).read_text()
    (resource,) = re.findall(r"resources: \[\.\./(k8s/overlays/\S+)\]", text)
    kustomization["resources"] = [f"../{resource}"]
    if page != "README.md":
        kustomization["patches"] = documented(page, "patches:")["patches"]
    folder = tmp_path / "my-sweep"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    sweep = (tmp_path / resource / "sweep.yaml").read_text()
    concurrent = re.search(r"`search.concurrent: (\d+)`", text)
    (folder / "sweep.yaml").write_text(
        re.sub(r"concurrent: \d+\}", f"concurrent: {concurrent[1]}}}", sweep) if concurrent else sweep
    )
    objects = k8s.render(str(folder))
    assert [fault for rule in k8s_rules.RULES for fault in rule(objects)] == []
    assert {pod.main["image"] for pod in k8s.pods(objects)} == {"<registry>/raytune-lora:0.1.0-ray2.60.0-cu130"}
    cfg = composed(objects)
    assert fits(cfg, objects)
    assert not fits(cfg, objects, more=1)


def documented(page: str, part: str) -> Any:
    """The one YAML block of a page that has the part."""
    blocks = re.findall(r"```yaml\n(.*?)```", (k8s.K8S / page).read_text(), re.DOTALL)
    (block,) = [block for block in blocks if part in block]
    return yaml.safe_load(block)


def test_the_pod_for_files_keeps_the_rules() -> None:
    objects = [yaml.safe_load((k8s.K8S / "docs" / "files.yaml").read_text())]
    for rule in (k8s_rules.security, k8s_rules.no_latest):
        assert list(rule(objects)) == []
    assert list(k8s_rules.security(changed(objects, "Pod spec/securityContext", GONE)))


def commands() -> list[str]:
    """Each kubectl command of the manifests' headers and of the documentation."""
    texts = [path.read_text() for pattern in ("*.md", "*.yaml") for path in k8s.K8S.rglob(pattern)]
    return sorted({found for text in texts for found in re.findall(r"kubectl apply -k (\S+?)[\s`,.;:)]", text)})


@pytest.mark.parametrize("folder", commands())
def test_what_is_to_be_applied_is_there(folder: str) -> None:
    assert folder.removeprefix("k8s/") in k8s.APPLIED or folder.startswith("my-")
