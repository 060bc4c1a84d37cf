"""What a run leaves behind to go on from: checkpoints that are there whole or not at all."""
