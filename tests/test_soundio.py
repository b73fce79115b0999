"""Sound files: what comes out is what went in, and every bad file gets one true sentence."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

import soundio
from hparams import InputError
from soundio import AudioInfo, OutputFiles, Reader, SampleFormat, probe

ROOT = Path(__file__).parent.parent
RATE = 44100
INT_FORMATS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
FORMATS = {**INT_FORMATS, "FLOAT": None, "DOUBLE": None}


def noise(n_samples: int, n_channels: int = 2, seed: int = 0) -> np.ndarray:
    """Make (n_samples, n_channels) in soundfile's order."""
    return 0.3 * np.random.default_rng(seed).uniform(-1, 1, (n_samples, n_channels))


def wav_bytes(data: bytes, tag: int = 1, bits: int = 16, n_channels: int = 1, **change) -> bytes:
    """Build a WAV by hand; `change` puts other numbers into its header."""
    rate, size = change.get("rate", RATE), change.get("size", len(data))
    width = bits // 8 * n_channels
    fmt = struct.pack("<HHIIHH", tag, n_channels, rate, (rate * width) & 0xFFFFFFFF, width, bits)
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt + change.get("before", b"")
    chunks += b"data" + struct.pack("<I", size) + data
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read_codes(path: Path, n_samples: int = 1000, **options) -> np.ndarray:
    with Reader(path, **options) as reader:
        return np.concatenate(list(reader.blocks(n_samples)), axis=1)


def like(path: Path, subtype: str = "PCM_16", n_channels: int = 1, n_samples: int = 1000):
    """Describe a sound as `probe` would."""
    return AudioInfo(
        path, RATE, n_channels, n_samples, SampleFormat(subtype, FORMATS[subtype]), "WAV"
    )


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


# --- Headers ------------------------------------------------------------------------------------


def test_a_header_is_told_as_the_standard_library_wrote_it(tmp_path):
    path = tmp_path / "song.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 3, 48000, 0, "NONE", ""))
        file.writeframes(bytes(6 * 1001))
    info = probe(path)
    assert (info.sample_rate, info.n_channels, info.n_samples) == (48000, 2, 1001)
    assert info.sample_format == SampleFormat("PCM_24", 24)
    assert (info.container, info.warnings, info.path) == ("WAV", (), path)
    assert info.seconds == pytest.approx(1001 / 48000)


def test_every_other_sample_format_becomes_16_bits():
    for subtype in ("ULAW", "IMA_ADPCM", "VORBIS", "MPEG_LAYER_III", "ALAC_24"):
        assert soundio.sample_format(subtype) == SampleFormat("PCM_16", 16)
    assert soundio.sample_format("PCM_S8") == SampleFormat("PCM_U8", 8)


