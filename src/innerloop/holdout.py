"""Who gets the unadapted list, and who is sampled: a stable hash of the user, equal in all processes and releases.

A user's place is the 64-bit XXH3 of the UTF-8 user_id with a fixed seed, as a share of 2**64. Whoever is below a share
is in it: a larger share keeps all who were in the smaller one, and two seeds are two independent draws.
"""

import xxhash

HOLD_OUT_SEED = 20_260_101
"""Of the hold-out. Never to change: users would move from one arm to the other."""
SAMPLE_SEED = 20_260_102
"""Of the sample that quality reads. Another one than the hold-out's, or the sample would hold more of one arm."""
_ALL = 2.0**64


def place(user_id: str | bytes, seed: int) -> float:
    """The user's place in [0, 1], uniform over users."""
    name = user_id.encode() if isinstance(user_id, str) else user_id
    return xxhash.xxh3_64_intdigest(name, seed=seed) / _ALL


def in_hold_out(user_id: str | bytes, share: float) -> bool:
    """Whether this user belongs to the hold-out when it is `share` of all users."""
    return place(user_id, HOLD_OUT_SEED) < share


def in_sample(user_id: str | bytes, share: float) -> bool:
    """Whether this user belongs to a sample of `share` of all users; the whole is everybody."""
    return share >= 1.0 or place(user_id, SAMPLE_SEED) < share
