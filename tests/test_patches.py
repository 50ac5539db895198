"""Geometry of patches against dense matrices, PyTorch's own resizing and exact enumeration."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from closed_forms import certificates
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from art_rs_plugins.theory.certificates import Certificates
from art_rs_plugins.theory.patches import (
    CertifiedVote,
    Pad,
    PatchCertificates,
    PatchGeometry,
    Placement,
    Repeat,
    Resize,
    frame_radius,
    sub_videos,
)

STACK, GRID = Placement.PER_PATCH, Placement.SHARED_RESIZED


def dense(geometry: PatchGeometry, *, cut: bool = True) -> np.ndarray:
    """The map itself, from basis vectors: cut into patches, or only resized."""
    size = int(np.prod(geometry.size))
    columns = []
    for basis in np.eye(size):
        v = basis.reshape(geometry.size)
        for axis, matrix in enumerate(geometry.matrices()):
            v = np.apply_along_axis(lambda line, matrix=matrix: matrix @ line, axis, v)
        boxes = [tuple(slice(a, a + p) for a, p in zip(o, geometry.patch, strict=True)) for o in geometry.offsets]
        columns.append(np.concatenate([v[box].ravel() for box in boxes]) if cut else v.ravel())
    return np.array(columns).T


def svd(geometry: PatchGeometry, *, cut: bool = True) -> float:
    return float(np.linalg.norm(dense(geometry, cut=cut), 2))


# ---------------------------------------------------------------------- resizing


@pytest.mark.parametrize("mode, antialias", [
    ("bilinear", False), ("bicubic", False), ("nearest", False), ("bilinear", True), ("bicubic", True),
])   # fmt: skip
def test_weights_are_those_of_pytorch(mode: str, antialias: bool) -> None:
    for old, new in [(1, 1), (1, 5), (5, 1), (8, 9), (9, 8), (32, 36), (30, 32), (7, 23), (23, 7), (64, 28), (40, 11)]:
        basis = torch.eye(old, dtype=torch.float64)[:, None, None, :]
        settings = {} if mode == "nearest" else {"align_corners": False, "antialias": antialias}
        expected = functional.interpolate(basis, size=(1, new), mode=mode, **settings)[:, 0, 0].T.numpy()
        found = Resize((1, new), mode, antialias).matrices((1, old))[1]
        assert found.shape == (new, old)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-12)


@given(st.integers(1, 40), st.integers(1, 40))
def test_nearest_copies_the_entry_that_exact_arithmetic_names(old: int, new: int) -> None:
    # PyTorch computes the place in float32, and takes its neighbour at 26 -> 22 and 39 -> 33
    (matrix,) = Resize((new,), "nearest").matrices((old,))
    for row in range(new):
        assert np.flatnonzero(matrix[row]).tolist() == [row * old // new]


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize("old, new, mode, norm", [
    (32, 36, "bilinear", 1.1300), (30, 32, "bilinear", 1.0699), (224, 256, "bilinear", 1.1483),
    (224, 384, "bilinear", 1.7184), (224, 512, "bilinear", 2.2874), (224, 640, "bilinear", 2.8574),
    (32, 36, "bicubic", 1.1678), (32, 36, "nearest", 2.0),
])   # fmt: skip
def test_norms_of_resizing(old: int, new: int, mode: str, norm: float) -> None:
    geometry = PatchGeometry.grid((old, old), new, 1, before=Resize((new, new), mode))
    assert geometry.norm(GRID) == pytest.approx(norm, abs=1e-3 if mode != "nearest" else 0.0)
    assert geometry.norm(STACK) == pytest.approx(geometry.norm(GRID), rel=1e-11)   # one patch, the whole
    assert geometry.norm(Placement.SHARED_INPUT) == 1.0


@pytest.mark.parametrize("stride, m, norm", [(1, 25, 5.6393), (2, 9, 3.3834), (4, 4, 2.2555)])
def test_norms_of_stacks_of_resized_images(stride: int, m: int, norm: float) -> None:
    geometry = PatchGeometry.grid((32, 32), 32, stride, before=Resize((36, 36)))
    assert len(geometry.offsets) == m
    assert geometry.norm(STACK) == pytest.approx(norm, abs=1e-4)


def test_norms_against_dense_matrices() -> None:
    grid = PatchGeometry.grid((8, 8), 8, 1, before=Resize((9, 9)))
    assert (grid.norm(GRID), grid.norm(STACK)) == (pytest.approx(1.13003, abs=1e-5), pytest.approx(2.16943, abs=1e-5))
    assert grid.norm(STACK) == pytest.approx(svd(grid), rel=1e-11)
    assert PatchGeometry.grid((32, 32), 30, 2).norm(STACK) == 2.0   # no rounding where coverage says it all

    crops = PatchGeometry.random((256, 256), 224, 16, seed=0)
    assert crops.norm(STACK) == 4.0
    assert (crops.coverage() == 16).sum() >= 192**2


BEFORE = st.one_of(
    st.none(),
    st.builds(Pad, st.integers(0, 2)),
    st.builds(
        Resize,
        st.tuples(st.integers(5, 9), st.integers(5, 9)),
        st.sampled_from(["bilinear", "bicubic", "nearest"]),
    ),
    st.builds(Repeat, st.integers(1, 9)),
)


@given(BEFORE, st.tuples(*[st.integers(4, 6)] * 2), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_no_norm_is_below_the_svd(before, size: tuple[int, int], patch: int, m: int, seed: int) -> None:
    canvas = size if before is None else [len(matrix) for matrix in before.matrices(size)]
    places = math.prod(side - patch + 1 for side in canvas)
    geometry = PatchGeometry.random(size, patch, min(m, places), seed=seed, before=before)
    for placement, cut in ((GRID, False), (STACK, True)):
        true, bound = svd(geometry, cut=cut), geometry.norm(placement)
        assert bound >= true * (1.0 - 1e-14)
        simple = np.sqrt(geometry.coverage().max()) * geometry.norm(GRID) if cut else true
        assert bound <= simple * (1.0 + 1e-9)
        if not (isinstance(before, Resize) and before.mode == "bicubic" and cut):   # negative weights
            assert bound <= true * (1.0 + 1e-5)


def test_a_large_stack_that_is_no_grid_is_bounded_from_above() -> None:
    # power iteration, stopped early and stretched by 1e-4, ends below the norm here
    geometry = PatchGeometry.random((224, 224), 224, 8, seed=0, before=Resize((256, 256)))
    across, down = geometry.matrices()
    counts, bound = geometry.coverage(), geometry.norm(STACK)

    def rayleigh(v: np.ndarray, steps: int) -> float:
        """Below the norm, whatever v is."""
        for _ in range(steps):
            v = across.T @ (counts * (across @ v @ down.T)) @ down
            v /= np.linalg.norm(v)
        return float(np.sqrt(np.sum(counts * (across @ v @ down.T) ** 2) / np.sum(v**2)))

    stopped = rayleigh(np.random.default_rng(0).random((224, 224)), 30)
    # smooth bumps, on what all patches see, do nearly as well as the bound says
    rows, cols = (np.flatnonzero(counts.max(axis=axis) == 8) for axis in (1, 0))
    waves = [np.zeros(256) for _ in range(2)]
    for wave, seen in zip(waves, (rows, cols), strict=True):
        wave[seen] = np.sin(np.linspace(0.0, np.pi, len(seen)))
    reached = rayleigh(across.T @ np.outer(*waves) @ down, 30)
    assert stopped * 1.0001 < reached <= bound < np.sqrt(8) * geometry.norm(GRID)
    assert bound < reached * 1.0002


def test_temporal_norms() -> None:
    starts = tuple((s,) for s in (0, 2, 4))
    clip = PatchGeometry((12,), (8,), starts)
    assert clip.coverage().tolist() == [1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1]
    assert clip.norm(STACK) == np.sqrt(3.0)
    with pytest.warns(UserWarning, match="only 1 of 3 offsets are distinct"):
        short = PatchGeometry((5,), (8,), ((0,),) * 3, before=Repeat(8))
    assert short.norm(STACK) == np.sqrt(12.0)   # the last frame is there four times, in three sub-videos
    assert short.norm(GRID) == 2.0
    assert clip.norm(Placement.SHARED_INPUT) == short.norm(Placement.SHARED_INPUT) == 1.0
    frames_and_rows = PatchGeometry((5, 4), (8, 4), ((0, 0),), before=Repeat(8))
    assert frames_and_rows.norm(STACK) == 2.0
    assert frames_and_rows.canvas == (8, 4)


def test_copies_of_one_patch_add_up() -> None:
    with pytest.warns(UserWarning, match="distinct"):
        geometry = PatchGeometry((6, 6), (4, 4), ((1, 1),) * 5)
    assert geometry.norm(STACK) == np.sqrt(5.0)


def test_one_draw_for_all_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="no radius is certified under COMMON_PATCH"):
        PatchGeometry.grid((4, 4), 2, 2).norm(Placement.COMMON_PATCH)


# ---------------------------------------------------------------------- where patches lie


def test_coverage_of_the_fixture() -> None:
    geometry = PatchGeometry.grid((8, 8), 6, 1)
    assert geometry.coverage()[2].tolist() == [3, 6, 9, 9, 9, 9, 6, 3]
    assert (geometry.coverage() ** 2).sum() == 2116
    assert geometry.norm(STACK) == 3.0
    assert geometry.offsets[:4] == ((0, 0), (0, 1), (0, 2), (1, 0))


def test_a_stride_that_does_not_divide_says_so() -> None:
    with pytest.warns(UserWarning, match=r"no patch sees the last \[1, 1\] entries"):
        geometry = PatchGeometry.grid((9, 9), 6, 2)
    assert geometry.offsets == tuple(itertools.product((0, 2), repeat=2))
    counts = geometry.coverage()
    assert (counts == 0).sum() == 17
    assert not counts[:, 8].any()
    assert not counts[8].any()


def test_random_places_reach_both_ends_and_are_distinct() -> None:
    drawn = [PatchGeometry.random((9, 7), 6, 3, seed=seed) for seed in range(60)]
    assert {o for g in drawn for o in g.offsets} == set(itertools.product(range(4), range(2)))
    assert all(len(set(g.offsets)) == 3 for g in drawn)
    assert drawn[3] == PatchGeometry.random((9, 7), 6, 3, seed=3) != drawn[4]
    assert PatchGeometry.random((6, 6), 6, 1, seed=0).offsets == ((0, 0),)
    with pytest.raises(ValueError, match=r"m must lie in \[1, 1\]"):
        PatchGeometry.random((6, 6), 6, 2, seed=0)


def test_corners() -> None:
    assert PatchGeometry.corners((8, 9), 6).offsets == ((0, 0), (0, 3), (2, 0), (2, 3), (1, 1))
    assert PatchGeometry.corners((6, 6), 6).offsets == ((0, 0),)
    assert PatchGeometry.corners((32, 32), 32, before=Pad(4)).offsets[3] == (8, 8)


def test_a_geometry_is_a_value() -> None:
    geometry = PatchGeometry.corners((8, 8), 6, before=Resize((9, 9)))
    assert pickle.loads(pickle.dumps(geometry)) == geometry
    assert hash(geometry) == hash(pickle.loads(pickle.dumps(geometry)))


@pytest.mark.parametrize("call, message", [
    (lambda: PatchGeometry((8, 8), (6, 6), ((0, 3),)), r"offsets must lie in \[0, canvas - patch\]"),
    (lambda: PatchGeometry((8, 8), (6, 6), ((-1, 0),)), "offsets must be >= 0"),
    (lambda: PatchGeometry((8, 8), (9, 6), ((0, 0),)), "patch .* is larger"),
    (lambda: PatchGeometry((8, 8), (6,), ((0, 0),)), "patch must be >= 1, one for each of 2 axes"),
    (lambda: PatchGeometry((8, 8), (6, 6), ()), "must not be empty"),
    (lambda: PatchGeometry.grid((8, 8), 9, 1), "patch 9 is larger"),
    (lambda: PatchGeometry.grid((8, 8), 6, 0), "stride must be >= 1"),
    (lambda: Resize((0, 8)), "size must be >= 1"),
    (lambda: Resize((8, 8), "lanczos"), "mode must be"),
    (lambda: Resize((8, 8), "nearest", True), "antialias needs"),
    (lambda: Pad(-1), "width must be >= 0"),
    (lambda: Repeat(0), "length must be >= 1"),
    (lambda: PatchGeometry((8, 8), (6, 6), ((0, 0),), Resize((8,))), "one for each of 2 axes"),
    (lambda: sub_videos(20, 16, (5,), 8), r"starts must lie in \[0, 4\]"),
    (lambda: sub_videos(20, 16, (0,), 17), r"chunk must lie in \[1, length = 16\]"),
    (lambda: frame_radius([-1.0], 4), "radius must be finite"),
    (lambda: frame_radius(1.0, 0), "frames must be >= 1"),
])   # fmt: skip
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_floats_are_no_sizes() -> None:
    for call in (lambda: PatchGeometry((8.0, 8), (6, 6), ((0, 0),)), lambda: Pad(1.5), lambda: frame_radius(1.0, True)):
        with pytest.raises(TypeError, match="must be integers"):
            call()


# ---------------------------------------------------------------------- clips


def test_sub_videos_share_their_chunks() -> None:
    geometry, members = sub_videos(116, 64, (0, 16, 32, 48), 16)
    assert len(geometry.offsets) == 7
    assert sum(map(len, members)) == 16
    assert members[1] == (1, 2, 3, 4)
    assert len(sub_videos(64, 64, (0,), 8, 16)[1][0]) == 4
    assert len(sub_videos(64, 64, (0,), 8, 8)[1][0]) == 8
    short, members = sub_videos(5, 8, (0,), 8)
    assert short.before == Repeat(8)
    assert short.canvas == (8,)
    assert members == ((0,),)


def test_radii_of_frames() -> None:
    radius = frame_radius([0.5, 0.0], 100)
    np.testing.assert_allclose(radius, [0.05, 0.0], rtol=1e-11)
    assert radius[0] * np.sqrt(100) < 0.5
    for frames in (1, 2, 3, 7, 310):   # the worst clip within the frames' balls lies inside the clip's ball
        assert np.sqrt(frames) * frame_radius(0.7, frames) < 0.7


# ---------------------------------------------------------------------- certificates


def test_radii_side_by_side() -> None:
    plain = certificates([0.2, np.nan, 0.4], sigma=np.full(3, 0.1))
    found = PatchCertificates.of(plain, 3.0)
    np.testing.assert_allclose(found.radius, [0.2, 0.0, 0.4])
    np.testing.assert_allclose(found.raw_radius, [0.6, 0.0, 1.2])
    np.testing.assert_allclose(found.sigma, 0.3)
    assert found.passes.tolist() == [1100] * 3
    assert PatchCertificates.of(plain, 3.0, patches=9).passes.tolist() == [9900] * 3
    both = Certificates.concatenate([found[:1], found[[1, 2]]])
    assert isinstance(both, PatchCertificates)
    np.testing.assert_array_equal(both.raw_radius, found.raw_radius)
    copy = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(copy.raw_radius, found.raw_radius)
    with pytest.raises(ValueError, match="lift_norm must be finite and > 0"):
        PatchCertificates.of(plain, 0.0)


def split(radii: list[list[float]], classes: list[list[int]]) -> list[Certificates]:
    """Certificates of each patch, from rows of patches and columns of inputs."""
    return [certificates(r, prediction=c) for r, c in zip(radii, classes, strict=True)]


def test_vote_of_disjoint_patches() -> None:
    # three of three agree; two have to change, and the cheapest two are apart: sqrt(.3^2 + .4^2)
    geometry = PatchGeometry((1, 9), (1, 3), ((0, 0), (0, 3), (0, 6)))
    vote = CertifiedVote(geometry)
    found = vote.combine(split([[0.4, 0.4, 0.4, np.nan], [0.3, 0.3, np.nan, 0.3], [0.5, 0.5, np.nan, 0.1]],
                               [[1, 1, 1, 1], [1, 1, 1, 2], [1, 2, 1, 2]]))   # fmt: skip
    assert found.radius == pytest.approx([0.5, 0.3, 0.0, 0.1], rel=1e-11)
    assert np.all(found.radius <= [0.5, 0.3, 0.0, 0.1])
    assert found.abstained.tolist() == [False, False, True, False]
    assert found.prediction[[0, 1, 3]].tolist() == [1, 1, 2]
    np.testing.assert_allclose(found.alpha, 0.003)
    assert vote.level(0.003) == 0.001
    assert found.n.tolist() == [3000] * 4
    assert found.count.tolist() == [2850, 1900, 950, 1900]


def test_ties_lose_the_vote() -> None:
    geometry = PatchGeometry((1, 8), (1, 2), tuple((0, a) for a in (0, 2, 4, 6)))
    found = CertifiedVote(geometry).combine(split([[0.2], [0.2], [0.9], [0.9]], [[0], [0], [1], [1]]))
    assert found.abstained.all()
    three = CertifiedVote(geometry).combine(split([[0.2], [0.3], [0.9], [0.9]], [[0], [0], [0], [1]]))
    assert three.radius == pytest.approx([0.2], rel=1e-11)   # one change ties


@given(st.lists(st.floats(0.01, 2.0), min_size=2, max_size=4), st.integers(0, 99), st.booleans())
def test_vote_never_exceeds_a_change_that_is_found(radii: list[float], seed: int, resized: bool) -> None:
    # the classifier of each patch changes at its radius, in every direction; search for a short way to change enough
    m, rng = len(radii), np.random.default_rng(seed)
    geometry = PatchGeometry.random((4, 4), 3, m, seed=seed, before=Resize((6, 5)) if resized else None)
    found = CertifiedVote(geometry).combine(split([[r] for r in radii], [[0]] * m))
    patches = dense(geometry).reshape(m, 9, 16)
    best = np.inf
    for chosen in itertools.combinations(range(m), m - m // 2):
        weights = rng.dirichlet(np.ones(len(chosen)), size=30) / np.array(radii)[list(chosen)]
        directions = [np.linalg.svd(np.concatenate([w * patches[i] for w, i in zip(row, chosen, strict=True)]))[2][0]
                      for row in weights]   # fmt: skip
        moved = np.linalg.norm(np.einsum("mpd,rd->rmp", patches, np.array(directions)), axis=2)[:, list(chosen)]
        best = min(best, (np.array(radii)[list(chosen)] / moved.clip(1e-9)).max(axis=1).min())
    assert 0.0 < float(found.radius[0]) <= best


def test_overlap_is_what_weakens_the_vote() -> None:
    apart = PatchGeometry((1, 9), (1, 3), ((0, 0), (0, 3), (0, 6)))
    with pytest.warns(UserWarning, match="distinct"):
        same = PatchGeometry((1, 9), (1, 3), ((0, 0),) * 3)
    patches = split([[0.4], [0.4], [0.4]], [[0]] * 3)
    assert CertifiedVote(apart).combine(patches).radius == pytest.approx([0.4 * np.sqrt(2)])
    assert CertifiedVote(same).combine(patches).radius == pytest.approx([0.4])   # one perturbation changes all three
    with pytest.raises(ValueError, match="each of 3 patches, got 2"):
        CertifiedVote(apart).combine(patches[:2])
    with pytest.raises(ValueError, match="l2 certificates of one kind and performance"):
        CertifiedVote(apart).combine([*patches[:2], certificates([0.4], kind="conditional")])
    with pytest.raises(ValueError, match="l2 certificates of one kind and performance"):
        CertifiedVote(apart).combine([*patches[:2], certificates([0.4], performance="bfloat16")])
    assert CertifiedVote(apart).combine(patches).passes.tolist() == [3300]
