"""Time and memory a picture beside diffusers' own pipeline, on the same weights.

The model has the shape of Stable Diffusion 1.5 (four levels, cross-attention at three, a KL autoencoder of factor 8, a
CLIP text encoder) at a small width, with random weights; the parts are the real classes. Both take DDIM, the same steps
and guidance 7.5; they alternate in one process, so that what else the machine does hits both, and the figure to trust
is the ratio (the median over rounds). ``interval`` guides between sigma/alpha 0.3 and 5 only, which diffusers' pipeline
cannot; a step outside costs half. Peak memory is that of a process of its own for each, beyond what it has once loaded;
on a GPU all that torch has allocated.

    python benchmarks/diffusers_sampling.py --rounds 7 --out sampling.json
    python benchmarks/diffusers_sampling.py --full --device cuda --precision bf16 --compile --count 4
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
from dataclasses import dataclass
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
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Way:
    """How the networks compute: where, in which type of numbers, compiled or not."""

    device: str
    precision: str
    compile: bool


def save_model(folder: Path, full: bool) -> None:
    """A pipeline of the shape of Stable Diffusion 1.5: ``full``, or narrow and for pictures of 256 x 256."""
    library: Any = import_module("diffusers")
    widths = (320, 640, 1280, 1280) if full else (32, 64, 128, 128)
    text = 768 if full else 64
    unet = tiny.unet(
        sample_size=64 if full else 32,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=text,
        norm_num_groups=32 if full else 16,
    )
    vae = tiny.seeded(
        library.AutoencoderKL,
        block_out_channels=(128, 256, 512, 512) if full else (16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if full else 16,
        sample_size=512 if full else 256,
    )
    pipeline = library.StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny.clip(width=text),
        tokenizer=tiny.clip_tokenizer(),
        unet=unet,
        scheduler=tiny.latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def theirs(folder: Path, steps: int, count: int, way: Way) -> Callable[[], Any]:
    """Diffusers' pipeline: ``count`` pictures a call."""
    library: Any = import_module("diffusers")
    pipeline = library.StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=TYPES[way.precision]
    ).to(way.device)
    pipeline.set_progress_bar_config(disable=True)
    if way.compile:
        mode = "reduce-overhead" if way.device == "cuda" else None
        pipeline.unet = torch.compile(pipeline.unet, mode=mode)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode)

    def once() -> Any:
        return pipeline(
            [PROMPT] * count,
            negative_prompt=[NEGATIVE] * count,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="np",
        ).images

    return once


def ours(
    folder: Path, steps: int, count: int, way: Way, interval: tuple[float, float] | None = None
) -> Callable[[], Any]:
    """Ours on the same folder."""
    pipeline = Pipeline.load(folder, way.device, dtype=TYPES[way.precision])
    pipeline = pipeline.compiled() if way.compile else pipeline

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


def memory(folder: Path, who: str, steps: int, count: int, way: Way) -> float:
    """Peak of a process of its own, in MB."""
    words = [sys.executable, __file__, "--memory-of", who, "--folder", str(folder), "--steps", str(steps)]
    words += ["--count", str(count), "--device", way.device, "--precision", way.precision]
    words += ["--compile"] if way.compile else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def resident() -> float:
    """MB in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure(folder: Path, steps: int, count: int, rounds: int, way: Way) -> dict[str, Any]:
    """Seconds of each, alternating, and the ratios."""
    runs = {
        "diffusers": theirs(folder, steps, count, way),
        "undiffuse": ours(folder, steps, count, way),
        "undiffuse, interval": ours(folder, steps, count, way, INTERVAL),
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
        found[name]["peak MB"] = memory(folder, name, steps, count, way)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=1, help="pictures a call")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=TYPES)
    parser.add_argument("--compile", action="store_true", help="both; on a GPU with CUDA graphs")
    parser.add_argument("--full", action="store_true", help="of the real size, pictures of 512 x 512")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    way = Way(args.device, args.precision, args.compile)
    if args.memory_of:
        once = {"diffusers": theirs, "undiffuse": ours}[args.memory_of](args.folder, args.steps, args.count, way)
        before = resident()
        once()
        if way.device == "cuda":
            print(torch.cuda.max_memory_allocated() / 1e6)
        else:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 - before)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(folder, args.full)
        found = measure(folder, args.steps, args.count, args.rounds, way)
    load = os.getloadavg()[0]
    print(f"{args.count} picture(s) a call, {args.steps} steps, {args.rounds} rounds, load {load:.1f}; {way}\n")
    print(f"{'':22}{'s a picture':>12}{'ratio':>8}{'peak MB':>10}")
    for name, each in found.items():
        peak = f"{each['peak MB']:10.0f}" if "peak MB" in each else ""
        print(f"{name:22}{each['seconds a picture']:12.2f}{each['ratio']:8.2f}{peak}")
    if args.out:
        args.out.write_text(
            json.dumps({"steps": args.steps, "count": args.count, "load": load, **vars(way), **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
