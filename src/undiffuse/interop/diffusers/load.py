"""Reading a folder of diffusers into a :class:`.Pipeline`, and writing it again."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ...asking import Sampling
from ...conditions import Condition, Conditions
from ...config import from_json, load_json, write_bytes_atomic
from ...data.spec import DataSpec, units_between
from ...denoiser import Denoiser, terminal_snr_report
from ...errors import UndiffuseError, UndiffuseWarning, choose, unknown
from ...pipeline import FORMAT, REGISTRIES, ModelConfig, Pipeline, Tunings
from ...weights import read_header
from .codecs import CODECS
from .families import ENCODERS, FAMILIES, LEFT_OUT, OLD_NAMES, TOKENIZERS, Made, Parts, Size
from .folder import PICKLES, Folder, describe_parts, line_of
from .networks import NETWORKS, Seats
from .schedulers import DEFAULTS, Meaning, read_scheduler

LARGEST = 16_384
"""Pixels along a side."""


def load(
    path: str | Path,
    device: str | torch.device,
    dtype: torch.dtype | None,
    variant: str | None,
    config: str | Path | None,
    download: bool,
    offload: bool,
) -> Pipeline:
    """:meth:`.Pipeline.load` of a folder of diffusers."""
    if Path(path).is_file() and Path(path).suffix.lower() in PICKLES:  # before anything is imported for it
        raise UndiffuseError(f"{path}: a pickle, which can run code, and is not opened; fetch it as .safetensors")
    try:
        import diffusers
        import transformers
    except ImportError:
        raise UndiffuseError(
            f"{path}: needs diffusers and transformers, which are missing: pip install 'undiffuse[diffusers]'"
        ) from None
    for library in (diffusers, transformers):
        quiet(library)
    if Path(path).is_file():
        return single_file(Path(path), config, torch.device(device), dtype or torch.float32, offload)
    if config is not None:
        raise UndiffuseError(f"{path}: config says what a checkpoint in one file is; this is none")
    here, root = (Path(path), None) if Path(path).is_dir() else hub_folder(str(path), variant, download)
    return assemble(Folder(here, root, variant), torch.device(device), dtype or torch.float32, offload)


def single_file(
    path: Path, config: str | Path | None, device: torch.device, dtype: torch.dtype, offload: bool
) -> Pipeline:
    """A checkpoint in one file, through diffusers' own converters. What the file does not say (prediction, schedule,
    text encoders' sizes; trap X3) is in ``config``, a folder of diffusers, whose weights are not needed."""
    import diffusers

    if "undiffuse" in read_header(path).metadata:
        raise UndiffuseError(f"{path}: a file of a model; name its folder, {path.parent}")
    if config is None:
        raise UndiffuseError(
            f"{path}: a checkpoint in one file does not say what its network predicts (trap X3): pass config=FOLDER, a "
            "folder of diffusers with model_index.json and the configs of a model of this kind"
        )
    folder = Folder(Path(config))
    choose(f"kind of pipeline in {folder.path / 'model_index.json'}", folder.family, FAMILIES)
    known = {*NETWORKS, *OLD_NAMES, *CODECS, *ENCODERS, *TOKENIZERS, *DEFAULTS}
    for part, (library, kind) in folder.parts.items():
        if part not in LEFT_OUT and (kind not in known or library not in ("diffusers", "transformers")):
            raise unknown(f"class of {part} in {folder.path / 'model_index.json'}", kind, known)
        if folder.inside(part, "config.json").exists():
            folder.json(part, "config.json")
    made = getattr(diffusers, folder.family)
    nothing = {part: None for part in folder.parts if part in LEFT_OUT}
    with tempfile.TemporaryDirectory() as place:
        try:
            with torch.random.fork_rng(devices=[]), nothing_missing():
                read = made.from_single_file(
                    str(path), config=str(folder.path), local_files_only=True, torch_dtype=dtype, **nothing
                )
                read.save_pretrained(place, safe_serialization=True)
        except Exception as error:
            said = line_of(error)
            raise UndiffuseError(f"{path}: cannot be read as the {folder.family} of {config} ({said})") from None
        return assemble(Folder(Path(place)), device, dtype, offload)


