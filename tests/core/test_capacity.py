"""How many rows are tried: stand-ins that are slow, or short of memory, beside the real network."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from core.capacity import MOST, SECONDS, rows_worth
from core.job import Subject
from core.spec import CollisionSpec
from core.taps import Tap

SPEC = CollisionSpec(preset="paper-mnist")
PLENTY = 2**40


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.open(SPEC, torch.device("cpu"))


def hindered(subject: Subject, hinder: Callable[[int], object]) -> Subject:
    """With `hinder` called with the number of rows before each pass of the network."""
    tap, network = subject.tap, copy.deepcopy(subject.tap.network)
    network.register_forward_pre_hook(lambda _, inputs: hinder(len(inputs[0])) and None)
    return replace(subject, working_tap=Tap(tap.normalize, network, tap.layer))


def test_a_small_network_is_worth_many_rows(subject):
    assert 32 < rows_worth(subject, SPEC, PLENTY) <= MOST


def test_rows_that_take_their_time_one_by_one_are_not_worth_more(subject):
    assert rows_worth(hindered(subject, lambda rows: time.sleep(0.02 * rows)), SPEC, PLENTY) <= 16


def test_a_slow_network_is_given_up_in_time(subject):
    began = time.perf_counter()
    assert rows_worth(hindered(subject, lambda rows: time.sleep(1.5)), SPEC, PLENTY) == 1
    assert time.perf_counter() - began < 2 * SECONDS


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_rows_that_memory_does_not_hold_are_left_out(subject, error):
    def hinder(rows: int) -> None:
        if rows > 16:
            raise error

    assert 1 <= rows_worth(hindered(subject, hinder), SPEC, PLENTY) <= 16


def test_other_failures_are_not_taken_for_want_of_memory(subject):
    def hinder(rows: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        rows_worth(hindered(subject, hinder), SPEC, PLENTY)


def test_rows_that_the_budget_does_not_hold_are_left_out(subject):
    row = subject.footprint.steps(SPEC) / SPEC.rows
    assert rows_worth(subject, SPEC, 9 * row) == 8
    assert rows_worth(subject, SPEC, 7 * row) == 1
