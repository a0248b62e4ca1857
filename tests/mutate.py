"""Damage of every kind, drawn from a seed: what a disk, a network or an enemy makes of a good file."""

import copy
import json
import random
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 5, 3.5, -9999.0, 1e308, 10**400, float("nan"), float("-inf"), "", "x", "-1",
    "\x1b[2J", "\ud800", "\u202e", "x" * 5000, [], {}, [[]], [None], {"": None}, [[[[[[[[1]]]]]]]],
]  # fmt: skip


def mutated(good: Any, rng: random.Random) -> bytes:
    """JSON that was good: bytes flipped, cut off, or another value or key somewhere inside."""
    if rng.random() < 0.3:
        return damaged(json.dumps(good).encode(), rng)
    tree = copy.deepcopy(good)
    for _ in range(rng.choice((1, 1, 2, 4))):
        tree = _changed(tree, rng)
    return json.dumps(tree).encode()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, removed, doubled, or cut off."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 20))):
        if not found:
            break
        at = rng.randrange(len(found))
        match rng.randrange(5):
            case 0:
                found[at] = rng.randrange(256)
            case 1:
                del found[at : at + rng.randrange(1, 20)]
            case 2:
                found[at:at] = found[at : at + rng.randrange(1, 20)]
            case 3:
                del found[at:]
            case _:
                found[at:at] = rng.choice((b"\x00", b"\xff", b"[", b"{", b'"', b"\x1b[2J", b"99999", b"-"))
    return bytes(found)


def _changed(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.85:
        key = rng.choice(list(tree))
        match rng.randrange(6):
            case 0:
                del tree[key]
            case 1:
                tree[rng.choice(("", "x", "12", "-1", "9" * 30, "\x1b", "²"))] = tree.pop(key)
            case _:
                tree[key] = _changed(tree[key], rng)
        return tree
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = rng.randrange(len(tree))
        match rng.randrange(6):
            case 0:
                del tree[at]
            case 1:
                tree.append(copy.deepcopy(tree[at]))
            case _:
                tree[at] = _changed(tree[at], rng)
        return tree
    return copy.deepcopy(rng.choice(VALUES))
