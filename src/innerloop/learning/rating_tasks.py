"""Ratings as the tasks of a head: whitened features, and labels that are what the zero-shot prediction left over.

For a user with prior N(m, T) over (c, w), T = RR', and an item with features x = (1, v):

    features z = R'x       label = rating - mean - b - x . m       weight = noise / (noise + what v's uncertainty adds)

so that every head starts from a prior of zero mean and unit variance, whatever the user's content says.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from innerloop.learning.heads.base import Support
from innerloop.learning.rating_model import Bools, Floats, Ints, RatingModel


@dataclass(frozen=True)
class RatingTasks:
    """`features` [M, P] by item, `biases` [M] (mean + b), `designs` [M, P] x, `extra` [M] variance, `priors` [U, P]."""

    features: Floats
    biases: Floats
    designs: Floats
    extra: Floats
    priors: Floats
    noise: float
    model: RatingModel
    root: Floats

    @classmethod
    def of(cls, model: RatingModel) -> "RatingTasks":
        designs = model.items.design()[0]
        root: Floats = np.linalg.cholesky(model.users.spread).astype(np.float64)
        known = model.users.known
        typical = model.users.prior[known].copy()
        typical[:, 0] = 1.0
        second = typical.T @ typical / max(len(typical), 1)
        second[1:, 1:] += model.users.spread[1:, 1:]
        extra = np.einsum("nde,de->n", model.items.covariance, second)
        priors, biases = model.users.prior, model.mean + model.items.mean[:, 0]
        return cls(designs @ root, biases, designs, extra, priors, model.noise, model, root)

    @property
    def width(self) -> int:
        return int(self.features.shape[1])

    def zero_shot(self, users: Ints, items: Ints) -> Floats:
        """The prediction [T, S] for users [T] and items [T, S] of whose ratings nothing is known."""
        return np.asarray(self.biases[items] + np.einsum("tsp,tp->ts", self.designs[items], self.priors[users]))

    def support(self, users: Ints, items: Ints, ratings: Floats, mask: Bools) -> Support:
        """The support sets of users [T]: items, ratings and mask [T, S]."""
        weights = self.noise / (self.noise + self.extra[items])
        return Support(
            self.query(items),
            torch.from_numpy(ratings - self.zero_shot(users, items)).float(),
            torch.from_numpy(weights).float(),
            torch.zeros(items.shape),
            torch.from_numpy(mask),
        )

    def query(self, items: Ints) -> Tensor:
        """Features [..., P] of items."""
        return torch.from_numpy(self.features[items]).float()

    def history(self, users: Ints) -> tuple[Tensor, Tensor]:
        """What a user's training ratings say, as P examples of weight 1: features [T, P, P] and labels [T, P].

        A Gaussian likelihood is a quadratic form, so its square root says all of it: with G = precision after less
        precision before (whitened) and p the pull, X = (noise G)^(1/2) and y = (noise)^(1/2) G^(-1/2) p.
        """
        precision = np.linalg.inv(self.model.users.covariance[users])
        whitened = self.root.T @ precision @ self.root
        gram = whitened - np.eye(self.width)
        off = self.model.users.mean[users] - self.priors[users]
        pull = np.einsum("pd,tde,te->tp", self.root.T, precision, off)
        values, vectors = np.linalg.eigh(gram)
        values = np.maximum(values, 0.0)
        inverse = np.where(values > 1e-6, 1.0 / np.sqrt(np.maximum(values, 1e-6)), 0.0)  # noqa: PLR2004
        features = np.sqrt(self.noise * values)[:, :, None] * vectors.mT
        labels = np.sqrt(self.noise) * inverse * np.einsum("tpk,tp->tk", vectors, pull)
        return torch.from_numpy(features).float(), torch.from_numpy(labels).float()

    def spread(self, support: Support, query: Tensor, items: Ints) -> Floats:
        """The standard deviation [T, Q] of the ratings of `items` [T, Q] after the support set, whatever its labels."""
        confidence = torch.where(support.mask, support.weights, 0.0) / self.noise
        weighted = support.features * confidence.unsqueeze(-1)
        gram = weighted.mT @ support.features + torch.eye(self.width)
        variance = (query * torch.linalg.solve(gram, query.mT).mT).sum(-1)
        return np.asarray(np.sqrt(variance.numpy() + self.noise + self.extra[items]))
