"""Every head as an arm of the slate protocol: on the features that the default's own weights act on.

A task is a choice. Its examples are the candidates of the user's newest lists before it, 1 for what was chosen and 0
for the others, which weigh together as much; features are taken from their list's mean, for only differences within a
list tell anything. The query is the list itself, by softmax. Episodes are the last of the training lists, seen by the
shared weights of those before them, which have not seen them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.evaluation.taught_heads import earlier_part, taught
from innerloop.learning.ads.choice import fit_shared
from innerloop.learning.ads.choosers import Chooser, Features, Seen, padded
from innerloop.learning.heads import Episodes, Head, Support

LISTS, EPISODES = 5, 2_000
"""So many of a user's newest lists are the support set, and so many training lists are episodes, at most."""
_AT_ONCE = 256


def support(tasks: Sequence[Sequence[Seen]], dimension: int) -> Support:
    """The examples of T tasks, given each task's lists in own features [P, d], in order of time."""
    examples = [[_examples(one) for one in lists[-LISTS:]] for lists in tasks]
    rows = [np.concatenate(some) if some else np.zeros((0, dimension + 2), np.float32) for some in examples]
    table = np.zeros((len(rows), max((len(row) for row in rows), default=0), dimension + 2), np.float32)
    mask = np.zeros(table.shape[:2], bool)
    for at, row in enumerate(rows):
        table[at, : len(row)], mask[at, : len(row)] = row, True
    all_of = torch.from_numpy(table)
    return Support(
        features=all_of[..., 2:].contiguous(),
        labels=all_of[..., 0],
        weights=all_of[..., 1],
        ages=torch.zeros(mask.shape),  # like the default, heads let no example age
        mask=torch.from_numpy(mask),
    )


def _examples(one: Seen) -> Features:
    """Label, weight and centred features of each candidate, [P, 2 + d]."""
    chosen = (np.arange(len(one.features)) == one.chosen).astype(np.float32)
    weights = np.where(chosen > 0, 1.0, 1.0 / max(len(chosen) - 1, 1))
    return np.column_stack([chosen, weights, _centred(one.features)]).astype(np.float32)


def _centred(features: Features) -> Features:
    return np.asarray(features - features.mean(0), np.float32)


def teach(seen: Sequence[Seen], users: Sequence[int], groups: Ints, columns: Ints, *, seed: int) -> dict[str, Head]:
    """Meta-train every head on lists in order of time and whose they are; as `Chooser.fit`."""
    cut = earlier_part(len(seen))
    shared, precision = fit_shared(padded(seen[:cut]), groups)
    everybody = Chooser(shared, precision, columns, 1.0)
    earlier: dict[int, list[Seen]] = {}
    asked, tasks = [], []
    for at, (user, one) in enumerate(zip(users, seen, strict=True)):
        mine, own = earlier.setdefault(user, []), everybody.own(one)
        if at >= cut:
            asked.append(own)
            tasks.append([before for before in mine[-LISTS:] if before.time < one.time])
        mine.append(own)
    kept = np.random.default_rng(seed).permutation(len(asked))[:EPISODES]
    queries = padded([Seen(_centred(asked[at].features), asked[at].chosen, asked[at].time) for at in kept])
    mean = torch.from_numpy(everybody.mean).float()
    episodes = Episodes(
        support=support([tasks[at] for at in kept], len(mean)),
        features=torch.from_numpy(queries.features),
        labels=torch.from_numpy(queries.chosen),
        mask=torch.from_numpy(queries.mask),
        loss="softmax",
    )
    return taught(episodes, mean, seed=seed)


@dataclass
class HeadArms:
    """Asks the heads, many choices at once; `scores` are in the order in which the choices were given."""

    heads: dict[str, Head]
    scores: dict[str, list[Floats]] = field(default_factory=dict)
    waiting: list[tuple[Features, list[Seen]]] = field(default_factory=list)

    def ask(self, features: Features, lists: list[Seen]) -> None:
        """Ask for a list [P, d] after these lists of its user, both in own features."""
        self.waiting.append((features, lists))
        if len(self.waiting) == _AT_ONCE:
            self.answer()

    def answer(self) -> None:
        """Score what waits."""
        if not self.waiting:
            return
        asked = padded([Seen(_centred(features), 0, 0) for features, _ in self.waiting])
        known = support([lists for _, lists in self.waiting], asked.features.shape[2])
        for name, head in self.heads.items():
            found = head.score(head.adapt(known), torch.from_numpy(asked.features)).detach().double().numpy()
            mine = self.scores.setdefault(name, [])
            mine += [row[there] for row, there in zip(found, asked.mask, strict=True)]
        self.waiting.clear()
