"""Layers into which models are cut."""
