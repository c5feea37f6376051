import pytest
import xxhash

from innerloop.holdout import in_hold_out, in_sample, place

USERS = [f"user-{n}" for n in range(20_000)]
PINNED = ["user-34", "user-40", "user-73"]


def test_the_hold_out_is_pinned() -> None:
    """Of an independent computation once and for all: users who flip would spoil every comparison over time."""
    assert [user for user in USERS[:100] if in_hold_out(user, 0.05)] == PINNED
    assert place("üser", 7) == xxhash.xxh3_64("üser".encode(), seed=7).intdigest() / 2**64


def test_keys_and_names_agree() -> None:
    assert all(in_hold_out(user, 0.05) == in_hold_out(user.encode(), 0.05) for user in USERS[:1_000])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.5])
def test_its_share_is_the_one_set(share: float) -> None:
    held = sum(in_hold_out(user, share) for user in USERS)
    assert abs(held - share * len(USERS)) <= 4 * (share * (1 - share) * len(USERS)) ** 0.5


def test_a_larger_share_keeps_all_who_were_in_the_smaller() -> None:
    for smaller, larger in ((0.01, 0.05), (0.05, 0.2)):
        assert {u for u in USERS if in_hold_out(u, smaller)} < {u for u in USERS if in_hold_out(u, larger)}


def test_the_sample_is_drawn_independently_of_the_hold_out() -> None:
    both = sum(in_hold_out(user, 0.5) and in_sample(user, 0.5) for user in USERS)
    assert abs(both - len(USERS) / 4) < 4 * (len(USERS) * 3 / 16) ** 0.5
    assert all(in_sample(user, 1.0) for user in USERS)
