"""Loss, optimiser, schedule, loop, checkpoints: from tokens to trained weights."""
