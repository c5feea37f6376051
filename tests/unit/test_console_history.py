import math

from innerloop.worker.console.history import POINTS, History


def test_an_hour_is_kept_and_thinned() -> None:
    history = History()
    for second in range(10_000):
        history.add(1_000_000.0 + second, {"a": float(second)})
    points = history.series("a")
    assert POINTS - 1 <= len(points) <= POINTS + 2
    assert points[0][0] >= (1_000_000 + 10_000 - 3_600 - 30) * 1000
    assert [value for _, value in points] == sorted(value for _, value in points)
    assert abs(points[-1][1] - 9_990) < 20


def test_every_look_is_a_point_while_there_are_few() -> None:
    history = History()
    for second in range(5):
        history.add(100.0 + second, {"a": second * 2.0})
    assert [value for _, value in history.series("a")] == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_what_is_not_known_is_no_point() -> None:
    history = History()
    history.add(1.0, {"a": math.nan})
    history.add(2.0, {})
    history.add(3.0, {"a": 0.0})
    assert [value for _, value in history.series("a")] == [0.0]
    assert history.series("b") == []
