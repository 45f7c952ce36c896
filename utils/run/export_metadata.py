"""What the headers of exports tell the programs that manage weights: `modelspec.*`, which Stability AI's ModelSpec
describes (github.com/Stability-AI/ModelSpec, 1.0.1), and `ss_*`, which kohya's scripts write. All values are texts, as
safetensors asks; of folders and files there are names alone, and no paths.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from utils.adapters.kinds import COMFYUI, LAYOUT
from utils.dataset.samples import Sample
from utils.errors import UserError
from utils.json_files import read_json
from utils.run.durable import write_bytes
from utils.run.progress import Progress
from utils.run.tensor_file import sha256_of
from utils.settings.schema import Settings

SPEC = "1.0.1"
IMPLEMENTATIONS = {COMFYUI: "https://github.com/comfyanonymous/ComfyUI", "diffusers": "diffusers"}
ABOUT = "about.json"
"""The file in a run's folder with what its exports say of the run."""
STARTED, FINISHED = "ss_training_started_at", "ss_training_finished_at"
MOST_TAGS, LONGEST_TAG = 500, 100
"""Of each directory so many tags are counted in a header, of at most so many letters: captions may be prose."""
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


def of_file(
    metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], *, layout: str, title: str, stem: str
) -> dict[str, str]:
    """The header of one file of an export.

    Args:
        metadata: what all files of the export say.
        layout: "diffusers", "comfyui" or that of another program.
        title: of the export.
        stem: the name of the file, without its ending.
    """
    digest, now = sha256_of(tensors), datetime.now(UTC)
    # Where no settings say it, as of what tools make.
    pairs = (("ss_network_dim", "rank"), ("ss_network_alpha", "alpha"))
    own = {key: metadata[said] for key, said in pairs if said in metadata}
    return {
        **own,
        **metadata,
        LAYOUT: layout,
        "modelspec.sai_model_spec": SPEC,
        "modelspec.implementation": IMPLEMENTATIONS.get(layout, layout),
        "modelspec.title": metadata.get("modelspec.title", title),
        "modelspec.date": now.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
        "ss_output_name": stem,
    }


def of_training(metadata: Mapping[str, str]) -> dict[str, str]:
    """How far training had come at an export, and when, if that is not said already."""
    now = repr(datetime.now(UTC).timestamp())
    return {"ss_steps": metadata.get("step", "0"), FINISHED: metadata.get(FINISHED, now)}


def of_settings(settings: Settings) -> dict[str, str]:
    """What a run's settings say."""
    adapter, chosen = settings.adapter, settings.optimizer
    words = {
        "ss_learning_rate": chosen.lr,
        "ss_optimizer": chosen.type,
        "ss_optimizer_args": json.dumps(chosen.model_dump(mode="json", exclude={"type", "lr"})),
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_lr_warmup_steps": settings.warmup_steps,
        "ss_max_train_steps": settings.max_steps,
        "ss_num_epochs": settings.epochs,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_gradient_checkpointing": bool(settings.activation_checkpointing),
        "ss_max_grad_norm": settings.gradient_clipping,
        "ss_batch_size_per_device": settings.micro_batch_size_per_gpu,
        "ss_mixed_precision": PRECISIONS.get(settings.model.dtype, settings.model.dtype),
        "ss_seed": settings.seed,
        "ss_noise_offset": settings.model.noise_offset or None,
        "ss_min_snr_gamma": settings.model.min_snr_gamma,
        "ss_loss_type": settings.model.loss_type,
        "modelspec.timestep_range": f"{round(1000 * settings.model.min_t)},{round(1000 * settings.model.max_t)}",
    }
    if adapter:
        rank = getattr(adapter, "rank", None)
        alpha = getattr(adapter, "alpha", None)
        words |= {
            "ss_network_module": "networks.lora" if adapter.type == "lora" else "lycoris.kohya",
            "ss_network_dim": rank,
            "ss_network_alpha": rank if alpha is None else alpha,
            "ss_network_dropout": adapter.dropout,
            "ss_network_args": json.dumps(
                {"algo": adapter.type}
                | adapter.model_dump(
                    mode="json", exclude={"type", "rank", "alpha", "dropout", "init_from_existing", "lycoris_config"}
                )
            ),
        }
    return {key: str(value) for key, value in words.items() if value is not None}


