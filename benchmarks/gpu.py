"""The GPU path from end to end: a LoRA search and whole-model trainings under ZeRO-2 and with offload, on a fresh random Llama.

    python benchmarks/gpu.py [--only NAME ...] [--trials N] [--steps N] [--hidden N --layers N --vocabulary N] [--json FILE]
    python benchmarks/gpu.py --device cpu --hidden 64 --layers 2 --vocabulary 200 --steps 4      # a look at the logic without a GPU

Each workload is a whole run as a user starts it (`experiment.run`: a Ray cluster of this machine, one lane of one worker, Optuna,
DeepSpeed, bf16, evaluation), on a model of about 270 M weights made here. One row per trial: seconds of an optimiser step, the most
memory the worker's GPU held, and what `doctor` would have foretold without activations. The memory of a CPU worker is that of its
process with all libraries and is no measure of anything. The first workload starts the cluster; its wall time holds that.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HOST = {"device": "cpu"}
WORKLOADS = {
    "lora": ("lora", {"stage": 1}),
    "full, ZeRO-2": ("full", {"stage": 2}),
    "full, ZeRO-2, optimizer on the host": ("full", {"stage": 2, "offload_optimizer": HOST}),
    "full, ZeRO-3, all on the host": ("full", {"stage": 3, "offload_optimizer": HOST, "offload_param": HOST}),
}
HEADINGS = ("workload", "trial", "state", "weights M", "trained M", "s / step", "peak GiB", "foretold GiB", "trial s", "wall s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=tuple(WORKLOADS), help="workloads, by name")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trials", type=int, default=3, help="trials of the LoRA search; the others are one each")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    facts = machine(args.device)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), args)
        for name in args.only or WORKLOADS:
            rows += run(Path(folder), name, args)
            keep(rows, facts, args)
    show(rows, facts)
    if any(row["state"] != "complete" for row in rows):
        raise SystemExit("not every trial was completed; see the column state")


def keep(rows: list[dict], facts: str, args) -> None:
    """Write what is known so far, so that a benchmark that is cut off leaves the workloads it ended."""
    if args.json:
        asked = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"machine": facts, "arguments": asked, "rows": rows}, indent=1))


def machine(device: str) -> str:
    """What the figures are of. Ends the process where a GPU is asked for and there is none."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return f"CPU ({os.cpu_count()} cores): shows that the path works, measures no GPU"
    import torch

    if not torch.cuda.is_available():
        why = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        raise SystemExit(f"benchmarks/gpu.py measures a GPU, and torch {torch.__version__} {why}; --device cpu shows its logic on a small model")
    return f"{torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def make_inputs(folder: Path, args) -> None:
    """A random Llama, its tokenizer, and rows of random words."""
    import tiny_llama
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tiny_llama.tokenizer()
    heads = max(1, args.hidden // 64)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=max(args.vocabulary, len(words)), hidden_size=args.hidden, intermediate_size=4 * args.hidden, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2 * args.length, bos_token_id=2, eos_token_id=3,
            pad_token_id=0,
        )  # fmt: skip
    ).to(torch.bfloat16).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choices(tiny_llama.WORDS, k=count))

    rows = [{"prompt": f"make {text(6)}", "response": text(args.length - 16)} for _ in range(64)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("harmful", "benign"):
        (folder / f"{name}.txt").write_text("\n".join(f"how do i make {text(5)}" for _ in range(8)))


def experiment_of(folder: Path, name: str, args):
    from orchestrator import config

    recipe, zero = WORKLOADS[name]
    rates = {"low": 1e-5, "high": 1e-4, "log": True}
    suites = [{"name": kind, "data": str(folder / f"{kind}.txt"), "kind": kind} for kind in ("harmful", "benign")]
    return config.from_dict({
        "name": "gpu",
        "model": {"model_name_or_path": str(folder / "model"), "dtype": "bfloat16"},
        "task": {"data": str(folder / "task.jsonl"), "eval_size": 8, "metric": "neg_loss", "max_length": args.length, "max_new_tokens": 8},
        "safety": {"data": None, "max_new_tokens": 8, "suites": suites, "allow_overlap": True},  # random words meet by chance; only times are read
        "recipes": [[recipe]],
        "search": {"trials": args.trials if recipe == "lora" else 1, "finalists": 0, "seeds": 1, "space": {"learning_rate": rates}},
        "training": {
            "bf16": True, "max_steps": args.steps, "per_device_train_batch_size": args.batch, "logging_steps": args.steps, "save_steps": 0,
            "torch_threads": 0 if "offload_optimizer" in zero and args.device == "cuda" else 1,
        },
        "deepspeed": {"zero_optimization": zero},
        "ray": {"lanes": 1, "use_gpu": args.device == "cuda"},
        "tracking": {"enabled": False},
        "output": {"dir": str(folder / "run"), "overwrite": True},
    })  # fmt: skip


def run(folder: Path, name: str, args) -> list[dict]:
    """One row per trial of a workload."""
    from rich.console import Console

    from orchestrator.config import recipe_items
    from orchestrator.experiment import driver
    from orchestrator.models import identity
    from orchestrator.trial.engine import memory

    made = experiment_of(folder, name, args)
    foretold = memory.of_experiment(made, recipe_items(made.recipes[0]), identity.shape(made.model)).peak
    start = time.perf_counter()
    driver.run(made, Console(stderr=True))
    wall, rows = time.perf_counter() - start, []
    for path in sorted((folder / "run" / "trials").glob("*/result.json")):
        result = json.loads(path.read_text())
        steps = [event["seconds_per_step"] for event in result["history"] if event["kind"] == "train"]
        rows.append({
            "workload": name, "trial": result["trial_id"], "state": result["state"], "error": result["error"], "wall_s": wall,
            "parameters": result["facts"].get("parameters"), "trained": result["facts"].get("trainable_parameters"),
            "step_s": steps[-1] if steps else None, "peak_bytes": result["facts"].get("peak_memory_mb", 0) * 2**20, "foretold_bytes": foretold,
            "seconds": result["seconds"],
        })  # fmt: skip
    return rows


def show(rows: list[dict], facts: str) -> None:
    from rich.console import Console
    from rich.table import Table

    def number(value, scale: float, digits: int) -> str:
        return "-" if value is None else f"{value / scale:.{digits}f}"

    table = Table(*HEADINGS, title=facts)
    for row in rows:
        table.add_row(
            row["workload"], row["trial"], row["state"], number(row["parameters"], 1e6, 1), number(row["trained"], 1e6, 2),
            number(row["step_s"], 1, 3), number(row["peak_bytes"], 2**30, 2), number(row["foretold_bytes"], 2**30, 2),
            number(row["seconds"].get("total"), 1, 1), number(row["wall_s"], 1, 1),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
