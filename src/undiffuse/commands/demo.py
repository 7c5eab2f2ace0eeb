"""``undiffuse demo``: from nothing to a trained model and its pictures in two minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .options import AnyPath

EXAMPLES = """
undiffuse demo                     train on handwritten digits, then sample
undiffuse demo --out runs/other --seed 1
"""

ROWS = 8  # the grid is 8x8, one class a row


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    run: Path
    samples: Path
    denoising: Path
    model: Path


def demo(out: AnyPath = Path("runs/demo"), seed: int = 0, device: str = "auto") -> Demo:
    """Train a class-conditional model from scratch on scikit-learn's 1,797 handwritten digits and sample from it.

    Leaves a run folder with a grid of samples (one class a row), the way from noise to digits as an animation, the
    metrics, the configuration and the model. A run that was stopped goes on; a finished one is sampled again.

    Args:
        out: The run folder.
        seed: Decides the weights, the noise and the order of the data.
        device: auto, cpu, cuda, mps.

    Raises:
        UndiffuseError: scikit-learn is missing, or the folder holds another run.
    """
    from ..outputs import write_samples
    from ..pipeline import BATCH, Pipeline, resolve_device
    from .train import train

    out = Path(out)
    train("digits", out=out, recipe="digits", seed=seed, device=device)
    pipeline = Pipeline.load(out, resolve_device(device))
    classes: list[int | None] = [row for row in range(ROWS) for _ in range(ROWS)]
    options = {"number": len(classes), "classes": ",".join(map(str, classes)), "seed": seed}
    targets = out / "samples.png", out / "denoising.webp"
    for target in targets:
        drawn = len(classes), pipeline.sampling, BATCH, None
        write_samples(target, pipeline, *drawn, str(out), options, seed=seed, classes=classes)
    return Demo(out, *targets, out / "model")


def report(made: Demo) -> str:
    run = made.run
    return f"""
{made.samples}: new digits, one class a row
{made.denoising}: the same digits coming out of the noise

try next
  undiffuse sample {run} --classes 3 -n 16 --seed 1     sixteen threes
  undiffuse sample {run} --steps 5 --solver heun        fewer steps, another solver
  undiffuse sample {run} --guidance-scale 4             ask harder: clearer, less varied
  undiffuse show {run}                                  what was trained, and how
  undiffuse train FOLDER                                your own pictures""".lstrip()
