"""Joins a model and a run: what happens to the denoiser, the data, samples and exports. Knows no single model."""
