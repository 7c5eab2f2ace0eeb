from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageFile

from data.pictures import bad_files, chunk, jpeg_bytes, png_bytes, ramp, raw_png, rows16, save
from undiffuse.data import png, store
from undiffuse.data.folder import Images
from undiffuse.data.images import Header, Target, fit
from undiffuse.data.store import BadFile, File, Folder

BAD = bad_files()


def single(path: Path) -> tuple[Folder, tuple[File]]:
    """The file ``path`` as the loaders meet it: listed in its folder."""
    folder = Folder(path.parent)
    file, reason = next((file, reason) for file, reason in folder.entries() if file.path == path.name)
    if reason:
        raise BadFile(reason)
    return folder, (file,)


def read_header(path: Path) -> Header:
    return Images().header(*single(path))


def decode(path: Path, target: Target):
    return Images().decode(*single(path), target)


def read(path: Path, channels: int = 3, bits: int = 8) -> np.ndarray:
    header = read_header(path)
    return decode(path, Target((header.height, header.width), channels, bits)).pixels


def notes(path: Path) -> str:
    header = read_header(path)
    return " ".join(decode(path, Target((header.height, header.width), 3, 8)).notes)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def close(found: np.ndarray, expected: np.ndarray, within: int = 1) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= within


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, BAD[name])
    with pytest.raises(BadFile) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) > 10


def test_size_is_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    for name in ("09-30000.png", "10-13000.png", "11-huge.png"):
        with pytest.raises(BadFile, match="million pixels"):
            read_header(write(tmp_path / name, BAD[name]))


@pytest.mark.parametrize("extension", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_the_header_is_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str) -> None:
    path = save(tmp_path / f"a.{extension}", ramp())

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    header = read_header(path)
    assert (header.height, header.width, header.bits) == (8, 8, 8)


def test_large_files_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", ramp())
    monkeypatch.setattr(store, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(BadFile, match="MB"):
        read_header(path)


def test_smallest_and_longest_that_are_accepted(tmp_path: Path) -> None:
    assert read(save(tmp_path / "a.png", ramp(4, 4))).shape == (4, 4, 3)
    assert read(save(tmp_path / "b.png", ramp(4, 128))).shape == (4, 128, 3)


@pytest.mark.parametrize("extension", ["png", "webp", "bmp", "tiff", "gif", "jpg"])
def test_formats(tmp_path: Path, extension: str) -> None:
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(extension, {})
    colour = ramp(16, 24)
    if extension == "gif":  # 256 colours at most
        colour = colour // 64 * 64
    close(read(save(tmp_path / f"a.{extension}", colour, **options)), colour, 3 if extension == "jpg" else 0)


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    flat = np.full((16, 16, 3), (200, 90, 30), np.uint8)
    close(read(write(tmp_path / "a.png", jpeg_bytes(flat))), flat, 3)


def test_bytes_after_the_end_are_noted(tmp_path: Path) -> None:
    for name, data in (("a.jpg", jpeg_bytes(ramp())), ("b.png", png_bytes(ramp()))):
        assert "after the end" in notes(write(tmp_path / name, data + b"PK\3\4 a zip file"))
        assert notes(write(tmp_path / name, data + b"\0\0\n")) == ""


def test_trap_D2_16_bits_survive(tmp_path: Path) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("a.png", "a.tiff"):
        path = save(tmp_path / name, deep)
        assert read_header(path).bits == 16
        assert read_header(path).grey
        found = read(path, channels=1, bits=16)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, deep)
        eight = read(path, channels=1)
        np.testing.assert_array_equal(eight, np.round(deep / 257).astype(np.uint8))
        assert abs(eight.mean() / 255 - 0.5) < 0.001  # cutting the high values off gives 0.97
    path = write(tmp_path / "b.png", raw_png(256, 256, 16, 0, rows16(deep)))
    np.testing.assert_array_equal(read(path, channels=1, bits=16), deep)


