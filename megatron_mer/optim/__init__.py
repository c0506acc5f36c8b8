"""Learning-rate schedules and parameter groups."""

from megatron_mer.optim.groups import parameter_groups
from megatron_mer.optim.schedule import check_schedule, lr_at

__all__ = ["check_schedule", "lr_at", "parameter_groups"]
