"""Saved masks: the network's answers in 8 bits, to render a song again without asking it.

A zip of ``about.json`` and arrays ``columns_000000000.npy`` …, (n_columns, n_masks, n_bins) uint8,
named by their first column: numpy.load opens it, and it need not be in memory at once.
"""

from __future__ import annotations

import io
import json
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hparams import InputError

FORMAT = "vocal-mask mask 1"
MAX_ENTRY_BYTES = 2**28  # of a stretch of columns, unpacked: more is no mask of ours
DAMAGE = (  # what a broken zip and its contents raise
    *(zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError),
    *(EOFError, RuntimeError, NotImplementedError, MemoryError, struct.error),
)
_NEVER = (1980, 1, 1, 0, 0, 0)  # the zip format's first day: same run, same bytes


class MaskWriter:
    """Write a mask stretch by stretch; `close` completes the file, `abandon` gives it up.

    Parameters
    ----------
    file : binary file
        Open for writing, seekable.
    about : dict
        What the mask belongs to; may be changed until `close`.
    """

    def __init__(self, file: BinaryIO, about: dict[str, Any]) -> None:
        self.about = about
        self.n_columns = 0
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)

    def write(self, levels: np.ndarray) -> None:
        """Append columns, (n_masks, n_bins, n) uint8."""
        if not levels.shape[-1]:
            return
        entry = io.BytesIO()
        np.save(entry, np.ascontiguousarray(levels.transpose(2, 0, 1)), allow_pickle=False)
        self._add(f"columns_{self.n_columns:09d}.npy", entry.getvalue())
        self.n_columns += levels.shape[-1]

    def close(self) -> None:
        """Write what the mask belongs to, and the directory."""
        about = {"format": FORMAT, **self.about, "n_columns": self.n_columns}
        self._add("about.json", json.dumps(about, indent=1).encode())
        self._zip.close()

    def abandon(self) -> None:
        """Forget the file, unless it is complete: the zip would write into it when collected."""
        self._zip.fp = None

    def _add(self, name: str, data: bytes) -> None:
        self._zip.writestr(zipfile.ZipInfo(name, _NEVER), data, zipfile.ZIP_DEFLATED)


class SavedMask:
    """A mask that `MaskWriter` wrote; close it by leaving the ``with`` block.

    Attributes
    ----------
    about : dict

    Raises
    ------
    InputError
        If the file is missing, damaged or no saved mask; from `read`, if it ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a FIFO would wait for ever
                raise InputError(f"{path}: is not a regular file (name a saved mask)")
            self._zip = zipfile.ZipFile(path)
            self.about = json.loads(self._unpack("about.json"))
            if self.about["format"] != FORMAT:
                raise InputError(f"{path}: a mask of another version (save it again)")
            self._shape = int(self.about["n_masks"]), int(self.about["n_bins"])
            self.n_samples = int(self.about["n_samples"])
            names = sorted(name for name in self._zip.namelist() if name.startswith("columns_"))
            self._names = iter(names)
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such mask (--save-mask writes one)") from error
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise InputError(f"{path}: not a saved mask, or damaged (save it again)") from error
        self._waiting: np.ndarray | None = None

    def __enter__(self) -> SavedMask:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def check(self, wanted: dict[str, Any]) -> None:
        """Refuse a mask that belongs to another song: InputError names what differs."""
        for name, value in wanted.items():
            if self.about.get(name) != value:
                raise InputError(
                    f"{self.path}: belongs to another song: {name} is {self.about.get(name)} "
                    f"there, {value} here (save its own)"
                )

    def read(self, n: int) -> np.ndarray:
        """Return the next `n` columns, (n_masks, n_bins, n) uint8."""
        parts, n_found = [np.zeros((0, *self._shape), np.uint8)], 0
        while n_found < n:
            if self._waiting is None or not len(self._waiting):
                self._waiting = self._next()
            parts.append(self._waiting[: n - n_found])
            self._waiting = self._waiting[len(parts[-1]) :]
            n_found += len(parts[-1])
        return np.ascontiguousarray(np.concatenate(parts).transpose(1, 2, 0))

    def _next(self) -> np.ndarray:
        """Unpack the next stretch, (n_columns, n_masks, n_bins)."""
        name = next(self._names, None)
        if name is None:
            raise InputError(f"{self.path}: ends before the song does (save it again)")
        try:
            columns = np.load(io.BytesIO(self._unpack(name)), allow_pickle=False)
        except (*DAMAGE, OSError) as error:
            raise InputError(f"{self.path}: damaged at {name} (save it again)") from error
        if columns.dtype != np.uint8 or columns.ndim != 3 or columns.shape[1:] != self._shape:
            raise InputError(f"{self.path}: damaged at {name} (save it again)")
        return columns

    def _unpack(self, name: str) -> bytes:
        if self._zip.getinfo(name).file_size > MAX_ENTRY_BYTES:
            raise ValueError(name)
        return self._zip.read(name)
