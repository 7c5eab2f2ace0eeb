"""Frozen CLIP and T5: tiny random ones, saved as transformers saves them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from undiffuse import encoders
from undiffuse.conditions import Conditions, Pretrained
from undiffuse.errors import UndiffuseError, UndiffuseWarning

pytestmark = pytest.mark.slow  # importing transformers takes as long as all the laws of a chapter
WORDS = ["<pad>", "<s>", "</s>", "a", "red", "blue", "circle", "square", "<unk>"]


def made(folder: Path, kind: str, seed: int = 0) -> str:
    """A random encoder with a tokenizer of nine words, in a folder."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(seed)
    if kind == "clip":
        config = transformers.CLIPTextConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        model = transformers.CLIPTextModel(config)
    else:
        config = transformers.T5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
        model = transformers.T5EncoderModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_what_the_network_gets_is_what_transformers_says(kind: str, tmp_path: Path) -> None:
    name = made(tmp_path, kind)
    condition = Pretrained(name, 8, length=6, token_width=5)
    conditions = Conditions({"text": condition})
    texts = ["a red circle", "", "blue"]
    told = conditions.encode({"text": condition.read(texts)}, 3)
    encoder = encoders.load(name)
    given = encoder.tokenizer(texts[0], return_tensors="pt")["input_ids"]
    hidden = encoder.model(input_ids=given).last_hidden_state[0]
    assert torch.allclose(told["tokens"][0, : len(hidden)], condition.project(hidden), atol=1e-5)
    assert torch.allclose(told["vector"][0], condition.pooled(hidden.mean(0)), atol=1e-5)
    assert told["mask"].sum(1).tolist() == [3 + encoder.marks, 0, 1 + encoder.marks]
    null = conditions.encode(conditions.null(1), 1)
    assert torch.equal(null["vector"][0], told["vector"][1])
    told["tokens"].sum().backward()
    assert all(p.grad is None for p in encoder.model.parameters())
    assert set(condition.state_dict()) == {"project.weight", "project.bias", "pooled.weight", "pooled.bias"}


def test_trap_P6_what_is_kept_is_of_these_weights_numbers_and_words(tmp_path: Path) -> None:
    one, other = (encoders.load(made(tmp_path / str(seed), "clip", seed)) for seed in (0, 1))
    words = one.tokens("a red circle")
    keys = {one.key(words), other.key(words), one.key(words[:2])}
    once = one(words)
    assert one(words) is once
    one.model.to(torch.bfloat16)
    keys.add(one.key(words))
    again = one(words)
    assert again is not once
    assert again.dtype == torch.float32
    assert bool(again.isfinite().all())
    assert len(keys) == 4


def test_trap_P6_embeddings_of_training_data_are_on_the_disk_and_damaged_ones_are_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))
    name = made(tmp_path / "clip", "clip")

    def anew() -> encoders.Encoder:
        encoders.load.cache_clear()
        return encoders.load(name)

    condition = Pretrained(name, 8, length=6).eval()
    rows, folder = condition.read(["a red circle", "blue"]), condition.encoder.folder
    condition.embed(rows)
    assert not folder.exists()  # what a user asks for is not written down
    encoders.load.cache_clear()
    condition = Pretrained(name, 8, length=6)
    with torch.autocast("cpu", torch.bfloat16):
        condition.embed(rows)
    files = sorted(folder.glob("*/*"))
    assert len(files) == 2

    one = anew()
    words = one.tokens("a red circle")
    exact = one._read(words)
    monkeypatch.setattr(encoders.Encoder, "_read", lambda *_: pytest.fail("was read again"))
    assert torch.equal(one(words), exact)
    monkeypatch.undo()
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "cache"))

    file = folder / one.key(words)[:2] / one.key(words)
    whole = file.read_bytes()
    for damage in (b"", whole[:-4], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]):
        file.write_bytes(damage)
        assert torch.equal(anew()(words, store=True), exact)
        assert file.read_bytes() == whole
    file.unlink()
    monkeypatch.setenv("UNDIFFUSE_CACHE_GB", str(1.5e-9 * len(whole)))
    assert torch.equal(anew()(words, store=True), exact)
    assert not file.exists()  # the cache is full
    (other,) = folder.glob("*/*")
    os.utime(other, (1, 1))  # of what was used long ago
    assert torch.equal(anew()(words, store=True), exact)
    assert file.exists()
    assert not other.exists()
    before = time.time() - 5
    os.utime(file, (before, before))
    anew()(words)
    assert file.stat().st_mtime > before  # it is used
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("UNDIFFUSE_CACHE", str(tmp_path / "file"))
    assert torch.equal(anew()(words, store=True), exact)  # no place for a cache


def test_other_weights_of_the_same_name_are_refused(tmp_path: Path) -> None:
    condition = Pretrained(made(tmp_path, "clip"), 8, length=6)
    config = Conditions({"text": condition}).config
    assert Conditions.build(config, 8).config == config
    made(tmp_path, "clip", seed=1)
    encoders.load.cache_clear()
    with pytest.raises(UndiffuseError, match="not those that this model was trained with"):
        Conditions.build(config, 8)
    with torch.device("meta"), pytest.raises(UndiffuseError, match="not those"):
        Conditions.build(config, 8)


def test_long_texts_are_cut_and_wrong_encoders_refused(tmp_path: Path) -> None:
    condition = Pretrained(made(tmp_path / "clip", "clip"), 8, length=3)
    with pytest.warns(UndiffuseWarning, match="cut was 'circle'"):
        condition.read(["a red blue circle"])
    with pytest.raises(UndiffuseError, match="length=11 must be from 1 to 10"):
        Pretrained(str(tmp_path / "clip"), 8, length=11)
    with pytest.raises(UndiffuseError, match="cannot be loaded"):
        encoders.load(str(tmp_path / "nothing"))
    assert isinstance(condition.project, nn.Linear)
