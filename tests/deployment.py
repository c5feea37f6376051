"""What `deploy/` holds, as data."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from programs import program

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "innerloop.json"
_KUSTOMIZE = "sigs.k8s.io/kustomize/kustomize/v5@v5.7.1"
_BUILDS_IT = "kustomize, kubectl, or Go 1.22.7 or newer (https://go.dev/dl; Debian 12's golang-go is 1.19)"


def document(path: Path) -> Any:
    """The one document of a YAML file."""
    return yaml.safe_load(path.read_text())


def built(overlay: str) -> list[dict[str, Any]]:
    """Every object of a Kubernetes overlay."""
    command = [*kustomize(), str(DEPLOY / "kubernetes" / "overlays" / overlay)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def kustomize() -> list[str]:
    """The command that builds an overlay; made from the Go module where neither it nor kubectl is installed."""
    if found := shutil.which("kustomize"):
        return [found, "build"]
    if found := shutil.which("kubectl"):
        return [found, "kustomize"]
    made = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "innerloop" / "go" / "kustomize"
    if not made.exists():
        command = [program("go", f"to build kustomize; install {_BUILDS_IT}"), "install", _KUSTOMIZE]
        environment = {**os.environ, "GOBIN": str(made.parent)}
        got = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=Path.home())
        if got.returncode != 0:
            pytest.skip(f"needs {_BUILDS_IT}; kustomize cannot be built: {got.stderr.strip().splitlines()[-1]}")
    return [str(made), "build"]


def rules() -> list[dict[str, Any]]:
    """Every rule of `prometheus/rules.yml`."""
    return [rule for group in document(DEPLOY / "prometheus" / "rules.yml")["groups"] for rule in group["rules"]]


def panels() -> Iterator[tuple[str, list[str]]]:
    """Title and queries of each panel of the dashboard; Grafana's own interval is a minute."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel["title"], [target["expr"].replace("$__rate_interval", "1m") for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    """Our metrics and recorded rules in a query."""
    return set(re.findall(r"\binnerloop[_:][a-z0-9_:]+", expression))
