"""What `innerloop dlq` prints: dead letters in groups, one by one, and what a replay did."""

from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec
from rich.table import Table
from rich.text import Text

from innerloop.errors import Reason, SettingsError
from innerloop.streams.dead_letter_queue import DeadLetterQueue, Replay
from innerloop.streams.dead_letters import DeadLetter

_SHOWN_BYTES = 400


class Group(msgspec.Struct):
    """Dead letters of one reason and topic; times are epoch milliseconds."""

    reason: str
    topic: str
    letters: int
    replayed: int
    first: int
    last: int
    example: str


@dataclass(frozen=True)
class Wanted:
    """Which dead letters are meant; made by `wanted`."""

    reason: str | None
    since_ms: float
    until_ms: float

    def __call__(self, letter: DeadLetter) -> bool:
        return self.since_ms <= letter.refused_ms < self.until_ms and self.reason in {None, letter.reason}


def wanted(reason: str | None, since: str | None, until: str | None) -> Wanted:
    """Those of this reason, refused in [since, until), times in ISO 8601. Raises SettingsError."""
    if reason is not None and reason not in set(Reason):
        raise SettingsError(f"--reason {reason} is none of {', '.join(Reason)}.")
    return Wanted(reason, _time("--since", since, float("-inf")), _time("--until", until, float("inf")))


def _time(option: str, text: str | None, default: float) -> float:
    """Epoch milliseconds; without an offset the time is UTC."""
    if text is None:
        return default
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(f"{option} {text} is no time: write for instance 2026-01-31T12:00:00Z.") from None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000


def grouped(queue: DeadLetterQueue) -> list[Group]:
    """Groups of reason and topic, the largest first."""
    groups: dict[tuple[str, str], Group] = {}
    for letter in queue.letters():
        key = (letter.reason, letter.record.topic)
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(*key, 0, 0, letter.refused_ms, letter.refused_ms, "")
        group.letters += 1
        group.replayed += letter.place in queue.replayed
        group.first, group.last = min(group.first, letter.refused_ms), max(group.last, letter.refused_ms)
        group.example = group.example or readable(letter.message.encode())
    return sorted(groups.values(), key=lambda group: -group.letters)


def described(letter: DeadLetter, *, replayed: bool) -> str:
    """All of one dead letter, for people: nothing in it reaches the terminal as it is."""
    record = letter.record
    return "\n  ".join(
        [
            f"{readable(record.topic.encode())}[{record.partition}] at offset {record.offset}",
            f"reason: {readable(letter.reason.encode())}: {readable(letter.message.encode())}",
            f"refused: {_text(letter.refused_ms)}{', replayed since' if replayed else ''}",
            f"key: {_bytes(record.key)}",
            f"value: {_bytes(record.value)}{' (cut; the whole is where it came from)' if letter.cut else ''}",
            *(f"header {readable(name.encode())}: {_bytes(value)}" for name, value in record.headers),
        ]
    )


def readable(content: bytes) -> str:
    """Text as it is, but for what is no text or steers a terminal, which is escaped; at most 400 bytes of it."""
    text = content[:_SHOWN_BYTES].decode(errors="backslashreplace")
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return shown + (f"... ({len(content):,} bytes)" if len(content) > _SHOWN_BYTES else "")


def sentences(done: Replay, *, dry_run: bool) -> list[str]:
    """What a replay did."""
    to = ", ".join(f"{count:,} to {topic}" for topic, count in sorted(done.sent.items()))
    verb = "Would replay" if dry_run else "Replayed"
    said = [f"{verb} {done.sent.total():,} dead letters{f': {to}' if to else ''}."]
    if done.earlier:
        said.append(f"{done.earlier:,} had been replayed before.")
    if done.gone:
        first = done.gone[0].record
        said.append(
            f"{len(done.gone):,} can't be replayed: they were cut, and are no longer on the topic they came from (the"
            f" first: {readable(first.topic.encode())}[{first.partition}] at offset {first.offset}); ask their producer"
            " to send them again."
        )
    for topic, count in sorted(done.elsewhere.items()):
        said.append(f"{count:,} came from {readable(topic.encode())}, which ingest doesn't read: they stay.")
    return said


def table(groups: list[Group]) -> Table:
    """The groups, for people."""
    table = Table()
    for name in ("reason", "topic"):
        table.add_column(name, overflow="fold")
    for name in ("letters", "replayed"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("first", "last", "example"):
        table.add_column(name, overflow="fold")  # what a narrow terminal would cut off can't be told apart
    for group in groups:
        cells = [group.reason, group.topic, f"{group.letters:,}", f"{group.replayed:,}"]
        cells += [_text(group.first), _text(group.last), group.example]
        table.add_row(*(Text(readable(cell.encode())) for cell in cells))
    return table


def _bytes(content: bytes | None) -> str:
    return "none" if content is None else readable(content) or "empty"


def _text(epoch_ms: int) -> str:
    return f"{datetime.fromtimestamp(epoch_ms / 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"
