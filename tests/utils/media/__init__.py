"""Tests of utils.media."""
