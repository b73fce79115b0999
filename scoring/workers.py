"""Songs in parallel: processes of one thread, each with one song at a time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from hparams import InputError


def in_parallel(
    function: Callable[[Any], Any], jobs: list[Any], n_workers: int | None
) -> Iterator[Any]:
    """Call a function for all jobs, each on one thread.

    Parameters
    ----------
    function : callable
        Of a module, where spawned processes find it.
    jobs : list
    n_workers : int, optional
        Processes, by default one a core; a single one is this process.

    Yields
    ------
    object
        What the function returns, or the InputError that it raises, whichever is done first.

    Raises
    ------
    InputError
        If a process dies.
    """
    n_workers = min(n_workers or os.cpu_count() or 1, len(jobs))
    if n_workers <= 1:
        yield from map(functools.partial(_attempt, function), jobs)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(n_workers, context, _start_worker)
    try:
        # Ctrl-C reaches the whole group, and the parent decides: children inherit the block.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [executor.submit(_attempt, function, job) for job in jobs]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(
            "a process that scored a song died; was it out of memory? (run again, with fewer "
            "--workers; what is scored is kept)"
        ) from None
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _attempt(function: Callable[[Any], Any], job: Any) -> Any:
    """Return what a function gives, or the InputError that it raises; on one thread.

    The number of threads changes the last bits of a sum, and it is songs that are parallel.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(job)
    except InputError as error:
        return error
    finally:
        torch.set_num_threads(before)


def _start_worker() -> None:
    """End with the parent, however it ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
