"""Tests of the mathematics of training."""