def test_paths_that_are_no_sound_files_are_named(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "fifo.wav")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path has at most 107 bytes
        listener.bind("socket.wav")
        os.chdir(here)
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere.wav")
    write(tmp_path / "empty.wav", b"")
    write(tmp_path / "text.wav", b"la la la, an evening song\n" * 100)
    write(tmp_path / "film.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(100))
    expected = {
        "missing.wav": "no such file",
        "text.wav/song.wav": "no such file",
        "nu\0ll.wav": "no such file",
        "folder.wav": "is a directory",
        "fifo.wav": "is not a regular file",
        "socket.wav": "is not a regular file",
        "loop.wav": "links go round",
        "dangling.wav": "no such file",
        "empty.wav": "empty file",
        "text.wav": "not audio",
        "film.m4a": "ffmpeg -i",
        "n" * 300 + ".wav": "name is too long",
    }
    for name, what in expected.items():
        with pytest.raises(InputError, match=what) as error:
            probe(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ")
        assert str(error.value).endswith(")"), "every message ends with the fix"
    with pytest.raises(InputError, match="not a regular file"):
        probe("/dev/zero")


def test_a_forbidden_file_is_told_as_such(tmp_path):
    code = (
        "import os, sys, soundio\n"
        "os.chdir(sys.argv[1])\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)  # root may read everything\n"
        "for check in (soundio.probe, soundio.sha256, soundio.check_writable):\n"
        "    try: check(soundio.Path('locked.wav'))\n"
        "    except soundio.InputError as error: print(error)\n"
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


def test_importing_soundio_is_quick_and_needs_no_torch():
    code = "import sys, soundio; print('torch' in sys.modules, 'librosa' in sys.modules)"
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert seen.stdout == "False False\n"


def test_a_header_without_samples_is_refused(tmp_path):
    for size in (0, 2 * 500):
        path = write(tmp_path / "none.wav", wav_bytes(bytes(size), size=0))
        with pytest.raises(InputError, match="no audio samples"):
            probe(path)


def test_sample_rates_outside_4_to_384_khz_are_refused(tmp_path):
    for rate in (1, 3999, 384_001, 2_000_000_000):
        path = write(tmp_path / "rate.wav", wav_bytes(bytes(2000), rate=rate))
        with pytest.raises(InputError, match=f"sample rate {rate} Hz"):
            probe(path)
    for rate in (4000, 11025, 192_000, 384_000):
        assert probe(write(path, wav_bytes(bytes(2000), rate=rate))).sample_rate == rate


def test_a_wav_that_is_cut_off_is_refused_unless_allowed(tmp_path):
    whole = wav_bytes(bytes(range(250)) * 8, n_channels=2)
    path = write(tmp_path / "cut.wav", whole[: 44 + 1000 + 2])  # and half a frame
    with pytest.raises(InputError, match=r"promises 500 frames, file holds 250 .*truncated"):
        probe(path)
    with pytest.raises(InputError, match="file holds 250"):
        Reader(path)
    info = probe(path, allow_truncated=True)
    assert info.n_samples == 250
    assert "promises 500 frames" in info.warnings[0]
    codes = read_codes(path, allow_truncated=True)
    expected = np.frombuffer(whole[44:1044], "<i2").reshape(250, 2).T
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *[(c, "PCM_16") for c in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC")],
        *[("WAV", s) for s in ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "FLOAT", "DOUBLE")],
        *[("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_24")],
    ],
)
def test_every_container_is_read_whole_and_never_short_when_cut(tmp_path, container, subtype):
    path, n_samples = tmp_path / "sound", 48001
    soundfile.write(path, noise(n_samples), 48000, subtype, format=container)
    codes = read_codes(path, n_samples=999)
    assert not probe(path).warnings
    reference = soundfile.read(path)[0].T
    assert codes.shape == reference.shape
    assert codes.shape[1] - n_samples in range(2048)  # ADPCM fills its last block
    got = soundio.to_float(codes, probe(path).sample_format)
    np.testing.assert_allclose(got, reference.clip(-1, 1), atol=0.51 / 32768)

    content = path.read_bytes()
    for keep in (0.3, 0.8, 0.9):
        path.write_bytes(content[: int(keep * len(content))])
        with pytest.raises(InputError):
            read_codes(path)


def test_a_cut_aiff_counts_samples_not_the_bytes_before_them(tmp_path):
    path = tmp_path / "cut.aiff"
    soundfile.write(path, noise(1000, 1), RATE, "PCM_16")
    write(path, path.read_bytes()[:-20])
    with pytest.raises(InputError, match="promises 1000 frames, file holds 990 "):
        probe(path)


def test_an_ogg_without_its_last_page_is_refused(tmp_path):
    path = tmp_path / "cut.ogg"
    soundfile.write(path, noise(3 * RATE), RATE)
    content = path.read_bytes()
    write(path, content[: content.rindex(b"OggS")])
    with pytest.raises(InputError, match="its end is missing"):
        probe(path)


@pytest.mark.parametrize("container", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "OGG", "MP3"])
def test_scrambled_headers_are_read_or_refused_but_never_a_crash(tmp_path, container):
    path, rng = tmp_path / "sound", np.random.default_rng(0)
    soundfile.write(path, noise(2000, 1), RATE, format=container)
    content = path.read_bytes()
    for _ in range(60):
        changed = bytearray(content)
        for at in rng.integers(0, 130, rng.integers(1, 6)):
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        try:
            codes = read_codes(write(path, changed[: rng.integers(5, 2 * len(changed))]))
        except InputError:
            continue
        assert codes.size


def test_the_length_that_a_pipe_writes_is_accepted_with_a_warning(tmp_path):
    data = np.arange(1000, dtype="<i2").tobytes()
    for size in (0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000):
        path = write(tmp_path / "pipe.wav", wav_bytes(data, size=size))
        info = probe(path)
        assert info.n_samples == 1000
        assert len(info.warnings) == 1
        assert "pipe" in info.warnings[0]
        np.testing.assert_array_equal(read_codes(path), [np.arange(1000)])


