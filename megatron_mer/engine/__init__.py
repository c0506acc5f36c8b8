"""The model under DeepSpeed; the only package that imports it."""
