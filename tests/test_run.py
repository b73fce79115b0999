"""Training: it learns, it can be stopped at any step, and it says when it went wrong."""

import errno
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_dataset import SMALL
from test_dataset import song as song_of_frames
from tqdm import tqdm

import audio
import cli
import dataset
import model
from dataset import Batch, Feed, OpenSong
from hparams import HParams, InputError
from learning import run as training
from learning import targets, validation
from learning.ranks import World

HP = replace(SMALL, chunk_slices=12, epochs=2, mask_target="ratio", valid_seconds=1)
CPU = torch.device("cpu")


def song(name: str, vocals: np.ndarray, accompaniment: np.ndarray) -> OpenSong:
    """Make a song in memory of two waveforms at 4 kHz."""
    both = torch.from_numpy(np.stack([vocals, accompaniment])).float()
    spec = audio.stft(both, audio.grid_at(4000, HP))  # (2, n_bins, n_frames)
    array = torch.view_as_real(spec.permute(2, 0, 1)).half().contiguous().numpy()
    return song_of_frames(name, array=array)


def sine(hertz: float, amplitude: float = 0.1, n_samples: int = 1600) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(n_samples) / 4000)


def song_of_noise(name: str, seed: int) -> OpenSong:
    """A wavering high tone is the voice; a low one and noise are the band."""
    rng = np.random.default_rng(seed)
    voice = sine(rng.uniform(900, 1500), 0.2) * (np.sin(np.arange(1600) / 120 + seed) > 0)
    return song(name, voice, sine(rng.uniform(100, 300), 0.2) + 0.01 * rng.standard_normal(1600))


def make_run(
    songs: list[OpenSong],
    hp: HParams = HP,
    *,
    valid: list[OpenSong] | None = None,
    resident: bool = True,
    world: World | None = None,
    shares: tuple[float, ...] = (),
) -> training.Run:
    """Set a run up that validates on the first song, unless others are given."""
    feed = Feed(songs, hp, CPU, resident)
    return training.Run(hp, feed, songs[:1] if valid is None else valid, world, shares)


def first_batch(run: training.Run) -> Batch:
    """This rank's share of the first batch of a run."""
    chunks = dataset.plan_epoch(run.songs, run.hp, 0)[: run.hp.batch_size]
    return next(run.feed.batches([run.world.share(chunks)]))


def example_of(run: training.Run, batch: Batch) -> tuple[torch.Tensor, ...]:
    spectrograms = run.feed.spectrograms(batch)
    return targets.make_example(spectrograms, batch.gains, batch.eq_db, run.curve_db, run.hp)


def go(
    run: training.Run,
    last: Path | None = None,
    until: int = 10**9,
    log: Callable[[dict[str, float], int], None] = lambda *_: None,
) -> training.Run:
    """Train to the end or up to a step, as train.py does, without the validation."""
    while not run.is_finished and run.step < until:
        training.train_epoch(run, log, lambda: run.step >= until, lambda: run.write(last))
        if run.step >= until:
            break
        run.epoch, run.batch = run.epoch + 1, 0
    return run


def resumed_from(path: Path, run: training.Run) -> training.Run:
    """Let a fresh run go on where another one was saved."""
    checkpoint = model.load_checkpoint(path)
    assert run.differences(checkpoint) == {}
    run.restore(checkpoint)
    return run


def state(run: training.Run) -> dict[str, torch.Tensor]:
    """All that training changes: weights, statistics of batch norm, moments, learning rate."""
    found = dict(run.model.state_dict())
    found |= {f"averaged {name}": value for name, value in run.averaged.state_dict().items()}
    optimizer = run.optimizer.state_dict()
    for index, moments in optimizer["state"].items():
        found |= {f"{index} {name}": torch.as_tensor(value) for name, value in moments.items()}
    assert optimizer["param_groups"][0]["lr"] is run.learning_rate
    found["counts"] = torch.tensor([run.epoch, run.batch, run.step])
    return found


def assert_same(run: training.Run, other: training.Run) -> None:
    states = state(run), state(other)
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(*(s[name] for s in states))] == []


