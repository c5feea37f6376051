"""What `innerloop evaluate` makes of its command line, and what it refuses before anything is read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from innerloop.config import SEQUENCES, LearningSettings
from innerloop.errors import SettingsError
from innerloop.evaluation.conversion import protocol as conversion
from innerloop.evaluation.outcome import Outcome
from innerloop.evaluation.report import require_writable
from innerloop.evaluation.sequence import protocol as sequence
from innerloop.evaluation.slate import protocol as slate
from innerloop.evaluation.stream import protocol as stream
from innerloop.evaluation.stream.options import FLAGS, PRESETS, StreamOptions, as_typed
from innerloop.worker.columns import columns_of
from innerloop.worker.evaluate import app

Runs = list[tuple[tuple[object, ...], dict[str, object]]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What the protocols were run with, which do nothing but answer."""
    asked: Runs = []

    def run(*given: object, **named: object) -> Outcome:
        asked.append((given, named))
        return Outcome(np.arange(3), frozenset(), {"default": {"hit": np.ones(3)}})

    for module in (stream, conversion, slate, sequence):
        monkeypatch.setattr(module, "run", run)
    return asked


def _evaluate(*command: str, report: Path) -> str:
    done = CliRunner().invoke(app, [*command, "--data", "events.csv", "--report", str(report), "--draws", "20"])
    if done.exception is not None:
        raise done.exception
    return done.output


def _refused(*command: str, report: Path) -> str:
    with pytest.raises(SettingsError) as error:
        _evaluate(*command, report=report)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# --- where the report goes


@pytest.mark.parametrize("protocol", ["stream", "conversion", "slate"])
def test_a_report_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path, runs: Runs, protocol: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "report.html").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "taken", Path("/proc/innerloop")):
        assert "name another folder with --report" in _refused(protocol, report=folder)
    assert runs == []
    assert (tmp_path / "file").read_bytes() == b""


def test_looking_whether_a_report_can_be_written_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "report.json").write_text("{}")
    require_writable(tmp_path)
    assert (tmp_path / "report.json").read_text() == "{}"


def test_of_a_disk_that_fills_meanwhile_one_sentence_is_said_and_the_figures_are_shown(
    tmp_path: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_given: object, **_named: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = CliRunner().invoke(app, ["slate", "--data", "d", "--report", str(tmp_path), "--draws", "20"])
    assert len(runs) == 1
    assert isinstance(done.exception, SettingsError)
    assert str(done.exception).startswith(f"The report cannot be written to {tmp_path} (No space left on device)")
    assert "default" in done.stdout
    assert "Written" not in done.stdout


# --- options of stream


def test_a_preset_is_what_its_help_says_to_type(tmp_path: Path, runs: Runs) -> None:
    for name, preset in PRESETS.items():
        _evaluate("stream", "--preset", name, report=tmp_path)
        _evaluate("stream", *as_typed(preset).split(), report=tmp_path)
        bundled, typed = (given[1] for given, _ in runs[-2:])
        assert bundled == preset
        assert typed == replace(preset, most_warm_up=None)


def _help(command: str) -> Mapping[str, tuple[str, str]]:
    """By option its help, and the default that is shown."""
    group = typer.main.get_command(app)
    options = group.commands[command].params  # type: ignore[attr-defined]
    return {option.opts[0]: (option.help, str(option.show_default)) for option in options}


def test_the_help_names_what_presets_and_defaults_are() -> None:
    shown = _help("stream")
    said, _ = shown["--preset"]
    for name, preset in PRESETS.items():
        assert f"{name}: {as_typed(preset)}" in said
    assert "--every 5 --warm-up 300000 --hits 10 --hits 20 --reciprocal 10" in said
    assert "of data with less than 2 times that warm-up the first 30% of the events" in said
    defaults = {flag: default for flag, (_, default) in shown.items()}
    for name, flag in FLAGS.items():
        value = getattr(StreamOptions(), name)
        usual = "the first 30% of the events" if value is None else {False: "no"}.get(value, str(value).strip("(),'"))
        assert defaults[flag] == usual
    assert all(kind in shown["--sequence"][0] for kind in SEQUENCES)


def test_sequence_models_are_those_of_the_settings(tmp_path: Path, runs: Runs) -> None:
    for kind in SEQUENCES:
        assert LearningSettings(sequence=kind).sequence == kind
        _evaluate("stream", "--sequence", kind, report=tmp_path)
    assert len(runs) == len(SEQUENCES)
    said = _refused("stream", "--sequence", "foo", report=tmp_path)
    assert said.startswith("There is no sequence model foo: choose one of auto, off,")
    assert len(runs) == len(SEQUENCES)


def test_a_rate_through_kafka_has_an_end(tmp_path: Path, runs: Runs) -> None:
    assert "events per second" in _refused("stream", "--through-kafka", "--rate", "inf", report=tmp_path)
    assert runs == []


@pytest.mark.parametrize("seed", ["-1", str(2**32)])
def test_a_seed_that_a_generator_does_not_take_is_refused(tmp_path: Path, runs: Runs, seed: str) -> None:
    done = CliRunner().invoke(app, ["stream", "--data", "d", "--report", str(tmp_path), "--seed", seed])
    assert done.exit_code == 2
    assert "--seed" in done.output
    assert runs == []


# --- columns


@pytest.mark.parametrize("protocol", ["stream", "conversion", "sequence"])
def test_columns_are_mapped(tmp_path: Path, runs: Runs, protocol: str) -> None:
    _evaluate(protocol, "--column", "item_id=sku", "--column", "user_id=who", report=tmp_path)
    _evaluate(protocol, report=tmp_path)
    assert [named["columns"] for _, named in runs] == [{"item_id": "sku", "user_id": "who"}, {}]
    assert "--column item_id is not ours=theirs" in _refused(protocol, "--column", "item_id", report=tmp_path)


@pytest.mark.parametrize("pair", ["", "=", "a", "a=", "=b"])
def test_a_column_that_maps_nothing_is_refused(pair: str) -> None:
    with pytest.raises(SettingsError, match="is not ours=theirs"):
        columns_of([pair])


def _quiet(_what: str, _share: float) -> None: ...


@pytest.mark.parametrize(
    "run",
    [
        lambda path, columns: stream.run(path, StreamOptions(), columns=columns, tell=_quiet),
        lambda path, columns: stream.run(path, StreamOptions(), columns=columns, history=path, tell=_quiet),
        lambda path, columns: conversion.run(path, seed=0, columns=columns, tell=_quiet),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_a_column_that_is_not_found_is_mapped_where_it_is_said(
    tmp_path: Path,
    run: Callable[[Path, dict[str, str] | None], object],
    folder: bool,  # noqa: FBT001
) -> None:
    file = tmp_path / "events.csv"
    file.write_text("user_id,thing,event_time,event_type\nu,a,1,click\nu,b,2,purchase\n")
    path = tmp_path if folder else file
    with pytest.raises(SettingsError, match="none of which is known as item_id: map one with --column item_id=NAME"):
        run(path, {})
    with pytest.raises(SettingsError, match=r"known as item_id: rename one\."):
        run(path, None)
    with pytest.raises(SettingsError) as error:  # it reads them, and finds too few
        run(path, {"item_id": "thing"})
    assert "known as" not in str(error.value)
