"""The model against transformers.LlamaForCausalLM, and what its layers promise."""

from dataclasses import asdict, replace

import pytest
import torch
from torch.nn import functional

from megatron_mer.config import ModelConfig, RopeScaling
from megatron_mer.errors import ConfigError
from megatron_mer.model import Llama, build_layers, layer_costs


def model_config(**changes):
    values = {
        "seq_length": 24,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "vocab_size": 64,
    }
    return ModelConfig(**{**values, **changes})


def tokens(config, rows=3):
    ids = torch.randint(
        0, config.vocab_size, (rows, config.seq_length + 1), generator=torch.manual_seed(5)
    )
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def transformers_name(name):
    for ours, theirs in (
        ("layers.", "model.layers."),
        ("embedding.", "model.embed_tokens."),
        ("final_norm.", "model.norm."),
        ("head.", "lm_head."),
        ("input_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("attention.", "self_attn."),
    ):
        name = name.replace(ours, theirs)
    return name


def rope_parameters(config):
    """What transformers calls rope_base and rope_scaling."""
    scaling = {"kind": "default"} if config.rope_scaling is None else asdict(config.rope_scaling)
    given = {key: value for key, value in scaling.items() if value is not None}
    return {"rope_theta": config.rope_base, "rope_type": given.pop("kind"), **given}


def transformers_twin(config, model):
    transformers = pytest.importorskip("transformers")
    twin = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.seq_length,
            rms_norm_eps=config.norm_eps,
            head_dim=config.head_dim,
            rope_parameters=rope_parameters(config),
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    state = {transformers_name(name): value.clone() for name, value in model.state_dict().items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return twin


# A context of 8 tokens that 24 tokens go beyond, so that each scaling shows.
LINEAR = RopeScaling(kind="linear", factor=4.0)
LLAMA31 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=8)
YARN_MSCALE = replace(YARN, mscale=2.0, mscale_all_dim=0.5, beta_fast=4.0, truncate=False)
MODELS = {
    "llama2": {"num_kv_heads": 4},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "rope_base": 500000.0},
    "llama31": {"rope_base": 500000.0, "rope_scaling": LLAMA31},
    "linear": {"rope_scaling": LINEAR},
    "yarn": {"rope_scaling": YARN},
    "yarn_mscale": {"rope_scaling": YARN_MSCALE},
    "wide_heads": {"head_dim": 14, "rope_scaling": LLAMA31},
    "narrow_heads": {"head_dim": 6, "num_kv_heads": 1, "rope_scaling": YARN},
    "narrow_mha": {"head_dim": 4, "num_kv_heads": 4, "norm_eps": 1e-6},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_equals_transformers(changes, tied):
    config = model_config(tie_embeddings=tied, **changes)
    model = Llama(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():  # every term shows, the norm weights too
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    twin = transformers_twin(config, model)
    inputs, targets = tokens(config)
    logits = model(inputs)
    expected = twin(inputs).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    losses = []
    for values in (logits, expected):
        losses.append(functional.cross_entropy(values.flatten(0, 1), targets.flatten()))
        losses[-1].backward()
    assert abs(losses[0].item() - losses[1].item()) <= 1e-5
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        grad = theirs[transformers_name(name)].grad
        assert grad.abs().max() > 1e-5, name
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_layers_in_a_row_are_the_model(tied):
    config = model_config(tie_embeddings=tied)
    model = Llama(config, seed=1)
    named = build_layers(config)
    assert [name for name, _ in named] == [
        "embedding",
        "layers.0",
        "layers.1",
        "final_norm",
        "embedding" if tied else "head",
    ]
    assert len(layer_costs(config)) == len(named)
    modules = {name: factory() for name, factory in named}
    names = [
        f"{layer}.{local}" for layer in modules for local, _ in modules[layer].named_parameters()
    ]
    assert sorted(names) == sorted(model.state_dict())
    for name, module in modules.items():
        module.load_state_dict(
            {
                key.removeprefix(f"{name}."): value
                for key, value in model.state_dict().items()
                if key.startswith(f"{name}.")
            }
        )
    inputs, _ = tokens(config)
    x = inputs
    for place, (name, _) in enumerate(named):
        x = modules[name].logits(x) if name == "embedding" and place else modules[name](x)
    assert torch.equal(x, model(inputs))


def test_later_tokens_do_not_reach_earlier_logits():
    config = model_config()
    model = Llama(config, seed=1)
    inputs, _ = tokens(config)
    changed = inputs.clone()
    changed[:, 10] = (changed[:, 10] + 1) % config.vocab_size
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-7)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-4)


def test_bf16_stays_close_to_fp32():
    config = model_config(seq_length=600, num_layers=1)
    model = Llama(config, seed=1)
    inputs, _ = tokens(config, rows=1)
    expected = model(inputs)
    rounded = model.bfloat16()(inputs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_evaluating_first_leaves_training_possible():
    config = model_config(seq_length=17, rope_base=12345.0)
    model = Llama(config, seed=1)
    inputs, _ = tokens(config)
    with torch.inference_mode():
        model(inputs)
    model(inputs).sum().backward()
    assert model.embedding.weight.grad is not None


@pytest.mark.parametrize("head_dim", [None, 12])
def test_costs_are_flops_of_the_matrix_products(head_dim):
    config = model_config(tie_embeddings=True, head_dim=head_dim)
    costs = layer_costs(config)
    assert costs[0] == 0.0
    weights = (
        sum(parameter.numel() for _, parameter in build_layers(config)[1][1]().named_parameters())
        - 2 * config.hidden_size
    )
    scores = 2 * 2 * config.seq_length * config.num_heads * (head_dim or 8)
    assert costs[1] == costs[2] == 2 * weights + scores + 8 * config.hidden_size
    assert costs[-1] == 2 * config.hidden_size * config.vocab_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": None}, ["model.vocab_size"]),
        ({"num_heads": 5}, ["32", "5", "multiple of 10", "even model.head_dim"]),
        ({"head_dim": 7}, ["7", "even model.head_dim"]),
        ({"num_kv_heads": 3}, ["3", "4", "divisor"]),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, words):
    with pytest.raises(ConfigError) as error:
        build_layers(model_config(**changes))
    assert all(word in str(error.value) for word in words)
