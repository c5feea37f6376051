"""Items by number, and the ads seen lately. Identifiers are interned so that a support set is a row of numbers."""

from collections.abc import Mapping, Sequence

from psycopg2.extensions import cursor as Cursor  # noqa: N812 - the driver names its class so
from psycopg2.extras import execute_values
from sqlalchemy import Connection, Engine, text

from innerloop.store.database import cursor_of, transaction

MAX_CACHED_ITEMS = 2_000_000
NUMBERS_AT_ONCE = 500
"""New items in one transaction. A number can be committed after a higher one, as a rule by no more than this many for
each writer at work: readers that follow the numbers look back for it."""

# Sorted, so that two processes that meet the same new items never wait for each other in a circle.
_INTERN = """
    INSERT INTO items (item_id, category)
    SELECT item_id, category FROM unnest(%s::text[], %s::text[]) AS v (item_id, category) ORDER BY item_id
    ON CONFLICT (item_id) DO NOTHING
"""
_NUMBERS = "SELECT item_id, item_no, category IS NULL FROM items WHERE item_id = ANY(%s)"
# Purchases and impressions often name no category. Locked in one order and behind the inserts: no circle here either.
_CATEGORISE = """
    WITH told AS (
        SELECT item_no, v.category FROM items
        JOIN unnest(%s::text[], %s::text[]) AS v (item_id, category) USING (item_id)
        WHERE items.category IS NULL ORDER BY item_id FOR UPDATE OF items
    )
    UPDATE items SET category = told.category FROM told WHERE items.item_no = told.item_no
"""

# An ad's row moves at most once a minute: many workers see the same few ads.
_SEE_ADS = """
    INSERT INTO ads AS a (ad_id, item_no, last_seen)
    SELECT ad_id, item_no, now() FROM (VALUES %s) AS v (ad_id, item_no) ORDER BY ad_id
    ON CONFLICT (ad_id) DO UPDATE SET item_no = excluded.item_no, last_seen = excluded.last_seen
    WHERE a.last_seen < now() - interval '1 minute' OR a.item_no <> excluded.item_no
"""


class ItemNumbers:
    """Item numbers known to this process. Bounded: a catalogue larger than the bound is read again now and then."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers: dict[str, int] = {}
        self._uncategorised: set[str] = set()

    def intern(self, item_ids: Sequence[str], categories: Mapping[str, str]) -> list[int]:
        """The number of each of `item_ids`; new items are inserted first, with their category. Raises RetryError.

        An item keeps the first category that an event names for it. In a transaction of its own: inside the batch's,
        two workers that met the same new item waited for each other's whole batch. A number that no event uses, should
        the batch not commit, harms nothing.
        """
        known = self._numbers
        new = list({item for item in item_ids if item not in known} | self._uncategorised.intersection(categories))
        if new:
            if len(known) + len(new) > MAX_CACHED_ITEMS:
                known.clear()
                self._uncategorised.clear()
                new = list(set(item_ids))
            for first in range(0, len(new), NUMBERS_AT_ONCE):
                with transaction(self._engine) as connection:
                    some = new[first : first + NUMBERS_AT_ONCE]
                    found = _find_or_insert(cursor_of(connection), some, categories)
                # Only now: a number that was rolled back never was.
                known.update((item, number) for item, number, _ in found)
                self._uncategorised.difference_update(some)
                self._uncategorised.update(item for item, _, bare in found if bare and item not in categories)
        return [known[item] for item in item_ids]


def _find_or_insert(cursor: Cursor, items: list[str], categories: Mapping[str, str]) -> list[tuple[str, int, bool]]:
    """(item_id, item_no, whether it had no category) of each."""
    cursor.execute(_NUMBERS, (items,))
    found: list[tuple[str, int, bool]] = cursor.fetchall()
    numbered = {item for item, _, _ in found}
    unseen = [item for item in items if item not in numbered]
    if unseen:
        cursor.execute(_INTERN, (unseen, [categories.get(item) for item in unseen]))
        cursor.execute(_NUMBERS, (unseen,))
        found += cursor.fetchall()
    told = [item for item, _, bare in found if bare and item in categories]
    if told:
        cursor.execute(_CATEGORISE, (told, [categories[item] for item in told]))
    return found


def see_ads(connection: Connection, ads: Mapping[str, int]) -> None:
    """Note that these ads (ad_id -> item number) have just had an event."""
    if ads:
        execute_values(cursor_of(connection), _SEE_ADS, sorted(ads.items()), page_size=len(ads))


def items_after(connection: Connection, number: int) -> list[tuple[int, str, str | None]]:
    """(item_no, item_id, category) of items numbered above `number`."""
    rows = connection.execute(
        text("SELECT item_no, item_id, category FROM items WHERE item_no > :n ORDER BY item_no"), {"n": number}
    )
    return [(row.item_no, row.item_id, row.category) for row in rows]


def items_numbered(connection: Connection, numbers: Sequence[int]) -> list[tuple[int, str, str | None]]:
    """(item_no, item_id, category) of some items."""
    rows = connection.execute(
        text("SELECT item_no, item_id, category FROM items WHERE item_no = ANY(:numbers)"), {"numbers": list(numbers)}
    )
    return [(row.item_no, row.item_id, row.category) for row in rows]


def categories_of(connection: Connection, item_ids: Sequence[str]) -> dict[str, str]:
    """The category of each of these items that has one."""
    rows = connection.execute(
        text("SELECT item_id, category FROM items WHERE item_id = ANY(:items) AND category IS NOT NULL"),
        {"items": list(item_ids)},
    )
    return {row.item_id: row.category for row in rows}


def any_ads(connection: Connection) -> bool:
    """Whether any ad was ever seen."""
    return bool(connection.execute(text("SELECT EXISTS (SELECT FROM ads)")).scalar())


def active_ads(connection: Connection, days: float) -> list[tuple[str, int]]:
    """(ad_id, item_no) of ads with an event in the last `days`."""
    query = text(
        "SELECT ad_id, item_no FROM ads WHERE last_seen > now() - make_interval(secs => :seconds) ORDER BY ad_id"
    )
    return [(row.ad_id, row.item_no) for row in connection.execute(query, {"seconds": days * 86_400})]
