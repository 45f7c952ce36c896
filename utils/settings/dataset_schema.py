"""Every key of a dataset file, with its type, its default and what it does.

A key may stand at the top of the file, for all directories, or in a `[[directory]]`, for that one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from utils.settings.values import (
    AspectRatio,
    Count,
    Natural,
    Part,
    Positive,
    Resolution,
    SettingsTable,
    Share,
    SizeBucket,
    UserPath,
    or_else,
)

ControlFit = Literal["crop", "stretch", "pad"] | None
ControlPaths = Annotated[
    UserPath | Annotated[list[UserPath], Field(min_length=1)],
    or_else("must be a path in quotes, or an array of paths"),
]
Jitter = Annotated[tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]], Field(strict=False)]


class DataKeys(SettingsTable):
    """The keys that a dataset file may give to all of its directories, and each directory to itself."""

    # Sizes.
    resolutions: list[Resolution] = []
    """Sizes that each sample is used at: a side stands for the area of that square; or [width, height], of which aspect
    ratio buckets take the area."""
    enable_ar_bucket: bool = False
    """Keep pictures near their own shape instead of cropping all to one shape."""
    min_ar: Positive = 0.5
    """Narrowest bucket: width / height."""
    max_ar: Positive = 2.0
    """Widest bucket: width / height."""
    num_ar_buckets: Count = 7
    """Number of buckets from `min_ar` to `max_ar`, evenly spaced in logarithm."""
    ar_buckets: list[AspectRatio] | None = None
    """The buckets themselves, as width / height or [width, height]; excludes the three keys above."""
    size_buckets: list[SizeBucket] | None = None
    """Complete buckets as [width, height, frames]; excludes `resolutions` and the aspect ratio keys."""
    frame_buckets: list[Count] = [1]
    """Numbers of frames that clips are cut to; 1 is a still picture."""
    min_resolution: Count | None = None
    """Skip files with fewer pixels than the square of this side."""
    max_resolution: Count | None = None
    """Skip files with more pixels than the square of this side."""
    no_upscale: bool = False
    """Do not enlarge files: if a resolution has more pixels than a file, use the file at its own size."""
    crop: Literal["center", "random", "none"] = "center"
    """How a file that does not have the shape of its bucket is cropped: at its centre, at a random position for each of
    `augment_variants`, or not at all, which changes its proportions."""

    # Variants.
    augment_variants: Count = 1
    """Versions of each file that are cached, with other crops, flips, colours and clips; one of them is drawn an
    epoch."""
    flip: bool = False
    """Mirror about half of the `augment_variants`."""
    color_jitter: Jitter | None = None
    """Change brightness, contrast, saturation and hue of the `augment_variants` by up to these shares, as in
    [0.1, 0.1, 0.1, 0.02]."""

    # Clips.
    framerate: Positive | None = None
    """Frames per second of clips; default: the model's."""
    video_clip_mode: Literal["single_beginning", "single_middle", "single_random", "multiple_overlapping", "chunks"] = (
        "single_beginning"
    )
    """Which clips are taken from a video: one from its beginning, from its middle or from a random position; as many
    overlapping ones as cover all of it; or consecutive ones without the rest at the end."""

    # Captions.
    caption_source: Literal["auto", "file", "filename", "foldername"] = "auto"
    """Where captions come from: a file beside each picture or the table that lists them, the name of the file, or of
    its folder. `auto` is `file`."""
    caption_extension: str = ".txt"
    """Ending of the caption files."""
    instance_prompt: str | None = None
    """One caption for all files, instead of their own."""
    multiple_captions: Literal["random", "first", "all"] = "random"
    """How several captions of a file are used: draw one each epoch, use the first, or make each a separate sample."""
    caption_prefix: str = ""
    """Text before every caption."""
    caption_suffix: str = ""
    """Text after every caption."""
    trigger_word: str | None = None
    """Word that is put first, with a comma, into each caption that does not contain it."""
    cache_shuffle_num: Natural = 0
    """Cache this many versions of each caption with shuffled tags, and draw one each epoch; 0: as written."""
    cache_shuffle_delimiter: Annotated[str, Field(min_length=1)] = ", "
    """Separator of tags."""
    keep_tokens: Natural = 0
    """Number of tags at the beginning that stay where they are."""
    keep_tokens_separator: str | None = None
    """Text before which all tags stay where they are, as in `|||`; it is taken out."""
    shuffle_capitalization: Annotated[Share, BeforeValidator(lambda value: 0.0 if value is False else value)] = 0.0
    """Probability for each tag that its capitals are drawn anew: all small, first letter, each word, all capitals."""
    tag_dropout: Share = 0.0
    """Probability that a tag is dropped; tags that are kept in place stay."""
    enable_wildcard: bool = False
    """Read {red|green} as a choice, of which each version of a caption has one, and of several lines one. Choices may
    be nested; {{red|green}} is text. Eight versions are cached, or `cache_shuffle_num`."""
    weighted_tags: bool = False
    """Read (word:1.3) as emphasis, for the text encoders that can be given weights."""
    uncond_fraction: Part = 0.0
    """Fraction of the draws in which the caption is dropped, so that guidance has something to compare with."""
    uncond_fraction_per_encoder: dict[str, Part] = {}
    """The same for one text encoder by its name, each drawn on its own, as in { t5 = 0.1, clip = 0.1 }."""
    uncond_every_n_epochs: Count | None = None
    """Drop all captions in every n-th epoch."""

    # Masks, controls, weights.
    alpha_mask: bool = False
    """Weigh the loss by the opacity of pictures with transparency."""
    default_mask_file: UserPath | None = None
    """Mask of the files that have none of their own; it is scaled to the shape of each."""
    unmasked_weight: Part = 0.0
    """Weight of the loss where a mask is black."""
    normalize_masked_area: bool = False
    """Divide the loss by the mask's share of the picture, so that small masks count as much as large ones."""
    mask_probability: Part = 1.0
    """Fraction of the draws in which the mask is applied."""
    control_resolution: Count | None = None
    """Side of the square whose area control images are brought to, in the shape of their target; default: the size of
    the target."""
    control_fit: ControlFit = None
    """How control images that are views of their own are brought to the shape of their target: cropped on their own,
    scaled regardless of their proportions, or whole on white. Default: they lie on their target, are cropped where it
    is, and must have its proportions."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor on the loss of these samples."""
    is_regularisation_data: bool = False
    """These samples preserve the model: each epoch uses them as often as all others together, regardless of their
    number; often with a `loss_weight` below 1."""

    # How often, and when.
    num_repeats: Positive = 1
    """Number of times that each sample is used per epoch; 0.5 uses half of them, and the other half in the next
    epoch."""
    start_epoch: Count = 1
    """First epoch in which these samples are used, counted from 1."""
    end_epoch: Count | None = None
    """Last epoch in which they are used."""
    start_step: Natural = 0
    """Use them in epochs that begin after this many steps or more."""
    end_step: Count | None = None
    """Use them in epochs that begin before this many steps."""

    # What is read.
    recursive: bool = False
    """Also search subfolders."""
    file_column: str | None = None
    """Column of a metadata table with the file; default: one of the usual names."""
    caption_column: str | None = None
    """Column with the caption; default: one of the usual names."""
    image_column: str | None = None
    """Column of a Parquet or Arrow table with the bytes of the picture; default: one of the usual names."""
    data_file_keys: list[str] = []
    """Columns of a metadata table, or endings of the members of a tar, with control images, in their order."""
    filter: str | None = None
    """Use only the rows of a table for which this holds, as in `width >= 512 and aesthetic > 5`."""
    deduplicate: bool = False
    """Use each picture once, even if several rows contain it."""


