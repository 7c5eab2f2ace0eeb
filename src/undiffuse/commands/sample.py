"""``undiffuse sample``: samples from a saved model."""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..errors import UndiffuseError, UndiffuseWarning, unknown
from .options import AnyPath, Precision, dtype_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..pipeline import Pipeline

EXAMPLES = """
undiffuse sample runs/demo                         a grid, in samples.png
undiffuse sample runs/demo -n 100 --classes 3,7 --seed 1
undiffuse sample runs/demo --solver heun --steps 10 --guidance-scale 2
undiffuse sample runs/demo --out digits.npy -n 1000   the data's own units
undiffuse sample runs/demo --out digits.webp       the way from noise to data
undiffuse sample runs/demo --out folder/           one PNG a sample
undiffuse sample --from samples.png                the same picture again
undiffuse sample runs/shapes --prompt "a red circle above a blue square"
undiffuse sample runs/enlarge --beside small.png      a model of model.beside
undiffuse sample models/sd --prompt "a (red:1.3) house" --weighted-prompts
undiffuse sample runs/demo --solver ddpm --steps 250 --set noise=brownian
undiffuse sample runs/big -n 10000 --out many.npy --compile --precision bf16
"""


@dataclass(frozen=True)
class Sampled:
    """What was sampled, how, and where it is."""

    path: Path
    samples: int
    shape: tuple[int, ...]  # of one sample, in the data's own layout
    dtype: str
    seed: int
    classes: tuple[str, ...] | None
    prompts: tuple[str, ...] | None
    solver: str
    grid: str
    steps: int
    guidance_scale: float
    calls: int  # of the network, for one sample
    whole_calls: int  # those in which all of it has computed
    precision: str  # float32, bfloat16 or float16
    compiled: bool  # whether the network was; not if that has failed
    seconds: float


