"""Seeded permutations of range(size) that need no memory: any place of any epoch is arithmetic.

Contract: `permute(index, size, key)` is a bijection of range(size) for every key, vectorised, the same in every process
and on every machine (integer arithmetic only). The cost does not depend on `size`, so a jump to any step is free.

Source: a generalised Feistel network on Z_a x Z_b with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002). With a = ceil(sqrt(size)) and b = ceil(size / a) the domain a * b exceeds `size` by less than a, so a
second walk is rare.
"""

from __future__ import annotations

import math

import numpy as np

_NUM_ROUNDS = 6
_MASK = (1 << 64) - 1


def hash_key(*parts: int) -> int:
    """Mix integers into one 64-bit key; the order counts."""
    key = 0x9E3779B97F4A7C15
    for part in parts:
        key = _mix_int((key ^ (part & _MASK)) + 0x9E3779B97F4A7C15)
    return key


def hash_array(values: np.ndarray, key: int) -> np.ndarray:
    """64 well-mixed bits for each value (uint64 [n] -> uint64 [n]); the constants of splitmix64."""
    x = (values ^ np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a permutation of range(size), chosen by `key`, sends each index (int64 [n] -> int64 [n])."""
    if size <= 1:
        return np.zeros_like(index)
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    round_keys = [hash_key(key, number) for number in range(_NUM_ROUNDS)]
    result = _feistel(index.astype(np.uint64), rows, columns, round_keys)
    while (outside := np.flatnonzero(result >= size)).size:
        result[outside] = _feistel(result[outside], rows, columns, round_keys)
    return result.astype(np.int64)


def _feistel(values: np.ndarray, rows: int, columns: int, round_keys: list[int]) -> np.ndarray:
    a, b = np.uint64(rows), np.uint64(columns)
    left, right = values // b, values % b
    for number, key in enumerate(round_keys):
        if number % 2 == 0:
            left = (left + hash_array(right, key) % a) % a
        else:
            right = (right + hash_array(left, key) % b) % b
    return left * b + right


def _mix_int(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
