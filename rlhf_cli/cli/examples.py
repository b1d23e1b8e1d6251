"""What people type: the examples at the end of each command's help. Tests parse every one of them."""

from __future__ import annotations

_STAGES: dict[str, tuple[str, ...]] = {
    "sft": (
        "rlhf sft recipes/tiny/sft.yaml",
        "rlhf sft sft.yaml training.learning_rate=2e-5 -o runs/sft-2",
        "rlhf sft sft.yaml --max-steps 20 --dry-run",
    ),
    "train-rm": (
        "rlhf train-rm recipes/tiny/rm.yaml",
        "rlhf train-rm rm.yaml --set data.train=mine.jsonl -o runs/rm-mine",
    ),
    "ppo": (
        "rlhf ppo recipes/tiny/ppo.yaml",
        "rlhf ppo ppo.yaml ppo.kl.coef=0.1 --seed 7 -o runs/ppo-kl",
        "rlhf ppo ppo.yaml --resume runs/ppo/checkpoints/step-000100",
    ),
    "dpo": (
        "rlhf dpo recipes/tiny/dpo.yaml",
        "rlhf dpo dpo.yaml objective.beta=0.05 -o runs/dpo-005",
        "rlhf dpo dpo.yaml --report-to tensorboard",
    ),
    "orpo": ("rlhf orpo recipes/tiny/orpo.yaml", "rlhf orpo orpo.yaml -o runs/orpo-2 --resume never"),
    "simpo": ("rlhf simpo recipes/tiny/simpo.yaml", "rlhf simpo simpo.yaml objective.gamma=1.0 -o runs/simpo-g1"),
    "sample": (
        "rlhf sample sample.yaml",
        "rlhf sample sample.yaml --best-of 8 -o runs/best",
    ),
    "score": ("rlhf score score.yaml", "rlhf score score.yaml data.completions=runs/sample -o runs/scored"),
    "select": ("rlhf select select.yaml", "rlhf select select.yaml data.completions=runs/scored -o runs/pairs"),
    "eval": (
        "rlhf eval recipes/eval/duel.yaml",
        "rlhf eval eval.yaml --against runs/sft --json",
    ),
}
EXAMPLES: dict[str, tuple[str, ...]] = _STAGES | {
    "": (
        "rlhf init my-project",
        "rlhf check recipes/tiny/sft.yaml",
        "rlhf sft recipes/tiny/sft.yaml",
        "rlhf explain dpo",
    ),
    "check": ("rlhf check recipes/tiny/dpo.yaml", "rlhf check sft.yaml dpo.yaml --set data.train=mine.jsonl"),
    "deps": ("rlhf deps recipes/tiny/dpo.yaml", "rlhf deps sft.yaml dpo.yaml > chain.mk"),
    "init": ("rlhf init my-project", "rlhf init my-project --model Qwen/Qwen2.5-0.5B-Instruct --quantization none"),
    "data": ("rlhf data recipes/tiny/dpo.yaml", "rlhf data sft.yaml -n 5 --html data.html"),
    "merge": ("rlhf merge runs/dpo -o merged", "rlhf merge runs/dpo -o merged --weights trained --dtype bfloat16"),
    "chat": (
        "rlhf chat runs/dpo",
        "rlhf chat runs/sft runs/dpo --temperature 0",
        'echo "Who are you?" | rlhf chat runs/dpo --max-new-tokens 64',
    ),
    "report": (
        "rlhf report runs/dpo",
        "rlhf report runs/dpo runs/simpo -o compare.html --x tokens",
    ),
    "plan": ("rlhf plan recipes/tiny/dpo.yaml", "rlhf plan dpo.yaml --vram 12"),
    "serve-rollouts": (
        "rlhf serve-rollouts ppo.yaml",
        "rlhf serve-rollouts ppo.yaml --print",
        "rlhf serve-rollouts ppo.yaml -- --tensor-parallel-size 2",
        "rlhf serve-rollouts ppo.yaml --vllm ~/vllm/bin/vllm --gpu-memory-utilization 0.4",
    ),
    "schema": ("rlhf schema > recipes/schema.json", "rlhf schema dpo"),
    "list": ("rlhf list", "rlhf list --json"),
    "explain": ("rlhf explain dpo", "rlhf explain gae --json"),
    "env": ("rlhf env", "rlhf env 2> env.txt"),
}
"""By command; by an empty name those of `rlhf` itself."""
