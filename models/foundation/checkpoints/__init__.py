"""Weights on disk: headers, names, and whether a file is what it should be."""
