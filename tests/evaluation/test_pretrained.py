"""DINOv2 and CLIP through transformers, at toy size with random weights; nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse import Examples, UndiffuseError, UndiffuseWarning, from_array, measure
from undiffuse.evaluation.extraction import extract, make_features, pick, reference_features
from undiffuse.evaluation.features import Identity, Pixels
from undiffuse.evaluation.pretrained import CLIP, IMAGENET, DINOv2, shortened, text_features

transformers = pytest.importorskip("transformers", reason="transformers is not installed: undiffuse[diffusers]")
LIMIT = 16  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
        dino = transformers.Dinov2Config(image_size=56, **small)
        transformers.Dinov2Model(dino).save_pretrained(root / "dino")
        words = {**{k: small[k] for k in list(small)[:3]}, "vocab_size": 40, "max_position_embeddings": LIMIT}
        words |= {"intermediate_size": 64, "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39}
        vision = {**small, "image_size": 56, "intermediate_size": 64}
        clip = transformers.CLIPConfig(text_config=words, vision_config=vision, projection_dim=24)
        transformers.CLIPModel(clip).save_pretrained(root / "clip")
    letters = [*"abcdefghijklmnopqr", *(f"{letter}</w>" for letter in "abcdefghijklmnopqr")]
    vocabulary = {token: number for number, token in enumerate([*letters, "<unk>", "!</w>"])}
    vocabulary |= {"<|startoftext|>": 38, "<|endoftext|>": 39}
    (root / "clip" / "vocab.json").write_text(json.dumps(vocabulary))
    (root / "clip" / "merges.txt").write_text("#version: 0.2\n")
    (root / "clip" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return root


def pictures() -> np.ndarray:
    values = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
    values[0, 0, 0], values[0, 0, 1] = 0, 255
    return values


def test_dinov2_is_the_class_token_after_the_last_norm(folder: Path) -> None:
    data = from_array(pictures())
    features = DINOv2(str(folder / "dino"), size=56).fit(data)
    assert features.name == "dinov2/dino/pil-bicubic-56"
    found = extract(features, data).features
    assert found.shape == (5, 32)
    model = transformers.Dinov2Model.from_pretrained(folder / "dino")
    x = Pixels((56, 56), "pil-bicubic", (0, 0, 0), (255, 255, 255))(pictures(), data.spec)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in IMAGENET)
    with torch.inference_mode():
        expected = model(pixel_values=(x - mean) / deviation).pooler_output
    assert torch.allclose(found, expected, atol=1e-5)


def test_clip_is_transformers_own(folder: Path) -> None:
    data = from_array(pictures())
    features = CLIP(str(folder / "clip"), size=56).fit(data)
    found, prompts = extract(features, data).features, ["a b c", "d", "abc de f", "q r", "a"]
    model = transformers.CLIPModel.from_pretrained(folder / "clip").eval()
    x = features.prepare(pictures(), data.spec)
    with torch.inference_mode():
        ids = features.network.tokenizer(prompts, padding=True, return_tensors="pt")  # pyrefly: ignore
        out = model(pixel_values=x, **ids)
    texts = text_features(features, prompts)
    assert torch.allclose(torch.nn.functional.normalize(found), out.image_embeds, atol=1e-5)
    assert torch.allclose(torch.nn.functional.normalize(texts), out.text_embeds, atol=1e-5)


def test_trap_V11_a_long_prompt_keeps_its_end_token_and_says_so(folder: Path) -> None:
    features = CLIP(str(folder / "clip"), size=56).fit(from_array(pictures()))
    fits, long = " ".join("abcdefghijklmn"), " ".join("abcdefghijklmnopqr")  # 14 and 18 tokens, and two at the ends
    with pytest.warns(
        UndiffuseWarning, match="1 of 3 prompts have more than 16 tokens and are cut, the first is number 1"
    ):
        found = text_features(features, ["a", long, fits])
    assert torch.allclose(found[1], found[2], atol=1e-6)  # what is left is read like a prompt of its own
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_trap_V11_shortened() -> None:
    rows = [[9, 1, 2, 8], [9, *range(10), 8], [9, 1, 2, 3, 4, 8]]
    assert shortened(rows, 6, 8) == ([[9, 1, 2, 8], [9, 0, 1, 2, 3, 8], [9, 1, 2, 3, 4, 8]], [1])


def test_what_is_not_there_is_never_fetched_or_made_up(folder: Path, tmp_path: Path) -> None:
    data = from_array(pictures())
    with pytest.raises(UndiffuseError, match=r"name its folder \(--weights FOLDER\), or allow"):
        DINOv2(str(tmp_path / "nothing")).fit(data)
    with pytest.raises(UndiffuseError, match=r"not the weights of a Dinov2Model: \d+ tensors missing"):
        DINOv2(str(folder / "clip")).fit(data)
    with pytest.raises(UndiffuseError, match="prompts need the features clip, these are identity"):
        text_features(Identity(10_000).fit(data), ["a"])


def test_captions_are_embedded_with_the_pictures_and_scored(folder: Path, tmp_path: Path) -> None:
    """What `evaluate --features clip` of a model of texts takes; more prompts than are read at once."""
    data = from_array(np.resize(pictures(), (300, 40, 40, 3)))
    data.texts = [("a b c", "d", "q r")[i % 3] for i in range(300)]
    features = make_features("clip", data, weights=folder / "clip")
    found = reference_features(features, data, 290, cache=tmp_path)
    rows = pick(data, 290)
    expected = torch.cat([text_features(features, [data.texts[i]]) for i in rows[:5]])
    assert found.texts is not None
    assert torch.allclose(found.texts[:5], expected, atol=1e-5)
    again = reference_features(features, data, 290, cache=tmp_path)
    assert again.texts is not None
    assert again.texts.equal(found.texts)
    both = Examples(images=found.features, texts=found.texts)
    score = measure(both, both)["clip_score"]
    assert score.n == 145
    assert score.floor is not None
