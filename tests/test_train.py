"""train.py from the outside: what it writes, what it refuses, and how it stops."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import dataset
import model
import train
from hparams import InputError, from_dict, hparams
from learning import planning, sampling, validation
from learning import run as training
from learning.ranks import World
from separation import Separator
from tools import publish

TRAIN = Path(__file__).parent.parent / "train.py"
SMALL = {
    "width": 2,
    "model_type": "convnet",
    "epochs": 2,
    "chunk_slices": 32,
    "valid_seconds": 2,
    "stft_frames": 9,
}


def settings(**changes: object) -> list[str]:
    return [f"--set={name}={value}" for name, value in (SMALL | changes).items()]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """Undo what a shell does to the tests when it starts them in the background: no Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(toy_dataset, tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("whole"))
    try:
        assert train.main([str(toy_dataset), *settings()]) == 0
        return Path("runs/convnet").absolute()
    finally:
        os.chdir(before)


def weights_equal(ours: Path, theirs: Path) -> bool:
    ours, theirs = (model.load_checkpoint(path)["weights"] for path in (ours, theirs))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def with_songs(source: Path, folder: Path, keep: Callable[[dict], object], **changes) -> Path:
    """Make a dataset of some of the songs of another."""
    (folder / "songs").mkdir(parents=True)
    about = json.loads((source / dataset.MANIFEST).read_text())
    about["songs"] = [one | changes for one in about["songs"] if keep(one)]
    for one in about["songs"]:
        (folder / one["file"]).symlink_to(source / one["file"])
    (folder / dataset.MANIFEST).write_text(json.dumps(about))
    return folder


def listing(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- A run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--all-songs"]])
def test_songs_of_the_test_split_are_learnt_from_on_demand_only(toy_dataset, tmp_path, flags):
    about = json.loads((toy_dataset / dataset.MANIFEST).read_text())["songs"]
    apart = next(one["id"] for one in about if one["split"] == "train")
    data = with_songs(toy_dataset, tmp_path / "data", lambda one: one["id"] != apart)
    held = with_songs(toy_dataset, tmp_path / "held", lambda one: one["id"] == apart)
    run = ["--validate-on", str(held), "--set", "steps=1"]
    assert train.main([str(data), *settings(), *run, *flags]) == 0
    learnt = model.load_checkpoint(Path("runs/convnet/last.pth"))["data"]
    expected = {one["id"] for one in about if one["split"] == "train" or flags} - {apart}
    assert {entry.rsplit(" ", 1)[0] for entry in learnt} == expected


def test_a_run_writes_networks_that_separate_songs(whole, toy_tree):
    for name in ("best.pth", "last.pth"):
        separator = Separator.load(whole / name)
        wav = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 5000)).astype(np.float32)
        vocals, rest = separator.separate(wav, 44100)
        np.testing.assert_allclose(vocals + rest, wav, atol=1e-6)
    names = sorted(p.name.split(".")[0] for p in whole.iterdir())
    assert names == ["best", "curves", "events", "last", "previous"]
    curves = xml.etree.ElementTree.parse(whole / "curves.svg").getroot()
    words = {element.text for element in curves.iter() if element.text}
    assert {"Loss", "train", "held out", "soft", "binary", "the mixture itself"} <= words


def test_a_checkpoint_says_how_it_was_made(whole, toy_dataset):
    last = model.load_checkpoint(whole / "last.pth")
    assert last["hparams"] == asdict(hparams) | SMALL
    ids = {f"{s.id} {s.sha256}" for s in dataset.load_manifest(toy_dataset).songs}
    assert len(last["data"]) == 2, "of three songs to train, one is held out"
    assert set(last["data"]) < ids
    assert set(last["scores"]) == {"loss", "soft", "binary"}
    assert last["step"] == last["resume"]["scheduler"]["last_epoch"]
    assert (last["resume"]["epoch"], last["resume"]["batch"]) == (2, 0)
    assert [set(epoch) for epoch in last["resume"]["history"]] == 2 * [
        {"step", "loss/train", "loss", "soft", "binary"}
    ]
    assert last["resume"]["history"][-1]["step"] == last["step"]
    assert last["resume"]["processes"] == 1
    best = model.load_checkpoint(whole / "best.pth")
    assert "resume" not in best
    found = max(best["scores"]["soft"], best["scores"]["binary"])
    assert found == last["resume"]["best_db"]
    assert best["mask_settings"]["mask_at_eval"] == (
        best["scores"]["binary"] > best["scores"]["soft"]
    )