@contextmanager
def nothing_missing() -> Iterator[None]:
    """Let no module be loaded in part. The converters ask for the weights that they find, and what they do not find
    stays as it was drawn at random; so what torch says is missing, and they do not look at, is an error here."""
    load = nn.Module.load_state_dict

    def whole(module: nn.Module, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = load(module, state, strict, assign)
        parameters = {name for name, _ in module.named_parameters()}
        if lost := [name for name in found.missing_keys if name in parameters]:
            raise UndiffuseError(f"it lacks {lost[0]} of {type(module).__name__}")
        return found

    nn.Module.load_state_dict = whole  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


NEEDED = re.compile(
    r"(model_index|config|scheduler_config)\.json|diffusion_pytorch_model\.safetensors"
    r"|[\w.-]+/[\w.-]+\.(json|txt|model|safetensors)"
)
"""Files of a repository that are fetched: configs, vocabularies and safetensors of its parts."""


def hub_folder(name: str, variant: str | None, download: bool) -> tuple[Path, Path]:
    """The folder of a model of the Hugging Face Hub on this machine, and what its links must not leave. Fetched, at one
    revision, only if ``download`` says so."""
    import huggingface_hub

    sizes: dict[str, int] = {}
    revision: str | None = None
    try:
        if download:
            info = huggingface_hub.model_info(name, files_metadata=True)
            revision = info.sha
            sizes = {each.rfilename: each.size or 0 for each in info.siblings or [] if NEEDED.fullmatch(each.rfilename)}
            sizes = {file: size for file, size in sizes.items() if wanted(file, list(sizes), variant)}
            if "model_index.json" not in sizes:
                raise UndiffuseError(f"{name}: has no model_index.json on the Hub, so it is no model of diffusers")
            total = sum(sizes.values()) / 1e9
            warnings.warn(f"fetching {len(sizes)} files, {total:.2f} GB, of {name} at {revision}", UndiffuseWarning, 4)
        place = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=not download, allow_patterns=sorted(sizes) or None
        )
    except UndiffuseError:
        raise
    except Exception as error:  # of the client, or of what it connects with
        said = line_of(error)
        if download:
            raise UndiffuseError(f"{name}: cannot be fetched ({said})") from None
        raise UndiffuseError(
            f"{name}: no folder of that name, and no model of the Hugging Face Hub on this machine; "
            "Pipeline.load(..., download=True) fetches it (or `hf download NAME`)"
        ) from None
    return Path(place), Path(place).parents[1]


def wanted(file: str, files: Sequence[str], variant: str | None) -> bool:
    """Whether a file is of the variant, where there are several of one thing."""
    if not file.endswith((".safetensors", ".index.json")):
        return True
    folder = file.split("/")[0]
    named = f".{variant}." if variant else None
    if named and any(each.startswith(f"{folder}/") and named in each for each in files):
        return named in file
    return not re.search(r"\.(fp16|bf16|fp32|non_ema|ema)[.-]", file)


def quiet(library: Any) -> None:
    """Its notices are for its own users; what matters here is raised."""
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()


def assemble(folder: Folder, device: torch.device, dtype: torch.dtype, offload: bool) -> Pipeline:
    """The pipeline of a checked folder."""
    if offload and device.type == "cpu":
        raise UndiffuseError("offload keeps in main memory what the device does not need now: name a device, say cuda")
    family = choose(f"kind of pipeline in {folder.path / 'model_index.json'}", folder.family, FAMILIES)
    parts = Parts(folder, dtype)
    try:
        made = family(parts)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UndiffuseError):
            raise
        said = line_of(error)
        raise UndiffuseError(f"{folder.path}: its configs do not describe a {folder.family} ({said})") from None
    known = {*parts.modules, *parts.tokenizers, "scheduler", *LEFT_OUT}
    if strange := {name: value for name, value in folder.parts.items() if name not in known}:
        raise UndiffuseError(f"{folder.path}: a {folder.family} has no {describe_parts(strange)}; remove it")
    described, where = folder.scheduler()
    name = described.get("_class_name")
    forced = {key: value for key, value in made.scheduler.items() if key in DEFAULTS.get(str(name), {})}
    meaning = read_scheduler({**described, **forced}, where, made.flow_grid)
    if made.codec is not None and meaning.threshold != "none":
        raise UndiffuseError(
            f"{where}: clip_sample or thresholding of latents, which have no range (trap S16): set it to false"
        )
    home = DiffusersHome(folder, parts, made, meaning, torch.device("cpu") if offload else device)
    pipeline = home.pipeline(made.size)
    for module in (pipeline.denoiser, made.codec):
        if module is not None:
            module.to(home.place).eval().requires_grad_(False)
    if offload:
        home.device, seats = home.place, Seats(device)
        made.network.seats = seats
        if made.codec is not None:
            made.codec.seats = seats
        for reader in () if made.texts is None else map(made.texts.reader, made.texts.names):
            reader.seats = seats
    return with_settings(pipeline, folder.path / "pipeline.json")


