"""Sounds: WAV files of whole numbers (8, 16, 24 or 32 bits) or of real numbers.

All sounds of a set have one length, one rate and one form:

    length     that which 95 % of the sounds fit into, or ``length`` seconds: longer ones are cropped in the middle,
               shorter ones end in silence
    rate       is that of the files; files of several rates are refused, since resampling is a matter of taste
    channels   mono if all are mono, else those of the widest: a mono sound is then the same in all of them
    bits       those of the widest; narrower ones are shifted up, which is exact
    range      whole numbers: that of their bits; real numbers: -1 to 1, the full scale of the format

Model units are float32: 8, 16 and 24 bits come back exactly, of 32 bits the upper 24.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from math import isfinite
from typing import BinaryIO, final

import numpy as np

from ..errors import UndiffuseError
from .folder import Form, Reader
from .images import Channels, Decoded
from .spec import DataSpec, units_between
from .store import BadFile, File, Store

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
TO_THE_END = (0, 0xFFFFFFFF)
"""Lengths that programs write which did not know it yet."""


@dataclass(frozen=True)
class Sound:
    """What a WAV file says about itself: ``frames`` samples in each of its ``channels``, from byte ``start`` on."""

    channels: int
    rate: int
    bits: int
    real: bool
    frames: int
    start: int


@dataclass(frozen=True)
class SoundTarget:
    """The form of all sounds of a set."""

    length: int
    channels: int
    bits: int
    real: bool


def read_wav(file: BinaryIO, size: int) -> Sound:
    """The header of a WAV file (RIFF) of ``size`` bytes. Raises :class:`BadFile`."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise BadFile("not a WAV file")
    form: tuple[int, int, int, int] | None = None
    while len(head := file.read(8)) == 8:
        kind, length, here = head[:4], int.from_bytes(head[4:], "little"), file.tell()
        if kind == b"fmt ":
            content = file.read(min(length, 40))
            if len(content) < 16:
                raise BadFile("damaged: its format chunk is cut")
            code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", content[:16])
            if code == EXTENSIBLE and len(content) >= 26:
                code = int.from_bytes(content[24:26], "little")
            form = (code, channels, rate, bits)
        elif kind == b"data":
            if form is None:
                raise BadFile("damaged: no format before its samples")
            return _sound(*form, size - here if length in TO_THE_END else length, here, size)
        file.seek(here + length + length % 2)
    raise BadFile("truncated: it has no samples")


def _sound(code: int, channels: int, rate: int, bits: int, length: int, start: int, size: int) -> Sound:
    wanted = {PCM: (8, 16, 24, 32), FLOAT: (32, 64)}
    if code not in wanted:
        raise BadFile(f"compressed (WAV format {code}): save it as PCM")
    if bits not in wanted[code] or not 1 <= channels <= 64 or rate < 1:
        raise BadFile(f"{bits} bits, {channels} channels, {rate} Hz: save it as 8, 16, 24 or 32 bits PCM")
    if start + length > size:
        raise BadFile("truncated: the file ends before its samples do")
    frames = length // (channels * bits // 8)
    if frames == 0:
        raise BadFile("it has no samples")
    return Sound(channels, rate, bits, code == FLOAT, frames, start)


