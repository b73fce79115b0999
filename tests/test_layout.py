"""Files import only from rows below theirs, and every file has its row."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

import hparams

ROOT = Path(__file__).parent.parent
ROWS = (
    ("hparams",),
    ("headers", "decoders"),
    (
        "audio",
        "soundio",
        "alignment",
        "metrics",
        "commandline",
        "synthesis",
        "distributed",
        "charts",
        "convolution",
        "bsseval",
        "masks",
        "workers",
        "augmentation",
        "optimizer",
    ),
    ("outputs", "piping"),
    ("tracks", "dataset", "model", "scorebook"),
    ("separation", "sampling", "building", "roofline", "report", "estimates", "summary"),
    ("validation", "scoring", "comparison"),
    ("training", "evaluation"),
    ("planning", "tuning"),
    ("build_dataset", "train", "generate", "evaluate", "benchmark", "draw", "publish", "demo"),
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
PRESENT = sorted(path.stem for path in ROOT.glob("*.py"))
SCRIPTS = [name for name in PRESENT if name in ROWS[-1]]
LIBRARIES = [name for name in PRESENT if name not in ROWS[-1]]
WITHOUT_TORCH = (
    "decoders",
    "headers",
    "soundio",
    "outputs",
    "piping",
    "tracks",
    "synthesis",
    "metrics",
    "hparams",
    "scorebook",
    "estimates",
    "summary",
    "comparison",
)


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text())


def imports(node: ast.AST) -> set[str]:
    """All modules imported anywhere below a node, by their first name."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found.add((child.module or ".").split(".")[0])
    return found


def violations(name: str, source: ast.AST) -> list[str]:
    """Imports of a file that are not from a row below its own."""
    return sorted(other for other in imports(source) & ROW.keys() if ROW[other] >= ROW.get(name, 9))


def calls(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name):
            yield child.func.id


def test_every_file_has_its_place_in_the_table():
    assert [name for name in PRESENT if name not in ROW] == []


@pytest.mark.parametrize("name", PRESENT)
def test_a_file_imports_only_from_rows_below(name):
    assert violations(name, tree(name)) == []


@pytest.mark.parametrize(
    ("name", "source", "found"),
    [
        ("train", "import generate", ["generate"]),
        ("audio", "def f():\n    from soundio import probe", ["soundio"]),
        ("metrics", "import model as m, hparams", ["model"]),
        ("separation", "import model, audio, numpy", []),
    ],
)
def test_the_check_of_rows_sees_what_it_is_meant_to_see(name, source, found):
    assert violations(name, ast.parse(source)) == found


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "commandline"])
def test_nouns_print_nothing_and_read_no_command_line(name):
    source = tree(name)
    assert "argparse" not in imports(source)
    assert "print" not in set(calls(source))
    assert "main" not in {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    assert not any("__name__" in ast.dump(node) for node in source.body if isinstance(node, ast.If))


@pytest.mark.parametrize("name", PRESENT)
def test_nothing_happens_at_import(name):
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
        ast.If,  # TYPE_CHECKING and, in scripts, __name__
    )
    docstring, *statements = tree(name).body
    assert isinstance(docstring, ast.Expr), "no docstring"
    assert [ast.unparse(node)[:80] for node in statements if not isinstance(node, allowed)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_verbs_have_a_main_that_tests_can_call(name):
    mains = [node for node in tree(name).body if getattr(node, "name", "") == "main"]
    assert len(mains) == 1
    assert [ast.unparse(node) for node in mains[0].decorator_list] == ["commandline.script"]


@pytest.mark.parametrize("name", PRESENT)
def test_a_module_says_its_job_in_a_dozen_lines_at_most(name):
    n_lines = len((ast.get_docstring(tree(name)) or "").splitlines())
    assert 1 <= n_lines <= 12


def test_every_setting_is_read_somewhere():
    read: set[str] = set()
    for name in PRESENT:
        if name != "hparams":
            nodes = list(ast.walk(tree(name)))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # The mask settings are looked up by name, as three sources compete for them.
    by_name = set(hparams.MASK_SETTINGS) if "MASK_SETTINGS" in read | imported_names() else set()
    unread = {field.name for field in fields(hparams.HParams)} - read - by_name
    if "train" not in PRESENT:
        pytest.skip(f"train.py is still to come; unread so far: {sorted(unread)}")
    assert unread == set()


def imported_names() -> set[str]:
    return {
        alias.name
        for name in PRESENT
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", [name for name in WITHOUT_TORCH if name in PRESENT])
def test_bad_paths_are_told_before_torch_is_imported(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert "torch" not in imports(tree(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name):
    command = [sys.executable, "-X", "importtime", f"{name}.py", "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert run.returncode == 0
    assert "examples:" in run.stdout
    assert "argparse" in imported
    assert not imported & {"torch", "librosa", "scipy", "tensorboard"}


@pytest.mark.skipif(os.name != "posix", reason="make and bash")
def test_tools_name_no_machine_and_no_package_host():
    for name in ("Makefile", ".ci/run", "requirements.txt", "requirements-dev.txt"):
        text = (ROOT / name).read_text()
        assert "http" not in text
        assert "/work" not in text
        assert "/home" not in text
