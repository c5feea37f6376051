"""A release: everything that serving needs, as two files that name each other.

`release-<version>.safetensors` holds the tensors and the identifiers, `release-<version>.json` is the card: what it was
made from, how good it was, and the SHA-256 of the other file. Nothing in either can run code. The card is written last,
so a card on disk means a whole release.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from innerloop.errors import SettingsError
from innerloop.learning.ads.ad_model import AdModel
from innerloop.learning.blend import WEIGHTS
from innerloop.learning.candidates import FEATURES, PLAIN
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads import RESTORE, Head
from innerloop.learning.ranker import Ranker
from innerloop.learning.sequence_encoder import SequenceEncoder
from innerloop.learning.transitions import Transitions
from innerloop.learning.whole_file import write_whole

_UNREADABLE = (
    LookupError,
    ValueError,
    TypeError,
    RuntimeError,
    msgspec.MsgspecError,
    safetensors.SafetensorError,
)
"""What parts raise of which they know nothing: names, kinds and shapes of another version."""
_HEAD, _RANKER, _ADS, _SEQUENCE, _TRANSITIONS = "head.", "ranker.", "ads.", "sequence.", "transitions."


class DataSummary(msgspec.Struct, frozen=True):
    """What the release was learned from; times are epoch milliseconds."""

    events: int
    users: int
    items: int
    first_event_time: int
    last_event_time: int


class Card(msgspec.Struct, frozen=True):
    """`metrics` are those of held-out clicks, `settings` include what was chosen on others of them."""

    version: int
    created: str
    method: str
    dimension: int
    data: DataSummary
    metrics: dict[str, float]
    settings: dict[str, float | int | None]
    innerloop: str
    sha256: str = ""


@dataclass(frozen=True)
class Release:
    card: Card
    encoder: Encoder
    head: Head
    ranker: Ranker | None = None
    """Those that are trained have one; without, lists are what the head alone likes best."""
    ads: AdModel | None = None
    """Without one, ads are ranked by the head, and their scores are no probabilities."""
    sequence: SequenceEncoder | None = None
    """What a task's items in their order make likely; its table has the rows of `encoder`."""
    transitions: Transitions | None = None
    """What followed what, by rows of `encoder`; there is one where there is a sequence model."""

    @property
    def version(self) -> int:
        return self.card.version

    @property
    def item_ids(self) -> list[str]:
        return self.encoder.item_ids

    @property
    def item_vectors(self) -> Tensor:
        """The vectors of `item_ids`, [N, d] float32."""
        return self.encoder.vectors

    def vectors_for(self, item_ids: Sequence[str], categories: Sequence[str | None] | None = None) -> Tensor:
        """Return the vectors [N, d] of any items, known to the release or not."""
        return self.encoder.vectors_for(item_ids, categories)

    def sequence_vectors_for(self, item_ids: Sequence[str], categories: Sequence[str | None]) -> Tensor:
        """The sequence model's vectors [N, e] of any items. Only for a release that has one."""
        assert self.sequence is not None  # noqa: S101 - asked for by who saw it
        rows = self.encoder.rows_of(item_ids)
        unseen = self.sequence.unseen_vectors(self.encoder.category_rows_of(categories))
        described = self.encoder.described_rows_of(item_ids)
        unseen[described >= 0] = self.sequence.described[described[described >= 0]]
        if not len(self.sequence.vectors):
            return unseen
        return torch.where((rows >= 0).unsqueeze(1), self.sequence.vectors[rows.clamp(min=0)], unseen)


