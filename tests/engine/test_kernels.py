"""Other kernels for the same block: what is left out says so once, and losses agree."""

import logging
import sys
import types

import pytest
import torch
from torch.nn import functional

from megatron_mer.config import KernelsConfig, ModelConfig
from megatron_mer.engine import kernels
from megatron_mer.model import MLP, Llama, RMSNorm
from megatron_mer.model.llama import rms_norm, swiglu
from megatron_mer.parallel import TensorParallelGroup, vocab_parallel_cross_entropy

CONFIG = ModelConfig(
    seq_length=16,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    vocab_size=61,
)


def loss_and_gradients(model):
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    logits = model(ids[:, :-1])
    loss = vocab_parallel_cross_entropy(logits, ids[:, 1:].contiguous(), TensorParallelGroup())
    loss.mean().backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(model, reference, tolerance=1e-5):
    (loss, grads), (wanted, expected) = loss_and_gradients(model), loss_and_gradients(reference)
    torch.testing.assert_close(loss, wanted, rtol=tolerance, atol=tolerance)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=10 * tolerance, atol=tolerance)


def test_without_liger_kernel_the_plain_kernels_stay(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    model = Llama(CONFIG, seed=1)
    assert "liger-kernel cannot be used" in kernels.use_liger(model.modules())
    assert all(m.normalise is rms_norm for m in model.modules() if isinstance(m, RMSNorm))
    assert all(m.gate is swiglu for m in model.modules() if isinstance(m, MLP))


def test_what_liger_kernel_would_compute_takes_the_place_of_every_norm_and_gate(monkeypatch):
    """Its kernels need a GPU: functions with their arguments stand in, to test what is passed."""
    calls = []

    class Norm:
        @staticmethod
        def apply(x, weight, eps, offset, casting, in_place):
            assert (offset, casting, in_place) == (0.0, "gemma", False)
            calls.append("norm")
            return functional.rms_norm(x, weight.shape, weight, eps)

    class Gate:
        @staticmethod
        def apply(gate, up):
            calls.append("gate")
            return functional.silu(gate) * up

    for name, content in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": Norm},
        "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": Gate},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    model = Llama(CONFIG, seed=1)
    assert kernels.use_liger(model.modules()) is None
    assert_same(model, Llama(CONFIG, seed=1))
    assert (calls.count("norm"), calls.count("gate")) == (5, 2)


def test_without_a_compiler_blocks_run_as_they_are_and_one_line_says_so(monkeypatch, caplog):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    kernels.compile_problem.cache_clear()
    model = Llama(CONFIG, seed=1)
    with caplog.at_level(logging.INFO, logger=kernels.logger.name):
        kernels.logger.addHandler(caplog.handler)
        kernels.choose_kernels(model.modules(), KernelsConfig(compile=True), rank=0)
        kernels.choose_kernels(model.modules(), KernelsConfig(compile=True), rank=1)
        kernels.logger.removeHandler(caplog.handler)
    kernels.compile_problem.cache_clear()
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 1
    assert "there is no C++ compiler" in said.pop()
    assert_same(model, Llama(CONFIG, seed=1))


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    model = Llama(CONFIG, seed=1)
    kernels.choose_kernels(model.modules(), KernelsConfig(compile=True), rank=0)
    assert model.layers[0].compute.__qualname__ != Llama(CONFIG, seed=1).layers[0].compute
    assert_same(model, Llama(CONFIG, seed=1))


@pytest.mark.gpu
def test_liger_kernel_computes_the_same_on_a_gpu():
    pytest.importorskip("liger_kernel")
    model, reference = (Llama(CONFIG, seed=1).to("cuda") for _ in range(2))
    assert kernels.use_liger(model.modules()) is None
    assert_same(model, reference, tolerance=1e-4)
