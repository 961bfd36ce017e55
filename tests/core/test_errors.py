"""Errors cross processes and are copied: what they say must stay."""

import copy
import pickle

import pytest

from core.errors import CoreError, InvalidSpec, UnknownName


@pytest.mark.parametrize(
    "remade", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))]
)
@pytest.mark.parametrize(
    "error", [UnknownName("layer", "fc11", ["fc2", "fc1"]), InvalidSpec("No."), CoreError()]
)
def test_an_error_copied_or_pickled_says_the_same(remade, error):
    again = remade(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.code == error.code
