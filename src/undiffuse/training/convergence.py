"""When does training stop improving? A power law through the held-out curve, and a rule.

    L(n) = a + b n^-c        over the images seen n, while the learning rate is constant

Another quarter of training, from n to 1.25 n, is expected to gain ``b (n^-c - (1.25 n)^-c)``. The run has *converged*
when even the high end of that (its 90 % quantile) is less than the standard error of such a change: that of the paired
differences, draw by draw, to the evaluation a fifth of the run ago. The quarter is then spent on the cool-down instead:
the learning rate falls to 0, a fifth of the whole run (Haegele et al. 2024, arXiv:2405.18392).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .held_out import Evaluation
from .recipe import Plan, Recipe

MORE = 0.25
"""The training that is asked about, and the cool-down, as a share of the images seen."""
LEAST = 8
"""Evaluations that a fit needs."""


@dataclass(frozen=True)
class Forecast:
    """What the fit says.

    Attributes:
        images: seen at the last evaluation.
        loss: the averaged weights' held-out loss there.
        noise: the standard error of its change over the last fifth of the run.
        gain, gain_high: what another quarter of training would lower it by: median and 90 % quantile.
        until, until_low, until_high: the images after which a quarter more gains less than the noise: median, 10 % and
            90 % quantiles; at most 100 times the images seen, where the fit knows nothing.
    """

    images: int
    loss: float
    noise: float
    gain: float
    gain_high: float
    until: float
    until_low: float
    until_high: float

    @property
    def converged(self) -> bool:
        """The rule above."""
        return self.gain_high < self.noise

    def __str__(self) -> str:
        known = f"held-out loss {self.loss:.4f}; {MORE:.0%} more training gains about {max(0.0, self.gain):.2g} "
        known += f"(at most {max(0.0, self.gain_high):.2g}), and {self.noise:.2g} can be told from chance"
        if self.converged:
            return f"{known}: converged"
        if self.until_high >= 50 * self.images:
            return f"{known}: still improving, the end is not in sight"
        return (
            f"{known}: improves measurably until about {_rounded(self.until)} images "
            f"({_rounded(self.until_low)} to {_rounded(self.until_high)})"
        )


def forecast(rows: Sequence[Evaluation], begin: int = 0) -> Forecast | None:
    """Fit the evaluations from ``begin`` images on, and from a quarter of the images seen; None where they are fewer
    than eight.

    For each exponent c on a grid, a and b are least squares; exponents and b are weighed by their likelihood for normal
    residuals, whose size is that of the best fit. Neighbouring points of an average are alike, so each counts as half.
    """
    if not rows:
        return None
    now = rows[-1].images
    known = [(row.images, row.ema) for row in rows if row.ema is not None and row.images >= max(begin, now / 4)]
    last = rows[-1]
    if len(known) < LEAST or last.ema is None or last.noise is None:
        return None
    n, losses = np.array(known, dtype=np.float64).T
    exponents = np.geomspace(0.05, 4, 200)[:, None]
    powers = (n / now) ** -exponents  # [c, k]
    centred = powers - powers.mean(1, keepdims=True)
    spread = (centred**2).sum(1)
    b = (centred * losses).sum(1) / spread
    residuals = losses - losses.mean() - b[:, None] * centred
    squares = (residuals**2).sum(1)
    variance = max(float(squares.min()) / (len(n) - 3), 1e-16 * float(losses[-1]) ** 2, 1e-30)
    z = np.linspace(-2.5, 2.5, 21)
    weight = np.exp(-(squares - squares.min()) / (4 * variance))[:, None] * np.exp(-(z**2) / 2)
    slopes = b[:, None] + z * np.sqrt(2 * variance / spread)[:, None]
    gain = slopes * (1 - (1 + MORE) ** -exponents)  # at n = now, where the power is 1
    with np.errstate(divide="ignore", over="ignore"):
        until = np.clip((np.maximum(gain, 0) / max(last.noise, 1e-12)) ** (1 / exponents), 0, 100) * now

    def quantile(values: np.ndarray, q: float) -> float:
        order = np.argsort(values, axis=None)
        heap = np.cumsum(weight.ravel()[order])
        return float(values.ravel()[order][np.searchsorted(heap, q * heap[-1])])

    return Forecast(
        images=now,
        loss=last.ema,
        noise=last.noise,
        gain=quantile(gain, 0.5),
        gain_high=quantile(gain, 0.9),
        until=quantile(until, 0.5),
        until_low=quantile(until, 0.1),
        until_high=quantile(until, 0.9),
    )


def constant_from(recipe: Recipe, plan: Plan) -> int | None:
    """The images from which on the learning rate has been constant until now; None where it falls or is to fall."""
    if plan.images is None or recipe.optimiser.decay == "constant":
        return recipe.optimiser.warmup
    return None


def cool_down(recipe: Recipe, images: int, estimate: Forecast | None) -> Plan | None:
    """The plan of the rest of a run until convergence, once it has converged or has reached its longest: the learning
    rate falls from here to the end. None: go on."""
    batch, longest = recipe.training.batch_size, recipe.training.images
    if estimate is not None and estimate.images == images and estimate.converged:
        return Plan(min(longest, images + max(batch, round(images * MORE))), images)
    if images * (1 + MORE) >= longest:
        return Plan(longest, images)
    return None


def _rounded(images: float) -> str:
    """Two digits: more are not known."""
    return f"{float(f'{images:.2g}'):,.0f}"