class DirectorySettings(DataKeys):
    """`[[directory]]`: one folder or file of the data."""

    path: UserPath
    """Folder of pictures and clips; or a table of them (.csv, .json, .jsonl, .parquet, .arrow), or a .tar; a folder may
    have captions.json or a metadata table in it, or hold .tar, .parquet or .arrow files."""
    control_path: ControlPaths | None = None
    """Folder of control images of the same names as the files in `path`, or several folders, for several controls."""
    mask_path: UserPath | None = None
    """Folder of masks of the same names: white is trained, black is not; or, for VACE with `mask_means = "made_anew"`,
    white is made anew and black is kept."""

    @property
    def control_paths(self) -> list[Any]:
        """The control folders, none to several."""
        if self.control_path is None:
            return []
        return self.control_path if isinstance(self.control_path, list) else [self.control_path]


# A directory that sets one of the keys on the right has chosen against the file's value on the left.
_REPLACED_BY = {
    "size_buckets": {"resolutions"},
    "ar_buckets": {"min_ar", "max_ar", "num_ar_buckets"},
    "instance_prompt": {"caption_source"},
}


class DatasetSettings(DataKeys):
    """A dataset file: what a run's `dataset` and the `config` of `eval_datasets` name."""

    cache_dir: UserPath | None = None
    """Folder of encoded samples, which all runs may share; default: `cache` in the run's `output_dir`."""
    cache_keep_days: Annotated[float, Field(ge=0)] = 7
    """Days for which encoded samples stay that no run wants any more, so that a trial at another size costs nothing;
    0: until they are more than half of the cache."""
    cache_keep_gb: Annotated[float, Field(ge=0)] = 50
    """The most that these may take, in GB of 1e9 bytes; the latest stay."""
    directory: Annotated[list[DirectorySettings], Field(min_length=1)]
    """The folders of the data: one `[[directory]]` table each."""

    def resolved(self, directory: DirectorySettings) -> DirectorySettings:
        """`directory` with the file's values for the keys that it does not set itself."""
        own = directory.model_fields_set
        replaced = {key for key, by in _REPLACED_BY.items() if by & own}
        inherited = (self.model_fields_set & DataKeys.model_fields.keys()) - own - replaced
        return directory.model_copy(update={key: getattr(self, key) for key in inherited})
