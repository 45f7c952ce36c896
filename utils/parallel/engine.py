"""DeepSpeed's pipeline engine, corrected by subclassing.

What differs from `deepspeed.runtime.pipe.engine.PipelineEngine` of 0.19.8, each with a test beside it:

- a stage with several outputs runs its backward pass once, not once per output;
- every received tensor gets a buffer of its own type and shape (the stock pool confuses types from three stages on);
- the stream may change its shape; only tensors that require a gradient get one (`wire.py`);
- the gradient norm covers all stages, not only the first, and a step is left out whose norm is not finite;
- a stage without trainable parameters trains, and gradients of 16-bit ones may be summed in float32;
- a stage does not wait until what it sends has arrived, nor for one tensor after another;
- data ranks may divide state and gradients (`sharding.py`), at any number of stages, and weights (`divided.py`);
- a step does not walk through all modules, and with one data rank nothing is copied to be averaged;
- gradients go to other data ranks while the backward pass makes the next ones (`travelling.py`);
- a stage may have several pieces of the model, and the schedule is interleaved then (`interleaved.py`);
- evaluation returns a loss per sample, and a prediction can be had from the same stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.utils.timer import NoopTimer
from torch import nn

from utils.diffusion.auxiliary import Output
from utils.parallel import wire
from utils.parallel.backend import configuration
from utils.parallel.breakdown import Breakdown
from utils.parallel.clipping import Clipping, gradient_norms
from utils.parallel.interleaved import Layout
from utils.parallel.mail import StageMail
from utils.parallel.pipeline import DenoiserPipeline
from utils.parallel.release import GradientRelease, may_step
from utils.parallel.schedules import schedule_of, turns_of
from utils.parallel.sharding import Shares
from utils.parallel.step_numbers import StepNumbers, StepResult
from utils.parallel.step_times import StepTimes
from utils.parallel.teacher import Teacher
from utils.parallel.travelling import shared_by, with_zeros
from utils.settings.deepspeed_keys import DeepSpeedSettings
from utils.settings.values import ClipBy

MicroBatch = tuple[Any, ...]
"""(inputs of the first stage, labels of the last): NamedTuples or tuples of CPU tensors and None. Further items are
for a teacher."""


class Engine(PipelineEngine):
    """Trains, evaluates and predicts with one stage of a `DenoiserPipeline`; see the module for what it corrects.

    Args:
        clip_norm, clip_by: see `Clipping`.
        release: see `GradientRelease`; then one micro-batch is a step, without a limit of the whole gradient's norm,
            with all of the stage's parameters in `shares`.
        after_step: changes parameters after each step, the same ones on all data ranks.
        float32_gradients: sum the gradients of 16-bit parameters in float32, since in their own type what later
            micro-batches add to a large sum is lost. The optimizer must take them so.
        shares: which of the parameters `optimizer` steps; default: all that the stage trains.
        deepspeed: what DeepSpeed is told beside: see `utils/settings/deepspeed_keys.py`.

    Attributes:
        beside_backward: called before a backward pass, which does not keep other threads from running Python.
    """

    beside_backward: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self,
        module: DenoiserPipeline,
        optimizer: torch.optim.Optimizer,
        *,
        accumulation: int,
        clip_norm: float,
        clip_by: ClipBy = "norm",
        release: bool = False,
        after_step: Callable[[], None] | None = None,
        teacher: Teacher | None = None,
        float32_gradients: bool = False,
        shares: Shares | None = None,
        deepspeed: DeepSpeedSettings | None = None,
    ):
        deepspeed = deepspeed or DeepSpeedSettings()
        config, mpu = configuration(accumulation, deepspeed), module.mpu()
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=mpu,
            config=config,
            config_class=DeepSpeedConfig(config, mpu),
            model_parameters=[p for p in module.parameters() if p.requires_grad],
        )
        # Its own would keep the events of each step until they are printed, which they never are here.
        self.timers = NoopTimer()
        trained = module.trained_of_pieces()
        self._trained = [parameter for piece in trained for parameter in piece]
        if float32_gradients:
            for parameter in self._trained:
                parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)
        # Now that the rest of the stage is on the device.
        module.swap.start(self.device, self.grid.get_data_parallel_group())
        self._shares = shares or Shares({})
        self._shares.start(self.grid.get_data_parallel_group(), self.device)
        layers = module.forward_funcs if module.swap.needs_all_ranks else None
        late = [*shared_by(module.forward_funcs), *module.swap.late_gradients]
        how = {"sent_as": self._config.communication_data_type, "layers": layers, "late": late}
        self._travelling = None if release else self._shares.travelling_gradients(trained, **how)
        module.swap.going_back = self._travelling.reduce_behind if layers and self._travelling else None
        self._times = StepTimes(self.device)
        self._INSTRUCTION_MAP = self._times.timed(self._INSTRUCTION_MAP)
        self._breakdown = self._released = None
        if deepspeed.wall_clock_breakdown:
            self._breakdown = Breakdown(self.device, None if self.grid.get_data_parallel_rank() else self.stage_id)
            self._INSTRUCTION_MAP = self._breakdown.timed(self._INSTRUCTION_MAP)
        self._clipping = Clipping(clip_norm, clip_by)
        if release:
            mean = self._mean_over_data_ranks if self.grid.get_data_parallel_world_size() > 1 else None
            parts = module.forward_funcs, self._trained, optimizer, mean, self._clipping
            self._released = GradientRelease(*parts)
        self.teacher = teacher
        self._after_step = after_step
        self._grad_norm, self._norms_P = torch.zeros(()), torch.zeros(0)
        self._keep_predictions = False
        self._begin(0, self._rank_after_rank())
        descriptions = dist.new_group(backend="gloo") if self.is_pipe_parallel else None
        self._mail = StageMail(self.grid, self.device, descriptions, is_ring=module.pieces > 1)

    def train_step(
        self, batches: Iterable[MicroBatch] | None, step: int, numbers: Sequence[int] | None = None
    ) -> StepResult:
        """One optimizer step over as many micro-batches as are accumulated.

        Args:
            batches: this data rank's micro-batches; None on a stage that is neither the first nor the last.
            step: number of the step, which seeds dropout.
            numbers: of this data rank's micro-batches among those of all, which seed dropout too, so that it does not
                depend on how a step is dealt; default: rank after rank.
        """
        if self.teacher is not None:
            batches = self._with_teacher_labels(self.teacher, batches)
        self._begin(step, self._rank_after_rank() if numbers is None else numbers)
        self._times.begin()
        loss = self.train_batch(iter(batches) if batches is not None else None)
        self._mail.finish()
        if self._breakdown:
            self._breakdown.tell(step)
        micro_batches = self.micro_batches * self.grid.get_data_parallel_world_size()
        return self._numbers_of_step.result(loss, self._grad_norm, micro_batches, self._times)

    def evaluate(self, batches: Iterable[MicroBatch] | None, count: int) -> list[torch.Tensor]:
        """The loss of every sample (B,) in float32, per micro-batch, on every stage of this data rank."""
        with self.module.swap.evaluation(count):
            return self._from_last_stage(self._run_forward(batches, count, keep_predictions=False), count)

    def predict(self, batches: Iterable[MicroBatch] | None, count: int) -> list[torch.Tensor]:
        """The last layer's output per micro-batch, on every stage of this data rank."""
        with self.module.swap.evaluation(count):
            return self._from_last_stage(self._run_forward(batches, count, keep_predictions=True), count)

    def _with_teacher_labels(
        self, teacher: Teacher, batches: Iterable[MicroBatch] | None
    ) -> Iterable[MicroBatch] | None:
        """The micro-batches of a step; on the last stage they have the teacher's labels."""
        batches = batches if batches is None else list(batches)
        given = batches and [teacher.inputs(batch) for batch in batches]
        with teacher.present():
            outputs = self._run_forward(given, self.micro_batches, keep_predictions=True)
        if not self.is_last_stage():
            return batches
        return [
            (inputs, teacher.teach(labels, output))
            for (inputs, labels, *_), output in zip(batches, outputs, strict=True)
        ]

    def _rank_after_rank(self) -> Sequence[int]:
        first = self.grid.get_data_parallel_rank() * self.micro_batches
        return range(first, first + self.micro_batches)

    def _begin(self, step: int, numbers: Sequence[int]) -> None:
        self._forward_count, self._backward_count = Counter(), Counter()
        self._losses: dict[int, torch.Tensor] = {}
        self._gradients: dict[int, list[torch.Tensor]] = {}
        self._numbers = numbers
        self._numbers_of_step = StepNumbers(self.module.loss_terms, self.device)
        self._step = step
        self.module.draw = None

    def _run_forward(self, batches: Iterable[MicroBatch] | None, count: int, *, keep_predictions: bool) -> list:
        """The outputs of the last stage for the micro-batches; nothing on other stages."""
        self._begin(self._step, range(count))
        self.module.eval()
        self._keep_predictions = keep_predictions
        self.total_loss = None
        self.set_dataiterator(iter(batches) if batches is not None else None)
        try:
            with torch.no_grad():
                self._exec_schedule(self._inference_schedule(count))
            self._mail.finish()
        finally:
            # Also after an error, since training may go on without what failed.
            self._keep_predictions = False
            for buffers in self.pipe_buffers.values():
                buffers[:] = [None] * len(buffers)
            outputs = self.fwd_outputs
            self.fwd_outputs = []
        return outputs

    def _train_schedule(self) -> schedule.PipeSchedule:
        return schedule_of(Layout(self.num_stages, self.module.pieces, self.micro_batches), self.stage_id)

    def _inference_schedule(self, micro_batches: int) -> schedule.PipeSchedule:
        layout = Layout(self.num_stages, self.module.pieces, micro_batches, trains=False)
        return schedule_of(layout, self.stage_id)

    def _exec_schedule(self, pipe_schedule: schedule.PipeSchedule) -> None:
        self.module.swap.begin_turns(turns_of(pipe_schedule))
        super()._exec_schedule(pipe_schedule)

    def _begins(self, piece: int) -> bool:
        """Whether micro-batches begin at this piece of the stage."""
        return self.is_first_stage() and piece == 0

    def _ends(self, piece: int) -> bool:
        """Whether they end there."""
        return self.is_last_stage() and piece == self.module.pieces - 1

    def _neighbour(self, distance: int) -> int:
        """The stage after this one, or with -1 the one before it; they are in a circle if they have several pieces."""
        return (self.stage_id + distance) % self.num_stages

    def _from_last_stage(self, tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        return self._mail.from_last_stage(tensors, count, is_last=self.is_last_stage())

    # The instructions of the schedule, in the order in which a micro-batch goes through them.

    def _load_micro_batch(self, buffer_id: int, piece: int = 0) -> None:
        inputs, labels, *_ = next(self.data_iterator)
        if self._begins(piece):
            self.pipe_buffers["inputs"][buffer_id] = wire.to_device(inputs, self.device)
        if self._ends(piece):
            self.pipe_buffers["labels"][buffer_id] = wire.to_device(labels, self.device)

    def _receive_activations(self, buffer_id: int, piece: int = 0) -> None:
        description = self._mail.description(self._neighbour(-1))
        tensors = [self._mail.buffer(expected) for expected in description.tensors]
        self._mail.receive(tensors, self._neighbour(-1))
        for tensor, expected in zip(tensors, description.tensors, strict=True):
            tensor.requires_grad_(expected.requires_grad and torch.is_grad_enabled())
        self.pipe_buffers["inputs"][buffer_id] = wire.unflatten(tensors, description)

    def _forward(self, buffer_id: int, piece: int = 0) -> None:
        self.module.draw = (self._step, self._numbers[self._forward_count[piece]])
        self._forward_count[piece] += 1
        outputs = self.module(self.pipe_buffers["inputs"][buffer_id], piece)
        if not torch.is_grad_enabled():
            self.pipe_buffers["inputs"][buffer_id] = None
        if self._ends(piece):
            self._finish_forward(buffer_id, outputs)
        else:
            self.pipe_buffers["outputs"][buffer_id] = outputs

    def _finish_forward(self, buffer_id: int, outputs: Any) -> None:
        """Takes the loss of a micro-batch, or its prediction."""
        prediction, terms_K = outputs if isinstance(outputs, Output) else (outputs, None)
        labels, self.pipe_buffers["labels"][buffer_id] = self.pipe_buffers["labels"][buffer_id], None
        if self._keep_predictions:
            self.fwd_outputs.append(prediction)
            return
        losses_B = self.module.loss_fn(prediction, labels)
        self.fwd_outputs.append(losses_B.detach().float())
        loss = losses_B.mean()
        self.total_loss = loss.detach() + (0.0 if self.total_loss is None else self.total_loss)
        if terms_K is not None:
            self._numbers_of_step.add_terms(terms_K)
            loss = loss + terms_K.sum()
        if torch.is_grad_enabled():
            self._numbers_of_step.add_levels(losses_B, labels)
            self._losses[buffer_id] = loss

    def _send_activations(self, buffer_id: int, piece: int = 0, under_way: int = 0) -> None:
        tensors, description = wire.flatten(self.pipe_buffers["outputs"][buffer_id])
        self._mail.send(tensors, self._neighbour(1), description, under_way=under_way)
        if not torch.is_grad_enabled():
            self.pipe_buffers["outputs"][buffer_id] = None

    def _receive_gradients(self, buffer_id: int, piece: int = 0) -> None:
        _, description = wire.flatten(self.pipe_buffers["outputs"][buffer_id])
        gradients = [self._mail.buffer(expected) for expected in description.tensors if expected.requires_grad]
        self._mail.receive(gradients, self._neighbour(1))
        self._gradients[buffer_id] = gradients

    def _backward(self, buffer_id: int, piece: int = 0) -> None:
        self.beside_backward()
        self.module.swap.begin_turn()
        self._backward_count[piece] += 1
        if self._travelling:
            self._travelling.begin_backward(piece, last=self._backward_count[piece] == self.micro_batches)
        if self._ends(piece):
            loss = self._losses.pop(buffer_id)
            if loss.requires_grad:
                DeepSpeedEngine.backward(self, loss)
            # Its graph stays until the next one: without it, a CPU's heap would shrink and grow in every step. Behind
            # other stages it would keep what has come from them.
            self.loss = None if self.is_pipe_parallel else loss
        else:
            tensors, _ = wire.flatten(self.pipe_buffers["outputs"][buffer_id])
            outputs = [tensor for tensor in tensors if tensor.requires_grad]
            gradients = self._gradients.pop(buffer_id)
            if outputs:
                torch.autograd.backward(outputs, gradients)
        if self._travelling:
            self._travelling.end_backward()
        self.pipe_buffers["outputs"][buffer_id] = None
        if self._begins(piece):
            self.pipe_buffers["inputs"][buffer_id] = None

    def _send_gradients(self, buffer_id: int, piece: int = 0, under_way: int = 0) -> None:
        tensors, _ = wire.flatten(self.pipe_buffers["inputs"][buffer_id])
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = [t.grad if t.grad is not None else torch.zeros_like(t) for t in wanted]
        self._mail.send(gradients, self._neighbour(-1), under_way=under_way)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _reduce_gradients(self) -> None:
        """The means of the gradients over the data ranks; those that are missing are zeros, as on other ranks."""
        self.module.swap.settle()
        if self._released:
            return
        if self._travelling:
            self._travelling.hand_over()
        else:
            with_zeros(self._trained)

    def allreduce_bucket(self, bucket: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The mean of some gradients in one piece, on the device; those of swapped blocks come from the host."""
        return super().allreduce_bucket([gradient.to(self.device) for gradient in bucket], *args, **kwargs)

    def zero_grad(self) -> None:
        """Without gradients the next step begins."""
        for parameter in self._trained:
            parameter.grad = None

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self._released:
            self._grad_norm = self._norm_over_stages(self._released.finish(self.device))
        else:
            sent = self._travelling
            norms_P = sent.norms_of_all() if sent else gradient_norms(self._trained, self.device)
            self._norms_P = norms_P
            self._grad_norm = self._norm_over_stages(norms_P)
            self._clipping.apply(self._trained, norms_P, self._grad_norm, self.module.forward_funcs)
            # All ranks have the same norm.
            if may_step(self.optimizer, self._grad_norm):
                self._shares.before_step()
                self.optimizer.step()
                self._shares.after_step()
        if self._after_step:
            self._after_step()
        self.zero_grad()
        self.global_steps += 1

    def gradient_norms(self) -> dict[nn.Parameter, float]:
        """The norm of the last step's gradient of each parameter that this stage trains, before clipping; the same on
        all its data ranks."""
        if self._released:
            norms = self._released.norms
            return dict(zip(norms, torch.stack([*norms.values()]).tolist(), strict=True)) if norms else {}
        return dict(zip(self._trained, self._norms_P.tolist(), strict=True))

    def _norm_over_stages(self, norms: torch.Tensor) -> torch.Tensor:
        """The norm of the gradient of the whole model, of which this stage's parts have these."""
        square = norms.square().sum()
        if self.is_pipe_parallel:
            dist.all_reduce(square, group=self.grid.get_pipe_parallel_group())
        return square.sqrt()

    def _mean_over_data_ranks(self, gradients: Sequence[torch.Tensor]) -> None:
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            own = [gradient for gradient in gradients if gradient.dtype == dtype]
            self.allreduce_and_copy(own, self.grid.get_data_parallel_group())

    _INSTRUCTION_MAP = {
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _load_micro_batch,
        schedule.RecvActivation: _receive_activations,
        schedule.ForwardPass: _forward,
        schedule.SendActivation: _send_activations,
        schedule.RecvGrad: _receive_gradients,
        schedule.BackwardPass: _backward,
        schedule.SendGrad: _send_gradients,
        schedule.ReduceGrads: _reduce_gradients,
    }
