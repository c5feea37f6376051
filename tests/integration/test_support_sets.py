import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from innerloop.config import Settings
from innerloop.store import items, support_sets
from innerloop.store.database import connect, cursor_of, transaction
from innerloop.store.items import ItemNumbers, see_ads
from innerloop.store.support_sets import SupportConflictError, decode, encode, read, write
from innerloop.support import EXAMPLE, Ints, SupportSets, merge

Row = tuple[int, int, int, float, int]  # time, hash, item, weight, type


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    made = connect(settings.database)
    yield made
    made.dispose()


def sets_of(rows: list[list[Row]]) -> SupportSets:
    starts = np.concatenate(([0], np.cumsum([len(each) for each in rows], dtype=np.int64)))
    made = np.zeros(int(starts[-1]), EXAMPLE)
    for at, (time, hashed, item, weight, kind) in enumerate(row for each in rows for row in each):
        made[at]["time"], made[at]["hash"], made[at]["item"] = time, hashed, item
        made[at]["weight"], made[at]["type"] = weight, kind
    return SupportSets(starts, made)


def rows_of(sets: SupportSets) -> list[list[Row]]:
    rows = [(int(e["time"]), int(e["hash"]), int(e["item"]), float(e["weight"]), int(e["type"])) for e in sets.examples]
    return [rows[start:end] for start, end in zip(sets.starts[:-1], sets.starts[1:], strict=True)]


def versions(*numbers: int) -> Ints:
    return np.array(numbers, np.int64)


def stored(engine: Engine) -> dict[str, tuple[list[Row], int]]:
    """The whole table, by plain SQL."""
    query = "SELECT user_id, event_times, event_hashes, items, weights, event_types, version FROM support_sets"
    with engine.connect() as connection:
        return {
            row.user_id: (list(zip(*row[1:4], _reals(row.weights), row.event_types, strict=True)), row.version)
            for row in connection.execute(text(query))
        }


def _reals(weights: list[float]) -> list[float]:
    """Postgres says the shortest decimals that name the 32-bit number."""
    return [float(weight) for weight in np.array(weights, np.float32)]


identifiers = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=64)
examples = st.tuples(
    st.integers(0, 2**53),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(1, 2**31 - 1),
    st.floats(0, 100, width=32),
    st.integers(1, 4),
)
full = st.integers(-(2**31), 2**31).map(
    lambda seed: [(n, seed * 2**31 - n**9, n + 1, n / 4, n % 4 + 1) for n in range(64)]
)
tables = st.dictionaries(
    identifiers | st.sampled_from(["é" * 128, "x" * 256, "\\N", "{}", "a\tb\nc", "%s", "'", '"']),
    st.tuples(st.lists(examples, max_size=5) | full, st.integers(1, 2**62)),
    max_size=6,
)


@given(tables)
def test_what_is_encoded_is_decoded(table: dict[str, tuple[list[Row], int]]) -> None:
    sets, numbers = sets_of([rows for rows, _ in table.values()]), versions(*(version for _, version in table.values()))
    users, back, numbers_back = decode(memoryview(encode(list(table), sets, numbers)))
    assert users == list(table)
    assert rows_of(back) == [rows for rows, _ in table.values()]
    assert (numbers_back == numbers).all()


def test_what_is_written_is_read_and_is_what_postgres_has(engine: Engine) -> None:
    @hypothesis_settings(max_examples=30)
    @given(tables)
    def check(table: dict[str, tuple[list[Row], int]]) -> None:
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE support_sets"))
        sets = sets_of([rows for rows, _ in table.values()])
        with transaction(engine) as connection:
            numbers = versions(*(version for _, version in table.values()))
            write(connection, list(table), sets, numbers, reborn=int((numbers > 1).sum()))
        assert stored(engine) == table
        with transaction(engine) as connection:
            users, back, numbers = read(connection, [*reversed(table), "nobody at all"])
        assert dict(zip(users, zip(rows_of(back), numbers.tolist(), strict=True), strict=True)) == table

    check()


