"""Every mistake is named, with its numbers and its place, and all of them come together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mer.config import load_config
from megatron_mer.errors import ConfigError

Refused = Callable[..., list[str]]

YARN = "--model.rope_scaling={kind: yarn, factor: 2, original_max_position_embeddings: 8"

SINGLE = [
    # One override each -> what the one line that it causes has to begin with or hold.
    ("--optimizer.lrr=1", "optimizer.lrr: no such key", "did you mean lr?"),
    ("--replya.alpha=0.5", "replya: no such key", "did you mean replay?"),
    ("--seed=-1", "seed: given -1", "a whole number >= 0"),
    ("--seed=true", "seed: given true", "a whole number"),
    ("--seed=1.5", "seed: given 1.5", "a whole number"),
    ("--seed=1e30", "seed: given 1E+30", "a whole number"),
    ("--seed='7'", "seed: given '7'", "without quotes"),
    ("--name=7", "name: given 7", "write it in quotes"),
    ("--name=''", "name: given ''", "at least one character"),
    ("--precision=fp16", "precision: given 'fp16'", "bf16 | fp32"),
    ("--model.size=llama-2m", "model.size: given 'llama-2m'", "did you mean llama-1m?"),
    ("--model.size=null", "model.hidden_size: missing", "or choose a model.size"),
    ("--model.seq_length=0", "model.seq_length: given 0", ">= 1"),
    ("--model.num_heads=3", "model.num_heads: hidden_size 128 / num_heads 3", "even"),
    ("--model.num_kv_heads=3", "model.num_kv_heads: 3 heads", "a divisor of 4"),
    ("--model.head_dim=31", "model.head_dim: given 31", "an even number"),
    ("--model.rope_scaling=2", "model.rope_scaling: given 2", "a section with the keys kind"),
    ("--model.rope_scaling={factor: 2}", "model.rope_scaling.kind: missing", "llama3 | yarn"),
    (
        "--model.rope_scaling={kind: dynamic, factor: 2}",
        "model.rope_scaling.kind: given 'dynamic'",
        "linear | llama3 | yarn",
    ),
    (
        "--model.rope_scaling={kind: linear, factor: 0.5}",
        "model.rope_scaling.factor: given 0.5",
        "1 or above",
    ),
    (
        "--model.rope_scaling={kind: linear, factor: 2, beta_fast: 9}",
        "model.rope_scaling.beta_fast: given 9",
        "linear has no use for",
    ),
    (
        "--model.rope_scaling={kind: yarn, factor: 2}",
        "model.rope_scaling.original_max_position_embeddings: missing",
        "for yarn",
    ),
    (YARN + ", mscale: 1}", "model.rope_scaling.mscale: given 1", "both mscale and"),
    (
        YARN + ", mscale: 1, mscale_all_dim: 1, attention_factor: 1}",
        "model.rope_scaling.mscale: given 1",
        "remove one of them",
    ),
    (YARN + ", beta_fast: 1}", "model.rope_scaling.beta_fast: 1 with beta_slow 1", "above 1"),
    (
        "--model.rope_scaling={kind: llama3, factor: 2, original_max_position_embeddings: 8, "
        "low_freq_factor: 4, high_freq_factor: 1}",
        "model.rope_scaling.high_freq_factor: given 1",
        "above 4",
    ),
    ("--model.tie_embeddings=1", "model.tie_embeddings: given 1", "true or false"),
    ("--optimizer.lr=0", "optimizer.lr: given 0", "> 0"),
    ("--optimizer.lr=.nan", "optimizer.lr: given NaN", "a number > 0"),
    ("--optimizer.lr=.inf", "optimizer.lr: given Infinity", "a number > 0"),
    ("--optimizer.betas=[0.9, 1.0]", "optimizer.betas: given [0.9, 1.0]", "< 1"),
    ("--optimizer.betas=[0.9]", "optimizer.betas: given [0.9]", "a list of 2"),
    ("--optimizer.clip=-1", "optimizer.clip: given -1", ">= 0"),
    ("--schedule.min_lr=0.01", "schedule.min_lr: 0.01 is above", "0 to 0.001"),
    ("--schedule.warmup_steps=21", "schedule.warmup_steps: 21 steps", "schedule of 20"),
    ("--schedule={kind: constant, min_lr: 1e-4}", "schedule.min_lr: given 0.0001", "constant"),
    ("--schedule={kind: constant, total_steps: 9}", "schedule.total_steps: given 9", "then"),
    ("--schedule.then=3", "schedule.then: given 3", "a list of sections"),
    ("--schedule.then=[{kind: cosine}]", "schedule.then.0.lr: missing", "a number > 0"),
    ("--schedule.then=[{kind: constant, lr: 1}]", "schedule.total_steps: missing", "begins"),
    ("--schedule.then=[{kind: cosine, lr: 1}]", "schedule.then.0.steps: missing", "constant"),
    ("--replay.alpha=1.0", "replay.alpha: given 1.0", "no fresh row"),
    ("--replay.alpha=-0.1", "replay.alpha: given -0.1", ">= 0"),
    ("--replay.alpha=0.1234567891", "replay.alpha: given 0.1234567891", "9 decimal places"),
    ("--replay.alpha=.nan", "replay.alpha: given NaN", "decimal fraction"),
    ("--replay.alpha=false", "replay.alpha: given false", "decimal fraction"),
    ("--replay={}", "replay.alpha: missing", "add it"),
    ("--replay.policy=fair", "replay.policy: given 'fair'", "uniform | equal | weights"),
    ("--replay.weights.fr=-1", "replay.weights.fr: given -1", "a number >= 0"),
    ("--replay.weights=[1, 2]", "replay.weights: given [1, 2]", "{name: a number >= 0}"),
    ("--replay=0.5", "replay: given 0.5", "a section with the keys alpha"),
    ("--reptile={k: 5}", "reptile.epsilon: missing", ">= 0 and <= 1"),
    ("--reptile={k: 0, epsilon: 1}", "reptile.k: given 0", ">= 1"),
    ("--reptile={k: 5, epsilon: 1.1}", "reptile.epsilon: given 1.1", "<= 1"),
    ("--reptile={k: 5, epsilon: 1, nesterov: true}", "reptile.nesterov: given true", "momentum"),
    ("--batch.micro_batch_size=3", "batch.global_batch_size: 8 rows", "micro_batch_size 3"),
    ("--parallel.zero_stage=2", "parallel.zero_stage: given 2", "gradients"),
    ("--parallel.zero_stage=0", "parallel.zero_stage: given 0", "allowed: 1"),
    ("--parallel.pp_size=5", "parallel.pp_size: 5 stages", "1 to 4"),
    ("--tokenizer=gpt:x", "tokenizer: given 'gpt:x'", "sentencepiece:PATH, hf:PATH, tiktoken:PATH"),
    ("--tokenizer=tok.model", "tokenizer: given 'tok.model'", "sentencepiece:PATH"),
    ("--stream=[]", "stream: given an empty list", "at least one"),
    ("--stream=en", "stream: given 'en'", "a list of sections"),
    ("--stream.0=en", "stream.0: given 'en'", "a section with the keys task, train"),
    ("--stream.0.train=[]", "stream.0.train: given an empty list", "at least one"),
    ("--stream.0.steps=null", "stream.0: has no length", "either steps or fresh_tokens"),
    ("--stream.0.fresh_tokens=9", "stream.0: given steps 10 and fresh_tokens 9", "either"),
    ("--stream.0.max_epochs=0", "stream.0.max_epochs: given 0", "> 0"),
    ("--stream.0.train.0.max_epochs=0", "stream.0.train.0.max_epochs: given 0", "> 0"),
    ("--stream.0.valid=[a]", "stream.0.valid: given ['a']", "by name"),
    ("--stream.0.train=[a/x.bin]", "stream.0.train.0.prefix: given 'a/x.bin'", "write a/x"),
    ("--stream.0.train=[a/x, a/x]", "stream.0.train: the dataset 'x' stands here 2", "once"),
    ("--stream.1.train=[b/en]", "stream.1.train.0.name: 'en' names b/en", "data/en in stream.0"),
    ("--stream.1.valid={en: x}", "stream.1.valid.en: 'en' names x here", "data/en_valid"),
    ("--stream.1.valid=data/en", "stream.1.valid: data/en is trained on", "stream.0.train.0"),
    ("--stream.0.train=[{prefix: a, weight: 1}, b]", "stream.0.train: 1 of 2", "for all"),
    ("--stream.1.trained_before=true", "stream.1.steps: given 10", "takes no step"),
    ("--checkpoint.keep_last=0", "checkpoint.keep_last: given 0", ">= 1"),
    ("--checkpoint=null", "checkpoint: given null", "a section"),
]


@pytest.mark.parametrize(("override", "begins", "holds"), SINGLE, ids=lambda text: text[:40])
def test_one_mistake(refused: Refused, override: str, begins: str, holds: str) -> None:
    lines = refused(override)
    assert any(line.startswith(begins) and holds in line for line in lines), lines


def test_a_single_mistake_is_a_single_line(refused: Refused) -> None:
    assert len(refused("--model.size=llama-2m")) == 1
    assert len(refused("--optimizer.lr=x")) == 1
    assert len(refused("--stream.1.train=[b/en]")) == 1


def test_evaluation_without_data(refused: Refused) -> None:
    lines = refused("--evaluate={}", "--stream.0.valid=null", "--stream.1.valid=null")
    assert [line.partition(":")[0] for line in lines] == ["evaluate"]


def test_entries_trained_before(refused: Refused, base: Path) -> None:
    before = "{task: old, train: [old], trained_before: true}"
    en = "{task: en, train: [en], steps: 5}"
    replay = "--replay.alpha=0.5"
    assert len(load_config(base, [f"--stream=[{before}, {en}]", replay]).stream) == 2
    # A resumed run may add one behind what was begun.
    assert load_config(base, [f"--stream=[{en}, {before}]", replay]).stream[1].trained_before
    (line,) = refused(f"--stream=[{before}]", replay)
    assert line.startswith("stream: each of the 1 entries has trained_before")
    (line,) = refused(f"--stream=[{before}, {en}]")
    assert "without replay: and valid: has no effect" in line
    epochs = "[{prefix: a, max_epochs: 2}, b, {prefix: c, max_epochs: 1}]"
    lines = refused(f"--stream=[{before}, {en}]", replay, "--stream.0.train", epochs)
    assert [line.partition(":")[0] for line in lines] == [
        "stream.0.train.0.max_epochs",
        "stream.0.train.2.max_epochs",
    ]
    assert "given 2 in an entry with trained_before" in lines[0]


@pytest.mark.parametrize(
    ("replay", "begins", "holds"),
    [
        ("weights: {en: 1, fr: 1}", "replay.weights: given, which policy uniform", "nothing"),
        ("policy: equal, weights: {}", "replay.weights: given, which policy equal", "nothing"),
        ("policy: weights", "replay.weights: missing", "each of the tasks ['en', 'fr']"),
        ("policy: weights, weights: {en: 1}", "replay.weights: no weight for ['fr']", "0 means"),
        (
            "policy: weights, weights: {en: 1, fr: 1, frr: 1}",
            "replay.weights.frr: the stream has no task 'frr'",
            "did you mean fr?",
        ),
        ("policy: weights, weights: {en: 0, fr: 0.0}", "replay.weights: each weight is 0", "above"),
    ],
)
def test_weights_of_tasks(refused: Refused, replay: str, begins: str, holds: str) -> None:
    (line,) = refused(f"--replay={{alpha: 0.5, {replay}}}")
    assert line.startswith(begins)
    assert holds in line


def test_all_problems_of_weights_together(refused: Refused) -> None:
    lines = refused("--replay={alpha: 0.5, policy: weights, weights: {de: 0, it: 0, en: 0}}")
    assert [line.partition(":")[0] for line in lines] == [
        "replay.weights.de",
        "replay.weights.it",
        "replay.weights",
        "replay.weights",
    ]


@pytest.mark.parametrize(
    ("then", "begins", "holds"),
    [
        ("{kind: constant, lr: 1, min_lr: 0.5}", "0.min_lr: given 0.5", "constant"),
        ("{kind: cosine, steps: 5, lr: 1e-4, min_lr: 1e-3}", "0.min_lr: 0.001", "0 to 0.0001"),
        ("{kind: cosine, steps: 5, lr: 1, warmup_steps: 5}", "0.warmup_steps: 5", "0 to 4"),
        ("{kind: constant, steps: 5, lr: 1, warmup_steps: 6}", "0.warmup_steps: 6", "0 to 5"),
        ("{kind: constant, lr: 1}, {kind: constant, lr: 1}", "0.steps: missing", "another"),
        ("{kind: linear, lr: 1}", "0.kind: given 'linear'", "cosine | constant"),
    ],
)
def test_segments_of_the_schedule(refused: Refused, then: str, begins: str, holds: str) -> None:
    (line,) = refused("--schedule.total_steps=20", f"--schedule.then=[{then}]")
    assert line.startswith(f"schedule.then.{begins}")
    assert holds in line


def test_segments_behind_a_refused_one_are_checked(refused: Refused) -> None:
    then = "[{kind: cosine, steps: 0, lr: 1, min_lr: 2}, {kind: cosine, lr: 1, min_lr: 3}]"
    assert [line.partition(":")[0] for line in refused(f"--schedule.then={then}")] == [
        "schedule.then.0.steps",
        "schedule.total_steps",
        "schedule.then.0.min_lr",
        "schedule.then.1.min_lr",
        "schedule.then.1.steps",
    ]


def test_arguments_that_are_no_override(refused: Refused) -> None:
    lines = refused("stray", "--seed", "--stream.9.steps", "5", "--name.x=1", "--seed=[", "--=1")
    assert lines[0].startswith("stray: no option; allowed: --section.key value")
    assert lines[1].startswith("--seed: given no value")
    assert lines[2].startswith("--stream.9.steps: stream has 2 items")
    assert lines[3].startswith("--name.x: name holds 'small'")
    assert lines[4].startswith("--seed:1:2: is no valid YAML")
    assert lines[5].startswith("--=1: no option")
    assert len(lines) == 6


def test_all_problems_of_a_file_at_once(base: Path, tmp_path: Path) -> None:
    text = base.read_text()
    text = text.replace("seed: 1\n", "seed: one\nlearning_rate: 3\n")
    text = text.replace("global_batch_size: 8", "global_batch_size: 10")
    text = text.replace("micro_batch_size: 2", "micro_batch_size: 4")
    text = text.replace("lr: 1e-3", "lr: 1e-3, clip: soft")
    text = text.replace("task: en,", "")
    text += "schedule: {min_lr: 1}\nname: twice\nreplay: {alpha: 1.0}\n"
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert {line.partition(": ")[0]: line.rpartition(":")[2] for line in lines} == {
        "name": "14)",
        "seed": "2)",
        "learning_rate": "3)",
        "optimizer.clip": "8)",
        "stream.0.task": "10)",
        "replay.alpha": "15)",
        # Contradictions are found although other values of their sections were refused.
        "schedule.min_lr": "13)",
        "batch.global_batch_size": "7)",
    }
    assert "given twice, in lines 1 and 14" in str(caught.value)
    assert "10 rows do not divide into micro_batch_size 4" in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(lines)


def test_places_of_overrides_and_of_extended_files(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\nbatch:\n  micro_batch_size: no\nreplay: {alpha: 2}\n")
    base.write_text(base.read_text().replace("lr: 1e-3", "lr: fast"))
    with pytest.raises(ConfigError) as caught:
        load_config(top, ["--replay.alpha", "3"])
    places = {problem.path: problem.where for problem in caught.value.problems}
    assert places == {
        "batch.micro_batch_size": f"{top}:3",
        "optimizer.lr": f"{base}:7",
        "replay.alpha": "--replay.alpha",
    }


def test_a_replaced_list_takes_its_places_along(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\nstream:\n  - {task: en, train: a/x.bin, steps: 5}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(top)
    (problem,) = caught.value.problems
    assert (problem.path, problem.where) == ("stream.0.train.0.prefix", f"{top}:3")


def test_entries_behind_a_refused_one_are_checked(refused: Refused) -> None:
    stream = "[{task: a, steps: 1}, {task: b, train: x/d, steps: 1}, "
    stream += "{task: c, train: y/d, valid: x/d, steps: 1}]"
    assert [line.partition(":")[0] for line in refused(f"--stream={stream}")] == [
        "stream.0.train",
        "stream.2.train.0.name",
        "stream.2.valid",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n", r"holds \['a'\]"),
        ("a: [1\nb: 2\n", r"bad\.yaml:2:\d+: is no valid YAML"),
        ("a: b: c\n", r"bad\.yaml:1:5: is no valid YAML: mapping values are not allowed"),
        ("a: 1\n---\nb: 2\n", r"bad\.yaml:2:1: is no valid YAML"),
        ("a: \x00\n", "is no valid YAML"),
        ("name: !!python/name:os.system x\n", "given a value marked"),
        ("name: &x [*x]\n", "an alias that contains itself"),
        ("name: !!int x\n", "marked as int"),
        ("1: x\n", "the key 1"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="no UTF-8"):
        load_config(tmp_path / "latin.yaml")