def with_settings(pipeline: Pipeline, path: Path) -> Pipeline:
    """The pipeline with the settings that :meth:`.Pipeline.save_settings` left beside it, if it did."""
    if not path.exists():
        return pipeline
    stated = load_json(path)
    meant = pipeline._meaning()
    known = (*meant, "sampling", "tuned")
    for name in stated if isinstance(stated, dict) else ():
        if name not in known:
            raise unknown(f"key of {path}", name, known)
    if not isinstance(stated, dict) or "sampling" not in stated or stated.get("format") != FORMAT:
        raise UndiffuseError(f"{path}: must be an object of format {FORMAT} with sampling; remove it")
    spec = DataSpec.from_json(stated["data"]) if "data" in stated else pipeline.spec
    if spec.shape != pipeline.spec.shape:
        pipeline = pipeline.resized(*spec.shape[1:])
    for name, value in pipeline._meaning().items():
        if name != "info" and stated.get(name) != value:
            raise UndiffuseError(f"{path}: {name} is not that of the folder; remove the file, or restore the folder")
    pipeline.sampling = from_json(Sampling, stated["sampling"], str(path), REGISTRIES)
    if "tuned" in stated:
        tuned = from_json(Tunings, stated["tuned"], f"{path}: tuned", REGISTRIES)
        if tuned.weights != pipeline.fingerprint:
            raise UndiffuseError(f'{path}: its tuned settings are of other weights; remove "tuned" and tune again')
        pipeline.tuned = tuned.settings
    return pipeline


def picture(channels: int, size: Size, classes: tuple[str, ...]) -> DataSpec:
    """Pictures of 8 bits, grey, RGB or of another number of channels."""
    shift, scale = units_between(0.0, 255.0)
    layout = "HW" if channels == 1 else "HWC"
    return DataSpec("image", (channels, *size), "uint8", 0.0, 255.0, shift, scale, layout, classes)


