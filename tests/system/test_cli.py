"""The command line, as processes of its own: what it prints, how it leaves, what it needs."""

import json
import signal
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import polars as pl
import psutil
import pytest
from confluent_kafka import TopicPartition
from offsets import committed
from shell import Shell
from typer.testing import CliRunner

from innerloop.config import Settings
from innerloop.evaluation.shop import Shop
from innerloop.store.database import connect
from innerloop.streams import clients
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.topics import ensure_topics
from innerloop.worker.cli import app

Wait = Callable[..., None]
NOWHERE = "127.0.0.1:1"
COMMANDS = [(each.name or getattr(each.callback, "__name__", "")) for each in app.registered_commands]


def is_one_sentence(text: str) -> bool:
    return text.startswith("innerloop: ") and text.count("\n") == 1 and "Traceback" not in text


# --- what needs no service


def test_every_command_explains_itself(bare_shell: Shell) -> None:
    shown = bare_shell.run("--help")
    assert shown.code == 0
    assert {"ingest", "adapt", "train", "demo"} < set(COMMANDS)
    for command in COMMANDS:
        assert command in shown.out
        helped = CliRunner().invoke(app, [command, "--help"])
        assert helped.exit_code == 0
        assert f"{command} " in helped.output
        assert "--member" not in helped.output, "for the pool only"


def test_the_version_is_told_without_any_setting() -> None:
    told = CliRunner().invoke(app, ["--version"], env={"INNERLOOP_NONSENSE": "1"})
    assert told.exit_code == 0
    assert told.output == f"innerloop {version('innerloop')}\n"


def test_config_shows_all_settings_and_no_secret(bare_shell: Shell) -> None:
    shown = bare_shell.run(
        "config",
        INNERLOOP_KAFKA__PROPERTIES='{"sasl.password": "hush"}',
        INNERLOOP_DATABASE__URL="postgresql://u:hush@h/d",
        INNERLOOP_ADAPT__TOP="7",
    )
    assert shown.code == 0
    assert "hush" not in shown.out + shown.err
    settings = json.loads(shown.out)
    assert settings.keys() == Settings.model_fields.keys()
    assert settings["adapt"]["top"] == 7


