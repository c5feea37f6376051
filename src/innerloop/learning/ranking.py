"""The best items of each task, exactly, over the whole catalogue."""

import torch
from torch import Tensor

from innerloop.learning.devices import one_thread
from innerloop.learning.heads import Head

_HIDDEN = 32  # numbers that a small network holds for each item and task
# Held at once. On a CPU 16 MB of scores: fewer would read the item vectors more often, more would leave the cache. On a
# GPU 256 MB of each, scores and vectors of d = 64: it waits whenever it is asked anew, and eight processes share it.
_SCORES = {"cpu": 4_000_000, "cuda": 1 << 26}
_GATHERED = 1 << 20


def top_k(parameters: Tensor, vectors: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the k best items of each task: indices [T, k] int64 and scores [T, k], best first.

    `parameters` [T, d], `vectors` [N, d], `excluded` [T, E] int64 holds items to leave out, padded with -1. With fewer
    than k items k is N. Left-out items have score -inf and come last. The order of equal scores is not defined.

    torch.topk row by row is quick enough: searching only the blocks of 64 items with the k best maxima was tried and
    gained nothing (50 of 10 thousand items, 1024 tasks, one thread: 63 ms against 51, of which the product is 20).
    """
    k = min(k, len(vectors))
    chunk = max(1, _SCORES[vectors.device.type] // max(1, len(vectors)))
    indices, values = _room(parameters, k)
    for first in range(0, len(parameters), chunk):
        some = slice(first, first + chunk)
        scores = parameters[some] @ vectors.T  # [t, N]
        if excluded is not None:
            _leave_out(scores, excluded[some])
        values[some], indices[some] = scores.topk(k)
    return indices, values


def best_by(
    head: Head, parameters: Tensor, vectors: Tensor, k: int, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k best items of each task by a head of any kind; parameters [T, P], all else as in `top_k`."""
    if head.linear:
        return top_k(parameters, vectors, k, excluded)
    k = min(k, len(vectors))
    indices, values = _room(parameters, k)
    chunk = max(1, _SCORES[vectors.device.type] // (_HIDDEN * max(1, len(vectors))))
    for first in range(0, len(parameters), chunk):
        some = slice(first, first + chunk)
        scores = head.score(parameters[some], vectors)
        if excluded is not None:
            _leave_out(scores, excluded[some])
        values[some], indices[some] = scores.topk(k)
    return indices, values


def scores_of(
    parameters: Tensor, rows: Tensor, vectors: Tensor, places: Tensor, prior: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scores [M] of vectors [N, d] at `places` [M], by parameters [T, d] of tasks `rows` [M] and by a prior [d].

    `rows` ascend. Without a prior the second is zeros.
    """
    if vectors.device.type == "cpu":
        return _scores_by_task(parameters, rows, vectors, places, prior)
    scores, unadapted = parameters.new_empty(len(rows)), parameters.new_zeros(len(rows))
    for first in range(0, len(rows), _GATHERED):
        some = slice(first, first + _GATHERED)
        gathered = vectors[places[some]]
        scores[some] = torch.linalg.vecdot(gathered, parameters[rows[some]])
        if prior is not None:
            unadapted[some] = gathered @ prior
    return scores, unadapted


def _scores_by_task(
    parameters: Tensor, rows: Tensor, vectors: Tensor, places: Tensor, prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, one task after the other: on a CPU what is gathered for one stays in the nearest cache."""
    sizes = torch.bincount(rows, minlength=len(parameters)).tolist()
    scores, unadapted = [], []
    with one_thread():
        for own, its in zip(parameters, torch.split(places, sizes), strict=True):
            gathered = vectors.index_select(0, its)
            scores.append(torch.mv(gathered, own))
            if prior is not None:
                unadapted.append(torch.mv(gathered, prior))
    found = torch.cat(scores) if scores else parameters.new_zeros(0)
    return found, torch.cat(unadapted) if unadapted else torch.zeros_like(found)


def _room(parameters: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For the indices and the scores [T, k] of as many tasks as there are parameters."""
    values = parameters.new_empty(len(parameters), k)
    return torch.empty_like(values, dtype=torch.int64), values


def _leave_out(scores: Tensor, excluded: Tensor) -> None:
    """Set scores [T, N] to -inf at excluded [T, E], in place; -1 is padding."""
    rows = torch.arange(len(scores), device=scores.device).unsqueeze(1).expand_as(excluded)
    real = excluded >= 0
    scores[rows[real], excluded[real]] = float("-inf")
