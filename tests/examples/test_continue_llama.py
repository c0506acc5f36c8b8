"""examples/continue_llama, as its user runs it: one command."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

PROGRAM = "examples/continue_llama/start.py"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_replay_of_a_stand_in_forgets_less(start, tmp_path):
    printed = start(PROGRAM)
    assert "of English forgotten:" in printed
    runs = tmp_path / "runs" / "continue_llama"
    begun, ends = {}, {}
    for run in ("replay", "plain"):
        lines = (runs / run / "evaluations.jsonl").read_text().splitlines()
        losses = [json.loads(line)["losses"] for line in lines]
        begun[run], ends[run] = losses[0], losses[-1]
        assert ends[run]["de"] < begun[run]["de"] - 1.0, run
    assert begun["replay"] == begun["plain"], "both start from the same folder"
    assert ends["replay"]["en"] < ends["plain"]["en"] - 0.05
    # Plain continuation forgets French again while it learns German.
    assert ends["replay"]["fr"] < ends["plain"]["fr"] - 0.5 < begun["plain"]["fr"] - 0.5

    last = max((runs / "replay" / "hf").iterdir())
    model = LlamaForCausalLM.from_pretrained(last)
    tokenizer = AutoTokenizer.from_pretrained(last)
    tokens = tokenizer("Der Rechner startet das Programm.", return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert loss < 7.0, "a uniform guess has ln 4096 = 8.3"

    assert "the run is done" in start(PROGRAM)
