"""The distance to the floor: a step of the real commands against the products of its linear layers at full speed.

    python scripts/bench/floor.py                               every job
    python scripts/bench/floor.py --pairs pairs.json dpo sft    some, on rows of your own

Model, rows and recipes are those of against_trl.py (23M parameters, float32, batch of 4, one thread of the CPU), but
the same 4 rows at every step, so that the reference's numbers are known. Floor: the operations of the linear layers
(forward, gradient by the input, and by the weights where they are trained; of the tokens that are computed, the head of
those that are scored) at the rate that the same process reaches in multiplying square matrices of 1,024. The step: CPU
seconds, the least of --repeats turns after one to warm up. Where they go: shares of one more step, under torch's
profiler; elementwise: all other operations on tensors, also copies; other: Python, and what lies between them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from against_trl import recipe
from alone import command, leave, process, repeated
from world import BATCH, make_world

if TYPE_CHECKING:
    from rlhf_cli.models.roles import Role
    from rlhf_cli.train.engine import Engine

JOBS = ("dpo", "dpo-lora", "sft", "rm")
SIDE = 1024
MATMUL = {f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "addmv_", "dot")}
KINDS = ("matmul", "attention", "optimiser", "elementwise", "other")


def kind_of(name: str) -> str:
    """What an operation of the profile counts as."""
    if name in MATMUL:
        return "matmul"
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "attention"
    if "_foreach_" in name or "_fused_adam" in name:
        return "optimiser"
    return "elementwise" if name.startswith("aten::") else "other"


def operations(role: Role, tokens: float, scored: float) -> float:
    """Floating-point operations of the linear layers in a step."""
    from torch.nn import Linear

    model, trained, total = role.base.model, {id(p) for _, p in role.parameters}, 0.0
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, Linear):
            rows = tokens if module is not head else scored if role.head is None else 0.0
            total += 2.0 * rows * module.weight.numel() * (3 if id(module.weight) in trained else 2)
    return total


def rate() -> float:
    """Floating-point operations a second of a product of square matrices."""
    import torch

    a, b, c = (torch.randn(SIDE, SIDE) for _ in range(3))
    return 2.0 * SIDE**3 / repeated(lambda: torch.mm(a, b, out=c), 10)["seconds"]


def shares(step: Callable[[], Any]) -> dict[str, float]:
    """Where the time of a step goes, in percent."""
    from torch.profiler import ProfilerActivity, profile

    found = dict.fromkeys(KINDS, 0.0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        began = time.perf_counter()
        step()
        whole = time.perf_counter() - began  # the profiler goes by the clock as well
    for event in seen.key_averages():
        found[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    found["other"] = whole - sum(found[kind] for kind in KINDS[:-1])
    return {kind: 100 * seconds / whole for kind, seconds in found.items()}


def run(world: Path, job: str, out: Path, turns: int) -> None:
    """Steps of the stage, in place of its loop."""
    from rlhf_cli.train.engine import Engine

    def fit(engine: Engine, step: Callable[[], dict[str, float]]) -> None:
        (learner,), scored, plain = engine.learners.values(), [], engine.update

        def update(role: Role, samples: Sequence[Any], *arguments: Any, **named: Any) -> dict[str, float]:
            scored.append(sum(int(c.scored.sum()) for sample in samples for c in sample.completions))
            return plain(role, samples, *arguments, **named)

        engine.update = update  # type: ignore[method-assign]
        fastest = rate()
        found: dict[str, Any] = repeated(step, turns)
        tokens = engine.tokens / len(scored)
        found |= {"rate": max(fastest, rate()), "tokens": tokens, "scored": scored[0]}
        leave(out, found | {"operations": operations(learner.role, tokens, scored[0]), "shares": shares(step)})

    Engine.fit = fit  # type: ignore[method-assign, assignment]
    made = recipe(world, job, out / "run")
    made["data"]["train"] = {"path": made["data"]["train"], "limit": BATCH}
    command(made, out)


def line(job: str, found: dict[str, Any]) -> str:
    """Of the table."""
    floor = found["operations"] / found["rate"]
    cells = [
        job, f"{found['tokens']:,.0f} ({found['scored']:,})", f"{found['operations'] / 1e9:.0f}",
        f"{found['rate'] / 1e9:.0f}", f"{floor:.2f}", f"{found['seconds']:.2f}", f"{found['seconds'] / floor:.2f}",
        *(f"{found['shares'][kind]:.0f}" for kind in KINDS),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Parse the arguments; measure, or be what is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)}; none: all")
    parser.add_argument("--pairs", type=Path, help="a file of preference pairs; none: made up")
    parser.add_argument("--out", type=Path, help="a folder for models and rows; none: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.jobs) - set(JOBS)):
        parser.error(f"no job {unknown[0]}; there are {', '.join(JOBS)}")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from rlhf_cli.models.base import quiet

    quiet()
    if asked.world:
        run(asked.world, asked.jobs[0], asked.out, asked.repeats)
        return
    print(f"| a step of | tokens (scored) | GFLOP | GFLOP/s | floor s | CPU s | times the floor | "
          f"{' % | '.join(KINDS)} % |")  # fmt: skip
    print(f"|{'---|' * (7 + len(KINDS))}")
    with tempfile.TemporaryDirectory(dir=asked.out) as folder:
        world = Path(folder)
        make_world(world, asked.pairs, wide=False)
        for job in asked.jobs or JOBS:
            words = ["--world", folder, "--repeats", str(asked.repeats), job]
            print(line(job, process(__file__, world, words)), flush=True)


if __name__ == "__main__":
    main()
