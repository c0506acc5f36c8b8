"""Helpers for tests of distributed programs; imported by no other package."""

from megatron_mer.testing.ranks import WorldError, run_world

__all__ = ["WorldError", "run_world"]
