"""Kafka with SASL/SCRAM, TLS and ACLs, Postgres with TLS and a role that owns nothing: the loop runs, and says what is
wrong when it may not; no secret ever leaves it."""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
import typer
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    NewTopic,
    ResourcePatternType,
    ResourceType,
)
from secured import (
    ADMINISTRATOR,
    KEY_PASSWORD,
    OWNER,
    PASSWORD,
    SHOP,
    USER,
    SecuredKafka,
    SecuredPostgres,
    make_certificates,
    secured_kafka,
    secured_postgres,
)
from shell import Result, Shell, outer_environment

from innerloop.client import newest
from innerloop.config import DatabaseSettings, KafkaSettings, Settings
from innerloop.errors import RetryError, ServiceError, SettingsError, StopError
from innerloop.evaluation.shop import Shop
from innerloop.shop_items import Item
from innerloop.store.database import connect, require_tables, transaction
from innerloop.store.migrate import grant, migrate
from innerloop.store.tables import metadata
from innerloop.streams import clients
from innerloop.streams.event_producer import EventProducer
from innerloop.streams.groups import members_with_partitions
from innerloop.streams.offsets import LogEnds
from innerloop.streams.watch import OutputWatch
from innerloop.worker.cli import app
from innerloop.worker.console import names as console_names
from innerloop.worker.console.names import Names
from innerloop.worker.demo.names import publish_items
from innerloop.worker.train_items import items_on_topic

CANARIES = (PASSWORD, KEY_PASSWORD, "canary-of-an-ssl-password")


@dataclass(frozen=True)
class Secured:
    kafka: SecuredKafka
    postgres: SecuredPostgres

    def settings(self, user: str = USER, *, owner: bool = False) -> Settings:
        return Settings(
            kafka=KafkaSettings(bootstrap_servers=self.kafka.address, properties=self.kafka.properties(user)),
            database=DatabaseSettings(url=self.postgres.url(OWNER if owner else USER)),
        )


@pytest.fixture(scope="module")
def secured() -> Iterator[Secured]:
    """Migrated by the owner, topics made by the administrator; as the programs' user there is DML and no more."""
    with ExitStack() as stack:
        place = tempfile.TemporaryDirectory(prefix="innerloop-", dir="/tmp", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(place))
        folder.chmod(0o711)  # PostgreSQL leaves root behind and must get in
        for name in ("certificates", "postgres"):
            (folder / name).mkdir(mode=0o711)
        certificates = make_certificates(folder / "certificates")
        with ThreadPoolExecutor(2) as pool:
            kafka = pool.submit(stack.enter_context, secured_kafka(folder / "kafka", certificates))
            postgres = pool.submit(stack.enter_context, secured_postgres(folder / "postgres", certificates))
            both = Secured(kafka.result(), postgres.result())
        (folder / "shell").mkdir()
        shell = Shell(folder / "shell", environment(both.settings(ADMINISTRATOR, owner=True)))
        for arguments in (("migrate", "--grant-to", USER), ("topics",)):
            done = shell.run(*arguments)
            assert done.code == 0, done
        yield both


def environment(settings: Settings) -> dict[str, str]:
    properties = {name: value.get_secret_value() for name, value in settings.kafka.properties.items()}
    return {
        **outer_environment(),
        "COLUMNS": "1000",
        "INNERLOOP_KAFKA": json.dumps({**settings.kafka.model_dump(), "properties": properties}),
        "INNERLOOP_DATABASE__URL": settings.database.url.get_secret_value(),
    }


@pytest.fixture
def shell(secured: Secured, tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path, environment(secured.settings()))
    yield made
    made.close()


