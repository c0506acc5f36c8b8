"""What arrives from a good file, overrides, extends, and writing it back."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mer.config import (
    DatasetConfig,
    ModelConfig,
    RopeScaling,
    load_config,
    model_of_size,
    resolve_vocab,
    to_yaml,
)
from megatron_mer.errors import ConfigError


def test_defaults_and_shorthands(base: Path) -> None:
    config = load_config(base)
    assert (config.parallel.tp_size, config.parallel.zero_stage) == (1, 1)
    assert config.replay is None
    assert config.reptile is None
    assert config.evaluate is None
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.lr == 1e-3
    assert config.checkpoint.keep_last == 2
    assert config.stream[0].train == (DatasetConfig(prefix="data/en", name="en"),)
    assert config.stream[0].valid_sets == {"en": "data/en_valid"}


def test_a_size_gives_the_dimensions_and_keys_beside_it_win(base: Path) -> None:
    model = load_config(base, ["--model.num_layers", "3"]).model
    assert model == model_of_size("llama-1m", seq_length=64, num_layers=3)
    assert (model.hidden_size, model.num_layers, model.num_kv_heads) == (128, 3, 2)
    assert model.tie_embeddings
    assert model.vocab_size is None


def test_heads_of_keys_and_values_default_to_the_heads(base: Path) -> None:
    config = load_config(base, ["--model", "{size: llama-99m, seq_length: 8, num_heads: 4}"])
    assert config.model.num_kv_heads == 4


def test_a_model_by_hand(base: Path) -> None:
    by_hand = "{seq_length: 8, hidden_size: 16, num_layers: 1, num_heads: 2, ffn_hidden_size: 24}"
    expected = ModelConfig(
        seq_length=8,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        ffn_hidden_size=24,
    )
    assert load_config(base, ["--model", by_hand]).model == expected


def test_heads_fill_the_width_unless_their_own_is_given(base: Path) -> None:
    assert load_config(base).model.head_dim == 32
    model = load_config(base, ["--model.head_dim=48"]).model
    assert (model.hidden_size, model.num_heads, model.head_dim) == (128, 4, 48)


@pytest.mark.parametrize(
    ("size", "parameters", "head_dim"),
    [
        ("llama-6b", 5.7e9, 128),
        ("llama3-1b", 1.236e9, 64),
        ("llama3-3b", 3.213e9, 128),
        ("llama3-8b", 8.030e9, 128),
        ("llama3-70b", 70.554e9, 128),
    ],
)
def test_large_sizes_have_the_parameters_of_their_names(
    size: str, parameters: float, head_dim: int
) -> None:
    """Counted as Meta does; METHOD's 5.7B with a vocabulary of about 50,000."""
    model = model_of_size(size, seq_length=8)
    vocabulary = 50304 if size == "llama-6b" else 128256
    hidden, heads = model.hidden_size, model.num_heads + model.num_kv_heads
    block = 2 * hidden * heads * head_dim + 3 * hidden * model.ffn_hidden_size + 2 * hidden
    tables = vocabulary * hidden * (1 if model.tie_embeddings else 2)
    assert model.head_dim == head_dim
    assert model.num_layers * block + hidden + tables == pytest.approx(parameters, rel=1e-3)


