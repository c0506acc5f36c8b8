"""The copy of the code that a submitted run keeps."""

import subprocess

import pytest

from megatron_mer.launch.freeze import freeze_code, new_folder


def git(folder, *arguments):
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path):
    root = tmp_path / "project"
    for name in ("megatron_mer/a.py", "tools/b.py", "examples/slurm/c.sh", "pretrain_llama_mer.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first\n")
    return root


def test_without_git_the_code_alone_is_kept(project, tmp_path):
    (project / "megatron_mer" / "__pycache__").mkdir()
    freeze_code(project, tmp_path / "code")
    copied = {str(p.relative_to(tmp_path / "code")) for p in (tmp_path / "code").rglob("*.*")}
    assert copied == {
        "megatron_mer/a.py", "tools/b.py", "examples/slurm/c.sh", "pretrain_llama_mer.py",
    }  # fmt: skip


def test_commit_and_difference_are_named(project, tmp_path):
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-qm", "one")
    head = git(project, "rev-parse", "HEAD")
    freeze_code(project, tmp_path / "clean")
    assert (tmp_path / "clean" / "COMMIT").read_text() == f"{head}\n"
    assert not (tmp_path / "clean" / "changes.diff").exists()
    (project / "megatron_mer" / "a.py").write_text("second\n")
    (project / "megatron_mer" / "new.py").write_text("new\n")
    freeze_code(project, tmp_path / "changed")
    assert (tmp_path / "changed" / "COMMIT").read_text() == f"{head}+changes\n"
    difference = (tmp_path / "changed" / "changes.diff").read_text()
    assert "+second" in difference
    assert "megatron_mer/new.py" in difference
    assert (tmp_path / "changed" / "megatron_mer" / "new.py").exists()


def test_two_submissions_of_one_second_have_two_folders(tmp_path):
    made = [new_folder(tmp_path / "slurm") for _ in range(3)]
    assert len(set(made)) == 3
    assert max(made) == made[-1]
