"""Cosines from inner products, by hand and against gradients whose true direction is known."""

import numpy as np
import pytest

from megatron_mer.analysis.alignment import alignment
from megatron_mer.analysis.matrix_picture import matrix_picture


def gram(*vectors):
    matrix = np.array(vectors, dtype=np.float64)
    return matrix @ matrix.T


def test_two_sources_by_hand():
    # Halves (1, 0) and (1, 2): gradient (1, 1). Halves (0, 4) and (0, 2): gradient (0, 3).
    found = alignment(["a", "b"], gram((1, 0), (1, 2), (0, 4), (0, 2)))
    assert found.norms == pytest.approx([2**0.5, 3.0])
    assert found.dots == pytest.approx(np.array([[2.0, 3.0], [3.0, 9.0]]))
    assert found.cosines == pytest.approx(np.array([[1, 0.5**0.5], [0.5**0.5, 1]]))
    assert found.halves == pytest.approx([1 / 5**0.5, 1.0])
    # <a, a'> = 1 and <b, b'> = 8.
    assert found.corrected[0, 1] == pytest.approx(3 / 8**0.5)
    assert found.between() == pytest.approx(0.5**0.5)


def test_what_does_not_exist_is_no_number():
    found = alignment(["zero", "a", "torn"], gram((0, 0), (0, 0), (1, 0), (1, 0), (1, 1), (-1, 1)))
    assert np.isnan(found.cosines[0, 1])
    assert found.cosines[1, 2] == pytest.approx(0.0)
    # The halves of "torn" point away from each other: there is nothing to correct with.
    assert np.isnan(found.corrected[1, 2])
    assert np.isnan(found.halves[0])
    assert alignment(["alone"], gram((1, 0), (1, 0))).between() is None
    with pytest.raises(ValueError, match="for 2 sources"):
        alignment(["a", "b"], gram((1, 0), (1, 0)))


def test_the_correction_finds_the_true_cosine_under_noise():
    generator = np.random.default_rng(0)
    size, noise = 40_000, 0.02
    one = generator.normal(size=size)
    one /= np.linalg.norm(one)
    other = generator.normal(size=size)
    other -= one * (one @ other)
    other = 0.6 * one + 0.8 * other / np.linalg.norm(other)
    halves = [true + noise * generator.normal(size=size) for true in (one, one, other, other)]
    found = alignment(["one", "other"], gram(*halves))
    assert found.cosines[0, 1] < 0.1
    assert found.corrected[0, 1] == pytest.approx(0.6, abs=0.15)


def test_a_picture_is_drawn(tmp_path):
    path = tmp_path / "made/cosines.png"
    matrix_picture(["en", "fr"], [[1.0, None], [-0.5, 1.0]], path, "cosines of $x")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="without a row"):
        matrix_picture([], [], path)
