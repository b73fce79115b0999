"""Sound files: what comes out is what went in, and every bad file gets one true sentence."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import INT_FORMATS, RATE, noise, read_codes, wav_bytes, write

from hparams import InputError
from sound import reading
from sound.reading import MP3_FRAME, Reader, SampleFormat, probe

ROOT = Path(__file__).parent.parent


def test_paths_that_are_no_sound_files_are_named(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    write(tmp_path / "silent.wav", wav_bytes(b""))
    write(tmp_path / "slow.wav", wav_bytes(bytes(2000), rate=3999))
    soundfile.write(tmp_path / "radio.ogg", noise(RATE), RATE)
    first = (tmp_path / "radio.ogg").read_bytes()
    soundfile.write(tmp_path / "radio.ogg", noise(RATE), RATE)  # with another serial number
    write(tmp_path / "radio.ogg", first + (tmp_path / "radio.ogg").read_bytes())
    write(tmp_path / "empty.wav", b"")
    write(tmp_path / "text.wav", b"la la la, an evening song\n" * 100)
    write(tmp_path / "film.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(100))
    expected = {
        "missing.wav": "no such file",
        "text.wav/song.wav": "Not a directory",
        "nu\0ll.wav": "no such file",
        "folder.wav": "is a directory",
        "fifo.wav": "is not a regular file",
        "loop.wav": "Too many levels of symbolic links",
        "silent.wav": "no audio samples",
        "slow.wav": "sample rate 3999 Hz",
        "radio.ogg": "another sound follows",
        "empty.wav": "empty file",
        "text.wav": "not audio",
        "film.m4a": "(m4a needs PyAV|not audio .*m4a, and .* says)",
    }
    for name, what in expected.items():
        with pytest.raises(InputError, match=what) as error:
            probe(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert str(error.value).endswith(")"), "every message ends with the fix"


def test_a_forbidden_file_is_told_as_such(tmp_path):
    code = (
        "import os, sys\n"
        "import cli\n"
        "from sound import reading\n"
        "os.chdir(sys.argv[1])\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)  # root may read everything\n"
        "for check in (reading.probe, reading.sha256, cli.check_writable):\n"
        "    try: check(reading.Path('locked.wav'))\n"
        "    except reading.InputError as error: print(error)\n"
    )
    write(tmp_path / "locked.wav", wav_bytes(bytes(10))).chmod(0)
    tmp_path.chmod(0o555)
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seen = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines() == [
        "locked.wav: permission denied (change its permissions)",
        "locked.wav: permission denied (change its permissions)",
        ".: not writable (choose another folder)",
    ]


def test_every_container_is_read_whole(tmp_path):
    sounds = [(c, "PCM_16") for c in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "CAF", "FLAC")]
    sounds += [("WAV", law) for law in ("ULAW", "ALAW", "IMA_ADPCM")]
    sounds += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
    path, n_samples = tmp_path / "sound", 48001
    for container, subtype in sounds:
        endian = "BIG" if container == "WAV" else None  # RIFX
        soundfile.write(path, 5 * noise(n_samples), 48000, subtype, endian, container)
        codes, info = read_codes(path, n_samples=999), probe(path)
        assert not info.warnings
        assert info.sample_format == SampleFormat("PCM_16", 16)
        reference = soundfile.read(path)[0].T
        assert codes.shape == reference.shape
        assert codes.shape[1] - n_samples in range(2048)  # ADPCM fills its last block
        top = 32767 / 32768
        np.testing.assert_allclose(codes / 32768, reference.clip(-1, top), atol=0.51 / 32768)


@pytest.mark.parametrize("container", ["WAV", "RF64", "W64", "AIFF", "AU", "FLAC", "OGG", "MP3"])
def test_a_cut_file_is_an_error_never_a_shorter_success(tmp_path, container):
    path, n = tmp_path / "sound", 2 * RATE
    soundfile.write(path, noise(n), RATE, format=container)
    content = path.read_bytes()
    for keep in (0.3, 0.97):
        write(path, content[: int(keep * len(content))])
        with pytest.raises(InputError, match=r"promises|its end is missing|damaged after"):
            read_codes(path)
        if container != "OGG":
            assert 0.5 * keep * n < read_codes(path, allow_truncated=True).shape[1] < n


def test_the_length_that_a_pipe_writes_is_accepted_with_a_warning(tmp_path):
    for size in (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7FFFF000):
        path = write(tmp_path / "pipe.wav", wav_bytes(bytes(2000), size=size))
        assert probe(path).n_samples == 1000
        assert "does not tell its length" in probe(path).warnings[0]
    with pytest.raises(InputError, match="promises"):  # a cut file of three gigabytes is no pipe
        probe(write(path, wav_bytes(bytes(2000), size=3_000_000_000)))


def test_float_samples_that_are_none_or_would_overflow_are_refused(tmp_path):
    path = tmp_path / "loud.wav"
    for subtype, level in (("FLOAT", 2e6), ("FLOAT", np.nan), ("DOUBLE", -1e300)):
        wav = np.zeros((30_000, 2))
        wav[441, 1] = level
        soundfile.write(path, wav, RATE, subtype)
        with pytest.raises(InputError, match=r"at 0.010 s.*scale it down, or repair"):
            read_codes(path)
    soundfile.write(path, np.full(1000, 40.0), RATE, "FLOAT")
    assert read_codes(path).max() == 40


def test_damage_inside_is_an_error_never_a_shorter_sound(tmp_path):
    said = r"x\..*: (damaged after|header promises|not audio|its page at)"
    for container in ("flac", "mp3", "ogg"):
        path = tmp_path / f"x.{container}"
        soundfile.write(path, noise(3 * RATE), RATE)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 20_000] = np.random.default_rng(0).bytes(20_000)
        with pytest.raises(InputError, match=said):
            read_codes(write(path, content))


@pytest.mark.parametrize("name", ["x.wav", "x.flac", "x.mp3", "x.opus", "adpcm.wav"])
def test_an_excerpt_is_cut_from_the_whole_sample_by_sample(tmp_path, name):
    path = tmp_path / name
    container, subtype = {"x.opus": ("OGG", "OPUS"), "adpcm.wav": ("WAV", "IMA_ADPCM")}.get(
        name, (None, None)
    )
    soundfile.write(path, noise(120_000), 48000, subtype, format=container)
    whole = read_codes(path)
    for start, duration in ((0, 0.5), (0.1, None), (0.37501, 0.3), (1.0, 1.2), (2.4, 9)):
        first = round(start * 48000)
        last = whole.shape[1] if duration is None else first + round(duration * 48000)
        expected = whole[:, first:last]
        for n_samples in (960, 50_000):
            with Reader(path, start=start, duration=duration) as reader:
                blocks = list(reader.blocks(n_samples))
                assert reader.n_read == expected.shape[1] > 0
            assert abs(reader.info.n_samples - expected.shape[1]) <= 2 * MP3_FRAME
            assert {block.shape[1] for block in blocks[:-1]} <= {n_samples}
            np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected)


def test_an_excerpt_that_does_not_exist_is_refused_with_both_times(tmp_path):
    path = write(tmp_path / "song.wav", wav_bytes(bytes(2 * RATE)))
    for start in (1, 1.5, 99):
        with pytest.raises(InputError, match=rf"begins at {start:.3f} s, .* ends at 1\.000 s"):
            Reader(path, start=start)
    with Reader(path, start=1 - 0.9 / RATE, duration=1e300) as reader:
        assert reader.info.n_samples == 1 == sum(block.shape[1] for block in reader.blocks(7))


def test_every_code_becomes_a_float_and_comes_back():
    for subtype, bits in INT_FORMATS.items():
        fmt, top = SampleFormat(subtype, bits), 2 ** (bits - 1)
        codes = np.array([-top, -top + 1, -1, 0, 1, top // 3, top - 1])
        wav = reading.to_float(codes, fmt)
        assert wav.dtype == np.float32
        assert wav[0] == -1
        assert wav[-1] == np.float32((top - 1) / top)
        np.testing.assert_allclose(reading.to_codes(wav, fmt), codes, atol=0, rtol=1e-7)
        found = reading.to_codes(np.array([-9.0, 9.0, 0.6 / top, 0.4 / top]), fmt)
        np.testing.assert_array_equal(found, [-top, top - 1, 1, 0])
        assert found.dtype == np.int32
