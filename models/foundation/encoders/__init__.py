"""Encoders that turn pictures, clips and captions into cached features."""
