"""A recorded batch counts what the batch itself counts. The recording is a GPU's; all else is tested on any machine."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import X, digits_network, smooth

from art_rs_plugins import Gaussian, GridGaussian, Performance
from art_rs_plugins.smoothing import graphs, sampling
from art_rs_plugins.smoothing.graphs import BatchGraph, batch_graph
from art_rs_plugins.smoothing.modules import BaseClassifier
from art_rs_plugins.smoothing.noise import Key, Stage
from art_rs_plugins.smoothing.performance import Voter
from art_rs_plugins.smoothing.sampling import make_sampler
from art_rs_plugins.smoothing.video import Lifted

IMAGES = torch.from_numpy((X[:7] * 255).round() / 255)


def recorder(record, generators):
    """What a device does: the same work, at the same places, whenever it is replayed."""
    assert list(generators) == []
    result = record()
    return lambda: result.copy_(record()), result


def sampler(f, noise, block=300):
    return make_sampler(
        f, IMAGES, noise, 250, num_classes=10, seed=3, indices=None, stage=Stage.ESTIMATION, block=block
    )


@pytest.fixture
def f():
    return Voter(BaseClassifier(digits_network()), Performance(channels_last=True))


@pytest.mark.parametrize("noise", [Gaussian(0.25), GridGaussian(0.25)])
def test_votes_are_those_of_the_batches_bit_for_bit(f, noise, monkeypatch):
    rows = np.array([5, 0, 3, 6, 1])
    plain = sampler(f, noise).count(rows, 0, 250)
    recorded = []

    def keep(*batch):
        recorded.append(batch_graph(*batch, capture=recorder))
        return recorded[-1]

    monkeypatch.setattr(sampling, "batch_graph", keep)
    f.graphs = {}
    assert torch.equal(sampler(f, noise).count(rows, 0, 250), plain)
    assert torch.equal(sampler(f, noise).count(rows[:2], 100, 250), sampler_without(f, noise).count(rows[:2], 100, 250))
    if isinstance(noise, GridGaussian):
        assert recorded == []   # reads tables that a graph would not keep
    else:
        assert len(recorded) == len(f.graphs) == 1   # the last batch is padded, so one graph serves them all
        assert recorded[0] is not None
    assert not torch.equal(plain, replace(sampler(f, noise), seed=4).count(rows, 0, 250))


def sampler_without(f, noise):
    """A sampler whose network keeps no graphs."""
    return sampler(lambda noisy: f(noisy), noise)


def test_each_noise_level_and_shape_has_a_graph_and_few_are_kept(f, monkeypatch):
    monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=recorder))
    f.graphs = {}
    for sigma in np.linspace(0.1, 0.5, 20):
        found = sampler(f, Gaussian(float(sigma))).count(np.arange(7), 0, 250)
        assert torch.equal(found, sampler_without(f, Gaussian(float(sigma))).count(np.arange(7), 0, 250))
        assert 1 <= len(f.graphs) <= sampling.GRAPHS
    before = dict(f.graphs)
    mixed = Gaussian(np.linspace(0.1, 0.5, 7))   # no graph knows which slot gets which level
    assert torch.equal(
        sampler(f, mixed).count(np.arange(7), 0, 250), sampler_without(f, mixed).count(np.arange(7), 0, 250)
    )
    assert f.graphs == before


def frozen_draws(record, generators):
    """A recording that repeats the draws that it was recorded with."""
    result = record()
    return lambda: None, result


def wrong_votes(record, generators):
    result = record()
    return lambda: result.copy_(record().flip(1)), result


def keeping(name):
    """A recording that keeps the inputs, or the limits, of the batch that it was recorded with."""

    def recording(record, generators):
        graph = record.__closure__[[*record.__code__.co_freevars].index("self")].cell_contents
        result, kept = record(), getattr(graph, name).clone()

        def replay():
            getattr(graph, name).copy_(kept)
            result.copy_(record())

        return replay, result

    return recording


def test_draws_are_told_apart_where_features_hide_them_and_where_there_is_one(monkeypatch):
    """With inputs that dwarf the noise, or a single number, the recording of old draws is still found out."""
    for x in (torch.tensor([[30.0, 5e4, 1.0, 2.0]]), torch.tensor([[0.5]])):
        f = Voter(BaseClassifier(torch.nn.Linear(x.shape[1], 2).eval()), Performance(channels_last=True))
        f.graphs = {}
        monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=frozen_draws))
        settings = {"num_classes": 2, "seed": 0, "indices": None, "stage": Stage.ESTIMATION, "block": 100}
        with pytest.warns(RuntimeWarning, match="its votes differ"):
            make_sampler(f, x, Gaussian(0.25), 200, **settings).count(np.arange(1), 0, 200)


def test_sigmas_that_print_alike_have_graphs_of_their_own(f, monkeypatch):
    monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=recorder))
    f.graphs = {}
    for sigma in (0.5, 0.5 + 1e-9):
        sampler(f, Gaussian(sigma)).count(np.arange(2), 0, 250)
    assert len(f.graphs) == 2
    sampler(f, Gaussian(np.full(7, 0.7))).count(np.arange(2), 0, 250)   # one for each input, though all the same
    assert len(f.graphs) == 2


def test_calls_in_inference_mode_and_without_it_share_a_graph(f, monkeypatch):
    monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=recorder))
    f.graphs = {}
    with torch.inference_mode():
        first = sampler(f, Gaussian(0.25)).count(np.arange(7), 0, 250)
    assert torch.equal(sampler(f, Gaussian(0.25)).count(np.arange(7), 0, 250), first)


def test_networks_of_the_user_keep_their_attributes():
    network = digits_network()
    network.graphs, network.passed = {i: i for i in range(9)}, 3
    found = sampler(network.eval(), Gaussian(0.25)).count(np.arange(7), 0, 250)
    assert int(found.sum()) == 7 * 250
    assert (len(network.graphs), network.passed) == (9, 3)


@pytest.mark.parametrize("recording", [frozen_draws, wrong_votes, keeping("picked"), keeping("limit")])
@pytest.mark.parametrize("sure", [False, True])
def test_a_graph_that_counts_otherwise_is_not_used(f, monkeypatch, recording, sure):
    """Repeated draws would make every certificate false; a network that is sure of its class hides them."""
    if sure:
        monkeypatch.setattr(Voter, "forward", lambda self, noisy: torch.eye(10)[[4]].expand(len(noisy), 10))
    elif recording is wrong_votes:
        monkeypatch.setattr(sampling, "_projected", lambda directions, noisy: noisy.new_zeros(len(noisy), 10))
    monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=recording))
    f.graphs = {}
    with pytest.warns(RuntimeWarning, match="without a graph of the device: its votes differ"):
        found = sampler(f, Gaussian(0.25)).count(np.arange(7), 0, 250)
    assert torch.equal(found, sampler_without(f, Gaussian(0.25)).count(np.arange(7), 0, 250))
    with warnings.catch_warnings():
        warnings.simplefilter("error")   # said once
        assert torch.equal(sampler(f, Gaussian(0.25)).count(np.arange(7), 0, 250), found)
    assert list(f.graphs.values()) == [None]


def test_a_device_that_cannot_record_counts_all_the_same(f, monkeypatch):
    def failing(record, generators):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(sampling, "batch_graph", lambda *batch: batch_graph(*batch, capture=failing))
    f.graphs = {}
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing$"):
        found = sampler(f, Gaussian(0.25)).count(np.arange(7), 0, 250)
    assert torch.equal(found, sampler_without(f, Gaussian(0.25)).count(np.arange(7), 0, 250))


def test_a_replay_that_keeps_old_inputs_would_be_seen():
    """Negative control of the tests above: they notice inputs, limits and keys that stay behind."""
    keys = [Key(0, i, Stage.ESTIMATION, 0) for i in range(2)]

    def step(picked, sources, limit):
        return torch.stack([picked.sum(1).long(), limit, torch.tensor([key.index for key in sources])], dim=1)

    graph = BatchGraph(step, torch.ones(2, 3), keys, torch.tensor([5, 6]), recorder)
    assert graph.votes.tolist() == [[3, 5, 0], [3, 6, 1]]
    others = [Key(0, i, Stage.ESTIMATION, 0) for i in (8, 9)]
    assert graph(torch.full((2, 3), 2.0), others, torch.tensor([7, 8])).tolist() == [[6, 7, 8], [6, 8, 9]]


def test_only_compiled_networks_on_cuda_keep_graphs(f):
    assert f.graphs is None
    assert Voter(BaseClassifier(digits_network()), Performance(compile=True)).graphs is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("noise", [Gaussian(0.25), Lifted(Gaussian(0.25), 2.0)])
def test_on_a_gpu_a_graph_is_recorded_and_counts_alike(noise):
    network = digits_network().cuda()
    f = Voter(BaseClassifier(network), Performance(channels_last=True))
    x = IMAGES.cuda()
    settings = {"num_classes": 10, "seed": 3, "indices": None, "stage": Stage.ESTIMATION, "block": 300}
    plain = make_sampler(f, x, noise, 2_000, **settings).count(np.arange(7), 0, 2_000)
    f.graphs = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = make_sampler(f, x, noise, 2_000, **settings).count(np.arange(7), 0, 2_000)
    assert torch.equal(found, plain)
    assert isinstance(next(iter(f.graphs.values())), graphs.BatchGraph)
    estimator = smooth(digits_network(), performance=Performance(compile=True), device_type="gpu")
    first = estimator.certificates(X[:4], n=3_000, seed=1)
    assert np.array_equal(first.count, estimator.certificates(X[:4], n=3_000, seed=1, batch_size=2).count)
