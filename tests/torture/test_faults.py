"""Odd sounds, full disks, kill -9: each on the real scripts, and what was good before stays."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import RATE, like, names, noise, wav_bytes, write

import build_dataset
import generate
import model
import separation
import train
from demo import synthesis
from hparams import InputError
from sound import reading, writing

ROOT = Path(__file__).parents[2]
NETWORK = str(ROOT / "pretrained" / "resnet18_small.pth")
TRAIN = ["--set=width=2", "--set=model_type=convnet", "--set=valid_seconds=1"]
pytestmark = pytest.mark.usefixtures("empty_folder")


def errors(capsys: pytest.CaptureFixture, kind: str = "error") -> list[str]:
    """Return what was said of one kind, without the script's name; nothing else may be."""
    lines = capsys.readouterr().err.splitlines()
    assert all(f": {kind}: " in line for line in lines), lines
    return [line.partition(f": {kind}: ")[2] for line in lines]


def script(name: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / f"{name}.py", *map(str, words)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def stem(name: str) -> np.ndarray:
    return soundfile.read(f"generated/{name}.wav", always_2d=True)[0]


def state(folder: Path) -> dict[str, bytes | tuple[int, dict[str, bytes]]]:
    """Return what stands under every final name: bytes, or a checkpoint's step and weights."""
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        if path.name[0] == "." or "tfevents" in path.name:
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".pth":
            checkpoint = model.load_checkpoint(path)
            weights = {key: x.numpy().tobytes() for key, x in checkpoint["weights"].items()}
            found[name] = checkpoint["step"], weights
        else:
            found[name] = path.read_bytes()
    return found


# --- Sounds -------------------------------------------------------------------------------------

ODD = {
    "silence": np.zeros((9000, 2)),
    "direct current": np.full((9000, 2), 0.5),
    "denormal": 1e-40 * noise(9000),
    "hardly there": 1e-30 * noise(9000),
    "32 dB too loud": 40 * noise(9000) / 0.3,
    "one sample": noise(1),
    "two samples": noise(2),
    "shorter than the network's view": noise(4410),
    "32 channels": noise(3000, 32),
}


@pytest.mark.torture
def test_odd_sounds_are_separated_and_add_up(capsys):
    paths = [f"{name}.wav" for name in ODD]
    for path, wav in zip(paths, ODD.values(), strict=True):
        soundfile.write(path, wav, RATE, "FLOAT")
    assert generate.main([NETWORK, *paths, "--background", "--report"]) == 0
    assert errors(capsys) == []
    for name, wav in ODD.items():
        wav, peak = wav.astype(np.float32), np.abs(wav).max()
        vocals, accompaniment = (stem(f"{name}_{end}") for end in ("vocals", "accompaniment"))
        assert vocals.shape == accompaniment.shape == wav.shape
        assert np.abs(vocals).max() <= 2 * peak
        np.testing.assert_allclose(vocals + accompaniment, wav, rtol=0, atol=1e-6 * peak)


def test_what_cannot_be_separated_is_one_line_each_and_leaves_nothing(capsys):
    write(Path("1025.wav"), wav_bytes(bytes(20_500), n_channels=1025))
    soundfile.write("1e38.wav", np.full((9000, 2), 1e38), RATE, "FLOAT")
    long = f"{'n' * 251}.wav"
    write(Path("none.wav"), wav_bytes(bytes(2000), size=0))
    write(Path(long), wav_bytes(bytes(2000)))
    assert generate.main([NETWORK, "1025.wav", "1e38.wav", "none.wav", long]) == 1
    *said, last = capsys.readouterr().err.splitlines()
    assert len(said) == 4
    assert "4 of 4 files failed" in last
    for what in (
        "File name too long (shorten its name)",
        "1025.wav: not audio that can be read: Too many channels",
        "1e38.wav: sample of 1e+38 at 0.000 s",
        "none.wav: no audio samples",
    ):
        assert any(what in line for line in said), what
    assert names(Path("generated")) == []


def test_bytes_behind_the_length_that_a_header_promises_are_told(capsys):
    samples = (30_000 * noise(3000, 1)).astype("<i2")
    write(Path("a.wav"), wav_bytes(samples.tobytes(), size=4000))
    assert generate.main([NETWORK, "a.wav", "--background"]) == 0
    said = "a.wav: 2000 bytes behind the sound that its header promises are ignored"
    assert errors(capsys, "warning") == [said]
    both = stem("a_vocals") + stem("a_accompaniment")
    np.testing.assert_array_equal(both * 2**15, samples[:2000])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(name):
    soundfile.write(name, noise(20 * RATE), RATE)
    with reading.Reader(name) as reader:
        blocks = reader.blocks(5000)
        next(blocks)
        os.truncate(name, 100_000)
        with pytest.raises(InputError, match=name):
            list(blocks)


@pytest.mark.torture
def test_minutes_of_ogg_are_written_at_once():
    """Vorbis of libsndfile crashes where it is given 65536 samples or more."""
    path, wav = Path("a.ogg"), noise(240 * 8000, 1).T.astype(np.float32)
    info = like(path, "FLOAT", n_samples=wav.shape[1])
    with writing.SoundWriter(path, info, writing.choose_format(info, "ogg"), "vocals") as file:
        file.write(writing.Separated(wav, wav, 0 * wav))
    assert soundfile.info(path).frames == wav.shape[1]


@pytest.mark.torture
def test_neither_threads_nor_a_missing_home_change_the_stems():
    soundfile.write("a.wav", noise(RATE), RATE)
    stems = []
    for environment in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "64", "HOME": "/dev/null"}):
        done = script("generate", NETWORK, "a.wav", "--overwrite", "--report", **environment)
        assert (done.returncode, done.stderr) == (0, "")
        stems.append(stem("a_vocals"))
    np.testing.assert_allclose(*stems, rtol=0, atol=2 / 255)  # two levels of the mask


