"""Denoisers that diffusers lacks, as modules in one piece, in the form of its own classes.

A file `<name>.py` has a class, and is imported where that is used (`models/foundation/checkpoints/stock.py`), since it
imports diffusers; what its model needs too stands in a file that does not.
"""