def test_llama3_brings_its_angles_and_null_takes_them_away(base: Path) -> None:
    expected = RopeScaling(
        kind="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    section = "{size: llama3-1b, seq_length: 64}"
    config = load_config(base, ["--model", section])
    assert config.model == model_of_size("llama3-1b", seq_length=64)
    assert (config.model.rope_base, config.model.rope_scaling) == (500000.0, expected)
    for overrides in ([], ["--model.rope_scaling", "null"]):
        config = load_config(base, ["--model", section, *overrides])
        assert (config.model.rope_scaling is None) == bool(overrides)
        base.write_text(to_yaml(config))
        assert load_config(base).model == config.model


@pytest.mark.parametrize("alpha", ["0.29", "0.1", "0", "0.25", "0.999999999", "29e-2"])
def test_alpha_is_exact(base: Path, alpha: str) -> None:
    config = load_config(base, [f"--replay.alpha={alpha}"])
    assert config.replay is not None
    assert isinstance(config.replay.alpha, Decimal)
    assert Fraction(config.replay.alpha) == Fraction(alpha)


def test_the_language_no_stays_text(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "no.yaml"
    path.write_text(base.read_text().replace("task: en", "task: no"))
    config = load_config(path, ["--stream.1.task", "on"])
    assert [entry.task for entry in config.stream] == ["no", "on"]


def test_limits_that_are_just_met(base: Path) -> None:
    schedule = "{warmup_steps: 19, min_lr: 1e-3, total_steps: 20}"
    config = load_config(base, ["--schedule", schedule, "--parallel.pp_size=4"])
    assert (config.schedule.warmup_steps, config.schedule.min_lr) == (19, 1e-3)


def test_large_counts_may_be_written_with_an_exponent(base: Path) -> None:
    config = load_config(base, ["--stream.0.fresh_tokens", "100e9", "--stream.0.steps", "null"])
    assert config.stream[0].fresh_tokens == 100_000_000_000
    assert isinstance(config.stream[0].fresh_tokens, int)


def test_both_forms_of_an_override(base: Path) -> None:
    config = load_config(
        base,
        [
            "--stream.1.steps",
            "50",
            "--stream.0.train.0.weight=2",
            "--optimizer.betas",
            "[0.8, 0.9]",
            "--reptile.k=5",
            "--reptile.epsilon",
            "0.5",
            "--tokenizer=sentencepiece:a=b.model",
        ],
    )
    assert config.stream[1].steps == 50
    assert config.stream[0].train[0].weight == 2.0
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.reptile is not None
    assert (config.reptile.k, config.reptile.epsilon) == (5, 0.5)
    assert config.tokenizer == "sentencepiece:a=b.model"
    assert load_config(base, ["--replay.alpha", "0.5", "--replay", "null"]).replay is None


def test_the_empty_list_of_segments_is_none_at_all(base: Path) -> None:
    then = "[{kind: constant, lr: 1}]"
    overrides = ["--schedule.total_steps=9", "--schedule.then", then, "--schedule.then.0.lr=2e-4"]
    (segment,) = load_config(base, overrides).schedule.then
    assert (segment.kind, segment.steps, segment.lr) == ("constant", None, 2e-4)
    assert load_config(base, [*overrides, "--schedule.then=[]"]).schedule.then == ()


def test_weights_of_tasks_can_be_patched(base: Path) -> None:
    weights = ["--replay.alpha=0.5", "--replay.policy=weights", "--replay.weights.en", "0.5"]
    config = load_config(base, [*weights, "--replay.weights.fr=2"])
    assert config.replay is not None
    assert config.replay.weights == {"en": 0.5, "fr": 2.0}
    assert load_config(base, [*weights, "--replay.weights", "{en: 1, fr: 0}"]).replay is not None
    with pytest.raises(ConfigError, match=r"no weight for \['fr'\]"):
        load_config(base, weights)


def test_a_task_may_return(base: Path) -> None:
    stream = "[{task: en, train: a/en, valid: a/v, steps: 1}, {task: fr, train: a/fr, steps: 1}, "
    stream += "{task: en, train: a/en, valid: a/v, steps: 1}]"
    config = load_config(base, ["--stream", stream])
    assert [entry.task for entry in config.stream] == ["en", "fr", "en"]


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path, base: Path) -> None:
    middle = tmp_path / "sub" / "middle.yaml"
    middle.parent.mkdir()
    middle.write_text("extends: ../base.yaml\nreplay: {alpha: 0.5}\noptimizer: {clip: 2}\n")
    top = tmp_path / "top.yaml"
    top.write_text(
        "extends: sub/middle.yaml\nreplay: {include_current_task: true}\n"
        "stream: [{task: de, train: [x/de], steps: 3}]\n"
    )
    config = load_config(top)
    assert config.replay is not None
    assert (config.replay.alpha, config.replay.include_current_task) == (Decimal("0.5"), True)
    assert (config.optimizer.lr, config.optimizer.clip) == (1e-3, 2.0)
    assert [entry.task for entry in config.stream] == ["de"]
    top.write_text("extends: sub/middle.yaml\nreplay: null\n")
    assert load_config(top).replay is None


def test_extends_in_a_circle_or_into_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("extends: second.yaml\n")
    second.write_text("name: x\nextends: first.yaml\n")
    with pytest.raises(ConfigError, match=r"circle: .*first.*second.*first.*second\.yaml:2\)"):
        load_config(first)
    second.write_text("extends: missing.yaml\n")
    with pytest.raises(ConfigError, match=r"given 'missing.yaml'.*\(.*second\.yaml:1\)"):
        load_config(first)
    second.write_text("extends: [a, b]\n")
    with pytest.raises(ConfigError, match=r"given \['a', 'b'\]"):
        load_config(first)


def test_vocabulary(base: Path) -> None:
    config = load_config(base)
    assert resolve_vocab(config, 4096).model.vocab_size == 4096
    larger = load_config(base, ["--model.vocab_size", "4100"])
    assert resolve_vocab(larger, 4096).model.vocab_size == 4100
    with pytest.raises(ConfigError, match="4100 is less than the tokenizer's 4101"):
        resolve_vocab(larger, 4101)


def test_written_back_it_loads_equal(base: Path, tmp_path: Path) -> None:
    config = load_config(
        base,
        [
            *("--replay.alpha", "0.29", "--reptile", "{k: 3, epsilon: 1}"),
            *("--stream.0.valid", "{no: a/no, '1e3': a/b}", "--model.vocab_size", "64"),
            *("--evaluate", "{}", "--optimizer.eps", "1e-12"),
            *("--replay.policy=weights", "--replay.weights={en: 0.1, fr: 0}"),
            *("--schedule.total_steps=9", "--schedule.then=[{kind: constant, lr: 3e-5}]"),
            *("--stream.0.train.0.max_epochs", "2.5"),
        ],
    )
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
    | st.sampled_from(["no", "1e-3", "0o7", "1_0", "~", "Null", ".inf", "0x1F", "12:30", "=", "y"]),
    alpha=st.decimals(0, "0.999", places=9),
    lr=st.floats(1e-12, 1.0, exclude_min=True),
)
def test_any_text_and_number_survive_writing(
    base: Path, tmp_path: Path, name: str, alpha: Decimal, lr: float
) -> None:
    from dataclasses import replace

    from megatron_mer.config import ReplayConfig

    config = load_config(base)
    config = replace(
        config,
        name=name,
        replay=ReplayConfig(alpha=alpha),
        optimizer=replace(config.optimizer, lr=lr),
    )
    written = tmp_path / "written.yaml"
    written.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(written) == config