def wait_for(look: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def is_one_sentence(text: str) -> bool:
    return text.startswith("innerloop: ") and text.count("\n") == 1 and "Traceback" not in text


# --- the loop, and what its user may not do


@pytest.mark.timeout(400)
def test_the_whole_loop_runs_for_a_user_who_may_do_no_more_than_needed(secured: Secured, shell: Shell) -> None:
    events = Shop(3, users=60, items=50).history(2_000)
    events.write_csv(shell.folder / "shop.csv")
    training = shell.start("train", "--events", "shop.csv", "--share", "0.8", INNERLOOP_LEARNING__SEQUENCE="off")
    trained = shell.finish(training, 180)
    assert trained.code == 0, trained.err
    hurried = {"window_seconds": 1, "grace_seconds": 1, "idle_seconds": 1, "from_beginning": True}
    workers = [
        shell.start("ingest"),
        shell.start("adapt", "--member", "cpu"),
        shell.start("quality", INNERLOOP_QUALITY=json.dumps(hurried)),
    ]
    by_the_shop = environment(secured.settings(SHOP))["INNERLOOP_KAFKA"]
    sent = shell.run("replay", "shop.csv", "--rate", "max", "--start", "0.8", INNERLOOP_KAFKA=by_the_shop)
    assert sent.code == 0, sent.err
    user = str(events["user_id"][-1])
    settings = secured.settings()

    def is_scored() -> bool:
        assert all(worker.poll() is None for worker in workers), [shell.errors(worker) for worker in workers]
        return newest(settings, "recommendations", user) is not None

    wait_for(is_scored, 60)
    ends = LogEnds(settings, [settings.topics.quality_windows])
    wait_for(lambda: is_scored() and sum(ends.read().values()), 60)
    shown = shell.run("scores", user)
    assert (shown.code, "recommendations" in shown.out, user in shown.out) == (0, True, True), shown
    wait_for(lambda: all(each["offsets"] == 0 for each in json.loads(shell.run("lag", "--json").out)))
    for worker in workers:
        worker.terminate()
        done = shell.finish(worker)
        assert done.code == 0, done.err
        assert "denied" not in done.err
        assert "not authorized" not in done.err


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TABLE t (n int)",
        "ALTER TABLE items ADD COLUMN x int",
        "DROP TABLE items",
        "TRUNCATE items",
        "CREATE TRIGGER t BEFORE INSERT ON items EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "CREATE SCHEMA s",
        "SET ROLE innerloop_owner",
        "SELECT * FROM alembic_version",
        "COPY items TO PROGRAM 'true'",
        "SELECT pg_read_file('postgresql.conf')",
    ],
)
def test_the_role_may_not(secured: Secured, statement: str) -> None:
    connection = psycopg2.connect(secured.postgres.url())
    try:
        with connection.cursor() as cursor, pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute(statement)
    finally:
        connection.close()


def test_nor_may_the_kafka_user(secured: Secured) -> None:
    settings = secured.settings()
    admin = clients.admin(settings.kafka)
    made = admin.create_topics([NewTopic("another", 1)])["another"]
    gone = admin.delete_topics([settings.topics.clicks])[settings.topics.clicks]
    for future in (made, gone):
        with pytest.raises(KafkaException) as raised:
            future.result(20)
        assert raised.value.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED
    refused: list[KafkaError] = []
    producer = clients.producer(settings.kafka, lambda error, _: refused.append(error) if error else None)
    producer.produce(settings.topics.clicks, b"an event of its own")
    producer.flush(10)
    assert [error.code() for error in refused] == [KafkaError.TOPIC_AUTHORIZATION_FAILED]


def starts(watch: OutputWatch) -> bool:
    try:
        watch.start([0])
    except RetryError:  # a group that is new has no coordinator for a moment
        return False
    return True


def test_a_watch_that_may_not_read_is_no_watch_and_says_so(secured: Secured) -> None:
    """Without READ on the scores a sleeping worker's lists would stay the last, and nobody would know."""
    settings = secured.settings()
    topic = settings.topics.recommendations
    watch = OutputWatch(settings.kafka, group="innerloop-adapt-watch", topics=[topic])
    wait_for(lambda: starts(watch))
    place = (ResourceType.TOPIC, topic, ResourcePatternType.LITERAL)
    secured.kafka.allow([AclBinding(*place, f"User:{USER}", "*", AclOperation.READ, AclPermissionType.DENY)])
    try:
        with pytest.raises(StopError, match=f"watch {topic}.*OPERATIONS.md"):
            wait_for(lambda: watch.strangers({0: 1}))
    finally:
        secured.kafka.no_longer(
            AclBindingFilter(*place, f"User:{USER}", "*", AclOperation.READ, AclPermissionType.DENY)
        )
        watch.close()


