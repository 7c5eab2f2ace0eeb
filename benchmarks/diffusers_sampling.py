"""Time and memory a picture beside diffusers' own pipeline, on the same weights.

The model has the shape of Stable Diffusion 1.5 (four levels, cross-attention at three, a KL autoencoder of factor 8, a
CLIP text encoder) at a small width, with random weights; the parts are the real classes. Both take DDIM, the same steps
and guidance 7.5; they alternate in one process, so that what else the machine does hits both, and the figure to trust
is the ratio (the median over rounds). ``interval`` guides between sigma/alpha 0.3 and 5 only, which diffusers' pipeline
cannot; a step outside costs half. Peak memory is that of a process of its own for each, beyond what it has once loaded.

    python benchmarks/diffusers_sampling.py --rounds 7 --out sampling.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from undiffuse import Pipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import diffusers_models as tiny  # the same makers as the tests'

PROMPT = "a red circle on the sea"
NEGATIVE = "small green cat"
GUIDANCE = 7.5
INTERVAL = (0.3, 5.0)
WIDTHS = (32, 64, 128, 128)


def save_model(folder: Path) -> None:
    """A pipeline of the shape of Stable Diffusion 1.5, pictures of 256 x 256."""
    library: Any = import_module("diffusers")
    unet = tiny.unet(
        sample_size=32,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=64,
        norm_num_groups=16,
    )
    vae = tiny.seeded(
        library.AutoencoderKL,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=256,
    )
    pipeline = library.StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny.clip(width=64),
        tokenizer=tiny.clip_tokenizer(),
        unet=unet,
        scheduler=tiny.latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def theirs(folder: Path, steps: int, count: int) -> Callable[[], Any]:
    """Diffusers' pipeline: ``count`` pictures a call."""
    library: Any = import_module("diffusers")
    pipeline = library.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def once() -> Any:
        return pipeline(
            [PROMPT] * count,
            negative_prompt=[NEGATIVE] * count,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="np",
        ).images

    return once


def ours(folder: Path, steps: int, count: int, interval: tuple[float, float] | None = None) -> Callable[[], Any]:
    """Ours on the same folder."""
    pipeline = Pipeline.load(folder)

    def once() -> Any:
        return pipeline.sample(
            count,
            prompts=[PROMPT],
            negative_prompt=NEGATIVE,
            solver="ddim",
            steps=steps,
            guidance_scale=GUIDANCE,
            guidance_interval=interval,
        )

    return once


def memory(folder: Path, who: str, steps: int, count: int) -> float:
    """Peak of a process of its own, in MB above what it has after loading."""
    words = [sys.executable, __file__, "--memory-of", who, "--folder", str(folder), "--steps", str(steps)]
    done = subprocess.run([*words, "--count", str(count)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident() -> float:
    """MB in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: Path, steps: int, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of each, alternating, and the ratios."""
    runs = {
        "diffusers": theirs(folder, steps, count),
        "undiffuse": ours(folder, steps, count),
        "undiffuse, interval": ours(folder, steps, count, INTERVAL),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:
        runs[name]()  # once unmeasured
    for _ in range(rounds):
        for name, once in runs.items():
            begun = time.perf_counter()
            once()
            seconds[name].append(time.perf_counter() - begun)
    found: dict[str, Any] = {}
    for name, each in seconds.items():
        ratio = statistics.median(mine / other for mine, other in zip(each, seconds["diffusers"], strict=True))
        found[name] = {"seconds a picture": statistics.median(each) / count, "ratio": ratio}
    for name in ("diffusers", "undiffuse"):
        found[name]["peak MB"] = memory(folder, name, steps, count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=1, help="pictures a call")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.memory_of:
        once = {"diffusers": theirs, "undiffuse": ours}[args.memory_of](args.folder, args.steps, args.count)
        before = resident()
        once()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder)
        found = measure(folder, args.steps, args.count, args.rounds)
    load = os.getloadavg()[0]
    print(f"{args.count} picture(s) a call, {args.steps} steps, {args.rounds} rounds, load {load:.1f}\n")
    print(f"{'':22}{'s a picture':>12}{'ratio':>8}{'peak MB':>10}")
    for name, each in found.items():
        peak = f"{each['peak MB']:10.0f}" if "peak MB" in each else ""
        print(f"{name:22}{each['seconds a picture']:12.2f}{each['ratio']:8.2f}{peak}")
    if args.out:
        args.out.write_text(
            json.dumps({"steps": args.steps, "count": args.count, "load": load, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
