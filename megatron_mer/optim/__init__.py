"""Learning-rate schedules and parameter groups."""