def of_progress(progress: Progress, *, epoch_ended: bool = False) -> dict[str, str]:
    """How far training had come: the epoch that it is in, or that it has just completed, counted from 1.

    Args:
        epoch_ended: whether the step was the last of the progress's epoch, of which an owed export knows no more.
    """
    return {"ss_epoch": str(progress.epoch + (epoch_ended or progress.step_in_epoch > 0))}


def of_samples(samples: Iterable[Sample]) -> dict[str, str]:
    """What the training data say: how many pictures, tags and sizes, and the words that call up what is trained."""
    tags: dict[str, Counter[str]] = {}
    repeats: dict[str, float] = {}
    files: dict[str, set[str]] = {}
    sizes: Counter[tuple[int, int, int]] = Counter()
    triggers: dict[str, None] = {}
    regularisation: set[str] = set()
    names = _Names()
    for sample in samples:
        directory = names.of(sample.rules.path)
        sizes[sample.bucket.width, sample.bucket.height, sample.bucket.frames] += 1
        repeats[directory] = sample.rules.num_repeats
        if sample.rules.is_regularisation_data:
            regularisation.add(directory)
        elif said := sample.rules.trigger_word or sample.rules.instance_prompt:
            triggers[said] = None
        own = files.setdefault(directory, set())
        if sample.media.digest not in own:
            own.add(sample.media.digest)
            caption = sample.captions[0] if sample.captions else ""
            found = {tag.strip() for tag in caption.split(",")} - {""}
            tags.setdefault(directory, Counter()).update(tag for tag in found if len(tag) <= LONGEST_TAG)
    trained = [directory for directory in files if directory not in regularisation]
    counted = {name: {"n_repeats": repeats[name], "img_count": len(own)} for name, own in files.items()}
    buckets = {
        str(number): {"resolution": [width, height], "count": count, **({"frames": frames} if frames > 1 else {})}
        for number, ((width, height, frames), count) in enumerate(sorted(sizes.items()))
    }
    width, height, _ = max(sizes, key=lambda size: (sizes[size], size))
    called = {"modelspec.trigger_phrase": ", ".join(triggers), "ss_trigger_words": ", ".join(triggers)}
    return {
        "ss_num_train_images": str(sum(len(files[name]) for name in trained)),
        "ss_num_reg_images": str(sum(len(files[name]) for name in regularisation)),
        "ss_dataset_dirs": json.dumps({name: counted[name] for name in trained}),
        "ss_reg_dataset_dirs": json.dumps({name: counted[name] for name in sorted(regularisation)}),
        "ss_tag_frequency": json.dumps({name: dict(own.most_common(MOST_TAGS)) for name, own in tags.items()}),
        "ss_bucket_info": json.dumps({"buckets": buckets}),
        "ss_enable_bucket": str(len(sizes) > 1),
        # The size that most samples have.
        "ss_resolution": f"({width}, {height})",
        "modelspec.resolution": f"{width}x{height}",
        **(called if triggers else {}),
    }


class _Names:
    """Short names of directories: their own, and a number where another is called so too."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def of(self, path: Path) -> str:
        if path not in self._known:
            taken, name, number = set(self._known.values()), path.resolve().name or "data", 2
            own = name
            while own in taken:
                own, number = f"{name} ({number})", number + 1
            self._known[path] = own
        return self._known[path]


def legacy_hash(file: Path) -> str | None:
    """The short hash by which programs know a file of weights: of 64 KiB at 1 MiB; None if it is smaller."""
    with file.open("rb") as stream:
        stream.seek(0x100000)
        block = stream.read(0x10000)
    return hashlib.sha256(block).hexdigest()[:8] if block else None


def keep(folder: Path, metadata: Mapping[str, str]) -> None:
    """Writes what a run's exports say of it into its folder, for exports of its checkpoints later."""
    write_bytes(folder / ABOUT, json.dumps(dict(metadata), indent=1).encode())


def kept(folder: Path) -> dict[str, str]:
    """What a run's folder has of that; nothing if it is not there.

    Raises:
        UserError: it is damaged.
    """
    path = folder / ABOUT
    if not path.is_file():
        return {}
    found = read_json(path)
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise UserError.of("is no table of texts; remove it, and exports say less of their run", str(path))
    return found
