import json
import subprocess
import sys
from pathlib import Path

import pytest

from innerloop.evaluation.judge.verdict import FATES

RUN = Path(__file__).with_name("run.py")
KINDS = {
    "kill9-ingest",
    "kill9-adapt",
    "kill9-several",
    "sigstop",
    "sigterm",
    "broker",
    "postgres",
    "session",
    "scale",
    "release",
    "clock",
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("protocol", "seed"), [("classic", 5), ("consumer", 6)])
def test_a_storm_of_every_kind_of_fault_leaves_nothing_to_find(tmp_path: Path, protocol: str, seed: int) -> None:
    report = tmp_path / "report.json"
    options = ["--minutes", "2", "--seed", str(seed), "--protocol", protocol, "--most-per-second", "2000"]
    options += ["--report", str(report)]
    done = subprocess.run([sys.executable, str(RUN), *options], capture_output=True, text=True, check=False)
    assert report.exists(), done.stderr[-4_000:]
    said = json.loads(report.read_text())
    assert said["findings"] == [], done.stderr[-4_000:]
    assert said["faults"].keys() == KINDS
    assert said["events"] > 10_000
    assert said["seed"] == seed
    assert sum(said["asleep"].values()) == said["faults"]["sigstop"]
    counts = said["counts"]
    assert min(counts[f"{model}_recomputed"] for model in ("recommendations", "ads")) > 100
    assert min(counts[fate] for fate in (*FATES, "came_back")) > 0
    assert counts["unaccounted"] == 0
    assert said["seconds"] > 60
    assert said["ok"] is True
    assert done.returncode == 0
