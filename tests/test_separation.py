"""From a song to its vocals: the same however it arrives, and vocals plus the rest are the song."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import sounds
import torch
from test_model import lively
from torch import nn

import audio
import cli
from hparams import HParams, InputError
from scoring import metrics, songs
from separation import READ_SAMPLES, Separator, Stream, split
from sound import reading

ASSETS = Path(__file__).parent.parent / "assets"
SOFT = {"mask_at_eval": False, "eval_mask_threshold": 0.5, "noise_gate": 0.0}
NEVER = torch.full((1,), -torch.inf, dtype=torch.float64)
BINARY = {**SOFT, "mask_at_eval": True}
HP = HParams(model_type="convnet", width=2, stft_frames=9, block_frames=16, precision="float32")


def make(hp: HParams = HP, mask_settings: dict = SOFT, model: nn.Module | None = None) -> Separator:
    """Make a separator with a network of which the answers move."""
    model = lively(hp) if model is None else model
    curve_db = audio.weighting_curve_db(hp)
    separator = Separator(model, hp, curve_db, mask_settings, torch.device("cpu"))
    separator.stereo = "mean"
    return separator


@pytest.fixture(scope="module")
def separator() -> Separator:
    return make()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Make a waveform whose loudness changes, from -40 dB to full scale."""
    rng, knots = np.random.default_rng(seed), np.arange(0, shape[-1] + 4000, 4000)
    levels = 10 ** np.random.default_rng(1).uniform(-2, 0, len(knots))
    loudness = np.interp(np.arange(shape[-1]), knots, levels)
    return (rng.uniform(-1, 1, shape) * loudness).astype(np.float32)


def push_all(stream: Stream, wav: np.ndarray, sizes: Iterator[int]) -> np.ndarray:
    """Push a waveform in pieces; return all vocals."""
    parts, start = [], 0
    while start < wav.shape[-1]:
        size = next(sizes)
        parts.append(stream.push(wav[:, start : start + size]))
        start += size
    parts.append(stream.finish())
    return torch.cat(parts, -1).numpy()


def reference(separator: Separator, wav: np.ndarray, sample_rate: int) -> np.ndarray:
    """Separate slowly: the whole song's STFT, every slice on its own, the whole inverse."""
    hp, grid = separator.hp, audio.grid_at(sample_rate, separator.hp)
    spec = audio.stft(torch.from_numpy(wav), grid)  # (n_channels, n_bins, n_frames)
    seen = audio.to_network_bins(spec.mean(0), hp)
    level_db = audio.loudness_db(seen[None], separator.curve_db)
    seen = seen * 10 ** (audio.level_gain_db(level_db, NEVER, 0, hp)[0] / 20).float()
    seen = audio.features(seen, separator.curve_db, hp.mixture_power, hp)
    slices = sounds.slices(seen, hp)  # (n_frames, 1, n_bins, stft_frames)
    with torch.inference_mode():
        mask = torch.cat([separator.model(one[None].contiguous())[0] for one in slices], -1)
    mask = audio.quantize_mask(mask.sigmoid())
    mask = audio.vocals_mask(mask, **separator.mask_settings)[None]
    masked = audio.apply_mask(spec, mask)
    return audio.istft(masked, grid, wav.shape[-1]).numpy()


def test_a_stream_gives_the_bits_of_the_whole_song():
    for n_channels, mask_settings in ((1, SOFT), (2, BINARY), (3, SOFT)):
        separator, wav = make(mask_settings=mask_settings), noise(n_channels, 40_001)
        whole = separator.separate(wav, 16000)[0]
        sizes_of = np.random.default_rng(0).integers(0, 5000, 1000)
        for sizes in (itertools.repeat(997), itertools.repeat(20_000), iter(sizes_of)):
            stream = separator.stream(16000, n_channels)
            np.testing.assert_array_equal(push_all(stream, wav, sizes), whole)
        assert whole.std() > 0.01


def test_the_callers_array_is_neither_changed_nor_kept(separator):
    wav = noise(2, 9000)
    before, buffer = wav.copy(), np.zeros((2, 100), np.float32)
    expected, accompaniment = separator.separate(wav, 16000)
    np.testing.assert_array_equal(wav, before)
    stream, parts = separator.stream(16000, 2), []
    for start in range(0, 9000, 100):
        buffer[:] = wav[:, start : start + 100]  # one array, filled again and again
        parts.append(stream.push(buffer))
        np.testing.assert_array_equal(buffer, before[:, start : start + 100])
    parts.append(stream.finish())
    np.testing.assert_array_equal(torch.cat(parts, -1), expected)
    expected[:] = accompaniment[:] = 7  # nor do the results share its memory
    np.testing.assert_array_equal(wav, before)


