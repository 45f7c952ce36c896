"""Tests of adapters on a denoiser."""
