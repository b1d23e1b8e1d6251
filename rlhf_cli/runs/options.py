"""What the command line asks of a stage beside the recipe. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Options of every stage that are not part of the recipe."""

    resume: str = "auto"
    """auto, never, or the path of a checkpoint."""
    dry_run: bool = False
    """Check recipe, data and model, say what would be done, write nothing."""
    debug: bool = False
    """Show tracebacks."""
