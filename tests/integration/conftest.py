import uuid
from collections.abc import Iterator

import pytest

from innerloop.config import DatabaseSettings, KafkaSettings, Settings, TopicSettings, load_settings
from innerloop.worker.services import Services, running_services


@pytest.fixture(scope="session")
def services() -> Iterator[Services]:
    with running_services(load_settings(), announce=lambda _line: None) as running:
        yield running


@pytest.fixture
def settings(services: Services) -> Settings:
    """Running services; topics and groups of this test alone, the topics not made yet."""
    mark = uuid.uuid4().hex[:8]
    names = {
        name: f"{field.default}.{mark}" for name, field in TopicSettings.model_fields.items() if field.annotation is str
    }
    return Settings(
        kafka=KafkaSettings(
            bootstrap_servers=services.bootstrap_servers,
            ingest_group=f"ingest.{mark}",
            adapt_group=f"adapt.{mark}",
        ),
        topics=TopicSettings(**names, partitions=4),
        database=DatabaseSettings(url=services.database_url),
    )
