"""The demo from outside: what it reports adds up, and nothing of it stays behind."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from shell import Shell

from innerloop.evaluation.shop import Shop

KEYS = {
    "seconds": None,
    "events_produced": None,
    "events_stored": None,
    "dead_letters": None,
    "users_adapted": None,
    "scores_published": {"recommendations", "ads"},
    "latency_ms": {"p50", "p99"},
    "lag_final": None,
    "hit_rate": {"adapted", "unadapted", "placebo"},
    "ok": None,
}


def ours(mark: str) -> list[psutil.Process]:
    """Every process that inherited the mark, whoever is its parent now: workers, servers and their watchers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DEMO_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def checked(path: Path) -> dict[str, float]:
    """The report, after what must hold of every run."""
    report = json.loads(path.read_text())
    assert list(report) == list(KEYS)
    for name, inner in KEYS.items():
        if inner is not None:
            assert report[name].keys() == inner
    assert report["ok"] is True
    assert report["dead_letters"] == report["lag_final"] == 0
    assert report["events_produced"] == report["events_stored"] > 0
    assert 0 < report["users_adapted"] <= report["scores_published"]["recommendations"] <= report["events_produced"]
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p99"]
    assert all(0 <= rate <= 1 for rate in report["hit_rate"].values())
    return dict(report)


def test_eight_seconds_of_the_shop(bare_shell: Shell) -> None:
    mark = f"shop{os.getpid()}"
    demo = bare_shell.finish(bare_shell.start("demo", "--seconds", "8", "--report", "f.json", DEMO_MARK=mark), 200)
    assert demo.code == 0, demo
    report = checked(bare_shell.folder / "f.json")
    assert report["seconds"] == pytest.approx(8, abs=2)
    assert 3_000 < report["events_produced"] < 4_100, "500 a second"
    assert report["scores_published"]["ads"] > 0  # type: ignore[index]
    assert report["hit_rate"]["adapted"] > 1.3 * report["hit_rate"]["unadapted"]  # type: ignore[index]
    assert report["hit_rate"]["adapted"] > 1.3 * report["hit_rate"]["placebo"]  # type: ignore[index]
    assert json.dumps(report, indent=2) in demo.out, "and it is shown"
    ready = re.findall(r"^== ready: (\d of 1 ingest, \d of 2 adapt)", demo.out, re.MULTILINE)
    assert ready[-1] == "1 of 1 ingest, 2 of 2 adapt", "it says who is ready while they start"
    assert demo.out.index("== ready: ") < demo.out.index("the loop runs")
    assert ours(mark) == []


def test_a_file_of_events_until_its_end(bare_shell: Shell) -> None:
    Shop(5, users=300, items=200).history(6_000).rename({"item_id": "sku"}).write_csv(bare_shell.folder / "e.csv")
    options = ["--events", "e.csv", "--column", "item_id=sku", "--history", "0.8", "--rate", "max", "--workers", "1"]
    demo = bare_shell.finish(bare_shell.start("demo", *options, "--report", "f.json"), 200)  # it trains, too
    assert demo.code == 0, demo
    assert checked(bare_shell.folder / "f.json")["events_produced"] == 1_200


def test_control_c_stops_all_of_it(bare_shell: Shell) -> None:
    mark = f"stop{os.getpid()}"
    Shop(5, users=300, items=200).history(12_000).write_csv(bare_shell.folder / "e.csv")
    demo = bare_shell.start("demo", "--events", "e.csv", "--workers", "1", "--report", "f.json", DEMO_MARK=mark)
    assert demo.stdout is not None
    while "the loop runs" not in (line := demo.stdout.readline()):
        assert line, bare_shell.errors(demo)
    time.sleep(2.0)
    assert len(ours(mark)) > 4, "the demo, its workers, Kafka and PostgreSQL"
    demo.send_signal(signal.SIGINT)
    result = bare_shell.finish(demo, 120)
    assert result.code == 0, result
    assert "Traceback" not in result.err
    checked(bare_shell.folder / "f.json")
    assert ours(mark) == []


def test_control_c_while_it_starts_is_no_traceback(bare_shell: Shell) -> None:
    mark = f"early{os.getpid()}"
    demo = bare_shell.start("demo", DEMO_MARK=mark)
    assert demo.stdout is not None
    while "training on" not in (line := demo.stdout.readline()):
        assert line, bare_shell.errors(demo)
    demo.send_signal(signal.SIGINT)
    result = bare_shell.finish(demo, 30)
    assert result.code == 130, result
    assert result.out.endswith("Stopped before the loop ran.\n")
    assert "Traceback" not in result.err
    assert ours(mark) == []
