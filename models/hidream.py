"""HiDream-I1, full, dev and fast: experts that a router chooses, and a different state of Llama for every block.

Shapes: B batch, T image tokens, L text tokens, S all positions (T, T5's and two states of Llama), N states of Llama,
P pooled text features, C channels of a token, D width, h w latent cells. From the first single block on, T also
counts the text, which follows the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from models.base import Features, ModelEncoder
from models.families.pictures import PicturePipeline
from models.foundation.checkpoints.configs import SCHEDULER_FILE, stock_scheduler
from models.foundation.checkpoints.folders import TextPart, check_folder_type
from models.foundation.checkpoints.key_layouts import KeyLayout, KeyRule
from models.foundation.checkpoints.weights import build_empty
from models.foundation.encoders.llama import LlamaEncoder, StatesFeatures
from models.foundation.encoders.text_features import MaskedT5Features, ProjectedFeatures
from models.foundation.layers.hidream import DoubleBlock, HiDreamStream, Route, SingleBlock, routes
from models.foundation.layers.patches import PATCH, patchify, unpatchify
from utils.diffusion.auxiliary import Output
from utils.diffusion.objectives import FlowMatching
from utils.errors import Problem, UserError
from utils.json_files import read_json
from utils.settings.model_schema import ModelSettings
from utils.settings.paths import missing
from utils.settings.values import Count, NotNegative, UserPath

if TYPE_CHECKING:
    from diffusers import HiDreamImageTransformer2DModel

TEXT_PARTS = (
    TextPart("clip_l", "CLIPTextModelWithProjection"),
    TextPart("clip_g", "CLIPTextModelWithProjection", "text_encoder_2", "tokenizer_2"),
    TextPart("t5", "T5EncoderModel", "text_encoder_3", "tokenizer_3"),
    TextPart("llama3", "LlamaModel", "text_encoder_4", "tokenizer_4"),
)
CLIPS = ("clip_l", "clip_g")
SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "UniPCMultistepScheduler")


class HiDreamOptions(ModelSettings):
    """`[model]` of `type = "hidream"`.

    `[sampling] guidance`: 5 is usual for full; dev and fast are distilled and take 1, which means no guidance.
    """

    llama3_path: UserPath | None = None
    """Folder of Llama 3.1 8B Instruct, with its tokenizer; default: `text_encoder_4` and `tokenizer_4` of
    `diffusers_path`, which HiDream's own folder lacks."""
    llama3_4bit: bool = False
    """Keep Llama in 4 bits while captions are encoded: 5 GB instead of 15. The same as `text_encoder_dtype = "nf4"` for
    Llama alone, whatever `text_encoder_dtype` says of the others."""
    max_sequence_length: Count = 128
    """Number of tokens of T5 and of Llama that the model sees, including padding."""
    balance_loss_weight: NotNegative = 0.01
    """Weight of the loss that makes the router choose the experts of a layer equally often; 0 for none. Evaluation does
    not include it."""
    fill_up_pictures: bool = True
    """Pad pictures that are not square to the number of tokens of 1024 x 1024, as diffusers does in inference,
    regardless of their size. ComfyUI does not; false is faster for small pictures."""


class HiDreamInputs(NamedTuple):
    """The inputs of the entry. `canvas_hw0` has no elements: its shape carries the latent's height and width."""

    x_BTC: torch.Tensor
    mask_BT: torch.Tensor | None
    positions_1S3: torch.Tensor
    t5_BLD: torch.Tensor
    llama3_BLD: tuple[torch.Tensor, ...]
    pooled_BP: torch.Tensor
    t_B: torch.Tensor
    canvas_hw0: torch.Tensor


class Entry(nn.Module):
    """Embeds tokens, time and positions. Its text consists of T5's features and Llama's state for the last block. Each
    stage makes the rotary table itself."""

    remakes = ("rope_1S1E22",)

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
            positions_1S3=inputs.positions_1S3,
            rope_1S1E22=self.pe_embedder(inputs.positions_1S3),
            terms_K=torch.zeros(1, device=weight.device),
            canvas_hw0=inputs.canvas_hw0,
        )

    def remake(self, stream: HiDreamStream) -> dict[str, Any]:
        """The fields that are not sent from stage to stage."""
        return {"rope_1S1E22": self.pe_embedder(stream.positions_1S3)}


