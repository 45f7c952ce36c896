"""Further denoisers of pictures at the sizes that people train."""

from __future__ import annotations

from tests.models.full_size_clips import KANDINSKY5_TEXT
from tests.models.sized import FullSize, text_of, vae_of

FLUX2_VAE = {"_class_name": "AutoencoderKLFlux2"}

FLUX3 = FullSize(
    "Flux.3 Klein",
    "flux3",
    {"transformer": {"_class_name": "Flux3Transformer2DModel"}, "vae": FLUX2_VAE},
    text_of("qwen3_vl", 640, 20480),
)
QWEN_IMAGE_21 = FullSize(
    "Qwen-Image 2.1",
    "qwen_image_21",
    {
        "transformer": {"_class_name": "QwenImage21Transformer2DModel"},
        "vae": {"_class_name": "AutoencoderKLQwenImage21"},
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
    },
    text_of("qwen3_vl", 1024, 4096),
)
SANA = FullSize(
    "Sana 1.6B",
    "sana",
    {
        "transformer": {"_class_name": "SanaTransformer2DModel"},
        "vae": {"_class_name": "AutoencoderDC"},
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
    },
    text_of("gemma2", 300, 2304),
)
PIXART = FullSize(
    "PixArt-Sigma",
    "pixart",
    {
        "transformer": {
            "_class_name": "PixArtTransformer2DModel",
            "sample_size": 128,
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        "vae": vae_of(4),
        "scheduler": {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
    },
    text_of("t5", 300, 4096),
)
KANDINSKY5_IMAGE = FullSize(
    "Kandinsky 5 Lite, text to image",
    "kandinsky5",
    {
        "transformer": {
            "_class_name": "Kandinsky5Transformer3DModel",
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 2560,
            "ff_dim": 10240,
            "num_visual_blocks": 50,
            "axes_dims": [32, 48, 48],
        },
        "vae": vae_of(16, shift_factor=0.1),
    },
    KANDINSKY5_TEXT,
)
