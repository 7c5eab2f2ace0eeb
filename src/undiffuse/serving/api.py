"""What clients send and get: OpenAI's image API, Hugging Face's text-to-image, and arrays for data that is no picture.

Every form becomes the same :class:`.engine.Request`. Unknown fields are refused by name: a setting that would silently
do nothing is a wrong result.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Annotated, Any, Literal, LiteralString, TypeVar

import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from ..asking import Sampling
from ..beside import stated
from ..commands.sample import parse_classes
from ..conditions import Attributes, Patches, Picture, Vector, Written, rows_in
from ..data import DataSpec
from ..data.images import Target, decode, read_header
from ..data.shown import File, hole_in, shown_in
from ..data.sounds import encode_wav
from ..data.store import BadFile
from ..errors import UndiffuseError
from ..pipeline import Pipeline

B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = 20_000_000  # bytes
    samples: int = 64  # of one request
    steps: int = 1000
    json: int = 1_000_000  # bytes of a JSON body, which is read in one go
    pixels: int = 16_000_000  # of an uploaded picture
    seconds: float = 300.0  # until the answer, waiting included
    upload_seconds: float = 30.0  # until the body has arrived


class Refused(Exception):
    """An answer that is an error: ``{"error": {message, type, param, code}}``. ``wait``: seconds until it is worth
    trying again, for ``Retry-After``."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        wait: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.wait = status, message, param, code, wait

    @property
    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- The forms --------------------------------------------------------------------------------------------------------


Word = Annotated[str, Field(max_length=10_000, strict=True)]
Cell = Word | Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)] | None
Row = Cell | Annotated[list[Cell], Field(max_length=1000)]
"""What is asked of one sample: a text, a name, a number or several; null leaves it open."""


