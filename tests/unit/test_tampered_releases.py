"""A release that is not the one that was trained and registered is refused, whichever of its files was changed."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors.torch
import torch

from innerloop.errors import SettingsError
from innerloop.learning.encoder import Encoder
from innerloop.learning.heads.bayes import BayesHead
from innerloop.learning.releases import Card, DataSummary, Release, load, save


def small_release(seed: int, version: int = 1) -> Release:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)
    encoder = Encoder([f"i{n}" for n in range(6)], vectors, [], torch.zeros(0, 6), torch.full((6,), -1))
    precision = torch.eye(8, dtype=torch.float64)
    head = BayesHead.from_prior(
        torch.zeros(8), precision, (vectors.T @ vectors).double(), alpha=0.1, noise=0.2, half_life=3_600.0
    )
    data = DataSummary(events=1, users=1, items=6, first_event_time=0, last_event_time=0)
    card = Card(version, "2025-06-15T00:00:00+00:00", head.name, 8, data, {"ndcg": 1 / 3}, {"seed": seed}, "test")
    return Release(card, encoder, head)


Tampering = Callable[[Path, Path], None]
"""Takes the card of the release in force and the card of another one."""


def flip_a_byte(card: Path, _other: Path) -> None:
    tensors = card.with_suffix(".safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)


def swap_the_tensors(card: Path, other: Path) -> None:
    other.with_suffix(".safetensors").replace(card.with_suffix(".safetensors"))


def swap_both(card: Path, other: Path) -> None:
    swap_the_tensors(card, other)
    other.replace(card)


def change_the_tensors_and_their_hash(card: Path, other: Path) -> None:
    swap_the_tensors(card, other)
    digest = hashlib.sha256(card.with_suffix(".safetensors").read_bytes()).hexdigest()
    edit(card, sha256=digest)


def change_the_card(card: Path, _other: Path) -> None:
    edit(card, metrics={"ndcg": 0.9})


def add_to_the_card(card: Path, _other: Path) -> None:
    edit(card, note="trust me")


def put_a_pickle_there(card: Path, _other: Path) -> None:
    content = pickle.dumps(Bomb(card.with_name("exploded")))
    card.with_suffix(".safetensors").write_bytes(content)
    edit(card, sha256=hashlib.sha256(content).hexdigest())


def edit(card: Path, **changes: Any) -> None:
    card.write_text(json.dumps({**json.loads(card.read_text()), **changes}))


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (flip_a_byte, "not those its card was written for"),
        (swap_the_tensors, "not those its card was written for"),
        (swap_both, "not the card that was registered"),
        (change_the_tensors_and_their_hash, "not the card that was registered"),
        (change_the_card, "not the card that was registered"),
        (add_to_the_card, "not the card that was registered"),
        (put_a_pickle_there, "not the card that was registered"),
    ],
)
def test_a_release_that_was_tampered_with_is_refused(tmp_path: Path, tamper: Tampering, says: str) -> None:
    card = save(small_release(1), tmp_path / "releases")
    registered = as_the_database_gives_it(card)
    assert load(card, registered).version == 1
    tamper(card, save(small_release(2), tmp_path / "others"))
    with pytest.raises(SettingsError, match=says) as raised:
        load(card, registered)
    assert "\n" not in str(raised.value)
    assert not card.with_name("exploded").exists()


def as_the_database_gives_it(card: Path) -> dict[str, Any]:
    """What is registered is what the file holds, by way of JSON."""
    registered: dict[str, Any] = json.loads(json.dumps(msgspec.json.decode(card.read_bytes())))
    assert registered["sha256"] == hashlib.sha256(card.with_suffix(".safetensors").read_bytes()).hexdigest()
    return registered


def test_a_release_of_a_later_kind_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """Kinds are numbers in it: one that is not known here is no place in our list of them."""
    card = save(small_release(1), tmp_path)
    tensors = card.with_suffix(".safetensors")
    content = safetensors.torch.load_file(tensors)
    content["head.numbers"][2] = 7  # its likelihood
    safetensors.torch.save_file(content, tensors)
    edit(card, sha256=hashlib.sha256(tensors.read_bytes()).hexdigest())
    with pytest.raises(SettingsError, match="no release that this version can read"):
        load(card)


def test_a_pickle_is_not_even_read_where_nothing_is_registered(tmp_path: Path) -> None:
    card = save(small_release(1), tmp_path)
    put_a_pickle_there(card, card)
    with pytest.raises(SettingsError, match="is no release that this version can read"):
        load(card)
    assert not card.with_name("exploded").exists()


def test_a_name_in_a_release_is_only_a_name(tmp_path: Path) -> None:
    """Tensors under names nobody asked for, a path among them, are left alone."""
    card = save(small_release(1), tmp_path)
    tensors = card.with_suffix(".safetensors")
    more = {**safetensors.torch.load(tensors.read_bytes()), "../../escape": torch.zeros(1)}
    content = safetensors.torch.save(more)
    tensors.write_bytes(content)
    edit(card, sha256=hashlib.sha256(content).hexdigest())
    before = sorted(tmp_path.rglob("*"))
    assert load(card).version == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_version_is_part_of_what_is_registered(tmp_path: Path) -> None:
    card = save(small_release(1, version=2), tmp_path)
    registered = as_the_database_gives_it(card)
    older = save(replace(small_release(1), card=small_release(1).card), tmp_path)
    with pytest.raises(SettingsError, match="not the card that was registered"):
        load(older, registered)
