"""Encodes and decodes images and videos with PyAV: PNG or JPEG files as bytes, and the frames of an mp4 at given times."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, final

import numpy as np

from difftori.data.formats._source import need
from difftori.errors import DataError

_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "mjpeg"}
_FAULTS = (OSError, ValueError, RuntimeError, TypeError, EOFError, MemoryError, NotImplementedError)
_BLOCK = 64


def decode_image(content: bytes, place: str, channels: int = 3) -> np.ndarray:
    """Decode a PNG or JPEG file to uint8 (height width 3), or grey ones, if one channel is expected, to uint8 or uint16 (height width 1).

    Raises DataError for other content.
    """
    av = need("av")
    codec = next((name for magic, name in _MAGIC.items() if content.startswith(magic)), None)
    if codec is None:
        raise DataError(
            f"{place} begins with {content[:8]!r}, which is neither PNG nor JPEG. Fix: create the data set again"
        )
    try:
        decoder = av.CodecContext.create(codec, "r")
        frames = [*decoder.decode(av.Packet(content)), *decoder.decode(None)]
        kind = frames[0].format.name
        if channels == 3 or not kind.startswith("gray"):
            return frames[0].to_ndarray(format="rgb24")
        return frames[0].to_ndarray(format="gray16le" if kind.startswith("gray16") else "gray")[..., None]
    except (*_FAULTS, av.FFmpegError, IndexError) as error:
        raise DataError(f"{place} cannot be decoded ({error or 'no image in it'}). Fix: restore the file") from error


def encode_image(image: np.ndarray) -> bytes:
    """Encode uint8 (height width 3), or uint8 or uint16 (height width 1), as a PNG file."""
    av = need("av")
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.time_base = Fraction(1, 1)
    form = "rgb24" if image.shape[2] == 3 else "gray" if image.dtype == np.uint8 else "gray16be"
    encoder.pix_fmt = form
    image = image if image.shape[2] == 3 else image[..., 0]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=form)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def read_frames(path: Path, times: np.ndarray, tolerance: float, channels: int = 3) -> Iterator[np.ndarray]:
    """Iterate over the frames at these increasing times in seconds, in blocks of uint8 (B height width C), C 3 or 1.

    Raises DataError if the file cannot be decoded, or has no frame within `tolerance` of a time.
    """
    av = need("av")
    found, block = 0, []
    try:
        # Opened here and read as mp4 only: a playlist under this name could make FFmpeg open other files.
        with path.open("rb") as file, av.open(file, format="mp4") as container:
            if not container.streams.video:
                raise DataError(f"{path}: no video stream. Fix: restore the file")
            for frame in container.decode(video=0):
                if found == len(times) or frame.time is None or times[found] < frame.time - tolerance:
                    break
                if times[found] > frame.time + tolerance:
                    continue
                image = frame.to_ndarray(format="rgb24" if channels == 3 else "gray")
                block.append(image if channels == 3 else image[..., None])
                found += 1
                if len(block) == _BLOCK:
                    yield np.stack(block)
                    block = []
    except DataError:
        raise
    except (*_FAULTS, av.FFmpegError) as error:
        raise DataError(
            f"{path}: no readable video ({error}); it is truncated or damaged. Fix: restore the file"
        ) from error
    if found < len(times):
        raise DataError(
            f"{path}: no frame at {times[found]:.3f} s, number {found + 1} of {len(times)}; it is truncated, or belongs to "
            "other episodes. Fix: restore the file"
        )
    if block:
        yield np.stack(block)


@final
class VideoWriter:
    """Writes frames (height width 3) to an mp4 file: H.264, 4:2:0, a key frame every second frame."""

    def __init__(self, path: Path, fps: Fraction, height: int, width: int, crf: int):
        av = need("av")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._av, self._file = av, path.open("wb")
        self._container = av.open(self._file, "w", format="mp4")
        self._stream: Any = self._container.add_stream("libx264", rate=fps, options={"g": "2", "crf": str(crf)})
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        self.frames = 0

    def append(self, images: np.ndarray) -> None:
        """Encode and append frames, uint8 (B height width 3)."""
        for image in images:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Finish the file."""
        with self._file:
            self._container.mux(self._stream.encode(None))
            self._container.close()
