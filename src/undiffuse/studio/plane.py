"""The 2-D lab: a distribution in the plane, of which the score is known exactly, and a network that learns it.

The distribution is a Gaussian of deviation h about each of K points, so that moons, rings and what was drawn by hand
are one thing. With s^2 = alpha^2 h^2 + sigma^2 and r_k the posterior weights of the points m_k,

    -score = sum_k r_k (x - alpha m_k) / s^2,    E[eps|x] = -sigma score,
    E[x0|x] = sum_k r_k (m_k + alpha h^2 (x - alpha m_k) / s^2)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..data import DataSpec
from ..data.base import ArrayDataset
from ..denoiser import Denoise
from ..errors import UndiffuseError
from ..grids import Uniform
from ..levels import Estimate, Level, spread
from ..noise import Streams, stream
from ..objectives import Stratified, UniformTimes
from ..sampling import start, trajectory
from ..schedules import Schedule
from ..solvers import Heun, Solver
from ..training.recipe import Averaging, Model, Objective, Optimiser, Recipe, Training
from ..training.trainer import Trainer
from .labs import velocity

REACH = 3.0  # the page shows [-REACH, REACH]^2
LATTICE = 21
CELLS = 48
PARTICLES = 400
FINE = 80
MOST = 600  # points of a distribution


@dataclass(frozen=True, eq=False)
class Cloud:
    """A Gaussian of deviation ``width`` about each of ``points`` ``[K, 2]``; itself the exact denoiser."""

    points: Tensor
    width: float

    def _posterior(self, x: Tensor, level: Level) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = spread(level.alpha, x), spread(level.sigma, x)
        variance = alpha**2 * self.width**2 + sigma**2
        off = x[:, None] - (alpha[..., None] if alpha.ndim else alpha) * self.points
        scaled = variance[..., None] if variance.ndim else variance
        return off, scaled, (-(off**2) / (2 * scaled)).sum(-1), variance

    def __call__(self, x: Tensor, level: Level) -> Estimate:
        points = self.points.to(x)
        off, variance, log_p, _ = replace(self, points=points)._posterior(x, level)
        r = torch.softmax(log_p, 1)[..., None]
        alpha, sigma = spread(level.alpha, x), spread(level.sigma, x)
        mean = (r * (off / variance)).sum(1)
        x0 = (r * points).sum(1) + alpha * self.width**2 * mean
        return Estimate(x0, sigma * mean)

    def density(self, x: Tensor, level: Level) -> Tensor:
        """``[B]``, at one level."""
        _, _, log_p, variance = replace(self, points=self.points.to(x))._posterior(x, level)
        return torch.exp(log_p).mean(1) / (2 * pi * float(variance))

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """``[count, 2]`` samples."""
        generator = stream(seed, 0)
        which = torch.randint(len(self.points), (count,), generator=generator)
        noise = torch.randn(count, 2, dtype=self.points.dtype, generator=generator)
        return self.points[which] + self.width * noise


def cloud_of(points: np.ndarray | Tensor, width: float = 0.08) -> Cloud:
    """Centred, and scaled to unit variance: where the noise is at home."""
    x = torch.as_tensor(points, dtype=torch.float64)
    if x.ndim != 2 or x.shape[1] != 2 or not 3 <= len(x) <= MOST or not bool(x.isfinite().all()):
        raise UndiffuseError(f"a distribution needs 3 to {MOST} finite points in the plane")
    x = x - x.mean(0)
    size = float(x.square().mean().sqrt())
    if size < 1e-6:
        raise UndiffuseError("all points are in one place: draw a shape")
    return Cloud(x / size, width)


def _angles(count: int, turns: float = 1.0) -> np.ndarray:
    return np.linspace(0, 2 * pi * turns, count, endpoint=False)


def _mixture() -> Cloud:
    angle = _angles(5)
    return cloud_of(np.stack([np.cos(angle), np.sin(angle)], 1), 0.18)


def _moons() -> Cloud:
    a = np.linspace(0, pi, 150)
    upper, lower = np.stack([np.cos(a), np.sin(a)], 1), np.stack([1 - np.cos(a), 0.5 - np.sin(a)], 1)
    return cloud_of(np.concatenate([upper, lower]), 0.09)


def _swissroll() -> Cloud:
    a = 1.5 * pi * (1 + 2 * np.linspace(0, 1, 300))
    return cloud_of(np.stack([a * np.cos(a), a * np.sin(a)], 1), 0.07)


def _rings() -> Cloud:
    a = _angles(150)
    ring = np.stack([np.cos(a), np.sin(a)], 1)
    return cloud_of(np.concatenate([ring, 0.45 * ring]), 0.07)


def _checkerboard() -> Cloud:
    place = (np.arange(6) + 0.5) / 6
    squares = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    return cloud_of(np.array([(i + u, j + v) for i, j in squares for u in place for v in place]), 0.08)


CLOUDS: dict[str, Callable[[], Cloud]] = {
    "moons": _moons,
    "mixture": _mixture,
    "swissroll": _swissroll,
    "rings": _rings,
    "checkerboard": _checkerboard,
}
"""The distributions by name."""


# --- what the page draws ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """How a distribution is looked at."""

    cloud: Cloud
    schedule: Schedule
    solver: Solver
    steps: int
    seed: int

    @property
    def levels(self) -> list[Level]:
        return Uniform().levels(self.schedule, self.steps)

    def noise(self) -> Tensor:
        """``[PARTICLES, 2]``, the same for every denoiser."""
        return Streams(self.seed, PARTICLES).draw((2,))

    def paths(self, denoise: Denoise, levels: list[Level] | None = None) -> Tensor:
        """``[F, PARTICLES, 2]``: particles from noise to data."""
        levels = levels or self.levels
        x = start(levels[0], self.noise())
        noise = Streams(self.seed + 1, PARTICLES)
        return torch.stack([frame.x for frame in trajectory(denoise, x, levels, self.solver, noise)])

    def end(self, denoise: Denoise, steps: int) -> Tensor:
        """``[PARTICLES, 2]``: where Heun's method with so many steps ends."""
        levels = Uniform().levels(self.schedule, steps)
        noise = Streams(self.seed + 1, PARTICLES)
        frames = trajectory(denoise, start(levels[0], self.noise()), levels, Heun(), noise)
        return deque(frames, maxlen=1).pop().x

    def fields(self, denoise: Denoise) -> tuple[Tensor, Tensor]:
        """``(velocity, score)``, each ``[F, LATTICE^2, 2]``, rows from the bottom to the top."""
        where = lattice(LATTICE)
        moving, scores = [], []
        for level in self.levels:
            at = level if float(level.t) > 0 else self.schedule(max(0.01, self.schedule.first))
            with torch.no_grad():
                estimate = denoise(where * float(torch.hypot(at.alpha, at.sigma)), at)
            moving.append(velocity(at, estimate.x0, estimate.eps))
            scores.append(-estimate.eps / float(at.sigma))
        return torch.stack(moving).float(), torch.stack(scores).float()

    def density(self) -> Tensor:
        """``[F, CELLS^2]`` uint8, each level relative to its maximum."""
        where = lattice(CELLS)
        each = []
        for level in self.levels:
            p = self.cloud.density(where * float(torch.hypot(level.alpha, level.sigma)), level)
            each.append((255 * p / p.max()).round().to(torch.uint8))
        return torch.stack(each)


