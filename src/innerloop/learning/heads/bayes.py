"""A Bayesian linear head in closed form, with implicit negatives through one Gram matrix shared by all tasks.

For a task with examples X [S, d], labels y and weights W = diag(weight * 2^(-age / half_life) / noise) it minimises,
as iALS does (Hu, Koren, Volinsky 2008; Rendle et al. 2021) but around a prior N(mu, inverse(Lambda)) instead of zero,

    (Xw - y)' W (Xw - y)  +  alpha * sum over all items v of (v . w)^2  +  (w - mu)' Lambda (w - mu)

whose solution is w = inverse(A + X'WX) (Lambda mu + X'Wy), A = Lambda + alpha G, G = sum of v v'. Without examples that
is m = inverse(A) Lambda mu. Since Lambda mu = A m, the form computed here is the same,

    w = m + inverse(A + X'WX) X'W (y - Xm)

so that m is stored, returned bit for bit when there are no examples, and everything else is a step away from it.
With inverse(A) = RR' and Z = W^(1/2) X R the step is R u, where u solves one of two systems with eigenvalues >= 1:

    primal  (I + Z'Z) u = Z' r      d x d        dual (Woodbury)  u = Z' inverse(I + ZZ') r      S x S

with r = W^(1/2) (y - Xm). No jitter is needed, float32 is enough, and the smaller system is solved.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.learning.heads.base import Support

_JITTER = 1e-6  # of the mean variance: directions in which tasks don't differ stay invertible in float32


@dataclass(frozen=True)
class BayesHead:
    """`mean` [d] is m, `root` [d, d] is R, both float32; `noise` > 0 and `half_life` > 0 (seconds, may be inf)."""

    mean: Tensor
    root: Tensor
    noise: float = 1.0
    half_life: float = float("inf")
    name: ClassVar[str] = "bayes"

    @classmethod
    def from_prior(
        cls, mu: Tensor, precision: Tensor, gram: Tensor, *, alpha: float, noise: float, half_life: float
    ) -> "BayesHead":
        """Make it of mu [d], Lambda [d, d], G [d, d]; torch.linalg.LinAlgError if Lambda + alpha G isn't definite."""
        a = precision.double() + alpha * gram.double()
        mean = torch.linalg.solve(a, precision.double() @ mu.double())
        # A = CC' gives inverse(A) = C^-T C^-1, so R = C^-T.
        lower = torch.linalg.cholesky(a)
        root = torch.linalg.solve_triangular(lower, torch.eye(len(a), dtype=a.dtype, device=a.device), upper=False).T
        return cls(mean.float(), root.float().contiguous(), noise, half_life)

    @property
    def prior(self) -> Tensor:
        return self.mean

    def adapt(self, support: Support) -> Tensor:
        mean, root = self.mean.to(support.features.device), self.root.to(support.features.device)
        z, residual = self._whitened(support, mean, root)
        examples, dimension = z.shape[1:]
        step = dual(z, residual) if examples < dimension else primal(z, residual)
        return mean + step @ root.T  # [T, d]

    def _whitened(self, support: Support, mean: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """Z [T, S, d] and r [T, S]; rows that are padded are zero, whatever they held."""
        confidence = support.weights * torch.exp2(-support.ages / self.half_life) / self.noise
        scale = torch.where(support.mask, confidence, 0.0).sqrt()  # [T, S]
        features = torch.where(support.mask.unsqueeze(-1), support.features, 0.0)
        labels = torch.where(support.mask, support.labels, 0.0)
        return (features * scale.unsqueeze(-1)) @ root, (labels - features @ mean) * scale

    def state(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.noise, self.half_life], dtype=torch.float64)
        return {"mean": self.mean, "root": self.root, "numbers": numbers}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "BayesHead":
        noise, half_life = state["numbers"].tolist()
        return cls(state["mean"], state["root"], noise, half_life)


@dataclass(frozen=True)
class Prior:
    """What EM learns over many tasks, mu [d] and Lambda [d, d], given G [d, d] and the three numbers."""

    mu: Tensor
    precision: Tensor
    gram: Tensor
    alpha: float
    noise: float
    half_life: float

    def head(self) -> "BayesHead":
        return BayesHead.from_prior(
            self.mu, self.precision, self.gram, alpha=self.alpha, noise=self.noise, half_life=self.half_life
        )


def learn_prior(
    support: Support, gram: Tensor, *, alpha: float, noise: float, half_life: float, iterations: int = 6
) -> Prior:
    """Empirical Bayes by EM over the tasks of `support` (T >= 1), from N(0, I).

    E: task t has posterior N(w_t, C_t), C_t = inverse(A + X'WX).  M: mu = mean w_t, inverse(Lambda) = mean (C_t +
    (w_t - mu)(w_t - mu)'), the textbook update of a Gaussian random effect (Laird and Ware 1982).
    """
    dimension = gram.shape[0]
    confidence = torch.where(support.mask, support.weights * torch.exp2(-support.ages / half_life) / noise, 0.0)
    weighted = support.features * confidence.unsqueeze(-1)  # [T, S, d]
    moment = weighted.mT @ support.features  # [T, d, d]
    pull = (weighted.mT @ support.labels.unsqueeze(-1)).squeeze(-1)  # [T, d]
    prior = Prior(torch.zeros(dimension), torch.eye(dimension), gram, alpha, noise, half_life)
    for _ in range(iterations):
        prior = _em_step(prior, moment, pull)
    return prior


def _em_step(prior: Prior, moment: Tensor, pull: Tensor) -> Prior:
    lower = torch.linalg.cholesky(prior.precision + prior.alpha * prior.gram + moment)  # [T, d, d]
    right = pull + prior.precision @ prior.mu
    means = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)  # [T, d]
    mu = means.mean(0)
    spread = (means - mu).double()
    covariance = torch.cholesky_inverse(lower).mean(0).double() + spread.T @ spread / len(means)
    covariance += _JITTER * covariance.diagonal().mean() * torch.eye(len(mu), dtype=torch.float64)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return replace(prior, mu=mu, precision=precision.float())


def primal(z: Tensor, residual: Tensor) -> Tensor:
    """(I + Z'Z) u = Z'r for z [T, S, d] and residual [T, S]; u [T, d]."""
    gram = z.mT @ z  # [T, d, d]
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return _solve(gram, z.mT @ residual.unsqueeze(-1)).squeeze(-1)


def dual(z: Tensor, residual: Tensor) -> Tensor:
    """Solve for the same u [T, d] as `primal`, from S x S systems."""
    kernel = z @ z.mT  # [T, S, S]
    kernel.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return (z.mT @ _solve(kernel, residual.unsqueeze(-1))).squeeze(-1)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))
