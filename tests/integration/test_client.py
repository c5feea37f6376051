import itertools
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from confluent_kafka import Producer, murmur2
from confluent_kafka.admin import NewPartitions

from innerloop.client import ScoreReader, Tombstone, newest
from innerloop.config import Settings
from innerloop.errors import RetryError, ServiceError
from innerloop.scores import AdScores, RecommendationScores, ScoredItem
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.topics import ensure_topics
from innerloop.worker.scores import show_scores


def scores(user: str, support_version: int, model_version: int = 1, item: str = "a") -> RecommendationScores:
    return RecommendationScores(
        user_id=user,
        model="recommendations",
        model_version=model_version,
        support_version=support_version,
        support_size=support_version,
        event_time=1_750_000_000_000,
        scored_at=1_750_000_000_100,
        method="bayes",
        items=[ScoredItem(item_id=item, score=1.5)],
    )


@pytest.fixture
def topic(settings: Settings) -> str:
    ensure_topics(settings)
    name: str = settings.topics.recommendations
    return name


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    made = clients.producer(settings.kafka)
    yield made
    assert made.flush(10) == 0


def send(producer: Producer, topic: str, *records: RecommendationScores | tuple[str, bytes | None]) -> None:
    for record in records:
        if isinstance(record, tuple):
            producer.produce(topic, key=record[0], value=record[1])
        else:
            producer.produce(topic, key=record.user_id, value=msgspec.json.encode(record))
    assert producer.flush(10) == 0


def test_a_view_is_whole_and_newest_whatever_the_log_holds(settings: Settings, topic: str, producer: Producer) -> None:
    users = [f"u-{n}" for n in range(500)]
    send(producer, topic, *(scores(user, version) for user in users for version in (1, 3, 2)))
    send(producer, topic, ("u-0", None), ("u-1", b"no scores"), ("u-2", b""))
    with ScoreReader(settings) as reader:
        reader.wait_until_current(20)
        assert len(reader) == 499
        assert reader.get("u-0") is None
        assert all(reader.get(user) == scores(user, 3) for user in users[1:])
        assert reader.stale_dropped == 500
        assert reader.undecodable == 2
        send(producer, topic, scores("u-0", 1), scores("u-9", 1))
        reader.wait_until_current(20)
        assert reader.get("u-0") == scores("u-0", 1)
        assert reader.get("u-9") == scores("u-9", 3)


@pytest.mark.usefixtures("topic")
def test_an_empty_topic_is_current_at_once(settings: Settings) -> None:
    with ScoreReader(settings) as reader:
        began = time.monotonic()
        reader.wait_until_current(20)
        assert time.monotonic() - began < 5
        assert reader.refresh() == 0
        assert list(reader.records(idle_seconds=0.1)) == []
    with pytest.raises(ValueError, match="closed"):
        reader.refresh()
    reader.close()


def test_iteration_yields_what_advances_and_tombstones_on_request(
    settings: Settings, topic: str, producer: Producer
) -> None:
    send(producer, topic, scores("u", 1), scores("u", 1), ("u", b"{}"), scores("u", 3), scores("u", 2), ("u", None))
    send(producer, topic, scores("u", 1, item="again"))
    expected = [scores("u", 1), scores("u", 3), Tombstone("u"), scores("u", 1, item="again")]
    with ScoreReader(settings, tombstones=True) as reader:
        assert list(itertools.islice(reader, len(expected))) == expected
        assert list(reader.records(idle_seconds=1)) == []
    with ScoreReader(settings) as reader:
        wanted = [each for each in expected if not isinstance(each, Tombstone)]
        assert list(itertools.islice(reader, len(wanted))) == wanted
        assert list(reader.records(idle_seconds=1)) == []


def test_leaving_the_loop_loses_nothing_of_what_was_fetched(settings: Settings, topic: str, producer: Producer) -> None:
    send(producer, topic, *(scores("u", version) for version in range(1, 51)))
    seen: list[int] = []
    with ScoreReader(settings) as reader:
        while len(seen) < 50:
            for record in reader:
                seen.append(record.support_version)
                break
    assert seen == list(range(1, 51))


def test_a_new_record_is_there_within_a_moment(settings: Settings, topic: str, producer: Producer) -> None:
    taken = []
    with ScoreReader(settings) as reader:
        reader.wait_until_current(20)
        for version in range(1, 21):
            began = time.monotonic()
            send(producer, topic, scores("u", version))
            while reader.refresh(timeout=1.0) == 0:
                assert time.monotonic() - began < 10
            taken.append(time.monotonic() - began)
    assert sorted(taken)[10] < 1.0, taken


def test_a_group_shares_the_topic_and_goes_on_where_it_stopped(
    settings: Settings, topic: str, producer: Producer
) -> None:
    group = settings.kafka.adapt_group + ".service"
    send(producer, topic, *(scores(f"u-{n}", 1) for n in range(200)))
    with ScoreReader(settings, group=group) as reader:
        first = [record.user_id for record in itertools.islice(reader, 50)]
    with ScoreReader(settings, group=group) as reader:
        second = [record.user_id for record in reader.records(idle_seconds=20)]
        assert sorted({*first, *second}) == sorted(f"u-{n}" for n in range(200))
        assert len(first) + len(second) == 201, "the record at hand when the loop was left comes again, no other"
        with ScoreReader(settings, group=group) as another:
            seen: list[list[str]] = [[], []]
            readers = [
                threading.Thread(target=lambda n=n, r=r: seen[n].extend(each.user_id for each in r.records(20)))
                for n, r in enumerate((reader, another))
            ]
            for thread in readers:
                thread.start()
            deadline = time.monotonic() + 30
            while members_with_partitions(settings.kafka, group) < 2:
                assert time.monotonic() < deadline, "the second gets no share"
                time.sleep(0.1)
            send(producer, topic, *(scores(f"u-{n}", 2) for n in range(200)))
            for thread in readers:
                thread.join()
    assert sorted(seen[0] + seen[1]) == sorted(f"u-{n}" for n in range(200))
    assert seen[0]
    assert seen[1]


