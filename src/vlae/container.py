"""The file around compressed images: what made it, and checksums of the bytes and of what they give."""

import struct
import zlib
from typing import NamedTuple

MAGIC = b"VLA\x01"  # the last byte is the version
NUMBERS = struct.Struct("<BBbBBIHII")
KINDS = ("bits-back", "two-part", "lossy")
FLOATS = ("float32", "float64")
START = len(MAGIC) + 4 + NUMBERS.size + 8


class CodecError(ValueError):
    """Damaged bytes, or those of another model or machine: no image is returned rather than a wrong one."""


class Header(NamedTuple):
    """What a file says of itself, in its first 35 bytes; a lossy one has zeros where it says nothing.

    Codes are multiples of 2^`spacing`; batches of at most `batch` images were computed in `floats` by `threads`
    threads. `initial` 32-bit words stood on the stack before the first image. `fingerprint` is a checksum of what the
    model makes of fixed images, `content` of what decoding gives (codes or images); `model` is a digest of the weights.
    """

    kind: str
    floats: str
    spacing: int
    batch: int
    threads: int
    images: int
    initial: int
    fingerprint: int
    content: int
    model: str
    torch: str
    constriction: str


def pack(header: Header, payload: bytes) -> bytes:
    """The file. ValueError for more images or initial words than it can count."""
    kind, floats, *numbers, model, torch, constriction = header
    versions = bytes(int(part) for name in (torch, constriction) for part in name.split(".")[:2])
    try:
        packed = NUMBERS.pack(KINDS.index(kind), FLOATS.index(floats), *numbers)
    except struct.error as error:
        raise ValueError(f"{header.images} images from {header.initial} initial words do not fit a file") from error
    body = packed + bytes.fromhex(model) + versions + payload
    return MAGIC + zlib.crc32(body).to_bytes(4, "little") + body


def unpack(data: bytes) -> tuple[Header, bytes]:
    """Header and payload. CodecError unless every byte is as it was written."""
    if len(data) < START or data[:4] != MAGIC:
        raise CodecError("no compressed images, or of another version of vlae")
    if zlib.crc32(data[8:]) != int.from_bytes(data[4:8], "little"):
        raise CodecError("damaged: the checksum is wrong")
    kind, floats, *numbers = NUMBERS.unpack_from(data, 8)
    if kind >= len(KINDS) or floats >= len(FLOATS):
        raise CodecError(f"damaged: kind {kind}, floats {floats}")
    model, versions = data[START - 8 : START - 4].hex(), data[START - 4 : START]
    torch, constriction = (f"{versions[at]}.{versions[at + 1]}" for at in (0, 2))
    fields = KINDS[kind], FLOATS[floats], *numbers, model, torch, constriction
    header, payload = Header(*fields), data[START:]
    if not 1 <= header.images <= len(payload):  # each takes a byte at least, so that a false count does no harm
        raise CodecError(f"damaged: {header.images} images in {len(payload)} bytes")
    return header, payload
