"""Processes that are killed at a system call, a model of the disk after a power cut, and the commands that both try."""
