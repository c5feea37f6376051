"""From a history of events to a sequence encoder: softmax at every event, then episodes through the head.

1. Everything before a cut teaches; each task's first event after it is held out, and says when to stop.
2. Episodes (a task's events before some moment are its support set, the next is its query) go on to teach encoder and
   head together, through the head's solve. They are kept if what is held out is foreseen better for it.

How long is bound by the number of events learned from, so that the same history gives the same encoder anywhere.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from innerloop.learning.described import Described
from innerloop.learning.encoder import Encoder
from innerloop.learning.episodes import Log
from innerloop.learning.history_encoder import history_encoder
from innerloop.learning.history_head import HistoryHead
from innerloop.learning.item_encoder import ContentCode, ItemContent, ItemEncoder
from innerloop.learning.processes import agreed
from innerloop.learning.sequence_encoder import SequenceEncoder
from innerloop.learning.softmax_training import Histories, Plan, SequenceModel, Trainer, held_out_gains

Progress = Callable[[str, float], None]

_EPOCHS = 2, 20  # at least and at most
_DROPOUT, _ID_DROPOUT = 0.5, 0.05
_NEGATIVES, _RATE = 1_024, 8e-3
_BATCH, _STEPS = 128, 20  # histories in a step, fewer where an epoch would have fewer steps than that
_VALIDATION = 4_000
_CONTINUED = 0.25  # of the events, when a trained model goes on to learn what came later
_STAGES = "softmax", "through-head", "continued"
_EPISODES_SHARE = 0.3  # of the time, about
_CUTS = 2  # episodes of a task and epoch


@dataclass(frozen=True)
class Recipe:
    """What is trained: the kind of history encoder, the newest `capacity` events it sees, events in all epochs."""

    kind: str = "attention"
    dimension: int = 64
    capacity: int = 50
    layers: int = 2
    positions: int = 1_500_000
    through_head: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Taught:
    """A trained model, and nDCG@10 of what was held out: by softmax alone, and after the episodes."""

    model: SequenceModel
    item_ids: list[str]
    categories: list[str]
    metrics: dict[str, float]
    others: ItemContent
    """Of the items that are described and that it wasn't trained on."""

    def encoder(self, recipe: Recipe) -> SequenceEncoder:
        return SequenceEncoder.of(self.model, recipe.kind, recipe.capacity, recipe.layers, self.others)


def learn_sequences(
    log: Log,
    encoder: Encoder,
    recipe: Recipe,
    *,
    cut: int,
    described: Described,
    tell: Progress,
    checkpoint: Path | None = None,
) -> Taught | None:
    """Learn from the events of `log` up to `cut` (epoch ms), judged by those after it; None if there are too few.

    The items are those of `encoder`; its categories and what is told of items are what one that was never met is known
    by.
    """
    histories = histories_of(log, recipe.capacity, cut)
    learned = int((histories.mask & ~histories.held)[:, 1:].sum())
    if not learned or not bool(histories.held[:, 1:].any()):
        return None
    epochs = _epochs(recipe.positions, learned)
    contents = _Contents.of(encoder, described)
    model = _model(encoder, recipe, contents)
    plan = Plan(
        epochs=epochs,
        batch=_batch(histories),
        negatives=_NEGATIVES,
        learning_rate=_RATE,
        validation_tasks=_VALIDATION,
        seed=recipe.seed,
        content=_digest(encoder, histories, described),
    )
    stage = None if checkpoint is None else checkpoint / _STAGES[0]

    def told(what: str, share: float) -> None:
        tell(what, (1.0 - _EPISODES_SHARE) * share if recipe.through_head else share)

    done = Trainer(model, histories, plan, checkpoint=stage, progress=told).run()
    metrics = {"sequence_epochs": float(done.best_epoch), "sequence_ndcg@10": max(done.scores)}
    if recipe.through_head:
        stage = None if checkpoint is None else checkpoint / _STAGES[1]
        model, reached = _through_head(model, histories, recipe, plan, tell=tell, checkpoint=stage)
        metrics["sequence_head_ndcg@10"] = reached
    return Taught(model, encoder.item_ids, encoder.categories, metrics, contents.others)


