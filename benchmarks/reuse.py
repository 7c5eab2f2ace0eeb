"""Reuse between calls (`Sampling.reuse`, DeepCache): what it saves, and what it costs.

    python benchmarks/reuse.py                              time of networks with random weights
    python benchmarks/reuse.py --run FOLDER [--reuse 2,3,5] [--solver NAME] [--steps 20] [--guidance 1] [--samples 2000]

With a model, all settings draw the same samples from the same noise, in turns, chunk by chunk, so that what else the
machine does meets all alike; the figures are CPU time and its share of plain sampling's. *Moved* is the root mean
square of the difference to plain sampling, as a share of the deviation of the pictures' pixels. The quality is

- of a model of MNIST the Frechet distance to the 10,000 test digits in the features of `quality_per_minute.py`,
- of a model of `shapes` the share of pictures that are what their caption says (`shapes.py`), on captions of pairs of
  colour and shape that training has not seen.

Below each is plain sampling with so many fewer steps that it takes as long: what reuse must be better than.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from undiffuse import Pipeline, open_dataset
from undiffuse.asking import Sampling
from undiffuse.data.shapes import Shapes, score
from undiffuse.evaluation.extraction import as_data, extract, make_features, reference_features
from undiffuse.evaluation.frechet import frechet
from undiffuse.networks import Network, build, sized
from undiffuse.outputs import describe
from undiffuse.reuse import Kept

CHUNK = 100

# --- networks alone ---------------------------------------------------------------------------------------------------

CIFAR = {"widths": [128, 256, 256, 256], "blocks": 2, "attention": [1], "head_width": 256, "embedding": 512}
STABLE = {"widths": [320, 640, 1280, 1280], "blocks": 2, "attention": [0, 1, 2], "head_width": 40, "embedding": 1280}
CASES: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "unet small, 28x28": ((1, 28, 28), *sized((1, 28, 28), "small")),
    "unet base, 32x32": ((3, 32, 32), *sized((3, 32, 32), "base")),
    "mp_unet base, 32x32": ((3, 32, 32), *sized((3, 32, 32), "base", family="mp_unet")),
    "dit base, 32x32": ((3, 32, 32), *sized((3, 32, 32), "base", family="dit")),
    "DiT-B/4, 32x32": ((3, 32, 32), *sized((3, 32, 32), "DiT-B/4", family="dit")),
    "DDPM's for CIFAR-10": ((3, 32, 32), "ddpm_unet", {"in_channels": 3, "groups": 32, **CIFAR}),
    "as Stable Diffusion's": ((4, 64, 64), "ddpm_unet", {"in_channels": 4, "token_width": 768, "groups": 32, **STABLE}),
}
LARGEST = 200_000_000  # parameters of networks that are timed; of larger ones only the FLOPs are counted


def inputs(network: Network, shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
    tokens = (torch.zeros(batch, 77, network.token_width),) if network.token_width else ()
    vector = torch.zeros(batch, network.condition_width) if network.condition_width else None
    return torch.zeros(batch, *shape), torch.full((batch,), 500.0), vector, *tokens  # type: ignore[return-value]


def flops(family: str, config: dict[str, Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """Of a whole call of one sample, and of one that reuses; nothing is computed."""
    with torch.device("meta"):
        twin = build(family, config)
        kept, counts = Kept(), []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                twin(*inputs(twin, shape, 1), deep=kept)
            counts.append(counter.get_total_flops())
    return counts[0], counts[1]


@torch.no_grad()
def alone(rounds: int, batch: int) -> list[dict[str, Any]]:
    """Time and FLOPs of calls, whole and not."""
    print(f"{'':24}{'parameters':>12}{'GFLOP':>8}{'reusing':>9}{'ms':>9}{'reusing':>9}   so much faster at 2, 3, 5")
    rows = []
    for title, (shape, family, config) in CASES.items():
        with torch.device("meta"):
            network = build(family, config)
        parameters = sum(p.numel() for p in network.parameters())
        whole, shallow = flops(family, config, shape)
        row: dict[str, Any] = {"network": title, "parameters": parameters, "flops": whole, "reusing": shallow / whole}
        line = f"{title:24}{parameters / 1e6:10.1f} M{whole / 1e9:8.2f}{shallow / whole:9.1%}"
        share = shallow / whole
        if parameters <= LARGEST:
            network = build(family, config).eval()
            asked, kept = inputs(network, shape, batch), Kept()
            network(*asked, deep=kept)
            times: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(rounds):
                for reuses in times:
                    begun = time.process_time()
                    network(*asked, deep=Kept(kept.features) if reuses else Kept())
                    times[reuses].append(time.process_time() - begun)
            share = median(b / a for a, b in zip(times[False], times[True], strict=True))
            row |= {"ms": 1e3 * median(times[False]) / batch, "share": share}
            line += f"{row['ms']:9.2f}{share:9.1%}"
        else:
            line += f"{'not timed':>18}"
        print(line + "   " + "  ".join(f"{k / (1 + (k - 1) * share):.2f}" for k in (2, 3, 5)), flush=True)
        rows.append(row)
    return rows


# --- a model ----------------------------------------------------------------------------------------------------------


def draw(
    pipeline: Pipeline, settings: list[Sampling], chunks: int, told: dict[str, Any]
) -> list[tuple[Tensor, list[float]]]:
    """The same samples by each of the settings, in turns, and the CPU time of each chunk."""
    drawn: list[tuple[list[Tensor], list[float]]] = [([], []) for _ in settings]
    pipeline.draw(4, sampling=settings[0], **told)
    for chunk in range(chunks):
        for each, (parts, times) in zip(settings, drawn, strict=True):
            begun = time.process_time()
            numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
            parts.append(pipeline.draw(numbers, seed=1, sampling=each, batch_size=CHUNK, **told))
            times.append(time.process_time() - begun)
    return [(torch.cat(parts), times) for parts, times in drawn]


Judge = Callable[[np.ndarray], tuple[float, str]]
"""The quality of samples in the data's own units: the figure, and how it is written."""


