"""Write a trained model as a file that other programs run, prove that they compute the same, and import such files."""
