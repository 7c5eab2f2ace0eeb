"""Quality per minute: how good the digits are after a fixed amount of computation, ours beside a reference recipe.

    python benchmarks/quality_per_minute.py [--minutes 5 10 20] [--calls 5 10 20 50] [--samples 5000] [--out FILE]

A minute is one of *two cores*: 120 seconds of CPU time, measured by the operating system for this process and its
children, so that other work on the machine makes the run longer but not worse. Reading the data and drawing the noise
count; judging does not. By default one thread computes, as threads that wait for each other use CPU time for nothing.

The figure is the Frechet distance of samples to the 10,000 test digits in the features of a classifier of real ones
(`undiffuse evaluate`'s own), and its multiple of the floor, which is what as many real training digits have. Classes
are asked for in the shares that they have in the training data. A call is one pass of the network for one sample: a
guided step is two.

The reference is diffusers' UNet2DModel of 0.99 M parameters, its DDPM schedule (linear betas, predicted noise), AdamW
1e-4, weight decay 0.01, gradients clipped to 1, batches of 128, its EMAModel, DPM-Solver++ with 20 calls. It knows no
classes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _reference import reference_network

from undiffuse import Pipeline, open_dataset
from undiffuse.asking import Sampling
from undiffuse.config import override
from undiffuse.data import Dataset
from undiffuse.evaluation.extraction import as_data, extract, make_features, pick, reference_features
from undiffuse.evaluation.features import Features
from undiffuse.evaluation.frechet import frechet
from undiffuse.pipeline import REGISTRIES
from undiffuse.schedules import Schedule
from undiffuse.training import Trainer, make_recipe, speed
from undiffuse.training.draws import batch_indices
from undiffuse.training.recipe import Plan, Recipe

CORES = 2  # what a "minute" has of them


def cpu_seconds() -> float:
    """CPU time of this process and of the children that it has waited for."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in each)


class Budget:
    """CPU seconds that may be spent; time in which it is not running does not count."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun, self.started = seconds, cpu_seconds(), time.perf_counter()

    @property
    def spent(self) -> float:
        return cpu_seconds() - self.begun

    def updates(self) -> Iterator[tuple[int, float]]:
        """Counts updates until all is spent, with the share that is; says once a minute how far it is."""
        said = time.monotonic()
        step = 0
        while (spent := self.spent) < self.seconds:
            yield step, spent / self.seconds
            step += 1
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(f"  {spent:.0f} of {self.seconds:.0f} CPU-seconds, {step} updates", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Judge:
    """The Frechet distance to the test digits, and what real digits have."""

    train: Dataset
    features: Features
    test: torch.Tensor

    @staticmethod
    def of(train: Dataset, test: Dataset, cache: Path | None) -> Judge:
        features = make_features("classifier", train, cache=cache)
        return Judge(train, features, reference_features(features, test, cache=cache).features)

    def distance(self, samples: np.ndarray) -> dict[str, float]:
        """Of samples in the data's own units: the figure with its interval."""
        found = frechet(extract(self.features, samples).features.numpy(), self.test.numpy())
        return {"fd": found.value, "low": found.low, "high": found.high}

    def floor(self, count: int, draws: int = 5) -> float:
        """The mean figure of ``count`` real training digits."""
        rows = [extract(self.features, self.train, pick(self.train, count, seed=i)).features for i in range(draws)]
        return float(np.mean([frechet(each.numpy(), self.test.numpy()).value for each in rows]))

    def classes(self, count: int) -> list[int]:
        """What to ask for: the shares of the training data, in random order."""
        assert self.train.labels is not None
        counts = as_data(np.bincount(self.train.labels), count)
        return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts)).tolist()


# --- ours -------------------------------------------------------------------------------------------------------------


def train_ours(data: Dataset, recipe: Recipe, seconds: float, seed: int) -> tuple[Pipeline, dict[str, float]]:
    """The recipe's averaged weights after so many CPU seconds. The learning rate follows the share that is spent: the
    plan's length is what the speed so far allows."""
    budget, settled = Budget(seconds), 50  # the first updates are slow, and say little of the speed
    recipe, why = speed.choose(data, recipe, seed=seed, minutes=seconds / 60)
    if why:
        print(f"  {why}", file=sys.stderr)
    trainer = Trainer(data, recipe, seed=seed, plan=Plan(None))
    for step, share in budget.updates():
        if step >= settled:
            trainer.plan = Plan(max(trainer.images + 1, round(trainer.images / share)))
        trainer.update()
    used = spent(budget, trainer.images)
    return trainer.pipeline({"used": used}), used


def calls_of(sampling: Sampling, schedule: Schedule) -> int:
    """How often the network is called for one sample by a solver of one call a step."""
    return sum(sum(sampling.halves(level)) for level in sampling.grid.levels(schedule, sampling.steps)[:-1])


def within(calls: int, sampling: Sampling, schedule: Schedule) -> Sampling:
    """``sampling`` with as many steps as so many network calls allow."""
    choices = (replace(sampling, steps=steps) for steps in range(calls, 0, -1))
    return next(choice for choice in choices if calls_of(choice, schedule) <= calls)


