"""Tools for files of weights: `python -m utils.adapters.tools`."""

import runpy

if __name__ == "__main__":
    # The command has the name of what it is for; what knows models stands on a floor above.
    runpy.run_module("models.assembly.tools", run_name="__main__", alter_sys=True)
