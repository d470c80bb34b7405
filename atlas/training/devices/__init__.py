"""The hardware and processes of a run: devices, ranks, memory, compilation and signals."""
