import json

from innerloop.config import Settings
from innerloop.evaluation.quality.state import Click
from innerloop.holdout import in_hold_out
from innerloop.worker.quality.sample import Reader, Record, Sampler

USERS = [f"user-{n}".encode() for n in range(4_000)]
HEAD = {"user_id": "u", "model_version": 2, "support_version": 3, "support_size": 1, "event_time": 5, "scored_at": 6}


def sampler(per_second: float) -> tuple[Sampler, list[float]]:
    clock = [0.0]
    return Sampler(0.05, per_second, clock=lambda: clock[0]), clock


def second(sampler: Sampler, clock: list[float], *, part: float = 1.0) -> set[bytes]:
    """Who was taken in a second in which each user had one record."""
    taken = {user for user in USERS if sampler.takes(user)}
    clock[0] += 1.0
    sampler.adjust(part)
    return taken


def test_below_the_rate_everybody_is_looked_at() -> None:
    everybody, clock = sampler(10_000)
    assert all(len(second(everybody, clock)) == len(USERS) for _ in range(3))


def test_above_the_rate_the_sample_keeps_to_it_with_half_from_the_hold_out() -> None:
    few, clock = sampler(200)
    second(few, clock)
    taken = second(few, clock)
    held = sum(in_hold_out(user, 0.05) for user in taken)
    assert abs(len(taken) - 200) < 50
    assert abs(held - 100) < 30
    assert second(few, clock) == taken, "the same users as long as the rate is the same"


def test_a_process_with_half_of_the_partitions_takes_half() -> None:
    few, clock = sampler(200)
    second(few, clock, part=0.5)
    assert abs(len(second(few, clock)) - 100) < 40


def test_a_smaller_hold_out_than_its_half_leaves_the_rest_to_the_others() -> None:
    few, clock = sampler(1_000)
    second(few, clock)
    taken = second(few, clock)
    held = {user for user in USERS if in_hold_out(user, 0.05)}
    assert held < taken
    assert abs(len(taken) - 1_000) < 120


def test_a_share_falls_at_once_and_rises_slowly() -> None:
    few, clock = sampler(200)
    second(few, clock)
    low = list(few.shares)
    clock[0] += 1.0
    few.adjust(1.0)
    assert all(before <= now < 1.1 * before for before, now in zip(low, few.shares, strict=True))


def test_records_become_what_the_judge_needs() -> None:
    topics, reader = Settings().topics, Reader(Settings())
    event = {"event_id": "e", "user_id": "u", "item_id": "i", "event_time": "1970-01-01T00:00:01Z", "ad_id": "a"}
    records = [
        Record(b"u", json.dumps({**event, "event_type": kind}).encode(), 7) for kind in ("click", "cart", "purchase")
    ]
    batch = reader.batch(topics.clicks, 3, [*records, Record(b"u", b"{", 7), Record(b"u", None, 7)], 9)
    assert (batch.source, batch.at) == (f"{topics.clicks}/3", 9)
    assert batch.clicks == [Click("u", 1_000, 7, "i", "a", batch.clicks[0].mark)]
    assert len(batch.purchases) == 1
    assert reader.unreadable == 2


def test_a_tombstone_forgets_and_a_record_of_before_the_hold_out_is_adapted() -> None:
    topics, reader = Settings().topics, Reader(Settings())
    items = [{"item_id": f"i{n}", "score": 1.0} for n in range(50)]
    record = {**HEAD, "model": "recommendations", "method": "bayes", "items": items}
    batch = reader.batch(
        topics.recommendations, 0, [Record(b"v", None, 8), Record(b"u", json.dumps(record).encode(), 8)], 9
    )
    assert batch.forgotten == ["v"]
    assert (batch.lists[0].arm, batch.lists[0].order, len(batch.lists[0].items)) == ("adapted", (2, 3, 6), 20)


def test_only_a_probability_of_a_purchase_after_a_click_is_one() -> None:
    topics, reader = Settings().topics, Reader(Settings())
    ad = {"ad_id": "a", "item_id": "i", "score": 0.01, "click": 0.1, "purchase_given_click": 0.2}
    chances = []
    for kind in ("purchase_given_click", "click_and_purchase", "click", "ranking", "of a later version"):
        record = {**HEAD, "model": "ads", "method": "bayes", "kind": kind, "ads": [ad]}
        chances += reader.batch(topics.ads, 0, [Record(b"u", json.dumps(record).encode(), 8)], 9).ads
    assert [each.chances for each in chances] == [[0.01], [0.2], [], [], []]
