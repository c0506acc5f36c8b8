"""The choices of `kernels` train the same model."""

import pytest

pytestmark = pytest.mark.dist


def test_a_loss_in_chunks_trains_as_one_of_whole_logits(tiny):
    tiny.train(tiny.write("whole"), "--kernels.loss=whole")
    tiny.train(tiny.write("chunked"), "--kernels.loss_chunk_tokens=5")
    whole, chunked = tiny.lines("whole"), tiny.lines("chunked")
    assert len(whole) == len(chunked) == 20
    for mine, other in zip(chunked, whole, strict=True):
        for key in ("loss", "loss_fresh", "grad_norm"):
            assert mine[key] == pytest.approx(other[key], abs=1e-5)
    for mine, other in zip(
        tiny.lines("chunked", "evaluations.jsonl"),
        tiny.lines("whole", "evaluations.jsonl"),
        strict=True,
    ):
        assert mine["losses"] == pytest.approx(other["losses"], abs=1e-5)
