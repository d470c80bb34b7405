"""A stream of bytes → text and documents. One module per kind of format."""
