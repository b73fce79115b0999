"""The file of scores: kept line by line, one writer at a time, nothing lost or mixed."""

from __future__ import annotations

import pytest

import scorebook
from hparams import InputError
from scorebook import Scorebook

ABOUT = {"seconds": None, "checkpoint": "abc"}


def record(name: str, size: int = 1) -> dict:
    return {"name": name, "files": [{"path": "a", "size": size, "sha256": "f"}], "estimates": {}}


def sources(size: int = 1) -> dict:
    return {"files": [{"path": "a", "size": size}], "estimates": {}}


def test_songs_are_kept_until_the_output_is_whole(tmp_path):
    out = tmp_path / "a.json"
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.add(record("one"))
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert book.holds("one", sources())
        assert not book.holds("one", sources(size=2))
        assert not book.holds("two", sources())
        book.add(record("two"))
        book.finish(list(book.records.values()), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert [song["name"] for song in scorebook.read(out)["songs"]] == ["one", "two"]
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert book.holds("two", sources())
        with pytest.raises(
            InputError, match="holds 1 songs that are not asked for now, such as two"
        ):
            book.refuse_loss(["one"])
    with Scorebook(out, ABOUT, overwrite=True) as book:
        assert not book.holds("two", sources())


def test_a_line_that_was_cut_is_dropped_and_the_next_one_is_whole(tmp_path):
    out = tmp_path / "a.json"
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.add(record("one"))
    with open(book.path, "ab") as file:
        file.write(b'{"name": "tw')
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.add(record("three"))
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert sorted(book.records) == ["one", "three"]


def test_scores_of_another_run_are_refused_while_they_are_lines_too(tmp_path):
    out = tmp_path / "a.json"
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.add(record("one"))
    with pytest.raises(InputError, match="of a run with other checkpoint"):
        Scorebook(out, {**ABOUT, "checkpoint": "def"}, overwrite=False)
    book.path.write_bytes(b"no lines of ours\n")
    with pytest.raises(InputError, match=r"a\.json\.partial: damaged"):
        Scorebook(out, ABOUT, overwrite=False)


def test_two_runs_cannot_write_the_same_output(tmp_path):
    with (
        Scorebook(tmp_path / "a.json", ABOUT, overwrite=False),
        pytest.raises(InputError, match="another run is writing it"),
    ):
        Scorebook(tmp_path / "a.json", ABOUT, overwrite=True)
