"""The benchmark of the plan at scale runs; what it measures is no test's business."""

import json
import subprocess
import sys


def test_the_smallest_run_of_the_scale_benchmark(project_root, tmp_path) -> None:
    program = project_root / "benchmarks" / "scale.py"
    done = subprocess.run(
        [sys.executable, program, "--runs", "1G", "--places", "5", "--repetitions", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("| 100%")]
    assert float(line.split("|")[2]) > 0
    recorded = json.loads((project_root / "benchmarks" / "data" / "scale.json").read_text())
    assert recorded