# --- Memory and checkpoints ---------------------------------------------------------------------


def test_a_gpu_that_is_too_small_names_the_setting(capsys, monkeypatch):
    def split(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 TiB")

    monkeypatch.setattr(separation, "split", split)
    write(Path("a.wav"), wav_bytes(bytes(2000)))
    assert generate.main([NETWORK, "a.wav"]) == 1
    (said,) = errors(capsys)
    assert said == "a.wav: out of memory on the GPU (try --set block_frames=64)"
    assert names(Path("generated")) == []


def test_a_checkpoint_that_would_grow_is_not_unpacked(capsys, monkeypatch):
    checkpoint, said = io.BytesIO(), r"^bomb.pth: not a checkpoint of this version, or damaged"
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/data/0", bytes(10**7))
    write(Path("bomb.pth"), checkpoint.getvalue())
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(InputError, match=said):
        model.load_checkpoint(Path("bomb.pth"))


@pytest.mark.torture
def test_short_songs_and_batches_of_any_size_are_learnt_from(capsys):
    for i, n_samples in enumerate((30_000, 1, 700, 30_000)):
        for name, seed in (("vocals", i), ("bass", i + 9)):
            path = Path("songs", str(i), f"{name}.wav")
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise(n_samples, 1, seed), 22050)
    with pytest.raises(SystemExit, match="2"):
        build_dataset.main(["songs", "data", "--workers=0"])
    capsys.readouterr()
    assert build_dataset.main(["songs", "data", "--workers=1"]) == 0
    for batch_size, chunk_slices in ((1, 1), (64, 64)):
        pace = [f"--set=batch_size={batch_size}", f"--set=chunk_slices={chunk_slices}"]
        argv = ["data", *TRAIN, *pace, "--set=steps=3", f"--name={batch_size}"]
        assert train.main(argv) == 0
        assert model.load_checkpoint(Path(f"runs/{batch_size}/last.pth"))["step"] == 3
    assert errors(capsys) == []


# --- Full disks ---------------------------------------------------------------------------------


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=99m", str(disk)], check=True)


@pytest.mark.torture
@pytest.mark.parametrize("small_disk", ["2600k"], indirect=True)
def test_a_full_disk_leaves_both_stems_as_they_were(small_disk):
    soundfile.write("a.wav", noise(10 * RATE), RATE)
    words = [NETWORK, "a.wav", "--background", "--output-dir", small_disk]
    assert script("generate", *words, "--duration=1").returncode == 0
    before = state(small_disk)
    done = script("generate", *words)
    assert done.returncode == 1
    (said,) = done.stderr.splitlines()
    assert f": no space left on {small_disk} (free some)" in said
    assert state(small_disk) == before
    assert sorted(before) == names(small_disk) == ["a_accompaniment.wav", "a_vocals.wav"]


@pytest.mark.torture
@pytest.mark.parametrize("small_disk", ["4m"], indirect=True)
def test_a_full_disk_keeps_the_songs_that_are_built(small_disk, toy_tree, toy_dataset):
    words = [toy_tree, small_disk / "data", "--workers=1"]
    done = script("build_dataset", *words)
    assert done.returncode == 1
    *said, last = done.stderr.splitlines()
    assert 0 < len(said) < 4
    assert all(": could not be written: No space left on device" in line for line in said)
    assert f": error: {len(said)} of 4 songs are bad" in last
    whole, built = state(toy_dataset), state(small_disk / "data")
    assert built.items() < whole.items()
    grow(small_disk)
    assert script("build_dataset", *words).returncode == 0
    assert state(small_disk / "data") == whole