def save(release: Release, directory: Path | str) -> Path:
    """Write both files, each under a temporary name first, and return the card's path.

    Raises SettingsError when the directory can't be written to.
    """
    directory, name = Path(directory), f"release-{release.version}"
    tensors = {f"{_HEAD}{key}": value for key, value in release.head.state().items()} | {
        "item_vectors": release.encoder.vectors,
        "item_ids": _as_tensor(release.encoder.item_ids),
        "category_vectors": release.encoder.category_vectors,
        "categories": _as_tensor(release.encoder.categories),
        "item_categories": release.encoder.item_categories,
        "described_ids": _as_tensor(release.encoder.described_ids),
        "described_vectors": release.encoder.described_vectors,
    }
    if release.ranker is not None:
        tensors |= {f"{_RANKER}{key}": value for key, value in release.ranker.state().items()}
    if release.ads is not None:
        tensors |= {f"{_ADS}{key}": value for key, value in release.ads.state().items()}
    if release.sequence is not None:
        tensors |= {f"{_SEQUENCE}{key}": value for key, value in release.sequence.state().items()}
    if release.transitions is not None:
        tensors |= {f"{_TRANSITIONS}{key}": value for key, value in release.transitions.state().items()}
    content = safetensors.torch.save({key: value.cpu().contiguous() for key, value in tensors.items()})
    card = msgspec.structs.replace(release.card, sha256=hashlib.sha256(content).hexdigest())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / f"{name}.safetensors", content)
        write_whole(directory / f"{name}.json", msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n")
    except OSError as error:
        raise SettingsError(f"Release {release.version} cannot be written to {directory}: {error.strerror}.") from None
    return directory / f"{name}.json"


def load(card_path: Path | str, registered: Mapping[str, object] | None = None) -> Release:
    """Read and check a release. Raises SettingsError when a file is missing, was changed, or doesn't fit together.

    `registered` is the card as the database has it: who can write to the directory, and to nothing else, could put
    another release there whose own card names its tensors.
    """
    card_path = Path(card_path)
    card = _read_card(card_path, registered)
    content = _read(card_path.with_suffix(".safetensors"))
    if hashlib.sha256(content).hexdigest() != card.sha256:
        raise SettingsError(f"The tensors of {card_path} are not those its card was written for: fetch both again.")
    try:
        tensors = safetensors.torch.load(content)
        encoder = Encoder(
            item_ids=_as_names(tensors["item_ids"]),
            vectors=tensors["item_vectors"],
            categories=_as_names(tensors["categories"]),
            category_vectors=tensors["category_vectors"],
            item_categories=tensors["item_categories"],
            **_described(tensors),
        )
        head = RESTORE[card.method](_part(tensors, _HEAD))
        ranked = _part(tensors, _RANKER)
        ranker = Ranker.restore(ranked) if ranked else None
        of_ads = _part(tensors, _ADS)
        ads = AdModel.restore(of_ads) if of_ads else None
        of_sequence, of_transitions = _part(tensors, _SEQUENCE), _part(tensors, _TRANSITIONS)
        sequence = SequenceEncoder.restore(of_sequence) if of_sequence else None
        transitions = Transitions.restore(of_transitions) if of_transitions else None
    except _UNREADABLE as error:
        raise SettingsError(f"{card_path} is no release that this version can read: {error!r}.") from None
    _check_shapes(card, encoder, head, ranker, card_path, has_sequence=sequence is not None)
    for fault in () if ads is None else ads.faults(len(encoder.item_ids), len(encoder.categories)):
        raise SettingsError(f"{card_path} has an ad model with {fault}: train it again.")
    counts = len(encoder.item_ids), len(encoder.categories), len(encoder.described_ids)
    faults = () if sequence is None else sequence.faults(*counts)
    for fault in (*faults, *(() if transitions is None else transitions.faults(len(encoder.item_ids)))):
        raise SettingsError(f"{card_path} has a sequence model with {fault}: train it again.")
    return Release(card, encoder, head, ranker, ads, sequence, transitions)


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of items beside the table; a release of before there were any has none."""
    if "described_ids" not in tensors:
        return {}
    return {
        "described_ids": _as_names(tensors["described_ids"]),
        "described_vectors": tensors["described_vectors"],
    }


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _check_shapes(
    card: Card, encoder: Encoder, head: Head, ranker: Ranker | None, path: Path, *, has_sequence: bool
) -> None:
    d = card.dimension
    expected = {
        "item vectors": (encoder.vectors, (len(encoder.item_ids), d)),
        "category vectors": (encoder.category_vectors, (len(encoder.categories), d - 2)),
        "vectors of described items": (encoder.described_vectors, (len(encoder.described_ids), d - 2)),
        "prior": (head.prior, (d,) if head.linear else tuple(head.prior.shape)),
    }
    if ranker is not None:
        count = (len(FEATURES) if has_sequence else PLAIN,)
        expected |= {"means of its ranker": (ranker.mean, count), "scales of its ranker": (ranker.scale, count)}
        expected |= {} if ranker.blend is None else {"blend of its ranker": (ranker.blend, tuple(WEIGHTS.shape))}
        expected |= {f"{name} of its ranker": (t, tuple(t.shape)) for name, t in ranker.network.state_dict().items()}
    for what, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise SettingsError(f"{path} has {what} that are not finite float32 of shape {shape}: train it again.")
    rows, known = encoder.item_categories, len(encoder.categories)
    if (
        rows.shape != (len(encoder.item_ids),)
        or rows.dtype != torch.int64
        or not bool(((rows >= -1) & (rows < known)).all())
    ):
        raise SettingsError(f"{path} has categories of items that are not one of its {known} each: train it again.")


def _read_card(path: Path, registered: Mapping[str, object] | None) -> Card:
    content = _read(path)
    try:
        if registered is not None and msgspec.json.decode(content) != registered:
            raise SettingsError(
                f"{path} is not the card that was registered in the database: find out who changed it, or train again."
            )
        return msgspec.json.decode(content, type=Card)
    except msgspec.MsgspecError as error:
        raise SettingsError(f"{path} is no release card: {error}.") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(
            f"{path} cannot be read ({error.strerror}): run innerloop train or name a release."
        ) from None


def _as_tensor(names: Sequence[str]) -> Tensor:
    return torch.frombuffer(bytearray(msgspec.json.encode(list(names))), dtype=torch.uint8)


def _as_names(tensor: Tensor) -> list[str]:
    return msgspec.json.decode(tensor.numpy().tobytes(), type=list[str])
