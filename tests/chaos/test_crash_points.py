"""A worker is killed before and after each step of each batch; what is there in the end is as if nobody had been."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from broken import STEPS, Fault, Kind
from small_run import SECONDS, SmallRun, small, until

from innerloop.config import Settings
from innerloop.evaluation.judge.scores import same_content
from innerloop.store.audit import StoredExample, stored_sets
from innerloop.store.database import connect, transaction
from innerloop.store.migrate import migrate
from innerloop.streams.whole_topic import whole_topic

EVENTS = 12
KINDS: tuple[Kind, ...] = ("ingest", "adapt")


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Iterator[SmallRun]:
    # With a name of its own a worker takes its predecessor's place at once, instead of when its session is over.
    small_run = SmallRun(small(settings, static_membership="only"), tmp_path / "killed")
    yield small_run
    small_run.close()


@pytest.fixture
def undisturbed(bare_settings: Settings, tmp_path: Path) -> Iterator[SmallRun]:
    engine = connect(bare_settings.database)
    migrate(engine)
    engine.dispose()
    small_run = SmallRun(small(bare_settings), tmp_path / "undisturbed")
    yield small_run
    small_run.close()


def killed_at_each_batch(run: SmallRun, kind: Kind, step: str) -> int:
    """The nth worker is killed at the step in its nth batch, until one gets through; how many were."""
    kills = 0
    while True:
        worker = run.start(kind, fault=Fault(step, kills + 1))
        until(lambda: not worker.is_alive() or run.caught_up(kind), run.said)  # noqa: B023 - called at once
        if run.caught_up(kind):
            worker.kill()
            worker.join(SECONDS)
            return kills
        assert worker.exitcode == -signal.SIGKILL, run.said
        kills += 1


def sets(run: SmallRun) -> dict[str, list[StoredExample]]:
    with transaction(run.engine) as connection:
        return {row.user: row.examples for row in stored_sets(connection)}


def lists(run: SmallRun) -> dict[str, dict[str, Any]]:
    """The last record of each user."""
    records = whole_topic(run.settings, run.settings.topics.recommendations)
    return {(record.key or b"").decode(): json.loads(record.value or b"") for record in records}


@pytest.mark.timeout(600)  # some seventy workers start
def test_a_kill_at_any_step_of_any_batch_changes_nothing(run: SmallRun, undisturbed: SmallRun) -> None:
    kills: dict[tuple[Kind, str], int] = {}
    for step in STEPS["ingest"]:
        run.send(EVENTS)
        kills["ingest", step] = killed_at_each_batch(run, "ingest", step)
    intact = run.start("ingest")
    for step in STEPS["adapt"]:
        run.send(EVENTS)
        until(lambda: run.caught_up("ingest"), run.said)
        kills["adapt", step] = killed_at_each_batch(run, "adapt", step)
    intact.terminate()
    intact.join(SECONDS)
    assert min(kills.values()) > 0, kills
    assert sum(kills.values()) > 2 * len(kills), kills
    run.run(*KINDS)
    assert run.judged().findings == []

    undisturbed.send(run.sent)
    undisturbed.run(*KINDS)
    assert undisturbed.judged().findings == []
    assert sets(run) == sets(undisturbed)
    ours, theirs = lists(run), lists(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(same_content(ours[user], theirs[user]) for user in ours)
