"""Training: it learns, it can be stopped at any step, and it says when it went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import dataset
import model
import training
from dataset import PARTS, OpenSong, Song
from hparams import HParams, InputError

HP = HParams(
    sample_rate=4000,
    n_fft=64,
    hop_length=16,
    stft_frames=5,
    width=4,
    chunk_slices=12,
    batch_size=4,
    epochs=2,
    mask_target="ratio",
    valid_seconds=1,
)
CPU = torch.device("cpu")


def song(name: str, vocals: np.ndarray, accompaniment: np.ndarray) -> OpenSong:
    """Make a song in memory from two waveforms at 4 kHz."""
    both = torch.from_numpy(np.stack([vocals, accompaniment])).float()
    spec = audio.stft(both, audio.grid_at(4000, HP))  # (2, n_bins, n_frames)
    array = torch.view_as_real(spec.permute(2, 0, 1)).half().contiguous().numpy()
    about = Song(
        id=name,
        file="",
        split="train",
        singer=name,
        group=name,
        parts=PARTS,
        n_frames=len(array),
        sample_rate=4000,
        seconds=len(vocals) / 4000,
        sha256=f"hash of {name}",
        inputs=(),
    )
    return OpenSong(about, array, dataset._levels_db(array, PARTS))


def sine(hertz: float, amplitude: float = 0.1, n_samples: int = 1600) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(n_samples) / 4000)


def song_of_noise(name: str, seed: int) -> OpenSong:
    """A wavering high tone is the voice; a low one and noise are the band."""
    rng = np.random.default_rng(seed)
    voice = sine(rng.uniform(900, 1500), 0.2) * (np.sin(np.arange(1600) / 120 + seed) > 0)
    return song(name, voice, sine(rng.uniform(100, 300), 0.2) + 0.01 * rng.standard_normal(1600))


@pytest.fixture(scope="module")
def songs() -> list[OpenSong]:
    return [song_of_noise(name, seed) for seed, name in enumerate("abc")]


def go(
    run: training.Run,
    last: Path,
    until: int = 10**9,
    log: Callable[[dict[str, float], int], None] = lambda *_: None,
) -> training.Run:
    """Train to the end or up to a step, as train.py does."""
    while run.epoch < run.hp.epochs and run.step < until:
        training.train_epoch(run, lambda _: None, log, lambda: run.step >= until, last)
        if run.step >= until:
            break
        run.epoch, run.batch = run.epoch + 1, 0
    return run


def state(run: training.Run) -> dict[str, torch.Tensor]:
    """All that training changes: weights, statistics of batch norm, moments, learning rate."""
    found = dict(run.model.state_dict())
    optimizer = run.optimizer.state_dict()
    for index, moments in optimizer["state"].items():
        found |= {f"{index} {name}": torch.as_tensor(value) for name, value in moments.items()}
    for name in ("lr", "betas"):
        found[name] = torch.tensor(optimizer["param_groups"][0][name])
    found["counts"] = torch.tensor([run.epoch, run.batch, run.step])
    return found


def assert_same(ours: training.Run, theirs: training.Run) -> None:
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- A step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(model.MODELS))
@pytest.mark.parametrize("mask_target", ["activity", "dominance", "ratio"])
def test_a_tiny_network_learns_one_batch_by_heart(songs, model_type, mask_target):
    hp = replace(
        HP,
        model_type=model_type,
        mask_target=mask_target,
        schedule="constant",
        learning_rate=0.02,
        loss_weight=0,  # all bins alike: then the entropy of the target is the least loss
        width=8,
        remix=0,
    )
    run = training.Run(hp, songs, CPU)
    batch = dataset.plan_epoch(songs, hp, 0)[0]
    spectrograms = dataset.read_batch(songs, batch, hp)
    gains = torch.tensor([chunk[4:] for chunk in batch])
    _, target = training.make_example(run, spectrograms, gains)
    best = float(torch.special.entr(target).add(torch.special.entr(1 - target)).mean())
    losses = [float(training.train_step(run, spectrograms, gains)[0]) for _ in range(60)]
    assert 0.05 < float(target.mean()) < 0.95
    assert losses[-1] - best < 0.05 * (losses[0] - best)


def test_an_example_is_centred_on_the_frames_it_is_asked_about(songs):
    for stride in (1, 3):
        hp = replace(HP, stft_stride=stride, chunk_slices=6)
        run = training.Run(hp, songs, CPU)
        batch = dataset.plan_epoch(songs, hp, 0)[0]
        spectrograms = dataset.read_batch(songs, batch, hp)
        features, target = training.make_example(run, spectrograms, torch.ones(len(batch), 2))
        assert features.shape == (len(batch), 1, hp.n_bins, 5 * stride + 5)
        assert target.shape == (len(batch), hp.n_bins, 6)
        assert run.model(features)[..., ::stride].shape == target.shape
        for i in range(6):
            centre = spectrograms[:, 2 + i * stride : 3 + i * stride]
            vocals, rest = dataset.mix(centre, torch.ones(len(batch), 2))
            expected = audio.ideal_ratio_mask(vocals, rest)
            np.testing.assert_array_equal(target[..., i : i + 1], expected)


def test_with_a_stride_a_step_asks_about_every_third_column_only(songs):
    hp = replace(HP, stft_stride=3)
    run, twin = training.Run(hp, songs, CPU), training.Run(hp, songs, CPU)
    batch = dataset.plan_epoch(songs, hp, 0)[0]
    spectrograms, gains = dataset.read_batch(songs, batch, hp), torch.ones(len(batch), 2)
    features, target = training.make_example(twin, spectrograms, gains)
    columns = [3 * i for i in range(hp.chunk_slices)]
    logits = twin.model(features)[..., columns]
    heard = features[:, 0, :, [hp.context + column for column in columns]]
    expected = training.mask_loss(logits, target, heard, hp)
    loss, _ = training.train_step(run, spectrograms, gains)
    np.testing.assert_allclose(loss, expected.detach(), rtol=1e-6)


def test_the_gains_reach_the_mixture_and_the_target(songs):
    run = training.Run(HP, songs, CPU)
    batch = dataset.plan_epoch(songs, HP, 0)[0]
    spectrograms = dataset.read_batch(songs, batch, HP)
    n = len(batch)
    no_voice, target = training.make_example(run, spectrograms, torch.tensor([[0.0, 1.0]] * n))
    assert not target.any()
    _, target = training.make_example(run, spectrograms, torch.tensor([[1.0, 0.0]] * n))
    np.testing.assert_allclose(target[target > 0], 1, rtol=1e-6)
    flipped, _ = training.make_example(run, spectrograms, torch.tensor([[0.0, -1.0]] * n))
    np.testing.assert_array_equal(flipped, no_voice)
    silence, _ = training.make_example(run, spectrograms, torch.zeros(n, 2))
    assert not silence.any()


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_a_bin_counts_by_its_amplitude_to_the_power_of_the_loss_weight(power):
    amplitude = torch.tensor([1.0, 0.1, 0.01, 0.001]).reshape(1, 4, 1)
    hp = replace(HP, mixture_power=power, min_level_db=-190.0)
    features = audio.features(amplitude + 0j, torch.zeros(4), power, hp)
    logits = torch.tensor([2.0, -1.0, 0.0, 3.0]).reshape(1, 4, 1)
    target = torch.tensor([0.0, 1.0, 0.3, 1.0]).reshape(1, 4, 1)
    errors = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log())
    for loss_weight in (0.0, 0.5, 1.0):
        weights = amplitude**loss_weight
        expected = float((weights * errors).sum() / weights.sum())
        found = training.mask_loss(logits, target, features, replace(hp, loss_weight=loss_weight))
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_silent_batch_has_a_finite_loss():
    silence = torch.zeros(1, 4, 2)
    assert training.mask_loss(silence, silence, silence, HP).isfinite()


def test_gradients_are_scaled_down_to_the_norm_allowed(songs):
    batch = dataset.plan_epoch(songs, HP, 0)[0]
    spectrograms = dataset.read_batch(songs, batch, HP)
    norms = []
    for allowed in (1e-3, 1e6):
        run = training.Run(replace(HP, max_grad_norm=allowed), songs, CPU)
        _, before = training.train_step(run, spectrograms, torch.ones(len(batch), 2))
        grads = [weight.grad.flatten() for weight in run.model.parameters()]
        norms.append((float(before), float(torch.cat(grads).norm())))
    assert norms[0][0] == norms[1][0] > 1e-2, "what is told is the norm before"
    assert norms[0][1] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1][1] == pytest.approx(norms[1][0], rel=1e-5)


def test_the_same_seed_gives_the_same_weights(songs, tmp_path):
    runs = [
        go(training.Run(replace(HP, seed=seed), songs, CPU), tmp_path / "last.pth")
        for seed in (0, 0, 1)
    ]
    assert_same(runs[0], runs[1])
    assert not torch.equal(runs[0].model.head.weight, runs[2].model.head.weight)


# --- The learning rate --------------------------------------------------------------------------


def rates(n_steps: int, **settings: object) -> list[float]:
    """The learning rate of every step of a run."""
    hp = replace(HP, learning_rate=0.1, **settings)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.AdamW([weight], lr=hp.learning_rate)
    scheduler = training.make_scheduler(optimizer, hp, n_steps)
    found = []
    for _ in range(n_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("n_steps", [1, 2, 10, 199])
def test_one_cycle_rises_to_the_learning_rate_and_falls_to_almost_nothing(n_steps):
    peak = 0.3 * (n_steps + 1) - 1

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * share))

    expected = [
        cosine(0.1 / 25, 0.1, step / peak)
        if step <= peak
        else cosine(0.1, 0.1 / 25e4, (step - peak) / (n_steps - peak))
        for step in range(n_steps)
    ]
    np.testing.assert_allclose(rates(n_steps, schedule="one-cycle"), expected, rtol=1e-6)
    if n_steps == 199:
        assert max(expected) == pytest.approx(0.1)


def test_cyclic_is_a_triangle_of_two_epochs_up_and_two_down():
    n_steps, epochs = 120, 12  # 10 steps an epoch
    found = rates(n_steps, schedule="cyclic", epochs=epochs)
    expected = np.interp(np.arange(n_steps) % 40, [0, 20, 40], [0.01, 0.1, 0.01])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_constant_stays():
    assert set(rates(50, schedule="constant")) == {0.1}


# --- Stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["one-cycle", "cyclic", "constant"])
def test_resuming_equals_not_stopping(songs, tmp_path, schedule):
    hp = replace(HP, schedule=schedule)
    last = tmp_path / "last.pth"
    whole = go(training.Run(hp, songs, CPU), last)
    per_epoch = [dataset.count_batches(songs, hp, epoch) for epoch in range(2)]
    assert whole.step == whole.n_steps == sum(per_epoch)
    for until in (0, 3, per_epoch[0], per_epoch[0] + 1, sum(per_epoch), 10**9):
        stopped = go(training.Run(hp, songs, CPU), last, until)
        assert stopped.step == min(until, sum(per_epoch))
        stopped.save(last)
        torch.manual_seed(until)  # a new process starts with other random numbers
        resumed = training.Run(hp, songs, CPU)
        resumed.restore(last, model.load_checkpoint(last))
        assert_same(resumed, stopped)
        assert_same(go(resumed, last), whole)


def test_a_stop_ends_after_the_step_and_leaves_the_epoch_unfinished(songs, tmp_path):
    run = go(training.Run(HP, songs, CPU), tmp_path / "last.pth", until=2)
    assert (run.epoch, run.batch, run.step) == (0, 2, 2)


def test_all_that_was_found_out_survives_a_save(songs, tmp_path):
    run = go(training.Run(HP, songs, CPU), tmp_path / "last.pth", until=2)
    run.best_db, run.scores = 1.5, {"soft": 1.5, "binary": float("nan")}
    run.mask_settings["mask_at_eval"] = True
    run.save(tmp_path / "last.pth")
    resumed = training.Run(HP, songs, CPU)
    resumed.restore(tmp_path / "last.pth", model.load_checkpoint(tmp_path / "last.pth"))
    assert resumed.best_db == 1.5
    np.testing.assert_equal(resumed.scores, run.scores)
    assert resumed.mask_settings == run.mask_settings


def test_best_weights_cannot_be_resumed_from_and_other_songs_are_refused(songs, tmp_path):
    run = training.Run(HP, songs, CPU)
    run.save(tmp_path / "best.pth", whole=False)
    run.save(tmp_path / "last.pth")
    with pytest.raises(InputError, match=r"best.pth: holds no training state \(resume from last"):
        run.restore(tmp_path / "best.pth", model.load_checkpoint(tmp_path / "best.pth"))
    for others in (songs[:2], songs[::-1], [*songs[:2], song_of_noise("d", 9)]):
        other = training.Run(HP, others, CPU)
        with pytest.raises(InputError, match=r"last.pth: was trained on other songs"):
            other.restore(tmp_path / "last.pth", model.load_checkpoint(tmp_path / "last.pth"))


def test_long_epochs_are_saved_within(songs, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECK_EVERY", 2)
    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    run = go(training.Run(HP, songs, CPU), tmp_path / "last.pth", until=5)
    found = model.load_checkpoint(tmp_path / "last.pth")
    assert (found["step"], found["resume"]["batch"]) == (4, 4)
    resumed = training.Run(HP, songs, CPU)
    resumed.restore(tmp_path / "last.pth", found)
    assert_same(go(resumed, tmp_path / "last.pth", until=5), run)


# --- Going wrong --------------------------------------------------------------------------------


def poison_read(run: training.Run, monkeypatch: pytest.MonkeyPatch, step: int) -> list:
    """Make the batch of one step hold a NaN; returns the batches read."""
    read, batches = dataset.read_batch, []

    def poisoned(songs, batch, hp):
        batches.append(batch)
        spectrograms = read(songs, batch, hp)
        if len(batches) == step:
            spectrograms[0, 2, 0, 3, 0] = float("nan")
        return spectrograms

    monkeypatch.setattr(dataset, "read_batch", poisoned)
    return batches


def poison_gradient(run: training.Run, monkeypatch: pytest.MonkeyPatch, step: int) -> list:
    """Make the gradient of one step infinite, while its loss is a number."""
    steps = []

    def poisoned(grad: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        return grad * (math.inf if len(steps) == step else 1)

    run.model.head.weight.register_hook(poisoned)
    return steps


@pytest.mark.parametrize("poison", [poison_read, poison_gradient])
@pytest.mark.parametrize("step", [5, 6])  # found at a look within the epoch, and just after one
def test_a_number_that_is_none_stops_the_run_and_the_last_save_stays(
    songs, tmp_path, monkeypatch, poison, step
):
    monkeypatch.setattr(training, "CHECK_EVERY", 3)
    monkeypatch.setattr(training, "SAVE_EVERY", -1)
    run, last = training.Run(HP, songs, CPU), tmp_path / "last.pth"
    batches = poison(run, monkeypatch, step)
    planned = dataset.plan_epoch(songs, HP, 0)[step - 1]
    with pytest.raises(InputError, match=rf"^step {step}: loss is ") as error:
        go(run, last)
    ids = sorted({songs[i].song.id for chunk in planned for i in (chunk[0], chunk[2])})
    assert f"songs {', '.join(ids)} (" in str(error.value)
    assert "nan" in str(error.value) or "inf" in str(error.value)
    assert len(batches) >= step
    assert model.load_checkpoint(last)["step"] == 3, "finite weights, from before"


def test_a_bad_number_in_the_step_of_a_stop_is_found(songs, tmp_path, monkeypatch):
    run = training.Run(HP, songs, CPU)
    poison_read(run, monkeypatch, 2)
    with pytest.raises(InputError, match=r"^step 2: loss is nan"):
        go(run, tmp_path / "last.pth", until=2)


def test_a_stop_that_arrives_between_two_looks_waits_for_the_next_step(songs, tmp_path):
    asked = []

    def stopped() -> bool:
        asked.append(len(asked) + 1)
        return asked[-1] >= 3

    run = training.Run(HP, songs, CPU)
    training.train_epoch(run, lambda _: None, lambda *_: None, stopped, tmp_path / "last.pth")
    assert run.step == len(asked) == 3, "one answer a step"


# --- Scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backing_db", [0, 6, -20])
def test_the_mixture_scores_as_loud_as_its_backing_and_ideal_masks_find_the_voice(backing_db):
    # Two tones 30 bins apart: their product sums to nothing, so SI-SDR is the ratio of energies.
    tones = song("tones", sine(250), sine(1500, 0.1 * 10 ** (backing_db / 20)))
    found = training.bounds(training.Run(HP, [tones], CPU), [tones])
    assert found["floor"] == pytest.approx(-backing_db, abs=0.05)
    # Beyond their main lobes (2 bins) a Hann window's leakage is 31 dB and more down.
    assert found["ideal_binary"] > found["floor"] + 25
    assert found["ideal_ratio"] > found["floor"] + 25


def test_songs_without_a_voice_are_left_out_of_the_scores(songs):
    silent = song("silent", 0 * sine(1), sine(300))
    run = training.Run(HP, songs, CPU)
    assert training.bounds(run, [songs[0], silent]) == training.bounds(run, songs[:1])
    scores = training.validate(run, [silent])
    assert math.isfinite(scores["loss"])
    assert math.isnan(scores["soft"])


def perfect(run: training.Run, songs: list[OpenSong]) -> None:
    """Let the run's network answer what a mask of the energies would be."""

    class Oracle(torch.nn.Module):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            share = audio.ideal_ratio_mask(*training._signals(run, self.song))
            return share.logit(1e-9)

    run.model = Oracle()
    run.model.song = songs[0]