def sample(
    model: Annotated[AnyPath | None, tyro.conf.Positional] = None,
    number: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None,
    solver: str | None = None,
    steps: int | None = None,
    grid: str | None = None,
    guidance_scale: float | None = None,
    classes: str | None = None,
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT")] = (),
    prompts: AnyPath | None = None,
    negative_prompt: Annotated[str | None, tyro.conf.arg(metavar="TEXT")] = None,
    weighted_prompts: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    cond: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=ROW")] = (),
    against: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=ROW")] = (),
    beside: AnyPath | None = None,
    mask: AnyPath | None = None,
    attention: AnyPath | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    rows: int | None = None,
    tile: int | None = None,
    size: Annotated[str | None, tyro.conf.arg(metavar="HEIGHTxWIDTH")] = None,
    out: AnyPath | None = None,
    from_: Annotated[AnyPath | None, tyro.conf.arg(name="from")] = None,
    device: str = "auto",
    precision: Precision | None = None,
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = (),
) -> Sampled:
    """Sample from a model and write a picture, a folder of pictures, an array or an animation.

    Args:
        model: A run folder or a model folder.
        number: How many samples (default 64; with --beside as many as there are pictures).
        solver: How to walk from noise to data (default: the model's).
        steps: How many steps (default: the model's).
        grid: Which noise levels to visit (default: the model's).
        guidance_scale: 1 is the conditional model, 0 the unconditional one, more asks harder (default: the model's).
        classes: Numbers, names, ranges or `none`: `3`, `0-9`, `cat,dog`. Sample i gets class number i modulo how many
            are given (default: all in turn).
        prompt: What a model with text shall make; may be repeated. Sample i gets prompt i modulo how many there are.
        prompts: A text file with one prompt a line, after those of --prompt.
        negative_prompt: What guidance leads away from.
        weighted_prompts: Brackets in prompts weigh words, `(word:1.3)`, `(word)`, `[word]`: of models of diffusers.
        cond: Any condition by name: `attributes=manx,none`, `breed=manx`, `age=3` in the data's own units, or
            `place=0.1,0.2` as the model takes it; may be repeated. Sample i gets row i modulo how many there are.
        against: What guidance leads away from, any condition by name: `classes=3`.
        beside: Of a model that was shown pictures: a picture to enlarge, fill or translate, a folder of them, or a
            .npy in the data's own units. Sample i gets picture i modulo how many there are.
        mask: What of these pictures is to be filled in: a picture, transparent or white there.
        attention: Also write a .png of where each word of the first prompt has acted in sample 0.
        seed: Sample i is a function of the seed and i (default 0).
        batch_size: Samples computed together (default 64); changes a sample by rounding only.
        rows: Fill every network call up to so many rows, as `undiffuse serve --exact --rows N` does: on a CPU the
            samples are then the server's to the last bit.
        tile: Decode a model's latents in tiles of so many positions a side, for pictures that do not fit into memory.
        size: Of the pictures, of a model of diffusers that makes them in several (default: its own).
        out: A .png grid, a .npy array of shape [N, data shape] in the data's own units and dtype, a .gif or .webp of
            the trajectory, or a folder with one file a sample. Sounds: a .wav with one after another, or a folder of
            them. Points: a .csv. (Default: samples, as what the data is.)
        from_: A PNG made by this command: make it again, except for the options that are given.
        device: auto, cpu, cuda, mps.
        precision: Of the network: float32 (the default), or bf16 or fp16, which take half the memory, are faster where
            the processor multiplies in them, and change a sample by their rounding.
        compile: Compile the network (torch.compile; CUDA graphs on a GPU), which takes a minute or more and pays for
            many samples; changes a sample by rounding only. Take a --batch-size that is a power of two.
        set: Change one more sampling setting, such as threshold=static, noise=brownian, guidance_interval=0.2,5,
            solver.eta=0.5, long_prompts=windows or clip_skip=1, or reuse=3 to run the whole network in every third call
            only; may be repeated.

    Raises:
        UndiffuseError: a model that cannot be loaded, an option out of range, a name that does not exist.
    """
    from ..codecs import Tiling
    from ..config import override
    from ..distributed import joined
    from ..outputs import check_target, describe, made_by, suffixes, write_attention, write_samples
    from ..pipeline import BATCH, REGISTRIES, Pipeline

    given = {
        "number": number,
        "solver": solver,
        "steps": steps,
        "grid": grid,
        "guidance_scale": guidance_scale,
        "classes": classes,
        "prompt": [*prompt, *read_prompts(prompts)] or None,
        "negative_prompt": negative_prompt,
        "weighted_prompts": weighted_prompts or None,
        "cond": list(cond) or None,
        "against": list(against) or None,
        "beside": None if beside is None else str(beside),
        "mask": None if mask is None else str(mask),
        "seed": seed,
        "batch_size": batch_size,
        "rows": rows,
        "tile": tile,
        "size": size,
        "precision": precision,
        "compile": compile or None,
        "set": list(set) or None,
    }
    made = made_by(Path(from_)) if from_ is not None else None
    if model is None and made is None:
        raise UndiffuseError("name a model: undiffuse sample runs/NAME")
    model = Path(model or (made["model"] if made else ""))
    options: dict[str, Any] = {**(made["options"] if made else {}), **{k: v for k, v in given.items() if v is not None}}
    if beside is not None:
        options.pop("shown", None)
    with joined(device) as (team, place):
        with team.agree():
            pipeline = Pipeline.load(model, place, dtype=dtype_of(options.get("precision")))
            if "size" in options:
                pipeline = pipeline.resized(*parse_size(options["size"]))
            if made and made["weights"] != pipeline.fingerprint:
                others = "by other weights, or in another precision"
                warnings.warn(f"{from_} was made {others}: expect another picture", UndiffuseWarning, stacklevel=2)
            if options.get("compile"):
                pipeline = pipeline.compiled()
            of_sampling = ("solver", "steps", "grid", "guidance_scale", "weighted_prompts")
            changes = {name: options[name] for name in of_sampling if name in options}
            settings = pipeline.settings(made["sampling"] if made else None, **changes)
            settings = override(settings, options.get("set", ()), REGISTRIES)
            count, seed, batch = options.get("number", 64), options.get("seed", 0), options.get("batch_size", BATCH)
            chosen = parse_classes(options["classes"], pipeline.spec.classes) if "classes" in options else None
            asked, negative = options.get("prompt"), options.get("negative_prompt")
            pictures = read_beside(pipeline, options)
            rows_of, away = (parse_rows(options.get(name, ()), pipeline, name) for name in ("cond", "against"))
            if pictures is not None:
                rows_of, count = {**rows_of, "beside": pictures}, options.get("number", len(pictures))
            if attention is not None and (not asked or Path(attention).suffix.lower() != ".png"):
                raise UndiffuseError("--attention names a .png and needs a --prompt, to whose words it is")
            if "tile" in options:
                if pipeline.codec is None:
                    raise UndiffuseError("--tile is for models in latents; this one makes the data themselves")
                pipeline.tiling = Tiling(options["tile"])
            target = Path(out or f"samples{suffixes(pipeline.spec)[0]}")
            told: dict[str, Any] = {"prompts": asked, "negative_prompt": negative, "cond": rows_of, "against": away}
            pipeline.begin([0], classes=chosen, sampling=settings, **told)  # refuses
            if team.first:
                check_target(target, pipeline.spec)
        begun = time.monotonic()
        with progress_bar(team.first) as tick:
            write_samples(
                target,
                pipeline,
                count,
                settings,
                batch,
                tick,
                str(model),
                options,
                options.get("rows"),
                team,
                seed=seed,
                classes=chosen,
                **told,
            )
        if attention is not None and asked and team.first:
            write_attention(Path(attention), pipeline, pipeline.attention(asked[0], seed=seed, **vars(settings)))
    shown = describe(settings)
    if settings in pipeline.tuned:
        shown["grid"] = "tuned"
    return Sampled(
        path=target,
        samples=count,
        shape=pipeline.spec.original_shape,
        dtype=pipeline.spec.dtype,
        seed=seed,
        classes=None if chosen is None else tuple("none" if c is None else pipeline.spec.classes[c] for c in chosen),
        prompts=None if asked is None else tuple(asked),
        **shown,
        calls=pipeline.calls(settings),
        whole_calls=pipeline.whole_calls(settings),
        precision=pipeline.arithmetic["dtype"],
        compiled=pipeline.arithmetic["compiled"],
        seconds=time.monotonic() - begun,
    )


