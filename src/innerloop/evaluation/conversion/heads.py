"""Every head as an arm of the conversion protocol: on the features that the default's own weights act on.

A task is a click; its support set is the user's newest clicks with a label, as known strictly before it, and its query
the click itself. Episodes are the last of the training clicks, seen by everybody's answer of those before them, which
has not seen what it is asked: the same halves by which the default chooses how much users may differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from innerloop.evaluation.outcome import Floats, Ints
from innerloop.evaluation.taught_heads import earlier_part, taught
from innerloop.learning.ads.ad_head import AdHead
from innerloop.learning.ads.click_log import ConversionLog, Histories, known_clicks, rows_of
from innerloop.learning.heads import Episodes, Head, Support

EPISODES = 4_000
"""So many clicks, drawn at random, are episodes at most."""
_AT_ONCE = 2048


@dataclass(frozen=True)
class Clicks:
    """All clicks of a log, with the columns `ad_head.COLUMNS` [P, C] that describe each as of its own moment."""

    log: ConversionLog
    histories: Histories
    columns: Tensor

    def support(self, features: Tensor, clicks: Ints) -> Support:
        """What is known of the users of these `clicks` [M], numbers among all; `features` [P, K] of all clicks."""
        at = self.log.clicks[clicks]
        windows = self.histories.before(self.log.users[at], self.log.times[at])
        numbers, labels, mask = known_clicks(self.log, rows_of(self.log, self.log.clicks), windows)
        there = torch.from_numpy(mask)
        return Support(
            features=features[torch.from_numpy(numbers)],
            labels=torch.from_numpy(labels).float(),
            weights=there.float(),
            ages=torch.zeros(mask.shape),  # like the default, heads let no example age
            mask=there,
        )


def teach(clicks: Clicks, train: Ints, labels: Floats, *, seed: int) -> dict[str, Head]:
    """Meta-train every head on the last of the clicks `train`, given the `labels` of these."""
    cut = earlier_part(len(train))
    known, answers = torch.from_numpy(train), torch.from_numpy(labels)
    everybody = AdHead.fit(clicks.columns[known[:cut]], answers[:cut], seed=seed)
    features = everybody.own_features(clicks.columns).float()
    asked = np.arange(cut, len(train))
    if len(asked) > EPISODES:
        asked = np.sort(np.random.default_rng(seed).choice(asked, EPISODES, replace=False))
    episodes = Episodes(
        support=clicks.support(features, train[asked]),
        features=features[known[asked]].unsqueeze(1),
        labels=answers[asked].float().unsqueeze(1),
        loss="logistic",
    )
    return taught(episodes, everybody.own_mean.float(), seed=seed)


def logits(clicks: Clicks, everybody: AdHead, heads: dict[str, Head], asked: Ints) -> dict[str, Floats]:
    """Each head's logits [M] of the clicks `asked` [M], around everybody's answer."""
    features = everybody.own_features(clicks.columns).float()
    return {name: np.concatenate(list(_scores(clicks, head, features, asked))) for name, head in heads.items()}


def _scores(clicks: Clicks, head: Head, features: Tensor, asked: Ints) -> Iterator[Floats]:
    for first in range(0, len(asked), _AT_ONCE):
        some = asked[first : first + _AT_ONCE]
        parameters = head.adapt(clicks.support(features, some))
        yield head.score(parameters, features[torch.from_numpy(some)].unsqueeze(1))[:, 0].detach().double().numpy()
