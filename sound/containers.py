"""What the headers of WAV, FLAC, Ogg and MPEG audio promise, and reading on where it is wrong.

libsndfile believes headers and reads no further: of an MP3 whose Xing header counts half of the
frames it gives half, of two songs in one Ogg file the first. The decoder's own end is the truth:
`endless_flac` and `endless_mpeg` hide the length, so that libsndfile decodes all that there is.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

_REFLECTED = bytes(int(f"{i:08b}"[::-1], 2) for i in range(256))
MOST_FRAME = 1441  # bytes of MPEG layer III
_ENDLESS = 2**30  # MPEG frames: 300 days
_KBITS_1 = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # MPEG-1
_KBITS_2 = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # MPEG-2 and 2.5
_LAYER_3 = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb][\x10-\xeb]", re.DOTALL)  # begins a frame


class Pieces(io.RawIOBase):
    """Bytes, and stretches (begin, end) of a file, one behind the other, as one file to read.

    `n_claimed` more bytes are claimed to follow, but only the last are there, where mpg123 looks
    for a tag.
    """

    def __init__(
        self, file: BinaryIO, pieces: Sequence[bytes | tuple[int, int]], n_claimed: int = 0
    ) -> None:
        self._file, self._pieces, self._at = file, pieces, 0
        sizes = (len(p) if isinstance(p, bytes) else p[1] - p[0] for p in pieces)
        self._begins = list(itertools.accumulate(sizes, initial=0))
        self._n_bytes = self._begins[-1] + n_claimed
        self.end = pieces[-1][1]  # in the file

    readable = seekable = lambda _self: True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to another position."""
        self._at = offset + (0, self._at, self._n_bytes)[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer, or as much of it as there is."""
        view, n_done = memoryview(buffer).cast("B"), 0
        if self._n_bytes - 128 <= self._at < self._n_bytes > self._begins[-1]:
            n_done = min(len(view), self._n_bytes - self._at)
            view[:n_done] = bytes(n_done)
            self._at += n_done
            return n_done
        for piece, begin, end in zip(self._pieces, self._begins, self._begins[1:], strict=False):
            n = min(end - self._at, len(view) - n_done)
            if n > 0:
                first = self._at - begin
                if isinstance(piece, bytes):
                    data = piece[first : first + n]
                else:
                    self._file.seek(piece[0] + first)
                    data = self._file.read(n)
                view[n_done : n_done + len(data)] = data
                n_done, self._at = n_done + len(data), self._at + len(data)
        return n_done


def faults(file: BinaryIO, sound: Any) -> tuple[str, str]:
    """Return what is wrong with a file that libsndfile has opened, and what is merely odd."""
    if sound.format == "OGG":
        return _ogg_faults(file)
    n_held, n_promised, slack = file.seek(0, os.SEEK_END), 0, 0  # bytes
    if sound.format == "MP3" and (xing := _xing(file, 0)):
        n_held, n_promised, slack = n_held - xing.frame, xing.n_bytes, MOST_FRAME
    elif sound.format == "W64":
        n_promised = int.from_bytes(_read(file, 16, 8), "little")
    elif sound.format == "AU":
        order = "big" if _read(file, 0, 4) == b".snd" else "little"
        begin, size = (int.from_bytes(_read(file, at, 4), order) for at in (4, 8))
        n_promised = 0 if size == 0xFFFFFFFF else begin + size
    if n_promised > n_held + slack:
        return f"header promises {n_promised} bytes, file holds {n_held}", ""
    if sound.format not in ("WAV", "WAVEX", "RF64", "AIFF", "AIFC"):
        return "", ""
    problem = warning = ""
    chunks, n_behind = chunks_of(file)
    n_promised = sound.frames
    if b"COMM" in chunks and sound.subtype.startswith(("PCM", "FLOAT", "DOUBLE")):
        n_promised = int.from_bytes(_read(file, chunks[b"COMM"][0] + 2, 4), "big")
    elif b"data" in chunks:  # libsndfile takes what there is of a cut one
        begin, promised = chunks[b"data"]
        n_held = os.fstat(file.fileno()).st_size - begin
        if is_unknown_length(promised):
            warning = "its header does not tell its length (written by a pipe?)"
        elif promised > n_held > 0:
            n_promised = math.ceil(sound.frames * promised / n_held)
    if n_promised != sound.frames:
        problem = f"header promises {n_promised} frames, file holds {sound.frames}"
    elif n_behind:
        warning = f"{n_behind} bytes behind the sound that its header promises are ignored"
    return problem, warning


def has_mpeg(file: BinaryIO, begin: int, end: int) -> bool:
    """Say whether three frames of MPEG layer III follow one another in a stretch of a file."""
    for at in range(begin, end, 2**16):
        for found in _LAYER_3.finditer(_read(file, at, 2**16 + 3)):
            frame, n_frames = at + found.start(), 0
            while n_frames < 3 and (size := _frame_size(file, frame)):
                frame, n_frames = frame + size, n_frames + 1
            if n_frames == 3:
                return True
    return False


def has_second_flac(file: BinaryIO) -> bool:
    """Say whether another FLAC follows in a file."""
    file.seek(0)
    before, n_found = b"", 0
    while block := file.read(2**20):
        n_found += (before + block).count(b"fLaC\0\0\0\x22")
        before = block[-7:]
    return n_found > 1


def chunks_of(file: BinaryIO) -> tuple[dict[bytes, tuple[int, int]], int]:
    """Return where the chunks of a WAV or AIFF begin and how many bytes they promise.

    Returns also how many bytes behind the last one are no chunk.
    """
    end = file.seek(0, os.SEEK_END)
    order = "little" if _read(file, 0, 4) in (b"RIFF", b"RF64") else "big"
    chunks, at = {}, 12
    while at + 8 <= end and len(chunks) < 1000:  # a hostile file can hold millions
        head = _read(file, at, 8)
        name, size = head[:4], int.from_bytes(head[4:], order)
        if not all(32 <= byte < 127 for byte in name):
            break
        # RF64 keeps its size elsewhere.
        if name == b"data" and b"ds64" in chunks and size == 0xFFFFFFFF:
            size = int.from_bytes(_read(file, chunks[b"ds64"][0] + 8, 8), "little")
        if chunks.keys() & {b"data", b"SSND"} and at + 8 + size > end:
            break
        chunks.setdefault(name, (at + 8, size))
        at += 8 + size + size % 2
    return chunks, max(0, end - at)


def is_unknown_length(size: int) -> bool:
    """Say whether a WAV's data size is the largest number, which writers into a pipe leave there.

    Any other size is believed: a cut file of 3 GB has more than 0x7FFFFFFF in its header, too.
    """
    return 0xFFFF0000 <= size < 2**32 or 0x7FFF0000 <= size <= 0x80000000


def _ogg_faults(file: BinaryIO) -> tuple[str, str]:
    """Follow an Ogg file's pages to the end."""
    size, at, stream, is_end = os.fstat(file.fileno()).st_size, 0, b"", 0
    while at < size:
        file.seek(at)
        page = file.read(27 + 255)
        if not page.startswith(b"OggS") or len(page) < 27:
            what = f"{size - at} bytes behind byte {at} are no sound"
            return ("", what) if is_end else (what, "")
        n_bytes = 27 + page[26] + sum(page[27 : 27 + page[26]])
        whole = page[:22] + bytes(4) + _read(file, at + 26, n_bytes - 26)
        if stream and (page[14:18] != stream or page[5] & 2):
            return "another sound follows", ""
        if at + n_bytes > size:
            return "its end is missing", ""
        if _crc(whole) != page[22:26]:
            return f"its page at byte {at} is damaged", ""
        stream, at, is_end = page[14:18], at + n_bytes, page[5] & 4
    return "", "" if is_end else "its last page is not marked as such (a broadcast, or cut?)"


def _crc(page: bytes) -> bytes:
    """Return the checksum of an Ogg page: CRC-32, but neither reflected nor inverted as zlib's."""
    register = zlib.crc32(page.translate(_REFLECTED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return register.to_bytes(4, "big").translate(_REFLECTED)


def endless_flac(file: BinaryIO) -> Pieces | None:
    """Hide the length that a FLAC header promises."""
    begin = _after_id3(file, 0)
    head = _read(file, begin, 26)
    if not head.startswith(b"fLaC"):
        return None
    # The length has 36 bits; the upper half of their first byte is something else.
    hidden = head[:21] + bytes([head[21] & 0xF0, 0, 0, 0, 0])
    return Pieces(file, [hidden, (begin + 26, file.seek(0, os.SEEK_END))])


def endless_mpeg(
    file: BinaryIO, begin: int, n_bytes: int, n_samples: int
) -> tuple[Pieces | None, Callable[[], bool]]:
    """Let MPEG layer III promise more than the `n_samples` that libsndfile takes it to hold.

    It does so in the Xing header if that says so, or else by its size. Returns also a function,
    which may walk through the file, that says whether fewer frames than were promised mean damage:
    there was a promise, and it is not merely wrong beside frames that go on to the end.

    References
    ----------
    .. [1] ISO/IEC 11172-3:1993 and 13818-3:1998, 2.4.1.3 and 2.4.2.3: the header of a frame.
    """
    end = _before_tags(file, min(begin + n_bytes, file.seek(0, os.SEEK_END)))
    xing = _xing(file, begin)
    if xing is None:
        return None, lambda: True
    frame_samples = 1152 if _read(file, xing.frame + 1, 1)[0] & 8 else 576
    if 0 <= xing.n_frames * frame_samples - n_samples < 2 * 4096:  # delay and padding
        pieces = [(xing.frame, xing.count), struct.pack(">I", _ENDLESS), (xing.count + 4, end)]
        is_cut = not xing.n_bytes or xing.n_bytes > end - xing.frame
        return Pieces(file, pieces), lambda: is_cut or not _is_unbroken(file, xing.frame, end)
    # The length is guessed from a bit rate and from the file's size.
    return Pieces(file, [(xing.frame, end)], n_claimed=2**40), lambda: False


class _Xing(NamedTuple):
    """Where the first frame of MPEG layer III begins, and what the Xing header in it counts."""

    frame: int
    count: int  # where the number of frames stands
    n_frames: int  # 0: not told, as the next
    n_bytes: int


def _xing(file: BinaryIO, begin: int) -> _Xing | None:
    """Find the first frame behind a tag; None if there is none."""
    begin = _after_id3(file, begin)
    found = _LAYER_3.search(_read(file, begin, 2**16))
    if found is None:
        return None
    frame = begin + found.start()
    head = _read(file, frame, 200)
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    flags, n_frames, n_bytes = struct.unpack(">III", head[tag + 4 : tag + 16].ljust(12, b"\0"))
    if tag < 0 or not flags & 1:
        return _Xing(frame, 0, 0, 0)
    return _Xing(frame, frame + tag + 8, n_frames, n_bytes if flags & 2 else 0)


def _is_unbroken(file: BinaryIO, at: int, end: int) -> bool:
    """Say whether MPEG frames follow one another to the end, but for tags."""
    file = io.BufferedReader(Pieces(file, [(0, end)]), 2**20)
    while size := _frame_size(file, at):
        at += size
    return at >= end


def _frame_size(file: BinaryIO, at: int) -> int:
    """Return the bytes of the MPEG layer III frame that begins here; 0 if none does."""
    word = int.from_bytes(_read(file, at, 4), "big")
    version, index, rate = word >> 19 & 3, word >> 12 & 15, word >> 10 & 3
    if word >> 21 != 0x7FF or version == 1 or word >> 17 & 3 != 1 or index in (0, 15) or rate == 3:
        return 0
    is_first = version == 3
    kbits = (_KBITS_1 if is_first else _KBITS_2)[index - 1]
    hertz = (44100, 48000, 32000)[rate] >> (0 if is_first else 1 if version == 2 else 2)
    return (144000 if is_first else 72000) * kbits // hertz + (word >> 9 & 1)


def _after_id3(file: BinaryIO, at: int) -> int:
    """Return where an ID3 tag that begins here ends; `at` where none does."""
    head = _read(file, at, 10)
    if not head.startswith(b"ID3") or len(head) < 10:
        return at
    return at + 10 + sum(byte << 7 * i for i, byte in enumerate(head[:5:-1]))


def tell_utf8(file: BinaryIO) -> None:
    """Say in an MP3 that its tags are UTF-8, as libsndfile gives them to LAME, not Latin-1.

    ID3v2.4 knows that encoding, as 3, and has sizes of 7 bits a byte, where 2.3 had 8.
    """
    tag, at = bytearray(_read(file, 0, _after_id3(file, 0))), 10
    # Of every frame: its name, size, flags, encoding and text.
    while at + 10 < len(tag) and tag[at : at + 4].isalnum():
        size = int.from_bytes(tag[at + 4 : at + 8])
        tag[at + 4 : at + 8] = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
        tag[at + 10], at = 3, at + 10 + size
    if tag:
        tag[3] = 4
        file.seek(0)
        file.write(tag)


def _before_tags(file: BinaryIO, end: int) -> int:
    """Return where the tags at the end of an MP3 begin: ID3v1, and before it APEv2."""
    if _read(file, max(0, end - 128), 3) == b"TAG":
        end -= 128
    foot = _read(file, max(0, end - 32), 32)
    if foot.startswith(b"APETAGEX"):
        size, _, flags = struct.unpack("<III", foot[12:24])
        end -= size + 32 * (flags >> 31)  # and its head
    return max(0, end)


def _read(file: BinaryIO, at: int, n_bytes: int) -> bytes:
    file.seek(at)
    return file.read(n_bytes)
