"""generate.py, as a musician runs it: whole files that add up to the song, or one true sentence."""

from __future__ import annotations

import os
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from test_model import lively

import audio
import commandline
import generate
import model as networks
from hparams import HParams

ROOT = Path(__file__).parent.parent
HP = HParams(model_type="convnet", width=2, stft_frames=9)
TUNED = {"mask_at_eval": False, "eval_mask_threshold": 0.5, "noise_gate": 0.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small network that has learned nothing, but of which the answers move."""
    path = tmp_path_factory.mktemp("runs") / "best.pth"
    curve_db = audio.weighting_curve_db(HP)
    networks.save_checkpoint(path, lively(HP), HP, curve_db=curve_db, mask_settings=TUNED)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def song(path: str | Path, n_samples: int = 20_000, n_channels: int = 2, **options) -> Path:
    """Write a song of noise."""
    rng = np.random.default_rng(len(str(path)))
    wav = rng.uniform(-0.5, 0.5, (n_samples, n_channels))
    rate, subtype = options.get("rate", 44100), options.get("subtype", "PCM_16")
    with open(path, "wb") as file:
        soundfile.write(file, wav, rate, subtype, format=options.get("format", "WAV"))
    return Path(path)


def codes(path: Path) -> np.ndarray:
    """Read integers, shape=(n_samples, n_channels), with soundfile alone."""
    with open(path, "rb") as file:
        return soundfile.read(file, dtype="int32", always_2d=True)[0].astype(np.int64)


def made(directory: str = "generated") -> list[str]:
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def run(*words: str | Path, **options) -> subprocess.CompletedProcess:
    """Run the real script."""
    command = [sys.executable, ROOT / "generate.py", *words]
    options = {"capture_output": True, "text": True, "timeout": 300, **options}
    return subprocess.run(command, **options)


def assert_one_error(stderr: str, *parts: str) -> None:
    """Fail unless there is exactly one error line, with all these parts, and no traceback."""
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert "Traceback" not in stderr
    assert "weights_only" not in stderr


# --- One song -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "n_channels", "subtype"),
    [
        (8000, 1, "PCM_U8"),
        (22050, 2, "PCM_16"),
        (44100, 2, "PCM_24"),
        (48000, 6, "PCM_32"),
        (44100, 2, "FLOAT"),
        (96000, 1, "DOUBLE"),
    ],
)
def test_vocals_and_accompaniment_are_as_the_song_and_add_up(
    checkpoint, capsys, rate, n_channels, subtype
):
    path = song("song.wav", 30_001, n_channels, rate=rate, subtype=subtype)
    before = path.read_bytes()
    assert generate.main([str(checkpoint), str(path), "--background"]) == 0
    assert made() == ["song_accompaniment.wav", "song_vocals.wav"]
    outputs = [Path("generated", name) for name in made()]
    for output in outputs:
        info, expected = soundfile.info(output), soundfile.info(path)
        for name in ("samplerate", "channels", "frames", "subtype", "format"):
            assert getattr(info, name) == getattr(expected, name)
    if subtype.startswith("PCM"):
        accompaniment, vocals = (codes(output) for output in outputs)
        np.testing.assert_array_equal(vocals + accompaniment, codes(path))
    else:
        accompaniment, vocals = (soundfile.read(output)[0] for output in outputs)
        np.testing.assert_allclose(vocals + accompaniment, soundfile.read(path)[0], atol=1e-6)
    share = (
        np.square(vocals, dtype=float).sum() / np.square(vocals + accompaniment, dtype=float).sum()
    )
    assert 0.01 < share < 0.99
    assert path.read_bytes() == before
    out, err = capsys.readouterr()
    assert "real-time factor" in out
    assert "generated/song_vocals.wav, generated/song_accompaniment.wav: " in out
    assert ": error: " not in err


def test_without_background_only_the_vocals_are_written(checkpoint):
    path = song("song.flac", subtype="PCM_24", format="FLAC")
    assert generate.main([str(checkpoint), str(path), "--output-dir", "a/b"]) == 0
    assert made("a/b") == ["song_vocals.wav"]
    alone = codes("a/b/song_vocals.wav")
    assert generate.main([str(checkpoint), str(path), "--background"]) == 0
    np.testing.assert_array_equal(codes("generated/song_vocals.wav"), alone)


def test_a_lossy_song_becomes_two_files_of_16_bits_that_add_up(checkpoint):
    path = song("song.ogg", 50_000, subtype="VORBIS", format="OGG")
    assert generate.main([str(checkpoint), str(path), "--background"]) == 0
    vocals, accompaniment = (
        codes(f"generated/song_{n}.wav") >> 16 for n in ("vocals", "accompaniment")
    )
    decoded = np.rint(soundfile.read(path, dtype="float32")[0].clip(-1, 1) * 32768).clip(
        -32768, 32767
    )
    np.testing.assert_array_equal(vocals + accompaniment, decoded)
    assert soundfile.info("generated/song_vocals.wav").subtype == "PCM_16"


def test_a_second_run_writes_the_same_bytes(checkpoint):
    path = song("song.wav", 100_000, subtype="FLOAT")
    contents = []
    for directory in ("a", "b", "a"):
        assert generate.main([str(checkpoint), str(path), "--output-dir", directory]) == 0
        contents.append(Path(directory, "song_vocals.wav").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_a_real_command_separates_a_toy_song(checkpoint, toy_tree, folder):
    mixture = next(toy_tree.glob("Mixtures/Test/*/mixture.wav"))
    done = run(checkpoint, mixture, "--background", "--output-dir", "stems", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert made("stems") == ["mixture_accompaniment.wav", "mixture_vocals.wav"]
    vocals, accompaniment = (
        codes("stems/mixture_vocals.wav"),
        codes("stems/mixture_accompaniment.wav"),
    )
    np.testing.assert_array_equal(vocals + accompaniment, codes(mixture))
    assert vocals.any()
    assert done.stdout.splitlines()[0].startswith("device: CPU")
    assert "4.0 s in " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("n_samples", [1, 2, 127, 511, 2048, 2049])
def test_a_song_of_a_few_samples_is_separated(checkpoint, n_samples):
    path = song("song.wav", n_samples)
    assert generate.main([str(checkpoint), str(path), "--background"]) == 0
    vocals, accompaniment = (codes(f"generated/song_{n}.wav") for n in ("vocals", "accompaniment"))
    np.testing.assert_array_equal(vocals + accompaniment, codes(path))


def test_silence_in_is_silence_out(checkpoint, capsys):
    soundfile.write("silence.wav", np.zeros((50_000, 2)), 44100)
    assert generate.main([str(checkpoint), "silence.wav", "--background"]) == 0
    for name in made():
        assert len(codes(f"generated/{name}")) == 50_000
        assert not codes(f"generated/{name}").any()
    assert capsys.readouterr().err == ""


def test_samples_that_were_limited_are_counted_once(checkpoint, capsys):
    soundfile.write("loud.wav", np.random.default_rng(0).choice([-1.0, 1.0], (50_000, 2)), 44100)
    words = [str(checkpoint), "loud.wav", "--background", "--set", "mask_at_eval=true"]
    assert generate.main(words) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "warning: loud.wav: " in lines[0]
    assert "samples of the vocals limited" in lines[0]
    vocals, accompaniment = (codes(f"generated/loud_{n}.wav") for n in ("vocals", "accompaniment"))
    np.testing.assert_array_equal(vocals + accompaniment, codes("loud.wav"))


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem", ["a,b.c", "-x", "a b", "line\nbreak", 'it\'s "x"', "😀", "x" * 251, "\udcff\udcfe"]
)
def test_a_name_keeps_all_but_its_extension(checkpoint, capsys, stem):
    path = song(f"{stem}.wav", 3000)
    assert generate.main([str(checkpoint), "--background", "--", str(path)]) == 0
    kept = stem if len(stem) < 200 else stem[:200]
    assert len(made()) == 2
    for suffix in ("_accompaniment.wav", "_vocals.wav"):
        (name,) = (name for name in made() if name.endswith(suffix))
        assert name.startswith(kept)
        assert len(stem) > 200 or name == stem + suffix
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2, "the device, and one line per song"
    assert err == ""


def test_two_songs_of_one_name_are_not_written_over_each_other(checkpoint, capsys):
    os.mkdir("b")
    first, second = song("song.wav", 3000), song("b/song.flac", 4000, format="FLAC")
    assert generate.main([str(checkpoint), str(first), str(second)]) == 1
    assert_one_error(capsys.readouterr().err, "b/song.flac: song.wav already becomes ")
    assert len(codes("generated/song_vocals.wav")) == 3000
    assert made() == ["song_vocals.wav"]


def test_a_song_is_never_overwritten(checkpoint, capsys):
    song("a.wav", 3000)
    inputs = {"a_vocals.wav": song("a_vocals.wav", 4000).read_bytes()}
    words = [str(checkpoint), "a.wav", "a_vocals.wav", "--output-dir", "."]
    assert generate.main(words) == 1
    assert_one_error(capsys.readouterr().err, "a_vocals.wav: would overwrite the input")
    assert Path("a_vocals.wav").read_bytes() == inputs["a_vocals.wav"]
    assert made(".") == ["a.wav", "a_vocals.wav", "a_vocals_vocals.wav"]
    os.mkdir("links")
    os.symlink("../a.wav", "links/a_vocals.wav")
    assert generate.main([str(checkpoint), "a.wav", "--output-dir", "links"]) == 1
    assert_one_error(capsys.readouterr().err, "links/a_vocals.wav: would overwrite the input a.wav")


# --- What goes wrong ----------------------------------------------------------------------------


def test_one_bad_song_does_not_stop_the_others(checkpoint, capsys):
    song("a.wav", 3000)
    song("c.wav", 5000)
    Path("b.wav").write_text("la la la, an evening song\n" * 100)
    assert generate.main([str(checkpoint), "a.wav", "b.wav", "c.wav", "--background"]) == 1
    assert len(made()) == 4
    assert len(codes("generated/c_vocals.wav")) == 5000
    err = capsys.readouterr().err
    assert_one_error(err, "b.wav: not audio")
    assert err.splitlines()[-1].endswith("1 of 3 files failed")
    assert len(err.splitlines()) == 2


def test_a_song_that_turns_out_damaged_leaves_nothing(checkpoint, capsys):
    song("good.wav", 3000)
    rng, content = (
        np.random.default_rng(0),
        bytearray(song("bad.flac", 300_000, format="FLAC").read_bytes()),
    )
    content[600_000:600_500] = rng.bytes(500)
    Path("bad.flac").write_bytes(content)
    os.mkdir("generated")
    Path("generated/bad_vocals.wav").write_bytes(b"old")
    assert generate.main([str(checkpoint), "bad.flac", "good.wav", "--background"]) == 1
    assert_one_error(capsys.readouterr().err, "bad.flac: damaged after ")
    assert made() == ["bad_vocals.wav", "good_accompaniment.wav", "good_vocals.wav"]
    assert Path("generated/bad_vocals.wav").read_bytes() == b"old"


def test_samples_that_are_no_numbers_are_refused_or_silenced(checkpoint, capsys):
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, (30_000, 2))
    wav[100, 0], wav[20_000] = np.nan, (np.inf, -np.inf)
    soundfile.write("nan.wav", wav, 44100, "FLOAT")
    assert generate.main([str(checkpoint), "nan.wav"]) == 1
    assert_one_error(capsys.readouterr().err, "nan.wav: 3 non-finite samples, first at 0.002 s")
    assert made() == []
    assert generate.main([str(checkpoint), "nan.wav", "--background", "--fix-nonfinite"]) == 0
    assert "nan.wav: 3 non-finite samples taken as silence" in capsys.readouterr().err
    total = sum(soundfile.read(f"generated/nan_{n}.wav")[0] for n in ("vocals", "accompaniment"))
    np.testing.assert_allclose(total, np.where(np.isfinite(wav), wav, 0), atol=1e-6)


def test_a_truncated_song_is_refused_or_taken_as_far_as_it_goes(checkpoint, capsys):
    path = song("cut.wav", 10_000)
    path.write_bytes(path.read_bytes()[: 44 + 4 * 6000])
    assert generate.main([str(checkpoint), "cut.wav"]) == 1
    assert_one_error(
        capsys.readouterr().err, "promises 10000 frames, file holds 6000", "--allow-tr"
    )
    assert generate.main([str(checkpoint), "cut.wav", "--allow-truncated"]) == 0
    assert "warning: cut.wav: " in capsys.readouterr().err
    assert len(codes("generated/cut_vocals.wav")) == 6000


def test_a_damaged_checkpoint_is_told_and_nothing_is_written(checkpoint, capsys):
    song("song.wav", 3000)
    content = checkpoint.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", content[:1000], content[:-100], bytes(flipped), b"la la la" * 100):
        Path("bad.pth").write_bytes(damaged)
        assert generate.main(["bad.pth", "song.wav"]) == 1
        assert_one_error(capsys.readouterr().err, "bad.pth: ")
    for missing in ("none.pth", ".", "x" * 300):
        assert generate.main([missing, "song.wav"]) == 1
        assert_one_error(capsys.readouterr().err, f"{missing}: no such checkpoint")
    assert made() == []


def test_a_missing_gpu_is_wrong_usage_and_not_a_slow_run(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    song("song.wav", 3000)
    with pytest.raises(SystemExit) as error:
        generate.main([str(checkpoint), "song.wav", "--device", "cuda"])
    assert error.value.code == 2
    assert "--device cuda" in capsys.readouterr().err
    assert made() == []


def test_an_impossible_output_folder_is_told_before_any_work(checkpoint, capsys):
    song("song.wav", 3000)
    Path("file").write_bytes(b"")
    for directory in ("file", "file/deeper"):
        assert generate.main([str(checkpoint), "song.wav", "--output-dir", directory]) == 1
        assert_one_error(capsys.readouterr().err, "not a directory")
    assert Path("file").read_bytes() == b""


# --- Settings -----------------------------------------------------------------------------------


def vocals_of(checkpoint: Path, *settings: str) -> np.ndarray:
    words = [word for setting in settings for word in ("--set", setting)]
    assert generate.main([str(checkpoint), "song.wav", *words]) == 0
    return codes("generated/song_vocals.wav")


def test_the_command_line_goes_before_hparams_and_hparams_before_the_checkpoint(
    checkpoint, monkeypatch
):
    song("song.wav")
    tuned = vocals_of(checkpoint)
    gated = vocals_of(checkpoint, "noise_gate=1")
    assert tuned.any()
    assert np.abs(gated).sum() < 0.1 * np.abs(tuned).sum()
    monkeypatch.setattr(commandline, "hparams", replace(HParams(), noise_gate=1.0))
    np.testing.assert_array_equal(vocals_of(checkpoint), gated)
    np.testing.assert_array_equal(vocals_of(checkpoint, "noise_gate=0"), tuned)
    np.testing.assert_array_equal(vocals_of(checkpoint, "noise_gate=none"), tuned)
    binary = vocals_of(checkpoint, "mask_at_eval=true")
    np.testing.assert_array_equal(vocals_of(checkpoint, "mask_at_eval=1", "noise_gate=0"), binary)
    assert (binary != tuned).any()


def test_only_settings_that_contradict_the_checkpoint_are_refused(checkpoint, capsys):
    song("song.wav")
    tuned = vocals_of(checkpoint)
    np.testing.assert_array_equal(vocals_of(checkpoint, "width=2", "stft_frames=9"), tuned)
    np.testing.assert_array_equal(vocals_of(checkpoint, "stft_stride=5", "seed=3"), tuned)
    os.remove("generated/song_vocals.wav")
    capsys.readouterr()
    assert generate.main([str(checkpoint), "song.wav", "--set", "width=16"]) == 1
    assert_one_error(capsys.readouterr().err, f"{checkpoint}: trained with width=2, not 16")
    for wrong in ("widht=2", "width=two", "noise_gate=2", "width"):
        assert generate.main([str(checkpoint), "song.wav", "--set", wrong]) == 2
        assert_one_error(capsys.readouterr().err, wrong.partition("=")[0])
    assert made() == []


# --- The real script, under stress --------------------------------------------------------------


def test_a_wrong_path_is_told_before_torch_is_loaded(checkpoint):
    song("song.wav", 3000)
    command = [sys.executable, "-X", "importtime", ROOT / "generate.py"]
    for words, code, what in (
        ([checkpoint, "none.wav"], 1, "none.wav: no such file"),
        (["none.pth", "song.wav"], 1, "none.pth: no such checkpoint"),
        ([checkpoint, "song.wav", "--set", "widht=3"], 2, "did you mean width?"),
        (["--help"], 0, ""),
        ([checkpoint], 2, "audio"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        imports, rest = [], []
        for line in done.stderr.splitlines():
            (imports if line.startswith("import time:") else rest).append(line)
        assert done.returncode == code
        assert what in "\n".join(rest)
        assert len(imports) > 10
        assert not any(line.split("|")[-1].strip() == "torch" for line in imports)
        assert not any("librosa" in line for line in imports)
    assert made() == []


@pytest.mark.torture
def test_a_song_is_separated_in_any_locale_and_with_any_number_of_threads(checkpoint):
    path, vocals = song("Ärger 😀\udcff.wav", 200_000), []
    for environment in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "64"}, {"LC_ALL": "C"}):
        environment = {**environment, "PYTHONIOENCODING": "ascii", "PATH": os.environ["PATH"]}
        done = run(checkpoint, path, env={**environment, "HOME": "/nonexistent"})
        assert (done.returncode, done.stderr) == (0, "")
        vocals.append(codes(Path("generated", made()[0])))
    for other in vocals[1:]:
        # 16 bits; another number of threads may round a mask to the next of 256 levels.
        assert np.abs(other - vocals[0]).max() <= 2**16 * 32
        assert (other != vocals[0]).mean() < 0.01


@pytest.mark.torture
@pytest.mark.parametrize("environment", [{}, {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}])
def test_a_malicious_checkpoint_does_nothing_and_is_told_in_one_line(folder, environment):
    song("song.wav", 3000)
    code = (
        "import os, torch\n"
        "class Evil:\n"
        "    def __reduce__(self): return os.mkdir, ('marker',)\n"
        "torch.save({'format': 'vocal-mask checkpoint 1', 'weights': Evil()}, 'evil.pth')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    done = run("evil.pth", "song.wav", env={**os.environ, **environment})
    assert done.returncode == 1
    assert_one_error(done.stderr, "generate.py: error: evil.pth: not a checkpoint, or damaged")
    assert len(done.stderr.splitlines()) == 1
    assert made() == []
    assert not Path("marker").exists()


@pytest.mark.torture
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_old_files_and_no_half_ones(checkpoint, signum, code):
    song("song.wav", 44100 * 240)
    os.mkdir("generated")
    Path("generated/song_vocals.wav").write_bytes(b"old")
    command = [sys.executable, ROOT / "generate.py", checkpoint, "song.wav", "--background"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    started = time.monotonic()
    while len(made()) < 3 and time.monotonic() - started < 120:  # the temporary ones are there
        time.sleep(0.02)
    assert len(made()) == 3
    time.sleep(0.3)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert made() == ["song_vocals.wav"]
    assert Path("generated/song_vocals.wav").read_bytes() == b"old"


@pytest.mark.torture
def test_a_file_size_limit_is_told_and_keeps_the_old_file(checkpoint):
    song("song.wav", 400_000)
    os.mkdir("generated")
    Path("generated/song_vocals.wav").write_bytes(b"old")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    done = run(checkpoint, "song.wav", preexec_fn=limit)
    assert done.returncode == 1
    assert_one_error(done.stderr, "generated/song_vocals.wav: could not be written")
    assert made() == ["song_vocals.wav"]
    assert Path("generated/song_vocals.wav").read_bytes() == b"old"


@pytest.mark.torture
def test_a_long_song_takes_no_more_memory_than_a_short_one(checkpoint):
    peaks = []
    for minutes in (1, 20):
        n_bytes = 4 * 44100 * 60 * minutes
        header = b"RIFF" + struct.pack("<I", 36 + n_bytes) + b"WAVEfmt "
        header += struct.pack("<IHHIIHH", 16, 1, 2, 44100, 4 * 44100, 4, 16)
        Path("long.wav").write_bytes(header + b"data" + struct.pack("<I", n_bytes))
        os.truncate("long.wav", 44 + n_bytes)  # sparse: silence
        code = (
            "import sys, resource, generate\n"
            "assert generate.main(sys.argv[1:]) == 0\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        )
        command = [sys.executable, "-c", code, checkpoint, "long.wav", "--background"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]) * 1024)
        assert soundfile.info("generated/long_vocals.wav").frames == n_bytes // 4
    assert peaks[1] < min(1.05 * peaks[0] + 2e7, 1e9)


@pytest.mark.torture
def test_a_closed_output_ends_the_run_quietly(checkpoint):
    song("song.wav", 3000)
    words = [sys.executable, ROOT / "generate.py", checkpoint, "song.wav"]
    for redirection in ("2>&-", ">&-", "<&-", "| head -c 1 >/dev/null"):
        command = 'exec "$@" ' + redirection if "|" not in redirection else '"$@" ' + redirection
        done = subprocess.run(["bash", "-c", command, "-", *words], capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert made() == ["song_vocals.wav"]
        assert len(codes("generated/song_vocals.wav")) == 3000
        os.remove("generated/song_vocals.wav")


def test_two_ranks_share_the_files_and_tell_a_bad_one_once(checkpoint):
    names = [song(f"song{i}.wav", 5000 + i) for i in range(3)]
    Path("text.wav").write_text("la la la")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, ROOT / "generate.py", checkpoint, *names, "text.wav", "--device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode != 0, "the rank that tells of the bad file says so"
    assert done.stderr.count("text.wav: not audio") == 1
    assert made() == [f"song{i}_vocals.wav" for i in range(3)]
    assert done.stdout.count("real-time factor") == 3
    alone = run(checkpoint, *names, "--output-dir=alone", "--device=cpu", env=environment)
    assert alone.returncode == 0
    for name in made():
        assert Path("generated", name).read_bytes() == Path("alone", name).read_bytes()