@pytest.mark.torture
@pytest.mark.parametrize("small_disk", ["1200k"], indirect=True)
def test_training_outlives_a_full_disk_and_saves_when_there_is_room(small_disk, toy_dataset):
    words = [ROOT / "train.py", toy_dataset, *TRAIN, "--set=width=24", "--set=epochs=4"]
    command, pipe = [sys.executable, *map(str, words)], subprocess.PIPE
    with subprocess.Popen(command, cwd=small_disk, stdout=pipe, stderr=pipe, text=True) as process:
        warning = process.stderr.readline()
        assert "No space left on device; training goes on" in warning
        grow(small_disk)
        process.communicate()
    assert process.returncode == 0
    last = model.load_checkpoint(small_disk / "runs/convnet/last.pth")
    assert last["resume"]["epoch"] == 4


# --- kill -9 ------------------------------------------------------------------------------------


def test_what_a_killed_run_left_is_removed_but_not_what_is_being_written():
    write(Path("a.wav"), wav_bytes(bytes(2000)))
    Path("generated").mkdir()
    write(Path("generated/.b_vocals.wav.tmp-1"), b"half of it")
    os.utime(write(Path("generated/.a_vocals.wav.tmp-2"), b"half of it"), (1e9, 1e9))
    assert generate.main([NETWORK, "a.wav"]) == 0
    assert names(Path("generated")) == [".b_vocals.wav.tmp-1", "a_vocals.wav"]


def prepare(kind: str, folder: Path) -> tuple[Path, list[object]]:
    """Make what a script needs; returns the folder it writes into, and its command."""
    music, data = folder / "music", folder / "data"
    synthesis.write_dsd100(music, n_train=6, n_test=2, seconds=4, sample_rate=22050, seed=0)
    if kind == "build":
        return data, [ROOT / "build_dataset.py", music, data, "--workers=2"]
    if kind == "generate":
        options = ["--background", "--report", "--output-dir", folder / "out"]
        return folder / "out", [ROOT / "generate.py", NETWORK, music / "Mixtures", *options]
    assert build_dataset.main([str(music), str(data), "--workers=1"]) == 0
    settings = ["--set=epochs=8", "--set=chunk_slices=32"]
    return folder / "runs" / "convnet", [ROOT / "train.py", data, *TRAIN, *settings]


def assert_nothing_is_lost(before: dict, now: dict, whole: dict, kind: str) -> None:
    """Compare two states with each other, and with that of a run that nobody killed."""
    if kind == "train":
        assert before.get("last.pth", (0,))[0] <= now.get("last.pth", (0,))[0]
    else:
        assert before.keys() <= now.keys()
        assert [name for name in now if now[name] != whole.get(name)] == []


def parts(folder: Path) -> set[Path]:
    """Return the temporary files that are there."""
    return {*folder.rglob(".*.tmp-*")}


def await_file(process: subprocess.Popen, folder: Path) -> float:
    """Wait for the first new file, before which libraries are loaded; returns the time."""
    before = {*folder.rglob("*")}
    while process.poll() is None and {*folder.rglob("*")} <= before:
        time.sleep(0.001)
    return time.monotonic()


def kill_in_time(process: subprocess.Popen, seconds: float, folder: Path, in_a_file: bool) -> bool:
    """Kill a process after so long, or at the next file it writes; false if it ended before."""
    end, before = await_file(process, folder) + seconds, parts(folder)
    while time.monotonic() < end or (in_a_file and parts(folder) <= before):
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    process.kill()
    process.wait()
    return True


def kill_often(kind: str, home: Path, n_kills: int) -> int:
    """Kill a script so many times; returns how often something was finished by then."""
    rng, before, n_killed, n_with_something = random.Random(0), {}, 0, 0
    folder, words = prepare(kind, home)

    def start() -> subprocess.Popen:
        goes_on = kind == "train" and (folder / "last.pth").exists()
        more = ["--checkpoint", folder / "last.pth"] if goes_on else []
        command = [sys.executable, *map(str, [*words, *more])]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}  # two would wait for each other
        return subprocess.Popen(command, cwd=home, stdout=subprocess.DEVNULL, env=alone)

    process = start()
    began = await_file(process, folder)
    assert process.wait() == 0
    longest, whole = time.monotonic() - began, state(folder)
    shutil.rmtree(folder)
    while True:
        in_a_file = n_killed % 2 == 1  # early, so that a file is still to come
        process, seconds = start(), rng.uniform(0, longest / 4 if in_a_file else longest)
        if n_killed < n_kills and kill_in_time(process, seconds, folder, in_a_file):
            now = state(folder)
            assert_nothing_is_lost(before, now, whole, kind)
            n_killed += 1
            n_with_something += bool(now)
            before = now
            continue
        assert process.wait() == 0
        now = state(folder)
        assert kind == "generate" or not parts(folder)  # there, an hour later
        assert all(now[name] == whole[name] for name in whole)
        if n_killed == n_kills:
            return n_with_something
        shutil.rmtree(folder)
        before = {}


@pytest.mark.torture
@pytest.mark.parametrize("kind", ["build", "train", "generate"])
def test_whenever_a_script_is_killed_nothing_is_lost_and_a_rerun_finishes(kind, tmp_path):
    assert kill_often(kind, tmp_path, n_kills=5) > 0
