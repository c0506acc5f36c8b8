"""The arithmetic of memory, where a number can be found in another way."""

from pathlib import Path

import pytest
import torch

from megatron_mer.analysis.memory import plan as module
from megatron_mer.analysis.memory.activations import attention_saved
from megatron_mer.analysis.memory.plan import plan_memory
from megatron_mer.analysis.memory.shape import RankShape
from megatron_mer.config import load_config
from megatron_mer.model import build_layers
from megatron_mer.parallel.topology import Layout

PAPER = Path(__file__).resolve().parents[3] / "examples/paper/1.1b_mer25.yaml"


def planned(ranks, *options, device="cuda"):
    config = load_config(PAPER, options)
    return config, plan_memory(config, Layout.of(config.parallel, ranks), device)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("pp_size", [1, 3])
def test_the_weights_of_all_stages_are_those_of_the_model(pp_size, tied):
    options = (f"--parallel.pp_size={pp_size}", f"--model.tie_embeddings={tied}")
    config, stages = planned(pp_size, *options)
    with torch.device("meta"):
        layers = dict(build_layers(config.model))
        count = sum(p.numel() for make in layers.values() for p in make().parameters())
    if tied == "true" and pp_size > 1:
        count += 128256 * config.model.hidden_size  # first and last stage hold one each
    assert sum(one.always["weights"] for one in stages) == 2 * count


def test_optimizer_and_reptile_are_shared_by_the_data_ranks_and_gradients_are_not():
    (_, [one]), (_, [eight]) = planned(1), planned(8)
    for name in ("fp32 masters", "Adam moments", "Reptile anchor", "Reptile last delta"):
        assert one.always[name] == pytest.approx(8 * eight.always[name], rel=1e-4)
    assert one.always["gradient sums"] == pytest.approx(eight.always["gradient sums"], rel=1e-4)
    # Masters, moments and anchor in fp32, the last delta in bf16.
    assert eight.host_total == eight.always["fp32 masters"] * 4.5


def test_an_anchor_on_the_host_leaves_the_gpu():
    (_, [device]), (_, [host]) = planned(1), planned(1, "--reptile.anchor=host")
    moved = device.always["Reptile anchor"] + device.always["Reptile last delta"]
    assert device.peak - host.peak == host.host_total - device.host_total == moved


def test_each_stage_holds_as_many_micro_batches_as_stages_are_behind_it():
    assert [s.stage.in_flight for s in planned(4, "--parallel.pp_size=4")[1]] == [4, 3, 2, 1]
    few = ("--parallel.pp_size=4", "--batch.global_batch_size=8")
    assert [s.stage.in_flight for s in planned(4, *few)[1]] == [2, 2, 2, 1]


def test_a_share_of_an_uneven_vocabulary_is_padded_and_a_lone_head_repeated():
    options = ["--model.vocab_size=1001", "--model.num_kv_heads=2", "--model.num_heads=28"]
    config = load_config(PAPER, options)
    shape = RankShape.of(config, Layout(tp_size=4, pp_size=1, dp_size=1), "cuda")
    assert (shape.vocab, shape.kv_width, shape.query_width) == (251, 64, 7 * 64)


def test_a_gpu_keeps_the_scores_in_fp32_with_grouped_heads_alone():
    def saved(precision, kv_heads):
        options = [f"--precision={precision}", f"--model.num_kv_heads={kv_heads}"]
        config = load_config(PAPER, options)
        shape = RankShape.of(config, Layout(tp_size=1, pp_size=1, dp_size=1), "cuda")
        return attention_saved(shape), 4 * shape.rows * shape.heads * shape.seq_length**2

    kept, scores = saved("fp32", 14)
    assert kept > scores
    assert saved("fp32", 28)[0] < scores
    assert saved("bf16", 14)[0] < scores


def test_numbers_that_stand_elsewhere_too_are_the_same():
    from deepspeed.runtime import engine as deepspeed_engine

    from megatron_mer.continual import reptile
    from megatron_mer.engine import deepspeed_config

    assert module.LARGEST_BUCKET == deepspeed_config._LARGEST_BUCKET
    assert module.REPTILE_CHUNK == reptile.CHUNK
    assert module.REDUCED_TOGETHER == deepspeed_engine.MEMORY_OPT_ALLREDUCE_SIZE


def test_the_constants_are_those_of_the_engine():
    """They stand there too because the plan loads no torch."""
    from megatron_mer.continual import reptile
    from megatron_mer.engine import deepspeed_config

    assert module.REPTILE_CHUNK == reptile.CHUNK
    assert module.REPTILE_CPU_CHUNK == reptile.CPU_CHUNK
    assert module.LARGEST_BUCKET == deepspeed_config._LARGEST_BUCKET
