"""Memory of a rank that trains on the CPU: what a step frees, the next one takes again."""

from __future__ import annotations

import ctypes

from megatron_mer.log import get_logger

logger = get_logger(__name__)

# Numbers of <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory instead of giving it back to the system.

    By default glibc gives each large tensor pages of its own, and those back when it is freed: the
    system clears thousands of pages in every step, a tenth of the time of a small model's step.
    The process then keeps what it took at most, which it needs again in the next step.

    Returns:
        Whether it could: the C library is glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("this C library has no mallopt: freed memory goes back to the system")
        return False
    most = 2**31 - 1  # bytes; as an int it can be no larger
    done = [mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, most), mallopt(_TOP_PAD, 64 << 20)]
    return all(done)
