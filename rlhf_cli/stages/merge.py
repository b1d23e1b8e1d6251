"""`rlhf merge`: a run's adapter as a full model, in a folder of its own.

1. Work the adapter into the weights that were asked for, and say how far its answers moved;
2. write the model with tokenizer, template and a model card, whole or not at all;
3. open it again, and check that it answers the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

from rlhf_cli.errors import ModelError, RecipeError
from rlhf_cli.models.base import Text, load_text
from rlhf_cli.models.build import frozen_role
from rlhf_cli.models.merging import Merged, Weights, answers, merge
from rlhf_cli.models.save import pad_id, save_policy, save_reward
from rlhf_cli.recipe.settings.model import Dtype, ModelSettings
from rlhf_cli.runs import ancestry, card, opening, provenance
from rlhf_cli.runs.display import Display
from rlhf_cli.runs.files import FREE, disk_error, remove_quietly, sync_tree, temporary, writable

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25, "float16": 0.05}
"""How far a logit may move by being written and read again: rounding of the products, in the dtype."""


def run(name: str, folder: str, weights: Weights, dtype: Dtype, display: Display) -> None:
    """Merge a run into a new folder. Raises RecipeError and ModelError."""
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError("is there already and not empty", folder, "choose another folder")
    writable(out, f"--output-dir {folder}", "choose another folder")
    text = load_text(ModelSettings(name_or_path=name), "policy", "reward", "cost", "process")
    merged = merge(text, weights, dtype)
    for line in told(merged):
        display.note(line)
    if weights == "original" and quantisation_of(text) != "none":
        display.note(
            f"the run was trained on {quantisation_of(text)} weights: --weights trained answers as the run does"
        )
    draft = temporary(out)
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        if merged.role.head is None:
            save_policy(merged.role, text, draft)
        else:
            save_reward(merged.role, text, draft)
        write_card(text, name, out, merged, draft)
        sync_tree(draft)
        gap = reopened(merged, draft)
        if out.exists():
            out.rmdir()
        os.rename(draft, out)
    except OSError as error:
        raise disk_error(error, "the merged model cannot be written", out, FREE) from error
    finally:
        remove_quietly(draft)
    display.note(f"{out}: opened again, it answers the same (largest difference {gap:.1e})")


def quantisation_of(text: Text) -> str:
    """Of the weights that a run was trained on."""
    recipe = (text.path.run or {}).get("recipe") or {}
    return str((recipe.get("model") or {}).get("quantization", "none"))


def told(merged: Merged) -> list[str]:
    """What was done, and how far the answers moved."""
    what = "logit" if merged.divergence is not None else "score"
    kl = "" if merged.divergence is None else f", mean KL {merged.divergence:.2e} nats a token"
    return [
        f"merged into {merged.words}, {str(merged.role.base.dtype)[6:]}",
        f"against the adapter on the weights it was trained on: a {what} differs by {merged.largest:.2e} at most{kl}",
    ]


def reopened(merged: Merged, folder: Path) -> float:
    """The largest difference between the model in memory and in the folder. ModelError when it is no rounding."""
    dtype = cast("Dtype", str(merged.role.base.dtype)[6:])
    settings = ModelSettings(name_or_path=str(folder), dtype=dtype, kernels="reference", attn_implementation="sdpa")
    kind = "policy" if merged.role.head is None else "reward"
    text = load_text(settings, kind)  # type: ignore[arg-type]
    again = frozen_role(merged.role.name, settings, text, None)
    gap = float((answers(again, text) - answers(merged.role, text)).abs().max())
    if not gap <= TOLERANCE[dtype]:
        raise ModelError(f"the model that was written answers otherwise (by {gap:.3g})", str(folder))
    return gap


def write_card(text: Text, name: str, out: Path, merged: Merged, folder: Path) -> None:
    """README.md of the merged model in `folder`, which is to become `out`."""
    run = dict(text.path.run or {})
    if "base_license" not in run:
        run |= ancestry.about(text.source, text.revision, None, [])
    before = [*run.get("ancestry", []), *([{"name": name, "stage": run["stage"]}] if "stage" in run else [])]
    kl = "" if merged.divergence is None else f" Mean KL to it on random tokens: {merged.divergence:.2e} nats."
    story = card.Story(
        title=out.name,
        summary=f"The adapter {card.quoted(name)} on {card.quoted(text.source)}, merged into {merged.words}.{kl}",
        base=text.source, relation="finetune", tags=["rlhf", "merge"], run=run,
        lineage=[f"base: {card.quoted(str(before[0].get('base') or text.source) if before else text.source)}",
                 *(f"{card.quoted(str(e['name']))}: `rlhf {e['stage']}`" for e in before),
                 f"**{card.quoted(str(out))}**: `rlhf merge`"],
        versions=provenance.versions(),
    )  # fmt: skip
    end = text.template.end_text or str(text.tokenizer.eos_token)
    model = opening.of_folder(folder, str(out), run, end, pad_id(text))
    (folder / card.FILE).write_text(card.card(story, model), encoding="utf-8", errors="replace")
