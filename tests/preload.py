"""What the server of test processes imports before it forks."""

import os

# These tests are about processes; those marked gpu start their own.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402, F401
import diffusers.models.transformers.transformer_flux  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402

import models.flux  # noqa: E402, F401
import utils.parallel.engine  # noqa: E402, F401

torch.set_num_threads(1)
