"""Draws every picture of these pages into docs/images. Nothing is trained: the denoisers here are exact.

    python docs/pictures.py            all of them
    python docs/pictures.py grids      those named

The data is a Gaussian mixture, of which everything is known in closed form, or a finite set of pictures, which is a
mixture too, of points.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from io import BytesIO
from math import pi
from pathlib import Path
from textwrap import wrap

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from undiffuse import (
    GRIDS,
    PREDICTIONS,
    SCHEDULES,
    SOLVERS,
    TIMES,
    WEIGHTS,
    X0,
    Cosine,
    Denoise,
    Estimate,
    Flow,
    FlowVelocity,
    Frame,
    Level,
    LinearBetas,
    LogSNR,
    Streams,
    Uniform,
    cfg,
    frechet,
    interval,
    open_dataset,
    slerp,
    trajectory,
)
from undiffuse.data.shapes import Shapes
from undiffuse.levels import spread
from undiffuse.sampling import start

FOLDER = Path(__file__).parent / "images"
COLOURS = ["#0f62ac", "#d1495b", "#2a9d5c", "#e08e0b", "#7b4fa3", "#3a3a3a", "#17a2b8", "#a0522d"]
GREY = "#9aa3ad"

plt.rcParams.update({
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "savefig.dpi": 110,
    "font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.color": "#e6e9ec", "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8,
    "axes.prop_cycle": plt.cycler(color=COLOURS), "figure.constrained_layout.use": True, "svg.hashsalt": "undiffuse",
})  # fmt: skip


# --- Exact denoisers --------------------------------------------------------------------------------------------------


def exact(means: Tensor, deviation: float) -> Denoise:
    """The best denoiser of data that is each of ``means [K, D]`` alike, plus noise of ``deviation`` (0: points)."""

    def denoise(x: Tensor, level: Level) -> Estimate:
        flat, points = x.flatten(1), means.to(x.dtype)
        alpha, sigma = spread(level.alpha, flat), spread(level.sigma, flat)
        variance = (alpha * deviation) ** 2 + sigma**2
        distance = flat.square().sum(1, keepdim=True) - 2 * alpha * flat @ points.T + alpha**2 * points.square().sum(1)
        mean = torch.softmax(-distance / (2 * variance), dim=1) @ points
        off = flat - alpha * mean
        x0 = mean + alpha * deviation**2 / variance * off
        return Estimate(x0.reshape(x.shape), (sigma / variance * off).reshape(x.shape))

    return denoise


def half_circles() -> tuple[Tensor, Tensor]:
    """Two interleaved half circles of 12 means each, float64."""
    angle = torch.linspace(0, pi, 12, dtype=torch.float64)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return 1.2 * upper, -1.2 * upper


UPPER, LOWER = half_circles()
MOONS, WIDTH = torch.cat([UPPER, LOWER]), 0.12
MOON = exact(MOONS, WIDTH)


def sampled(denoise: Denoise, samples: int, solver: str, steps: int, seed: int = 0, grid=Uniform()) -> list[Frame]:
    """The frames of a trajectory of points in the plane on the flow schedule, float64."""
    noise = Streams(seed, samples)
    levels = grid.levels(Flow(), steps)
    x = start(levels[0], noise.draw((2,))).double()
    return list(trajectory(denoise, x, levels, SOLVERS[solver], noise))


def plane(axes: Axes, title: str, reach: float = 2.4) -> None:
    """A square without ticks."""
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[], title=title)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#d0d5da")


def data(axes: Axes) -> None:
    """The means of the data."""
    axes.scatter(*MOONS.T, s=26, color="#e3c9a0", lw=0, zorder=0)


# --- One function a picture -------------------------------------------------------------------------------------------


def levels() -> plt.Figure:
    """Chapter 1: the density of noisy data in one dimension, and the ODE's paths through it."""
    means, width, schedule = torch.tensor([[-1.6], [0.2], [1.5]], dtype=torch.float64), 0.15, Cosine()
    t, x = torch.linspace(0, 1, 300, dtype=torch.float64), torch.linspace(-3, 3, 300, dtype=torch.float64)
    level = schedule(t)
    variance = (level.alpha * width) ** 2 + level.sigma**2
    off = x[:, None, None] - level.alpha[None, :, None] * means[:, 0]
    density = (torch.exp(-(off**2) / (2 * variance[None, :, None])) / variance[None, :, None].sqrt()).mean(2)
    figure, axes = plt.subplots(figsize=(8, 3.4))
    axes.imshow(density**0.5, extent=(0, 1, -3, 3), origin="lower", aspect="auto", cmap="Blues", vmax=2.1)
    begin = torch.linspace(-2.1, 2.1, 15, dtype=torch.float64)[:, None]
    frames = trajectory(exact(means, width), begin, Uniform().levels(schedule, 120), SOLVERS["heun"], Streams(0, 15))
    path = [(float(frame.level.t), frame.x[:, 0]) for frame in frames]
    axes.plot([t for t, _ in path], torch.stack([x for _, x in path]), color=COLOURS[1], lw=0.9)
    axes.set(
        xlabel="t", ylabel="x", ylim=(-3, 3), title="x = alpha x0 + sigma eps: its density, and the paths of the ODE"
    )
    axes.text(0.01, -2.85, "data", ha="left")
    axes.text(0.99, -2.85, "noise", ha="right")
    axes.grid(False)
    return figure


