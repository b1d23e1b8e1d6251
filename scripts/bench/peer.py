"""The peer's side of against_trl.py: TRL's trainers on the same world. Runs in an environment of its own."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from probe import probe

DATA = {"kto": "verdicts", "sft": "demonstrations", "rloo": "prompts", "ppo": "prompts"}
"""Which file of the world; else pairs."""
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dpo": ("trl", "DPO", {"beta": 0.1}),
    "kto": ("trl", "KTO", {"beta": 0.1}),
    "orpo": ("trl.experimental.orpo", "ORPO", {"beta": 0.1}),
    "simpo": ("trl.experimental.cpo", "CPO", {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "rm": ("trl", "Reward", {}),
    "sft": ("trl", "SFT", {"assistant_only_loss": False}),
    "rloo": ("trl", "RLOO", {"num_generations": 4, "max_completion_length": 128, "beta": 0.05, "num_iterations": 1,
                             "per_device_train_batch_size": 16, "normalize_advantages": False}),
}  # fmt: skip
"""Module, name and settings."""
KEYS = {"plain": (), "precomputed": ("precompute_ref_log_probs",), "packed": ("packing",)}
"""What each of its ways switches on."""


def _length(completions: list[Any], **_: Any) -> list[float]:
    return [len(str(c)) / 1000 for c in completions]


def run_peer(world: Path, job: str, out: Path, way: str, steps: int) -> dict[str, Any]:
    """TRL's trainer for the job. way: plain, precomputed (references) or packed."""
    import torch
    from datasets import Dataset

    torch.set_num_threads(1)
    method = job.partition("-")[0]
    lines = (world / f"{DATA.get(method, 'pairs')}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    order = json.loads((world / "order.json").read_text(encoding="utf-8"))
    data = Dataset.from_list([rows[i] for i in order])
    common: dict[str, Any] = {
        "output_dir": str(out / "peer"), "per_device_train_batch_size": 4, "learning_rate": 1e-5,
        "max_steps": steps, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "gradient_checkpointing": False, "bf16": False, "use_cpu": True, "seed": 42,
        "optim": "adamw_torch_fused", "disable_tqdm": True, "max_grad_norm": 1.0, "weight_decay": 0.0,
    }  # fmt: skip
    trainer = _ppo(world, data, common) if method == "ppo" else _trainer(world, job, data, common, way)
    found: dict[str, Any] = {}
    with probe(found):
        trainer.train()
    found["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return found


def _trainer(world: Path, job: str, data: Any, common: dict[str, Any], way: str) -> Any:
    """The trainer of a method."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

    method, folder = job.partition("-")[0], str(world / "model")
    load: dict[str, Any] = {"dtype": torch.float32}
    if "nf4" in job:
        load["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if method == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **load)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **load)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if "lora" in job or "nf4" in job else None
    module, trainer_name, more = TRAINERS[method]
    library = importlib.import_module(module)
    trainer_class, configuration = getattr(library, f"{trainer_name}Trainer"), getattr(library, f"{trainer_name}Config")
    if method != "rloo":
        common["max_length"] = 1152
    arguments = configuration(**common | more | dict.fromkeys(KEYS[way], True))
    extra = {"reward_funcs": _length} if method == "rloo" else {}

    class InOrder(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
            if method == "rloo":
                return super()._get_train_sampler(*arguments, **named)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return InOrder(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora, **extra
    )


def _ppo(world: Path, data: Any, common: dict[str, Any]) -> Any:
    """The PPO trainer of an older release: policy, reference, reward and value model, all whole."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    library = importlib.import_module("trl.experimental.ppo")
    folder = str(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    ids = [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in data]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(str(world / "reward"), num_labels=1) for _ in range(2)
    )
    arguments = library.PPOConfig(**common | {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": -1,
        "total_episodes": 16 * common["max_steps"],
        "num_ppo_epochs": 4, "num_mini_batches": 1, "response_length": 128, "temperature": 1.0, "stop_token": "eos",
        "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "num_sample_generations": 0,
        "local_rollout_forward_batch_size": 16,
    })  # fmt: skip
    return library.PPOTrainer(
        args=arguments, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=type(data).from_dict({"input_ids": ids}),
    )  # fmt: skip
