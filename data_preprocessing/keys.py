"""Keyed hashes of texts: what decides a document's side of the split and its place in the order.

Both depend on the text alone, so adding, removing or reordering other documents moves none.
"""

from __future__ import annotations

import hashlib

KEY_BYTES = 16
"""Order keys are that long: two different texts sharing one is out of the question."""
SPLIT_SCALE = 2**64


def order_key(text: str, seed: int) -> bytes:
    """Return the key that documents are sorted by: equal texts share it, other texts do not.

    Args:
        text: normalised text.
        seed: gives another order of the same documents.
    """
    seed_key = seed.to_bytes(8, "little", signed=True)
    digest = hashlib.blake2b(
        text.encode("utf-8"), digest_size=KEY_BYTES, key=seed_key, person=b"order"
    )
    return digest.digest()


def is_valid(text: str, valid_share: float) -> bool:
    """Tell whether a document is held out.

    Independent of the shuffling seed. A larger share keeps every document that is held out already.

    Args:
        text: normalised text.
        valid_share: in [0, 1).
    """
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"split").digest()
    return int.from_bytes(digest, "big") < int(valid_share * SPLIT_SCALE)


def bucket_of(key: bytes, num_buckets: int) -> int:
    """Return the bucket of an order key; buckets in ascending order hold ascending keys."""
    return int.from_bytes(key, "big") * num_buckets >> 8 * KEY_BYTES
