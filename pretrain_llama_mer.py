#!/usr/bin/env python3
"""Continual pre-training of Llama models with meta-experience replay; see --help."""

import os
import sys

from megatron_mer.training.main import main

if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's clean-up: process groups whose peers failed would wait in it.
    os._exit(code)