@pytest.mark.parametrize(
    ("command", "variables", "says"),
    [
        ("config", {"INNERLOOP_INGEST__BATCH_SIZE": "0"}, "ingest.batch_size"),
        ("config", {"INNERLOOP_INGEST__BATCHSIZE": "1"}, "ingest.batchsize: there is no such setting; the nearest is"),
        ("config", {"INNERLOOP_INJEST__BATCH_SIZE": "1"}, "INNERLOOP_INJEST__BATCH_SIZE"),
        ("config", {"INNERLOOP_KAFKA": "{"}, "kafka"),
        ("config", {"INNERLOOP_CONFIG": "/absent.toml"}, "/absent.toml"),
        ("config", {"INNERLOOP_CONFIG": "wrong.toml"}, "cannot be read"),
        ("ingest", {"INNERLOOP_DATABASE__URL": ""}, "INNERLOOP_DATABASE__URL"),
        ("ingest", {"INNERLOOP_DATABASE__URL": "mysql://h/d"}, "only postgresql"),
        ("ingest", {"INNERLOOP_DATABASE__URL": "nonsense"}, "is not an address"),
        ("topics", {"INNERLOOP_KAFKA__BOOTSTRAP_SERVERS": ""}, "INNERLOOP_KAFKA__BOOTSTRAP_SERVERS"),
        ("topics", {"INNERLOOP_KAFKA": '{"bootstrap_servers": "h:1", "properties": {"acks": "0"}}'}, "acks"),
        ("topics", {"INNERLOOP_KAFKA": '{"bootstrap_servers": "h:1", "properties": {"no.such": "0"}}'}, "no.such"),
        ("adapt --devices cuda:99", {}, "There is no device cuda:99"),
        ("adapt --devices ,", {}, "--devices is empty"),
        ("replay absent.csv --rate 0", {}, "rate"),
        ("replay absent.csv --column item_id", {}, "--column item_id is not ours=theirs"),
        ("demo --rate never", {}, "rate"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_2(
    bare_shell: Shell, command: str, variables: dict[str, str], says: str
) -> None:
    (bare_shell.folder / "wrong.toml").write_text("[kafka\n")
    result = bare_shell.run(*command.split(), **variables)
    assert result.code == 2
    assert is_one_sentence(result.err), result.err
    assert says in result.err


# --- what is missing


def test_without_broker_or_database_it_leaves_with_3(shell: Shell) -> None:
    (shell.folder / "events.csv").write_text("event_id,event_type,user_id,item_id,event_time\n1,click,u,i,1\n")
    commands = ["ingest", "adapt --member cpu", "topics", "lag", "scores u", "replay events.csv"]
    kafka = {"INNERLOOP_KAFKA__BOOTSTRAP_SERVERS": NOWHERE}
    broker = {command: shell.start(*command.split(), **kafka) for command in commands}
    url = f"postgresql://postgres@{NOWHERE}/x"
    commands = ["ingest", "migrate", "ingest --processes 2", "adapt --processes 2"]
    database = {command: shell.start(*command.split(), INNERLOOP_DATABASE__URL=url) for command in commands}
    for command, process in broker.items():
        result = shell.finish(process)
        assert result.code == 3, (command, result)
        assert is_one_sentence(result.err), (command, result.err)
        assert (
            f"No Kafka broker answers at {NOWHERE} (Connect to ipv4#{NOWHERE} failed: Connection refused)" in result.err
        )
    for command, process in database.items():
        result = shell.finish(process)
        assert result.code == 3, (command, result)
        assert is_one_sentence(result.err), (command, result.err)
        assert "INNERLOOP_DATABASE__URL" in result.err


def test_what_is_not_made_yet_names_the_command_that_makes_it(
    shell: Shell, settings: Settings, bare_settings: Settings
) -> None:
    empty = bare_settings.database.url.get_secret_value()
    for command in ("ingest", "train"):
        result = shell.run(*command.split(), INNERLOOP_DATABASE__URL=empty)
        assert (result.code, "run `innerloop migrate`" in result.err, is_one_sentence(result.err)) == (3, True, True)
    (shell.folder / "events.csv").write_text("event_id,event_type,user_id,item_id,event_time\n1,click,u,i,1\n")
    commands = ("ingest", "lag", "scores u", "replay events.csv", "train --events events.csv")
    for command, process in [(each, shell.start(*each.split())) for each in commands]:
        result = shell.finish(process)
        assert result.code == 3, result
        assert "run `innerloop topics`" in result.err, (command, result.err)
    assert shell.run("migrate").out == "The tables are up to date.\n"
    assert settings.topics.clicks in shell.run("topics").out
    assert shell.run("topics").out == "All topics exist.\n"
    pool, nothing = shell.start("adapt", "--devices", "cpu", "--processes", "1"), shell.start("train")
    result = shell.finish(pool)
    assert result.code == 3, result
    assert "run `innerloop train`" in result.err
    result = shell.finish(nothing)
    assert result.code == 2
    assert "There are no events to train on" in result.err


@pytest.mark.parametrize("command", ["scores", "erase"])
def test_bytes_that_are_no_text_are_no_user(shell: Shell, command: str) -> None:
    result = shell.run(command, "\udcff")  # as Python has an argument of the byte 0xff
    assert result.code == 2
    assert result.err == "innerloop: '\\udcff' is no user: an identifier is UTF-8.\n"


# --- the pool


def test_the_pool_starts_again_who_was_killed_and_says_why(shell: Shell, settings: Settings, wait_for: Wait) -> None:
    ensure_topics(settings)
    pool = shell.start("ingest", "--processes", "2")
    kafka, whole = settings.kafka, psutil.Process(pool.pid)
    wait_for(lambda: members_with_partitions(kafka, kafka.ingest_group) == 2)
    victim = whole.children()[0]
    victim.kill()
    wait_for(lambda: len(whole.children()) == 2 and victim not in whole.children())
    told = [json.loads(line) for line in shell.errors(pool).splitlines() if "starts again" in line]
    assert [(line["why"], line["pid"]) for line in told] == [("killed by SIGKILL", victim.pid)]
    children = whole.children()
    time.sleep(2.0)  # the new one is up
    pool.terminate()
    assert shell.finish(pool, 15).code == 0
    assert not any(child.is_running() for child in children)


def test_members_do_not_outlive_a_killed_pool(shell: Shell, settings: Settings, wait_for: Wait) -> None:
    ensure_topics(settings)
    pool = shell.start("ingest", "--processes", "2")
    whole = psutil.Process(pool.pid)
    wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.ingest_group) == 2)
    members = whole.children()
    pool.kill()
    wait_for(lambda: not any(each.is_running() for each in members), 15)


def test_a_members_settings_error_ends_the_pool_with_its_code(shell: Shell, settings: Settings) -> None:
    ensure_topics(settings)
    kafka = json.dumps({"bootstrap_servers": settings.kafka.bootstrap_servers, "properties": {"acks": "0"}})
    result = shell.run("ingest", "--processes", "2", INNERLOOP_KAFKA=kafka)
    assert result.code == 2
    assert "kafka.properties may not set acks" in result.err
    assert "starts again" not in result.err


# --- the whole loop by hand


def stored(settings: Settings) -> dict[tuple[str, int], int]:
    engine = connect(settings.database)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "SELECT topic, partition, next_offset FROM partition_ledger WHERE next_offset > 0"
        ).all()
    engine.dispose()
    return {(row.topic, row.partition): row.next_offset for row in rows}


def behind(shell: Shell) -> int:
    shown = shell.run("lag", "--json")
    assert shown.code == 0, shown.err
    return sum(each["offsets"] for each in json.loads(shown.out))


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    Shop(3, users=400, items=300).history(20_000).write_csv(tmp_path / "shop.csv")
    return tmp_path / "shop.csv"


