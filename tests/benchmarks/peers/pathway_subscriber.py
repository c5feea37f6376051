"""Pathway: the topic as a table of JSON records, and a Python subscriber that upserts what each minibatch brought."""

import os
from typing import Any

import pathway as pw
from upserts import Sets, tell


class Click(pw.Schema):
    """The fields that are stored."""

    event_id: str
    event_type: str
    user_id: str
    item_id: str
    event_time: int


class Store(pw.io.python.ConnectorObserver):
    """Gathers the rows of a minibatch and writes them when Pathway says that it is whole."""

    def __init__(self) -> None:
        self._sets = Sets()
        self._rows: list[dict[str, Any]] = []
        self._started = False

    def on_change(self, key: pw.Pointer, row: dict[str, Any], time: int, is_addition: bool) -> None:  # noqa: ARG002, FBT001
        if not self._started:
            self._started = True
            tell("started")
        self._rows.append(row)

    def on_time_end(self, time: int) -> None:  # noqa: ARG002
        if self._rows:
            self._sets.append(self._rows)
            self._rows = []


def main() -> None:
    """Run until SIGTERM."""
    settings = {
        "bootstrap.servers": os.environ["BENCH_BROKER"],
        "group.id": os.environ["BENCH_GROUP"],
        "auto.offset.reset": "earliest",
    }
    clicks = pw.io.kafka.read(
        settings, os.environ["BENCH_TOPIC"], format="json", schema=Click, autocommit_duration_ms=200
    )
    pw.io.python.write(clicks, Store())
    pw.run(monitoring_level=pw.MonitoringLevel.NONE)


if __name__ == "__main__":
    main()
