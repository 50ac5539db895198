"""Clips: sub-videos that share their chunks, noise that padding repeats, files and moving digits."""

import builtins
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_forms import Linear, allowed
from support import DIGITS
from torch import Tensor, nn

from art_rs_plugins.benchmark.video import decode, moving_mnist
from art_rs_plugins.smoothing.certify import certify
from art_rs_plugins.smoothing.modules import PatchReduce
from art_rs_plugins.smoothing.noise import Gaussian, Key, Stage, standard_normal
from art_rs_plugins.smoothing.sampling import count_votes
from art_rs_plugins.smoothing.video import Max, Mean, SubVideos, Vote
from art_rs_plugins.theory.patches import PatchCertificates, PatchGeometry, Placement, Repeat, frame_radius, sub_videos
from art_rs_plugins.theory.rules import OneSided

RAW = Mean(softmax=False)
STACK = Placement.PER_PATCH


def normal(*shape: int, seed: int = 0) -> Tensor:
    return standard_normal(shape, Key(seed, 0, Stage.ATTACK, 7))


class Network(nn.Module):
    """A small 3-D network that counts the clips and frames it is shown."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.LazyLinear(classes))
        self.shown: list[int] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(len(x))
        return self.layers(x).mean(dim=1)


def of_clips(network: nn.Module, frames: int, length: int, starts, chunk: int, stride=None, reduction=None, **settings):
    geometry, members = sub_videos(frames, length, starts, chunk, stride)
    return PatchReduce(network, geometry, reduction=SubVideos(members, reduction or Mean()), **settings).eval()


def by_hand(network: nn.Module, x: Tensor, length: int, starts, chunk: int, stride: int, reduction) -> Tensor:
    """Sub-video by sub-video and chunk by chunk, as if nothing were shared."""
    if x.shape[2] < length:
        x = torch.cat([x, x[:, :, [-1] * (length - x.shape[2])]], dim=2)
    whole = []
    for start in starts:
        part = x[:, :, start : start + length]
        chunks = [network(part[:, :, at : at + chunk]) for at in range(0, length - chunk + 1, stride)]
        whole.append(torch.stack(chunks).mean(0))
    return reduction(torch.stack(whole))


def test_sub_videos_run_along_the_frames() -> None:
    x = normal(1, 3, 116, 4, 4)
    with pytest.warns(UserWarning, match=r"no patch sees the last \[4\]"):
        geometry = PatchGeometry.grid((116,), 64, 16)
    stack = PatchReduce(nn.Flatten(), geometry, placement=STACK).lift(x)
    assert stack.shape == (1, 4, 3, 64, 4, 4)   # four of them, and not one for each of three channels
    for number in range(4):
        assert torch.equal(stack[:, number], x[:, :, 16 * number : 16 * number + 64])


@pytest.mark.parametrize("reduction", [Mean(), RAW, Max(), Vote()])
@pytest.mark.parametrize("frames, length, starts, chunk, stride", [
    (20, 12, (0, 4, 8), 4, 4), (20, 12, (0, 3, 8), 4, 8), (16, 16, (0,), 4, 2), (5, 8, (0,), 4, 4), (5, 8, (0,), 8, 8),
    (9, 8, (0, 1), 3, 2),
])   # fmt: skip
def test_every_chunk_is_seen_once_and_nothing_changes(frames, length, starts, chunk, stride, reduction) -> None:
    network, x = Network(), normal(2, 3, frames, 5, 5, seed=1)
    f = of_clips(network, frames, length, starts, chunk, stride, reduction, block=2)
    f(x)
    network.shown.clear()
    scores = f(x)
    distinct = {start + at for start in starts for at in range(0, length - chunk + 1, stride)}
    assert network.shown == [2] * len(distinct)
    torch.testing.assert_close(scores, by_hand(network, x, length, starts, chunk, stride, reduction))


def test_shared_starts_on_the_chunk_grid_cost_one_pass_of_the_clip() -> None:
    network = Network()
    f = of_clips(network, 128, 64, range(0, 65, 16), 16)
    f(normal(2, 3, 128, 3, 3))
    network.shown.clear()
    count_votes(f, normal(1, 3, 128, 3, 3), Gaussian(0.5), 20, num_classes=4, seed=0, block=20)
    probes, draws = network.shown[:-1], network.shown[-1:]
    assert draws == [20 * 8]   # of 5 * 4 chunks of sub-videos, 8 are distinct
    assert sum(probes) == 3 * 4 * 8   # what the check of the network asks


def test_padded_frames_carry_the_noise_of_the_last_frame() -> None:
    seen: list[Tensor] = []

    class Record(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return x.flatten(1)[:, :2]

    f = of_clips(Record(), 5, 8, (0,), 8)
    assert f.lift_norm == 1.0
    z = f.lift(torch.zeros(1, 3, 5, 2, 2)) + 0.5 * normal(1, 3, 5, 2, 2)
    f(z)
    assert seen[0].shape == (1, 3, 8, 2, 2)
    assert torch.equal(seen[0][:, :, :5], z)
    for frame in (5, 6, 7):
        assert torch.equal(seen[0][:, :, frame], z[:, :, 4])


def test_noise_on_every_sub_video_is_paid_for() -> None:
    # a linear network on sub-videos of a short clip, all of them the same: published as sqrt(12) times too much
    w = torch.zeros(1, 8, 2, 2)
    w[:, 4:] = 1.0   # it looks at the repeated frames
    with pytest.warns(UserWarning, match="distinct"):
        copies = PatchGeometry((5,), (8,), ((0,),) * 3, before=Repeat(8))
    f = PatchReduce(Linear(w), copies, reduction=RAW, placement=STACK).eval()
    assert f.lift_norm == np.sqrt(12.0)
    x = torch.zeros(1, 1, 5, 2, 2)
    x[:, :, 4] = 0.05
    truth = 0.1   # of the last frame alone: four pixels of 0.05
    found = certify(f, f.lift(x), f.lifted(Gaussian(0.5)), num_classes=2, n=100_000, seed=0)
    found = PatchCertificates.of(found, f.lift_norm)
    assert 0.9 * truth < found.radius[0] < truth
    assert found.raw_radius[0] > 3.0 * truth
    shared = PatchReduce(Linear(w), copies, reduction=RAW).eval()
    plain = certify(shared, x, Gaussian(0.5), num_classes=2, n=100_000, seed=0)
    assert 0.9 * truth < plain.radius[0] < truth   # three copies and four repeats change nothing here


def test_noise_on_every_sub_video_follows_the_published_order() -> None:
    # chunks inside sub-videos as one network, noise behind the extraction of sub-videos
    network, x = Network(), normal(2, 3, 20, 5, 5)
    chunks = PatchReduce(network, PatchGeometry.grid((12,), 4, 4), reduction=RAW)
    geometry = PatchGeometry((20,), (12,), ((0,), (4,), (8,)))
    f = PatchReduce(chunks, geometry, placement=STACK).eval()
    assert f.lift_norm == np.sqrt(3.0)
    torch.testing.assert_close(f(f.lift(x)), by_hand(network, x, 12, (0, 4, 8), 4, 4, Mean()))


def test_radii_of_frames_keep_the_promise() -> None:
    # linear in three of the frames, equally: attacking just these is the worst case, and the corollary is sharp
    frames, alpha, trials, k = 12, 0.05, 800, 3
    f = of_clips(Linear(torch.ones(1, k, 2, 2) / np.sqrt(4.0 * k)), frames, k, (4,), k, reduction=RAW)
    x = torch.full((trials, 1, frames, 2, 2), 0.1)
    margin = 0.1 * np.sqrt(4.0 * k)   # of the clip
    worst = margin / np.sqrt(k)   # of each of the three frames
    np.testing.assert_allclose(f(x)[:, 0].detach(), margin, rtol=1e-5)
    settings = {"num_classes": 2, "n": 500, "n0": 20, "rule": OneSided(alpha), "seed": 3, "block": 1000}
    radius = certify(f, x, Gaussian(0.4), **settings).radius
    assert 0.2 * alpha * trials < (frame_radius(radius, k) > worst).sum() <= allowed(trials, alpha)
    assert (frame_radius(radius, k - 1) > worst).sum() > allowed(trials, alpha)   # one frame too few
    assert (frame_radius(radius, frames) < 0.6 * worst).all()


@pytest.mark.parametrize("call, message", [
    (lambda: SubVideos(()), "members must name"),
    (lambda: SubVideos(((0,), ())), "members must name"),
    (lambda: moving_mnist(np.zeros((2, 8, 8), np.float32)), r"images must have shape \(b, 1, h, w\)"),
    (lambda: moving_mnist(np.zeros((2, 1, 8, 8), np.float32), size=7), "with h and w at most 7"),
    (lambda: moving_mnist(np.zeros((2, 1, 8, 8), np.float32), indices=[1]), "indices must be integers"),
    (lambda: moving_mnist(np.zeros((2, 1, 8, 8), np.float32), frames=0), "frames must be at least 1"),
])   # fmt: skip
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------- moving digits

IMAGES = (DIGITS.images[:6, None] / 16.0).astype(np.float32)


def test_flights_depend_on_seed_and_index_alone() -> None:
    clips = moving_mnist(IMAGES, frames=9, size=20, seed=3)
    assert clips.shape == (6, 1, 9, 20, 20)
    assert clips.dtype == np.float32
    two = moving_mnist(IMAGES[[4, 1]], frames=9, size=20, seed=3, indices=[4, 1])
    np.testing.assert_array_equal(two, clips[[4, 1]])
    np.testing.assert_array_equal(moving_mnist(IMAGES, frames=5, size=20, seed=3), clips[:, :, :5])
    assert not np.array_equal(moving_mnist(IMAGES, frames=9, size=20, seed=4), clips)


def test_every_frame_shows_the_whole_digit_where_it_has_flown() -> None:
    for size in (8, 9, 20):
        for clip, image in zip(moving_mnist(IMAGES, frames=40, size=size)[:, 0], IMAGES[:, 0], strict=True):
            places = []
            for frame in clip:
                rows, columns = np.nonzero(frame)
                inside = np.nonzero(image)
                top, left = rows.min() - inside[0].min(), columns.min() - inside[1].min()
                np.testing.assert_array_equal(frame[top : top + 8, left : left + 8], image)
                assert frame.sum() == pytest.approx(image.sum())
                places.append((top, left))
            steps = np.abs(np.diff(places, axis=0))
            assert steps.max() <= 6   # at most 5 of speed, and rounding
            if size == 20:
                assert len(set(places)) > 10


# ---------------------------------------------------------------------- files


def written(path: Path, pictures: np.ndarray) -> Path:
    """A lossless clip of frames (f, h, w, 3) of bytes."""
    av = pytest.importorskip("av", reason="needs PyAV, the extra video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "bgr0"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_a_lossless_clip_comes_back(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (7, 24, 32, 3), dtype=np.uint8)
    path = written(tmp_path / "clip.mkv", pictures)
    clip = decode(path)
    assert clip.shape == (3, 7, 24, 32)
    assert clip.dtype == np.float32
    expected = pictures.transpose(3, 0, 1, 2) / np.float32(255.0)
    np.testing.assert_allclose(clip, expected, atol=1e-7)
    np.testing.assert_allclose(decode(path, frames=2, start=1, step=3), expected[:, [1, 4]], atol=1e-7)
    assert decode(path, frames=99, step=4).shape[1] == 2
    with pytest.raises(ValueError, match="no frame from number 7 on"):
        decode(path, start=7)

    small = decode(path, size=12)
    scaled = nn.functional.interpolate(
        torch.from_numpy(expected.transpose(1, 0, 2, 3).copy()), size=(12, 16), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(small, scaled[..., 2:14].transpose(0, 1).numpy(), atol=1e-5)
    assert decode(path, size=40).shape == (3, 7, 40, 40)


def test_what_is_no_clip_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av", reason="needs PyAV, the extra video")
    with pytest.raises(FileNotFoundError, match="no clip at"):
        decode(tmp_path / "absent.mkv")
    (tmp_path / "text.mkv").write_text("no video")
    with pytest.raises(ValueError, match="holds no video that can be decoded"):
        decode(tmp_path / "text.mkv")
    with pytest.raises(ValueError, match="size must be at least 1"):
        decode(tmp_path / "text.mkv", size=0)
    usual = builtins.__import__

    def without_av(name, *rest, **kwargs):
        if name == "av":
            raise ImportError(name)
        return usual(name, *rest, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(ImportError, match=r"pip install 'art-rs-plugins\[video\]'"):
        decode(tmp_path / "text.mkv")


def test_a_real_clip_is_certified_from_file_to_frames() -> None:
    pytest.importorskip("av", reason="needs PyAV, the extra video")
    folder = os.environ.get("ART_RS_SHARED_DATA")
    path = Path(folder or ".") / "video" / "video_0.mov"
    if folder is None or not path.is_file():
        pytest.skip("needs the clips of the folder that ART_RS_SHARED_DATA names")
    clip = decode(path, size=32)
    assert clip.shape[0] == 3
    assert clip.shape[2:] == (32, 32)
    assert 0.0 <= clip.min() < clip.max() <= 1.0
    f = of_clips(Network(), clip.shape[1], 8, (0,), 4)   # shorter than a sub-video
    with torch.no_grad():
        scores = f(torch.from_numpy(clip)[None])
    f.f.network.layers[-1].bias.data[int(scores.argmax())] += 5.0   # a class that is clear
    found = certify(f, torch.from_numpy(clip)[None], Gaussian(0.25), num_classes=4, n=200, seed=0)
    assert found.radius[0] > 0.25
    assert frame_radius(found.radius, clip.shape[1])[0] < found.radius[0] / np.sqrt(clip.shape[1])
