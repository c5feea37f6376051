"""What `deploy/audit.sh` makes of an advisory service's answers. The service is a stand-in: tests ask none outside."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[2] / "deploy" / "audit.sh"
# The last argument is the list of requirements: the probe's own, which everybody should know, or the lock.
UV = """\
#!/usr/bin/env bash
if grep -q jinja2==2.10 "${@: -1}"; then
    case "$PROBE" in
    knows) echo "jinja2 2.10 PYSEC-2019-217 2.10.1" && exit 1 ;;
    empty) echo "No known vulnerabilities found" && exit 0 ;;
    away) echo "ConnectionError: no route to host" && exit 1 ;;
    hangs) exec sleep 60 ;;
    esac
fi
echo "looked up $(cat "${@: -1}") $*" && exit "$LOCK"
"""


@pytest.mark.parametrize(
    ("probe", "lock", "code", "said"),
    [
        ("knows", "0", 0, "looked up locked==1"),
        ("knows", "1", 1, "looked up locked==1"),
        ("knows", "2", 1, "looked up locked==1"),
        ("empty", "0", 3, "nothing was checked"),
        ("away", "0", 3, "no route to host"),
        ("hangs", "0", 3, "nothing was checked"),
    ],
)
def test_only_a_service_that_knows_is_believed(tmp_path: Path, probe: str, lock: str, code: int, said: str) -> None:
    files = {"deploy/install.sh": "#!/bin/sh\n", ".venv/bin/uv": UV, "deploy/requirements.lock": "locked==1"}
    for name, content in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
        file.chmod(0o755)
    shutil.copy(AUDIT, tmp_path / "deploy")
    done = subprocess.run(
        [str(tmp_path / "deploy" / "audit.sh"), "-s", "osv"],
        env=os.environ | {"PROBE": probe, "LOCK": lock, "ANSWER_SECONDS": "2" if probe == "hangs" else "60"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    if code != 3:
        assert "-s osv --strict --require-hashes" in done.stdout
