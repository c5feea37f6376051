"""Quix Streams: a batching sink, written and committed with every checkpoint of 20,000 records."""

import os
from typing import Any

from quixstreams import Application
from quixstreams.sinks import BatchingSink, SinkBatch
from upserts import Sets, tell


class SetsSink(BatchingSink):
    """Upserts what a checkpoint has gathered of a partition."""

    def setup(self) -> None:
        self._sets = Sets()
        self._started = False

    def add(self, *args: Any, **named: Any) -> None:
        if not self._started:
            self._started = True
            tell("started")
        super().add(*args, **named)

    def write(self, batch: SinkBatch) -> None:
        self._sets.append(item.value for item in batch)


def main() -> None:
    """Run until SIGTERM."""
    app = Application(
        broker_address=os.environ["BENCH_BROKER"],
        consumer_group=os.environ["BENCH_GROUP"],
        auto_offset_reset="earliest",
        commit_every=20_000,
        commit_interval=1.0,
        auto_create_topics=False,
        loglevel="WARNING",
    )
    app.dataframe(app.topic(os.environ["BENCH_TOPIC"], value_deserializer="json")).sink(SetsSink())
    app.run()


if __name__ == "__main__":
    main()
