"""``undiffuse doctor``: look at a run before it begins, or at one that is there."""

from __future__ import annotations

import os
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Unpack

import tyro

from ..errors import UndiffuseError, UndiffuseWarning
from .ls import is_run
from .options import AnyPath, DataOptions, checked

if TYPE_CHECKING:
    from ..training.doctor import Finding

EXAMPLES = """
undiffuse doctor digits                  the data, the plan, a trial: a minute
undiffuse doctor ./photos --image-size 64 --minutes 30
undiffuse doctor ./photos --quick        without the trial
undiffuse doctor runs/demo               a run: state, checkpoints, losses
undiffuse doctor runs/demo --resume      prove that it can be stopped
undiffuse doctor runs/demo --nan         why its loss was not finite
"""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says."""

    subject: str
    light: Literal["green", "yellow", "red"]  # the worst of its findings
    findings: list[Finding]
    seconds: float


def doctor(
    data_or_run: Annotated[str, tyro.conf.Positional],
    recipe: str = "default",
    out: AnyPath | None = None,
    steps: int | None = None,
    images: int | None = None,
    minutes: float | None = None,
    batch_size: int | None = None,
    model_size: Literal["tiny", "small", "base", "large"] | None = None,
    seed: int = 0,
    device: str = "auto",
    strict: bool = False,
    quick: bool = False,
    resume: bool = False,
    nan: bool = False,
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH=VALUE")] = (),
    **reading: Unpack[DataOptions],
) -> Diagnosis:
    """Look at data and a plan before the first long hour, or at a run.

    Each line is green, yellow (it will run, but probably not as hoped) or red (mend it first). The exit code is 1 if
    one is red, else 0.

    Args:
        data_or_run: What would be given to train, or a run folder.
        recipe: As for train.
        out: Where the run would be (default: runs/).
        steps: Length of the run in updates.
        images: Length of the run in images seen.
        minutes: Length of the run in time.
        batch_size: Images an update.
        model_size: tiny, small, base or large.
        seed: Of everything that is drawn.
        device: auto, cpu, cuda, mps.
        strict: As for train.
        quick: Data and plan only, without the trial.
        resume: Of a run: prove on it that stopping and resuming changes nothing.
        nan: Of a run: compute its update that was not finite again, and say where it went wrong.
        set: Change one setting of the recipe; may be repeated.
        reading: How the data are read.

    Raises:
        UndiffuseError: what train would refuse; a folder that is no run.
    """
    from ..training.doctor import examine, worst

    begun = time.monotonic()
    checked(reading)
    if is_run(Path(data_or_run)):
        from ..training.aftercare import examine_run

        findings = examine_run(Path(data_or_run), device=device, nan=nan)
        if resume:
            findings += _proof(Path(data_or_run), device)
        return Diagnosis(data_or_run, worst(findings), findings, time.monotonic() - begun)
    if resume or nan:
        raise UndiffuseError(f"{data_or_run}: not a run folder, which --resume and --nan are for")
    from .train import prepare

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset, chosen = prepare(
            data_or_run,
            recipe=recipe,
            steps=steps,
            images=images,
            minutes=minutes,
            batch_size=batch_size,
            model_size=model_size,
            seed=seed,
            strict=strict,
            set=set,
            **reading,
        )
    said = {f"{dataset.name}: {note}" for note in dataset.notes}  # the data set has told these itself
    notes = [str(each.message) for each in caught if issubclass(each.category, UndiffuseWarning)]
    notes = [note for note in notes if note not in said]
    findings = list(
        examine(dataset, chosen, seed=seed, device=device, minutes=minutes, out=out or "runs", notes=notes, quick=quick)
    )
    subject = f"{data_or_run}: {dataset.describe()}; recipe {chosen.name}"
    return Diagnosis(subject, worst(findings), findings, time.monotonic() - begun)


def _proof(run: Path, device: str) -> list[Finding]:
    """Exact resume, proved with the data that the run's own command names."""
    from ..training.doctor import Finding
    from ..training.proof import prove_resume
    from .train import data_of

    dataset = data_of(run, latents=True)
    proof = prove_resume(run, dataset, device=device)
    if proof.exact:
        return [
            Finding(
                "resume",
                "green",
                f"{proof.updates} updates from update {proof.step}, with a stop in the middle and without: all "
                f"{proof.numbers:,} numbers are equal to the last bit ({proof.device})",
            )
        ]
    what = ", ".join(proof.differences[:3])
    if not proof.repeatable:
        return [
            Finding(
                "resume",
                "yellow",
                f"differs ({what}), but so do the same updates made twice without a stop",
                f"{proof.device} rounds differently from time to time, or the data are not the same each time: try "
                "--device cpu",
            )
        ]
    return [Finding("resume", "red", f"differs: {what}", "report this with the run's config.json: it is a bug")]


def exit_code(diagnosis: Diagnosis) -> int:
    """1 if anything is red."""
    return 1 if diagnosis.light == "red" else 0


def report(diagnosis: Diagnosis) -> str:
    colours = {"green": "32", "yellow": "33", "red": "31;1"}
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = [*textwrap.wrap(diagnosis.subject, 80), ""]
    for finding in diagnosis.findings:
        word = f"{finding.light:<7}"
        lit = f"\x1b[{colours[finding.light]}m{word}\x1b[0m" if colour else word
        body = textwrap.wrap(finding.measured, 54, break_on_hyphens=False) or [""]
        if finding.remedy:
            body += textwrap.wrap(f"-> {finding.remedy}", 54, subsequent_indent="   ", break_on_hyphens=False)
        lines.append(f"{lit} {finding.check:<17} {body[0]}")
        lines += [f"{'':<25} {line}" for line in body[1:]]
    counts = {light: sum(f.light == light for f in diagnosis.findings) for light in ("green", "yellow", "red")}
    verdict = {"green": "all is well", "yellow": "look at the yellow ones", "red": "mend the red ones first"}
    lines += [
        "",
        ", ".join(f"{count} {light}" for light, count in counts.items() if count)
        + f": {verdict[diagnosis.light]} ({diagnosis.seconds:.0f} s)",
    ]
    return "\n".join(lines)
