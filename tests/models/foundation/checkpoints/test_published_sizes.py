"""The published models: how large they are, what their tensors do not tell, and by what their files are known."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from accelerate import init_empty_weights

import models
from models.base import BasePipeline
from models.foundation.checkpoints.published import CONFIGS, Architecture
from models.foundation.checkpoints.recognition import recognised
from models.foundation.checkpoints.stock import of_transformers
from utils.first_values import none_without_memory

BILLIONS = {
    "anima/2b": 2.09,
    "auraflow/0.1": 6.83,
    "auraflow/0.3": 6.86,
    "chroma/chroma1": 8.90,
    "cogvideox/1.5_5b": 5.57,
    "cogvideox/1.5_5b_i2v": 5.57,
    "cogvideox/2b": 1.69,
    "cogvideox/5b": 5.57,
    "cogvideox/5b_i2v": 5.63,
    "cogview4/6b": 6.37,
    "cosmos/14b_t2w": 14.27,
    "cosmos/14b_v2w": 14.27,
    "cosmos/7b_t2w": 7.24,
    "cosmos/7b_v2w": 7.24,
    "cosmos_predict2/14b_t2i": 14.27,
    "cosmos_predict2/14b_v2w": 14.27,
    "cosmos_predict2/2b_t2i": 1.96,
    "cosmos_predict2/2b_v2w": 1.96,
    "cosmos_predict25/14b": 14.37,
    "cosmos_predict25/2b": 2.06,
    "ernie_image/8b": 8.03,
    "flux/dev": 11.90,
    "flux/schnell": 11.89,
    "flux2/dev": 32.22,
    "flux2/klein_4b": 3.88,
    "flux2/klein_9b": 9.08,
    "flux3/klein_base": 5.54,
    "framepack/13b": 12.87,
    "hidream/i1": 17.11,
    "hunyuan_dit/1.1": 1.52,
    "hunyuan_dit/1.2": 1.50,
    "hunyuan_image/2.1": 17.43,
    "hunyuan_video/i2v_16ch": 12.82,
    "hunyuan_video/i2v_33ch": 12.81,
    "hunyuan_video/t2v": 12.82,
    "hunyuan_video_15/480p_i2v": 8.33,
    "hunyuan_video_15/480p_t2v": 8.33,
    "hunyuan_video_15/720p_i2v": 8.33,
    "hunyuan_video_15/720p_t2v": 8.33,
    "ideogram4/9b": 9.28,
    "kandinsky5/lite_i2v": 2.01,
    "kandinsky5/lite_t2i": 6.02,
    "kandinsky5/lite_t2v": 2.01,
    "kandinsky5/pro_i2v": 19.31,
    "kandinsky5/pro_t2v": 19.31,
    "krea2/raw": 12.82,
    "krea2/turbo": 12.82,
    "ltx2/2.0_19b": 13.04,
    "ltx2/2.3_22b": 13.12,
    "ltx_video/13b": 13.04,
    "ltx_video/2b_0.9.0": 1.92,
    "ltx_video/2b_0.9.1": 1.92,
    "ltx_video/2b_0.9.5": 1.92,
    "lumina2/2b": 2.61,
    "minimax_h3/fl2va": 33.12,
    "mochi/preview": 10.03,
    "omnigen2/4b": 3.97,
    "pixart/alpha_1024": 0.61,
    "pixart/alpha_512": 0.61,
    "pixart/sigma_1024": 0.61,
    "pixart/sigma_2k": 0.61,
    "pixart/sigma_512": 0.61,
    "qwen_image/20b": 20.43,
    "qwen_image/edit_2511": 20.43,
    "qwen_image_21/7b": 7.12,
    "qwen_image_21/7b_turbo": 7.12,
    "qwen_image_layered/20b": 20.43,
    "sana/0.6b_1024": 0.59,
    "sana/0.6b_512": 0.59,
    "sana/1.5_1.6b": 1.60,
    "sana/1.5_4.8b": 4.72,
    "sana/1.6b_1024": 1.60,
    "sana/1.6b_2k": 1.60,
    "sana/1.6b_4k": 1.60,
    "sana/1.6b_512": 1.60,
    "sd15/1.5": 0.86,
    "sd3/3.5_large": 8.15,
    "sd3/3.5_medium": 2.47,
    "sd3/3_medium": 2.08,
    "sdxl/base": 2.57,
    "wan/2.1_flf2v_14b": 16.40,
    "wan/2.1_i2v_14b": 16.39,
    "wan/2.1_t2v_1.3b": 1.42,
    "wan/2.1_t2v_14b": 14.29,
    "wan/2.2_i2v_a14b": 14.29,
    "wan/2.2_t2v_a14b": 14.29,
    "wan/2.2_ti2v_5b": 5.00,
    "wan_vace/2.1_1.3b": 2.15,
    "wan_vace/2.1_14b": 17.34,
    "z_image/6b": 6.15,
}
"""Parameters of the published denoisers; of LTX-2's the half for video."""
MILLIONS = {
    "bert_chinese_large": 352,
    "byt5_small_glyph": 219,
    "clip_g": 695,
    "clip_l": 124,
    "clip_vit_h": 631,
    "gemma2_2b": 2614,
    "gemma3_12b": 12187,
    "glm4_9b": 8779,
    "llama3_1_8b": 7505,
    "llama3_8b_llava": 7505,
    "llava_llama3_8b": 7830,
    "long_clip_g": 695,
    "long_clip_l": 124,
    "ministral_3_3b": 3849,
    "mistral_small_3_24b": 23340,
    "mt5_xl": 1670,
    "pile_t5_xl": 1224,
    "qwen2_5_vl_3b": 3755,
    "qwen2_5_vl_7b": 8292,
    "qwen2_5_vl_7b_text": 7071,
    "qwen3_0.6b": 596,
    "qwen3_4b": 4022,
    "qwen3_8b": 7568,
    "qwen3_vl_32b": 32579,
    "qwen3_vl_4b": 4438,
    "qwen3_vl_8b": 8145,
    "siglip_so400m_384": 428,
    "t5_11b": 4865,
    "t5_xxl": 4762,
    "umt5_xxl": 5681,
}
"""Parameters of the published encoders of texts and pictures, tied ones once."""
SAME_TENSORS = [
    {"hunyuan_video/i2v_16ch", "hunyuan_video/t2v"},
    {f"hunyuan_video_15/{size}p_{task}" for size in (480, 720) for task in ("i2v", "t2v")},
    {"kandinsky5/lite_i2v", "kandinsky5/lite_t2v"},
    {"kandinsky5/pro_i2v", "kandinsky5/pro_t2v"},
    {"krea2/raw", "krea2/turbo"},
    {"ltx_video/2b_0.9.0", "ltx_video/2b_0.9.1", "ltx_video/2b_0.9.5"},
    {"pixart/alpha_512", *(f"pixart/sigma_{size}" for size in ("512", "1024", "2k"))},
    {"qwen_image/20b", "qwen_image/edit_2511"},
    {"qwen_image_21/7b", "qwen_image_21/7b_turbo"},
    {"sana/0.6b_1024", "sana/0.6b_512"},
    {f"sana/1.6b_{size}" for size in ("512", "1024", "2k", "4k")},
    {"wan/2.1_t2v_14b", "wan/2.2_t2v_a14b"},
]
"""Architectures that the denoiser's tensors do not tell apart."""
CLASSES = {
    "bert": "BertModel",
    "clip_text_model": "CLIPTextModelWithProjection",
    "clip_vision_model": "CLIPVisionModel",
    "gemma2": "Gemma2Model",
    "gemma3": "Gemma3Model",
    "glm": "GlmModel",
    "llama": "LlamaModel",
    "llava": "LlavaModel",
    "mistral3": "Mistral3Model",
    "mt5": "MT5EncoderModel",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_text": "Qwen2_5_VLTextModel",
    "qwen3": "Qwen3Model",
    "qwen3_vl": "Qwen3VLModel",
    "siglip_vision_model": "SiglipVisionModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}


def shapes_of_all() -> dict[str, frozenset]:
    """Names and shapes of the parameters of each published denoiser, by which its files are recognised."""
    found, recognisable = {}, set()
    for place in sorted(CONFIGS.glob("*/*.json")):
        kind, architecture = place.parent.name, Architecture(place)
        pipeline = models.build(models.find(kind).Options(type=kind, architecture=architecture.name))
        shapes = {name: one.shape for name, one in pipeline.weights.build_empty().named_parameters()}
        found[f"{kind}/{architecture.name}"] = frozenset(shapes.items())
        # A type is known by names, which its architectures share.
        for layout in layouts_of(pipeline, shapes) if kind not in recognisable else ():
            mark = recognised(layout)
            assert mark is not None and f'"{kind}"' in mark.fits, (place, mark)
        recognisable.add(kind)
        # Every other part can be made of its configuration too.
        assert pipeline.encoders() and pipeline.scheduler()
    return found


def layouts_of(pipeline: BasePipeline, shapes: dict[str, torch.Size]) -> Iterator[dict[str, torch.Size]]:
    """The tensors of a denoiser's file, of diffusers and of the publisher."""
    whole = {**shapes, **pipeline.weights.shapes_beside()}
    yield whole
    # Files of UNets have the other parts too.
    if pipeline.original_layout and pipeline.options.type not in ("sd15", "sdxl"):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in whole.items()}
        original = pipeline.original_layout.to_original(tensors)
        yield {f"model.diffusion_model.{name}": one.shape for name, one in original.items()}