def test_one_users_newest_is_found_by_its_partition_and_after_the_partitions_grew(
    settings: Settings, topic: str, producer: Producer
) -> None:
    users = [f"user/{n}/ü" for n in range(12)]
    send(producer, topic, *(scores(user, version) for version in (1, 2) for user in users))
    for user in users[:5]:
        assert newest(settings, "recommendations", user) == scores(user, 2)
    assert newest(settings, "recommendations", "nobody") is None
    admin = clients.admin(settings.kafka)
    admin.create_partitions([NewPartitions(topic, 7)])[topic].result()
    while len(admin.list_topics(timeout=5).topics[topic].partitions) < 7:
        time.sleep(0.05)
    for user in users:
        assert newest(settings, "recommendations", user) == scores(user, 2)


def test_the_key_alone_finds_the_partition(topic: str, producer: Producer) -> None:
    where: dict[bytes | None, int | None] = {}
    for user in [f"u-{n}" for n in range(300)] + ["ü", "用户", " "]:
        producer.produce(topic, key=user, value=b"", on_delivery=lambda _e, m: where.update({m.key(): m.partition()}))
    assert producer.flush(10) == 0
    assert len(where) == 303
    assert all(murmur2(key, 4) == partition for key, partition in where.items() if key is not None)


@pytest.mark.usefixtures("topic")
def test_stop_ends_iteration_from_another_thread(settings: Settings) -> None:
    with ScoreReader(settings) as reader:
        threading.Timer(0.5, reader.stop).start()
        began = time.monotonic()
        assert list(reader) == []
        assert time.monotonic() - began < 3


def test_what_is_missing_is_a_sentence(settings: Settings) -> None:
    with pytest.raises(ServiceError, match=f"Topic {settings.topics.ads} does not exist"):
        ScoreReader(settings, "ads")
    ensure_topics(settings)
    with pytest.raises(ServiceError, match="has 4 partitions, none of which is 4"):
        ScoreReader(settings, partitions=[4])
    with pytest.raises(ValueError, match="one or the other"):
        ScoreReader(settings, partitions=[0], group="g")
    with ScoreReader(settings, group="any") as reader, pytest.raises(ValueError, match="without a group"):
        reader.wait_until_current(1)


def test_a_reader_that_cannot_keep_up_in_time_says_so(settings: Settings, topic: str, producer: Producer) -> None:
    send(producer, topic, scores("u", 1))
    with ScoreReader(settings) as reader, pytest.raises(RetryError, match=r"is not read to its end|does not say where"):
        reader.wait_until_current(0.0)


def test_a_topic_that_never_stops_keeps_nobody_longer_than_asked(
    settings: Settings, topic: str, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(producer, topic, scores("u", 1))
    with ScoreReader(settings) as reader:
        while not reader._pending:
            reader._fetch(1.0)
        [message] = reader._pending
        monkeypatch.setattr(reader, "_fetch", lambda _seconds: reader._pending.append(message))
        monkeypatch.setattr(reader, "_next", dict.fromkeys(reader._next, 0))
        send(producer, topic, scores("u", 2))  # more than this reader will ever have read
        with pytest.raises(RetryError, match="is not read to its end"):
            reader.wait_until_current(3.0)
        threading.Timer(0.3, reader.stop).start()
        reader.refresh()


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("ranking", ["score", "0.2500"]),
        ("click", ["clicked if shown", "25.00%"]),
        (
            "click_and_purchase",
            ["clicked if shown", "bought if clicked", "clicked and bought if shown", "50.00%", "40.00%", "25.00%"],
        ),
        ("of a later version", ["score", "0.2500"]),
    ],
)
def test_scores_are_shown(  # noqa: PLR0917 - fixtures, and what is shown
    settings: Settings,
    topic: str,
    producer: Producer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    columns: list[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    entry: dict[str, object] = {"ad_id": "ad-1", "item_id": "[red]", "score": 0.25}
    if kind == "click_and_purchase":
        entry |= {"click": 0.5, "purchase_given_click": 0.4}
    told = {**msgspec.to_builtins(scores("u[b]", 2)), "model": "ads", "kind": kind, "ads": [entry]}
    ads = msgspec.convert(told, AdScores)
    send(producer, topic, scores("u[b]", 2, item="sku-1"))
    producer.produce(settings.topics.ads, key="u[b]", value=msgspec.json.encode(ads))
    assert producer.flush(10) == 0
    assert show_scores(settings, "u[b]") == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("u[b]", "sku-1", "1.5000", "ad-1", "[red]", *columns))
    assert show_scores(settings, "nobody") == 1
    assert "User nobody has no scores" in capsys.readouterr().out
