"""The frame of every script: however a run ends, the user sees one line and a true exit code."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import cli
from hparams import InputError

ROOT = Path(__file__).parent.parent
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def script(tmp_path):
    """Write a script with the given body of `main`; return its command."""

    def make(body: str) -> list[str]:
        path = tmp_path / "song.py"
        path.write_text(
            "import os, sys, time\nimport cli\nfrom hparams import InputError\n\n\n"
            "@cli.script\ndef main(argv=None):\n"
            f"{textwrap.indent(textwrap.dedent(body), '    ')}\n\n\n"
            "if __name__ == '__main__':\n    sys.exit(main())\n",
            encoding="utf-8",
        )
        return [sys.executable, str(path)]

    return make


def environment(**more: str) -> dict[str, str]:
    """Return a user's environment: Python buffers a pipe there."""
    kept = {name: v for name, v in os.environ.items() if not name.startswith(("PYTHON", "LC_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def run(command: list[str] | str, **env: str) -> subprocess.CompletedProcess:
    is_line = isinstance(command, str)
    return subprocess.run(command, shell=is_line, env=environment(**env), capture_output=True)


@pytest.mark.parametrize(
    ("body", "code", "out", "err"),
    [
        ("print('vocals.wav'); return 0", 0, b"vocals.wav\n", b""),
        ("return 1", 1, b"", b""),
        (
            "raise InputError('a\\n\\x1b\\x9b\\u202e\\udcff.mp3')",  # would move or colour its text
            1,
            b"",
            b"song.py: error: a\\n\\x1b\\x9b\\u202e\\udcff.mp3\n",
        ),
        (
            "import torch; torch.empty(2**50)",
            1,
            b"",
            b"song.py: error: out of memory (try a smaller batch_size to train, "
            b"block_frames to separate)\n",
        ),
        ("return 1 / 0", 1, b"", b"ZeroDivisionError: division by zero\n"),
        (
            "cli.make_parser('Hear.\\n\\nsong.py').parse_args(['--volume=11'])",
            2,
            b"",
            b"song.py: error: unrecognized arguments: --volume=11\n",
        ),
    ],
)
def test_every_end_has_its_message_and_its_exit_code(script, body, code, out, err):
    ended = run(script(body))
    assert (ended.returncode, ended.stdout) == (code, out)
    assert ended.stderr.endswith(err)
    assert (b"Traceback" in ended.stderr) == (b"ZeroDivision" in err)
    if err.startswith(b"song.py: error: a"):
        assert ended.stderr == err
        assert b"Traceback" in run([*script(body), "--debug"]).stderr


def test_a_reader_that_has_seen_enough_is_no_error(script):
    body = "sys.stdin.readline()\nfor i in range(100_000): print('line', i)\nreturn 0"
    with subprocess.Popen(script(body), env=environment(), **PIPES) as process:
        process.stdout.close()
        process.stdin.write(b"go\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_signals_within_a_second_are_one_request_and_a_later_one_ends(monkeypatch):
    asked, before = [], signal.getsignal(signal.SIGINT)

    def main(argv):
        with cli.Stop() as stop:
            assert not stop()
            assert stop.exit_code == 143, "another process was asked to stop"
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(signum)
            asked.append((stop(), stop.exit_code))
            monkeypatch.setattr(cli, "SAME_WISH", -1)
            signal.raise_signal(signal.SIGINT)

    assert cli.script(main)([]) == 130
    assert asked == [(True, 130)]
    assert signal.getsignal(signal.SIGINT) == before


SAY_EVERYTHING = """
cli.warn("a warning")
with cli.progress(2, " slices") as bar:
    bar.update(1)
print("the result 😀 é")
raise InputError("the error 😀")
"""


@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("2>&-", "the result 😀 é\n", ""),
        (">&-", "", "song.py: warning: a warning\nsong.py: error: the error 😀\n"),
    ],
)
def test_a_closed_stream_takes_nothing_away_from_the_others(script, redirection, out, err):
    ended = run(f"{shlex.join(script(SAY_EVERYTHING))} {redirection}", PYTHONUTF8="1")
    assert (ended.returncode, ended.stdout.decode(), ended.stderr.decode()) == (1, out, err)


def test_a_name_in_another_alphabet_is_printed_everywhere(script):
    ended = run(script(SAY_EVERYTHING), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ended.stdout == rb"the result \U0001f600 \xe9" + b"\n"
    assert ended.stderr.endswith(rb"song.py: error: the error \U0001f600" + b"\n")


def test_the_device_is_told_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    parser = cli.make_parser("Hear it.\n\nsong.py")
    cli.add_device_option(parser)
    for n_gpus, choice, name, said in (
        (0, "auto", "cpu", "device: CPU, 3 threads (no CUDA device)\n"),
        (1, "auto", "cuda:0", "device: GPU 0 (there is one; --device cpu for the CPU)\n"),
        (2, "cuda", "cuda:1", "device: GPU 1 (as asked)\n"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda n=n_gpus: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n_gpus: n)
        options = parser.parse_args(["--device", choice])
        assert str(cli.device_of(options, parser, max(0, n_gpus - 1))) == name
        assert capsys.readouterr().out == said
        with pytest.raises((InputError, SystemExit)):  # a process too many
            cli.device_of(parser.parse_args(["--device", "cuda"]), parser, n_gpus)
        capsys.readouterr()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / ("長" * 80 + ".npy")
    cli.replace_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="could not be written: No space left") as raised:
        cli.replace_atomically(path, fail)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    cli.replace_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == [path.name]
    for wrong in (tmp_path, path / "below", Path(os.devnull)):
        with pytest.raises(InputError, match=re.escape(str(wrong).removesuffix("/below"))):
            cli.replace_atomically(wrong, lambda file: None)


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_workers_give_results_and_end_with_their_parent(script, signum):
    """Their standard output is a pipe, which is at its end when the last of them has gone."""
    jobs = ["2 + 2", "1 + 1", "__import__('time').sleep(60)"]
    command = script(f"for job in cli.in_processes(eval, {jobs}, 2): print(job[1], flush=True)")
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE) as process:
        said = {process.stdout.readline() for _ in range(2)}
        assert said == {b"2\n", b"4\n"}
        process.send_signal(signum)
        assert process.stdout.read() == b""
