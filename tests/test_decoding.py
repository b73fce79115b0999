"""What libsndfile cannot read: as long as the original, in step with it, or an error."""

import json
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from sounds import RATE, read_codes, wav_bytes, write

import build_dataset
import dataset
import evaluate
from hparams import InputError, hparams
from sound import decoding, tracks
from sound.reading import Reader, SampleFormat, probe

N_SAMPLES = 132_300  # no whole number of AAC frames
KINDS = {  # name: encoder, sample format, options of the container
    "song.m4a": ("aac", "fltp", {}),
    "fast.m4a": ("aac", "fltp", {"movflags": "faststart"}),
    "alac.m4a": ("alac", "s16p", {}),
    "song.mka": ("aac", "fltp", {}),
    "song.wma": ("wmav2", "fltp", {}),
    "song.aac": ("aac", "fltp", {}),  # without a container, and so without a length
    "live.mka": ("aac", "fltp", {"live": "1"}),  # as a browser records, which tells none
}


def original() -> np.ndarray:
    t = np.arange(N_SAMPLES) / RATE
    sweep = 0.3 * np.sin(2 * np.pi * (200 * t + 400 * t**2))
    return np.stack([sweep, 0.5 * sweep[::-1]]).astype(np.float32)


def encode(path: Path, wavs: list[np.ndarray], codec="aac", kind="fltp", options=None) -> Path:
    """Write sounds as the audio streams of one file."""
    with av.open(str(path), "w", options=options or {}) as container:
        container.metadata.update(title="Träume", artist="A", track="3")
        streams = [container.add_stream(codec, RATE, layout="stereo", format=kind) for _ in wavs]
        for stream, wav in zip(streams, wavs, strict=True):
            stream.bit_rate = 160_000
            if kind == "s16p":
                wav = np.rint(wav * 2**15).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wav), kind, "stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, 0, Fraction(1, RATE)
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same music in many formats."""
    folder = tmp_path_factory.mktemp("music")
    for name, (codec, kind, options) in KINDS.items():
        encode(folder / name, [original()], codec, kind, options)
    return folder


def read_floats(path: Path, **options) -> np.ndarray:
    with Reader(path, **options) as reader:
        return reader.read()


def test_an_m4a_has_the_length_of_its_original_and_is_in_step(folder):
    name = "song.m4a"
    info = probe(folder / name)
    assert (info.sample_rate, info.n_channels, info.n_samples) == (RATE, 2, N_SAMPLES)
    assert (info.sample_format, info.container) == (SampleFormat("PCM_16", 16), "M4A")
    assert info.tags == {"artist": "A", "title": "Träume", "tracknumber": "3"}
    wav, true = read_floats(folder / name), original()
    assert wav.shape == true.shape
    middle = slice(2000, -2000)
    errors = [np.mean((np.roll(wav, shift) - true)[:, middle] ** 2) for shift in (-1, 0, 1)]
    assert errors[1] < 0.02 * np.mean(true**2)  # and a shift by one sample is heard:
    assert errors[1] < 0.2 * min(errors[0], errors[2])
    part = read_floats(folder / name, start=1.1, duration=0.5)
    np.testing.assert_array_equal(part, wav[:, round(1.1 * RATE) : round(1.6 * RATE)])


def test_what_tells_no_length_is_decoded_to_its_end_and_of_several_sounds_the_first_is_told(folder):
    for name in ("song.aac", "live.mka"):
        assert N_SAMPLES <= read_floats(folder / name).shape[1] < N_SAMPLES + 4096
        assert probe(folder / name).warnings == ()
    two = encode(folder / "two.mka", [original(), original()])
    assert probe(two).warnings == ("holds 2 sounds, of which the first is taken",)


def test_a_title_in_another_encoding_is_left_out(folder, tmp_path):
    wav = wav_bytes(bytes(2000))
    latin1 = "Träume ist".encode("latin-1")
    for name, content in (
        ("song.wav", wav + b"LIST\x16\0\0\0INFOINAM\x0a\0\0\0" + latin1),
        ("song.m4a", (folder / "song.m4a").read_bytes().replace("ä".encode(), b"\xe4\xe4")),
        ("song.mka", (folder / "song.mka").read_bytes().replace("ä".encode(), b"\xe4\xe4")),
    ):
        assert "title" not in probe(write(tmp_path / name, content)).tags
        assert len(read_codes(tmp_path / name)) in (1, 2)


def test_alac_is_the_original_to_the_bit(folder):
    assert probe(folder / "alac.m4a").sample_format == SampleFormat("PCM_16", 16)
    codes = read_codes(folder / "alac.m4a")
    np.testing.assert_array_equal(codes, np.rint(original() * 2**15))


def test_a_cut_file_is_an_error_never_a_shorter_success(folder, tmp_path):
    for name in ("fast.m4a", "song.m4a", "alac.m4a", "song.mka", "song.wma"):
        content = (folder / name).read_bytes()
        path = write(tmp_path / name, content[: len(content) // 2])
        with pytest.raises(InputError, match=r"damaged after|holds|not audio") as error:
            read_codes(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
    cut = read_codes(tmp_path / "fast.m4a", allow_truncated=True)
    assert RATE // 2 < cut.shape[1] < N_SAMPLES


def test_garbage_and_playlists_never_reach_the_decoder(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"song\.m4a: m4a needs PyAV \(pip install av\)$"):
        probe(folder / "song.m4a")
    monkeypatch.setattr(decoding, "open_sound", lambda *_: pytest.fail("handed on"))
    for content in (b"la la la\n" * 100, b"#EXTM3U\nhttp://x/y.ts\n", bytes(5000)):
        with pytest.raises(InputError, match="not audio"):
            probe(write(tmp_path / "song.m4a", content))


def test_a_musdb18_tree_becomes_a_dataset(tmp_path):
    parts = [original() * level for level in (0.5, 0.1, 0.1, 0.1, 0.2)]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        encode(tmp_path / split / f"Some - {split}.stem.mp4", parts)
    found = tracks.find_tracks(tmp_path)
    assert found.layout == "MUSDB18"
    assert [(track.name, track.split) for track in found.tracks] == [
        ("Some - test", "test"),
        ("Some - train", "train"),
    ]
    vocals, accompaniment = tracks.read_channels(found.tracks[0])
    np.testing.assert_allclose(np.std(vocals), 0.2 * np.std(original()), rtol=0.1)
    np.testing.assert_allclose(np.std(accompaniment), 0.3 * np.std(original()), rtol=0.1)


def test_real_musdb18_files_are_built_and_scored_end_to_end(data_folder, tmp_path):
    root = data_folder / "musdb7" / "stem_mp4"
    if not root.is_dir():
        pytest.skip("no MUSDB18 there")
    assert build_dataset.main([str(root), str(tmp_path / "built"), "--workers", "1"]) == 0
    songs = dataset.open_songs([tmp_path / "built"], hparams)
    assert {song.song.split for song in songs} == {"train", "test"}
    scores = tmp_path / "bounds.json"
    words = [str(root), "--seconds", "1", "--every", "2", "--output", str(scores)]
    assert evaluate.main(["bounds", *words]) == 0
    assert json.loads(scores.read_text())