def test_an_example_is_made_of_the_frames_it_is_asked_about(songs):
    for settings in ({}, {"stft_stride": 3}, {"stft_lookahead": 1}):
        hp = replace(HP, chunk_slices=6, **settings)
        run = make_run(songs, hp)
        batch = first_batch(run)
        spectrograms = run.feed.spectrograms(batch)
        n, stride, ones = len(spectrograms), hp.stft_stride, torch.ones(len(spectrograms), 2)
        features, target, _ = example_of(run, batch._replace(gains=ones))
        assert features.shape == (n, 1, hp.n_bins, 5 * stride + 5)
        assert target.shape == run.model(features)[..., ::stride].shape == (n, hp.n_bins, 6)
        for i in range(6):
            first = hp.lookback + i * stride
            answered = targets.mix(spectrograms[:, first : first + 1], ones)
            np.testing.assert_array_equal(target[..., i : i + 1], audio.ideal_ratio_mask(*answered))


@pytest.mark.parametrize("kind", sorted(training.OPTIMIZERS))
def test_a_step_with_its_pace_on_the_device_is_the_step_with_numbers(songs, kind):
    """The slow twin: learning rate and decay as Python numbers, torch's own moving average."""
    hp = replace(HP, optimizer=kind, learning_rate=0.003, ema_decay=0.9)
    run, twin = make_run(songs, hp), make_run(songs, hp)
    optimizer = training.OPTIMIZERS[kind](twin.model.parameters(), weight_decay=hp.weight_decay)
    averaged = torch.optim.swa_utils.AveragedModel(twin.model, use_buffers=True)
    for step, chunks in enumerate(dataset.batches_of(dataset.plan_epoch(songs, hp, 0), hp)):
        (batch,) = run.feed.batches([chunks])
        loss, norm = run.take_step(batch)
        run.step += 1

        optimizer.zero_grad()
        expected = training.loss_of(twin, batch)
        expected.backward()
        np.testing.assert_allclose(loss, expected.detach(), rtol=1e-4)
        n = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), hp.max_grad_norm)
        np.testing.assert_allclose(norm, n, rtol=1e-3)
        rate = training.learning_rate(step, hp, run.n_steps)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        averaged.multi_avg_fn = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        averaged.n_averaged += 1  # the first call would only copy
        averaged.update_parameters(twin.model)
    for network, expected in ((run.model, twin.model), (run.averaged, averaged.module)):
        for name, value in expected.state_dict().items():
            if value.is_floating_point():
                found = network.state_dict()[name]
                np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_the_worst_of_what_a_teacher_labelled_is_left_out_of_the_step(songs):
    taught = [replace(one, song=replace(one.song, taught=True)) for one in songs]
    losses = []
    for these, trim in ((songs, 0.0), (songs, 0.5), (taught, 0.5)):
        run = make_run(these, replace(HP, trim=trim))
        losses.append(float(run.take_step(first_batch(run))[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] < losses[1]


def test_a_step_in_bfloat16_learns_as_one_in_float32_does(songs):
    hp = replace(HP, model_type="convnet", mask_target="dominance", loss="cross-entropy")
    losses, hp = {}, replace(hp, learning_rate=0.01, epochs=3)
    for precision in ("float32", "bfloat16", "auto"):
        run = make_run(songs, replace(hp, precision=precision))
        losses[precision] = []
        go(run, log=lambda values, _step, of=precision: losses[of].append(values["loss/train"]))
        assert all(weight.dtype == torch.float32 for weight in run.model.parameters())
    assert losses["auto"] == losses["float32"] != losses["bfloat16"], "auto on the CPU is float32"
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.05)
    assert losses["bfloat16"][-1] < 0.9 * losses["bfloat16"][0]


def test_after_a_short_training_the_voice_is_clearer_than_in_the_mixture(toy_dataset):
    fast = {"chunk_slices": 16, "batch_size": 4, "epochs": 5, "seed": 2}
    hp = replace(HParams(), width=8, mask_target="ratio", **fast)
    learn, valid = dataset.hold_out(dataset.open_songs([toy_dataset], hp), hp)
    run = make_run(learn, hp, valid=valid)
    go(run)
    scores = validation.validate(run, valid)
    assert scores["floor"] + 2 < scores["soft"]


def test_a_run_ends_at_the_step_it_is_told(songs, monkeypatch):
    bars = []
    monkeypatch.setattr(cli, "progress", lambda n, _: bars.append(tqdm(total=n)) or bars[-1])
    for steps, n_epochs in ((1, 1), (10, 2)):  # 8 an epoch, and 2 epochs are asked for
        run = make_run(songs, replace(HP, steps=steps))
        while not run.is_finished:
            training.train_epoch(run, lambda *_: None, lambda: False, lambda: None)
            assert bars[-1].n == bars[-1].total, "the progress bar of every epoch ends at its end"
            assert not run.is_finished, "it is validated first"
            run.finish_epoch({"loss": 1.0, "soft": 2.0, "binary": 3.0})
        assert (run.step, run.n_steps, run.epoch) == (steps, steps, n_epochs)


def test_one_cycle_is_that_of_the_paper():
    hp = replace(HP, learning_rate=0.1)
    for n_steps in (1, 199):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        reference = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=n_steps + 1, cycle_momentum=False
        )
        for step in range(n_steps):
            found = training.learning_rate(step, hp, n_steps)
            assert found == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
            optimizer.step()
            reference.step()


