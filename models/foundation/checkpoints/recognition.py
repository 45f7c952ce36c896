"""Recognises the content of safetensors files by the names and shapes in their headers, so that the message about a
wrong file says what would fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from utils.errors import UserError

Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class FileSignature:
    """What identifies a kind of file.

    Attributes:
        what: a description of the content.
        fits: what to do with such a file.
        has: parts of tensor names that all occur.
        lacks: parts of tensor names that do not occur.
        size: (part of a tensor's name, dimension, its size), if this distinguishes it from related models.
    """

    what: str
    fits: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    size: tuple[str, int, int] | None = None

    def is_on(self, shapes: Shapes) -> bool:
        """Whether a file with tensors of these names and shapes is of this kind."""
        if not all(any(part in name for name in shapes) for part in self.has):
            return False
        if any(part in name for name in shapes for part in self.lacks):
            return False
        if self.size is None:
            return True
        part, dimension, size = self.size
        found = [shape for name, shape in shapes.items() if part in name]
        return bool(found) and len(found[0]) > dimension and found[0][dimension] == size


def _type(name: str) -> str:
    return f'set [model] type = "{name}"'


ADAPTER = "give it as [adapter] init_from_existing, or in [[model.preset_adapters]], and the model itself here"
TEXT_WIDTH = "attn2.to_k.weight"
UNET = ("down_blocks.", "up_blocks.", TEXT_WIDTH)
ORIGINAL_UNET = ("input_blocks.0.0.weight", "output_blocks.", TEXT_WIDTH)
UNETS = {768: ("Stable Diffusion 1.5", _type("sd15")), 2048: ("Stable Diffusion XL", _type("sdxl"))}
OTHER_UNETS = {1024: "Stable Diffusion 2", 1280: "the refiner of Stable Diffusion XL"}
NOT_TRAINED = "it is not trained here"
FRAMEPACK = "FramePack"

FOLDERS = {
    "AnimaModularPipeline": "anima",
    "AuraFlowPipeline": "auraflow",
    "ChromaPipeline": "chroma",
    "CogVideoXImageToVideoPipeline": "cogvideox",
    "CogVideoXPipeline": "cogvideox",
    "CogVideoXVideoToVideoPipeline": "cogvideox",
    "CogView4Pipeline": "cogview4",
    "Cosmos2_5_PredictBasePipeline": "cosmos_predict25",
    "Cosmos2TextToImagePipeline": "cosmos_predict2",
    "Cosmos2VideoToWorldPipeline": "cosmos_predict2",
    "CosmosTextToWorldPipeline": "cosmos",
    "CosmosVideoToWorldPipeline": "cosmos",
    "ErnieImagePipeline": "ernie_image",
    "Flux2KleinPipeline": "flux2",
    "Flux2Pipeline": "flux2",
    "Flux3ModularPipeline": "flux3",
    "FluxKontextPipeline": "flux",
    "FluxPipeline": "flux",
    "HiDreamImagePipeline": "hidream",
    "HunyuanDiTPipeline": "hunyuan_dit",
    "HunyuanImagePipeline": "hunyuan_image",
    "HunyuanVideo15ImageToVideoPipeline": "hunyuan_video_15",
    "HunyuanVideo15Pipeline": "hunyuan_video_15",
    "HunyuanVideoFramepackPipeline": "framepack",
    "HunyuanVideoImageToVideoPipeline": "hunyuan_video",
    "HunyuanVideoPipeline": "hunyuan_video",
    "Ideogram4Pipeline": "ideogram4",
    "Kandinsky5I2VPipeline": "kandinsky5",
    "Kandinsky5T2IPipeline": "kandinsky5",
    "Kandinsky5T2VPipeline": "kandinsky5",
    "Krea2Pipeline": "krea2",
    "LTX2ConditionPipeline": "ltx2",
    "LTX2ImageToVideoPipeline": "ltx2",
    "LTX2Pipeline": "ltx2",
    "LTXConditionPipeline": "ltx_video",
    "LTXImageToVideoPipeline": "ltx_video",
    "LTXPipeline": "ltx_video",
    "Lumina2Pipeline": "lumina2",
    "Lumina2Text2ImgPipeline": "lumina2",
    "MiniMaxH3ModularPipeline": "minimax_h3",
    "MochiPipeline": "mochi",
    "OmniGen2Pipeline": "omnigen2",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "QwenImage21Pipeline": "qwen_image_21",
    "QwenImageEditPipeline": "qwen_image",
    "QwenImageEditPlusPipeline": "qwen_image",
    "QwenImageLayeredPipeline": "qwen_image_layered",
    "QwenImagePipeline": "qwen_image",
    "SanaPipeline": "sana",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "WanImageToVideoPipeline": "wan",
    "WanPipeline": "wan",
    "WanVACEPipeline": "wan_vace",
    "ZImagePipeline": "z_image",
}
"""The `type` for each class that `model_index.json` of a diffusers folder may name."""

ADAPTER_NAMES = {
    "AuraFlow": r"joint_transformer_blocks_|(double|single)_layers_\d+_(attn_w|mlp|mod)",
    "Stable Diffusion 1.5, 2 or XL": r"(down|up|mid|input|output|middle)_blocks?_",
    "HunyuanVideo": r"individual_token_refiner|double_blocks_\d+_img_(attn_q|attn_k|mod_linear|mlp_fc)",
    "Flux.3": r"mode_blocks_|single_blocks_\d+_([qkv]_proj|attn_out|mlp_(in|out))$"
    r"|single_transformer_blocks_\d+_(attn_to_out_0|ff_linear)",
    "Flux.1 or Chroma": r"(double|single)_blocks_|single_transformer_blocks_",
    "HiDream": r"(double|single)_stream_blocks_",
    "MiniMax-H3": (
        r"(^|_)blocks_\d+_(attn_(qkv_proj|out_proj)|mlp_fc[12]|adaln_proj_linear)$"
        r"|token_refiner_(refiner_)?blocks_\d+_|transformer_blocks_\d+_adaln_proj_linear$"
    ),
    "Mochi": (
        r"(^|_)blocks_\d+_(attn_(qkv|proj)_[xy]|mlp_[xy]_w[12]|mod_[xy])$"
        r"|transformer_blocks_\d+_attn1_(add_[qkv]_proj|to_add_out)$"
    ),
    "Stable Diffusion 3": r"joint_blocks_|transformer_blocks_\d+_(ff_context|norm1_context|attn2_add)",
    "Krea 2": r"txtfusion_|text_fusion_|blocks_\d+_(attn_(w[qkvo]|(to_)?gate)$|(mlp|ff)_(gate|up|down)$)",
    "Qwen-Image 2.1": r"transformer_blocks_\d+_img_mlp_(gate|proj|out)",
    "Qwen-Image": r"transformer_blocks_\d+_(img|txt)_(mod|mlp)",
    "Z-Image, Lumina 2, OmniGen2 or Ideogram 4": (
        r"(noise|context)_refiner_|(^|_)layers_\d+_(attention|attn|feed_forward|adaLN|adaln_modulation)"
    ),
    "HunyuanDiT": r"blocks_\d+_(attn1_Wqkv|attn2_kv_proj|skip_linear|default_modulation)",
    "PixArt or Sana": r"(^|_)blocks_\d+_(attn_(qkv|proj)|cross_attn_(q_linear|kv_linear|proj)|mlp_fc[12])$",
    "Cosmos 1.0": r"blocks_block\d+_blocks_\d_block_",
    "Cosmos-Predict2": r"transformer_blocks_\d+_norm\d_linear|blocks_\d+_((self|cross)_attn_\w+_proj|adaln_|mlp_layer)",
    "Kandinsky 5": r"(text|visual)_transformer_blocks_\d+_",
    "CogVideoX": r"(^|_)blocks_\d+_([qkv]|attn_out|ff_(proj|out))$|transformer_blocks_\d+_norm[12]_linear$",
    "LTX-Video, CogVideoX or PixArt": r"transformer_blocks_\d+_(audio_)?attn[12]_to_",
    "Sana": r"transformer_blocks_\d+_(attn[12]_to_|ff_conv_)",
    "Wan": r"(^|_)blocks_\d+_(self_attn|cross_attn|ffn|attn1_to|attn2_to)_",
    "another transformer of diffusers, such as SD3, CogView4 or Qwen-Image": r"transformer_blocks_\d+_",
}
"""What modules of a model are called in adapters, with _ for dots. The first one that matches counts."""

HUNYUAN_VIDEO = (
    ("txt_in.individual_token_refiner", "img_in.proj.weight"),
    ("context_embedder.token_refiner", "x_embedder.proj.weight"),
)
"""Of Tencent's, and of diffusers: what only this family has, and what takes the latents."""
STEPS_OF_ITS_OWN = ("time_r_in.", "timestep_embedder_r.")
"""Of both, what only models have that were distilled to fewer steps."""

GUESS = "; is it another model's?"

# The first one that matches counts.
SIGNATURES: tuple[FileSignature, ...] = (
    *(
        FileSignature("an adapter", ADAPTER, (part,))
        for part in (".lora_down", ".lora_A", ".lora.down", ".lokr_w", ".hada_w", ".oft_blocks", ".ia3_l")
    ),
    *(
        FileSignature(f"an inpainting model of {name}", "give the plain one", parts, size=(first, 1, 9))
        for name, _ in UNETS.values()
        for parts, first in ((UNET, "conv_in.weight"), (ORIGINAL_UNET, "input_blocks.0.0.weight"))
    ),
    *(
        FileSignature(name, fits, parts, size=(TEXT_WIDTH, 1, width))
        for width, (name, fits) in UNETS.items()
        for parts in (UNET, ORIGINAL_UNET)
    ),
    *(
        FileSignature(name, NOT_TRAINED, parts, size=(TEXT_WIDTH, 1, width))
        for width, name in OTHER_UNETS.items()
        for parts in (UNET, ORIGINAL_UNET)
    ),
    *(
        FileSignature("AuraFlow", _type("auraflow"), ("register_tokens", part))
        for part in ("double_layers.0.attn.w1q", "joint_transformer_blocks.0.ff_context.")
    ),
    FileSignature("Chroma", _type("chroma"), ("distilled_guidance_layer.",)),
    FileSignature("ERNIE-Image", _type("ernie_image"), ("adaLN_modulation.1.", "layers.0.adaLN_sa_ln.")),
    FileSignature("Flux.2", _type("flux2"), ("double_stream_modulation_img.", "single_stream_modulation.")),
    *(
        FileSignature(
            "the step-distilled Flux.3",
            "it is not trained here; give flux-3-image-klein-base",
            ("early_stream_modulations.image.", part),
        )
        for part in ("ref_time_in.", "target_timestep_embedder.")
    ),
    FileSignature("Flux.3", _type("flux3"), ("early_stream_modulations.image.", "single_stream_modulations.")),
    *(
        FileSignature(
            "the step-distilled HunyuanVideo 1.5",
            "it is not trained here; give the plain one",
            (refiner, "cond_type_embed", part),
        )
        for (refiner, _), part in zip(HUNYUAN_VIDEO, STEPS_OF_ITS_OWN, strict=True)
    ),
    *(
        FileSignature("HunyuanVideo 1.5", _type("hunyuan_video_15"), (refiner, "cond_type_embed"))
        for refiner, _ in HUNYUAN_VIDEO
    ),
    *(
        FileSignature("the distilled HunyuanImage 2.1", "it is not trained here; give the plain one", (refiner, part))
        for (refiner, _), part in zip(HUNYUAN_VIDEO, STEPS_OF_ITS_OWN, strict=True)
    ),
    FileSignature("HunyuanImage 2.1", _type("hunyuan_image"), ("txt_in.individual_token_refiner", "byt5_in.fc1.")),
    FileSignature(
        "HunyuanImage 2.1",
        _type("hunyuan_image"),
        ("context_embedder.token_refiner", "time_guidance_embed.", "context_embedder_2."),
    ),
    FileSignature(
        "the refiner of HunyuanImage 2.1", NOT_TRAINED, ("txt_in.individual_token_refiner",), lacks=("vector_in.",)
    ),
    FileSignature(
        "the refiner of HunyuanImage 2.1", NOT_TRAINED, ("context_embedder.token_refiner", "time_guidance_embed.")
    ),
    FileSignature(FRAMEPACK, _type("framepack"), ("context_embedder.token_refiner", "clean_x_embedder.")),
    *(
        FileSignature("SkyReels of picture to video", NOT_TRAINED, (refiner,), size=(first, 1, 32))
        for refiner, first in HUNYUAN_VIDEO
    ),
    *(FileSignature("HunyuanVideo", _type("hunyuan_video"), (refiner,)) for refiner, _ in HUNYUAN_VIDEO),
    FileSignature("Flux.1 dev", _type("flux"), ("double_blocks.0.img_attn.qkv", "guidance_in.")),
    FileSignature(
        "Flux.1 schnell", _type("flux") + " with schnell's folder", ("double_blocks.0.img_attn.qkv", "vector_in.")
    ),
    FileSignature("Flux.1 dev", _type("flux"), ("single_transformer_blocks.0.proj_mlp", "guidance_embedder.")),
    FileSignature(
        "Flux.1 schnell",
        _type("flux") + " with schnell's folder",
        ("single_transformer_blocks.0.proj_mlp", "time_text_embed.text_embedder."),
    ),
    FileSignature("Stable Diffusion 3", _type("sd3"), ("joint_blocks.0.x_block.",)),
    FileSignature("Stable Diffusion 3", _type("sd3"), ("pos_embed.pos_embed", "ff_context.", "time_text_embed.")),
    FileSignature(
        "Qwen-Image-Layered", _type("qwen_image_layered"), ("transformer_blocks.0.img_mod.1.", "addition_t_embedding.")
    ),
    FileSignature("Qwen-Image", _type("qwen_image"), ("transformer_blocks.0.img_mod.1.", "txt_in.")),
    FileSignature("Qwen-Image 2.1", _type("qwen_image_21"), ("transformer_blocks.0.img_mlp.", "txt_in.text_norm.")),
    FileSignature("HiDream", _type("hidream"), ("double_stream_blocks.0.block.", "caption_projection.0.")),
    FileSignature("HunyuanDiT", _type("hunyuan_dit"), ("text_embedding_padding",)),
    *(FileSignature("Krea 2", _type("krea2"), (part,)) for part in ("txtfusion.projector.", "text_fusion.projector.")),
    FileSignature(
        "Kandinsky 5",
        _type("kandinsky5"),
        ("visual_transformer_blocks.0.visual_modulation.", "pooled_text_embeddings."),
    ),
    FileSignature("Ideogram 4", _type("ideogram4"), ("llm_cond_norm.", "embed_image_indicator.")),
    *(
        FileSignature("Sana Sprint", f"{NOT_TRAINED}, as it was distilled; give Sana", parts)
        for parts in (("time_embed.guidance_embedder.", "caption_norm."), ("cfg_embedder.", "attention_y_norm."))
    ),
    *(
        FileSignature("Sana", _type("sana"), parts)
        for parts in (
            ("caption_norm.", "transformer_blocks.0.ff.conv_depth."),
            ("attention_y_norm.", "blocks.0.mlp.depth_conv."),
        )
    ),
    *(
        FileSignature("CogVideoX", _type("cogvideox"), ("patch_embed.text_proj.", time))
        for time in ("time_embedding.linear_1.", "time_embedding_linear_1.")
    ),
    FileSignature(
        "CogVideoX with the names of its publisher's training",
        "convert it by scripts/convert_cogvideox_to_diffusers.py of diffusers",
        ("mixins.patch_embed.text_proj.", "adaln_layer.adaLN_modulations."),
    ),
    FileSignature("CogView4", _type("cogview4"), ("patch_embed.text_proj.", "time_condition_embed.")),
    FileSignature(
        "MiniMax-H3 with a table in place of what embeds the time, as it is pruned for ComfyUI",
        "it is not trained here; give a file that has `time_embedder`, or leave it out",
        ("adaln_t_table", "condition_proj."),
    ),
    *(
        FileSignature("MiniMax-H3", _type("minimax_h3"), (part, "audio_p"))
        for part in ("token_refiner.blocks.0.attn.qkv_proj.", "token_refiner.refiner_blocks.0.attn.to_q.")
    ),
    *(
        FileSignature("Mochi", _type("mochi"), ("pos_frequencies", part))
        for part in ("t5_yproj.", "time_embed.caption_proj.")
    ),
    *(FileSignature("LTX-2", _type("ltx2"), (part,)) for part in ("audio_patchify_proj.", "audio_proj_in.")),
    *(
        FileSignature("PixArt", _type("pixart"), parts)
        for parts in (("t_block.1.", "y_embedder.y_proj."), ("adaln_single.emb.", "pos_embed.proj."))
    ),
    FileSignature("LTX-Video", _type("ltx_video"), ("patchify_proj.",)),
    FileSignature(
        "LTX-Video",
        _type("ltx_video"),
        ("time_embed.emb.timestep_embedder.", "caption_projection.linear_1.", "attn1.norm_q."),
        lacks=("patch_embed.",),
    ),
    FileSignature("Cosmos 1.0", _type("cosmos"), ("blocks.block0.blocks.0.block.attn.to_q.0.",)),
    FileSignature("Cosmos 1.0", _type("cosmos"), ("learnable_pos_embed.pos_emb_t", "time_embed.t_embedder.")),
    *(
        FileSignature(what, fits, (block, *part))
        for what, fits, part in (
            ("Anima", _type("anima"), ("llm_adapter.",)),
            ("Anima", _type("anima"), ("text_conditioner.",)),
            ("Cosmos-Predict2.5", _type("cosmos_predict25"), ("crossattn_proj.0.",)),
            ("Cosmos-Predict2", _type("cosmos_predict2"), ()),
        )
        for block in ("blocks.0.adaln_modulation_self_attn.1.", "transformer_blocks.0.norm1.linear_1.")
    ),
    FileSignature("Z-Image", _type("z_image"), ("noise_refiner.0.", "x_pad_token")),
    FileSignature("OmniGen2", _type("omnigen2"), ("noise_refiner.0.", "ref_image_refiner.0.")),
    FileSignature("Lumina Image 2", _type("lumina2"), ("noise_refiner.0.", "context_refiner.0.")),
    FileSignature("Wan VACE", _type("wan_vace"), ("vace_patch_embedding.", "vace_blocks.0.")),
    *(
        FileSignature(f"Wan {variant}", _type("wan"), (part,), size=("patch_embedding.weight", 1, channels))
        for part in ("blocks.0.self_attn.q.", "blocks.0.attn1.to_q.")
        for channels, variant in ((16, "for text to video"), (36, "for picture to video"), (48, "2.2 TI2V-5B"))
    ),
    FileSignature("Wan", _type("wan"), ("blocks.0.self_attn.q.", "text_embedding.0.")),
    FileSignature("Wan", _type("wan"), ("blocks.0.attn1.to_q.", "condition_embedder.text_embedder.")),
    FileSignature(
        "a VAE", "give it as [model] vae_path", ("decoder.conv_in.",), lacks=("transformer_blocks.", "input_blocks.")
    ),
    FileSignature("a text encoder", "give it in [model] text_encoders", ("embeddings.token_embedding.",)),
    FileSignature("a text encoder", "give it in [model] text_encoders", ("block.0.layer.0.SelfAttention.",)),
    FileSignature(
        "a text encoder", "give it in [model] text_encoders", ("embed_tokens.weight", "layers.0.self_attn.q_proj.")
    ),
)


def recognised(shapes: Shapes) -> FileSignature | None:
    """The kind of a file with these tensors; None if it is unknown."""
    return next((signature for signature in SIGNATURES if signature.is_on(shapes)), None)


def likeness(shapes: Shapes, model_type: str) -> str:
    """What a file with these tensors contains, to be said behind what is wrong with it, and what would fit it; "" if it
    belongs to this type, or is unknown."""
    signature = recognised(shapes)
    if signature is None or signature.fits == _type(model_type):
        return ""
    return f"; it looks like {signature.what}: {signature.fits}"


def explained(error: UserError, shapes: Shapes, model_type: str) -> UserError:
    """The error about a file with these tensors, extended by what the file contains if that belongs to another type."""
    said = likeness(shapes, model_type)
    if not said:
        return error
    return UserError(replace(p, message=p.message.removesuffix(GUESS) + said) for p in error.problems)


def owner_of_names(modules: Iterable[str]) -> str | None:
    """The model to which most of these modules, of an adapter's file, belong by their names; None if it is unknown."""
    spelled = [module.replace(".", "_") for module in modules]
    owners = Counter(
        next((model for model, pattern in ADAPTER_NAMES.items() if re.search(pattern, name)), None) for name in spelled
    )
    owners.pop(None, None)
    return owners.most_common(1)[0][0] if owners else None
