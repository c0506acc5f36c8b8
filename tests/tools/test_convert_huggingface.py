"""From Hugging Face and back: to the bit, with equal logits, and what is refused."""

import json
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from megatron_mer.checkpoint import CheckpointReader
from megatron_mer.config.parse import parse_model
from megatron_mer.config.yaml12 import read_yaml
from tests.hf_folder import LLAMA3, hf_folder, same_bytes, tensors, with_tokenizer

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def convert(project_root: Path):
    path = project_root / "tools/convert_checkpoint.py"
    spec = util.spec_from_file_location("convert_checkpoint", path)
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(one) for one in arguments])


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"max_shard_size": "20KB", "rope_parameters": LLAMA3}),
        (torch.float16, {"tie_word_embeddings": True, "head_dim": 16}),
    ],
)
def test_there_and_back_to_the_bit_with_the_logits_of_transformers(
    tmp_path, capsys, convert, dtype, changes
):
    source = with_tokenizer(hf_folder(tmp_path / "base", dtype, **changes))
    (source / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert convert("from-hf", source, "--output", tmp_path / "ours") == 0
    said = capsys.readouterr().out
    assert "logits differ from transformers' by at most" in said
    assert float(said.split("at most ")[1].split()[0]) <= 1e-5
    back = tmp_path / "back"
    assert convert("to-hf", f"{tmp_path / 'ours'}@0", "--output", back) == 0
    assert float(capsys.readouterr().out.split("at most ")[1].split()[0]) <= 1e-5
    assert same_bytes(source, back)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (back / "tokenizer_config.json").exists()
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == 2
    config = json.loads((back / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert not list(tmp_path.glob(".*"))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5000}},
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 32}},
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {"rope_parameters": {**YARN, "mscale": 1.0, "attention_factor": 1.3}},
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0, "beta_fast": 20}},
    ],
)
def test_each_kind_of_longer_context_comes_and_goes(tmp_path, capsys, convert, rope):
    source = with_tokenizer(hf_folder(tmp_path / "base", **rope))
    assert convert("from-hf", source, "--output", tmp_path / "ours") == 0
    said = capsys.readouterr().out
    assert float(said.split("at most ")[1].split()[0]) <= 1e-5
    model = read_yaml(said.splitlines()[-1], "printed").data["model"]
    assert parse_model({**model, "seq_length": 32})[1] == []
    back = tmp_path / "back"
    assert convert("to-hf", tmp_path / "ours", "--output", back) == 0
    assert float(capsys.readouterr().out.split("at most ")[1].split()[0]) <= 1e-5


def test_a_killed_conversion_is_repeated_and_a_wrong_one_removed(
    tmp_path, capsys, convert, monkeypatch
):
    source = with_tokenizer(hf_folder(tmp_path / "base"))
    ours, back = tmp_path / "ours", tmp_path / "back"
    (ours / "checkpoints/step_000000000.tmp").mkdir(parents=True)
    (tmp_path / "back.tmp").mkdir()
    monkeypatch.setattr("megatron_mer.checkpoint.huggingface.logits.TOLERANCE", -1.0)
    assert convert("from-hf", source, "--output", ours) == 1
    assert "the conversion is wrong" in capsys.readouterr().err
    assert not list((ours / "checkpoints").iterdir())
    monkeypatch.undo()
    assert convert("from-hf", source, "--output", ours) == 0
    monkeypatch.setattr("megatron_mer.checkpoint.huggingface.logits.TOLERANCE", -1.0)
    assert convert("to-hf", ours, "--output", back) == 1
    assert not back.exists()
    assert (tmp_path / "back.tmp").exists(), "somebody's folder"


def test_a_tokenizer_that_is_not_the_runs(tmp_path, capsys, convert):
    source = with_tokenizer(hf_folder(tmp_path / "base", vocab_size=258))
    assert convert("from-hf", source, "--output", source) == 2
    assert "the folder itself" in capsys.readouterr().err
    convert("from-hf", source, "--output", tmp_path / "ours", "--no-check")
    longer = f"hf:{with_tokenizer(tmp_path / 'longer', ('the',)) / 'tokenizer.json'}"
    arguments = ("--output", tmp_path / "back", "--tokenizer")
    assert convert("to-hf", tmp_path / "ours", *arguments, longer) == 2
    assert "with 259 ids; the model has 258 rows" in capsys.readouterr().err
    path = with_tokenizer(tmp_path / "other") / "tokenizer.json"
    path.write_text(path.read_text().replace(" ", "  "))
    assert convert("to-hf", tmp_path / "ours", *arguments, f"hf:{path}") == 0
    assert "is not the file that the run was given" in capsys.readouterr().err


