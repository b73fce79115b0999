"""train.py from the outside: what it writes, what it refuses, and how it stops."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset
import model
import train
import training
from hparams import from_dict, hparams
from separation import Separator

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


def test_a_run_writes_networks_that_separate_songs(whole, toy_tree):
    for name in ("best.pth", "last.pth"):
        separator = Separator.load(whole / name)
        wav = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 5000)).astype(np.float32)
        vocals, rest = separator.separate(wav, 44100)
        np.testing.assert_allclose(vocals + rest, wav, atol=1e-6)
    assert sorted(p.name.split(".")[0] for p in whole.iterdir()) == ["best", "events", "last"]


def test_a_checkpoint_says_how_it_was_made(whole, toy_dataset):
    last = model.load_checkpoint(whole / "last.pth")
    assert last["hparams"] == asdict(hparams) | SMALL
    ids = {f"{s.id} {s.sha256}" for s in dataset.load_manifest(toy_dataset).songs}
    assert len(last["data"]) == 2, "of three songs to train, one is held out"
    assert set(last["data"]) < ids
    assert set(last["scores"]) == {"loss", "soft", "binary"}
    assert last["step"] == last["resume"]["scheduler"]["last_epoch"]
    assert (last["resume"]["epoch"], last["resume"]["batch"]) == (2, 0)
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
    assert re.fullmatch(r"convnet, width 2: 0\.\d\d million weights; 1 epochs, \d+ steps", lines[3])
    number = r"-?\d+\.\d\d dB"
    assert re.fullmatch(
        rf"held-out vocals, SI-SDR: floor {number}, ideal_binary {number}, ideal_ratio {number}",
        lines[4],
    )
    assert lines[5].startswith("epoch   1  train 0.")
    assert lines[6] == "best.pth and last.pth are in runs/x"
    assert len(lines) == 7


def test_the_same_command_gives_the_same_weights(toy_dataset, whole):
    assert train.main([str(toy_dataset), *settings()]) == 0
    assert weights_equal(Path("runs/convnet/last.pth"), whole / "last.pth")
    assert weights_equal(Path("runs/convnet/best.pth"), whole / "best.pth")


def test_the_best_network_is_that_of_the_epoch_that_sounded_best(toy_dataset, monkeypatch):
    found = iter([(1.0, 0.0), (2.0, 3.0), (2.5, 0.0)])  # SI-SDR with the soft and the binary mask

    def scripted(*_args) -> dict[str, float]:
        return dict(zip(("soft", "binary"), next(found), strict=True), loss=0.5)

    monkeypatch.setattr(training, "validate", scripted)
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
    assert train.main([*map(str, argv), "--overwrite", "--set=seed=1"]) == 0
    assert Path("runs/convnet/last.pth").read_bytes() != first
    (new,) = Path("runs/convnet").glob("events*")
    assert new != old, "old curves do not mix with the new"


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
    assert "best.pth: holds no training state" in refused(
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
    assert "last.pth: was trained on other songs" in line


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
    read = dataset.read_batch
    monkeypatch.setattr(dataset, "read_batch", lambda *args: read(*args) * float("nan"))
    assert train.main([str(toy_dataset), *settings()]) == 1
    assert re.search("^[^\n]*: error: step 1: loss is nan.*\n$", capsys.readouterr().err)
    assert list(Path().rglob("*.pth")) == []


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
    return [dataset.count_batches(learn, hp, epoch) for epoch in range(hp.epochs)]


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


def test_a_finished_run_resumes_to_itself(toy_dataset, whole, capsys):
    argv = [str(toy_dataset), "--checkpoint", str(whole / "last.pth"), "--name", "again"]
    before = (whole / "last.pth").read_bytes()
    assert train.main(argv) == 0
    assert (whole / "last.pth").read_bytes() == before


def test_a_second_signal_ends_the_run_at_once(toy_dataset, monkeypatch):
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
