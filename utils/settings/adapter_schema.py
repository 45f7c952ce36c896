"""The keys of `[adapter]` that all kinds of adapters share; a kind's own are a subclass, in its file of
`utils/adapters/`.

The documentation and the JSON schemas are generated from the strings under the keys.
"""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field

from utils.settings.model_schema import DType, ModelSettings
from utils.settings.values import Natural, Positive, SettingsTable, Share, UserPath


class AdapterRule(SettingsTable):
    """`[[adapter.rules]]`: how the adapter of some modules differs from that of the others. For each module the first
    rule counts that matches it."""

    pattern: Annotated[str, Field(min_length=1)]
    """Glob pattern that may match anywhere in a module's name, or is the class of a module around it."""
    type: str | None = None
    """Kind of their adapter; default: that of all."""
    keys: dict[str, Any] = {}
    """What else their adapter is told, with `type`: keys of this kind, as in `{ factor = 16, full_matrix = true }`.
    What is not here is as in `[adapter]`, where both kinds have it."""
    rank: Natural | None = None
    """Rank of their updates, whatever their kernels; 0 adapts none of them; default: that of all."""
    alpha: Positive | None = None
    """Their alpha; default: that of all."""
    dropout: Share | None = None
    """Fraction of their inputs that is dropped in training; default: that of all."""
    lr: Positive | None = None
    """Their learning rate; default: that of all. A rule of `[optimizer]` comes before it."""

    @property
    def sizes(self) -> dict[str, float]:
        """The keys of the adapter itself that it sets."""
        return self.model_dump(exclude={"pattern", "type", "keys", "lr"}, exclude_none=True)


class AdapterSettings(SettingsTable):
    """`[adapter]`: train an adapter instead of the model itself. Without this table: full fine-tuning.

    A kind of adapter is a subclass, with the keys that only this kind has: one file of `utils/adapters/`.
    """

    binds_checkpoint: ClassVar[tuple[str, ...]] = ("type", "include", "exclude")
    of_runs: ClassVar[tuple[str, ...]] = ()
    """The keys of a kind that are for all modules of a run, and stand in no rule."""
    of_files: ClassVar[tuple[str, ...]] = ()
    """The keys in which all modules of a kind have to agree, since a file says them once."""

    type: str
    """Kind of adapter."""
    dropout: Share = 0.0
    """Fraction of an adapter's inputs that is dropped in training."""
    dtype: DType = "float32"
    """Type of the adapter's weights."""
    include: list[str] = []
    """Glob patterns that may match anywhere in a module's name, or are the class of a module around it: adapt only
    modules that match one; empty: all Linears of the blocks."""
    exclude: list[str] = []
    """Glob patterns of the same kinds: do not adapt modules that match one."""
    convolutions: bool = False
    """Also adapt the convolutions of a UNet, and its Linears outside of attention (sd15, sdxl)."""
    init_from_existing: UserPath | None = None
    """File or folder of an adapter to continue from; default: start with no effect."""
    lycoris_config: UserPath | None = None
    """A JSON file with LyCORIS's configuration, as SimpleTuner's users have it: its keys are read as those of this
    table, `type` among them."""

    rules: list[AdapterRule] = []
    """Modules whose adapter has another rank, alpha, dropout or learning rate, or is of another kind."""

    def problems(self, model: ModelSettings) -> Iterator[tuple[str, str]]:
        """Contradictions among the keys of this table, and with those of [model]: a key, and what is wrong with it."""
        for number, rule in enumerate(self.rules, start=1):
            if not rule.sizes and rule.lr is None and rule.type is None:
                yield f"rules[{number}]", "says nothing; give it type, rank, alpha, dropout or lr"
            if rule.keys and rule.type is None:
                yield f"rules[{number}].keys", f'are told with a kind: add type = "{self.type}", or another'
            if rule.type and getattr(self, "dim_from_weights", False):
                yield f"rules[{number}].type", "is set by the file, with dim_from_weights; leave one of them out"
            if rule.type is not None:
                continue
            if unknown := [key for key in rule.sizes if key not in type(self).model_fields]:
                yield (
                    f"rules[{number}].{unknown[0]}",
                    f'is for adapters that have a {unknown[0]}, and not "{self.type}"',
                )
            if rule.rank is not None and getattr(self, "dim_from_weights", False):
                yield f"rules[{number}].rank", "is set by the file, with dim_from_weights; leave one of them out"

    def binding(self) -> dict[str, Any]:
        """The rules have no place in what checkpoints without rules hold."""
        rules = [
            [rule.pattern, rule.rank, rule.alpha, *([rule.type, rule.keys] if rule.type else [])]
            for rule in self.rules
            if rule.sizes or rule.type
        ]
        return {**super().binding(), **({"rules": rules} if rules else {})}
