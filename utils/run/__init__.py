"""A run: its folder, its clock, and what happens between two steps."""