def digits(options: argparse.Namespace, count: int) -> tuple[dict[str, Any], Judge]:
    """What to ask a model of MNIST for, and how good it is."""
    train = open_dataset("mnist", data_root=options.data_root)
    features = make_features("classifier", train, cache=options.cache)
    test = open_dataset("mnist-test", data_root=options.data_root)
    real = reference_features(features, test, cache=options.cache).features.numpy()
    assert train.labels is not None
    shares = as_data(np.bincount(train.labels), count)  # the classes of the training data, in random order
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(shares)), shares)).tolist()

    def judge(samples: np.ndarray) -> tuple[float, str]:
        found = frechet(extract(features, samples).features.numpy(), real)
        return found.value, f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"

    return {"classes": labels}, judge


def captions(count: int) -> tuple[dict[str, Any], Judge]:
    """The same of a model of ``shapes``."""
    said = Shapes(99, unseen=True).captions(range(count)) or []

    def judge(samples: np.ndarray) -> tuple[float, str]:
        right = dict(score(list(samples), said))["all"]
        return right, f"{right:.1%}"

    return {"prompts": said}, judge


def model(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of one model."""
    pipeline = Pipeline.load(options.run)
    chunks = max(1, options.samples // CHUNK)
    told, judge = captions(chunks * CHUNK) if pipeline.takes_prompts else digits(options, chunks * CHUNK)
    own = {} if options.solver is None else {"solver": options.solver}
    usual = pipeline.settings(steps=options.steps, guidance_scale=options.guidance, **own)
    settings = [usual]
    (_, (once,)), *tried = draw(pipeline, [usual, *(replace(usual, reuse=k) for k in options.reuse)], 1, told)
    for k, (_, (reusing,)) in zip(options.reuse, tried, strict=True):
        settings += [replace(usual, reuse=k), replace(usual, steps=round(options.steps * reusing / once))]
    drawn = draw(pipeline, settings, chunks, told)
    plain, plain_times = drawn[0]
    solver = describe(usual)["solver"]
    print(f"{chunks * CHUNK} samples, {solver}, guidance {options.guidance:g}, load {os.getloadavg()[0]:.1f}")
    print(f"{'reuse':>5}{'steps':>7}{'calls':>7}{'whole':>7}{'ms a sample':>13}{'share':>8}{'moved':>8}   quality")
    rows = []
    for sampling, (x, times) in zip(settings, drawn, strict=True):
        value, said = judge(pipeline.spec.to_data(x))
        row: dict[str, Any] = {
            "reuse": sampling.reuse,
            "steps": sampling.steps,
            "calls": pipeline.calls(sampling),
            "whole": pipeline.whole_calls(sampling),
            "ms": 1e3 * median(times) / CHUNK,
            "share": median(b / a for a, b in zip(plain_times, times, strict=True)),
            "moved": float((x - plain).square().mean().sqrt() / plain.std(0).square().mean().sqrt()),
            "quality": value,
        }
        rows.append(row)
        shown = "{reuse:5}{steps:7}{calls:7}{whole:7}{ms:13.1f}{share:8.1%}{moved:8.1%}".format(**row)
        print(f"{shown}   {said}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, help="a model of MNIST or of shapes")
    parser.add_argument("--reuse", type=lambda text: [int(part) for part in text.split(",")], default=[2, 3, 5])
    parser.add_argument("--solver", help="the model's own, unless given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--cache", type=Path, help="where the classifier is kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4, help="of the networks alone")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"one thread, load {os.getloadavg()[0]:.1f}")
    rows = alone(options.rounds, options.batch) if options.run is None else model(options)
    if options.out:
        options.out.write_text(json.dumps({"load": os.getloadavg()[0], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
