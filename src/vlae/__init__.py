"""Variational lossy autoencoders: an encoder, a prior, a decoder and a likelihood, and functions of the four."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .codes import encode
    from .compression import compress, decompress
    from .container import CodecError
    from .data import Images
    from .evaluation import log_likelihood
    from .model import VLAE, Terms, build, load
    from .sampling import complete, interpolate, reconstruct, sample
    from .training import LitVLAE

__all__ = [
    "VLAE",
    "CodecError",
    "Images",
    "LitVLAE",
    "Terms",
    "build",
    "complete",
    "compress",
    "decompress",
    "encode",
    "interpolate",
    "load",
    "log_likelihood",
    "reconstruct",
    "sample",
]
__version__ = "0.1.0"

# torch reads them once, as it starts
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads that spin make shared cores many times slower
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors in large pages: new ones cost far fewer page faults

_HOMES = {
    "codes": ["encode"],
    "compression": ["compress", "decompress"],
    "container": ["CodecError"],
    "data": ["Images"],
    "evaluation": ["log_likelihood"],
    "model": ["VLAE", "Terms", "build", "load"],
    "sampling": ["complete", "interpolate", "reconstruct", "sample"],
    "training": ["LitVLAE"],
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that `import vlae` does not wait for torch."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
