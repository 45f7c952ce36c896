"""What a run is made of on this process: everything that its loop and its duties share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from optimizers.averaging import weights_to_use
from optimizers.ema import EMA
from utils.dataset.samples import Bucket
from utils.parallel.engine import Engine
from utils.parallel.sharding import Shares
from utils.ranks import Ranks
from utils.run.attempts import reason_of
from utils.run.block_norms import BlockNorms
from utils.run.metrics import Metrics
from utils.run.out_of_memory import explaining
from utils.run.patience import Patience
from utils.run.report import RunPage
from utils.run.savings import Parallelism, Saving, ways_for
from utils.run.signals import StopRequested, StopRequests
from utils.run.webhook import Webhook
from utils.settings.schema import Settings


@dataclass(frozen=True)
class RunParts:
    """The parts of a run.

    Attributes:
        parameters: the trainable ones of this stage, by name.
        shares: which of the parameters `optimizer` has, and `ema`.
        folder: of the run.
        stop: whether this process was asked to stop; the ranks agree on it among themselves.
        ema: the averages of the parameters, if the run has any.
        tokens: the sizes of a sample and of its references -> its image tokens.
        norms: by block, if they are asked for.
        patience: which ends the run when evaluations gain nothing any more.
        webhook: whom the run tells how it does.
        page: which is written anew when there is something to look at.
        parallelism: for what is told where memory does not suffice.
    """

    settings: Settings
    ranks: Ranks
    engine: Engine
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    shares: Shares
    folder: Path
    metrics: Metrics
    stop: StopRequests
    ema: EMA | None = None
    tokens: Callable[[Sequence[Bucket]], int] = lambda shape: 0
    norms: BlockNorms | None = None
    patience: Patience = field(default_factory=Patience)
    webhook: Webhook = field(default_factory=Webhook)
    page: RunPage = field(default_factory=RunPage)
    parallelism: Parallelism = Parallelism(())

    def weights_to_use(self) -> AbstractContextManager[None]:
        """A context in which the parameters have the values that are to be used; see `optimizers/averaging.py`. All
        ranks enter it together."""
        return weights_to_use(self.optimizer, self.shares.held.values(), self.shares.show_values)

    def ways(self, what: str) -> list[Saving]:
        """What to set if the memory does not suffice for what is called so; see `ways_for`."""
        return ways_for(what, self.settings, self.parallelism)

    def telling(self, work: Callable[[], bool]) -> bool:
        """Does the work of the run, and tells of a failure that ends it, on the page and to the webhook."""
        self.stop.watch.tell_end = self._tell_failure
        watch = self.stop.watch
        try:
            with explaining(lambda: self.ways(watch.doing), self.folder, lambda: watch.doing):
                return work()
        except StopRequested:
            raise
        except Exception as error:
            self._tell_failure(self.stop.watch.verdict_behind(error) or reason_of(error))
            raise
        finally:
            self.webhook.finish()

    def _tell_failure(self, reason: str) -> None:
        self.page.tell_end(f"the run failed: {reason}")
        self.webhook.post("failure", reason=reason)
        self.webhook.finish()