def schedules() -> plt.Figure:
    """Chapter 2: every schedule, as a curve in the plane and over time."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    figure, ((flat, snr), (left, right)) = plt.subplots(2, 2, figsize=(9.4, 7))
    styles = ["-", "--", ":"]
    for i, (name, schedule) in enumerate(SCHEDULES.items()):
        level = schedule(t)
        # Thinner one after the other, so that those below show where curves coincide.
        look = {"color": COLOURS[i % 8], "ls": styles[i // 8 % 3], "lw": 4.2 - 0.24 * i}
        flat.plot(level.alpha, level.sigma, **look, label=name)
        snr.plot(t, level.log_snr, **look)
        left.plot(t, level.alpha, **look)
        right.plot(t, level.sigma, **look)
    flat.set(
        xlim=(-0.03, 1.12),
        ylim=(-0.03, 1.4),
        xlabel="alpha",
        ylabel="sigma",
        title="variance preserving: an arc; flow: a chord; exploding: a line",
    )
    for log_snr in (-4, -2, 0, 2, 4):
        ratio = np.exp(-log_snr / 2)
        end = (1.03, 1.03 * ratio) if ratio < 1.2 else (1.3 / ratio, 1.3)
        flat.plot([0, end[0]], [0, end[1]], color=GREY, lw=0.6, zorder=0)
        flat.text(end[0] * 1.015, end[1] * 1.015, str(log_snr), color="#6b747d", fontsize=8, va="center")
    snr.set(ylim=(-15, 15), xlabel="t", title="log SNR (grey rays on the left)")
    left.set(xlabel="t", title="alpha")
    right.set(ylim=(-0.03, 1.4), xlabel="t", title="sigma (ve goes on to 50, edm to 80)")
    figure.legend(*flat.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def predictions() -> plt.Figure:
    """Chapter 3: the determinant, and what an error of the output does to x0."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]
    figure, rows = plt.subplots(1, 3, figsize=(10, 3.6))
    for axes, schedule, name in ((rows[0], Cosine(), "cosine_continuous"), (rows[1], Flow(), "flow")):
        for key, prediction in PREDICTIONS.items():
            axes.plot(t, prediction.det(schedule(t)), label=key, ls="--" if key in ("score", "edm") else "-")
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set(ylim=(-2.2, 1.6), xlabel="t", title=f"det on {name}")
    level = Flow()(t)
    for key, prediction in PREDICTIONS.items():
        rows[2].semilogy(
            t, level.sigma / prediction.det(level).abs(), label=key, ls="--" if key in ("score", "edm") else "-"
        )
    rows[2].set(ylim=(1e-2, 1e2), xlabel="t", title="error of x0 for an error of 1 in y (flow)")
    figure.legend(*rows[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def denoiser() -> plt.Figure:
    """Chapter 4: where the best denoiser believes the data to be, from every x, at four levels."""
    figure, row = plt.subplots(1, 4, figsize=(10, 2.95))
    side = torch.linspace(-2.1, 2.1, 15, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    for axes, t in zip(row, (0.9, 0.6, 0.3, 0.1), strict=True):
        level = Flow()(t)
        e = MOON(x, level)
        data(axes)
        axes.plot(*torch.stack([x, e.x0]).permute(2, 0, 1), color=GREY, lw=0.5)
        axes.scatter(*e.x0.T, s=7, color=COLOURS[0], lw=0, zorder=3)
        plane(axes, f"t = {t}")
    return figure


def conditions() -> plt.Figure:
    """Chapter 5: the same noise, asked for either class and for nothing in particular."""
    figure, row = plt.subplots(1, 3, figsize=(8.4, 3.25))
    asked = {"class 0": exact(UPPER, WIDTH), "class 1": exact(LOWER, WIDTH), "null": MOON}
    for axes, (name, denoise), colour in zip(row, asked.items(), (COLOURS[1], COLOURS[2], COLOURS[0]), strict=True):
        data(axes)
        frames = sampled(denoise, 150, "heun", 40)
        for i in range(12):
            axes.plot(*torch.stack([frame.x[i] for frame in frames]).T, color=GREY, lw=0.7)
        axes.scatter(*frames[0].x[:12].T, s=12, color="#3a3a3a", lw=0, zorder=2)
        axes.scatter(*frames[-1].x.T, s=8, color=colour, lw=0, zorder=3)
        plane(axes, name)
    return figure


def guidance() -> plt.Figure:
    """Chapter 6: one class, asked for harder and harder, from the same noise."""
    figure, row = plt.subplots(1, 5, figsize=(11.4, 2.8))
    cond = exact(UPPER, WIDTH)
    scales = {
        "scale 0": 0.0,
        "scale 1": 1.0,
        "scale 2": 2.0,
        "scale 5": 5.0,
        "5 inside an interval": interval(5.0, 0.2, 2.0),
    }
    for axes, (name, scale) in zip(row, scales.items(), strict=True):
        data(axes)
        frames = sampled(cfg(cond, MOON, scale), 250, "heun", 60)
        axes.scatter(*frames[-1].x.T, s=6, color=COLOURS[1], lw=0, zorder=3)
        plane(axes, name)
    return figure


def solvers() -> plt.Figure:
    """Chapter 7: the paths of four solvers for the same number of calls, and where they end."""
    figure, row = plt.subplots(1, 4, figsize=(10.4, 3.15))
    for axes, (name, steps) in zip(row, (("euler", 8), ("heun", 4), ("dpmpp_2m", 8), ("ddpm", 8)), strict=True):
        data(axes)
        frames = sampled(MOON, 200, name, steps, grid=LogSNR(0.05, 20))
        for i in range(9):
            axes.plot(
                *torch.stack([frame.x[i] for frame in frames]).T, color=COLOURS[0], lw=0.8, alpha=0.7, marker=".", ms=3
            )
        axes.scatter(*frames[-1].x.T, s=6, color=COLOURS[1], lw=0, zorder=3)
        plane(axes, f"{name}: {steps} steps, {frames[-1].calls} calls")
    return figure


def grids() -> plt.Figure:
    """Chapter 8: which levels each grid visits in 12 steps, on the log-SNR axis."""
    figure, axes = plt.subplots(figsize=(8.4, 1 + 0.27 * len(GRIDS)))
    schedule = LinearBetas()
    for i, grid in enumerate(GRIDS.values()):
        log_snr = schedule(grid.times(schedule, 12)[:-1]).log_snr
        axes.plot(log_snr, np.full(12, -i), "o-", ms=5, lw=0.6, color=COLOURS[i % 8], clip_on=False)
    for t, name in ((1.0, "t = 1"), (schedule.first, "t = 1/1000")):
        axes.axvline(float(schedule(t).log_snr), color=GREY, lw=0.8, ls="--", zorder=0)
        axes.text(float(schedule(t).log_snr), 0.55, name, ha="center", color="#6b747d", fontsize=9)
    axes.set(
        xlabel="log SNR   (noise on the left; the last step, to sigma = 0, is at infinity)",
        ylim=(0.4 - len(GRIDS), 0.5),
    )
    axes.set_yticks(range(0, -len(GRIDS), -1), list(GRIDS))
    return figure


def noise() -> plt.Figure:
    """Chapter 8: between two noises, by the sphere and by the straight line."""
    weights = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, b = Streams(0, [0]).draw((28, 28)), Streams(0, [1]).draw((28, 28))
    lines = torch.stack([(1 - w) * a + w * b for w in weights])
    arcs = torch.stack([slerp(a, b, float(w)) for w in weights])
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), width_ratios=(1, 0.92))
    left.plot(weights, lines.flatten(1).std(1), label="straight line")
    left.plot(weights, arcs.flatten(1).std(1), label="slerp")
    left.set(ylim=(0.6, 1.1), xlabel="weight", title="deviation of 28 x 28 numbers")
    left.legend(loc="lower left")
    begin = torch.stack([torch.tensor([2.0, 0.6]), torch.tensor([-1.2, 1.6])]).double()
    data(right)
    for between, colour in (("line", COLOURS[0]), ("slerp", COLOURS[1])):
        first, last = begin[:1], begin[1:]
        x = torch.cat([(slerp if between == "slerp" else torch.lerp)(first, last, float(w)) for w in weights])
        *_, end = trajectory(MOON, x, Uniform().levels(Flow(), 60), SOLVERS["heun"], Streams(0, len(x)))
        right.plot(*x.T, color=colour, lw=1.2, label=between)
        right.scatter(*end.x.T, s=8, color=colour, lw=0, zorder=3)
    plane(right, "noises between two, and their samples")
    return figure


def film(count: int, columns: Sequence[int], steps: int = 40) -> tuple[list[Tensor], list[str]]:
    """Rows x and x0 of ``count`` trajectories that end at scikit-learn's digits, and the titles of the columns."""
    dataset = open_dataset("digits")
    x0, _ = dataset.batch(range(len(dataset)))
    noise = Streams(3, count)
    levels = LogSNR(0.02, 20).levels(Flow(), steps)
    x = start(levels[0], noise.draw(dataset.spec.shape))
    frames = list(trajectory(exact(x0.flatten(1), 0.0), x, levels, SOLVERS["dpmpp_2m"], noise))
    rows: list[Tensor] = []
    for i in range(count):
        rows.append(torch.stack([frames[c].x[i] for c in columns]))
        beliefs = [frames[min(c + 1, steps)].estimate for c in columns]
        rows.append(torch.stack([e.x0[i] for e in beliefs if e is not None]))
    return rows, [f"t = {float(frames[c].level.t):.2f}" for c in columns]


def pictures() -> plt.Figure:
    """Chapter 8: x and the belief x0 on the way from noise to a digit."""
    rows, titles = film(2, (0, 4, 8, 12, 15, 18, 22, 27, 40))
    spec = open_dataset("digits").spec
    figure, grid = plt.subplots(len(rows), len(titles), figsize=(9, 4.3))
    for i, row in enumerate(rows):
        for j, image in enumerate(spec.to_images(row)):
            axes = grid[i][j]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            if i == 0:
                axes.set_title(titles[j], fontsize=9)
        grid[i][0].set_ylabel(("x", "x0")[i % 2], rotation=0, labelpad=12, va="center")
    return figure


def pipeline() -> plt.Figure:
    """Noise, the sample in model units, and the same in the units of the data."""
    spec = open_dataset("digits").spec
    rows, _ = film(1, (0, 40))
    noise, sample = rows[0].split(1)
    parts = {
        "noise: a function of (seed, i)": (noise[0, 0].numpy(), ".1f", (-2, 2)),
        "sample, model units: float32 in [-1, 1]": (sample[0, 0].numpy(), ".1f", (-1, 1)),
        "spec.to_data: uint8 in 0..16": (spec.to_data(sample)[0], "d", (0, 16)),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.8))
    for place, (title, (values, style, (low, high))) in zip(axes, parts.items(), strict=True):
        place.imshow(values, cmap="gray", vmin=low, vmax=high)
        for (y, x), value in np.ndenumerate(values):
            dark = value < (low + high) / 2
            place.text(
                x, y, format(value, style), color="white" if dark else "black", ha="center", va="center", fontsize=8
            )
        place.set(xticks=[], yticks=[], title=title)
        place.grid(False)
    return figure


