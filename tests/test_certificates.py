"""Certificates: frozen, checked, and joined without losing a bit."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from closed_forms import certificates

from art_rs_plugins.theory.certificates import Certificates

ARRAYS = (
    "prediction", "radius", "abstained", "p_lower", "p_upper", "count", "runner_up_count",
    "n", "n0", "sigma", "alpha", "index", "seed",
)   # fmt: skip


def same(a: Certificates, b: Certificates) -> bool:
    fields = [f.name for f in dataclasses.fields(Certificates)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


def test_nothing_can_be_written() -> None:
    some = certificates([0.5, np.nan])
    for name in ARRAYS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(some, name)[0] = 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(some, name, None)


def test_later_changes_of_the_source_do_not_reach_it() -> None:
    source = np.array([0.5, 0.25])
    some = dataclasses.replace(certificates([0.0, 0.0]), radius=source)
    source[:] = 99.0
    assert some.radius.tolist() == [0.5, 0.25]


def test_scalars_are_spread_and_types_are_fixed() -> None:
    some = certificates([0.5, 0.25], alpha=0.01, n=200, count=150, seed=3)
    assert some.alpha.tolist() == [0.01, 0.01]
    assert some.n.tolist() == [200, 200]
    for name in ARRAYS:
        kind = getattr(some, name).dtype.kind
        real = name in ("radius", "p_lower", "p_upper", "sigma", "alpha")
        assert kind == ("b" if name == "abstained" else "f" if real else "i")


def test_indexing_picks_rows_of_every_array() -> None:
    some = certificates([0.1, np.nan, 0.3, 0.4], prediction=[4, 5, 6, 7])
    assert some[2].prediction.tolist() == [6]
    assert len(some[-1]) == 1
    assert some[1:3].index.tolist() == [1, 2]
    assert some[np.array([True, False, False, True])].radius.tolist() == [0.1, 0.4]
    assert some[[3, 0]].prediction.tolist() == [7, 4]
    assert len(some[:0]) == 0
    assert not some[[3, 0]].radius.flags.writeable
    with pytest.raises(IndexError):
        some[4]


def test_concatenate_undoes_slicing() -> None:
    some = certificates([0.1, np.nan, 0.3], prediction=[1, 2, 3], kind="exact")
    assert same(Certificates.concatenate([some[:1], some[1:1], some[1:]]), some)
    assert not same(Certificates.concatenate([some[1:], some[:1]]), some)


def test_concatenate_refuses_a_mixture() -> None:
    some = certificates([0.1])
    with pytest.raises(ValueError, match="at least one"):
        Certificates.concatenate([])
    with pytest.raises(ValueError, match="different kind"):
        Certificates.concatenate([some, certificates([0.1], kind="conditional")])
    with pytest.raises(ValueError, match="different norm"):
        Certificates.concatenate([some, certificates([0.1], norm=1.0)])


def test_holds_at_is_true_up_to_the_radius() -> None:
    some = certificates([0.5, np.nan, 0.0])
    assert some.holds_at(0.0).tolist() == [True, False, True]
    assert some.holds_at(0.5).tolist() == [True, False, False]
    assert some.holds_at(np.nextafter(0.5, 1)).tolist() == [False, False, False]
    for radius in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="radius must be finite and >= 0"):
            some.holds_at(radius)


@pytest.mark.parametrize("name", ["radius", "p_lower", "p_upper", "sigma", "alpha"])
def test_what_is_not_finite_is_refused(name: str) -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            dataclasses.replace(certificates([0.5]), **{name: np.array([value])})


@pytest.mark.parametrize("name", ["prediction", "count", "runner_up_count", "n", "n0", "index", "seed", "passes"])
def test_what_is_not_an_integer_is_refused(name: str) -> None:
    for value in (1.5, np.nan):
        with pytest.raises(TypeError, match=f"{name} must be integers"):
            dataclasses.replace(certificates([0.5]), **{name: np.array([value])})


def test_passes_are_those_of_the_draws_unless_said_otherwise() -> None:
    some = certificates([0.5, 0.5], n=np.array([1000, 960]))
    assert some.passes.tolist() == [1100, 1060]
    more = dataclasses.replace(some, passes=np.array([4400, 4800]))
    assert Certificates.concatenate([some, more])[1:3].passes.tolist() == [1060, 4400]


def test_false_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="0 where abstained"):
        certificates([0.5], abstained=np.array([True]))
    with pytest.raises(ValueError, match="radius must be >= 0"):
        certificates([-0.5])
    for count in (-1, 1001):
        with pytest.raises(ValueError, match="count must lie between 0 and n"):
            certificates([0.5], count=np.array([count]))
    with pytest.raises(ValueError, match="kind must be one of"):
        certificates([0.5], kind="proved")
    with pytest.raises(ValueError, match=r"prediction must have shape \(b,\)"):
        certificates([0.5], prediction=np.zeros((1, 1), int))
    with pytest.raises(ValueError, match="broadcast"):
        certificates([0.5, 0.5], alpha=np.array([0.1, 0.1, 0.1]))


def test_travels_between_processes() -> None:
    some = certificates([0.5, np.nan], kind="exact")
    for twin in (pickle.loads(pickle.dumps(some)), copy.deepcopy(some)):
        assert same(twin, some)
        assert not any(getattr(twin, name).flags.writeable for name in ARRAYS)
