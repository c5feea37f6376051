"""The Kubernetes overlays as they would be applied: against published schemas, and against what the product needs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import typer
import yaml  # type: ignore[import-untyped]
from deployment import DEPLOY, built, document
from programs import go_module

from innerloop.config import Settings
from innerloop.worker.cli import app

pytestmark = pytest.mark.timeout(600)  # the first time, Go modules are fetched

Object = dict[str, Any]
KUBERNETES = "1.34"
KEDA = "github.com/kedacore/keda/v2@v2.21.0"
PROMETHEUS_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"
CUSTOM = {
    "ScaledObject": (KEDA, "config/crd/bases/keda.sh_scaledobjects.yaml"),
    "TriggerAuthentication": (KEDA, "config/crd/bases/keda.sh_triggerauthentications.yaml"),
    "ServiceMonitor": (
        PROMETHEUS_OPERATOR,
        "example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
    ),
    "PrometheusRule": (
        PROMETHEUS_OPERATOR,
        "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
    ),
}


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return built(str(request.param))


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object]]:
    """Component and pod specification of everything that starts pods."""
    for each in objects:
        spec = each.get("spec", {})
        template = spec.get("jobTemplate", {}).get("spec", spec).get("template")
        if template:
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template["spec"]


def containers(objects: list[Object]) -> Iterator[Object]:
    for _, pod in pods(objects):
        yield from pod.get("initContainers", []) + pod["containers"]


def closed(schema: Any) -> Any:
    """The same schema, refusing fields that it does not name, as the API server does in strict mode."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def test_each_object_has_the_published_shape(objects: list[Object]) -> None:
    for each in objects:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("kind", CUSTOM)
def test_each_custom_object_has_the_shape_of_its_definition(objects: list[Object], kind: str) -> None:
    module, path = CUSTOM[kind]
    definition = yaml.safe_load((go_module(module) / path).read_text())
    schemas = {each["name"]: each["schema"]["openAPIV3Schema"] for each in definition["spec"]["versions"]}
    mine = [each for each in objects if each["kind"] == kind]
    assert mine
    for each in mine:
        schema = closed(schemas[each["apiVersion"].partition("/")[2]])
        schema["properties"]["metadata"] = {"type": "object"}
        jsonschema.Draft202012Validator(schema).validate(each)


