"""Bytes of what a micro batch leaves for its backward pass, and of what that pass makes on its way.

Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count a GPT block so; here the tensors are
those that autograd keeps of `model/llama.py` and `parallel/loss.py`, found in a profile of the
engine. A tensor that several operations keep counts once.
"""

from __future__ import annotations

from megatron_mer.analysis.memory.shape import FP32, RankShape


def norm_saved(shape: RankShape) -> int:
    """What an RMSNorm keeps beside its output, which the matrices behind it keep.

    A GPU has one kernel (`aten::_fused_rms_norm`) that keeps its input and 1/rms. On a CPU it is a
    row of operations in fp32 (`rms_norm_composite`): the input and the product before the weight.
    """
    if shape.device == "cuda":
        return shape.stream + FP32 * shape.tokens
    return 2 * FP32 * shape.tokens * shape.hidden + FP32 * shape.tokens


def attention_saved(shape: RankShape) -> int:
    """Rotated q and k, v, the mix of the values and the scores' log-sum-exp.

    Flash attention keeps no scores (Dao et al. 2022, arXiv 2205.14135). But no fused kernel for
    GPUs takes fp32 with grouped heads (`sdp_utils.cpp`): there PyTorch repeats the heads of k and v
    and keeps the scores.
    """
    channels = 2 * shape.query_width + 2 * shape.kv_width
    saved = shape.tokens * channels * shape.width + FP32 * shape.tokens * shape.heads
    if shape.device == "cuda" and shape.width == FP32 and shape.grouped:
        repeated = 2 * shape.tokens * shape.query_width * FP32
        saved += repeated + FP32 * shape.tokens * shape.seq_length * shape.heads
    return saved


def block_saved(shape: RankShape) -> int:
    """A block: two norms with their outputs, attention, and gate, silu, up and their product."""
    feed_forward = 4 * shape.tokens * shape.ffn * shape.width
    return 2 * (norm_saved(shape) + shape.stream) + attention_saved(shape) + feed_forward


def block_backward(shape: RankShape) -> int:
    """The most that a block's backward pass holds beside what was saved.

    The gradient of the residual stream and, in the feed-forward layer: of the product and of the
    down-projection's weight at once; then of both factors, the product itself being gone.
    """
    channels = shape.tokens * shape.ffn * shape.width
    matrix = shape.hidden * shape.ffn * shape.width
    return shape.stream + max(channels + matrix, 2 * channels)


def loss_forward(shape: RankShape) -> int:
    """The exponentials of the logits, in fp32, which the backward pass turns into the gradient."""
    return FP32 * shape.tokens * shape.vocab


def loss_backward(shape: RankShape) -> int:
    """Those, and the gradient in the logits' dtype."""
    return loss_forward(shape) + (shape.logits if shape.width != FP32 else 0)


def head_backward(shape: RankShape) -> int:
    """Gradients of the logits, of the head's weight and of its input."""
    return shape.logits + shape.vocab_matrix * shape.width + shape.stream


def chunked_loss(shape: RankShape) -> int:
    """What `parallel/chunked_loss.py` makes: gradients of input and weight, and a chunk's logits.

    The weight's gradient is summed in fp32. Logits lie beside their softmax, in bf16 on a CPU with
    an fp32 copy; then, in bf16, the softmax beside the gradient and its product with the input.
    """
    logits = shape.chunk * shape.vocab
    softmax = logits * (shape.width + FP32)
    product = 0
    if shape.width != FP32:
        softmax += logits * FP32 if shape.device == "cpu" else 0
        product = logits * (FP32 + shape.width) + shape.vocab_matrix * shape.width
    return shape.stream + shape.vocab_matrix * FP32 + max(softmax, product)


def chunked_backward(shape: RankShape) -> int:
    """Both gradients; in bf16 the weight's in its own dtype too."""
    copied = shape.vocab_matrix * shape.width if shape.width != FP32 else 0
    return shape.stream + shape.vocab_matrix * FP32 + copied
