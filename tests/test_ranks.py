"""Several processes are one run: the same gradient, the same weights, one set of files, one end."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_run import HP, first_batch, go, make_run, poison_gradient, song_of_noise
from test_train import TRAIN, settings

import model
import train
from dataset import OpenSong
from hparams import InputError
from learning import ranks, validation
from learning import run as training
from learning.ranks import World

ROOT = Path(__file__).parent.parent
# No clipping; loud bins count for more.
WIDE = replace(HP, max_grad_norm=1e6, loss="cross-entropy", loss_weight=1.0)
LONG = replace(HP, steps=50, epochs=1000)
pytestmark = pytest.mark.usefixtures("empty_folder")


def torchrun(*argv: object) -> subprocess.Popen:
    """Start a script on two processes."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    more = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*starter, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | more,
    )


@contextlib.contextmanager
def ended(process: subprocess.Popen):
    """Leave no process behind, whatever a test finds; torchrun ends those that it started."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


def some_songs() -> list[OpenSong]:
    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


def one_gradient(here: World) -> dict[str, torch.Tensor]:
    """A step in which batch norm uses the statistics it has, as those are each rank's own."""
    songs = some_songs()
    run = make_run(songs, WIDE, world=here)
    run.network.eval()
    loss, norm = run.take_step(first_batch(run))
    grads = {name: weight.grad for name, weight in run.model.named_parameters()}
    return {**grads, "loss": here.mean(loss), "norm": norm}


def fifty_steps(here: World, folder: Path) -> dict[str, Any]:
    """A run of 50 steps with its files, as train.py has them."""
    songs = some_songs()
    run = make_run(songs, LONG, world=here, valid=songs)
    losses = []
    go(run, log=lambda values, _step: losses.append(values["loss/train"]))
    run.finish_epoch(validation.validate(run, songs))
    training.save(run, folder, "best.pth")
    training.save(run, folder, "last.pth")
    return {
        "weights": dict(run.model.named_parameters()),
        "averaged": run.averaged.state_dict(),
        "step": run.step,
        "losses": losses,
        "scores": run.scores,
        "files": sorted(os.listdir(folder)),
    }


def other_ends(here: World) -> dict[str, Any]:
    """Where ranks must not decide each for itself."""
    songs = some_songs()
    found: dict[str, Any] = {}
    run = make_run(songs, world=here)
    training.train_epoch(
        run, lambda *_: None, lambda: here.rank == 1 and run.step == 3, lambda: None
    )
    found["stopped"] = run.step
    run = make_run(songs, world=here)
    if here.rank == 1:
        poison_gradient(run, 2)
    try:
        go(run)
    except InputError as error:
        found["error"] = str(error)[:15]
    return found


def be_a_rank(folder: Path) -> None:
    """What each of the two processes does."""
    here = ranks.world()
    own = folder / str(here.rank)
    own.mkdir()
    with ranks.joined(here):
        found = {
            "gradient": one_gradient(here),
            "run": fifty_steps(here, own),
            "ends": other_ends(here),
        }
    assert not torch.distributed.is_initialized()
    torch.save(found, folder / f"{here.rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    with ended(torchrun(__file__, folder)) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_the_gradient_of_two_ranks_is_that_of_one_process_on_the_joined_batch(two):
    alone = one_gradient(World())
    for found in (of_rank["gradient"] for of_rank in two[1]):
        assert found.keys() == alone.keys()
        for name, grad in alone.items():
            scale = float(grad.abs().max())
            np.testing.assert_allclose(found[name], grad, 1e-5, 1e-5 * scale, err_msg=name)
    assert float(alone["norm"]) > 1e-2


def test_only_the_first_rank_writes_and_what_it_wrote_scores_the_same_alone(two):
    folder, found = two
    assert found[0]["ends"] == found[1]["ends"] == {"stopped": 3, "error": "step 2: loss is"}
    first, second = (of_rank["run"] for of_rank in found)
    assert (first.pop("files"), second.pop("files")) == (["best.pth", "last.pth"], [])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["losses"][-1] < first["losses"][0]
    songs = some_songs()
    run = make_run(songs, LONG, valid=songs)
    checkpoint = model.load_checkpoint(folder / "0" / "last.pth")
    assert run.differences(checkpoint).keys() == {"processes"}
    run.restore(checkpoint)
    scores = validation.validate(run, songs)
    assert scores == pytest.approx(first["scores"], rel=1e-6)


def test_a_batch_that_the_processes_cannot_share_is_refused(toy_dataset, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "world", lambda: World(0, 3))
    monkeypatch.setattr(ranks, "joined", lambda *_: contextlib.nullcontext())
    assert train.main([str(toy_dataset), *settings()]) == 1
    wanted = "batch_size is 8, which 3 processes cannot share evenly (--set batch_size=9)"
    assert capsys.readouterr().err.endswith(f": error: {wanted}\n")
    assert list(Path().rglob("*.pth")) == []


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Return the process ids of torchrun's ranks."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if is_running(pid, b"train.py")]


def is_running(pid: int, what: bytes = b"") -> bool:
    """Tell whether a process is there and no zombie, whose command line is empty."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return bool(words) and what in words
    return False


@pytest.mark.torture
def test_a_rank_that_is_killed_ends_all_within_seconds(toy_dataset):
    with ended(torchrun(TRAIN, toy_dataset, *settings(epochs=1000))) as process:
        assert any(line.startswith("epoch   2") for line in process.stdout)
        pids = ranks_of(process)
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "train.py: error: rank" in err
    assert "lost the others" in err
    assert not any(is_running(pid) for pid in pids)
    model.load_checkpoint(Path("runs/convnet/last.pth"))


if __name__ == "__main__":
    be_a_rank(Path(sys.argv[1]))
