"""Chains of element-wise operations as single kernels: plain PyTorch by default, compiled by `torch.compile` on demand.

Run one by one, each operation of a chain reads and writes its tensors whole, which on a GPU takes as long as the matrix
product before it. The compiler (Triton on a GPU, C++ on a CPU) makes one pass of them; both give the same numbers to
rounding. Nothing is compiled until a chain is first called so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

OPTIONS: dict[str, Any] = {"deterministic": True}
"""No choice between kernels by timing: a run that is resumed must compute what it computed before. Before
PyTorch 2.10 it cannot be asked, and a GPU may choose so."""
KINDS = 64
"""Sorts of arguments (dtypes, sizes of one, None) for which a chain is compiled at most."""


class Fused(Generic[P, T]):
    """A function of tensors that can be called as it stands or compiled. It may overwrite matrices it is given.

    whole: the same for the compiler, where the plain form goes in steps that keep a CPU's cache or matrix unit busy.
    """

    def __init__(self, plain: Callable[P, T], whole: Callable[P, T] | None = None) -> None:
        self.plain, self.whole = plain, whole or plain

    @cached_property
    def compiled(self) -> Callable[P, T]:
        """The same by `torch.compile`, for all sizes at once. Vectors come as copies: one that is a part of another may
        begin anywhere in it, and would be compiled for over and over."""
        compiled: Callable[..., T] = torch.compile(self.whole, dynamic=True, fullgraph=True, options=_known(OPTIONS))

        @torch._dynamo.config.patch(recompile_limit=KINDS)
        def call(*args: Any) -> T:
            return compiled(*(a.clone() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args))

        return call  # type: ignore[return-value]

    def by(self, compiled: bool) -> Callable[P, T]:
        """Which of the two."""
        return self.compiled if compiled else self.plain


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those that the installed PyTorch knows; it refuses others."""
    from torch._inductor import config

    return {name: value for name, value in options.items() if hasattr(config, name)}


def attempt(device: torch.device) -> str | None:
    """Compile a small chain for a device; why that fails, in one line, or None."""
    x = torch.linspace(-1.0, 1.0, 12, device=device).view(3, 4)
    try:
        found = Fused(_probe).compiled(x)
    except Exception as error:  # whatever the compiler, or what it calls, says
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        said = (lines or [type(error).__name__])[0][:200]
        if "C++ compiler" not in said:
            return said
        asked = os.environ.get("CXX")
        return f"no C++ compiler (CXX is {asked})" if asked else "no C++ compiler was found"
    gap = float((found - _probe(x)).abs().max())
    return None if gap < 1e-5 else f"the compiled kernel is wrong by {gap:.3g}"


def _probe(x: Tensor) -> Tensor:
    return (x - x.amax(1, keepdim=True)).exp().sum(1)
