"""The Prometheus rules and the Grafana dashboard: their own tests, and that they speak of metrics that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]
from deployment import DASHBOARD, DEPLOY, document, metric_names, panels, rules
from programs import program
from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from innerloop import metrics

PROMETHEUS = DEPLOY / "prometheus"


def declared() -> dict[str, set[str]]:
    """Every series that the product shows, with its labels."""
    series = {}
    for each in vars(metrics).values():
        if not isinstance(each, Counter | Gauge | Histogram):
            continue
        for family in each.describe():
            names = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            for suffix in names:
                own = {"le"} if suffix == "_bucket" else set()
                series[family.name + suffix] = set(each._labelnames) | own
    assert series
    return series


def queries() -> list[str]:
    return [rule["expr"] for rule in rules()] + [query for _, asked in panels() for query in asked]


def test_promtool_finds_that_each_alert_fires_when_it_must_and_only_then() -> None:
    tests = ["rules_test.yml", "rules_week_test.yml"]
    command = [program("promtool", "apt-get install prometheus"), "test", "rules", *tests]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [
        asked
        for name in tests
        for each in document(PROMETHEUS / name)["tests"]
        for asked in each.get("alert_rule_test", [])
    ]
    alerts = {rule["alert"] for rule in rules() if "alert" in rule}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_promtool_accepts_the_configuration() -> None:
    command = [program("promtool", "apt-get install prometheus"), "check", "config", "prometheus.yml"]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_asks_for_metrics_that_are_declared_or_recorded() -> None:
    known = set(declared()) | {rule["record"] for rule in rules() if "record" in rule}
    assert set().union(*map(metric_names, queries())) <= known


def test_every_label_that_a_query_selects_by_is_declared() -> None:
    series = declared()
    for query in queries():
        for name, selector in re.findall(r"(innerloop_\w+)\{([^}]*)\}", query):
            for label in re.findall(r"(\w+)\s*[=!]", selector):
                assert label in series[name] | {"job", "instance"}, query


def test_promtool_parses_every_query_of_the_dashboard(tmp_path: Path) -> None:
    asked = [query for _, of_panel in panels() for query in of_panel]
    written = [{"record": f"query{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": written}]}))
    command = [program("promtool", "apt-get install prometheus"), "check", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set().union(*(metric_names(query) for _, asked in panels() for query in asked))
    recorded = {rule["record"]: metric_names(rule["expr"]) for rule in rules() if "record" in rule}
    reached = shown.union(*(recorded.get(name, set()) for name in shown))
    families = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in declared()}
    assert not {name for name in families if not any(each.startswith(name) for each in reached)}


def test_the_panels_lie_side_by_side() -> None:
    board = json.loads(DASHBOARD.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    identifiers = [panel["id"] for panel in board["panels"]]
    assert len(set(identifiers)) == len(identifiers)


def test_the_aim_of_the_latency_is_a_bucket_of_its_histogram() -> None:
    """Between two buckets a percentile is a guess, and the alert compares it with the aim."""
    (late,) = [rule["expr"] for rule in rules() if rule.get("alert") == "InnerloopScoresLate"]
    aim = float(late.rpartition(">")[2])
    histogram: Histogram = metrics.EVENT_TO_SCORE
    assert aim in histogram._upper_bounds
    assert REGISTRY.get_sample_value("innerloop_event_to_score_seconds_bucket", {"le": str(aim)}) is not None


@pytest.mark.parametrize("file", ["rules.yml", "prometheus.yml"])
def test_jobs_are_those_that_the_rules_tell_apart(file: str) -> None:
    named = set(re.findall(r'job(?:_name)?(?:!?=~?"|: )([a-z|]+)', (PROMETHEUS / file).read_text()))
    assert {part for name in named for part in name.split("|")} == {"ingest", "adapt", "quality", "console"}
