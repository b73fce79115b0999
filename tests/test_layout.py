"""What every file has in common: verbs run, nouns are imported, and nothing waits for torch."""

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
ROOMS = ("sound", "learning", "scoring", "demo", "tools")
FILES = [path for room in (".", *ROOMS) for path in sorted((ROOT / room).glob("*.py"))]
FILES = [path for path in FILES if path.name != "__init__.py"]
PRESENT = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
SCRIPTS = (
    "build_dataset",
    "train",
    "generate",
    "evaluate",
    "demo.__main__",
    "tools.benchmark",
    "tools.figures",
    "tools.publish",
)
LIBRARIES = [name for name in PRESENT if name not in SCRIPTS]
WITHOUT_TORCH = (
    "hparams",
    "cli",
    "sound.decoding",
    "sound.headers",
    "sound.reading",
    "sound.writing",
    "sound.pipes",
    "sound.tracks",
    "demo.synthesis",
    "scoring.tables",
)


def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name.replace(".", "/")).with_suffix(".py").read_text())


def imports(node: ast.AST) -> set[str]:
    """All modules imported anywhere below a node, by their first name."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name.split(".")[0] for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            found.add((child.module or ".").split(".")[0])
    return found


def calls(node: ast.AST) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.Call) and isinstance(child.func, ast.Name):
            yield child.func.id


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_nothing_by_itself(room):
    assert len(ast.parse((ROOT / room / "__init__.py").read_text()).body) == 1, "a docstring"


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "cli"])
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
    assert [ast.unparse(node) for node in mains[0].decorator_list] == ["cli.script"]


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
    assert unread == set()


def imported_names() -> set[str]:
    return {
        alias.name
        for name in PRESENT
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_bad_paths_are_told_before_torch_is_imported(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    if name != "cli":
        assert "torch" not in imports(tree(name))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name):
    command = [sys.executable, "-X", "importtime", "-m", name, "--help"]
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
