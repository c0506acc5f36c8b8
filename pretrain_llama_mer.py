#!/usr/bin/env python3
"""Continual pre-training of Llama models with meta-experience replay; see --help."""

import os
import signal
import sys

if __name__ == "__main__":
    # They ask a run that trains for something. Until it listens, which is after imports that take
    # seconds, they must not end it.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    from megatron_mer.training.main import main

    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's clean-up: process groups whose peers failed would wait in it.
    os._exit(code)
