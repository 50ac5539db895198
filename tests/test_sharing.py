"""Estimators of one network share their votes, and nothing else: the same bits, in fewer forward passes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import TEST, X, digits_network, smooth
from torch import nn

from art_rs_plugins import (
    Cascade,
    Certificates,
    Conditional,
    Envelope,
    Gaussian,
    GridGaussian,
    PatchGeometry,
    Performance,
    PyTorchInstaRS,
    PyTorchSmoothedClassifier,
    PyTorchSmoothReduce,
    Selector,
    SequentialScales,
    share_votes,
)
from art_rs_plugins.benchmark import suite as suites
from art_rs_plugins.benchmark.config import RULES, RunConfig
from art_rs_plugins.benchmark.models import build
from art_rs_plugins.benchmark.records import read_record
from art_rs_plugins.benchmark.runs import certify, certify_together
from art_rs_plugins.benchmark.workers import Group, Task, Together
from art_rs_plugins.smoothing.scales import predict_scales
from art_rs_plugins.smoothing.sigma import MultiStartSearch
from art_rs_plugins.theory.patches import Pad, Placement

INPUTS, INDICES = np.round(X[TEST][:6] * 255) / np.float32(255), np.arange(10, 16)
BLOCK = Performance(channels_last=True, block=100)   # one chunk of draws in a pass, so that none is padded
BLOCKS = Performance(channels_last=True)


class Counting(nn.Module):
    """A network that counts the rows that it, or any copy of it, is asked about."""

    rows: ClassVar[list[int]] = []

    def __init__(self, seed: int = 0, outputs: int = 10) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = digits_network(seed) if outputs == 10 else nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return self.inner(x)


def insta(network: nn.Module, certificate: Any, **settings: Any) -> PyTorchInstaRS:
    settings = {"scale": 0.25, "device_type": "cpu", "sample_size": 100, **settings}
    return PyTorchInstaRS(network, nn.CrossEntropyLoss(), (1, 8, 8), 10, certificate=certificate, **settings)


def asked(
    estimators: list[PyTorchSmoothedClassifier], together: bool, **settings: Any
) -> tuple[list[Certificates], int]:
    """Certificates, and the rows of the forward passes behind them less those of probes."""
    settings = {"n": 500, "n0": 100, "seed": 3, "indices": INDICES, **settings}
    Counting.rows.clear()
    if together:
        with share_votes(*estimators):
            found = [each.certificates(INPUTS, **settings) for each in estimators]
    else:
        found = [each.certificates(INPUTS, **settings) for each in estimators]
    return found, sum(rows for rows in Counting.rows if rows > 4)


def same(a: Certificates, b: Certificates) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in (
        "prediction", "radius", "abstained", "p_lower", "p_upper", "count", "runner_up_count", "n", "n0", "sigma",
        "alpha", "index", "seed", "passes",
    ))   # fmt: skip


def family(network: nn.Module, **settings: Any) -> list[PyTorchSmoothedClassifier]:
    chooser = insta(network, Selector((0.25, 0.5), 0.25), **settings)
    chooser.selector = Counting(1, outputs=2).eval()
    return [
        insta(network, Envelope((0.25, 0.5)), **settings),
        insta(network, Cascade((0.5, 0.25), 0.6), **settings),
        chooser,
        insta(network, Conditional(MultiStartSearch(draws=20, evaluations=3)), **settings),
        smooth(network, scale=0.25, **settings),
        smooth(network, scale=0.5, alpha=0.01, **settings),
    ]


@pytest.mark.parametrize("radii", [None, (0.0, 0.1, 0.25)])
@pytest.mark.parametrize("performance", [BLOCK, Performance(dtype="bfloat16", block=100)])
def test_the_same_bits_in_fewer_passes(radii, performance):
    estimators = family(Counting().eval(), performance=performance)
    alone, many = asked(estimators, False, radii=radii)
    shared, few = asked(estimators, True, radii=radii)
    assert all(map(same, alone, shared))
    envelope, cascade, selector, conditional, plain, wide = (int(found.passes.sum()) for found in alone)
    assert many >= envelope + cascade + selector + conditional + plain + wide
    # what the envelope has not asked is asked once: levels of the selector itself, the search, and longer runs
    own = sum(int(found.passes.sum()) for found in alone[2:4])
    assert few <= envelope + own + (0 if radii is None else cascade + plain + wide) // 2
    if radii is None:
        assert few < many - cascade - plain - wide + 100   # the envelope has all their votes at n draws


def test_after_the_block_nothing_is_kept():
    network = Counting().eval()
    first, second = smooth(network, performance=BLOCK), insta(network, Envelope((0.25, 0.5)), performance=BLOCK)
    _, few = asked([first, second], True)
    _, again = asked([first, second], True)
    assert few == again > 0
    _, many = asked([first, second], False)
    assert many == few + 6 * 600   # sigma .25 is asked twice


def voters(first: PyTorchSmoothedClassifier, second: PyTorchSmoothedClassifier) -> int:
    """Rows that sharing saves two estimators; their certificates have to stay their own."""
    alone, many = asked([first, second], False)
    shared, few = asked([first, second], True)
    assert all(map(same, alone, shared))
    return many - few


def test_only_what_agrees_is_shared():
    network = Counting().eval()
    plain = smooth(network, performance=BLOCK)
    assert voters(plain, smooth(network, performance=BLOCK)) == 6 * 600
    others = [
        smooth(network, performance=BLOCK, scale=0.3),
        smooth(Counting(1).eval(), performance=BLOCK),
        smooth(Counting().eval(), performance=BLOCK),   # equal weights in another object: to be safe, not compared
        smooth(network, performance=Performance(channels_last=True, dtype="bfloat16", block=100)),
        smooth(network, performance=Performance(channels_last=True, block=50)),
        smooth(network, performance=BLOCK, preprocessing=(0.5, 2.0)),
        smooth(network, performance=BLOCK, noise=GridGaussian, clip_values=(0.0, 1.0)),
    ]
    for other in others:
        assert voters(plain, other) == 0


def test_another_seed_index_or_input_has_votes_of_its_own():
    network = Counting().eval()
    first, second = smooth(network, performance=BLOCK), smooth(network, performance=BLOCK)
    settings: dict[str, Any] = {"n": 500, "n0": 100, "seed": 3, "indices": INDICES}
    for changes, x in (({"seed": 4}, INPUTS), ({"indices": INDICES + 100}, INPUTS), ({}, X[TEST][50:56])):
        expected = second.certificates(x, **{**settings, **changes})
        with share_votes(first, second):
            first.certificates(INPUTS, **settings)
            assert same(second.certificates(x, **{**settings, **changes}), expected)
    nudged = INPUTS.copy()
    nudged[0, 0, 0, 0] = np.nextafter(nudged[0, 0, 0, 0], np.float32(2.0))
    Counting.rows.clear()
    with share_votes(first, second):
        first.certificates(INPUTS, **settings), second.certificates(nudged, **settings)
    assert sum(rows for rows in Counting.rows if rows > 4) == 6 * 600 + 600


@pytest.mark.parametrize("sizes", [(500, 450, 130, 80, 50), (50, 80, 130, 450, 500)])
def test_shorter_and_longer_runs_are_not_mixed_up(sizes):
    network = Counting().eval()
    estimators = [smooth(network, performance=BLOCK) for _ in sizes]
    settings = [{"n": n, "n0": n0, "seed": 3, "indices": INDICES} for n in sizes for n0 in (100, 60)]
    expected = [estimators[0].certificates(INPUTS, **each) for each in settings]
    with share_votes(*estimators):
        found = [estimators[i // 2].certificates(INPUTS, **each) for i, each in enumerate(settings)]
    assert all(map(same, found, expected))


def test_new_weights_are_asked_again_within_the_block():
    network = Counting().eval()
    first, second = smooth(network, performance=BLOCK), smooth(network, performance=BLOCK)
    settings: dict[str, Any] = {"n": 500, "n0": 100, "seed": 3, "indices": INDICES}
    with share_votes(first, second):
        before = first.certificates(INPUTS, **settings)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.data.mul_(-1.0)   # behind the back of autograd's counters
        after = second.certificates(INPUTS, **settings)
    assert same(after, smooth(network, performance=BLOCK).certificates(INPUTS, **settings))
    assert not np.array_equal(before.prediction, after.prediction)


def test_a_network_that_knows_how_to_fold_and_noise_behind_a_map_keep_their_bits():
    torch.manual_seed(0)
    resnet = build("resnet20", (3, 16, 16), 10, seed=0).eval()
    x, common = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32), {"n": 200, "n0": 100, "seed": 1}
    first, second = (smooth(resnet, (3, 16, 16), scale=0.25, performance=BLOCKS) for _ in range(2))
    expected = first.certificates(x, **common)
    with share_votes(first, second):
        assert same(second.certificates(x, **common), expected)
        assert same(first.certificates(x, **common), expected)
    grid = np.round(x * 255) / np.float32(255)
    settings: dict[str, Any] = {"geometry": PatchGeometry.corners((16, 16), 12, before=Pad(2)), "clip_values": (0, 1)}
    found, flat = {}, nn.Sequential(nn.Flatten(), nn.Linear(432, 10)).eval()
    for noise in (Gaussian, GridGaussian):
        reduced = PyTorchSmoothReduce(
            flat, nn.CrossEntropyLoss(), (3, 16, 16), 10, placement=Placement.SHARED_RESIZED, noise=noise,
            device_type="cpu", scale=0.25, performance=BLOCKS, **settings,
        )   # fmt: skip
        found[noise] = reduced.certificates(grid, **common)
    with share_votes(reduced):
        for noise, certificates in found.items():
            reduced.noise = noise
            assert same(reduced.certificates(grid, **common), certificates)
    assert not np.array_equal(found[Gaussian].count, found[GridGaussian].count)


def test_autocast_is_another_network():
    network = digits_network().eval()
    first, second = smooth(network, performance=BLOCK), smooth(network, performance=BLOCK)
    settings: dict[str, Any] = {"n": 500, "n0": 100, "seed": 3}
    expected = second.certificates(INPUTS, **settings)
    with share_votes(first, second):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = first.certificates(INPUTS, **settings)
        assert same(second.certificates(INPUTS, **settings), expected)
    assert not same(other, expected)


def test_threads_may_ask_at_once():
    network = digits_network().eval()
    estimators = [smooth(network, performance=BLOCK) for _ in range(4)]
    settings: dict[str, Any] = {"n": 500, "n0": 100, "seed": 3}
    expected = estimators[0].certificates(INPUTS, **settings)
    with share_votes(*estimators), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: each.certificates(INPUTS, **settings), estimators * 3))
    assert all(same(each, expected) for each in found)


def test_blocks_may_be_nested_overlap_and_end_with_an_error():
    network = Counting().eval()
    first, second = smooth(network, performance=BLOCK), smooth(network, performance=BLOCK)
    own, settings = [list(each._voters) for each in (first, second)], {"n": 500, "n0": 100, "seed": 3}

    def interrupted() -> None:
        with share_votes(first, second):
            with share_votes(first):
                first.certificates(INPUTS, **settings)
            first.certificates(INPUTS, **settings)
            Counting.rows.clear()
            second.certificates(INPUTS, **settings)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not Counting.rows
    blocks = [share_votes(first, second), share_votes(second, first)]
    for enter in (True, False):
        for block in blocks:
            block.__enter__() if enter else block.__exit__(None, None, None)
    assert [each._voters for each in (first, second)] == own
    assert getattr(first._voter(), "kept", None) is None
    assert [len(copy.deepcopy(first)._voters), len(pickle.loads(pickle.dumps(first))._voters)] == [1, 1]
    with pytest.raises(ValueError, match="at least one"), share_votes():
        pass
    with pytest.raises(TypeError, match="must be PyTorchSmoothedClassifier, got Counting"), share_votes(network):
        pass
    with pytest.raises(ValueError, match="performance must make a frozen copy"), share_votes(first, smooth(network)):
        pass
    assert [each._voters for each in (first, second)] == own


def test_an_answer_needs_no_radii() -> None:
    network, x, rule = digits_network().eval(), torch.from_numpy(INPUTS), Envelope((0.25, 0.5))
    settings: dict[str, Any] = {"num_classes": 10, "n": 200, "seed": 1}
    answers = [predict_scales(network, x, each, **settings) for each in (rule, SequentialScales(rule, (0.1, 0.2)))]
    assert np.array_equal(answers[0].prediction, answers[1].prediction)
    assert np.array_equal(answers[0].votes, answers[1].votes)
    assert np.array_equal(answers[0].abstained, answers[1].abstained)


# ---------------------------------------------------------------------------------------------- runs and suites

CONFIG = RunConfig(
    model="support:digits_network", device="cpu", n=300, n0=20, examples=":40", block=100, channels_last=True
)
LEVELS = {"sigmas": [0.25, 0.5]}
CONFIGS = [
    replace(CONFIG, rule="one-sided"),
    replace(CONFIG, rule="two-sided"),
    replace(CONFIG, method="insta-rs", options={"certificate": "envelope", **LEVELS}),
    replace(CONFIG, sigma=0.5, radii=(0.0, 0.1), alpha=0.01),
]


def rows(path: Path) -> list[list[str]]:
    """Cells of a record but for the seconds."""
    return [cells[:5] + cells[6:] for cells in (line.split("\t") for line in path.read_text().split("\n"))]


def test_runs_that_share_votes_record_what_each_alone_would(tmp_path: Path) -> None:
    alone = [certify(config, tmp_path / f"alone{i}.tsv") for i, config in enumerate(CONFIGS)]
    outputs = [tmp_path / f"{i}.tsv" for i in range(len(CONFIGS))]
    by_record = dict(zip(outputs, CONFIGS, strict=True))
    families = [{path: by_record[path] for path in group} for group in (outputs[:2], outputs[2:3], outputs[3:])]
    certify_together(families)
    assert [rows(path) for path in outputs] == [rows(record.path) for record in alone]
    manifests = [[read_record(path).manifest for path in paths] for paths in (outputs, [each.path for each in alone])]
    for together, apart in zip(*manifests, strict=True):
        assert {**together, "command": 0, "created": 0} == {**apart, "command": 0, "created": 0}
    for path, keep in zip(outputs, (41, 30, 3, 17), strict=True):   # one whole, the others stopped on the way
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]))
    certify_together(families)
    assert [rows(path) for path in outputs] == [rows(record.path) for record in alone]


def test_tasks_that_share_votes_travel_to_workers() -> None:
    network = digits_network().eval()
    estimators = [smooth(network, performance=BLOCK, alpha=alpha) for alpha in (0.001, 0.1)]
    together = Together(tuple(Task(each, {"n": 300, "n0": 20, "seed": 0}) for each in estimators))
    group = Group(INDICES, INPUTS, np.zeros(6, dtype=np.int64))
    there: Together = pickle.loads(pickle.dumps(together))
    for task in (together, there, there):
        assert all(map(same, task(group).certificates, [each(group).certificates[0] for each in together.tasks]))
    assert there.tasks[0].estimator.model.base is there.tasks[1].estimator.model.base


def test_runs_of_other_networks_or_inputs_share_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "a.tsv", tmp_path / "b.tsv"
    for change in ({"seed": 1}, {"examples": ":30"}, {"noise": "grid"}, {"channels_last": False}, {"data": "mnist"}):
        with pytest.raises(ValueError, match="must be of one network and the same inputs to share draws"):
            certify_together([{first: CONFIG}, {second: replace(CONFIG, **change)}])
    rules = [replace(CONFIG, options={"reduction": each}, rule=rule) for each, rule in zip("ab", RULES, strict=True)]
    for family in (rules, [CONFIG, replace(CONFIG, n=400)]):
        with pytest.raises(ValueError, match="each rule for each reduction in order"):
            certify_together([dict(zip((first, second), family, strict=True))])
    assert not list(tmp_path.iterdir())


SUITE = """
[run]
data = "digits"
model = "support:digits_network"
device = "cpu"
n = 300
n0 = 20
block = 100
channels_last = true
examples = ":40"
[[cell]]
name = "fixed"
[[cell]]
name = "envelope"
run = { method = "insta-rs", options = { certificate = "envelope", sigmas = [0.25, 0.5] } }
[[cell]]
name = "stale"
selector = { examples = "::100", model = "mlp" }
run = { method = "insta-rs", options = { certificate = "selector", sigmas = [0.25, 0.5], selector_sigma = 0.5 } }
[[cell]]
name = "broken"
run = { method = "insta-rs", options = { certificate = "envelope" } }
[[cell]]
name = "wide"
run = { sigma = 0.5, n = 200 }
[[cell]]
name = "wide-again"
rules = ["one-sided"]
run = { sigma = 0.5, n = 200 }
[[cell]]
name = "other"
run = { dtype = "bfloat16" }
"""


def test_cells_of_one_network_share_votes_and_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "suite.toml").write_text(SUITE)
    read, groups = suites.read(str(tmp_path / "suite.toml")), []

    def watched(families: Any, **settings: Any) -> Any:
        groups.append([output.stem for family in families for output in family])
        return certify_together(families, **settings)

    monkeypatch.setattr(suites, "certify_together", watched)
    (tmp_path / "out").mkdir()
    stale = tmp_path / "out" / "stale.selector.safetensors"
    save_file({"weight": torch.zeros(1)}, stale, metadata={"chooser": "other"})
    done = suites.run(read, tmp_path / "out")
    assert [record.name for record in done.records] == ["fixed", "envelope", "wide", "wide-again.one-sided", "other"]
    assert list(done.failed) == ["stale", "broken"]
    assert "was trained otherwise" in done.failed["stale"]
    assert "needs the option sigmas" in done.failed["broken"]
    whole = ["fixed", "envelope", "broken", "wide", "wide-again.one-sided"]
    assert groups == [whole, *([name] for name in whole), ["other"]]   # what cannot be prepared parts no others
    groups.clear()
    kept = replace(read, cells=tuple(cell for cell in read.cells if cell.name not in done.failed))
    again = suites.run(kept, tmp_path / "b")
    assert groups == [[name for name in whole if name != "broken"], ["other"]]
    assert [rows(each.path) for each in again.records] == [rows(each.path) for each in done.records]
    (tmp_path / "b" / "envelope.tsv").unlink()   # what is whole is not voted on again
    (tmp_path / "b" / "envelope.manifest.json").unlink()
    asked, call = [], Task.__call__
    monkeypatch.setattr(Task, "__call__", lambda task, group: asked.append(type(task.estimator)) or call(task, group))
    once_more = suites.run(kept, tmp_path / "b")
    assert [rows(each.path) for each in once_more.records] == [rows(each.path) for each in done.records]
    assert set(asked) == {PyTorchInstaRS}
