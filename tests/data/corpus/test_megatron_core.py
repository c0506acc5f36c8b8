"""megatron-core opens what we write, and reads the tokens that the tokenizer gave."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from megatron_mer.data.tokenizers import load_tokenizer
from tests.data.corpus.conftest import Build
from tests.handbook import DATA, Handbook

# In a process of its own: it brings torch, and changes how warnings are shown.
READ = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
found = IndexedDataset(sys.argv[1])
documents = [found[number] for number in range(len(found))]
np.savez(sys.argv[2], ends=found.document_indices, dtype=str(found.index.dtype(0).dtype),
         lengths=found.sequence_lengths, tokens=np.concatenate(documents))
"""


@pytest.mark.parametrize("kind", ["hf", pytest.param("unigram", marks=pytest.mark.slow)])
def test_megatron_core_reads_the_same_tokens(
    build: Build, handbook: Handbook, names: Mapping[str, str], tmp_path: Path, kind: str
) -> None:
    if sys.platform != "linux" or sys.version_info >= (3, 14):
        pytest.skip("megatron-core comes for Linux and Python 3.10 to 3.13")
    inputs = [DATA / f"{language}.jsonl.gz" for language in handbook]
    tokenizer = load_tokenizer(names[kind])
    result = build(inputs, tmp_path / "all", tokenizer=names[kind], workers=2)
    command = [sys.executable, "-c", READ, str(tmp_path / "all"), str(tmp_path / "found.npz")]
    subprocess.run(command, check=True, timeout=120)
    found = np.load(tmp_path / "found.npz")
    wanted = [
        [*tokenizer.encode(json.loads(line)["text"]).tolist(), tokenizer.eod_id]
        for path in inputs
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    assert found["dtype"] == "uint16"
    assert found["lengths"].tolist() == [len(document) for document in wanted]
    assert found["ends"].tolist() == list(range(len(wanted) + 1))
    assert found["tokens"].tolist() == [token for document in wanted for token in document]
    assert result.sidecar is not None
    assert result.sidecar.tokens == len(found["tokens"])
