"""What an engine must do the same as PlainEngine, as functions that run on one worker or on several, in this process.

Each case trains a tiny Llama and returns its weights. Imported by workers that `test_engine.py` starts.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import toy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

import strategies
from orchestrator.trial.engine.deepspeed import DeepSpeedEngine
from strategies.plain import PlainEngine
from strategies.recipe import build

STEPS = 3
OFFLOADED = {
    "1, optimizer on the host": (1, ("offload_optimizer",)),
    "2, optimizer on the host": (2, ("offload_optimizer",)),
    "3, optimizer on the host": (3, ("offload_optimizer",)),
    "3, weights on the host": (3, ("offload_param",)),
    "3, both on the host": (3, ("offload_optimizer", "offload_param")),
}
"""Stages whose shards are in host memory: (ZeRO stage, what is offloaded)."""
ON_HOST = ("surgery", "lora and frozen layers")
"""The cases they run: all verbs, accumulation, clipping, two parameter groups, parameters that no backward reaches."""


def settings(**changes):
    values = {
        # small, since Adam's first steps turn the round-off of near-zero gradients into steps of this size
        "learning_rate": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.5, "bf16": False,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def make(stage: int | str | None, module, rank: int, world: int, **changes):
    """The engine of a ZeRO stage (a key of OFFLOADED for one with shards on the host), or PlainEngine for None."""
    common = {"training": settings(**changes), "max_steps": STEPS, "rank": rank, "world_size": world, "device": "cpu"}
    if stage is None:
        return PlainEngine(module, **common)
    stage, keys = OFFLOADED.get(stage, (stage, ()))
    # small buckets: several of them even in this model; threshold: some parameters stay gathered, some not
    zero = {"stage": stage, "reduce_bucket_size": 4000, "stage3_param_persistence_threshold": 2000} if stage else {"stage": 0}
    return DeepSpeedEngine(module, deepspeed={"zero_optimization": zero | {key: {"device": "cpu"} for key in keys}}, **common)


def rows(rank: int, world: int, **changes):
    """8 rows per step however many workers there are."""
    return toy.data(per_device_batch_size=2, accumulation_steps=4 // world, rank=rank, world_size=world, **changes)


def plain(engine, data, step):
    engine.gradient(data.batches(data.task, step))


def surgery(engine, data, step):
    """All verbs in one step: two gradients, one at shifted weights, inner products, a combination, one more on top."""
    task = data.batches(data.task, step)
    engine.gradient(task)
    g_u = engine.gradients()
    engine.gradient(data.batches(data.safety, step, "safety", 3))
    g_a = engine.gradients()
    with engine.shifted(g_a, 0.02):
        engine.gradient(task)
        g_s = engine.gradients()
    engine.combine([(1.0, g_u), (-0.5 * g_u.dot(g_a) / g_a.dot(g_a), g_a), (0.3 / g_s.norm(), g_s)])
    engine.gradient(data.batches(data.task, step, "more", 4))


def small():
    return toy.model(layers=2)


def mixture():
    """A mixture of experts, which lie in one tensor a layer."""
    with torch.random.fork_rng(devices=[]):
        return tiny.model("qwen3_moe", num_hidden_layers=2).train()


def run(stage, rank, world, step_of=plain, recipe=(), steps=STEPS, checkpointing=False, last_stage=3, made=small, dtype=torch.float32, **changes):
    """Train, export, and return (weights, steps' logs); None for a stage that a strategy of the recipe refuses."""
    if isinstance(stage, int) and stage > last_stage:
        assert any(strategies.get(name).max_zero_stage == last_stage for name, _ in recipe)
        return None
    data = rows(rank, world)
    built = build(recipe)
    data = built.prepare_data(data)
    module = built.setup(made().to(dtype))
    if checkpointing:
        module.activation_checkpointing_enable()
    before = hooks(module)
    engine = make(stage, module, rank, world, **changes)
    logs = []
    for step in range(steps):
        extra = built.step(engine, data.batches(data.task, step), step) if recipe else step_of(engine, data, step)
        logs.append(engine.step() | (extra or {}) | built.after_step(engine, step))
    built.end(engine)
    module = built.finish(engine.export())
    engine.close()
    assert hooks(module) == before, "a hook is left in the exported model"
    assert all(p.numel() for p in module.parameters()), "an exported parameter is empty"
    left = {name for p in module.parameters() for name in vars(p)}
    assert not left, f"left on exported parameters: {left}"
    return toy.weights(module), logs


def hooks(module) -> dict[str, int]:
    """Number of forward and backward hooks of each module that has any."""
    counts = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
        for name, m in module.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


CASES = {
    "plain": {},
    "clipping off, no decay": {"max_grad_norm": 0.0, "weight_decay": 0.0},
    "surgery": {"step_of": surgery},
    "frozen layers": {"recipe": (("freeze_layers", {"start": 1, "end": 1, "modules": "all"}),), "checkpointing": True},
    "lora and frozen layers": {"recipe": (("freeze_layers", {"start": 1, "end": 1}), ("lora", {"lora_r": 4}))},
    "lora on experts": {"recipe": (("lora", {"lora_r": 4}),), "made": mixture, "checkpointing": True},
    "safegrad": {"recipe": (("safegrad", {"rho": 0.5, "num_safety": 8, "safety_batch_size": 3}),)},
    "sap": {"recipe": (("sap", {"num_pairs": 8, "pairs_per_step": 3}),), "checkpointing": True, "last_stage": 2},
    "spard and sbr": {"recipe": (("spard", {"share": 0.1, "safety_batch_size": 3, "radius": 0.01}), ("sbr", {"num_anchors": 3, "weight": 5.0}))},
    "constrained_sft and ema": {"recipe": (("constrained_sft", {}), ("ema", {"decay": 0.5}))},
    "lisa": {"recipe": (("lisa", {"align_steps": 1, "task_steps": 1}),)},
    "preferences": {"recipe": (("refusal_training", {"loss": "dpo", "benign_share": 0.5}),)},
}


def resume(stage, rank, world, folder: Path):
    """Weights of an uninterrupted run, and of one that was saved, lost a step and was loaded into a fresh engine."""
    data = rows(rank, world)

    def engine():
        return make(stage, toy.model(layers=2), rank, world)

    def train(built, first, last):
        for step in range(first, last):
            plain(built, data, step)
            built.step()

    whole = engine()
    train(whole, 0, STEPS)
    first = engine()
    train(first, 0, 1)
    first.save(folder, {"note": "one"})
    train(first, 1, 2)
    first.close()
    second = engine()
    extra = second.load(folder)
    assert extra == {"note": "one"} and second.steps == 1
    train(second, 1, STEPS)
    results = toy.weights(whole.export()), toy.weights(second.export())
    whole.close()
    second.close()
    return results


def shift(stage, rank, world):
    """Weights before, inside and after `shifted`, the last after an exception inside."""
    data = rows(rank, world)
    engine = make(stage, toy.model(layers=2), rank, world)
    plain(engine, data, 0)
    engine.step()
    plain(engine, data, 1)
    direction = engine.gradients()

    def look():
        with engine.gathered() as whole:
            return toy.weights(whole)

    before, inside = look(), None
    try:
        with engine.shifted(direction, 0.1):
            inside = look()
            raise KeyError("inside")
    except KeyError:
        after = look()
    plain(engine, data, 1)
    engine.step()
    exported = toy.weights(engine.export())
    engine.close()
    return before, inside, after, exported


def nan_message(stage, rank, world) -> str:
    """What a NaN on one worker alone raises on this worker."""
    data = rows(rank, world)
    engine = make(stage, toy.model(layers=2), rank, world)

    def loss(forward, batch):
        from strategies.base import lm_loss

        total, units = lm_loss(forward, batch)
        return (total * float("nan") if rank == world - 1 else total), units

    try:
        engine.gradient(data.batches(data.task, 0), loss)
    except FloatingPointError as error:
        return str(error)
    finally:
        engine.close()
    return "nothing raised"


def generates(stage, rank, world) -> list[int]:
    """Tokens that the gathered model generates in the middle of training, after which training goes on."""
    data = rows(rank, world)
    engine = make(stage, toy.model(layers=2), rank, world)
    plain(engine, data, 0)
    engine.step()
    with engine.gathered() as whole, torch.no_grad():
        whole.eval()
        answer = whole.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=5, do_sample=False, pad_token_id=0)[0].tolist()
    plain(engine, data, 1)
    engine.step()
    engine.close()
    return answer


def everything(rank: int, world: int, folder: str) -> dict:
    """All cases under PlainEngine and every stage; tensors of rank 0."""
    torch.set_num_threads(1)
    found: dict = {}
    for stage in (None, 0, 1, 2, 3, *OFFLOADED):
        gc.freeze()  # every engine collects when it is closed, which would walk all that imports have left until here
        for name in ON_HOST if stage in OFFLOADED else CASES:
            found[stage, name] = run(stage, rank, world, **CASES[name])
        found[stage, "resume"] = resume(stage, rank, world, Path(folder) / f"stage-{stage}")
        found[stage, "shift"] = shift(stage, rank, world)
        found[stage, "nan"] = nan_message(stage, rank, world)
        found[stage, "generates"] = generates(stage, rank, world)
    return found


def worker(rank: int, world: int, folder: str) -> None:
    """Entry of a started process: all cases over gloo, results in `folder/rank-N.pt`."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(everything(rank, world, folder), Path(folder) / f"rank-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    worker(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
