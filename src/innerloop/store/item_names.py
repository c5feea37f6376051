"""What items are called, for a process that shows them: in a temporary file, since a shop may have millions."""

import sqlite3
import threading
from collections.abc import Iterable, Mapping


class ItemNames:
    """At most `most` names by item. Any thread may read while one writes.

    A private file of SQLite's, about 100 bytes a name, of which some 8 MB are held in memory; it is gone with the
    process. Raises sqlite3.Error where there is no room for it.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count, self._full = most, 0, False
        self._lock = threading.Lock()
        self._file = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": temporary and nameless
        self._file.execute("PRAGMA cache_size = -8192")  # kB
        self._file.execute("PRAGMA journal_mode = MEMORY")  # of one batch, gone with its end
        self._file.execute("CREATE TABLE item (item_id TEXT PRIMARY KEY, name TEXT NOT NULL) WITHOUT ROWID")

    def __len__(self) -> int:
        return self._count

    @property
    def full(self) -> bool:
        """Whether a name was left out since there were as many as there may be."""
        return self._full

    def put(self, names: Mapping[str, str | None]) -> None:
        """Take in what items are called now; None: the item is gone. All of it or, when this raises, nothing."""
        with self._lock:
            count = self._count
            try:
                self._file.execute("BEGIN")
                for item, name in names.items():
                    self._put(item, name)
                self._file.execute("COMMIT")
            except BaseException:
                self._file.rollback()
                self._count = count
                raise

    def _put(self, item: str, name: str | None) -> None:
        if name is None:
            self._count -= self._file.execute("DELETE FROM item WHERE item_id = ?", (item,)).rowcount
        elif self._file.execute("UPDATE item SET name = ? WHERE item_id = ?", (name, item)).rowcount:
            return
        elif self._count < self._most:
            self._file.execute("INSERT INTO item VALUES (?, ?)", (item, name))
            self._count += 1
        else:
            self._full = True

    def clear(self) -> None:
        """Forget every name."""
        with self._lock:
            self._file.execute("DELETE FROM item")
            self._count, self._full = 0, False

    def of(self, items: Iterable[str]) -> dict[str, str]:
        """The names of those items that have one."""
        with self._lock:
            rows = (
                self._file.execute("SELECT item_id, name FROM item WHERE item_id = ?", (item,)).fetchone()
                for item in set(items)
            )
            return dict(row for row in rows if row is not None)

    def close(self) -> None:
        with self._lock:
            self._file.close()
