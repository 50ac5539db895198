"""Classifiers whose smoothed version is known in closed form, and the threshold of a fair simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import binom
from torch import Tensor, nn

from art_rs_plugins.theory.certificates import Certificates

FALSE_ALARM = 1e-6
"""Probability that a correct library fails one simulation, were its seed redrawn."""


def allowed(trials: int, alpha: float) -> int:
    """Violations that a library which keeps its promise exceeds with probability at most FALSE_ALARM."""
    return int(binom.isf(FALSE_ALARM, trials, alpha))


class Linear(nn.Module):
    """Class 0 where w.x + b > 0, else class 1; the smoothed classifier is the classifier itself."""

    def __init__(self, w: Any, b: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.as_tensor(w, dtype=torch.float32).flatten())
        self.b = nn.Parameter(torch.tensor(float(b)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([score, -score], dim=1)

    def distance(self, x: Tensor) -> np.ndarray:
        """Signed distance to the boundary, in float64."""
        w, b = self.w.detach().double(), self.b.detach().double()
        return ((x.double().flatten(1) @ w + b) / w.norm()).numpy()


class Largest(nn.Module):
    """Class of the largest coordinate: by symmetry the smoothed classifier is the classifier itself."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def distance(x: Tensor) -> np.ndarray:
        """Distance to the nearest boundary, the hyperplane on which the two largest coordinates agree."""
        top = x.double().topk(2, dim=1).values
        return ((top[:, 0] - top[:, 1]) / np.sqrt(2.0)).numpy()


class Strips(nn.Module):
    """Classes of the intervals between `edges` along a unit direction: probabilities are differences of Phi."""

    def __init__(self, edges: list[float], classes: list[int], direction: Any) -> None:
        super().__init__()
        self.edges, self.classes = edges, classes
        u = torch.as_tensor(direction, dtype=torch.float32).flatten()
        self.u = nn.Parameter(u / u.norm())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        cell = torch.bucketize(x.flatten(1) @ self.u, torch.tensor(self.edges))
        return nn.functional.one_hot(torch.tensor(self.classes)[cell], max(self.classes) + 1).float()

    def probabilities(self, t: float, sigma: float) -> np.ndarray:
        """P(f = c) for every class c, under noise, at position t along the direction."""
        steps = ndtr((np.array([-np.inf, *self.edges, np.inf]) - t) / sigma)
        return np.bincount(self.classes, weights=np.diff(steps), minlength=max(self.classes) + 1)

    def smoothed(self, t: float, sigma: float) -> int:
        return int(self.probabilities(t, sigma).argmax())

    def distance(self, t: float, sigma: float, reach: float) -> float:
        """Distance to the nearest point of another smoothed class, found on a fine grid and then by bisection."""
        here = self.smoothed(t, sigma)

        def margin(s: float) -> float:
            p = self.probabilities(s, sigma)
            return float(p[here] - np.delete(p, here).max())

        best = np.inf
        for side in (-1.0, 1.0):
            grid = t + side * np.linspace(0.0, reach, 400)
            crossed = np.nonzero([margin(s) < 0 for s in grid])[0]
            if len(crossed):
                root = brentq(margin, grid[crossed[0] - 1], grid[crossed[0]], xtol=1e-13)
                best = min(best, abs(root - t))
        return best


class Function(nn.Module):
    """A function as a module in eval mode, with a parameter of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def certificates(radius: Any, prediction: Any = None, **changes: Any) -> Certificates:
    """Certificates made by hand; a radius of NaN stands for an abstention."""
    radius = np.atleast_1d(np.asarray(radius, dtype=np.float64))
    b = len(radius)
    abstained = np.isnan(radius)
    values: dict[str, Any] = {
        "prediction": np.zeros(b, np.int64) if prediction is None else np.asarray(prediction),
        "radius": np.where(abstained, 0.0, radius),
        "abstained": abstained,
        "p_lower": np.full(b, 0.9),
        "p_upper": np.full(b, 0.1),
        "count": np.full(b, 950),
        "runner_up_count": np.full(b, 50),
        "n": np.full(b, 1000),
        "n0": np.full(b, 100),
        "sigma": np.full(b, 0.5),
        "alpha": np.full(b, 0.001),
        "index": np.arange(b),
        "seed": np.full(b, 7),
    }
    return Certificates(**(values | changes))
