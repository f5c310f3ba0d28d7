"""Linearised modules against derivatives of their own, in families whose mixers are called and work otherwise; which modules are taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import toy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "families"))
import tiny

from strategies import auxiliary, linear, linearising, matrices, trying
from strategies.base import StrategyError


def setting(scale=0.05):
    data, model = toy.data(), toy.model().eval()
    names = linearising.containers(model, "attention")
    modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items() if ".self_attn." in n}
    generator = torch.Generator().manual_seed(0)
    factors = {
        n: (scale * torch.randn(m.weight.shape[0], 2, generator=generator), torch.randn(2, m.weight.shape[1], generator=generator))
        for n, m in modules.items()
    }  # fmt: skip
    return model, modules, factors, names, data.collate(data.task, range(3))


def attention_output(model, batch):
    """What the first attention module gives."""
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return seen[0].detach()


def test_the_linearised_attention_is_value_plus_derivative():
    """Against central differences of the weights themselves."""
    model, modules, factors, names, batch = setting()
    start = attention_output(model, batch)
    with linearising.linearised(model, modules, {}, factors, names):
        first_order = attention_output(model, batch)
    model = model.double()
    sides = []
    for step in (1e-4, -1e-4):
        for name, (left, right) in factors.items():
            model.get_parameter(name).data += step * (left @ right)
        sides.append(attention_output(model, batch))
        for name, (left, right) in factors.items():
            model.get_parameter(name).data -= step * (left @ right)
    slope = (sides[0] - sides[1]) / 2e-4
    torch.testing.assert_close(first_order.double(), start.double() + slope, atol=1e-5, rtol=1e-4)


def test_it_is_linear_in_the_update_and_plain_attachment_is_not():
    model, modules, factors, names, batch = setting(scale=0.3)
    double = {n: (2 * left, right) for n, (left, right) in factors.items()}
    start = attention_output(model, batch)

    def change(attach, chosen):
        with attach(chosen):
            return attention_output(model, batch) - start

    def first_order(chosen):
        return linearising.linearised(model, modules, {}, chosen, names)

    def plain(chosen):
        return auxiliary.attached(model, modules, chosen)

    torch.testing.assert_close(change(first_order, double), 2 * change(first_order, factors), atol=1e-4, rtol=1e-3)
    assert (change(plain, double) - 2 * change(plain, factors)).abs().max() > 1e-2


def test_linearising_each_projection_alone_changes_nothing():
    """Why the module is linearised as a whole: a linear layer is linear in its weight."""
    model, modules, factors, _, batch = setting(scale=0.3)
    with auxiliary.attached(model, modules, factors):
        plain = attention_output(model, batch)
    for name, module in modules.items():  # one at a time through functional_call, as the official code linearises
        left, right = factors[name]
        start = module.weight.detach()

        def forward(x, weight=start, delta=left @ right):
            value, slope = torch.func.jvp(lambda w: torch.nn.functional.linear(x, w), (weight,), (delta,))
            return value + slope

        module.forward = forward
    torch.testing.assert_close(attention_output(model, batch), plain, atol=1e-5, rtol=1e-4)


def test_patches_and_hooks_are_gone_afterwards_also_after_an_exception():
    model, modules, factors, names, batch = setting()
    with pytest.raises(KeyError), linearising.linearised(model, modules, {}, factors, names):
        raise KeyError
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())


def test_gradients_reach_every_factor():
    model, modules, factors, names, batch = setting()
    leaves = [t.requires_grad_() for pair in factors.values() for t in pair]
    with linearising.linearised(model, modules, {}, factors, names):
        loss = model(input_ids=batch["input_ids"]).logits.float().square().mean()
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, leaves))


# ------------------------------------------------------------------------------------------------ other families


def changes(model, name, generator):
    """Factors of every matrix in one module: (linear layers, batches, factors)."""
    choosing = matrices.routers(model)
    modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items() if n.startswith(f"{name}.") and n not in choosing}
    batches = {n: place for n, place in auxiliary.block_batches(model).items() if n.startswith(f"{name}.")}
    factors = {}
    for one, (module, leaf, how) in (auxiliary.of_linears(modules) | batches).items():
        weight = module._parameters[leaf]
        *count, d_out, d_in = weight.mT.shape if how.transposed else weight.shape
        factors[one] = (0.05 * torch.randn(*count, d_out, 2, generator=generator), torch.randn(*count, 2, d_in, generator=generator))
    return modules, batches, factors


def given(model, name, batch):
    """What the module gives to a forward: its first tensor."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o if torch.is_tensor(o) else o[0]))
    with torch.no_grad():
        trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    return seen[-1]