def _digest(encoder: Encoder, histories: Histories, described: Described) -> str:
    """Of all that is learned from: a checkpoint of other items or events is not gone on from."""
    parts = (histories.items, histories.lengths, histories.held, encoder.item_categories)
    names = repr((encoder.item_ids, encoder.categories, described.digest()))
    said = [names.encode(), *(part.numpy().tobytes() for part in parts)]
    return hashlib.sha256(b"".join(said)).hexdigest()


def _through_head(
    model: SequenceModel, histories: Histories, recipe: Recipe, plan: Plan, *, tell: Progress, checkpoint: Path | None
) -> tuple[SequenceModel, float]:
    """The same model taught further by episodes, or as it was where that is no better."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = held_out_gains(model, histories, plan)
    model.head = HistoryHead(recipe.dimension).to(model.bias.device)
    further = replace(plan, epochs=3, patience=0, cuts=_CUTS, learning_rate=plan.learning_rate / 4, seed=plan.seed + 1)

    def told(what: str, share: float) -> None:
        tell(what, 1.0 - _EPISODES_SHARE * (1.0 - share))

    Trainer(model, histories, further, checkpoint=checkpoint, progress=told).run()
    reached = held_out_gains(model, histories, plan)
    better = reached - start
    spread = float(better.std()) if len(better) > 1 else math.inf
    if not agreed(float(better.mean()) > spread / len(better) ** 0.5):  # or chance may have it
        model.head = None
        model.load_state_dict(before)
    return model, float(reached.mean())


def continue_learning(
    taught: Taught,
    log: Log,
    encoder: Encoder,
    recipe: Recipe,
    *,
    described: Described,
    tell: Progress,
    checkpoint: Path | None = None,
) -> Taught:
    """Go on from a trained model with a longer history, to which items may have been added; nothing is held out.

    `described` is what the model was trained with.
    """
    contents = _Contents.of(encoder, described)
    model = _model(encoder, recipe, contents)
    _take_over(model, taught, encoder)
    histories = histories_of(log, recipe.capacity, None)
    learned = int(histories.mask[:, 1:].sum())
    if not learned:
        return Taught(model, encoder.item_ids, encoder.categories, taught.metrics, contents.others)
    epochs = max(1, round(_CONTINUED * min(_epochs(recipe.positions, learned), taught.metrics["sequence_epochs"])))
    plan = Plan(
        epochs=epochs,
        batch=_batch(histories),
        negatives=_NEGATIVES,
        learning_rate=_RATE / 2,
        seed=recipe.seed + 2,
        content=_digest(encoder, histories, described),
    )
    if model.head is not None:
        plan = replace(plan, cuts=_CUTS)
    stage = None if checkpoint is None else checkpoint / _STAGES[2]
    Trainer(model, histories, plan, checkpoint=stage, progress=tell).run()
    return Taught(model, encoder.item_ids, encoder.categories, taught.metrics, contents.others)


def forget_checkpoint(directory: Path) -> None:
    """Remove what a finished training left behind: the next one has another history."""
    for stage in _STAGES:
        for file in (directory / stage).glob("training*"):
            file.unlink()


def histories_of(log: Log, capacity: int, cut: int | None) -> Histories:
    """The tasks' events up to `cut` in windows of at most `capacity`; each task's first event after it is held out.

    A held-out event ends the window of the newest events before it; windows are cut from there backwards.
    """
    count = len(log.items)
    at = torch.arange(count)
    early = torch.ones(count, dtype=torch.bool) if cut is None else log.times <= cut
    is_first = log.first == at
    number = torch.cumsum(is_first, 0) - 1  # of the task
    many = torch.zeros(int(is_first.sum()), dtype=torch.int64).index_add_(0, number, early.long())
    step = at - log.first
    used = early | (step == many[number])  # the first after the cut, too
    has_held = torch.zeros_like(many).index_add_(0, number, (used & ~early).long())
    total = many + has_held
    back = (total[number] - 1 - step)[used]  # how many come after it
    row_key = number[used] * (int(back.max()) // capacity + 1 if len(back) else 1) + back // capacity
    _, row = torch.unique(row_key, return_inverse=True)
    lengths = torch.bincount(row)
    offset = back % capacity  # places before the window's end
    column = lengths[row] - 1 - offset
    shape = (len(lengths), max(1, int(lengths.max()) if len(lengths) else 1))
    items, held = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    items[row, column] = log.items[used]
    held[row, column] = ~early[used]
    return Histories(items, lengths, held)


def _batch(histories: Histories) -> int:
    return min(_BATCH, max(1, len(histories) // _STEPS))


def _epochs(positions: int, learned: int) -> int:
    return min(_EPOCHS[1], max(_EPOCHS[0], positions // learned))


@dataclass(frozen=True)
class _Contents:
    """The content of the encoder's items and of the others that are described, and how it is coded."""

    code: ContentCode
    own: ItemContent
    others: ItemContent

    @classmethod
    def of(cls, encoder: Encoder, described: Described) -> "_Contents":
        code = replace(described.code, categories=tuple(encoder.categories))
        others = encoder.described_ids
        of_others = encoder.category_rows_of(described.category_names(others))
        return cls(
            code,
            replace(described.content_of(encoder.item_ids), categories=encoder.item_categories + 1),
            replace(described.content_of(others), categories=of_others + 1),
        )

    @property
    def tell(self) -> bool:
        return bool(self.code.categories or self.code.has_price or self.code.word_buckets)


