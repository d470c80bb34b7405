"""Estimates of the memory and time that a run needs on a machine or a card, with tables and advice."""
