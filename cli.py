"""What every script shares: errors as one line, exit codes, options, progress, safe files, a pool.

Exit codes: 0 all done, 1 some input failed, 2 wrong usage, 130 interrupted, 143 terminated.
``--debug`` shows the traceback behind an error; a bug of ours always shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hparams import HParams, InputError, UsageError, hparams, override

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

PRETRAINED = Path(__file__).parent / "pretrained" / "resnet18.pth"  # comes with the project
SAME_WISH = 1.0  # seconds within which a second signal is the first one again
Main = Callable[[list[str] | None], int]


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Make a parser with every script's options.

    The first paragraph of a script's `doc` describes it, the last one holds the examples.
    """
    description, *_, examples = doc.split("\n\n")
    parser = argparse.ArgumentParser(
        prog=_script_name(),
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, text = parser.add_argument, "override a setting of hparams.py; may be given several times"
    add("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE", help=text)
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``; read it with `device_of`."""
    text = "where the network runs; auto (the default) takes a CUDA GPU where there is one"
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help=text)


def positive_count(text: str) -> int:
    """Read a count for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def positive_number(text: str) -> float:
    """Read a finite number above 0, such as seconds, for argparse."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return float(text)


def settings_of(args: argparse.Namespace) -> HParams:
    """Return hparams.py with the command line's ``--set`` applied; InputError if one is wrong."""
    return override(hparams, args.settings)


def device_of(
    args: argparse.Namespace, parser: argparse.ArgumentParser, local_rank: int = 0
) -> torch.device:
    """Return the device asked for, a GPU by its `local_rank`, and print which it is, and why."""
    import torch  # here, so that --help and wrong paths answer at once

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" and not n_gpus:
        parser.error("--device cuda: this torch sees no CUDA device (use --device cpu or auto)")
    reason = "no CUDA device" if not n_gpus else "there is one; --device cpu for the CPU"
    reason = reason if args.device == "auto" else "as asked"
    if args.device == "cpu" or not n_gpus:
        print(f"device: CPU, {torch.get_num_threads()} threads ({reason})")
        return torch.device("cpu")
    if local_rank >= n_gpus:
        raise InputError(f"process {local_rank} of this machine has no GPU: there are {n_gpus}")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    print(f"device: {torch.cuda.get_device_name(device)} ({reason})")
    return device


def refuse_missing(checkpoint: Path) -> None:
    """Tell a checkpoint's wrong path; scripts do so before torch is loaded."""
    if not os.path.isfile(checkpoint):  # false, too, where the name is too long
        what = "is a directory" if os.path.isdir(checkpoint) else "no such checkpoint"
        raise InputError(f"{checkpoint}: {what} (name a .pth file that train.py wrote)")


def refuse_missing_folder(folder: Path, remedy: str = "check the name") -> None:
    """Tell a folder's wrong path."""
    if not os.path.isdir(folder):  # false, too, where the name is too long
        what = "not a folder" if os.path.exists(folder) else "no such folder"
        raise InputError(f"{folder}: {what} ({remedy})")


def script(main: Main) -> Main:
    """Wrap a script's ``main(argv)`` so that every way to end has its message and exit code."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        debug = "--debug" in (sys.argv[1:] if argv is None else argv)
        if sys.stderr is None:  # closed ("2>&-"): print would take standard output instead
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a name in another alphabet must not end the run
                stream.reconfigure(errors="backslashreplace")
        before = None
        with contextlib.suppress(ValueError):  # only the main thread may, not a notebook's
            # The script is unwound, so that temporary files are removed.
            before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            return main(argv)
        except InputError as error:
            if debug:
                raise
            complain(error)
            return 2 if isinstance(error, UsageError) else 1
        except BrokenPipeError:  # "| head": whoever read our output has seen enough
            return 1
        except OSError as error:
            if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            complain(f"{error.strerror} (what was being written, or where this is printed to)")
            return 1
        except (RuntimeError, MemoryError) as error:
            if debug or not re.search("MemoryError|of memory|allocate memory", repr(error)):
                raise
            complain("out of memory (try a smaller batch_size to train, block_frames to separate)")
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
            try:
                if sys.stdout is not None:
                    sys.stdout.flush()
            except OSError:  # at exit Python would complain about a closed pipe
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return wrapped


class Stop:
    """Ctrl-C or SIGTERM as a request: call it to ask; another one ends the run at once.

    torchrun passes on what it receives, so that one wish may arrive twice: only what comes a
    second later is another one.
    """

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return self._signum != 0

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, also where another process received it."""
        return 128 + (self._signum or signal.SIGTERM)

    def __enter__(self) -> Stop:
        self._signum = 0
        self._before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, _frame: object) -> None:
        if not self._signum:
            self._signum, self._at = signum, time.monotonic()
        elif time.monotonic() - self._at > SAME_WISH:
            self.__exit__()
            signal.raise_signal(signum)


