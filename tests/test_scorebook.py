"""The file of scores: kept line by line, one writer at a time, nothing lost or mixed."""

from __future__ import annotations

import errno
import json
import os

import pytest

from hparams import InputError
from scoring import scorebook, tables
from scoring.scorebook import Scorebook

ABOUT = {"seconds": None, "checkpoint": "abc"}


def record(name: str, sha256: str = "f") -> dict:
    known = {field: kind() for field, kind in scorebook.FIELDS.items()}
    scores = {"it": {stem: {"sdr": [1.0, None], "si_sdr": 3} for stem in scorebook.STEMS}}
    silent = {"reference": 0, "it": 0}
    return known | {"name": name, "scores": scores, "silent": silent, **sources(sha256)}


def sources(sha256: str = "f") -> dict:
    return {"files": [{"path": "a", "size": 1, "sha256": sha256}], "estimates": {}}


TOTALS = {"it": {}}


def test_the_stems_that_are_checked_are_those_that_are_scored():
    assert set(tables.STEMS) == scorebook.STEMS


def test_songs_are_kept_until_the_output_is_whole(tmp_path):
    out = tmp_path / "a.json"
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.add(record("one"))
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert book.holds("one", sources())
        assert not book.holds("one", sources("another content of this size"))
        assert not book.holds("two", sources())
        book.add(record("two"))
        book.finish(["one", "two"], TOTALS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert [song["name"] for song in scorebook.read(out)["songs"]] == ["one", "two"]
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert book.holds("two", sources())
        with pytest.raises(
            InputError, match="holds 1 songs that are not asked for now, such as two"
        ):
            book.refuse_loss(["one"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with Scorebook(out, ABOUT, overwrite=True) as book:
        assert not book.holds("two", sources())


def finished(out, *names: str, about=ABOUT) -> None:
    with Scorebook(out, about, overwrite=False) as book:
        for name in names:
            book.add(record(name))
        book.finish(list(names), TOTALS, {})


@pytest.mark.parametrize("about", [ABOUT, {**ABOUT, "seconds": 3}])
@pytest.mark.parametrize("n_scored", [0, 1])
def test_an_interrupted_overwrite_goes_on_without_what_it_replaces(tmp_path, about, n_scored):
    finished(out := tmp_path / "a.json", "one", "two")
    with Scorebook(out, about, overwrite=True) as book:
        for name in ["one"][:n_scored]:
            book.add(record(name, "new"))
    with Scorebook(out, about, overwrite=False) as book:
        assert sorted(book.records) == ["one"][:n_scored]
        book.add(record("two", "new"))
        book.finish(["two"], TOTALS, {})
    assert {song["files"][0]["sha256"] for song in scorebook.read(out)["songs"]} == {"new"}


def test_songs_that_fail_now_are_set_aside_and_come_back(tmp_path):
    finished(out := tmp_path / "a.json", "one", "two")
    with Scorebook(out, ABOUT, overwrite=False) as book:
        book.finish(["two"], TOTALS, {})
    stored = scorebook.read(out)
    assert [song["name"] for song in stored["songs"]] == ["two"]
    assert [song["name"] for song in stored["set_aside"]] == ["one"]
    with Scorebook(out, ABOUT, overwrite=False) as book:
        assert book.holds("one", sources())


DAMAGED = [
    b"",
    b"[1]",
    b"\xff",
    b'{"format": "vocal-mask scores 1"}',
    *(
        json.dumps({"format": scorebook.FORMAT, **more}).encode()
        for more in (
            {},
            {"about": {}, "summary": {}, "songs": None, "set_aside": []},
            {"about": {}, "summary": TOTALS, "songs": [1], "set_aside": []},
            {"about": {}, "summary": TOTALS, "songs": [{"name": "a"}], "set_aside": []},
            {"about": {}, "summary": {}, "songs": [record("a")], "set_aside": []},
            {"about": 3, "summary": TOTALS, "songs": [record("a")], "set_aside": []},
            {
                "about": {},
                "summary": TOTALS,
                "songs": [record("a"), {**record("b"), "scores": {}}],
                "set_aside": [],
            },
            {
                "about": {},
                "summary": TOTALS,
                "songs": [
                    {
                        **record("b"),
                        "scores": {"it": {stem: {"sdr": "1"} for stem in scorebook.STEMS}},
                    }
                ],
                "set_aside": [],
            },
            {
                "about": {},
                "summary": TOTALS,
                "songs": [{**record("b"), "scores": {"it": {"vocals": {}}}}],
                "set_aside": [],
            },
            {
                "about": {},
                "summary": TOTALS,
                "songs": [{**record("b"), "scores": {"it": [1]}}],
                "set_aside": [],
            },
        )
    ),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_scores_are_told_in_one_line(tmp_path, content):
    out = tmp_path / "a.json"
    out.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json: .*\(score again, with --overwrite\)"):
        Scorebook(out, ABOUT, overwrite=False)
    assert out.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "line",
    [
        [1],
        3,
        {"format": scorebook.FORMAT},
        {"format": "vocal-mask scores 1", "about": {}, "replaces": False},
        {"format": scorebook.FORMAT, "about": 3, "replaces": False},
    ],
)
def test_damaged_lines_are_told_with_their_files_name(tmp_path, line):
    out = tmp_path / "a.json"
    scorebook.partial(out).write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=r"a\.json\.partial: .* \(remove it\)"):
        Scorebook(out, ABOUT, overwrite=False)


def test_what_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "b.json.partial").mkdir()
    for out, told in (
        (tmp_path / "b.json", "b.json.partial: is a directory"),
        (tmp_path / ("x" * 248 + ".json"), "the name is too long"),
        (type(tmp_path)("/proc/x.json"), "/proc.*: "),
    ):
        with pytest.raises(InputError, match=told):
            Scorebook(out, ABOUT, overwrite=False)


def test_a_full_disk_is_told_with_file_and_folder(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Scorebook(tmp_path / "a.json", ABOUT, overwrite=False) as book:
        monkeypatch.setattr(os, "fsync", full)
        told = rf"a\.json\.partial: no space left on {tmp_path}: have .* MB"
        with pytest.raises(InputError, match=told):
            book.add(record("one"))


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