def test_trap_D2_16_bit_colour(tmp_path: Path) -> None:
    deep = np.stack([np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040 + c * 5 for c in range(3)], axis=-1)
    path = write(tmp_path / "a.png", raw_png(8, 8, 16, 2, rows16(deep)))
    close(read(path), np.round(deep / 257).astype(np.uint8))
    np.testing.assert_array_equal(read(path, bits=16), deep)
    alpha = (np.arange(64, dtype=np.uint16).reshape(8, 8, 1) * 1040)[::-1]
    both = np.concatenate([deep, alpha], -1)
    path = write(tmp_path / "b.png", raw_png(8, 8, 16, 6, rows16(both)))
    np.testing.assert_array_equal(read(path, 4, bits=16), both)
    share = alpha / 65535
    on_white = deep * share + 65535 * (1 - share)
    assert np.abs(read(path, 3, bits=16) - on_white).max() <= 1
    grey = np.concatenate([deep[..., :1], alpha], -1)
    path = write(tmp_path / "c.png", raw_png(8, 8, 16, 4, rows16(grey)))
    assert read_header(path).grey
    assert np.abs(read(path, 1, bits=16) - on_white[..., 0]).max() <= 1
    key = chunk(b"tRNS", deep[3, 4].astype(">u2").tobytes())
    path = write(tmp_path / "d.png", raw_png(8, 8, 16, 2, rows16(deep), key))
    assert read(path, 3, bits=16)[3, 4].tolist() == [65535] * 3
    assert read(path, 3, bits=16)[3, 5].tolist() == deep[3, 5].tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_trap_D3_16_bit_colour_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    picture = ramp(6, 9)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", picture, exif=exif)
    eXIf = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    deep = write(tmp_path / "b.png", raw_png(9, 6, 16, 2, rows16(picture.astype(np.uint16) * 257), eXIf))
    np.testing.assert_array_equal(read(deep, bits=16), read(path).astype(np.uint16) * 257)  # Pillow turned this one


