"""Schedules as DeepSpeed's engine takes them; the interleaved one in its instructions."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from deepspeed.runtime.pipe import schedule

from utils.parallel.interleaved import Layout, Message, Pass, Step, steps_of_all
from utils.parallel.ring import Turn

Instructions = list[schedule.PipeInstruction]


def schedule_of(layout: Layout, stage: int) -> schedule.PipeSchedule:
    """That of a stage: with several pieces in each the interleaved one, else DeepSpeed's."""
    if layout.pieces > 1:
        return InterleavedSchedule(layout, stage)
    kind = schedule.TrainSchedule if layout.trains else schedule.InferenceSchedule
    return kind(layout.micro_batches, layout.stages, stage)


def turns_of(pipe_schedule: schedule.PipeSchedule) -> Iterator[Turn]:
    """The passes of a stage, in order."""
    for step in pipe_schedule.steps():
        for one in step:
            if isinstance(one, schedule.ForwardPass | schedule.BackwardPass):
                yield Turn(isinstance(one, schedule.ForwardPass), one.kwargs.get("piece", 0))


class InterleavedSchedule(schedule.PipeSchedule):
    """The instructions of one stage. Each says of which `piece` of the stage it is, and one that sends how many
    messages to the same stage may be `under_way` then."""

    def __init__(self, layout: Layout, stage: int):
        super().__init__(layout.micro_batches, layout.stages, stage)
        self._layout = layout

    def num_pipe_buffers(self) -> int:
        """One for each micro-batch in each piece; they are names, and those that are not used are empty."""
        return self._layout.micro_batches * self._layout.pieces

    def steps(self) -> Iterator[Instructions]:
        """See `PipeSchedule`. A step is a pass with what it receives and sends."""
        yield from _instructions(self._layout, self.stage_id)
        if self._layout.trains:
            yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]


# Those of training, of evaluation and of samples.
@lru_cache(maxsize=4)
def _instructions(layout: Layout, stage: int) -> list[Instructions]:
    """Of every step of a stage."""
    return [_of_step(layout, stage, step) for step in steps_of_all(layout)[stage]]


def _of_step(layout: Layout, stage: int, step: Step) -> Instructions:
    def which(one: Pass) -> dict[str, int]:
        return {"buffer_id": one.piece * layout.micro_batches + one.micro_batch, "piece": one.piece}

    def receive(message: Message) -> schedule.PipeInstruction:
        kind = schedule.RecvActivation if message.of.forward else schedule.RecvGrad
        return kind(**which(message.of))

    one = step.one
    done = [receive(message) for message in step.before]
    at_an_end = (stage, one.piece) in ((0, 0), (layout.stages - 1, layout.pieces - 1))
    if one.forward and at_an_end:
        done.append(schedule.LoadMicroBatch(**which(one)))
    done.append((schedule.ForwardPass if one.forward else schedule.BackwardPass)(**which(one)))
    done += [receive(message) for message in step.after]
    if step.sent:
        kind = schedule.SendActivation if one.forward else schedule.SendGrad
        done.append(kind(**which(one), under_way=step.under_way))
    return done
