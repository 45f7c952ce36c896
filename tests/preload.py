"""What the server of test processes does once before it forks, so that none of them has to: it imports everything, and
warms what a process is slow to do for the first time."""

import os

# These tests are about processes; those marked gpu start their own.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import io  # noqa: E402
import signal  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

# It would go through all that is imported, again and again.
gc.disable()

import deepspeed  # noqa: E402, F401
import peft  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
import utils.parallel.engine  # noqa: E402, F401
from models.assembly.stage import load_stage  # noqa: E402
from tests.models import tiny_flux  # noqa: E402
from tests.models.tiny_folder import settings_of  # noqa: E402
from tests.runs import config_writer, write_short_flux  # noqa: E402
from utils.adapters.lora import LoraSettings  # noqa: E402
from utils.ranks import Ranks  # noqa: E402
from utils.run.signals import StopRequests  # noqa: E402

# The stock pipelines too, which take seconds each; and all that a run imports on its way.
ROOT = Path(__file__).parents[1]
for pattern in ("tests/models/tiny_*.py", "train.py", "models/**/*.py", "optimizers/**/*.py", "utils/**/*.py"):
    for module in sorted(ROOT.glob(pattern)):
        importlib.import_module(".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))

# A shell that starts tests in the background lets them ignore it, and trainers too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
# diffusers, transformers and PEFT build their tables when they are first asked to load something.
flux = tiny_flux.pipeline(tiny_flux.MINI_FLUX)
flux.check()
load_stage(flux, settings_of(flux, LoraSettings(type="lora", rank=1)), stage=0)
# What the planner finds out of operations holds in all runs of the miniature Flux.
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    pictures, short_flux = Path(folder) / "pictures", Path(folder) / "flux"
    pictures.mkdir()
    short_flux.mkdir()
    for number, size in enumerate([(96, 48), (64, 64), (64, 64)]):
        Image.new("RGB", size).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a picture")
    config = config_writer(Path(folder), pictures, write_short_flux(short_flux))()
    train.run(train.parse_arguments(["--config", str(config), "--check"]), Ranks(), StopRequests(), 0.0)
# Forked processes would have its thread without its running.
if tqdm.monitor is not None:
    tqdm.monitor.exit()
    tqdm.monitor = None
# What is here stays: the collector of a forked process need not look at it, nor copy the pages that it lies on.
gc.collect()
gc.freeze()
gc.enable()
