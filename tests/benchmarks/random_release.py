"""A release of random vectors: scoring costs the same whatever the numbers mean, so nothing is trained."""

from dataclasses import replace
from datetime import UTC, datetime

import torch

from innerloop.learning.candidates import FEATURES
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads.bayes import BayesHead
from innerloop.learning.ranker import Ranker
from innerloop.learning.releases import Card, DataSummary, Release


def with_ranker(release: Release) -> Release:
    """The same with an untaught ranker, frozen as a taught one is."""
    torch.manual_seed(0)
    ranker = Ranker.new(torch.zeros(len(FEATURES)), torch.ones(len(FEATURES)))
    ranker.network.requires_grad_(requires_grad=False)
    return replace(release, ranker=ranker)


def random_release(items: int, dimension: int, seed: int = 0) -> Release:
    """Make a release of `items` unit vectors, named item-0 and so on, with the default head."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(items, dimension, generator=generator), dim=1)
    names = [f"item-{number}" for number in range(items)]
    encoder = Encoder(names, vectors, [], torch.zeros(0, dimension - 2), torch.full((items,), -1))
    spread = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    head = BayesHead.from_prior(
        torch.randn(dimension, generator=generator) / dimension**0.5,
        torch.eye(dimension, dtype=torch.float64) + spread @ spread.T / dimension,
        (vectors.T @ vectors).double(),
        alpha=0.03,
        noise=0.2,
        half_life=21_600.0,
    )
    card = Card(
        version=1,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=head.name,
        dimension=dimension,
        data=DataSummary(events=0, users=0, items=items, first_event_time=0, last_event_time=0),
        metrics={},
        settings={"seed": seed},
        innerloop="benchmark",
    )
    return Release(card, encoder, head)