@pytest.mark.parametrize("shape", [(5, 7, 3), (9, 4, 4), (6, 6, 2), (4, 11, 1)])
def test_trap_D2_16_bit_filters(shape: tuple[int, int, int]) -> None:
    """Every filter of the standard, written as it is there: a loop over bytes."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 65536, shape).astype(np.uint16)
    stored = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(*shape[:2], -1).astype(int)
    padded = np.pad(stored, ((1, 0), (1, 0), (0, 0)))
    rows = b""
    for y in range(shape[0]):
        row = []
        for x in range(shape[1]):
            for a, b, c, value in zip(padded[y + 1, x], padded[y, x + 1], padded[y, x], stored[y, x], strict=True):
                nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))[2]
                row.append(int(value - (0, a, b, (a + b) // 2, nearest)[y % 5]) % 256)
        rows += bytes([y % 5, *row])
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[shape[2]]
    np.testing.assert_array_equal(png.decode16(raw_png(shape[1], shape[0], 16, kind, rows)), pixels)
    np.testing.assert_array_equal(png.decode16(png.encode16(pixels)), pixels)
    for wrong in (rows[:-1], rows + b"\0", b"\x05" + rows[1:]):
        with pytest.raises(BadFile, match="damaged"):
            png.decode16(raw_png(shape[1], shape[0], 16, kind, wrong))


COLOUR, ALPHA = ramp(8, 8), ramp(8, 8, 1, 3)
ON_WHITE = np.round(COLOUR * (ALPHA / 255)[..., None] + 255 * (1 - ALPHA / 255)[..., None])
GREY_ON_WHITE = np.round(ALPHA * (COLOUR[..., 0] / 255) + 255 * (1 - COLOUR[..., 0] / 255))


def test_trap_D3_alpha_is_composited_on_white(tmp_path: Path) -> None:
    rgba = np.concatenate([COLOUR, ALPHA[..., None]], axis=-1)
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True}), ("a.tiff", {})):
        path = save(tmp_path / name, rgba, **options)
        close(read(path), ON_WHITE)
        np.testing.assert_array_equal(read(path, channels=4), rgba)
    hidden = rgba.copy()
    hidden[..., :] = (255, 0, 0, 0)
    assert (read(save(tmp_path / "b.png", hidden)) == 255).all()


def test_trap_D3_grey_with_alpha(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", np.stack([ALPHA, COLOUR[..., 0]], axis=-1))
    assert read_header(path).grey
    close(read(path, channels=1), GREY_ON_WHITE)
    close(read(path, channels=3), np.repeat(GREY_ON_WHITE[..., None], 3, axis=-1))


def test_trap_D3_palette_with_transparency(tmp_path: Path) -> None:
    indices = np.arange(64, dtype=np.uint8).reshape(8, 8) % 3
    palette = bytes([200, 0, 0, 0, 200, 0, 0, 0, 200])
    rows = b"".join(b"\0" + row.tobytes() for row in indices)
    plain = write(tmp_path / "a.png", raw_png(8, 8, 8, 3, rows, chunk(b"PLTE", palette)))
    colours = np.frombuffer(palette, np.uint8).reshape(3, 3)
    np.testing.assert_array_equal(read(plain), colours[indices])
    seen = write(tmp_path / "b.png", raw_png(8, 8, 8, 3, rows, chunk(b"PLTE", palette), chunk(b"tRNS", b"\x00\x80")))
    expected = np.array([[255, 255, 255], [127, 227, 127], [0, 0, 200]], np.uint8)
    close(read(seen), expected[indices])
    gif = tmp_path / "c.gif"
    image = Image.fromarray(indices).convert("P")
    image.putpalette(palette)
    image.save(gif, transparency=0)
    close(read(gif), np.array([[255, 255, 255], [0, 200, 0], [0, 0, 200]], np.uint8)[indices])


def test_trap_D3_a_colour_that_means_transparent(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rows = b"".join(b"\0" + row.tobytes() for row in grey)
    path = write(tmp_path / "a.png", raw_png(8, 8, 8, 0, rows, chunk(b"tRNS", b"\0\x05")))
    np.testing.assert_array_equal(read(path, channels=1), np.where(grey == 5, 255, grey))
    deep = grey.astype(np.uint16) * 1000
    path = write(tmp_path / "b.png", raw_png(8, 8, 16, 0, rows16(deep), chunk(b"tRNS", (5000).to_bytes(2, "big"))))
    expected = np.where(deep == 5000, 255, np.round(deep / 257))
    np.testing.assert_array_equal(read(path, channels=1), expected)
    np.testing.assert_array_equal(read(path, channels=1, bits=16), np.where(deep == 5000, 65535, deep))
    rgb = np.stack([grey, grey, grey * 2], axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    path = write(tmp_path / "c.png", raw_png(8, 8, 8, 2, rows, chunk(b"tRNS", b"\0\x05\0\x05\0\x0a")))
    np.testing.assert_array_equal(read(path)[0, :7], [[i, i, 2 * i] if i != 5 else [255] * 3 for i in range(7)])
    nibbles = np.arange(16, dtype=np.uint8).reshape(2, 8).repeat(2, axis=0)  # 4 bits: stored level 5 is shown as 85
    rows = b"".join(b"\0" + bytes(row[0::2] * 16 + row[1::2]) for row in nibbles)
    path = write(tmp_path / "d.png", raw_png(8, 4, 4, 0, rows, chunk(b"tRNS", b"\0\x05")))
    np.testing.assert_array_equal(read(path, channels=1), np.where(nibbles == 5, 255, nibbles * 17))


def test_trap_D3_one_bit(tmp_path: Path) -> None:
    bits = np.eye(8, dtype=bool)
    path = tmp_path / "a.png"
    Image.fromarray(bits).save(path)
    assert read_header(path).grey
    np.testing.assert_array_equal(read(path, channels=1), bits * 255)


def test_trap_D3_cmyk_of_both_polarities(tmp_path: Path) -> None:
    flat = np.zeros((16, 16, 3), np.uint8) + np.array([200, 60, 20], np.uint8)
    cmyk = Image.fromarray(flat).convert("CMYK")
    adobe = BytesIO()
    cmyk.save(adobe, "JPEG", quality=100)
    data = adobe.getvalue()
    assert b"Adobe" in data
    close(read(write(tmp_path / "adobe.jpg", data)), flat, 3)
    # the other polarity: stored as it is, and no Adobe marker
    plain = BytesIO()
    ImageChops.invert(cmyk).save(plain, "JPEG", quality=100)
    data = plain.getvalue()
    at = data.index(b"\xff\xee")
    data = data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]
    close(read(write(tmp_path / "plain.jpg", data)), flat, 3)
    cmyk.save(tmp_path / "a.tiff")
    close(read(tmp_path / "a.tiff"), flat, 3)


def test_trap_D3_lab_and_ycbcr(tmp_path: Path) -> None:
    muted = ramp(16, 16) // 2 + 64  # Lab in 8 bits is coarse where colours are saturated
    rgb = Image.fromarray(muted)
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = to_lab.apply(rgb)
    lab.info.pop("icc_profile", None)
    lab.save(tmp_path / "lab.tiff")
    with Image.open(tmp_path / "lab.tiff") as image:
        assert image.mode == "LAB"
    close(read(tmp_path / "lab.tiff"), muted, 3)
    rgb.convert("YCbCr").save(tmp_path / "ycc.tiff")
    close(read(tmp_path / "ycc.tiff"), muted, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg", "tiff", "webp"])
def test_trap_D3_exif_is_turned_upright(tmp_path: Path, orientation: int, extension: str) -> None:
    upright = ramp(8, 12)
    # how a camera that is held so stores the upright picture: row and column 0 of the file are ... of the picture
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(extension, {})
    path = save(tmp_path / f"a.{extension}", np.ascontiguousarray(stored), exif=exif, **options)
    header = read_header(path)
    assert (header.height, header.width) == (8, 12)
    close(read(path), upright, 3 if extension == "jpg" else 0)


def test_trap_D3_profiles(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", ramp(), icc_profile=srgb)
    np.testing.assert_array_equal(read(path), ramp())
    assert notes(path) == ""
    assert "profile" in notes(save(tmp_path / "b.png", ramp(), icc_profile=b"not a profile"))
    np.testing.assert_array_equal(read(tmp_path / "b.png"), ramp())


def test_trap_D3_a_wide_profile_is_converted(tmp_path: Path) -> None:
    """In a profile whose red and blue primaries are exchanged, red means blue."""
    exchanged = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert "sRGB".encode("utf-16-be") in exchanged
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    exchanged = exchanged.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)
    close(read(save(tmp_path / "a.png", ramp(), icc_profile=exchanged)), ramp()[..., ::-1], 2)
    rgba = np.concatenate([ramp(), ramp(channels=1)[..., None]], axis=-1)
    found = read(save(tmp_path / "b.png", rgba, icc_profile=exchanged), channels=4)
    close(found, rgba[..., [2, 1, 0, 3]], 2)


def test_an_orientation_after_the_pixels_is_refused(tmp_path: Path) -> None:
    """Headers choose the form of all images; a picture that turns afterwards would be cropped without a word."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, data = png_bytes(ramp(8, 12)), exif.tobytes().removeprefix(b"Exif\0\0")
    path = write(tmp_path / "a.png", plain[:-12] + chunk(b"eXIf", data) + plain[-12:])
    with pytest.raises(BadFile, match="orientation"):
        read(path)


