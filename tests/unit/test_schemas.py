import json
import tomllib
from pathlib import Path
from typing import get_args

import jsonschema
import msgspec
import pytest
from jsonschema import Draft202012Validator

from innerloop import schemas
from innerloop.config import KafkaSettings, Settings, TopicSettings
from innerloop.erasure import Erasure
from innerloop.errors import DeadLetterError
from innerloop.evaluation.quality.record import QualityWindow
from innerloop.events import Event, decode
from innerloop.scores import AdaptationRequest, AdScores, AdsKind, RecommendationScores, ScoredAd, ScoredItem
from innerloop.shop_items import Item, decode_item
from innerloop.streams.topics import catalogue

HERE = Path(schemas.__file__).parent
SCHEMAS = sorted(HERE.glob("*.v*.json"))
EXAMPLES = sorted((HERE / "examples").glob("*.json"))
STRUCTS = {
    "event": Event,
    "adaptation_request": AdaptationRequest,
    "erasure": Erasure,
    "recommendation_scores": RecommendationScores,
    "ad_scores": AdScores,
    "quality_window": QualityWindow,
    "item": Item,
}


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(schemas.load(name), format_checker=Draft202012Validator.FORMAT_CHECKER)


def examples(name: str) -> list[Path]:
    return [path for path in EXAMPLES if path.name.split(".")[0] == name]


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_a_schema_is_a_schema_and_has_examples(path: Path) -> None:
    schema = json.loads(path.read_text())
    Draft202012Validator.check_schema(schema)
    assert schema["$id"] == path.name
    assert set(schema["required"]) <= set(schema["properties"])
    assert len(examples(path.name.split(".")[0])) >= 2


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_validates_and_decodes(path: Path) -> None:
    name = path.name.split(".")[0]
    example = path.read_bytes()
    validator(name).validate(json.loads(example))
    if name == "event":
        event = decode(example)
        assert event.user_id == json.loads(example)["user_id"]
        assert 1_700_000_000_000 < event.time_ms < 1_800_000_000_000
    elif name in STRUCTS:
        record = msgspec.json.decode(example, type=STRUCTS[name])
        assert set(msgspec.json.decode(msgspec.json.encode(record))) <= set(json.loads(example))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_without_a_required_field_fails_in_both(path: Path) -> None:
    name = path.name.split(".")[0]
    for field in schemas.load(name)["required"]:
        broken = json.loads(path.read_text())
        del broken[field]
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate(broken)
        if name in STRUCTS:
            with pytest.raises((msgspec.ValidationError, DeadLetterError)):
                decode_as(name, broken)


def decode_as(name: str, message: dict[str, object]) -> object:
    raw = json.dumps(message).encode()
    return decode(raw) if name == "event" else msgspec.json.decode(raw, type=STRUCTS[name])


NO_NUMBERS: tuple[object, ...] = ("19.90", [], True)
TIMES: tuple[object, ...] = (-1, 1.5, 2**53 + 1, "yesterday", "2025-06-15T15:06:40", None, "")
WRONG: list[tuple[str, object]] = [
    *[(field, value) for field in ("event_id", "user_id", "item_id") for value in ("", 7, None, "x" * 257, "a\0b")],
    *[("ad_id", value) for value in ("", 7, "a\0b")],
    *[("session_id", value) for value in (7, "x" * 257, "a\0b")],
    *[("event_type", value) for value in ("view", "Click", "", None, 1)],
    *[("event_time", value) for value in TIMES],
    *[(field, value) for field in ("price", "quantity", "value") for value in NO_NUMBERS],
    ("currency", 978),
]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_schema_and_decoder_refuse_the_same_events(field: str, value: object) -> None:
    event = json.loads((HERE / "examples/event.click_on_ad.json").read_text()) | {field: value}
    assert not validator("event").is_valid(event)
    with pytest.raises(DeadLetterError):
        decode_as("event", event)


RIGHT = [
    ("user_id", "x" * 256),
    ("user_id", " "),
    ("session_id", ""),
    ("event_time", 0),
    ("event_time", "1970-01-01T00:00:00Z"),
    ("event_time", "2025-06-15T15:06:40.123456-11:30"),
    ("price", 0),
    ("price", -3.5),
    ("quantity", 0.25),
    ("currency", "EUR"),
    ("colour", {"of": ["any", "kind"]}),
]


@pytest.mark.parametrize(("field", "value"), RIGHT)
def test_schema_and_decoder_take_the_same_events(field: str, value: object) -> None:
    event = json.loads((HERE / "examples/event.click.json").read_text()) | {field: value}
    validator("event").validate(event)
    decode_as("event", event)


WRONG_ITEMS: list[tuple[str, object]] = [
    *[("item_id", value) for value in ("", 7, None, "x" * 257, "a\0b")],
    *[("name", value) for value in ("", 7, None, "x" * 513, "a\0b", ["a"])],
    *[("category", value) for value in ("", 7, "x" * 257, "a\0b")],
    *[("price", value) for value in NO_NUMBERS],
    *[("url", value) for value in (7, "x" * 2049, "a\0b")],
]


