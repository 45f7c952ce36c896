"""HiDream-I1, full, dev and fast: experts that a router chooses, and another state of Llama for every block.

Shapes: B batch, T image tokens, L text tokens, S all positions (T, T5's and two states of Llama), N states of Llama,
P pooled text features, C channels of a token, D width, h w latent cells. From the first single block on T counts the
text too, which follows the picture.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HiDreamImageTransformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_hidream_image import MoEGate
from torch import nn
from torch.nn import functional
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.folders import check_diffusers_folder, check_folder_type, part_override, read_config
from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.weights import build_empty
from models.foundation.encoders.clip import clip_config
from models.foundation.encoders.llama import LlamaEncoder, LlamaStates, Route, StatesFeatures, routes
from models.foundation.encoders.text import TextEncoder
from models.foundation.encoders.text_features import MaskedT5Features, ProjectedFeatures
from models.foundation.layers.chain import capture_outputs
from models.foundation.layers.patches import PATCH, patchify, unpatchify
from utils.diffusion.auxiliary import Output, load_balancing
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings
from utils.settings.paths import missing
from utils.settings.values import Count, NotNegative, UserPath

PARTS = (
    "scheduler",
    *(f"text_encoder{number}" for number in ("", "_2", "_3")),
    *(f"tokenizer{number}" for number in ("", "_2", "_3")),
    "transformer",
    "vae",
)
SINGLE_FILES = {"transformer": "transformer_path", "vae": "vae_path"}
TEXT_ENCODERS = {
    "text_encoder": "clip_l",
    "text_encoder_2": "clip_g",
    "text_encoder_3": "t5",
    "text_encoder_4": "llama3",
}
LLAMA_PARTS = ("text_encoder_4", "tokenizer_4")
CLIPS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
CONFIG_KEYS = (
    *("caption_channels", "in_channels", "llama_layers", "max_resolution", "text_emb_dim"),
    *("num_layers", "num_single_layers"),
)
SCHEDULERS = {
    cls.__name__: cls for cls in (FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler, UniPCMultistepScheduler)
}


class HiDreamOptions(ModelSettings):
    """`[model]` of `type = "hidream"`.

    `[sampling] guidance`: 5 is usual for full; dev and fast are distilled, and take 1, which is none.
    """

    llama3_path: UserPath | None = None
    """Folder of Llama 3.1 8B Instruct, with its tokenizer; default: `text_encoder_4` and `tokenizer_4` of
    `diffusers_path`, where HiDream's own folder has none."""
    llama3_4bit: bool = False
    """Keep Llama in 4 bits while captions are encoded: 6 GB instead of 16. Needs a GPU."""
    max_sequence_length: Count = 128
    """Tokens of T5 and of Llama, padding included, which the model sees."""
    balance_loss_weight: NotNegative = 0.01
    """Weight of the loss that has the experts of a layer chosen alike often; 0: none. It is no part of the loss of an
    evaluation."""
    fill_up_pictures: bool = True
    """Fill pictures that are not square up to the tokens of 1024 x 1024, as diffusers does in inference, whatever their
    size. ComfyUI does not; false is faster for small pictures."""


class HiDreamInputs(NamedTuple):
    """What the entry takes. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_1S3: torch.Tensor
    t5_BLD: torch.Tensor
    llama3_BLD: tuple[torch.Tensor, ...]
    pooled_BP: torch.Tensor
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class HiDreamStream(NamedTuple):
    """What travels from layer to layer. `llama3_BLD` are the states that blocks still to come project, each once;
    `last_BLD` is that of the last block, projected. `text_BLD` is None when it has joined `x_BTD`. Of a picture that is
    filled up `mask_BT` has ones and zeros, by which keys are multiplied."""

    x_BTD: torch.Tensor
    text_BLD: torch.Tensor | None
    llama3_BLD: tuple[torch.Tensor, ...]
    last_BLD: torch.Tensor
    time_BD: torch.Tensor
    mask_BT: torch.Tensor | None
    rope_1S1E22: torch.Tensor
    terms_K: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, time and positions; its text is T5's and that of Llama's state for the last block."""

    def __init__(self, denoiser: HiDreamImageTransformer2DModel, route: Route):
        super().__init__()
        self.x_embedder = denoiser.x_embedder
        self.t_embedder = denoiser.t_embedder
        self.p_embedder = denoiser.p_embedder
        self.pe_embedder = denoiser.pe_embedder
        self.last_projection, self.t5_projection = denoiser.caption_projection[-2:]
        self.route = route

    def forward(self, inputs: HiDreamInputs) -> HiDreamStream:
        weight = self.x_embedder.proj.weight
        dtype = weight.dtype
        states = [state.to(dtype) for state in inputs.llama3_BLD]
        last_BLD = self.last_projection(states[self.route.own])
        return HiDreamStream(
            x_BTD=self.x_embedder(inputs.x_BTC.to(dtype)),
            text_BLD=torch.cat([self.t5_projection(inputs.t5_BLD.to(dtype)), last_BLD], dim=1),
            llama3_BLD=tuple(states[index] for index in self.route.onward),
            last_BLD=last_BLD,
            # The time stays float32 until it is embedded.
            time_BD=self.t_embedder(inputs.t_B, dtype) + self.p_embedder(inputs.pooled_BP.to(dtype)),
            mask_BT=None if inputs.mask_BT is None else inputs.mask_BT.to(dtype),
            rope_1S1E22=self.pe_embedder(inputs.positions_1S3),
            terms_K=torch.zeros(1, device=weight.device),
            canvas_hw0=inputs.canvas_hw0,
        )