def is_refused(settings: Settings) -> bool:
    """Whether somebody new may not read names."""
    names = Names(settings)
    names.read()
    names.close()
    return bool(names.notice)


def test_names_that_may_not_be_read_are_ids_and_the_console_says_why(
    secured: Secured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_names, "_AGAIN_SECONDS", 0.0)
    settings = secured.settings()
    publish_items(secured.settings(SHOP), [Item("a", "A name")])
    names = Names(settings)

    def turned(says: str) -> bool:
        names.read()
        return says in names.notice

    place = (ResourceType.TOPIC, settings.topics.items, ResourcePatternType.LITERAL)
    for operation, says in ((AclOperation.READ, "OPERATIONS.md"), (AclOperation.ALL, "authorization failed")):
        rule = (*place, f"User:{USER}", "*", operation, AclPermissionType.DENY)
        secured.kafka.allow([AclBinding(*rule)])
        try:
            wait_for(lambda: is_refused(settings))  # rules come into force a moment later
            wait_for(lambda says=says: turned(says))  # type: ignore[misc]
            assert "shown by their ids" in names.notice
            assert names.of(["a"]) == {}
        finally:
            secured.kafka.no_longer(AclBindingFilter(*rule))
    wait_for(lambda: turned("") and names.of(["a"]) == {"a": "A name"} and names.notice == "")
    names.close()


def test_a_catalogue_that_may_not_be_read_stops_training_with_a_sentence(secured: Secured) -> None:
    settings = secured.settings()
    publish_items(secured.settings(SHOP), [Item("a", "A name")])
    place = (ResourceType.TOPIC, settings.topics.items, ResourcePatternType.LITERAL)

    def says(sentence: str) -> bool:
        try:
            items_on_topic(settings, set())
        except ServiceError as error:
            return sentence in str(error)
        return False

    for operation, sentence in ((AclOperation.READ, "OPERATIONS.md"), (AclOperation.ALL, "authorization failed")):
        rule = (*place, f"User:{USER}", "*", operation, AclPermissionType.DENY)
        secured.kafka.allow([AclBinding(*rule)])
        try:
            wait_for(lambda sentence=sentence: says(sentence))  # type: ignore[misc]
        finally:
            secured.kafka.no_longer(AclBindingFilter(*rule))
    wait_for(lambda: not says("authorization failed"))


def test_migrate_is_for_the_owner_alone(shell: Shell) -> None:
    done = shell.run("migrate")
    assert done.code == 3, done
    assert is_one_sentence(done.err), done.err
    assert "permission denied" in done.err
    assert "run `innerloop migrate` as the owner" in done.err


def test_what_may_not_be_read_stops_with_the_command_that_grants_it(secured: Secured) -> None:
    database = "half_granted"
    secured.postgres.run(f"CREATE DATABASE {database} OWNER {OWNER}")
    owner = connect(DatabaseSettings(url=secured.postgres.url(OWNER, database=database)))
    migrate(owner)
    engine = connect(DatabaseSettings(url=secured.postgres.url(database=database)))
    require_tables(engine)

    def delete() -> None:
        with transaction(engine) as connection:
            connection.exec_driver_sql("DELETE FROM items WHERE item_id = %s", ("a secret of a user",))

    with pytest.raises(ServiceError, match=rf"denied for table items.*--grant-to {USER}") as raised:
        delete()
    assert "a secret" not in str(raised.value)
    grant(owner, USER)
    delete()
    with pytest.raises(ServiceError, match=r'role "nobody; DROP" does not exist.*CREATE ROLE'):
        grant(owner, "nobody; DROP")
    with owner.connect() as connection:
        held = connection.exec_driver_sql(
            "SELECT table_name, string_agg(privilege_type, ' ' ORDER BY privilege_type)"
            " FROM information_schema.role_table_grants WHERE grantee = %s GROUP BY 1",
            (USER,),
        ).all()
    assert {tuple(row) for row in held} == {(name, "DELETE INSERT SELECT UPDATE") for name in metadata.tables}
    for each in (engine, owner):
        each.dispose()


# --- who is not let in, or is not trusted