# each mixes tokens in another way, or is called by another name, or holds experts, or gives more than one tensor
KINDS = {
    "mistral": "attention", "gemma3_text": "attention", "gpt2": "attention_mlp", "openai-gpt": "attention", "bloom": "attention", "dbrx": "attention",
    "mamba": "attention", "rwkv": "attention_mlp", "jamba": "attention", "qwen3_next": "attention", "lfm2": "attention", "longcat_flash": "attention",
    "mixtral": "attention_mlp", "llama4_text": "attention_mlp", "jetmoe": "attention", "ctrl": "attention_mlp", "gpt_oss": "attention_mlp",
}  # fmt: skip


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_module_is_linearised_exactly(family):
    """Against central differences of the weights themselves, experts among them."""
    model = tiny.model(family)
    batch, kinds = trying.batch(model, (20, 20)), set()
    for name in linearising.containers(model, KINDS[family]):
        kind = type(model.get_submodule(name))
        modules, batches, factors = changes(model, name, torch.Generator().manual_seed(0))
        if kind in kinds or not factors:
            continue
        kinds.add(kind)
        start = given(model, name, batch)
        with linearising.linearised(model, modules, batches, factors, [name]):
            first_order = given(model, name, batch)
        sides = []
        for step in (4e-3, -4e-3):
            swap = auxiliary.Swap(model, auxiliary.of_linears(modules) | batches)
            swap.put(factors, step)
            sides.append(given(model, name, batch))
            swap.back()
        slope = (sides[0] - sides[1]) / 8e-3
        assert slope.abs().max() > 1e-2
        assert (first_order - start - slope).abs().max() < 5e-3 * slope.abs().max(), (name, kind)
        assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    assert kinds


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "llama4_text", "modernbert-decoder"])
def test_padding_beyond_a_narrow_window_gives_what_eager_attention_gives(family):
    """Rows that may look at nothing: their softmax has a derivative all the same, as in eager attention."""
    found = {}
    for kind in ("sdpa", "eager"):
        model = tiny.model(family)
        model.set_attn_implementation(kind)
        batch, names = trying.batch(model, (5, 40, 23)), linearising.containers(model, "attention")
        modules = {f"{n}.weight": m for n, m in linear.block_linears(model).items() if n.startswith(tuple(f"{name}." for name in names))}
        generator = torch.Generator().manual_seed(0)
        shapes = {n: m.weight.shape for n, m in modules.items()}
        factors = {
            n: ((0.05 * torch.randn(d_out, 2, generator=generator)).requires_grad_(), torch.randn(2, d_in, generator=generator))
            for n, (d_out, d_in) in shapes.items()
        }
        with linearising.linearised(model, modules, {}, factors, names):
            logits = trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            real = batch["attention_mask"].bool()
            slopes = torch.autograd.grad(logits[real].square().mean(), [left for left, _ in factors.values()])
        assert all(torch.isfinite(slope).all() for slope in slopes) and torch.isfinite(logits).all()
        found[kind] = (logits[real].detach(), slopes)
    torch.testing.assert_close(found["sdpa"][0], found["eager"][0], atol=1e-3, rtol=1e-3)
    for one, other in zip(found["sdpa"][1], found["eager"][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-3 * float(other.abs().max()), rtol=1e-2)


def test_masks_become_finite_and_keep_what_they_say():
    query = torch.zeros(1, 1, 2, 4)
    mask = torch.tensor([[True, False], [False, False]])
    finite = linearising.finite_mask(mask, query)
    assert torch.equal(finite == 0, mask) and torch.isfinite(finite).all() and finite.dtype == query.dtype
    added = torch.tensor([[0.5, -torch.inf]])
    assert linearising.finite_mask(added, query).tolist() == [[0.5, torch.finfo(torch.float32).min]]


def test_modules_are_found_by_what_they_are():
    def of(family, which="attention", **more):
        return [name.removeprefix("model.layers.") for name in linearising.containers(tiny.model(family, **more), which)]

    assert of("dbrx")[0].endswith("blocks.0.norm_attn_norm.attn")
    assert of("longcat_flash") == [f"{block}.self_attn.{i}" for block in (0, 1) for i in (0, 1)]
    assert of("nemotron_h") == ["0.mixer", "1.mixer"] and of("nemotron_h", "attention_mlp") == ["0.mixer", "1.mixer", "2.mixer"]
    assert of("opt", "attention_mlp")[0].endswith("layers.0.self_attn") and not any("fc" in name for name in of("opt", "attention_mlp"))
    assert of("falcon_h1")[:2] == ["0.mamba", "0.self_attn"]


def test_what_only_mixes_tokens_is_found_by_what_its_forward_is_given():
    from torch import nn

    from strategies.block_parts import outermost, part_of

    class Blend(nn.Module):
        def __init__(self):
            super().__init__()
            self.together = nn.Linear(4, 4)

        def forward(self, hidden_states, position_embeddings=None):
            return self.together(hidden_states)

    block = nn.Module()
    block.blend, block.widen = Blend(), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    assert [(one.name, one.part) for one in outermost(block)] == [("blend", "attention"), ("widen", "mlp")]
    assert part_of(block, "blend.together.weight") == "attention" and part_of(block, "widen.0.weight") == "mlp"


def test_a_shared_block_has_one_update_wherever_it_is_used():
    """Zamba2's attention is one set of tensors in several blocks."""
    model = tiny.model("zamba2", num_hidden_layers=4, layers_block_type=["hybrid", "mamba", "hybrid", "mamba"])
    name = "model.layers.0.shared_transformer.self_attn.o_proj.weight"
    twin = model.get_submodule("model.layers.2.shared_transformer.self_attn.o_proj")
    assert twin.weight is model.get_parameter(name) and twin is not model.get_submodule(name.removesuffix(".weight"))
    rows, data = trying.rows(model), toy.data()
    found = auxiliary.train(model, rows, data, auxiliary.Plan(steps=1, rank=2), only=lambda one: "shared_transformer.self_attn" in one)
    assert name in found and not any("layers.2" in one for one in found)
    factors = {name: (torch.randn(32, 2), torch.randn(2, twin.weight.shape[1]))}
    batch, modules = trying.batch(model), {name: model.get_submodule(name.removesuffix(".weight"))}
    with torch.no_grad(), auxiliary.attached(model, modules, factors):
        logits = trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        model.get_parameter(name).add_(factors[name][0] @ factors[name][1])
        wanted = trying.forward(model)(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, wanted, atol=1e-3, rtol=1e-3)


def test_a_weight_that_is_read_and_not_called_is_trained_too():
    """Mamba's time step: the mixer multiplies with the layer's weight itself."""
    model = tiny.model("mamba")
    found = auxiliary.train(model, trying.rows(model), toy.data(), auxiliary.Plan(steps=2, rank=1))
    assert all(left.count_nonzero() for left, _ in found.values()) and any("dt_proj" in name for name in found)
    assert not model._forward_hooks and not model._forward_pre_hooks and all(isinstance(p, torch.nn.Parameter) for p in model.parameters())


def test_a_layer_that_gives_more_than_a_tensor_is_no_linear_layer():
    class Two(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    hook = linearising._added("a.weight", torch.zeros(2, 1), torch.zeros(1, 2), [torch.zeros(())])
    with pytest.raises(StrategyError, match="a is called for more than one tensor"):
        hook(Two(2, 2), (torch.zeros(1, 2),), Two(2, 2)(torch.zeros(1, 2)))