def test_what_is_no_waveform_is_refused(separator):
    for shape in ((), (1, 2, 500), (0, 500), (5000, 2)):
        with pytest.raises(InputError, match=r"\(n_channels, n_samples\)"):
            separator.separate(np.zeros(shape, np.float32), 16000)
    for rate in (0, -44100, 44.1, 3999, 384_001, 2_000_000_000, float("nan")):
        with pytest.raises(InputError, match=f"sample rate {rate} Hz"):
            separator.separate(np.zeros(500, np.float32), rate)
    broken = np.zeros(500)
    broken[7] = np.nan
    for wav, what in ((np.ones(500, np.int16), "int16: full scale is 1"), (broken, "not finite")):
        for either in (wav, torch.from_numpy(wav)):
            with pytest.raises(InputError, match=what):
                separator.separate(either, 16000)
    with pytest.raises(InputError, match="not finite"):
        separator.stream(16000, 1).push(np.full((1, 5), np.inf))


@pytest.mark.parametrize(
    ("sample_rate", "model_type", "stft_frames", "mask_settings"),
    [
        (8000, "convnet", 9, SOFT),
        (44100, "resnet18", 1, SOFT),
        (48000, "convnet", 41, {**BINARY, "noise_gate": 0.4}),  # blocks are shorter than its view
        (192000, "resnet18", 41, SOFT),
    ],
)
def test_blocks_give_what_the_whole_song_gives_at_once(
    monkeypatch, sample_rate, model_type, stft_frames, mask_settings
):
    # Where blocks and slices round differently, a mask may fall to the other of two 8-bit levels.
    monkeypatch.setattr(audio, "quantize_mask", lambda mask: mask)
    hp = replace(HP, model_type=model_type, stft_frames=stft_frames, width=4)
    separator = make(hp, mask_settings)
    wav = noise(2, round(0.8 * sample_rate) + 5)
    vocals, accompaniment = separator.separate(wav, sample_rate)
    np.testing.assert_allclose(vocals, reference(separator, wav, sample_rate), atol=1e-6)
    np.testing.assert_allclose(vocals + accompaniment, wav, atol=1e-6)
    assert vocals.dtype == accompaniment.dtype == np.float32
    share = np.square(vocals).sum() / np.square(wav).sum()
    assert 0.01 < share < 0.99


def test_a_song_of_any_length_keeps_its_length(separator):
    for n_fft in (1024, 2048):  # at 22.05 and 44.1 kHz
        hop, rate = n_fft // 4, 22050 * n_fft // 1024
        lengths = [0, 1, 2, hop - 1, hop, 511, 512, n_fft, n_fft + 1]
        lengths += [15 * hop, 16 * hop - 1, 16 * hop, 32 * hop + n_fft]
        for n_samples in lengths:
            for shape in ((n_samples,), (1, n_samples), (2, n_samples)):
                wav = noise(*shape) + np.float32(0.1)
                vocals, accompaniment = separator.separate(wav, rate)
                assert vocals.shape == accompaniment.shape == shape
                np.testing.assert_allclose(vocals + accompaniment, wav, atol=1e-6)
                assert np.isfinite(vocals).all()
                assert n_samples == 0 or np.abs(vocals).max() > 1e-4


def masks_of(separator: Separator, wav: np.ndarray, rate: int, **options) -> torch.Tensor:
    """Collect the masks of a song before they are rounded to 8 bits: (n_masks, n_bins, n)."""
    masks, stream = [], separator.stream(rate, len(wav), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio, "quantize_mask", lambda mask: masks.append(mask) or mask)
        push_all(stream, wav, itertools.repeat(960))
    n_frames = stream.grid.n_frames(wav.shape[-1])
    context = separator.hp.lookahead
    return torch.cat(masks, -1)[..., context : context + n_frames].reshape(-1, 513, n_frames)