def kafka_that_refuses(secured: Secured, case: str) -> KafkaSettings:
    kafka, certificates = secured.kafka, secured.kafka.certificates
    address = {"expired": kafka.expired, "misnamed": kafka.misnamed}.get(case, kafka.address)
    other = {
        "password": {"sasl_password": "wrong"},
        "user": {"sasl_username": "nobody"},
        "authority": {"ssl_ca_location": str(certificates.stranger)},
        "mechanism": {"sasl_mechanism": "PLAIN"},
    }.get(case, {})
    return KafkaSettings(bootstrap_servers=address, properties=kafka.properties(**other))


def database_that_refuses(secured: Secured, case: str) -> str:
    postgres = secured.postgres
    return {
        "password": lambda: postgres.url(password="wrong"),
        "user": lambda: postgres.url(user="nobody"),
        "authority": lambda: postgres.url(sslrootcert=str(postgres.certificates.stranger)),
        "no TLS": lambda: postgres.url(sslmode="disable"),
    }.get(case, postgres.url)()


KAFKA_SAYS = [
    ("password", r"does not let innerloop_app in \(.*invalid credentials.*correct sasl\.username, sasl\.password"),
    ("user", r"does not let nobody in"),
    ("mechanism", r"does not let innerloop_app in .*mechanism"),
    ("authority", r"certificate of Kafka .* it is not signed by an authority .*ssl\.ca\.location"),
    ("expired", r"certificate of Kafka .* it has expired: renew it"),
    ("misnamed", r"certificate of Kafka .* it is not for 127\.0\.0\.1"),
]
DATABASE_SAYS = [
    ("password", r"password authentication failed.*correct user and password in INNERLOOP_DATABASE__URL"),
    ("user", r"password authentication failed for user .nobody"),
    ("authority", r"it is not signed by an authority .*sslrootcert"),
    ("expired", r"it has expired.*renew the server's certificate"),
    ("misnamed", r"does not match host name.*correct sslrootcert and host"),
    ("no TLS", r"no encryption.*sslmode=verify-full"),
]


@pytest.mark.parametrize(("case", "says"), KAFKA_SAYS)
def test_kafka_that_refuses_is_one_sentence_at_once(secured: Secured, case: str, says: str) -> None:
    with pytest.raises(ServiceError, match=says) as raised:
        clients.require_broker(kafka_that_refuses(secured, case), seconds=60.0)  # far below: it does not wait
    assert "\n" not in str(raised.value)
    assert not any(canary in str(raised.value) for canary in CANARIES)


@pytest.mark.parametrize(("case", "says"), DATABASE_SAYS)
@pytest.mark.parametrize("attempt", [require_tables, migrate])
def test_a_database_that_refuses_is_one_sentence(
    secured: Secured, attempt: Callable[..., None], case: str, says: str
) -> None:
    url = database_that_refuses(secured, case)
    try:
        if case in {"expired", "misnamed"}:
            secured.postgres.show(case)
            wait_for(lambda: not lets_in(url))
        with pytest.raises(ServiceError, match=says) as raised:
            attempt(connect(DatabaseSettings(url=url)))
    finally:
        secured.postgres.show("valid")
        wait_for(lambda: lets_in(secured.postgres.url()))
    assert "\n" not in str(raised.value)
    assert not any(canary in str(raised.value) for canary in CANARIES)


def lets_in(url: str) -> bool:
    try:
        psycopg2.connect(url).close()
    except psycopg2.OperationalError:
        return False
    return True


@pytest.mark.parametrize(
    ("properties", "says"),
    [
        ({"ssl.ca.location": "/absent.pem"}, "absent.pem"),
        ({"error_cb": "print"}, "error_cb"),
        ({"ssl.key.location": "{key}", "ssl.key.password": "canary-of-an-ssl-password"}, "ssl.key.location"),
    ],
)
def test_files_that_cannot_be_used_are_one_sentence(secured: Secured, properties: dict[str, str], says: str) -> None:
    key = str(secured.kafka.certificates.key("client"))
    other = {name: value.format(key=key) for name, value in properties.items()}
    settings = KafkaSettings(
        bootstrap_servers=secured.kafka.address, properties={**secured.kafka.properties(), **other}
    )
    with pytest.raises(SettingsError, match=re.escape(says)) as raised:
        clients.admin(settings)
    assert "\n" not in str(raised.value).strip()
    assert not any(canary in str(raised.value) for canary in CANARIES)


