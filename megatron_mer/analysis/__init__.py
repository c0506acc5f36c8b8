"""Tables and pictures of a run, from what it left behind."""