def test_live_masks_are_the_masks_of_the_file():
    for model_type, rate, mask_frames in (("resnet18", 22050, 2), ("convnet", 48000, 1)):
        separator = make(HParams(model_type=model_type, width=4, mask_frames=mask_frames))
        wav = noise(2, rate)
        live = masks_of(separator, wav, rate, live=True)
        whole = masks_of(separator, wav, rate)
        assert whole.std() > 0.01
        np.testing.assert_allclose(live, whole, rtol=0, atol=1e-5)


def test_live_audio_is_the_same_in_packets_of_any_size_and_beside_another_stream(separator):
    wav, other = noise(2, 20_000), separator.stream(48000, 1, live=True)
    expected = push_all(separator.stream(48000, 2, live=True), wav, itertools.repeat(480))

    def beside(sizes: list[int]) -> Iterator[int]:
        for size in itertools.cycle(sizes):
            other.push(noise(1, size, seed=9))
            yield size

    for sizes in ([960], [1, 7, 5000]):
        found = push_all(separator.stream(48000, 2, live=True), wav, beside(sizes))
        assert found.shape == wav.shape
        # Equal to rounding; where that moves a mask's level, by one of 255.
        assert np.square(found - expected).sum() < 1e-5 * np.square(expected).sum()


def test_live_audio_is_as_late_as_promised_and_not_later():
    """Pushed sample by sample, an impulse comes out after (12 hop + n_fft) / rate, or sooner."""
    for rate, expected_ms in ((22050, 186), (48000, 187)):
        hp = HParams(model_type="convnet", width=2)
        network = nn.Module()
        network.forward = lambda x, _past: torch.full((1, 513, 1), 50.0)
        stream = make(hp, model=network).stream(rate, 1, live=True)
        assert stream.delay == 12 * stream.grid.hop_length + stream.grid.n_fft
        assert round(1000 * stream.delay / rate) == expected_ms
        at, n, out, lateness, n_returned = rate // 5, rate // 2, [], [], 0
        wav = np.zeros((1, n), np.float32)
        wav[0, at] = 1
        for i in range(n):
            out.append(stream.push(wav[:, i : i + 1]))
            n_returned += out[-1].shape[-1]
            lateness.append(i + 1 - n_returned)
        assert max(lateness) == stream.delay - 1  # what the last packet lacked is not counted
        out = torch.cat(out, -1)[0].numpy()
        assert out.argmax() == at
        np.testing.assert_allclose(out, wav[0, : len(out)], atol=1e-5)


def test_the_mask_of_the_whole_song_is_what_a_stream_applies():
    for n_samples, stereo in ((1, "mean"), (300, "channels"), (30_001, "mean")):
        separator, wav = make(), noise(2, n_samples)
        separator.stereo = stereo
        mask, grid = separator.song_mask(wav, 44100), audio.grid_at(44100, HP)
        assert mask.shape == (1 + (stereo == "channels"), 513, grid.n_frames(n_samples))
        assert mask.std() > 0.001
        np.testing.assert_array_equal(mask.mul(255), mask.mul(255).round())
        for settings in (SOFT, BINARY, {**SOFT, "noise_gate": 0.4, "mask_sharpness": 2.0}):
            applied = audio.vocals_mask(mask, **settings)
            spec = audio.apply_mask(audio.stft(torch.from_numpy(wav), grid), applied)
            separator.mask_settings = settings
            vocals, _ = separator.separate(wav, 44100)
            np.testing.assert_allclose(vocals, audio.istft(spec, grid, n_samples), atol=1e-6)


