"""Estimates of the memory and disk space that a run needs, and of the micro-batch that fits."""
