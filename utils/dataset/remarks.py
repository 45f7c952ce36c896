"""What is to be told about samples that can be used, but probably not as their owner meant them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from utils.dataset.batches import SMALLEST_AREA
from utils.dataset.captions import choice_in
from utils.dataset.encoders import Encoder, text_of
from utils.dataset.inputs import TEXT
from utils.dataset.manifest import Row
from utils.dataset.samples import Mask, Sample, SampleVersion
from utils.dataset.sources import Remark
from utils.media.colour_profiles import Colours
from utils.settings.dataset_schema import DatasetSettings, DirectorySettings

LIGHT_WEIGHT = 0.01
"""A sample whose weight is below this on average trains next to nothing."""
SAMPLES_BETWEEN_HEEDS = 1024
OWN_TOKENS = 8
"""More than tokenizers add to a text beyond what they add to an empty one."""
ALL_WHITE = 0.999
MOST_ENLARGED = 1.5
MOST_CUT_OFF = 0.5
AS_THEY_ARE: dict[Colours, str] = {
    "unknown": "its profile of colours cannot be used, and it is read as if it were of sRGB; save it without a profile",
    "inks": "it is CMYK without a profile that can be used, and is read by a plain formula, which makes colours "
    "stronger than they are in print; convert it to sRGB",
    "wide": "it has a high dynamic range or a wide gamut (HLG, PQ, BT.2020, P3), and is read as if it had not, which "
    "makes it pale; convert it to BT.709, as ffmpeg does with zscale and tonemap",
}


def remarks_on(
    rows: Sequence[Row], samples: Sequence[Sample], dataset: DatasetSettings, *, masks_weigh: bool = True
) -> list[Remark]:
    """All remarks on the rows of a dataset and on its samples, grouped by title.

    Args:
        masks_weigh: masks are weights of the loss; otherwise they say what the model makes anew.
    """
    rules = [dataset.resolved(directory) for directory in dataset.directory]
    return [
        *_used_as_pictures(rows),
        *_colours_as_they_are(rows),
        *_without_caption(rows, rules),
        *_wildcards(rows, rules),
        *(_without_weight(rows, rules) if masks_weigh else _of_regions(rows)),
        *_all_white(rows, rules, "pictures are trained whole" if masks_weigh else "nothing is kept"),
        *_enlarged(samples),
        *_cut_off(samples),
    ]


def nothing_is_weighed(rows: Sequence[Row], dataset: DatasetSettings) -> str:
    """Why the masks of a dataset leave nothing to train; "" if they do leave something."""
    rules = [dataset.resolved(directory) for directory in dataset.directory]
    if not rows or not all(row.mask and _weight(row, rules[row.directory]) < SMALLEST_AREA for row in rows):
        return ""
    first = rows[0].mask.media.locator
    return (
        f"all {len(rows)} masks are black, the first is {first}, so that nothing would be trained; white is what is "
        "trained, so turn them round, or leave masks out"
    )


def seen_in_training(training: Sequence[Sample], evaluation: Sequence[Sample]) -> list[Remark]:
    """The files of an evaluation set that are in the training set too, by their content."""
    trained = {sample.media.digest: sample.media.locator for sample in training}
    both = {sample.media.digest: sample.media.locator for sample in evaluation if sample.media.digest in trained}
    text = "is trained too, as {}, so that its loss says nothing about new pictures; keep it in one of the sets"
    return [Remark("in both sets", str(file), text.format(trained[digest])) for digest, file in both.items()]


def truncated(
    encoders: Sequence[Encoder], samples: Sequence[Sample], raise_if_stopping: Callable[[], None] = lambda: None
) -> list[Remark]:
    """The files whose captions are longer than one of the text encoders reads, once for each encoder.

    Args:
        encoders: all of a model's; those that cannot count tokens are passed over.
    """
    found: list[Remark] = []
    for encoder in encoders if samples else ():
        if not hasattr(encoder, "token_count"):
            continue
        limit, counts = encoder.token_limit, dict[str, int]()
        # No tokenizer makes more tokens than bytes. What is short is not counted: of millions, that takes minutes.
        short = limit - _tokens(encoder, samples[0], "") - OWN_TOKENS
        told: set[str] = set()
        for number, sample in enumerate(samples):
            if number % SAMPLES_BETWEEN_HEEDS == 0:
                raise_if_stopping()
            for caption in sample.captions:
                if len(caption.encode()) <= short:
                    continue
                if caption not in counts:
                    counts[caption] = _tokens(encoder, sample, caption)
                file = str(sample.media.locator)
                if counts[caption] > limit and file not in told:
                    told.add(file)
                    text = f"{encoder.name} reads {limit} of the {counts[caption]} tokens of {caption!r:.60}"
                    found.append(Remark("caption truncated", file, text))
    return found


def _tokens(encoder: Encoder, sample: Sample, caption: str) -> int:
    input_name = next(input_name for input_name in encoder.reads if input_name in TEXT)
    return encoder.token_count(text_of(SampleVersion(sample, sample.takes[0], caption, sample.id), encoder, input_name))


def _weight(row: Row, rules: DirectorySettings) -> float:
    """The mean weight of a row's loss under its mask, before it is divided by the mask's area."""
    return rules.unmasked_weight + (1 - rules.unmasked_weight) * row.mask.mean


def _used_as_pictures(rows: Sequence[Row]) -> Iterator[Remark]:
    for row in rows:
        if row.media.fault:
            yield Remark("used as a picture", str(row.media.locator), f"{row.media.fault}; its first frame is trained")


def _colours_as_they_are(rows: Sequence[Row]) -> Iterator[Remark]:
    for row in rows:
        for media in (row.media, *row.controls):
            if text := AS_THEY_ARE.get(media.colours):
                yield Remark("colours not converted", str(media.locator), text)


def _without_caption(rows: Sequence[Row], rules: Sequence[DirectorySettings]) -> Iterator[Remark]:
    for row in rows:
        if "" in row.captions and rules[row.directory].instance_prompt != "":
            yield Remark("without a caption", str(row.media.locator), "its caption is empty, and it is trained so")


def _wildcards(rows: Sequence[Row], rules: Sequence[DirectorySettings]) -> Iterator[Remark]:
    for row in rows:
        if rules[row.directory].enable_wildcard:
            continue
        if choice := next(filter(None, map(choice_in, row.captions)), None):
            text = f"its caption has {choice!r:.60}, which is trained as text; enable_wildcard = true draws one of them"
            yield Remark("wildcards as text", str(row.media.locator), text)


def _without_weight(rows: Sequence[Row], rules: Sequence[DirectorySettings]) -> Iterator[Remark]:
    for row in rows:
        own = rules[row.directory]
        if not row.mask or _weight(row, own) >= (SMALLEST_AREA if own.normalize_masked_area else LIGHT_WEIGHT):
            continue
        mask = "its opacity" if row.mask.is_alpha else f"its mask {row.mask.media.locator}"
        weight = f"{mask} is {row.mask.mean:.2%} on average, and white is 100%"
        yield Remark("next to no weight", str(row.media.locator), f"{weight}; white is what is trained")


def _of_regions(rows: Sequence[Row]) -> Iterator[Remark]:
    """Files of which all is made anew, or next to nothing, where masks say what is."""
    for row in rows:
        if not row.mask:
            yield Remark("without a mask", str(row.media.locator), "it has no mask, so that all of it is made anew")
        elif row.mask.mean < SMALLEST_AREA:
            mask = "its opacity" if row.mask.is_alpha else f"its mask {row.mask.media.locator}"
            text = f"{mask} is {row.mask.mean:.2%} on average; white is what is made anew, and the rest is kept"
            yield Remark("next to nothing made anew", str(row.media.locator), text)


def _all_white(rows: Sequence[Row], rules: Sequence[DirectorySettings], so_that: str) -> Iterator[Remark]:
    by_directory: dict[int, list[Mask]] = defaultdict(list)
    for row in rows:
        if row.mask:
            by_directory[row.directory].append(row.mask)
    for number, masks in by_directory.items():
        own = rules[number]
        # A default mask that is white says that the files without a mask are to be trained whole.
        default = own.default_mask_file and str(own.default_mask_file.absolute())
        is_given = any(mask.is_alpha or mask.media.locator.file != default for mask in masks)
        if is_given and all(mask.mean > ALL_WHITE for mask in masks):
            what = "no picture has transparency" if own.alpha_mask else f"all {len(masks)} masks are white"
            yield Remark("masks nothing", str(own.path), f"{what}, so that {so_that}")


def _enlarged(samples: Sequence[Sample]) -> Iterator[Remark]:
    told: set[str] = set()
    for sample in sorted(samples, key=lambda one: -one.bucket.pixels):
        media, bucket = sample.media, sample.bucket
        scale = max(bucket.width / media.width, bucket.height / media.height)
        if scale > MOST_ENLARGED and str(media.locator) not in told:
            told.add(str(media.locator))
            sizes = f"{media.width}x{media.height} pixels are enlarged {scale:.1f} times to {bucket}"
            yield Remark("enlarged", str(media.locator), f"{sizes}; no_upscale = true uses files at their own size")


def _cut_off(samples: Sequence[Sample]) -> Iterator[Remark]:
    told: set[str] = set()
    # Where a crop lies makes no difference, and of a million files few have sizes of their own.
    known: dict[tuple[int, int, int, int, bool], float] = {}
    for sample in samples:
        media, bucket, take = sample.media, sample.bucket, sample.takes[0]
        sizes = (media.width, media.height, bucket.width, bucket.height, take.crop == "none")
        if sizes not in known:
            left, top, right, bottom = take.view(bucket).box(media.width, media.height)
            known[sizes] = 1 - (right - left) * (bottom - top) / (media.width * media.height)
        lost = known[sizes]
        # Half is what a bucket of another shape may take of many pictures.
        if lost > MOST_CUT_OFF + 1e-6 and str(media.locator) not in told:
            told.add(str(media.locator))
            advice = "give it a bucket of its shape (enable_ar_bucket, min_ar, max_ar), or leave it out"
            text = f"{media.width}x{media.height} pixels lose {lost:.0%} to the crop of {bucket}; {advice}"
            yield Remark("mostly cut off", str(media.locator), text)
