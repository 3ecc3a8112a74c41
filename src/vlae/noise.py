"""Noise as a function of a key, so that a batch, an image or a picture has its own whatever came before."""

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A seed as a function of a key such as ("order", seed, epoch): other keys, unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Noise as a function of a key."""
    return torch.Generator(device).manual_seed(seed_of(*key))
