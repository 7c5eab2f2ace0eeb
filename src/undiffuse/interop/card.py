"""The model card: what a model is, of what, how good, and under which license, as a README.md with YAML on top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL.Image import Image

from .. import __version__
from ..errors import UndiffuseError
from ..networks import Network, describe
from ..outputs import describe as settings_of
from ..outputs import drawable, grid
from ..pipeline import Pipeline

SHOWN = 16
"""Samples on the card."""
LICENSES = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "other")
"""Some of the Hub's names, for suggestions; any other is taken as it is."""


def model_card(
    pipeline: Pipeline,
    *,
    license: str | None = None,
    diffusers: str | None = None,
    run: Path | None = None,
    name: str = "",
) -> str:
    """The card as Markdown.

    Args:
        license: of the weights, by the Hub's name for it; None: the card says that none is stated.
        diffusers: why diffusers needs code of ours for it, "" if it needs none, None if it is no folder of diffusers.
        run: the folder of its run, whose evaluations are quoted.
        name: the title.
    """
    title = name or f"A diffusion model of {pipeline.info.get('data') or pipeline.spec.kind}"
    tags = ["undiffuse", "diffusion", *(["diffusers"] if diffusers is not None else [])]
    head = [
        "---",
        f"license: {license or 'unknown'}",
        "library_name: " + ("diffusers" if diffusers == "" else "undiffuse"),
    ]
    head += ["pipeline_tag: " + ("text-to-image" if pipeline.takes_prompts else "unconditional-image-generation")] * (
        pipeline.spec.kind == "image"
    )
    head += ["tags:", *(f"- {tag}" for tag in tags), "---"]
    parts = [*head, "", f"# {title}", ""]
    if drawable(pipeline.spec):
        parts += [f"![{SHOWN} samples, none chosen](samples.png)", ""]
    parts += ["## What it is", "", *rows(facts(pipeline)), ""]
    if license is None:
        parts += ["**No license is stated**: ask the author before you use it.", ""]
    parts += ["## How to sample", "", *usage(pipeline, diffusers), ""]
    found = evaluations(run, pipeline.fingerprint)
    if found:
        parts += ["## How good it is", "", *found, ""]
    else:
        parts += [
            "## How good it is",
            "",
            "Nothing was measured where it was written; `undiffuse evaluate` measures.",
            "",
        ]
    parts += [
        "## How it was trained",
        "",
        "```json",
        json.dumps(pipeline.info, indent=2, ensure_ascii=False),
        "```",
        "",
    ]
    parts += ["## Limits", "", "It makes data like those that it was trained on, with their faults and omissions."]
    return "\n".join(parts) + "\n"


def facts(pipeline: Pipeline) -> list[tuple[str, str]]:
    """What is asked first."""
    network, spec = pipeline.denoiser.network, pipeline.spec
    said = [("data", f"{pipeline.info.get('data', 'not stated')}: {spec.kind} {list(spec.shape)}, {spec.dtype}")]
    if spec.classes:
        said.append(("classes", ", ".join(spec.classes[:20]) + (" ..." if len(spec.classes) > 20 else "")))
    if pipeline.denoiser.conditions is not None:
        said.append(("takes", ", ".join(_taken(pipeline))))
    cost = describe(network, pipeline.shape) if isinstance(network, Network) else None
    said.append(("network", f"{pipeline.config.network}" + ("" if cost is None else f", {cost}")))
    said.append(("schedule", type(pipeline.config.schedule).__name__))
    said.append(("the network says", type(pipeline.config.prediction).__name__))
    said.append(("sampling", ", ".join(f"{key} {value}" for key, value in settings_of(pipeline.sampling).items())))
    if "images" in pipeline.info:
        said.append(("images seen", f"{pipeline.info['images']:,}"))
    said.append(("recipe", str(pipeline.info.get("recipe", "not stated"))))
    said.append(("weights", f"{pipeline.fingerprint} (SHA-256)"))
    return [*said, ("made with", f"undiffuse {__version__}")]


def _taken(pipeline: Pipeline) -> list[str]:
    """What it can be asked for, by the names that ``cond`` takes."""
    assert pipeline.denoiser.conditions is not None
    spec = pipeline.spec
    of = {"attributes": spec.attributes, "numbers": spec.numbers}
    return [
        f"{name} ({', '.join(each for each, *_ in of[name])})" if of.get(name) else name
        for name in pipeline.denoiser.conditions.asked
    ]


def rows(pairs: list[tuple[str, str]]) -> list[str]:
    """A table."""
    return ["| | |", "|---|---|", *(f"| {key} | {str(value).replace('|', '/')} |" for key, value in pairs)]


def usage(pipeline: Pipeline, diffusers: str | None) -> list[str]:
    """Code that samples from it."""
    conditions = pipeline.denoiser.conditions
    classes = len(pipeline.spec.classes) if conditions is not None and "classes" in conditions.asked else 0
    asked = f", classes={list(range(min(classes, 4)))}" if classes else ""
    asked = ', prompts=["..."]' if pipeline.takes_prompts else asked
    place = "FOLDER" if diffusers is None else "FOLDER/undiffuse"
    own = ["```python", "import undiffuse", f'images = undiffuse.Pipeline.load("{place}").sample(4{asked})', "```"]
    if diffusers == "":
        call = 'pipeline("...")' if pipeline.takes_prompts else "pipeline(4)"
        return [
            "```python",
            "from diffusers import DiffusionPipeline",
            'pipeline = DiffusionPipeline.from_pretrained("FOLDER")',
            f"images = {call}.images",
            "```",
        ]
    if diffusers is None:
        return own
    return [*own, "", f"With diffusers, through code in this folder, since {diffusers}:", "", "```python",
            "from diffusers import DiffusionPipeline",
            'pipeline = DiffusionPipeline.from_pretrained("FOLDER", custom_pipeline="FOLDER", trust_remote_code=True)',
            "images = pipeline(4).images", "```"]  # fmt: skip


def evaluations(run: Path | None, weights: str) -> list[str]:
    """The figures of the evaluations of these very ``weights`` in a run's folder, each with its interval, floor and
    fingerprint; those of earlier weights are of another model."""
    lines = []
    for path in sorted(run.glob("evaluation/*/evaluation.json")) if run is not None else ():
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
            made = found["samples"]
            if made.get("weights") != weights:
                continue
            steps = f"{made['steps']} step{'s' * (made['steps'] != 1)}"
            how = f"{made['solver']}, {steps}, guidance {made['guidance_scale']:g}, n = {made['n']:,}"
            lines += [
                f"{how}, {found['features']['name']} features, against {found['data']['name']} (fingerprint "
                f"{found['fingerprint']}):",
                "",
                "| | value | 95 % | real data |",
                "|---|---|---|---|",
            ]
            for name, each in found["metrics"].items():
                floor = "" if each["floor"] is None else f"{each['floor']:.4g}"
                span = " to ".join(f"{bound:.4g}" for bound in each["interval"])
                lines.append(f"| {name.replace('_', ' ')} | {each['value']:.4g} | {span} | {floor} |")
            lines.append("")
        except (ValueError, KeyError, TypeError) as error:
            raise UndiffuseError(f"{path}: cannot be read ({error}); remove it") from None
    return lines


def card_picture(pipeline: Pipeline) -> Image | None:
    """The first samples of seed 0; None for data that are not drawn."""
    return grid(pipeline.spec, pipeline.draw(SHOWN)) if drawable(pipeline.spec) else None
