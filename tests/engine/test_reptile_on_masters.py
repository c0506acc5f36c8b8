"""Reptile on DeepSpeed's fp32 masters: where an update puts the weights, they stay."""

import math
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import CheckpointReader, Fragment, find_latest
from megatron_mer.config import load_config
from megatron_mer.data.loader import TrainLoader
from megatron_mer.model import Llama
from megatron_mer.optim.groups import parameter_groups
from megatron_mer.optim.schedule import lr_at
from megatron_mer.testing import run_world
from megatron_mer.training.preflight import prepare

pytestmark = pytest.mark.dist

PROGRAMS = Path(__file__).with_name("programs.py")
PP2 = "--parallel.pp_size=2"
TP4 = "--parallel.tp_size=4"
MOMENTS = ("exp_avg", "exp_avg_sq")


def run(tiny, function, world_size, *options):
    """Run a program of this folder on the tiny corpus."""
    arguments = {"arguments": [str(tiny.write("run")), *options], "world_size": world_size}
    return run_world(PROGRAMS, function, world_size, arguments, timeout=90)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(4, ("--precision=bf16", PP2)), (2, ("--precision=bf16", "--parallel.tp_size=2"))],
    ids=["pp2_dp2", "tp2"],
)
def test_a_step_of_rate_zero_leaves_the_weights_where_reptile_put_them(tiny, ranks, options):
    for said in run(tiny, "rest_after_reptile", ranks, "--reptile.k=3", *options):
        assert said["updated"]
        assert said["applied"]
        assert said["masters_rest"]
        assert said["weights_rest"]
        assert said["weights_are_rounded_masters"]
        # Three steps of Adam at rate 1e-3, half of which was taken back.
        assert said["masters_moved_by_reptile"] > 1e-4
        assert said["weights_moved_by_reptile"] > 1e-4


def test_a_micro_batch_waits_for_no_value_of_a_tensor(tiny):
    """Reads of values belong to the end of a step: their number knows nothing of micro batches."""
    many, few = (run(tiny, "host_reads", 1, f"--batch.micro_batch_size={rows}") for rows in (1, 4))
    assert (many[0]["micro_batches"], few[0]["micro_batches"]) == (8, 2)
    assert many[0]["reads"] == few[0]["reads"] > 0


def test_masters_start_from_fp32_and_each_weight_counts_once(tiny):
    said = run(tiny, "fp32_start", 4, "--precision=bf16", PP2, "--parallel.tp_size=2")
    assert all(rank["exact"] == 0.0 for rank in said)
    assert max(rank["rounded"] for rank in said) > 1e-6, "the values do not fit into bf16"
    model = Llama(prepare(load_config(tiny.write("run"), ()), 1).config.model, seed=7)
    assert sum(rank["numel"] for rank in said) == sum(p.numel() for p in model.parameters())
    assert {name for rank in said for name in rank["counted"]} == set(model.state_dict())


UNEVEN = ("--model.num_kv_heads=1", "--model.vocab_size=517")


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, ("--parallel.tp_size=2",)), (4, ("--parallel.tp_size=2", PP2)), (4, (TP4,))],
    ids=["tp2", "tp2_pp2", "tp4"],
)
def test_repeated_heads_and_padded_rows_count_once_or_never(tiny, ranks, options):
    said = run(tiny, "fp32_start", ranks, "--precision=bf16", *UNEVEN, *options)
    assert all(rank["exact"] == 0.0 for rank in said)
    model = Llama(prepare(load_config(tiny.write("run"), UNEVEN), 1).config.model, seed=7)
    assert sum(rank["numel"] for rank in said) == sum(p.numel() for p in model.parameters())
    assert {name for rank in said for name in rank["counted"]} == set(model.state_dict())


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_checkpoint_goes_to_another_tp_and_back_to_the_bit(tiny, tied):
    """Weights, moments, Reptile's anchor, velocity or last delta; in none of them is padding."""
    options = (*UNEVEN, f"--model.tie_embeddings={tied}", "--reptile.momentum=0.5")
    layouts = {
        "two": (2, "--parallel.tp_size=2"),
        "one": (1,),
        "four": (4, TP4),
        "back": (2, "--parallel.tp_size=2"),
    }
    stored, source, said = {}, None, {}
    for name, (ranks, *layout) in layouts.items():
        target = tiny.folder / "checkpoints" / name
        arguments = [str(tiny.write("run")), *options, *layout]
        program = {"arguments": arguments, "world_size": ranks, "target": str(target)}
        if source is not None:
            program["source"] = str(source)
        said[name] = run_world(PROGRAMS, "rewrite", ranks, program, timeout=90)
        source, reader = target, CheckpointReader(target)
        stored[name] = {(p.kind, p.name): p for p in reader.parameters()}
        stored[name] = {key: reader.parameter(*key) for key in stored[name]}
    assert {kind for kind, _ in stored["two"]} == {*MOMENTS, "master", "anchor", "velocity"}
    assert stored["two"]["exp_avg", "embedding.weight"].shape == (517, 32)
    for name, values in stored.items():
        assert values.keys() == stored["two"].keys()
        assert all(torch.equal(values[key], stored["two"][key]) for key in values), name
        assert all(rank["padding_is_zero"] for rank in said[name]), name
    weights = {k: v for k, v in stored["one"].items() if k[0] == "master"}
    assert sum(rank["elements"] for rank in said["one"]) == sum(v.numel() for v in weights.values())
    # 259 rows on the first rank, 258 on the second: one row of padding in each table.
    last = said["two"][1]
    assert last["allocated"] - last["elements"] >= 32 * (1 if tied == "true" else 2)
    folder = tiny.folder / "checkpoints"
    for file in sorted((folder / "two").glob("rank_*")):
        assert file.read_bytes() == (folder / "back" / file.name).read_bytes()


