"""A trained model as a file that others run, and the proof that it says what the model says."""
