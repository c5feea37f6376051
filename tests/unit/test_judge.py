"""The judge on forged evidence: a run that is right, and one thing wrong with it at a time."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
import xxhash
from confluent_kafka import murmur2
from hypothesis import given
from hypothesis import strategies as st

from innerloop.errors import DeadLetterError
from innerloop.evaluation.judge.contents import Contents, Prior
from innerloop.evaluation.judge.oracle import Headers, Oracle, Poison, Rules, partition_of, read_event
from innerloop.evaluation.judge.scores import content_key, same_content
from innerloop.evaluation.judge.verdict import FATES, MOST_FINDINGS, Evidence, LedgerWrite, Verdict, judge
from innerloop.events import decode
from innerloop.store.audit import LedgerRow, StoredExample, StoredSet
from innerloop.streams.batch import Record

NOW = 1_750_000_000_000
RULES = Rules(2, {"click": 1.0, "cart": 2.0, "favorite": 2.0, "purchase": 4.0}, NOW + 86_400_000, 1_000)
CLICKS, DEAD, REQUESTS, LISTS = "clicks", "dead", "requests", "lists"


def event(name: str, user: str = "u", at: int = 0, kind: str = "click") -> bytes:
    said = {"event_id": name, "event_type": kind, "user_id": user, "item_id": f"item of {name}", "event_time": NOW + at}
    return json.dumps(said).encode()


def record(topic: str, offset: int, value: bytes | None, key: str = "u", **headers: str) -> Record:
    pairs = tuple((name, text.encode()) for name, text in headers.items())
    return Record(topic, 0, offset, NOW, key.encode(), value, pairs)


def example(name: str, at: int, kind: int = 1, weight: float = 1.0) -> StoredExample:
    hashed = xxhash.xxh3_64_intdigest(name.encode())
    return StoredExample(NOW + at, hashed - 2**64 if hashed >= 2**63 else hashed, f"item of {name}", kind, weight)


def letter(
    offset: int,
    of: int,
    reason: str = "undecodable",
    value: bytes = b"{",
    *,
    headers: Headers = (("trace", b"1"),),
    topic: str = CLICKS,
) -> Record:
    said = {"topic": topic, "partition": "0", "offset": str(of), "exception.class.name": f"innerloop.{reason}"}
    added = tuple((f"__connect.errors.{name}", text.encode()) for name, text in said.items())
    return msgspec.structs.replace(record(DEAD, offset, value), headers=(*headers, *added))


def request(offset: int, version: int, at: int, user: str = "u") -> Record:
    said = {"user_id": user, "support_version": version, "event_time": NOW + at, "ingested_at": NOW}
    return record(REQUESTS, offset, json.dumps(said).encode(), user)


def listed(offset: int, version: int, size: int, at: int, *, epoch: int = 1, **said: Any) -> Record:
    common = {
        "user_id": "u",
        "model": "recommendations",
        "model_version": 1,
        "support_version": version,
        "support_size": size,
        "trends_version": 0,
        "event_time": NOW + at,
        "scored_at": NOW,
        "method": "bayes",
        "items": [{"item_id": "a", "score": 0.5}, {"item_id": "b", "score": 0.25}],
    }
    value = json.dumps(common | said).encode()
    return record(LISTS, offset, value, **{"innerloop.owner_epoch": str(epoch)})


# A release so sure of itself that no example moves it: everybody gets a with 0.5 and b with 0.25.
PRIOR = Prior(
    ["item of c", "b", "item of b", "a"],
    np.array([[0, 0], [0, 1], [0, 0], [1, 0]], float),
    np.array([0.5, 0.25]),
    1e-6 * np.eye(2),
    1.0,
    3_600.0,
)


def evidence() -> Evidence:
    """Four events of one user of whom two are kept, one of them twice, and a bad record."""
    values = [event("a", at=1), event("b", at=2, kind="purchase"), event("a", at=1), b"{", event("c", at=3)]
    return Evidence(
        produced=[
            record(CLICKS, offset, value, **({"trace": "1"} if value == b"{" else {}))
            for offset, value in enumerate(values)
        ],
        stored=[StoredSet("u", 2, [example("b", 2, 4, 4.0), example("c", 3)])],
        ledger=[LedgerRow(CLICKS, "id", 0, 5, 1), LedgerRow(REQUESTS, "id", 0, None, 2)],
        dead_letters=[letter(0, 3), letter(1, 3)],
        requests=[request(0, 1, 2), request(1, 2, 3), request(2, 2, 3)],
        scores={"recommendations": [listed(0, 1, 2, 2), listed(1, 2, 2, 3), listed(2, 2, 2, 3, epoch=2)]},
        requests_topic=REQUESTS,
        partitions=1,
        committed={"ingest": {(CLICKS, 0): (5, 5)}},
        writes=[LedgerWrite(CLICKS, 0, 1, None, "one"), LedgerWrite(CLICKS, 0, 1, 5, "one")],
        contents=Contents({1: PRIOR}, {}, 2, 0.0),
    )


def erasure(offset: int, user: str, at: int) -> Record:
    return record("erasures", offset, json.dumps({"user_id": user, "requested_at": NOW + at}).encode(), user)


def told(offset: int, version: int, user: str) -> Record:
    said = {"user_id": user, "support_version": version, "event_time": NOW, "ingested_at": NOW, "erased": True}
    return record(REQUESTS, offset, json.dumps(said).encode(), user)


def list_of(user: str, *what: int) -> Record:
    return msgspec.structs.replace(listed(*what, user_id=user), key=user.encode())


def with_an_erasure() -> Evidence:
    """The same, an impression, another user who was erased before and after coming, and one who came back."""
    right = evidence()
    others = [event("g", "v", at=4), event("b", "w", at=4), event("c", "w", at=12)]
    return replace(
        right,
        produced=[
            *right.produced,
            record("shown", 0, event("s", at=5, kind="impression")),
            *(record("shown", offset, value) for offset, value in enumerate(others, 1)),
        ],
        stored=[*right.stored, StoredSet("w", 3, [example("c", 12)])],
        ledger=[*right.ledger, LedgerRow("shown", "id", 0, 4, 1), LedgerRow("erasures", "id", 0, 3, 1)],
        erasures=[erasure(0, "v", 9), record("erasures", 1, b"{"), erasure(2, "w", 9)],
        dead_letters=[*right.dead_letters, letter(2, 1, topic="erasures", headers=())],
        requests=[
            *right.requests,
            *(request(3, 1, 4, "v"), told(4, 1, "v")),
            *(request(5, 1, 4, "w"), told(6, 2, "w"), request(7, 3, 12, "w")),
        ],
        scores={
            "recommendations": [
                *right.scores["recommendations"],
                record(LISTS, 3, None, "v"),
                *(list_of("w", 4, 1, 1, 4), record(LISTS, 5, None, "w"), list_of("w", 6, 3, 1, 12)),
            ]
        },
        shown=[StoredSet("u", 1, [example("s", 5, 5, 0.0)])],
        receipts=lambda _: {"v": NOW + 9, "w": NOW + 9},
    )


def test_who_was_erased_leaves_a_receipt_and_tombstones_only_or_what_came_since() -> None:
    verdict = judge(with_an_erasure(), RULES)
    assert verdict.findings == []
    assert {fate: verdict.counts[fate] for fate in FATES} == {
        "stored": 4,
        "duplicate": 1,
        "too_late": 1,
        "dead_lettered": 2,
        "erased": 2,
        "erasures": 2,
    }


ERASED: dict[str, tuple[dict[str, Any], str]] = {
    "a set": ({"stored": [*evidence().stored, StoredSet("v", 1, [])]}, "User v has a support set and was erased"),
    "the past of who came back": (
        {"stored": [*evidence().stored, StoredSet("w", 3, [example("b", 4), example("c", 12)])]},
        "User w's support set is not what was produced: 0 events are missing and 1",
    ),
    "what came since lost": ({"stored": evidence().stored}, "User w has 1 events and no support set"),
    "impressions": (
        {"shown": [*(with_an_erasure().shown or ()), StoredSet("v", 1, [])]},
        "User v has a set of impressions and was erased",
    ),
    "impressions lost": ({"shown": []}, "User u has 1 events and no set of impressions"),
    "no receipt": ({"receipts": lambda _: {"w": NOW + 9}}, "User v was erased, and there is no receipt of it"),
    "a receipt of less": (
        {"receipts": lambda _: {"v": NOW + 9, "w": NOW + 8}},
        f"User w was to be erased up to {NOW + 9}, and the receipt says {NOW + 8}",
    ),
    "a receipt of more than there was": (
        {"receipts": lambda _: {"v": NOW + 10, "w": NOW + 9}},
        f"User v was to be erased up to {NOW + 9}, and the receipt says {NOW + 10}",
    ),
    "no request": ({"requests": evidence().requests}, "User v was erased, and no request says so"),
    "no tombstone": ({"scores": evidence().scores}, "User v was erased and has no tombstone"),
    "a list after the tombstone": (
        {
            "scores": {
                "recommendations": [
                    *with_an_erasure().scores["recommendations"],
                    list_of("v", 7, 1, 1, 4),
                ]
            }
        },
        "User v was erased, and the last of the recommendations (offset 7) is a list",
    ),
    "a tombstone after the list": (
        {"scores": {"recommendations": [*with_an_erasure().scores["recommendations"], record(LISTS, 7, None, "w")]}},
        "User w's last record of recommendations (offset 7) is a tombstone, and its support set is at 3",
    ),
    "an older list of who came back": (
        {
            "scores": {
                "recommendations": [*with_an_erasure().scores["recommendations"], list_of("w", 7, 2, 1, 4)],
            }
        },
        "user w's version goes back from (1, 3) (offset 6) to (1, 2)",
    ),
    "a bad erasure let go": ({"dead_letters": evidence().dead_letters}, "erasures[0]@1 is a bad record and was never"),
    "erasures unread": (
        {"ledger": [*evidence().ledger, LedgerRow("shown", "id", 0, 4, 1)]},
        "The ledger has erasures[0] at None",
    ),
}


def test_who_came_back_and_lost_the_set_was_asked_for_all_the_same() -> None:
    findings = judge(replace(with_an_erasure(), stored=evidence().stored), RULES).findings
    assert "User w was asked for and has no support set." in findings
    assert not any(finding.startswith("User v") for finding in findings)


@pytest.mark.parametrize("wrong", ERASED)
def test_what_is_left_of_the_erased_is_found(wrong: str) -> None:
    changed, finding = ERASED[wrong]
    findings = judge(replace(with_an_erasure(), **changed), RULES).findings
    assert any(finding in each for each in findings), findings


def test_a_receipt_may_be_of_what_a_clock_ahead_of_it_dated_later() -> None:
    oracle = Oracle(RULES)
    oracle.see(record(CLICKS, 0, event("a", at=10)))
    oracle.see_erasure(erasure(0, "u", 9))
    assert list(oracle.carry_out({"u": NOW + 9})) == []
    assert oracle.gone == set()
    assert list(oracle.carry_out({"u": NOW + 10})) == []
    assert oracle.gone == {"u"}


def judged(**changed: Any) -> Verdict:
    return judge(replace(evidence(), **changed), RULES)


def test_a_run_that_is_right_has_no_finding_and_every_record_has_one_fate() -> None:
    verdict = judged()
    assert verdict.ok
    assert verdict.counts["records"] == 5
    fates = [verdict.counts[fate] for fate in ("stored", "duplicate", "too_late", "dead_lettered")]
    assert fates == [2, 1, 1, 1]
    assert verdict.counts["dead_letters_repeated"] == 1
    assert verdict.counts["unaccounted"] == 0


A, B, C = example("a", 1), example("b", 2, 4, 4.0), example("c", 3)
LAST = listed(2, 2, 2, 3)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an event missing": ({"stored": [StoredSet("u", 2, [C])]}, "1 events are missing and 0"),
    "an older event kept": ({"stored": [StoredSet("u", 2, [A, C])]}, "1 events are missing and 1"),
    "an event twice": ({"stored": [StoredSet("u", 2, [B, C, C])]}, "0 events are missing and 1"),
    "another order": ({"stored": [StoredSet("u", 2, [C, B])]}, "the order is another"),
    "another weight": ({"stored": [StoredSet("u", 2, [B._replace(weight=1.0), C])]}, "is not what was produced"),
    "another type": ({"stored": [StoredSet("u", 2, [B._replace(type=1), C])]}, "is not what was produced"),
    "another item": ({"stored": [StoredSet("u", 2, [B._replace(item="x"), C])]}, "is not what was produced"),
    "nobody's set": (
        {"stored": [*evidence().stored, StoredSet("v", 1, [C])]},
        "User v has a support set and no events",
    ),
    "no set": ({"stored": []}, "User u has 2 events and no support set"),
    "a ledger behind": ({"ledger": [LedgerRow(CLICKS, "id", 0, 4, 1)]}, "clicks[0] at 4, and it ends at 5"),
    "a commit behind": ({"committed": {"g": {(CLICKS, 0): (4, 5)}}}, "Group g has committed 4 of clicks[0]"),
    "a dead letter missing": ({"dead_letters": []}, "clicks[0]@3 is a bad record and was never dead-lettered"),
    "a dead letter of a good record": ({"dead_letters": [letter(0, 3), letter(1, 4)]}, "which is no bad record"),
    "a dead letter of nothing": ({"dead_letters": [letter(0, 3), record(DEAD, 1, b"{")]}, "which is no bad record"),
    "another reason": ({"dead_letters": [letter(0, 3, "too_large")]}, "says too_large, and it is undecodable"),
    "other headers": ({"dead_letters": [letter(0, 3, headers=())]}, "does not repeat its headers"),
    "headers of its own": (
        {"dead_letters": [letter(0, 3, headers=(("trace", b"1"), ("more", b"")))]},
        "does not repeat its headers",
    ),
    "accounts that do not add up": (
        {"stored": [StoredSet("u", 2, [C])]},
        "Of 5 records 1 are unaccounted for: 1 stored, 1 dup",
    ),
    "another value": ({"dead_letters": [letter(0, 3, value=b"[")]}, "does not repeat its key and value"),
    "a request missing": ({"requests": [request(0, 1, 2)]}, "is at 2, the highest asked for is 1"),
    "no request": ({"requests": []}, "the highest asked for is none"),
    "a request too high": ({"requests": [request(0, 3, 3)]}, "the highest asked for is 3"),
    "requests on another partition": ({"partitions": 2}, "user u belongs on partition"),
    "a request of another time": ({"requests": [request(0, 2, 2)]}, "last request is of events up to"),
    "nobody's request": ({"requests": [request(0, 2, 3), request(1, 1, 3, "v")]}, "User v was asked for"),
    "no score": ({"scores": {"recommendations": []}}, "User u has events and no recommendations"),
    "an old score": ({"scores": {"recommendations": [listed(0, 1, 2, 2)]}}, "names support version 1, and the set is"),
    "a score of the future": ({"scores": {"recommendations": [listed(0, 3, 2, 3)]}}, "names support version 3"),
    "an older record last": (
        {"scores": {"recommendations": [LAST, listed(3, 1, 2, 2, epoch=2)]}},
        "last record of recommendations (offset 3) names support version 1, older than 2 at offset 2",
    ),
    "a step back by the owner": (
        {"scores": {"recommendations": [LAST, listed(3, 1, 2, 2), listed(4, 2, 2, 3)]}},
        "version goes back from (1, 2) (offset 2) to (1, 1), both written under epoch 1",
    ),
    "another size": ({"scores": {"recommendations": [listed(0, 2, 1, 3)]}}, "is of 1 events up to"),
    "another list of the same versions": (
        {"scores": {"recommendations": [LAST, listed(3, 2, 2, 3, items=[{"item_id": "c", "score": 0.5}])]}},
        "two different recommendations of the same versions (1, 2)",
    ),
    "another list from the beginning on": (
        {"scores": {"recommendations": [listed(0, 2, 2, 3, items=[{"item_id": "b", "score": 0.5}])]}},
        "User u's last recommendations begin with [('b', 0.5)], and release 1 makes [('a', 0.5), ('b', 0.25)]",
    ),
    "a list made of another set": (
        {"contents": Contents({1: replace(PRIOR, root=np.eye(2), mean=np.ones(2))}, {}, 2, 0.0)},
        "User u's last recommendations begin with [('a', 0.5), ('b', 0.25)], and release 1 makes [('b', 1.0), ",
    ),
    "an epoch nobody had": ({"scores": {"recommendations": [listed(0, 2, 2, 3, epoch=3)]}}, "written under epoch 3"),
    "no epoch": (
        {"scores": {"recommendations": [msgspec.structs.replace(LAST, headers=())]}},
        "written under epoch None",
    ),
    "another user's list": ({"scores": {"recommendations": [listed(0, 2, 2, 3, user_id="v")]}}, "is of v and model"),
    "a tombstone": (
        {"scores": {"recommendations": [record(LISTS, 0, None)]}},
        "a score record without key or value, and user u was not erased",
    ),
    "a write by a superseded owner": (
        {"writes": [*evidence().writes, LedgerWrite(CLICKS, 0, 2, 5, "two"), LedgerWrite(CLICKS, 0, 2, 6, "one")]},
        "one moved clicks[0] to 6 under epoch 2, which two had claimed: a superseded owner wrote",
    ),
    "a claim that moves": (
        {"writes": [*evidence().writes, LedgerWrite(CLICKS, 0, 2, 4, "two")]},
        "two claimed clicks[0] and moved it from 5 to 4",
    ),
    "a first claim that moves": ({"writes": [LedgerWrite(CLICKS, 0, 1, 5, "one")]}, "moved it from None to 5"),
    "an epoch that is left out": (
        {"writes": [*evidence().writes, LedgerWrite(CLICKS, 0, 3, 5, "two")]},
        "two claimed clicks[0] with epoch 3 after 1",
    ),
    "an epoch that falls": (
        {"writes": [*evidence().writes, LedgerWrite(CLICKS, 0, 2, 5, "two"), LedgerWrite(CLICKS, 0, 1, 5, "one")]},
        "one claimed clicks[0] with epoch 1 after 2",
    ),
    "a ledger that goes back": (
        {"writes": [*evidence().writes, LedgerWrite(CLICKS, 0, 1, 4, "one")]},
        "one moved clicks[0] back from 5 to 4",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_found(wrong: str) -> None:
    changed, finding = WRONG[wrong]
    findings = judged(**changed).findings
    assert any(finding in each for each in findings), findings


def test_an_older_record_of_a_stranger_is_no_finding_once_it_is_answered() -> None:
    lists = [listed(0, 2, 2, 3, epoch=2), listed(1, 1, 2, 2, epoch=1), listed(2, 2, 2, 3, epoch=2)]
    verdict = judged(scores={"recommendations": lists})
    assert verdict.ok
    assert verdict.counts["recommendations_older_than_the_one_before"] == 1


def test_findings_are_counted_and_not_all_kept() -> None:
    stored = [StoredSet(f"v{n}", 1, []) for n in range(2 * MOST_FINDINGS)]
    verdict = judged(stored=[*evidence().stored, *stored])
    assert len(verdict.findings) == MOST_FINDINGS
    assert verdict.counts["findings"] == 2 * MOST_FINDINGS


def test_what_is_recomputed_is_counted_and_the_ads_are_those_of_their_items() -> None:
    lists = evidence().scores["recommendations"]
    ads = [{"ad_id": "ad", "item_id": "b", "score": 0.25}]
    shown = [listed(0, 2, 2, 3, model="ads", ads=ads)]
    verdict = judged(scores={"recommendations": lists, "ads": shown}, contents=Contents({1: PRIOR}, {"ad": "b"}, 2, 0))
    assert verdict.findings == []
    assert (verdict.counts["recommendations_recomputed"], verdict.counts["ads_recomputed"]) == (1, 1)


def test_who_is_held_out_gets_the_list_of_nobody() -> None:
    moved = replace(PRIOR, root=np.eye(2))
    contents = Contents({1: moved}, {}, 1, 1.0)
    events = [(NOW, 1, "a", 1, 1.0)]
    assert contents.expected("recommendations", 1, "u", events) == [("a", 0.5)]
    # One example of weight 1: halfway from 0.5 to the label 1.
    assert replace(contents, hold_out=0.0).expected("recommendations", 1, "u", events) == [("a", 0.75)]
    assert contents.expected("recommendations", 2, "u", events) is None


@given(st.binary(max_size=40), st.integers(1, 300))
def test_keys_lie_where_kafka_puts_them(key: bytes, partitions: int) -> None:
    assert partition_of(key, partitions) == murmur2(key, partitions)


def test_scores_that_differ_in_the_last_digits_are_the_same_list() -> None:
    def of(*pairs: tuple[str, float]) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(listed(0, 1, 1, 0).value or b"")
        return said | {"items": [{"item_id": item, "score": score} for item, score in pairs]}

    one = of(("a", 1.0), ("b", 0.5), ("c", 0.4))
    assert same_content(one, of(("a", 1.00001), ("b", 0.5), ("c", 0.39999)))
    assert same_content(of(("a", 0.5), ("b", 0.5)), of(("b", 0.50001), ("a", 0.49999)))
    assert same_content(one, of(("a", 1.0), ("b", 0.5), ("d", 0.40001)))  # which of two equal ones is the last
    assert not same_content(one, of(("a", 1.0), ("b", 0.5)))
    assert not same_content(one, of(("a", 1.0), ("b", 0.51), ("c", 0.4)))
    assert not same_content(one, of(("b", 1.0), ("a", 0.5), ("c", 0.4)))
    assert not same_content(one, of(("a", 1.0), ("d", 0.5), ("c", 0.4)))


def test_what_everybody_does_is_part_of_the_versions_of_a_ranked_list_only() -> None:
    said = json.loads(listed(0, 7, 1, 0, trends_version=3).value or b"")
    assert content_key(said) == (1, 7)
    assert content_key(said | {"method": "bayes+ranker"}) == (1, 7, 3)


# --- the oracle reads records by itself; here both readings are compared

GOOD: dict[str, Any] = json.loads(event("e"))
READABLE: list[dict[str, Any]] = [
    {},
    {"event_time": "2025-06-15T15:06:40.5Z"},
    {"event_time": "2025-06-15T17:06:40+02:00"},
    {"event_type": "impression"},
    {"price": 1, "quantity": 2.5, "currency": "EUR", "value": None},
    {"session_id": "", "category": "c", "ad_id": "a", "unknown": [1]},
    {"user_id": "ü" * 128},
]
REFUSED: list[dict[str, Any]] = [
    {"event_id": None},
    {"event_id": ""},
    {"user_id": 7},
    {"user_id": "ü" * 129},
    {"item_id": "a\0"},
    {"event_type": "view"},
    {"event_time": -1},
    {"event_time": "2025-06-15T15:06:40"},
    {"event_time": "then"},
    {"event_time": True},
    {"event_time": RULES.latest_ms + 1},
    {"price": "dear"},
    {"category": ""},
    {"session_id": 1},
]


@pytest.mark.parametrize("change", [*READABLE, *REFUSED], ids=str)
def test_oracle_and_product_read_records_alike(change: dict[str, Any]) -> None:
    _compare(json.dumps(GOOD | change).encode())


@pytest.mark.parametrize("value", [None, b"", b"{", b"[]", b"null", b"\xff", b'{"a":NaN}', b" " * 1_001], ids=str)
def test_oracle_and_product_refuse_alike(value: bytes | None) -> None:
    _compare(value)


def _compare(value: bytes | None) -> None:
    def product() -> tuple[str, int, str]:
        read = decode(value, latest_ms=RULES.latest_ms, max_bytes=RULES.max_bytes)
        return read.user_id, read.time_ms, read.item_id

    def oracle() -> tuple[str, int, str]:
        user, (time, _, item, _, _) = read_event(value, RULES)
        return user, time, item

    assert _outcome(oracle) == _outcome(product)


def _outcome(read: Callable[[], tuple[str, int, str]]) -> object:
    try:
        return read()
    except Poison as poison:
        return str(poison)
    except DeadLetterError as error:
        return str(error.reason)


def test_a_fold_in_any_order_is_the_same() -> None:
    values = [event(f"e{n}", at=n % 4) for n in range(12)]
    folds = []
    for order in (values, values[::-1], values[::2] + values[1::2] + values):
        oracle = Oracle(RULES)
        for offset, value in enumerate(order):
            oracle.see(record(CLICKS, offset, value))
        folds.append(oracle.expected("u"))
    assert folds[0] == folds[1] == folds[2]
    assert len(folds[0]) == RULES.capacity
