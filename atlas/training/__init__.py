"""Training: the loss, the optimizers, the schedule, the training loop and the checkpoints."""
