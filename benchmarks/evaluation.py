"""Prompts per second of safebasin's evaluation against one `model.generate` call per prompt, same answers.

    python benchmarks/evaluation.py [--model FOLDER] [--prompts N] [--max-new-tokens N] [--json FILE]

Without --model: the embedded pocket model and its harmful suite (built on first use, about two minutes). With a folder: that model and
the prompts of --data (CSV or JSONL). One thread; both sides see the same rendered prompts, greedy, float32. Rounds alternate and the
median is taken, so that other load on the machine falls on both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from orchestrator import config
from orchestrator.evaluation.generate import encode_prompts, generate, inference, stop_tokens  # noqa: E402
from orchestrator.evaluation.suites import load_suite  # noqa: E402
from orchestrator.models import loading  # noqa: E402


def one_by_one(model, tokenizer, prompts, max_new_tokens: int) -> list[str]:
    """The loop found in most evaluation scripts: a prompt, a call."""
    import torch

    answers, stops = [], sorted(stop_tokens(model, tokenizer))
    with inference(model):
        for ids in encode_prompts(tokenizer, prompts):
            row = torch.tensor([ids])
            out = model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            answers.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return answers


def measure(model, tokenizer, prompts, max_new_tokens: int, rounds: int) -> dict:
    """Seconds of both ways, alternating; the slow one is given every fourth prompt, since it needs no more to be measured."""
    few = prompts[::4]
    generate(model, tokenizer, prompts[:8], max_new_tokens=4)
    one_by_one(model, tokenizer, few[:2], 4)
    ours, theirs, same = [], [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        batched = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        middle = time.perf_counter()
        single = one_by_one(model, tokenizer, few, max_new_tokens)
        ours.append(len(prompts) / (middle - start))
        theirs.append(len(few) / (time.perf_counter() - middle))
        same = sum(a == b for a, b in zip(batched[::4], single, strict=True))
    return {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "batched_per_s": statistics.median(ours),
        "one_by_one_per_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "same_answers": same,
        "compared": len(few),
    }


def main() -> None:
    """Print one table; write the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--data", default="pocket:harmful")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    template = None if options.model == "pocket" else loading.TEMPLATE_EXAMPLE
    model, tokenizer = loading.load(config.Model(model_name_or_path=options.model, chat_template=template))
    suite = load_suite(config.Suite(name="benchmark", data=options.data, limit=options.prompts))
    figures = measure(model, tokenizer, suite.prompts, options.max_new_tokens, options.rounds)
    figures |= {"model": options.model, "parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__}
    print(
        f"{'one by one':>12} {'batched':>10} {'ratio':>7} {'same answers':>13}   prompts/s, {figures['parameters']:,} parameters, 1 thread"
    )
    print(
        f"{figures['one_by_one_per_s']:12.1f} {figures['batched_per_s']:10.1f} {figures['ratio']:7.1f} "
        f"{figures['same_answers']:>9}/{figures['compared']}"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
