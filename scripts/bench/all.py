"""Every benchmark in one command: measures and writes the tables of docs/BENCHMARKS.md.

    python scripts/bench/all.py                    every part
    python scripts/bench/all.py growth startup     some: training, rollouts, growth, floor, plan, sharding ...

Each part is a script beside this one. Its tables replace what stands between its markers on the page, `<!-- growth -->`
and `<!-- /growth -->`, with a line about the machine; all else on the page stays. A part is written as soon as it is
done. The peers are installed when they are needed and not there: TRL 1.16 in .peer, for PPO TRL 1.12 in .peer-ppo.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "BENCHMARKS.md"
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """An environment with TRL."""

    folder: Path
    packages: tuple[str, ...]


PEERS = {
    "peer": Peer(ROOT / ".peer", ("trl==1.16.0", "peft", "bitsandbytes")),
    "ppo-peer": Peer(ROOT / ".peer-ppo", ("trl==1.12.0", "peft", "bitsandbytes")),
}


@dataclass(frozen=True)
class Part:
    """A script and the options it takes of ours."""

    script: str
    peers: tuple[str, ...] = ()
    out: bool = True
    pairs: bool = False


PARTS = {
    "training": Part("against_trl.py", ("peer", "ppo-peer"), pairs=True),
    "rollouts": Part("rollouts.py", out=False),
    "startup": Part("startup.py", ("peer",)),
    "checkpoints": Part("checkpoints.py"),
    "sharding": Part("sharding.py"),
    "growth": Part("growth.py"),
    "floor": Part("floor.py", pairs=True),
    "plan": Part("plan.py"),
    "plan-processes": Part("plan_processes.py"),
    "levers": Part("levers.py", out=False),
}


def installed(peer: Peer) -> str:
    """The peer's Python, installed when it is not there."""
    python, ready = peer.folder / "bin" / "python", peer.folder / "ready"
    if not ready.is_file():
        install = [str(python), "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt")]
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(peer.folder)],
            [*install, TORCH],
            [*install, *peer.packages],
        ):
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        ready.touch()
    return str(python)


def tables(command: Sequence[str]) -> str | None:
    """The tables that a script prints, shown as they come; None when it fails or prints none."""
    print(" ".join(command), flush=True)
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            if line.startswith("|") or (lines and not line.strip()):
                lines.append(line.rstrip())
    return "\n".join(lines).strip() or None if running.returncode == 0 else None


def spliced(page: str, name: str, text: str) -> str:
    """The page with this text between the markers of a part. ValueError when they are not there once."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(page)) != 1 or page.count(start) != 1:
        raise ValueError(f"{PAGE.name} needs {start.strip()} and {end} once")
    return pattern.sub(lambda _: f"{start}{text}\n{end}", page)


def facts(peers: dict[str, str]) -> str:
    """A line about the machine and the versions."""
    known = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", known.read_text(encoding="utf-8") if known.is_file() else "")
    processor = " ".join((named[1] if named else platform.processor() or platform.machine()).split())
    here = [f"{name} {version(name)}" for name in ("torch", "transformers")]
    for name, python in peers.items():
        asked = [python, "-c", "from importlib.metadata import version; print(version('trl'))"]
        there = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        here.append(f"TRL {there}" + (" for PPO" if name == "ppo-peer" else ""))
    commit = git("rev-parse", "--short", "HEAD") + (
        " and changes" if git("status", "--porcelain", "--", ".", f":!{PAGE.relative_to(ROOT)}") else ""
    )
    threads = os.environ["OMP_NUM_THREADS"]
    return (
        f"{processor}{_gpu()}, {os.cpu_count()} cores, {threads} thread{'s' if threads != '1' else ''} a process; "
        f"{', '.join(here)}; commit {commit}; {datetime.now(UTC):%Y-%m-%d}."
    )


def _gpu() -> str:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
    except FileNotFoundError:
        return ""
    return "".join(f", {line.partition(': ')[2].partition(' (')[0]}" for line in listed[:1])


def git(*words: str) -> str:
    """What git says of the project; unknown outside a repository."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return "unknown" if done.returncode else done.stdout.strip()


def measured(name: str, part: Part, pythons: dict[str, str], pairs: Path | None, repeats: int) -> bool:
    """Run a part and write it on the page; whether that went well."""
    peers = {peer: pythons[peer] for peer in part.peers}
    options = [word for peer, python in peers.items() for word in (f"--{peer}", python)]
    options += ["--pairs", str(pairs)] if part.pairs and pairs else []
    with tempfile.TemporaryDirectory() as out:
        options += ["--out", out] if part.out else []
        script = str(Path(__file__).with_name(part.script))
        found = tables([sys.executable, script, *options, "--repeats", str(repeats)])
    if found is not None:
        text = f"{found}\n\n{facts(peers)}"
        PAGE.write_text(spliced(PAGE.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    return found is not None


def main() -> None:
    """Parse the arguments; run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    for name, peer in PEERS.items():
        parser.add_argument(f"--{name}", help=f"a Python that has {peer.packages[0]}; none: {peer.folder.name}")
    parser.add_argument("--pairs", type=Path, help="a file of preference pairs; none: made up")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    if unknown := sorted(set(asked.parts) - set(PARTS)):
        parser.error(f"no part {unknown[0]}; there are {', '.join(PARTS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parts = {name: PARTS[name] for name in asked.parts or PARTS}
    for name in parts:
        spliced(PAGE.read_text(encoding="utf-8"), name, "")
    given = {"peer": asked.peer, "ppo-peer": asked.ppo_peer}
    needed = dict.fromkeys(peer for part in parts.values() for peer in part.peers)
    pythons = {name: given[name] or installed(PEERS[name]) for name in needed}
    failed = [name for name, part in parts.items() if not measured(name, part, pythons, asked.pairs, asked.repeats)]
    if failed:
        sys.exit(f"failed, and left on the page as they were: {', '.join(failed)}")


if __name__ == "__main__":
    main()
