"""What libsndfile forgives silently: files that are cut off, or that do not tell their length.

`check_length` finds out how much sound a file really holds, by walking over the chunks of WAV,
AIFF, CAF and their like, over the pages of Ogg and over the frames of MP3.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import soundfile

MP3_FRAME = 1152  # samples; an MP3 header may promise up to one frame more than is decoded
SAMPLE_BYTES = {
    **{"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
}

_MPEG_1_KBIT = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_2_KBIT = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)


def check_length(fd: int, sound: soundfile.SoundFile) -> tuple[int, str, str]:
    """Find what libsndfile forgives silently: returns (n_samples, problem, warning), "" for none.

    `n_samples` is what can be read.
    """
    start, n_bytes = _skip_id3(fd), os.fstat(fd).st_size
    magic = os.pread(fd, 4, start)
    if magic == b"OggS":
        return sound.frames, _check_ogg(fd, n_bytes), ""
    if sound.format == "MP3":
        return _check_mp3_length(fd, start, n_bytes, sound.frames)
    if sound.format == "AAC":
        return _check_adts_length(fd, n_bytes, sound)
    found = _find_data(fd, magic, start)
    if found is None:
        return sound.frames, "", ""
    data, promised = found
    held = n_bytes - data
    if promised <= held:
        n_lost = _junk_bytes(fd, magic, data + promised, n_bytes)
        return sound.frames, "", f"{n_lost} bytes after the data chunk ignored" if n_lost else ""
    width = SAMPLE_BYTES.get(sound.subtype, 0) * sound.channels
    n_held = min(sound.frames, held // width) if width else sound.frames
    if is_unknown_length(promised):
        return n_held, "", "its header does not tell its length (written by a pipe?)"
    if width:
        return n_held, f"header promises {promised // width} frames, file holds {n_held}", ""
    return n_held, f"header promises {promised} bytes, file holds {held}", ""


def is_unknown_length(size: int) -> bool:
    """Say whether a WAV's data chunk was begun by somebody who did not know its size.

    Whoever writes into a pipe cannot return to the header and leaves the largest number there. Any
    other size is believed: a cut file of 3 GB has more than 0x7FFFFFFF in its header, too.
    """
    return size >= 0xFFFF0000 or 0x7FFF0000 <= size <= 0x80000000


@dataclass(frozen=True)
class _Layout:
    """How a container lists its chunks."""

    n_header: int  # bytes before the first chunk
    entry: str  # struct format of (name, size)
    data: bytes = b"data"  # name of the chunk with the samples
    align: int = 1  # chunks start at multiples of this many bytes
    n_counted: int = 0  # bytes of the entry that its size counts
    n_lead: int = 0  # bytes in the data chunk before the samples


_LAYOUTS = {
    b"RIFF": _Layout(12, "<4sI", align=2),
    b"RIFX": _Layout(12, ">4sI", align=2),
    b"RF64": _Layout(12, "<4sI", align=2),
    b"FORM": _Layout(12, ">4sI", data=b"SSND", align=2, n_lead=8),  # AIFF
    b"caff": _Layout(8, ">4sq"),
    b"riff": _Layout(40, "<16sQ", align=8, n_counted=24),  # Sony Wave64
}


def _find_data(fd: int, magic: bytes, start: int) -> tuple[int, int] | None:
    """Find the samples in a chunked file; returns (offset, promised size) [bytes], or None."""
    if magic == b".snd":  # Sun AU has no chunks, only a fixed header
        offset, size = struct.unpack(">II", os.pread(fd, 8, start + 4))
        return start + offset, size
    layout = _LAYOUTS.get(magic)
    if layout is None:
        return None
    n_entry, size64 = struct.calcsize(layout.entry), 0
    position = start + layout.n_header
    for _ in range(10_000):  # a hostile file can hold millions of empty chunks
        entry = os.pread(fd, n_entry, position)
        if len(entry) < n_entry:
            return None
        name, size = struct.unpack(layout.entry, entry)
        position += n_entry
        size -= layout.n_counted
        if name == b"ds64":  # RF64 keeps its 64-bit sizes here
            size64 = int.from_bytes(os.pread(fd, 8, position + 8), "little")
        if name[:4] == layout.data:
            if magic == b"RF64" and size == 0xFFFFFFFF:
                size = size64
            return position + layout.n_lead, size - layout.n_lead
        if not 0 <= size < 2**62:
            return None
        position += size + -size % layout.align
    return None


def _junk_bytes(fd: int, magic: bytes, end: int, n_bytes: int) -> int:
    """Count the bytes after a RIFF data chunk, if they are no further chunk."""
    end += end % 2
    if magic not in (b"RIFF", b"RIFX", b"RF64") or end >= n_bytes:
        return 0
    entry = os.pread(fd, 8, end)
    if len(entry) == 8:
        name, size = struct.unpack(_LAYOUTS[magic].entry, entry)
        if all(32 <= byte < 127 for byte in name) and end + 8 + size <= n_bytes:
            return 0
    return n_bytes - end


def _skip_id3(fd: int) -> int:
    """Return the size of an ID3v2 tag (titles, cover art) in front of the sound, 0 for none."""
    tag = os.pread(fd, 10, 0)
    if len(tag) < 10 or tag[:3] != b"ID3":
        return 0
    size = 0
    for byte in tag[6:]:  # seven bits in each byte
        size = size << 7 | byte & 0x7F
    return 10 + size


def _check_ogg(fd: int, n_bytes: int) -> str:
    """Say what is wrong with the end of an Ogg file, "" for nothing.

    Its last page must be whole, marked as the last, and of the stream that the first page began:
    of several that follow each other, as in recorded radio, libsndfile reads the first.
    """
    tail = os.pread(fd, 65536, max(0, n_bytes - 65536))  # a page has at most 65307 bytes
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return "its end is missing"
    n_segments = page[26]
    n_page = 27 + n_segments + sum(page[27 : 27 + n_segments])
    if not page[5] & 4 or n_page > len(page):
        return "its end is missing"
    is_one = os.pread(fd, 4, 14) == page[14:18]  # the stream's serial number
    return "" if is_one else "several sounds in one file, of which only the first can be read"


def _check_mp3_length(fd: int, start: int, n_bytes: int, n_samples: int) -> tuple[int, str, str]:
    """Count an MP3's samples where no Xing header does it; returns as `check_length`.

    libsndfile then guesses the length from the file's size, cover art included, and the bit rate
    of its beginning; where the guess is too short it reads no further.
    """
    head = os.pread(fd, 4096, start)
    if b"Xing" in head or b"Info" in head:
        return n_samples, "", ""
    n_found, end = _count_mp3_samples(fd, start)
    if n_found > n_samples + 2 * MP3_FRAME:
        problem = f"only {n_samples} of its {n_found} frames can be decoded: convert it to wav"
        return n_samples, problem, ""
    if end > n_bytes:
        return min(n_found, n_samples), "", "its last MP3 frame is cut; it may have been longer"
    if n_bytes - end > 128 and os.pread(fd, 8, end)[:3] not in (b"TAG", b"APE", b"LYR", b"ID3"):
        return n_samples, f"no MP3 frame at byte {end} of {n_bytes}", ""
    return min(n_found, n_samples), "", ""


def _count_mp3_samples(fd: int, position: int) -> tuple[int, int]:
    """Walk over MPEG layer III frames [1] as far as they go; returns (n_samples, end [bytes]).

    References
    ----------
    .. [1] ISO/IEC 11172-3:1993 and 13818-3:1998, 2.4.2.3 (the header of a frame).
    """
    n_samples = 0
    while len(header := os.pread(fd, 4, position)) == 4:
        word = int.from_bytes(header, "big")
        version, rate, index = word >> 19 & 3, word >> 10 & 3, word >> 12 & 15
        is_layer_3 = word >> 21 == 0x7FF and word >> 17 & 3 == 1
        if not is_layer_3 or version == 1 or rate == 3 or index in (0, 15):
            break
        is_mpeg_1 = version == 3
        halvings = {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2, 2.5
        sample_rate = (44100, 48000, 32000)[rate] >> halvings
        kbit = (_MPEG_1_KBIT if is_mpeg_1 else _MPEG_2_KBIT)[index]
        padding = word >> 9 & 1
        position += (144 if is_mpeg_1 else 72) * kbit * 1000 // sample_rate + padding
        n_samples += MP3_FRAME if is_mpeg_1 else MP3_FRAME // 2
    return n_samples, position


def _check_adts_length(fd: int, n_bytes: int, sound: soundfile.SoundFile) -> tuple[int, str, str]:
    """Count the frames [1] of a bare AAC stream, which has no other length.

    References
    ----------
    .. [1] ISO/IEC 13818-7:2006, 6.2 (the header of an ADTS frame).
    """
    n_samples = position = 0
    while len(header := os.pread(fd, 7, position)) == 7 and header[0] == 0xFF:
        index, n_frame = header[2] >> 2 & 15, int.from_bytes(header[3:6], "big") >> 5 & 0x1FFF
        if header[1] & 0xF6 != 0xF0 or n_frame < 7 or index >= len(_ADTS_RATES):
            break
        # With spectral band replication the decoder gives twice as many samples.
        n_samples += 1024 * (1 + header[6] % 4) * sound.samplerate // _ADTS_RATES[index]
        position += n_frame
    if position > n_bytes:
        return n_samples, "", "its last AAC frame is cut; it may have been longer"
    if n_bytes - position > 128:
        return n_samples, f"no AAC frame at byte {position} of {n_bytes}", ""
    return n_samples, "", ""