@pytest.mark.timeout(600)
def test_replay_train_ingest_adapt_scores(shell: Shell, settings: Settings, shop: Path, wait_for: Wait) -> None:
    assert shell.run("topics").code == 0
    trained = shell.finish(shell.start("train", "--events", str(shop), "--share", "0.5"), seconds=300)
    assert trained.code == 0, trained.err
    assert trained.out.startswith("Release 1 at ")
    assert (shell.folder / "releases" / "release-1.json").is_file(), "where it was run, by default"
    ingest = shell.start("ingest", PYTHONPROFILEIMPORTTIME="1")
    adapt = shell.start("adapt", "--devices", "cpu", "--processes", "1")
    kafka, topics = settings.kafka, settings.topics
    wait_for(lambda: all(members_with_partitions(kafka, each) for each in (kafka.ingest_group, kafka.adapt_group)))

    replay = shell.start("replay", str(shop), "--rate", "max", "--start", "0.5")
    assert shell.finish(replay).out.splitlines()[-1].startswith("10000 events")
    wait_for(lambda: committed(kafka, kafka.adapt_group, [topics.requests], topics.partitions))
    # Under way: both are told to stop.
    began = time.monotonic()
    ingest.terminate()
    adapt.terminate()
    ended, adapted = shell.finish(ingest, 15), shell.finish(adapt, 15)
    assert time.monotonic() - began < 10
    assert (ended.code, adapted.code) == (0, 0), (ended.err[-2000:], adapted.err[-2000:])
    assert "Traceback" not in ended.err + adapted.err
    assert committed(kafka, kafka.ingest_group, topics.events, topics.partitions) == stored_events(settings)
    assert "innerloop.ingest" in ended.err
    assert "torch" not in ended.err, "ingest starts without it"

    ingest, adapt = shell.start("ingest"), shell.start("adapt", "--devices", "cpu", "--processes", "1")
    wait_for(lambda: behind(shell) == 0)
    user = pl.read_csv(shop)["user_id"][-1]
    shown = shell.run("scores", user)
    assert shown.code == 0, shown.err
    shown_text = " ".join(shown.out.split())
    assert f"recommendations for {user}" in shown_text
    assert "by bayes+ranker, model 1" in shown_text
    assert "ok: nothing waits." in shell.run("lag").out
    nobody = shell.run("scores", "nobody at all")
    assert nobody.code == 1
    assert "User nobody at all has no scores" in nobody.out

    again = shell.finish(shell.start("train"), seconds=300)
    assert again.out.startswith("Release 2 at "), again.err
    with clients.consumer(kafka, "test") as consumer:
        consumer.assign([TopicPartition(topics.releases, 0, 0)])
        records = [json.loads(m.value() or b"") for m in consumer.consume(2, 10)]
    assert [record["version"] for record in records] == [1, 2]
    for process in (ingest, adapt):
        process.send_signal(signal.SIGINT)
    assert [shell.finish(process, 15).code for process in (ingest, adapt)] == [0, 0]


def stored_events(settings: Settings) -> dict[tuple[str, int], int]:
    found = {place: offset for place, offset in stored(settings).items() if place[0] in settings.topics.events}
    assert found
    return found


@pytest.mark.timeout(600)
def test_a_stream_is_judged_offline_and_through_kafka_alike(bare_shell: Shell) -> None:
    Shop(2, users=60, items=120).history(1_500).write_parquet(bare_shell.folder / "shop.parquet")
    command = ["evaluate", "stream", "--data", "shop.parquet", "--report", "out", "--through-kafka", "--rate", "40"]
    done = bare_shell.finish(bare_shell.start(*command, "--draws", "20"), seconds=500)
    assert done.code == 0, done.err
    report = json.loads((bare_shell.folder / "out" / "report.json").read_text())
    rates = {row["arm"]: row["value"] for row in report["rows"] if row["slice"] == "all" and row["metric"] == "hr@20"}
    assert {"default", "bayes", "anil", "cavia", "maml", "reptile", "none", "placebo", "stale-1h"} < set(rates)
    assert {"popularity", "recents", "item-knn", "vsknn", "ials", "sasrec"} < set(rates)
    assert rates["through-kafka"] > 0.5 * rates["default, same moments"]
    assert rates["through-kafka, newest state"] == pytest.approx(rates["default, newest state"], abs=0.1)
    assert rates["default"] > rates["placebo"]
    assert "<table>" in (bare_shell.folder / "out" / "report.html").read_text()


def test_through_kafka_never_writes_to_a_broker_of_yours(shell: Shell) -> None:
    Shop(2, users=60, items=120).history(300).write_parquet(shell.folder / "shop.parquet")
    done = shell.run("evaluate", "stream", "--data", "shop.parquet", "--report", "out", "--through-kafka")
    assert done.code == 2
    assert is_one_sentence(done.err)
    assert "of its own" in done.err
