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

with r = W^(1/2) (y - Xm). Float32 is enough, and the smaller system is solved. The posterior's covariance is
R inverse(I + Z'Z) R'. Binary labels: a few such solves in a row, see `newton`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from innerloop.learning.heads.base import Likelihood, Support, linear_scores
from innerloop.learning.heads.chunks import in_chunks
from innerloop.learning.heads.meta import Episodes, Recipe, Weights, learn, mean_loss, split
from innerloop.learning.heads.newton import Whitened, curvature, newton_step
from innerloop.learning.heads.solve import cholesky, exact_float32, information, whitened_step

_JITTER = 1e-6  # of the mean variance: directions in which tasks don't differ stay invertible in float32
_NOISES = (0.05, 0.2, 1.0, 4.0)
_EM_TASKS = 4_000  # whose moments [d, d] are held at a time
_LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "logistic")  # the order is what a release keeps
_STATE_NUMBERS = 4  # the first releases knew only noise and half-life


@dataclass(frozen=True)
class BayesHead:
    """`mean` [d] is m, `root` [d, d] is R, both float32; `noise` > 0 and `half_life` > 0 (seconds, may be inf).

    With `likelihood` logistic the labels are 0 or 1 and scores are log-odds; `newton_steps` solves are made.
    """

    mean: Tensor
    root: Tensor
    noise: float = 1.0
    half_life: float = float("inf")
    likelihood: Likelihood = "gaussian"
    newton_steps: int = 3
    name: ClassVar[str] = "bayes"
    linear: ClassVar[bool] = True

    @classmethod
    def from_prior(
        cls,
        mu: Tensor,
        precision: Tensor,
        gram: Tensor,
        *,
        alpha: float,
        noise: float,
        half_life: float,
        likelihood: Likelihood = "gaussian",
    ) -> "BayesHead":
        """Make it of mu [d], Lambda [d, d], G [d, d]; torch.linalg.LinAlgError if Lambda + alpha G isn't definite."""
        a = precision.double() + alpha * gram.double()
        mean = torch.linalg.solve(a, precision.double() @ mu.double())
        # A = CC' gives inverse(A) = C^-T C^-1, so R = C^-T.
        lower = torch.linalg.cholesky(a)
        root = torch.linalg.solve_triangular(lower, torch.eye(len(a), dtype=a.dtype, device=a.device), upper=False).T
        return cls(mean.float(), root.float().contiguous(), noise, half_life, likelihood)

    @property
    def prior(self) -> Tensor:
        return self.mean

    def adapt(self, support: Support) -> Tensor:
        on = self._on(support.features.device)
        with exact_float32(support.features.device):
            return in_chunks(lambda some: on.mean + _solved(on, _whitened(on, some)) @ on.root.T, support, len(on.mean))

    def score(self, parameters: Tensor, features: Tensor) -> Tensor:
        return linear_scores(parameters, features)

    def variance(self, support: Support, features: Tensor) -> Tensor:
        """Return the posterior variance of each score, [T, N], for features [N, d] or [T, N, d].

        Of the score itself (x'w), without the noise of a label. Exact for the gaussian likelihood, Laplace's
        approximation at the solution found for the logistic one. Builds [T, d, N]: give it some tasks at a time.
        """
        on = self._on(features.device)
        with exact_float32(features.device):
            white = _whitened(on, support)
            scale = white.scale
            if on.likelihood == "logistic":
                scale = scale * curvature(white.offset + white.along(_solved(on, white))).sqrt()
            z = white.inputs * scale.unsqueeze(-1)
            candidates = (features.float() @ on.root).mT.expand(len(z), -1, -1)  # [T, d, N]
            half: Tensor = torch.linalg.solve_triangular(cholesky(information(z)), candidates, upper=False)
        return half.square().sum(1)

    def state(self) -> dict[str, Tensor]:
        numbers = [self.noise, self.half_life, _LIKELIHOODS.index(self.likelihood), self.newton_steps]
        return {"mean": self.mean, "root": self.root, "numbers": torch.tensor(numbers, dtype=torch.float64)}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> "BayesHead":
        numbers = state["numbers"].tolist()
        if len(numbers) < _STATE_NUMBERS:
            return cls(state["mean"], state["root"], *numbers)
        noise, half_life, likelihood, steps = numbers
        return cls(state["mean"], state["root"], noise, half_life, _LIKELIHOODS[int(likelihood)], int(steps))

    @classmethod
    def meta_train(cls, episodes: Episodes, recipe: Recipe) -> "BayesHead":
        """Learn the prior by EM on the support sets, then through the solve on the queries.

        How much an example says is chosen first, among `_NOISES`, by the loss on held-out tasks. A `recipe.start`
        replaces the mean that EM finds.
        """
        candidates = [_by_em(episodes, recipe, noise) for noise in _NOISES]
        _, held_out = split(episodes, recipe)
        losses = [_held_out_loss(head, held_out, recipe) for head in candidates]
        return refine(candidates[losses.index(min(losses))], episodes, recipe)

    def _on(self, device: torch.device) -> "BayesHead":
        return (
            self if self.mean.device == device else replace(self, mean=self.mean.to(device), root=self.root.to(device))
        )


def _whitened(head: BayesHead, support: Support) -> Whitened:
    return whitened(support, head.mean, head.root, head.noise, head.half_life)


def _solved(head: BayesHead, white: Whitened) -> Tensor:
    return _step(white, head.likelihood, head.newton_steps)