def _model(encoder: Encoder, recipe: Recipe, contents: _Contents) -> SequenceModel:
    count = len(encoder.item_ids)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        dropout = _ID_DROPOUT if contents.tell else 0.0  # without content nothing can stand in
        items = ItemEncoder(count, recipe.dimension, code=contents.code, id_dropout=dropout)
        history = history_encoder(
            recipe.kind, recipe.dimension, capacity=recipe.capacity, dropout=_DROPOUT, layers=recipe.layers
        )
    model = SequenceModel(items, history, contents.own if contents.tell else None)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def _take_over(model: SequenceModel, taught: Taught, encoder: Encoder) -> None:
    """Put what was taught where its items and categories are now; a new item starts as the unknown identifier."""
    old = taught.model
    rows = {item: row for row, item in enumerate(taught.item_ids)}
    source = torch.tensor([rows.get(item, -1) for item in encoder.item_ids], device=model.bias.device)
    model.items.identifiers.weight[:-1] = old.items.identifiers.weight[source]  # the last row is the unknown's
    model.items.identifiers.weight[-1] = old.items.identifiers.weight[-1]
    if model.items.categories is not None and old.items.categories is not None:
        known = {name: row for row, name in enumerate(taught.categories, 1)}
        of = torch.tensor([known.get(name, 0) for name in encoder.categories], device=model.bias.device)
        model.items.categories.weight[1:] = old.items.categories.weight[of]  # row 0 is zero, the unknown's
    for new, learned in ((model.items.prices, old.items.prices), (model.items.words, old.items.words)):
        if new is not None and learned is not None:
            new.load_state_dict(learned.state_dict())
    low = old.bias.min() if len(old.bias) else 0.0
    model.bias.copy_(torch.where(source >= 0, old.bias[source.clamp(min=0)], low))
    model.history.load_state_dict(old.history.state_dict())
    if old.head is not None:
        model.head = HistoryHead(model.items.identifiers.embedding_dim).to(model.bias.device)
        model.head.load_state_dict(old.head.state_dict())