def test_a_network_that_knows_the_answer_scores_as_the_ideal_masks(songs):
    run = training.Run(HP, songs, CPU)
    perfect(run, songs)
    scores, ideal = training.validate(run, songs[:1]), training.bounds(run, songs[:1])
    assert scores["soft"] == pytest.approx(ideal["ideal_ratio"], abs=0.2)
    assert scores["binary"] == pytest.approx(ideal["ideal_binary"], abs=0.2)


def test_validation_changes_nothing(songs):
    run = training.Run(HP, songs, CPU)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    first = training.validate(run, songs)
    assert training.validate(run, songs) == first
    after = run.model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_every_frame_of_a_song_is_predicted_with_silence_around(songs):
    run = training.Run(HP, songs, CPU)
    run.model.eval()
    vocals, accompaniment = training._signals(run, songs[0])
    logits = training._predict(run, training._hear(run, vocals + accompaniment))
    features = audio.features((vocals + accompaniment)[0], run.curve_db, HP.mixture_power, HP)
    with torch.no_grad():
        one_by_one = run.model(audio.slices(features, HP))  # (n_frames, n_bins, 1)
    np.testing.assert_allclose(logits[0], one_by_one[..., 0].T, atol=1e-5)


def test_the_picture_has_the_lows_at_the_bottom_and_the_sounds_are_those_of_the_song(songs):
    low = song("low", sine(125), 0 * sine(1))  # bin 2 of 33
    picture, sounds = training.picture_and_sound(training.Run(HP, songs, CPU), low)
    n_bins = HP.n_bins
    assert picture.shape == (3 * n_bins, low.song.n_frames)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert abs(int(picture[:n_bins].mean(1).argmax()) - (n_bins - 1 - 2)) <= 1
    # The mixture is the voice alone: to float16, the song that went in.
    for name in ("mixture", "truth"):
        np.testing.assert_allclose(sounds[name], sine(125)[: len(sounds[name])], atol=1e-3)


