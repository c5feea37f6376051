from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy import Engine, text

from innerloop.config import DatabaseSettings, Settings
from innerloop.errors import FencedError, RetryError
from innerloop.store import support_sets
from innerloop.store.accounts import events_handled
from innerloop.store.database import connect, transaction
from innerloop.store.ledger import Ledger
from innerloop.support import EXAMPLE, SupportSets

FIRST, SECOND = ("clicks", 0), ("clicks", 1)
IDS = {"clicks": "id-of-clicks"}


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = connect(settings.database)
    yield made
    made.dispose()


def rows(engine: Engine) -> dict[tuple[str, int], tuple[int | None, int]]:
    """(topic_id, partition) -> (next_offset, owner_epoch)"""
    with engine.connect() as connection:
        found = connection.execute(text("SELECT * FROM partition_ledger")).all()
    return {(row.topic_id, row.partition): (row.next_offset, row.owner_epoch) for row in found}


def advance(engine: Engine, ledger: Ledger, offsets: dict[tuple[str, int], int], user: str | None = None) -> None:
    """One batch: a user's support set, then the ledger, in one transaction."""
    with transaction(engine) as connection:
        if user is not None:
            one = SupportSets(np.array([0, 1]), np.zeros(1, EXAMPLE))
            support_sets.write(connection, [user], one, np.array([1]))
        ledger.advance(connection, offsets)
    ledger.advanced(offsets)


def users(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text("SELECT user_id FROM support_sets ORDER BY 1")).scalars())


def test_a_claim_starts_with_nothing_and_moves_with_its_data(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    claims = ledger.claim([FIRST, SECOND])
    assert {p: (c.epoch, c.next_offset) for p, c in claims.items()} == {FIRST: (1, None), SECOND: (1, None)}
    advance(engine, ledger, {FIRST: 10}, "u")
    advance(engine, ledger, {FIRST: 15, SECOND: 4}, "v")
    assert rows(engine) == {("id-of-clicks", 0): (15, 1), ("id-of-clicks", 1): (4, 1)}
    assert (ledger[FIRST].next_offset, ledger[SECOND].next_offset) == (15, 4)
    assert users(engine) == ["u", "v"]
    with engine.connect() as connection:
        assert events_handled(connection) == 19


def test_each_claim_raises_the_epoch_and_keeps_the_offset(engine: Engine) -> None:
    first, second = Ledger(engine, IDS), Ledger(engine, IDS)
    first.claim([FIRST])
    advance(engine, first, {FIRST: 10})
    claim = second.claim([FIRST, SECOND])
    assert (claim[FIRST].epoch, claim[FIRST].next_offset) == (2, 10)
    assert (claim[SECOND].epoch, claim[SECOND].next_offset) == (1, None)
    assert first.claim([FIRST])[FIRST].epoch == 3


def test_a_superseded_owner_writes_nothing(engine: Engine) -> None:
    stale, owner = Ledger(engine, IDS), Ledger(engine, IDS)
    stale.claim([FIRST, SECOND])
    advance(engine, stale, {FIRST: 10, SECOND: 10})
    owner.claim([FIRST])
    with pytest.raises(FencedError, match=r"clicks\[0\]") as raised:
        advance(engine, stale, {FIRST: 20, SECOND: 20}, "u")  # the partition it still owns is taken back as well
    assert raised.value.exit_code == 4
    assert rows(engine) == {("id-of-clicks", 0): (10, 2), ("id-of-clicks", 1): (10, 1)}
    assert users(engine) == []
    advance(engine, owner, {FIRST: 20}, "u")
    assert users(engine) == ["u"]


def test_a_claim_waits_for_a_write_in_hand_and_sees_it(engine: Engine, settings: Settings) -> None:
    """Between the owner's write and its commit nobody can claim: no moment has two owners."""
    owner, other = Ledger(engine, IDS), connect(settings.database)
    owner.claim([FIRST])
    with transaction(engine) as connection:
        owner.advance(connection, {FIRST: 7})
        with other.connect() as waiting:
            waiting.execute(text("SET lock_timeout = '100ms'"))
            with pytest.raises(Exception, match="lock timeout"):
                waiting.execute(text("UPDATE partition_ledger SET owner_epoch = owner_epoch + 1"))
    assert Ledger(other, IDS).claim([FIRST])[FIRST].next_offset == 7
    other.dispose()


@pytest.mark.parametrize("moved_to", [None, 9, 11])
def test_an_offset_that_this_owner_did_not_leave_is_fenced(engine: Engine, moved_to: int | None) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST])
    advance(engine, ledger, {FIRST: 10})
    with engine.begin() as connection:
        connection.execute(text("UPDATE partition_ledger SET next_offset = :offset"), {"offset": moved_to})
    with pytest.raises(FencedError):
        advance(engine, ledger, {FIRST: 20}, "u")
    assert rows(engine)["id-of-clicks", 0] == (moved_to, 1)
    assert users(engine) == []


