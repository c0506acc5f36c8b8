"""What checkpoints of before mean today."""

from dataclasses import asdict

from megatron_mer.config import model_of_size
from megatron_mer.training.run_state import saved_model


def test_models_of_before_had_heads_that_fill_the_width_and_plain_angles():
    now = asdict(model_of_size("llama-99m", seq_length=8))
    before = {key: now[key] for key in now if key not in ("head_dim", "rope_scaling")}
    assert saved_model({"model": before}) == now
    scaled = asdict(model_of_size("llama3-1b", seq_length=8, head_dim=96))
    assert saved_model({"model": scaled}) == scaled