def lattice(count: int) -> Tensor:
    """``[count^2, 2]`` float32 places on [-REACH, REACH]^2."""
    axis = torch.linspace(-REACH, REACH, count)
    return torch.cartesian_prod(axis, axis).flip(1)


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def exact(view: View) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What is known without learning: fields, density, particles, and the error of the solver alone."""
    paths = view.paths(view.cloud)
    move, score = view.fields(view.cloud)
    fine = view.end(view.cloud, FINE)
    meta = {
        "t": [float(level.t) for level in view.levels],
        "alpha": [float(level.alpha) for level in view.levels],
        "sigma": [float(level.sigma) for level in view.levels],
        "reach": REACH,
        "lattice": LATTICE,
        "cells": CELLS,
        "solver_error": None if view.solver.stochastic else rms(paths[-1] - fine),
    }
    arrays = {
        "paths": paths.float(),
        "velocity": move,
        "score": score,
        "density": view.density(),
        "points": view.cloud.points.float(),
    }
    return meta, arrays


# --- learning while one watches ---------------------------------------------------------------------------------------


@final
class Session:
    """One network that learns one distribution on a thread of its own, until it has seen enough, is stopped, or nobody
    has asked for ``patience`` seconds."""

    def __init__(self, view: View, updates: int = 2000, every: float = 0.7, patience: float = 15.0) -> None:
        self.view = view
        self.updates, self.every, self.patience = updates, every, patience
        self.version = 0
        self.latest: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        self.asked = time.monotonic()
        self.stopping = threading.Event()
        self.trouble: str | None = None
        self.thread = threading.Thread(target=self._train, name="undiffuse-plane", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End it, and wait until it has ended."""
        self.stopping.set()
        self.thread.join(10)

    def _train(self) -> None:
        try:
            trainer = Trainer(_dataset(self.view), _recipe(self.view, self.updates), seed=self.view.seed)
            losses: list[float] = []
            steps: list[int] = []
            fine = self.view.end(self.view.cloud, FINE)
            exact = self.view.paths(self.view.cloud)
            shown = time.monotonic()
            for update in trainer.updates():
                if update.step % 20 == 1 or update.step == self.updates:
                    losses.append(float(update.loss))
                    steps.append(update.step)
                gone = time.monotonic() - self.asked > self.patience
                last = self.stopping.is_set() or gone or update.step >= self.updates
                if last or time.monotonic() - shown > self.every:
                    self._show(trainer, steps, losses, exact, fine, last)
                    shown = time.monotonic()
                if last:
                    return
        except Exception as error:
            self.trouble = str(error)

    def _show(
        self, trainer: Trainer, steps: list[int], losses: list[float], exact: Tensor, fine: Tensor, last: bool
    ) -> None:
        view, denoise = self.view, trainer.ema.denoiser.bind()
        paths = view.paths(denoise)
        move, score = view.fields(denoise)
        errors = []
        with torch.no_grad():
            for level, x in zip(view.levels[:-1], exact[:-1], strict=True):
                errors.append(rms(denoise(x, level).x0 - view.cloud(x, level).x0))
        meta = {
            "steps": list(steps),
            "losses": list(losses),
            "updates": self.updates,
            "finished": last,
            "error_by_level": errors,
            "model_error": rms(view.end(denoise, FINE) - fine) if last else rms(paths[-1] - exact[-1]),
            "both": None if view.solver.stochastic else rms(paths[-1] - fine),
        }
        self.latest = meta, {"paths": paths.float(), "velocity": move, "score": score}
        self.version += 1


def _dataset(view: View) -> ArrayDataset:
    spec = DataSpec("points", (2,), "float32", None, None, (0.0, 0.0), (1.0, 1.0), "D")
    points = view.cloud.draw(20_000, view.seed).float().numpy()
    return ArrayDataset(spec, points, None, name="the plane")


def _recipe(view: View, updates: int) -> Recipe:
    batch = 256
    return Recipe(
        name="plane",
        model=Model(
            size="tiny",
            family="mlp",
            network={"width": 64, "blocks": 3, "octaves": 2, "embedding": 64},
            schedule=view.schedule,
        ),
        objective=Objective(times=Stratified(UniformTimes())),
        optimiser=Optimiser(lr=3e-3, warmup=20 * batch, decay="cosine"),
        training=Training(images=updates * batch, batch_size=batch, held_out=0),
        ema=Averaging(half_life=20 * batch),
    )
