"""A folder of diffusers is somebody else's: what it may and may not do when it is read. And written again, byte for
byte."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from undiffuse import Pipeline, UndiffuseError
from undiffuse.interop.diffusers.folder import safe_name
from undiffuse.weights import pieces, read_weights

pytest.importorskip("diffusers", reason="folders of diffusers are read with it")
pytest.importorskip("transformers", reason="and their texts with transformers")

import diffusers_models as tiny


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    tiny.sd().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | changes))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- There and back ---------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "sd3": tiny.sd3,
    "flux": tiny.flux,
    "ddim": tiny.ddim,
    "dit": lambda: tiny.dit(5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_save_is_the_same_to_the_byte(tmp_path: Path, kind: str) -> None:
    import diffusers

    KINDS[kind]().save_pretrained(tmp_path / "theirs")
    ours = Pipeline.load(tmp_path / "theirs")
    ours.sampling = ours.settings(steps=2, solver="dpmpp_2m")
    ours.save(tmp_path / "a")
    again = Pipeline.load(tmp_path / "a")
    assert again.sampling == ours.sampling
    assert again.fingerprint == ours.fingerprint
    again.save(tmp_path / "b")
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    theirs = files(tmp_path / "theirs")
    assert set(first) == {*theirs, "pipeline.json"}
    assert json.loads(first["model_index.json"]) == json.loads(theirs["model_index.json"])
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "a")


def test_a_model_does_not_change_with_its_file(folder: Path) -> None:
    """Weights that are read lazily are the file: who writes over it would change the model in memory."""
    ours = Pipeline.load(folder)
    before = ours.fingerprint
    for part in ("unet", "vae", "text_encoder"):
        for path in (folder / part).glob("*.safetensors"):
            path.write_bytes(b"\xff" * path.stat().st_size)
    assert ours.fingerprint == before
    ours.save(folder)  # over itself
    assert Pipeline.load(folder).fingerprint == before
    assert [name for name in files(folder) if "tmp" in name] == []


def test_settings_stay_beside_the_folder(folder: Path) -> None:
    ours = Pipeline.load(folder).resized(48, 32)
    ours.sampling = ours.settings(steps=3, guidance_scale=2.0)
    ours.save_settings(folder)
    again = Pipeline.load(folder)
    assert again.sampling == ours.sampling
    assert again.spec.shape == (3, 48, 32)
    edit(folder / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    with pytest.raises(UndiffuseError, match="model is not that of the folder"):
        Pipeline.load(folder)


def test_what_changes_nothing_is_left_out_and_said(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert Pipeline.load(folder).info["left out"] == ["safety_checker"]


def test_a_vocabulary_that_needs_a_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.pixart().save_pretrained(tmp_path)
    (tmp_path / "tokenizer/tokenizer.json").rename(tmp_path / "tokenizer/spiece.model")
    monkeypatch.setattr("undiffuse.interop.diffusers.families.find_spec", lambda name: None)
    with pytest.raises(UndiffuseError, match="pip install sentencepiece"):
        Pipeline.load(tmp_path)


def test_a_vocabulary_of_sentencepiece_is_read(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="T5's own vocabularies are its files")
    from sentencepiece import sentencepiece_model_pb2 as proto

    tiny.pixart().save_pretrained(tmp_path)
    whole = Pipeline.load(tmp_path)
    model = proto.ModelProto()  # type: ignore[attr-defined]
    for word in sorted(tiny.t5_tokenizer().get_vocab(), key=tiny.t5_tokenizer().get_vocab().get):
        model.pieces.add(piece=word, score=-3.0, type={"<pad>": 3, "</s>": 3, "<unk>": 2}.get(word, 1))
    for name, value in {"model_type": 1, "unk_id": 2, "pad_id": 0, "eos_id": 1, "bos_id": -1}.items():
        setattr(model.trainer_spec, name, value)
    model.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer/tokenizer.json").unlink()
    (tmp_path / "tokenizer/spiece.model").write_bytes(model.SerializeToString())
    edit(tmp_path / "tokenizer/tokenizer_config.json", extra_ids=0)
    ours = Pipeline.load(tmp_path)
    asked = [each.denoiser.conditions.part("prompt").read(["a red circle on the sea"]) for each in (whole, ours)]
    assert torch.equal(*asked)


ALSO: dict[str, Callable[[], Any]] = {
    "LatentConsistencyModelImg2ImgPipeline": tiny.lcm,
    "StableDiffusionXLInpaintPipeline": lambda: tiny.sdxl(in_channels=9),
    "StableDiffusion3Img2ImgPipeline": tiny.sd3,
    "FluxImg2ImgPipeline": tiny.flux,
}


@pytest.mark.parametrize("kind", ALSO)
def test_pipelines_of_the_same_parts_are_read(tmp_path: Path, kind: str) -> None:
    ALSO[kind]().save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", _class_name=kind)
    ours = Pipeline.load(tmp_path).resized(32, 32)
    keep = np.zeros((1, 32, 32), dtype=bool)
    keep[:, :16] = True
    picture = np.full((1, 32, 32, 3), 90, dtype=np.uint8)
    made = ours.sample(2, prompts=["a cat"], image=picture, keep=keep, steps=2)
    assert (made[:, :16] == 90).all()
    assert made[:, 16:].std() > 1
    changed = ours.sample(2, prompts=["a cat"], image=picture, strength=0.5, steps=4)
    assert np.abs(changed.astype(int) - 90).max() > 1


# --- As the first ones were written -----------------------------------------------------------------------------------


def test_the_first_folders_had_no_parts(tmp_path: Path) -> None:
    tiny.ddpm().save_pretrained(tmp_path / "parts")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, content in files(tmp_path / "parts").items():
        (flat / Path(name).name).write_bytes(content)
    ours = Pipeline.load(flat)
    assert ours.fingerprint == Pipeline.load(tmp_path / "parts").fingerprint
    ours.save(tmp_path / "again")
    assert Pipeline.load(tmp_path / "again").fingerprint == ours.fingerprint


@pytest.mark.parametrize("make", [tiny.pixart, lambda: tiny.dit(5)], ids=["pixart", "dit"])
def test_the_first_transformers_had_one_name(tmp_path: Path, make: Callable[[], Any]) -> None:
    make().save_pretrained(tmp_path)
    new = Pipeline.load(tmp_path).fingerprint
    edit(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    norm = "ada_norm_single" if "caption_channels" in config else "ada_norm_zero"
    edit(tmp_path / "transformer/config.json", _class_name="Transformer2DModel", norm_type=norm)
    assert Pipeline.load(tmp_path).fingerprint == new


def test_the_first_tokenizers_and_autoencoders(folder: Path) -> None:
    """Vocabulary and merges in files of their own, attention under its old names, positions among the weights."""
    whole = Pipeline.load(folder)
    part = folder / "tokenizer"
    model = json.loads((part / "tokenizer.json").read_text())["model"]
    (part / "tokenizer.json").unlink()
    (part / "vocab.json").write_text(json.dumps(model["vocab"]))
    (part / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"]) + "\n")
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in read_weights(path).items():
        for new, first in old.items():
            name = name.replace(new, first)
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    path.write_bytes(b"".join(pieces(tensors, {"format": "pt"})))
    path = folder / "text_encoder/model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in read_weights(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    path.write_bytes(b"".join(pieces(tensors, {"format": "pt"})))
    ours = Pipeline.load(folder)
    asked: dict[str, Any] = {"prompts": ["a red circle on the sea"], "steps": 2, "seed": 3}
    assert (ours.sample(1, **asked) == whole.sample(1, **asked)).all()


# --- Nothing of it runs -----------------------------------------------------------------------------------------------

HOOK = """
    import builtins, importlib.abc, os, sys, socket, subprocess, warnings
    warnings.simplefilter("ignore")
    import diffusers, transformers, torch
    import undiffuse.interop.diffusers.load
    from undiffuse import Pipeline, UndiffuseError
    good, hostile = sys.argv[1:]
    Pipeline.load(good).sample(1, prompts=["a cat"], steps=1)  # all that is needed is imported by now
    before, met = set(sys.modules), []

    def seen(event, arguments):
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
            met.append((event, str(arguments)[:80]))
        if event == "pickle.find_class":
            met.append((event, str(arguments)[:80]))
        if event in ("exec", "compile") and "hostile" in str(arguments[0]):
            met.append((event, str(arguments)[:80]))
        if event == "open" and "outside" in str(arguments[0]):
            met.append((event, str(arguments)[:80]))

    sys.addaudithook(seen)
    for name in sorted(os.listdir(hostile)):
        try:
            Pipeline.load(os.path.join(hostile, name))
        except UndiffuseError as error:
            assert len(str(error).splitlines()) == 1, str(error)
            continue
        print("loaded", name)
    print("new modules", sorted(set(sys.modules) - before))
    print("met", met)
