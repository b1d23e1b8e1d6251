"""Help, schema and every recipe error answer quickly and never import torch and its like."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf_cli"
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "bitsandbytes", "accelerate", "pandas", "pyarrow")
CHILD = """
import sys
from rlhf_cli.cli.app import run_command_line
code = run_command_line(sys.argv[1:])
loaded = [name for name in {heavy!r} if name in sys.modules]
assert not loaded, loaded
sys.exit(code)
"""
UNUSED = (
    "torch._inductor.compile_fx", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "rich",
    "tensorboard",
)  # fmt: skip
"""What a plain run, without LoRA and quantisation and on local files, has no use for before its first step."""
TRAINS = """
import os, sys
from rlhf_cli.cli import app
from rlhf_cli.catalog.entries import Entry
plain = Entry.load
def load(entry):
    found = plain(entry)
    from rlhf_cli.train.engine import Engine
    Engine.tick = stop
    return found
def stop(engine, metrics):
    print(sorted(name for name in {unused!r} if name in sys.modules))
    print(metrics["loss"], flush=True)
    os._exit(0)
Entry.load = load
sys.argv[0] = "rlhf"
app.main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own that fails when something heavy was imported."""
    program = CHILD.format(heavy=HEAVY)
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def broken(tmp_path: Path) -> str:
    """A recipe with a wrong key."""
    file = tmp_path / "broken.yaml"
    file.write_text("stage: dpo\nlr: 1\n")
    return str(file)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "Usage: rlhf"),
        ([], "Usage: rlhf"),
        (["dpo", "--help"], "Usage: rlhf dpo"),
        (["ppo", "-h"], "Usage: rlhf ppo"),
        (["--version"], "rlhf "),
        (["schema"], '"$schema"'),
        (["schema", "ppo"], '"$schema"'),
        (["list", "--json"], '"objectives"'),
    ],
)
def test_what_goes_to_stdout_is_light(arguments: list[str], shown: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert shown in done.stdout


def test_recipe_errors_are_light(broken: str) -> None:
    for command in (["dpo", broken], ["check", broken], ["dpo", broken, "seed=x"], ["ppo", broken]):
        done = run(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {broken}:1:")
        assert "Traceback" not in done.stderr


def test_usage_errors_are_light(broken: str) -> None:
    for command in (["dpo"], ["dqo", broken], ["dpo", broken, "--foo"], ["schema", "x"], ["dpo", "nope.yaml"]):
        done = run(*command)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_help_takes_less_than_a_second_of_work() -> None:
    program = "import time; import rlhf_cli.cli.app as a; a.run_command_line(['--help']); print(time.process_time())"
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout.splitlines()[-1]) < 1.0, f"{time.perf_counter() - started:.1f} s on the wall"


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "rlhf_cli", "--help"], capture_output=True, text=True, timeout=60)
    assert done.stdout == run("--help").stdout


@pytest.mark.parametrize("package", ["recipe", "runs", "cli", "report", "data.prepare"])
def test_modules_below_the_torch_line(package: str) -> None:
    folder = ROOT / package
    names = [f"{package}.{path.stem}" for path in folder.glob("[a-z]*.py")] if folder.is_dir() else [package]
    imports = "; ".join(f"import rlhf_cli.{name}" for name in names)
    program = f"{imports}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of one layer, and rows for two stages."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("world")
    words = ["<pad>", "</s>", "<unk>", "yes", "no", "why", "so"]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": "why so", "chosen": f"yes {word}", "rejected": "no"} for word in words[3:]]
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    for name, lines in (("dpo", rows), ("sft", demonstrations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(("stage", "lora"), [("sft", False), ("dpo", False), ("dpo", True)])
def test_a_run_imports_what_it_uses(stage: str, lora: bool, world: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({
        "stage": stage, "model": str(world / "model"), "lora": {} if lora else None,
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(world / f"{stage}.jsonl"), "max_length": 16}, "evaluation": {"samples": 0},
        "training": {"learning_rate": 0.001, "batch_size": 4, "max_steps": 1},
        **({"objective": {"name": "dpo"}} if stage == "dpo" else {}),
    }))  # fmt: skip
    program = TRAINS.format(unused=UNUSED)
    done = subprocess.run(
        [sys.executable, "-c", program, stage, str(recipe)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    loaded, loss = done.stdout.splitlines()
    assert loaded == "[]"
    assert float(loss) > 0
