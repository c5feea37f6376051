"""A judge that can't see is worthless: one guarantee at a time is broken on purpose, and it must find each."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken import Fault, Kind
from small_run import USERS, SmallRun, ended, is_stopped, small, until
from world import connected

from innerloop.config import Settings
from innerloop.store.database import transaction
from innerloop.streams.whole_topic import whole_topic

STOP = signal.SIGSTOP
EVENTS = 60


@pytest.fixture
def run(settings: Settings, tmp_path: Path) -> Iterator[SmallRun]:
    small_run = SmallRun(small(settings), tmp_path)
    yield small_run
    small_run.close()


@pytest.fixture
def alone(settings: Settings, tmp_path: Path) -> Iterator[SmallRun]:
    """One worker of a kind at a time; each takes its predecessor's place at once, its session need not be over."""
    small_run = SmallRun(small(settings, static_membership="only"), tmp_path)
    yield small_run
    small_run.close()


@pytest.fixture
def slow_to_send(settings: Settings, tmp_path: Path) -> Iterator[SmallRun]:
    """Records lie in the workers' producers for a minute, unless they are flushed."""
    small_run = SmallRun(small(settings, static_membership="only", **{"linger.ms": "60000"}), tmp_path)
    yield small_run
    small_run.close()


def must_find(run: SmallRun, what: str) -> None:
    findings = run.judged().findings
    assert any(what in finding for finding in findings), findings


def crash(run: SmallRun, kind: Kind, step: str, broken: str | None = None) -> None:
    ended(run.start(kind, broken=broken, fault=Fault(step)), [-signal.SIGKILL])


def work(run: SmallRun, kind: Kind, broken: str | None = None) -> None:
    """One worker until it has committed everything, and then its sudden end."""
    worker = run.start(kind, broken=broken)
    until(lambda: run.caught_up(kind), run.said)
    worker.kill()
    worker.join()


def test_where_nothing_is_broken_nothing_is_found(slow_to_send: SmallRun) -> None:
    run = slow_to_send
    run.send(EVENTS)
    crash(run, "ingest", "after the transaction")
    crash(run, "ingest", "before the flush")
    work(run, "ingest")
    crash(run, "adapt", "before the flush")
    run.run("ingest", "adapt")
    verdict = run.judged()
    assert verdict.findings == []
    assert verdict.counts["records"] == EVENTS
    assert verdict.counts["stored"] == held(run, "SELECT sum(cardinality(items)) FROM support_sets")
    assert verdict.counts["dead_lettered"] == dead_lettered(run)
    fates = [verdict.counts[fate] for fate in ("stored", "duplicate", "too_late", "dead_lettered")]
    assert min(fates) > 0
    assert verdict.counts["unaccounted"] == 0
    for model in ("recommendations", "ads"):
        assert verdict.counts[f"{model}_recomputed"] == USERS


def held(run: SmallRun, query: str) -> int:
    with transaction(run.engine) as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def dead_lettered(run: SmallRun) -> int:
    """How many places the dead letters name."""
    names = [f"__connect.errors.{name}" for name in ("topic", "partition", "offset")]
    letters = whole_topic(run.settings, run.settings.topics.dead_letters)
    return len({tuple(dict(letter.headers)[name] for name in names) for letter in letters})


@pytest.mark.parametrize(
    ("broken", "finding"),
    [("ledger check off", "the highest asked for is"), ("replays not recognised", "are there that should not be")],
)
def test_replays_that_are_taken_for_new_are_found(alone: SmallRun, broken: str, finding: str) -> None:
    """They are duplicates by their ids, so nothing changes and nobody is asked for, or they count again."""
    run = alone
    run.send(3)  # of three users: none comes again and is asked for then
    crash(run, "ingest", "after the transaction", broken)
    work(run, "ingest", broken)
    run.run("ingest", "adapt")
    must_find(run, finding)


@pytest.mark.parametrize(
    ("kind", "finding"), [("ingest", "the highest asked for is"), ("adapt", "and no recommendations")]
)
def test_a_skipped_flush_is_found(slow_to_send: SmallRun, kind: Kind, finding: str) -> None:
    run = slow_to_send
    run.send(EVENTS)
    if kind == "adapt":
        work(run, "ingest")
    work(run, kind, "flush skipped")
    run.run("ingest", "adapt")
    must_find(run, finding)


@pytest.mark.parametrize(
    ("kind", "step", "finding"),
    [
        ("ingest", "after the transaction", "the highest asked for is"),
        ("adapt", "before the produce", "and no recommendations"),
    ],
)
def test_offsets_committed_first_are_found(alone: SmallRun, kind: Kind, step: str, finding: str) -> None:
    run = alone
    run.send(EVENTS)
    if kind == "adapt":
        work(run, "ingest")
    while not run.caught_up(kind):  # each batch is lost: whether a user comes again later does not matter
        crash(run, kind, step, "offset committed first")
    run.run("ingest", "adapt")
    must_find(run, finding)