EVERYTHING = {
    "second_voice": 0.5,
    "second_backing": 0.5,
    "mask_target": "phase",
    "equalizer_db": 3,
    "trim": 0.3,
    "steps": 11,  # in an epoch cut short
}


@pytest.mark.parametrize("settings", [{}, EVERYTHING])
def test_resuming_equals_not_stopping(songs, tmp_path, settings):
    mixed = [songs[0], *(replace(one, dataset=1) for one in songs[1:])]
    mixed[1] = replace(mixed[1], song=replace(mixed[1].song, taught=True))
    hp, last = replace(HP, **settings), tmp_path / "last.pth"
    whole = go(make_run(mixed, hp, shares=(1, 3)))
    first = dataset.count_batches(mixed, hp, 0)
    for until in (3, first, first + 1):
        stopped = go(make_run(mixed, hp, shares=(1, 3)), until=until)
        assert stopped.step == until
        stopped.write(last)
        torch.manual_seed(until)  # a new process starts with other random numbers
        resumed = resumed_from(last, make_run(mixed, hp, shares=(1, 3), resident=False))
        assert_same(resumed, stopped)
        assert_same(go(resumed), whole)
    checkpoint = model.load_checkpoint(last)
    assert checkpoint["taught"] == ["b hash of b"]
    assert make_run(mixed, hp, shares=(1, 2)).differences(checkpoint) == {
        "shares": "its datasets had other shares"
    }


def test_a_new_run_can_start_from_the_averaged_weights_of_an_old_one(songs, tmp_path):
    go(make_run(songs), until=4).write(tmp_path / "last.pth")
    checkpoint = model.load_checkpoint(tmp_path / "last.pth")
    run = make_run(songs)
    run.start_from(checkpoint)
    for network in (run.model, run.averaged):
        torch.testing.assert_close(network.state_dict(), checkpoint["weights"], rtol=0, atol=0)
    assert (run.epoch, run.batch, run.step, run.best_db) == (0, 0, 0, -np.inf)
    assert not run.optimizer.state


def poison_gradient(run: training.Run, step: int) -> None:
    """Make the gradient of one step infinite, while its loss is a number."""
    steps = []

    def poisoned(grad: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return grad * (math.inf if len(steps) == step else 1)

    run.model.head.weight.register_hook(poisoned)


def test_a_number_that_is_none_stops_the_run_and_the_last_save_stays(songs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECK_EVERY", 3)
    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    for step in (5, 6):  # found at a look within the epoch, and just after one
        run, last = make_run(songs), tmp_path / "last.pth"
        poison_gradient(run, step)
        planned = dataset.plan_epoch(songs, HP, 0)[4 * (step - 1) : 4 * step]
        ids = sorted({songs[i].song.id for i in planned.songs.flat})
        with pytest.raises(InputError, match=rf"^step {step}: loss is ") as error:
            go(run, last)
        assert f"songs {', '.join(ids)} (" in str(error.value)
        assert model.load_checkpoint(last)["step"] == 3, "finite weights, from before"


@pytest.mark.parametrize("broken", ["no module", "full disk"])
def test_a_log_that_cannot_be_written_is_one_warning_and_training_goes_on(
    songs, tmp_path, monkeypatch, capfd, broken
):
    from tensorboard.summary.writer import record_writer

    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if broken == "full disk":
        monkeypatch.setattr(record_writer.RecordWriter, "write", write)
    else:
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    warnings: list[str] = []
    with training.open_log(tmp_path, warnings.append) as log:
        run = go(make_run(songs, replace(HP, steps=2)), log=log)
        log({"again": 1.0}, 3)
    assert run.step == 2
    (warning,) = warnings
    assert warning.startswith("TensorBoard log stopped: ")
    assert capfd.readouterr().err == ""
