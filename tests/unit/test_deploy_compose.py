"""compose.yaml: against Compose's own schema, and against what the product needs. No container is started here."""

import json
import re
from pathlib import PurePosixPath
from typing import Any

import jsonschema
import pytest
import typer
from deployment import DEPLOY, document
from programs import go_module

from innerloop.worker.cli import app

SPECIFICATION = "github.com/compose-spec/compose-go/v2@v2.16.2"
OURS = {"migrate", "topics", "train", "ingest", "adapt", "quality", "console"}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = document(DEPLOY / "compose.yaml")["services"]
    return found


@pytest.mark.timeout(600)
def test_it_has_the_shape_that_compose_publishes() -> None:
    schema = json.loads((go_module(SPECIFICATION) / "schema" / "compose-spec.json").read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(document(DEPLOY / "compose.yaml"))


def test_every_part_is_there(services: dict[str, Any]) -> None:
    assert set(services) == OURS | {"kafka", "postgres", "prometheus", "grafana"}
    assert services["train"]["profiles"] == ["train"]


def test_what_is_published_is_published_on_loopback_alone(services: dict[str, Any]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
    assert not any("ports" in services[name] for name in ("ingest", "adapt", "quality")), "or they could not be scaled"


def test_our_containers_run_commands_that_exist_and_may_do_little(services: dict[str, Any]) -> None:
    commands: Any = typer.main.get_command(app)
    for name in OURS:
        command, *arguments = services[name]["command"]
        commands.commands[command].make_context(command, list(arguments))
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]


def test_everything_that_stays_has_a_health_check(services: dict[str, Any]) -> None:
    for name, service in services.items():
        one_shot = service.get("restart") == "no"
        of_the_image = name in {"ingest", "adapt", "quality"}
        check = service.get("healthcheck", {})
        assert check.get("disable") is True if one_shot else of_the_image or "test" in check, name


def test_no_password_is_written_down(services: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    for name in ("POSTGRES_PASSWORD", "GRAFANA_PASSWORD"):
        assert re.search(rf"\$\{{{name}:\?|environment: {name}\b", text)
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD_FILE"] == "/run/secrets/postgres_password"
    assert "${POSTGRES_PASSWORD:?" in services["ingest"]["environment"]["INNERLOOP_DATABASE__URL"]


def test_images_are_plain_names_with_a_version(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name not in OURS:
            assert re.fullmatch(r"[a-z]+(/[a-z]+)?:v?\d[\w.]*", service["image"]), service["image"]


def test_what_is_mounted_from_here_is_here(services: dict[str, Any]) -> None:
    mounted = [volume for each in services.values() for volume in each.get("volumes", []) if volume.startswith("./")]
    assert len(mounted) == 4
    assert all((DEPLOY / volume.partition(":")[0]).exists() for volume in mounted)
    dashboards = document(DEPLOY / "grafana" / "provisioning" / "dashboards" / "innerloop.yml")
    (provider,) = dashboards["providers"]
    folder = PurePosixPath(provider["options"]["path"])
    assert any(volume.split(":")[1] == str(folder) for volume in services["grafana"]["volumes"])
    home = PurePosixPath(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == folder
    assert (DEPLOY / "grafana" / "dashboards" / home.name).is_file()


def test_prometheus_looks_where_the_processes_listen(services: dict[str, Any]) -> None:
    jobs = document(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"]
    looked = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs}
    assert set(looked) == {"ingest", "adapt", "quality", "console"}
    for name, where in looked.items():
        assert where["names"] == [name]
        assert where["port"] == (8080 if name == "console" else 9464)
    targets = json.loads(services["console"]["environment"]["INNERLOOP_CONSOLE__TARGETS"])
    assert targets == [f"{name}:9464" for name in ("ingest", "adapt", "quality")]