def decode_wav(data: bytes, target: SoundTarget) -> np.ndarray:
    """``[length, channels]`` samples in the form of ``target``. Raises :class:`BadFile`."""
    sound = read_wav(BytesIO(data), len(data))
    width, count = sound.bits // 8, sound.frames * sound.channels
    raw = np.frombuffer(data, np.uint8, count * width, sound.start)
    first = max(0, (sound.frames - target.length) // 2)
    raw = raw.reshape(sound.frames, sound.channels, width)[first : first + target.length]
    if sound.real:
        values = raw.reshape(len(raw), -1).view(f"<f{width}").astype(np.float64)
        if not np.isfinite(values).all():
            raise BadFile("it has NaN or infinite samples")
        if np.abs(values).max(initial=0) > 1:
            raise BadFile(f"it reaches {np.abs(values).max():.3g}, beyond full scale (1): make it quieter")
    else:  # shifted up to the upper bits of 32
        wide = np.zeros((*raw.shape[:2], 4), np.uint8)
        wide[..., 4 - width :] = raw ^ 0x80 if width == 1 else raw
        full = wide.reshape(len(raw), -1).view("<i4").astype(np.float64)
        values = full / 2.0 ** (31 if target.real else 32 - target.bits)
    if target.channels == 1 and sound.channels > 1:
        values = values.mean(axis=1, keepdims=True)
        values = values if target.real else np.floor(values + 0.5)
    elif sound.channels == 1:
        values = np.broadcast_to(values, (len(values), target.channels))
    result = np.zeros((target.length, target.channels))
    result[: len(values)] = values
    return (result + (128 if target.bits == 8 else 0)).astype(sound_dtype(target.bits, target.real))


def sound_dtype(bits: int, real: bool) -> np.dtype:
    return np.dtype({8: "uint8", 16: "int16", 24: "int32", 32: "float32" if real else "int32", 64: "float64"}[bits])


def encode_wav(values: np.ndarray, spec: DataSpec) -> bytes:
    """One sound in original units, ``[L]`` or ``[L, C]`` of ``spec.dtype``, as a WAV file of the bits of the data."""
    assert spec.rate is not None
    assert spec.high is not None
    real, itemsize = values.dtype.kind == "f", values.dtype.itemsize
    width = 3 if not real and spec.high == 2.0**23 - 1 else itemsize
    table = np.ascontiguousarray(values.reshape(len(values), -1), values.dtype.newbyteorder("<"))
    content = table.view(np.uint8).reshape(-1, itemsize)[:, :width].tobytes()
    block = spec.channels * width
    head = struct.pack("<HHIIHH", FLOAT if real else PCM, spec.channels, spec.rate, spec.rate * block, block, 8 * width)
    body = b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", len(content))
    body += content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@final
@dataclass(frozen=True)
class Sounds(Reader):
    """WAV files; ``length`` in seconds, ``channels`` as a number."""

    length: float | None = None
    channels: Channels = None

    noun = "sounds"
    formats = "WAV"
    known = frozenset(("wav", "wave"))
    unsupported = frozenset(("mp3", "flac", "ogg", "opus", "m4a", "aac", "aif", "aiff", "wma"))

    def header(self, store: Store, files: tuple[File, ...]) -> Sound:
        store.check(files[0])
        with store.open(files[0]) as stream:
            return read_wav(stream, files[0].size)

    def decode(self, store: Store, files: tuple[File, ...], target: SoundTarget) -> Decoded:
        data = store.read(files[0])
        values = decode_wav(data, target)
        return Decoded(values[:, 0] if target.channels == 1 else values, (), blake2b(data, digest_size=16).digest())

    def form(self, headers: Sequence[Sound], name: str) -> Form:
        rates = Counter(sound.rate for sound in headers)
        if len(rates) > 1:
            listed = ", ".join(f"{rate:,} Hz ({count})" for rate, count in rates.most_common(3))
            raise UndiffuseError(f"{name}: sounds of {len(rates)} rates: {listed}; bring them to one (sox, ffmpeg)")
        rate = next(iter(rates))
        voices = sorted({sound.channels for sound in headers})
        if isinstance(self.channels, int):
            if self.channels != 1 and voices != [self.channels] and voices != [1]:
                raise UndiffuseError(
                    f"{name}: channels={self.channels}, but the files have {voices}; choose 1 to mix them"
                )
            channels = self.channels
        elif len(voices) > 1 and voices != [1, voices[-1]]:
            raise UndiffuseError(
                f"{name}: sounds of {voices} channels; choose channels=1 (--channels 1) to mix each to mono"
            )
        else:
            channels = voices[-1]
        lengths = np.sort([sound.frames for sound in headers])
        if self.length is None:
            length = int(lengths[int(np.ceil(0.95 * len(lengths))) - 1])
        else:
            length = round(self.length * rate) if isfinite(self.length) else 0
        if not 4 <= length <= 2**24:
            raise UndiffuseError(
                f"{name}: a length of {length / rate:g} s is {length} samples; 4 to {2**24:,} are possible"
            )
        notes = []
        cropped, padded = int((lengths > length).sum()), int((lengths < length).sum())
        if cropped or padded:
            notes.append(
                f"every sound becomes {length / rate:.3g} s: {cropped} are longer and are cropped in the middle, "
                f"{padded} are shorter and end in silence; --length SECONDS chooses another"
            )
        real = any(sound.real for sound in headers)
        bits = max(sound.bits for sound in headers if sound.real == real)
        if len({(sound.bits, sound.real) for sound in headers}) > 1:
            notes.append(f"sounds of several bit depths: all become {bits} bits{' (real numbers)' if real else ''}")
        if bits == 32 and not real:
            notes.append("of 32 bits the upper 24 come back exactly")
        full = 2.0 ** (bits - 1)
        low, high = (-1.0, 1.0) if real else (0.0, 255.0) if bits == 8 else (-full, full - 1)
        shift, scale = units_between(low, high)
        dtype, layout = sound_dtype(bits, real).name, "L" if channels == 1 else "LC"
        spec = DataSpec("sound", (channels, length), dtype, low, high, shift, scale, layout, rate=rate)
        return Form(SoundTarget(length, channels, bits, real), spec, tuple(notes))

    def remarks(self, values: np.ndarray, spec: DataSpec) -> list[str]:
        peak = max(abs(float(values.max()) - spec.shift[0]), abs(float(values.min()) - spec.shift[0])) / spec.scale[0]
        return [f"the loudest sample is {peak:.2%} of full scale: make them louder"] if peak < 0.05 else []
