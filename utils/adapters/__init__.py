"""Adapters on a frozen denoiser."""