def test_a_run_tells_its_songs_bounds_and_epochs(toy_dataset, capsys):
    assert train.main([str(toy_dataset), *settings(epochs=1), "--name", "x", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("device: CPU, ")
    assert lines[1] == "learn from 2 songs of 2 singers or bands, 0.1 min, 690 slices"
    assert lines[2] == "validate on 1 songs of 1 singers or bands, 0.1 min, 345 slices"
    size = r"\d+\.\d\d GB"
    assert re.fullmatch(
        rf"dataset: {size}, in the memory of the machine \({size} free; a step takes {size}\)",
        lines[3],
    )
    assert re.fullmatch(r"convnet, width 2: 0\.\d\d million weights; \d+ steps, 1 epochs", lines[4])
    number = r"-?\d+\.\d\d dB"
    assert re.fullmatch(
        rf"held-out vocals, SI-SDR: floor {number}, ideal_binary {number}, ideal_ratio {number}",
        lines[5],
    )
    assert re.match(r"epoch   1  train -?0\.\d{4}  valid -?\d\.\d{4}  SI-SDR soft", lines[6])
    assert lines[7] == "the run is in runs/x"
    assert len(lines) == 8


def test_the_same_command_gives_the_same_weights(toy_dataset, whole):
    assert train.main([str(toy_dataset), *settings()]) == 0
    assert weights_equal(Path("runs/convnet/last.pth"), whole / "last.pth")
    assert weights_equal(Path("runs/convnet/best.pth"), whole / "best.pth")


def test_the_best_network_is_that_of_the_epoch_that_sounded_best(toy_dataset, monkeypatch):
    found = iter([(1.0, 0.0), (2.0, 3.0), (2.5, 0.0)])  # SI-SDR with the soft and the binary mask

    def scripted(*_args) -> dict[str, float]:
        return dict(zip(("soft", "binary"), next(found), strict=True), loss=0.5)

    monkeypatch.setattr(validation, "validate", scripted)
    assert train.main([str(toy_dataset), *settings(epochs=3)]) == 0
    best = model.load_checkpoint(Path("runs/convnet/best.pth"))
    last = model.load_checkpoint(Path("runs/convnet/last.pth"))
    assert best["scores"] == {"soft": 2, "binary": 3, "loss": 0.5}
    assert best["mask_settings"]["mask_at_eval"]
    assert not last["mask_settings"]["mask_at_eval"]
    assert last["resume"]["best_db"] == 3
    assert best["step"] < last["step"]


def test_with_no_held_out_voice_the_loss_decides_which_network_is_best(toy_dataset):
    songs = dataset.load_manifest(toy_dataset).songs
    folder = with_songs(toy_dataset, Path("silent"), lambda one: one["split"] == "test")
    (silent,) = dataset.load_manifest(folder).songs
    array = np.load(folder / silent.file)
    array[:, 0] = 0
    (folder / silent.file).unlink()
    np.save(folder / silent.file, array)
    assert len(songs) == 4
    argv = [str(toy_dataset), "--validate-on", str(folder), *settings()]
    # Its hash is that of the song it was made from, which is not learnt from.
    assert train.main(argv) == 0
    best = model.load_checkpoint(Path("runs/convnet/best.pth"))
    last = model.load_checkpoint(Path("runs/convnet/last.pth"))
    assert np.isnan(best["scores"]["soft"])
    assert -last["resume"]["best_db"] == best["scores"]["loss"] <= last["scores"]["loss"]


def test_other_songs_are_validated_on_if_named(toy_dataset, capsys):
    hidden = with_songs(toy_dataset, Path("hidden"), lambda one: one["split"] == "test")
    argv = [str(toy_dataset), *settings(epochs=1)]
    assert train.main([*argv, "--validate-on", str(hidden)]) == 0
    out = capsys.readouterr().out
    assert "learn from 3 songs" in out
    assert "validate on 1 songs" in out
    assert len(model.load_checkpoint(Path("runs/convnet/last.pth"))["data"]) == 3
    voices = with_songs(toy_dataset, Path("same"), lambda one: one["split"] == "train")
    assert train.main([*argv, "--name=same", "--validate-on", str(voices)]) == 1
    assert "none of 3 songs to validate on" in capsys.readouterr().err


def test_a_run_ends_at_the_step_it_is_told_and_is_validated_there(toy_dataset, capsys):
    argv = [str(toy_dataset), *settings(steps=4), "--dataset-on=disk"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "read from disk ahead of the steps (" in out
    assert "GB free, as asked;" in out
    assert "; 4 steps, 1.33 epochs\n" in out
    last = model.load_checkpoint(Path("runs/convnet/last.pth"))
    assert last["step"] == last["hparams"]["steps"] == 4
    assert [epoch["step"] for epoch in last["resume"]["history"]] == [3, 4]
    assert last["scores"]["loss"] == last["resume"]["history"][1]["loss"]


def test_a_number_of_minutes_becomes_a_number_of_steps_which_a_resumed_run_keeps(
    toy_dataset, monkeypatch, capsys
):
    asked, last = [], Path("runs/convnet/last.pth")
    monkeypatch.setattr(planning, "steps_in", lambda _run, minutes: asked.append(minutes) or 5)
    with monkeypatch.context() as patch:
        send_at(2, signal.SIGTERM, patch)
        assert train.main([str(toy_dataset), *settings(), "--minutes=1.5"]) == 143
    assert asked == [1.5]
    assert model.load_checkpoint(last)["hparams"]["steps"] == 5
    again = [toy_dataset, "--checkpoint", last, "--minutes=3"]
    assert "--minutes: a resumed run keeps its number of steps" in refused(capsys, *again, code=2)
    assert train.main([str(toy_dataset), "--checkpoint", str(last)]) == 0
    assert model.load_checkpoint(last)["step"] == 5
    monkeypatch.setattr(planning, "steps_in", lambda _run, _minutes: 2)
    assert train.main([*map(str, again), "--adapt", "--name=anew"]) == 0
    assert model.load_checkpoint(Path("runs/anew/last.pth"))["step"] == 2


def test_the_measurement_of_a_runs_speed_leaves_no_trace_in_it(toy_dataset, monkeypatch):
    monkeypatch.setattr(planning, "MEASURE_SECONDS", 0)
    measure = planning.steps_in
    monkeypatch.setattr(planning, "steps_in", lambda *args: min(4, measure(*args)))
    assert train.main([str(toy_dataset), *settings(), "--minutes=1", "--name=measured"]) == 0
    assert train.main([str(toy_dataset), *settings(steps=4), "--name=told"]) == 0
    assert weights_equal(Path("runs/measured/last.pth"), Path("runs/told/last.pth"))


def test_the_range_test_draws_a_picture_and_trains_nothing(toy_dataset, monkeypatch, capsys):
    monkeypatch.setattr(planning, "FIND_LR_STEPS", 30)
    kept = Path("runs/convnet/last.pth")
    for what in ("a new folder", "one that holds a run"):
        assert train.main([str(toy_dataset), *settings(), "--find-lr"]) == 0, what
        out = capsys.readouterr().out
        number = r"(\d(?:\.\d)?e?-?\d*)"
        found = re.search(rf"suggested: --set learning_rate={number} \(runs/convnet/find_lr", out)
        assert 1e-6 <= float(found[1]) <= 1
        drawn = xml.etree.ElementTree.parse("runs/convnet/find_lr.svg").getroot()
        assert {"loss", "suggested"} <= {element.text for element in drawn.iter()}
        expected = [path for path in ("runs/convnet/last.pth",) if kept.exists()]
        assert [path for path in listing() if path.endswith(".pth")] == expected
        kept.write_bytes(b"precious")
    assert kept.read_bytes() == b"precious"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_that_is_none_is_wrong_usage(toy_dataset, capsys, minutes):
    with pytest.raises(SystemExit) as error:
        train.main([str(toy_dataset), f"--minutes={minutes}"])
    assert error.value.code == 2
    assert "--minutes" in capsys.readouterr().err


def test_curves_that_cannot_be_drawn_end_no_run(toy_dataset, capsys):
    Path("runs/convnet/curves.svg").mkdir(parents=True)
    assert train.main([str(toy_dataset), *settings(epochs=1)]) == 0
    assert re.search(r"^[^\n]*: warning: [^\n]*curves.svg[^\n]*\n$", capsys.readouterr().err)


# --- Refusals -----------------------------------------------------------------------------------


def refused(capsys, *argv: object, code: int = 1) -> str:
    """Run with bad input; returns the one line it says, and makes sure that nothing is written."""
    before = listing()
    capsys.readouterr()
    assert train.main([str(one) for one in argv]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert [path for path in listing() if path not in before and not Path(path).is_dir()] == []
    return lines[0]


def test_a_run_is_not_overwritten_unasked(toy_dataset, capsys):
    argv = [toy_dataset, *settings(epochs=1)]
    assert train.main([*map(str, argv)]) == 0
    first = Path("runs/convnet/last.pth").read_bytes()
    assert "runs/convnet: holds a run (--name another one, --overwrite it, or resume it" in refused(
        capsys, *argv
    )
    assert Path("runs/convnet/last.pth").read_bytes() == first
    (old,) = Path("runs/convnet").glob("events*")
    Path("runs/convnet/previous.pth").write_bytes(b"of the old run")
    assert train.main([*map(str, argv), "--overwrite", "--set=seed=1"]) == 0
    assert Path("runs/convnet/last.pth").read_bytes() != first
    (new,) = Path("runs/convnet").glob("events*")
    assert new != old, "old curves do not mix with the new"
    assert Path("runs/convnet/previous.pth").read_bytes() not in (b"of the old run", first)


def test_an_overwritten_run_is_kept_until_the_new_one_is_saved(toy_dataset, monkeypatch):
    argv = [str(toy_dataset), *settings(epochs=1)]
    assert train.main(argv) == 0
    first = Path("runs/convnet/last.pth").read_bytes()

    def fail(*_args) -> None:
        raise InputError("the first step fails")

    monkeypatch.setattr(training, "train_step", fail)
    again = ["--checkpoint", "runs/convnet/last.pth", "--adapt", "--set=seed=1"]
    assert train.main([str(toy_dataset), *again]) == 1
    assert Path("runs/convnet/last.pth").read_bytes() == first, "not overwritten unasked"
    assert train.main([str(toy_dataset), *again, "--overwrite"]) == 1
    assert Path("runs/convnet/previous.pth").read_bytes() == first
    assert model.load_checkpoint(Path("runs/convnet/last.pth"))["step"] == 0


def test_a_finished_run_that_could_not_be_saved_has_failed(toy_dataset, monkeypatch, capsys):
    fill_disk(monkeypatch, [False, True, True])  # best.pth is written, last.pth is not
    assert train.main([str(toy_dataset), *settings(epochs=1)]) == 1
    assert "is not saved; what was saved before is untouched" in capsys.readouterr().err


def test_two_runs_cannot_write_into_one_folder(toy_dataset, capsys):
    Path("runs/convnet").mkdir(parents=True)
    with train.locked(Path("runs/convnet"), World()):
        assert "another run writes there" in refused(capsys, toy_dataset, *settings(epochs=1))


@pytest.mark.parametrize("name", ["", "../out", "a/b"])
def test_the_name_of_a_run_is_no_path(toy_dataset, capsys, name):
    assert "a name, not a path" in refused(capsys, toy_dataset, "--name", name, code=2)


def test_a_best_network_kept_without_its_run_is_not_overwritten_either(toy_dataset, capsys):
    kept = Path("runs/convnet/best.pth")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"precious")
    assert "holds a run" in refused(capsys, toy_dataset, *settings(epochs=1))
    assert kept.read_bytes() == b"precious"


def test_a_run_resumed_under_another_name_is_judged_on_its_own(toy_dataset):
    argv = [str(toy_dataset), *settings(epochs=2, schedule="constant")]
    assert train.main([*argv, "--name", "first"]) == 0
    interrupted = model.load_checkpoint(Path("runs/first/last.pth"))
    interrupted["resume"] |= {"epoch": 1, "batch": 0, "best_db": 1000.0}
    interrupted["step"] = interrupted["resume"]["history"][0]["step"]
    network, hp = model.restore_model(Path("runs/first/last.pth"), interrupted)
    rest = {name: interrupted[name] for name in interrupted if name not in ("weights", "hparams")}
    model.save_checkpoint(Path("runs/first/last.pth"), network, hp, **rest)
    stale = Path("runs/second/best.pth")
    stale.parent.mkdir()
    stale.write_bytes(b"of an older run")
    resume = ["--checkpoint", "runs/first/last.pth", "--name", "second", "--overwrite"]
    assert train.main([str(toy_dataset), *resume]) == 0
    best = model.load_checkpoint(stale)
    assert model.load_checkpoint(stale.parent / "last.pth")["resume"]["best_db"] < 1000
    assert best["scores"]


def test_a_missing_or_wrong_checkpoint_is_named(toy_dataset, whole, capsys):
    assert "no.pth: no such checkpoint" in refused(capsys, toy_dataset, "--checkpoint", "no.pth")
    Path("text.pth").write_text("la la la")
    assert "text.pth: not a checkpoint, or damaged" in refused(
        capsys, toy_dataset, "--checkpoint", "text.pth"
    )
    assert "best.pth: it holds no training state" in refused(
        capsys, toy_dataset, "--checkpoint", whole / "best.pth", "--name", "new"
    )


def test_a_setting_that_contradicts_the_checkpoint_is_refused_with_both_values(
    toy_dataset, whole, capsys
):
    argv = [toy_dataset, "--name=new", "--checkpoint", whole / "last.pth"]
    for name, (ours, theirs) in {
        "epochs": (2, 30),
        "width": (2, 8),
        "learning_rate": (hparams.learning_rate, 0.5),
        "n_fft": (1024, 2048),
    }.items():
        line = refused(capsys, *argv, "--set", f"{name}={theirs}")
        assert f"last.pth: its {name} is {ours}, not {theirs}" in line


def test_other_songs_than_the_checkpoints_are_refused(toy_dataset, whole, capsys):
    train_songs = [s.id for s in dataset.load_manifest(toy_dataset).songs if s.split == "train"]
    few = with_songs(toy_dataset, Path("few"), lambda one: one["id"] != train_songs[0])
    line = refused(capsys, few, "--name=new", "--checkpoint", whole / "last.pth")
    assert "last.pth: it was trained on other songs, or in another order" in line


def test_data_that_cannot_be_used_is_named(toy_dataset, capsys):
    assert "nowhere: no such folder" in refused(capsys, "nowhere", toy_dataset)
    assert "nowhere: no such folder" in refused(capsys, toy_dataset, "--validate-on", "nowhere")
    Path("empty").mkdir()
    assert "empty: no manifest.json" in refused(capsys, toy_dataset, "empty")
    line = refused(capsys, toy_dataset, "--set=n_fft=2048")
    assert "built with n_fft=1024, not 2048" in line
    one = with_songs(toy_dataset, Path("one"), lambda one: one["id"].startswith("001"))
    assert "training songs" in refused(capsys, one)
    other = with_songs(toy_dataset, Path("voices"), lambda one: True, parts=["vocals"])
    assert "not the array the manifest promises" in refused(capsys, other)


def test_a_run_folder_that_cannot_be_is_told_before_any_work(toy_dataset, capsys):
    Path("runs").write_bytes(b"")
    assert "not a directory" in refused(capsys, toy_dataset, *settings())


def test_wrong_paths_are_told_before_torch_is_loaded(toy_dataset):
    code = (
        "import sys, train\n"
        "for argv in (['nowhere'], [sys.argv[1], '--checkpoint', 'no.pth']):\n"
        "    assert train.main(argv) == 1\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(toy_dataset)],
        env=os.environ | {"PYTHONPATH": str(TRAIN.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error:") == 2


def test_wrong_usage_exits_with_2(toy_dataset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv in ([], [str(toy_dataset), "--epochs", "3"], [str(toy_dataset), "--device", "cuda"]):
        with pytest.raises(SystemExit) as error:
            train.main(argv)
        assert error.value.code == 2


@pytest.mark.parametrize(
    "wrong", ["epochs=0", "learning_rate=-1", "batch_size=0", "epoch=3", "stft_frames=8"]
)
def test_wrong_settings_are_refused(toy_dataset, capsys, wrong):
    assert wrong.split("=")[0] in refused(capsys, toy_dataset, "--set", wrong, code=2)


def test_a_loss_that_is_no_number_ends_the_run_with_one_line(toy_dataset, capsys, monkeypatch):
    mix = sampling.mix
    monkeypatch.setattr(sampling, "mix", lambda x, gains: mix(x * float("nan"), gains))
    assert train.main([str(toy_dataset), *settings()]) == 1
    assert re.search("^[^\n]*: error: step 1: loss is nan.*\n$", capsys.readouterr().err)
    assert list(Path().rglob("*.pth")) == []


def test_a_network_that_does_not_fit_the_memory_is_one_line(toy_dataset, capsys, monkeypatch):
    answer = model.ConvNet.forward

    def forward(network: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
        if features.device.type == "meta":  # where the memory of a step is only counted
            return answer(network, features)
        raise torch.OutOfMemoryError("tried to allocate 2 TiB")

    monkeypatch.setattr(model.ConvNet, "forward", forward)
    assert train.main([str(toy_dataset), *settings()]) == 1
    said = capsys.readouterr().err
    assert said.endswith("step 1: out of memory with batch_size=8 (try --set batch_size=4)\n")
    assert said.count("\n") == 1


def fill_disk(monkeypatch: pytest.MonkeyPatch, fails: list[bool]) -> None:
    """Let the disk be full for some of the next saves, and then no more."""
    save = model.save_checkpoint

    def save_perhaps(path: Path, *args, **extra) -> None:
        if fails and fails.pop(0):
            raise InputError(f"{path}: no space left on the disk")
        save(path, *args, **extra)

    monkeypatch.setattr(model, "save_checkpoint", save_perhaps)


def test_a_disk_that_stays_full_ends_the_run_at_the_third_save(toy_dataset, capsys, monkeypatch):
    fill_disk(monkeypatch, [False, False, *100 * [True]])
    assert train.main([str(toy_dataset), *settings(epochs=9, learning_rate=1e-9)]) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert [": warning: " in line for line in warnings] == [True, True]
    assert all(line.endswith("training goes on with what was saved before") for line in warnings)
    assert error.endswith("is not saved; what was saved before is untouched")
    last = model.load_checkpoint(Path("runs/convnet/last.pth"))
    assert last["resume"]["epoch"] == 1, "what was saved before"


def test_a_disk_that_is_full_for_a_while_ends_nothing(toy_dataset, whole, capsys, monkeypatch):
    fill_disk(monkeypatch, [True, True])
    assert train.main([str(toy_dataset), *settings()]) == 0
    assert capsys.readouterr().err.count(": warning: ") == 2
    assert weights_equal(Path("runs/convnet/last.pth"), whole / "last.pth")


def score_epochs(monkeypatch: pytest.MonkeyPatch, decibels: list[float]) -> None:
    """Let the epochs' networks sound as good as that."""

    def validate(*_args):
        return {"loss": 0.0, "soft": decibels.pop(0), "binary": -9.0}

    monkeypatch.setattr(validation, "validate", validate)


@pytest.mark.parametrize(
    ("decibels", "fails", "best"),
    [
        ([3.0, 2.0], [True], 2),  # what was not saved need not be beaten
        ([3.0, 2.0], [False, False, False], 1),
        # The last epoch's is written in the end.
        ([2.0, 3.0], [False, False, True, False, False], 2),
    ],
)
def test_the_best_network_that_could_be_saved_is_there(
    toy_dataset, monkeypatch, decibels, fails, best
):
    score_epochs(monkeypatch, decibels)
    fill_disk(monkeypatch, fails)
    assert train.main([str(toy_dataset), *settings(epochs=2)]) == 0
    first, second = steps_of_each_epoch(toy_dataset, Path("runs/convnet"))
    step = model.load_checkpoint(Path("runs/convnet/best.pth"))["step"]
    assert step == {1: first, 2: first + second}[best]


def test_a_best_network_that_was_never_saved_is_written_when_the_run_is_resumed(
    toy_dataset, capsys, monkeypatch
):
    fill_disk(monkeypatch, [True, False, True])
    assert train.main([str(toy_dataset), *settings(epochs=1)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the best network so far is not saved" in error
    best, last = (Path("runs/convnet") / name for name in ("best.pth", "last.pth"))
    assert not best.exists()
    assert train.main([str(toy_dataset), "--checkpoint", str(last)]) == 0
    assert weights_equal(best, last)


# --- Stopping and going on ----------------------------------------------------------------------


def send_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive in the middle of a step."""
    take, steps = training.train_step, []

    def take_and_send(*args):
        steps.append(0)
        if len(steps) == step:
            os.kill(os.getpid(), signum)
        return take(*args)

    monkeypatch.setattr(training, "train_step", take_and_send)


def steps_of_each_epoch(data: Path, whole: Path) -> list[int]:
    hp = from_dict(model.load_checkpoint(whole / "last.pth")["hparams"])
    learn, _ = dataset.hold_out(dataset.open_songs([data], hp), hp)
    return [sampling.count_batches(learn, hp, epoch) for epoch in range(hp.epochs)]


@pytest.mark.parametrize(
    ("signum", "where"),
    [
        (signal.SIGINT, "first step"),
        (signal.SIGTERM, "second epoch"),
        (signal.SIGINT, "last step of an epoch"),
        (signal.SIGTERM, "last step of all"),
    ],
)
def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_as_if_nothing_was(
    toy_dataset, whole, monkeypatch, capsys, signum, where
):
    first, second = steps_of_each_epoch(toy_dataset, whole)
    step = {
        "first step": 1,
        "second epoch": first + 1,
        "last step of an epoch": first,
        "last step of all": first + second,
    }[where]
    last = Path("runs/convnet/last.pth")
    with monkeypatch.context() as patch:
        send_at(step, signum, patch)
        assert train.main([str(toy_dataset), *settings()]) == 128 + signum
    assert f"stopped at step {step}; resume with --checkpoint {last}" in capsys.readouterr().out
    assert model.load_checkpoint(last)["step"] == step
    assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)
    assert train.main([str(toy_dataset), "--checkpoint", str(last)]) == 0
    for name in ("last.pth", "best.pth"):
        assert weights_equal(last.parent / name, whole / name)
    ours, theirs = (model.load_checkpoint(folder / "last.pth") for folder in (last.parent, whole))
    assert ours["scores"] == theirs["scores"]
    assert ours["resume"]["best_db"] == theirs["resume"]["best_db"]


def test_a_run_goes_on_as_if_nothing_was_in_an_epoch_cut_short_and_from_disk(
    toy_dataset, monkeypatch
):
    argv = [str(toy_dataset), *settings(steps=5)]
    assert train.main([*argv, "--name=straight"]) == 0
    last = Path("runs/convnet/last.pth")
    with monkeypatch.context() as patch:
        send_at(4, signal.SIGINT, patch)
        assert train.main([*argv, "--dataset-on=disk"]) == 130
    assert model.load_checkpoint(last)["step"] == 4
    assert train.main([str(toy_dataset), "--checkpoint", str(last), "--dataset-on=device"]) == 0
    ours, theirs = (model.load_checkpoint(folder) for folder in (last, "runs/straight/last.pth"))
    assert weights_equal(last, Path("runs/straight/last.pth"))
    for name, weight in theirs["resume"]["weights"].items():
        assert torch.equal(ours["resume"]["weights"][name], weight), name
    assert ours["scores"] == theirs["scores"]


def test_a_damaged_last_save_gives_way_to_the_one_before(toy_dataset, whole, capsys):
    folder = Path("runs/convnet")
    shutil.copytree(whole, folder)
    last, previous = folder / "last.pth", folder / "previous.pth"
    assert model.load_checkpoint(previous)["resume"]["epoch"] == 1
    last.write_bytes(last.read_bytes()[:-1000])
    capsys.readouterr()
    assert train.main([str(toy_dataset), "--checkpoint", str(last)]) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "warning: runs/convnet/last.pth: not a checkpoint, or damaged" in warning
    assert warning.endswith("; going on from runs/convnet/previous.pth, step 3")
    for name in ("last.pth", "best.pth"):
        assert weights_equal(folder / name, whole / name)
    ours, theirs = (model.load_checkpoint(where / "last.pth") for where in (folder, whole))
    assert ours["scores"] == theirs["scores"]


def test_only_a_damaged_last_save_gives_way(toy_dataset, whole, capsys):
    folder = Path("runs/convnet")
    shutil.copytree(whole, folder)
    other = folder / "other.pth"
    (folder / "last.pth").rename(other)
    other.write_bytes(other.read_bytes()[:-1000])
    assert "other.pth: not a checkpoint, or damaged" in refused(
        capsys, toy_dataset, "--checkpoint", other
    )
    for name in ("last.pth", "previous.pth"):
        other.replace(folder / name)
        other = folder / name
    shutil.copy(other, folder / "last.pth")
    line = refused(capsys, toy_dataset, "--checkpoint", folder / "last.pth")
    assert "previous.pth: not a checkpoint, or damaged" in line


def test_a_finished_run_resumes_to_itself(toy_dataset, whole, capsys):
    argv = [str(toy_dataset), "--checkpoint", str(whole / "last.pth"), "--name", "again"]
    before = (whole / "last.pth").read_bytes()
    assert train.main(argv) == 0
    assert (whole / "last.pth").read_bytes() == before


def test_a_second_signal_ends_the_run_at_once(toy_dataset, monkeypatch):
    monkeypatch.setattr(cli, "SAME_WISH", -1)

    def twice(*_args) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step goes on")

    monkeypatch.setattr(training, "train_step", twice)
    assert train.main([str(toy_dataset), *settings()]) == 130
    assert list(Path().rglob("*.pth")) == []


def start(*argv: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONUNBUFFERED": "1"},
    )


def wait_for(process: subprocess.Popen, beginning: str) -> None:
    assert any(line.startswith(beginning) for line in process.stdout), process.stderr.read()


@pytest.mark.torture
def test_the_script_runs_and_stops_as_a_program(toy_dataset):
    argv = [toy_dataset, *settings(epochs=1000)]
    process = start(*argv)
    wait_for(process, "epoch   2")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "resume with --checkpoint runs/convnet/last.pth" in out
    assert model.load_checkpoint(Path("runs/convnet/last.pth"))["resume"]["epoch"] >= 2


@pytest.mark.torture
def test_whenever_a_run_is_killed_its_checkpoints_are_whole_and_it_goes_on(toy_dataset):
    rng = random.Random(0)
    argv = [toy_dataset, *settings(epochs=6)]
    last = Path("runs/convnet/last.pth")
    process = start(*argv, "--name=whole")
    process.communicate()
    assert process.returncode == 0
    for attempt in range(8):
        options = ["--checkpoint", last] if last.exists() else ["--overwrite"]
        process = start(*argv, *options)
        if attempt < 7:
            wait_for(process, "held-out")
            time.sleep(rng.uniform(0, 6))
            process.kill()
        process.communicate()
        for path in last.parent.glob("*.pth"):
            model.load_checkpoint(path)
    assert process.returncode == 0
    for name in ("last.pth", "best.pth"):
        assert weights_equal(last.parent / name, Path("runs/whole") / name)
    assert [name for name in listing(last.parent) if "tmp" in name] == []


@pytest.mark.torture
def test_signals_at_any_time_end_the_run_within_seconds(toy_dataset):
    rng = random.Random(0)
    for attempt in range(6):
        signum = rng.choice([signal.SIGINT, signal.SIGTERM])
        process = start(toy_dataset, *settings(epochs=1000), "--overwrite")
        wait_for(process, rng.choice(["device", "held-out", "epoch"]))
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signum)
        asked = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - asked < 15, "it is told to be done within 5 on an idle machine"
        assert process.returncode == 128 + signum, attempt
        assert "Traceback" not in err


# --- Adapting -----------------------------------------------------------------------------------


def changed(path: Path, copy: Path, **resume: object) -> Path:
    """Copy a checkpoint with something else in its training state."""
    checkpoint = model.load_checkpoint(path)
    checkpoint["resume"] |= resume
    network, hp = model.restore_model(path, checkpoint)
    rest = {name: checkpoint[name] for name in checkpoint if name not in ("weights", "hparams")}
    copy.parent.mkdir(parents=True, exist_ok=True)
    model.save_checkpoint(copy, network, hp, **rest)
    return copy


def test_every_difference_is_named_and_how_to_go_on(toy_dataset, whole, capsys):
    resume = ["--name=new", "--checkpoint", whole / "last.pth"]
    hint = "(give what it was trained with, or --adapt)"
    others = with_songs(toy_dataset, Path("others"), lambda one: one["split"] == "test")
    line = refused(capsys, toy_dataset, *resume, "--validate-on", others)
    assert line.endswith(
        "last.pth: it was trained on other songs, or in another order; "
        f"it was validated on other songs {hint}"
    )
    four = changed(whole / "last.pth", Path("four/last.pth"), processes=4)
    line = refused(capsys, toy_dataset, "--checkpoint", four)
    assert line.endswith(f"four/last.pth: it ran on 4 processes, not 1 {hint}")
    line = refused(capsys, toy_dataset, *resume, "--set=epochs=9")
    assert line.endswith("its epochs is 2, not 9; --adapt starts a new schedule with it")
    for adapt in ([], ["--adapt"]):  # another network cannot have its weights
        line = refused(capsys, toy_dataset, *resume, *adapt, "--set=width=4")
        assert line.endswith("last.pth: its width is 2, not 4")


def test_a_trained_network_is_adapted_to_other_songs_and_settings(
    toy_dataset, whole, capsys, monkeypatch
):
    train_songs = [s.id for s in dataset.load_manifest(toy_dataset).songs if s.split == "train"]
    few = with_songs(toy_dataset, Path("few"), lambda one: one["id"] != train_songs[0])
    old, began = model.load_checkpoint(whole / "last.pth"), []
    step = training.train_step

    def remember(run, *args):
        if not began:
            weights = {name: value.clone() for name, value in run.model.state_dict().items()}
            began.append((run.step, weights, run.scheduler.last_epoch))
        return step(run, *args)

    monkeypatch.setattr(training, "train_step", remember)
    options = ["--adapt", "--checkpoint", str(whole / "last.pth"), "--set=learning_rate=0.01"]
    assert train.main([str(few), *options, "--set=steps=2", "--name=new"]) == 0
    ((first, weights, scheduled),) = began
    assert (first, scheduled) == (0, 0)
    for name, value in old["weights"].items():
        assert torch.equal(weights[name], value), name
    new = model.load_checkpoint(Path("runs/new/last.pth"))
    assert new["step"] == new["hparams"]["steps"] == 2
    assert new["hparams"] == old["hparams"] | {"learning_rate": 0.01, "steps": 2}
    assert len(new["data"]) == 1
    assert len(new["resume"]["history"]) == 1
    assert Path("runs/new/best.pth").exists()
    said = capsys.readouterr().out
    assert re.search(
        r"adapting .*/last.pth: its learning_rate is 0.01, not|it was trained on", said
    )


def test_only_the_weights_of_a_best_network_are_needed_to_adapt_it(toy_dataset, whole):
    options = ["--adapt", "--checkpoint", str(whole / "best.pth"), "--name=new"]
    assert train.main([str(toy_dataset), *options, "--set=steps=1"]) == 0
    assert model.load_checkpoint(Path("runs/new/last.pth"))["step"] == 1


def test_what_is_adapted_keeps_its_terms_and_what_it_had_learnt(toy_dataset, whole, capsys):
    learnt = model.load_checkpoint(whole / "best.pth")["data"]  # two songs; one is held out now
    ids = [song.rpartition(" ")[0] for song in learnt]
    others = with_songs(toy_dataset, Path("others"), lambda one: one["id"] in ids)
    words = ["--licence", "research", "--source", "a band"]
    assert publish.main([str(whole / "best.pth"), "net.pth", *words]) == 0
    assert "--name the new run" in refused(
        capsys, others, "--adapt", "--checkpoint=net.pth", "--set=steps=1", code=2
    )
    for network, name, steps in (("net.pth", "one", 1), ("runs/one/last.pth", "two", 2)):
        options = ["--adapt", "--checkpoint", network, "--name", name, f"--set=steps={steps}"]
        assert train.main([str(others), *options]) == 0
        assert "has learnt from 1 of the 1 songs" in capsys.readouterr().err
        found = model.load_checkpoint(Path("runs") / name / "best.pth")
        assert (found["licence"], found["sources"]) == ("research", ["a band"])
        assert found["learnt_before"] == sorted(learnt)
        assert set(model.learnt_songs(found)) == set(learnt)
    # Only renamed: it is restored, not adapted.
    words = ["--checkpoint=runs/one/last.pth", "--name=three"]
    assert train.main([str(others), *words]) == 0
    found = model.load_checkpoint(Path("runs/three/last.pth"))
    assert (found["licence"], found["learnt_before"]) == ("research", sorted(learnt))


def test_a_song_learnt_at_another_speed_flatters_the_scores_too(toy_dataset, whole, capsys):
    stored = model.load_checkpoint(whole / "best.pth")
    ids = [song.rpartition(" ")[0] for song in stored["data"]]
    others = with_songs(toy_dataset, Path("others"), lambda one: one["id"] in ids)
    network, hp = model.restore_model(whole / "best.pth", stored)
    rest = {name: stored[name] for name in stored.keys() - {"weights", "hparams", "data"}}
    data = [f"{name} x1.15 00" for name in ids]
    model.save_checkpoint(Path("net.pth"), network, hp, data=data, **rest)
    options = ["--adapt", "--checkpoint=net.pth", "--name=one", "--set=steps=1"]
    assert train.main([str(others), *options]) == 0
    assert "has learnt from 1 of the 1 songs" in capsys.readouterr().err


def test_weights_that_answer_nonsense_are_not_saved(toy_dataset, capsys, monkeypatch):
    nan = math.nan
    monkeypatch.setattr(
        validation, "validate", lambda *_: {"loss": nan, "soft": nan, "binary": nan}
    )
    assert train.main([str(toy_dataset), *settings(steps=2, epochs=1)]) == 1
    assert "have diverged" in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.pth"))


def test_an_adapted_run_does_not_overwrite_the_old_one_unasked(toy_dataset, whole, capsys):
    folder = Path("runs/convnet")
    shutil.copytree(whole, folder)
    options = ["--adapt", "--checkpoint", folder / "last.pth", "--set=steps=1"]
    before = (folder / "last.pth").read_bytes()
    for more in ([], ["--name=convnet"]):
        assert "runs/convnet: holds a run" in refused(capsys, toy_dataset, *options, *more)
        assert (folder / "last.pth").read_bytes() == before
    assert train.main([str(toy_dataset), *map(str, options), "--overwrite"]) == 0
    assert model.load_checkpoint(folder / "last.pth")["step"] == 1


def test_adapt_without_a_checkpoint_is_wrong_usage(toy_dataset, capsys):
    assert "--adapt goes with --checkpoint" in refused(capsys, toy_dataset, "--adapt", code=2)


def test_with_only_another_number_of_processes_a_run_goes_on_where_it_was(
    toy_dataset, whole, monkeypatch, capsys
):
    last = Path("runs/convnet/last.pth")
    with monkeypatch.context() as patch:
        send_at(4, signal.SIGINT, patch)
        assert train.main([str(toy_dataset), *settings()]) == 130
    four = changed(last, Path("four/last.pth"), processes=4)
    assert "it ran on 4 processes" in refused(capsys, toy_dataset, "--checkpoint", four)
    options = ["--checkpoint", str(four), "--adapt", "--name=on"]
    assert train.main([str(toy_dataset), *options]) == 0
    assert "adapting" not in capsys.readouterr().out
    assert weights_equal(Path("runs/on/last.pth"), whole / "last.pth")
    found = model.load_checkpoint(Path("runs/on/last.pth"))
    assert found["step"] == 6
    assert found["resume"]["processes"] == 1
