"""What the server of test processes imports before it forks."""

import os

# These tests are about processes; those marked gpu start their own.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib  # noqa: E402
from pathlib import Path  # noqa: E402

import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402

import utils.parallel.engine  # noqa: E402, F401

# The stock pipelines too, which take seconds each.
for module in Path(__file__).with_name("models").glob("tiny_*.py"):
    importlib.import_module(f"tests.models.{module.stem}")

torch.set_num_threads(1)