def report(sampled: Sampled) -> str:
    kind = "x".join(map(str, sampled.shape)) or "scalar"
    rate = sampled.samples / max(sampled.seconds, 1e-9)
    how = [sampled.precision] * (sampled.precision != "float32") + ["compiled"] * sampled.compiled
    whole = "" if sampled.whole_calls == sampled.calls else f", {sampled.whole_calls} of them whole"
    return (
        f"{sampled.path}\n"
        f"  {sampled.samples} samples, {kind} {sampled.dtype}, seed {sampled.seed}, "
        f"{sampled.seconds:.1f} s ({rate:.3g} a second{'; ' if how else ''}{', '.join(how)})\n"
        f"  {sampled.solver}, {sampled.grid} grid, {sampled.steps} steps, guidance {sampled.guidance_scale:g}: "
        f"{sampled.calls} network calls a sample{whole}"
    )


def read_beside(pipeline: Pipeline, options: dict[str, Any]) -> Tensor | None:
    """The pictures that ``options`` name, in model units; what they hold is noted among the options."""
    from ..data.base import digest
    from ..data.shown import read_shown

    if "beside" not in options:
        if "mask" in options:
            raise UndiffuseError(f"--mask {options['mask']}: says what is to be filled in; of what picture? (--beside)")
        return None
    if pipeline.beside is None:
        raise UndiffuseError(
            f"--beside {options['beside']}: this model was trained with no pictures beside: leave it out"
        )
    shown = read_shown(options["beside"], pipeline.beside, options.get("mask"), pipeline.fills_holes)
    before, options["shown"] = options.get("shown"), digest(shown.numpy().tobytes())[:16]
    if before not in (None, options["shown"]):
        warnings.warn(
            f"{options['beside']} holds other pictures than it did: expect another result",
            UndiffuseWarning,
            stacklevel=2,
        )
    return shown


