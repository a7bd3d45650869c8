"""One run of the grid by PEFT, in a process of its own, in the plain loop of its documentation.

    python -m sweeps.peft_run DATA OUT LR RANK SEED BATCH_SIZE MAX_LENGTH STEPS

Prints one JSON object: seconds of each step, losses, and the largest resident memory. Tokens, masks and the order of the
examples are those that lorasmith trains on; rows are padded to the longest of their batch.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import peft
import torch

from lorasmith.bases import load_base
from lorasmith.data import Example, encode, read_records, steps
from lorasmith.train import TrainConfig


def main() -> None:
    data, out, lr, rank, seed, batch_size, max_length, count = sys.argv[1:]
    base = load_base("smollm2-135m")
    examples = encode(read_records(data), base.tokenizer, max_length=int(max_length)).examples
    order = steps(examples, batch_size=int(batch_size), epochs=1, seed=int(seed))
    torch.manual_seed(int(seed))
    config = peft.LoraConfig(r=int(rank), lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(base.model, config)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=float(lr), weight_decay=0.0, fused=True)
    schedule = TrainConfig(lr=float(lr))
    seconds, losses = [], []
    for step in range(int(count)):
        start = time.perf_counter()
        batch = padded([examples[i] for i in order[step]])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = schedule.lr_at(step, int(count))
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    model.save_pretrained(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"step_s": seconds, "losses": losses, "peak_rss_bytes": peak}))


def padded(examples: list[Example]) -> dict[str, torch.Tensor]:
    length = max(map(len, examples))
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens = torch.from_numpy(example.tokens).long()
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(example.supervised), tokens, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


if __name__ == "__main__":
    main()
