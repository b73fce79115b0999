"""The file of scores that evaluate.py writes, song by song, so that no song is scored twice.

Until all songs are there, each is a line of ``<output>.partial``; then the output is written whole.
The first line says what decides the scores, and whether what the output held is to be dropped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

from hparams import InputError
from sound import reading, writing

FORMAT = "vocal-mask scores 2"
Record = dict[str, Any]  # of a song, as it is stored
STEMS = {"vocals", "accompaniment"}
FIELDS = {
    "name": str,
    "group": str,
    "seconds": float,
    "n_frames": int,
    "silent": dict,
    "files": list,
    "estimates": dict,
    "notes": list,
    "learnt": bool,
    "tuned": bool,
    "scores": dict,
}


class Scorebook:
    """The scores so far: a line for every song in a file beside the output, until all are there.

    Parameters
    ----------
    output : Path
    about : dict
        What decides the scores. Those of an earlier run are kept if it was the same then.
    overwrite : bool
        Drop them; if this run is interrupted, the next one goes on without them.

    Raises
    ------
    InputError
        If there are scores of something else, another run is writing the same file, or it cannot
        be written.
    """

    def __init__(self, output: Path, about: dict[str, Any], overwrite: bool) -> None:
        self.output, self.about = output, about
        self.path = partial(output)
        self.records: dict[str, Record] = {}
        writing.check_writable(self.path)
        try:
            self._file = open(self.path, "a+b")  # noqa: SIM115 (closed in __exit__)
        except OSError as error:
            raise InputError(f"{self.path}: not writable: {reading.reason(error)}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            n_kept = 0 if overwrite else self._recall()
            self._file.truncate(n_kept)
            self._is_begun = n_kept > 0
            if overwrite:
                self._begin(replaces=True)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"{output}: another run is writing it; wait until it is done"
            ) from None
        except InputError:
            self.__exit__()
            raise

    def __enter__(self) -> Scorebook:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk, again
            self._file.close()
        if self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()

    def _recall(self) -> int:
        """Read the scores of a run that ended, then those of one that did not.

        Returns how many bytes of the latter are whole lines; the last one may be cut.
        """
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        begin: dict[str, Any] = {"format": FORMAT, "about": self.about, "replaces": False}
        try:
            begin, *lines = map(json.loads, whole.splitlines() or [json.dumps(begin)])
            if begin["format"] != FORMAT:
                raise InputError(f"{self.path}: scores of another version (remove it)")
            about, replaces = dict(begin["about"]), begin["replaces"]
            _check(lines)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{self.path}: damaged (remove it)") from error
        self._refuse_others(self.path, about)
        if self.output.is_file() and not replaces:
            stored = read(self.output)
            self._refuse_others(self.output, stored["about"])
            lines = [*stored["songs"], *stored["set_aside"], *lines]
        self.records = {record["name"]: record for record in lines}
        return len(whole)

    def _refuse_others(self, path: Path, about: dict[str, Any]) -> None:
        different = [name for name in self.about if about.get(name) != self.about[name]]
        if different:
            raise InputError(
                f"{path}: holds scores of a run with other {', '.join(different)} "
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
        """Return whether a song is scored already, from files of this very content."""
        record = self.records.get(name)
        return record is not None and {key: record[key] for key in sources} == sources

    def add(self, record: Record) -> None:
        """Keep a song's scores, come what may."""
        if not self._is_begun:
            self._begin(replaces=False)
        self.records[record["name"]] = record
        self._append(record)

    def _begin(self, replaces: bool) -> None:
        self._is_begun = True
        self._append({"format": FORMAT, "about": self.about, "replaces": replaces})

    def _append(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise writing.write_error(self.path, error) from error

    def finish(self, names: list[str], summary: dict[str, Any], selection: dict[str, Any]) -> None:
        """Write the output, and drop the lines.

        Parameters
        ----------
        names : list of str
            The songs that `summary` is about. Those of earlier runs that now failed are set aside:
            they count for nothing, and are there again when their files are.
        summary, selection : dict
        """
        contents = {
            "format": FORMAT,
            "about": self.about,
            "selection": selection,
            "summary": summary,
            "songs": [self.records[name] for name in names],
            "set_aside": [self.records[name] for name in sorted(self.records.keys() - set(names))],
        }
        data = json.dumps(contents, separators=(",", ":"), allow_nan=False).encode()
        writing.replace_atomically(self.output, lambda file: file.write(data))
        self._file.close()
        self.path.unlink()


def partial(output: Path) -> Path:
    """Name the file of lines beside an output."""
    return output.with_name(f"{output.name}.partial")


def read(path: Path) -> dict[str, Any]:
    """Read what `Scorebook.finish` wrote; InputError if it is something else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise InputError(f"{path}: is not a regular file (name scores of evaluate.py)")
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise InputError(
                f"{path}: scores of another version, or none (score again, with --overwrite)"
            )
        _check([*stored["songs"], *stored["set_aside"]])
        for system in stored["songs"][0]["scores"] if stored["songs"] else ():
            stored["summary"][system]
        return {**stored, "about": dict(stored["about"])}
    except OSError as error:
        raise InputError(f"{path}: {reading.reason(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: no scores of evaluate.py, or damaged (score again, with --overwrite)"
        ) from error


def _check(records: list[Record]) -> None:
    """Raise KeyError, TypeError or ValueError if songs lack what is read of them, or differ."""
    layouts = set()
    for record in records:
        for name, kind in FIELDS.items():
            if not isinstance(record[name], kind):
                raise TypeError(name)
        if not {"reference", *record["scores"]} <= record["silent"].keys():
            raise ValueError("silent")
        [file["sha256"] for file in record["files"]]
        for system, stems in record["scores"].items():
            if stems.keys() != STEMS:
                raise ValueError(system)
            for stem, metrics in stems.items():
                for metric, score in metrics.items():
                    layouts.add((system, stem, metric))
                    for value in score if isinstance(score, list) else [score]:
                        if not isinstance(value, int | float | None):
                            raise TypeError(metric)
    for record in records:
        n_scores = sum(len(metrics) for of in record["scores"].values() for metrics in of.values())
        if n_scores != len(layouts):
            raise ValueError("scores")


def identity(path: Path, root: Path) -> dict[str, Any]:
    """Say which file this is, wherever its root lies, by what it holds."""
    about = {"path": os.path.relpath(path, root), "size": size_of(path)}
    return about | {"sha256": reading.sha256(path)}


def size_of(path: Path) -> int:
    """Return a file's size; 0 if it is not there, which is told when it is read."""
    return path.stat().st_size if path.is_file() else 0