class Exit(nn.Module):
    """Projects the image tokens to the latent (B, C, h, w); in training together with the loss of the experts."""

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
    denoiser_class = "HiDreamImageTransformer2DModel"
    config_keys = (
        "caption_channels",
        "in_channels",
        "llama_layers",
        "max_resolution",
        "num_layers",
        "num_single_layers",
        "text_emb_dim",
    )
    scheduler_sets_levels = True
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

    @property
    def text_parts(self) -> tuple[TextPart, ...]:
        *others, llama = TEXT_PARTS
        root = self.options.llama3_path
        return (*others, replace(llama, folder="", tokenizer="", root=root) if root else llama)

    def check_folder(self) -> None:
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
        part = self.parts.text_part("llama3").folder
        if llama_folder is None and not (folder / part).is_dir():
            raise UserError.of(
                f"is required: {folder} has no {part}, since HiDream comes without Llama. Give the folder of Llama 3.1 "
                "8B Instruct, with its tokenizer",
                where="[model] llama3_path",
            )
        super().check_folder()

    def problems_of_parts(self) -> Iterator[Problem]:
        config, llama, clips = (
            self.parts.denoiser_config,
            self.parts.text_config("llama3"),
            [*map(self.parts.text_config, CLIPS)],
        )
        pooled, made = sum(clip["projection_dim"] for clip in clips), self.vae_config["latent_channels"]
        blocks, layers = config["num_layers"] + config["num_single_layers"], config["llama_layers"]
        if len(config["caption_channels"]) != 2:
            yield self.parts.misfit("needs two `caption_channels`, for T5 and for Llama; download it again")
            return
        state_width = config["caption_channels"][1]
        if config["in_channels"] != made:
            yield self.parts.misfit(
                f"takes latents of {config['in_channels']} channels and the VAE makes {made}; give HiDream's own VAE"
            )
        if blocks != len(layers):
            yield self.parts.misfit(f"has {blocks} blocks and {len(layers)} llama_layers; download it again")
        if any(layer >= llama["num_hidden_layers"] for layer in layers):
            yield self.parts.misfit(
                f"reads layer {max(layers)} of Llama, whose layers are 0 to {llama['num_hidden_layers'] - 1}; give "
                "Llama 3.1 8B"
            )
        if state_width != llama["hidden_size"]:
            yield self.parts.misfit(
                f"takes states of {state_width} features and Llama has {llama['hidden_size']}; give Llama 3.1 8B"
            )
        if config["text_emb_dim"] != pooled:
            yield self.parts.misfit(
                f"takes {config['text_emb_dim']} pooled features and CLIP-L and CLIP-G make {pooled}; give HiDream's "
                "own"
            )
        length, places = self.options.max_sequence_length, min(clip["max_position_embeddings"] for clip in clips)
        if length > places:
            message = f"CLIP has {places} positions, so {length} is too much; HiDream's own has 248"
            yield Problem("", "[model] max_sequence_length", message)

    def encoders(self, controls: int = 0) -> list[ModelEncoder]:
        length, used = self.options.max_sequence_length, sorted(set(self.parts.denoiser_config["llama_layers"]))
        states = StatesFeatures("llama3", length, tuple(used))
        return [
            self.autoencoder(),
            *(self.parts.text_encoder(ProjectedFeatures(f"{name}_pooled", length)) for name in CLIPS),
            self.parts.text_encoder(MaskedT5Features(length)),
            self.parts.text_encoder(states, LlamaEncoder, kept="nf4" if self.options.llama3_4bit else None),
        ]

    def build_denoiser(self) -> HiDreamImageTransformer2DModel:
        # With that switch neither experts nor routers would be trained.
        return self.parts.made_denoiser(force_inference_output=False)

    def to_layers(self, denoiser: HiDreamImageTransformer2DModel) -> list[nn.Module]:
        entry, *onward = routes(self.parts.denoiser_config["llama_layers"])
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
            # Text and the padding of a picture have the position 0, 0.
            positions_1S3=functional.pad(positions_T3, (0, 0, 0, filled - tokens + texts))[None],
            t5_BLD=t5_BLD,
            llama3_BLD=states_BNLD.unbind(1),
            pooled_BP=torch.cat([features[f"{name}_pooled"] for name in CLIPS], dim=1),
            t_B=self.objective.model_time(t_B),
            canvas_hw0=torch.empty(height, width, 0),
        )

    def _filled(self, height: int, width: int) -> int:
        """The number of image tokens that the model sees for a latent of `height` x `width` cells. The padding matters:
        the values of padding tokens take part in attention, although their keys are zero."""
        rows, columns = self.parts.denoiser_config["max_resolution"]
        tokens = (height // PATCH) * (width // PATCH)
        most = rows * columns // PATCH**2
        return max(tokens, most) if self.options.fill_up_pictures and height != width else tokens

    def scheduler(self) -> Any:
        file = self.options.diffusers_path / SCHEDULER_FILE
        name = read_json(file, kinds={"_class_name": str}).get("_class_name")
        if name not in SCHEDULERS:
            raise UserError.of(f"is of {name}, and samples are drawn with {', '.join(SCHEDULERS)}", str(file))
        return stock_scheduler(self.options.diffusers_path, name)
