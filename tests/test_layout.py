"""What every file has in common: verbs run, nouns are imported, and imports run one way."""

import ast
import graphlib
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import hparams

ROOT = Path(__file__).parent.parent
VERBS = ("build_dataset", "train", "generate", "evaluate")
STOREYS = (  # a file imports only from what stands below it, and its own folder
    VERBS,
    ("tools", "demo"),
    ("learning",),
    ("scoring",),
    ("separation",),
    ("dataset", "model", "sound"),
    ("audio", "cli"),
    ("hparams",),
)
STOREY_OF = {name: i for i, names in enumerate(STOREYS) for name in names}
ROOMS = [name for name in STOREY_OF if (ROOT / name).is_dir()]
FILES = sorted(path for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py"))
CODE_LINES, TEST_LINES = 7956, 6495
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
SCRIPTS = [*VERBS, "demo", "tools.benchmark", "tools.export", "tools.publish"]


MODULES = {file.removesuffix(".py").replace("/", "."): file for file in TREES}


def imports_of(file: str) -> set[str]:
    """Name the project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= members & MODULES.keys() or {node.module}
    return {name for name in names if name.split(".")[0] in STOREY_OF}


def test_a_file_imports_only_what_stands_below_it_and_siblings_without_circles():
    siblings = {}
    for module, file in MODULES.items():
        room = module.split(".")[0]
        names = imports_of(file)
        outside = {name.split(".")[0] for name in names} - {room}
        too_high = {name for name in outside if STOREY_OF[name] <= STOREY_OF[room]}
        assert not too_high, f"{file} imports {too_high}"
        siblings[module] = {name for name in names if name.startswith(f"{room}.")}
    graphlib.TopologicalSorter(siblings).prepare()


def test_the_house_stays_small():
    """A ratchet: lower both numbers with every cut, and never raise them."""
    assert len(FILES) <= 34
    assert sum("/" not in file for file in TREES) <= 10
    code, tests = (
        sum(len(path.read_text().splitlines()) for path in paths)
        for paths in (FILES, (ROOT / "tests").rglob("*.py"))
    )
    assert code <= CODE_LINES
    assert tests <= TEST_LINES


def test_every_setting_is_read_somewhere():
    nodes = [node for file, t in TREES.items() if file != "hparams.py" for node in ast.walk(t)]
    properties = [n for n in ast.walk(TREES["hparams.py"]) if getattr(n, "decorator_list", None)]
    nodes += [node for n in properties if isinstance(n, ast.FunctionDef) for node in ast.walk(n)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    # The mask settings are looked up by name, as three sources compete for them.
    unread = {field.name for field in fields(hparams.HParams)} - read - set(hparams.MASK_SETTINGS)
    assert unread == set()


def test_every_file_can_be_imported_where_nothing_is_posix():
    """As on Windows; and what sound files need is there before torch is."""
    hidden = "fcntl grp posix_ipc pwd resource termios"
    names = [name for name in MODULES if "__main__" not in name]
    names.sort(key=lambda name: not name.startswith(("sound", "cli", "hparams")))
    code = f"""
import importlib, sys
hidden = {hidden.split()}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in hidden: raise ImportError(name + " is not there on Windows")
sys.meta_path.insert(0, Hide())
for name in {names}:
    importlib.import_module(name)
    assert not (name.startswith("sound.") and "torch" in sys.modules), name
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name):
    command = [sys.executable, "-X", "importtime", "-m", name, "--help"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {line.split("|")[-1].strip() for line in run.stderr.splitlines()}
    assert "examples:" in run.stdout
    assert "argparse" in imported
    assert not imported & {"torch", "librosa", "scipy", "tensorboard", "matplotlib", "filelock"}
