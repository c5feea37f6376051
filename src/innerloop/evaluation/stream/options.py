"""What is asked of every arm in the stream protocol, and what counts as an answer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from innerloop.config import SEQUENCES
from innerloop.errors import SettingsError
from innerloop.events import CODES

MOST_CUTOFF = 100
"""Lists are 256 long, so that so many are left when what the user has seen is removed."""


@dataclass(frozen=True)
class StreamOptions:
    """What is asked, and what counts as an answer."""

    targets: tuple[str, ...] = ("click",)
    """Types of event to foresee."""
    remove_seen: bool = False
    """Remove what the user has had an event with, and don't ask for it."""
    within_session: bool = False
    """Ask only when the user's event before is of the same session; of the same visit, where the data has none."""
    every: int = 1
    """Ask at every so-manieth of these moments."""
    warm_up: int | None = None
    """Events at the start that are only learned from; None: the first `warm_up_share`."""
    warm_up_share: float = 0.3
    most_warm_up: float | None = None
    """Of data of which `warm_up` would be more than this share, it is the first `warm_up_share` instead."""
    hits: tuple[int, ...] = (20,)
    reciprocal: tuple[int, ...] = (20,)
    block_seconds: float = 30.0
    train_every_hours: float = 24.0
    """How often the served release is trained again, on what has happened by then."""
    train_on: int = 300_000
    """Newest events that a release is trained on."""
    capacity: int = 64
    sequence: str = "auto"
    """The served release's sequence model, as in `learning.sequence`."""


PRESETS: Mapping[str, StreamOptions] = {
    "globo": StreamOptions(
        remove_seen=True,
        within_session=True,
        every=5,
        warm_up=300_000,
        most_warm_up=0.5,
        hits=(10, 20),
        reciprocal=(10,),
    ),
    "taobao": StreamOptions(targets=("click", "purchase")),
}

FLAGS: Mapping[str, str] = {
    "targets": "--target",
    "remove_seen": "--remove-seen",
    "within_session": "--within-session",
    "every": "--every",
    "warm_up": "--warm-up",
    "hits": "--hits",
    "reciprocal": "--reciprocal",
    "sequence": "--sequence",
}
"""What the command line calls an option that it has."""


def as_typed(options: StreamOptions) -> str:
    """What differs from the defaults, as one would write it on the command line."""
    plain, words = StreamOptions(), list[str]()
    for name, flag in FLAGS.items():
        value = getattr(options, name)
        if value != getattr(plain, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [flag if one is True else f"{flag} {one}" for one in values]
    return " ".join(words)


def in_words(options: StreamOptions) -> str:
    """What differs from the defaults, for people."""
    typed, most = as_typed(options), options.most_warm_up
    if most is None:
        return typed
    return f"{typed}, but of data with less than {round(1 / most)} times that warm-up {usual('warm_up')} as warm-up"


def usual(name: str) -> str:
    """What an option is when neither it nor a preset was chosen."""
    value = getattr(StreamOptions(), name)
    if name == "warm_up":
        return f"the first {StreamOptions.warm_up_share:.0%} of the events"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def options_of(preset: str | None, **chosen: object) -> StreamOptions:
    """A preset's options, or the defaults, with those that were chosen (not None) in their place.

    A warm-up that was chosen holds whatever its share. Raises SettingsError for a preset, an event type or a sequence
    model that doesn't exist, or a cut-off beyond what every arm's list has.
    """
    if preset is not None and preset not in PRESETS:
        raise SettingsError(f"There is no preset {preset}: choose one of {', '.join(PRESETS)}.")
    base = StreamOptions() if preset is None else PRESETS[preset]
    if chosen.get("warm_up") is not None:
        base = replace(base, most_warm_up=None)
    options = replace(base, **{name: value for name, value in chosen.items() if value is not None})  # type: ignore[arg-type]
    unknown = [name for name in options.targets if name not in CODES]
    if unknown:
        raise SettingsError(f"{unknown[0]} is no type of event to foresee: choose of {', '.join(CODES)}.")
    if options.sequence not in SEQUENCES:
        raise SettingsError(f"There is no sequence model {options.sequence}: choose one of {', '.join(SEQUENCES)}.")
    longest = max(*options.hits, *options.reciprocal)
    if longest > MOST_CUTOFF:
        raise SettingsError(f"The cut-off {longest} is beyond the lists that are compared: give {MOST_CUTOFF} at most.")
    return options
