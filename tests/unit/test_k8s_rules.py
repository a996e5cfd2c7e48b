"""The manifests keep every rule that sweeps on KubeRay go wrong by, and each rule finds what breaks it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests import k8s
from tests.k8s import GONE, changed
from tests.unit import k8s_rules as rules

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders k8s/, is not installed")

CLUSTER = "RayJob spec/rayClusterSpec"
HEAD = f"{CLUSTER}/headGroupSpec"
HEAD_POD = f"{HEAD}/template/spec"
WORKERS = f"{CLUSTER}/workerGroupSpecs/0"
POD = f"{WORKERS}/template/spec"
MAIN = f"{POD}/containers/0"
AFFINITY = "nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms/0/matchExpressions"
ENFORCED = "pod-security.kubernetes.io~1enforce"
TOKEN = {"name": "HF_TOKEN", "value": "hf_abc"}
SPREAD = "topologySpreadConstraints/0/labelSelector/matchLabels"

# what is done to which overlay, and the rule that finds it
FAULTS: list[tuple[Any, str, str, Any]] = [
    (rules.names, "base", "RayJob metadata/name", "s" * 48),
    (rules.names, "base", "RayJob metadata/name", "7b-sweep"),
    (rules.names, "overlays/nightly", "RayCronJob metadata/name", "n" * 37),
    (rules.names, "overlays/standing", "RayCluster metadata/name", "s" * 54),
    (rules.versions, "base", f"{CLUSTER}/rayVersion", GONE),
    (rules.versions, "base", f"{CLUSTER}/rayVersion", "2.59.0"),
    (rules.versions, "base", f"{MAIN}/image", "raytune-lora:0.1.0-ray2.59.0-cpu"),
    (rules.versions, "overlays/spot", f"{CLUSTER}/autoscalerOptions/image", "rayproject/ray:2.60.0"),
    (rules.no_latest, "base", f"{MAIN}/image", "raytune-lora:latest"),
    (rules.no_latest, "overlays/standing", "Deployment spec/template/spec/containers/0/image", "redis"),
    (rules.head, "base", f"{HEAD}/rayStartParams/num-cpus", "4"),
    (rules.head, "overlays/gpu", f"{HEAD_POD}/containers/0/resources/limits/nvidia.com~1gpu", 1),
    (rules.head, "overlays/spot", f"{HEAD_POD}/tolerations", [{"key": "spot", "operator": "Exists"}]),
    (rules.head, "overlays/spot", f"{HEAD_POD}/affinity", GONE),
    (rules.head, "overlays/spot", f"{HEAD_POD}/affinity/{AFFINITY}/2", GONE),
    (rules.head, "overlays/spot", "RayJob spec/submitterPodTemplate/spec/affinity", GONE),
    (rules.replicas, "base", f"{WORKERS}/maxReplicas", GONE),
    (rules.replicas, "base", f"{WORKERS}/minReplicas", 2),
    (rules.replicas, "base", f"{WORKERS}/maxReplicas", 2147483647),
    (rules.autoscaler, "base", f"{WORKERS}/priority", 1),
    (rules.autoscaler, "base", f"{WORKERS}/idleTimeoutSeconds", 60),
    (rules.autoscaler, "overlays/spot", f"{CLUSTER}/enableInTreeAutoscaling", False),
    (rules.autoscaler, "overlays/spot", f"{CLUSTER}/autoscalerOptions/version", GONE),
    (rules.autoscaler, "overlays/spot", f"{CLUSTER}/autoscalerOptions/resources/limits/memory", "512Mi"),
    (rules.autoscaler, "overlays/spot", f"{POD}/restartPolicy", "Always"),
    (rules.autoscaler, "overlays/spot", f"{HEAD_POD}/automountServiceAccountToken", False),
    (rules.autoscaler, "overlays/spot", f"{HEAD_POD}/containers/0/env/0/name", "RAY_enable_autoscaler_v2"),
    (rules.deadlines, "base", "RayJob spec/submissionMode", "K8SJobMode"),
    (rules.deadlines, "base", "RayJob spec/submissionMode", "SidecarMode"),
    (rules.deadlines, "base", "RayJob spec/submissionMode", "InteractiveMode"),
    (rules.deadlines, "base", "RayJob spec/activeDeadlineSeconds", GONE),
    (rules.deadlines, "base", "RayJob spec/preRunningDeadlineSeconds", GONE),
    (rules.deadlines, "base", "RayJob spec/preRunningDeadlineSeconds", 86400),
    (rules.deadlines, "base", "RayJob spec/activeDeadlineSeconds", 86400),
    (rules.deadlines, "base", "ConfigMap data/sweep.yaml", "workers: 1"),
    (rules.deadlines, "base", "RayJob spec/runtimeEnvYAML", GONE),
    (rules.deadlines, "base", "RayJob spec/runtimeEnvYAML", "env_vars: {RAYTUNE_LORA_REFUSED: stopped}"),
    (rules.deadlines, "overlays/nightly", "RayCronJob spec/jobTemplate/preRunningDeadlineSeconds", 3600),
    (rules.deadlines, "overlays/nightly", "RayCronJob spec/schedule", "0 */12 * * *"),
    (rules.deadlines, "base", "RayJob spec/backoffLimit", 0),
    (rules.deadlines, "base", "RayJob spec/clusterSelector", {"ray.io/cluster": "other"}),
    (rules.deadlines, "base", "RayJob spec/entrypoint", "python /app/jobs/sweep.py experiment=sweep"),
    (rules.deletion, "base", "RayJob spec/shutdownAfterJobFinishes", GONE),
    (rules.deletion, "base", "RayJob spec/ttlSecondsAfterFinished", 3600),
    (rules.deletion, "base", "RayJob spec/ttlSecondsAfterFinished", GONE),
    (rules.deletion, "base", "RayJob spec/deletionStrategy", {"deletionRules": []}),
    (rules.deletion, "overlays/nightly", "RayCronJob spec/jobTemplate/shutdownAfterJobFinishes", GONE),
    (rules.deletion, "base", "RayJob spec/managedBy", "me"),
    (rules.gpus, "overlays/gpu", f"{MAIN}/resources/requests/cpu", "8"),
    (rules.gpus, "overlays/dev", f"{MAIN}/resources/requests/memory", "1Gi"),
    (rules.gpus, "overlays/gpu", f"{POD}/nodeSelector", GONE),
    (rules.gpus, "overlays/gpu", f"{POD}/tolerations", []),
    (rules.gpus, "overlays/gpu", f"{MAIN}/image", "raytune-lora:0.1.0-ray2.60.0-cpu"),
    (rules.gpus, "overlays/dev", f"{MAIN}/image", "raytune-lora:0.1.0-ray2.60.0-cu130"),
    (rules.memory, "overlays/gpu", f"{POD}/volumes/1/emptyDir/medium", GONE),
    (rules.memory, "overlays/gpu", f"{POD}/volumes/1/emptyDir/sizeLimit", "2Gi"),
    (rules.memory, "overlays/gpu", f"{POD}/volumes/1/emptyDir/sizeLimit", "200Gi"),
    (rules.memory, "overlays/gpu", f"{MAIN}/volumeMounts/1", GONE),
    (rules.memory, "base", f"{WORKERS}/rayStartParams/object-store-memory", GONE),
    (rules.storage, "base", f"{MAIN}/volumeMounts/2/mountPath", "/data"),
    (rules.storage, "base", f"{POD}/volumes/2/persistentVolumeClaim/claimName", "other"),
    (rules.storage, "base", "PersistentVolumeClaim metadata/name", "other"),
    (rules.storage, "base", "ConfigMap metadata/name", "other"),
    (rules.storage, "base", "RayJob spec/entrypoint", "python /app/jobs/sweep.py output=/shared/x cache=/tmp/cache"),
    (rules.security, "base", f"{POD}/securityContext/runAsNonRoot", GONE),
    (rules.security, "base", f"{POD}/securityContext/seccompProfile", GONE),
    (rules.security, "base", f"{POD}/hostNetwork", True),
    (rules.security, "base", f"{POD}/automountServiceAccountToken", True),
    (rules.security, "base", f"{POD}/volumes/0", {"name": "tmp", "hostPath": {"path": "/"}}),
    (rules.security, "base", f"{MAIN}/securityContext/privileged", True),
    (rules.security, "base", f"{MAIN}/securityContext/allowPrivilegeEscalation", GONE),
    (rules.security, "base", f"{MAIN}/securityContext/capabilities/drop", []),
    (rules.security, "base", f"{MAIN}/securityContext/readOnlyRootFilesystem", False),
    (rules.security, "overlays/multinode-70b", f"{MAIN}/securityContext/capabilities/add", ["IPC_LOCK"]),
    (rules.security, "base", f"{MAIN}/env/3", TOKEN),
    (rules.security, "base", f"{CLUSTER}/authOptions/mode", "disabled"),
    (rules.security, "base", f"{CLUSTER}/authOptions", GONE),
    (rules.security, "base", "ConfigMap kind", "Secret"),
    (rules.security, "overlays/spot", f"{CLUSTER}/autoscalerOptions/securityContext", GONE),
    (rules.enforced, "base", f"Namespace metadata/labels/{ENFORCED}", "baseline"),
    (rules.enforced, "overlays/multinode-70b", f"Namespace metadata/labels/{ENFORCED}", "privileged"),
    (rules.selectors, "base", "NetworkPolicy spec/podSelector/matchLabels/app", "ray"),
    (rules.selectors, "base", "NetworkPolicy spec/ingress/1/ports/0/port", "dash"),
    (rules.selectors, "base", "PodDisruptionBudget spec/selector/matchLabels/ray.io~1node-type", "driver"),
    (rules.selectors, "overlays/monitoring", "PodMonitor spec/selector/matchLabels/app", "ray"),
    (rules.selectors, "overlays/monitoring", "PodMonitor spec/podMetricsEndpoints/0/port", "metric"),
    (rules.selectors, "overlays/monitoring", f"{HEAD_POD}/containers/0/ports/3", GONE),
    (rules.selectors, "overlays/standing", "Service spec/selector/component", "valkey"),
    (rules.selectors, "overlays/multinode-70b", f"{POD}/{SPREAD}/ray.io~1group", "cpu"),
    (rules.budget, "base", "PodDisruptionBudget spec/maxUnavailable", 0),
    (rules.budget, "base", "PodDisruptionBudget spec/minAvailable", 1),
    (rules.budget, "base", "PodDisruptionBudget spec/unhealthyPodEvictionPolicy", GONE),
    (rules.budget, "base", f"{HEAD_POD}/containers/0/lifecycle", GONE),
    (rules.budget, "base", f"{HEAD_POD}/terminationGracePeriodSeconds", 30),
    (rules.budget, "base", f"{MAIN}/lifecycle", GONE),
    (rules.budget, "base", f"{POD}/terminationGracePeriodSeconds", 30),
    (rules.quotas, "overlays/spot", f"{WORKERS}/maxReplicas", 3),
    (rules.quotas, "overlays/spot", "ResourceQuota spec/hard/limits.memory", "2000Gi"),
    (rules.queue, "overlays/kueue", "RayJob spec/suspend", GONE),
    (rules.queue, "overlays/kueue", f"{CLUSTER}/enableInTreeAutoscaling", True),
]
STANDING, REDIS = "RayCluster spec", "Deployment spec/template/spec"
FAULTS += [
    (
        rules.fault_tolerance,
        "overlays/standing",
        f"{STANDING}/gcsFaultToleranceOptions/redisPassword",
        {"value": "1234"},
    ),
    (rules.fault_tolerance, "overlays/standing", f"{STANDING}/gcsFaultToleranceOptions/redisAddress", "valkey:6379"),
    (rules.fault_tolerance, "overlays/standing", f"{STANDING}/headGroupSpec/rayStartParams/redis-password", "1234"),
    (rules.fault_tolerance, "overlays/standing", f"{STANDING}/workerGroupSpecs/1", GONE),
    (rules.redis, "overlays/standing", f"{REDIS}/containers/0/resources/limits/memory", "256Mi"),
    (rules.redis, "overlays/standing", f"{REDIS}/containers/0/resources/limits/memory", "4Gi"),
    (rules.redis, "overlays/standing", f"{STANDING}/workerGroupSpecs/1/maxReplicas", 4),
]


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("folder", [folder for folder in k8s.APPLIED if folder not in k8s.SPACES])
def test_every_overlay_keeps_the_rules(folder: str, rule: Any) -> None:
    assert list(rule(k8s.together(folder))) == []


@pytest.mark.parametrize(
    ("rule", "folder", "where", "value"),
    FAULTS,
    ids=[
        f"{rule.__name__}-{where.split('/', 2)[-1]}-{'gone' if value is GONE else value}"[:90]
        for rule, _, where, value in FAULTS
    ],
)
def test_a_fault_is_found(rule: Any, folder: str, where: str, value: Any) -> None:
    assert list(rule(changed(k8s.together(folder), where, value)))


def test_every_rule_has_a_fault() -> None:
    assert {rule for rule, *_ in FAULTS} == set(rules.RULES)


def test_the_queue_has_room_for_its_sweep() -> None:
    """Kueue's quota holds the job whole, the label leads to a queue, and the queue to the quota."""
    (job,) = k8s.kind(k8s.together("overlays/kueue"), "RayJob")
    queues = k8s.together("overlays/kueue/queues")
    (local,), (cluster,) = k8s.kind(queues, "LocalQueue"), k8s.kind(queues, "ClusterQueue")
    (priority,) = k8s.kind(queues, "WorkloadPriorityClass")
    assert job["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": local["metadata"]["name"],
        "kueue.x-k8s.io/priority-class": priority["metadata"]["name"],
    }
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (flavor,) = cluster["spec"]["resourceGroups"][0]["flavors"]
    assert flavor["name"] == k8s.kind(queues, "ResourceFlavor")[0]["metadata"]["name"]
    quota = {entry["name"]: k8s.quantity(entry["nominalQuota"]) for entry in flavor["resources"]}
    wanted = rules.totals(k8s.together("overlays/kueue"))
    assert all(wanted[name] <= quota[name] for name in wanted)


def test_spot_trials_are_tolerated_where_they_are_wanted() -> None:
    on_demand, spot = k8s.workers(k8s.together("overlays/spot"))
    assert not [item for item in on_demand.spec["tolerations"] if "spot" in item["key"]]
    assert [item for item in spot.spec["tolerations"] if "spot" in item["key"]]
    groups = k8s.clusters(k8s.together("overlays/spot"))[0]["workerGroupSpecs"]
    assert groups[1]["priority"] > groups[0].get("priority", 0), "spot first, it is what the overlay is for"
