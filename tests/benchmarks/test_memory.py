"""Exact search of the memory beside scikit-learn's BallTree, in one run; nothing is asserted about time.

    python -m pytest tests/benchmarks/test_memory.py --benchmark-enable -s
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from sklearn.neighbors import BallTree

from art_rs_plugins.theory.search import BallSearch

BALLS, QUERIES, SHAPE = 20_000, 256, (3, 32, 32)


def images(count: int, seed: int) -> np.ndarray:
    """Smooth random images with a little noise: neighbours as far apart as photographs are."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0.0, 1.0, (count, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    return np.clip(coarse + rng.normal(0.0, 0.05, (count, *SHAPE)), 0.0, 1.0).astype(np.float32)


def test_exact_lookups_against_a_ball_tree(benchmark) -> None:
    stored, queries = images(BALLS, 0), images(QUERIES, 1)
    radii = np.random.default_rng(2).uniform(0.1, 2.0, BALLS)
    queries[::4] = stored[:: BALLS // (QUERIES // 4)][: len(queries[::4])]   # a quarter lies in a ball, near its edge
    step = np.random.default_rng(3).normal(size=(len(queries[::4]), *SHAPE))
    step *= (radii[:: BALLS // (QUERIES // 4)][: len(step)] / np.linalg.norm(step.reshape(len(step), -1), axis=1))[
        :, None, None, None
    ]
    side = np.where(np.arange(len(step)) % 2, 1 - 1e-5, 1 + 1e-5)[:, None, None, None]   # just inside, just outside
    queries[::4] += (step * side).astype(np.float32)
    search = BallSearch(SHAPE)
    search.append(stored.reshape(BALLS, -1), radii)
    flat = queries.reshape(QUERIES, -1)

    def ours() -> list[set[int]]:
        return [set(rows[apart <= radii[rows]].tolist()) for rows, apart in search.near(flat, np.zeros(QUERIES))]

    tree = BallTree(stored.reshape(BALLS, -1).astype(np.float64), leaf_size=40)

    def ball_tree() -> list[set[int]]:
        found, apart = tree.query_radius(flat.astype(np.float64), radii.max(), return_distance=True)
        return [set(rows[d <= radii[rows]].tolist()) for rows, d in zip(found, apart, strict=True)]

    def brute() -> list[set[int]]:
        exact = stored.reshape(BALLS, -1).astype(np.float64)
        apart = [np.linalg.norm(exact - query, axis=1) for query in flat.astype(np.float64)]
        return [set(np.flatnonzero(row <= radii).tolist()) for row in apart]

    def timed(act: Callable[[], list[set[int]]]) -> tuple[list[set[int]], float]:
        begun = time.perf_counter()
        answer = act()
        return answer, time.perf_counter() - begun

    ours()
    (mine, fast), (theirs, slow), (truth, _) = timed(ours), timed(ball_tree), timed(brute)
    assert mine == truth
    assert sum(map(len, mine)) >= QUERIES // 8
    print(f"\n{BALLS:,} balls, {QUERIES} queries: ours {fast * 1e3:.0f} ms, BallTree {slow * 1e3:.0f} ms, "
          f"{slow / fast:.0f} times (goal 20); as brute force in float64: {mine == truth}, {theirs == truth}")
    benchmark.pedantic(ours, rounds=3)
    benchmark.extra_info["BallTree / ours"] = slow / fast
