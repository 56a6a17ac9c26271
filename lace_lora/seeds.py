"""A separate random stream for each use of a seed."""

import hashlib

import torch


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A generator seeded by a hash of the seed and the use's name, so that similar seeds give independent streams."""
    return torch.Generator().manual_seed(stream_seed(seed, *names))


def stream_seed(seed: int, *names: str | int) -> int:
    digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
