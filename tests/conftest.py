"""What holds for every test."""

import os

# Set before torch starts: the machine's cores are shared with the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
