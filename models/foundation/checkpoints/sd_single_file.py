"""Names in the single files of Stable Diffusion: checkpoints, which hold UNet, VAE and text encoders, and LoRAs.

Checkpoints have the names of their publisher (`model.diffusion_model.input_blocks...`). LoRAs for ComfyUI, Forge and
other programs have kohya's names: `lora_unet_` or `lora_te_`, then diffusers' or the publisher's name of a module, with
_ for dots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from models.foundation.checkpoints.folders import TextPart
from models.foundation.checkpoints.headers import read_header
from models.foundation.checkpoints.key_layouts import KOHYA, LYCORIS, KeyLayout, KeyRule, difference_of
from models.foundation.checkpoints.weights import CheckpointNames
from utils.adapters.file_names import TEXT_MODEL
from utils.adapters.kinds import Target
from utils.settings.model_schema import ModelSettings, TextEncoderFile

Tensors = dict[str, torch.Tensor]

UNET = "unet"
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
MARKS = {"v_pred": ("prediction_type", "v_prediction"), "ztsnr": ("rescale_betas_zero_snr", True)}
"""Names of tensors without a meaning of their own, by which checkpoints say what the UNet predicts: option, value."""
PROJECTION = "text_projection.weight"
LAYERS = "text_model.encoder.layers.{}"
OPEN_CLIP = KeyLayout(
    [
        KeyRule("token_embedding", ("text_model.embeddings.token_embedding",)),
        KeyRule("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        *(
            KeyRule(
                f"transformer.resblocks.{{}}.attn.in_proj_{parameter}",
                tuple(f"{LAYERS}.self_attn.{part}_proj.{parameter}" for part in "qkv"),
            )
            for parameter in ("weight", "bias")
        ),
        *(
            KeyRule(f"transformer.resblocks.{{}}.{there}", (f"{LAYERS}.{here}",))
            for there, here in {
                "attn.out_proj": "self_attn.out_proj",
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            }.items()
        ),
        KeyRule("ln_final", ("text_model.final_layer_norm",)),
        KeyRule("text_projection", (PROJECTION,)),
    ]
)
IN_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
IN_RESNET = {**{name: name for name in ("norm1", "conv1", "norm2", "conv2")}, "nin_shortcut": "conv_shortcut"}


def vae_layout(config: Mapping[str, Any]) -> KeyLayout:
    """The publisher's names of the VAE, whose decoder counts its levels in the opposite order."""
    levels, per_level = len(config["block_out_channels"]), config["layers_per_block"]
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    modules = []
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out")]
        pairs.append((f"{side}.norm_out", f"{side}.conv_norm_out"))
        modules += [(f"{side}.mid.block_{n + 1}", f"{side}.mid_block.resnets.{n}", IN_RESNET) for n in range(2)]
        modules.append((f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", IN_ATTENTION))
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        modules += [(f"encoder.down.{level}.block.{n}", f"{down}.resnets.{n}", IN_RESNET) for n in range(per_level)]
        modules += [(f"decoder.up.{level}.block.{n}", f"{up}.resnets.{n}", IN_RESNET) for n in range(per_level + 1)]
        pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    pairs += [(f"{there}.{a}", f"{here}.{b}") for there, here, within in modules for a, b in within.items()]
    return KeyLayout([KeyRule(there, (here,)) for there, here in pairs])


def vae_to_original(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """diffusers' VAE as in checkpoints, where the projections of its attention are convolutions."""
    renamed = vae_layout(config).to_original(tensors)
    return {
        f"{VAE_PREFIX}{name}": tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
        for name, tensor in renamed.items()
    }


def open_clip_original(prefix: str) -> CheckpointNames:
    """OpenCLIP in a checkpoint, which has names of its own."""

    def convert(tensors: Tensors) -> Tensors:
        named = OPEN_CLIP.from_original({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
        return {name: _other_side(tensor) if name == PROJECTION else tensor for name, tensor in named.items()}

    return CheckpointNames(prefix, convert)


def open_clip_to_original(tensors: Tensors) -> Tensors:
    """OpenCLIP under its own names, without the prefix."""
    turned = {name: _other_side(tensor) if name == PROJECTION else tensor for name, tensor in tensors.items()}
    return OPEN_CLIP.to_original(turned)


def _other_side(projection: torch.Tensor) -> torch.Tensor:
    """The transposed projection: OpenCLIP multiplies from the other side."""
    return projection.T.contiguous()


class CheckpointLayout(KeyLayout):
    """The names of an ensemble of UNet and text encoders. Reading uses it for the UNet only.

    Args:
        unet: the publisher's names of the UNet.
        lora_prefixes: see `FileLayout.part_prefixes`.
        others: tensors of the ensemble -> the tensors of a checkpoint that do not belong to the UNet.
    """

    def __init__(
        self,
        unet: KeyLayout,
        lora_prefixes: Mapping[str, tuple[str, ...]],
        others: Callable[[Tensors], Tensors],
    ):
        super().__init__(unet.rules, parts_are_known=True)
        self.part_prefixes, self.others = dict(lora_prefixes), others

    def to_original(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """A whole checkpoint."""
        unet = super().to_original(part_of(tensors, UNET))
        return {**{f"{UNET_PREFIX}{name}": tensor for name, tensor in unet.items()}, **self.others(dict(tensors))}

    def targets(self, names: Iterable[str]) -> Iterator[tuple[str, Target]]:
        """The UNet's."""
        for there, target in super().targets(_own(names)):
            yield there, Target(tuple(f"{UNET}.{module}" for module in target.modules), target.swap_halves)

    def comfyui_names(self, modules: Iterable[str]) -> dict[str, str]:
        """See `FileLayout`."""
        return {module: self._kohya_name(module, LYCORIS) for module in modules}

    def lora_to_kohya(
        self,
        factors: Mapping[str, torch.Tensor],
        scale: float | Callable[[str], float],
        rows_of: Callable[[str], int],
        dora_scale: Callable[[str], torch.Tensor] | None = None,
    ) -> Tensors:
        """LoRA factors under kohya's names, with diffusers' names of modules."""
        converted = {}
        for module in sorted({name.partition(".lora_")[0] for name in factors}):
            name = self._kohya_name(module, KOHYA)
            down, up = factors[f"{module}.lora_A.weight"], factors[f"{module}.lora_B.weight"]
            converted[f"{name}.lora_down.weight"] = down
            converted[f"{name}.lora_up.weight"] = up
            own = scale(module) if callable(scale) else scale
            converted[f"{name}.alpha"] = torch.tensor(own * down.shape[0])
            if dora_scale:
                converted[f"{name}.dora_scale"] = dora_scale(module)
        return converted

    def differences(self, values: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
        """Of the UNet by the publisher's names; of text encoders by ComfyUI's, of which kohya's know some modules."""
        converted = super().differences(part_of(values, UNET), part_of(shapes, UNET))
        for name, tensor in values.items():
            part, _, rest = name.partition(".")
            if part != UNET:
                within = rest if rest.startswith((TEXT_MODEL, PROJECTION)) else f"{TEXT_MODEL}{rest}"
                converted[self.part_prefixes[part][-1] + difference_of(within)] = tensor
        return converted

    def _kohya_name(self, module: str, of_unet: str) -> str:
        part, _, rest = module.partition(".")
        prefix = of_unet if part == UNET else self.part_prefixes[part][0]
        return prefix + rest.replace(".", "_")


def _own(names: Iterable[str]) -> list[str]:
    """The names of the UNet's, without its prefix."""
    return [name.removeprefix(f"{UNET}.") for name in names if name.startswith(f"{UNET}.")]


def part_of(tensors: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The tensors of one part of an ensemble, or what is known of them, under its own names."""
    own = f"{part}."
    return {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}


def with_parts_of_checkpoint(options: ModelSettings, texts: Sequence[TextPart]) -> ModelSettings:
    """The options, where the VAE and the text encoders of a checkpoint in `transformer_path` replace those of the
    folder, and its marks say what it predicts, unless options say so too.

    Raises:
        UserError: the file cannot be read.
    """
    path = options.transformer_path
    if path is None or path.is_dir():
        return options
    keys = read_header(path, with_gguf=True).files
    given = [entry.type for entry in options.text_encoders]
    found = [
        TextEncoderFile(type=part.name, path=path)
        for part in texts
        if part.name not in given and any(key.startswith(part.names.prefix) for key in keys)
    ]
    has_vae = options.vae_path is None and any(key.startswith(VAE_PREFIX) for key in keys)
    parts: dict[str, Any] = {"vae_path": path} if has_vae else {}
    for mark, (option, value) in MARKS.items():
        if mark in keys and option not in options.model_fields_set:
            parts[option] = value
    return options.model_copy(update={**parts, "text_encoders": [*options.text_encoders, *found]})
