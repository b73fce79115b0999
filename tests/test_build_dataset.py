import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import wav_bytes, write_wav

import audio
import build_dataset
import dataset
from hparams import InputError, hparams
from sound import pairs, tracks

ROOT = Path(__file__).parent.parent
RATE = 22050
BUILD = [sys.executable, str(ROOT / "build_dataset.py")]
write = functools.partial(write_wav, rate=RATE)


def noise(seed: int, n_samples: int = 2 * RATE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.2, 0.2, n_samples)


def song(folder: Path, vocals: np.ndarray, mixture: np.ndarray) -> Path:
    write(folder / "vocals.wav", vocals)
    write(folder / "mixture.wav", mixture)
    return folder


def contents(output: Path) -> dict[str, bytes]:
    """The dataset itself, without the notes, which know dates."""
    files = [*output.glob("songs/*.npy"), output / dataset.MANIFEST]
    return {path.name: path.read_bytes() for path in files}


def build_first(root: Path, output: Path) -> dataset.Song:
    """Build one song of a folder."""
    task = build_dataset.Task(root=root, output=output, hp=hparams)
    kind = "voices" if root.name == "voices" else None
    return build_dataset.build_song(task, tracks.find_tracks(root, kind).tracks[0])


@pytest.fixture
def output(toy_dataset, tmp_path) -> Path:
    """A copy of the toy dataset, to spoil."""
    return Path(shutil.copytree(toy_dataset, tmp_path / "dataset"))


def test_the_transform_by_blocks_is_that_of_the_whole():
    for rate, n_samples in ((8000, 1), (48000, 2048), (22050, 50_001)):
        wav = np.random.default_rng(0).uniform(-1, 1, (2, n_samples)).astype(np.float32)
        grid = audio.grid_at(rate, hparams)
        blocks = [wav[:, i : i + 333] for i in range(0, n_samples, 333)]
        stored = np.concatenate(list(dataset.spectrogram_blocks(blocks, grid, hparams)))
        whole = audio.to_network_bins(audio.stft(torch.from_numpy(wav), grid), hparams)
        whole = torch.view_as_real(whole.permute(2, 0, 1)).half().numpy()
        assert stored.dtype == np.float16
        np.testing.assert_array_equal(stored, whole)


