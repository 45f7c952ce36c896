"""How a model draws the samples of a run: which, from what features, and with what."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from models.assembly.prompts import (
    PICTURES,
    encoders_of_prompts,
    pictures_a_prompt,
    prompt_encoders,
    prompt_versions,
    schedule_of,
)
from models.assembly.sample_checks import check_requests, tell_long_prompts, tell_remarks
from models.base import BasePipeline
from utils.dataset.batches import SampleReader, pad_ragged
from utils.dataset.encoders import Encoder, applies_to, inputs_of, item_key
from utils.dataset.encoding import features_of
from utils.dataset.samples import SampleVersion
from utils.device_memory import lacks_memory
from utils.errors import UserError
from utils.ranks import Ranks, any_rank, gather
from utils.run.attempts import is_expected, let_go, reason_of
from utils.run.clip_score import ClipScore
from utils.run.sampling import Drawing, SampleModel
from utils.run.signals import StopRequested
from utils.settings.prompt_files import parse, text_of
from utils.settings.sample_requests import SampleRequest, requests_of
from utils.settings.schema import Settings

logger = logging.getLogger(__name__)


def give_back_memory(device: torch.device) -> None:
    """Lets go of what torch's allocator keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class PromptFeatures:
    """The features of prompts: from the cache; or encoded here, and kept in memory, where the cache has none.

    Args:
        encoders: those that read prompts.
        cached: versions of prompts that the cache has.
    """

    def __init__(
        self,
        encoders: Sequence[Encoder],
        cache_dir: Path,
        device: torch.device,
        cached: Iterable[SampleVersion] = (),
    ) -> None:
        self.encoders, self.device = encoders, device
        self._cache_dir = cache_dir
        self._cached = {self._key(version) for version in cached}
        self._kept: dict[tuple[str, ...], dict[str, torch.Tensor]] = {}

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(self.encoders, self._cache_dir)

    def of(self, version: SampleVersion) -> Mapping[str, torch.Tensor]:
        """Those of a version, each (1, ...), on the CPU."""
        kept = self._kept.get(self._key(version))
        if kept is None:
            return self._reader.batch([version]).features
        return {name: pad_ragged([tensor]) for name, tensor in kept.items()}

    def encode(self, versions: Iterable[SampleVersion]) -> None:
        """Encodes what is neither cached nor kept, and forgets what is no more among the versions. Each encoder is
        loaded once, and freed before the next one comes."""
        keyed = {self._key(version): version for version in versions}
        kept = {key: features for key, features in self._kept.items() if key in keyed}
        missing = {key: version for key, version in keyed.items() if key not in self._cached and key not in kept}
        made: dict[tuple[str, ...], dict[str, torch.Tensor]] = {key: {} for key in missing}
        for encoder in self.encoders:
            wanted = {key: version for key, version in missing.items() if applies_to(encoder, version.sample)}
            if wanted:
                self._encode(encoder, wanted, made)
        self._kept = kept | made

    def _encode(self, encoder: Encoder, wanted: Mapping, made: Mapping) -> None:
        try:
            self._encode_on(self.device, encoder, wanted, made)
            return
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            # Beside what is trained there may be no room for it, and prompts are few.
            logger.info("%s has no room on the device, and reads prompts on the processor", encoder.name)
        # Behind the `except`, which holds what the attempt has made: quantised weights are made on the device.
        give_back_memory(self.device)
        self._encode_on(torch.device("cpu"), encoder, wanted, made)

    def _encode_on(self, device: torch.device, encoder: Encoder, wanted: Mapping, made: Mapping) -> None:
        try:
            encoder.load(device)
            with torch.no_grad():
                for key, version in wanted.items():
                    made[key].update(features_of({"": inputs_of(encoder, version)}, encoder)[""])
        finally:
            encoder.unload()
            give_back_memory(self.device)

    def _key(self, version: SampleVersion) -> tuple[str, ...]:
        return tuple(item_key(encoder, version) for encoder in self.encoders if applies_to(encoder, version.sample))


