"""What a release's sequence model and transitions add to a list: candidates, and what they say of every candidate."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from innerloop.learning.candidates import FEATURES, Candidates, Recent, first_of
from innerloop.learning.catalogue import Catalogue
from innerloop.learning.devices import moved, one_thread
from innerloop.learning.heads import NoneHead
from innerloop.learning.item_index import ItemSearch
from innerloop.learning.ranking import scores_of
from innerloop.learning.transitions import best_followers, followers, says_of

Ints = NDArray[np.int64]
_SEQUENCE, _FOLLOWERS, _SHARE = (FEATURES.index(name) for name in ("sequence", "followers", "followers_share"))
_NEXT, _FOLLOWED = 50, 50
"""Candidates that the sequence model, at least, and the transitions give."""
_EPSILON = 1e-6


@dataclass(frozen=True)
class Foreseen:
    """Of T tasks: the query of each [T, e], the log of the sum of exp of its best scores [T], and what follows."""

    queries: Tensor
    level: Tensor
    follows: scipy.sparse.csr_matrix  # [T, places]
    liked: Ints  # [T, K] candidates, -1 for none, some twice


class Foreseer:
    """A release's sequence model over a catalogue; with over `index_above` items its best are found by an index."""

    def __init__(self, catalogue: Catalogue, index_above: int | None) -> None:
        self._catalogue = catalogue
        self._search = ItemSearch(index_above)
        transitions = catalogue.release.transitions
        self._matrix = None
        if transitions is not None:
            self._matrix = transitions.matrix(catalogue.places_of_release(), len(catalogue))

    def close(self) -> None:
        """Have no index built any more."""
        self._search.close()

    def foresee(self, recent: Recent, least: Ints) -> Foreseen:
        """What is next after tasks' newest examples, all that is looked at: at least `least` [T] items of each."""
        newest, wanted = _that_count(recent), np.maximum(least, _NEXT)
        with one_thread():
            queries = self._queries(newest)
        vectors = self._catalogue.sequence_vectors
        places, scores = self._search.best(NoneHead(queries[0]), queries, vectors, int(wanted.max()))
        follows = self._follows(newest)
        liked = np.concatenate([first_of(places.cpu().numpy(), wanted), best_followers(follows, _FOLLOWED)], 1)
        return Foreseen(queries, scores[:, :_NEXT].logsumexp(1), follows, liked)

    def describe(self, foreseen: Foreseen, found: Candidates) -> None:
        """Fill in the features: log P among the task's best, what the transitions say, and as a share of the most."""
        rows = found.rows()
        at = moved(torch.from_numpy(rows), self._catalogue.device)
        places = moved(torch.from_numpy(found.places), self._catalogue.device)
        scores, _ = scores_of(foreseen.queries, at, self._catalogue.sequence_vectors, places)
        found.features[:, _SEQUENCE] = (scores - foreseen.level[at]).cpu().numpy()
        says = says_of(foreseen.follows, rows, found.places)
        most = np.maximum.reduceat(np.append(says, np.float32(0.0)), found.starts[:-1])
        found.features[:, _FOLLOWERS] = np.log(says + _EPSILON)
        found.features[:, _SHARE] = says / np.maximum(most[rows], _EPSILON)

    def _queries(self, newest: Ints) -> Tensor:
        sequence = self._catalogue.sequence
        assert sequence is not None  # noqa: S101 - or there would be no foreseer
        newest = newest[:, : sequence.capacity]
        there = newest >= 0
        lengths = there.sum(1)
        width = newest.shape[1]
        # Oldest first, at the front.
        step = lengths[:, None] - 1 - np.arange(width)
        places = np.take_along_axis(newest, np.maximum(step, 0), 1)
        where = moved(torch.from_numpy(np.maximum(places, 0)), self._catalogue.device)
        count = moved(torch.from_numpy(lengths), self._catalogue.device)
        return sequence.queries(self._catalogue.sequence_vectors[where], count)

    def _follows(self, newest: Ints) -> scipy.sparse.csr_matrix:
        if self._matrix is None:
            return scipy.sparse.csr_matrix((len(newest), len(self._catalogue)), dtype=np.float32)
        return followers(newest, self._matrix)


def _that_count(recent: Recent) -> Ints:
    """Places [T, S], newest first, of what the catalogue has and has a weight, side by side; -1 behind them."""
    places = np.where(recent.weights > 0, recent.places, -1)
    return np.take_along_axis(places, np.argsort(places < 0, 1, kind="stable"), 1)
