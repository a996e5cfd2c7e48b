"""The sweeps in the manifests: their commands compose, are well, and fit the cluster that runs them."""

from __future__ import annotations

import copy
import re
import shlex
import shutil
import subprocess
import threading
import time
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

SWEEPS = [folder for folder in k8s.APPLIED if folder not in (*k8s.SPACES, "overlays/standing", "overlays/kueue/queues")]
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
    kustomization, text = documented("README.md", "images:"), (k8s.K8S / page).read_text()
    (resource,) = re.findall(r"resources: \[\.\./(k8s/overlays/\w+)\]", text)
    kustomization["resources"] = [f"../{resource}"]
    space = None
    if page != "README.md":
        kustomization["patches"] = documented(page, "kind: RayJob")["patches"]
        space = str(write(tmp_path / "my-namespace", documented(page, "storageClassName")))
    folder = write(tmp_path / "my-sweep", kustomization)
    sweep = (tmp_path / resource / "sweep.yaml").read_text()
    concurrent = re.search(r"`search.concurrent: (\d+)`", text)
    (folder / "sweep.yaml").write_text(
        re.sub(r"concurrent: \d+\}", f"concurrent: {concurrent[1]}}}", sweep) if concurrent else sweep
    )
    objects = k8s.together(str(folder), space)
    assert [fault for rule in k8s_rules.RULES for fault in rule(objects)] == []
    assert {pod.main["image"] for pod in k8s.pods(objects)} == {"<registry>/raytune-lora:0.1.0-ray2.60.0-cu130"}
    cfg = composed(objects)
    assert fits(cfg, objects)
    assert not fits(cfg, objects, more=1)
    if space is not None:
        (claim,) = k8s.kind(objects, "PersistentVolumeClaim")
        assert claim["spec"]["storageClassName"] in ("standard-rwx", "efs")
        assert k8s.kind(objects, "ResourceQuota")
        assert addresses(objects) == IDENTITY[Path(page).stem]


def write(folder: Path, kustomization: Any) -> Path:
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


# who hands out a cloud's workload identity, and at which ports
IDENTITY = {
    "gke": {"169.254.169.252/32": {80, 988}, "169.254.169.254/32": {80}},
    "eks": {"169.254.170.23/32": {80}, "fd00:ec2::23/128": {80}},
}


def addresses(objects: list[k8s.Object]) -> dict[str, set[int]]:
    """Where Ray's pods may go that is named by its address, and the ports."""
    found: dict[str, set[int]] = {}
    for policy in k8s.kind(objects, "NetworkPolicy"):
        assert all(
            policy["spec"]["podSelector"]["matchLabels"].items() <= pod.labels.items() for pod in k8s.pods(objects)
        )
        for rule in policy["spec"].get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer:
                    found.setdefault(peer["ipBlock"]["cidr"], set()).update(port["port"] for port in rule["ports"])
    return found


@pytest.mark.parametrize("folder", SWEEPS)
def test_nobodys_metadata_server_is_reached_unasked(folder: str) -> None:
    """Where it hands out the rights of the node."""
    assert addresses(k8s.together(folder)) == {}


@pytest.mark.parametrize("folder", SWEEPS)
def test_two_sweeps_share_nothing_that_one_of_them_brings(folder: str, tmp_path: Path) -> None:
    """By one line of each: its own RayJob mounts its own config, and deleting one leaves the other and the results."""
    shutil.copytree(k8s.K8S, tmp_path / "k8s")
    owned = []
    for name in ("invoices", "letters"):
        kustomization = {"resources": [f"../k8s/{folder}"], "nameSuffix": f"-{name}"}
        objects = k8s.render(str(write(tmp_path / name, kustomization)))
        assert {item["kind"] for item in objects} <= {"RayJob", "RayCronJob", "ConfigMap"}
        (config,) = k8s.kind(objects, "ConfigMap")
        mounted = {v["configMap"]["name"] for p in k8s.pods(objects) for v in p.spec["volumes"] if "configMap" in v}
        assert mounted == {config["metadata"]["name"]}
        assert [
            fault for rule in (k8s_rules.names, k8s_rules.storage) for fault in rule(k8s.render("namespace") + objects)
        ] == []
        owned.append({(item["kind"], item["metadata"]["name"]) for item in objects})
    assert owned[0] & owned[1] == set()


def test_sweeps_and_clusters_of_one_namespace_share_nothing_by_their_own_names() -> None:
    """A nightly sweep and the standing cluster beside one of each day."""
    owned = [
        {(i["kind"], i["metadata"]["name"]) for i in k8s.render(f"overlays/{name}")}
        for name in ("gpu", "nightly", "standing")
    ]
    assert owned[0] & owned[1] == owned[1] & owned[2] == owned[0] & owned[2] == set()


@pytest.mark.parametrize("page", sorted((k8s.K8S / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_commands_of_a_page_wait_for_what_they_need(page: Path) -> None:
    """``kubectl cp`` for the pod and ``kubectl logs`` for the job; data is there before the sweep that reads it."""
    lines = [
        line for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL) for line in block.splitlines()
    ]
    for number, line in enumerate(lines):
        if " cp " in line and "kubectl" in line:
            assert re.search(r"wait --for=condition=Ready pod/files --timeout=\d+m$", lines[number - 1])
            assert lines[number - 2] == "kubectl apply -f k8s/docs/files.yaml"
        if " logs -f job/" in line:
            (job,) = re.findall(r"job/(\S+)", line)
            assert re.search(rf"wait --for=create job/{job} --timeout=\d+m$", lines[number - 1])
        if " cp train.jsonl " in line:
            assert not any("apply -k my-sweep" in before for before in lines[:number])
            assert any("apply -k my-sweep" in after for after in lines[number:])


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_a_head_that_goes_waits_for_its_driver(seconds: float, tmp_path: Path) -> None:
    """The hook of its pod, as it finds one, or none, among the processes."""
    (head,) = [pod for pod in k8s.pods(k8s.render("base")) if pod.role == "head"]
    command = [part.replace("/proc/", f"{tmp_path}/") for part in head.main["lifecycle"]["preStop"]["exec"]["command"]]
    for number, words in ((1, ("ray", "start", "--head")), (7, ("python", "/app/jobs/sweep.py", "experiment=sweep"))):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_text("\0".join(words) + "\0")
    driver = tmp_path / "7" / "cmdline"
    began = time.monotonic()
    ending = threading.Timer(seconds, driver.unlink)
    ending.start()
    if not seconds:
        ending.join()
    assert subprocess.run(command, timeout=30, check=False).returncode == 0
    assert seconds <= time.monotonic() - began < seconds + 10
    assert not driver.exists()


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
