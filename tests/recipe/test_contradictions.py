"""Each rule across keys, with the line it says: it stands at one key and names the line of the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cli.errors import RecipeError
from rlhf_cli.recipe.reader import read_recipe

SFT = "stage: sft\nmodel:\n  name_or_path: m\ndata:\n  train: d\ntraining:\n  learning_rate: 1\noutput_dir: o\n"
DPO = SFT.replace("sft", "dpo") + "objective:\n  name: dpo\n"
PPO = SFT.replace("sft", "ppo") + "rewards:\n- function: f.py:g\n"
RM = SFT.replace("sft", "train-rm")
RLOO = "rollout:\n  completions_per_prompt: 2\nppo:\n  advantage:\n    name: rloo\n"
DROP = "add `lora: {}` or set `quantization: none`"


def under(recipe: str, block: str, *lines: str) -> str:
    """The recipe with further lines below a block's key."""
    return recipe.replace(f"{block}:\n", f"{block}:\n" + "".join(f"  {line}\n" for line in lines), 1)


CONTRADICTIONS: dict[str, tuple[str, str]] = {
    "two warm-ups": (
        under(SFT, "training", "warmup_ratio: 0.1", "warmup_steps: 3"),
        "r:7:3 training.warmup_ratio: give warmup_ratio or warmup_steps, not both (see training.warmup_steps on "
        "line 8)",
    ),
    "a warm-up that is not read": (
        under(SFT, "training", "warmup_ratio: 0.1", "lr_scheduler: constant"),
        "r:7:3 training.warmup_ratio: warmup_ratio is not read with lr_scheduler constant: use constant_with_warmup "
        "(see training.lr_scheduler on line 8)",
    ),
    "a warm-up longer than the run": (
        under(SFT, "training", "max_steps: 5", "warmup_steps: 9"),
        "r:8:3 training.warmup_steps: warmup_steps = 9 is more than max_steps = 5: the learning rate would never be "
        "reached (see training.max_steps on line 7)",
    ),
    "betas of no Adam": (
        under(SFT, "training", "optimizer: sgd", "adam_beta1: 0.5"),
        "r:8:3 training.adam_beta1: adam_beta1 is not read by optimizer sgd (see training.optimizer on line 7)",
    ),
    "a tracker twice": (
        SFT + "logging: {report_to: [wandb, wandb]}\n",
        "r:9:11 logging.report_to: report_to names a tracker twice",
    ),
    "flash attention in float32": (
        under(SFT, "model", "dtype: float32", "attn_implementation: flash_attention_2"),
        "r:4:3 model.attn_implementation: attn_implementation flash_attention_2 knows no dtype float32: use bfloat16, "
        "or sdpa (see model.dtype on line 3)",
    ),
    "packed without segments": (
        under(under(SFT, "training", "layout: packed"), "model", "attn_implementation: eager"),
        "r:8:3 training.layout: training.layout packed needs attention by segments, and model.attn_implementation "
        "eager has none: set one of them to auto (see model.attn_implementation on line 3)",
    ),
    "quantised and trained": (
        under(SFT, "model", "quantization: nf4") + "lora: null\n",
        "r:3:3 model.quantization: model.quantization is set but lora is null: a quantised base cannot be trained "
        f"itself; {DROP} (see lora on line 10)",
    ),
    "DoRA in eight bits": (
        under(SFT, "model", "quantization: int8") + "lora:\n  use_dora: true\n",
        "r:11:3 lora.use_dora: lora.use_dora does not work on model.quantization int8: use nf4, or use_dora: false "
        "(see model.quantization on line 3)",
    ),
    "a share of bad rows that all stop": (
        under(SFT, "data", "max_bad_rows: 0.1", "on_bad_row: error"),
        "r:5:3 data.max_bad_rows: max_bad_rows is only read with on_bad_row: drop, and on_bad_row is error (see "
        "data.on_bad_row on line 6)",
    ),
    "a weight of held-out data": (
        under(SFT, "data", "eval:", "- path: e", "  weight: 3"),
        "r:7:5 data.eval.0.weight: eval.0.weight is not read: a weight says how often an epoch of training passes over "
        "a source",
    ),
    "a source twice": (
        SFT.replace("train: d", "train:\n  - d\n  - e\n  - path: d\n    weight: 3"),
        "r:8:5 data.train.2: train.2 is the same source as train.0: give one of them, with weight: 2 (see data.train.0 "
        "on line 6)",
    ),
    "a reference that is not read": (
        DPO.replace("name: dpo", "name: sft") + "reference: m\n",
        "r:11:1 reference: reference is not read by objective sft: leave it out",
    ),
    "one row of a comparison": (
        under(DPO.replace("name: dpo", "name: kto"), "training", "batch_size: 1"),
        "r:7:3 training.batch_size: training.batch_size is 1, and objective kto compares those of a step: two at least",
    ),
    "no room for a prompt": (
        under(PPO, "data", "max_length: 64") + "rollout:\n  max_new_tokens: 64\n",
        "r:13:3 rollout.max_new_tokens: rollout.max_new_tokens = 64 leaves no room for a prompt in data.max_length = "
        "64 (see data.max_length on line 5)",
    ),
    "completions of prompts": (
        under(PPO, "data", "truncation: right"),
        "r:5:3 data.truncation: data.truncation right cuts completions, and ppo's data have none: use left or drop",
    ),
    "only the critic": (
        under(PPO, "training", "max_steps: 5") + "critic:\n  pretrain_steps: 5\n",
        "r:13:3 critic.pretrain_steps: critic.pretrain_steps = 5 would be all of training.max_steps = 5: the policy "
        "would never be trained (see training.max_steps on line 7)",
    ),
    "a wire of no critic": (
        PPO + RLOO + "doctor: {wires: {explained_variance: pause}}\n",
        "r:16:18 doctor.wires.explained_variance: doctor.wires.explained_variance watches a critic, and ppo.advantage "
        "rloo has none: leave it out (see ppo.advantage on line 14)",
    ),
    "a threshold of no wire": (
        PPO + "doctor:\n  thresholds: {length_growth: 9}\n  wires: {length: ignore}\n",
        "r:12:16 doctor.thresholds.length_growth: thresholds.length_growth is only read by wires.length, which is set "
        "to ignore (see doctor.wires.length on line 13)",
    ),
    "groups that do not come out even": (
        under(PPO, "training", "batch_size: 5") + "rollout:\n  completions_per_prompt: 3\n",
        "r:7:3 training.batch_size: a rollout of training.batch_size x ppo.mini_batches = 20 completions cannot be "
        "shared out in groups of rollout.completions_per_prompt = 3 (see rollout.completions_per_prompt on line 13)",
    ),
    "the time of a model": (
        PPO.replace("function: f.py:g", "run: r\n  timeout: 3"),
        "r:11:3 rewards.0.timeout: timeout is only read with function or rule",
    ),
    "a cost without its multiplier": (
        PPO + "- function: f.py:h\n  role: cost\n",
        "r:9:1 rewards: rewards holds 'h' with role: cost; say how it is held down: ppo.lagrange: {}",
    ),
    "more than the ceiling": (
        PPO + "ppo:\n  lagrange:\n    init: 9\n    max: 5\n",
        "r:13:5 ppo.lagrange.init: init 9 lies above max 5 (see ppo.lagrange.max on line 14)",
    ),
    "kinds of KL": (
        PPO + "ppo:\n  kl_in: loss\n  kl_estimator: k1\n",
        "r:13:3 ppo.kl_estimator: kl_estimator k1 does not belong in the loss, where its gradient is zero on average: "
        "use k2 or k3, or kl_in: reward (see ppo.kl_in on line 12)",
    ),
    "data settings of another objective": (
        under(RM, "data", "step_separator: x") + "objective:\n  name: bradley_terry\n",
        "r:5:3 data.step_separator: data.step_separator is only read by step_labels, two_token, and objective.name is "
        "bradley_terry (see objective.name on line 11)",
    ),
    "no name": (SFT.replace("dir: o", "dir: ' '"), "r:8:13 output_dir: the text is empty"),
    "no path": (SFT.replace("train: d", "train: ''"), "r:5:10 data.train: the text is empty"),
    "a name for no file": (
        SFT.replace("path: m", f"path: a/{'x' * 256}"),
        "r:3:17 model.name_or_path: a name in it is longer than 255 bytes; no file can be called so",
    ),
    "no layers": (
        SFT + "lora: {target_modules: []}\n",
        "r:9:24 lora.target_modules: the list is empty (give at least one)",
    ),
    "a broken expression": (
        SFT + "lora: {target_modules: '('}\n",
        "r:9:24 lora.target_modules: this is no regular expression: missing ), unterminated subpattern at position 0",
    ),
    "columns of nothing": (
        SFT.replace("train: d", "train: {path: d, columns: {prompt: []}}"),
        "r:5:38 data.train.columns.prompt: the list is empty (give at least one)",
    ),
}