def test_every_command_leaves_with_that_sentence_and_3(secured: Secured, shell: Shell) -> None:
    refused = secured.settings().model_copy(update={"kafka": kafka_that_refuses(secured, "user")})
    kafka = environment(refused)["INNERLOOP_KAFKA"]
    commands = ("ingest", "adapt --member cpu", "topics", "scores u", "lag")
    by_kafka = {each: shell.start(*each.split(), INNERLOOP_KAFKA=kafka) for each in commands}
    url = secured.postgres.url(user="nobody")
    by_postgres = {each: shell.start(*each.split(), INNERLOOP_DATABASE__URL=url) for each in ("ingest", "migrate")}
    for says, started in (("does not let nobody in", by_kafka), ("authentication failed", by_postgres)):
        for command, process in started.items():
            done = shell.finish(process)
            assert done.code == 3, (command, done)
            assert is_one_sentence(done.err), (command, done.err)
            assert says in done.err, (command, done.err)
            assert PASSWORD not in done.err, command


# --- while it runs


def test_credentials_that_change_while_it_runs_are_told_and_taken_again(secured: Secured, shell: Shell) -> None:
    settings, kafka = secured.settings(), secured.kafka
    ingest = shell.start("ingest")
    wait_for(lambda: members_with_partitions(settings.kafka, settings.kafka.ingest_group) == 1)
    kafka.set_password(USER, "rotated")
    kafka.server.restart()
    refused = "does not let innerloop_app in"
    wait_for(lambda: refused in shell.errors(ingest))
    time.sleep(2.0)
    told = shell.errors(ingest)
    assert ingest.poll() is None
    assert "SASL authentication error" not in told, "librdkafka's own line for every attempt"
    assert told.count(refused) < 5, "by each of its clients, not for each attempt"
    kafka.set_password(USER, PASSWORD)
    secured.postgres.run(
        f"ALTER ROLE {USER} PASSWORD 'rotated'",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{USER}'",
    )
    click(secured, "patient")
    wait_for(lambda: "password authentication failed" in shell.errors(ingest))
    secured.postgres.run(f"ALTER ROLE {USER} PASSWORD '{PASSWORD}'")
    wait_for(lambda: stored(secured, "patient"))
    ingest.terminate()
    done = shell.finish(ingest)
    assert done.code == 0, done.err
    assert not any(canary in done.out + done.err for canary in CANARIES)


def click(secured: Secured, user: str) -> None:
    producer = EventProducer(secured.settings(SHOP))
    event = {"event_id": f"{user}-1", "event_type": "click", "user_id": user, "item_id": "i"}
    producer.send(user, "click", json.dumps({**event, "event_time": int(time.time() * 1000)}).encode())
    producer.finish()


def stored(secured: Secured, user: str) -> bool:
    connection = psycopg2.connect(secured.postgres.url(OWNER))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM support_sets WHERE user_id = %s", (user,))
            return cursor.fetchone() is not None
    finally:
        connection.close()


# --- secrets

SERVES = {"up", "demo", "console"}
"""Run until they are stopped, and `up` prints the password of the database that it made: that is its task."""
ARGUMENTS = {
    "adapt": "--member cpu",
    "scores": "u",
    "replay": "events.csv",
    "erase": "u",
    "train": "--events events.csv",
}


NEEDS_THE_DATABASE = {"migrate", "ingest", "adapt", "train"}


def commands() -> list[str]:
    """Every command there is, those of groups included, but for `evaluate`, which has no services."""
    inner = [
        f"{group.name} {name}"
        for group in app.registered_groups
        if group.name != "evaluate" and group.typer_instance is not None
        for name in names_of(group.typer_instance)
    ]
    named = [name for name in names_of(app) if name not in SERVES]
    return [f"{name} {ARGUMENTS.get(name, '')}".strip() for name in (*named, *inner)]


def names_of(commands: typer.Typer) -> list[str]:
    return [str(each.name or getattr(each.callback, "__name__", "")) for each in commands.registered_commands]


