"""What other lossless formats make of the same pixels."""

import lzma
import math
import shutil
import subprocess
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, features
from torch import Tensor

WEBP = 16383  # pixels a side, which the format's headers can say


def sheet(x: UInt8[Tensor, "N C H W"], levels: int) -> Image.Image:
    """All images as one picture, in which headers weigh least; values as they are, one bit each for black and white."""
    columns = math.isqrt(len(x) - 1) + 1
    empty = x.new_zeros(-len(x) % columns, *x.shape[1:])
    rows = torch.cat([x, empty]).unflatten(0, (-1, columns))  # [R K C H W]
    picture = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()
    if x.shape[1] == 3:
        return Image.fromarray(picture)
    grey = picture[:, :, 0]
    return Image.fromarray(grey * 255).convert("1") if levels == 2 else Image.fromarray(grey)


def sizes(x: UInt8[Tensor, "N C H W"], levels: int) -> dict[str, int]:
    """Bytes of images, grey or colour, in one PNG, WebP (if it can be so large), JPEG XL (if there is `cjxl`) and xz;
    keys name versions."""
    picture, pixels = sheet(x, levels), x.numpy().tobytes()
    png, webp = BytesIO(), BytesIO()
    picture.save(png, "PNG", optimize=True)
    found = {f"PNG (zlib {features.version('zlib')})": len(png.getvalue())}
    if max(picture.size) <= WEBP:
        picture.convert("RGB").save(webp, "WEBP", lossless=True, quality=100, method=6)
        found[f"WebP {features.version('webp')}"] = len(webp.getvalue())
    raw = np.packbits(x.numpy()).tobytes() if levels == 2 else pixels
    found["xz"] = min(len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) for data in (raw, pixels))
    if shutil.which("cjxl"):
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "sheet.png", Path(folder) / "sheet.jxl"
            source.write_bytes(png.getvalue())
            subprocess.run(["cjxl", source, target, "-d", "0", "-e", "9"], check=True, capture_output=True)
            text = subprocess.run(["cjxl", "--version"], check=True, capture_output=True, text=True).stdout
            found[f"JPEG XL ({' '.join(text.split()[:2])})"] = target.stat().st_size
    return found
