"""Starts DeepSpeed's communication on top of the process group that `utils.ranks` made."""

from __future__ import annotations

import logging
import os
from typing import Any

from utils.settings.deepspeed_keys import DeepSpeedSettings

NEVER = 10**9


def initialize_deepspeed() -> None:
    """Lets DeepSpeed use the running process group; quietly, and without compiling anything.

    On a CPU, DeepSpeed would build a shared-memory operator at its first start: half a minute to a minute of compiler
    time, a lock that a killed build never releases, and 132 MB in /dev/shm per run. Nothing here uses it, so it is
    declared unavailable.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.WARNING)
    shared_memory_operator = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if shared_memory_operator is not None:
        # DeepSpeed's own table of what can be built takes a compiler half a second, and this entry alone is asked for.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})[shared_memory_operator.NAME] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)


def configuration(accumulation: int, settings: DeepSpeedSettings) -> dict[str, Any]:
    """What the engine is told; DeepSpeed may say what the settings let it say.

    Args:
        accumulation: micro-batches of a step.
    """
    from deepspeed.utils.logging import set_log_level_from_string

    if settings.dump_state:
        set_log_level_from_string("info")
    return {
        # Not used: micro-batches may differ in size.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "steps_per_print": NEVER,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": settings.communication_data_type,
        "dump_state": settings.dump_state,
    }
