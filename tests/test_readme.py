"""README.md and docs/: every command is accepted by its parser, and what is named is there."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from test_layout import SCRIPTS

from hparams import hparams

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "pretrained/README.md"]


class Parsed(BaseException):
    """The parser accepted the command; nothing is run."""


def commands_in(text: str) -> list[str]:
    """Find lines such as ``    python train.py data/dsd100    # comment``, or with torchrun."""
    text = re.sub(r"torchrun (--\S+ (\d+ )?)*", "python ", text.replace("\\\n", ""))
    command = r"python (?:\w+\.py|-m (?:demo|tools\.\w+))\b[^`|\n]*"
    lines = re.findall(rf"^ *(?:\| |[^`\n]* \| )?`?({command})", text, re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


def module_of(script: str) -> ModuleType:
    """Import ``train.py``, ``tools.benchmark`` or the ``demo``, which is a folder."""
    name = script.removesuffix(".py")
    return importlib.import_module("demo.__main__" if name == "demo" else name)


def test_every_documented_command_is_accepted_by_its_parser(monkeypatch, capsys):
    def accept(real):
        def parse(self, argv=None):
            real(self, argv)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, accept(real))
    scripts = [module_of(name) for name in SCRIPTS]
    texts = [page.read_text() for page in PAGES]
    texts += [script.__doc__ + getattr(script, "EPILOG", "") for script in scripts]
    commands = sorted({command for text in texts for command in commands_in(text)})
    assert len(commands) > 50
    refused = []
    for command in commands:
        _, script, *words = [word for word in shlex.split(command) if word != "-m"]
        try:
            module_of(script).main(words)
        except Parsed:
            settings = [word for word in words if re.fullmatch(r"\w+=[^/]+", word)]
            known = all(hasattr(hparams, setting.split("=")[0]) for setting in settings)
            if known or "--estimates" in words:
                continue
        except SystemExit:
            pass
        refused.append(f"{command}: {capsys.readouterr().err}")
    assert not refused


def test_readme_and_docs_are_short_enough_to_be_read():
    assert (ROOT / "README.md").stat().st_size <= 12_000
    assert sum(page.stat().st_size for page in ROOT.glob("docs/*.md")) <= 25_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(((?!#|https?:)[^)]*)\)", text)
    names = re.findall(r"\b(?:assets|docs|pretrained|tests|tools)/[\w.]*\w\b", text)
    names += re.findall(r"\b\w+\.py\b", text)
    places = ("", "tools", "demo", "tests")
    for name in links:
        assert (page.parent / name).exists(), name
    for name in names:
        assert any((ROOT / place / name).exists() for place in places), name
    headings = {re.sub(r"[^\w]+", "-", h.lower()) for h in re.findall(r"^#+ (.*)", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= headings


def test_the_tree_of_the_readme_names_every_file_at_the_root_and_every_room():
    tree = (ROOT / "README.md").read_text().split("## The files")[1].split("```")[1]
    shown = set(re.findall(r"^(\S+)|  (\S+(?:\.py|/)) ", tree, re.MULTILINE))
    names = {name for pair in shown for name in pair if name}
    rooms = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} - {"tests/"}
    assert names == {path.name for path in ROOT.glob("*.py")} | rooms


def test_every_setting_of_the_readme_has_the_default_it_says():
    table = (ROOT / "README.md").read_text().split("## Settings")[1].split("## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    assert len(rows) >= 8
    for names, defaults in rows:
        settings = re.findall(r"`(\w+)`", names)
        for name, default in zip(settings, defaults.split(", "), strict=True):
            value = getattr(hparams, name)
            expected = {str(value), "as tuned" if value is None else f"{value}"}
            expected |= {f"{value:g}"} if isinstance(value, float) else set()
            assert default.strip() in expected, name
