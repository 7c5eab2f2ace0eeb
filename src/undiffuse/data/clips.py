"""Clips: a video, a folder of frames, or an animated GIF, APNG, WebP or TIFF stack, is one clip of so many consecutive
frames.

The frames are those in the middle; a clip that has fewer is a bad file. Each frame is an image and gets its form by the
rules for images. In a folder whose first picture has several frames, every picture is a clip of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from typing import final

import numpy as np
from PIL import Image

from .folder import Form, Images, Reader, image_spec, image_target
from .images import FORMATS, Channels, Decoded, Header, Size, Target, combined, decode, fit, foreign, read_header
from .store import BadFile, File, Store
from .video import CONTAINERS, middle_pictures, read_video


@final
@dataclass(frozen=True)
class Clips(Reader):
    """Clips of ``frames`` frames; ``image_size`` and ``channels`` as for images."""

    frames: int
    image_size: Size = None
    channels: Channels = None

    noun = "clips"
    formats = "folders of PNG, JPEG, ...; animated GIF, APNG, WebP, TIFF; MP4, WebM, MOV, MKV, AVI"
    known = Images.known | CONTAINERS.keys()
    unsupported = Images.unsupported | {"flv", "wmv", "mpg", "mpeg", "ogv", "ts"}

    def group(self, store: Store, files: Sequence[File]) -> list[tuple[str, tuple[File, ...]]]:
        folders: dict[str, list[File]] = {}
        for file in files:
            folders.setdefault(file.path.rpartition("/")[0], []).append(file)
        items: list[tuple[str, tuple[File, ...]]] = []
        for folder, inside in folders.items():
            videos = [file for file in inside if file.extension in CONTAINERS]
            pictures = [file for file in inside if file.extension not in CONTAINERS]
            alone = [*videos, *pictures] if pictures and self._moves(store, pictures[0]) else videos
            items += [(file.path, (file,)) for file in alone]
            if pictures and len(alone) < len(inside):
                items.append((folder or ".", tuple(pictures)))
        return items

    def _moves(self, store: Store, file: File) -> bool:
        try:
            return count_frames(store.read(file)) > 1
        except (BadFile, OSError):
            return False

    def header(self, store: Store, files: tuple[File, ...]) -> Header:
        if files[0].extension in CONTAINERS:
            with store.open(files[0]) as stream:
                return read_video(stream, files[0].extension, self.frames)
        store.check(files[0])
        count = len(files) if len(files) > 1 else count_frames(store.read(files[0]))
        if count < self.frames:
            raise BadFile(f"{count} frames, fewer than frames={self.frames}")
        with store.open(files[0]) as stream:
            header = read_header(stream)
        return header if len(files) > 1 else replace(header, bits=8)

    def form(self, headers: Sequence[Header], name: str) -> Form:
        target, notes = image_target(headers, self.image_size, self.channels, name)
        same = all((header.height, header.width) == target.size for header in headers)
        spec = image_spec(target, resize=None if same else "lanczos")
        shape = (target.channels, self.frames, *target.size)
        return Form(target, replace(spec, kind="video", shape=shape, layout=f"T{spec.layout}"), tuple(notes))

    def decode(self, store: Store, files: tuple[File, ...], target: Target) -> Decoded:
        if files[0].extension in CONTAINERS:
            with store.open(files[0]) as stream:
                shown, notes = middle_pictures(stream, files[0].extension, self.frames)
            pixels = np.stack([fit(combined(each, None, target.channels), target.size) for each in shown])
            return Decoded(pixels, notes, blake2b(np.stack(shown).tobytes(), digest_size=16).digest())
        if len(files) == 1:
            data = store.read(files[0])
            pictures = middle_frames(data, self.frames)
            parts = [decode(picture, target) for picture in pictures]
            return Decoded(np.stack([part.pixels for part in parts]), (), blake2b(data, digest_size=16).digest())
        first = (len(files) - self.frames) // 2
        parts = [decode(store.read(file), target) for file in files[first : first + self.frames]]
        notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
        content = blake2b(b"".join(part.digest for part in parts), digest_size=16).digest()
        return Decoded(np.stack([part.pixels for part in parts]), notes, content)


def count_frames(data: bytes) -> int:
    """How many frames an image file has."""
    with foreign(), warnings.catch_warnings(), Image.open(BytesIO(data), formats=FORMATS) as image:
        warnings.simplefilter("ignore")
        read_header(BytesIO(data))
        return int(getattr(image, "n_frames", 1))


def middle_frames(data: bytes, count: int) -> list[bytes]:
    """``count`` frames from the middle of a file, each as a PNG of its own."""
    frames = []
    with foreign(), Image.open(BytesIO(data), formats=FORMATS) as image:
        first = (int(getattr(image, "n_frames", 1)) - count) // 2
        for index in range(first + count):  # in order: a frame may be a change of the one before it
            image.seek(index)
            if index >= first:
                buffer = BytesIO()
                image.convert("RGBA" if image.mode in ("P", "PA") else image.mode).save(buffer, "PNG")
                frames.append(buffer.getvalue())
    return frames