def test_postgres_itself_writes_the_stream_that_we_write(engine: Engine) -> None:
    """Byte for byte, so that an empty array or a full one is never an array of another shape."""
    rows: list[list[Row]] = [[], [(1, -5, 3, 0.5, 2)], [(n, n - 30, n + 1, 1.0, 4) for n in range(64)]]
    ours = encode(["a", "b", "c"], sets_of(rows), versions(1, 2, 3))
    with transaction(engine) as connection:
        write(connection, ["a", "b", "c"], sets_of(rows), versions(1, 2, 3), reborn=2)
        theirs = io.BytesIO()
        query = f"COPY (SELECT user_id, {support_sets._NAMES}, version FROM support_sets ORDER BY user_id)"
        cursor_of(connection).copy_expert(f"{query} TO STDOUT (FORMAT binary)", theirs)
    assert theirs.getvalue() == ours


def test_nothing_and_nobody(engine: Engine) -> None:
    with transaction(engine) as connection:
        write(connection, [], SupportSets.empty(), versions())
        assert read(connection, [])[0] == []
        assert read(connection, ["nobody"])[0] == []
    assert stored(engine) == {}


def test_people_read_names(engine: Engine) -> None:
    shoe, hat = ItemNumbers(engine).intern(["shoe", "hat é"], {})
    rows = [(1_700_000_000_123, -1, hat, 1.0, 1), (1_700_000_001_000, 7, shoe, 4.0, 4)]
    with transaction(engine) as connection:
        write(connection, ["u"], sets_of([rows]), versions(1))
        query = "SELECT *, extract(epoch FROM event_time) * 1000 AS ms FROM support_examples ORDER BY position"
        first, second = connection.execute(text(query)).all()
    assert (first.user_id, first.version, first.position, first.item_id) == ("u", 1, 1, "hat é")
    assert (first.event_type, first.weight, first.ms) == ("click", 1.0, 1_700_000_000_123)
    assert (second.position, second.item_id, second.event_type, second.weight) == (2, "shoe", "purchase", 4.0)


@pytest.mark.parametrize("version", [1, 2, 4, 9])
def test_only_the_next_version_may_be_written(engine: Engine, version: int) -> None:
    """The guard names how many, and the rollback takes the others of the batch back as well."""
    with transaction(engine) as connection:
        write(connection, ["u", "v"], sets_of([[(1, 1, 1, 1.0, 1)], [(2, 2, 2, 1.0, 1)]]), versions(2, 2), reborn=2)
    before = stored(engine)
    changed = sets_of([[(5, 5, 5, 1.0, 1)], [(6, 6, 6, 1.0, 1)], [(7, 7, 7, 1.0, 1)]])

    def attempt() -> None:
        with transaction(engine) as connection:
            see_ads(connection, {"new ad": 1})
            write(connection, ["new", "u", "v"], changed, versions(1, 3, version))

    with pytest.raises(SupportConflictError, match="1 of 3 users"):
        attempt()
    assert stored(engine) == before
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM ads")).scalar_one() == 0
    with transaction(engine) as connection:
        write(connection, ["new", "u", "v"], changed, versions(1, 3, 3))
    assert {user: number for user, (_, number) in stored(engine).items()} == {"new": 1, "u": 3, "v": 3}


def _add(engine: Engine, users: list[str], hashed: int, meet: threading.Barrier) -> int:
    """Read, merge one event into each user, write; again on a conflict. Returns how many conflicts there were."""
    for conflicts in range(1_000):
        try:
            with transaction(engine) as connection:
                found, sets, numbers = read(connection, users)
                if conflicts == 0:
                    meet.wait(10)  # both have read the same
                rows = dict(zip(found, zip(rows_of(sets), numbers.tolist(), strict=True), strict=True))
                old = sets_of([rows.get(user, ([], 0))[0] for user in users])
                event = sets_of([[(100 + hashed % 7, hashed, 1, 1.0, 1)]] * len(users)).examples
                merged = merge(old, np.arange(len(users)), event, 64).sets
                write(connection, users, merged, versions(*(rows.get(user, ([], 0))[1] + 1 for user in users)))
        except SupportConflictError:
            continue
        return conflicts
    raise AssertionError("never got its turn")


