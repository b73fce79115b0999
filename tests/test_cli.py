"""The frame of every script: however a run ends, the user sees one line and a true exit code."""

from __future__ import annotations

import argparse
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

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
    assert signal.getsignal(signum) == before, "the handler of before is back"


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


# --- Files and processes --------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / ("長" * 80 + ".npy")
    cli.replace_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.replace_atomically(path, fail)
    assert path.read_bytes() == b"old"
    cli.replace_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]
    for wrong in (tmp_path, path / "below", Path(os.devnull)):
        with pytest.raises(InputError, match=re.escape(str(wrong))):
            cli.replace_atomically(wrong, lambda file: None)


def test_a_full_disk_is_told(tmp_path):
    def fail(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="could not be written: No space left") as raised:
        cli.replace_atomically(tmp_path / "a.npy", fail)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_a_folder_is_locked_until_its_process_ends(script, tmp_path):
    command = script(
        f"""
        from pathlib import Path
        with cli.locked(Path({str(tmp_path)!r})):
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(InputError, match="another process works here"), cli.locked(tmp_path):
            raise AssertionError("not reached")
        process.kill()
    with cli.locked(tmp_path):
        pass


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_job_gives_its_result_or_its_error_on_one_thread(n_workers):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = [["width=2"], ["wrong"], []]
        found = {
            job[0] if job else "": got
            for job, got in cli.in_processes(hparams.parse_settings, jobs, n_workers)
        }
        assert found["width=2"] == {"width": 2}
        assert found[""] == {}
        assert "write it as name=value" in str(found["wrong"])
        threads = cli.in_processes(eval, ["__import__('torch').get_num_threads()"] * 2, n_workers)
        assert [got for _, got in threads] == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert list(cli.in_processes(len, [], n_workers)) == []


def test_a_worker_that_dies_is_told():
    with pytest.raises(InputError, match="a worker process died"):
        list(cli.in_processes(os._exit, [3, 3], 2))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, signum):
    """Their standard output is a pipe, which is at its end when the last of them has gone."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cli, time\n"
    code += "if __name__ == '__main__':\n"
    code += "  job = \"print('ready', flush=True) or __import__('time').sleep(60)\"\n"
    code += "  cli.script(lambda argv: list(cli.in_processes(eval, [job] * 3, 2)))([])"
    (tmp_path / "pool.py").write_text(code)
    command = [sys.executable, str(tmp_path / "pool.py")]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        process.send_signal(signum)
        assert process.stdout.read() == b""
