import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop.errors import SettingsError
from innerloop.events import decode
from innerloop.worker.replay import Pace, encode_events, parse_rate

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
TRICKY = st.sampled_from(['a,"ad_id":null', 'x","ad_id":null', "\u2028\n\r\x85", "\\", '"', '\\"', "用户", "a\tb"])
IDENTIFIER = st.one_of(TRICKY, TEXT)
EVENT = st.fixed_dictionaries(
    {
        "event_id": IDENTIFIER,
        "event_type": st.sampled_from(["click", "cart", "favorite", "purchase"]),
        "user_id": IDENTIFIER,
        "item_id": IDENTIFIER,
        "event_time": st.integers(0, 2**45),
        "session_id": st.none() | IDENTIFIER,
        "category": st.none() | IDENTIFIER,
        "ad_id": st.none() | IDENTIFIER,
        "price": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "quantity": st.none() | st.integers(-5, 2**40),
        "currency": st.none() | st.just("EUR"),
        "value": st.none() | st.floats(0, 1e9),
    }
)
SCHEMA = {
    **dict.fromkeys(
        ("event_id", "event_type", "user_id", "item_id", "session_id", "category", "ad_id", "currency"), pl.String()
    ),
    "event_time": pl.Int64(),
    "price": pl.Float64(),
    "quantity": pl.Int64(),
    "value": pl.Float64(),
}


@given(st.lists(EVENT, max_size=20))
def test_every_event_comes_back_as_it_was(events: list[dict[str, object]]) -> None:
    encoded = encode_events(pl.DataFrame(events, schema=SCHEMA))
    assert len(encoded) == len(events)
    for event, raw in zip(events, encoded, strict=True):
        assert msgspec.to_builtins(decode(raw)) == event
        assert set(msgspec.json.decode(raw)) == {name for name, value in event.items() if value is not None}


def test_other_columns_stay_behind_and_missing_ones_are_no_matter() -> None:
    row = {"colour": "c", "event_id": "e", "event_type": "click", "user_id": "u", "item_id": "i", "event_time": 5}
    [raw] = encode_events(pl.DataFrame([row]))
    assert msgspec.json.decode(raw) == {name: value for name, value in row.items() if name != "colour"}


def test_pace_gives_out_the_rate_and_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("innerloop.worker.replay.time.monotonic", lambda: now[0])
    pace = Pace(1_000)
    assert pace.due() == 1
    assert pace.due() == 0
    now[0] += 0.0105
    assert pace.due() == 10
    now[0] += 60
    assert pace.due() == 60_000
    assert pace.due() == 0


def test_a_rate_is_a_number_or_max() -> None:
    assert parse_rate("max") is None
    assert parse_rate("2e4") == 20_000
    for wrong in ("0", "-1", "nan", "inf", "fast", ""):
        with pytest.raises(SettingsError) as told:
            parse_rate(wrong)
        assert str(told.value) == f"{wrong} is no rate: give a number of events per second above 0, or max."