def test_published_denoisers_have_their_size_and_what_their_tensors_do_not_tell_is_known() -> None:
    shapes = shapes_of_all()
    counted = {name: round(sum(shape.numel() for _, shape in one) / 1e9, 2) for name, one in shapes.items()}
    assert counted == BILLIONS
    alike: dict[frozenset, set[str]] = {}
    for name, one in shapes.items():
        alike.setdefault(one, set()).add(name)
    assert [names for names in alike.values() if len(names) > 1] == SAME_TENSORS


@pytest.mark.parametrize("name", sorted(MILLIONS))
def test_published_encoders_have_their_size(name: str) -> None:
    (file,) = (CONFIGS / "shared").glob(f"*_encoder/{name}.json")
    config = json.loads(file.read_text())
    cls = of_transformers(CLASSES[config["model_type"]])
    with none_without_memory(), init_empty_weights():
        encoder = cls(cls.config_class.from_dict(config))
    tied = ["encoder.embed_tokens.weight", *(["lm_head.weight"] if config.get("tie_word_embeddings") else [])]
    own = {key: value for key, value in encoder.named_parameters() if key not in tied}
    assert round(sum(value.numel() for value in own.values()) / 1e6) == MILLIONS[name]


def test_each_shared_configuration_is_used() -> None:
    content = " ".join(file.read_text() for file in CONFIGS.glob("*/*.json"))
    shared = [file.relative_to(CONFIGS / "shared").with_suffix("") for file in CONFIGS.glob("shared/*/*.json")]
    assert shared and [place for place in shared if f'"{place.as_posix()}"' not in content] == []
