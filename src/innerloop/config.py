"""The settings in force: environment first, then a TOML file, then these defaults.

`INNERLOOP_KAFKA__BOOTSTRAP_SERVERS=...` sets `kafka.bootstrap_servers`. The TOML file is `innerloop.toml` in the
working directory, or the one that `INNERLOOP_CONFIG` names.
"""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from innerloop.errors import SettingsError

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
SEQUENCES = ("auto", "off", "pooled", "gru", "attention")
"""What `learning.sequence` may be."""
MOST_SEED = 2**32 - 1
"""Some generators take no larger seed, and none a negative one."""
_WEIGHTS = {"click": 1.0, "cart": 2.0, "favorite": 2.0, "purchase": 4.0}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSettings(_Section):
    """Where the broker is and how this deployment is named on it."""

    bootstrap_servers: str = ""
    ingest_group: str = "innerloop-ingest"
    adapt_group: str = "innerloop-adapt"
    quality_group: str = "innerloop-quality"
    """Of `innerloop quality`; its own topics (the sample, and what it remembers) begin with this name."""
    group_protocol: Annotated[str, Field(pattern="^(classic|consumer)$")] = "classic"
    """`consumer` is KIP-848 (Kafka 4.0 and newer). It gives a member the same partition numbers of both event topics,
    which `classic`, whose cooperative-sticky assignor looks at each topic alone, does not."""
    static_membership: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,200}$")] = ""
    """Empty: members are dynamic. Else member n of a command is the static member `<this>-<n>` (KIP-345): one that is
    back within its session finds its partitions where they were. Must differ between machines or pods."""
    properties: dict[str, SecretStr] = Field(default_factory=dict)
    """Any librdkafka property, for every client: `properties."security.protocol" = "SASL_SSL"`."""


class TopicSettings(_Section):
    """Names, and the shape with which `innerloop topics` makes them. Existing topics are left as they are."""

    clicks: str = "events.clicks"
    purchases: str = "events.purchases"
    impressions: str = "events.impressions"
    dead_letters: str = "events.dlq"
    requests: str = "adaptation.requests"
    recommendations: str = "scores.recommendations"
    ads: str = "scores.ads"
    releases: str = "models.releases"
    erasures: str = "privacy.erasures"
    quality_windows: str = "quality.windows"
    items: str = "catalog.items"
    partitions: Positive = 4
    replication_factor: Positive = 1

    @property
    def events(self) -> tuple[str, str]:
        """The topics of what users do."""
        return self.clicks, self.purchases

    @property
    def ingested(self) -> tuple[str, ...]:
        """The topics that ingest subscribes to: what users do, what they are shown, and the erasures."""
        return *self.events, self.impressions, self.erasures


class DatabaseSettings(_Section):
    """A SQLAlchemy address: `postgresql+psycopg2://user:password@host:5432/innerloop`."""

    url: SecretStr = SecretStr("")


class SupportSettings(_Section):
    """How much of each user is kept, and how much each kind of event says."""

    capacity: Annotated[int, Field(ge=1, le=1024)] = 64
    impressions: Annotated[int, Field(ge=0, le=1024)] = 32
    """How many impressions of each user are kept, beside the support set; 0: none, they are read and dropped."""
    weights: dict[str, Weight] = Field(default_factory=_WEIGHTS.copy)
    """A kind that is not named counts 1; one of weight 0 says nothing. There is no dislike: a weight is at least 0."""

    @field_validator("weights")
    @classmethod
    def _of_examples(cls, weights: dict[str, float]) -> dict[str, float]:
        if strange := weights.keys() - _WEIGHTS.keys():
            raise ValueError(f"{min(strange)} has no weight; {', '.join(_WEIGHTS)} have one")
        return weights


