"""What is no whole Llama is refused with the names of what is wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mer.checkpoint.huggingface import HuggingFaceFolder, HuggingFaceReader
from megatron_mer.errors import ForeignCheckpointError
from tests.hf_folder import ROWS, hf_folder

transformers = pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    return hf_folder(tmp_path / "base")


def refused(path: Path) -> str:
    with pytest.raises(ForeignCheckpointError) as error:
        HuggingFaceFolder(path).check()
    return str(error.value)


def rewritten(folder: Path, change) -> str:
    """The refusal of a folder whose tensors were changed."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return refused(folder)


def configured(folder: Path, **values) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return refused(folder)


def test_a_whole_llama_is_not_refused(folder):
    HuggingFaceFolder(folder).check()


def test_missing_extra_and_misshaped_tensors_come_together(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        tensors["model.norm.weight"] = torch.zeros(31)

    said = rewritten(folder, change)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight;" in said
    assert "extra tensors: model.layers.0.self_attn.sinks;" in said
    assert "misshaped tensors: model.norm.weight [31] instead of [32];" in said


def test_long_lists_are_cut(folder):
    said = rewritten(folder, dict.clear)
    assert "model.embed_tokens.weight, " in said
    assert "and 22 more" in said


def test_a_missing_head_and_a_tied_one_that_differs(folder):
    said = rewritten(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert "missing tensors: lm_head.weight" in said
    assert "tie_word_embeddings: true" in said
    tensors = load_file(folder / WEIGHTS)
    table = tensors["model.embed_tokens.weight"]
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    save_file({**tensors, "lm_head.weight": table.clone()}, folder / WEIGHTS)
    whole = HuggingFaceFolder(folder)
    whole.check()
    HuggingFaceReader(whole).check_tied()
    table = table.clone()
    table[ROWS - 1, 3] += 1
    save_file({**tensors, "lm_head.weight": table}, folder / WEIGHTS)
    with pytest.raises(ForeignCheckpointError, match=r"is not model\.embed_tokens\.weight"):
        HuggingFaceReader(HuggingFaceFolder(folder)).check_tied()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attention_bias": True}, "attention_bias: True; allowed: false"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'; allowed: 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'; allowed: default"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "llama3 without low_freq"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
        ({"hidden_size": None}, "hidden_size: None; allowed: a whole number"),
        ({"head_dim": 8.0}, "head_dim: given 8.0; allowed: a whole number"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads: given '2'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 heads of keys and values"),
        ({"rms_norm_eps": None}, "rms_norm_eps: given null"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings: 'x'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: given 'no'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta: given 'big'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": "4"}}, "rope_scaling.factor"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}},
            "rope_scaling.beta_fast: 1 with beta_slow 2",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            "rope_scaling: {'type': 'linear', 'factor': 4}, but rope_parameters {",
        ),
        ({"head_dim": 16}, "misshaped tensors: model.layers.0.self_attn.q_proj.weight [32, 32] "),
    ],
)
def test_what_a_llama_may_not_have(folder, values, words):
    assert words in configured(folder, **values)


def other(path: Path, model) -> str:
    model.save_pretrained(path)
    return refused(path)


def test_other_architectures_are_named_with_their_tensors(tmp_path):
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": ROWS,
        "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8,
    }  # fmt: skip
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(**sizes, sliding_window=64)
    )
    said = other(tmp_path / "mistral", mistral)
    assert "model_type: 'mistral'; allowed: 'llama'" in said
    assert "sliding_window: 64" in said
    qwen = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    said = other(tmp_path / "qwen", qwen)
    assert "model_type: 'qwen2'" in said
    assert "extra tensors: " in said
    assert "model.layers.0.self_attn.k_proj.bias" in said


def test_pickles_are_never_read(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    said = refused(folder)
    assert "pytorch_model.bin: pickles" in said
    assert "save_pretrained" in said
    (folder / "pytorch_model.bin").rename(folder / WEIGHTS)
    assert "is no safetensors file" in refused(folder)
    (folder / WEIGHTS).unlink()
    assert "holds no weights" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: cannot be read" in refused(folder)


@pytest.mark.parametrize("keep", [-100, 5, 1000])
def test_a_torn_shard_is_named_with_what_it_lacks(tmp_path, keep):
    folder = hf_folder(tmp_path / "base", max_shard_size="30KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    said = refused(folder)
    assert shard.name in said
    assert "fetch the file again" in said or keep == 5
    if keep == -100:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        listed = said.split("not whole: ")[1].split(";")[0].split(", ")
        assert set(listed) <= {name for name, file in index.items() if file == shard.name}
        assert listed


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "a pointer of Git LFS"),
        (b"\x04\0\0\0\0\0\0\0[{}]", "its header is no JSON object"),
    ],
)
def test_what_is_no_safetensors_file_is_told_apart(folder, content, words):
    (folder / WEIGHTS).write_bytes(content)
    assert words in refused(folder)


def test_bytes_behind_the_last_tensor_are_told(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    said = refused(folder)
    assert "its header needs" in said
    assert "not whole" not in said


def test_an_index_that_lies_is_named(tmp_path):
    folder = hf_folder(tmp_path / "base", max_shard_size="30KB")
    index = json.loads((folder / INDEX).read_text())
    outside = {**index["weight_map"], "more": "../other.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": outside}))
    assert "names files outside of the folder: ../other.safetensors" in refused(folder)
    (folder / INDEX).write_text(json.dumps(index))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    moved = shard.rename(folder / "elsewhere")
    said = refused(folder)
    assert f"names files that are not there: {shard.name}" in said
    lost = next(name for name, file in index["weight_map"].items() if file == shard.name)
    assert lost in said
    moved.rename(shard)
    first = sorted(folder.glob("model-*.safetensors"))[0].name
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {**index["weight_map"], lost: first, "more": first}})
    )
    assert f"names what is not there: {lost} in {first}, more in {first}" in refused(folder)
    del index["weight_map"][lost]
    (folder / INDEX).write_text(json.dumps(index))
    assert f"does not name {lost}" in refused(folder)