@final
class DiffusersHome:
    """Where a pipeline comes from: the parts of a folder, and its small files as they were. ``place``: of samples."""

    def __init__(self, folder: Folder, parts: Parts, made: Made, meaning: Meaning, place: torch.device) -> None:
        self.made, self.meaning, self.modules, self.place = made, meaning, parts.modules, place
        self.device: torch.device | None = None
        self.family = folder.family
        kept = {*parts.modules, *parts.tokenizers, "scheduler"}
        index: dict[str, Any] = {key: value for key, value in folder.index.items() if key.startswith("_")}
        index |= {name: list(value) if name in kept else [None, None] for name, value in folder.parts.items()}
        self.index = {key: index.get(key, value) for key, value in folder.index.items()}
        self.left_out = sorted(set(folder.parts) - kept)
        self.files: dict[str, bytes] = {}
        for part in sorted(parts.modules):
            self.files[f"{part}/config.json"] = folder.inside(part, "config.json").read_bytes()
        self.files["scheduler/scheduler_config.json"] = folder.inside("scheduler", "scheduler_config.json").read_bytes()
        for part in sorted(parts.tokenizers):
            for path in folder.files(part):
                self.files[f"{part}/{path.name}"] = path.read_bytes()

    def pipeline(self, size: Size) -> Pipeline:
        """The pipeline for pictures of this size; all of them share their weights."""
        made, meaning = self.made, self.meaning
        height, width = size
        factor = made.network.patch * (1 if made.codec is None else made.codec.factor)
        if min(size) < 1 or max(size) > LARGEST or height % factor or width % factor:
            raise UndiffuseError(
                f"pictures of {height} x {width}: both must be multiples of {factor}, and at most {LARGEST}"
            )
        if made.network.fixed and size != made.size:
            raise UndiffuseError(f"this network makes pictures of {made.size[0]} x {made.size[1]} only")
        conditions: dict[str, Condition] = {} if made.texts is None else {"prompt": made.texts}
        conditions |= {name: part.to(self.place) for name, part in made.told(size).items()}
        channels = made.network.in_channels if made.codec is None else int(made.codec.config["in_channels"])
        beside = sum(part.channels for part in conditions.values())
        latents = made.network.in_channels if made.codec is None else len(made.codec.mean)
        if made.network.in_channels != latents + beside:
            raise UndiffuseError(f"a network of {made.network.in_channels} channels in latents of {latents}")
        if made.network.out_channels not in (latents, 2 * latents):
            raise UndiffuseError(f"a network that says {made.network.out_channels} channels of {latents}")
        learned = made.network.out_channels == 2 * latents
        if meaning.learned_variance and not learned:
            raise UndiffuseError("the scheduler wants a learned variance (learned_range), the network has none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndiffuseWarning)  # of the signal left at t = 1, too late to change (S7)
            denoiser = Denoiser(
                made.network,
                meaning.schedule,
                meaning.prediction,
                meaning.label,
                meaning.input_scale,
                Conditions(conditions) if conditions else None,
                learned,
            )
        config = ModelConfig(
            network=type(made.network.inner).__name__,
            network_config={key: value for key, value in made.network.options.items() if not key.startswith("_")},
            schedule=meaning.schedule,
            prediction=meaning.prediction,
            label=meaning.label,
            input_scale=meaning.input_scale,
            conditions={name: {"kind": "diffusers", **part.config} for name, part in conditions.items()},
            learned_variance=learned,
        )
        tokens = (height // factor) * (width // factor)
        info = {"from": self.family, "left out": self.left_out, "end": terminal_snr_report(meaning.schedule)}
        return Pipeline(
            denoiser.eval(),
            config,
            picture(channels, size, made.classes),
            meaning.sampling(made.steps, made.guidance_scale, tokens),
            info,
            codec=made.codec,
            home=self,
        )

    def seen(self, pipeline: Pipeline, image: Tensor, keep: Tensor) -> dict[str, Tensor]:
        """See :meth:`.Home.seen`: a network with a hole is told where it is (1), and the latents of the picture, grey
        there. A latent is kept where all that it stands for is."""
        conditions = pipeline.denoiser.conditions
        if conditions is None or "hole" not in conditions.names:
            return {}
        whole = keep.expand(-1, *pipeline.spec.shape).all(1, keepdim=True)
        around = pipeline.encode(torch.where(whole, image, 0.0))
        made = ~pipeline.kept(whole).expand(len(around), -1, -1, -1)
        return {"hole": torch.cat([made.to(around), around], dim=1)}

    def resized(self, pipeline: Pipeline, size: Sequence[int]) -> Pipeline:
        """See :meth:`.Pipeline.resized`."""
        if len(size) != 2 or not all(type(each) is int for each in size):
            raise UndiffuseError(f"a picture has a height and a width, not {list(size)}")
        height, width = size
        other = self.pipeline((height, width))
        other.sampling = (
            replace(pipeline.sampling, grid=other.sampling.grid) if self.meaning.shift else pipeline.sampling
        )
        other.tuned, other.tiling = pipeline.tuned, pipeline.tiling
        return other

    def save(self, pipeline: Pipeline, folder: Path) -> None:
        """Write diffusers' layout: the libraries write the weights, the small files are as they were. Each file is
        replaced when it is whole."""
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for part, module in self.modules.items():
                module.save_pretrained(f"{place}/{part}", safe_serialization=True)  # type: ignore[operator]
                (folder / part).mkdir(exist_ok=True)
                for path in sorted(Path(place, part).iterdir()):
                    path.replace(folder / part / path.name)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(folder / name, content)
        write_bytes_atomic(folder / "model_index.json", (json.dumps(self.index, indent=2) + "\n").encode())
