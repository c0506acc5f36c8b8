"""The rank grid against DeepSpeed's, and the cutting of stages against exhaustive search."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mer.errors import ConfigError, LaunchError
from megatron_mer.parallel import Layout, split_stages


@pytest.mark.parametrize(
    ("pp", "dp", "tp"), [(1, 1, 1), (2, 3, 4), (4, 1, 2), (3, 2, 1), (1, 4, 2)]
)
def test_grid_is_deepspeeds(pp, dp, tp):
    topology = pytest.importorskip("deepspeed.runtime.pipe.topology")
    theirs = topology.PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    ours = Layout(tp_size=tp, pp_size=pp, dp_size=dp)
    assert ours.world_size == theirs.world_size()
    for rank in range(ours.world_size):
        place, expected = ours.coordinate(rank), theirs.get_coord(rank)
        assert place._asdict() == {axis: getattr(expected, axis) for axis in place._fields}
        assert ours.rank_of(*place) == rank
    for groups, axis in (
        (ours.tensor_groups(), "model"),
        (ours.data_groups(), "data"),
        (ours.pipe_groups(), "pipe"),
    ):
        # DeepSpeed leaves the lists out where an axis has one rank only.
        assert groups == (
            theirs.get_axis_comm_lists(axis) or [[rank] for rank in range(len(groups))]
        )


def test_model_counts_fastest_and_pipe_slowest():
    layout = Layout(tp_size=2, pp_size=2, dp_size=2)
    assert layout.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.data_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.pipe_groups() == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_impossible_grids_and_ranks_are_named():
    with pytest.raises(ConfigError) as error:
        Layout(tp_size=0, pp_size=1, dp_size=-1)
    assert "parallel.tp_size: 0" in str(error.value)
    assert "parallel.dp_size: -1" in str(error.value)
    with pytest.raises(LaunchError, match="ranks 0 to 3"):
        Layout(tp_size=2, pp_size=2, dp_size=1).coordinate(4)


def stage_costs(costs, bounds):
    return [sum(costs[start:stop]) for start, stop in itertools.pairwise(bounds)]


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=8).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_no_cut_is_better(case):
    costs, stages = case
    bounds = split_stages(costs, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert len(bounds) == stages + 1
    assert all(start < stop for start, stop in itertools.pairwise(bounds))

    def key(cut):
        loads = stage_costs(costs, cut)
        return max(loads), sum(load * load for load in loads)

    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    assert key(bounds) == min(key([0, *cut, len(costs)]) for cut in cuts)


def test_a_dear_head_takes_blocks_off_the_last_stage():
    assert split_stages([0.0, *[1.0] * 8, 0.0, 4.0], 3) == [0, 5, 9, 11]


def test_a_deep_model_on_many_stages_is_quick():
    bounds = split_stages([0.0, *[1.0] * 126, 0.01, 2.5], 64)
    assert len(bounds) == 65
    assert max(stage_costs([0.0, *[1.0] * 126, 0.01, 2.5], bounds)) <= 3.0


def test_more_stages_than_layers_is_an_error():
    with pytest.raises(ConfigError, match=r"parallel\.pp_size: 4; allowed: 1 to 3"):
        split_stages([1.0, 1.0, 1.0], 4)
