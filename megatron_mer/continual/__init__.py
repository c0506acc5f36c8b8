"""Continual pre-training: the stream's plan, Reptile, and measures of forgetting.

Importing this package imports nothing; `continual.stream` works without torch.
"""
