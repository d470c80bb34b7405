"""What a run computes on: devices, ranks, memory, compilation, signals."""
