"""Qwen3-VL as a text encoder for captions together with pictures.

Shapes: L tokens, F features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image

from models.foundation.checkpoints.configs import PROCESSOR_KINDS
from models.foundation.checkpoints.headers import fingerprint
from models.foundation.encoders.first_frame import processor_of
from models.foundation.encoders.qwen3_vl import Qwen3VLStates
from models.foundation.encoders.qwen_vl import PICTURE, PROCESSOR
from models.foundation.encoders.text import TextEncoder
from utils.errors import UserError
from utils.json_files import read_json, require

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

BEFORE, BEHIND = "<|vision_start|>", "<|vision_end|>"
"""The tokens around a picture."""
CLIP = "<|video_pad|>"
"""The token of a clip."""
OF_CLIPS = "video_preprocessor_config.json"
"""How clips are prepared, beside what says it of pictures."""
COLOURS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""Of red, green and blue, where that does not say."""


class Qwen3VLPictureEncoder(TextEncoder):
    """Qwen3-VL as an `Encoder` of a caption and of pictures, which it sees with the settings in the folder's
    `processor`. Subclasses say which, and how they stand beside the caption.

    Args:
        others, further: as of `TextEncoder`; the features are `Qwen3VLStates`.
    """

    sees_pictures = True
    features: Qwen3VLStates

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(super().fingerprint, self.folder / PROCESSOR)

    @cached_property
    def processor(self) -> Qwen2VLImageProcessorPil:
        """The processor that turns pictures into patches.

        Raises:
            UserError: its settings are missing or damaged.
        """
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        return processor_of(self.folder / PROCESSOR, Qwen2VLImageProcessorPil)

    def check(self) -> None:
        super().check()
        assert self.processor
        config = self.config()
        known = {
            PICTURE: config.image_token_id,
            CLIP: config.video_token_id,
            BEFORE: config.vision_start_token_id,
            BEHIND: config.vision_end_token_id,
        }
        for token, number in known.items():
            if self.tokenizer.convert_tokens_to_ids(token) != number:
                raise UserError.of(
                    f"this tokenizer knows another {token} than the encoder in {self.subfolder}, or none; take the "
                    "model's own",
                    str(self.tokenizer_folder),
                )

    @property
    def side(self) -> int:
        """How many pixels of a side a token of a picture covers."""
        return self.processor.patch_size * self.processor.merge_size

    def patches(self, pictures: Sequence[Image.Image]) -> tuple[Mapping[str, torch.Tensor], list[int]]:
        """What the encoder is shown of pictures, and how many tokens each has."""
        patches = self.processor(images=list(pictures), return_tensors="pt")
        counts = (patches.image_grid_thw.prod(dim=1) // self.processor.merge_size**2).tolist()
        return {"pixel_values": patches.pixel_values, "image_grid_thw": patches.image_grid_thw}, counts

    def clip_patches(self, clips: Sequence[Sequence[Image.Image]]) -> tuple[Mapping[str, torch.Tensor], list[int]]:
        """What the encoder is shown of the frames of clips, as they are, and how many tokens each pair of frames has. A
        frame without another one after it is a pair with itself (transformers' processor of clips, which needs
        torchvision)."""
        values, grids, pair = [], [], self.processor.temporal_patch_size
        colours = {name: self._of_clips.get(name, default) for name, default in COLOURS.items()}
        for frames in clips:
            patches = self.processor(images=list(frames), do_resize=False, return_tensors="pt", **colours)
            _, rows, columns = patches.image_grid_thw[0].tolist()
            # A picture is a frame that does not move.
            how = {"t": len(frames), "c": len(COLOURS["image_mean"]), "k": pair}
            still_TNCP = rearrange(patches.pixel_values, "(t n) (c k p) -> k t n c p", **how)[0]
            alone = -len(frames) % pair
            still_TNCP = torch.cat([still_TNCP, still_TNCP[-1:].expand(alone, -1, -1, -1)])
            values.append(rearrange(still_TNCP, "(t k) n c p -> (t n) (c k p)", k=pair))
            grids.append([len(still_TNCP) // pair, rows, columns])
        shown = {"pixel_values_videos": torch.cat(values), "video_grid_thw": torch.tensor(grids)}
        return shown, [rows * columns // self.processor.merge_size**2 for _, rows, columns in grids]

    @cached_property
    def _of_clips(self) -> dict[str, Any]:
        """The settings by which clips are prepared."""
        return read_json(self.folder / PROCESSOR / OF_CLIPS, kinds=PROCESSOR_KINDS)

    def clip_size(self, width: int, height: int, frames: int) -> tuple[int, int]:
        """The width and height in pixels at which it sees so many frames of a clip of this size.

        Raises:
            UserError: the folder does not say.
        """
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        size = self._of_clips.get("size", {})
        require(size, ("shortest_edge", "longest_edge"), str(self.folder / PROCESSOR / OF_CLIPS), where="size")
        limits = size["shortest_edge"], size["longest_edge"]
        seen = smart_resize(frames, height, width, self.processor.temporal_patch_size, self.side, *limits)
        return seen[1], seen[0]

    def states(self, row: Sequence[int], shown: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The features (L, F) of a row of tokens with those of pictures and clips, of which the encoder is shown
        patches, and their grids."""
        config, tokens_1L = self.model.config, torch.tensor([row]).to(self.model.device)
        dtypes = {name: self.dtype if name.startswith("pixel_values") else None for name in shown}
        states = self.features.states(
            self.model,
            tokens_1L,
            attention_mask=torch.ones_like(tokens_1L),
            # Without it transformers numbers the tokens of a picture like words.
            mm_token_type_ids=(tokens_1L == config.image_token_id) + 2 * (tokens_1L == config.video_token_id).int(),
            **{name: one.to(self.model.device, dtypes[name]) for name, one in shown.items()},
        )
        return self.features.joined(states)[0]
