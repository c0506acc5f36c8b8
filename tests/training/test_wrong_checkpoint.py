"""A checkpoint that is whole, but of another model, run, tokenizer or other data."""

import json

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError
from megatron_mer.training.preflight import prepare
from megatron_mer.training.resume import resumed, settings
from megatron_mer.training.run_state import RunState


@pytest.fixture
def saved(tiny):
    """The run state that the tiny run leaves after ten batches, as its file has it."""
    prepared = prepare(load_config(tiny.write("run")), 1)
    state = RunState(batches=10, updates=10, horizon=prepared.plan.total_batches)
    counters = {"updates_since": 2, "updates_done": 2}
    content = state.to_json(prepared.plan.history(), settings(prepared), counters)
    return json.loads(json.dumps(content))


def refusal(tiny, saved, *options):
    """Every line of what a start with these options says of the checkpoint."""
    prepared = prepare(load_config(tiny.folder / "run.yaml", options), 1)
    with pytest.raises(ConfigError) as caught:
        resumed(prepared, saved)
    return str(caught.value)


def test_its_own_is_taken(tiny, saved):
    prepared, state = resumed(prepare(load_config(tiny.folder / "run.yaml"), 1), saved)
    assert (state.batches, prepared.plan.total_batches) == (10, 20)


MODELS = {
    "--model.hidden_size=64": "model.hidden_size: given 64, but the run began with 32",
    "--model.num_layers=6": "model.num_layers: given 6, but the run began with 4",
    "--model.num_layers=2": "model.num_layers: given 2, but the run began with 4",
    "--model.tie_embeddings=false": "model.tie_embeddings: given False, but the run began with",
    "--model.vocab_size=640": "model.vocab_size: given 640, but the run began with",
    "--model.num_kv_heads=4": "model.num_kv_heads: given 4, but the run began with 2",
    "--model.ffn_hidden_size=96": "model.ffn_hidden_size: given 96, but the run began with 64",
}


@pytest.mark.parametrize("option", MODELS)
def test_another_model(tiny, saved, option):
    said = refusal(tiny, saved, option)
    assert MODELS[option] in said
    assert "undo the change, or begin anew with --fresh" in said


def test_another_tokenizer(tiny, saved):
    saved["settings"]["tokenizer"] = "0123456789abcdef" * 4
    said = refusal(tiny, saved)
    assert "tokenizer: its model has SHA-256 " in said
    assert "the run began with one of 0123456789abcdef..." in said


def test_other_data_under_the_same_name(tiny, saved):
    saved["settings"]["content"]["fr"] = "sha256:" + "7" * 64
    said = refusal(tiny, saved)
    assert "dataset 'fr' has the content " in said
    assert "its content changed" in said


def test_another_run(tiny, saved):
    """Its stream, its seed and its model: all is told at once."""
    said = refusal(
        tiny, saved, "--seed=8", "--stream.0.task=old", "--model.hidden_size=64", "--reptile=null"
    )
    for words in ("seed was 7, is 8", "'old'", "model.hidden_size: given 64", "no reptile section"):
        assert words in said, said
