"""Threads of OpenMP that wait sleep, instead of spinning on the cores that others need: seen by OpenMP itself."""

import os
import subprocess
import sys

import pytest

# `app` stands for any command that loads torch; OpenMP tells what it goes by when it is loaded.
_COMMAND = """
import sys
from innerloop.worker import cli
assert "torch" not in sys.modules
cli.app = lambda: __import__("torch")
cli.main()
"""


@pytest.mark.parametrize(("asked", "spins"), [(None, "0"), ("active", "30000000000")])
def test_a_command_has_waiting_threads_sleep_unless_its_user_says_otherwise(asked: str | None, spins: str) -> None:
    said = {} if asked is None else {"OMP_WAIT_POLICY": asked}
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND],
        env={**environment, **said, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
