"""The permutation that orders an epoch: a bijection for every size, another one for every key, the same everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm.data.permutation import hash_key, permute

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 100, 101, 255, 256, 257, 1000, 4095, 4097, 12_345]


@pytest.mark.parametrize("size", SIZES)
def test_every_index_comes_once(size):
    for key in range(5):
        assert sorted(permute(np.arange(size), size, hash_key(key))) == list(range(size))


def test_a_place_of_a_huge_permutation_costs_nothing_and_is_in_range():
    size = 10**13 + 37
    index = np.array([0, 1, size - 1, size // 2])
    places = permute(index, size, hash_key(1))
    assert len(set(places.tolist())) == 4 and places.min() >= 0 and places.max() < size


def test_keys_give_different_orders():
    orders = {tuple(permute(np.arange(50), 50, hash_key(seed, epoch))) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100
    assert hash_key(1, 2) != hash_key(2, 1)


def test_places_are_spread_evenly():
    # 4,000 orders of 10: each index should stand at each place about 400 times (standard deviation 19)
    counts = np.zeros((10, 10))
    for key in range(4000):
        counts[np.arange(10), permute(np.arange(10), 10, hash_key(key))] += 1
    assert counts.min() > 300 and counts.max() < 500


def test_neighbours_are_not_kept_together():
    order = permute(np.arange(10_000), 10_000, hash_key(3))
    assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 20  # 2 expected of a random order


def test_the_same_in_another_process():
    code = (
        "import numpy as np; from minillm.data.permutation import hash_key, permute;"
        "print(permute(np.arange(1000), 1000, hash_key(7, 0, 3)).tolist())"
    )
    root = Path(__file__).parents[2]
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert other.strip() == str(permute(np.arange(1000), 1000, hash_key(7, 0, 3)).tolist())
