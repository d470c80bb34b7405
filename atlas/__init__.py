"""Atlas: from raw text to a GPT that llama.cpp runs, every step in the open."""

__version__ = "0.1.0"
