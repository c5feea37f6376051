"""Whatever a consumer passes over, every record of the log is handed on, in order."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from innerloop import metrics
from innerloop.streams.batch import Batch
from innerloop.streams.continuity import Continuity

TOPIC = "clicks"


@dataclass(frozen=True)
class Message:
    """As much of a Kafka message as is looked at."""

    number: int
    at: int

    def topic(self) -> str:
        return TOPIC

    def partition(self) -> int:
        return self.number

    def offset(self) -> int:
        return self.at


@dataclass
class Client:
    """Reads logs, of which it passes over `faults`: (offset it stands at) -> how many records, each once."""

    logs: dict[int, list[int]]
    faults: dict[tuple[int, int], int]
    places: dict[int, int] = field(default_factory=dict)
    seeks: int = 0

    def seek(self, number: int, offset: int) -> None:
        self.places[number] = offset
        self.seeks += 1

    def poll(self, sizes: Iterator[int]) -> Batch:
        """Some records of every partition in turn."""
        found: list[Message] = []
        for number, log in self.logs.items():
            for _ in range(next(sizes)):
                place = self.places.setdefault(number, 0)
                ahead = [offset for offset in log if offset >= place][self.faults.pop((number, place), 0) :]
                if ahead:
                    found.append(Message(number, ahead[0]))
                    self.places[number] = ahead[0] + 1
        return Batch(found)  # type: ignore[arg-type]

    @property
    def at_the_end(self) -> bool:
        return all(self.places.get(number, 0) > log[-1] for number, log in self.logs.items())


def handed_on(client: Client, continuity: Continuity, sizes: Iterator[int]) -> dict[int, list[int]]:
    """What a loop hands on until the ends of the logs."""
    found: dict[int, list[int]] = {number: [] for number in client.logs}
    while not client.at_the_end:
        batch = client.poll(sizes)
        again = continuity.jumps(batch)
        for (_, number), offset in again.items():
            client.seek(number, offset)
        for (_, number), offset in zip((kept := batch.before(again)).partitions, kept.offsets, strict=True):
            found[number].append(offset)
    return found


def from_the_start(logs: dict[int, list[int]]) -> Continuity:
    continuity = Continuity()
    continuity.starts({(TOPIC, number): 0 for number in logs})
    return continuity


LENGTH = 30
# Of a log without more than two holes every jump is looked at.
LOGS = st.dictionaries(
    st.integers(0, 2),
    st.sets(st.integers(0, LENGTH - 2), max_size=2).map(lambda holes: sorted({*range(LENGTH)} - holes)),
    min_size=1,
)
FAULTS = st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, LENGTH)), st.integers(1, 5), max_size=20)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=10)


@given(LOGS, FAULTS, SIZES)
def test_nothing_is_passed_over_and_nothing_comes_twice(
    logs: dict[int, list[int]], faults: dict[tuple[int, int], int], sizes: list[int]
) -> None:
    # What is passed over at the very end no later record tells of: the next one will.
    faults = {(number, place): many for (number, place), many in faults.items() if place + many + 3 < LENGTH}
    own = sum(LENGTH - len(log) for log in logs.values())
    most = 2 * (len(faults) + own)
    client = Client(logs, faults)
    assert handed_on(client, from_the_start(logs), cycle(sizes)) == logs
    assert client.seeks <= most


def test_a_log_of_transactions_is_believed_after_three_jumps_and_looked_at_again_when_it_resumes() -> None:
    logs = {0: [offset for offset in range(300) if offset % 3]}
    client, continuity = Client(logs, {}), from_the_start(logs)
    assert handed_on(client, continuity, cycle([1, 50])) == logs
    assert client.seeks == 3

    logs[0] += [400, 401]
    continuity.resumes()
    assert handed_on(client, continuity, cycle([5])) == {0: [400, 401]}
    assert client.seeks == 4


def test_what_had_been_passed_over_is_counted_and_the_log_is_not_believed_for_long() -> None:
    logs = {0: list(range(100))}
    before = metrics.PASSED_OVER._value.get()
    client, continuity = Client(logs, {(0, 10 * n): 2 for n in range(9)}), from_the_start(logs)
    assert handed_on(client, continuity, cycle([7])) == logs
    assert metrics.PASSED_OVER._value.get() == before + 9


@pytest.mark.parametrize("start", [-2, 40])
def test_it_starts_where_it_is_told(start: int) -> None:
    """At the beginning of a log (-2), wherever that is; behind records that are not wanted."""
    logs = {0: list(range(40, 60))}
    client, continuity = Client(logs, {}), Continuity()
    continuity.starts({(TOPIC, 0): start})
    assert handed_on(client, continuity, cycle([7])) == logs
    assert client.seeks == 0


def test_who_comes_back_starts_anew() -> None:
    logs = {0: list(range(60))}
    client, continuity = Client(logs, {}), from_the_start(logs)
    client.poll(iter([30]))
    continuity.leaves([(TOPIC, 0)])
    continuity.starts({(TOPIC, 0): 5})
    assert handed_on(client, continuity, cycle([7])) == {0: list(range(5, 60))}
    assert client.seeks == 1
