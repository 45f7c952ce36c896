"""Writes the pages and schemas that are made from the code: `python docs/generate.py`."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

DOCS = Path(__file__).parent
PAGES = (
    "coming_from_diffusion_pipe.md",
    "dataset.schema.json",
    "model_checks.md",
    "optimizers.md",
    "settings.md",
    "settings.schema.json",
    "supported_models.md",
)
OBJECTIVES = {
    "flow": "flow matching",
    "edm": "EDM",
    None: "DDPM's steps; predicts the noise or v, as the folder's scheduler says",
}
"""By its kind; None if a model's files decide."""
HUB = {
    "anima": ("circlestone-labs/Anima-Base-v1.0-Diffusers",),
    "auraflow": ("fal/AuraFlow-v0.3", "purplesmartai/pony-v7-base"),
    "chroma": ("lodestones/Chroma1-HD",),
    "cogvideox": (
        "zai-org/CogVideoX-2b",
        "zai-org/CogVideoX-5b-I2V",
        "zai-org/CogVideoX1.5-5B",
        "zai-org/CogVideoX1.5-5B-I2V",
    ),
    "cogview4": ("zai-org/CogView4-6B",),
    "cosmos": ("nvidia/Cosmos-1.0-Diffusion-7B-Text2World", "nvidia/Cosmos-1.0-Diffusion-7B-Video2World"),
    "cosmos_predict2": ("nvidia/Cosmos-Predict2-2B-Text2Image", "nvidia/Cosmos-Predict2-2B-Video2World"),
    "cosmos_predict25": ("nvidia/Cosmos-Predict2.5-2B",),
    "ernie_image": ("baidu/ERNIE-Image",),
    "flux": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Kontext-dev"),
    "flux2": ("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-base-4B"),
    "flux3": ("black-forest-labs/flux-3-image-klein-base",),
    "hidream": ("HiDream-ai/HiDream-I1-Full",),
    "hunyuan_dit": ("Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",),
    "hunyuan_image": ("hunyuanvideo-community/HunyuanImage-2.1-Diffusers",),
    "hunyuan_video": ("hunyuanvideo-community/HunyuanVideo", "hunyuanvideo-community/HunyuanVideo-I2V"),
    "hunyuan_video_15": (
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v",
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
    ),
    "ideogram4": ("ideogram-ai/ideogram-4-fp8",),
    "kandinsky5": (
        "kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers",
        "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
    ),
    "krea2": ("krea/Krea-2-Raw", "krea/Krea-2-Turbo"),
    "ltx2": ("Lightricks/LTX-2",),
    "ltx_video": ("Lightricks/LTX-Video", "Lightricks/LTX-Video-0.9.7-dev"),
    "lumina2": ("Alpha-VLLM/Lumina-Image-2.0",),
    "minimax_h3": ("MiniMaxAI/MiniMax-H3",),
    "mochi": ("genmo/mochi-1-preview",),
    "omnigen2": ("OmniGen2/OmniGen2",),
    "pixart": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/PixArt-XL-2-1024-MS"),
    "qwen_image": ("Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit"),
    "qwen_image_21": ("Qwen/Qwen-Image-2.1",),
    "qwen_image_layered": ("Qwen/Qwen-Image-Layered",),
    "sana": (
        "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
        "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    ),
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5",),
    "sd3": ("stabilityai/stable-diffusion-3.5-medium",),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "wan": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    "wan_vace": ("Wan-AI/Wan2.1-VACE-1.3B-diffusers", "Wan-AI/Wan2.1-VACE-14B-diffusers"),
    "z_image": ("Tongyi-MAI/Z-Image-Turbo",),
}
"""By model: names of diffusers folders on Hugging Face."""
_MODELS_HEAD = """# Supported models

This page is generated from `models/`. A model's folder, which `diffusers_path` names, is downloaded with

    hf download OWNER/NAME --local-dir models/NAME

where OWNER/NAME are those below or another of the same architecture; some want you to accept their licence on
[Hugging Face](https://huggingface.co) first, and `hf auth login`.

`transformer_path` may replace the denoiser's weights by those of a single file, or several options all parts of a
folder ([single files](single_files.md)). A denoiser's file may be safetensors or GGUF, with diffusers' keys or the
publisher's, which ComfyUI's files have too. Of a GGUF all kinds are decoded that the `gguf` package knows: F32, F16,
BF16, Q8_0, the Q4 to Q6 with and without K, and smaller ones. None of the files that are offered on the hub has been at
hand: what is tested are files that the package wrote from small models of all these types, and random codes of the
kinds with a K, which it only reads. T5 and UMT5 are read from GGUF too, by llama.cpp's names, as entries of
`text_encoders`; other text encoders and VAEs are not."""

sys.path.insert(0, str(DOCS.parent))


def pages() -> dict[str, str]:
    """File name under docs/ -> content."""
    import models
    from docs.optimizers_page import optimizers_page
    from utils.settings.document import dataset_json_schema, settings_json_schema, settings_page
    from utils.settings.foreign_page import foreign_page

    pipelines = {name: models.find(name) for name in models.available()}
    classes = {section: choice.classes for section, choice in models.choices().items()}
    classes["model"] = {name: pipeline.Options for name, pipeline in pipelines.items()}
    return {
        "coming_from_diffusion_pipe.md": foreign_page(),
        "settings.md": settings_page(classes),
        "settings.schema.json": settings_json_schema(classes),
        "dataset.schema.json": dataset_json_schema(),
        "supported_models.md": supported_models(pipelines),
        "model_checks.md": model_checks(pipelines),
        "optimizers.md": optimizers_page(),
    }


def supported_models(pipelines: dict[str, type]) -> str:
    """One section a model, from what its class states."""
    sections = [section(name, pipeline) for name, pipeline in pipelines.items()]
    return "\n\n".join([_MODELS_HEAD, *sections]) + "\n"


def section(name: str, pipeline: type) -> str:
    from utils import adapters

    media = pipeline.media
    # Of some models only files or options say that they make clips of a picture.
    stills = "" if pipeline.starts_from_picture is True else "pictures, and "
    known = pipeline.original_layout is not None
    facts = {
        "Trains on": (
            "still pictures" if media.max_frames == 1 else f"{stills}clips of up to {media.max_frames} frames"
        )
        + f"; sides are multiples of {media.spatial} pixels",
        "Objective": OBJECTIVES[getattr(pipeline.objective, "kind", None)],
        "Trains as": ", ".join([*(kind.name for kind in adapters.available().values()), "or in full"]),
        **({"To be had as": ", ".join(f"`{folder}`" for folder in HUB[name])} if name in HUB else {}),
        "Weights from": "a diffusers folder" + (", or a single file with the publisher's keys" if known else ""),
        **_single_files(name, pipeline),
        "Exports for": "diffusers" + (", ComfyUI" if known else ""),
        "Blocks that are adapted and recomputed": ", ".join(f"`{block}`" for block in pipeline.blocks),
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    return f"## `{name}`\n\n{pipeline.__doc__}\n\n| | |\n|---|---|\n{rows}\n\nIts own keys: [settings](settings.md)."


CHECKS = {
    "test_layers_equal_the_whole_module": "layers",
    "test_stages_and_recomputing_change_nothing": "stages",
    "test_text_is_that_of_the_stock_pipeline": "text",
    "test_latents_are_those_of_the_stock_pipeline": "latents",
    "test_samples_are_those_of_the_stock_pipeline": "samples",
    "test_an_adapter_is_loaded_by_the_stock_pipeline_and_gone_on_from": "adapter",
    "test_all_weights_are_read_from_what_was_exported": "export",
    "test_swapping_blocks_changes_no_bit": "swapping",
    "test_a_folder_of_pictures_trains": "run",
}
"""The tests of `tests/test_models.py` that compare a model, and their columns."""
_CHECKS_HEAD = """# What is checked of each model

This page is generated from the tests. Each model, small and with random weights, is compared with the stock library:

- *layers*: outputs and all gradients are those of the stock module, bit for bit unless its test says why not;
- *stages*: three recomputed stages of pipeline parallelism train as one process does, in full and as a LoRA;
- *text*, *latents*, *samples*: what the stock pipeline encodes and draws;
- *adapter*: the stock pipeline loads an exported LoRA, and training goes on from it;
- *export*: what a full fine-tune exports is read again, in every layout;
- *swapping*: blocks in the machine's memory change no bit;
- *run*: `train.py` on two processes, from pictures to exports and a checkpoint, which some types go on from.

Rows with an indented name are variants, with the checks that show something beyond those of the type; where there is
none, a file of tests of the model's own has what is left. *Publisher's files* are read and written by its own names, or
ComfyUI's; *single files* is how many architectures are known [without a folder](single_files.md).
"""


def model_checks(pipelines: dict[str, type]) -> str:
    """A row for each type and each of its variants, a column for each generic test."""
    from models.foundation.checkpoints.published import architectures
    from tests.models.tiny_folder import VARIANTS

    def row(name: str, tests: Collection[str], *further: str) -> str:
        return f"| {' | '.join([name, *('yes' if test in tests else '' for test in CHECKS), *further])} |"

    rows = []
    for name, pipeline in pipelines.items():
        known = "yes" if pipeline.original_layout is not None else ""
        rows.append(row(f"`{name}`", CHECKS, known, str(len(architectures(name)) or "")))
        # The longest name of a type that a variant's begins with is that of its type.
        own = [one for one in VARIANTS if max((n for n in pipelines if one.startswith(n)), key=len) == name]
        rows += [row(f"&nbsp;&nbsp;{variant}", VARIANTS[variant], "", "") for variant in own]
    heads = ["", *CHECKS.values(), "publisher's files", "single files"]
    return "\n".join([_CHECKS_HEAD, f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *rows]) + "\n"


def _single_files(name: str, pipeline: type) -> dict[str, str]:
    from models.foundation.checkpoints.published import architectures

    known = [f"`{one.name}`" for one in architectures(name)]
    texts = pipeline.text_parts if isinstance(pipeline.text_parts, tuple) else ()
    encoders = f"; text encoders: {', '.join(f'`{part.name}`' for part in texts)}" if texts else ""
    return {"Without a folder": f"architectures: {', '.join(known)}{encoders}"} if known else {}


def main() -> int:
    for name, content in pages().items():
        (DOCS / name).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
