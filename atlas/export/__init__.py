"""Export models for other programs, prove that llama.cpp computes the same as PyTorch, and import models."""
