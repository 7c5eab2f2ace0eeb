"""What may be read of a folder of diffusers, and what may not.

A folder is somebody else's: it may name code to run, files outside of it, sizes that no memory holds, and numbers that
are none. So nothing in it chooses what is imported (classes come from tables here), no name in it leaves it, weights
are safetensors, and their headers are checked against the files and against the network that the config describes
before anything of the declared size is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from ...config import LARGEST_FILE, load_json, parse_json
from ...errors import UndiffuseError
from ...weights import Header, read_header

LARGEST_NUMBER = 1 << 24
"""In a config of a network; above it nothing real has a size."""
COUNTS = re.compile(r"length|^total_")
"""Keys of numbers that size nothing: a tokenizer's longest text, an index's bytes."""
MOST_LAYERS = 1024
MOST_PLACES = 50_000_000
"""Numbers in tables of positions that a network computes for itself."""
LAYERS = re.compile(r"^num_.*(layers|blocks)$|^num_layers|layers_per_block")
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack", ".h5", ".onnx")
CODE = ("auto_map", "custom_pipeline", "custom_pipelines", "_target_", "trust_remote_code", "quantization_config")
"""Keys of configs with which other programs import or run something."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def safe_name(name: object, where: str) -> str:
    """A plain name of a file or a folder, or an error: no path, nothing that is one on another system."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name.endswith(".") or ".." in name or len(name) > 200:
        raise UndiffuseError(f"{where}: {name!r} is not a plain name of something in its own folder")
    return name


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield str(key), inner
        if isinstance(inner, (dict, list)):
            yield from entries(inner)


def check_config(config: Any, where: str) -> dict[str, Any]:
    """A config that names no code and no absurd size, or an error."""
    if not isinstance(config, dict):
        raise UndiffuseError(f"{where}: must be a JSON object")
    for key, value in entries(config):
        if key in CODE and value not in (None, {}, []):
            raise UndiffuseError(
                f"{where}: {key} names code or another format of weights, which is not read; remove it"
            )
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER and not COUNTS.search(key):
            raise UndiffuseError(f"{where}: {key} = {value} is more than any network has; is the file damaged?")
        if isinstance(value, int) and value > MOST_LAYERS and LAYERS.search(key):
            raise UndiffuseError(f"{where}: {key} = {value} layers are more than any network has")
        if isinstance(value, list) and len(value) > 100_000:
            raise UndiffuseError(f"{where}: {key} is a list of {len(value)} entries; is the file damaged?")
    name = config.get("_class_name", "")
    if not isinstance(name, str):
        raise UndiffuseError(f"{where}: _class_name = {name!r} names code of its own, which is never run")
    return config


@final
class Folder:
    """A folder of diffusers, with its ``model_index.json`` read and checked.

    Args:
        path: of the folder.
        root: what its files must not leave; the folder itself, or the place of a download whose names are links.
        variant: of the weights' files, such as ``fp16``.
        index: what its ``model_index.json`` would say, of a folder that holds one part and has none.

    Attributes:
        family: the class of the pipeline; ``parts``: class by name; ``options``: the rest of the index.
    """

    def __init__(
        self,
        path: Path,
        root: Path | None = None,
        variant: str | None = None,
        index: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.root = path, (root or path).resolve()
        self.variant = None if variant is None else safe_name(variant, "variant")
        self.flat: set[str] = set()
        where = self.path / "model_index.json"
        read = load_json(self.inside("model_index.json")) if index is None else index
        self.index = check_config(read, str(where))
        self.family = str(self.index.get("_class_name", ""))
        if not self.family:
            raise UndiffuseError(f"{where}: _class_name, the kind of pipeline, is missing")
        self.parts: dict[str, tuple[str, str]] = {}
        self.options: dict[str, Any] = {}
        for name, value in self.index.items():
            if name.startswith("_"):
                continue
            if isinstance(value, list) and len(value) == 2 and all(each is None for each in value):
                continue
            if isinstance(value, list):
                if len(value) != 2 or not all(isinstance(each, str) for each in value):
                    raise UndiffuseError(f"{where}: {name} must be [library, class], not {value!r}")
                self.parts[safe_name(name, str(where))] = (value[0], value[1])
            else:
                self.options[name] = value
        if (self.path / "config.json").is_file():  # the first ones had network and scheduler beside the index
            self.flat = {part for part in self.parts if not (self.path / part).exists()}

    def inside(self, *names: str) -> Path:
        """A file or folder of it, which is where its name says, and which is no device."""
        for name in names:
            safe_name(name, str(self.path))
        path = self.path.joinpath(*(names[1:] if names[:1] and names[0] in self.flat else names))
        if not path.resolve().is_relative_to(self.root):
            raise UndiffuseError(f"{path}: is a link that leaves the folder; copy what it points to")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UndiffuseError(f"{path}: neither a file nor a folder")
        return path

    def json(self, *names: str) -> dict[str, Any]:
        """A JSON file of it, checked."""
        path = self.inside(*names)
        return check_config(load_json(path), str(path))

    def scheduler(self, part: str = "scheduler") -> tuple[dict[str, Any], str]:
        """The scheduler's config, where minus infinity may stand (diffusers writes it), and its path."""
        path = self.inside(part, "scheduler_config.json")
        if not path.is_file():
            raise UndiffuseError(f"{path}: no such file")
        content = path.read_bytes()[: LARGEST_FILE + 1].decode("utf-8-sig", errors="replace")
        config = parse_json(re.sub(r":\s*-Infinity", ": null", content), str(path))
        return check_config(config, str(path)), str(path)

    def files(self, part: str) -> Iterator[Path]:
        """The regular files of a part, in order."""
        folder = self.inside(part)
        if not folder.is_dir():
            raise UndiffuseError(f"{folder}: no such folder, but model_index.json names it")
        for path in sorted(folder.iterdir()):
            if NAME.fullmatch(path.name) and self.inside(part, path.name).is_file():
                yield path

    def headers(self, part: str) -> list[Header]:
        """The headers of a part's weights, each checked against its file."""
        names = [path.name for path in self.files(part)]
        ending = "" if self.variant is None else f".{self.variant}"
        stems = ("diffusion_pytorch_model", "model")
        single = [f"{stem}{ending}.safetensors" for stem in stems if f"{stem}{ending}.safetensors" in names]
        indices = [f"{stem}.safetensors.index{ending}.json" for stem in stems]
        indices = [name for name in indices if name in names]
        if len(single) + len(indices) > 1:
            both = " and ".join([*single, *indices])
            raise UndiffuseError(f"{self.path / part}: has {both}: keep the one that is meant")
        if single:
            return [read_header(self.inside(part, single[0]))]
        if indices:
            return self.shards(part, indices[0])
        variants = sorted(
            {name.split(".")[1] for name in names if name.endswith(".safetensors") and name.count(".") == 2}
        )
        if variants and self.variant is None and not any("-of-" in each for each in variants):
            raise UndiffuseError(
                f"{self.path / part}: has weights as {', '.join(variants)} only: load with variant={variants[0]!r}"
            )
        if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
            raise UndiffuseError(
                f"{self.path / part / pickles[0]}: a pickle, which can run code, and is not opened; save the "
                "model with safe_serialization=True (diffusers' default) where you trust it, or fetch its safetensors"
            )
        raise UndiffuseError(f"{self.path / part}: no weights ({single or 'diffusion_pytorch_model.safetensors'})")

    def shards(self, part: str, index: str) -> list[Header]:
        """The headers of weights in several files, which must be in the folder and hold what their index says."""
        where = str(self.path / part / index)
        listed = self.json(part, index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise UndiffuseError(f"{where}: weight_map must say which tensor is in which file")
        shards = sorted({safe_name(name, where) for name in listed.values()})
        if len(shards) > 1000 or not all(name.endswith(".safetensors") for name in shards):
            raise UndiffuseError(f"{where}: names {len(shards)} files, of which each must be a .safetensors")
        headers = [read_header(self.inside(part, name)) for name in shards]
        held = {tensor: name for name, header in zip(shards, headers, strict=True) for tensor in header.shapes}
        if sum(len(header.shapes) for header in headers) != len(held) or held != listed:
            raise UndiffuseError(f"{where}: is not what the files hold; copy the folder again")
        return headers


def load_part(
    folder: Folder, part: str, make: Any, read: Callable[..., Any], dtype: torch.dtype, name: str
) -> nn.Module:
    """A module of a library with a part's weights: every tensor of the network from the file, and every one finite.

    Args:
        make: builds it from its config, on whatever device is the default.
        read: ``from_pretrained`` of its class.
        name: of the argument that sets the type.
    """
    where = str(folder.path / part)
    config = folder.json(part, "config.json")
    headers = folder.headers(part)
    try:
        with torch.device("meta"):
            planned = make(config)
    except UndiffuseError:
        raise
    except Exception as error:  # whatever a library makes of a config that it does not understand
        raise UndiffuseError(f"{where}: its config.json does not build a network ({line_of(error)})") from None
    held = sum(header.parameters for header in headers)
    wanted = sum(parameter.numel() for parameter in planned.parameters())
    tables = sum(buffer.numel() for buffer in planned.buffers())  # of positions; not all of them are in the file
    if wanted > held * 1.05 + 10_000 or tables > held + MOST_PLACES:
        raise UndiffuseError(f"{where}: config.json describes {wanted + tables:,} numbers, the weights hold {held:,}")
    options: dict[str, Any] = {
        name: dtype,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if folder.variant is not None:
        options["variant"] = folder.variant
    try:
        with torch.random.fork_rng(devices=[]):
            module, info = read(str(folder.inside(part)), **options)
    except Exception as error:
        raise UndiffuseError(f"{where}: the weights do not fit the network ({line_of(error)})") from None
    for kind in ("missing_keys", "mismatched_keys"):
        if wrong := sorted(map(str, info.get(kind) or ())):
            raise UndiffuseError(f"{where}: the weights do not fit: {kind.replace('_', ' ')} {', '.join(wrong[:3])}")
    strange = [key for key in sorted(info.get("unexpected_keys") or ()) if not key.endswith("position_ids")]
    if strange:
        raise UndiffuseError(f"{where}: has weights that the network has no place for: {', '.join(strange[:3])}")
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise UndiffuseError(f"{where}: {key} holds NaN or infinite numbers as {tensor.dtype}")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()  # what was read may be the file itself, which others may change
    return module.eval().requires_grad_(False)


def line_of(error: Exception) -> str:
    """What a library said, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def describe_parts(parts: Mapping[str, tuple[str, str]]) -> str:
    """Names and classes, for messages."""
    return ", ".join(f"{name} ({kind})" for name, (_, kind) in parts.items())
