import itertools
import time
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import Message, TopicPartition, murmur2

from innerloop.config import Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.events import decode
from innerloop.streams import clients
from innerloop.streams.topics import ensure_topics
from innerloop.worker.replay import EventProducer, replay


def table(rows: int) -> pl.DataFrame:
    kinds = ["click", "purchase", "cart", "refund", "click"]
    return pl.DataFrame(
        {
            "event_id": [f"e{n}" for n in range(rows)],
            "event_type": [kinds[n % 5] for n in range(rows)],
            "user_id": [f"u{n % 7}" for n in range(rows)],
            "item_id": [f"i{n % 11}" for n in range(rows)],
            "event_time": [1_700_000_000_000 + 1_000 * n for n in range(rows)],
            "price": [1.5 if n % 5 == 1 else None for n in range(rows)],
        }
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table(1_000).write_parquet(tmp_path / "events.parquet")
    return tmp_path / "events.parquet"


@pytest.fixture
def made(settings: Settings) -> Settings:
    ensure_topics(settings)
    return settings


def read(settings: Settings, topic: str) -> list[Message]:
    with clients.consumer(settings.kafka, "test") as consumer:
        ends = {n: consumer.get_watermark_offsets(TopicPartition(topic, n), 10)[1] for n in range(4)}
        consumer.assign([TopicPartition(topic, n, 0) for n in range(4)])
        messages: list[Message] = []
        deadline = time.monotonic() + 20
        while len(messages) < sum(ends.values()) and time.monotonic() < deadline:
            messages += consumer.consume(1_000, 0.2)
    assert not any(message.error() for message in messages)
    return messages


def test_every_event_is_there_once_keyed_in_order_and_in_its_topic(made: Settings, file: Path) -> None:
    progress: list[tuple[int, int]] = []
    report = replay(made, file, on_progress=lambda *each: progress.append(each))
    assert (report.sent, report.purchases, report.skipped, report.stopped) == (800, 200, 200, False)
    assert progress[-1] == (800, 800)
    clicks, purchases = (read(made, topic) for topic in made.topics.events)
    assert {decode(each.value()).event_type for each in clicks} == {"click", "cart"}
    assert {decode(each.value()).event_type for each in purchases} == {"purchase"}
    ids = [decode(each.value()).event_id for each in clicks + purchases]
    assert sorted(ids) == sorted(f"e{n}" for n in range(1_000) if n % 5 != 3)
    for messages in (clicks, purchases):
        last: dict[bytes | None, int] = {}
        for each in messages:
            event = decode(each.value())
            assert each.key() == event.user_id.encode()
            assert each.partition() == murmur2(each.key() or b"", 4)
            assert event.time_ms > last.get(each.key(), 0)
            last[each.key()] = event.time_ms
            assert abs(each.timestamp()[1] / 1000 - time.time()) < 60, "a record's time is when it was sent"


def test_a_part_of_the_file_with_times_moved_to_now(made: Settings, file: Path) -> None:
    report = replay(made, file, start=0.5, end=0.75, limit=100, shift_to_now=True)
    assert report.sent == 100
    events = [decode(each.value()) for topic in made.topics.events for each in read(made, topic)]
    numbers = sorted(int(event.event_id[1:]) for event in events)
    assert numbers == [n for n in range(500, 750) if n % 5 != 3][:100]
    times = {int(event.event_id[1:]): event.time_ms for event in events}
    assert abs(max(times.values()) / 1000 - time.time()) < 60
    assert times[numbers[-1]] - times[numbers[0]] == 1_000 * (numbers[-1] - numbers[0]), "distances stay"


def test_parts_of_a_file_are_together_the_whole(made: Settings, file: Path) -> None:
    shares = [0.0, 0.1234, 0.5, 0.50001, 1.0]
    for start, end in itertools.pairwise(shares):
        replay(made, file, start=start, end=end)
    assert sum(len(read(made, topic)) for topic in made.topics.events) == 800


def test_the_rate_is_kept(made: Settings, file: Path) -> None:
    report = replay(made, file, rate=400)
    assert report.sent == 800
    assert 1.9 <= report.seconds < 10


def test_stop_ends_even_a_slow_replay_at_once(made: Settings, file: Path) -> None:
    asked: list[float] = []

    def stop() -> bool:
        asked.append(time.monotonic())  # first when it has read the file and found its topics
        return asked[-1] - asked[0] > 1

    report = replay(made, file, rate=0.01, stop=stop)
    assert (report.sent, report.stopped) == (1, True)
    assert time.monotonic() - asked[0] < 10


def test_a_full_queue_delays_and_drops_nothing(made: Settings, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    wide = clients.producer
    monkeypatch.setattr(
        clients,
        "producer",
        lambda kafka, *args, **own: wide(kafka, *args, **{**own, "queue_buffering_max_messages": 10}),
    )
    assert replay(made, file).sent == 800
    assert sum(len(read(made, topic)) for topic in made.topics.events) == 800


def test_an_event_that_is_too_large_is_told_at_the_end(made: Settings) -> None:
    producer = EventProducer(made)
    producer.send("u", "click", b"x" * 5_000_000)
    producer.send("u", "click", b"{}")
    with pytest.raises(ServiceError, match=r"1 of 2 events were not delivered, the first: .*too large"):
        producer.finish()
    assert len(read(made, made.topics.clicks)) == 1


def test_what_cannot_be_sent_is_a_sentence(settings: Settings, file: Path) -> None:
    with pytest.raises(ServiceError, match="do not exist: run"):
        replay(settings, file)
    for wrong in ({"rate": 0.0}, {"rate": -1.0}, {"start": 0.9, "end": 0.1}, {"end": 1.5}, {"limit": -1}):
        with pytest.raises(SettingsError):
            replay(settings, file, **wrong)
    with pytest.raises(SettingsError, match="is not a file"):
        replay(settings, file.parent / "absent.csv")


def test_an_empty_part_is_no_error(made: Settings, file: Path) -> None:
    report = replay(made, file, start=0.5, end=0.5, shift_to_now=True)
    assert (report.sent, report.skipped, report.stopped) == (0, 0, False)


def test_impressions_go_to_a_topic_of_their_own(made: Settings, tmp_path: Path) -> None:
    frame = table(50).with_columns(pl.col("event_type").replace("refund", "impression"))
    frame.write_parquet(tmp_path / "shown.parquet")
    report = replay(made, tmp_path / "shown.parquet")
    assert (report.sent, report.skipped) == (50, 0)
    shown = [decode(each.value()) for each in read(made, made.topics.impressions)]
    assert {event.event_id for event in shown} == {f"e{n}" for n in range(50) if n % 5 == 3}
    assert {event.event_type for event in shown} == {"impression"}
