import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, text
from sqlalchemy.engine import make_url

from innerloop.config import DatabaseSettings, Settings
from innerloop.errors import ServiceError, SettingsError
from innerloop.store.database import connect, require_tables
from innerloop.store.migrate import migrate
from innerloop.store.tables import metadata


@pytest.fixture
def engine(bare_settings: Settings) -> Iterator[Engine]:
    made = connect(bare_settings.database)
    yield made
    made.dispose()


@pytest.fixture
def nowhere() -> DatabaseSettings:
    """A port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return DatabaseSettings(url=f"postgresql://somebody:hunter2@127.0.0.1:{port}/innerloop")


def everything(engine: Engine) -> list[tuple[str, ...]]:
    query = "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
    with engine.connect() as connection:
        rows = connection.execute(text(f"{query} WHERE table_schema = 'public' ORDER BY 1, 2")).all()
    return [tuple(row) for row in rows]


def test_the_migrations_build_what_the_tables_say(engine: Engine) -> None:
    assert everything(engine) == []
    migrate(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = [each for each in compare_metadata(context, metadata) if "alembic_version" not in str(each)]
        assert differences == []
        assert set(inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}
        assert inspect(connection).get_view_names() == ["support_examples"]
        keys = {name: inspect(connection).get_pk_constraint(name)["constrained_columns"] for name in metadata.tables}
    assert keys == {name: [column.name for column in table.primary_key] for name, table in metadata.tables.items()}
    require_tables(engine)


def test_running_again_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    before = everything(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO items (item_id) VALUES ('kept')"))
    migrate(engine)
    assert everything(engine) == before
    with engine.connect() as connection:
        assert connection.execute(text("SELECT item_id FROM items")).scalars().all() == ["kept"]


def test_several_at_once_are_one(bare_settings: Settings) -> None:
    engines = [connect(bare_settings.database) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, engines))
    require_tables(engines[0])
    with engines[0].connect() as connection:
        assert len(connection.execute(text("SELECT * FROM alembic_version")).all()) == 1
    for each in engines:
        each.dispose()


def test_missing_tables_name_the_command(engine: Engine) -> None:
    with pytest.raises(ServiceError, match=r"no table .*: run `innerloop migrate`\.$"):
        require_tables(engine)
    migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE ads"))
    with pytest.raises(ServiceError, match=r"no table ads: run `innerloop migrate`\.$"):
        require_tables(engine)


@pytest.mark.parametrize("attempt", [require_tables, migrate])
def test_a_database_that_is_away_is_one_sentence_without_its_password(
    nowhere: DatabaseSettings, attempt: object
) -> None:
    with pytest.raises(ServiceError) as raised:
        attempt(connect(nowhere))  # type: ignore[operator]
    sentence = str(raised.value)
    assert "INNERLOOP_DATABASE__URL" in sentence
    assert "127.0.0.1" in sentence
    assert "hunter2" not in sentence
    assert "\n" not in sentence
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("attempt", [require_tables, migrate])
@pytest.mark.parametrize("change", [{"password": "wrong-hunter2"}, {"database": "no_such_database"}])
def test_a_refusal_is_one_sentence_without_a_password(
    bare_settings: Settings, attempt: object, change: dict[str, str]
) -> None:
    url = make_url(bare_settings.database.url.get_secret_value())
    wrong = url.set(**change).render_as_string(hide_password=False)  # type: ignore[arg-type]
    with pytest.raises(ServiceError) as raised:
        attempt(connect(DatabaseSettings(url=wrong)))  # type: ignore[operator]
    assert "\n" not in str(raised.value)
    assert "hunter2" not in str(raised.value)
    assert str(url.password) not in str(raised.value)


@pytest.mark.parametrize("address", ["", "nonsense", "mysql://u:hunter2@h/d", "postgresql+asyncpg://u:hunter2@h/d"])
def test_an_address_that_is_none_is_one_sentence(address: str) -> None:
    with pytest.raises(SettingsError, match="INNERLOOP_DATABASE__URL") as raised:
        connect(DatabaseSettings(url=address))
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_the_usual_spellings_of_an_address_are_taken(bare_settings: Settings, scheme: str) -> None:
    address = bare_settings.database.url.get_secret_value().replace("postgresql+psycopg2", scheme)
    engine = connect(DatabaseSettings(url=address))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT 1")).scalar_one() == 1
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing(engine: Engine) -> None:
    """All of it is one transaction: the first attempt meets a table in its way, the second one does not."""
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE releases (in_the_way int)"))
    with pytest.raises(ServiceError, match="cannot be migrated"):
        migrate(engine)
    assert {name for name, *_ in everything(engine)} == {"releases"}
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE releases"))
    migrate(engine)
    require_tables(engine)