class Drawings:
    """The samples that a run draws, which a file of prompts may change between two times.

    Args:
        encoders: of the model, which nothing else uses at the same time.
        in_cache: whether the cache has the features of the prompts with which the run begins.
    """

    def __init__(
        self,
        pipeline: BasePipeline,
        encoders: Sequence[Encoder],
        settings: Settings,
        ranks: Ranks,
        cache_dir: Path,
        *,
        in_cache: bool = True,
    ) -> None:
        self.pipeline, self.settings, self.ranks = pipeline, settings, ranks
        self.encoders, self.file = encoders, settings.sampling.prompt_file
        requests = requests_of(settings.sampling, pipeline.guided_by_second_prediction)
        self.pictures, self._times = pictures_a_prompt(requests), 0
        self._text = settings.sampling.from_file.text if self.file else None
        readers = {True: encoders_of_prompts(encoders, requests), False: prompt_encoders(encoders)}
        asked = self._asked(requests)
        self._features = {
            sees: PromptFeatures(
                reader, cache_dir, ranks.device, [v for v, of in asked if of == sees] if in_cache else ()
            )
            for sees, reader in readers.items()
        }
        self._requests, self._drawings = requests, None

    def now(self) -> Sequence[Drawing]:
        """What is to be drawn; see `SampleModel.drawings`."""
        if self._drawings is None:
            self._drawings = self._made(self._requests)
        if self.file:
            self._read_anew()
        return self._drawings

    def _made(self, requests: Sequence[SampleRequest]) -> list[Drawing]:
        """What draws the samples, the features of this process's among them encoded."""
        reads = self.ranks.is_first_stage or self.pipeline.starts_from_picture
        asked = self._asked(requests[self.ranks.data_rank :: self.ranks.data_ranks] if reads else ())
        for sees, features in self._features.items():
            features.encode(version for version, of in asked if of == sees)
        return [self._drawing(request) for request in requests]

    def _asked(self, requests: Sequence[SampleRequest]) -> list[tuple[SampleVersion, bool]]:
        """What is read for each prediction of some samples, and whether it sees the pictures."""
        return [one for request in requests for one in self._versions(request)]

    def _versions(self, request: SampleRequest) -> list[tuple[SampleVersion, bool]]:
        prompt, *negative = prompt_versions(self.pipeline, request.settings)
        contrasts = self.pipeline.contrasts(len(request.control_images)) if negative else ()
        return [(prompt, True), *((*negative, sees) for sees in contrasts)]

    def _drawing(self, request: SampleRequest) -> Drawing:
        one, versions = request.settings, self._versions(request)
        latent_shape = self.pipeline.latent_shape(one.width, one.height, one.frames)
        sections = self.pipeline.sections(latent_shape)
        return Drawing(
            request,
            features=lambda: [self._features[sees].of(version) for version, sees in versions],
            predictions=len(versions),
            latent_shape=latent_shape,
            schedule=schedule_of(self.pipeline, one),
            passes=[{"section": torch.tensor([section.start])} for section in sections] or ({},),
        )

    def _read_anew(self) -> None:
        """Takes the samples of the file as it is now. If something is wrong with it, that is told, and the last good
        ones stay; all ranks do the same."""
        self._times += 1
        tag = f"prompts/{self._times}"
        text, reason = gather(self.ranks, tag, self._text_now() if self.ranks.is_main else None)[0]
        if reason is None and text == self._text:
            return
        error = None
        if reason is None:
            try:
                file = parse(self.file, text)
                requests = requests_of(self.settings.sampling, self.pipeline.guided_by_second_prediction, file)
                self._check(requests)
                drawings = self._made(requests)
            except StopRequested:
                raise
            except Exception as caught:
                let_go(caught)
                error = caught
            if any_rank([error is not None])[0]:
                reasons = gather(self.ranks, f"{tag}/failed", error and reason_of(error))
                reason = next(one for one in reasons if one is not None)
        if reason is None:
            self._requests, self._drawings, self._text = requests, drawings, text
        if self.ranks.is_main:
            if error is not None and not is_expected(error):
                logger.error("%s:", self.file, exc_info=error)
            if reason is None:
                logger.info("prompts are read anew from %s: there are %d samples now", self.file, len(drawings))
                tell_remarks(self.pipeline, file)
                tell_long_prompts(self.encoders, requests, self.pipeline)
            else:
                logger.error("%s cannot be used, and the samples stay those before: %s", self.file, reason)

    def _text_now(self) -> tuple[str | None, str | None]:
        """What the file says, or why it cannot be read."""
        try:
            return text_of(self.file), None
        except UserError as error:
            return None, reason_of(error)

    def _check(self, requests: Sequence[SampleRequest]) -> None:
        check_requests(self.pipeline, requests, has_adapter=self.settings.adapter is not None)
        if (given := pictures_a_prompt(requests)) != self.pictures:
            raise UserError.of(f"gives {given} per prompt, and the run began with {self.pictures}", where=PICTURES)


def sample_model(
    pipeline: BasePipeline,
    encoders: Sequence[Encoder],
    settings: Settings,
    ranks: Ranks,
    cache_dir: Path,
    *,
    in_cache: bool = True,
) -> SampleModel:
    """How to draw this model's samples; see `Drawings`."""
    autoencoder = encoders[0]
    drawings = Drawings(pipeline, encoders, settings, ranks, cache_dir, in_cache=in_cache)

    def decode(latents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # The VAE comes beside the training's state: it gets the room that the allocator keeps, and gives it back.
        give_back_memory(ranks.device)
        autoencoder.load(ranks.device)
        try:
            return [autoencoder.decode(one)[0].cpu() for one in latents]
        finally:
            autoencoder.unload()
            give_back_memory(ranks.device)

    clip = settings.sampling.clip_path
    return SampleModel(
        drawings=drawings.now,
        prepare=pipeline.prepare_inputs,
        for_scheduler=pipeline.objective.for_scheduler,
        guided=pipeline.guided,
        before=pipeline.before_steps,
        after=pipeline.after_steps,
        features_everywhere=pipeline.starts_from_picture,
        noise_dtype=torch.float32 if pipeline.noise_in_float32 else pipeline.dtype,
        fps=pipeline.media.fps,
        decode=decode,
        name=base_name(pipeline),
        score=ClipScore(clip, ranks.device) if clip else None,
    )


def base_name(pipeline: BasePipeline) -> str:
    """What the weights are called on disk from which the run begins."""
    options = pipeline.options
    if options.transformer_path:
        return Path(pipeline.parts.denoiser_path).name
    return options.architecture or options.diffusers_path.resolve().name