def weights() -> plt.Figure:
    """Chapter 9: how much each level counts, how often it is drawn, and the product of both."""
    schedule = Flow()
    log_snr = torch.linspace(-10, 10, 801, dtype=torch.float64)
    level = schedule(schedule.time_at(log_snr))
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.6, 3.7))
    for i, (name, weight) in enumerate(WEIGHTS.items()):
        value = weight(level, FlowVelocity()) * (FlowVelocity().det(level) / X0().det(level)) ** 2
        left.semilogy(log_snr, value, color=COLOURS[i], label=name)
    left.set(ylim=(1e-3, 1e4), xlabel="log SNR", title="weight on the x0 error\n(network predicts flow)")
    left.legend()
    edges = torch.linspace(-10, 10, 201, dtype=torch.float64)
    places = (edges[1:] + edges[:-1]) / 2
    for i, (name, times) in enumerate(TIMES.items()):
        drawn = schedule(times(u, schedule)).log_snr
        density = torch.histogram(drawn, edges)[0] / len(u) / (edges[1] - edges[0])
        middle.plot(places, density, color=COLOURS[4 + i], label=name, ls="--" if name == "stratified" else "-")
    middle.set(xlabel="log SNR", title="density of the times drawn\n(flow schedule)", ylim=(0, 0.27))
    middle.legend()
    drawn = torch.histogram(schedule(TIMES["uniform"](u, schedule)).log_snr, edges)[0]
    there = schedule(schedule.time_at(places))
    for i, weight in enumerate(WEIGHTS.values()):
        share = weight(there, FlowVelocity()) * drawn
        right.plot(places, share / share.sum() / (edges[1] - edges[0]), color=COLOURS[i])
    right.set(xlabel="log SNR", title="share of the flow error at each level:\nweight times density of uniform times")
    right.set(ylim=(0, None))
    return figure


