"""The frame of every script: however a run ends, the user sees one line and a true exit code."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import cli
import hparams
from hparams import HParams, InputError

ROOT = Path(__file__).parent.parent
CONTROLS = "a\tb\x1b[31m\x9b\u202e\ud83d.mp3"  # what would move or colour a terminal's text


@pytest.fixture
def script(tmp_path):
    """Write a script with the given body of `main`; return its command."""

    def make(body: str) -> list[str]:
        path = tmp_path / "song.py"
        path.write_text(
            "import os, signal, sys, time\n"
            "import cli\n"
            "from hparams import InputError\n\n\n"
            "@cli.script\n"
            "def main(argv=None):\n"
            f"{textwrap.indent(textwrap.dedent(body), '    ')}\n\n\n"
            "sys.exit(main())\n",
            encoding="utf-8",
        )
        return [sys.executable, str(path)]

    return make


def environment(**more: str) -> dict[str, str]:
    """Return a user's environment: Python buffers a pipe there."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("PYTHON", "LC_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(command: list[str] | str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        env=environment(**env),
        capture_output=True,
        timeout=60,
    )


# --- Ends ---------------------------------------------------------------------------------------


def test_a_run_that_went_well_ends_as_it_says(script):
    for code in (0, 1):
        ended = run(script(f"print('vocals.wav'); return {code}"))
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, b"vocals.wav\n", b"")


def test_what_the_user_can_fix_is_one_line_and_exit_code_1(script):
    command = script(r"raise InputError('no\nsuch\x1b[31m \udcff.mp3: not audio (convert it)')")
    ended = run(command)
    assert ended.returncode == 1
    assert ended.stdout == b""
    expected = rb"song.py: error: no\nsuch\x1b[31m \udcff.mp3: not audio (convert it)"
    assert ended.stderr == expected + b"\n"


def test_debug_shows_where_the_error_came_from(script):
    ended = run([*script("raise InputError('no such file')"), "--debug"])
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"Traceback (most recent call last)")
    assert ended.stderr.endswith(b"hparams.InputError: no such file\n")


def test_debug_is_read_from_the_arguments_that_main_is_given(capsys):
    @cli.script
    def main(argv=None):
        raise InputError("no such file")

    assert main([]) == 1
    assert capsys.readouterr().err.endswith(": error: no such file\n")
    with pytest.raises(InputError):
        main(["--debug"])


def test_a_bug_of_ours_keeps_its_traceback(script):
    ended = run(script("return 1 / 0"))
    assert ended.returncode == 1
    assert ended.stderr.startswith(b"Traceback")
    assert b"ZeroDivisionError" in ended.stderr


def test_wrong_usage_is_exit_code_2(script):
    ended = run([*script("cli.make_parser('Hear.', '').parse_args(argv)"), "--volume=11"])
    assert ended.returncode == 2
    assert ended.stderr.endswith(b"song.py: error: unrecognized arguments: --volume=11\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_in_silence_after_cleaning_up(script, tmp_path, signum, code):
    command = script(
        """
        temporary = sys.argv[0] + ".tmp"
        open(temporary, "w").close()
        try:
            print("ready", flush=True)
            time.sleep(30)
        finally:
            os.remove(temporary)
        """
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signum)
        assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == code
    assert os.listdir(tmp_path) == ["song.py"]


@pytest.mark.parametrize("n_lines", [1, 100_000])
def test_a_reader_that_has_seen_enough_is_no_error(script, n_lines):
    command = script(
        f"""
        sys.stdin.readline()
        for i in range({n_lines}): print("line", i)
        return 0
        """
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == (0 if n_lines == 1 else 1), "1 where the run was cut off"


def test_the_caller_of_main_gets_its_sigterm_handler_back():
    seen = []

    @cli.script
    def main(argv=None):
        seen.append(signal.getsignal(signal.SIGTERM))
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert main([]) == 0
    assert seen != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_main_runs_in_a_thread_too():
    codes = []
    main = cli.script(lambda argv: 0)
    thread = threading.Thread(target=lambda: codes.append(main([])))
    thread.start()
    thread.join()
    assert codes == [0]


# --- Stopping after saving ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signum", "code", "second"),
    [
        (signal.SIGINT, 130, KeyboardInterrupt),
        (signal.SIGTERM, 143, cli.Terminated),
    ],
)
def test_the_first_signal_asks_and_the_second_ends(signum, code, second, monkeypatch):
    monkeypatch.setattr(cli, "SAME_WISH", -1)
    wished, before = [], signal.getsignal(signum)

    @cli.script
    def main(argv=None):
        with cli.Stop() as stop:
            assert not stop()
            signal.raise_signal(signum)
            assert stop()
            wished.append(stop.exit_code)
            with pytest.raises(second):
                signal.raise_signal(signum)
            signal.raise_signal(signum)
            raise AssertionError("not reached")

    assert main([]) == code
    assert wished == [code]
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("later", [signal.SIGINT, signal.SIGTERM])
def test_signals_within_a_second_are_one_wish_and_any_later_one_ends(later, monkeypatch):
    asked = []

    def main(argv):
        with cli.Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            asked.append((stop(), stop.exit_code))
            monkeypatch.setattr(cli, "SAME_WISH", -1)
            signal.raise_signal(later)

    assert cli.script(main)([]) == 128 + later
    assert asked == [(True, 130)]


def test_where_another_process_was_asked_to_stop_the_exit_code_is_that_of_sigterm():
    with cli.Stop() as stop:
        assert not stop()
    assert stop.exit_code == 143


def test_without_a_signal_nothing_is_asked_and_the_handlers_return():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with cli.Stop() as stop:
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] != before
    assert not stop()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


# --- Streams ------------------------------------------------------------------------------------