@pytest.mark.parametrize(("field", "value"), WRONG_ITEMS)
def test_schema_and_decoder_refuse_the_same_items(field: str, value: object) -> None:
    item = json.loads((HERE / "examples/item.whole.json").read_text()) | {field: value}
    assert not validator("item").is_valid(item)
    with pytest.raises(DeadLetterError):
        decode_item(str(item["item_id"]).encode(), json.dumps(item).encode())


RIGHT_ITEMS: list[tuple[str, object]] = [
    *[("name", value) for value in ("x" * 512, " ", "<b>&amp;</b>", "\u20ac")],
    *[(field, None) for field in ("category", "price", "url")],
    *[("price", value) for value in (0, -1, 3.5)],
    ("url", ""),
    ("colour", {"of": ["any", "kind"]}),
]


@pytest.mark.parametrize(("field", "value"), RIGHT_ITEMS)
def test_schema_and_decoder_take_the_same_items(field: str, value: object) -> None:
    item = json.loads((HERE / "examples/item.whole.json").read_text()) | {field: value}
    validator("item").validate(item)
    assert decode_item(item["item_id"].encode(), json.dumps(item).encode()).name == item["name"]


@pytest.mark.parametrize("key", [None, b"", b"another", b"4711 ", b"\xff"])
def test_an_item_under_another_key_is_none(key: bytes | None) -> None:
    with pytest.raises(DeadLetterError, match="is not the record's key"):
        decode_item(key, (HERE / "examples/item.whole.json").read_bytes())


@pytest.mark.parametrize("name", STRUCTS)
def test_struct_and_schema_have_the_same_fields(name: str) -> None:
    schema, fields = schemas.load(name), msgspec.structs.fields(STRUCTS[name])  # type: ignore[arg-type] # every value is a struct
    assert set(schema["properties"]) == {field.name for field in fields}
    assert set(schema["required"]) == {field.name for field in fields if field.required}


def test_the_kinds_of_ads_are_those_of_the_schema() -> None:
    assert set(schemas.load("ad_scores")["properties"]["kind"]["enum"]) == set(get_args(AdsKind))


def test_a_release_record_is_a_card_and_its_place() -> None:
    releases = pytest.importorskip("innerloop.learning.releases")
    card, schema = {field.name for field in msgspec.structs.fields(releases.Card)}, schemas.load("release")
    assert set(schema["properties"]) == card | {"model", "location"}
    summary = {field.name for field in msgspec.structs.fields(releases.DataSummary)}
    assert set(schema["properties"]["data"]["properties"]) == summary


@pytest.mark.parametrize(
    ("name", "list_name", "struct"), [("recommendation_scores", "items", ScoredItem), ("ad_scores", "ads", ScoredAd)]
)
def test_struct_and_schema_have_the_same_entries(name: str, list_name: str, struct: type[msgspec.Struct]) -> None:
    entry = schemas.load(name)["properties"][list_name]["items"]
    fields = msgspec.structs.fields(struct)
    assert set(entry["properties"]) == {field.name for field in fields}
    assert set(entry["required"]) == {field.name for field in fields if field.required}


def test_the_catalogue_has_every_topic_under_its_default_name() -> None:
    defaults = TopicSettings()
    names = {name for name, field in TopicSettings.model_fields.items() if field.annotation is str}
    assert set(catalogue()) == names
    assert {field: topic.name for field, topic in catalogue().items()} == {n: getattr(defaults, n) for n in names}


@pytest.mark.parametrize("field", tomllib.loads(schemas.read("topics.toml")))
def test_a_topic_names_a_schema_and_has_a_configuration(field: str) -> None:
    topic = catalogue()[field]
    assert (HERE / f"{topic.schema}.json") in SCHEMAS
    assert topic.config["cleanup.policy"] in ("compact", "delete")
    assert topic.compacted == (field in ("recommendations", "ads", "releases", "items"))
    assert topic.compacted or int(topic.config["retention.ms"]) >= 86_400_000
    assert topic.written_by
    assert topic.read_by


def test_partitions_follow_the_setting_only_where_the_catalogue_says_so() -> None:
    settings = Settings(kafka=KafkaSettings(), topics=TopicSettings(partitions=12))
    counts = {field: topic.partition_count(settings.topics) for field, topic in catalogue().items()}
    assert {field for field, count in counts.items() if count == 1} == {"dead_letters", "releases", "quality_windows"}
    assert {count for count in counts.values() if count != 1} == {12}


def test_every_schema_belongs_to_a_topic() -> None:
    assert {topic.schema for topic in catalogue().values()} == {path.stem for path in SCHEMAS}


def test_a_version_that_is_not_there_is_not_found() -> None:
    with pytest.raises(FileNotFoundError):
        schemas.load("event", 999)
