"""A run's configuration as DeepSpeed's."""

from __future__ import annotations

from typing import Any

from megatron_mer.config import RunConfig
from megatron_mer.parallel import num_micro_batches

# ZeRO-1 in fp32 allocates one buffer of this many elements a dtype (its default of 5e8 is 2 GB).
_LARGEST_BUCKET = 200_000_000


def deepspeed_config(config: RunConfig, dp_size: int, local_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run.

    Gradients are accumulated in fp32 (it also selects the optimizer whose masters Reptile moves);
    activations travel whole between stages; checkpointing of activations is non-reentrant, since
    the first layer takes integer ids.

    Args:
        config: the run.
        dp_size: data-parallel size.
        local_parameters: number of this rank's weights, which bounds the reduction bucket.
    """
    bucket = max(1, min(local_parameters, _LARGEST_BUCKET))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches(config, dp_size),
        "gradient_clipping": config.optimizer.clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        # Its throughput timer waits for the GPU before every micro batch.
        "timers": {"throughput": {"enabled": False}},
        "pipeline": {
            "use_reentrant": False,
            "activation_checkpoint_interval": int(
                config.parallel.activation_checkpointing == "full"
            ),
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings
