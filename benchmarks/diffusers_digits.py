"""A model that diffusers trained and saved, sampled by diffusers and by us at the same number of network calls.

A ``UNet2DModel`` learns the 1,797 digits of scikit-learn with diffusers' own ``DDPMScheduler`` and the loop of its
tutorial, and is saved by ``DDPMPipeline.save_pretrained``. Both sides then draw the same number of samples from that
folder with 20 calls each; the Frechet distance to the data is in the features of the evaluation's digit classifier, and
that of real digits to real digits is the floor.

    python benchmarks/diffusers_digits.py --updates 600 --out digits.json
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from undiffuse import DATASETS, Pipeline, extract, frechet, make_features, reference_features
from undiffuse.data.base import ArrayDataset

OURS: dict[str, dict[str, Any]] = {
    "the folder's own": {},
    "default": {"solver": "dpmpp_2m", "grid": "uniform"},
    "dpmpp_2m_sde": {"solver": "dpmpp_2m_sde", "grid": "uniform"},
    "unipc_3": {"solver": "unipc_3", "grid": "uniform"},
}


def train(x0: Tensor, updates: int, folder: Path) -> None:
    """Diffusers' tutorial on unconditional training, on a processor."""
    theirs: Any = import_module("diffusers")
    torch.manual_seed(0)
    network = theirs.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=32,
        norm_num_groups=8,
    )
    scheduler = theirs.DDPMScheduler(num_train_timesteps=1000)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, update / 50) * (1 - update / updates)
        x = x0[torch.randint(len(x0), (128,))]
        eps, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        loss = F.mse_loss(network(scheduler.add_noise(x, eps, t), t).sample, eps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    theirs.DDPMPipeline(unet=network, scheduler=scheduler).save_pretrained(folder)


def theirs(folder: Path, kind: str, calls: int, count: int) -> Tensor:
    """Samples of a pipeline of diffusers, [-1, 1]."""
    library: Any = import_module("diffusers")
    torch.manual_seed(1)
    pipeline = getattr(library, kind if kind.endswith("Pipeline") else "DDPMPipeline").from_pretrained(folder)
    if kind.endswith("Scheduler"):
        pipeline.scheduler = getattr(library, kind).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=count, num_inference_steps=calls, output_type="np").images
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2) * 2 - 1


def measure(updates: int, calls: int, count: int, cache: Path | None) -> dict[str, Any]:
    data = DATASETS["digits"](seed=0)
    features = make_features(None, data, cache=cache)
    real = reference_features(features, data, len(data), cache=cache).features

    def distance(x: Tensor) -> float:
        samples = ArrayDataset(data.spec, data.spec.to_data(x.clamp(-1, 1)), None, name="samples", content="samples")
        return frechet(extract(features, samples).features, real).value

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        begun = time.process_time()
        train(data.batch(range(len(data)))[0], updates, folder)
        found["training, CPU seconds"] = time.process_time() - begun
        for kind in ("DDPMPipeline", "DDIMPipeline", "DPMSolverMultistepScheduler"):
            found[f"diffusers {kind}"] = distance(theirs(folder, kind, calls, count))
        pipeline = Pipeline.load(folder)
        for name, settings in OURS.items():
            sampling = pipeline.settings(steps=calls, **settings)
            assert pipeline.calls(sampling) == calls, name
            found[f"undiffuse {name}"] = distance(pipeline.draw(count, seed=1, sampling=sampling, batch_size=256))
    half = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    found["real against real"] = frechet(real[half[: len(half) // 2]], real[half[len(half) // 2 :]]).value
    return found


def quiet() -> None:
    """Diffusers without its notices and bars."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--cache", type=Path, help="where features are kept")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    quiet()
    found = measure(args.updates, args.calls, args.samples, args.cache)
    print(
        f"{args.updates} updates of 128, {args.samples} samples of {args.calls} calls, load {os.getloadavg()[0]:.1f}\n"
    )
    for name, value in found.items():
        print(f"{name:40}{value:10.3f}")
    if args.out:
        args.out.write_text(json.dumps({"updates": args.updates, "calls": args.calls, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
