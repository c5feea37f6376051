"""What some tests need beside Python: programs and Go modules. A test that misses one says that it did not run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def program(name: str, installed_by: str) -> str:
    """Its path; skips the test where it is not installed."""
    found = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    if found is None:
        pytest.skip(f"needs {name}: {installed_by}")
    return found


def go_module(module: str) -> Path:
    """The folder of `module@version`, fetched once into Go's cache; skips where Go or the module is out of reach."""
    go = program("go", "apt-get install golang-go")
    command = [go, "mod", "download", "-json", module]
    got = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path.home(), timeout=300)
    if got.returncode != 0:
        pytest.skip(f"needs the Go module {module}, which cannot be fetched: {_why(got.stdout)}")
    return Path(json.loads(got.stdout)["Dir"])


def _why(answer: str) -> str:
    try:
        return str(json.loads(answer)["Error"])
    except (ValueError, KeyError):
        return answer.strip() or "no answer"
