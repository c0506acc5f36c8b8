"""Time limits as Slurm writes them."""

import pytest

from megatron_mer.errors import LaunchError
from megatron_mer.launch.sbatch import seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1", 60),
        ("90", 5400),
        ("2:30", 150),
        ("24:00:00", 86400),
        ("1-0", 86400),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("0-0:00:07", 7),
    ],
)
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0:00", "1h", "1:2:3:4", "-1", "1-", "UNLIMITED"])
def test_what_is_no_time_limit(text):
    with pytest.raises(LaunchError, match="--time: given"):
        seconds_of(text)
