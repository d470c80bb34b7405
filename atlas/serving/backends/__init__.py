"""The models behind the server: Atlas's own engine, llama.cpp, and their common interface."""
