"""The quick start, as `make quickstart` runs it after the installation."""

import json

import pytest

LANGUAGES = ("en", "fr", "de", "ar", "ja")
PROGRAM = "examples/quickstart/start.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_languages_are_learned_and_kept(start, tmp_path):
    printed = start(PROGRAM)
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
    assert "the run is done" in start(PROGRAM)
