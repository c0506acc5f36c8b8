"""A run's configuration: its schema, and loading it with every problem found at once."""

from megatron_mer.config.checks import check_layout
from megatron_mer.config.describe import describe
from megatron_mer.config.load import load_config, resolve_vocab, to_yaml
from megatron_mer.config.model_schema import ModelConfig, RopeScaling
from megatron_mer.config.preflight_schema import PreflightConfig
from megatron_mer.config.schedule_checks import check_segments
from megatron_mer.config.schema import (
    BatchConfig,
    BoundsConfig,
    CheckpointConfig,
    DatasetConfig,
    EvaluateConfig,
    KernelsConfig,
    LaunchConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelConfig,
    ReplayConfig,
    ReptileConfig,
    RunConfig,
    ScheduleConfig,
    ScheduleSegmentConfig,
    TaskConfig,
    TensorboardConfig,
    WandbConfig,
)
from megatron_mer.config.sizes import SIZES, model_of_size

__all__ = [
    "SIZES",
    "BatchConfig",
    "BoundsConfig",
    "CheckpointConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "KernelsConfig",
    "LaunchConfig",
    "MetricsConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreflightConfig",
    "ReplayConfig",
    "ReptileConfig",
    "RopeScaling",
    "RunConfig",
    "ScheduleConfig",
    "ScheduleSegmentConfig",
    "TaskConfig",
    "TensorboardConfig",
    "WandbConfig",
    "check_layout",
    "check_segments",
    "describe",
    "load_config",
    "model_of_size",
    "resolve_vocab",
    "to_yaml",
]