def test_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(ramp(8, 8, 3, seed) // 64 * 64) for seed in range(3)]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        path = tmp_path / name
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(path, None, save_all=True, append_images=frames[1:], **lossless)
        np.testing.assert_array_equal(read(path), np.asarray(frames[0]))
        assert "frames" in notes(path)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(tmp_path: Path, channels: int) -> None:
    grey = read(save(tmp_path / "a.png", ramp(8, 8, 1)), channels)
    colour = read(save(tmp_path / "b.png", ramp()), channels)
    if channels == 1:
        np.testing.assert_array_equal(grey, ramp(8, 8, 1))
        close(colour, np.round(ramp() @ [0.299, 0.587, 0.114]))
    else:
        np.testing.assert_array_equal(grey[..., :3], ramp(8, 8, 1)[..., None].repeat(3, -1))
        np.testing.assert_array_equal(colour[..., :3], ramp())
        assert channels == 3 or (colour[..., 3] == 255).all()


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadFile, match="regular"):
        read_header(tmp_path / "a.png")
    with pytest.raises(BadFile, match="changed"):  # one that became a pipe after it was found does not block either
        Folder(tmp_path).open(File("a.png", 0, 0))


def test_a_grey_palette_is_grey(tmp_path: Path) -> None:
    image = Image.fromarray(ramp(8, 8, 1)).convert("P")
    image.putpalette(bytes(value for level in range(256) for value in (255 - level,) * 3))
    image.save(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").grey
    np.testing.assert_array_equal(read(tmp_path / "a.png", 1), 255 - ramp(8, 8, 1))


# ---- resizing ----


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12, 3), (9, 9, 1)])
def test_resizing_keeps_a_constant(dtype: str, shape: tuple[int, ...]) -> None:
    pixels = np.full(shape, 77, dtype)
    result = fit(pixels, (5, 7))
    assert result.shape == (5, 7, *shape[2:])
    assert result.dtype == pixels.dtype
    np.testing.assert_allclose(result, 77, rtol=1e-6)


def test_resizing_crops_the_middle() -> None:
    pixels = np.zeros((8, 24), np.uint8)
    pixels[:, 8:16] = 200
    np.testing.assert_array_equal(fit(pixels, (8, 8)), 200)
    np.testing.assert_array_equal(fit(pixels.T, (8, 8)), 200)


def test_resizing_is_antialiased() -> None:
    """A fine checkerboard becomes its mean. Without a filter that grows it becomes black, white or a false pattern."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    assert np.abs(fit(board, (8, 8)).astype(float)[1:-1, 1:-1] - 127.5).max() < 3


def test_resizing_is_the_same_for_8_and_16_bits() -> None:
    eight = ramp(37, 53, 1)
    sixteen = fit(eight.astype(np.uint16) * 257, (16, 16))
    assert np.abs(sixteen / 257 - fit(eight, (16, 16))).max() < 1


def test_resizing_does_not_bleed_hidden_colours() -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (0, 200, 0, 255)
    pixels[:, 4:] = (255, 0, 0, 0)  # red, but fully transparent
    result = fit(pixels, (4, 4))
    assert result[..., 0][result[..., 3] > 64].max() <= 4
