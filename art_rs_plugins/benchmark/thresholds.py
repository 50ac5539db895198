"""Theta of a composition, chosen on validation images, and what every theta buys."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from tabulate import tabulate
from tqdm.auto import tqdm

from art_rs_plugins.benchmark.compositions import Sweep, random_router, sweep
from art_rs_plugins.benchmark.config import RunConfig, parse_examples
from art_rs_plugins.benchmark.data import load
from art_rs_plugins.benchmark.files import json_bytes, load_json, write_atomic
from art_rs_plugins.benchmark.markup import drawing
from art_rs_plugins.benchmark.methods import open_estimator
from art_rs_plugins.benchmark.plots import COLOURS
from art_rs_plugins.benchmark.runs import facts
from art_rs_plugins.estimators.aces import PyTorchACES
from art_rs_plugins.smoothing.noise import Gaussian
from art_rs_plugins.smoothing.selectors import ScoreSelector
from art_rs_plugins.theory.composition import Histogram
from art_rs_plugins.theory.metrics import check_labels, natural_accuracy
from art_rs_plugins.theory.radii import gaussian_radius
from art_rs_plugins.theory.rules import OneSided, TopTwo, Verdict

__all__ = ["Study", "Tuning", "evaluate", "read_study", "tune", "write_study"]

RADII = (0.0, 0.25, 0.5, 0.75)
"""Radii of a study."""

GROUP = 16
"""Inputs between two steps of the progress bar."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """How theta is chosen: the highest certified accuracy among those that gain enough natural accuracy.

    Attributes
    ----------
    validation : str
        Images of the test split, start:stop:step, none of which is certified; many networks have seen all others.
    gain : float
        Natural accuracy above that of the smoothed classifier alone, on these images, in [0, 1).
    radius : float
        At which certified accuracy counts; one of `RADII`.
    """

    validation: str
    gain: float = 0.1
    radius: float = 0.25

    def __post_init__(self) -> None:
        parse_examples(self.validation, 1)
        if not 0.0 <= self.gain < 1.0:
            raise ValueError(f"gain of tuning must be in [0, 1), got {self.gain}")
        if self.radius not in RADII:
            raise ValueError(f"radius of tuning must be one of {RADII}, got {self.radius}")

    def rows(self, examples: str, total: int) -> NDArray[np.int64]:
        """Positions of the validation images; ``ValueError`` if there are none, or one of them is certified."""
        chosen = parse_examples(self.validation, total)
        shared = np.intersect1d(chosen, parse_examples(examples, total))
        if len(shared) or not len(chosen):
            raise ValueError(
                f"validation {self.validation!r} shares {len(shared)} of its {len(chosen)} images with the examples "
                f"{examples!r} that are reported: a theta that has seen them flatters itself; take others"
            )
        return chosen


@dataclass(frozen=True, slots=True, eq=False)
class Study:
    """What each theta buys on one set of images, and what it has to beat.

    Attributes
    ----------
    sweep : Sweep
        Of the composition.
    plain : float
        Natural accuracy of the smoothed classifier alone, an abstention being wrong.
    certified : float64, shape (r,)
        Its certified accuracy at `RADII`.
    core : float
        Natural accuracy of the core alone.
    total : int
        Images.
    """

    sweep: Sweep
    plain: float
    certified: NDArray[np.float64]
    core: float
    total: int

    def router(self, natural: float) -> NDArray[np.float64]:
        """Certified accuracy, shape (r,), of a coin in place of the selector, at the same natural accuracy."""
        return random_router(natural, core=self.core, smoothed=self.plain, certified=self.certified)[1]

    def markdown(self, theta: float) -> str:
        """Table of the parts, of the composition at this theta and some others, and of the coin beside each."""
        place = int(np.flatnonzero(self.sweep.theta == theta)[0])
        rows: list[list[Any]] = [
            ["smoothed classifier alone", "", self.plain, *self.certified],
            ["core alone", "", self.core, *[0.0] * len(RADII)],
        ]
        for at in sorted({place, *range(0, len(self.sweep.theta), 10)}):
            natural, name = self.sweep.natural[at], f"theta {self.sweep.theta[at]:g}"
            rows.append([f"**{name}**" if at == place else name, self.sweep.selected[at], natural,
                         *self.sweep.certified[at]])   # fmt: skip
            rows.append(["a coin at that accuracy", "", natural, *self.router(float(natural))])
        head = ["", "selected", "natural", *(f"r = {radius:g}" for radius in RADII)]
        return tabulate(rows, head, tablefmt="github", floatfmt=".3f") + "\n"

    def plot(self, theta: float, radius: float, ax: Axes) -> None:
        """Draw certified accuracy at one radius against natural accuracy, as theta moves, beside the coin."""
        column, place = RADII.index(radius), self.sweep.theta == theta
        natural, certified = self.sweep.natural, self.sweep.certified[:, column]
        between = np.linspace(self.plain, self.core, 50)
        ax.plot(between, [self.router(value)[column] for value in between], "--", color="#888888", label="a coin")
        ax.plot(natural, certified, color=COLOURS[0], label="entropy selector")
        chosen = f"theta {theta:g}, from validation images"
        ax.plot(natural[place], certified[place], "o", color=COLOURS[0], label=chosen)
        ax.plot(self.plain, self.certified[column], "s", color=COLOURS[1], label="smoothed classifier alone")
        ax.set(xlabel="natural accuracy", ylabel=f"certified accuracy at {radius:g}")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)


def evaluate(
    classifier: PyTorchACES,
    x: NDArray[np.float32],
    y: NDArray[np.int64],
    *,
    n: int,
    n0: int,
    seed: int,
    indices: NDArray[np.int64],
    verbose: bool = False,
) -> Study:
    """Evaluate every theta on b inputs, with the votes that `certificates` would decide on.

    Parameters
    ----------
    classifier : PyTorchACES
        With a selector that has a score; its own theta does not matter.
    x, y : ndarray, shape (b, *input_shape) and (b,)
        Inputs and their classes.
    n, n0, seed, indices
        As in `PyTorchACES.certificates`.
    verbose : bool
        Show a progress bar.

    Returns
    -------
    Study
    """
    if classifier.noise is not Gaussian:
        raise ValueError(f"classifier's noise must be Gaussian to evaluate theta, got {classifier.noise.__name__}")
    if not isinstance(classifier.selector, ScoreSelector):
        raise TypeError(f"classifier's selector must be a ScoreSelector, got {type(classifier.selector).__name__}")
    labels, parts = check_labels(y, len(x)), []
    for first in tqdm(range(0, len(x), GROUP), desc="votes", disable=not verbose):
        rows = slice(first, first + GROUP)
        parts.append(classifier.histogram(x[rows], n=n, n0=n0, seed=seed, indices=indices[rows]))
    votes = Histogram.concatenate([histogram for histogram, _ in parts])
    answers = [each for _, each in parts]
    core = Verdict(*(np.concatenate([getattr(each, name) for each in answers]) for name in ("prediction", "abstained")))
    alpha = classifier.alpha
    plain = TopTwo(alpha).decide(votes.class_estimation, n)
    alone = OneSided(alpha).decide(votes.class_selection, votes.class_estimation, n)
    radius = gaussian_radius(alone.failure, alone.p_upper, np.full(len(x), votes.sigma))
    right = ~alone.abstained & (alone.prediction == labels)
    return Study(
        sweep=sweep(votes, core, labels, radii=RADII, tau=classifier.selector.tau, alpha=alpha,
                    allocation=classifier.allocation, fallback=classifier.fallback),
        plain=natural_accuracy(plain.prediction, plain.abstained, labels),
        certified=np.array([np.mean(right & (radius >= r)) for r in RADII]),
        core=natural_accuracy(core.prediction, core.abstained, labels),
        total=len(x),
    )   # fmt: skip


def read_study(path: Path) -> Study:
    """Read what `write_study` wrote."""
    values = load_json(path)["study"]
    arrays = {name: np.asarray(value) for name, value in values.pop("sweep").items()}
    return Study(sweep=Sweep(**arrays), certified=np.asarray(values.pop("certified")), **values)


def write_study(config: RunConfig, rows: NDArray[np.int64], path: Path, *, verbose: bool = False) -> Study:
    """Evaluate every theta on some images of the test split, or read what was found before.

    Parameters
    ----------
    config : RunConfig
        Of method ``aces``; whatever its theta is.
    rows : ndarray of int64, shape (b,)
        Positions in the test split.
    path : Path
        JSON, written when all is known; an earlier one is read if it was made with the same settings.
    verbose : bool
        Show a progress bar.

    Raises
    ------
    ValueError, TypeError, OSError
        For a file made with other settings, and as `open_estimator`.
    """
    options = {name: value for name, value in config.options.items() if name != "theta"}
    data, classifier = open_estimator(config, None, path.parent)
    digests = facts(config, data, rows, classifier)
    known = {**asdict(config), "options": options, "rows": rows.tolist(), **digests}
    settings = json.loads(json.dumps(known))
    if path.exists():
        if load_json(path)["settings"] != settings:
            raise ValueError(f"{path} was made with other settings; choose another output folder, or delete it")
        return read_study(path)
    draws: dict[str, Any] = {"n": config.n, "n0": config.n0, "seed": config.seed, "indices": rows}
    found = evaluate(classifier, data.x_test[rows], data.y_test[rows], **draws, verbose=verbose)
    sweeps = {name: value.tolist() for name, value in asdict(found.sweep).items()}
    study = {"sweep": sweeps, "plain": found.plain, "certified": found.certified.tolist(), "core": found.core,
             "total": found.total}   # fmt: skip
    write_atomic(path, json_bytes({"settings": settings, "study": study}, "study"))
    return found


def tune(config: RunConfig, tuning: Tuning, stem: Path, *, verbose: bool = False) -> float:
    """Choose theta on validation images, and write what every theta buys there and on the test images.

    Parameters
    ----------
    config : RunConfig
        Of method ``aces``.
    tuning : Tuning
        How to choose.
    stem : Path
        ``<stem>.validation.json``, and of the test images ``<stem>.curve.json``, ``.md`` and ``.svg``.
    verbose : bool
        Show progress bars.

    Returns
    -------
    float
        Theta, fixed before the test images are looked at.

    Raises
    ------
    ValueError, TypeError, OSError
        For validation images that are certified later; if no theta gains as much; and as `write_study`.
    """
    total = len(load(config.data).x_test)
    rows = tuning.rows(config.examples, total)
    known = write_study(config, rows, stem.with_name(f"{stem.name}.validation.json"), verbose=verbose)
    theta = known.sweep.choose(natural=known.plain + tuning.gain, radius=tuning.radius)
    path = stem.with_name(f"{stem.name}.curve.json")
    test = write_study(config, parse_examples(config.examples, total), path, verbose=verbose)
    write_atomic(path.with_suffix(".md"), test.markdown(theta).encode())
    write_atomic(path.with_suffix(".svg"), drawing(lambda ax: test.plot(theta, tuning.radius, ax)).encode())
    return theta
