"""Clips as arrays: decoded from a file, or made of moving digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from art_rs_plugins.smoothing.noise import check_seed
from art_rs_plugins.smoothing.sampling import check_count
from art_rs_plugins.theory.patches import Resize

__all__ = ["decode", "moving_mnist"]


def decode(
    path: str | Path, *, frames: int | None = None, size: int | None = None, start: int = 0, step: int = 1
) -> NDArray[np.float32]:
    """Decode a clip.

    Parameters
    ----------
    path : str or Path
        A video file that FFmpeg knows.
    frames : int, optional
        Frames to keep at most; all of them by default.
    size : int, optional
        Scale the shorter side to this, with antialiasing, and cut out the centre; the frames as they are by default.
    start, step : int
        First frame, and from one to the next.

    Returns
    -------
    ndarray of float32, shape (3, frames, height, width)
        Red, green and blue in [0, 1], as stored: a rotation noted in the file is not applied. A certificate speaks of
        this array, not of the file.

    Raises
    ------
    ImportError
        Without PyAV, which the extra ``video`` installs.
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be decoded, holds no picture behind `start`, or a number is out of range.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "decoding a clip needs PyAV, which is not installed; run: pip install 'art-rs-plugins[video]'"
        ) from error
    start, step = check_count(start, "start", least=0), check_count(step, "step")
    limit = None if frames is None else check_count(frames, "frames")
    side = None if size is None else check_count(size, "size")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no clip at {path}")
    try:
        with av.open(str(path)) as container:
            stop = None if limit is None else start + step * limit
            pictures = [_scaled(picture, side) for picture in _pictures(container, start, stop, step)]
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} holds no video that can be decoded ({error})") from error
    if not pictures:
        raise ValueError(f"{path} holds no frame from number {start} on")
    return np.stack(pictures, axis=1)


def _pictures(container: Any, start: int, stop: int | None, step: int) -> Iterator[NDArray[np.uint8]]:
    """Frames (height, width, 3) of the first video stream."""
    for number, frame in enumerate(container.decode(container.streams.video[0])):
        if stop is not None and number >= stop:
            return
        if number >= start and (number - start) % step == 0:
            yield frame.to_ndarray(format="rgb24")


def _scaled(picture: NDArray[np.uint8], side: int | None) -> NDArray[np.float32]:
    """One frame (3, height, width) in [0, 1], scaled and cut to a square."""
    image = picture.astype(np.float64) / 255.0
    if side is not None:
        height, width = image.shape[:2]
        scale = side / min(height, width)
        new = (max(side, round(height * scale)), max(side, round(width * scale)))
        down, across = Resize(new, antialias=True).matrices((height, width))
        image = np.einsum("ah,hwc,bw->abc", down, image, across, optimize=True)
        top, left = (new[0] - side) // 2, (new[1] - side) // 2
        image = image[top : top + side, left : left + side]
    return np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32)


def moving_mnist(
    images: NDArray[np.float32],
    *,
    frames: int = 16,
    size: int = 64,
    seed: int = 0,
    indices: ArrayLike | None = None,
) -> NDArray[np.float32]:
    """Clips of single digits that fly straight and bounce off the border: moving MNIST, labelled by its digit.

    Parameters
    ----------
    images : ndarray of float32, shape (b, 1, h, w)
        One digit for each clip, such as ``load("mnist").x_test``.
    frames, size : int
        Frames of a clip, and height and width of each.
    seed : int
        Of the flights.
    indices : array_like of int, shape (b,), optional
        Index of each image in its data set; its position by default. A flight depends on (seed, index) alone.

    Returns
    -------
    ndarray of float32, shape (b, 1, frames, size, size)
        In the range of the images, on a background of 0.

    Raises
    ------
    ValueError, TypeError
        For images of the wrong shape or larger than `size`, or numbers out of range.

    Notes
    -----
    *Source.* Srivastava et al. (2015), "Unsupervised learning of video representations using LSTMs", with one digit in
    place of two.
    """
    frames, size, seed = check_count(frames, "frames"), check_count(size, "size"), check_seed(seed)
    images = np.asarray(images, dtype=np.float32)
    if images.ndim != 4 or images.shape[1] != 1 or max(images.shape[2:]) > size:
        raise ValueError(f"images must have shape (b, 1, h, w) with h and w at most {size}, got {images.shape}")
    keys = np.arange(len(images)) if indices is None else np.asarray(indices)
    if keys.shape != (len(images),) or keys.dtype.kind not in "iu" or np.any(keys < 0):
        raise ValueError(f"indices must be integers >= 0, one for each of {len(images)} images, got {indices!r}")
    height, width = images.shape[2:]
    clips = np.zeros((len(images), 1, frames, size, size), dtype=np.float32)
    for clip, image, key in zip(clips[:, 0], images[:, 0], keys.tolist(), strict=True):
        rng = np.random.default_rng([seed, key])
        angle, speed = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(2.0, 5.0)
        rows, columns = (
            _bounce(rng.uniform(0.0, room), speed * slope, room, frames)
            for room, slope in ((size - height, np.sin(angle)), (size - width, np.cos(angle)))
        )
        for frame, row, column in zip(clip, rows, columns, strict=True):
            frame[row : row + height, column : column + width] = image
    return clips


def _bounce(begin: float, velocity: float, room: int, frames: int) -> NDArray[np.int64]:
    """Positions in [0, room] of something that is thrown back at both ends."""
    if not room:
        return np.zeros(frames, dtype=np.int64)
    path = (begin + velocity * np.arange(frames)) % (2.0 * room)
    return np.asarray(np.rint(np.minimum(path, 2.0 * room - path)), dtype=np.int64)
