"""A tiny corpus of three languages, real text, and the configuration of a tiny run over it."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_mer.data.indexed_writer import IndexedDatasetWriter
from megatron_mer.data.sidecar import Provenance
from megatron_mer.data.tokenizers import load_tokenizer
from megatron_mer.testing import run_world

PROGRAMS = Path(__file__).parent / "training" / "programs.py"
LANGUAGES = ("en", "fr", "de")
VOCAB = 512
SEQ_LENGTH = 32


def _texts(root: Path, language: str, count: int) -> list[str]:
    path = root / "examples" / "quickstart" / "data" / f"{language}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [
            json.loads(line)["text"][:600] for line, _ in zip(lines, range(count), strict=False)
        ]


@pytest.fixture(scope="session")
def corpus(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tok.model and, for each language, a training and a held-out dataset."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("corpus")
    texts = {language: _texts(project_root, language, 60) for language in LANGUAGES}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter([t for many in texts.values() for t in many]),
        model_prefix=str(folder / "tok"),
        vocab_size=VOCAB,
        byte_fallback=True,
        hard_vocab_limit=True,
        minloglevel=2,
        num_threads=1,
    )
    tokenizer = load_tokenizer(f"sentencepiece:{folder / 'tok.model'}")
    provenance = Provenance(
        "sentencepiece", tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id, True
    )
    for language, many in texts.items():
        for name, part in ((language, many[8:]), (f"{language}_valid", many[:8])):
            writer = IndexedDatasetWriter(folder / name, np.uint16)
            for text in part:
                writer.add_document(np.append(tokenizer.encode(text), tokenizer.eod_id))
            writer.finalize(provenance)
    return folder


def tiny_config(corpus: Path, output_dir: Path) -> dict[str, Any]:
    """A run of 20 steps with replay, Reptile and masks on; fp32."""
    return {
        "name": "tiny",
        "seed": 7,
        "precision": "fp32",
        "model": {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 64,
            "seq_length": SEQ_LENGTH,
            "tie_embeddings": True,
        },
        "tokenizer": f"sentencepiece:{corpus / 'tok.model'}",
        "batch": {"global_batch_size": 8, "micro_batch_size": 1, "eod_mask_loss": True},
        "optimizer": {"lr": 1.0e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 3, "min_lr": 1.0e-4},
        "stream": [
            {
                "task": language,
                "train": [{"prefix": str(corpus / language)}],
                "valid": str(corpus / f"{language}_valid"),
                "steps": steps,
                "max_epochs": 4,
            }
            for language, steps in zip(LANGUAGES, (7, 7, 6), strict=True)
        ],
        "replay": {"alpha": 0.3},
        "reptile": {"k": 4, "epsilon": 0.5},
        "evaluate": {"max_batches": 2},
        "checkpoint": {"every_steps": 5},
        "output_dir": str(output_dir),
    }


MEASURED = (
    "step_seconds", "tokens_per_second", "mfu", "data_wait_seconds", "replay_wait_seconds",
    "memory_gib", "seconds",
)  # fmt: skip


class TinyRun:
    """Runs the training program on a world of ranks over the tiny corpus."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus = corpus
        self.folder = folder

    def write(self, name: str, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
        """Write the configuration ``name``, changed by ``change``; its run goes to ``name``."""
        config = tiny_config(self.corpus, self.folder / name)
        if change:
            change(config)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def train(
        self,
        config: Path,
        *overrides: str,
        world_size: int = 1,
        timeout: float = 120.0,
        expect_failure: bool = False,
        output: bool = False,
        **program: Any,
    ) -> Any:
        """Run it; see ``programs.train`` for the other arguments.

        Returns:
            Each rank's result; with ``expect_failure`` its exit code; with ``output`` instead what
            rank 0 printed.
        """
        arguments = {"arguments": ["--config", str(config), *overrides], **program}
        said = run_world(
            PROGRAMS, "train", world_size, arguments, timeout, expect_failure=expect_failure
        )
        if output:
            return said[0][1]
        return [code for code, _ in said] if expect_failure else said

    def lines(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The JSON lines that run ``name`` left."""
        text = (self.folder / name / file).read_text()
        return [json.loads(line) for line in text.splitlines()]

    def results(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The same without what is measured of the machine, which no two runs have in common."""
        lines = self.lines(name, file)
        return [{key: v for key, v in line.items() if key not in MEASURED} for line in lines]


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> TinyRun:
    """Tiny runs in a folder of this test."""
    return TinyRun(corpus, tmp_path)