@pytest.mark.timeout(400)
def test_no_command_tells_a_secret(secured: Secured, shell: Shell) -> None:
    """Each with canaries for secrets, most detailed logs, librdkafka's own included, and a database that refuses."""
    (shell.folder / "events.csv").write_text("event_id,event_type,user_id,item_id,event_time\n1,click,u,i,1\n")
    secrets = secured.kafka.properties(
        SHOP,
        ssl_key_location=str(secured.kafka.certificates.key("client")),
        ssl_certificate_location=str(secured.kafka.certificates.chain("client")),
        ssl_key_password=KEY_PASSWORD,
        debug="all",
    )
    kafka = json.dumps({"bootstrap_servers": secured.kafka.address, "properties": secrets})
    url = secured.postgres.url(user="nobody", sslpassword="canary-of-an-ssl-password")
    more = {"INNERLOOP_LOG_LEVEL": "debug", "INNERLOOP_KAFKA": kafka, "INNERLOOP_DATABASE__URL": url}
    everything = commands()
    assert {"config", "ingest", "adapt --member cpu", "migrate", "lag"} < set(everything)
    done = {"config toml": config_from_a_file(shell, secrets, url)}
    for first in range(0, len(everything), 4):
        started = {each: shell.start(*each.split(), **more) for each in everything[first : first + 4]}
        done |= {command: shell.finish(process, 180) for command, process in started.items()}
    for command, result in done.items():
        assert "Traceback" not in result.err, (command, result.err)
        for canary in CANARIES:
            assert canary not in result.out + result.err, (command, canary)
        codes = (
            {0} if command.startswith("config") else {1, 3} if command.split()[0] in NEEDS_THE_DATABASE else {0, 1, 3}
        )
        assert result.code in codes, (command, result.code, result.err)
        assert result.out + result.err, command


def config_from_a_file(shell: Shell, properties: dict[str, str], url: str) -> Result:
    lines = [f'"{name}" = "{value}"' for name, value in properties.items()]
    text = f'[database]\nurl = "{url}"\n[kafka.properties]\n' + "\n".join(lines)
    (shell.folder / "secret.toml").write_text(text)
    return shell.run("config", INNERLOOP_CONFIG="secret.toml")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://u:canary-of-a-password@127.0.0.1:1/d",
        "postgresql://127.0.0.1:1/d?user=u&password=canary-of-a-password&sslpassword=canary-of-a-key",
        "postgresql://u:canary-of-a-password/x@127.0.0.1:1/d",  # a slash that should have been %2F
        "postgresql://u:canary-of-a-password@127.0.0.1:no/d",
        "mysql://u:canary-of-a-password@h/d",
        "canary-of-a-password",
    ],
)
def test_no_address_is_shown_with_its_password(address: str) -> None:
    with pytest.raises((ServiceError, SettingsError), match="INNERLOOP_DATABASE__URL") as raised:
        require_tables(connect(DatabaseSettings(url=address)))
    assert "canary" not in str(raised.value)
    engine = connect(DatabaseSettings(url="postgresql://127.0.0.1:1/d?password=canary-of-a-password"))
    with pytest.raises(RetryError) as away, transaction(engine):
        pytest.fail("nobody listens there")
    assert "canary" not in str(away.value)


CRASH = """
import logging
from innerloop.config import load_settings
from innerloop.worker.logs import configure_logs

def crash(settings):
    url = settings.database.url.get_secret_value()
    password = settings.kafka.properties["sasl.password"].get_secret_value()
    raise RuntimeError("crashed on purpose")

settings = load_settings()
configure_logs(settings)
try:
    crash(settings)
except RuntimeError:
    logging.getLogger("innerloop").exception("told")
crash(settings)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_has_no_values_in_it(secured: Secured, log_format: str) -> None:
    variables = {**environment(secured.settings()), "INNERLOOP_LOG_FORMAT": log_format, "FORCE_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", CRASH], env=variables, capture_output=True, text=True, check=False)
    assert done.stderr.count("crashed on purpose") >= 2, done.stderr
    assert "crash" in done.stderr
    assert not any(canary in done.stderr for canary in CANARIES)
