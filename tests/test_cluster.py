"""The Kubernetes manifest is valid, and closed where the cluster guide says so."""

import copy
import json
from pathlib import Path

import pytest

jsonschema = pytest.importorskip("jsonschema")
yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
SCHEMA = json.loads((ROOT / "tests" / "raycluster.schema.json").read_text())


@pytest.fixture
def manifest():
    return list(yaml.safe_load_all((ROOT / "examples" / "cluster" / "raycluster.yaml").read_text()))


def groups(cluster):
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]


def test_the_manifest_is_valid(manifest):
    cluster, _ = manifest
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    jsonschema.validate(cluster, SCHEMA)
    for change in (
        lambda c: c["spec"].pop("headGroupSpec"),
        lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),  # texts only
        lambda c: c["spec"]["workerGroupSpecs"][0].update(replica=3),
        lambda c: c["spec"]["workerGroupSpecs"][0].update(replicas="4"),
        lambda c: c["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].pop("name"),
    ):
        broken = copy.deepcopy(cluster)
        change(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_the_manifest_keeps_its_ports_closed(manifest):
    cluster, policy = manifest
    head = cluster["spec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["include-dashboard"] == "false"
    for group in groups(cluster):
        for container in group["template"]["spec"]["containers"]:
            environment = {e["name"]: e for e in container["env"]}
            assert environment["RAY_AUTH_MODE"]["value"] == "token"
            assert "secretKeyRef" in environment["RAY_AUTH_TOKEN"]["valueFrom"], "a token in the manifest itself"
            assert environment["RAY_USAGE_STATS_ENABLED"]["value"] == "0"
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["podSelector"]["matchLabels"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert all("podSelector" in peer for rule in policy["spec"]["ingress"] for peer in rule["from"])


def test_the_guide_names_the_version_of_the_manifest(manifest):
    constraints = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert manifest[0]["spec"]["rayVersion"] == constraints["ray"]