def test_at_another_speed_a_song_is_what_its_samples_at_another_rate_are(tmp_path):
    for rate, folder in ((RATE, "recorded"), (RATE * 5 // 4, "declared")):
        write_wav(tmp_path / folder / "voices" / "a.wav", noise(1), rate)
    played, declared = tmp_path / "played", tmp_path / "other"
    words, voices = ["--as=voices"], str(tmp_path / "recorded" / "voices")
    assert build_dataset.main([voices, str(played), "--speed", "1.25", *words]) == 0
    assert build_dataset.main([str(tmp_path / "declared" / "voices"), str(declared), *words]) == 0
    (faster,), (same,) = (dataset.load_manifest(f).songs for f in (played, declared))
    assert (faster.id, faster.speed, same.speed) == (f"{same.id} x1.25", 1.25, 1)
    assert (faster.sample_rate, faster.seconds) == (same.sample_rate, same.seconds)
    found, expected = (np.load(f / s.file) for f, s in ((played, faster), (declared, same)))
    np.testing.assert_array_equal(found, expected)


def test_voices_alone_are_stored_alone_unless_too_loud_for_float16(tmp_path):
    write(tmp_path / "voices/a.wav", noise(1))
    song = build_first(tmp_path / "voices", tmp_path / "out")
    assert song.parts == ("vocals",)
    assert np.load(tmp_path / "out" / song.file).shape == (173, 1, 513, 2)
    write(tmp_path / "voices/a.wav", 1e5 * np.ones(RATE))
    with pytest.raises(InputError, match=r"a.wav: too loud"):
        build_first(tmp_path / "voices", tmp_path / "out")


def voice(seed: int, seconds: float = 6) -> np.ndarray:
    """A harmonic tone whose pitch wanders, as tonal as singing; with some breath."""
    rng, n = np.random.default_rng(seed), round(seconds * RATE)
    pitch = 200 + np.cumsum(rng.normal(0, 0.1, n))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tone + rng.normal(0, 0.002, n)).astype(np.float32)


def findings(vocals: np.ndarray, mixture: np.ndarray) -> tuple[str, str]:
    pair = pairs.Pair()
    for start in range(0, len(vocals), pairs.BLOCK):
        block = slice(start, start + pairs.BLOCK)
        pair.add(vocals[block], mixture[block] - vocals[block])
    return pair.findings()


def test_pairs_that_belong_together_pass():
    band = noise(2, 6 * RATE).astype(np.float32)
    for gain in (0.3, 1, 3):
        assert findings(gain * voice(1), gain * voice(1) + band) == ("", "")
    assert findings(0 * voice(1), band) == ("", ""), "silence"
    assert findings(0.003 * voice(1), band) == ("", ""), "hardly audible"
    problem, oddity = findings(voice(1), 0.71 * voice(1) + band)
    assert not problem
    assert "at gain 0.71 instead of 1: the accompaniment holds a part of them?" in oddity
    for seconds in (0.01, 0.5, 2, 3):  # however short
        short = voice(1, seconds)
        assert findings(short, short + noise(2, len(short))) == ("", "")


def test_pairs_that_do_not_are_told_in_numbers():
    band = 0.1 * noise(2, 6 * RATE).astype(np.float32)
    for vocals, mixture, said in (
        (voice(1), band - voice(1), "gain -1.00 instead of 1: inverted"),
        (voice(1), band + np.roll(voice(1), 441), "instead of 1: shifted, or of another song"),
        (voice(1), band + voice(3), "instead of 1: shifted, or of another song"),
        (voice(1), band + 2 * voice(1), "gain 2.00 instead of 1: at another level (+6.0 dB)"),
        (voice(1), voice(1), "has only -60 dB of it: are both the same sound?"),
        (voice(1) + band, 1.1 * (voice(1) + band), "only -60 dB"),
        (voice(1), voice(1) + 0.5 * band, "only -24 dB"),
        (voice(1), voice(1) + band + np.roll(voice(1), 1104), "+1104 samples later at gain 1.00"),
        (voice(1), voice(1) + band + np.roll(voice(1), -8000), "-8000 samples later at gain "),
    ):
        assert said in findings(vocals, mixture)[0]


@pytest.mark.parametrize(
    ("voice_gains", "band_gains", "channel", "n_in_phase"),  # [s]
    [
        ((1, -1), (1, 1), 0, 0),
        ((-0.8, 1), (1, 0.5), 1, 0),
        ((0.5, -0.6), (1, -1), 1, 0),
        ((1, 0), (0, 1), None, 0),
        ((1, -1), (1, 1), 0, 4),
    ],
)
def test_what_cancels_in_the_mean_of_the_channels_comes_from_one(
    tmp_path, capsys, monkeypatch, voice_gains, band_gains, channel, n_in_phase
):
    monkeypatch.setattr(pairs, "BLOCK", RATE)
    vocals, band = np.outer(voice(1), voice_gains), np.outer(noise(2, 6 * RATE), band_gains)
    vocals[: n_in_phase * RATE] = vocals[: n_in_phase * RATE, :1]
    song(tmp_path / "songs/a", vocals, vocals + band)
    built = build_first(tmp_path / "songs", tmp_path / "out")
    array = np.load(tmp_path / "out" / built.file).astype(np.float32)
    for part, wav in enumerate([vocals, band]):
        mono = wav.mean(1) if channel is None else wav[:, channel]
        spec = audio.stft(torch.from_numpy(mono.astype(np.float32)), audio.grid_at(RATE, hparams))
        expected = torch.view_as_real(spec.T).numpy()
        np.testing.assert_allclose(array[:, part], expected, rtol=1e-3, atol=1e-5)
    error = capsys.readouterr().err
    said = (
        ""
        if channel is None
        else f"cancel out in their mean; channel {channel + 1} is taken instead"
    )
    assert said in error
    assert bool(said) == bool(error)


def test_only_what_is_not_as_it_was_is_built_again(toy_tree, output, monkeypatch):
    before, build, built = contents(output), build_dataset.build_song, []

    def remember(task, track):
        built.append(track.name)
        return build(task, track)

    monkeypatch.setattr(build_dataset, "build_song", remember)
    again = [str(toy_tree), str(output), "--workers=1"]
    assert build_dataset.main(again) == 0
    assert (built, contents(output)) == ([], before)
    assert build_dataset.main([*again, "--taught"]) == 0
    assert all(one.taught for one in dataset.load_manifest(output).songs)
    assert built == []

    track = tracks.find_tracks(toy_tree).tracks[-1]
    stat = track.paths[0].stat()
    os.utime(track.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert build_dataset.main(again) == 0
    assert built == [track.name]
    assert contents(output) == before
    assert build_dataset.main(again) == 0
    assert built == [track.name]


def test_every_bad_song_is_named_and_the_others_are_kept_for_the_next_run(tmp_path, capsys):
    root, output = tmp_path / "songs", tmp_path / "out"
    for name in ("good", "better"):
        song(root / name, noise(1), noise(1) + noise(2))
    song(root / "unreadable", noise(1), noise(1))
    (root / "unreadable/vocals.wav").write_bytes(b"RIFF")
    write(root / "instrumental/bass.wav", noise(3))
    song(root / "inverted", voice(1), -voice(1))
    (root / "cover.jpg").write_bytes(b"x")
    assert build_dataset.main([str(root), str(output), "--workers", "1"]) == 1
    said, error = capsys.readouterr()
    assert (
        f"{root}: not taken: 1 without a sound's extension (.jpg) and 1 that no usable song needs\n"
    ) in said
    assert "unreadable/vocals.wav: not audio" in error
    assert "instrumental: no file's name says voice" in error
    assert "inverted/vocals.wav: the mixture holds these vocals at gain -" in error
    assert "3 of 5 songs are bad" in error
    assert not (output / dataset.MANIFEST).exists()
    assert len(list(output.glob("songs/*.npy"))) == 2

    assert build_dataset.main([str(root), str(output), "--workers", "1", "--skip-bad"]) == 0
    assert "2 songs, 3 bad ones left out, 0.00 hours" in capsys.readouterr().out
    assert [one.id for one in dataset.load_manifest(output).songs] == ["better", "good"]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert build_dataset.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_other_hparams_are_refused_with_both_values_and_overwrite_replaces(
    toy_tree, output, capsys
):
    error = refused(capsys, toy_tree, output, "--set", "hop_length=128")
    assert "'hop_length': 256" in error
    assert "'hop_length': 128" in error
    old = {path.name for path in output.glob("songs/*")}
    options = ["--set", "hop_length=128", "--overwrite", "--workers", "1"]
    assert build_dataset.main([str(toy_tree), str(output), *options]) == 0
    assert dataset.load_manifest(output).hparams["hop_length"] == 128
    assert {path.name for path in output.glob("songs/*")}.isdisjoint(old)
    assert len(list(output.glob("songs/*.npy"))) == 4


def test_what_is_in_the_output_already_is_not_replaced_by_mistake(
    toy_tree, output, tmp_path, capsys
):
    with build_dataset.the_only_build_in(output):
        assert "another process works here" in refused(capsys, toy_tree, output)
    write(tmp_path / "voices/a.wav", noise(1))
    before = contents(output)
    assert "holds 4 songs that" in refused(capsys, tmp_path / "voices", output, "--as=voices")
    assert contents(output) == before
    assert "holds other files" in refused(capsys, toy_tree, tmp_path)
    assert not (tmp_path / "songs").exists()
    assert "a.wav" in refused(capsys, toy_tree, tmp_path / "voices/a.wav")


def test_a_worker_that_dies_ends_the_build_and_is_told_with_its_song(tmp_path):
    n_bytes = 400_000_000  # nine minutes of silence at 384 kHz, which take no room on the disk
    write(tmp_path / "voices/short.wav", noise(1))
    with open(tmp_path / "voices/long.wav", "wb") as file:
        file.write(wav_bytes(b"", rate=384_000, size=n_bytes))
        file.truncate(44 + n_bytes)
    command = [
        *BUILD,
        str(tmp_path / "voices"),
        str(tmp_path / "out"),
        "--workers=2",
        "--as=voices",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").glob("songs/.long*.tmp-*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        os.kill(
            next(int(pid) for pid in children if b"spawn_main" in commands[pid]), signal.SIGKILL
        )
        error = process.stderr.read()
    assert process.returncode == 1
    assert error.startswith("build_dataset.py: error: a worker process died")
    assert error.count("\n") == 1
    assert list((tmp_path / "out/songs").glob("*long*")) == []
