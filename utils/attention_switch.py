"""Torch's switch for cuDNN's attention, which is one for all threads of a process.

It is off. Who turns it on, for some layers of the denoiser, has it alone; so has who needs it to stay off, as text
encoders that encode captions in another thread meanwhile: which kernels they got would follow from chance otherwise.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALONE = threading.Lock()


def turn_off() -> None:
    """To be called once in a process, since torch begins with it on."""
    torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def turned_on() -> Iterator[None]:
    """A context in which cuDNN's kernels may be taken."""
    with _ALONE:
        torch.backends.cuda.enable_cudnn_sdp(True)
        try:
            yield
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)


@contextmanager
def kept_off() -> Iterator[None]:
    """A context in which no other thread turns it on."""
    with _ALONE:
        yield
