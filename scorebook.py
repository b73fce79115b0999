"""The file of scores that evaluate.py writes, song by song, so that no song is scored twice.

Until all songs are there, each is a line of ``<output>.partial``; then the output is written whole.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import outputs
import soundio
from hparams import InputError

FORMAT = "vocal-mask scores 1"
Record = dict[str, Any]  # of a song, as it is stored


class Scorebook:
    """The scores so far: a line for every song in a file beside the output, until all are there.

    Parameters
    ----------
    output : Path
    about : dict
        What decides the scores. Those of an earlier run are kept if it was the same then.
    overwrite : bool
        Drop them.

    Raises
    ------
    InputError
        If there are scores of something else, or another run is writing the same file.
    """

    def __init__(self, output: Path, about: dict[str, Any], overwrite: bool) -> None:
        self.output, self.about = output, about
        self.path = output.with_name(f"{output.name}.partial")
        self.records: dict[str, Record] = {}
        self._file = open(self.path, "a+b")  # noqa: SIM115 (closed in __exit__)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            n_kept = 0 if overwrite else self._recall()
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{output}: another run is writing it; wait until it is done"
            ) from None
        except InputError:
            self.__exit__()
            raise
        self._file.truncate(n_kept)
        if not n_kept:
            self._append(about)

    def __enter__(self) -> Scorebook:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._file.close()
        if self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()

    def _recall(self) -> int:
        """Read the scores of a run that ended, then those of one that did not.

        Returns how many bytes of the latter are whole lines; the last one may be cut.
        """
        if self.output.is_file():
            stored = read(self.output)
            self._refuse_others(stored["about"])
            self.records |= {record["name"]: record for record in stored["songs"]}
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            about, *records = map(json.loads, whole.splitlines() or [json.dumps(self.about)])
            self.records |= {record["name"]: record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.path}: damaged (remove it)") from error
        self._refuse_others(about)
        return len(whole)

    def _refuse_others(self, about: dict[str, Any]) -> None:
        different = [name for name in self.about if about.get(name) != self.about[name]]
        if different:
            raise InputError(
                f"{self.output}: holds scores of a run with other {', '.join(different)} "
                "(choose another --output, or --overwrite)"
            )

    def refuse_loss(self, wanted: list[str]) -> None:
        """Refuse to go on where songs have scores that the output would not hold any more."""
        lost = sorted(self.records.keys() - set(wanted))
        if lost:
            raise InputError(
                f"{self.output}: holds {len(lost)} songs that are not asked for now, such as "
                f"{lost[0]} (choose another --output, or --overwrite)"
            )

    def holds(self, name: str, sources: dict[str, Any]) -> bool:
        """Return whether a song is scored already, from files of these names and sizes."""
        record = self.records.get(name, {})
        return _without_hashes({key: record.get(key) for key in sources}) == sources

    def add(self, record: Record) -> None:
        """Keep a song's scores, come what may."""
        self.records[record["name"]] = record
        self._append(record)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(
        self, records: list[Record], summary: dict[str, Any], selection: dict[str, Any]
    ) -> None:
        """Write the output, and drop the lines."""
        contents = {
            "format": FORMAT,
            "about": self.about,
            "selection": selection,
            "summary": summary,
            "songs": records,
        }
        data = json.dumps(contents, separators=(",", ":"), allow_nan=False).encode()
        outputs.replace_atomically(self.output, lambda file: file.write(data))
        self._file.close()
        self.path.unlink()


def read(path: Path) -> dict[str, Any]:
    """Read what `Scorebook.finish` wrote; InputError if it is something else."""
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise InputError(f"{path}: scores of another version (score again)")
        return stored
    except OSError as error:
        raise InputError(f"{path}: {soundio.reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no scores of evaluate.py, or damaged (score again)") from error


def identity(path: Path, root: Path, with_hash: bool = False) -> dict[str, Any]:
    """Say which file this is; its size alone tells at once whether it is the same one."""
    about = {"path": os.path.relpath(path, root), "size": size_of(path)}
    return about | ({"sha256": soundio.sha256(path)} if with_hash else {})


def size_of(path: Path) -> int:
    """Return a file's size; 0 if it is not there, which is told when it is read."""
    return path.stat().st_size if path.is_file() else 0


def _without_hashes(value: Any) -> Any:
    """Copy nested lists and dicts without what takes long to find out."""
    if isinstance(value, dict):
        return {key: _without_hashes(item) for key, item in value.items() if key != "sha256"}
    return [_without_hashes(item) for item in value] if isinstance(value, list) else value
