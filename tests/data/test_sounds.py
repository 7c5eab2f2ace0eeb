from __future__ import annotations

import io
import struct
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from undiffuse.data import open_dataset
from undiffuse.data.sounds import encode_wav
from undiffuse.errors import UndiffuseError, UndiffuseWarning

RATE = 8000


def tone(count: int = 64, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Real numbers ``[count, channels]`` from -1 to 1, without symmetry."""
    t = np.arange(count)[:, None] / count
    return np.sin(7 * t * (1 + np.arange(channels)) + seed) * np.linspace(1, 0.3, count)[:, None]


def whole(bits: int, seed: int = 0, channels: int = 1, count: int = 64) -> np.ndarray:
    """Signed whole numbers that use the full scale."""
    full = 2 ** (bits - 1)
    values = np.floor(tone(count, channels, seed) * (full - 1)).astype(np.int64)
    values[0], values[1] = -full, full - 1
    return values


def pcm(path: Path, values: np.ndarray, bits: int, rate: int = RATE) -> np.ndarray:
    """Signed ``[N, C]`` written by the standard library; returned as stored (8 bits are stored from 0 to 255)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = values + (128 if bits == 8 else 0)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(values.shape[1])
        file.setsampwidth(bits // 8)
        file.setframerate(rate)
        raw = np.ascontiguousarray(stored, "<i8").view(np.uint8).reshape(-1, 8)
        file.writeframes(raw[:, : bits // 8].tobytes())
    return stored


def quiet(path: Path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UndiffuseWarning)
        return open_dataset(str(path), **options)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("bits", "dtype"), [(8, "uint8"), (16, "int16"), (24, "int32"), (32, "int32")])
def test_whole_numbers_come_back(tmp_path: Path, bits: int, dtype: str, channels: int) -> None:
    written = [pcm(tmp_path / f"{i}.wav", whole(bits, i, channels), bits) for i in range(3)]
    data = quiet(tmp_path)
    assert (data.spec.kind, data.spec.shape, data.spec.dtype) == ("sound", (channels, 64), dtype)
    assert data.spec.rate == RATE
    values = data.values(range(3))
    np.testing.assert_array_equal(values.reshape(3, 64, channels), written)
    back = data.spec.to_data(data.batch(range(3))[0])
    assert np.abs(back.astype(np.int64) - values).max() <= (2**8 if bits == 32 else 0)
    again = encode_wav(values[1], data.spec)
    with wave.open(io.BytesIO(again)) as file:  # read by another implementation
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (channels, bits // 8, RATE)
    assert again == (tmp_path / "1.wav").read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_real_numbers_come_back(tmp_path: Path, dtype: str) -> None:
    for index in range(2):
        wavfile.write(tmp_path / f"{index}.wav", RATE, tone(seed=index).astype(dtype))
    data = open_dataset(str(tmp_path))
    assert (data.spec.low, data.spec.high, data.spec.dtype) == (-1, 1, dtype)
    np.testing.assert_array_equal(data.values([1])[0], tone(seed=1)[:, 0].astype(dtype))
    rate, read = wavfile.read(io.BytesIO(encode_wav(data.values([1])[0], data.spec)))
    assert rate == RATE
    np.testing.assert_array_equal(read, data.values([1])[0])


def test_length_and_silence(tmp_path: Path) -> None:
    for index in range(20):
        pcm(tmp_path / f"{index:02}.wav", whole(8, index, 1, 64 if index else 100), 8)
    short = pcm(tmp_path / "99.wav", whole(8, 3, 1, 40), 8)[:, 0]
    with pytest.warns(UndiffuseWarning, match=r"0.008 s: 1 are longer and are cropped in the middle, 1 are shorter"):
        data = open_dataset(str(tmp_path))
    assert data.spec.shape == (1, 64)  # what 95 % of them fit into
    np.testing.assert_array_equal(data.values([0])[0], whole(8, 0, 1, 100)[18:82, 0] + 128)
    np.testing.assert_array_equal(data.values([20])[0], [*short, *[128] * 24])
    assert quiet(tmp_path, length=0.0125).spec.shape == (1, 100)
    for wrong in (0.0, -1.0, 1e9, float("nan"), float("inf")):
        with pytest.raises(UndiffuseError, match="length"):
            open_dataset(str(tmp_path), length=wrong)
    with pytest.raises(UndiffuseError, match="image_size does not apply"):
        open_dataset(str(tmp_path), image_size=8)


def test_mixed_forms(tmp_path: Path) -> None:
    eight = pcm(tmp_path / "a.wav", whole(8), 8)[:, 0]
    pcm(tmp_path / "b.wav", whole(16, 1, 2), 16)
    with pytest.warns(UndiffuseWarning, match="all become 16 bits"):
        data = open_dataset(str(tmp_path))
    assert data.spec.shape == (2, 64)
    np.testing.assert_array_equal(data.values([0])[0], np.repeat((eight[:, None] - 128) * 256, 2, 1))
    mono = quiet(tmp_path, channels=1).values([1])[0]
    assert np.abs(mono - whole(16, 1, 2).mean(1)).max() <= 0.5
    wavfile.write(tmp_path / "c.wav", RATE, tone().astype(np.float32))
    mixed = quiet(tmp_path, channels=1)
    assert mixed.spec.dtype == "float32"
    np.testing.assert_allclose(mixed.values([0])[0], (eight - 128) / 128, atol=1e-7)
    pcm(tmp_path / "d.wav", whole(16), 16, rate=16000)
    with pytest.raises(UndiffuseError, match=r"2 rates: 8,000 Hz \(3\), 16,000 Hz \(1\)"):
        open_dataset(str(tmp_path))


def test_bad_sounds_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    pcm(folder / "a.wav", whole(16), 16)
    raw = (folder / "a.wav").read_bytes()
    loud, lost = io.BytesIO(), io.BytesIO()
    wavfile.write(loud, RATE, (2 * tone()).astype(np.float32))
    wavfile.write(lost, RATE, np.where(tone() > 0.5, np.nan, tone()).astype(np.float32))
    bad = {
        "cut": raw[:-10],
        "head": raw[:30],
        "text": b"this is not a sound" * 10,
        "empty": b"",
        "compressed": raw[:20] + struct.pack("<H", 2) + raw[22:],
        "twelve bits": raw[:34] + struct.pack("<H", 12) + raw[36:],
        "half a sample": raw[:40] + struct.pack("<I", 1) + raw[44:],
        "loud": loud.getvalue(),
        "nan": lost.getvalue(),
        "no channels": raw[:22] + struct.pack("<H", 0) + raw[24:],
    }
    for name, content in bad.items():
        (folder / "b.wav").write_bytes(content)
        with pytest.warns(UndiffuseWarning, match=r"1 files skipped: b.wav \(.{8,}\)"):
            assert len(open_dataset(str(folder))) == 1, name
    (folder / "b.wav").write_bytes(raw[:40] + struct.pack("<I", 0xFFFFFFFF) + raw[44:])  # written to a pipe
    np.testing.assert_array_equal(quiet(folder).values([1]), quiet(folder).values([0]))
    (folder / "b.mp3").write_bytes(b"ID3")
    with pytest.warns(UndiffuseWarning, match="mp3 is not supported"):
        open_dataset(str(folder))


def test_classes_of_sounds(tmp_path: Path) -> None:
    for index, name in enumerate(("0_george_1", "0_jackson_1", "7_george_0")):
        pcm(tmp_path / f"{name}.wav", whole(16, index), 16)
    assert open_dataset(str(tmp_path)).labels is None
    data = open_dataset(str(tmp_path), labels="name")
    assert data.spec.classes == ("0", "7")
    assert data.describe() == "3 sounds of 0.008 s at 8,000 Hz, mono int16 [-32768, 32767], 2 classes"
