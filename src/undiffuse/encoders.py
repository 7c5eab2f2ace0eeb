"""Text encoders that others have trained: CLIP's and T5's, through ``transformers``, frozen.

What an encoder says of a text is kept, under a key of everything that decides it: the encoder's weights, its number
type, and how the text became tokens (trap P6). The same text is therefore read once, however often it is seen: the last
ones are in memory, and those of training data in the user's cache too, for later runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import Room, cache_folder, used
from .config import write_bytes_atomic
from .errors import UndiffuseError

KEPT = 4096
"""Texts of which the embedding is kept in memory, the last ones used."""

KINDS = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}
"""The class of ``transformers`` for each kind of model."""


class Encoder:
    """A frozen text encoder.

    Attributes:
        name: the folder or the name on the Hub.
        hash: the first 16 digits of the SHA-256 of its weights and its tokenizer's vocabulary.
        width: numbers a token.
        most: most tokens of a text, without the marks around it.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name, self.model, self.tokenizer = name, model.eval().requires_grad_(False), tokenizer
        self.width = int(getattr(model.config, "hidden_size", None) or model.config.d_model)
        word, marked = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        first = next(i for i in range(len(marked)) if marked[i : i + len(word)] == word)
        self.before, self.after = marked[:first], marked[first + len(word) :]
        self.marks = len(self.before) + len(self.after)
        places = getattr(model.config, "max_position_embeddings", None)
        self.most = int(places) - self.marks if places else 512
        digest = sha256(repr(sorted(tokenizer.get_vocab().items())).encode())
        for key, tensor in sorted(model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.hash = digest.hexdigest()[:16]
        self.kept: OrderedDict[str, Tensor] = OrderedDict()

    def tokens(self, text: str) -> list[int]:
        """Its numbers of the words, without marks; none for a text without words."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text.strip() else []

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return str(self.tokenizer.decode(list(tokens)))

    def key(self, tokens: Sequence[int]) -> str:
        """Of what is kept: whose weights, in which numbers, of which input."""
        dtype = next(self.model.parameters()).dtype
        return sha256(repr((self.hash, str(dtype), self.marked(tokens))).encode()).hexdigest()

    def marked(self, tokens: Sequence[int]) -> list[int]:
        """The tokens between the marks for begin and end, as the tokenizer sets them."""
        return [*self.before, *tokens, *self.after]

    def __call__(self, tokens: Sequence[int], store: bool = False) -> Tensor:
        """``[len(tokens) + marks, width]``, float32, on the CPU: each word and mark in the light of the others.
        ``store``: keep it in the user's cache too; what is there is used in any case."""
        key = self.key(tokens)
        if key not in self.kept:
            file = self.folder / key[:2] / key
            said = self._stored(file, (len(tokens) + self.marks, self.width))
            if said is None:
                said = self._read(tokens)
                if store:
                    self._store(file, said)
            self.kept[key] = said
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]

    @torch.no_grad()
    def _read(self, tokens: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        given = torch.tensor([self.marked(tokens)], device=device)
        with torch.autocast(device.type, enabled=False):  # what is kept must not depend on who asks first
            return self.model(input_ids=given).last_hidden_state[0].float().cpu()

    @property
    def folder(self) -> Path:
        """Where this encoder's embeddings are: a file each, named by its key, a SHA-256 and then the numbers."""
        return cache_folder() / "texts" / self.hash

    @cached_property
    def _room(self) -> Room:
        return Room(cache_folder())

    @staticmethod
    def _stored(file: Path, shape: tuple[int, int]) -> Tensor | None:
        """What the file holds; None if it is missing, or damaged."""
        try:
            content = file.read_bytes()
        except OSError:
            return None
        used(file)
        digest, body = content[:32], bytearray(content[32:])
        if sha256(body).digest() != digest or len(body) != 4 * shape[0] * shape[1]:
            return None
        return torch.frombuffer(body, dtype=torch.float32).reshape(shape)

    def _store(self, file: Path, said: Tensor) -> None:
        body = said.contiguous().numpy().tobytes()
        with suppress(OSError):  # a cache that cannot be written saves no time, and that is all
            if self._room.take(32 + len(body)):  # else further texts are read anew by each run
                file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(file, sha256(body).digest(), body)


@lru_cache(4)
def load(name: str) -> Encoder:
    """The encoder in a folder, or of that name on the Hugging Face Hub. Only safetensors are read."""
    try:
        import transformers
    except ImportError:
        raise UndiffuseError(
            f"text encoder {name} needs transformers, which is missing: pip install 'undiffuse[diffusers]'"
        ) from None
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind not in KINDS:
            raise UndiffuseError(f"text encoder {name}: is a {kind}; CLIP and T5 can be used")
        with torch.device("cpu"):  # also where a model is only planned, on the device "meta"
            model = getattr(transformers, KINDS[kind]).from_pretrained(name, use_safetensors=True)
        return Encoder(name, model, transformers.AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        if isinstance(error, UndiffuseError):
            raise
        raise UndiffuseError(f"text encoder {name}: cannot be loaded ({str(error).splitlines()[0]})") from None
