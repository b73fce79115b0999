"""train.py from the outside: what it writes, what it refuses, and how it stops."""

import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import cli
import dataset
import model
import train
from hparams import InputError, hparams
from learning import run as training
from learning import targets, validation
from tools import publish

TRAIN = Path(__file__).parent.parent / "train.py"
SMALL = {"width": 2, "model_type": "convnet", "epochs": 2, "chunk_slices": 32}
SMALL |= {"valid_seconds": 2, "stft_frames": 9}
pytestmark = pytest.mark.usefixtures("empty_folder")


def settings(**changes: object) -> list[str]:
    return [f"--set={name}={value}" for name, value in (SMALL | changes).items()]


@pytest.fixture(scope="module")
def whole(toy_dataset, tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    save = training.save

    def save_twice(run, folder, name, *args):
        is_saved = save(run, folder, name, *args)
        if name == "last.pth" and run.epoch == 1:
            shutil.copy(folder / name, folder / "first_of_two.pth")
        return is_saved

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(training, "save", save_twice)
        assert train.main([str(toy_dataset), *settings()]) == 0
        return Path("runs/convnet").absolute()


def with_songs(source: Path, name: str, *numbers: int, **changes) -> str:
    """Make a dataset of some of the toy songs; number 0 is the one to test on."""
    folder = Path(name)
    (folder / "songs").mkdir(parents=True)
    about = json.loads((source / dataset.MANIFEST).read_text())
    about["songs"] = [about["songs"][number] | changes for number in numbers]
    for one in about["songs"]:
        (folder / one["file"]).symlink_to(source / one["file"])
    (folder / dataset.MANIFEST).write_text(json.dumps(about))
    return name


def ids_of(source: Path) -> list[str]:
    return [song.id for song in dataset.load_manifest(source).songs]


def listing(folder: Path = Path()) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_other_songs_are_validated_on_if_named_and_test_splits_learnt_from_on_demand(
    toy_dataset, capsys
):
    ids = ids_of(toy_dataset)
    held = with_songs(toy_dataset, "held", 1)
    data = with_songs(toy_dataset, "data", 0, 2, 3)
    for flags, expected in (([], ids[2:]), (["--all-songs"], [ids[0], *ids[2:]])):
        run = ["--validate-on", held, "--overwrite", *flags]
        assert train.main([data, *settings(steps=1), *run]) == 0
        learnt = model.load_checkpoint(Path("runs/convnet/last.pth"))["data"]
        assert [entry.rsplit(" ", 1)[0] for entry in learnt] == expected
        assert "validate on 1 songs" in capsys.readouterr().out
    assert "none of 1 songs can be validated on" in refused(capsys, held, "--validate-on", held)


def test_a_checkpoint_says_how_it_was_made(whole, toy_dataset):
    last, best = (model.load_checkpoint(whole / name) for name in ("last.pth", "best.pth"))
    assert last["hparams"] == asdict(hparams) | SMALL
    ids = {f"{s.id} {s.sha256}" for s in dataset.load_manifest(toy_dataset).songs}
    assert len(last["data"]) == 2, "of three songs to train, one is held out"
    assert set(last["data"]) < ids
    assert set(last["scores"]) == {"loss", "soft", "binary", "floor"}
    names = sorted(p.name.split(".")[0] for p in whole.iterdir())
    assert names == ["", "best", "events", "first_of_two", "last"], "the first is the lock"
    assert "resume" not in best
    assert max(best["scores"]["soft"], best["scores"]["binary"]) == last["resume"]["best_db"]


def test_the_best_network_is_that_of_the_epoch_that_sounded_best(toy_dataset, monkeypatch):
    found = iter([(1.0, 0.0), (2.0, 3.0), (2.5, 0.0)])  # SI-SDR with the soft and the binary mask

    def scripted(*_args) -> dict[str, float]:
        return dict(zip(("soft", "binary"), next(found), strict=True), loss=0.5, floor=0)

    monkeypatch.setattr(validation, "validate", scripted)
    assert train.main([str(toy_dataset), *settings(epochs=3)]) == 0
    best = model.load_checkpoint(Path("runs/convnet/best.pth"))
    last = model.load_checkpoint(Path("runs/convnet/last.pth"))
    assert best["scores"] == {"soft": 2, "binary": 3, "loss": 0.5, "floor": 0}
    assert best["mask_settings"]["mask_at_eval"]
    assert not last["mask_settings"]["mask_at_eval"]
    assert last["resume"]["best_db"] == 3
    assert best["step"] < last["step"]


def test_a_datasets_share_is_kept_by_a_run_that_goes_on(toy_dataset, capsys):
    for number, name in enumerate(("other", "first", "second", "held")):
        with_songs(toy_dataset, name, number)
    data = ["first", "second", "--validate-on", "held"]
    assert train.main([*data, *settings(), "--share", "1", "3"]) == 0
    assert "of every epoch: 25% first, 75% second" in capsys.readouterr().out
    again = [*data, "--checkpoint=runs/convnet/last.pth", "--name=again"]
    assert "its datasets had other shares" in refused(capsys, *again, "--share", 1, 1)
    assert "1 shares for 2 folders" in refused(capsys, *again, "--share", 1)
    assert train.main(again) == 0
    wrong = ["first", "other", *data[2:], *settings(), "--name=new", "--share", 1, 1]
    assert "other: no song to learn from, so it can have no --share" in refused(capsys, *wrong)


def refused(capsys, *argv: object, code: int = 1) -> str:
    """Run with bad input; returns the one line it says, and makes sure that nothing is written."""
    before = listing()
    capsys.readouterr()
    assert train.main([str(one) for one in argv]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    new = [path for path in map(Path, listing()) if str(path) not in before and path.is_file()]
    assert [path for path in new if path.name.split(".")[0] not in ("", "events")] == []
    return lines[0]


def test_a_run_is_not_overwritten_unasked(toy_dataset, capsys):
    argv, last = [str(toy_dataset), *settings(steps=1)], Path("runs/convnet/last.pth")
    assert train.main(argv) == 0
    first = last.read_bytes()
    said = "runs/convnet: holds a run (--name another one, --overwrite it, or resume it"
    adapt = [str(toy_dataset), "--adapt", f"--checkpoint={last}", "--set=steps=2"]
    for wrong in (argv, adapt, [*adapt, "--name=convnet"]):
        assert said in refused(capsys, *wrong)
        assert last.read_bytes() == first
    (old,) = Path("runs/convnet").glob("events*")
    assert train.main([*adapt, "--overwrite"]) == 0
    assert last.read_bytes() != first
    (new,) = Path("runs/convnet").glob("events*")
    assert new != old, "old curves do not mix with the new"


def test_data_that_cannot_be_used_is_named(toy_dataset, capsys):
    assert "nowhere: no such folder" in refused(capsys, "nowhere", toy_dataset)
    assert "nowhere: no such folder" in refused(capsys, toy_dataset, "--validate-on", "nowhere")
    Path("empty").mkdir()
    assert "empty: no manifest.json" in refused(capsys, toy_dataset, "empty")
    assert "no.pth: no such checkpoint" in refused(capsys, toy_dataset, "--checkpoint=no.pth")
    line = refused(capsys, toy_dataset, "--set=n_fft=2048")
    assert "built with n_fft=1024, not 2048" in line
    one = with_songs(toy_dataset, "one", 0)
    assert "none of 0 songs can be validated on" in refused(capsys, one)
    other = with_songs(toy_dataset, "voices", 1, 2, parts=["vocals"])
    assert "not the array the manifest promises" in refused(capsys, other)


def test_wrong_usage_is_told(toy_dataset, whole, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        train.main([str(toy_dataset), "--device", "cuda"])
    for option, said in (
        ("--name=../out", "a name, not a path"),
        ("--set=epochs=0", "epochs"),
        ("--adapt", "--adapt goes with --checkpoint"),
    ):
        assert said in refused(capsys, toy_dataset, option, code=2)
    Path("runs/convnet").mkdir(parents=True)
    with cli.locked(Path("runs/convnet")):
        assert "another process works here" in refused(capsys, toy_dataset, *settings(epochs=1))


def test_what_is_no_number_ends_the_run_with_one_line_and_is_not_saved(
    toy_dataset, capsys, monkeypatch
):
    argv, scores = (
        [toy_dataset, *settings(steps=2)],
        dict.fromkeys(("loss", "soft", "binary", "floor"), math.nan),
    )
    monkeypatch.setattr(validation, "validate", lambda *_: scores)
    assert "the loss on held-out songs is nan" in refused(capsys, *argv)
    mix = targets.mix
    monkeypatch.setattr(targets, "mix", lambda x, gains: mix(x * math.nan, gains))
    assert "error: step 1: loss is nan" in refused(capsys, *argv)


def test_a_disk_that_stays_full_ends_the_run_when_it_ends(toy_dataset, capsys, monkeypatch):
    save, paths = model.save_checkpoint, []

    def save_twice(path: Path, *args, **extra) -> None:
        paths.append(path)
        if len(paths) > 2:
            raise InputError(f"{path}: no space left on the disk")
        save(path, *args, **extra)

    monkeypatch.setattr(model, "save_checkpoint", save_twice)
    assert train.main([str(toy_dataset), *settings(epochs=3, learning_rate=1e-9)]) == 1
    *warnings, error = capsys.readouterr().err.splitlines()
    assert warnings
    assert all(one.endswith("training goes on with what was saved before") for one in warnings)
    assert error.endswith("what was saved before is untouched")
    assert model.load_checkpoint(Path("runs/convnet/last.pth"))["resume"]["epoch"] == 1


def send_at(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal arrive in the middle of a step."""
    take, steps = training.train_step, []

    def take_and_send(*args):
        steps.append(0)
        if len(steps) == step:
            os.kill(os.getpid(), signum)
        return take(*args)

    monkeypatch.setattr(training, "train_step", take_and_send)


def test_a_signal_ends_the_run_after_the_step_and_it_goes_on_as_if_nothing_was(
    toy_dataset, whole, monkeypatch, capsys
):
    n_steps = model.load_checkpoint(whole / "last.pth")["step"]  # of two epochs
    for signum, step in ((signal.SIGINT, n_steps // 2 + 1), (signal.SIGTERM, n_steps)):
        last = Path(f"runs/{step}/last.pth")
        with monkeypatch.context() as patch:
            send_at(step, signum, patch)
            assert train.main([str(toy_dataset), *settings(), f"--name={step}"]) == 128 + signum
        said = f"stopped at step {step}; resume with --checkpoint {last}"
        assert said in capsys.readouterr().out
        assert model.load_checkpoint(last)["step"] == step
        assert signal.getsignal(signum) in (signal.default_int_handler, signal.SIG_DFL)
        assert train.main([str(toy_dataset), "--checkpoint", str(last)]) == 0
        assert_same_run(last.parent, whole)


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("best.pth", "last.pth"):
        one, two = (model.load_checkpoint(folder / name) for folder in (run, other))
        torch.testing.assert_close(one["weights"], two["weights"], rtol=0, atol=0)
    assert one["scores"] == two["scores"]
    assert one["resume"]["best_db"] == two["resume"]["best_db"]


def test_every_difference_is_named_and_how_to_go_on(toy_dataset, whole, capsys):
    resume = [toy_dataset, "--name=new", "--checkpoint", whole / "last.pth"]
    others = with_songs(toy_dataset, "others", 0)
    said = (
        "last.pth: it was trained on other songs, or in another order; it was validated on other "
        "songs (give what it was trained with, or --adapt)"
    )
    assert refused(capsys, *resume, "--validate-on", others).endswith(said)
    said = "its epochs is 2, not 9 (give what it was trained with, or --adapt)"
    assert refused(capsys, *resume, "--set=epochs=9").endswith(said)
    for adapt in ([], ["--adapt"]):  # another network cannot have its weights
        line = refused(capsys, *resume, *adapt, "--set=width=4")
        assert line.endswith("last.pth: trained with width=2, not 4")


def test_what_is_adapted_keeps_its_terms_and_what_it_had_learnt(toy_dataset, whole, capsys):
    learnt = model.load_checkpoint(whole / "best.pth")["data"]  # two songs; one is held out now
    ids = [song.rpartition(" ")[0] for song in learnt]
    numbers = [ids_of(toy_dataset).index(name) for name in ids]
    others = with_songs(toy_dataset, "others", *numbers)
    words = ["--licence", "research", "--source", "a band"]
    assert publish.main([str(whole / "best.pth"), "net.pth", *words]) == 0
    adapt = ["--adapt", "--set=steps=1", "--checkpoint=net.pth"]
    assert "--name the new run" in refused(capsys, others, *adapt, code=2)
    for name, more in (("one", []), ("two", ["--checkpoint=runs/one/last.pth", "--set=steps=2"])):
        assert train.main([others, *adapt, *more, "--name", name]) == 0
        assert "has learnt from 1 of the 1 songs" in capsys.readouterr().err
        found = model.load_checkpoint(Path("runs") / name / "best.pth")
        assert (found["licence"], found["sources"]) == ("research", ["a band"])
        assert found["learnt_before"] == sorted(learnt) == sorted(model.learnt_songs(found))
    known = with_songs(toy_dataset, "known", numbers[0], id=ids[0].upper().replace(" ", "_"))
    new = with_songs(toy_dataset, "new", *({1, 2, 3} - set(numbers)), taught=True)
    assert train.main([new, "--validate-on", known, *adapt, "--name=four"]) == 0
    assert "has learnt from 1 of the 1 songs" in capsys.readouterr().err
    assert train.main([others, *adapt, "--checkpoint=runs/four/last.pth", "--name=five"]) == 0
    assert model.load_checkpoint(Path("runs/five/last.pth"))["taught"]
    # Only renamed: it is restored, not adapted.
    assert train.main([others, "--checkpoint=runs/one/last.pth", "--name=three"]) == 0
    found = model.load_checkpoint(Path("runs/three/last.pth"))
    assert (found["licence"], found["learnt_before"]) == ("research", sorted(learnt))


def test_with_only_another_number_of_processes_a_run_goes_on_where_it_was(
    toy_dataset, whole, capsys
):
    checkpoint = model.load_checkpoint(whole / "first_of_two.pth")
    checkpoint["resume"]["processes"] = 4
    network, hp = model.restore_model(whole, checkpoint)
    rest = {name: checkpoint[name] for name in checkpoint if name not in ("weights", "hparams")}
    model.save_checkpoint(Path("four.pth"), network, hp, **rest)
    options = [toy_dataset, "--checkpoint=four.pth", "--name=on"]
    assert "it ran on another number of processes" in refused(capsys, *options)
    assert train.main([*map(str, options), "--adapt"]) == 0
    assert "adapting" not in capsys.readouterr().out
    assert_same_run(Path("runs/on"), whole)
    assert model.load_checkpoint(Path("runs/on/last.pth"))["resume"]["processes"] == 1
