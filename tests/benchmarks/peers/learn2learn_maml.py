"""MAML of learn2learn, one user after the other: the loop that its examples have.

Reads the file argv[1] (numpy: the network, the users' examples, rate and steps), adapts the first argv[2] users, and
writes their parameters and how long that took to argv[3]. argv[4] is torch's number of threads, argv[5] the device that
network and examples are on: `cpu`, or `cuda` where there is a GPU, which is waited for before the clock is read. Per
user: clone, then `adapt` on the loss for each step, first order, which is the faster way and gives the same parameters.
"""

import sys
import time

import learn2learn
import numpy as np
import torch
from torch import nn


class Network(nn.Module):
    """Score = skip . x + second . tanh(first x + bias) + level."""

    def __init__(self, dimension: int, hidden: int) -> None:
        super().__init__()
        self.skip = nn.Linear(dimension, 1, bias=False)
        self.first = nn.Linear(dimension, hidden)
        self.second = nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.skip(x) + self.second(torch.tanh(self.first(x)))).squeeze(-1)


def main() -> None:
    """Adapt, measure, write."""
    given, count, target, threads = np.load(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    device = torch.device(sys.argv[5])
    torch.set_num_threads(threads)
    names = "features", "labels", "shares"
    features, labels, shares = (torch.from_numpy(given[name][:count]).to(device) for name in names)
    network = Network(features.shape[-1], int(given["hidden"]))
    nn.utils.vector_to_parameters(torch.from_numpy(given["start"]), network.parameters())
    network.to(device)
    maml = learn2learn.algorithms.MAML(network, lr=float(given["rate"]), first_order=True)
    steps = int(given["steps"])
    for user in range(min(20, count)):  # the first calls of a process are slow
        adapted(maml, features[user], labels[user], shares[user], steps)
    wait_for(device)
    began = time.perf_counter()
    found = [adapted(maml, features[user], labels[user], shares[user], steps) for user in range(count)]
    wait_for(device)
    seconds = time.perf_counter() - began
    rows = [nn.utils.parameters_to_vector(learner.parameters()).detach().cpu().numpy() for learner in found]
    np.savez(target, parameters=np.stack(rows), seconds=seconds)


def wait_for(device: torch.device) -> None:
    """Until all that was asked of a GPU is done; a CPU does what it is asked at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def adapted(
    maml: "learn2learn.algorithms.MAML", x: torch.Tensor, y: torch.Tensor, share: torch.Tensor, steps: int
) -> nn.Module:
    """One user's network."""
    learner = maml.clone()
    for _ in range(steps):
        learner.adapt((share * (y - learner(x)) ** 2).sum() / 2)
    return learner


main()