def said(folder: Path, text: str, *overrides: str) -> list[str]:
    """What is wrong with a recipe, its file called r."""
    file = folder / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file, overrides, None)
    assert caught.value.exit_code == 2
    return [str(problem).replace(str(file), "r") for problem in caught.value.problems]


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_names_both_lines(name: str, tmp_path: Path) -> None:
    text, line = CONTRADICTIONS[name]
    assert said(tmp_path, text) == [line]


def test_all_contradictions_are_named_at_once(tmp_path: Path) -> None:
    text = under(PPO, "data", "truncation: right", "max_length: 128") + RLOO + "critic: {start: zero}\n"
    assert [line.partition(": ")[0].split()[-1] for line in said(tmp_path, text)] == [
        "data.truncation", "data.max_length", "critic.start",
    ]  # fmt: skip


def test_an_override_is_named_in_the_place_of_a_line(tmp_path: Path) -> None:
    (line,) = said(tmp_path, under(SFT, "training", "warmup_ratio: 0.1"), "training.warmup_steps=3")
    assert line == (
        "r:7:3 training.warmup_ratio: give warmup_ratio or warmup_steps, not both (see training.warmup_steps in "
        "--set training.warmup_steps=3)"
    )


BOMBS = {
    "fifty megabytes": lambda file: file.truncate(50 * 2**20),
    "aliases": lambda file: file.write(
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 19_000))
    ),
    "depth": lambda file: file.write(b"[" * 1_000_000),
    "keys": lambda file: file.write(b"stage: sft\n" + b"".join(b"k%d: 1\n" % i for i in range(19_000))),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_take_little_time_and_memory(tmp_path: Path) -> None:
    """A second of time for each, and below 200 MB in all."""
    code = (
        "import sys, time\n"
        "from rlhf_cli.errors import RecipeError\n"
        "from rlhf_cli.recipe.reader import read_recipe\n"
        "for path in sys.argv[1:]:\n"
        "    start = time.process_time()\n"
        "    try: read_recipe(path, [], None)\n"
        "    except RecipeError as error: said = error.problems\n"
        "    assert 1 <= len(said) <= 51 and time.process_time() - start < 1, path\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(status['VmHWM'].split()[0]) * 1024)"
    )
    for name, write in BOMBS.items():
        with (tmp_path / name).open("wb") as file:
            write(file)
    files = [str(tmp_path / name) for name in BOMBS]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 10**6