"""


def hostile_folders(saved: Path, root: Path) -> None:
    """Folders that name code, each in its own way, beside files with code that would be noticed if it ran."""
    evil = "import os\nopen('/tmp/undiffuse_was_here', 'w')\nos.system('true')\nclass Evil: pass\n"

    def copy(name: str) -> Path:
        made = Path(shutil.copytree(saved, root / f"hostile_{name}"))
        for place in ("", "unet", "text_encoder", "tokenizer", "scheduler"):
            for file in ("pipeline.py", "evil.py", "modeling.py", "__init__.py"):
                (made / place / file).write_text(evil)
        return made

    index = "model_index.json"
    edit(copy("class_list") / index, _class_name=["pipeline", "Evil"])
    edit(copy("class_name") / index, _class_name="Evil")
    edit(copy("own_module") / index, unet=["evil", "Evil"])
    edit(copy("own_path") / index, unet=["pipeline", "UNet2DConditionModel"])
    edit(copy("dotted") / index, unet=["os", "system"])
    edit(copy("encoder") / index, text_encoder=["transformers", "AutoModel"])
    edit(copy("onnx") / index, unet=["diffusers", "OnnxRuntimeModel"])
    edit(copy("part_elsewhere") / index, **{"../outside": ["diffusers", "AutoencoderKL"]})
    edit(copy("custom_pipeline") / index, custom_pipeline="evil")
    edit(copy("auto_map") / "text_encoder/config.json", auto_map={"AutoModel": "modeling.Evil"})
    edit(
        copy("auto_map_tokenizer") / "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    )
    edit(copy("target") / "unet/config.json", _target_="os.system")
    edit(copy("class_in_config") / "unet/config.json", _class_name=["evil", "Evil"])
    edit(copy("quantised") / "unet/config.json", quantization_config={"quant_method": "evil"})
    edit(copy("scheduler") / "scheduler/scheduler_config.json", _class_name="Evil")
    edit(copy("scheduler_kwargs") / "scheduler/scheduler_config.json", evil="os.system('true')")
    pickled = copy("pickle") / "unet"
    (pickled / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, pickled / "diffusion_pytorch_model.bin")
    renamed = copy("pickle_renamed") / "unet"
    torch.save({"a": torch.zeros(1)}, renamed / "diffusion_pytorch_model.safetensors")


def test_LD2_LD3_an_audit_hook_sees_that_loading_runs_nothing(saved: Path, tmp_path: Path) -> None:
    hostile_folders(saved, tmp_path / "all")
    mark = Path("/tmp/undiffuse_was_here")
    mark.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOOK), str(saved), str(tmp_path / "all")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()
    assert done.stdout.splitlines() == ["new modules []", "met []"]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "class_list": ("model_index.json", {"_class_name": ["pipeline", "Evil"]}, "never run"),
    "family": ("model_index.json", {"_class_name": "StableDiffusionPipline"}, "did you mean 'StableDiffusionPipeline'"),
    "library": ("model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}, "not of 'evil'"),
    "class": ("model_index.json", {"unet": ["diffusers", "OnnxRuntimeModel"]}, "unknown class of unet"),
    "three": ("model_index.json", {"unet": ["a", "b", "c"]}, "must be \\[library, class\\]"),
    "part": ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "has no controlnet"),
    "missing": ("model_index.json", {"unet": [None, None]}, "part unet, which is missing"),
    "custom": ("model_index.json", {"custom_pipeline": "evil"}, "names code"),
    "auto_map": ("text_encoder/config.json", {"auto_map": {"AutoModel": "x.Y"}}, "names code"),
    "tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, "names code"),
    "quantised": ("unet/config.json", {"quantization_config": {"quant_method": "bnb"}}, "names code"),
    "huge": ("unet/config.json", {"cross_attention_dim": 10**9}, "more than any network"),
    "large": ("unet/config.json", {"cross_attention_dim": 100_000}, "the weights hold"),
    "layers": ("unet/config.json", {"layers_per_block": 10**6}, "layers are more"),
    "negative": ("unet/config.json", {"layers_per_block": -1}, "config.json|weights"),
    "other": ("unet/config.json", {"block_out_channels": [8, 8]}, "weights do not fit|the weights hold"),
    "kind": ("unet/config.json", {"num_class_embeds": 3}, "cannot be read here|do not fit"),
    "scale": ("vae/config.json", {"scaling_factor": -1.0}, "scaling_factor must be above 0"),
    "vocabulary": ("text_encoder/config.json", {"vocab_size": 10}, "do not fit|do not belong"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_LD3_LD5_a_config_is_refused_in_one_line(folder: Path, case: str) -> None:
    name, changes, said = REFUSED[case]
    edit(folder / name, **changes)
    with pytest.raises(UndiffuseError, match=said) as error:
        Pipeline.load(folder)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe{}", b"[" * 100_000, b'"text"']
)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_bad_configs_are_refused_in_one_line(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    begun = time.process_time()
    with pytest.raises(UndiffuseError) as error:
        Pipeline.load(folder)
    assert len(str(error.value).splitlines()) == 1
    assert time.process_time() - begun < 30  # not a promise of speed: that it does not hang


def test_LD5_tables_that_no_file_holds_are_not_allocated(tmp_path: Path) -> None:
    theirs = tiny.pixart()
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "transformer/config.json", sample_size=100_000)
    with pytest.raises(UndiffuseError, match="the weights hold"):
        Pipeline.load(tmp_path)
    tiny.ddim().save_pretrained(tmp_path / "pixels")
    edit(tmp_path / "pixels/unet/config.json", sample_size=1_000_000)
    with pytest.raises(UndiffuseError, match="at most 16384"):
        Pipeline.load(tmp_path / "pixels")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_C7_a_pipe_is_not_opened(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UndiffuseError, match="neither a file nor a folder"):
        Pipeline.load(folder)


NAMES = [
    "../x", "..", "/etc/passwd", "a/b", "a\\b", "C:\\x", "C:x", "\\\\host\\x", "%2e%2e", "x\0y", "x.", "x ", " x", "~x",
    "$HOME", ".hidden", "", "a/../b", "x\ny", "..\\x", "file:///x", "http://x", "a" * 300, "-rf", "x..y",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_LD4_a_name_stays_in_its_folder(name: str) -> None:
    with pytest.raises(UndiffuseError, match="plain name"):
        safe_name(name, "here")


@pytest.mark.parametrize("place", ["unet", "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_LD4_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path, place: str) -> None:
    (folder / place).rename(tmp_path / "outside")
    (folder / place).symlink_to(tmp_path / "outside")
    with pytest.raises(UndiffuseError, match="link that leaves"):
        Pipeline.load(folder)


def sharded(folder: Path, **changes: Any) -> Path:
    """The network's weights in two files."""
    part = folder / "unet"
    tensors = read_weights(part / "diffusion_pytorch_model.safetensors")
    (part / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(tensors)
    table = {}
    for i, share in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        (part / file).write_bytes(b"".join(pieces({name: tensors[name] for name in share}, {"format": "pt"})))
        table |= dict.fromkeys(share, file)
    index = {"metadata": {"total_size": 10**10}, "weight_map": table | changes}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return part


def test_LD4_shards_are_read_and_their_index_is_checked(folder: Path) -> None:
    whole = Pipeline.load(folder).fingerprint
    part = sharded(folder)
    assert Pipeline.load(folder).fingerprint == whole
    first = sorted(read_weights(part / "diffusion_pytorch_model-00001-of-00002.safetensors"))[0]
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    right = json.loads(index.read_text())
    for name, said in {
        "../../vae/diffusion_pytorch_model.safetensors": "plain name",
        "/etc/passwd": "plain name",
        "missing.safetensors": "no such file",
        "diffusion_pytorch_model-00002-of-00002.safetensors": "not what the files hold",
        "evil.bin": "must be a .safetensors",
    }.items():
        index.write_text(json.dumps(right | {"weight_map": right["weight_map"] | {first: name}}))
        with pytest.raises(UndiffuseError, match=said):
            Pipeline.load(folder)


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def damaged(content: bytes, how: str) -> bytes:
    header, data = header_of(content)
    if how == "empty":
        return b""
    if how == "half":
        return content[: len(content) // 2]
    if how == "trailing":
        return content + b"x"
    if how == "pickle":
        return b"\x80\x04\x95" + content
    name = next(name for name in header if name != "__metadata__")
    if how == "twice":
        text = json.dumps(header)
        text = text[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    else:
        header[name]["shape"] = {"shape": [2**40, 2**40], "negative": [-1, 8], "text": ["8"]}[how]
        text = json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + data


@pytest.mark.parametrize("how", ["empty", "half", "trailing", "pickle", "twice", "shape", "negative", "text"])
def test_LD1_damaged_weights_are_refused(folder: Path, how: str) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(UndiffuseError, match=r"damaged or not a safetensors file"):
        Pipeline.load(folder)


@pytest.mark.parametrize("how", ["nan", "shape", "missing", "strange"])
def test_A14_weights_of_another_network_are_refused(folder: Path, how: str) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = read_weights(path)
    if how == "nan":
        tensors["conv_in.bias"][0] = torch.nan
    if how == "shape":
        tensors["conv_in.bias"] = torch.zeros(9)
    if how == "missing":
        del tensors["conv_in.bias"]
    if how == "strange":
        tensors["conv_in.other"] = torch.zeros(1)
    path.write_bytes(b"".join(pieces(tensors, {"format": "pt"})))
    with pytest.raises(UndiffuseError, match=r"conv_in|do not fit") as error:
        Pipeline.load(folder)
    assert len(str(error.value).splitlines()) == 1


def test_LD2_pickles_are_refused_unopened(folder: Path, tmp_path: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(UndiffuseError, match="a pickle, which can run code, and is not opened"):
        Pipeline.load(folder)
    for name in ("model.ckpt", "model.pt", "model.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
        with pytest.raises(UndiffuseError, match="a pickle"):
            Pipeline.load(tmp_path / name)


def test_trap_X3_one_file_does_not_say_what_it_predicts(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(UndiffuseError, match=r"does not say what its network predicts \(trap X3\)"):
        Pipeline.load(path)
    edit(folder / "model_index.json", unet=["diffusers", "Evil"])
    with pytest.raises(UndiffuseError, match="unknown class of unet"):
        Pipeline.load(path, config=folder)
    (folder / "short.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(UndiffuseError, match="damaged"):
        Pipeline.load(folder / "short.safetensors", config=folder)


def test_a_checkpoint_in_one_file_is_the_folder(saved: Path, tmp_path: Path) -> None:
    """Written as CompVis did; the folder beside it needs no weights."""
    path = tmp_path / "one.safetensors"
    path.write_bytes(b"".join(pieces(tiny.in_one(tiny.sd()), {"format": "pt"})))
    config = Path(shutil.copytree(saved, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors")))
    ours = Pipeline.load(path, config=config)
    folder = Pipeline.load(saved)
    assert ours.fingerprint == folder.fingerprint
    assert ours.sampling == folder.sampling
    edit(config / "unet/config.json", cross_attention_dim=24)
    with pytest.raises(UndiffuseError, match="cannot be read as the StableDiffusionPipeline"):
        Pipeline.load(path, config=config)


ONE_FILE = {
    "sdxl": lambda: tiny.sdxl(width=24),
    "refiner": lambda: tiny.sdxl("StableDiffusionXLImg2ImgPipeline", refiner=True),
    "sdxl_inpaint": lambda: tiny.sdxl("StableDiffusionXLInpaintPipeline", width=24, in_channels=9),
    "sd2": tiny.sd,
    "sd_inpaint": lambda: tiny.sd("StableDiffusionInpaintPipeline", in_channels=9),
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_checkpoint_in_one_file_of_another_family(tmp_path: Path, name: str) -> None:
    theirs = ONE_FILE[name]()
    theirs.save_pretrained(tmp_path / "folder")
    (tmp_path / "one.safetensors").write_bytes(b"".join(pieces(tiny.in_one(theirs, name == "sd2"), {"format": "pt"})))
    shutil.copytree(tmp_path / "folder", tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    ours = Pipeline.load(tmp_path / "one.safetensors", config=tmp_path / "config")
    folder = Pipeline.load(tmp_path / "folder")
    assert ours.fingerprint == folder.fingerprint
    assert ours.sampling == folder.sampling


LOST = (
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight",
    "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    "first_stage_model.decoder.norm_out.bias",
    "model.diffusion_model.out.0.weight",
)


@pytest.mark.parametrize("lost", LOST)
def test_LD5_what_one_file_does_not_hold_is_not_made_up(saved: Path, tmp_path: Path, lost: str) -> None:
    """The converters leave what is missing as it was drawn at random."""
    one = tiny.in_one(tiny.sd())
    del one[lost]
    (tmp_path / "one.safetensors").write_bytes(b"".join(pieces(one, {"format": "pt"})))
    config = shutil.copytree(saved, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UndiffuseError, match="cannot be read as the StableDiffusionPipeline"):
        Pipeline.load(tmp_path / "one.safetensors", config=config)
    assert torch.nn.Module.load_state_dict.__module__ == "torch.nn.modules.module"


# --- The Hub ----------------------------------------------------------------------------------------------------------


def test_LD7_nothing_is_fetched_unless_asked_for(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache as the Hub's client makes it: names are links to blobs beside the snapshot."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    place = tmp_path / "models--me--tiny/snapshots/abc"
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options)
        if options["local_files_only"]:
            raise LocalEntryNotFoundError("not here")
        (place.parents[1] / "blobs").mkdir(parents=True)
        for i, file in enumerate(options["allow_patterns"]):
            (place / file).parent.mkdir(parents=True, exist_ok=True)
            blob = place.parents[1] / "blobs" / str(i)
            blob.write_bytes((saved / file).read_bytes())
            (place / file).symlink_to(blob)
        return str(place)

    beside = ["v1.safetensors", "unet/model.bin", "pipeline.py", "unet/x.fp16.safetensors"]
    siblings = [SimpleNamespace(rfilename=name, size=10) for name in [*files(saved), *beside]]
    info = SimpleNamespace(sha="abc", siblings=siblings)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, files_metadata: info)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UndiffuseError, match=r"Pipeline.load\(..., download=True\) fetches it"):
        Pipeline.load("me/tiny")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, files_metadata: 1 / 0)
    with pytest.raises(UndiffuseError, match=r"me/tiny: cannot be fetched \(division by zero\)"):
        Pipeline.load("me/tiny", download=True)
    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, files_metadata: info)
    with pytest.warns(UserWarning, match=r"fetching 10 files, 0.00 GB, of me/tiny at abc"):
        ours = Pipeline.load("me/tiny", download=True)
    assert asked[-1]["revision"] == "abc"
    assert sorted(asked[-1]["allow_patterns"]) == sorted(files(saved))
    assert ours.fingerprint == Pipeline.load(saved).fingerprint


def test_a_variant_is_named(folder: Path) -> None:
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UndiffuseError, match="load with variant='fp16'"):
        Pipeline.load(folder)


def test_what_is_meant_as_ours_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from undiffuse.weights import write_weights

    monkeypatch.chdir(tmp_path)
    for name in ("runs/demoo", "demoo"):
        with pytest.raises(UndiffuseError, match="no such model; `undiffuse ls` lists the runs"):
            Pipeline.load(name)
    write_weights("model.safetensors", {"a": torch.zeros(1)}, {"undiffuse": "{}"})
    with pytest.raises(UndiffuseError, match="a file of a model; name its folder"):
        Pipeline.load("model.safetensors")


def test_options_are_for_their_formats(tmp_path: Path) -> None:
    with pytest.raises(UndiffuseError, match="are for diffusers' folders"):
        Pipeline.load(tmp_path, variant="fp16")


def test_what_is_not_read_is_refused_by_name(folder: Path) -> None:
    edit(folder / "model_index.json", _class_name="KandinskyV22Pipeline")
    with pytest.raises(UndiffuseError, match=r"unknown kind of pipeline.*KandinskyV22Pipeline"):
        Pipeline.load(folder)


def test_trap_S16_latents_are_not_clipped(tmp_path: Path) -> None:
    theirs = tiny.ldm()
    theirs.scheduler = tiny.latent_scheduler(clip_sample=True)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UndiffuseError, match=r"no range \(trap S16\)"):
        Pipeline.load(tmp_path)


# --- The command line -------------------------------------------------------------------------------------------------


def test_the_verbs_take_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from undiffuse.commands import main

    out = str(tmp_path / "made.png")
    asked = ["--prompt", "a red circle", "-n", "2", "--steps", "2", "--out", out]
    assert main(["sample", str(folder), *asked]) == 0
    assert main(["sample", "--from", out, "--out", str(tmp_path / "again.png")]) == 0
    assert "ddim, leading grid, 2 steps" in capsys.readouterr().out
    tall = ["sample", str(folder), "--steps", "1", "-n", "2", "--size", "48x32"]
    assert main([*tall, "--out", str(tmp_path / "tall.npy")]) == 0
    assert np.load(tmp_path / "tall.npy").shape == (2, 48, 32, 3)
    assert main([*tall[:-1], "48", "--out", str(tmp_path / "no.npy")]) == 2
    assert "HEIGHTxWIDTH" in capsys.readouterr().err
    assert main(["show", str(folder)]) == 0
    shown = capsys.readouterr().out
    for said in ("StableDiffusionPipeline", "UNet2DConditionModel", "ScaledLinearBetas", "0.00468", "Eps"):
        assert said in shown
