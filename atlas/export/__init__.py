"""Export a model to files that other programs run, prove that both compute the same, and import such files."""
