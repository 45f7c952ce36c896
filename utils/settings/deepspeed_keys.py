"""`deepspeed_config`: keys of a DeepSpeed configuration, of which few are for the user to set.

Most of what such a file says has a key here, or would let data ranks, stages or a resumed run come to other weights
than one process does. Those are refused by name.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from utils.settings.values import SettingsTable


class DeepSpeedSettings(SettingsTable):
    """`[deepspeed_config]`: what DeepSpeed is told; as a table, or in a JSON file that the key names."""

    communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which gradients travel between data ranks; less than float32 rounds them."""
    wall_clock_breakdown: bool = False
    """Log what each stage does in the time of a step. Each part is then waited for, so that steps are slower."""
    dump_state: bool = False
    """Print DeepSpeed's own configuration and state before training, which are long."""


_TYPES = "`dtype`, in `[model]` and in `[adapter]`"
_BY_THE_MEAN = "gradients are averaged after they were summed, so that any number of processes trains alike"
_ORDER = "which samples a step takes follows from the dataset file and the seed, and none is left out"
INSTEAD: Mapping[str, str] = {
    "activation_checkpointing": "`activation_checkpointing`",
    "bf16": _TYPES,
    "bfloat16": _TYPES,
    "amp": _TYPES,
    "fp16": _TYPES,
    "torch_autocast": _TYPES,
    "data_types": _TYPES,
    "checkpoint": "`checkpoint_every_n_steps` and its like",
    "comet": "`[monitoring]`",
    "csv_monitor": "`[monitoring]`; metrics.jsonl is always written",
    "tensorboard": "`enable_tensorboard`, in `[monitoring]`",
    "wandb": "`enable_wandb`, in `[monitoring]`",
    "compile": "`compile`",
    "gradient_accumulation_steps": "`gradient_accumulation_steps`, above all tables",
    "gradient_clipping": "`gradient_clipping`, above all tables",
    "optimizer": "`[optimizer]`",
    "pipeline": "`pipeline_stages`, `partition_method` and `activation_checkpointing`",
    "scheduler": "`lr_scheduler` and `warmup_steps`",
    "steps_per_print": "`steps_per_print`, above all tables",
    "train_batch_size": "`micro_batch_size_per_gpu` and `gradient_accumulation_steps`",
    "train_micro_batch_size_per_gpu": "`micro_batch_size_per_gpu`",
    "zero_optimization": "`zero_stage`, and `offload_optimizer` for offload_optimizer",
    "weight_quantization": "`transformer_dtype`, in `[model]`",
}
"""Key of DeepSpeed's -> what to write."""
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("gradient_allreduce_op", "gradient_predivide_factor", "prescale_gradients"), _BY_THE_MEAN),
    **dict.fromkeys(("curriculum_learning", "data_efficiency", "dataloader_drop_last"), _ORDER),
    "comms_logger": "DeepSpeed 0.19.8 adds each time to those before it, and takes longer for it the longer a run is; "
    "wall_clock_breakdown tells times",
    "flops_profiler": "it counts by modules that it wraps, and layers run otherwise here; --check plans memory, and "
    "wall_clock_breakdown tells times",
    "zero_allow_untested_optimizer": "DeepSpeed does not take the steps",
    "zero_force_ds_cpu_optimizer": "DeepSpeed does not take the steps",
    "progressive_layer_drop": "it trains another model",
    "sparse_gradients": "no model here has sparse gradients",
}
"""Key of DeepSpeed's -> why it is not taken."""


def _read(value: Any) -> Any:
    """A table, or what the JSON file of this name has, of keys that are taken."""
    written = _from_file(value) if isinstance(value, str) else value
    if isinstance(written, Mapping):
        problems = [*_problems(written)]
        if problems:
            raise ValueError("; ".join(problems))
    return written


def _from_file(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    try:
        # Editors of Windows begin a file with a mark.
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    return content


def _problems(written: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the names of the keys."""
    known = DeepSpeedSettings.model_fields
    for key in written:
        if key in INSTEAD:
            yield f"`{key}` is not taken from here: write {INSTEAD[key]}"
        elif key in REFUSED:
            yield f"`{key}` is not taken: {REFUSED[key]}"
        elif key not in known:
            yield f"`{key}` is not taken; what is: {', '.join(known)}"


DeepSpeedConfig = Annotated[DeepSpeedSettings, BeforeValidator(_read, json_schema_input_type=DeepSpeedSettings | str)]
