"""Where a model tells malicious from normal prompts: the "safety layers", from activations and from over-rejection.

Li et al., "Safety Layers in Aligned Large Language Models", ICLR 2025, arXiv 2408.17003, sections 3.2 (existence) and 3.3 (localisation),
described after the reproduction silu101/safety-layers-repo. Layers are counted from 0, the first after the embedding; ranges include both
ends. Activations are taken from the decoder blocks themselves, so that no index is shifted by the embedding and the last is not normed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies import block_outputs, blocks, matrices, rows, trying
from strategies.base import Example, StrategyError, TrainingData

Range = tuple[int, int]


@dataclass(frozen=True)
class Curves:
    """Cosines of last-token activations by layer, (seeds, layers) each: mean over the random pairs of one seed's draw."""

    normal: Tensor
    malicious: Tensor
    mixed: Tensor

    @property
    def gap(self) -> Tensor:
        """(seeds, layers): by how much two normal prompts are more alike than a normal and a malicious one."""
        return self.normal - self.mixed


@dataclass(frozen=True)
class Located:
    """The safety layers of a model and what they were taken from."""

    curves: Curves
    onset: Range
    """From the activations alone."""
    range: Range
    """Refined by over-rejection; equal to `onset` where scaling changed no verdict."""
    untouched: int
    """Harmless prompts refused by the model as it is."""
    counts: dict[Range, int]
    """Harmless prompts refused with these layers' weights scaled."""
    asked: int
    """Harmless prompts asked each time."""


# ------------------------------------------------------------------------------------------------ activations


