import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from innerloop.config import KafkaSettings, Settings, load_settings
from innerloop.errors import SettingsError
from innerloop.streams import clients

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of the developer's own settings."""
    for name in os.environ:
        if name.startswith("INNERLOOP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def toml(tmp_path: Path) -> Write:
    def write(text: str, name: str = "innerloop.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal() -> str:
    with pytest.raises(SettingsError) as raised:
        load_settings()
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings().ingest.batch_size == 50_000
    assert load_settings().kafka.bootstrap_servers == ""


def test_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, toml: Write) -> None:
    toml('[support]\ncapacity = 8\n[ingest]\nbreaker_window = 7\n[topics]\nclicks = "from.file"')
    monkeypatch.setenv("INNERLOOP_SUPPORT__CAPACITY", "16")
    settings = load_settings()
    assert (settings.support.capacity, settings.ingest.breaker_window, settings.topics.clicks) == (16, 7, "from.file")
    assert settings.topics.purchases == "events.purchases"


def test_what_the_caller_passes_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_LOG_LEVEL", "debug")
    assert load_settings().log_level == "debug"
    assert load_settings(log_level="error").log_level == "error"


def test_another_file_may_be_named(monkeypatch: pytest.MonkeyPatch, toml: Write) -> None:
    toml('log_level = "wrong file"')
    monkeypatch.setenv("INNERLOOP_CONFIG", str(toml('log_level = "debug"', "other.toml")))
    assert load_settings().log_level == "debug"


def test_a_named_file_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_CONFIG", "/nowhere/innerloop.toml")
    assert "/nowhere/innerloop.toml" in refusal()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[ingest]\nbatch_sise = 5", "ingest.batch_sise"),
        ("[ingset]\nbatch_size = 5", "ingset"),
        ('[ingest]\nbatch_size = "many"', "ingest.batch_size"),
        ("[ingest]\nbatch_size = 0", "ingest.batch_size"),
        ("[support]\ncapacity = 5000", "support.capacity"),
        ("[support.weights]\nclick = -1", "support.weights.click"),
        ("[support.weights]\nclick = nan", "support.weights.click"),
        ("[support.weights]\nclick = inf", "support.weights.click"),
        ("[support.weights]\nclik = 1", "clik has no weight; click, cart, favorite, purchase have one"),
        ("[support.weights]\nimpression = 1", "impression has no weight"),
        ("[learning]\ndimension = 2", "learning.dimension"),
        ('[learning]\nsequence = "attention"\ndimension = 13', "sequence = attention needs an even dimension"),
        ("[ingest]\nbatch_size = 60000", "ingest.cached_users"),
        ('log_format = "xml"', "log_format"),
        ("log_level = = 3", "line 1"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_key(toml: Write, text: str, key: str) -> None:
    toml(text)
    assert key in refusal()


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("INNERLOOP_INGEST__BATCH_SISE", "5", "batch_sise"),
        ("INNERLOOP_INGEST__BATCH_SIZE", "many", "ingest.batch_size"),
        ("INNERLOOP_KAFKA__PROPERTIES", "{not json", "kafka"),
        ("INNERLOOP_KAFAK__BOOTSTRAP_SERVERS", "somewhere:9092", "kafak"),
    ],
)
def test_a_wrong_variable_is_one_sentence_that_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str
) -> None:
    monkeypatch.setenv(name, value)
    assert key in refusal().lower()


def test_every_wrong_setting_is_told_at_once(toml: Write) -> None:
    toml("[ingest]\nbatch_size = 0\n[support]\ncapacity = 0")
    sentence = refusal()
    assert "ingest.batch_size" in sentence
    assert "support.capacity" in sentence


def test_secrets_are_hidden_wherever_settings_are_shown(toml: Write) -> None:
    toml('[database]\nurl = "postgresql://u:hunter2@db/x"\n[kafka.properties]\n"sasl.password" = "hunter2"')
    settings = load_settings()
    for shown in (settings.model_dump_json(), str(settings), repr(settings)):
        assert "hunter2" not in shown
    assert json.loads(settings.model_dump_json())["kafka"]["properties"].keys() == {"sasl.password"}
    assert settings.database.url.get_secret_value() == "postgresql://u:hunter2@db/x"


def test_a_wrong_secret_is_not_repeated(toml: Write) -> None:
    toml('[database]\nurl = ["hunter2"]\n[kafka.properties]\n"sasl.password" = ["hunter2"]')
    assert "hunter2" not in refusal()


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().log_level = "debug"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        Settings().ingest.batch_size = 1  # type: ignore[misc]


def kafka(**passed: str) -> KafkaSettings:
    return KafkaSettings(
        bootstrap_servers="b:9092", properties={name.replace("_", "."): value for name, value in passed.items()}
    )


def test_librdkafka_properties_pass_through_and_beat_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_KAFKA__BOOTSTRAP_SERVERS", "b:9092")
    passed = {"security.protocol": "SSL", "client.id": "mine", "session.timeout.ms": "45000"}
    monkeypatch.setenv("INNERLOOP_KAFKA__PROPERTIES", json.dumps(passed))
    made = clients.properties(load_settings().kafka, session_timeout_ms=10_000, linger_ms=1)
    assert made["bootstrap.servers"] == "b:9092"
    assert made["linger.ms"] == 1
    assert {name: made[name] for name in passed} == passed


@pytest.mark.parametrize(
    "name",
    [
        "bootstrap.servers",
        "metadata.broker.list",  # the same by librdkafka's older name
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "acks",
        "request.required.acks",  # the same by librdkafka's older name
        "group.id",  # ingest and adapt would be one group
        "auto.offset.reset",  # what retention has passed would be skipped in silence
        "partition.assignment.strategy",  # the loop assigns incrementally
        "partitioner",  # a user's requests and scores would be on another partition than the shop's clients say
        "transactional.id",
        "allow.auto.create.topics",  # a topic asked for would be made as the broker likes, not as the catalogue says
    ],
)
def test_a_property_that_a_guarantee_rests_on_is_refused(name: str) -> None:
    with pytest.raises(SettingsError) as raised:
        clients.properties(kafka(**{name: "x"}))
    assert f"kafka.properties may not set {name}" in str(raised.value)


def test_a_property_that_librdkafka_does_not_know_is_a_sentence() -> None:
    with pytest.raises(SettingsError, match=r"no\.such\.property"):
        clients.producer(kafka(no_such_property="1"))


def test_no_broker_set_is_told() -> None:
    with pytest.raises(SettingsError, match="INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"):
        clients.properties(KafkaSettings())