class Block(nn.Module):
    """What both kinds of blocks have in common: a state of Llama, which the block sees and nothing behind it, and
    experts whose balance is a loss.

    Args:
        projection: of the state; None for the last block, whose state the entry projects.
    """

    recomputable = True

    def __init__(self, block: nn.Module, projection: nn.Module | None, route: Route | None, balance_weight: float):
        super().__init__()
        self.block = block
        self.projection = projection
        self.route = route
        self.balance_weight = balance_weight
        self.routers = [module for module in block.modules() if isinstance(module, MoEGate)]

    def forward(self, stream: HiDreamStream) -> HiDreamStream:
        if self.route is None:
            own_BLD, onward = stream.last_BLD, ()
        else:
            own_BLD = self.projection(stream.llama3_BLD[self.route.own])
            onward = tuple(stream.llama3_BLD[index] for index in self.route.onward)
        active_routers = self.routers if self.training and self.balance_weight > 0 else []
        with capture_outputs(active_routers, balance_of) as balances:
            stream = self.advance(stream, own_BLD)
        terms_K = stream.terms_K + self.balance_weight * sum(balances) if balances else stream.terms_K
        return stream._replace(llama3_BLD=onward, terms_K=terms_K)

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        """The stream with what the block makes of it."""
        raise NotImplementedError


