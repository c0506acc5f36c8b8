"""Where a Llama is cut into pipeline stages."""

import itertools

import pytest

from megatron_mer.parallel import stage_bounds


@pytest.mark.parametrize("blocks", [1, 2, 4, 7])
@pytest.mark.parametrize("head", [0.1, 1.0, 50.0])
def test_every_stage_holds_a_block(blocks, head):
    costs = [0.0, *[1.0] * blocks, 0.01, head]
    for pp_size in range(1, blocks + 1):
        bounds = stage_bounds(costs, pp_size)
        assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), pp_size + 1)
        for start, stop in itertools.pairwise(bounds):
            assert set(range(start, stop)) & set(range(1, blocks + 1)), bounds


def test_a_heavy_head_takes_blocks_off_the_last_stage():
    assert stage_bounds([0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0], 2) == [0, 4, 7]
