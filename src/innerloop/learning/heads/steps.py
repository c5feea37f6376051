"""Gradient steps on a task's examples: what anil, cavia, maml and reptile have in common.

A step moves a task's parameters along the sum over its examples of confidence * residual * d score / d parameters,
divided by their number, or by the sum of their confidence where that is more: what counts four times makes no step four
times as long. It is taken times a step size that may depend on how many examples there are,

    size_k(n) = rate_k * n^slope

slope 0 is gradient descent on the mean loss, slope 1 on the sum; both are learned (Meta-SGD: Li et al. 2017; a rate for
each step: Antoniou, Edwards, Storkey 2019). Here the residual is label - score, or label - sigmoid(score).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop.learning.heads.base import Likelihood, Support

_LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "logistic")  # the order is what a release keeps
_START = 0.5  # of the largest rate at which steps on a mean example are sure to descend


@dataclass(frozen=True)
class Rule:
    """What the inner loop needs besides parameters, and is not learned by gradient."""

    likelihood: Likelihood = "gaussian"
    half_life: float = float("inf")
    first_order: bool = False

    def state(self) -> Tensor:
        numbers = [_LIKELIHOODS.index(self.likelihood), self.half_life, float(self.first_order)]
        return torch.tensor(numbers, dtype=torch.float64)

    @classmethod
    def restore(cls, numbers: Tensor) -> "Rule":
        likelihood, half_life, first_order = numbers.tolist()
        return cls(_LIKELIHOODS[int(likelihood)], half_life, bool(first_order))


DEFAULT_RULE = Rule()


@dataclass(frozen=True)
class Examples:
    """A support set as the steps want it: zeros where padded, and what each example weighs."""

    features: Tensor  # [T, S, d]
    labels: Tensor  # [T, S]
    shares: Tensor  # [T, S]: confidence / number of examples, or / all their confidence where that is more
    counts: Tensor  # [T], at least 1
    likelihood: Likelihood

    @classmethod
    def of(cls, support: Support, rule: Rule) -> "Examples":
        padded = ~support.mask
        counts = support.mask.sum(-1).clamp(min=1)
        confidence = support.confidence(rule.half_life).float()
        divisors = torch.maximum(confidence.sum(-1), counts)
        return cls(
            features=support.features.float().masked_fill(padded.unsqueeze(-1), 0.0),
            labels=support.labels.float().masked_fill(padded, 0.0),
            shares=confidence / divisors.unsqueeze(-1),
            counts=counts,
            likelihood=rule.likelihood,
        )

    def pull(self, scores: Tensor) -> Tensor:
        """How much each example wants its score [T, S] raised: share * residual."""
        expected = scores if self.likelihood == "gaussian" else scores.sigmoid()
        return self.shares * (self.labels - expected)

    def sizes(self, rates: Tensor, slope: Tensor) -> Tensor:
        """Step sizes [k, T, 1] of logarithms of rates [k] and a slope []."""
        return torch.exp(rates.unsqueeze(-1) + slope * self.counts.to(slope.dtype).log()).unsqueeze(-1)


def first_rates(support: Support, rule: Rule, steps: int) -> Tensor:
    """Logarithms of rates [steps] to begin to learn from, on the scale of the features of `support`."""
    support = support.cleaned()
    confidence = support.confidence(rule.half_life)
    divisors = torch.maximum(confidence.sum(-1), support.mask.sum(-1))  # as in `Examples.of`
    size = (confidence * support.features.square().sum(-1)).sum() / divisors.sum().clamp(min=1)
    curvature = 1.0 if rule.likelihood == "gaussian" else 0.25  # at most
    return torch.log(_START / (curvature * size).clamp(min=1e-6)).expand(steps).clone()