def said_once(words: LiteralString) -> WrapValidator:
    """Of a field that may be several things: what it must be, rather than what it is not for each of them."""

    def validate(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
        try:
            return read(value)
        except ValidationError:
            raise PydanticCustomError("one_of", words) from None

    return WrapValidator(validate)


Rows = Annotated[
    Row | Annotated[list[Row], Field(max_length=1000)],
    said_once("must be a name, a number, null, a list of them, or a list of lists"),
]
Given = dict[Annotated[str, Field(max_length=100)], Rows]
"""Conditions by name: one row, or rows that the samples get in turn; :meth:`.Pipeline.conditions` reads them."""


class How(BaseModel):
    """Fields beyond OpenAI's that every form takes; with its client they go into ``extra_body``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    num_inference_steps: int | None = Field(None, ge=1, description="how many steps")
    guidance_scale: float | None = Field(None, ge=-100, le=100, description="1: the conditional model")
    negative_prompt: str | None = Field(None, max_length=10_000, description="what guidance leads away from")
    seed: int | None = Field(None, ge=0, lt=2**63, description="sample i is a function of the seed and i")
    solver: str | None = Field(None, max_length=100, description="how to walk from noise to data")
    grid: str | None = Field(None, max_length=100, description="which noise levels to visit")
    weighted_prompts: bool | None = Field(None, description="whether brackets weigh words: (word:1.3), (word), [word]")
    long_prompts: Literal["cut", "windows"] | None = Field(None, description="windows: nothing of a long prompt is cut")
    clip_skip: int | None = Field(None, ge=0, le=100, description="how many of CLIP's last layers are left out")
    class_labels: Annotated[
        int | list[int | None] | None,
        said_once("must be the number of a class, or a list of them (null: none)"),
    ] = Field(None, description="class numbers; sample i gets number i modulo them")
    cond: Given | None = Field(
        None, max_length=100, description="any condition by name, as /v1/models lists them; sample i gets row i in turn"
    )
    against: Given | None = Field(None, max_length=100, description="what guidance leads away from, by name")
    beside: Annotated[
        str | Annotated[list[str], Field(max_length=64)] | None, said_once("must be a text, or a list of at most 64")
    ] = Field(None, description="base64 of what the model is shown: a picture, or a .npy in the data's own units")


class Generation(How):
    """The body of ``/v1/images/generations``."""

    prompt: str = Field("", max_length=10_000, description="class names or numbers; empty: all classes in turn")
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(None, ge=1)
    size: str | None = Field(None, max_length=20, description="WIDTHxHEIGHT of the model, or auto")
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=16)
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = Field(None, max_length=1000)


class Edit(Generation):
    """The fields of ``/v1/images/edits`` beside its files, ``image`` and ``mask``."""

    strength: float | None = Field(None, gt=0, le=1, description="how much noise; 0.6, or 1 with a mask")

    @field_validator("cond", "against", mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return loads(value) if isinstance(value, str) else value


class Samples(How):
    """The body of ``/v1/samples``."""

    prompt: str = Field("", max_length=10_000)
    model: str | None = Field(None, max_length=200)
    n: int | None = Field(None, ge=1)
    format: Literal["npy", "wav"] | None = Field(None, description="npy; wav for sounds, one after another")


class Parameters(How):
    """``parameters`` of Hugging Face's text-to-image."""

    width: int | None = Field(None, ge=1, le=65536)
    height: int | None = Field(None, ge=1, le=65536)
    scheduler: str | None = Field(None, max_length=100, description="the name of a solver")


class TextToImage(BaseModel):
    """Hugging Face's text-to-image: ``{"inputs": ..., "parameters": {...}}``; answered by the bytes of one PNG."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    inputs: str = Field(max_length=10_000)
    parameters: Parameters | None = None


def read_json(body: bytes, form: type[B]) -> B:
    """``body`` as one form. Stricter than most: no duplicate keys, no NaN, no text for numbers, no unknown field."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(400, "the body is not JSON", code="invalid_json") from None
    value = loads(text)
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object", code="invalid_json")
    return checked(form, value, strict=True)


def loads(text: str) -> Any:
    """What JSON says, without duplicate keys and NaN."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen:
                raise Refused(400, f"{short(key)} is given twice", short(key), "duplicate_field")
            seen[key] = value
        return seen

    def constant(text: str) -> float:
        raise Refused(400, f"{text} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError):
        raise Refused(400, "this is not JSON", code="invalid_json") from None


def checked(form: type[B], value: Mapping[str, Any], strict: bool) -> B:
    """The form, or an error that names the field; form fields of uploads are text, so numbers are read from them."""
    try:
        return form.model_validate(dict(value), strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = short(".".join(str(part) for part in first["loc"]) or "body")
        if first["type"] == "extra_forbidden":
            known = ", ".join(form.model_fields)
            raise Refused(400, f"unknown field {param}; known are {known}", param, "unknown_field") from None
        raise Refused(400, f"{param}: {first['msg']}", param, "invalid_value") from None
    except (UnicodeError, RecursionError):
        raise Refused(400, "the body holds text that is not Unicode", code="invalid_value") from None


def short(text: str) -> str:
    return ascii(text)[1:-1][:80]


# --- Forms to requests ------------------------------------------------------------------------------------------------


def samples_of(form: Generation | Samples, limits: Limits) -> int:
    count = form.n or 1
    if count > limits.samples:
        raise Refused(400, f"n is at most {limits.samples}", "n", "too_large")
    return count


def seed_of(form: How) -> int:
    """The seed that was given, or a new one; the answer says which."""
    return secrets.randbelow(2**31) if form.seed is None else form.seed


def sampling_of(form: How, pipeline: Pipeline, limits: Limits) -> Sampling:
    """The model's settings with those that the form changes."""
    if form.num_inference_steps is not None and form.num_inference_steps > limits.steps:
        raise Refused(400, f"num_inference_steps is at most {limits.steps}", "num_inference_steps", "too_large")
    changes: dict[str, Any] = {}
    for field, name in (
        ("solver", "solver"),
        ("grid", "grid"),
        ("num_inference_steps", "steps"),
        ("guidance_scale", "guidance_scale"),
        ("weighted_prompts", "weighted_prompts"),
        ("long_prompts", "long_prompts"),
        ("clip_skip", "clip_skip"),
    ):
        value = getattr(form, field)
        if value is not None:
            changes[name] = value
    try:
        settings = pipeline.settings(**changes)
    except UndiffuseError as error:
        field = "solver" if "solver" in str(error) else "grid" if "grid" in str(error) else None
        raise Refused(400, str(error), field, "invalid_value") from None
    if settings.solver.adaptive:
        raise Refused(400, "this solver chooses its own number of steps; name another", "solver", "invalid_value")
    return settings


def asked_of(
    form: How, prompt: str, pipeline: Pipeline, sampling: Sampling, shown: Tensor | None = None
) -> dict[str, Any]:
    """What of a :class:`.engine.Request` says what is asked for; ``shown``: the pictures beside, model units."""
    classes = classes_of(form, prompt, pipeline)
    conditions = pipeline.denoiser.conditions
    written = {} if conditions is None else conditions.written
    given: dict[str, dict[str, Any]] = {"cond": {**(form.cond or {})}, "against": {**(form.against or {})}}
    if (negative := against_of(form, pipeline, sampling)) is not None:
        if "classes" in given["against"]:
            raise Refused(400, "a class is in against already", "negative_prompt", "invalid_value")
        given["against"]["classes"] = negative
    if given["against"] and sampling.guidance_scale == 1:
        raise Refused(400, "at guidance_scale 1 this does nothing: ask for more", "against", "invalid_value")
    for field, rows in given.items():
        if "beside" in rows and pipeline.beside is not None:
            raise Refused(400, "a picture is given as beside, or as the image of an edit", field, "invalid_value")
        try:
            for name, part in written.items():
                for text in rows_in(rows.get(name), 0):
                    part.check_length(text if isinstance(text, str) else "", sampling.reading)
            pipeline.conditions([0], None, cond=rows, reading=sampling.reading)
        except UndiffuseError as error:
            raise Refused(400, str(error), field, "invalid_value") from None
    if shown is not None:
        given["cond"]["beside"] = shown
    texts = texts_of(form, prompt, pipeline, sampling) if written else {}
    if written.keys() & given["cond"].keys() and not prompt.strip():
        texts["prompts"] = None
    return {"classes": classes, **{name: rows or None for name, rows in given.items()}, **texts}


def classes_of(form: How, prompt: str, pipeline: Pipeline) -> list[int | None] | None:
    """The classes that the samples get in turn: ``class_labels``, else those of the prompt."""
    names = pipeline.spec.classes if "classes" in pipeline.denoiser.null(1) else ()
    if form.class_labels is not None:
        labels = [form.class_labels] if isinstance(form.class_labels, int) else form.class_labels
        if not names:
            raise Refused(400, "this model has no classes", "class_labels", "invalid_value")
        if not labels or any(label is not None and not 0 <= label < len(names) for label in labels):
            raise Refused(400, f"classes are 0 to {len(names) - 1}", "class_labels", "invalid_value")
        if prompt.strip():
            raise Refused(400, "give class_labels or a prompt, not both", "class_labels", "invalid_value")
        return [*labels]
    if pipeline.takes_prompts or not prompt.strip():  # then the prompt is a text
        return None
    if not names:
        raise Refused(400, "this model takes no prompt: leave it empty", "prompt", "invalid_value")
    return _classes(prompt, names, "prompt")


def against_of(form: How, pipeline: Pipeline, sampling: Sampling) -> int | None:
    """The class that a negative prompt names."""
    if not (form.negative_prompt or "").strip():
        return None
    if sampling.guidance_scale == 1:
        raise Refused(
            400, "at guidance_scale 1 a negative prompt does nothing: ask for more", "negative_prompt", "invalid_value"
        )
    if pipeline.takes_prompts:
        return None
    names = pipeline.spec.classes if "classes" in pipeline.denoiser.null(1) else ()
    chosen = _classes(form.negative_prompt or "", names, "negative_prompt") if names else []
    if len(chosen) != 1:
        raise Refused(400, "a negative prompt is one class of this model", "negative_prompt", "invalid_value")
    return chosen[0]


def texts_of(form: How, prompt: str, pipeline: Pipeline, sampling: Sampling) -> dict[str, Any]:
    """What a model with text is asked for, and what guidance leads it away from."""
    conditions = pipeline.denoiser.conditions
    for field, text in (("prompt", prompt), ("negative_prompt", form.negative_prompt or "")):
        for part in conditions.written.values() if conditions is not None else ():
            try:
                part.check_length(text, sampling.reading)
            except UndiffuseError as error:
                raise Refused(400, str(error), field, "invalid_value") from None
    return {"prompts": [prompt], "negative_prompt": form.negative_prompt}


def _classes(text: str, names: tuple[str, ...], param: str) -> list[int | None]:
    try:
        return parse_classes(text.strip(), names)
    except UndiffuseError as error:
        raise Refused(400, str(error), param, "invalid_value") from None


def check_size(form: Generation, spec: DataSpec) -> None:
    """A model makes pictures of one size; asking for another is refused rather than resized."""
    if not spec.has_pictures:
        raise Refused(400, "this model makes no pictures: use /v1/samples", "model", "invalid_value")
    if form.output_compression is not None and form.output_format not in ("jpeg", "webp"):
        raise Refused(
            400, "output_compression is of jpeg and webp; a PNG is never lossy", "output_compression", "invalid_value"
        )
    height, width = spec.shape[1:]
    if form.size not in (None, "auto", f"{width}x{height}"):
        raise Refused(400, f"this model makes pictures of size {width}x{height}", "size", "invalid_value")


# --- Pictures in and out ----------------------------------------------------------------------------------------------


def askable(pipeline: Pipeline) -> list[dict[str, Any]]:
    """The conditions that a model can be asked for by name, and what a client, or a control, must know of each."""
    conditions, spec = pipeline.denoiser.conditions, pipeline.spec
    found: list[dict[str, Any]] = []
    for name in () if conditions is None else (*conditions.asked, *conditions.told):
        part = conditions.part(name)
        match part:
            case Attributes() if name == "attributes" and spec.attributes:
                found += [{"name": each, "kind": "attribute", "values": known} for each, known in spec.attributes]
            case Vector() if name == "numbers" and spec.numbers:
                found += [{"name": n, "kind": "number", "mean": mean, "deviation": d} for n, mean, d in spec.numbers]
            case _ if name == "classes":
                found.append({"name": name, "kind": "classes", "count": int(part.null(1)[0]), "values": spec.classes})
            case Written():
                found.append({"name": name, "kind": "text", "length": part.length})
            case Attributes():
                found.append({"name": name, "kind": "attributes", "sizes": part.sizes})
            case Vector():
                found.append({"name": name, "kind": "vector", "size": part.size})
            case Picture() | Patches() if name == "beside" and (shown := pipeline.beside) is not None:
                made = None if part.made is None else stated(part.made)["kind"]
                size = "x".join(map(str, reversed(shown.shape[1:]))) if shown.has_pictures else None
                form = {"shape": shown.original_shape, "dtype": shown.dtype, "size": size}
                found.append({"name": name, "kind": "picture", "made": made, **form})
            case _:
                found.append({"name": name, "kind": "array", "shape": list(part.null(1).shape[1:])})
    return found


def read_beside(form: How, pipeline: Pipeline) -> Tensor | None:
    """The pictures that a model is to be shown, ``[N, *shape]``, model units, NaN where nothing is known."""
    if form.beside is None:
        return None
    if not form.beside:
        raise Refused(400, "no picture given: name one, or leave beside out", "beside", "invalid_value")
    given = [form.beside] if isinstance(form.beside, str) else form.beside
    return shown_of("beside", decoded("beside", given), pipeline)


def decoded(field: str, texts: Sequence[str]) -> list[bytes]:
    """The files that a field holds in base64."""
    try:
        return [base64.b64decode(each, validate=True) for each in texts]
    except ValueError:
        raise Refused(400, f"{field} is base64 of a picture or of a .npy", field, "invalid_value") from None


def shown_of(field: str, files: Sequence[bytes], pipeline: Pipeline) -> Tensor:
    """The pictures in these files, which ``field`` gave, as a model is shown them."""
    if pipeline.beside is None:
        raise Refused(400, "this model was not trained with pictures beside", field, "invalid_value")
    try:
        return shown_in([File(field, data) for data in files], pipeline.beside, holes=pipeline.fills_holes)
    except UndiffuseError as error:
        raise Refused(400, str(error), field, "invalid_image") from None


@dataclass(frozen=True, eq=False)
class Beginning:
    """Where the pictures of an edit begin, and what of it stays; or what the model is shown."""

    image: Tensor | None = None
    keep: Tensor | None = None
    strength: float = 1.0
    shown: Tensor | None = None


def read_edit(form: Edit, files: Mapping[str, bytes], pipeline: Pipeline, limits: Limits) -> Beginning:
    """What the files of an edit mean. A model that was trained with pictures beside is shown ``image``: to enlarge, to
    colour, or to fill where ``mask`` or transparency says so. Any other begins at it with noise of ``strength``, and
    keeps what the mask does not give free."""
    spec, mask = pipeline.spec, files.get("mask")
    if pipeline.beside is not None and form.beside is not None:
        raise Refused(400, "the image is what this model is shown: leave out beside", "beside", "invalid_value")
    if pipeline.beside is not None and not pipeline.fills_holes:
        for field, given in (("mask", mask), ("strength", form.strength)):
            if given is not None:
                raise Refused(400, f"this model is shown the image, whole: leave out {field}", field, "invalid_value")
        return Beginning(shown=shown_of("image", [files["image"]], pipeline))
    image = read_picture(files["image"], spec, limits)
    if mask is None and has_hole(files["image"], spec, limits):
        mask = files["image"]  # as OpenAI has it
    if mask is not None and size_of("mask", mask) != size_of("image", files["image"]):
        width, height = size_of("image", files["image"])
        raise Refused(
            400, f"mask: must have the image's size, {width}x{height} (width, height)", "mask", "invalid_image"
        )
    if mask is None and pipeline.fills_holes and form.strength is None:
        raise Refused(400, "give a mask, or make a part of the image transparent: it is filled in", "mask", "missing")
    keep = None if mask is None else read_mask(mask, spec, limits)
    return Beginning(image, keep, form.strength if form.strength is not None else 0.6 if keep is None else 1.0)


def has_hole(data: bytes, spec: DataSpec, limits: Limits) -> bool:
    """Whether a part of an uploaded picture is transparent, and transparency no part of the data."""
    height, width = spec.shape[1:]
    return spec.channels != 4 and bool(
        (_pixels("image", data, Target((height, width), 4, 8), limits)[..., 3] < 255).any()
    )


def read_picture(data: bytes, spec: DataSpec, limits: Limits) -> Tensor:
    """An uploaded picture as ``[1, *shape]`` in model units, cropped and resized as training pictures are."""
    height, width = spec.shape[1:]
    bits = 16 if spec.dtype == "uint16" else 8
    if spec.dtype not in ("uint8", "uint16"):
        raise Refused(400, f"this model's data are {spec.dtype}, no pictures can be uploaded", "image", "invalid_value")
    pixels = _pixels("image", data, Target((height, width), spec.channels, bits), limits)
    low, high = float(spec.low or 0), float(spec.high or 255)
    scaled = low + pixels.astype(np.float64) / (2**bits - 1) * (high - low)  # digits are 0 to 16, say
    if "C" in spec.layout and pixels.ndim == 2:
        scaled = scaled[..., None]
    if "C" in spec.layout:
        scaled = np.moveaxis(scaled, -1, spec.layout.index("C"))
    return spec.to_model(np.rint(scaled)[None].astype(spec.dtype))


def read_mask(data: bytes, spec: DataSpec, limits: Limits) -> Tensor:
    """What must stay, ``[1, 1, H, W]``. With an alpha channel the transparent part is to be edited (OpenAI's form);
    without one the white part is (diffusers' form)."""
    import torch

    height, width = spec.shape[1:]
    pixels = _pixels("mask", data, Target((height, width), 4, 8), limits)
    keep = ~hole_in(pixels)
    if keep.all():
        raise Refused(400, "the mask leaves nothing to edit: make a part of it transparent, or white", "mask")
    return torch.from_numpy(keep)[None, None]


def size_of(what: str, data: bytes) -> tuple[int, int]:
    """(width, height) of an uploaded picture."""
    try:
        header = read_header(BytesIO(data))
    except BadFile as error:
        raise Refused(400, f"{what}: {error}", what, "invalid_image") from None
    return header.width, header.height


def _pixels(what: str, data: bytes, target: Target, limits: Limits) -> np.ndarray:
    width, height = size_of(what, data)
    try:
        if width * height > limits.pixels:
            raise BadFile(f"{width}x{height}: more than {limits.pixels / 1e6:g} million pixels")
        return decode(data, target).pixels
    except BadFile as error:
        raise Refused(400, f"{what}: {error}", what, "invalid_image") from None


def encode(picture: np.ndarray, kind: str, compression: int | None) -> bytes:
    """uint8 ``[H, W]`` or ``[H, W, C]`` as a file."""
    buffer = BytesIO()
    image = Image.fromarray(picture)
    if kind == "jpeg":
        image.convert("L" if image.mode == "L" else "RGB").save(
            buffer, "JPEG", quality=95 if compression is None else compression
        )
    elif kind == "webp":
        image.save(buffer, "WEBP", **({"lossless": True} if compression is None else {"quality": compression}))
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def as_file(spec: DataSpec, x: Sequence[Tensor], kind: str) -> tuple[bytes, str]:
    """The samples in the data's own units as the bytes of a ``.npy``, or one after another as a ``.wav``; and their
    media type."""
    import torch

    values = spec.to_data(torch.cat(list(x)))
    if kind == "wav":
        return encode_wav(values.reshape(-1, *values.shape[2:]), spec), "audio/wav"
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue(), "application/octet-stream"


def check_format(form: Samples, spec: DataSpec) -> str:
    if form.format == "wav" and spec.kind != "sound":
        raise Refused(400, f"this model makes {spec.kind}, no sound: format is npy", "format", "invalid_value")
    return form.format or "npy"