def test_tied_deltas_are_averaged_over_stages_cut_at_other_places(tiny):
    said = run(tiny, "averaged_tied", 4, PP2)
    assert [rank["right"] for rank in said] == [True] * 4
    assert sum(rank["pieces"] for rank in said) >= 2
    cuts = [sorted(c for rank in said if rank["pipe"] == p for c in rank["cuts"]) for p in (0, 1)]
    assert cuts[0] != cuts[1], "the stages' pieces must not line up, or this proves little"
    assert all(pieces[-1][1] == 512 * 32 for pieces in cuts)


def reference(config_file, options):
    """The same run in plain PyTorch: one process, AdamW, Reptile by its formula."""
    prepared = prepare(load_config(config_file, options), 1)
    config = prepared.config
    loader = TrainLoader(
        plan=prepared.plan,
        datasets=prepared.datasets,
        seq_length=config.model.seq_length,
        vocab_size=config.model.vocab_size,
        dp_rank=0,
        dp_size=1,
        micro_batch_size=config.batch.global_batch_size,
        eod_mask_loss=config.batch.eod_mask_loss,
        first_batch=0,
    )
    model = Llama(config.model, config.seed)
    optimizer = torch.optim.AdamW(
        parameter_groups(list(model.named_parameters()), config.optimizer.weight_decay),
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    parameters = list(model.parameters())
    anchor = [p.detach().clone() for p in parameters]
    velocity = [torch.zeros_like(p) for p in parameters]
    total = prepared.plan.total_batches
    lines = []
    for step in range(total):
        batch = next(loader)
        micro = batch.micro_batches[0]
        for group in optimizer.param_groups:
            group["lr"] = lr_at(config.schedule, config.optimizer.lr, total, step)
        optimizer.zero_grad()
        logits = model(torch.from_numpy(micro.inputs))
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(micro.targets).flatten(), reduction="none"
        )
        mask = torch.from_numpy(micro.mask).flatten()
        loss = (losses * mask).sum() / mask.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip)
        optimizer.step()
        line = {"loss": loss.item(), "grad_norm": norm.item()}
        if (step + 1) % config.reptile.k == 0:
            line["reptile_delta_norm"] = reptile(config.reptile, parameters, anchor, velocity)
        lines.append(line)
    loader.close()
    return model, lines


@torch.no_grad()
def reptile(config, parameters, anchor, velocity):
    """theta <- anchor + epsilon * step; returns the norm of theta - anchor."""
    squared = 0.0
    for theta, start, speed in zip(parameters, anchor, velocity, strict=True):
        delta = theta - start
        squared += float(delta.double().pow(2).sum())
        speed.mul_(config.momentum).add_(delta)
        step = delta + config.momentum * speed if config.nesterov else speed
        theta.copy_(start + config.epsilon * (step if config.momentum else delta))
        start.copy_(theta)
    return math.sqrt(squared)


@pytest.mark.parametrize(
    "options",
    [(), ("--reptile.momentum=0.5", "--reptile.nesterov=true")],
    ids=["plain", "nesterov"],
)
def test_equals_plain_pytorch_adamw_with_reptile(tiny, options):
    config = tiny.write("run")
    tiny.train(config, PP2, *options, world_size=4)
    model, wanted = reference(config, options)
    for line, reference_line in zip(tiny.lines("run"), wanted, strict=True):
        for key, value in reference_line.items():
            assert line[key] == pytest.approx(value, abs=1e-5), (line["step"], key)
    assert sum("reptile_delta_norm" in line for line in wanted) == 5
    info = find_latest(tiny.folder / "run" / "checkpoints")
    reader = CheckpointReader(info.path)
    for name, parameter in model.named_parameters():
        stored = torch.empty(parameter.numel())
        reader.fill(Fragment(name, "master", tuple(parameter.shape), None, 0, 1, 0, stored))
        torch.testing.assert_close(stored, parameter.detach().flatten(), rtol=0, atol=2e-5)
