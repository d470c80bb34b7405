"""Paths, archives and URLs → documents."""
