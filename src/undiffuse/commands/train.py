"""``undiffuse train``: train on your own data."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import tyro

from ..errors import UndiffuseError
from .options import AnyPath, DataOptions, checked, words_of

if TYPE_CHECKING:
    from ..data import Dataset
    from ..training import Progress, Recipe

EXAMPLES = """
undiffuse train digits                     real handwritten digits, a minute
undiffuse train moons --recipe tiny        seconds, to see that it works
undiffuse train ./photos --image-size 64   a folder of images, or folders of
                                           them, one a class
undiffuse train mnist --data-root ~/data --minutes 30
undiffuse train shapes --recipe text       captions: text to image
undiffuse train ./photos --image-size 64 --beside ./sketches
undiffuse train ./photos --attributes breed,colour --numbers age
undiffuse train ./photos --until-converged
undiffuse train ./photos --image-size 128 --recipe autoencoder --out runs/ae
undiffuse train ./photos --image-size 128 --codec runs/ae   in its latents
undiffuse train volumes.npy --set optimiser.lr=0.0005 --set training.keep=5
"""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    path: Path
    state: str
    step: int
    images: int
    seconds: float  # of training, over all its parts
    loss: float | None  # mean in the last line of the metrics
    model: Path
    resumed_from: int  # the update after which this call went on; 0: begun anew


def train(
    data: Annotated[str, tyro.conf.Positional],
    out: AnyPath | None = None,
    recipe: str = "default",
    steps: int | None = None,
    images: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    model_size: Literal["tiny", "small", "base", "large"] | None = None,
    codec: AnyPath | None = None,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    processes: Literal["auto"] | int = "auto",
    strict: bool = False,
    change: bool = False,
    until_converged: bool = False,
    tensorboard: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = (),
    **reading: Unpack[DataOptions],
) -> Trained:
    """Train a diffusion model. The same command continues a run that was stopped.

    Args:
        data: A folder, .zip or .tar of images, a .npy or .npz file, hf:NAME[:SPLIT] of the Hugging Face Hub, or the
            name of a data set: digits, mnist, moons, swissroll, checkerboard, shapes (with captions).
        out: The run folder (default: runs/ and the name of the data, with -codec or -latents after it for these).
        recipe: default, digits, mnist, cifar, points, images, text (pictures with captions), autoencoder (a codec, for
            --codec) or tiny (seconds, for tests).
        steps: Length of the run in updates.
        images: Length of the run in images seen.
        minutes: Length of the run in time; the speed of its first tenth decides how many images that is.
        batch_size: Images an update.
        model_size: tiny, small, base or large.
        codec: Train in the latents of this codec: a run of the recipe autoencoder, or a folder of diffusers (a vae, or
            a pipeline that has one). The data are encoded once and kept.
        seed: Of everything that is drawn.
        device: auto, cpu, cuda, mps.
        workers: Threads that read coming batches (default: what suits the data and the device); changes only the speed.
        processes: On a CPU: so many processes share each batch, and the threads. auto: as many as the run was stopped
            with; a new one of ten minutes or more tries what is faster.
        strict: Refuse a folder with a file that cannot be read instead of skipping it.
        change: Go on with the run that is there although its length, optimiser, objective or average were others.
        until_converged: Stop when the held-out loss no longer improves measurably; --steps or --images is then the most
            (default: ten times the recipe's).
        tensorboard: Also write curves and previews for TensorBoard.
        set: Change one setting of the recipe, such as optimiser.lr=0.001; may be repeated.
        reading: How the data are read.

    Returns:
        What the finished run is.

    Raises:
        UndiffuseError: bad data, a setting that does not exist or is out of range, a folder of another run.
    """
    from ..crew import Crew
    from ..distributed import joined
    from ..training import run_training
    from ..training.recipe import with_convergence

    if until_converged and minutes is not None:
        raise UndiffuseError("--until-converged has no time budget: give --images or --steps as the longest")
    if processes != "auto" and processes < 1:
        raise UndiffuseError(f"--processes {processes}: at least 1, or auto")
    given = {
        "--out": out,
        "--recipe": None if recipe == "default" else recipe,
        "--steps": steps,
        "--images": images,
        "--minutes": minutes,
        "--batch-size": batch_size,
        "--model-size": model_size,
        "--codec": codec,
        "--seed": seed or None,
        "--device": None if device == "auto" else device,
        "--workers": workers,
        "--processes": None if processes == "auto" else processes,
    }
    words = ["undiffuse", "train", data, *words_of({**given, **checked(reading)})]
    flags = {
        "--strict": strict,
        "--change": change,
        "--until-converged": until_converged,
        "--tensorboard": tensorboard,
    }
    words += [name for name, given in flags.items() if given]
    words += [word for setting in set for word in ("--set", setting)]
    called = Path(data).stem if Path(data).exists() else re.sub(r"[^\w.-]+", "-", data)
    called += "-codec" if recipe == "autoencoder" else "-latents" if codec is not None else ""
    folder = Path(out) if out is not None else Path("runs") / called
    with joined(device) as (team, place), screen() as (say, progress):
        prepared = partial(
            prepare,
            data,
            recipe=recipe,
            steps=steps,
            images=images,
            minutes=minutes,
            batch_size=batch_size,
            model_size=model_size,
            codec=codec,
            device=place,
            seed=seed,
            strict=strict,
            set=set,
            **reading,
        )
        if codec is not None and team.size > 1:  # one encodes the data, and the others find them in the cache
            with team.agree():
                if team.first:
                    prepared()
        with team.agree():
            dataset, chosen = prepared()
            if until_converged:
                chosen = with_convergence(chosen, given_length=steps is not None or images is not None)
        result = run_training(
            dataset,
            chosen,
            folder,
            seed=seed,
            device=device,
            minutes=minutes,
            change=change,
            workers=workers,
            data=data,
            command=shlex.join(words),
            tensorboard=tensorboard,
            crew=Crew(tuple(words[1:]), None if processes == "auto" else processes),
            say=say,
            progress=progress,
        )
    return Trained(**vars(result))


def prepare(
    data: str,
    *,
    recipe: str,
    steps: int | None,
    images: int | None,
    minutes: float | None,
    batch_size: int | None,
    model_size: str | None,
    seed: int,
    strict: bool,
    set: tuple[str, ...],
    codec: AnyPath | None = None,
    device: str = "cpu",
    **reading: Unpack[DataOptions],
) -> tuple[Dataset, Recipe]:
    """The data (or their latents) and the recipe that these options mean."""
    from ..data import open_dataset
    from ..data.latents import Latents, codec_for, latent_spec
    from ..pipeline import resolve_device
    from ..training import make_recipe
    from ..training.recipe import with_length, with_settings
    from ..training.tasks import NO_LATENTS

    if sum(limit is not None for limit in (steps, images, minutes)) > 1:
        raise UndiffuseError("--steps, --images and --minutes are three ways to say how long: give one")
    dataset = open_dataset(data, **checked(reading), strict=strict, seed=seed)
    inner = None if codec is None else codec_for(codec, dataset, resolve_device(device))
    spec = dataset.spec if inner is None else latent_spec(dataset.spec, inner)
    chosen = with_settings(make_recipe(recipe, spec, len(dataset), model_size), set)
    if inner is not None and chosen.codec is not None:
        raise UndiffuseError("a codec of latents: train it on the data, without --codec")
    if inner is not None and chosen.model.beside is not None:
        raise UndiffuseError(NO_LATENTS)
    if inner is not None:
        with bar(f"encoding {dataset.name}") as progress:
            dataset = Latents(dataset, inner, chosen.augment, progress=progress)
    return dataset, with_length(chosen, steps=steps, images=images, batch_size=batch_size)


def data_of(run: Path, latents: bool = False) -> Dataset:
    """The data that a run's own command names; ``latents``: or what of them it learns from."""
    from ..config import from_json, load_json
    from ..data import open_dataset
    from ..data.augment import Augment
    from ..data.latents import Latents, codec_for
    from . import _parse

    command = run / "command.txt"
    words = shlex.split(command.read_text("utf-8"))[2:] if command.is_file() else []
    if not words:
        raise UndiffuseError(f"{command}: does not name the data of this run, which was trained from Python")
    given = _parse("train", sys.modules[__name__], words).keywords  # pyrefly: ignore
    names = [name for name in (*DataOptions.__annotations__, "strict", "seed") if name in given]
    dataset = open_dataset(given["data"], **{name: given[name] for name in names})
    if given["codec"] is None or not latents:
        return dataset
    config = run / "config.json"
    augment = from_json(Augment, load_json(config)["recipe"]["augment"], str(config))
    return Latents(dataset, codec_for(given["codec"], dataset), augment)


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that appears when something is done; on no terminal a plain line every ten seconds."""
    from tqdm import tqdm

    bars: list[tqdm[Any]] = []
    last = time.monotonic()

    def move(done: int, total: int) -> None:
        nonlocal last
        if sys.stderr.isatty():
            if not bars:
                bars.append(tqdm(total=total, desc=what, unit="item", unit_scale=True, leave=False))
            bars[0].update(done - bars[0].n)
        elif time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,} items", flush=True)

    try:
        yield move
    finally:
        for each in bars:
            each.close()


def report(result: Trained) -> str:
    loss = "" if result.loss is None else f", loss {result.loss:.4g}"
    run = shlex.quote(str(result.path))
    makes = (result.model / "pipeline.json").is_file()
    following = f"undiffuse sample {run}" if makes else f"undiffuse train DATA --codec {run}"
    return (
        f"{result.path}: {result.state}, {result.step:,} updates, {result.images:,} images, "
        f"{result.seconds:.0f} s{loss}\n"
        f"  look: {shlex.quote(str(result.path / 'report.html'))}\n"
        f"  next: {following}"
    )


@contextmanager
def screen() -> Iterator[tuple[Callable[[str], None], Callable[[Progress], None]]]:
    """How lines and progress appear: a bar on a terminal, else a plain line every ten seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        bars: list[tqdm[Any]] = []

        def move(progress: Progress) -> None:
            if not bars:  # only now, so that it stands below the header; what came before is not this run's speed
                start = {"initial": progress.images, "total": progress.total_images}
                bars.append(tqdm(unit="img", unit_scale=True, dynamic_ncols=True, leave=False, **start))
            bar = bars[0]
            bar.total = progress.total_images
            if progress.loss is not None:
                bar.set_postfix_str(f"loss {progress.loss:.4f}", refresh=False)
            bar.update(progress.images - bar.n)

        try:
            yield lambda text: tqdm.write(text, file=sys.stdout), move
        finally:
            for bar in bars:
                bar.close()
        return
    last = time.monotonic()

    def line(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10 or progress.loss is None:
            return
        last = now
        of = "" if progress.total_images is None else f" of {progress.total_images:,}"
        left = "" if progress.seconds_left is None else f", {progress.seconds_left:.0f} s left"
        print(
            f"update {progress.step:,}, {progress.images:,}{of} images, loss {progress.loss:.4f}, "
            f"{progress.images_per_second:,.0f} images/s{left}",
            flush=True,
        )

    yield lambda text: print(text, flush=True), line
