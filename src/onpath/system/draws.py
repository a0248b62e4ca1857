"""Draws that depend on (seed, key, position) alone."""

import hashlib

import numpy as np


def noise(seed: int, key: str, length: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Uniforms in [0, 1) for one request: a pure function of seed, key and position."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(length)


def request_seed(seed: int, key: str) -> int:
    """For a generator that is not ours, of one request: a pure function of seed and key, in 63 bits."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
