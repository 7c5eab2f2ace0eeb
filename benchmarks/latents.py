"""Latents: a model of the pixels against one of the latents, on pictures with captions, at equal computation.

    python benchmarks/latents.py [--side 128] [--items 12000] [--minutes 15] [--codec-minutes 6] [--folds 4 8]
                                 [--out FOLDER]

Minutes are CPU time of this process (one thread), so that other work on the machine makes it longer but not worse. The
codec's own training, and encoding the data once, are stated apart. Both models have the same recipe and widths and as
many updates as their minutes allow; there is a pixel model for each of ``--folds``, which folds so many pixels a side
into channels (what the recipe's own 2 costs is measured too). Captions and pictures that are judged are none of those
trained on; attributes are read by the checker of the data set. Writes latents.json, a picture of each model's samples,
codec.png and the run folders; what was interrupted goes on, and what is in latents.json is not measured again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from undiffuse import Pipeline
from undiffuse.codecs import Codec
from undiffuse.config import override
from undiffuse.data import Dataset
from undiffuse.data.latents import Latents
from undiffuse.data.shapes import Shapes, score
from undiffuse.networks import build, describe
from undiffuse.outputs import tile, write_png
from undiffuse.pipeline import REGISTRIES
from undiffuse.training import Trainer, make_recipe, run_training
from undiffuse.training.recipe import Plan, Recipe, with_length

PROMPTS = 128


def planned(data: Dataset, recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with as many updates as fit into so many minutes of CPU time, measured on eight of them."""
    trainer = Trainer(data, recipe, plan=Plan(None))
    for _ in range(2):
        trainer.update()
    begun = time.process_time()
    for _ in range(8):
        trainer.update()
    each = (time.process_time() - begun) / 8
    return with_length(recipe, steps=max(20, int(60 * minutes / each)), images=None, batch_size=None)


def learned(data: Dataset, recipe: Recipe, out: Path, minutes: float) -> dict[str, float]:
    """Train, or go on; CPU seconds and images."""
    done, spent = out / "cpu.json", out.with_suffix(".spent")
    if not done.is_file():
        plan = out.with_suffix(".images")
        if not plan.is_file():
            plan.parent.mkdir(parents=True, exist_ok=True)
            plan.write_text(str(planned(data, recipe, minutes).training.images))
        before = float(spent.read_text()) if spent.is_file() else 0.0
        begun = time.process_time()
        try:
            result = run_training(
                data,
                with_length(recipe, steps=None, images=int(plan.read_text()), batch_size=None),
                out,
                device="cpu",
                say=lambda line: print(line, flush=True),
            )
        finally:
            seconds = before + time.process_time() - begun
            spent.write_text(str(seconds))
        done.write_text(json.dumps({"cpu_seconds": seconds, "images": result.images}))
    return json.loads(done.read_text())


def quiet(recipe: Recipe, *settings: str) -> Recipe:
    """Little beside training: no held-out loss, few previews."""
    common = ["training.preview_every=0", "training.checkpoint_every=500", "training.precision=float32"]
    return override(recipe, [*common, *settings], REGISTRIES)


def judged(model: Pipeline, prompts: list[str], picture: Path) -> dict[str, object]:
    """CPU seconds a picture, and the share of pictures in which each attribute is as the caption says."""
    begun = time.process_time()
    values = model.sample(PROMPTS, prompts=prompts, seed=1)
    seconds = (time.process_time() - begun) / PROMPTS
    write_png(picture, tile(list(values[:32]), 8))
    return {"seconds": seconds, "accuracy": dict(score(values, prompts))}


def call(model: Pipeline, fold: int | None = None) -> dict[str, float]:
    """Parameters, FLOPs and milliseconds of one network call for one sample (median of five in batches of 4)."""
    config = dict(model.config.network_config) | ({} if fold is None else {"fold": fold})
    network = build(model.config.network, config).eval()
    cost = describe(network, model.shape)
    x, label = torch.randn(4, *model.shape), torch.full((4,), 500.0)
    cond = model.denoiser.encode(model.denoiser.null(4), 4)
    times = []
    with torch.no_grad():
        for _ in range(6):
            begun = time.process_time()
            network(x, label, **cond)
            times.append((time.process_time() - begun) / 4)
    return {"parameters": cost.parameters, "gflop": cost.flops / 1e9, "ms": 1e3 * statistics.median(times[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--codec-minutes", type=float, default=6)
    parser.add_argument("--folds", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--out", type=Path, default=Path("latents"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data, out = Shapes(0, asked.side, asked.items), asked.out

    small = ("training.batch_size=8", "codec.channels=8", "optimiser.kind=muon", "optimiser.lr=0.005")
    recipe = quiet(make_recipe("autoencoder", data.spec, len(data)), "training.evaluate_every=1000", *small)
    found: dict[str, object] = {"codec": learned(data, recipe, out / "codec", asked.codec_minutes)}
    codec = Codec.load(out / "codec")
    begun = time.process_time()
    latents = Latents(data, codec, cache=out / "cache")
    found["encoding_cpu_seconds"] = time.process_time() - begun
    held = Shapes(0, asked.side, asked.items + PROMPTS)  # the same pictures, and more of them
    last = range(asked.items, len(held))
    x = held.batch(last[:32])[0]
    begun = time.process_time()
    with torch.no_grad():
        y = codec.decode(codec.encode(x))
    found["codec_ms"] = 1e3 * (time.process_time() - begun) / len(x)
    found["psnr"] = float((10 * (4 / (x - y).square().flatten(1).mean(1)).log10()).mean())
    write_png(out / "codec.png", tile([*data.spec.to_images(x[:8]), *data.spec.to_images(y[:8])], 8))
    captions, values = held.captions(last) or [], held.values(last)
    again = data.spec.to_data(codec.decode(codec.encode(data.spec.to_model(values))))
    found["checker"] = {"data": dict(score(values, captions)), "reconstructed": dict(score(again, captions))}

    written = out / "latents.json"
    if written.is_file():
        found = json.loads(written.read_text())
    for fold in (None, *asked.folds):
        name, each = ("latents", latents) if fold is None else (f"pixels-{fold}", data)
        if name in found:
            continue
        chosen = quiet(make_recipe("text", each.spec, len(each)), "training.evaluate_every=0", "training.batch_size=16")
        chosen = replace(chosen, name=f"text on {name}")
        if fold is not None:
            chosen = override(chosen, [f"model.network.fold={fold}"], REGISTRIES)
        run = learned(each, chosen, out / name, asked.minutes)
        model = Pipeline.load(out / name)
        found[name] = {**run, **judged(model, captions, out / f"{name}.png"), "call": call(model)}
        if fold is not None:
            found["call_of_fold_2"] = call(model, 2)
        written.write_text(json.dumps(found, indent=1))
        print(json.dumps(found, indent=1), flush=True)


if __name__ == "__main__":
    main()
