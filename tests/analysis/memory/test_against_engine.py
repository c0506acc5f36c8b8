"""The plan's bytes beside those of tensors that were live while the real engine trained."""

from pathlib import Path

import pytest
import yaml

from megatron_mer.analysis.memory.plan import plan_memory
from megatron_mer.config import load_config
from megatron_mer.parallel.topology import Layout
from megatron_mer.testing import run_world

pytestmark = pytest.mark.dist

PROGRAMS = Path(__file__).with_name("programs.py")
CONFIG = {
    "name": "memory",
    "seed": 1,
    "precision": "fp32",
    "model": {
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 384,
        "seq_length": 128,
        "vocab_size": 1024,
    },
    "tokenizer": "sentencepiece:none",
    "batch": {"global_batch_size": 16, "micro_batch_size": 4},
    "optimizer": {"lr": 1.0e-3},
    "stream": [{"task": "a", "train": [{"prefix": "none"}], "steps": 3}],
    "output_dir": "none",
}
BF16 = "--precision=bf16"
PP2, TP2 = "--parallel.pp_size=2", "--parallel.tp_size=2"
FULL = "--parallel.activation_checkpointing=full"
TIED = "--model.tie_embeddings=true"
ONE_MICRO_BATCH = "--batch.global_batch_size=4"
SHORT = "--model.seq_length=16"
REPTILE = "--reptile={k: 1, epsilon: 0.5}"
MOMENTUM = "--reptile={k: 1, epsilon: 0.5, momentum: 0.9}"
LARGE_VOCABULARY = "--model.vocab_size=8192"

# By name: ranks, options, and the phase in which the plan sees the peak.
RUNS = {
    "one rank": (1, (), "backward"),
    "one rank, one micro batch": (1, (ONE_MICRO_BATCH,), "backward"),
    "one rank, recomputing, large vocabulary": (1, (FULL, LARGE_VOCABULARY), "backward"),
    "one rank, tied, momentum": (1, (TIED, MOMENTUM), "backward"),
    "dp2, few tokens": (2, (SHORT,), "reduction"),
    "pp2": (2, (PP2,), "backward"),
    "pp2, tied, recomputing, momentum": (2, (PP2, TIED, FULL, MOMENTUM), "backward"),
    "tp2, large vocabulary": (2, (TP2, LARGE_VOCABULARY), "backward"),
    "tp2 pp2": (4, (TP2, PP2, REPTILE), "backward"),
    "bf16": (1, (BF16, "--batch.global_batch_size=8"), "backward"),
    "bf16, recomputing, large vocabulary": (1, (BF16, FULL, LARGE_VOCABULARY), "backward"),
    "bf16, one large matrix": (1, (BF16, TIED, LARGE_VOCABULARY, SHORT, REPTILE), "backward"),
    "bf16, dp2, few tokens": (2, (BF16, SHORT), "reduction"),
    "bf16, pp2, momentum": (2, (BF16, PP2, MOMENTUM), "backward"),
}


# On a CPU bf16 is slow.
SLOW = ("bf16, recomputing, large vocabulary", "bf16, one large matrix", "bf16, pp2, momentum")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=pytest.mark.slow if one in SLOW else ()) for one in RUNS]
)
def test_plan_agrees_with_the_peak_of_live_bytes(name, tmp_path):
    ranks, options, phase = RUNS[name]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    config = load_config(path, options)
    layout = Layout.of(config.parallel, ranks)
    plan = plan_memory(config, layout, "cpu")
    arguments = {"arguments": [str(path), *options], "world_size": ranks}
    measured = run_world(PROGRAMS, "peak", ranks, arguments, timeout=120)
    for rank, said in enumerate(measured):
        memory = plan[layout.coordinate(rank).pipe]
        predicted = memory.peak + memory.host_total
        parts = {**memory.always, **memory.phases[memory.peak_phase]}
        # The largest live tensors, as [bytes, how many], say what the plan does not know of.
        assert predicted == pytest.approx(said["peak"], rel=0.03), (parts, said)
    assert phase in (None, plan[0].peak_phase)
