import uuid
from collections.abc import Iterator

import hypothesis
import psycopg2
import pytest

from innerloop.config import DatabaseSettings, KafkaSettings, Settings, TopicSettings, load_settings
from innerloop.store.database import connect
from innerloop.store.migrate import migrate
from innerloop.worker.servers.services import Services, running_services

# Examples take as long as the machine is busy; a test that hangs is ended by pytest-timeout.
hypothesis.settings.register_profile("innerloop", deadline=None)
hypothesis.settings.load_profile("innerloop")

_TEMPLATE = "innerloop_tests"


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    with running_services(load_settings(), announce=lambda _line: None) as running:
        yield running


@pytest.fixture
def kip_848(services: Services) -> None:
    """The test needs the consumer group protocol that came with Kafka 4.0."""
    if services.kafka and int(services.kafka.version.partition(".")[0]) < 4:
        pytest.skip(f"Kafka {services.kafka.version} has no consumer group protocol")


@pytest.fixture(scope="session")
def template(services: Services) -> Iterator[str]:
    """A database with our tables, from which each test's own is copied."""
    _run(services, f"DROP DATABASE IF EXISTS {_TEMPLATE}", f"CREATE DATABASE {_TEMPLATE}")
    engine = connect(DatabaseSettings(url=_address(services, _TEMPLATE)))
    migrate(engine)
    engine.dispose()
    yield _TEMPLATE
    _run(services, f"DROP DATABASE {_TEMPLATE} WITH (FORCE)")


@pytest.fixture
def settings(services: Services, template: str) -> Iterator[Settings]:
    """Running services; a migrated database, topics and groups of this test alone, the topics not made yet."""
    yield from _settings(services, template)


@pytest.fixture
def bare_settings(services: Services) -> Iterator[Settings]:
    """The same with an empty database."""
    yield from _settings(services, "template1")


def _settings(services: Services, template: str) -> Iterator[Settings]:
    mark = uuid.uuid4().hex[:8]
    names = {
        name: f"{field.default}.{mark}" for name, field in TopicSettings.model_fields.items() if field.annotation is str
    }
    _run(services, f"CREATE DATABASE t{mark} TEMPLATE {template}")
    yield Settings(
        kafka=KafkaSettings(
            bootstrap_servers=services.bootstrap_servers,
            ingest_group=f"ingest.{mark}",
            adapt_group=f"adapt.{mark}",
            quality_group=f"quality.{mark}",
        ),
        topics=TopicSettings(**names, partitions=4),
        database=DatabaseSettings(url=_address(services, f"t{mark}")),
    )
    _run(services, f"DROP DATABASE t{mark} WITH (FORCE)")


def _address(services: Services, database: str) -> str:
    return f"{services.database_url.rpartition('/')[0]}/{database}"


def _run(services: Services, *statements: str) -> None:
    connection = psycopg2.connect(services.database_url.replace("+psycopg2", ""))
    connection.autocommit = True  # databases are not made inside a transaction
    try:
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    finally:
        connection.close()