def test_two_writers_of_the_same_users_never_lose_an_event(settings: Settings, engine: Engine) -> None:
    users = [f"u{n}" for n in range(20)]
    engines = [connect(settings.database) for _ in range(2)]
    meet = threading.Barrier(2)

    def work(member: int) -> int:
        order = users if member else users[::-1]  # the table's own order keeps them from a deadlock
        return sum(_add(engines[member], order, 1_000 * member + n, meet) for n in range(15))

    with ThreadPoolExecutor(2) as pool:
        conflicts = list(pool.map(work, range(2)))
    assert sum(conflicts) >= 15, "each round one of the two had read what the other then changed"
    expected = sorted(1_000 * member + n for member in range(2) for n in range(15))
    for rows, version in stored(engine).values():
        assert sorted(hashed for _, hashed, *_ in rows) == expected
        assert version == 30
        assert rows == sorted(rows)
    for each in engines:
        each.dispose()


def test_items_get_one_number_each_whoever_asks(settings: Settings, engine: Engine) -> None:
    names = [f"item {n} é" for n in range(200)]
    engines = [connect(settings.database) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        orders = (names, names[::-1], names[100:] + names[:100])
        answers = list(pool.map(lambda each, order: ItemNumbers(each).intern(order, {}), engines, orders))
    first = dict(zip(orders[0], answers[0], strict=True))
    assert len(set(first.values())) == 200
    for order, numbers in zip(orders, answers, strict=True):
        assert dict(zip(order, numbers, strict=True)) == first
    asked = ItemNumbers(engine)
    assert asked.intern([names[3], names[3], "another"], {})[:2] == [first[names[3]]] * 2
    assert asked.intern([], {}) == []
    for each in engines:
        each.dispose()


def test_an_item_has_the_first_category_that_is_named_for_it(engine: Engine) -> None:
    """Its first event may be a purchase, which names none."""
    numbers, other, late = ItemNumbers(engine), ItemNumbers(engine), ItemNumbers(engine)
    first = numbers.intern(["a", "b", "c"], {"c": "shoes"})
    other.intern(["b"], {})
    assert numbers.intern(["a", "c"], {"a": "hats", "c": "hats"}) == [first[0], first[2]]
    assert other.intern(["b", "a"], {"b": "bags", "a": "bags"}) == [first[1], first[0]]
    assert numbers.intern(["b"], {"b": "shoes"}) == late.intern(["b"], {"b": "hats"}) == [first[1]]
    with engine.begin() as connection:
        found = items.items_numbered(connection, first)
    assert sorted((item, category) for _, item, category in found) == [("a", "hats"), ("b", "bags"), ("c", "shoes")]
    assert not numbers._uncategorised


def test_workers_that_name_categories_at_once_do_not_wait_in_a_circle(settings: Settings, engine: Engine) -> None:
    names = [f"bare{n}" for n in range(400)]
    ItemNumbers(engine).intern(names, {})
    engines = [connect(settings.database) for _ in range(3)]
    orders = (names, names[::-1], names[200:] + names[:200])
    with ThreadPoolExecutor(3) as pool:
        list(
            pool.map(
                lambda each, order: ItemNumbers(each).intern(order, dict.fromkeys(order, f"of {order[0]}")),
                engines,
                orders,
            )
        )
    with engine.begin() as connection:
        found = items.categories_of(connection, names)
    assert found.keys() == set(names)
    assert set(found.values()) <= {f"of {order[0]}" for order in orders}
    for each in engines:
        each.dispose()


def test_a_catalogue_over_the_bound_is_read_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "MAX_CACHED_ITEMS", 3)
    numbers = ItemNumbers(engine)
    first = numbers.intern(["a", "b", "c"], {})
    assert numbers.intern(["c", "d", "a"], {}) == [first[2], first[2] + 1, first[0]]
    assert len(numbers._numbers) <= 3
    assert numbers.intern(["b"], {}) == [first[1]]
