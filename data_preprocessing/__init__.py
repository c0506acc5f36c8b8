"""Preparing raw text as the corpora of a task stream, before tokenizing."""
