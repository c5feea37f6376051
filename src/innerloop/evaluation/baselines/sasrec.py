"""SASRec (Kang and McAuley 2018) with a softmax over many negatives, trained once on what is seen before."""

import numpy as np
import torch

from innerloop.evaluation.baselines.candidate_lists import WIDTH, Lists
from innerloop.evaluation.baselines.popularity import Counts, for_everybody, where_known
from innerloop.evaluation.outcome import Bools, Floats, Ints
from innerloop.learning.history_encoder import history_encoder
from innerloop.learning.item_encoder import ItemEncoder
from innerloop.learning.softmax_training import Histories, Plan, SequenceModel, Trainer
from innerloop.learning.stream_log import StreamLog

_LENGTH = 50  # newest items of a history
_DIMENSION = 64
_POSITIONS = 1_500_000  # of histories to learn from, over all epochs
_BATCH, _NEGATIVES = 256, 1_024
_EPOCHS = 2, 20  # at least and at most


class SasRec:
    """Self-attention over the user's newest items. What the training didn't see has no score."""

    name = "sasrec"

    def __init__(self, log: StreamLog, *, seed: int = 0) -> None:
        self._log, self._seed = log, seed
        self._counts = Counts(log)
        self._shown = 0
        self._model: SequenceModel | None = None
        self._items: Ints = np.empty(0, np.int64)  # that were trained on
        self._number: Ints = np.full(len(log.item_ids) + 1, -1)  # of each item among these; the last for item -1

    def observe(self, first: int, last: int) -> None:
        self._counts.observe(first, last)
        self._shown = last

    def candidates(self, rows: Ints, support: Ints) -> Lists:
        if self._model is None and not self._train():
            return for_everybody(self._counts.top(), len(rows))
        own = self._number[np.where(support >= 0, self._log.items[support], -1)]
        known: Bools = np.any(own >= 0, axis=1)
        if not known.any():
            return for_everybody(self._counts.top(), len(rows))
        scores = self._scores(own[known])
        width = min(WIDTH, scores.shape[1])
        best = np.argpartition(scores, -width, axis=1)[:, -width:]
        return where_known(known, (self._items[best], np.take_along_axis(scores, best, 1)), self._counts.top())

    def scores_of(self, rows: Ints, support: Ints, items: Ints) -> Floats:
        """Scores [Q, P] of `items` [Q, P], -1 for none; the least for what the training didn't see."""
        del rows
        found = np.zeros(items.shape)
        if self._model is None and not self._train():
            return found
        own = self._number[np.where(support >= 0, self._log.items[support], -1)]
        known: Bools = np.any(own >= 0, axis=1)
        if known.any():
            scores, number = self._scores(own[known]), self._number[items[known]]
            found[known] = np.where(number >= 0, np.take_along_axis(scores, np.maximum(number, 0), 1), -np.inf)
        return found

    def _scores(self, own: Ints) -> Floats:
        """Scores [Q, M] of all M items after items [Q, S], newest first, -1 for what is unknown."""
        assert self._model is not None  # noqa: S101 - candidates() sees to it
        histories = _histories([items[items >= 0][:_LENGTH][::-1] for items in own])
        with torch.no_grad():
            scores = torch.addmm(self._bias, self._model.users(histories), self._vectors.T)
        return scores.double().numpy()

    def _train(self) -> bool:
        """Train on what was shown; False while there is nothing to learn from."""
        shown = self._log.by_user[self._log.by_user < self._shown]
        users = self._log.users[shown]
        if not (users[1:] == users[:-1]).any():
            return False
        self._items, numbers = np.unique(self._log.items[shown], return_inverse=True)
        self._number[self._items] = np.arange(len(self._items))
        begins = np.flatnonzero(np.diff(users)) + 1
        histories = _histories([part[-_LENGTH:] for part in np.split(numbers, begins)])
        learned = int(histories.mask[:, 1:].sum())
        epochs = min(_EPOCHS[1], max(_EPOCHS[0], _POSITIONS // learned))
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            attention = history_encoder("attention", _DIMENSION, capacity=_LENGTH)
            self._model = SequenceModel(ItemEncoder(len(self._items), _DIMENSION), attention)
        Trainer(self._model, histories, Plan(epochs=epochs, batch=_BATCH, negatives=_NEGATIVES, seed=self._seed)).run()
        with torch.no_grad():
            self._vectors, self._bias = self._model.table()
        return True


def _histories(items: list[Ints]) -> Histories:
    """Of lists of items, oldest first; nothing is held out."""
    lengths = np.array([len(part) for part in items])
    table = np.zeros((len(items), max(1, int(lengths.max(initial=1)))), np.int64)
    there = np.arange(table.shape[1]) < lengths[:, None]
    table[there] = np.concatenate(items)
    held = torch.zeros(table.shape, dtype=torch.bool)
    return Histories(torch.from_numpy(table), torch.from_numpy(lengths), held)
