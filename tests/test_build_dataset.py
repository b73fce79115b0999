from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import build_dataset
import dataset
from hparams import InputError, hparams
from learning import building
from sound import tracks

ROOT = Path(__file__).parent.parent
RATE = 22050
BUILD = [sys.executable, str(ROOT / "build_dataset.py")]


def noise(seed: int, n_samples: int = 2 * RATE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.2, 0.2, n_samples)


def write(path: Path, wav: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, subtype="FLOAT")
    return path


def song(folder: Path, vocals: np.ndarray, mixture: np.ndarray) -> Path:
    write(folder / "vocals.wav", vocals)
    write(folder / "mixture.wav", mixture)
    return folder


def contents(output: Path) -> dict[str, bytes]:
    """The dataset itself, without the journal, which knows dates."""
    files = [*output.glob("songs/*"), output / dataset.MANIFEST]
    return {path.name: path.read_bytes() for path in files}


def task(root: Path, output: Path, **changes: object) -> building.Task:
    for name in (building.SONGS, building.JOURNAL):
        (output / name).mkdir(parents=True, exist_ok=True)
    options = {"hp": hparams, "verify": False, "check_pairs": True, **changes}
    return building.Task(root=root, output=output, **options)


def first_outcome(about: building.Task) -> build_dataset.Outcome:
    return build_dataset.outcome_of(about, tracks.find_tracks(about.root).tracks[0])


@pytest.fixture(scope="module")
def built(toy_tree, tmp_path_factory) -> Path:
    """A finished dataset of the toy songs."""
    output = tmp_path_factory.mktemp("built") / "dataset"
    assert build_dataset.main([str(toy_tree), str(output), "--workers", "2"]) == 0
    return output


@pytest.fixture
def output(built, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(built, tmp_path / "dataset"))


# --- The arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("n_samples", [1, 700, 2048, 50_001])
@pytest.mark.parametrize("n_block", [333, 2**14])
def test_the_transform_by_blocks_is_that_of_the_whole(rate, n_samples, n_block):
    wav = np.random.default_rng(0).uniform(-1, 1, (2, n_samples)).astype(np.float32)
    grid = audio.grid_at(rate, hparams)
    blocks = [wav[:, i : i + n_block] for i in range(0, n_samples, n_block)]
    stored = np.concatenate(list(building.spectrogram_blocks(blocks, grid, hparams)))
    whole = audio.to_network_bins(audio.stft(torch.from_numpy(wav), grid), hparams)
    whole = torch.view_as_real(whole.permute(2, 0, 1)).half().numpy()
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, whole)


def test_a_dataset_holds_the_stft_of_vocals_and_of_the_rest(built, toy_tree):
    manifest = dataset.load_manifest(built)
    assert manifest.layout == "DSD100"
    assert [one.split for one in manifest.songs].count("train") == 3
    one = manifest.songs[-1]
    array = dataset.open_spectrogram(built, one, hparams.n_bins)
    paths = [toy_tree / source["path"] for source in one.inputs]
    assert [path.name for path in paths] == ["mixture.wav", "vocals.wav"]
    mixture, vocals = (soundfile.read(path, dtype="float32")[0].mean(1) for path in paths)
    for part, wav in enumerate([vocals, mixture - vocals]):
        spec = audio.stft(torch.from_numpy(wav), audio.grid_at(one.sample_rate, hparams))
        expected = torch.view_as_real(spec.T).numpy()
        np.testing.assert_allclose(array[:, part], expected, rtol=1e-3, atol=1e-6)


def test_voices_alone_are_stored_alone(tmp_path):
    write(tmp_path / "voices/a.wav", noise(1))
    record = first_outcome(task(tmp_path / "voices", tmp_path / "out")).record
    assert record["song"]["parts"] == ("vocals",)
    assert np.load(tmp_path / "out" / record["song"]["file"]).shape == (173, 1, 513, 2)


