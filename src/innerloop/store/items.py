"""Items by number, and the ads seen lately. Identifiers are interned so that a support set is a row of numbers."""

from collections.abc import Mapping, Sequence

from psycopg2.extras import execute_values
from sqlalchemy import Connection, text

from innerloop.store.database import cursor_of

MAX_CACHED_ITEMS = 2_000_000

# Sorted, so that two processes that meet the same new items never wait for each other in a circle.
_INTERN = """
    INSERT INTO items (item_id)
    SELECT DISTINCT item_id FROM unnest(%s::text[]) AS item_id ORDER BY item_id
    ON CONFLICT (item_id) DO NOTHING
"""
_NUMBERS = "SELECT item_id, item_no FROM items WHERE item_id = ANY(%s)"

# An ad's row moves at most once a minute: many workers see the same few ads.
_SEE_ADS = """
    INSERT INTO ads AS a (ad_id, item_no, last_seen)
    SELECT ad_id, item_no, now() FROM (VALUES %s) AS v (ad_id, item_no) ORDER BY ad_id
    ON CONFLICT (ad_id) DO UPDATE SET item_no = excluded.item_no, last_seen = excluded.last_seen
    WHERE a.last_seen < now() - interval '1 minute' OR a.item_no <> excluded.item_no
"""


class ItemNumbers:
    """Item numbers known to this process. Bounded: a catalogue larger than the bound is read again now and then."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._unsure: dict[str, int] = {}

    def intern(self, connection: Connection, item_ids: Sequence[str]) -> dict[str, int]:
        """Numbers for all of `item_ids`; new items are inserted in the caller's transaction."""
        known = self._numbers
        new = list({item for item in item_ids if item not in known})
        if new:
            cursor = cursor_of(connection)
            cursor.execute(_NUMBERS, (new,))
            self._unsure.update(cursor.fetchall())
            unseen = [item for item in new if item not in self._unsure]
            if unseen:
                cursor.execute(_INTERN, (unseen,))
                cursor.execute(_NUMBERS, (unseen,))
                self._unsure.update(cursor.fetchall())
        return {item: known[item] if item in known else self._unsure[item] for item in set(item_ids)}

    def committed(self) -> None:
        """The transaction that interned has committed: its numbers hold from now on."""
        if len(self._numbers) + len(self._unsure) > MAX_CACHED_ITEMS:
            self._numbers.clear()
        self._numbers.update(self._unsure)
        self._unsure.clear()

    def rolled_back(self) -> None:
        """The transaction that interned did not commit: its numbers never were."""
        self._unsure.clear()


def see_ads(connection: Connection, ads: Mapping[str, int]) -> None:
    """Note that these ads (ad_id -> item number) have just had an event."""
    if ads:
        execute_values(cursor_of(connection), _SEE_ADS, sorted(ads.items()), page_size=len(ads))


def items_after(connection: Connection, number: int) -> list[tuple[int, str]]:
    """(item_no, item_id) of items numbered above `number`."""
    rows = connection.execute(text("SELECT item_no, item_id FROM items WHERE item_no > :n ORDER BY item_no"), {"n": number})
    return [(row.item_no, row.item_id) for row in rows]


def items_numbered(connection: Connection, numbers: Sequence[int]) -> list[tuple[int, str]]:
    """(item_no, item_id) of some items."""
    rows = connection.execute(
        text("SELECT item_no, item_id FROM items WHERE item_no = ANY(:numbers)"), {"numbers": list(numbers)}
    )
    return [(row.item_no, row.item_id) for row in rows]


def active_ads(connection: Connection, days: float) -> list[tuple[str, int]]:
    """(ad_id, item_no) of ads with an event in the last `days`."""
    query = text("SELECT ad_id, item_no FROM ads WHERE last_seen > now() - make_interval(secs => :seconds) ORDER BY ad_id")
    return [(row.ad_id, row.item_no) for row in connection.execute(query, {"seconds": days * 86_400})]
