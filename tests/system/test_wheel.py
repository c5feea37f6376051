"""The wheel, not the tree: built, installed into an environment of its own, and run from an empty directory."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from shell import outer_environment

from innerloop.evaluation.shop import Shop

ROOT = Path(__file__).parents[2]
_LOOK = """
import json, sys
import innerloop.worker.servers, innerloop.schemas, innerloop.store.migrations
from importlib.resources import files
from alembic.config import Config
from alembic.script import ScriptDirectory
from innerloop import schemas
config = Config()
config.set_main_option("script_location", "innerloop.store:migrations")
print(json.dumps({
    "modules": [
        m.__file__ for m in (innerloop, innerloop.worker.servers, innerloop.schemas, innerloop.store.migrations)
    ],
    "schemas": sorted(f.name for f in files("innerloop.schemas").iterdir() if f.is_file() and f.name.endswith("json")),
    "examples": len([f for f in files("innerloop.schemas").joinpath("examples").iterdir()]),
    "topics": len(schemas.read("topics.toml")),
    "locks": sorted(f.name for f in files("innerloop.worker.servers").iterdir() if f.name.endswith(".lock")),
    "migrations": len(list(ScriptDirectory.from_config(config).walk_revisions())),
    "typed": files("innerloop").joinpath("py.typed").is_file(),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git would have: no build/ or egg-info of an earlier one, none left in the tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("src", "worker", "schemas"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (made,) = (copy / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it, and the dependencies of this one behind it on the path."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, symlinks=True)
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    site.joinpath("dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--offline", "--python", str(python), str(wheel)]
    command[0] = str(Path(sys.executable).with_name("uv"))
    subprocess.run(command, check=True, timeout=60)
    return python


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in outer_environment().items() if not name.startswith("PYTHON")}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def test_it_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("innerloop/") for name in names)
    tracked = subprocess.run(
        [shutil.which("git") or "git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    sources = [name for name in tracked.stdout.split() if name.startswith(("src/", "worker/", "schemas/"))]
    wanted = {
        f"innerloop/{name}".replace("innerloop/src/innerloop/", "innerloop/")
        for name in sources
        if (ROOT / name).exists()
    }
    assert names == wanted


def test_everything_is_found_from_an_empty_directory(python: Path, tmp_path: Path) -> None:
    looked = run(tmp_path, str(python), "-c", _LOOK)
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout)
    assert all(Path(each).is_relative_to(python.parents[1]) for each in found["modules"]), found["modules"]
    assert found["schemas"] == sorted(each.name for each in (ROOT / "schemas").glob("*.json"))
    assert found["examples"] == len(list((ROOT / "schemas" / "examples").glob("*.json")))
    assert found["topics"] > 0
    assert found["locks"] == sorted(each.name for each in (ROOT / "worker" / "servers").glob("kafka-*.lock"))
    assert found["locks"]
    assert found["migrations"] > 0
    assert found["typed"] is True


def test_the_command_runs(python: Path, tmp_path: Path) -> None:
    command = str(python.with_name("innerloop"))
    helped, shown = run(tmp_path, command, "--help"), run(tmp_path, command, "config")
    assert helped.returncode == 0, helped.stderr
    assert "demo" in helped.stdout
    assert json.loads(shown.stdout)["topics"]["clicks"] == "events.clicks"


def test_the_demo_runs(python: Path, tmp_path: Path) -> None:
    command = str(python.with_name("innerloop"))
    Shop(5, users=300, items=200).history(6_000).write_csv(tmp_path / "e.csv")  # trains sooner than the demo's shop
    options = ["--events", "e.csv", "--history", "0.8", "--workers", "1", "--report", "f.json"]
    demo = run(tmp_path, command, "demo", "--seconds", "5", *options)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert json.loads((tmp_path / "f.json").read_text())["ok"] is True
    assert sorted(each.name for each in tmp_path.iterdir()) == ["e.csv", "f.json"]
