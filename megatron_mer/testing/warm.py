"""What every training process imports, named once so that test worlds can import it ahead.

DeepSpeed imports its last two modules only inside ``initialize`` (about three seconds each).
"""

import deepspeed
import deepspeed.pipe
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.pipe.topology
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch  # noqa: F401