def complain(message: object, kind: str = "error") -> None:
    """Print one line on stderr: ``generate.py: error: song.mp3: …``."""
    print(f"{_script_name()}: {kind}: {printable(message)}", file=sys.stderr)


warn = functools.partial(complain, kind="warning")


def printable(text: object) -> str:
    """Escape what a terminal must not be sent: control characters and undecodable bytes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def progress(total: float | None, unit: str) -> tqdm:
    """Make a progress bar on stderr, silent where stderr is not a terminal."""
    from tqdm import tqdm  # 0.05 s that --help need not wait for

    is_seen = sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"  # torchrun: one for all
    return tqdm(total=total, unit=unit, disable=not is_seen, dynamic_ncols=True)


def _script_name() -> str:
    """Return what was started, as the user calls it; of ``python -m demo`` it is "demo"."""
    folder, name = os.path.split(sys.argv[0])
    return os.path.basename(folder) if name == "__main__.py" else name or "python"


def check_writable(path: Path) -> None:
    """Make sure that a file can be created or replaced at `path`; creates its directory."""
    place = path.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        place = path
        is_other = path.exists() and not path.is_file()  # raises where the name is too long
    except OSError as error:
        remedy = "shorten its name" if place is path else "choose another folder"
        raise InputError(f"{place}: {error.strerror or error} ({remedy})") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):  # false on a read-only disk even for root
        raise InputError(f"{path.parent}: not writable (choose another folder)")
    if is_other:  # renaming onto /dev/null would replace the device
        raise InputError(f"{path}: is not a regular file (choose another name)")


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """Name a temporary file, which replaces `path` when it is whole; InputError if it cannot."""
    path = Path(path)
    check_writable(path)
    temporary = path.with_name(f".{path.name[-40:]}.tmp-{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def replace_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file that appears whole or not at all, as `new_file`."""
    with new_file(path) as temporary, open(temporary, "wb") as file:
        write(file)


def ahead(items: Iterable[Any], n: int = 3) -> Iterator[Any]:
    """Yield items that a thread takes from an iterator, `n` ahead: both sides work at once."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        taken = [thread.submit(next, source, end) for _ in range(n)]
        while (item := taken.pop(0).result()) is not end:
            taken.append(thread.submit(next, source, end))
            yield item


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder if need be and keep other processes out; the lock ends with the process."""
    import filelock  # 0.1 s that --help need not wait for

    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(f"{folder}: another process works here (wait until it is done)") from None
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror} (choose another folder)") from error
    try:
        yield
    finally:
        lock.release()


def in_processes(
    function: Callable[[Any], Any], jobs: list[Any], n_workers: int | None = None
) -> Iterator[tuple[Any, Any]]:
    """Call a module's function for all songs, each in a process of one thread, one to each core.

    Yields each song with what the function returned, first done, first; if it raised InputError
    that is printed, and the song left out. InputError if a process dies.
    """
    with (
        contextlib.closing(_results(function, jobs, n_workers)) as results,
        progress(len(jobs), " songs") as bar,
    ):
        for job, result in results:
            bar.update()
            if isinstance(result, InputError):
                complain(result)
            else:
                yield job, result


def _results(
    function: Callable[[Any], Any], jobs: list[Any], n_workers: int | None
) -> Iterator[tuple[Any, Any]]:
    """Yield each job with what its function returned, or the InputError that it raised."""
    n_workers = min(n_workers or os.cpu_count() or 1, len(jobs))
    if n_workers <= 1:
        yield from ((job, _attempt(function, job)) for job in jobs)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        # Ctrl-C reaches the whole group, and the parent decides: children inherit the ignoring.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            job_of = {pool.submit(_attempt, function, job): job for job in jobs}
        finally:
            signal.signal(signal.SIGINT, before)
        for future in as_completed(job_of):
            yield job_of[future], future.result()
    except BrokenProcessPool:
        text = "a worker process died; was it out of memory? (run again, with fewer --workers)"
        raise InputError(text) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _attempt(function: Callable[[Any], Any], job: Any) -> Any:
    """Return what a function gives, or the InputError that it raises; on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # their number changes the last bits of a sum; jobs are parallel
    try:
        return function(job)
    except InputError as error:
        return error
    except torch.OutOfMemoryError:
        return InputError(f"{getattr(job, 'track', job).name}: out of GPU memory (fewer --workers)")
    finally:
        torch.set_num_threads(before)


def _start_worker() -> None:
    """Ignore Ctrl-C, and end with the parent, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