def test_keda_knows_every_option_of_the_scalers(objects: list[Object]) -> None:
    known = json.loads((go_module(KEDA) / "schema" / "generated" / "scalers-schema.json").read_text())["scalers"]
    (kafka,) = [each["parameters"] for each in known if each["type"] == "kafka"]
    allowed = {each["name"]: each.get("allowedValue") for each in kafka if each.get("metadataVariableReadable")}
    secret = {each["name"] for each in kafka if each.get("triggerAuthenticationVariableReadable")}
    for scaled in (each for each in objects if each["kind"] == "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            assert set(trigger["metadata"]) <= set(allowed)
            assert all(not allowed[name] or value in allowed[name] for name, value in trigger["metadata"].items())
    references = named(objects, "TriggerAuthentication", "innerloop-kafka")["spec"]["secretTargetRef"]
    assert {each["parameter"] for each in references} <= secret


def test_scaling_follows_the_groups_and_topics_of_the_defaults(objects: list[Object]) -> None:
    settings = Settings()
    variables = configuration(objects)
    watched = {
        "innerloop-ingest": (settings.kafka.ingest_group, [*settings.topics.events, settings.topics.impressions]),
        "innerloop-adapt": (settings.kafka.adapt_group, [settings.topics.requests]),
    }
    for name, (group, topics) in watched.items():
        spec = named(objects, "ScaledObject", name)["spec"]
        triggers = [each["metadata"] for each in spec["triggers"]]
        assert [each["topic"] for each in triggers] == topics
        assert {each["consumerGroup"] for each in triggers} == {group}
        assert {each["bootstrapServers"] for each in triggers} == {variables["INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"]}
        for each in triggers:
            assert each["limitToPartitionsWithLag"] == each["excludePersistentLag"] == "true"
            assert int(each["activationLagThreshold"]) > 0
            # What Kafka 4 no longer speaks is older than 2.1 (KIP-896); we are tested with 3.9 and newer.
            assert (2, 1) <= tuple(map(int, each["version"].split(".")[:2])) <= (3, 9)
        assert spec["maxReplicaCount"] <= int(variables["INNERLOOP_TOPICS__PARTITIONS"])
        assert "replicas" not in named(objects, "Deployment", spec["scaleTargetRef"]["name"])["spec"]


def configuration(objects: list[Object]) -> dict[str, str]:
    (found,) = [each for each in objects if each["kind"] == "ConfigMap"]
    data: dict[str, str] = found["data"]
    return data


def test_the_settings_are_read_in_a_cluster_that_names_its_services(
    objects: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in configuration(objects).items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "innerloop.worker", "config"]
    read = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert read.returncode == 0, read.stderr
    assert json.loads(read.stdout)["topics"]["partitions"] == 32
    # What the cluster would add by itself is refused as a misspelt setting, so no pod may ask for it.
    added = {**os.environ, "INNERLOOP_CONSOLE_SERVICE_HOST": "10.0.0.1"}
    assert subprocess.run(command, capture_output=True, check=False, env=added).returncode == 2
    assert all(pod["enableServiceLinks"] is False for _, pod in pods(objects))


def test_no_pod_may_do_more_than_it_needs(objects: list[Object]) -> None:
    for _, pod in pods(objects):
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] == "innerloop"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for each in containers(objects):
        assert each["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= set(each["resources"])
    assert not any(each["kind"] in {"Role", "ClusterRole", "RoleBinding"} for each in objects)


def test_secrets_are_named_and_never_held(objects: list[Object]) -> None:
    assert not any(each["kind"] == "Secret" for each in objects)
    for component, pod in pods(objects):
        for each in pod.get("initContainers", []) + pod["containers"]:
            sources = {variable["name"]: variable["valueFrom"]["secretKeyRef"] for variable in each["env"]}
            assert set(sources) == {"INNERLOOP_DATABASE__URL", "INNERLOOP_KAFKA__PROPERTIES"}
            owner = "innerloop-owner" if component == "migrate" else "innerloop"
            assert {source["name"] for source in sources.values()} == {owner}


def test_every_container_runs_a_command_that_exists(objects: list[Object]) -> None:
    commands: Any = typer.main.get_command(app)
    for each in containers(objects):
        name, *arguments = each["args"]
        commands.commands[name].make_context(name, list(arguments))


def test_every_part_is_there_and_probed_where_it_listens(objects: list[Object]) -> None:
    found = dict(pods(objects))
    assert set(found) == {"migrate", "train", "ingest", "adapt", "quality", "console"}
    for name in ("ingest", "adapt", "quality", "console"):
        (container,) = found[name]["containers"]
        (port,) = container["ports"]
        assert port == {"name": "http", "containerPort": 8080 if name == "console" else 9464}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == "http"
        assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        service = named(objects, "Service", f"innerloop-{name}")
        assert service["metadata"]["labels"]["app.kubernetes.io/name"] == "innerloop"  # the monitor looks for it
        assert service["spec"]["selector"]["app.kubernetes.io/component"] == name


def test_the_gpu_overlay_gives_each_adapt_pod_one_gpu_and_nobody_else_any() -> None:
    for component, pod in pods(built("gpu")):
        for each in pod["containers"]:
            wanted = 1 if component == "adapt" else None
            assert each["resources"]["limits"].get("nvidia.com/gpu") == wanted
    (adapt,) = dict(pods(built("gpu")))["adapt"]["containers"]
    assert adapt["args"] == ["adapt", "--processes", "4", "--devices", "cuda:0"]


def test_the_cluster_has_the_rules_that_were_tested(objects: list[Object]) -> None:
    assert named(objects, "PrometheusRule", "innerloop")["spec"] == document(DEPLOY / "prometheus" / "rules.yml")


@pytest.mark.parametrize("kind", ["ServiceMonitor", "PrometheusRule"])
def test_a_prometheus_of_the_usual_chart_selects_what_watches_us(objects: list[Object], kind: str) -> None:
    assert named(objects, kind, "innerloop")["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_names_are_asked_for_anywhere(objects: list[Object]) -> None:
    """A cache on the node has a host's address: a selector of pods or namespaces would shut it out."""
    egress = named(objects, "NetworkPolicy", "innerloop")["spec"]["egress"]
    anywhere = {(port["protocol"], port["port"]) for rule in egress if "to" not in rule for port in rule["ports"]}
    assert {("UDP", 53), ("TCP", 53)} <= anywhere
    servers = configuration(objects)["INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"].split(",")
    assert {("TCP", int(server.rpartition(":")[2])) for server in servers} <= anywhere
