"""Continual pre-training of Llama models on a stream of corpora, with replay and Reptile.

Importing this package imports neither torch nor DeepSpeed: whoever uses a part imports it.
"""

__version__ = "0.1.0"
