"""Songs in parallel: results, errors and deaths."""

from __future__ import annotations

import os

import pytest
import torch

from hparams import InputError, parse_settings
from scoring import workers


@pytest.mark.parametrize("n_workers", [1, 2])
def test_every_job_gives_its_result_or_its_error(n_workers):
    found = list(workers.in_parallel(parse_settings, [["width=2"], ["wrong"], []], n_workers))
    assert sorted(str(x) for x in found if not isinstance(x, InputError)) == ["{'width': 2}", "{}"]
    assert sum(isinstance(x, InputError) for x in found) == 1


@pytest.mark.parametrize("n_workers", [1, 2])
def test_each_job_has_one_thread_and_this_process_keeps_its_own(n_workers):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(
            workers.in_parallel(eval, ["__import__('torch').get_num_threads()"] * 2, n_workers)
        )
        assert found == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_worker_that_dies_is_told():
    with pytest.raises(InputError, match="a process that scored a song died"):
        list(workers.in_parallel(os._exit, [3, 3], 2))


def test_no_jobs_need_no_processes():
    assert list(workers.in_parallel(len, [], 4)) == []
