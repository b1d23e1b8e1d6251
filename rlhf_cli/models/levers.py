"""Which faster ways of computing a recipe asks for, and whether they can be had on this device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_cli.errors import ModelError
from rlhf_cli.models.device import compute_dtype, pick_device
from rlhf_cli.objectives import fused

if TYPE_CHECKING:
    import torch

    from rlhf_cli.recipe.settings.model import ModelSettings


class Levers(NamedTuple):
    """None of them changes a number but by rounding."""

    light: bool
    """Layers that keep less (models/lighten.py)."""
    compiled: bool
    """Chains of element-wise operations compiled (objectives/fused.py)."""
    flex: bool
    """Attention by segments as one kernel (models/flex.py)."""


def check_levers(settings: ModelSettings, source: str) -> None:
    """The same before anything is read, on the device that will compute. Raises ModelError, for a dtype that the device
    has not, too."""
    device = pick_device()
    compute_dtype(settings.dtype, device)
    levers(settings, device, source)


def levers(settings: ModelSettings, device: torch.device, source: str) -> Levers:
    """Raises ModelError for what this device has not."""
    asked = Levers(settings.kernels != "reference", settings.kernels == "compiled",
                   settings.attn_implementation == "flex_attention")  # fmt: skip
    needed = "Triton" if device.type == "cuda" else "a C++ compiler"
    if asked.flex and not has_flex(device):
        raise ModelError("model.attn_implementation: flex_attention has no backward pass on a CPU", source,
                         "use attn_implementation: auto")  # fmt: skip
    if (asked.compiled or asked.flex) and (why := fused.attempt(device)):
        key = "model.kernels: compiled" if asked.compiled else "model.attn_implementation: flex_attention"
        raise ModelError(f"{key} cannot be had here: {why}", source, f"install {needed}, or use auto")
    return asked


def has_flex(device: torch.device) -> bool:
    """Whether FlexAttention can be trained through there."""
    return device.type == "cuda"


def check_dropout(config: Any, source: str) -> None:
    """ModelError for a model that wants dropout on its attention, which FlexAttention knows not."""
    about = config.get_text_config()
    for key in ("attention_dropout", "attn_pdrop"):
        if getattr(about, key, None):
            raise ModelError(f"model.attn_implementation: flex_attention knows no dropout, and config.json has {key} "
                             f"{getattr(about, key)}", source, "use attn_implementation: auto")  # fmt: skip
