"""The quick start, as `make quickstart` runs it after the installation."""

import json
import os
import shutil
import subprocess
import sys

import pytest

LANGUAGES = ("en", "fr", "de", "ar", "ja")
PARTS = ("data_preprocessing", "examples", "megatron_mer", "tools", "pretrain_llama_mer.py")


def start(folder):
    """Run it in a copy of the project; return what it printed."""
    done = subprocess.run(
        [sys.executable, str(folder / "examples/quickstart/start.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_languages_are_learned_and_kept(project_root, tmp_path):
    for part in PARTS:
        copy = shutil.copytree if (project_root / part).is_dir() else shutil.copy
        copy(project_root / part, tmp_path / part)
    printed = start(tmp_path)
    assert "Held-out loss in nats a token" in printed
    run = tmp_path / "runs" / "quickstart"
    summary = json.loads((run / "summary.json").read_text())
    learned, entropy = summary["learned"]["sets"], summary["unigram_entropy"]
    assert tuple(learned) == LANGUAGES
    for language in LANGUAGES:
        assert learned[language] <= entropy[language] - 0.3, language
    assert summary["forgetting"]["mean"] < 0.3, "plain sequential training forgets about 3 nats"
    assert summary["replay_share"] == {
        f"{place} {language}": 0.25 if place else None for place, language in enumerate(LANGUAGES)
    }
    assert (run / "report" / "losses.png").stat().st_size > 10_000
    assert json.loads((run / "status.json").read_text())["status"] == "done"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == summary["steps"] == 750
    assert "the run is done" in start(tmp_path)