def spent(budget: Budget, images: int) -> dict[str, float]:
    """What a training run has used."""
    used = budget.spent
    return {
        "images": images,
        "cpu_seconds": used,
        "wall_seconds": time.perf_counter() - budget.started,
        "images_per_cpu_second": images / used,
    }


# --- the reference ----------------------------------------------------------------------------------------------------


def train_reference(data: Dataset, seconds: float, seed: int) -> tuple[Any, dict[str, float]]:
    """diffusers' network with its averaged weights."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    torch.manual_seed(seed)
    network = reference_network()
    schedule: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    budget, size, images = Budget(seconds), 128, 0
    for step, _ in budget.updates():
        x0, _ = data.batch(batch_indices(seed, step, size, len(data)))
        noise, steps = torch.randn_like(x0), torch.randint(1000, (size,))
        loss = (network(schedule.add_noise(x0, noise, steps), steps).sample - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        average.step(network.parameters())
        images += size
    used = spent(budget, images)
    network = copy.deepcopy(network).eval()
    average.copy_to(network.parameters())
    return network, used


@torch.inference_mode()
def sample_reference(network: Any, data: Dataset, count: int, calls: int) -> np.ndarray:
    """By diffusers' DPM-Solver++, in the data's units."""
    from diffusers import DPMSolverMultistepScheduler

    source, parts = torch.Generator().manual_seed(0), []
    for start in range(0, count, 250):
        solver: Any = DPMSolverMultistepScheduler(beta_schedule="linear", prediction_type="epsilon")
        solver.set_timesteps(calls)
        x = torch.randn(min(250, count - start), *data.spec.shape, generator=source)
        for step in solver.timesteps:
            x = solver.step(network(x, step).sample, step, x).prev_sample
        parts.append(x.clamp(-1, 1))
    return data.spec.to_data(torch.cat(parts))


# --- the table --------------------------------------------------------------------------------------------------------


def heading(name: str, used: dict[str, float]) -> None:
    print(
        f"\n{name}: {used['images']:,} images in {used['cpu_seconds']:.0f} CPU-seconds "
        f"({used['images_per_cpu_second']:.0f} a CPU-second, {used['wall_seconds']:.0f} s of wall time)"
    )
    print(f"{'calls':>8}{'distance':>12}{'95 % interval':>24}{'of the floor':>14}", flush=True)


def line(calls: int, found: dict[str, float], floor: float) -> None:
    interval = f"[{found['low']:.4f}, {found['high']:.4f}]"
    print(f"{calls:8}{found['fd']:12.4f}{interval:>24}{found['fd'] / floor:13.2f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--minutes", type=float, nargs="*", default=[5.0], help="of two cores; ours is trained for each"
    )
    parser.add_argument("--reference", type=float, nargs="*", default=[5.0], help="minutes of the reference recipe")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--recipe", default="mnist")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="PATH=VALUE", help="of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path, help="where the classifier is kept")
    parser.add_argument("--keep", type=Path, help="write the trained models here, or judge those that are there")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)

    data = open_dataset("mnist", data_root=options.data_root)
    judge = Judge.of(data, open_dataset("mnist-test", data_root=options.data_root), options.cache)
    floor = judge.floor(options.samples)
    recipe = override(make_recipe(options.recipe, data.spec, len(data)), options.settings, REGISTRIES)
    print(f"{options.samples} samples; {options.samples} real training digits: {floor:.4f}, which is the floor")
    print(f"{options.threads} threads of {os.cpu_count()}, load {os.getloadavg()[0]:.1f}; {recipe.cost(data.spec)}")
    rows: list[dict[str, Any]] = []

    def begin(name: str, used: dict[str, float]) -> None:
        heading(name, used)
        rows.append({"name": name, **used, "load": os.getloadavg()[0], "calls": {}})

    def note(calls: int, samples: np.ndarray) -> None:  # each row as soon as it is known
        found = judge.distance(samples)
        line(calls, found, floor)
        rows[-1]["calls"][calls] = found
        if options.out:
            kept = {"samples": options.samples, "floor": floor, "threads": options.threads, "rows": rows}
            options.out.write_text(json.dumps(kept, indent=1) + "\n")

    for minutes in options.minutes:
        kept = options.keep and options.keep / f"{options.recipe}-{minutes:g}"
        if kept and kept.exists():
            pipeline = Pipeline.load(kept)
            used = pipeline.info["used"]
        else:
            pipeline, used = train_ours(data, recipe, minutes * 60 * CORES, options.seed)
            if kept:
                pipeline.save(kept)
        begin(f"{options.recipe}, {minutes:g} minutes", used)
        for calls in options.calls:
            sampling = within(calls, recipe.sampling, pipeline.denoiser.schedule)
            x = pipeline.draw(options.samples, classes=judge.classes(options.samples), sampling=sampling)
            note(calls, data.spec.to_data(x))
    for minutes in options.reference:
        network, used = train_reference(data, minutes * 60 * CORES, options.seed)
        begin(f"reference, {minutes:g} minutes", used)
        note(20, sample_reference(network, data, options.samples, 20))


if __name__ == "__main__":
    main()
