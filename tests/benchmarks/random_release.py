"""A release of random vectors: scoring costs the same whatever the numbers mean, so nothing is trained."""

from dataclasses import replace
from datetime import UTC, datetime

import torch

from innerloop.learning.candidates import FEATURES, PLAIN
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads.bayes import BayesHead
from innerloop.learning.history_encoder import history_encoder
from innerloop.learning.ranker import Ranker
from innerloop.learning.releases import Card, DataSummary, Release
from innerloop.learning.sequence_encoder import SequenceEncoder
from innerloop.learning.transitions import KEPT, Transitions


def with_ranker(release: Release) -> Release:
    """The same with a ranker as it is drawn, frozen as a taught one is."""
    torch.manual_seed(0)
    width = PLAIN if release.sequence is None else len(FEATURES)
    ranker = Ranker.new(torch.zeros(width), torch.ones(width))
    ranker.network.requires_grad_(requires_grad=False)
    return replace(release, ranker=ranker)


def with_sequence(release: Release, seed: int = 0) -> Release:
    """The same with an untaught sequence model of the default kind, and transitions drawn at random."""
    items, dimension, capacity = len(release.item_ids), 64, 64
    torch.manual_seed(seed)
    history = history_encoder("pooled", dimension, capacity=capacity, dropout=0.0).eval()
    history.requires_grad_(requires_grad=False)
    model = SequenceEncoder(
        vectors=torch.randn(items, dimension + 1),
        unseen=torch.zeros(dimension + 1),
        category_vectors=torch.zeros(0, dimension + 1),
        described=torch.zeros(0, dimension + 1),
        kind="pooled",
        capacity=capacity,
        layers=1,
        history=history,
    )
    neighbours = torch.randint(items, (items, KEPT), dtype=torch.int32)
    return replace(release, sequence=model, transitions=Transitions(neighbours, torch.rand(items, KEPT)))


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
