"""Output files: what was written is what is read; whole or not at all; never over an input."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import FORMATS, RATE, like, names, read_codes, some_codes

from hparams import InputError
from sound.reading import AudioInfo, probe
from sound.writing import Record, Separated, SoundWriter, choose_format, record_in

RECORD = Record("0123abcd", "4567cdef", "89abef01")


def save(path: Path, codes: np.ndarray, info: AudioInfo, **options) -> None:
    with SoundWriter(path, info, choose_format(info, **options), "vocals", RECORD) as sound:
        for start in range(0, codes.shape[1], 40_000):
            block = codes[:, start : start + 40_000]
            sound.write(Separated(block, block, block * 0))


def test_what_is_written_is_what_is_read_for_every_format(tmp_path):
    path = tmp_path / os.fsdecode(b"-\xff %s \xf0\x9f\x98\x80.wav")
    for subtype in FORMATS:
        codes = some_codes(subtype)
        save(path, codes, like(path, subtype, 2))
        np.testing.assert_array_equal(read_codes(path), codes)
        info = probe(path)
        assert (info.sample_rate, info.n_channels, info.n_samples) == (RATE, 2, codes.shape[1])
        assert (info.sample_format.subtype, info.warnings) == (subtype, ())


def test_beyond_4_gib_the_header_has_64_bits(tmp_path):
    path = tmp_path / "long.wav"
    save(path, some_codes("PCM_16"), like(path, "PCM_16", 2, n_samples=2**30))
    assert probe(path).container == "RF64"
    assert probe(path).n_samples == 50_000


@pytest.mark.parametrize("container", ["wav", "flac", "ogg", "mp3"])
def test_a_disk_that_fills_up_is_one_line_and_keeps_the_old_file(small_disk, container):
    path = small_disk / f"x.{container}"
    path.write_bytes(b"old")
    codes = np.random.default_rng(0).integers(-(2**15), 2**15, (2, 40 * RATE)).astype(np.int32)
    if container in ("ogg", "mp3"):
        codes = codes.astype(np.float32) / 2**15
    with pytest.raises(InputError, match=r"x\..*: no space left on .*disk \(free some\)$"):
        save(path, codes, like(path, "PCM_16", 2, codes.shape[1]), container=container)
    assert names(small_disk) == [path.name]
    assert path.read_bytes() == b"old"


def test_the_format_keeps_what_the_container_can_and_tells_what_it_cannot(tmp_path):
    for subtype, container, wanted, found in (
        ("PCM_24", "wav", None, "PCM_24"),
        ("PCM_16", "wav", "FLOAT", "FLOAT"),
        ("PCM_U8", "flac", None, "PCM_16"),
        ("FLOAT", "flac", None, "PCM_24"),
        ("PCM_32", "flac", "PCM_16", "PCM_16"),
        ("PCM_16", "ogg", None, "VORBIS"),
        ("PCM_16", "mp3", None, "MPEG_LAYER_III"),
    ):
        assert choose_format(like(tmp_path, subtype), container, wanted).subtype == found
    with pytest.raises(InputError, match="at most 2 channels"):
        choose_format(like(tmp_path, n_channels=3), "mp3")
    with pytest.raises(InputError, match="MP3 allows only"):
        choose_format(replace(like(tmp_path), sample_rate=44_000), "mp3")


def test_tags_come_along(tmp_path):
    for container in ("wav", "flac", "ogg", "mp3"):
        path = tmp_path / f"x.{container}"
        earlier = f"[Vocal Mask {'0' * 24}] {'é' * 99}"  # the song is an output, too
        tags = {"title": "Ein Lied – 歌", "artist": "somebody", "comment": earlier}
        info = replace(like(path, n_samples=5000), tags=tags)
        codes = np.zeros((1, 5000), np.float32 if container in ("ogg", "mp3") else np.int32)
        save(path, codes, info, container=container)
        with soundfile.SoundFile(path) as sound:
            assert (sound.title, sound.artist) == (tags["title"], "somebody")
            assert sound.comment.startswith(earlier)
        assert record_in(path) == RECORD
