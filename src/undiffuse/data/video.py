"""Video files, decoded by FFmpeg through the package ``av`` (undiffuse[video]): the frames in the middle, no others.

Only the header and the first frame are read to know a file; its frames are counted by their time stamps without being
decoded. The container is the one that the name says: a file is never asked what it is, because a playlist in disguise
would make FFmpeg open other files and addresses.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..errors import UndiffuseError
from .images import Header, check_size, foreign
from .store import BadFile

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

CONTAINERS = {"mp4": "mov", "m4v": "mov", "mov": "mov", "mkv": "matroska", "webm": "matroska", "avi": "avi"}
"""FFmpeg's container by the extension."""


@contextmanager
def _opened(file: BinaryIO, extension: str) -> Generator[tuple[InputContainer, VideoStream]]:
    try:
        import av
    except ImportError:
        raise UndiffuseError(
            "videos are read by the package av, which is missing: pip install 'undiffuse[video]'"
        ) from None
    with foreign(), av.open(file, "r", format=CONTAINERS[extension]) as container:
        if not container.streams.video:
            raise BadFile("it has no pictures")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1  # files are decoded side by side already
        yield container, stream


def read_video(file: BinaryIO, extension: str, frames: int) -> Header:
    """Size and kind of a video that has so many ``frames`` at least. Raises :class:`BadFile`."""
    with _opened(file, extension) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise BadFile("it has no pictures")
        turned = first.rotation % 180 == 90
        height, width = (first.width, first.height) if turned else (first.height, first.width)
        check_size(width, height)
        count = len(_stamps(container, stream))
    if count < frames:
        raise BadFile(f"{count} frames, fewer than frames={frames}")
    return Header(height, width, _is_grey(first), 8)


def middle_pictures(file: BinaryIO, extension: str, count: int) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """``count`` frames from the middle, upright, uint8 ``[H, W, 1 or 3]`` each; and notes. Raises :class:`BadFile`."""
    with _opened(file, extension) as (container, stream):
        stamps = _stamps(container, stream)
        first = (len(stamps) - count) // 2
        wanted = stamps[max(first, 0) : first + count]
        if len(wanted) < count:
            raise BadFile(f"{len(stamps)} frames, fewer than frames={count}")
        container.seek(wanted[0], stream=stream)  # to the nearest before it that needs no other
        coming = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= wanted[0])
        found = list(islice(coming, count))
        if [frame.pts for frame in found] != wanted:
            raise BadFile("damaged: some of its frames cannot be decoded")
        notes = ("more than 8 bits a channel, read as 8",) if _depth(found[0]) > 8 else ()
        return [_upright(frame) for frame in found], notes


def _stamps(container: InputContainer, stream: VideoStream) -> list[int]:
    """The time of each frame, in order; nothing is decoded. The container is left at its beginning."""
    container.seek(0, stream=stream)
    packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
    stamps = {packet.pts for packet in packets if packet.pts is not None}
    if len(stamps) < len(packets):
        raise BadFile("some of its frames have no time of their own: convert it to .mp4 or .webm")
    container.seek(0, stream=stream)
    return sorted(stamps)


def _is_grey(frame: VideoFrame) -> bool:
    return len([part for part in frame.format.components if not part.is_alpha]) == 1 and not frame.format.has_palette


def _depth(frame: VideoFrame) -> int:
    return max((part.bits for part in frame.format.components), default=8)


def _upright(frame: VideoFrame) -> np.ndarray:
    grey = _is_grey(frame)
    pixels = frame.to_ndarray(format="gray" if grey else "rgb24")
    return np.rot90(pixels[..., None] if grey else pixels, frame.rotation // 90)