def test_shards_are_of_the_wanted_size_and_their_index_is_whole(tmp_path, convert):
    source = with_tokenizer(hf_folder(tmp_path / "base"))
    convert("from-hf", source, "--output", tmp_path / "ours", "--no-check")
    back = tmp_path / "back"
    arguments = ("--output", back, "--shard-size", "40K", "--dtype", "bf16")
    assert convert("to-hf", tmp_path / "ours", *arguments) == 0
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert max((back / name).stat().st_size for name in files) < 42_000
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(source).keys()
    assert index["metadata"]["total_size"] == sum(2 * t.numel() for t in tensors(source).values())
    rounded = {name: value.bfloat16() for name, value in tensors(source).items()}
    assert all(torch.equal(value, rounded[name]) for name, value in tensors(back).items())


def test_a_vocabulary_grows_by_means_of_its_pieces(tmp_path, capsys, convert):
    source = with_tokenizer(hf_folder(tmp_path / "base", torch.bfloat16, vocab_size=258))
    new = with_tokenizer(tmp_path / "new", ("the", "thé", "zu"))
    spec = f"hf:{new / 'tokenizer.json'}"
    assert convert("from-hf", source, "--output", tmp_path / "ours", "--tokenizer", spec) == 0
    assert "261 rows of the vocabulary, 3 of them new" in capsys.readouterr().out
    reader = CheckpointReader(tmp_path / "ours/checkpoints/step_000000000")
    model = json.loads((new / "tokenizer.json").read_text())["model"]["vocab"]
    for ours, theirs in (("embedding", "model.embed_tokens"), ("head", "lm_head")):
        rows, old = (
            reader.parameter("master", f"{ours}.weight"),
            tensors(source)[f"{theirs}.weight"].float(),
        )
        assert torch.equal(rows[:258], old)
        means = {
            "the": old[[model["th"], model["e"]]].double().mean(0),
            "zu": old[[model["z"], model["u"]]].double().mean(0),
            "thé": old[[model["th"], model["é"]]].double().mean(0),  # half a character
        }
        for piece, mean in means.items():
            assert torch.equal(rows[model[piece]], mean.float())
    back = tmp_path / "back"
    assert convert("to-hf", tmp_path / "ours", "--output", back) == 0
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 261
    assert (back / "tokenizer.json").read_bytes() == (new / "tokenizer.json").read_bytes()


def test_another_tokenizer_is_refused_with_the_first_ids_that_differ(tmp_path, capsys, convert):
    source = with_tokenizer(hf_folder(tmp_path / "base"))
    other = with_tokenizer(tmp_path / "other")
    path = other / "tokenizer.json"
    text = json.loads(path.read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(text))
    arguments = ("--output", tmp_path / "ours", "--tokenizer", f"hf:{path}")
    assert convert("from-hf", source, *arguments) == 2
    said = capsys.readouterr().err
    assert "does not extend" in said
    assert f"id {vocabulary['B']} was 'A', is 'B'" in said
    assert f"id {vocabulary['A']} was 'B', is 'A'" in said
    assert not (tmp_path / "ours").exists()


def test_a_missing_transformers_and_taken_places_are_told(tmp_path, capsys, convert, monkeypatch):
    source = with_tokenizer(hf_folder(tmp_path / "base"))
    output = ("--output", tmp_path / "ours")
    module = sys.modules["convert_checkpoint"]
    monkeypatch.setattr(module, "have_transformers", lambda: False)
    assert convert("from-hf", source, *output) == 2
    assert "pip install transformers, or --no-check" in capsys.readouterr().err
    assert convert("from-hf", source, *output, "--no-check") == 0
    assert convert("from-hf", source, *output, "--no-check") == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert convert("to-hf", tmp_path / "ours", "--output", source, "--no-check") == 2
    assert "is there already" in capsys.readouterr().err
    arguments = ("--output", tmp_path / "back", "--weights", "anchor", "--no-check")
    assert convert("to-hf", tmp_path / "ours", *arguments) == 2
    assert "without Reptile" in capsys.readouterr().err
    assert convert("to-hf", f"{tmp_path / 'ours'}@7", *arguments) == 2
    assert "step_000000000" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_ids_above_the_vocabulary_need_a_tokenizer_of_the_folder(tmp_path, capsys, convert):
    source = hf_folder(tmp_path / "base", vocab_size=200)
    new = with_tokenizer(tmp_path / "new")
    output = ("--output", tmp_path / "ours", "--no-check")
    assert convert("from-hf", source, *output) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert convert("from-hf", source, *output, "--tokenizer", f"hf:{new}") == 2
    assert "no tokenizer of its own" in capsys.readouterr().err