@pytest.mark.parametrize("broken", ["fencing off", None])
def test_a_superseded_owner_that_writes_is_found(run: SmallRun, broken: str | None) -> None:
    """It sleeps with a batch in hand; its successor has claimed the partitions and not written yet."""
    run.send(20)
    zombie = run.start("ingest", broken=broken, fault=Fault("before the transaction", signal=STOP))
    until(lambda: is_stopped(zombie), run.said)
    successor = run.start("ingest", fault=Fault("after a claim", signal=STOP))
    until(lambda: is_stopped(successor), run.said)
    os.kill(zombie.pid or 0, signal.SIGCONT)
    if broken:
        until(lambda: any(write.next_offset for write in run.writes), run.said)
        zombie.kill()
    else:
        ended(zombie, [4])
    os.kill(successor.pid or 0, signal.SIGCONT)
    successor.kill()
    successor.join()
    run.run("ingest", "adapt")
    if broken:
        must_find(run, "a superseded owner wrote")
    else:
        assert run.judged().findings == []


@pytest.mark.parametrize("broken", ["epoch test off", None])
def test_a_superseded_owner_that_reads_the_ledger_again_and_writes_is_found(run: SmallRun, broken: str | None) -> None:
    """It loses its database session in mid-transaction, and sleeps before it looks what became of the commit."""
    zombie = run.start("ingest", broken=broken, fault=Fault("before the ledger is read again", signal=STOP))
    until(lambda: len(run.writes) == len(run.settings.topics.events), run.said)
    with connected(run.settings) as connection, connection.cursor() as cursor:
        cursor.execute("BEGIN; LOCK TABLE partition_ledger IN EXCLUSIVE MODE")
        run.send(20)
        until(lambda: terminated(run), run.said)
        until(lambda: is_stopped(zombie), run.said)
        cursor.execute("ROLLBACK")
    successor = run.start("ingest", fault=Fault("after a claim", signal=STOP))
    until(lambda: is_stopped(successor), run.said)
    os.kill(zombie.pid or 0, signal.SIGCONT)
    if broken:
        until(lambda: any(write.next_offset for write in run.writes), run.said)
        zombie.kill()
    else:
        ended(zombie, [4])
    successor.kill()
    successor.join()
    run.run("ingest", "adapt")
    if broken:
        must_find(run, "a superseded owner wrote")
    else:
        assert run.judged().findings == []


def terminated(run: SmallRun) -> bool:
    """Whether a worker's session that waits for a lock was there, and is ended now."""
    with connected(run.settings) as connection, connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'innerloop' AND wait_event_type = 'Lock'"
        )
        (count,) = cursor.fetchone() or (0,)
    return bool(count)


def test_a_worker_frozen_in_its_transaction_does_not_hold_up_its_successor(run: SmallRun) -> None:
    """It holds the rows that its successor has to claim; the server ends its session."""
    run.send(20)
    fault = Fault("in the transaction, with the ledger moved", signal=STOP)
    zombie = run.start("ingest", broken="frozen sessions end soon", fault=fault)
    until(lambda: is_stopped(zombie), run.said)
    successor = run.start("ingest")
    until(lambda: run.caught_up("ingest"), run.said)
    os.kill(zombie.pid or 0, signal.SIGCONT)
    until(lambda: '"lost"' in run.said or not zombie.is_alive(), run.said)
    successor.kill()
    zombie.kill()
    run.run("ingest", "adapt")
    assert run.judged().findings == []


@pytest.mark.parametrize("broken", ["watch off", None])
def test_an_older_list_that_stays_the_last_is_found(run: SmallRun, broken: str | None) -> None:
    """A worker sleeps with a finished list in hand, wakes when its successor has published a newer one, and sends."""
    run.send(8)
    work(run, "ingest")
    zombie = run.start("adapt", fault=Fault("before the produce", signal=STOP))
    until(lambda: is_stopped(zombie), run.said)
    run.send(16)  # something new of everybody
    work(run, "ingest")
    successor = run.start("adapt", broken=broken)
    until(lambda: run.caught_up("adapt"), run.said)
    published = run.published
    os.kill(zombie.pid or 0, signal.SIGCONT)
    until(lambda: run.published > published, run.said)
    zombie.kill()
    if broken:
        successor.kill()
        run.skip_watching()
    run.run("ingest", "adapt")
    if broken:
        must_find(run, "older than")
    else:
        verdict = run.judged()
        assert verdict.findings == []
        assert verdict.counts["recommendations_older_than_the_one_before"] > 0
