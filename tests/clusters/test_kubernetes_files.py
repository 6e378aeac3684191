"""The Kubernetes manifests, read by the API's own schemas and held against each other.

KubeRay's two kinds have no schema in a package: their pods are checked by Kubernetes' schema, their own fields by the
names and rules of KubeRay 1.6.2's reference, written down here.
"""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cluster_texts import ROOT, all_manifests, arguments_after, manifest

KUBERNETES = "1.33"

# Fields of KubeRay 1.6.2, https://docs.ray.io/en/master/cluster/kubernetes/references/api.html
CLUSTER_FIELDS = {
    "": {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "autoscalerOptions": {
        *("version", "idleTimeoutSeconds", "upscalingMode", "resources", "image", "imagePullPolicy"),
        *("securityContext", "env", "envFrom", "volumeMounts"),
    },
    "headGroupSpec": {
        "template",
        "headService",
        "enableIngress",
        "rayStartParams",
        "serviceType",
        "resources",
        "labels",
    },
}
WORKER_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds", "rayStartParams", "template"),
    *("scaleStrategy", "numOfHosts", "resources", "labels"),
}
JOB_FIELDS = {
    *(
        "activeDeadlineSeconds",
        "backoffLimit",
        "submitterPodTemplate",
        "metadata",
        "clusterSelector",
        "submitterConfig",
    ),
    *("entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources", "entrypointNumCpus"),
    *("entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "suspend", "rayClusterSpec"),
}


@pytest.mark.parametrize("each", all_manifests(), ids=lambda each: each["kind"])
def test_kubernetes_accepts_manifest(each: dict[str, Any]) -> None:
    if each["apiVersion"].startswith("ray.io/"):
        for template in _pod_templates(each):
            wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "wrapped"}, "template": template}
            kubernetes_validate.validate(wrapped, KUBERNETES, strict=True)
    else:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_raycluster_follows_kuberays_rules() -> None:
    spec = manifest("RayCluster")["spec"]
    for part, known in CLUSTER_FIELDS.items():
        assert set(spec[part] if part else spec) <= known
    (workers,) = spec["workerGroupSpecs"]
    assert set(workers) <= WORKER_FIELDS
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert all(
        isinstance(each, str) for group in (spec["headGroupSpec"], workers) for each in group["rayStartParams"].values()
    )
    assert all(each["spec"]["restartPolicy"] == "Never" for each in _pod_templates(manifest("RayCluster")))
    assert workers["replicas"] == workers["minReplicas"] == 0 < workers["maxReplicas"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert f"ray=={spec['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_rayjob_follows_kuberays_rules() -> None:
    job = manifest("RayJob")
    assert set(job["spec"]) <= JOB_FIELDS
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": manifest("RayCluster")["metadata"]["name"]}
    # With a cluster of its own only: KubeRay refuses or ignores these beside a selector.
    assert not {"rayClusterSpec", "backoffLimit", "suspend", "shutdownAfterJobFinishes"} & set(job["spec"])
    assert not any(each.startswith("entrypoint") and each != "entrypoint" for each in job["spec"])  # stays on the head


def test_head_pod_is_kept_off_spot_nodes() -> None:
    head, worker = _pod_templates(manifest("RayCluster"))
    (term,) = head["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    refused = {each["key"]: each["values"] for each in term["matchExpressions"] if each["operator"] == "NotIn"}
    assert all(value in refused[key] for key, value in worker["spec"]["nodeSelector"].items())
    assert head["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"


def test_manifests_refer_to_what_is_there() -> None:
    created = {}
    for words in arguments_after("kuberay/kustomization.yaml", ["create", "secret", "generic"]):
        created[words[0]] = {key for word in words for key in re.findall(r"--from-file=([\w-]+)=", word)}
    everything = yaml.safe_dump_all(all_manifests())
    used = [each["secretKeyRef"] for each in _nodes_with(all_manifests(), "secretKeyRef")]
    assert len(used) >= 5
    assert all(each["key"] in created[each["name"]] for each in used)
    assert set(re.findall(r"secretName: (\S+)", everything)) <= set(created)
    assert created[manifest("RayCluster")["spec"]["authOptions"]["secretName"]] == {"auth_token"}
    claims = {each["metadata"]["name"] for each in all_manifests() if each["kind"] == "PersistentVolumeClaim"}
    assert set(re.findall(r"claimName: (\S+)", everything)) == claims
    services = {each["metadata"]["name"] for each in all_manifests() if each["kind"] == "Service"}
    assert set(re.findall(r"(?:@|http://)(refilled-[a-z]+):", everything)) == services


def test_pods_are_closed_to_others() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in all_manifests() if each["kind"] == "NetworkPolicy"}
    assert policies["nobody-enters"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    labels = [{"ray.io/cluster": "refilled", "ray.io/node-type": "head"}]  # KubeRay's own, on the head
    labels += [
        each["template"]["metadata"]["labels"]
        for each in _nodes_with(all_manifests(), "template")
        if "metadata" in each["template"] and "labels" in each["template"]["metadata"]
    ]
    labels.append(manifest("RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"])
    selectors = [
        each["podSelector"].get("matchLabels", {}) for each in _nodes_with(list(policies.values()), "podSelector")
    ]
    assert all(any(wanted.items() <= there.items() for there in labels) for wanted in selectors)
    assert not [each for each in all_manifests() if each["kind"] == "Ingress"]
    assert {each["spec"].get("type", "ClusterIP") for each in all_manifests() if each["kind"] == "Service"} == {
        "ClusterIP"
    }


def _pod_templates(each: dict[str, Any]) -> list[dict[str, Any]]:
    spec = each["spec"]
    if each["kind"] == "RayJob":
        return [spec["submitterPodTemplate"]]
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def _nodes_with(node: Any, key: str) -> list[dict[str, Any]]:
    """Every mapping below a node that has a key."""
    if isinstance(node, list):
        return [found for each in node for found in _nodes_with(each, key)]
    if not isinstance(node, dict):
        return []
    return ([node] if key in node else []) + [found for each in node.values() for found in _nodes_with(each, key)]
