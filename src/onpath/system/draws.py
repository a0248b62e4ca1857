"""Draws that depend on (seed, key, position) alone."""

import hashlib

import numpy as np
import torch


def noise(seed: int, key: str, length: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uniforms in [0, 1) for one request: a pure function of seed, key and position."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(length)


def seed_torch(seed: int, key: str) -> None:
    """Makes torch's own draws from here on, on every device, a function of seed and key: those of dropout."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
