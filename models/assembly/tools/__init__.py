"""Tools for files of weights: `python -m utils.adapters.tools`."""
