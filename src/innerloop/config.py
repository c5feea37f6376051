"""The settings in force: environment first, then a TOML file, then these defaults.

`INNERLOOP_KAFKA__BOOTSTRAP_SERVERS=...` sets `kafka.bootstrap_servers`. The TOML file is `innerloop.toml` in the
working directory, or the one that `INNERLOOP_CONFIG` names.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from innerloop.errors import SettingsError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Section):
    """Where the broker is and how this deployment is named on it."""

    bootstrap_servers: str = ""
    ingest_group: str = "innerloop-ingest"
    adapt_group: str = "innerloop-adapt"
    group_protocol: Annotated[str, Field(pattern="^(classic|consumer)$")] = "classic"
    """`consumer` is KIP-848 (Kafka 4.0 and newer). It gives a member the same partition numbers of both event topics,
    which `classic`, whose cooperative-sticky assignor looks at each topic alone, does not."""
    properties: dict[str, SecretStr] = Field(default_factory=dict)
    """Any librdkafka property, for every client: `properties."security.protocol" = "SASL_SSL"`."""


class TopicSettings(_Section):
    """Names, and the shape with which `innerloop topics` makes them. Existing topics are left as they are."""

    clicks: str = "events.clicks"
    purchases: str = "events.purchases"
    dead_letters: str = "events.dlq"
    requests: str = "adaptation.requests"
    recommendations: str = "scores.recommendations"
    ads: str = "scores.ads"
    releases: str = "models.releases"
    partitions: Positive = 4
    replication_factor: Positive = 1

    @property
    def events(self) -> tuple[str, str]:
        """The topics that ingest subscribes to."""
        return self.clicks, self.purchases


class DatabaseSettings(_Section):
    """A SQLAlchemy address: `postgresql+psycopg2://user:password@host:5432/innerloop`."""

    url: SecretStr = SecretStr("")


class SupportSettings(_Section):
    """How much of each user is kept, and how much each kind of event says."""

    capacity: Annotated[int, Field(ge=1, le=1024)] = 64
    weights: dict[str, float] = Field(
        default_factory=lambda: {"click": 1.0, "cart": 2.0, "favorite": 2.0, "purchase": 4.0}
    )


class IngestSettings(_Section):
    batch_size: Annotated[int, Field(gt=0, le=100_000)] = 50_000
    """Most records in one transaction."""
    poll_seconds: Seconds = 0.002
    """How long a poll waits for more once something has come: the price is paid in latency."""
    cached_users: Positive = 100_000
    """Bound of the write-through cache, in users (about 2 KB each at the default capacity)."""
    max_ahead_seconds: Seconds = 86_400.0
    """An event later than now by more than this is dead-lettered."""
    max_record_bytes: Positive = 1_048_576
    breaker_window: Positive = 1_000
    """When more than half of this many records in a row are bad, the worker stops: then the code is wrong."""

    @model_validator(mode="after")
    def _cache_holds_a_batch(self) -> Self:
        if self.cached_users < 2 * self.batch_size:
            raise ValueError("ingest.cached_users must be at least twice ingest.batch_size")
        return self


class TrendsSettings(_Section):
    """Live popularity and co-visits: how much of everybody's activity is told to the adapt processes."""

    every_seconds: Seconds = 1.0
    """How often an ingest process writes a piece: about the age of what is trending."""
    events_per_second: Positive = 5_000
    """Most events that one ingest process tells; of more, a random sample."""
    kept_events: Positive = 2_000_000
    """Events kept in the database (32 bytes each), which a starting adapt process reads."""


class AdaptSettings(_Section):
    batch_size: Positive = 4_096
    """Most requests in one poll; several for one user are one adaptation."""
    poll_seconds: Seconds = 0.002
    top: Positive = 50
    exclude_seen: bool = False
    """Leave out items that are in the user's support set."""
    ad_active_days: Annotated[float, Field(gt=0)] = 7.0
    """An ad is a candidate for this long after its newest event."""
    refresh_seconds: Seconds = 1.0
    """How often new items, ads and releases are looked for."""
    index_above: Positive = 20_000
    """With more items than this what a linear head likes best is found on a CPU by an index, which misses some 3%."""


class LearningSettings(_Section):
    method: str = "bayes"
    dimension: Positive = 64
    seed: int = 0
    releases_dir: Path = Path("releases")
    """Where `innerloop train` writes releases and `innerloop adapt` reads them."""


class Settings(BaseSettings):
    """Everything that can be set; `innerloop config` prints it with secrets hidden."""

    model_config = SettingsConfigDict(
        env_prefix="INNERLOOP_", env_nested_delimiter="__", extra="forbid", frozen=True, toml_file="innerloop.toml"
    )

    kafka: KafkaSettings = KafkaSettings()
    topics: TopicSettings = TopicSettings()
    database: DatabaseSettings = DatabaseSettings()
    support: SupportSettings = SupportSettings()
    ingest: IngestSettings = IngestSettings()
    trends: TrendsSettings = TrendsSettings()
    adapt: AdaptSettings = AdaptSettings()
    learning: LearningSettings = LearningSettings()
    log_level: Annotated[str, Field(pattern="(?i)^(debug|info|warning|error|critical)$")] = "info"
    log_format: Annotated[str, Field(pattern="^(auto|console|json)$")] = "auto"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment before file; what a caller passes before both."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=os.environ.get("INNERLOOP_CONFIG", "innerloop.toml"))
        return init_settings, env_settings, toml


_OTHER_VARIABLES = {"CONFIG", "KAFKA_VERSION", "TORCH"}


def load_settings(**overrides: Any) -> Settings:
    """Read the settings; raises SettingsError with one line per wrong setting."""
    named = os.environ.get("INNERLOOP_CONFIG")
    if named and not Path(named).is_file():
        raise SettingsError(f"INNERLOOP_CONFIG names {named}, which is not a file: correct it or unset it.")
    sections = {name.upper() for name in Settings.model_fields}
    for name in os.environ:
        # pydantic-settings only looks up the names that it knows, so a misspelt one would go unnoticed.
        ours = name.upper().removeprefix("INNERLOOP_")
        if ours != name.upper() and ours.partition("__")[0] not in sections | _OTHER_VARIABLES:
            raise SettingsError(f"Wrong settings: {name} is none of ours; `innerloop config` lists them.")
    try:
        return Settings(**overrides)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise SettingsError("Wrong settings: " + "; ".join(lines) + ".") from None
    except ValueError as error:  # TOML that does not parse, JSON in a variable that does not parse
        raise SettingsError(f"The settings cannot be read: {error}.") from None