def whitened(
    support: Support, mean: Tensor, root: Tensor, noise: float | Tensor, half_life: float | Tensor
) -> Whitened:
    """See examples in coordinates in which the prior is N(0, I); rows that are padded are zero, whatever they held."""
    padded = ~support.mask
    # Roots of constants: a weight of 0 would have an infinite derivative.
    weights, ages = support.weights.masked_fill(padded, 0.0), support.ages.masked_fill(padded, 0.0)
    scale = weights.float().sqrt() * torch.exp2(-ages / (2.0 * half_life)) / noise**0.5
    features = support.features.float()
    return Whitened(
        inputs=(features @ root).masked_fill_(padded.unsqueeze(-1), 0.0),
        offset=(features @ mean).masked_fill(padded, 0.0),
        labels=support.labels.masked_fill(padded, 0.0).float(),
        scale=scale,
    )


def _step(white: Whitened, likelihood: Likelihood, newton_steps: int) -> Tensor:
    """The step u [T, d] from the prior, in whitened coordinates; may use up `white`."""
    if likelihood == "gaussian":
        scale, residual = white.scale.unsqueeze(-1), (white.labels - white.offset) * white.scale
        # In place, which saves a tenth of the time, unless a gradient will want the inputs.
        z = white.inputs * scale if white.inputs.requires_grad else white.inputs.mul_(scale)
        return whitened_step(z, residual)
    step = torch.zeros_like(white.inputs[:, 0]) if white.inputs.shape[1] else white.inputs.sum(1)
    for _ in range(newton_steps):
        step = newton_step(white, step)
    return step


def _by_em(episodes: Episodes, recipe: Recipe, noise: float) -> BayesHead:
    """The head of the prior that EM finds on at most `_EM_TASKS` support sets."""
    rows = torch.randperm(len(episodes), generator=recipe.generator())[:_EM_TASKS]
    support, start = episodes.support.take(rows.to(episodes.features.device)).cleaned(), recipe.linear_start(episodes)
    if recipe.likelihood == "logistic":  # near p = 1/2 log-odds are 4 (p - 1/2)
        support = replace(support, labels=4.0 * support.labels - 2.0)
    gram = torch.zeros(len(start), len(start)) if recipe.gram is None else recipe.gram
    prior = learn_prior(support, gram.to(start.device), alpha=recipe.alpha, noise=noise, half_life=recipe.half_life)
    head = replace(prior.head(), likelihood=recipe.likelihood)
    return head if recipe.start is None else replace(head, mean=start)


def _held_out_loss(head: BayesHead, held_out: Episodes, recipe: Recipe) -> float:
    def predict(_weights: Weights, support: Support, features: Tensor) -> Tensor:
        return linear_scores(head.adapt(support), features)

    return mean_loss(predict, {}, replace(held_out, support=held_out.support.cleaned()), recipe)


def refine(head: BayesHead, episodes: Episodes, recipe: Recipe) -> BayesHead:
    """Learn m, R, the noise and a finite half-life by gradient through the solve (R2-D2, ALPaCA), from `head` on.

    Never worse than `head` on the fifth of the episodes that is held out. An infinite half-life stays infinite.
    """
    decays = head.half_life != float("inf")
    start = {"mean": head.mean, "root": head.root, "noise": torch.tensor(head.noise).log()}
    if decays:
        start["half_life"] = torch.tensor(head.half_life).log()
    start = {name: value.to(episodes.features.device) for name, value in start.items()}

    def predict(weights: Weights, support: Support, features: Tensor) -> Tensor:
        half_life = weights["half_life"].exp() if decays else head.half_life
        white = whitened(support, weights["mean"], weights["root"], weights["noise"].exp(), half_life)
        step = _step(white, head.likelihood, head.newton_steps)
        return linear_scores(weights["mean"] + step @ weights["root"].T, features)

    learned = learn(start, predict, episodes, recipe)
    return replace(
        head,
        mean=learned["mean"],
        root=learned["root"],
        noise=float(learned["noise"].exp()),
        half_life=float(learned["half_life"].exp()) if decays else head.half_life,
    )


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
    support = support.cleaned()
    weighted = support.features * (support.confidence(half_life) / noise).unsqueeze(-1)  # [T, S, d]
    moment = weighted.mT @ support.features  # [T, d, d]
    pull = (weighted.mT @ support.labels.unsqueeze(-1)).squeeze(-1)  # [T, d]
    nothing, eye = torch.zeros_like(gram[0]), torch.eye(len(gram), device=gram.device)
    prior = Prior(nothing, eye, gram, alpha, noise, half_life)
    for _ in range(iterations):
        prior = _em_step(prior, moment, pull)
    return prior


def _em_step(prior: Prior, moment: Tensor, pull: Tensor) -> Prior:
    lower = cholesky(prior.precision + prior.alpha * prior.gram + moment)  # [T, d, d]
    right = pull + prior.precision @ prior.mu
    means = torch.cholesky_solve(right.unsqueeze(-1), lower).squeeze(-1)  # [T, d]
    mu = means.mean(0)
    spread = (means - mu).double()
    covariance = torch.cholesky_inverse(lower).mean(0).double() + spread.T @ spread / len(means)
    covariance += _JITTER * covariance.diagonal().mean() * torch.eye(len(mu), dtype=torch.float64, device=mu.device)
    precision = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
    return replace(prior, mu=mu, precision=precision.float())