class IngestSettings(_Section):
    batch_size: Annotated[int, Field(gt=0, le=100_000)] = 50_000
    """Most records in one transaction."""
    poll_seconds: Seconds = 0.002
    """How long a poll waits for more once something has come: the price is paid in latency."""
    cached_users: Positive = 100_000
    """Bound of the write-through cache, in users (about 2 KB each at the default capacity)."""
    max_ahead_seconds: Seconds = 86_400.0
    """An event later than now by more than this is dead-lettered, and left out of a file that `train` reads."""
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
    batch_size: Positive = 32_768
    """Most requests in one batch; several for one user are one adaptation."""
    batch_users: Positive = 4_096
    """About how many different users a batch has at most: it must be done long before `max.poll.interval.ms`."""
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
    dimension: Annotated[int, Field(ge=3)] = 64
    """Of items' vectors; two of the numbers are an item's popularity and a constant."""
    seed: Annotated[int, Field(ge=0)] = 0
    sequence: Annotated[str, Field(pattern=f"^({'|'.join(SEQUENCES)})$")] = "auto"
    """The sequence model's history encoder. `auto` trains `pooled` and keeps it if lists of what came later are better
    for it; a kind that is named is kept in any case."""
    sequence_episodes: bool = True
    """Teach it further by episodes through a head of its own, and keep that where what is held out gains by it."""
    sequence_positions: Positive = 1_500_000
    """Most events, over all epochs, that it learns from: about 20 seconds a million on one core."""
    described_items: Positive = 200_000
    """Of the items that the shop describes and nobody has met, so many get a vector from what it says of them: about
    0.5 KB each in a release."""
    attribution_hours: Annotated[float, Field(ge=0.001, le=8760)] = 24.0
    """A purchase belongs to a click of its item at most so long before. A release keeps what it was learned with: a
    change counts from the next training on, and for `innerloop quality` from its next start, which
    judges no ad's click that is older than the new window and younger than the old."""
    click_hours: Annotated[float, Field(ge=0.001, le=8760)] = 1.0
    """A click belongs to an impression of its item at most so long before; one without a click is a negative then. As
    above, from the next training on."""
    releases_dir: Path = Path("releases")
    """Where `innerloop train` writes releases and `innerloop adapt` reads them."""

    @model_validator(mode="after")
    def _attention_has_two_heads(self) -> Self:
        if self.sequence == "attention" and self.dimension % 2:
            raise ValueError(f"sequence = attention needs an even dimension, and {self.dimension} is odd")
        return self


class HttpSettings(_Section):
    """Where each process shows /metrics, /livez and /readyz."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise: nothing here needs a password, so let only your own network reach it."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """0 for no listener. Several processes of one command take this port and those after it."""
    stuck_after_seconds: Seconds = 60.0
    """A loop that has not turned for so long dumps all stacks once, and /livez turns red."""
    linger_seconds: Annotated[float, Field(ge=0)] = 15.0
    """So long a process that the breaker has stopped still shows its metrics, or nobody would ever read that it did;
    several times the interval of whoever reads them. A signal ends it at once."""


class QualitySettings(_Section):
    """The hold-out, and the windows in which `innerloop quality` measures what adaptation is worth."""

    hold_out: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Share of the users, by a hash of their id, who get the unadapted list (method `none`)."""
    events_per_second: Positive = 500
    """Most events and lists that are judged, of all processes together; of more, a sample of the users, half of it from
    the hold-out: the interval of a difference is narrowest with equally many of both."""
    window_seconds: Positive = 60
    grace_seconds: Positive = 30
    """How long a window waits, by the time of the events, for those that come late; what is later counts as late."""
    idle_seconds: Seconds = 10.0
    """A partition that has sent nothing for so long no longer holds the windows back."""
    users: Positive = 100_000
    """Users whose lists are kept; beyond, who was not seen for longest is forgotten."""
    from_beginning: bool = False
    """Where a group that is new begins: with the oldest records there are, or with those to come."""


class ConsoleSettings(_Section):
    """The web page of `innerloop console`."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise: the page needs no password, and shows what users did."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    targets: tuple[Annotated[str, Field(pattern=r"^\S+:\d{1,5}$")], ...] = ()
    """host:port of the processes' listeners, for latency and what they do; a name may stand for several addresses."""
    named_items: Positive = 2_000_000
    """Most items whose names are kept, in a temporary file of about 100 bytes each; others are shown by their ids."""


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
    http: HttpSettings = HttpSettings()
    quality: QualitySettings = QualitySettings()
    console: ConsoleSettings = ConsoleSettings()
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
        lines = [f"{'.'.join(map(str, e['loc']))}: {_said(e)}" for e in error.errors()]
        raise SettingsError("Wrong settings: " + "; ".join(lines) + ".") from None
    except ValueError as error:  # TOML that does not parse, JSON in a variable that does not parse
        raise SettingsError(f"The settings cannot be read: {error}.") from None


def _said(error: ErrorDetails) -> str:
    """What is wrong with a setting; of a name that is none of ours, which of ours is the most like it."""
    if error["type"] != "extra_forbidden":
        return error["msg"].removeprefix("Value error, ")
    *sections, name = map(str, error["loc"])
    model: Any = Settings
    for section in sections:
        model = model.model_fields[section].annotation
    alike = difflib.get_close_matches(name, model.model_fields, 1)
    return f"there is no such setting; {f'the nearest is {alike[0]}' if alike else '`innerloop config` lists them'}"
