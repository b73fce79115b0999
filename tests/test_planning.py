"""What is found out before a run: does its data fit, how fast is it, which learning rate?"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import CPU, HP, make_run, song_of_noise

import model
from dataset import OpenSong
from hparams import InputError
from learning import planning, sampling, validation
from learning import run as training
from learning.ranks import World


@pytest.fixture(scope="module")
def songs() -> list[OpenSong]:
    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


# --- Speed --------------------------------------------------------------------------------------


class Clock:
    """A clock that goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(planning, "time", self)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.parametrize(("minutes", "expected"), [(10, 262), (1, 22), (0.01, 1)])
def test_a_number_of_minutes_is_a_number_of_steps(songs, monkeypatch, minutes, expected):
    clock, taken = Clock(monkeypatch), []
    n_batches = sampling.count_batches(songs, HP, 0)
    assert n_batches == 8

    def take(*_args) -> None:
        taken.append(0)
        clock.now += 1 if len(taken) > 3 else 100  # the first steps find memory and make plans

    def listen(*_args) -> None:
        clock.now += 10

    monkeypatch.setattr(training, "train_step", take)
    monkeypatch.setattr(validation, "validate", listen)
    # One validation is put aside for the end; the others come after 8 steps each.
    assert expected == max(1, int((60 * minutes - 10) / (1 + 10 / n_batches)))
    assert planning.steps_in(make_run(songs), minutes) == expected
    assert len(taken) < 20


def test_a_run_shorter_than_the_measurement_is_measured(songs, monkeypatch):
    monkeypatch.setattr(planning, "MEASURE_SECONDS", 0)
    assert planning.steps_in(make_run(songs, replace(HP, steps=1)), 1) > 1


# --- The range test -----------------------------------------------------------------------------


def script_losses(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float]
) -> list[tuple[float, float]]:
    """Let the loss of a step be a function of its learning rate; returns what was asked."""
    asked = []

    def step(run, *_batch) -> tuple[torch.Tensor, torch.Tensor]:
        rate = run.optimizer.param_groups[0]["lr"]
        asked.append((rate, loss(rate)))
        run.optimizer.step()
        run.scheduler.step()
        return torch.tensor(asked[-1][1]), torch.tensor(1.0)

    monkeypatch.setattr(training, "train_step", step)
    return asked


def smoothed(asked: list[tuple[float, float]]) -> list[float]:
    """Every loss with those before it, each step back counting a tenth less."""
    losses = [loss for _, loss in asked]
    return [
        np.average(losses[: n + 1], weights=0.9 ** np.arange(n, -1, -1)) for n in range(len(losses))
    ]


def test_the_range_test_suggests_the_rate_at_nine_tenths_of_the_fall(songs, monkeypatch):
    def loss(rate: float) -> float:  # falls from 1 at 1e-5 to 0.2 at 1e-3, rises from 0.1 on
        return 1 - 0.4 * min(max(math.log10(rate) + 5, 0), 2) + max(0.0, math.log10(rate) + 1) / 4

    asked, n_reported = script_losses(monkeypatch, loss), []
    curve, suggestion = planning.find_lr(make_run(songs), n_reported.append)
    assert len(curve) == len(asked) == sum(n_reported) == planning.FIND_LR_STEPS
    np.testing.assert_allclose([rate for rate, _ in curve], np.geomspace(1e-6, 1, 200), rtol=1e-6)
    np.testing.assert_allclose([value for _, value in curve], smoothed(asked), rtol=1e-5)
    values = np.array(smoothed(asked))
    wanted = asked[int(np.argmax(values <= values.min() + 0.1 * (values[0] - values.min())))][0]
    assert suggestion == pytest.approx(wanted, rel=1e-6)
    assert 10**-3.2 < suggestion < 10**-2.5, "the smoothing lags by some 10 steps of 0.03 decades"


@pytest.mark.parametrize("first", [0.3, 5.0])
def test_one_easy_or_hard_batch_does_not_decide_where_the_way_down_begins(
    songs, monkeypatch, first
):
    def loss(rate: float) -> float:  # falls from 1 at 1e-5 to 0.2 at 1e-3
        return first if rate < 1.01e-6 else 1 - 0.4 * min(max(math.log10(rate) + 5, 0), 2)

    script_losses(monkeypatch, loss)
    _, suggestion = planning.find_lr(make_run(songs), lambda _: None)
    assert 10**-3.4 < suggestion < 10**-2.4


def test_the_range_test_ends_where_the_loss_has_grown_by_three_times_its_best(songs, monkeypatch):
    asked = script_losses(monkeypatch, lambda rate: 0.5 if rate < 1e-2 else 50.0)
    curve, suggestion = planning.find_lr(make_run(songs), lambda _: None)
    assert 1e-2 <= asked[-1][0] == curve[-1][0] < 2e-2
    assert curve[-1][1] >= 4 * 0.5 > curve[-2][1]
    assert 1e-6 <= suggestion < 1e-2


def test_the_range_test_ends_where_the_loss_is_no_number(songs, monkeypatch):
    def loss(rate: float) -> float:
        return float("nan") if rate > 1e-2 else 1 - 0.1 * math.log10(rate / 1e-6)

    script_losses(monkeypatch, loss)
    curve, suggestion = planning.find_lr(make_run(songs), lambda _: None)
    assert math.isnan(curve[-1][1])
    assert all(math.isfinite(value) for _, value in curve[:-1])
    assert 1e-3 < suggestion < 1e-2
    # A NaN among the steps that tell where the way down begins.
    script_losses(monkeypatch, lambda rate: loss(rate * 1e4))
    curve, suggestion = planning.find_lr(make_run(songs), lambda _: None)
    assert math.isnan(curve[-1][1])
    assert suggestion in [rate for rate, _ in curve[:-1]]
    script_losses(monkeypatch, lambda _rate: float("nan"))
    with pytest.raises(InputError, match="the first loss is nan"):
        planning.find_lr(make_run(songs), lambda _: None)


