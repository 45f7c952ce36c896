"""What a model is conditioned with beside its text: pictures and clips, and frames that it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from models.contract.files import ModelFiles
from utils.dataset.encoders import Encoder
from utils.errors import UserError
from utils.settings.dataset_schema import ControlFit


class Conditions(ModelFiles):
    """The conditions of a model; by default none.

    Attributes:
        starts_from_picture: whether it makes clips, or layers, from a picture, which in training is the sample's own; a
            property if the model's files decide.
        ends_in_picture: whether clips that start from a picture also end in one, the second of a prompt, which in
            training is the clip's last frame; a property if files or options decide.
        follows_clip: whether its first control image may be a clip, as long as the sample's.
        frame_groups: frames of a clip -> how many of them each latent frame covers, for masks, 0 for one that covers
            the frame with which the next one begins; None if the first one covers the first frame alone, and each of
            the others as many as the next.
        control_fit: how the control images of prompts are brought to the sample's shape, as in a dataset; a property if
            options decide.
        masks_weigh: whether masks of the data weigh the loss; otherwise they say what of the first control image is
            made anew, and prompts may have one too; a property if options decide.
        max_controls: the largest number of control images with which it is conditioned.
    """

    starts_from_picture: bool = False
    ends_in_picture: bool = False
    follows_clip: ClassVar[bool] = False
    frame_groups: Callable[[int], Sequence[int]] | None = None
    control_fit: ControlFit = None
    masks_weigh: bool = True
    max_controls: ClassVar[int] = 0

    def encoders_for(self, controls: int) -> list[Encoder]:
        """`encoders`, for a dataset with this many control images per sample.

        Raises:
            UserError: this model takes fewer.
        """
        if controls > self.max_controls:
            raise UserError.of(
                f"this model takes {self.max_controls or 'no'} control images, and there are {controls}; leave "
                "control_path or data_file_keys out, or some of them",
                where="[[directory]]",
            )
        return self.encoders(controls)

    def given_frames(self, latent_shape: Sequence[int], quantile: float) -> int:
        """How many of the first frames of a clip's latent (C, f, h, w) the model is trained to go on from: it receives
        them without noise, as `given_frames` among the features of `prepare_inputs`, and they do not count in the loss.

        Args:
            quantile: a number in [0, 1), drawn for the sample.
        """
        return 0

    def sections(self, latent_shape: Sequence[int]) -> Sequence[range]:
        """The sections of a clip's latent (C, f, h, w) that the model makes one after the other, all of one length, as
        ranges of its frames in the order in which they are made; none for a model that makes a clip at once.

        In training one is drawn for each sample, and the loss counts its frames alone. `prepare_inputs` is told where
        it begins, as `section` (B,) among the features. The prediction is as long as the clip, with zeros for all other
        frames, so that the steps of a sample leave these as they are.
        """
        return ()

    def made_at_once(self, latent_shape: Sequence[int]) -> Sequence[int]:
        """The shape of what the model makes at once of a latent (C, ...): a section, or all of it."""
        sections = self.sections(latent_shape)
        if not sections:
            return latent_shape
        channels, _, *size = latent_shape
        return channels, len(sections[0]), *size
