"""Tests of a run's parts."""
