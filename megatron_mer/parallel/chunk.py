"""How many tokens' logits a chunked loss makes at once. No torch."""

from __future__ import annotations

# A chunk's logits in fp32 take so many bytes at most: on a CPU what its last cache holds beside
# the weight, on a GPU what keeps its matrix products large.
CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
# Below so many tokens summing up the weight's gradient costs more than the logits' caching saves.
LEAST_TOKENS = {"cpu": 512, "cuda": 1024}


def chunk_tokens(vocab_share: int, device_type: str) -> int:
    """Tokens of a chunk, where the configuration leaves that open.

    Args:
        vocab_share: columns of a rank's logits.
        device_type: cpu or cuda.
    """
    kind = device_type if device_type in CHUNK_BYTES else "cuda"
    return max(LEAST_TOKENS[kind], CHUNK_BYTES[kind] // (4 * max(1, vocab_share)))