@contextmanager
def watched(model: nn.Module, seen: dict[int, Tensor], last: list[Tensor]) -> Iterator[None]:
    """Inside, every forward writes into seen[layer] the (R, d) outputs of that block at the positions last[0], (R,). Hooks go afterwards. Raises
    StrategyError for blocks that give no hidden states of one width."""
    places = alike(model)

    def hook(layer: int):
        def keep(module, inputs, output):
            hidden = places[layer].of(output)
            seen[layer] = hidden[torch.arange(hidden.shape[0], device=hidden.device), last[0].to(hidden.device)].detach().float().cpu()

        return keep

    handles = [block.register_forward_hook(hook(layer)) for layer, block in enumerate(blocks.of(model).modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alike(model: nn.Module) -> tuple[block_outputs.Place, ...]:
    """Where each block's hidden states are. Raises StrategyError where a block gives none, or where widths differ."""
    places = block_outputs.places(model, "freeze_layers.range=auto")
    widths = sorted({place.width for place in places})
    if len(widths) > 1:
        raise StrategyError(
            f"freeze_layers.range=auto compares the outputs of all decoder blocks, and those of this model are {widths[0]} to {widths[-1]} wide; "
            "give freeze_layers.start and end"
        )
    return places


def last_token_states(model: nn.Module, prompts: Sequence[Example], data: TrainingData) -> Tensor:
    """(prompts, layers, d) float32 on the CPU: output of every block at the last token before the answer. Modes and weights stay."""
    asked = [Example(row.prompt, (-100,) * len(row.prompt), row.id, row.kind) for row in prompts]
    seen: dict[int, Tensor] = {}
    last = [torch.zeros(0)]
    found, size, forward = [], data.per_device_batch_size, trying.forward(model)
    with torch.no_grad(), rows.evaluating(model), watched(model, seen, last):
        for start in range(0, len(asked), size):
            batch = data.collate(asked, range(start, min(start + size, len(asked))))
            last[0] = batch["attention_mask"].sum(dim=1) - 1
            forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            found.append(torch.stack([seen[layer] for layer in range(len(seen))], dim=1))
    return torch.cat(found)


# ------------------------------------------------------------------------------------------------ pure functions on activations


def pair_cosines(a: Tensor, b: Tensor, pairs: Tensor) -> Tensor:
    """(L,) mean over pairs of the cosine between a[pairs[:, 0]] and b[pairs[:, 1]], float64. a (N, L, d), b (M, L, d), pairs (P, 2)."""
    x, y = a[pairs[:, 0]].double(), b[pairs[:, 1]].double()
    return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=1e-12).mean(dim=0)


def draw_pairs(first: Tensor, second: Tensor, count: int, generator: torch.Generator, same: bool) -> Tensor:
    """(count, 2) indices, one of `first` and one of `second`; with `same` (both of one class) never a prompt with itself.

    Raises StrategyError where `same` and there is only one prompt to draw from.
    """
    if same and len(first.unique()) < 2:
        raise StrategyError("two prompts of each class are needed to compare them; give more task and safety rows")
    found = torch.zeros(0, 2, dtype=torch.long)
    while len(found) < count:
        i = first[torch.randint(len(first), (count,), generator=generator)]
        j = second[torch.randint(len(second), (count,), generator=generator)]
        more = torch.stack([i, j], dim=1)
        found = torch.cat([found, more[i != j] if same else more])
    return found[:count]


def curves(normal: Tensor, malicious: Tensor, *, pairs: int = 500, seeds: int = 10) -> Curves:
    """The three mean cosines by layer, for every seed a draw of prompts (with replacement) and of `pairs` pairs among them.

    normal (N, L, d), malicious (M, L, d), both with at least 2 prompts. The spread over seeds is the bootstrap's: it covers the choice of prompts.
    """
    found: list[list[Tensor]] = [[], [], []]
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        n = _resampled(len(normal), generator)
        m = _resampled(len(malicious), generator)
        found[0].append(pair_cosines(normal, normal, draw_pairs(n, n, pairs, generator, True)))
        found[1].append(pair_cosines(malicious, malicious, draw_pairs(m, m, pairs, generator, True)))
        found[2].append(pair_cosines(normal, malicious, draw_pairs(n, m, pairs, generator, False)))
    return Curves(*(torch.stack(part) for part in found))


def _resampled(count: int, generator: torch.Generator) -> Tensor:
    """Indices drawn with replacement, at least two different ones where there are two."""
    while True:
        drawn = torch.randint(count, (count,), generator=generator)
        if count < 2 or len(drawn.unique()) > 1:
            return drawn


def degrees(cosines: Tensor) -> Tensor:
    """Angles in degrees."""
    return torch.rad2deg(torch.arccos(cosines.clamp(-1, 1)))


def interval(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, lower, upper) by layer of (seeds, layers): mean -+ 1.96 standard deviations of the bootstrap's draws; all equal for one seed."""
    mean = values.mean(dim=0)
    spread = 1.96 * values.std(dim=0) if len(values) > 1 else torch.zeros_like(mean)
    return mean, mean - spread, mean + spread


def onset_range(gap: Tensor, onset: float) -> Range | None:
    """First layer whose gap exceeds `onset` and after which it stays above 0, to the first from there after which it grows no more.

    gap (L,). None where no layer's does. The paper's step 1 as the reproduction reads it.
    """
    values = gap.tolist()
    for start, value in enumerate(values):
        if value > onset and all(later > 0 for later in values[start:]):
            end = start
            while end + 1 < len(values) and values[end + 1] > values[end]:
                end += 1
            return start, end
    return None


def refine(count: Callable[[int, int], int], start: int, end: int, layers: int) -> tuple[Range, dict[Range, int]]:
    """The range around start..end whose scaling makes the model refuse most harmless prompts, and every count taken.

    The last layer is moved first, a layer at a time, outwards and else inwards, as long as the count rises; then the first layer in the same
    way (the paper's step 2). A range is never emptied and never holds all layers. Ties keep what is there.
    """
    counts: dict[Range, int] = {}

    def refused(a: int, b: int) -> int:
        if (a, b) not in counts:
            counts[a, b] = count(a, b)
        return counts[a, b]

    def allowed(a: int, b: int) -> bool:
        return 0 <= a <= b < layers and b - a + 1 < layers

    found = (start, end)
    for moves in (((0, 1), (0, -1)), ((-1, 0), (1, 0))):
        for first, last in moves:
            before = found
            while allowed(found[0] + first, found[1] + last):
                tried = (found[0] + first, found[1] + last)
                if refused(*tried) <= refused(*found):
                    break
                found = tried
            if found != before:
                break  # outwards helped: the other way was behind it
    refused(*found)
    return found, counts


# ------------------------------------------------------------------------------------------------ over-rejection


def scalable(model: nn.Module, start: int, end: int) -> list[nn.Parameter]:
    """The weights of attention, what stands in its place, and feed-forward parts in layers start..end: matrices, batches of them (experts) and
    kernels of convolutions; no norm, bias or decay rate. Each once, also where several modules share it."""
    inside, matrices_of = blocks.of(model), matrices.stored(model)
    found = {}
    for name, (module, leaf) in matrices.owners(model).items():
        layer = inside.index(name)
        weight = module._parameters[leaf]
        kernel = leaf == "weight" and isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if layer is not None and start <= layer <= end and (name in matrices_of or kernel):
            found[id(weight)] = weight
    return list(found.values())


@contextmanager
def scaled(model: nn.Module, start: int, end: int, factor: float) -> Iterator[None]:
    """Inside, the weights of layers start..end (`scalable`) are multiplied by `factor`; put back bit for bit from copies afterwards, also after an
    exception."""
    weights = scalable(model, start, end)
    saved = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight in weights:
                weight.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for weight, copy in zip(weights, saved, strict=True):
                weight.copy_(copy)


def prompts_of(data: TrainingData, count: int) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """(normal, malicious, over-rejection) rows, at most `count` each, drawn with seed 0: location depends on model and data, not on the trial.

    Normal: harmless safety rows and task rows, half and half where there are enough. Raises StrategyError where a class is too small.
    """
    malicious = rows.sample([row for row in data.safety if row.kind == "refusal"], count, 0)
    harmless = rows.sample([row for row in data.safety if row.kind == "harmless"], count, 0)
    task = rows.sample(data.task, count, 0)
    half = max(count // 2, count - len(task))
    normal = harmless[:half] + task[: count - len(harmless[:half])]
    if len(malicious) < 2 or len(normal) < 2:
        raise StrategyError(
            f"safety layers are located with {len(malicious)} malicious (safety rows of kind refusal) and {len(normal)} normal prompts; "
            "at least 2 of each are needed: give safety.data, or freeze_layers.start and end"
        )
    return normal, malicious, harmless


def locate(model: nn.Module, data: TrainingData, *, onset: float = 0.05, alpha: float = 1.1, prompts: int = 100, pairs: int = 500,
           seeds: int = 10) -> Located | Curves:  # fmt: skip
    """Measure the safety layers of `model` on the rows' prompts; the curves alone where no layer's gap exceeds `onset`.

    Without harmless safety rows, or where `data.refuses` is not given, the range is that of the activations.
    """
    normal, malicious, harmless = prompts_of(data, prompts)
    found = curves(last_token_states(model, normal, data), last_token_states(model, malicious, data), pairs=pairs, seeds=seeds)
    layers = found.gap.shape[1]
    first = onset_range(found.gap.mean(dim=0), onset)
    if first is None:
        return found
    if first == (0, layers - 1):
        first = (0, max(0, layers - 2))  # something must be left to train
    if not harmless or data.refuses is None:
        return Located(found, first, first, 0, {}, 0)
    with rows.evaluating(model):
        untouched = sum(data.refuses(model, harmless))

        def count(start: int, end: int) -> int:
            with scaled(model, start, end, alpha):
                return sum(data.refuses(model, harmless))

        best, counts = refine(count, *first, layers)
    return Located(found, first, best, untouched, counts, len(harmless))


def agreed(found: Located | Curves, world_size: int) -> Located | Curves:
    """What worker 0 found, on every worker: rounding must not let two workers freeze different layers. Collective."""
    if world_size == 1:
        return found
    import torch.distributed as dist

    shared = [found]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]
