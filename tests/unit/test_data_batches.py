from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data import Example, fingerprint, steps
from lorasmith.errors import ConfigError, DataError


def example(length: int, first_supervised: int = 1) -> Example:
    return Example(np.arange(length, dtype=np.int32), np.arange(length) >= first_supervised, line=1)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_each_epoch_visits_every_example_once(count: int, size: int, epochs: int, drop_last: bool) -> None:
    if drop_last and count < size:
        with pytest.raises(DataError, match="no optimizer step"):
            steps(range(count), batch_size=size, epochs=epochs, seed=0, drop_last=True)
        return
    plan = steps(range(count), batch_size=size, epochs=epochs, seed=0, drop_last=drop_last)
    per_epoch = count // size if drop_last else -(-count // size)
    assert (len(plan), plan.per_epoch) == (per_epoch * epochs, per_epoch)
    for epoch in range(epochs):
        seen = list(itertools.chain(*(plan[epoch * per_epoch + k] for k in range(per_epoch))))
        assert len(set(seen)) == len(seen) == (count - count % size if drop_last else count)


def test_a_resumed_run_continues_from_the_step_number_alone() -> None:
    whole = list(steps(range(10), batch_size=3, epochs=3, seed=5))
    again = steps(range(10), batch_size=3, epochs=3, seed=5)
    assert [again[k] for k in reversed(range(12))] == whole[::-1]
    assert again[-1] == whole[-1]
    with pytest.raises(IndexError):
        again[12]


def test_more_epochs_do_not_change_the_steps_before() -> None:
    short = list(steps(range(10), batch_size=3, epochs=1, seed=5))
    assert list(steps(range(10), batch_size=3, epochs=4, seed=5))[: len(short)] == short


def test_epochs_and_seeds_differ() -> None:
    plan = steps(range(100), batch_size=100, epochs=2, seed=0)
    assert plan[0] != plan[1]
    assert plan[0] != steps(range(100), batch_size=100, epochs=1, seed=1)[0]
    assert plan[0] != list(range(100))


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"epochs": 0}, {"seed": -1}])
def test_settings_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        steps(range(3), **({"batch_size": 1, "epochs": 1, "seed": 0} | change))


def test_no_examples() -> None:
    with pytest.raises(DataError):
        steps([], batch_size=1, epochs=1, seed=0)


def test_the_fingerprint_sees_tokens_masks_order_and_borders() -> None:
    base = [example(3), example(4)]
    same = [example(3), example(4)]
    assert fingerprint(base) == fingerprint(same)
    others = [
        [example(4), example(3)],
        [example(3, first_supervised=2), example(4)],
        [example(3)],
        [example(7)],
    ]
    assert len({fingerprint(e) for e in (base, *others)}) == 5
