"""Tests of utils.settings."""
