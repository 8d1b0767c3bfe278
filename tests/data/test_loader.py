"""Batches ahead: their order, how many at once, where the threads run, what an error does."""

from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
import torch

from knl.data.loader import Loader, arranged

SHAPE = (2, 3, 4, 4)
BYTES = 4 * int(np.prod(SHAPE))
MB = 1024 * 1024


def maker(number, wait=0.0):
    def make():
        time.sleep(wait)
        return np.full(SHAPE, number, dtype=np.float32), np.array([number, number])

    return make


def started(layout="channels_last", ahead=4):
    return Loader(layout, BYTES, ahead * BYTES / MB)


def test_batches_come_in_order_whatever_each_takes():
    loader = started()
    waits = [0.05, 0.0, 0.02, 0.0, 0.0, 0.03, 0.0, 0.0]
    made = loader.run(maker(number, wait) for number, wait in enumerate(waits))
    assert [int(labels[0]) for _, labels in made] == list(range(len(waits)))
    loader.close()


def test_no_more_is_made_ahead_than_there_is_room_for():
    loader, given = started(ahead=3), []
    made = loader.run(given.append(number) or maker(number) for number in range(20))
    for taken in range(1, 17):
        next(made)
        assert len(given) == taken + 3
    loader.close()


def test_one_batch_is_made_ahead_even_where_it_is_larger_than_the_room():
    loader, made = Loader("contiguous", BYTES, 1e-9), threading.Event()

    def second():
        made.set()
        return maker(1)()

    batches = loader.run([maker(0), second, maker(2)])
    assert int(next(batches)[1][0]) == 0
    assert made.wait(timeout=10)  # while the first is in use
    assert [int(labels[0]) for _, labels in batches] == [1, 2]
    loader.close()


def test_threads_run_on_the_loader_cpus(monkeypatch):
    cpu = min(os.sched_getaffinity(0))
    monkeypatch.setenv("KNL_LOADER_CPUS", str(cpu))
    loader, seen = started(), []

    def where():
        seen.append((os.sched_getaffinity(0), threading.current_thread().name))
        return maker(0)()

    list(loader.run(where for _ in range(3)))
    loader.close()
    assert {frozenset(cpus) for cpus, _ in seen} == {frozenset({cpu})}
    assert all(name.startswith("knl-loader") for _, name in seen)
    assert threading.current_thread().name not in {name for _, name in seen}


def test_an_error_comes_when_its_batch_is_due_and_not_before():
    loader = started()

    def broken():
        raise OSError("gone")

    made = loader.run([maker(0), maker(1), broken, maker(3)])
    assert [int(next(made)[1][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(made)
    loader.close()


def test_leaving_early_drops_what_is_not_begun():
    loader, begun = started(ahead=50), []

    def slow():
        begun.append(1)
        time.sleep(0.05)
        return maker(0)()

    made = loader.run(slow for _ in range(50))
    next(made)
    made.close()
    loader.close()
    assert len(begun) < 50


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "ipex"])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_in_the_layout_of_the_model(layout, channels):
    images = np.random.default_rng(0).random((2, channels, 5, 6)).astype(np.float32)
    wanted = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    for given in (images, images.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)):
        tensor = torch.from_numpy(arranged(given, layout))
        assert tensor.is_contiguous(memory_format=wanted)
        np.testing.assert_array_equal(tensor.numpy(), images)
