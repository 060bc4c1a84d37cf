"""Training: packs in, a run folder with checkpoints and an adapter out. Knows nothing of Ray."""