def test_at_another_speed_a_song_is_what_its_samples_at_another_rate_are(tmp_path):
    for rate, folder in ((RATE, "recorded"), (RATE * 5 // 4, "declared")):
        write(tmp_path / folder / "voices" / "a.wav", noise(1), rate)
    played, declared = tmp_path / "played", tmp_path / "other"
    voices = str(tmp_path / "recorded" / "voices")
    assert build_dataset.main([voices, str(played), "--speed", "1.25"]) == 0
    assert build_dataset.main([str(tmp_path / "declared" / "voices"), str(declared)]) == 0
    (faster,), (same,) = (dataset.load_manifest(f).songs for f in (played, declared))
    assert (faster.id, faster.speed, same.speed) == (f"{same.id} x1.25", 1.25, 1)
    assert (faster.sample_rate, faster.seconds) == (same.sample_rate, same.seconds)
    found, expected = (np.load(f / s.file) for f, s in ((played, faster), (declared, same)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("text", ["0.4", "2.1", "nan", "fast"])
def test_a_speed_lies_between_a_half_and_two(text, tmp_path):
    with pytest.raises(SystemExit) as error:
        build_dataset.main([str(tmp_path), str(tmp_path / "out"), "--speed", text])
    assert error.value.code == 2


def test_silent_vocals_and_vocals_alone_are_valid_songs(tmp_path):
    song(tmp_path / "silent/song", np.zeros(RATE), noise(1, RATE))
    song(tmp_path / "alone/song", noise(1, RATE), noise(1, RATE))
    silent = first_outcome(task(tmp_path / "silent", tmp_path / "a")).record
    alone = first_outcome(task(tmp_path / "alone", tmp_path / "b")).record
    assert (silent["silent"], alone["silent"]) == (True, False)
    assert not np.load(tmp_path / "b" / alone["song"]["file"])[:, 1].any()


def test_a_shifted_pair_is_refused_in_samples_unless_told_to_trust_it(tmp_path):
    vocals = noise(1)
    song(tmp_path / "root/song", vocals, np.roll(vocals, -441) + noise(2))
    outcome = first_outcome(task(tmp_path / "root", tmp_path / "out"))
    assert "vocals.wav: the mixture holds these vocals 441 samples (20.0 ms) earlier" in (
        outcome.error
    )
    assert list((tmp_path / "out/songs").iterdir()) == []
    trusting = task(tmp_path / "root", tmp_path / "out", check_pairs=False)
    assert first_outcome(trusting).record


def test_sound_too_loud_for_float16_is_refused(tmp_path):
    write(tmp_path / "voices/loud.wav", 1e5 * np.ones(RATE))
    outcome = first_outcome(task(tmp_path / "voices", tmp_path / "out"))
    assert "loud.wav: too loud: peak 1e+05" in outcome.error


# --- Finished songs -------------------------------------------------------------------------------


def test_a_second_run_builds_nothing_and_changes_nothing(toy_tree, output, monkeypatch):
    monkeypatch.setattr(build_dataset, "work", None)  # no worker could start
    before = contents(output)
    assert build_dataset.main([str(toy_tree), str(output)]) == 0
    assert contents(output) == before


def test_only_a_song_whose_sources_changed_is_built_again(toy_tree, output):
    about = task(toy_tree, output)
    first, second, *_ = tracks.find_tracks(toy_tree).tracks
    stat = first.paths[0].stat()
    os.utime(first.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        assert building.finished(about, first) is None
        assert building.finished(about, second) is not None
    finally:
        os.utime(first.paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert building.finished(about, first) is not None


def test_verify_finds_a_flipped_bit_and_builds_the_song_again(toy_tree, output, capsys):
    before = contents(output)
    victim = sorted(output.glob("songs/*.npy"))[0]
    damaged = bytearray(victim.read_bytes())
    damaged[-1000] ^= 1
    victim.write_bytes(damaged)
    assert build_dataset.main([str(toy_tree), str(output), "--verify"]) == 0
    assert f"{victim}: damaged; built again" in capsys.readouterr().err
    assert contents(output) == before


def test_verify_finds_another_source_under_the_same_date(tmp_path):
    path = write(tmp_path / "voices/a.wav", noise(1))
    about = task(tmp_path / "voices", tmp_path / "out", verify=True)
    stat = path.stat()
    old = first_outcome(about).record["song"]
    write(path, noise(2))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    outcome = first_outcome(about)
    assert "a.wav: other content under the same size and date" in outcome.warning
    assert outcome.record["song"]["sha256"] != old["sha256"]


# --- Bad songs ------------------------------------------------------------------------------------


def test_every_bad_song_is_named_and_the_others_are_kept_for_the_next_run(tmp_path, capsys):
    root, output = tmp_path / "songs", tmp_path / "out"
    for name in ("good", "better"):
        song(root / name, noise(1), noise(1) + noise(2))
    song(root / "unreadable", noise(1), noise(1))
    (root / "unreadable/vocals.wav").write_bytes(b"RIFF")
    write(root / "instrumental/bass.wav", noise(3))
    song(root / "inverted", noise(1), noise(2) - noise(1))
    assert build_dataset.main([str(root), str(output), "--workers", "1"]) == 1
    error = capsys.readouterr().err
    assert "unreadable/vocals.wav: not audio" in error
    assert "instrumental: no file's name says voice" in error
    assert "inverted/vocals.wav: their polarity is inverted (gain -" in error
    assert "3 of 5 songs are bad" in error
    assert not (output / dataset.MANIFEST).exists()
    assert len(list(output.glob("songs/*"))) == 2

    assert build_dataset.main([str(root), str(output), "--workers", "1", "--skip-bad"]) == 0
    assert "2 songs, 3 bad ones left out, 0.00 hours, 346 slices" in capsys.readouterr().out
    assert [one.id for one in dataset.load_manifest(output).songs] == ["better", "good"]


def test_a_song_in_train_and_test_is_warned_of(toy_tree, tmp_path, capsys):
    root = Path(shutil.copytree(toy_tree, tmp_path / "tree"))
    (train,), (test,) = (sorted(root.glob(f"Mixtures/{name}/*"))[:1] for name in ("Dev", "Test"))
    for kind in ("Mixtures", "Sources"):
        other = root / kind / "Dev" / train.name
        shutil.copytree(root / kind / "Test" / test.name, other, dirs_exist_ok=True)
    assert build_dataset.main([str(root), str(tmp_path / "out")]) == 0
    assert f"{train.name} (train) and {test.name} (test) share a file" in capsys.readouterr().err


# --- The output folder ----------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert build_dataset.main([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err


def test_two_builds_cannot_share_an_output(toy_tree, output, capsys):
    with build_dataset.locked(output):
        assert f"locked by pid {os.getpid()}" in refused(capsys, toy_tree, output)
    assert build_dataset.main([str(toy_tree), str(output)]) == 0


def test_other_hparams_are_refused_with_both_values_and_overwrite_replaces(
    toy_tree, output, capsys
):
    error = refused(capsys, toy_tree, output, "--set", "hop_length=128")
    assert "'hop_length': 256" in error
    assert "'hop_length': 128" in error
    old = {path.name for path in output.glob("songs/*")}
    arguments = [str(toy_tree), str(output), "--set", "hop_length=128", "--overwrite"]
    assert build_dataset.main(arguments) == 0
    assert dataset.load_manifest(output).hparams["hop_length"] == 128
    assert {path.name for path in output.glob("songs/*")}.isdisjoint(old)
    assert len(list(output.glob("songs/*"))) == 4


def test_songs_of_another_folder_are_not_replaced_by_mistake(output, tmp_path, capsys):
    write(tmp_path / "voices/a.wav", noise(1))
    before = contents(output)
    assert "holds 4 songs that" in refused(capsys, tmp_path / "voices", output)
    assert contents(output) == before


def test_a_folder_with_other_files_is_left_alone(toy_tree, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert "holds other files" in refused(capsys, toy_tree, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert "thesis.tex" in refused(capsys, toy_tree, tmp_path / "thesis.tex")


def test_a_disk_too_small_is_told_before_the_work(toy_tree, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(build_dataset, "work", None)
    assert "no space left" in refused(capsys, toy_tree, tmp_path / "out")


@pytest.mark.parametrize("text", ["0", "-1", "two"])
def test_workers_are_counted_from_one(text, tmp_path):
    with pytest.raises(SystemExit) as stop:
        build_dataset.main([str(tmp_path), str(tmp_path), "--workers", text])
    assert stop.value.code == 2


def test_help_and_wrong_paths_do_not_wait_for_torch():
    code = "import sys, build_dataset; build_dataset.main(['/nowhere', '/tmp/x']); "
    code += "print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "False\n"
    assert "/nowhere: no such folder" in run.stderr


# --- Accidents ------------------------------------------------------------------------------------


def long_voice(path: Path, n_samples: int = 200_000_000) -> None:
    """Nine minutes of silence at 384 kHz that take no room: some seconds of work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n_bytes = 2 * n_samples
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 36 + n_bytes) + b"WAVEfmt ")
        file.write(struct.pack("<IHHIIHH", 16, 1, 1, 384_000, 768_000, 2, 16))
        file.write(b"data" + struct.pack("<I", n_bytes))
        file.truncate(44 + n_bytes)


def wait_for(found: Callable[[], object], seconds: float = 60) -> object:
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.01)
    return result


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.fixture
def building_long_voice(tmp_path):
    """A build in another process that is in the middle of a long song."""
    long_voice(tmp_path / "voices/long.wav")
    write(tmp_path / "voices/short.wav", noise(1))
    command = [*BUILD, str(tmp_path / "voices"), str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list((tmp_path / "out/songs").glob(".long*.tmp-*")))
    yield process
    process.kill()
    process.communicate()


def test_a_worker_that_dies_ends_the_build_and_is_told_with_its_song(building_long_voice, tmp_path):
    (pid,) = workers_of(building_long_voice)
    os.kill(pid, signal.SIGKILL)
    _, error = building_long_voice.communicate(timeout=10)
    assert building_long_voice.returncode == 1
    assert error.startswith("build_dataset.py: error: long: the process building it died")
    assert error.count("\n") == 1
    assert list((tmp_path / "out/songs").iterdir()) == []


@pytest.mark.torture
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_build_at_once_and_leaves_nothing(
    building_long_voice, tmp_path, number, code
):
    (pid,) = workers_of(building_long_voice)
    building_long_voice.send_signal(number)
    _, error = building_long_voice.communicate(timeout=5)
    assert (building_long_voice.returncode, error) == (code, "")
    assert not Path(f"/proc/{pid}").exists()
    assert list((tmp_path / "out/songs").iterdir()) == []


@pytest.mark.torture
def test_a_killed_build_leaves_no_worker_behind(building_long_voice):
    (pid,) = workers_of(building_long_voice)
    building_long_voice.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 5)


@pytest.mark.parametrize(
    "n_finished",
    [2, pytest.param(1, marks=pytest.mark.torture), pytest.param(3, marks=pytest.mark.torture)],
)
def test_a_killed_build_goes_on_to_the_same_dataset(toy_tree, built, tmp_path, n_finished):
    output = tmp_path / "out"
    command = [*BUILD, str(toy_tree), str(output), "--workers", "1"]
    with subprocess.Popen(command) as process:
        wait_for(lambda: len(list(output.glob(".build/*-*.json"))) >= n_finished)
        process.kill()
    for path in output.glob("songs/*.npy"):
        assert np.load(path).shape[1:] == (2, 513, 2)
    assert subprocess.run(command).returncode == 0
    assert contents(output) == contents(built)
    assert not list(output.glob("*/.*.tmp-*"))


# --- Real music -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mir1k", "voices", "backings"])
def test_real_music_is_built(data_folder, tmp_path, name):
    about = task(data_folder / name, tmp_path)
    for track in tracks.find_tracks(about.root).tracks[:3]:
        outcome = build_dataset.outcome_of(about, track)
        assert outcome.error == ""
        array = np.load(tmp_path / outcome.record["song"]["file"])
        assert 1e-3 < np.abs(array.astype(np.float32)).max() < 1


def test_the_journal_and_the_manifest_agree(built):
    songs = {one.id: one.sha256 for one in dataset.load_manifest(built).songs}
    records = [json.loads(path.read_text()) for path in built.glob(".build/*-*.json")]
    assert {one["song"]["id"]: one["song"]["sha256"] for one in records} == songs
    for path in built.glob("songs/*"):
        assert building.reading.sha256(path) in songs.values()


def test_a_song_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "voices/a.wav", noise(1))
    about = task(tmp_path / "voices", tmp_path / "out")
    (track,) = tracks.find_tracks(about.root).tracks
    hash_file = building.reading.sha256
    monkeypatch.setattr(
        building.reading, "sha256", lambda p: (hash_file(p), os.utime(path, (1, 1)))[0]
    )
    with pytest.raises(InputError, match="changed while it was read"):
        building.build_song(about, track)
    assert building.finished(about, track) is None


# --- Several processes --------------------------------------------------------------------------

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.torture
def test_two_ranks_build_the_dataset_that_one_builds(built, toy_tree, tmp_path):
    command = [*LAUNCH, BUILD[1], toy_tree, tmp_path / "out", "--workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(built)
    assert done.stdout.count("songs to train") == 1, "one voice is enough"


@pytest.mark.torture
def test_a_lock_that_is_held_ends_all_ranks(toy_tree, output):
    with build_dataset.locked(output):
        command = [*LAUNCH, BUILD[1], toy_tree, output, "--workers=1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert f"locked by pid {os.getpid()}" in done.stderr
