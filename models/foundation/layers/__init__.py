"""Layers that models are cut into."""