def test_after_a_short_training_the_voice_is_clearer_than_in_the_mixture(toy_dataset, tmp_path):
    fast = {"chunk_slices": 16, "batch_size": 4, "epochs": 4, "learning_rate": 0.01}
    hp = replace(HParams(), width=8, mask_target="ratio", **fast)
    learn, valid = dataset.hold_out(dataset.open_songs([toy_dataset], hp), hp)
    run = training.Run(hp, learn, CPU)
    bounds = training.bounds(run, valid)
    go(run, tmp_path / "last.pth")
    scores = training.validate(run, valid)
    assert bounds["floor"] + 2 < scores["soft"] < bounds["ideal_ratio"]


# --- The log ------------------------------------------------------------------------------------


def test_the_log_holds_curves_pictures_and_sounds(songs, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings: list[str] = []
    log = training.Log(tmp_path, warnings.append)
    log.scalars({"loss": 0.5, "rate": 0.1}, 3)
    picture, sounds = training.picture_and_sound(training.Run(HP, songs, CPU), songs[0])
    log.song(picture, {**sounds, "loud": 3 * sounds["mixture"], "none": np.zeros(0)}, HP, 3)
    log.close()
    assert warnings == []
    found = EventAccumulator(str(tmp_path)).Reload()
    tags = found.Tags()
    assert set(tags["scalars"]) == {"loss", "rate"}
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(3, 0.5)]
    assert tags["images"] == ["masks"]
    assert set(tags["audio"]) == {"mixture", "estimate", "truth", "loud"}, "none is left out"


def test_a_log_that_cannot_be_made_is_told_once_and_training_goes_on(songs, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    warnings: list[str] = []
    log = training.Log(tmp_path / "file" / "run", warnings.append)
    run = training.Run(HP, songs, CPU)
    go(run, tmp_path / "last.pth", log=log.scalars)
    log.song(*training.picture_and_sound(run, songs[0]), HP, 1)
    log.close()
    assert run.step == run.n_steps
    assert len(warnings) == 1
    assert "TensorBoard log stopped" in warnings[0]
    assert "training goes on" in warnings[0]


@pytest.mark.parametrize("method", ["add_scalar", "add_image", "add_audio", "close"])
def test_a_log_that_breaks_later_is_told_once_too(songs, tmp_path, monkeypatch, method):
    warnings: list[str] = []
    log = training.Log(tmp_path, warnings.append)
    writer = log._writer

    def full(*_args, **_options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, method, full)
    for step in range(3):
        log.scalars({"loss": 0.5}, step)
        log.song(np.zeros((3, 4)), {"mixture": np.zeros(10)}, HP, step)
    log.close()
    monkeypatch.undo()
    writer.close()
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
