"""Watches the score topics for records that the partition's present owner did not write.

Compaction keeps the last record of a key, not the highest version. A worker that slept past its session and wakes
may still have a list in its send queue, older than one its successor has published, and that list would then be the
one compaction keeps. Nothing can stop the send, so it is answered: every record carries its writer's epoch, the owner
reads its own output, and a user with a stranger's record, list or tombstone, is adapted again unless that is a former
owner's list of the newest state: after every takeover most are. The watch's own position is committed, so a stranger's
record is answered even when the owner dies between the two.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from innerloop.config import KafkaSettings
from innerloop.errors import RetryError, StopError
from innerloop.streams import clients
from innerloop.streams.batch import headers_of
from innerloop.streams.lost_brokers import WHY, BrokerCheck
from innerloop.streams.publisher import Headers
from innerloop.streams.waiting import Waiting, close

_LOG = structlog.get_logger(__name__)
OWNER_HEADER = "innerloop.owner_epoch"
_COMMIT_SECONDS = 1.0
_AT_ONCE = 10_000


class Stranger(NamedTuple):
    """What strangers wrote of a user: on which partition, and the oldest state that a list of theirs is of."""

    partition: int
    order: tuple[int, int]
    """(model_version, support_version) as a former owner's list says it, NO_LIST for anything else."""


NO_LIST = (-1, -1)


class _Order(msgspec.Struct):
    model_version: int
    support_version: int


_decode = msgspec.json.Decoder(_Order).decode


def add_strangers(found: dict[str, Stranger], more: Iterable[tuple[str, Stranger]]) -> None:
    """Of each user the oldest: what is older than the newest state must not stay on any topic."""
    for user, each in more:
        known = found.get(user, each)
        found[user] = Stranger(each.partition, min(known.order, each.order))


def owner_headers(epoch: int) -> Headers:
    """The mark on every score record: the epoch under which its writer held the request partition."""
    return [(OWNER_HEADER, str(epoch))]


class OutputWatch:
    """Reads the output partitions that belong to the request partitions held by this process."""

    def __init__(self, settings: KafkaSettings, *, group: str, topics: Sequence[str]) -> None:
        self._settings, self._topics, self._group = settings, topics, group
        self._blind = Waiting("score topics not watched")
        self._brokers = BrokerCheck(settings, topics[0])
        self._consumer = self._new_consumer()
        self._unwatched: list[int] = []
        """What a consumer watched that is no more, and no other does yet."""
        self._committed_at = time.monotonic()

    def _new_consumer(self) -> Consumer:
        return clients.consumer(
            self._settings, self._group, fetch_wait_max_ms=500, fetch_min_bytes=65_536, queued_min_messages=1_000
        )

    def start(self, partitions: Sequence[int]) -> None:
        """Watch these partitions of every topic, from where their last owner's watch stood. Raises RetryError."""
        wanted = [TopicPartition(topic, partition) for topic in self._topics for partition in partitions]
        if not wanted:
            return
        try:
            places = self._consumer.committed(wanted, timeout=10.0)
            for place in places:
                if place.offset < 0:
                    # Never watched: what is there was written before anyone could be a stranger.
                    _, place.offset = self._consumer.get_watermark_offsets(place, timeout=10.0)
                    self._consumer.commit(offsets=[place], asynchronous=False)
            # All or none: what was read of a partition that is not yet ours would be taken for answered.
            self._consumer.incremental_assign(places)
        except KafkaException as error:
            self._stop_if_forbidden(error.args[0])
            raise RetryError(f"The score topics cannot be watched: {error.args[0].str()}") from error

    def stop(self, partitions: Sequence[int]) -> None:
        """Stop watching partitions that now belong to another process, which goes on from the committed place."""
        self._unwatched = [each for each in self._unwatched if each not in partitions]
        gone = [p for p in self._consumer.assignment() if p.partition in set(partitions)]
        if gone:
            self._consumer.incremental_unassign(gone)

    def strangers(self, epochs: Mapping[int, int]) -> dict[str, Stranger]:
        """Users with a new record that was not written under `epochs[partition]`.

        Raises StopError when the topics may not be read, RetryError when they cannot be watched.
        """
        if self._brokers.lost(self._consumer):
            self._renew()
        if self._unwatched:
            self.start(self._unwatched)
            self._unwatched = []
        messages = self._consumer.consume(_AT_ONCE, 0)
        if messages:
            self._brokers.heard()
        found: dict[str, Stranger] = {}
        for message in messages:
            if (error := message.error()) is not None:
                self._stop_if_forbidden(error)
                self._blind.goes_on(error.str(), topic=message.topic())
                continue
            self._blind.ends()
            user, partition = _user(message.key()), message.partition() or 0
            epoch = epochs.get(partition)
            if user is None or epoch is None:
                continue
            writer = dict(headers_of(message)).get(OWNER_HEADER)
            if writer != str(epoch).encode():
                add_strangers(found, [(user, Stranger(partition, _order(writer, epoch, message.value())))])
        return found

    def _renew(self) -> None:
        """Another consumer for one that can do nothing any more, from where it had committed."""
        _LOG.warning("watch made anew", why=WHY)
        watched = {place.partition for place in self._consumer.assignment()}
        self._unwatched = sorted(watched.union(self._unwatched))
        lost, self._consumer = self._consumer, self._new_consumer()
        close(lost)

    def _stop_if_forbidden(self, error: KafkaError) -> None:
        if error.code() in clients.FORBIDDEN:
            raise StopError(
                f"Kafka does not let this user watch {' and '.join(self._topics)} in group {self._group} "
                f"({error.str()}): give it the ACLs that deploy/OPERATIONS.md lists."
            )

    def commit(self) -> None:
        """Everything found so far has been answered; called often, commits once a second."""
        if time.monotonic() - self._committed_at < _COMMIT_SECONDS:
            return
        self._committed_at = time.monotonic()
        try:
            places = [p for p in self._consumer.position(self._consumer.assignment()) if p.offset >= 0]
            if places:
                self._consumer.commit(offsets=places, asynchronous=True)
        except KafkaException:
            return  # tried again in a second; a lost commit costs a repeat

    def close(self) -> None:
        close(self._consumer)


def _order(writer: object, epoch: int, value: str | bytes | None) -> tuple[int, int]:
    """What the list is of that `writer` wrote, where that can be a former owner: only such a one is believed."""
    if not (isinstance(writer, bytes) and writer.isdigit() and 0 < int(writer) < epoch) or value is None:
        return NO_LIST
    try:
        said = _decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return NO_LIST
    return said.model_version, said.support_version


def _user(key: str | bytes | None) -> str | None:
    """The user that a record is of; None when its key can be nobody's: Postgres stores neither bad UTF-8 nor NUL."""
    try:
        user = key.decode() if isinstance(key, bytes) else key
    except UnicodeDecodeError:
        return None
    return None if user is None or "\0" in user else user
