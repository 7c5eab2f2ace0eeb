"""Is the picture what was asked for? Caption accuracy of a model of ``shapes`` and diversity, by guidance scale.

    python benchmarks/shapes.py [--run FOLDER] [--number N] [--steps N] [--scales 1,2,3,4,6] [--out FILE] [--plot FILE]

- *Accuracy*: the checker reads the pixels (`undiffuse.data.shapes.score`). Prompts are captions of another seed: with
  pairs of colour and shape that training has seen, and with those that it has never seen.
- *Diversity*: the mean distance (root of the mean square of pixels) between samples of one prompt, as a share of that
  between real pictures with the same caption; over the captions that real pictures have most often.

Without a run, one is trained by the recipe ``text``: 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np

from undiffuse import Pipeline, train
from undiffuse.data.shapes import Shapes, score

SEED = 99
"""Of the captions; the recipe trains on seed 0."""


def spread(pictures: np.ndarray) -> float:
    """Mean distance between two of the pictures ``[N, ...]``."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(flat, 2)]))


def common(count: int, most: int) -> dict[str, np.ndarray]:
    """The ``count`` captions that real pictures have most often, each with at most ``most`` of its pictures."""
    data = Shapes(SEED)
    captions = data.captions(range(6000)) or []
    names = [name for name, _ in Counter(captions).most_common(count)]
    where = {name: [i for i, caption in enumerate(captions) if caption == name][:most] for name in names}
    return {name: data.values(indices) for name, indices in where.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, help="judge the finished run that is there")
    parser.add_argument("--number", type=int, default=200, help="prompts of each kind and scale")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scales", default="1,2,3,4,6")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    run = options.run or train("shapes", recipe="text", out=Path(tempfile.mkdtemp()) / "shapes").path
    pipeline = Pipeline.load(run)
    asked = {name: Shapes(SEED, unseen=name == "unseen").captions(range(options.number)) for name in ("seen", "unseen")}
    real = common(8, 8)
    rows = []
    begun = time.process_time()
    print(
        f"{run}: {pipeline.info['images']:,} images seen, {options.steps} steps, {options.number} prompts of each kind"
    )
    print("guidance  seen  unseen  diversity   count shape colour size texture relation (seen)")
    for scale in map(float, options.scales.split(",")):
        how = {"guidance_scale": scale, "steps": options.steps}
        found = {
            name: dict(
                score(list(pipeline.sample(len(captions or []), prompts=captions, seed=1, **how)), captions or [])
            )
            for name, captions in asked.items()
        }
        shares = [spread(pipeline.sample(8, prompts=[c], seed=2, **how)) / spread(p) for c, p in real.items()]
        rows.append({"guidance_scale": scale, "diversity": float(np.mean(shares)), **found})
        parts = "   ".join(f"{value:.2f}" for name, value in found["seen"].items() if name != "all")
        right = "    ".join(f"{found[name]['all']:.2f}" for name in ("seen", "unseen"))
        print(f"{scale:8g}  {right}       {rows[-1]['diversity']:.2f}   {parts}", flush=True)
    print(f"{time.process_time() - begun:.0f} CPU-seconds")
    if options.out:
        options.out.write_text(json.dumps({"images": pipeline.info["images"], "rows": rows}, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy and diversity against the guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    scales = [row["guidance_scale"] for row in rows]
    axis.plot(scales, [row["seen"]["all"] for row in rows], "o-", label="captions, pairs seen in training")
    axis.plot(scales, [row["unseen"]["all"] for row in rows], "s-", label="captions, pairs never seen")
    axis.plot(scales, [row["diversity"] for row in rows], "^--", color="grey", label="diversity, of real pictures'")
    axis.set(xlabel="guidance scale", ylim=(0, max(1.1, *(row["diversity"] + 0.1 for row in rows))))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