def parse_size(text: str) -> tuple[int, ...]:
    """``512x768`` is a height and a width."""
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and len(number) < 6 for number in numbers):
        raise UndiffuseError(f"--size {text}: write it as HEIGHTxWIDTH, as in 512x768")
    return tuple(map(int, numbers))


def read_prompts(path: AnyPath | None) -> list[str]:
    """The lines of a text file, without empty ones."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UndiffuseError(f"--prompts {path}: cannot be read ({reason})") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UndiffuseError(f"--prompts {path}: holds no prompt; write one a line")
    return found


def parse_classes(text: str, names: tuple[str, ...]) -> list[int | None]:
    """Class numbers from ``3``, ``0-9``, ``cat,dog``; ``none`` is None, the null class. A name wins over a number."""

    def whole(text: str) -> bool:
        return text.isdecimal() and len(text) < 10  # "²" is a digit too, and Python reads numbers up to 4,300 digits

    chosen: list[int | None] = []
    for part in (part.strip() for part in text.split(",")):
        first, _, last = part.partition("-")
        if part in names:
            chosen.append(names.index(part))
        elif part.lower() == "none":
            chosen.append(None)
        elif whole(part):
            chosen.append(int(part))
        elif whole(first) and whole(last) and int(first) <= int(last) < len(names):
            chosen.extend(range(int(first), int(last) + 1))
        else:
            raise unknown("class", part, names)
    for number in chosen:
        if number is not None and number >= len(names):
            last_class = f"0 to {len(names) - 1}" if names else "none"
            raise UndiffuseError(f"--classes: class {number} does not exist; the classes of this model: {last_class}")
    return chosen


def parse_rows(texts: Sequence[str], pipeline: Pipeline, option: str) -> dict[str, list[Any]]:
    """Rows of conditions by name, from ``NAME=ROW`` each: a text, or numbers with ``none`` where nothing is asked."""
    from ..data.columns import read_row

    conditions = pipeline.denoiser.conditions
    rows: dict[str, list[Any]] = {}
    for each in texts:
        name, equals, said = each.partition("=")
        if conditions is None or name not in pipeline.names:
            raise unknown(f"condition of --{option} (as in classes=3)", name, pipeline.names)
        if name == "beside":
            raise UndiffuseError(f"--{option} {each}: pictures are given by --beside")
        if name in conditions.written:
            rows.setdefault(name, []).append(said)
            continue
        if not equals:
            raise UndiffuseError(f"--{option} {each}: say what is asked for, as in {name}=3")
        if (in_words := read_row(pipeline.spec, name, said)) is not None:
            rows.setdefault(name, []).extend(in_words)
            continue
        if name == "classes":
            rows.setdefault(name, []).extend(parse_classes(said, pipeline.spec.classes))
            continue
        try:
            numbers = [parse_number(part.strip()) for part in said.split(",")]
        except ValueError:
            raise UndiffuseError(f"--{option} {each}: numbers with commas between them, or none, are needed") from None
        single = conditions.part(name).null(1).ndim == 1  # then each number is a row
        rows.setdefault(name, []).extend(numbers if single else [numbers])
    return rows


def parse_number(text: str) -> float | None:
    """A number, whole where it is written so; ``none`` is None."""
    if text.lower() == "none":
        return None
    return int(text) if text.removeprefix("-").isdigit() else float(text)


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Gives ``tick(done, total)``, which moves a bar on a terminal and does nothing elsewhere."""
    if not shown or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(unit="step", leave=False) as bar:

        def tick(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tick
