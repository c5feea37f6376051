"""Faust: an agent that takes 1,000 events at a time and upserts them in a thread, so that heartbeats go on."""

import asyncio
import os
from typing import Any

import faust
from upserts import Sets, tell

app = faust.App(
    os.environ["BENCH_GROUP"],
    broker=f"kafka://{os.environ['BENCH_BROKER']}",
    store="memory://",
    consumer_auto_offset_reset="earliest",
    topic_disable_leader=True,
    web_enabled=False,
)
clicks = app.topic(os.environ["BENCH_TOPIC"], value_serializer="json", key_type=str, key_serializer="raw")
started = False


def note_first(event: Any) -> Any:
    """A stream processor: the first record starts the clock."""
    global started  # noqa: PLW0603 - Faust's own style is a module
    if not started:
        started = True
        tell("started")
    return event


@app.agent(clicks)
async def store(stream: Any) -> None:
    """One transaction for every batch."""
    sets = Sets()
    stream.add_processor(note_first)
    async for events in stream.take(1_000, within=0.5):
        await asyncio.to_thread(sets.append, events)


if __name__ == "__main__":
    app.main()