def frechet_floor() -> plt.Figure:
    """Evaluation: what a perfect generator scores, and two ways to draw an interval around it."""
    random = np.random.Generator(np.random.PCG64(0))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 3.5), width_ratios=(1.25, 1))

    def pair(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
        """Two draws of the same Gaussian, whose variances fall like 1/i."""
        a, b = random.standard_normal((2, n, d)) / np.sqrt(np.arange(1, d + 1))
        return a, b

    for colour, d in zip(COLOURS, (16, 64, 256), strict=False):
        counts = [n for n in (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000) if n > d]
        pairs = [pair(n, d) for n in counts]
        plain = [frechet(*each) for each in pairs]
        left.plot(counts, [f.value for f in plain], "o-", ms=4, color=colour, label=f"{d} features")
        left.fill_between(
            counts, [f.low or 1e-9 for f in plain], [f.high for f in plain], color=colour, alpha=0.2, lw=0
        )
    left.set(xscale="log", yscale="log", ylim=(1e-3, 3), xlabel="n, samples and as much data")
    left.set_title("Frechet distance of a perfect generator")
    left.legend()
    for i in range(12):
        a, b = pair(200, 64)
        ours = frechet(a, b)
        again = [frechet(a[random.integers(0, 200, 200)], b[random.integers(0, 200, 200)]).value for _ in range(60)]
        right.plot([ours.low, ours.high], [-i, -i], color=COLOURS[0], lw=3, solid_capstyle="butt")
        right.plot(np.quantile(again, [0.025, 0.975]), [-i + 0.3] * 2, color=COLOURS[1], lw=3, solid_capstyle="butt")
        right.plot(ours.value, -i, "o", ms=4, color="black", zorder=3)
    right.set(yticks=[], xlabel="Frechet distance", title="twelve draws, n = 200, 64 features")
    marks = [plt.Line2D([], [], color=c, lw=3) for c in COLOURS[:2]]
    dot = plt.Line2D([], [], color="black", marker="o", ms=4, lw=0)
    names = ["figure", "our interval", "naive bootstrap: misses"]
    right.legend([dot, *marks], names, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, columnspacing=1)
    return figure


def networks() -> plt.Figure:
    """The two families for data with spatial dimensions, as the code lays them out: a U-Net and one block of a DiT."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.6, 4.0), width_ratios=(1.25, 1))
    for axes in (left, right):
        axes.axis("off")
        axes.grid(False)

    def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str) -> None:
        axes.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=colour, alpha=0.25))
        axes.text(x, y, text, ha="center", va="center", fontsize=9)

    def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: str = "-") -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "ls": style, "lw": 1.4})

    left.set(xlim=(-0.9, 8.9), ylim=(-0.6, 4.6), title="U-Net with three levels")
    for x, text in ((0.0, "fold, stem"), (8.0, "head, unfold")):
        box(left, x, 3.8, 1.7, text, GREY)
    for i, y in enumerate((3.8, 2.2)):
        for x in (2.0 + i, 6.0 - i):
            box(left, x, y, 1.4, f"level {i}", COLOURS[0])
        arrow(left, (2.75 + i, y), (5.25 - i, y), "--")
        left.text(4, y + 0.12, "+", ha="center", color=GREY)
        arrow(left, (2.0 + i, y - 0.35), (3.0 + i if i == 0 else 3.9, y - 1.25))
        arrow(left, (5.0 if i == 0 else 4.1, y - 1.25), (6.0 - i, y - 0.35))
    box(left, 4.0, 0.6, 2.2, "level 2 (middle)", COLOURS[2])
    arrow(left, (0.9, 3.8), (1.25, 3.8))
    arrow(left, (6.75, 3.8), (7.1, 3.8))
    left.text(4, -0.35, "down: half the size          up: twice the size", ha="center", fontsize=9, color=GREY)

    right.set(xlim=(-2.6, 4.2), ylim=(-0.6, 6.1), title="a block of the transformer")
    parts = ["norm, scale, shift", "attention", "gate, +", "cross-attention to tokens, +", "norm, scale, shift",
             "perceptron", "gate, +"]  # fmt: skip
    for i, part in enumerate(parts):
        y = 5.4 - 0.85 * i
        modulated = part.startswith(("norm", "gate"))
        box(right, 0, y, 3.8, part, COLOURS[3] if modulated else COLOURS[2 if "token" in part else 0])
        if i:
            arrow(right, (0, y + 0.58), (0, y + 0.28))
        if modulated:
            arrow(right, (2.6, y), (1.95, y))
    right.plot([2.6, 2.6], [5.4 - 0.85 * 6, 5.4], color=GREY, lw=1.4)
    right.text(2.75, 2.85, "embedding of\nlevel, vector\nand mean token", va="center", fontsize=9)
    return figure


def shapes() -> plt.Figure:
    """Pictures of ``shapes`` with what is said of them; nothing is learned here."""
    data = Shapes()
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.9), layout="constrained")
    chosen = list(range(12))
    for axis, picture, caption in zip(axes.flat, data.values(chosen), data.captions(chosen) or [], strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title("\n".join(wrap(caption, 24)), fontsize=9)
    return figure


def latents() -> plt.Figure:
    """Encode, diffuse, decode: with the codec whose every result is known, which averages blocks."""
    picture = torch.from_numpy(Shapes(0, 128).values([4])[0].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    z = torch.nn.functional.avg_pool2d(picture, 8)
    noise = Streams(0, 1).draw(tuple(z.shape[1:]))
    noisy = [Flow()(t).mix(z, noise) for t in (1.0, 0.6, 0.3)]
    grown = torch.nn.functional.interpolate(z, scale_factor=8, mode="bilinear")
    figure, axes = plt.subplots(1, 6, figsize=(12, 2.6), width_ratios=[1.7, 1, 1, 1, 1, 1.7])
    titles = ["data", "latents", "t = 1", "t = 0.6", "t = 0.3", "decoded"]
    for axis, title, x in zip(axes, titles, [picture, z, *noisy, grown], strict=True):
        axis.imshow(((x[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[], xlabel=" x ".join(map(str, x.shape[2:])))
        axis.grid(False)
    figure.get_layout_engine().set(wspace=0.14)  # room for the arrows
    for axis, text in ((axes[0], "encode"), (axes[1], "learn"), (axes[4], "decode")):
        width = 1.0 if axis is axes[0] else 1.7
        begin, end = (1 + 0.06 * width, 0.5), (1 + 0.26 * width, 0.5)
        style = {"arrowstyle": "->", "color": GREY, "lw": 1.4}
        axis.annotate("", end, begin, xycoords="axes fraction", annotation_clip=False, arrowprops=style)
        axis.text((begin[0] + end[0]) / 2, 0.54, text, transform=axis.transAxes, ha="center", fontsize=8, color="#555")
    return figure


PICTURES: dict[str, Callable[[], plt.Figure]] = {
    "levels": levels,
    "schedules": schedules,
    "predictions": predictions,
    "denoiser": denoiser,
    "conditions": conditions,
    "guidance": guidance,
    "solvers": solvers,
    "grids": grids,
    "noise": noise,
    "pictures": pictures,
    "pipeline": pipeline,
    "weights": weights,
    "networks": networks,
    "latents": latents,
    "shapes": shapes,
    "frechet_floor": frechet_floor,
}


def main(names: Sequence[str]) -> None:
    """Draw the pictures named, or all."""
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        if name not in PICTURES:
            sys.exit(f"no picture {name!r}: choose from {', '.join(PICTURES)}")
        figure = PICTURES[name]()
        path = FOLDER / f"{name}.png"
        buffer = BytesIO()
        figure.savefig(buffer)
        plt.close(figure)
        Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size
        print(f"{path.relative_to(FOLDER.parent.parent)}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
