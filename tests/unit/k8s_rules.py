"""What KubeRay, Kubernetes and this project ask of the manifests beyond their form: each rule tells what breaks it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from raytune_lora.cluster.pack import LIMIT
from raytune_lora.cluster.withdraw import REFUSED
from tests.k8s import ROOT, Object, Pod, autoscaled, clusters, jobs, kind, pods, quantity, workers

_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36}
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_SPOT = {"cloud.google.com/gke-spot", "eks.amazonaws.com/capacityType", "karpenter.sh/capacity-type"}
_STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
_ENDING = 1800  # seconds that the best model takes to be measured
_DAY = 86400
_LARGEST = 500 * 2**20  # bytes of a working folder that Ray takes
_WRITTEN = 3.2  # times its size: what Redis takes while it is handed a working folder, as measured
_SECRET = re.compile(r"token|password|secret|api_key", re.IGNORECASE)


def names(objects: list[Object]) -> Iterator[str]:
    """KubeRay adds to the names of what it makes, and all must be names of services."""
    for item in kind(objects, *_LONGEST):
        name = item["metadata"]["name"]
        if len(name) > _LONGEST[item["kind"]] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
            yield f"{item['kind']} {name}: a name of at most {_LONGEST[item['kind']]} characters, a letter first"


def versions(objects: list[Object]) -> Iterator[str]:
    """One image for all containers of Ray, of the Ray that constraints.txt pins."""
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    for cluster in clusters(objects):
        if cluster.get("rayVersion") != pinned[1]:
            yield f"rayVersion {cluster.get('rayVersion')}, and constraints.txt has {pinned[1]}"
    images = {pod.main["image"] for pod in pods(objects)}
    images |= {c["autoscalerOptions"]["image"] for c in clusters(objects) if "image" in c.get("autoscalerOptions", {})}
    if len(images) > 1:
        yield f"several images: {sorted(images)}"
    for image in images:
        tag = image.rpartition("/")[2].partition(":")[2]
        if f"-ray{pinned[1]}-" not in tag:
            yield f"{image}: its tag names another Ray, or none"


def no_latest(objects: list[Object]) -> Iterator[str]:
    """Every image of every container has a tag, which is not ``latest``."""
    for item in _containers(objects):
        tag = item["image"].rpartition("/")[2].partition(":")[2]
        if tag in ("", "latest"):
            yield f"{item['image']}: no tag that stays"


def head(objects: list[Object]) -> Iterator[str]:
    """Nothing of the trials on the head, and the head not on nodes that are taken away."""
    for cluster in clusters(objects):
        params = cluster["headGroupSpec"]["rayStartParams"]
        if params.get("num-cpus") != "0":
            yield f"head: num-cpus {params.get('num-cpus')!r}, not '0'"
    spot = any(_wants_spot(pod) for pod in workers(objects))
    for pod in pods(objects):
        if pod.role != "worker" and (pod.limit("nvidia.com/gpu") or pod.spec.get("tolerations")):
            yield f"{pod.role}: a GPU or a toleration"
        if pod.role != "worker" and spot and _avoided(pod) != _SPOT:
            yield f"{pod.role}: may be placed on a spot node"


def replicas(objects: list[Object]) -> Iterator[str]:
    for cluster in clusters(objects):
        for group in cluster["workerGroupSpecs"]:
            low, now, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
            if None in (low, now, high) or not 0 <= low <= now <= high < 1000:
                yield f"{group['groupName']}: minReplicas {low} <= replicas {now} <= maxReplicas {high} does not hold"


def autoscaler(objects: list[Object]) -> Iterator[str]:
    """Version 2, with the memory that it needs; without one, nothing that asks for it."""
    for cluster in clusters(objects):
        groups, options = cluster["workerGroupSpecs"], cluster.get("autoscalerOptions", {})
        if not autoscaled(cluster):
            if options or any("priority" in group or "idleTimeoutSeconds" in group for group in groups):
                yield "settings of an autoscaler, and none is on"
            continue
        if options.get("version") != "v2":
            yield f"autoscaler {options.get('version')}, not v2"
        if quantity(options.get("resources", {}).get("limits", {}).get("memory", 0)) < 2**30:
            yield "autoscaler: less than 1Gi of memory"
        for template in (cluster["headGroupSpec"]["template"], *(group["template"] for group in groups)):
            if template["spec"].get("restartPolicy", "Never") != "Never":
                yield "restartPolicy: version 2 replaces pods itself"
        if not cluster["headGroupSpec"]["template"]["spec"].get("automountServiceAccountToken"):
            yield "head: the autoscaler has no token for the API server"
        variables = cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])
        if any(variable["name"] == "RAY_enable_autoscaler_v2" for variable in variables):
            yield "autoscaler: its version is set twice"


def deadlines(objects: list[Object]) -> Iterator[str]:
    """A job ends whatever happens, and a lost cluster is replaced by one that resumes."""
    for job in jobs(objects):
        mode = job.get("submissionMode", "K8sJobMode")
        if mode not in _MODES:
            yield f"submissionMode {mode}: known are {', '.join(_MODES)}"
        if mode == "SidecarMode" and ("submitterPodTemplate" in job or "submitterConfig" in job):
            yield "SidecarMode has no submitter of its own"
        if not 0 < job.get("preRunningDeadlineSeconds", 0) < job.get("activeDeadlineSeconds", 0):
            yield "preRunningDeadlineSeconds and activeDeadlineSeconds: both, the second longer"
        total = _hours(objects, job) * 3600
        if not 0 < total <= job.get("activeDeadlineSeconds", 0) - job.get("preRunningDeadlineSeconds", 0) - _ENDING:
            yield f"budget.wall_hours={total / 3600:g}: the driver ends a sweep in order before KubeRay ends an attempt"
        environment = yaml.safe_load(job.get("runtimeEnvYAML", "{}")).get("env_vars", {})
        if environment != {REFUSED: "stopped", **_STOPPING}:
            yield "runtimeEnvYAML: a job that is refused is stopped, and one that is stopped ends in order"
        if job.get("backoffLimit", 0) < 1 or "resume=auto" not in job["entrypoint"]:
            yield "a cluster that is lost must be retried, and the retry resume"
        if mode == "InteractiveMode" or "clusterSelector" in job:
            yield "backoffLimit is refused with InteractiveMode and clusterSelector"
    for item in kind(objects, "RayCronJob"):
        job = item["spec"]["jobTemplate"]
        waits = (1 + job.get("backoffLimit", 0)) * job.get("preRunningDeadlineSeconds", 0)
        longest = waits + _hours(objects, job) * 3600 + job.get("activeDeadlineSeconds", 0)
        if longest >= _DAY or not re.fullmatch(r"\d+ \d+ \* \* [*\d,-]+", item["spec"]["schedule"]):
            yield f"a night's sweep may take {longest / 3600:g} hours, and KubeRay starts the next one whatever runs"


def deletion(objects: list[Object]) -> Iterator[str]:
    """Whatever becomes of a job, its GPUs are let go soon: rules of a deletionStrategy know no job that was stopped."""
    for job in jobs(objects):
        if "deletionStrategy" in job or not job.get("shutdownAfterJobFinishes"):
            yield "a job that is stopped keeps its cluster: shutdownAfterJobFinishes, and no deletionStrategy"
        if not 0 < job.get("ttlSecondsAfterFinished", 0) <= 300:
            yield "ttlSecondsAfterFinished: a few minutes, in which GPUs are idle"
    for item in kind(objects, "RayJob", "RayCluster"):
        if item["spec"].get("managedBy", "ray.io/kuberay-operator") not in (
            "ray.io/kuberay-operator",
            "kueue.x-k8s.io/multikueue",
        ):
            yield f"managedBy {item['spec']['managedBy']}"


def gpus(objects: list[Object]) -> Iterator[str]:
    """Pods with GPUs are on nodes with GPUs, are guaranteed what they ask for, and have an image with CUDA."""
    some = any(pod.limit("nvidia.com/gpu") for pod in workers(objects))
    for pod in pods(objects):
        tag = pod.main["image"].rpartition("-")[2]
        if some != bool(re.fullmatch(r"cu\d+", tag)):
            yield f"{pod.role}: image {tag}, and there are {'' if some else 'no '}GPUs"
        requests, limits = pod.main["resources"]["requests"], pod.main["resources"]["limits"]
        if requests["memory"] != limits["memory"] or (some and requests != limits):
            yield f"{pod.role} {pod.group}: requests and limits differ"
        if not pod.limit("nvidia.com/gpu"):
            continue
        tolerated = {item["key"] for item in pod.spec.get("tolerations", [])}
        if "nvidia.com/gpu" not in tolerated or not pod.spec.get("nodeSelector"):
            yield f"{pod.group}: GPU nodes are neither tolerated nor selected"


def memory(objects: list[Object]) -> Iterator[str]:
    """/dev/shm is as large as NCCL and Ray need it, and leaves room in the memory that it counts towards."""
    for pod in pods(objects):
        if pod.role == "submitter":
            continue
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounted = [volumes[m["name"]] for m in pod.main["volumeMounts"] if m["mountPath"] == "/dev/shm"]
        if not mounted or mounted[0].get("emptyDir", {}).get("medium") != "Memory":
            yield f"{pod.role} {pod.group}: no /dev/shm in memory"
            continue
        shm = quantity(mounted[0]["emptyDir"].get("sizeLimit", 0))
        if not max(2**30, pod.limit("nvidia.com/gpu") * 2**30) <= shm < pod.limit("memory") / 2:
            yield f"{pod.role} {pod.group}: /dev/shm of {shm:g} bytes"
    for cluster in clusters(objects):
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            store = int(group["rayStartParams"].get("object-store-memory", 2**60))
            if store > 2**29:
                yield "object-store-memory: no more than half of the smallest /dev/shm"


def storage(objects: list[Object]) -> Iterator[str]:
    """Head and workers see the shared volume at the same path, and the commands write there."""
    claims, maps = (
        {item["metadata"]["name"] for item in kind(objects, name)} for name in ("PersistentVolumeClaim", "ConfigMap")
    )
    for pod in pods(objects):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        used = {m["mountPath"]: volumes[m["name"]].get("persistentVolumeClaim") for m in pod.main["volumeMounts"]}
        if pod.role != "submitter" and used.get("/shared") != {"claimName": "shared"}:
            yield f"{pod.role} {pod.group}: the shared volume is not at /shared"
    for pod in pods(objects):
        for volume in pod.spec["volumes"]:
            if (claim := volume.get("persistentVolumeClaim")) and claim["claimName"] not in claims:
                yield f"{pod.role}: there is no claim {claim['claimName']}"
            if (config := volume.get("configMap")) and config["name"] not in maps:
                yield f"{pod.role}: there is no ConfigMap {config['name']}"
    for job in jobs(objects):
        for key in ("output", "cache"):
            if not re.search(rf"\b{key}=(/shared/|s3://|gs://)", job["entrypoint"]):
                yield f"{key} is not on the shared volume"


def security(objects: list[Object]) -> Iterator[str]:
    """No root, no more rights than are needed, no secret in clear, and no cluster without a token."""
    for template in _templates(objects):
        spec = template["spec"]
        user = spec.get("securityContext", {})
        if not user.get("runAsNonRoot") or user.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield "a pod that may run as root, or with any system call"
        if spec.get("hostNetwork") or spec.get("hostPID") or any("hostPath" in v for v in spec.get("volumes", [])):
            yield "a pod that reaches into its node"
        if spec.get("automountServiceAccountToken") is not False and not _has_autoscaler(objects, template):
            yield "a pod with a token that it does not need"
    for item in _containers(objects):
        context = item.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield f"{item['name']}: may gain rights"
        if context.get("capabilities", {}).get("drop") != ["ALL"] or not context.get("readOnlyRootFilesystem"):
            yield f"{item['name']}: keeps capabilities, or may write to its root"
        if context.get("capabilities", {}).get("add"):
            yield f"{item['name']}: adds capabilities, which do nothing for a process that is not root"
        for variable in item.get("env", []):
            if _SECRET.search(variable["name"]) and "value" in variable:
                yield f"{item['name']}: {variable['name']} in clear"
    if kind(objects, "Secret"):
        yield "a Secret among the manifests"
    for cluster in clusters(objects):
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "a cluster without a token"


def enforced(objects: list[Object]) -> Iterator[str]:
    """The namespace refuses what the pods do not need."""
    for space in kind(objects, "Namespace"):
        level = space["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
        if level != "restricted":
            yield f"the namespace enforces {level}"


def selectors(objects: list[Object]) -> Iterator[str]:
    """Policies, budgets, monitors, services and spreads select pods that are there, and name ports that these have."""
    labels = [pod.labels for pod in pods(objects)]
    ports = [{port["name"] for port in pod.main.get("ports", [])} for pod in pods(objects)]
    for item in kind(objects, "Deployment"):
        labels.append(item["spec"]["template"]["metadata"]["labels"])
        ports.append({port["name"] for port in item["spec"]["template"]["spec"]["containers"][0].get("ports", [])})
    for who, selector, wanted in _selections(objects):
        chosen = [n for n, have in enumerate(labels) if selector.items() <= have.items()]
        if labels and not chosen:
            yield f"{who}: selects no pod"
        if missing := wanted - {name for n in chosen for name in ports[n]}:
            yield f"{who}: no pod that it selects has the port {', '.join(sorted(missing))}"


def budget(objects: list[Object]) -> Iterator[str]:
    """The head is not evicted, and pods get the time that their last work takes."""
    for item in kind(objects, "PodDisruptionBudget"):
        if item["spec"].get("minAvailable", 0) < 100 or "maxUnavailable" in item["spec"]:
            yield "PodDisruptionBudget: minAvailable, of more heads than there are: some sweeps' would be evicted"
        if item["spec"].get("unhealthyPodEvictionPolicy") != "AlwaysAllow":
            yield "PodDisruptionBudget: a head that never gets ready holds a drain up for ever"
    for pod in pods(objects):
        hook = " ".join(pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        wait = re.search(r"\{1\.\.(\d+)\}", hook)
        if pod.role == "head" and (wait is None or pod.spec["terminationGracePeriodSeconds"] < int(wait[1])):
            yield "head: it is killed before a driver that was told to stop has written its results"
    for pod in workers(objects):
        hook = " ".join(pod.main.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", []))
        drain = re.search(r"ray drain-node .*--deadline-remaining-seconds (\d+)", hook)
        if drain is None or pod.spec["terminationGracePeriodSeconds"] < int(drain[1]):
            yield f"{pod.group}: it is killed before its trials have written a checkpoint"


def quotas(objects: list[Object]) -> Iterator[str]:
    """What the cluster may grow to fits the quota of its namespace."""
    for item in kind(objects, "ResourceQuota"):
        hard = item["spec"]["hard"]
        wanted = totals(objects)
        wanted["pods"] = sum(pod.high for pod in pods(objects))
        wanted["persistentvolumeclaims"] = len(kind(objects, "PersistentVolumeClaim"))
        for key, limit in hard.items():
            if wanted[key.removeprefix("requests.").removeprefix("limits.")] > quantity(limit):
                yield f"ResourceQuota: {key} {limit} is less than the cluster may need"


def queue(objects: list[Object]) -> Iterator[str]:
    """A job in a queue of Kueue is begun by it, is of a fixed size, and ends its cluster itself."""
    for item in kind(objects, "RayJob"):
        if "kueue.x-k8s.io/queue-name" not in item["metadata"].get("labels", {}):
            continue
        spec = item["spec"]
        if not spec.get("suspend"):
            yield "Kueue: it lifts suspend"
        if autoscaled(spec["rayClusterSpec"]) or len(spec["rayClusterSpec"]["workerGroupSpecs"]) > 7:
            yield "Kueue: a fixed size, of seven groups at most"


def fault_tolerance(objects: list[Object]) -> Iterator[str]:
    """Redis keeps the state of a cluster whose drivers are not on its head, with a password from a Secret."""
    for cluster in clusters(objects):
        options = cluster.get("gcsFaultToleranceOptions")
        if options is None:
            continue
        if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
            yield "gcsFaultToleranceOptions: a password from a Secret"
        host = options["redisAddress"].partition(":")[0]
        if host not in [item["metadata"]["name"] for item in kind(objects, "Service")]:
            yield f"gcsFaultToleranceOptions: there is no service {host}"
        if "redis-password" in cluster["headGroupSpec"]["rayStartParams"]:
            yield "redis-password is set twice"
        if not _drivers(cluster):
            yield "a cluster that outlives its head has its drivers elsewhere"


def redis(objects: list[Object]) -> Iterator[str]:
    """Redis holds the working folders of all sweeps that run, and one more that is just submitted."""
    for item in kind(objects, "Deployment"):
        spec, host = item["spec"]["template"]["spec"], item["metadata"]["name"]
        memory = quantity(spec["containers"][0]["resources"]["limits"]["memory"])
        wanted = max((1 + sum(map(_drivers, clusters(objects)))) * LIMIT * 10**6, _LARGEST)
        if memory < _WRITTEN * wanted:
            yield f"{host}: {memory:g} bytes, and working folders of {wanted:g}, {_WRITTEN} times that while written"
        claims = {volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]}
        for claim in kind(objects, "PersistentVolumeClaim"):
            disk = quantity(claim["spec"]["resources"]["requests"]["storage"])
            if claim["metadata"]["name"] in claims and disk < 3 * memory:
                yield f"{host}: a disk of {disk:g} bytes does not hold its log twice"


RULES = (
    *(names, versions, no_latest, head, replicas, autoscaler, deadlines, deletion, gpus, memory, storage, security),
    *(enforced, selectors, budget, quotas, queue, fault_tolerance, redis),
)


def _hours(objects: list[Object], job: Object) -> float:
    """Of a sweep in all, as its command has it, or its config; 0 without a limit."""
    if typed := re.search(r"budget\.wall_hours=(\S+)", job["entrypoint"]):
        return float(typed[1])
    texts = [item["data"]["sweep.yaml"] for item in kind(objects, "ConfigMap") if "sweep.yaml" in item["data"]]
    return max((yaml.safe_load(text).get("budget", {}).get("wall_hours", 0) for text in texts), default=0)


def _drivers(cluster: Object) -> float:
    """How many sweeps may run at a time, by the resource that their drivers take."""
    return sum(
        float(group.get("resources", {}).get("driver", 0)) * group["maxReplicas"]
        for group in cluster["workerGroupSpecs"]
    )


def totals(objects: list[Object]) -> dict[str, float]:
    """Cores, bytes and devices of all pods together, at their most."""
    found = {key: sum(p.limit(key) * p.high for p in pods(objects)) for key in ("cpu", "memory", "nvidia.com/gpu")}
    for cluster in clusters(objects):
        for key, limit in cluster.get("autoscalerOptions", {}).get("resources", {}).get("limits", {}).items():
            found[key] += quantity(limit)
    return found


def _templates(objects: list[Object]) -> list[Object]:
    others = [item["spec"]["template"] for item in kind(objects, "Deployment")] + kind(objects, "Pod")
    return [pod.template for pod in pods(objects)] + others


def _containers(objects: list[Object]) -> list[Object]:
    found = [
        item for t in _templates(objects) for item in t["spec"]["containers"] + t["spec"].get("initContainers", [])
    ]
    for cluster in clusters(objects):
        if autoscaled(cluster):
            image = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
            found.append({"name": "autoscaler", "image": image} | cluster.get("autoscalerOptions", {}))
    return found


def _has_autoscaler(objects: list[Object], template: Object) -> bool:
    return any(autoscaled(c) and c["headGroupSpec"]["template"] is template for c in clusters(objects))


def _wants_spot(pod: Pod) -> bool:
    return any(re.search("spot", item["key"]) for item in pod.spec.get("tolerations", []))


def _avoided(pod: Pod) -> set[str]:
    affinity: Any = pod.spec.get("affinity", {}).get("nodeAffinity", {})
    terms = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [{}])
    keys = [{e["key"] for e in t.get("matchExpressions", []) if e["operator"] == "NotIn"} for t in terms]
    return set.intersection(*keys)


def _selections(objects: list[Object]) -> Iterator[tuple[str, dict[str, str], set[str]]]:
    """Who selects, the labels, and the names of the ports that it counts on."""
    for item in objects:
        who, spec = f"{item['kind']} {item['metadata']['name']}", item.get("spec", {})
        if item["kind"] == "NetworkPolicy":
            named = {str(p["port"]) for rule in spec.get("ingress", []) for p in rule.get("ports", [])}
            yield who, spec["podSelector"]["matchLabels"], named
        elif item["kind"] == "PodMonitor":
            yield who, spec["selector"]["matchLabels"], {end["port"] for end in spec["podMetricsEndpoints"]}
        elif item["kind"] == "Service":
            yield who, spec["selector"], {str(port["targetPort"]) for port in spec["ports"]}
        elif item["kind"] in ("PodDisruptionBudget", "Deployment"):
            yield who, spec["selector"]["matchLabels"], set()
    for pod in pods(objects):
        terms = pod.spec.get("topologySpreadConstraints", [])
        terms += (
            pod.spec.get("affinity", {})
            .get("podAffinity", {})
            .get("requiredDuringSchedulingIgnoredDuringExecution", [])
        )
        for term in terms:
            yield f"{pod.role} {pod.group}", term["labelSelector"]["matchLabels"], set()