def test_a_cut_file_of_three_gigabytes_is_not_mistaken_for_a_pipe(tmp_path):
    # Not every size from 0x7FFFFFFF on comes from a pipe: a real recording may be that large.
    path = write(tmp_path / "cut.wav", wav_bytes(bytes(2000), size=3_000_000_000))
    with pytest.raises(InputError, match="promises 1500000000 frames, file holds 1000"):
        probe(path)


def test_bytes_after_a_data_chunk_that_ends_too_early_are_counted(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 255, 2000, np.uint8).tobytes()
    path = write(tmp_path / "short.wav", wav_bytes(noisy, size=500))
    info = probe(path)
    assert info.n_samples == 250
    assert info.warnings == ("1500 bytes after the data chunk ignored",)


def test_chunks_around_the_samples_raise_no_warning(tmp_path):
    data, odd = np.arange(5, dtype=np.uint8).tobytes(), b"LIST" + struct.pack("<I", 3) + b"abc\0"
    after = b"\0" + b"id3 " + struct.pack("<I", 4) + b"song"  # the odd data chunk is padded
    content = wav_bytes(data, bits=8, before=odd) + after
    path = write(tmp_path / "chunks.wav", content)
    assert probe(path).warnings == ()
    np.testing.assert_array_equal(read_codes(path), [np.arange(5) - 128])
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)  # 7 bits a byte: 128
    assert probe(write(path, tag + content)).n_samples == 5
    with pytest.raises(InputError, match="file holds 4 "):
        probe(write(path, tag + content[: -len(after) - 1]))


def test_a_big_endian_rifx_file_is_read(tmp_path):
    path = tmp_path / "rifx.wav"
    soundfile.write(path, np.arange(10, dtype=np.int16), RATE, "PCM_16", "BIG", "WAV")
    assert path.read_bytes()[:4] == b"RIFX"
    np.testing.assert_array_equal(read_codes(path), [np.arange(10)])


def test_the_content_decides_not_the_extension(tmp_path):
    for name in ("song.wav", "song.raw", "song.mp3", "song"):
        path = tmp_path / name
        soundfile.write(path, noise(5000), RATE, "PCM_16", format="FLAC")
        assert probe(path).container == "FLAC"


def test_odd_names_are_read_and_written(tmp_path):
    content = wav_bytes(np.arange(10, dtype="<i2").tobytes())
    odd = ["-x.wav", "a b.wav", "😀.wav", "a\nb.wav", 'it\'s "x".wav', os.fsdecode(b"\xff\xfe.wav")]
    for name in [*odd, "a.b.c.wav", "é" * 125 + ".wav", "x" * 251 + ".wav"]:
        path = write(tmp_path / name, content)
        info = probe(path)
        output = soundio.output_path(tmp_path / "out", path, "_vocals.wav")
        with OutputFiles([output], info) as outputs:
            outputs.write(0, read_codes(path))
        np.testing.assert_array_equal(read_codes(output), [np.arange(10)])


