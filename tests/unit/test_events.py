import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from innerloop.errors import DeadLetterError, Reason
from innerloop.events import Event, decode, decode_many

NOW = 1_750_000_000_000
DAY = 86_400_000
MAX_BYTES = 1_048_576
GOOD: dict[str, Any] = {
    "event_id": "e1",
    "event_type": "click",
    "user_id": "u1",
    "item_id": "i1",
    "event_time": NOW,
}
GONE = object()


def record(**fields: Any) -> bytes:
    return json.dumps({k: v for k, v in {**GOOD, **fields}.items() if v is not GONE}, ensure_ascii=False).encode()


def refusal(value: bytes | None) -> DeadLetterError:
    with pytest.raises(DeadLetterError) as raised:
        decode(value, latest_ms=NOW + DAY, max_bytes=MAX_BYTES)
    return raised.value


def words(ms: int, zone: timezone = UTC) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)).astimezone(zone).isoformat()


def test_a_whole_event_comes_back_as_sent() -> None:
    more = {"event_type": "purchase", "session_id": "s", "ad_id": "a", "price": 2.5, "quantity": 3, "currency": "EUR"}
    event = decode(record(**more, value=7.5))
    assert (event.event_id, event.event_type, event.user_id, event.item_id) == ("e1", "purchase", "u1", "i1")
    assert (event.session_id, event.ad_id, event.currency) == ("s", "a", "EUR")
    assert (event.event_time, event.price, event.quantity, event.value) == (NOW, 2.5, 3.0, 7.5)


@pytest.mark.parametrize(
    ("value", "reason", "says"),
    [
        (None, Reason.UNDECODABLE, "empty"),
        (b"", Reason.UNDECODABLE, "empty"),
        (b"\x00\xff\xfe", Reason.UNDECODABLE, "not JSON"),
        (b"not json", Reason.UNDECODABLE, "not JSON"),
        (record()[:-1], Reason.UNDECODABLE, "not JSON"),
        (record() + b"}", Reason.UNDECODABLE, "not JSON"),
        (b'{"user_id":"\xff"}', Reason.UNDECODABLE, "not JSON"),
        (b'{"x":' + b"[" * 100_000, Reason.UNDECODABLE, "not JSON"),
        (record().replace(b"u1", b"\\ud800"), Reason.UNDECODABLE, "not JSON"),
        (record().replace(b"u1", b"u\0"), Reason.UNDECODABLE, "not JSON"),
        (b"[]", Reason.INVALID_FIELD, "object"),
        (b"null", Reason.INVALID_FIELD, "object"),
        (record(event_type="view"), Reason.INVALID_FIELD, "event_type"),
        (record(event_type="Click"), Reason.INVALID_FIELD, "event_type"),
        (record(event_type=1), Reason.INVALID_FIELD, "event_type"),
        (record(price="cheap"), Reason.INVALID_FIELD, "price"),
        (record().replace(b'"u1"', b'"u1","price":1e999'), Reason.INVALID_FIELD, "price"),
        (record(event_time=-1), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=NOW + DAY + 1), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=words(NOW + DAY + 1)), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=words(-1)), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=10**30), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=1.5), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=float(NOW)), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=True), Reason.INVALID_FIELD, "event_time"),
        (record(event_time="2024-01-01T00:00:00"), Reason.INVALID_FIELD, "event_time"),
        (record(event_time="yesterday"), Reason.INVALID_FIELD, "event_time"),
        (record(event_time=str(NOW)), Reason.INVALID_FIELD, "event_time"),
        (record(note="x" * MAX_BYTES), Reason.TOO_LARGE, "1048576"),
    ],
)
def test_what_is_bad_is_named(value: bytes | None, reason: Reason, says: str) -> None:
    error = refusal(value)
    assert error.reason is reason
    assert says in str(error)


@pytest.mark.parametrize("field", ["event_id", "event_type", "user_id", "item_id", "event_time"])
@pytest.mark.parametrize("missing", [GONE, None])
def test_a_required_field_is_named_when_it_is_missing(field: str, missing: object) -> None:
    error = refusal(record(**{field: missing}))
    assert error.reason is Reason.INVALID_FIELD
    assert field in str(error)


@pytest.mark.parametrize("field", ["event_id", "user_id", "item_id", "ad_id"])
@pytest.mark.parametrize(
    ("value", "says"),
    [("", "length"), ("x" * 257, "length"), ("é" * 128 + "x", "256 bytes"), ("a\0b", "NUL")],
)
def test_an_identifier_is_text_of_1_to_256_bytes_without_nul(field: str, value: str, says: str) -> None:
    for padding in (0, 500):  # a long record takes another way than a short one
        error = refusal(record(**{field: value}, note="x" * padding))
        assert error.reason is Reason.INVALID_FIELD
        assert str(error).startswith(f"{field}: ")
        assert says in str(error)


