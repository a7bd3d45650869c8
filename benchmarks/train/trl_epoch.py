"""The same epoch by TRL and PEFT, run by the interpreter of a scratch environment: prints one JSON object.

    python trl_epoch.py BASE_DIR DATA

Same examples in the same order, batches of 8, rank 16 on all linear layers, learning rate, warm-up, clip and
dtype as lorasmith's; completion-only loss; no gradient checkpointing, which is TRL's faster setting.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer


def conversation(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        *before, last = row["messages"]
        return {"prompt": before, "completion": [last]}
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main() -> None:
    base, data = sys.argv[1:]
    rows = [conversation(json.loads(line)) for line in Path(data).read_text().splitlines()]
    steps = -(-len(rows) // 8)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out, per_device_train_batch_size=8, num_train_epochs=1, learning_rate=1e-3,
            lr_scheduler_type="linear", warmup_steps=-(-4 * steps // 100), weight_decay=0.0, max_grad_norm=1.0,
            bf16=True, gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to=[], seed=0,
            use_cpu=True, max_length=1024, dataloader_pin_memory=False, train_sampling_strategy="sequential",
            disable_tqdm=True,
        )  # fmt: skip
        watch = Losses()
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[watch],
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {name: importlib.metadata.version(name) for name in ("trl", "peft", "transformers", "torch")}
    print(json.dumps({"train_s": seconds, "peak_rss_bytes": peak, "losses": watch.losses, "versions": found}))


if __name__ == "__main__":
    main()