def test_a_flac_of_unknown_length_is_refused(tmp_path):
    path = tmp_path / "stream.flac"
    soundfile.write(path, noise(5000), RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the 36 bits of STREAMINFO's total samples
    content[22:26] = bytes(4)
    with pytest.raises(InputError, match="does not tell its length"):
        probe(write(path, content))


def test_an_mp3_with_variable_bit_rate_and_no_length_header_is_never_cut_short(tmp_path):
    path, n_samples = tmp_path / "vbr.mp3", 8 * RATE
    wav = 0.1 * np.sin(np.arange(n_samples) / 7)[:, None]
    wav[n_samples // 2 :] += noise(n_samples - n_samples // 2, 1)  # needs larger frames
    with soundfile.SoundFile(
        path, "w", RATE, 1, bitrate_mode="VARIABLE", compression_level=0.5
    ) as f:
        f.write(wav)
    content = path.read_bytes()
    assert abs(probe(path).n_samples - n_samples) <= soundio.MP3_FRAME
    second_frame = content.index(content[:2], 4)
    write(path, content[second_frame:])  # without the frame that holds the Xing header
    with pytest.raises(InputError, match=r"of its 35\d\d\d\d frames .*: convert it"):
        probe(path)


def test_an_mp3_with_constant_bit_rate_needs_no_length_header(tmp_path):
    path = tmp_path / "cbr.mp3"
    soundfile.write(path, noise(RATE, 1), RATE, compression_level=0.5, bitrate_mode="CONSTANT")
    content = path.read_bytes()
    assert content[21:25] in (b"Info", b"Xing")
    content = content[content.index(content[:2], 4) :]
    cover = b"ID3\4\0\0\0\1\0\0" + bytes(2**14)  # libsndfile counts it as music
    for before, after in ((b"", b""), (cover, b""), (b"", b"TAG+" + bytes(351))):
        write(path, before + content + after)
        n_read = read_codes(path).shape[1]
        assert abs(n_read - RATE) <= 2 * soundio.MP3_FRAME
        assert abs(n_read - probe(path).n_samples) <= soundio.MP3_FRAME
        assert probe(path).warnings == ()
    write(path, content[: len(content) // 2 + 100])
    assert "last MP3 frame is cut" in probe(path).warnings[0]
    write(path, content[:5000] + bytes(5000) + content[10_000:])
    with pytest.raises(InputError, match=r"no MP3 frame at byte \d+ of \d+"):
        probe(path)


# --- Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "bits", "code", "raw"),
    [
        (1, 8, -128, b"\x00"),
        (1, 8, 127, b"\xff"),
        (1, 16, -2, b"\xfe\xff"),
        (1, 24, -(2**23), b"\x00\x00\x80"),
        (1, 24, 0x123456, b"\x56\x34\x12"),
        (1, 32, 0x12345678, b"\x78\x56\x34\x12"),
        (3, 32, 0.1, struct.pack("<f", 0.1)),
        (3, 64, 1 / 3, struct.pack("<d", 1 / 3)),
    ],
)
def test_codes_are_the_numbers_in_the_file(tmp_path, tag, bits, code, raw):
    path = write(tmp_path / "one.wav", wav_bytes(raw, tag=tag, bits=bits))
    codes = read_codes(path)
    dtype = {1: np.int32, 3: np.float32 if bits == 32 else np.float64}[tag]
    assert codes.dtype == dtype
    assert codes.shape == (1, 1)
    assert codes[0, 0] == dtype(code)


def test_lossy_sound_is_rounded_and_clipped_to_16_bits(tmp_path):
    path = tmp_path / "loud.ogg"
    soundfile.write(path, 5 * np.sign(noise(20_000, 1)), RATE, format="OGG")
    codes = read_codes(path)
    decoded = soundfile.read(path, dtype="float32")[0]
    assert np.abs(decoded).max() > 1.5
    np.testing.assert_array_equal(codes[0], np.rint(decoded * 32768).clip(-32768, 32767))


@pytest.mark.parametrize("name", ["x.wav", "x.mp3", "x.ogg", "x.opus", "x.flac"])
def test_blocks_of_any_size_hold_the_same_samples(tmp_path, name):
    path = tmp_path / name
    container, subtype = ("OGG", "OPUS") if name == "x.opus" else (None, None)
    soundfile.write(path, noise(60_000), 48000, subtype, format=container)
    whole = soundfile.read(path, dtype="float32")[0].T
    for n_samples in (960, 1000, 16384, 100_000):  # soundfile's own small reads break Opus
        with Reader(path) as reader:
            blocks = list(reader.float_blocks(n_samples))
            assert reader.n_read == whole.shape[1]
        assert {block.shape[1] for block in blocks[:-1]} <= {n_samples}
        assert 0 < blocks[-1].shape[1] <= n_samples
        np.testing.assert_array_equal(np.concatenate(blocks, axis=1), whole)


def test_float_blocks_are_the_codes_over_full_scale(tmp_path):
    for subtype in FORMATS:
        path = tmp_path / f"{subtype}.wav"
        soundfile.write(path, noise(3000), RATE, subtype)
        with Reader(path) as reader:
            blocks = list(reader.float_blocks(700))
            wav = np.concatenate(blocks, axis=1)
        assert wav.dtype == np.float32
        assert [block.shape for block in blocks] == [(2, 700)] * 4 + [(2, 200)]
        expected = soundio.to_float(read_codes(path), reader.info.sample_format)
        np.testing.assert_allclose(wav, expected, atol=1e-7)


def test_float_blocks_read_at_nearly_the_speed_of_one_call(tmp_path):
    path = tmp_path / "song.wav"
    soundfile.write(path, np.zeros((30 * RATE, 2), np.int16), RATE)

    def seconds(read) -> float:
        start = time.perf_counter()
        read()
        return time.perf_counter() - start

    def by_blocks() -> None:
        with Reader(path) as reader:
            for _ in reader.float_blocks(2**18):
                pass

    one_call = min(seconds(lambda: soundfile.read(path, dtype="float32")) for _ in range(5))
    assert min(seconds(by_blocks) for _ in range(5)) < 3 * one_call


def test_non_finite_samples_are_counted_over_the_whole_file_and_placed(tmp_path):
    wav = np.zeros((50_000, 2), np.float32)
    wav[88, 1], wav[90:95], wav[40_000, 0] = np.nan, -np.inf, np.inf
    path = tmp_path / "nan.wav"
    soundfile.write(path, wav, RATE, "FLOAT")
    for n_samples in (1000, 100_000):
        with pytest.raises(InputError, match=r"12 non-finite samples, first at 0.002 s \(--fix-"):
            read_codes(path, n_samples)
    with Reader(path, fix_nonfinite=True) as reader:
        codes = np.concatenate(list(reader.blocks(1000)), axis=1)
        assert reader.n_fixed == 12
    assert not codes.any()
    with Reader(path) as reader, pytest.raises(InputError, match="12 non-finite"):
        list(reader.float_blocks(1000))


def test_float_samples_that_would_overflow_are_refused(tmp_path):
    path = tmp_path / "loud.wav"
    for subtype, level in (("FLOAT", 2e6), ("FLOAT", -1e38), ("DOUBLE", 1e300)):
        wav = np.zeros(30_000)
        wav[441] = level
        soundfile.write(path, wav, RATE, subtype)
        with pytest.raises(InputError, match=r"at 0.010 s.*scale it down"):
            read_codes(path)
        wav[442] = np.nan
        soundfile.write(path, wav, RATE, subtype)
        with pytest.raises(InputError, match=r"at 0.010 s.*scale it down"):
            read_codes(path, fix_nonfinite=True)
    soundfile.write(path, np.full(1000, 40.0), RATE, "FLOAT")
    assert read_codes(path).max() == 40


def test_the_smallest_sounds_survive(tmp_path):
    path = tmp_path / "small.wav"
    for value in (0.0, 1e-30, 1e-40):  # the last one is denormal
        soundfile.write(path, np.full(3, value, np.float32), RATE, "FLOAT")
        np.testing.assert_array_equal(read_codes(path), np.full((1, 3), value, np.float32))


def test_damage_inside_is_an_error_never_a_shorter_sound(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("x.flac", "x.mp3", "x.ogg"):
        path = tmp_path / name
        soundfile.write(path, noise(3 * RATE), RATE)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 20_000] = rng.bytes(20_000)
        write(path, content)
        with pytest.raises(InputError, match=rf"{name}: (damaged after|header promises|not audio)"):
            read_codes(path)


def test_a_cut_flac_gives_what_it_has_when_that_is_allowed(tmp_path):
    path = tmp_path / "cut.flac"
    wav = (32768 * noise(3 * RATE)).astype(np.int16)
    soundfile.write(path, wav, RATE)
    content = path.read_bytes()
    write(path, content[: len(content) // 2])
    codes = read_codes(path, allow_truncated=True)
    assert codes.shape[1] > RATE
    np.testing.assert_array_equal(codes, wav[: codes.shape[1]].T)


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = write(tmp_path / "song.wav", wav_bytes(bytes(2 * 100_000)))
    with Reader(path) as reader:
        blocks = reader.blocks(1000)
        next(blocks)
        os.truncate(path, 44 + 2 * 30_000)
        with pytest.raises(InputError, match="changed while it was read"):
            list(blocks)


def test_reading_holds_one_block_not_the_song(tmp_path):
    path = write(tmp_path / "long.wav", wav_bytes(b"", size=2 * 2**30 - 2**20))
    os.truncate(path, 44 + 2 * 2**30 - 2**20)  # sparse: 3 hours of silence
    with Reader(path) as reader:
        assert reader.info.seconds > 3 * 3600
        blocks = reader.blocks(1000)
        tracemalloc.start()
        for _ in range(100):
            next(blocks)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20


# --- Codes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", INT_FORMATS)
def test_every_code_becomes_a_float_and_comes_back(subtype):
    fmt = SampleFormat(subtype, FORMATS[subtype])
    top = 2 ** (fmt.bits - 1)
    codes = np.array([-top, -top + 1, -1, 0, 1, top // 3, top - 1])
    wav = soundio.to_float(codes, fmt)
    assert wav.dtype == np.float32
    assert wav[0] == -1
    assert wav[-1] == np.float32((top - 1) / top)
    np.testing.assert_allclose(soundio.to_codes(wav, fmt), codes, atol=0, rtol=1e-7)
    np.testing.assert_array_equal(soundio.to_codes(np.array([-9.0, 9.0]), fmt), [-top, top - 1])
    assert soundio.to_codes(wav, fmt).dtype == np.int32


def test_codes_are_the_nearest_ones():
    fmt = SampleFormat("PCM_16", 16)
    wav = np.array([0.6, -0.6, 0.4, 1.4]) / 32768
    np.testing.assert_array_equal(soundio.to_codes(wav, fmt), [1, -1, 0, 1])
    for dtype, subtype in ((np.float32, "FLOAT"), (np.float64, "DOUBLE")):
        same = soundio.to_codes(np.array([1.5, -40.0]), SampleFormat(subtype, None))
        assert same.dtype == dtype
        np.testing.assert_array_equal(same, [1.5, -40.0])


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
def test_vocals_are_limited_so_that_the_rest_can_be_written(bits):
    fmt = SampleFormat({8: "PCM_U8"}.get(bits, f"PCM_{bits}"), bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    edges = np.array([low, low + 1, -1, 0, 1, high - 1, high])
    vocals, mixture = (grid.ravel().astype(np.int32) for grid in np.meshgrid(edges, edges))
    before = vocals.copy(), mixture.copy()
    limited, n_limited = soundio.limit_to_remainder(vocals, mixture, fmt)
    remainder = mixture.astype(np.int64) - limited
    assert low <= remainder.min()
    assert remainder.max() <= high
    fits = (mixture.astype(np.int64) - vocals >= low) & (mixture.astype(np.int64) - vocals <= high)
    np.testing.assert_array_equal(limited[fits], vocals[fits])
    assert n_limited == (~fits).sum() > 0
    assert limited.dtype == np.int32
    np.testing.assert_array_equal((vocals, mixture), before)


def test_float_vocals_have_no_limit():
    vocals = np.array([[3.0, -40.0]], np.float32)
    limited, n_limited = soundio.limit_to_remainder(vocals, -vocals, SampleFormat("FLOAT", None))
    np.testing.assert_array_equal(limited, vocals)
    assert n_limited == 0


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", FORMATS)
def test_what_is_written_is_what_is_read_for_every_format(tmp_path, subtype):
    fmt, rng = SampleFormat(subtype, FORMATS[subtype]), np.random.default_rng(0)
    shape, path = (3, 40_001), tmp_path / "new" / "out.wav"
    if fmt.bits:
        top = 2 ** (fmt.bits - 1)
        codes = rng.integers(-top, top, shape).astype(np.int32)
        codes[:, :2] = -top, top - 1
    else:
        codes = rng.normal(0, 9, shape).astype({"FLOAT": "f4", "DOUBLE": "f8"}[subtype])
    with OutputFiles([path], like(tmp_path / "in.wav", subtype, 3, shape[1])) as outputs:
        outputs.write(0, codes[:, :1])
        outputs.write(0, codes[:, 1:])
    read = read_codes(path)
    assert read.dtype == codes.dtype
    np.testing.assert_array_equal(read, codes)
    info = probe(path)
    assert (info.sample_rate, info.sample_format, info.warnings) == (RATE, fmt, ())
    assert names(path.parent) == ["out.wav"]


def test_the_standard_library_reads_the_same_codes(tmp_path):
    codes = np.array([[-(2**23), 5, 2**23 - 1]], np.int32)
    with OutputFiles([tmp_path / "o.wav"], like(tmp_path / "i.wav", "PCM_24")) as outputs:
        outputs.write(0, codes)
    with wave.open(str(tmp_path / "o.wav")) as file:
        raw = file.readframes(9)
    seen = [int.from_bytes(raw[i : i + 3], "little", signed=True) for i in range(0, 9, 3)]
    assert seen == codes[0].tolist()


def test_the_same_float_sound_is_the_same_file_at_any_time(tmp_path):
    paths = [tmp_path / "now.wav", tmp_path / "later.wav"]
    for path, pause in zip(paths, (0, 1.1), strict=True):
        time.sleep(pause)  # libsndfile notes the second of writing
        with OutputFiles([path], like(tmp_path / "in.wav", "FLOAT")) as outputs:
            outputs.write(0, np.ones((1, 100), np.float32))
    assert b"PEAK" in paths[0].read_bytes()
    assert soundio.sha256(paths[0]) == soundio.sha256(paths[1])


def test_beyond_4_gib_the_header_has_64_bits(tmp_path):
    info = like(tmp_path / "in.wav", n_samples=2**31)
    path = tmp_path / "out.wav"
    with OutputFiles([path], info) as outputs:
        outputs.write(0, np.ones((1, 100), np.int32))
    assert path.read_bytes()[:4] == b"RF64"
    np.testing.assert_array_equal(read_codes(path), np.ones((1, 100)))


def test_two_outputs_appear_together_and_replace_the_old_ones(tmp_path):
    paths = [write(tmp_path / name, b"old") for name in ("a.wav", "b.wav")]
    with OutputFiles(paths, like(tmp_path / "in.wav")) as outputs:
        for i in (0, 1):
            outputs.write(i, np.full((1, 10), i))
        assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(read_codes(path), np.full((1, 10), i))
    assert names(tmp_path) == ["a.wav", "b.wav"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, error):
    path = write(tmp_path / "a.wav", b"old")
    with pytest.raises(error), OutputFiles([path, tmp_path / "b.wav"], like(path / "x")) as outputs:  # noqa: PT012
        outputs.write(0, np.zeros((1, 10), np.int32))
        raise error
    assert names(tmp_path) == ["a.wav"]
    assert path.read_bytes() == b"old"


def test_a_file_that_does_not_read_back_as_written_is_not_kept(tmp_path, monkeypatch):
    def cut(fd: int) -> None:
        os.ftruncate(fd, 50)

    monkeypatch.setattr(soundio, "_clear_peak_time", cut)
    path = write(tmp_path / "a.wav", b"old")
    info = like(tmp_path / "in.wav")
    with pytest.raises(InputError, match="reads back as"), OutputFiles([path], info) as outputs:
        outputs.write(0, np.zeros((1, 10), np.int32))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.wav"]


def test_if_one_target_becomes_impossible_neither_output_appears(tmp_path):
    a, b = write(tmp_path / "a.wav", b"old"), tmp_path / "b.wav"
    info = like(tmp_path / "in.wav")
    with pytest.raises(InputError, match="is a directory"), OutputFiles([a, b], info) as outputs:  # noqa: PT012
        outputs.write(0, np.zeros((1, 10), np.int32))
        b.mkdir()
    assert a.read_bytes() == b"old"
    assert names(tmp_path) == ["a.wav", "b.wav"]


def test_outputs_of_dead_runs_are_removed_and_those_of_living_ones_kept(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(tmp_path / f".a.wav.tmp-{child.pid}", b"dead")
    keep = [f".a.wav.tmp-{os.getppid()}", ".a.wav.tmp-x", f".b.wav.tmp-{child.pid}"]
    for name in keep:
        write(tmp_path / name, b"")
    with OutputFiles([tmp_path / "a.wav"], like(tmp_path / "in.wav")) as outputs:
        outputs.write(0, np.zeros((1, 10), np.int32))
    assert names(tmp_path) == sorted([*keep, "a.wav"])


def test_an_input_is_never_overwritten(tmp_path):
    source = write(tmp_path / "song.wav", wav_bytes(bytes(2000)))
    other = write(tmp_path / "other.wav", wav_bytes(bytes(2000)))
    (tmp_path / "link.wav").symlink_to("song.wav")
    os.link(source, tmp_path / "hard.wav")
    info = probe(source)
    for name in ("song.wav", "link.wav", "hard.wav", "../" + tmp_path.name + "/song.wav"):
        with pytest.raises(InputError, match="would overwrite the input"):
            soundio.check_outputs([tmp_path / name], info)
        with pytest.raises(InputError, match="would overwrite the input"):
            OutputFiles([tmp_path / name], info)
    soundio.check_outputs([other], info)
    with pytest.raises(InputError, match=r"would overwrite the input .*other.wav"):
        soundio.check_outputs([other], info, inputs=[source, other])
    with pytest.raises(InputError, match="two outputs"):
        soundio.check_outputs([tmp_path / "x.wav", tmp_path / "x.wav"], info)


def test_impossible_outputs_are_told_before_any_work(tmp_path):
    info = like(tmp_path / "in.wav")
    write(tmp_path / "file", b"")
    (tmp_path / "folder.wav").mkdir()
    for name, what in {
        "file/out.wav": "not a directory",
        "file/deep/out.wav": "not a directory",
        "folder.wav": "is a directory",
        "x" * 300 + "/out.wav": "not writable: the name is too long",
    }.items():
        with pytest.raises(InputError, match=what):
            soundio.check_outputs([tmp_path / name], info)
    with pytest.raises(InputError, match="not a regular file"):
        soundio.check_writable(Path("/dev/null"))
    with pytest.raises(InputError, match="not writable"):
        soundio.check_writable(Path("/proc/self/out.wav"))
    assert names(tmp_path) == ["file", "folder.wav"]


def test_missing_space_is_told_before_any_work(tmp_path):
    info = like(tmp_path / "in.wav", n_samples=2**60)
    with pytest.raises(InputError, match=r"no space left on .*: need \S+ MB, have \S+ MB"):
        OutputFiles([tmp_path / "out.wav"], info)
    assert names(tmp_path) == []


def test_two_outputs_need_the_space_of_two(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    info = like(tmp_path / "in.wav", n_samples=1_000_000)
    soundio.check_outputs([tmp_path / "a.wav"], info)
    with pytest.raises(InputError, match=r"need 4\.01 MB, have 3 MB"):
        soundio.check_outputs([tmp_path / "a.wav", tmp_path / "b.wav"], info)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 2 MiB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_writing_keeps_the_old_files(small_disk, tmp_path):
    paths = [write(small_disk / name, b"old") for name in ("a.wav", "b.wav")]
    info = like(tmp_path / "in.wav", n_samples=400_000)  # two of 0.8 MB are announced
    what = f"no space left on {small_disk}: need 1.61 MB, have "
    with pytest.raises(InputError, match=what), OutputFiles(paths, info) as outputs:  # noqa: PT012
        write(small_disk / "stranger", bytes(700_000))
        for _ in range(40):
            outputs.write(0, np.zeros((1, 10_000), np.int32))
            outputs.write(1, np.zeros((1, 10_000), np.int32))
    assert names(small_disk) == ["a.wav", "b.wav", "stranger"]
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    with pytest.raises(InputError, match="no space left on"):
        soundio.replace_atomically(paths[0], lambda file: file.write(bytes(3_000_000)))
    assert names(small_disk) == ["a.wav", "b.wav", "stranger"]
    assert paths[0].read_bytes() == b"old"


def test_long_names_are_cut_between_characters_and_stay_different(tmp_path):
    def output(stem: str) -> str:
        return soundio.output_path(tmp_path, f"folder/{stem}.wav", "_vocals.wav").name

    assert output("a.b.c") == "a.b.c_vocals.wav"
    assert output("x" * 244) == "x" * 244 + "_vocals.wav"
    long = [output("é" * 123), output("é" * 122 + "e"), output("é" * 125), output("x" * 251)]
    assert len(set(long)) == len(long)
    for name in long:
        assert len(os.fsencode(name)) <= 255
        assert name.endswith("_vocals.wav")
        name.encode()  # no half characters
    assert os.fsencode(output(os.fsdecode(b"\xff" * 251))).startswith(b"\xff" * 230)


# --- Small files --------------------------------------------------------------------------------


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "manifest.json"
    soundio.replace_atomically(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        soundio.replace_atomically(path, fail)
    assert path.read_bytes() == b"first"
    assert names(path.parent) == ["manifest.json"]


def test_a_failed_small_file_tells_the_reason(tmp_path, monkeypatch):
    def fail(number: int, kind: type = OSError):
        def write(_file) -> None:
            raise kind(number, os.strerror(number))

        return write

    path = tmp_path / "x.npy"
    for number, what in {
        errno.ENOSPC: "no space left on",
        errno.EDQUOT: "no space left on",
        errno.EFBIG: "x.npy: could not be written: larger than",
        errno.EIO: "x.npy: could not be written: Input/output error",
    }.items():
        with pytest.raises(InputError, match=what):
            soundio.replace_atomically(path, fail(number))
    with pytest.raises(InputError, match="is a directory"):
        soundio.replace_atomically(tmp_path, fail(0))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space left on"):  # torch.save says RuntimeError
        soundio.replace_atomically(path, fail(0, RuntimeError))
    assert names(tmp_path) == []


def test_a_hash_is_the_published_one(tmp_path):
    path = write(tmp_path / "abc", b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert soundio.sha256(path) == expected
    with pytest.raises(InputError, match="no such file"):
        soundio.sha256(tmp_path / "none")