@pytest.mark.parametrize("field", ["event_id", "user_id", "item_id", "ad_id", "session_id"])
@pytest.mark.parametrize("value", ["x" * 256, "é" * 128, "😀" * 64, "a b", "'; DROP TABLE items; --", "\\N", "{}"])
def test_any_other_identifier_is_kept_as_it_is(field: str, value: str) -> None:
    assert getattr(decode(record(**{field: value})), field) == value


def test_a_session_may_be_absent_but_not_long_or_with_nul() -> None:
    assert decode(record(session_id=None)).session_id is None
    for value in ("x" * 257, "a\0b"):
        assert str(refusal(record(session_id=value))).startswith("session_id: ")


def test_unknown_fields_are_ignored() -> None:
    assert decode(record(campaign={"a": [1, 2]}, experiment=None)) == decode(record())


def test_a_record_of_exactly_the_limit_is_taken() -> None:
    room = MAX_BYTES - len(record(note=""))
    assert decode(record(note="x" * room), max_bytes=MAX_BYTES).event_id == "e1"
    assert refusal(record(note="x" * (room + 1))).reason is Reason.TOO_LARGE


def test_the_latest_time_is_taken() -> None:
    assert decode(record(event_time=NOW + DAY), latest_ms=NOW + DAY).event_time == NOW + DAY
    assert decode(record(event_time=0), latest_ms=NOW).event_time == 0


@given(st.integers(0, 253_402_300_799_999), st.integers(-23 * 60, 23 * 60))
@example(1_087_964_035_791, 0)  # binary fractions of a second lose this one's millisecond
def test_a_time_in_words_is_the_same_time(ms: int, minutes: int) -> None:
    zone = timezone(timedelta(minutes=minutes))
    try:
        said = words(ms, zone)
    except OverflowError:  # the year 10000 there
        return
    assert decode(record(event_time=said)).event_time == ms
    assert decode(record(event_time=ms)).event_time == ms


texts = st.text(st.characters(codec="utf-8"), max_size=300)
values = st.one_of(
    texts,
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["click", "purchase", "x" * 256, "x" * 257, "é" * 129, "\0", words(NOW), words(NOW + 2 * DAY)]),
    st.lists(st.integers(), max_size=2),
)
fields = st.sampled_from(
    ["event_id", "event_type", "user_id", "item_id", "event_time", "ad_id", "session_id", "price", "note"]
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good event with some fields replaced or removed, and at times some bytes of it as well."""
    event = GOOD | draw(st.dictionaries(fields, st.one_of(st.just(GONE), values), max_size=3))
    text = json.dumps({k: v for k, v in event.items() if v is not GONE}, ensure_ascii=draw(st.booleans())).encode()
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=2)):
        text = text[: at % len(text)] + bytes([byte]) + text[at % len(text) + 1 :]
    return text


@st.composite
def good(draw: st.DrawFn) -> bytes:
    return record(
        event_id=draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=64)),
        event_time=draw(st.one_of(st.integers(0, NOW), st.integers(0, NOW).map(words))),
        note="x" * draw(st.sampled_from([0, 300, 2_000])),
    )


@given(
    st.lists(st.one_of(good(), damaged(), st.binary(max_size=80), st.none(), st.just(b"")), max_size=150),
    st.sampled_from([100, 1_500, MAX_BYTES]),
)
def test_a_batch_decodes_as_its_records_one_by_one(records: list[bytes | None], max_bytes: int) -> None:
    expected: list[Event | tuple[Reason, str]] = []
    for value in records:
        try:
            expected.append(decode(value, latest_ms=NOW, max_bytes=max_bytes))
        except DeadLetterError as error:
            expected.append((error.reason, str(error)))
    events, positions, bad = decode_many(records, latest_ms=NOW, max_bytes=max_bytes)
    got = dict(zip(positions, events, strict=True)) | {at: (error.reason, str(error)) for at, error in bad}
    assert len(got) == len(events) + len(bad) == len(records)
    assert [got[at] for at in range(len(records))] == expected
    assert positions == sorted(positions)
    assert all(type(event.event_time) is int for event in events)


def test_one_bad_record_costs_its_neighbours_nothing() -> None:
    records = [record(event_id=f"e{n}") for n in range(200)]
    for at, value in ((0, b""), (63, record(user_id="\0")), (64, record(note="x" * 2_000)), (150, record(item_id=""))):
        records[at] = value
    events, positions, bad = decode_many(records, latest_ms=NOW, max_bytes=1_000)
    assert [at for at, _ in bad] == [0, 63, 64, 150]
    reasons = [Reason.UNDECODABLE, Reason.INVALID_FIELD, Reason.TOO_LARGE, Reason.INVALID_FIELD]
    assert [error.reason for _, error in bad] == reasons
    assert [event.event_id for event in events] == [f"e{n}" for n in positions]
    assert len(events) == 196
