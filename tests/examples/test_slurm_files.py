"""examples/slurm: each line that a site must change says so."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "slurm"
FILES = sorted(FOLDER.glob("*.sbatch"))
OF_A_SITE = (
    "--partition=", "--account=", "--gpus-per-node=", "--cpus-per-task=", "--mem=", "--time=",
    "module load", "source .venv", "export NCCL_", "ranks_per_node=",
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lines_of_a_site_are_marked(path):
    lines = path.read_text().splitlines()
    ours = [line for line in lines if line.startswith(("#SBATCH", "module", "source", "export"))]
    unmarked = [
        line for line in ours if any(word in line for word in OF_A_SITE) and "# SITE:" not in line
    ]
    assert unmarked == []
    marked = [line for line in lines if "# SITE:" in line]
    assert len(marked) >= 8


def test_there_is_a_file_for_each_way_to_start():
    assert [path.stem for path in FILES] == ["deepspeed", "one_node", "pretrain", "torchrun"]
