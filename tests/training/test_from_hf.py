"""A run that starts from a Hugging Face folder, and what it exports."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn import functional

from tests.hf_folder import LLAMA3, hf_folder, same_bytes, tensors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.dist

STILL = ("--optimizer.lr=1e-30",)
"""Without a rate no weight moves, so that each checkpoint has what was read."""


@pytest.fixture
def base(tiny) -> Path:
    """A GQA Llama in bf16, in shards, with rope scaling, the tokenizer of the tiny corpus and three
    rows more than that has ids."""
    changes = {"vocab_size": 515, "rope_parameters": LLAMA3, "max_shard_size": "40KB"}
    folder = hf_folder(tiny.folder / "base", torch.bfloat16, **changes)
    shutil.copyfile(tiny.corpus / "tok.model", folder / "tokenizer.model")
    return folder


def from_hf(base: Path, tasks=("de",), **keys):
    def change(config):
        config["model"] = {"from_hf": str(base), "seq_length": 32} | keys
        config["stream"] = [
            {**entry, "steps": 2} for entry in config["stream"] if entry["task"] in tasks
        ]
        config["replay"] = None
        config["schedule"] = {"kind": "constant"}
        config["checkpoint"] = {"export_hf": True}

    return change


SLOW = [pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 2), (4, 1))]


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), *SLOW])
def test_through_a_layout_and_back_to_the_bit(tiny, base, tp_size, pp_size):
    layout = (f"--parallel.tp_size={tp_size}", f"--parallel.pp_size={pp_size}")
    tiny.train(tiny.write("run", from_hf(base)), *layout, *STILL, world_size=tp_size * pp_size)
    export = tiny.folder / "run/hf/step_000000002_de"
    assert same_bytes(base, export)
    assert (export / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    assert not list(export.parent.glob(".*"))
    assert json.loads((export / "config.json").read_text())["max_position_embeddings"] == 128


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_vocabulary_grows_alike_at_any_layout(tiny, tp_size):
    """Ids 300 and above are new to the folder's own tokenizer, a part of the corpus's."""
    base = hf_folder(tiny.folder / "base", vocab_size=300)
    shutil.copyfile(tiny.corpus / "tok.model", tiny.folder / "whole.model")
    cut_vocabulary(tiny.folder / "whole.model", base / "tokenizer.model", 300)
    config = tiny.write("run", from_hf(base))
    tiny.train(config, f"--parallel.tp_size={tp_size}", *STILL, world_size=tp_size)
    grown, old = tensors(tiny.folder / "run/hf/step_000000002_de"), tensors(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert grown[name].shape == (512, 32)
        assert torch.equal(grown[name][:300], old[name])
        for row in (300, 401, 511):
            assert torch.equal(grown[name][row], mean_of_pieces(base, tiny, row, old[name]))
    log = (tiny.folder / "run/train.log").read_text()
    assert "with 212 new rows" in log


def cut_vocabulary(source: Path, target: Path, count: int) -> None:
    """The first pieces of a SentencePiece model, as a model."""
    from sentencepiece import sentencepiece_model_pb2 as format

    model = format.ModelProto.FromString(source.read_bytes())
    del model.pieces[count:]
    target.write_bytes(model.SerializeToString())


def mean_of_pieces(base: Path, tiny, row: int, old: torch.Tensor) -> torch.Tensor:
    """The mean that a new row must be, by the library itself."""
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(str(base / "tokenizer.model"))
    piece = SentencePieceProcessor(str(tiny.corpus / "tok.model")).IdToPiece(row)
    text = piece.replace("\u2581", " ")
    pieces = own.EncodeAsPieces(text.removeprefix(" "))
    if not text.startswith(" ") and len(pieces) > 1 and pieces[0] == "\u2581":
        pieces = pieces[1:]
    return old[[own.PieceToId(one) for one in pieces]].double().mean(0).float()


def test_a_tied_model_and_one_more_data_rank(tiny):
    changes = {"vocab_size": 512, "tie_word_embeddings": True, "head_dim": 16}
    base = hf_folder(tiny.folder / "base", torch.float32, **changes)
    shutil.copyfile(tiny.corpus / "tok.model", base / "tokenizer.model")
    config = tiny.write("run", from_hf(base))
    tiny.train(config, "--parallel.pp_size=2", *STILL, world_size=4)
    assert same_bytes(base, tiny.folder / "run/hf/step_000000002_de")
    written = yaml.safe_load((tiny.folder / "run/config.yaml").read_text())["model"]
    assert (written["head_dim"], written["tie_embeddings"], written["vocab_size"]) == (
        16,
        True,
        512,
    )


def test_the_first_batch_has_the_loss_of_transformers(tiny, base):
    record = tiny.folder / "record"
    record.mkdir()
    config = tiny.write("run", from_hf(base))
    tiny.train(config, "--batch.eod_mask_loss=false", record=str(record))
    path = record / "batch_0_data_0_pipe_0_model_0"
    rows = torch.tensor([line[:33] for line in json.loads(path.read_text())])
    model = transformers.LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    found = tiny.lines("run")[0]["loss"]
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - tiny.lines("run")[-1]["loss"]) > 1e-3


def test_a_converted_folder_is_started_from_like_a_run(tiny, base, project_root):
    tool = [sys.executable, str(project_root / "tools/convert_checkpoint.py")]
    ours = tiny.folder / "ours"
    arguments = ["from-hf", str(base), "--output", str(ours), "--no-check"]
    done = subprocess.run([*tool, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model = yaml.safe_load(done.stdout.splitlines()[-1])["model"]

    def change(config):
        from_hf(base)(config)
        config["model"] = {**model, "seq_length": 32}
        config["checkpoint"]["init_from"] = f"{ours}@0"

    config = tiny.write("run", change)
    assert "is not known; name it, or a stand-in" in said(tiny, config, "--dry-run")
    tiny.train(config)
    tiny.train(tiny.write("straight", from_hf(base)))
    assert tiny.results("run") == tiny.results("straight")
    last = "hf/step_000000002_de"
    assert same_bytes(tiny.folder / "run" / last, tiny.folder / "straight" / last)
    assert (tiny.folder / "run" / last / "tokenizer.model").exists()


def test_every_task_is_exported_while_training_goes_on(tiny, base):
    config = tiny.write("run", from_hf(base, ("en", "de")))
    tiny.train(config, "--reptile.k=3", world_size=2)
    exports = tiny.folder / "run/hf"
    names = ["step_000000002_en", "step_000000004_de"]
    assert sorted(path.name for path in exports.iterdir()) == names
    first, last = (tensors(exports / name) for name in names)
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert json.loads((exports / names[0] / "config.json").read_text())["rope_scaling"] == {
        key: value for key, value in LLAMA3.items() if key != "rope_theta"
    }
    # The export of a kill that came between is made up for by the next start.
    shutil.rmtree(exports / names[0])
    tiny.train(config, "--reptile.k=3", world_size=2)
    again = tensors(exports / names[0])
    assert all(torch.equal(again[name], first[name]) for name in first)
    loaded = transformers.LlamaForCausalLM.from_pretrained(exports / names[1])
    assert loaded.config.rope_parameters["rope_type"] == "llama3"


def test_an_export_that_fails_costs_the_run_nothing(tiny, base):
    config = tiny.write("run", from_hf(base))
    (tiny.folder / "run").mkdir()
    (tiny.folder / "run/hf").write_text("in the way")
    tiny.train(config)
    assert json.loads((tiny.folder / "run/status.json").read_text())["status"] == "done"
    log = (tiny.folder / "run/train.log").read_text()
    assert "step_000000002 was not written for Hugging Face" in log
    (tiny.folder / "run/hf").unlink()
    tiny.train(config)
    assert (tiny.folder / "run/hf/step_000000002_de/model.safetensors").exists()


def test_it_resumes_without_the_folder_and_to_the_bit(tiny, base):
    options = ("--checkpoint.every_steps=1",)
    tiny.train(tiny.write("alone", from_hf(base, ("en", "de"))), *options)
    config = tiny.write("killed", from_hf(base, ("en", "de")))
    tiny.train(config, *options, kill_after=2, expect_failure=True)
    base.rename(base.with_name("elsewhere"))
    tiny.train(config, *options)
    assert tiny.results("killed") == tiny.results("alone")
    last = "hf/step_000000004_de"
    assert same_bytes(tiny.folder / "killed" / last, tiny.folder / "alone" / last)


def test_copies_hold_what_an_export_needs_of_the_folder(tiny, base):
    def change(config):
        from_hf(base, ("en", "de"), seq_length=160)(config)
        config["checkpoint"]["copy_to"] = str(tiny.folder / "place")

    config = tiny.write("run", change)
    tiny.train(config, kill_after=2, expect_failure=True)
    shutil.rmtree(tiny.folder / "run")
    tiny.train(config)
    export = tiny.folder / "run/hf/step_000000004_de"
    values = json.loads((export / "config.json").read_text())
    assert (values["torch_dtype"], values["bos_token_id"]) == ("bfloat16", 1)
    assert values["max_position_embeddings"] == 160, "the folder's were 128"
    assert (export / "tokenizer.model").exists()


def test_replay_of_what_it_was_trained_on_before(tiny, base):
    def change(config):
        from_hf(base)(config)
        before = {"task": "base", "trained_before": True, "train": [str(tiny.corpus / "en")]}
        config["stream"].insert(0, before)
        config["replay"] = {"alpha": 0.25}

    tiny.train(tiny.write("run", change))
    assert [line["replay_rows"] for line in tiny.lines("run")] == [2, 2]
    assert "base" in tiny.lines("run")[0]["loss_by_task"]


def said(tiny, config: Path, *options: str) -> str:
    output = tiny.train(config, *options, expect_failure=True, output=True)
    return " ".join(output.split())


def test_bad_starts_are_refused_before_anything_is_written(tiny, base):
    other = said(tiny, tiny.write("run", from_hf(base, hidden_size=64)))
    assert "model.hidden_size: given 64, but" in other
    both = said(tiny, tiny.write("run", from_hf(base)), "--checkpoint.init_from=old@3")
    assert "can come from one place only" in both
    nowhere = said(tiny, tiny.write("run", from_hf(tiny.folder / "nowhere")))
    assert "nowhere/config.json: cannot be read" in nowhere
    small = hf_folder(tiny.folder / "small")
    assert "has 512 ids" in said(tiny, tiny.write("run", from_hf(small)))
    shard = sorted(base.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    torn = said(tiny, tiny.write("run", from_hf(base)))
    assert "fetch the file again" in torn
    assert not (tiny.folder / "run").exists()