def test_a_first_batch_is_fenced_when_somebody_was_there(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST])
    with engine.begin() as connection:
        connection.execute(text("UPDATE partition_ledger SET next_offset = 0"))
    with pytest.raises(FencedError):
        advance(engine, ledger, {FIRST: 20})


def test_a_row_that_is_gone_is_fenced(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST])
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM partition_ledger"))
    with pytest.raises(FencedError):
        advance(engine, ledger, {FIRST: 20}, "u")
    assert users(engine) == []


def test_a_topic_made_again_under_its_name_starts_anew(engine: Engine) -> None:
    before, after = Ledger(engine, IDS), Ledger(engine, {"clicks": "another-id"})
    before.claim([FIRST])
    advance(engine, before, {FIRST: 500})
    claim = after.claim([FIRST])[FIRST]
    assert (claim.epoch, claim.next_offset) == (1, None)
    advance(engine, after, {FIRST: 3})
    assert rows(engine) == {("id-of-clicks", 0): (500, 1), ("another-id", 0): (3, 1)}


def test_what_is_released_is_not_held(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST, SECOND])
    ledger.release([FIRST, ("clicks", 99)])
    assert FIRST not in ledger
    assert SECOND in ledger


def test_after_a_commit_of_unknown_outcome_the_ledger_tells(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST, SECOND])
    with transaction(engine) as connection:
        ledger.advance(connection, {FIRST: 12})  # committed, and nobody was told
    assert ledger[FIRST].next_offset is None
    ledger.reload()
    assert (ledger[FIRST].next_offset, ledger[SECOND].next_offset) == (12, None)
    advance(engine, ledger, {FIRST: 13})


def test_a_reload_after_somebody_elses_claim_is_fenced(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST])
    Ledger(engine, IDS).claim([FIRST])
    with pytest.raises(FencedError, match=r"clicks\[0\]"):
        ledger.reload()


def test_a_reload_of_a_row_that_is_gone_is_fenced(engine: Engine) -> None:
    ledger = Ledger(engine, IDS)
    ledger.claim([FIRST])
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM partition_ledger"))
    with pytest.raises(FencedError, match=r"clicks\[0\]"):
        ledger.reload()


@pytest.mark.parametrize("code", ["25006", "53100", "53200", "53300", "53400", "57P05", "58030", "08006"])
def test_what_a_server_in_trouble_says_is_waited_out(engine: Engine, code: str) -> None:
    with pytest.raises(RetryError, match="trouble"), transaction(engine) as connection:
        connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'trouble' USING ERRCODE = '{code}'; END $$")


def test_a_primary_that_became_read_only_is_waited_out(engine: Engine) -> None:
    """After a failover a connection may lead to what is now a standby."""
    with engine.begin() as connection:
        connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
    with pytest.raises(RetryError, match="read-only"):
        Ledger(engine, IDS).claim([FIRST])
    assert Ledger(engine, IDS).claim([FIRST])[FIRST].epoch == 1, "by a new connection"


def test_a_database_that_is_away_is_tried_again() -> None:
    away = connect(DatabaseSettings(url="postgresql://u:p@127.0.0.1:1/d"))
    with pytest.raises(RetryError, match="database is away"):
        Ledger(away, IDS).claim([FIRST])