def balance_of(router: MoEGate, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The balance of a router's choice (`load_balancing`), from what it took (B, T, D) and gave. Its probabilities are
    computed once more, since it gives those of the chosen experts alone."""
    logits_TE = functional.linear(inputs[0].flatten(0, 1), router.weight)
    return load_balancing(logits_TE.softmax(dim=-1), output[0])


class DoubleBlock(Block):
    """A block in which picture and text have weights of their own."""

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        x_BTD, text_BLD = self.block(
            hidden_states=stream.x_BTD,
            hidden_states_masks=stream.mask_BT,
            encoder_hidden_states=torch.cat([stream.text_BLD, own_BLD], dim=1),
            temb=stream.time_BD,
            image_rotary_emb=stream.rope_1S1E22,
        )
        return stream._replace(x_BTD=x_BTD, text_BLD=text_BLD[:, : stream.text_BLD.shape[1]])


class SingleBlock(Block):
    """A block that sees picture and text in a row; the first joins them."""

    def advance(self, stream: HiDreamStream, own_BLD: torch.Tensor) -> HiDreamStream:
        x_BTD, mask_BT = stream.x_BTD, stream.mask_BT
        if stream.text_BLD is not None:
            x_BTD = torch.cat([x_BTD, stream.text_BLD], dim=1)
            if mask_BT is not None:
                texts = stream.text_BLD.shape[1] + own_BLD.shape[1]
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), texts)], dim=1)
        result_BTD = self.block(
            hidden_states=torch.cat([x_BTD, own_BLD], dim=1),
            hidden_states_masks=mask_BT,
            temb=stream.time_BD,
            image_rotary_emb=stream.rope_1S1E22,
        )
        return stream._replace(x_BTD=result_BTD[:, : x_BTD.shape[1]], text_BLD=None, mask_BT=mask_BT)


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w); in training with the loss of the experts beside it."""

    def __init__(self, denoiser: HiDreamImageTransformer2DModel):
        super().__init__()
        self.final_layer = denoiser.final_layer
        self.filled = denoiser.max_seq

    def forward(self, stream: HiDreamStream) -> torch.Tensor | Output:
        height, width, _ = stream.canvas_hw0.shape
        rows, columns = height // PATCH, width // PATCH
        tokens = rows * columns
        picture_BTD = stream.x_BTD[:, : tokens if stream.mask_BT is None else self.filled]
        x_BTC = self.final_layer(picture_BTD, stream.time_BD)[:, :tokens]
        latent = unpatchify(x_BTC, height, width)
        return Output(latent, stream.terms_K) if self.training else latent


class HiDreamPipeline(PicturePipeline):
    """HiDream-I1 of HiDream.ai: full, and dev and fast, which are distilled."""

    Options = HiDreamOptions
    objective = FlowMatching(predicts_data_minus_noise=True, time_scale=1000.0)
    blocks = ("double_stream_blocks", "single_stream_blocks")
    stream_type = HiDreamStream
    guided_by_second_prediction = True
    loss_terms = ("balance",)

    @cached_property
    def original_layout(self) -> KeyLayout:
        """ComfyUI's names are those of diffusers."""
        parameters = [name for name, _ in build_empty(self.build_denoiser).named_parameters()]
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        return KeyLayout([KeyRule(module, (module,)) for module in modules])

    def check(self) -> None:
        folder, llama_folder = self.options.diffusers_path, self.options.llama3_path
        check_folder_type(self.options)
        if problems := list(missing("[model] llama3_path", llama_folder)):
            raise UserError(problems)
        if llama_folder is not None and not llama_folder.is_dir():
            raise UserError.of(
                f"is the folder of Llama, with its tokenizer, and {llama_folder} is a file; weights in one file go "
                "into [model] text_encoders beside it",
                where="[model] llama3_path",
            )
        if llama_folder is None and not (folder / LLAMA_PARTS[0]).is_dir():
            raise UserError.of(
                f"is required: {folder} has no {LLAMA_PARTS[0]}, since HiDream comes without Llama. Give the folder of "
                "Llama 3.1 8B Instruct, with its tokenizer",
                where="[model] llama3_path",
            )
        parts = (*PARTS, *(LLAMA_PARTS if llama_folder is None else ()))
        check_diffusers_folder(self.options, parts, SINGLE_FILES, TEXT_ENCODERS)
        self._check_variant()
        self.check_tensors()

    def _check_variant(self) -> None:
        """Whether transformer, VAE and text encoders fit one another."""
        config, options = self._transformer_config, self.options
        of_llama, clips = self._llama_config, [clip_config(options.diffusers_path, part) for part, _ in CLIPS.values()]
        pooled, made = sum(clip["projection_dim"] for clip in clips), self.vae_config["latent_channels"]
        blocks, layers = config["num_layers"] + config["num_single_layers"], config["llama_layers"]
        positions = min(clip["max_position_embeddings"] for clip in clips)
        wrong = {
            f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give HiDream's own VAE": (
                config["in_channels"] != made
            ),
            f"has {blocks} blocks and {len(layers)} llama_layers; download it again": blocks != len(layers),
            f"reads layer {max(layers)} of Llama, whose layers are 0 to {of_llama['num_hidden_layers'] - 1}; give "
            "Llama 3.1 8B": max(layers) >= of_llama["num_hidden_layers"],
            f"takes states of {config['caption_channels'][1]} features and Llama has {of_llama['hidden_size']}; give "
            "Llama 3.1 8B": config["caption_channels"][1] != of_llama["hidden_size"],
            f"takes {config['text_emb_dim']} pooled features and CLIP-L and CLIP-G make {pooled}; give HiDream's own": (
                config["text_emb_dim"] != pooled
            ),
        }
        file = str(options.diffusers_path / "transformer" / "config.json")
        problems = [Problem(file, "", message) for message, holds in wrong.items() if holds]
        if options.max_sequence_length > positions:
            message = (
                f"CLIP has {positions} places, so {options.max_sequence_length} is too much; HiDream's own has 248"
            )
            problems.append(Problem("", "[model] max_sequence_length", message))
        if problems:
            raise UserError(problems)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        options, folder, length = self.options, self.options.diffusers_path, self.options.max_sequence_length
        width = read_config(folder, "text_encoder_3", model="t5", keys=["d_model"])["d_model"]
        t5 = (T5EncoderModel, folder, "text_encoder_3", "tokenizer_3", part_override(options, "t5"), self.dtype)
        used = tuple(sorted(set(self._transformer_config["llama_layers"])))
        states = (len(used), length, self._llama_config["hidden_size"])
        llama = (*self._llama_location, part_override(options, "llama3"), self.dtype)
        return [
            self.autoencoder(),
            *(self._clip(name) for name in CLIPS),
            TextEncoder("t5", *t5, MaskedT5Features(length), {"t5": (length, width)}),
            LlamaEncoder(
                "llama3",
                LlamaStates,
                *llama,
                StatesFeatures("llama3", length, used),
                {"llama3": states},
                four_bit=options.llama3_4bit,
            ),
        ]

    def _clip(self, name: str) -> TextEncoder:
        folder, (part, tokenizer) = self.options.diffusers_path, CLIPS[name]
        shapes = {f"{name}_pooled": (clip_config(folder, part)["projection_dim"],)}
        reads = ProjectedFeatures(f"{name}_pooled", self.options.max_sequence_length)
        source = (CLIPTextModelWithProjection, folder, part, tokenizer, part_override(self.options, name), self.dtype)
        return TextEncoder(name, *source, reads, shapes)

    def build_denoiser(self) -> HiDreamImageTransformer2DModel:
        # That switch would train neither experts nor routers.
        return HiDreamImageTransformer2DModel.from_config(self._transformer_config, force_inference_output=False)

    def to_layers(self, denoiser: HiDreamImageTransformer2DModel) -> list[nn.Module]:
        entry, *onward = routes(self._transformer_config["llama_layers"])
        own = [*zip(denoiser.caption_projection, onward, strict=False), (None, None)]
        blocks = [
            *((DoubleBlock, block) for block in denoiser.double_stream_blocks),
            *((SingleBlock, block) for block in denoiser.single_stream_blocks),
        ]
        weight = self.options.balance_loss_weight
        middles = [kind(block, *state, weight) for (kind, block), state in zip(blocks, own, strict=True)]
        return [Entry(denoiser, entry), *middles, Exit(denoiser)]

    def prepare_inputs(
        self, features: Features, x_t: torch.Tensor, t_B: torch.Tensor, guidance: float | None = None
    ) -> HiDreamInputs:
        batch, _, height, width = x_t.shape
        x_BTC = patchify(x_t)
        tokens, filled = x_BTC.shape[1], self._filled(height, width)
        states_BNLD, t5_BLD = features["llama3"], features["t5"]
        texts = t5_BLD.shape[1] + 2 * states_BNLD.shape[2]
        rows, columns = torch.arange(height // PATCH).float(), torch.arange(width // PATCH).float()
        positions_T3 = torch.cartesian_prod(torch.zeros(1), rows, columns)
        return HiDreamInputs(
            x_BTC=functional.pad(x_BTC, (0, 0, 0, filled - tokens)),
            mask_BT=(torch.arange(filled) < tokens).expand(batch, -1) if filled > tokens else None,
            # Text and what a picture is filled up with are at 0, 0.
            positions_1S3=functional.pad(positions_T3, (0, 0, 0, filled - tokens + texts))[None],
            t5_BLD=t5_BLD,
            llama3_BLD=states_BNLD.unbind(1),
            pooled_BP=torch.cat([features[f"{name}_pooled"] for name in CLIPS], dim=1),
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(height, width, 0),
        )

    def _filled(self, height: int, width: int) -> int:
        """How many image tokens the model sees of a latent of `height` x `width` cells. Filling up is no matter of
        speed: the values of such tokens are seen, though their keys are zero."""
        rows, columns = self._transformer_config["max_resolution"]
        tokens = (height // PATCH) * (width // PATCH)
        most = rows * columns // PATCH**2
        return max(tokens, most) if self.options.fill_up_pictures and height != width else tokens

    def scheduler(self) -> Any:
        file = self.options.diffusers_path / "scheduler" / "scheduler_config.json"
        name = read_json(file).get("_class_name")
        if name not in SCHEDULERS:
            raise UserError.of(f"is of {name}, and samples are drawn with {', '.join(SCHEDULERS)}", str(file))
        return SCHEDULERS[name].from_pretrained(file.parent)

    def sampling_levels(self, steps: int) -> None:
        return None

    @property
    def _llama_location(self) -> tuple[Path, str, str]:
        """Folder, part with the weights, and part with the tokenizer."""
        own = self.options.llama3_path
        return (own, "", "") if own else (self.options.diffusers_path, *LLAMA_PARTS)

    @property
    def _llama_config(self) -> dict[str, Any]:
        folder, part, _ = self._llama_location
        return read_config(folder, part, model="llama", keys=["hidden_size", "num_hidden_layers"])

    # Kept: every micro-batch asks for it.
    @cached_property
    def _transformer_config(self) -> dict[str, Any]:
        folder, model = self.options.diffusers_path, HiDreamImageTransformer2DModel.__name__
        return read_config(folder, "transformer", model=model, keys=CONFIG_KEYS)