@pytest.mark.torture
def test_the_range_test_of_a_real_network_suggests_a_rate_that_was_tried(songs):
    curve, suggestion = planning.find_lr(make_run(songs), lambda _: None)
    assert suggestion in [rate for rate, _ in curve]
    assert 1e-5 < suggestion < 0.5
    assert min(value for _, value in curve) < curve[0][1]


# --- Memory -------------------------------------------------------------------------------------


def test_a_step_needs_what_the_layers_keep_and_the_weights_five_times():
    hp = replace(HP, model_type="convnet", batch_size=6)  # width 4: 33 bins, 16 frames
    per_chunk = 4 * (
        33 * 16  # features
        + 2 * 4 * 33 * 16  # first convolution; its norm, which the rectifier overwrites
        + 2 * 2 * 33 * 14  # second
        + 11 * 14  # pooled
        + 2 * 8 * 11 * 14  # third
        + 2 * 2 * 11 * 12  # fourth
    )  # 2 of 14, as the second convolution has half the channels
    per_chunk += 4 * 11 * 14  # the other channel of what was pooled
    per_chunk += 8 * 2 * (11 * 14 + 4 * 12)  # where the maxima were, int64
    per_chunk += 4 * (
        2 * 4 * 12 + 16 * 12 + 16 * 33
    )  # pooled, fifth, and the head's transposed weights
    per_chunk += 4 * 3 * 4 * 33 * 16  # gradients of the largest on their way
    n_weights = sum(weight.numel() for weight in model.build_model(hp).parameters())
    per_chunk += 64 * 33 * 16  # the spectrograms, their sum, the example
    expected = 5 * 4 * n_weights + 6 * per_chunk
    assert planning.step_bytes(hp, CPU) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("model_type", sorted(model.MODELS))
def test_the_memory_of_a_step_grows_with_the_batch_and_halves_in_bfloat16(model_type):
    def count(n_processes: int = 1, **settings: object) -> int:
        hp = replace(HP, model_type=model_type, width=16, **settings)
        return planning.step_bytes(hp, CPU, n_processes)

    weights = model.build_model(replace(HP, model_type=model_type, width=16)).parameters()
    fixed = 5 * 4 * sum(weight.numel() for weight in weights)
    mixing = 64 * 33 * 16  # complex numbers stay as they are
    one = count(batch_size=1) - fixed
    assert one > 0
    assert count(batch_size=12) == fixed + 12 * one
    assert count(batch_size=12, precision="bfloat16") == fixed + 6 * (one + mixing)
    assert count(batch_size=12, n_processes=4) == count(batch_size=3)
    assert count(batch_size=1, chunk_slices=48) > fixed + 2.5 * one


def test_a_dataset_is_loaded_where_it_fits_or_as_asked(songs, monkeypatch):
    n_bytes = sum(song.spectrogram.nbytes for song in songs)
    step = planning.step_bytes(HP, CPU)
    enough = 2 * (n_bytes + step)

    def place(free: int, where: str = "auto", world: World | None = None) -> tuple[bool, str]:
        monkeypatch.setattr(planning, "_free_bytes", lambda _device: free)
        return planning.place(songs, HP, CPU, world or World(), where)

    assert place(enough + 2)[0]
    assert not place(enough)[0], "half of what is free, less a step"
    assert place(max(n_bytes, step), "device")[0], "as asked, though it is more than half"
    with monkeypatch.context() as patch:
        patch.setattr(planning, "step_bytes", lambda *_args: 0)
        with pytest.raises(InputError, match=r"--dataset-on device: .* do not fit"):
            place(n_bytes - 1, "device")
    assert not place(10**12, "disk")[0]
    halves = World(0, 2, 0, 2)
    half_a_step = planning.step_bytes(HP, CPU, 2)
    assert place(4 * (n_bytes + half_a_step) + 4, world=halves)[0]
    assert not place(4 * (n_bytes + half_a_step), world=halves)[0], "two ranks, one memory"
    sizes = "0.00 GB free{}; a step takes 0.00 GB)"
    fits = "0.00 GB, in the memory of the machine (8.00 GB free; a step takes 0.00 GB)"
    assert place(8 * 10**9)[1] == fits
    read = "0.00 GB, read from disk ahead of the steps ("
    assert place(step)[1] == read + sizes.format("")
    assert place(step, "disk")[1] == read + sizes.format(", as asked")
    with pytest.raises(InputError, match=r"a step takes .* are free \(--set batch_size=3\)"):
        place(step - 1, "disk")
    assert "machine (0.00 GB free, as asked;" in place(max(n_bytes, step), "device")[1]


def test_nine_tenths_of_a_gpus_memory_may_be_filled_but_for_a_step(songs, monkeypatch):
    gpu = torch.device("cuda", 0)
    n_bytes = sum(song.spectrogram.nbytes for song in songs)
    enough = round((n_bytes + planning.step_bytes(HP, CPU)) / 0.9)
    for free, fits in ((enough + 9, True), (enough - 9, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 10**12))
        resident, reason = planning.place(songs, HP, gpu, World(), "auto")
        assert resident == fits
        assert ("in the memory of the GPU" in reason) == fits


def test_the_free_memory_of_this_machine_is_known():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 10**6 < planning._free_bytes(CPU) <= total
