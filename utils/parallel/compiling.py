"""Compiling a denoiser's repeated blocks (torch.compile): elementwise operations become few kernels, and a step asks
less of Python."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Iterable

import torch
from torch import nn

from utils.errors import UserError

COMPILER = "inductor"
FORMS = 64
"""How many forms of one layer class are compiled, after which torch goes on uncompiled: a form for each kind of block
behind it, with and without a gradient of its input, in training and evaluation, and for sizes at first one by one and
then of any kind."""
# Since torch 2.13 its configuration is one of each thread, and a GPU's backward pass, in which what is recomputed runs,
# has a thread of its own; before, it was one for all, and torch.compile did not take the limit.
LIMIT = {"recompile_limit": FORMS} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}

COMPILERS = {"cpu": ("CXX", ("g++",), "C++"), "cuda": ("CC", ("clang", "gcc"), "C")}
"""Type of device -> the variable that names the compiler that torch's code for it needs, those that it is without that,
and their language."""


def check_compiler(device_type: str) -> None:
    """Whether what compiled blocks need is there.

    Raises:
        UserError: it is not.
    """
    variable, usual, language = COMPILERS[device_type]
    named = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([named] if named else usual)):
        raise UserError.of(
            f"needs a {language} compiler, and there is no {named or ' or '.join(usual)}: install one, name one in the "
            f"environment variable {variable}, or leave it out",
            where="key `compile`",
        )


def compile_blocks(layers: Iterable[nn.Module]) -> None:
    """Lets the denoiser's own modules in the repeated blocks among `layers` be compiled when they first run; those of
    one kind share what is compiled. Not the layers around them: torch 2.11 cannot read NamedTuples."""
    torch._dynamo.config.recompile_limit = FORMS
    for layer in layers:
        if getattr(layer, "recomputable", False):
            for child in layer.children():
                for module in child if isinstance(child, nn.ModuleList) else (child,):
                    module.compile(backend=COMPILER, **LIMIT)
