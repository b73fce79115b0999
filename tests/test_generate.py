"""generate.py, as a musician runs it: whole files that add up to the song, or one true sentence."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sounds import wav_bytes, write
from test_model import lively

import audio
import cli
import generate
import model as networks
import separation
from hparams import HParams

ROOT = Path(__file__).parent.parent
HP = HParams(model_type="convnet", width=2, stft_frames=9, precision="float32")
TUNED = {"mask_at_eval": False, "eval_mask_threshold": 0.5, "noise_gate": 0.0}
pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small network that has learned nothing, but of which the answers move."""
    path = tmp_path_factory.mktemp("runs") / "best.pth"
    curve_db = audio.weighting_curve_db(HP)
    networks.save_checkpoint(path, lively(HP), HP, curve_db=curve_db, mask_settings=TUNED)
    return path


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


def assert_one_error(stderr: str, *parts: str) -> None:
    """Fail unless there is exactly one error line, with all these parts, and no traceback."""
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    assert all(part in lines[0] for part in parts), lines[0]
    assert "Traceback" not in stderr
    assert "weights_only" not in stderr


@pytest.mark.parametrize(
    ("rate", "n_channels", "subtype"),
    [(8000, 1, "PCM_U8"), (48000, 6, "PCM_24"), (44100, 2, "FLOAT")],
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
    assert 0.1 < np.std(vocals) / np.std(vocals + accompaniment) < 0.99
    assert path.read_bytes() == before
    out, err = capsys.readouterr()
    assert "real-time factor" in out
    assert "generated/song_vocals.wav, generated/song_accompaniment.wav: " in out
    assert ": error: " not in err


def test_a_name_keeps_all_but_its_extension(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(generate.cli, "PRETRAINED", checkpoint.absolute())
    for stem in ("a,b.c", "-x", "line\nbreak", "😀", "\udcff\udcfe"):
        assert generate.main(["--", str(song(f"{stem}.wav", 3000))]) == 0
        assert f"{stem}_vocals.wav" in made()
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
    for link, source in ((os.symlink, "../a.wav"), (os.link, "a.wav")):
        os.mkdir(folder := link.__name__)
        link(source, f"{folder}/a_vocals.wav")
        assert generate.main([str(checkpoint), "a.wav", "--output-dir", folder]) == 1
        said = f"{folder}/a_vocals.wav: would overwrite the input a.wav"
        assert_one_error(capsys.readouterr().err, said)


def test_a_damaged_checkpoint_is_told_and_nothing_is_written(checkpoint, capsys):
    song("song.wav", 3000)
    flipped = bytearray(checkpoint.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    Path("bad.pth").write_bytes(flipped)
    assert generate.main(["bad.pth", "song.wav"]) == 1
    said = "bad.pth: not a checkpoint of this version, or damaged"
    assert_one_error(capsys.readouterr().err, said)
    assert made() == []


def test_an_impossible_output_folder_is_told_before_any_work(checkpoint, capsys):
    song("song.wav", 3000)
    Path("file").write_bytes(b"")
    for directory in ("file", "file/deeper", "x" * 300):
        assert generate.main([str(checkpoint), "song.wav", "--output-dir", directory]) == 1
        assert_one_error(capsys.readouterr().err, "choose another folder")
    assert Path("file").read_bytes() == b""


def vocals_of(checkpoint: Path, *settings: str) -> np.ndarray:
    words = [word for setting in settings for word in ("--set", setting)]
    assert generate.main([str(checkpoint), "song.wav", "--overwrite", *words]) == 0
    return codes("generated/song_vocals.wav")


def test_the_command_line_goes_before_hparams_and_hparams_before_the_checkpoint(
    checkpoint, monkeypatch
):
    song("song.wav")
    tuned, gated = vocals_of(checkpoint), vocals_of(checkpoint, "noise_gate=1")
    assert np.abs(gated).sum() < 0.1 * np.abs(tuned).sum()
    for module in (cli, separation):
        monkeypatch.setattr(module, "hparams", replace(HParams(), noise_gate=1.0))
    np.testing.assert_array_equal(vocals_of(checkpoint), gated)
    np.testing.assert_array_equal(vocals_of(checkpoint, "noise_gate=none"), tuned)
    binary = vocals_of(checkpoint, "mask_at_eval=true")
    np.testing.assert_array_equal(vocals_of(checkpoint, "mask_at_eval=1", "noise_gate=0"), binary)
    assert (binary != tuned).any()


def test_only_settings_that_contradict_the_checkpoint_are_refused(checkpoint, capsys):
    song("song.wav", 3000)
    same = vocals_of(checkpoint, "width=2", "stft_frames=9", "stft_stride=5", "seed=3")
    np.testing.assert_array_equal(same, vocals_of(checkpoint))
    os.remove("generated/song_vocals.wav")
    capsys.readouterr()
    for wrong, code, what in (
        ("width=16", 1, f"{checkpoint}: trained with width=2, not 16"),
        ("width=two", 2, "width=two: 'two' is not a whole number"),
    ):
        assert generate.main([str(checkpoint), "song.wav", "--set", wrong]) == code
        assert_one_error(capsys.readouterr().err, what)


def test_a_wrong_path_is_told_before_torch_is_loaded(checkpoint, toy_dataset):
    song("song.wav", 3000)
    data, network = str(toy_dataset), str(checkpoint)
    mistakes = {
        "none.wav: no such file": (1, "generate", [network, "none.wav"]),
        "none.pth: no such checkpoint": (1, "generate", ["none.pth", "song.wav"]),
        "did you mean width?": (2, "generate", [network, "song.wav", "--set", "widht=3"]),
        "name a song": (2, "generate", [network]),
        "nowhere: no such folder": (1, "train", ["nowhere"]),
        "no.pth: no such checkpoint": (1, "train", [data, "--checkpoint", "no.pth"]),
    }
    code = f"""
import importlib, sys
for code, name, words in {[*mistakes.values()]}:
    assert importlib.import_module(name).main(words) == code, words
assert not sys.modules.keys() & {{"torch", "librosa"}}
"""
    command, environment = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, said in zip(done.stderr.splitlines(), mistakes, strict=True):
        assert said in line
    assert made() == []


@pytest.mark.torture
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_the_old_files_and_no_half_ones(checkpoint, signum, code):
    song("song.wav", 44100 * 240)
    assert generate.main([str(checkpoint), "song.wav", "--duration", "0.1"]) == 0
    before = Path("generated/song_vocals.wav").read_bytes()
    command = [sys.executable, ROOT / "generate.py", checkpoint, "song.wav", "--background"]
    process = subprocess.Popen([*command, "--report"], stderr=subprocess.PIPE, text=True)
    while len(made()) < 3:  # the temporary ones are there
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert made() == ["song_vocals.wav"]
    assert Path("generated/song_vocals.wav").read_bytes() == before


@pytest.mark.torture
def test_a_long_song_takes_no_more_memory_than_a_short_one(checkpoint):
    peaks = []
    for minutes in (1, 20):
        n_bytes = 4 * 44100 * 60 * minutes
        write(Path("long.wav"), wav_bytes(b"", n_channels=2, size=n_bytes))
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


def test_a_folder_keeps_its_tree_and_a_bad_file_does_not_stop_it(checkpoint, capsys):
    for name in ("in/b.wav", "in/deep/er/a.flac", "in/._b.wav", "in/deep/note.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        song(name, 3000, format="FLAC" if name.endswith("flac") else "WAV")
    Path("in/deep/bad.wav").write_bytes(Path("in/b.wav").read_bytes()[:10_000])
    words = [str(checkpoint), "in", "--output-dir", "in/out", "--background"]
    for already in (0, 2):
        assert generate.main(words) == 1
        found = sorted(str(p) for p in Path("in/out").rglob("*.*"))
        assert found == [
            "in/out/b_accompaniment.wav",
            "in/out/b_vocals.wav",
            "in/out/deep/er/a_accompaniment.wav",
            "in/out/deep/er/a_vocals.wav",
        ]
        out, err = capsys.readouterr()
        assert_one_error(err, "bad.wav: header promises 3000 frames, file holds 2489")
        written = " and 4 written by earlier runs" * bool(already)
        assert f"in: not taken: 1 without a sound's extension (.txt){written}\n" in out
        if already:
            assert "2 of 3 are already there (--overwrite separates again" in out
        else:
            assert "1 of 3 files failed" in err
            assert "already" not in out
    assert generate.main([*words, "--allow-truncated"]) == 0
    assert len(codes("in/out/deep/bad_vocals.wav")) == 2489


def test_stems_are_kept_as_long_as_they_are_of_this_song_network_and_setting(checkpoint, capsys):
    def is_kept(*words: str, network: str = str(checkpoint)) -> bool:
        stamps = {path: os.stat(path).st_mtime_ns for path in Path("generated").glob("*")}
        assert generate.main([network, "a.wav", *words]) == 0
        is_said = "1 of 1 is already there" in capsys.readouterr().out
        assert not is_said or all(os.stat(p).st_mtime_ns == stamps[p] for p in stamps)
        return is_said

    song("a.wav", 25_000)
    newer = shutil.copy(checkpoint, "newer.pth")
    with open(newer, "r+b") as file:  # another date in the archive
        file.seek(10)
        file.write(b"\x01")
    assert not is_kept()
    os.utime("a.wav")
    assert is_kept()
    for words in (["--duration", "0.3"], ["--set", "noise_gate=0.3"], ["--subtype", "FLOAT"], []):
        assert not is_kept(*words)
        assert is_kept(*words)
    assert not is_kept(network=newer)
    assert is_kept(network=newer)
    for words in (["--background", "--report"], *(["--format", f] for f in ("flac", "ogg", "mp3"))):
        assert not is_kept(*words)
        assert is_kept(*words)
    for end in ("wav", "flac", "ogg"):
        assert is_kept("--format", end)
        path = Path(f"generated/a_vocals.{end}")
        os.truncate(path, path.stat().st_size - 500)
        assert not is_kept("--format", end)
    assert is_kept("--background")
    assert not is_kept("--overwrite")
    first = codes("generated/a_vocals.wav")
    song("another.wav", 25_000)
    os.utime("another.wav", (1e9, 1e9))
    os.replace("another.wav", "a.wav")
    assert not is_kept()
    assert np.abs(codes("generated/a_vocals.wav") - first).max() > 1000
    middle = bytearray(Path("a.wav").read_bytes())
    middle[25_001] ^= 0x40
    Path("a.wav").write_bytes(middle)
    assert not is_kept()
    Path("moved").mkdir()
    shutil.copy("a.wav", "moved/a.wav")
    assert generate.main([str(checkpoint), "moved/a.wav"]) == 0
    assert "already there" in capsys.readouterr().out
    song("moved/a.wav", 20_000)
    assert generate.main([str(checkpoint), "moved/a.wav"]) == 1
    assert_one_error(capsys.readouterr().err, "a_vocals.wav: is made of another song of that name")


@pytest.mark.parametrize("name", ["a_vocals.wav", "a.html"])
def test_a_file_of_someone_else_is_not_replaced_unasked(checkpoint, capsys, name):
    song("a.wav", 3000)
    Path("generated").mkdir()
    foreign = song(f"generated/{name}", 500).read_bytes()
    words = [str(checkpoint), "a.wav", "--report"]
    assert generate.main(words) == 1
    assert_one_error(capsys.readouterr().err, "was not made by this program (--overwrite it")
    assert Path("generated", name).read_bytes() == foreign
    assert generate.main([*words, "--overwrite"]) == 0
    assert Path("generated", name).read_bytes() != foreign


def test_a_part_of_a_song_is_separated_as_if_it_were_the_song(checkpoint, capsys):
    path = song("song.wav", 50_000)
    wav = soundfile.read(path, dtype="int16")[0]
    soundfile.write("part.wav", wav[4410:26460], 44100, "PCM_16")
    words = ["--start", "0.1", "--duration", "0.5", "--report", "--set", "stft_stride=3"]
    assert generate.main([str(checkpoint), "song.wav", *words]) == 0
    page = Path("generated/song.html").read_text()
    assert "convnet, width 2, 9 frames" in page
    assert generate.main([str(checkpoint), "part.wav"]) == 0
    outputs = [codes(Path(f"generated/{name}_vocals.wav")) for name in ("song", "part")]
    assert outputs[0].any()
    np.testing.assert_array_equal(*outputs)
    assert generate.main([str(checkpoint), "song.wav", "--start", "2", "--overwrite"]) == 1
    assert_one_error(capsys.readouterr().err, "song.wav: ")


def test_a_song_that_breaks_off_leaves_nothing_new_and_does_not_stop_others(checkpoint, capsys):
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, (300_000, 2))
    wav[290_000] = np.nan
    soundfile.write("song.wav", wav, 44100, "FLOAT")
    song("good.wav", 3000)
    os.mkdir("generated")
    Path("generated/song_vocals.wav").write_bytes(b"old")
    words = [str(checkpoint), "song.wav", "good.wav", "--background", "--report", "--overwrite"]
    assert generate.main(words) == 1
    gc.collect()
    err = capsys.readouterr().err
    assert_one_error(err, "song.wav: sample of nan at 6.576 s")
    assert "1 of 2 files failed: song.wav" in err
    endings = (".html", "_accompaniment.wav", "_vocals.wav")
    assert made() == [*(f"good{end}" for end in endings), "song_vocals.wav"]
    assert Path("generated/song_vocals.wav").read_bytes() == b"old"


RAW_OPTIONS = ["--sample-format", "s16le", "--rate", "44100", "--channels", "2"]


def run_pipe(checkpoint: Path, data: bytes, *words: str) -> subprocess.CompletedProcess:
    """Run the real script with sound on its standard input."""
    command = [sys.executable, ROOT / "generate.py", checkpoint, "-", *words]
    return subprocess.run(command, input=data, capture_output=True, timeout=300)


def test_a_pipe_gives_the_bits_of_the_file(checkpoint):
    path = song("song.wav", 100_000)
    assert generate.main([str(checkpoint), "song.wav", "--background"]) == 0
    vocals, accompaniment = (
        soundfile.read(f"generated/song_{stem}.wav", dtype="int16")[0]
        for stem in ("vocals", "accompaniment")
    )
    assert np.abs(vocals).max() > 100
    done = run_pipe(checkpoint, path.read_bytes())
    assert done.returncode == 0
    found = np.frombuffer(done.stdout[-vocals.nbytes :], "<i2").reshape(-1, 2)
    np.testing.assert_array_equal(found, vocals)
    assert done.stdout[:4] == b"RIFF"
    assert b"device: CPU" in done.stderr
    raw = soundfile.read(path, dtype="int16")[0].tobytes()
    done = run_pipe(checkpoint, raw + b"\1", *RAW_OPTIONS, "--stem", "accompaniment")
    assert done.stdout == accompaniment.tobytes()
    assert b"1 bytes at the end are no whole sample" in done.stderr


def test_live_sound_comes_while_more_is_awaited(checkpoint):
    """A caller who waits for an answer gets it 186 ms of sound later, not at the end."""
    command = [sys.executable, ROOT / "generate.py", checkpoint, "-", "--live", *RAW_OPTIONS]
    rng, n = np.random.default_rng(0), 12_000  # what a pipe holds, so that nobody has to wait
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(rng.integers(-9000, 9000, (n, 2), "<i2").tobytes())
        process.stdin.flush()
        n_bytes = 4 * (n - 882 - (4 * 512 + 2048))  # the network of this test sees 9 frames
        assert len(process.stdout.read(n_bytes)) == n_bytes
        process.stdin.close()
        assert len(process.stdout.read()) == 4 * n - n_bytes
    assert process.returncode == 0


def test_a_pipe_that_is_no_sound_is_told_in_one_line(checkpoint):
    done = run_pipe(checkpoint, b"no sound at all, but long enough to be one")
    assert (done.returncode, done.stdout) == (1, b"")
    assert_one_error(done.stderr.decode(), "not a wav stream")


def test_options_that_do_not_go_together_are_wrong_usage(checkpoint, capsys):
    song("song.wav", 3000)
    for words, what in (
        (["song.wav", "--live"], "--live: takes sound as it comes"),
        (["-", "song.wav"], "-: is standard input and stands alone"),
        (["-", "--background"], "--background: is for files"),
        (["-", "--rate", "8000"], "describe raw PCM from -, all three"),
        (["song.wav", "--stem", "accompaniment"], "--stem: is for pipes"),
        (["song.wav", "--format=flac", "--subtype=FLOAT"], "FLOAT: choose one of PCM_16, PCM_24"),
        (["--live", "--sample-format", "f32le"], "--sample-format: is for pipes"),
    ):
        assert generate.main([str(checkpoint), *words]) == 2
        assert_one_error(capsys.readouterr().err, what)


class Card:
    """A sound card: what is heard is noise, what is played is kept; at last comes Ctrl-C."""

    def __init__(self, rate: int, n_packet: int, channels: int, dtype: str) -> None:
        assert (rate, n_packet, channels, dtype) == (48000, 960, 1, "float32")
        self.heard, self.played = [], []
        Card.last = self

    def __enter__(self) -> "Card":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, n: int) -> tuple[np.ndarray, bool]:
        if len(self.heard) == 60:
            raise KeyboardInterrupt
        rng = np.random.default_rng(len(self.heard))
        self.heard.append(rng.normal(0, 0.1, (n, 1)).astype(np.float32))
        return self.heard[-1], len(self.heard) == 5

    def write(self, wav: np.ndarray) -> bool:
        assert wav.shape == (960, 1)
        assert wav.flags.c_contiguous
        self.played.append(wav)
        return False


def test_a_microphone_is_separated_to_the_loudspeakers_until_ctrl_c(
    checkpoint, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert generate.main([str(checkpoint), "--live"]) == 1
    assert_one_error(capsys.readouterr().err, "pip install sounddevice", "--live -")
    module = type(sys)("sounddevice")
    module.Stream, module.PortAudioError = Card, type("PortAudioError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # other tests may want more
    stems = {}
    for stem in ("vocals", "accompaniment"):
        assert generate.main([str(checkpoint), "--live", "--stem", stem]) == 130
        stems[stem] = np.concatenate(Card.last.played)
        assert " ms behind its input" in capsys.readouterr().err
    heard = np.concatenate(Card.last.heard)
    delay = 4 * 560 + 2240
    assert np.abs(stems["vocals"]).max() > 0.01
    assert not stems["vocals"][:delay].any()
    total = (stems["vocals"] + stems["accompaniment"])[delay:]
    np.testing.assert_allclose(total, heard[:-delay], atol=1e-6)
