"""The mathematics of training: pure functions."""
