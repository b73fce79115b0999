from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = (
    "build_dataset",
    "train",
    "generate",
    "evaluate",
    "tools.benchmark",
    "tools.figures",
    "tools.publish",
    "demo",
)


class Parsed(BaseException):
    """The parser accepted the command; nothing is run."""


def commands_in(text: str) -> list[str]:
    """Find lines such as ``    python train.py data/dsd100    # comment``, or with torchrun."""
    text = re.sub(r"torchrun (--\S+ (\d+ )?)*", "python ", text)
    command = r"python (?:\w+\.py|-m (?:demo|tools\.\w+))\b[^`|\n]*"
    found = re.findall(rf"^ *(?:\| |[^`\n]* \| )?`?({command})", text, re.MULTILINE)
    return [re.sub(r"<[^>]*>", "something", line.split("#")[0]).strip() for line in found]


def module_of(script: str) -> ModuleType:
    """Import ``train.py``, ``tools.benchmark`` or the ``demo``, which is a package."""
    name = script.removesuffix(".py")
    return importlib.import_module("demo.__main__" if name == "demo" else name)


def documented_commands() -> list[str]:
    texts = [(ROOT / "README.md").read_text()]
    for name in SCRIPTS:
        script = module_of(name)
        texts += [script.__doc__, getattr(script, "EPILOG", "")]
    return sorted({command for text in texts for command in commands_in(text)})


@pytest.mark.parametrize("command", documented_commands())
def test_every_documented_command_is_accepted_by_its_parser(command, monkeypatch):
    def accept(real):
        def parse(self, argv=None):
            real(self, argv)
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        real = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, accept(real))
    _, script, *words = [word for word in shlex.split(command) if word != "-m"]
    with pytest.raises(Parsed):
        module_of(script).main(words)


def test_the_readme_shows_the_three_commands():
    shown = {command.split()[1] for command in commands_in((ROOT / "README.md").read_text())}
    assert {"build_dataset.py", "train.py", "generate.py"} <= shown


def test_every_setting_the_readme_names_exists_with_the_default_it_says():
    from hparams import hparams

    table = (ROOT / "README.md").read_text().split("## Settings")[1].split("## ")[0]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    assert len(rows) >= 8
    for names, defaults in rows:
        for name, default in zip(
            re.findall(r"`(\w+)`", names), defaults.replace("`", "").split(", "), strict=False
        ):
            value = getattr(hparams, name)
            expected = "as tuned" if value is None else str(value)
            assert default.strip() in (
                expected,
                f"{value:g}" if expected[0].isdigit() else expected,
            )


def test_every_picture_and_sound_of_the_readme_is_there():
    links = re.findall(r"\]\((assets/[^)]*)\)", (ROOT / "README.md").read_text())
    assert links
    for link in links:
        assert (ROOT / link).is_file()