def test_two_channels_may_be_separated_as_mid_and_side():
    separator = make()
    left, right = wav = noise(2, 20_000)
    mid, side = (separator.separate(w, 22050)[0] for w in ((left + right) / 2, (left - right) / 2))
    three = noise(3, 20_000)
    separator.stereo = "channels"
    one_by_one = separator.separate(three, 22050)[0]
    separator.stereo = "mid-side"
    found = separator.separate(wav, 22050)[0]
    assert np.square(found[0] - (mid + side)).sum() <= 1e-6 * np.square(wav).sum()
    assert np.square(found[1] - (mid - side)).sum() <= 1e-6 * np.square(wav).sum()
    np.testing.assert_array_equal(separator.separate(three, 22050)[0], one_by_one)
    mask = separator.song_mask(wav, 22050)
    rendered = songs.separate_by_mask(wav, mask, 22050, separator.hp, separator.mask_settings, True)
    np.testing.assert_allclose(rendered[0], found, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def clip() -> tuple[np.ndarray, np.ndarray, int]:
    """Return mixture and vocals of a real song, and their rate."""
    wavs = [
        soundfile.read(ASSETS / f"{name}.wav", dtype="float32") for name in ("mixture", "truth")
    ]
    return wavs[0][0], wavs[1][0], wavs[0][1]


def gain_of(wav: np.ndarray, truth: np.ndarray, rate: int, **options) -> float:
    """Separate with the network that comes with the project; return what the voice gained [dB]."""
    stream = Separator.load(cli.PRETRAINED).stream(rate, len(wav), **options)
    vocals = push_all(stream, wav, itertools.repeat(4096))
    assert vocals.shape == wav.shape
    return metrics.si_sdr(vocals, truth) - metrics.si_sdr(wav, truth)


@pytest.mark.parametrize(("level_db", "live"), [(-60, False), (30, True), (90, False)])
def test_a_recordings_level_does_not_matter(clip, level_db, live):
    mixture, truth, rate = clip
    level = np.float32(10 ** (level_db / 20))
    # test_golden.py: as it is, the voice gains 9.8 dB.
    assert gain_of(level * mixture[None], truth[None], rate, live=live) > 9.5


def test_the_level_gain_acts_on_no_ordinary_recording_and_is_the_same_in_any_blocks():
    level_db = torch.from_numpy(np.random.default_rng(0).uniform(-90, -1, 5000))
    level_db[1500], level_db[3000:3100], level_db[3100:4000] = 20.0, 0.0, -34.0

    def gain(*sizes: int) -> torch.Tensor:
        gains, peak_db, first = [], NEVER, 0
        for part in level_db.split(sizes):
            gains.append(audio.level_gain_db(part, peak_db, first, HP))
            (_, peak_db), first = gains[-1], first + len(part)
        return torch.cat([gain for gain, _ in gains])

    np.testing.assert_array_equal(gain(5000), gain(1, 1, 700, 4298))
    assert not gain(5000)[3000:4000].any()
    assert gain(5000)[:2000].min() < -15  # what is loud is at once softer, and only slowly louder


@pytest.mark.parametrize(("n_channels", "flipped"), [(2, "voice"), (4, "channels")])
def test_a_voice_that_the_mean_destroys_is_brought_out_all_the_same(clip, n_channels, flipped):
    mixture, truth, rate = clip
    polarity = np.resize(np.array([[1.0], [-1.0]], np.float32), (n_channels, 1))
    backing = (mixture - truth) * (np.abs(polarity) if flipped == "voice" else polarity)
    wav = backing + polarity * truth
    assert gain_of(wav[:, : 4 * rate], (polarity * truth)[:, : 4 * rate], rate) > 8


def test_integer_files_add_up_sample_by_sample(tmp_path):
    for subtype, bits in sounds.INT_FORMATS.items():
        rng, path = np.random.default_rng(0), tmp_path / "loud.wav"
        wav = (4 * noise(150_001, 2)).clip(-1, 1)  # longer than what is read at a time
        wav[50_000:100_000] = rng.choice([-1.0, 1.0], (50_000, 2))  # full scale, always
        soundfile.write(path, wav, 44100, subtype)
        separator = make(HParams(model_type="convnet", width=2), BINARY)
        with reading.Reader(path) as reader:
            stream = separator.stream(44100, 2)
            parts = [*split(stream, reader.blocks(READ_SAMPLES), reader.info.sample_format)]
        mixture, vocals, accompaniment = (
            np.concatenate([part[i] for part in parts], axis=1) for i in range(3)
        )
        n_limited = sum(part.n_limited for part in parts)
        np.testing.assert_array_equal(vocals.astype(np.int64) + accompaniment, mixture)
        low, high = reading.code_range(bits)
        assert (mixture.shape, mixture.min(), mixture.max()) == ((2, 150_001), low, high)
        for signal in (vocals, accompaniment):
            assert low <= signal.min() < signal.max() <= high
            assert signal.std() > 0.05 * high
        fmt = reading.SampleFormat(subtype, bits)
        free = reading.to_codes(separator.separate(reading.to_float(mixture, fmt), 44100)[0], fmt)
        assert n_limited == (free != vocals).sum() > 1000
        fits = (mixture - free.astype(np.int64) >= low) & (mixture - free.astype(np.int64) <= high)
        np.testing.assert_array_equal(vocals[fits], free[fits])
