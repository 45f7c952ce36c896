"""Tests of utils.dataset."""
