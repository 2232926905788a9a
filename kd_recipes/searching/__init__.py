"""Settings of a distillation that are searched: which there are, trials of them, and what came out of it."""