SAY_EVERYTHING = """
cli.warn("a warning")
with cli.progress(2, " slices") as bar:
    bar.update(1)
print("the result 😀 é")
raise InputError("the error 😀")
"""


def test_a_closed_stream_takes_nothing_away_from_the_others(script):
    command = shlex.join(map(str, script('print("aside", file=sys.stderr)' + SAY_EVERYTHING)))
    ended = run(f"{command} 2>&-", PYTHONUTF8="1")
    assert (ended.returncode, ended.stderr) == (1, b"")
    assert ended.stdout.decode() == "the result 😀 é\n"
    ended = run(f"{command} >&-", PYTHONUTF8="1")
    assert (ended.returncode, ended.stdout) == (1, b"")
    said = "aside\nsong.py: warning: a warning\nsong.py: error: the error 😀\n"
    assert ended.stderr.decode() == said
    ended = run(f"{command} >&- 2>&- <&-")
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")


def test_a_name_in_another_alphabet_is_printed_everywhere(script):
    command = script(SAY_EVERYTHING)
    ended = run(command, LC_ALL="C")
    assert ended.returncode == 1
    assert ended.stdout.decode() == "the result 😀 é\n"  # Python takes UTF-8 for the C locale
    ended = run(command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ended.returncode == 1
    assert ended.stdout == rb"the result \U0001f600 \xe9" + b"\n"
    assert ended.stderr.endswith(rb"song.py: error: the error \U0001f600" + b"\n")


def test_what_could_change_the_terminal_is_escaped_and_all_else_kept():
    found = cli.printable(CONTROLS)
    assert found == r"a\tb\x1b[31m\x9b\u202e\ud83d.mp3"
    for kept in ("Ça va – 東京 😀.wav", r"back\slash 'and' \"quotes\"", ""):
        assert cli.printable(kept) == kept
    assert cli.printable(InputError("no such file")) == "no such file"


def test_complaints_and_warnings_name_the_script(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/generate.py"])
    cli.complain("song.mp3: no such file")
    cli.warn(Path("a\nb"))
    monkeypatch.setattr(sys, "argv", [""])  # an interactive session
    cli.warn("quiet")
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.splitlines() == [
        "generate.py: error: song.mp3: no such file",
        r"generate.py: warning: a\nb",
        "python: warning: quiet",
    ]


def test_a_progress_bar_is_drawn_on_terminals_only(capsys, monkeypatch):
    with cli.progress(2, " slices") as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with cli.progress(2, " slices") as bar:
        bar.update(2)
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "2/2" in seen.err
    assert "slices" in seen.err


# --- Options ------------------------------------------------------------------------------------


def test_every_script_has_set_and_debug():
    parser = cli.make_parser("Hear it.\n\nMore.", "examples:\n  python song.py a.wav")
    args = parser.parse_args([])
    assert (args.settings, args.debug) == ([], False)
    args = parser.parse_args(["--set", "width=8", "--debug", "--set", "width=16"])
    assert (args.settings, args.debug) == (["width=8", "width=16"], True)
    text = parser.format_help()
    assert "\n\nHear it.\n\n" in text
    assert "More." not in text
    assert text.endswith("examples:\n  python song.py a.wav\n")


def test_one_run_does_not_set_the_next(capsys):
    parser = cli.make_parser("Hear it.", "")
    parser.parse_args(["--set", "width=8"])
    assert parser.parse_args([]).settings == []


def test_set_changes_this_run_and_not_hparams():
    args = argparse.Namespace(settings=["width=8", "width=16"])
    assert cli.settings_of(args) == HParams(width=16)
    assert hparams.hparams == HParams()
    with pytest.raises(InputError, match="did you mean width"):
        cli.settings_of(argparse.Namespace(settings=["widht=8"]))


def choose_device(choice: list[str], local_rank: int = 0):
    parser = cli.make_parser("Hear it.", "")
    cli.add_device_option(parser)
    return cli.device_of(parser.parse_args(choice), parser, local_rank)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, n_gpus: int) -> list[int]:
    """Let torch see some GPUs; returns the list of those that are then chosen."""
    import torch

    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    return chosen


def test_the_device_is_told_with_the_reason(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for n_gpus, choice, device, said in (
        (0, [], "cpu", "device: CPU, 3 threads (no CUDA device)\n"),
        (0, ["--device=cpu"], "cpu", "device: CPU, 3 threads (as asked)\n"),
        (1, ["--device=cpu"], "cpu", "device: CPU, 3 threads (as asked)\n"),
        (1, [], "cuda:0", "device: GPU 0 (there is one; --device cpu for the CPU)\n"),
        (2, ["--device=cuda"], "cuda:0", "device: GPU 0 (as asked)\n"),
    ):
        pretend_gpus(monkeypatch, n_gpus)
        assert choose_device(choice) == torch.device(device)
        assert capsys.readouterr().out == said


def test_every_process_of_a_machine_takes_its_own_gpu(monkeypatch):
    import torch

    chosen = pretend_gpus(monkeypatch, 2)
    assert choose_device([], 1) == torch.device("cuda", 1)
    assert choose_device([], 0) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="process 2 of this machine has no GPU: there are 2"):
        choose_device([], 2)
    assert chosen == [1, 0]


def test_a_gpu_that_is_not_there_is_wrong_usage(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for choice in ("cuda", "tpu"):
        with pytest.raises(SystemExit) as ended:
            choose_device([f"--device={choice}"])
        assert ended.value.code == 2
        assert f"--device{' ' if choice == 'cuda' else ': '}" in capsys.readouterr().err


def test_a_parser_is_there_before_torch_and_tqdm(script):
    ended = run(script("print('torch' in sys.modules, 'tqdm' in sys.modules)"))
    assert ended.stdout == b"False False\n"
