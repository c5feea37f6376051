"""The pool's supervisor, of which `tests/system/test_cli.py` has the rest."""

from innerloop.worker.pool import backoff


def test_a_process_that_fails_all_night_is_started_twice_a_minute() -> None:
    waits = [backoff(failures) for failures in range(1, 3_000)]
    assert waits[:3] == [0.2, 0.4, 0.8]
    assert waits == sorted(waits)
    assert waits[-1] == 30.0
