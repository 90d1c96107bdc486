"""
The contract of mixture of experts in model.py and train.py. A layer is compared with the dense
model, with plain loops over tokens (moe_reference, below), with closed forms, and a run with one
that was never stopped. test_interop.py compares it with Mixtral's own layer.
"""
import copy
import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import assets.draw
from configurator import load_checkpoint, read_log
from conftest import TINY, call, flags, ok
from model import GPT, GPTConfig, MoE, load_balancing_loss
from test_model import array, close, numpy_linear, numpy_softmax, small_gpt, some_ids


def moe_layer(seed=0, **settings):
    """A layer of four experts in training mode."""
    settings = dict(n_expert=4) | settings
    return small_gpt(seed, **settings).h[0].mlp.train()


def moe_reference(layer, x, n_active, bias=0.0):
    """
    The layer in a loop over the tokens of x (B, T, C). Returns its output (B, T, C), the load (E,),
    which is how often each expert was selected, and the router's probabilities (N, E).
    """
    outputs = []
    all_probs = []
    load = torch.zeros(len(layer.experts))
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        probs = logits.exp() / logits.exp().sum()
        preference = logits if layer.bias is None else probs + bias
        selected = preference.argsort(descending=True)[:n_active].tolist()
        # With one active expert its weight is its probability.
        total = sum(probs[e] for e in selected) if n_active > 1 else 1
        y = sum(probs[e] / total * layer.experts[e](token) for e in selected)
        outputs.append(y + sum(expert(token) for expert in layer.shared))
        load[selected] += 1
        all_probs.append(probs)
    return torch.stack(outputs).view_as(x), load, torch.stack(all_probs)


def router_probs(layer, x):
    return torch.softmax(x @ layer.router.weight.T, dim=-1)


SELECTION_BIAS = torch.tensor([0.3, 0.0, -0.4, 0.1])

# -----------------------------------------------------------------------------
# The output of a layer

def test_a_model_with_one_expert_is_the_dense_model():
    dense = small_gpt()
    sparse = small_gpt(n_expert=1, n_expert_active=1, seed=1)
    state = {name.replace('mlp.', 'mlp.experts.0.'): p for name, p in dense.state_dict().items()}
    for name, p in sparse.state_dict().items():
        if 'router' in name:
            state[name] = p
    sparse.load_state_dict(state)
    assert close(sparse(some_ids(2, 16))[0], dense(some_ids(2, 16))[0], 1e-5)


def test_with_all_experts_active_the_output_is_their_sum_weighted_by_the_softmax():
    layer = moe_layer(n_expert=3, n_expert_active=3)
    x = torch.randn(2, 7, 16)
    probs = router_probs(layer, x)
    expected = sum(probs[..., e, None] * layer.experts[e](x) for e in range(3))
    assert close(layer(x), expected, 1e-5)


@pytest.mark.parametrize('balance', ['aux', 'bias', 'none'])
@pytest.mark.parametrize('n_active, n_shared', [(1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (4, 1)])
def test_output_losses_and_all_gradients_equal_plain_loops(n_active, n_shared, balance):
    """The gradients are those of a randomly weighted output plus both losses."""
    layer = moe_layer(n_expert_active=n_active, n_shared_expert=n_shared, moe_balance=balance,
                      bias=n_shared == 1)
    bias = torch.zeros(4)
    if balance == 'bias':
        bias = SELECTION_BIAS
        layer.bias.copy_(bias)
    x = torch.randn(2, 9, 16, requires_grad=True)
    weight = torch.randn(2, 9, 16)
    inputs = [x, *layer.parameters()]

    # 1. the layer
    y = layer(x)
    objective = (y * weight).sum() + 3 * layer.z_loss
    if balance == 'aux':
        objective = objective + 5 * layer.balancing_loss
    gradients = torch.autograd.grad(objective, inputs)

    # 2. plain loops and the formulas of both losses
    expected, load, probs = moe_reference(layer, x, n_active, bias)
    logits = x.flatten(0, 1) @ layer.router.weight.T
    z_loss = logits.exp().sum(1).log().square().mean()
    balancing_loss = 4 * sum(load[e] / (18 * n_active) * probs[:, e].mean() for e in range(4))
    objective = (expected * weight).sum() + 3 * z_loss
    if balance == 'aux':
        objective = objective + 5 * balancing_loss
    expected_gradients = torch.autograd.grad(objective, inputs, allow_unused=True)

    # 3. both are equal
    assert close(y, expected, 1e-4)
    assert close(layer.z_loss, z_loss, 1e-4)
    if balance == 'aux':
        assert close(layer.balancing_loss, balancing_loss, 1e-5)
    else:
        assert layer.balancing_loss is None
    for a, b in zip(gradients, expected_gradients):
        if b is None:  # of an expert that no token selected
            b = torch.zeros_like(a)
        assert close(a, b, 1e-3)
    assert inputs[1] is layer.router.weight and gradients[1].abs().max() > 0.1


def test_the_output_trains_only_the_selected_experts():
    layer = moe_layer()
    x = torch.randn(1, 1, 16)
    logits = numpy_linear(layer.router, array(x[0]))[0]
    selected = set(logits.argsort()[-2:].tolist())
    layer(x).square().sum().backward()
    for e, expert in enumerate(layer.experts):
        for p in expert.parameters():
            assert (p.grad.abs().max() > 1e-4) == (e in selected)
        assert (layer.router.weight.grad[e].abs().max() > 1e-6) == (e in selected)


def test_the_balancing_loss_trains_the_routers_weights_of_every_expert():
    layer = moe_layer()
    layer(torch.randn(1, 1, 16))
    layer.balancing_loss.backward()
    assert layer.router.weight.grad.abs().min() > 0


def test_a_single_active_expert_is_weighted_by_its_probability():
    model = small_gpt(n_expert=4, n_expert_active=1)
    layer = model.h[0].mlp
    x = torch.randn(1, 5, 16)
    y = layer(x)
    probs = router_probs(layer, x)
    for t in range(5):
        best = probs[0, t].argmax()
        assert close(y[0, t], probs[0, t, best] * layer.experts[best](x[0, t]), 1e-5)


def test_with_a_single_active_expert_the_router_learns_from_the_loss_of_the_text():
    model = small_gpt(n_expert=4, n_expert_active=1)
    model(some_ids(2, 12), some_ids(2, 12, seed=1))[1].backward()
    for block in model.h:
        assert block.mlp.router.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize('moe_every, expected', [
    (1, [True, True, True, True]),
    (2, [False, True, False, True]),
    (4, [False, False, False, True]),
])
def test_every_nth_layer_has_experts(moe_every, expected):
    model = small_gpt(n_layer=4, n_expert=2, moe_every=moe_every)
    assert [isinstance(block.mlp, MoE) for block in model.h] == expected
    assert list(model.moes) == [layer for layer in range(4) if expected[layer]]


def test_a_model_can_be_copied_after_a_forward_pass_of_training():
    model = small_gpt(n_expert=4).train()
    ids = some_ids(2, 12)
    loss = model(ids, ids)[1] + model.aux_loss() + model.aux_loss('z')
    other = copy.deepcopy(model)
    loss.backward()
    assert torch.equal(other(ids)[0], model(ids)[0])
    assert other.moes[0] is other.h[0].mlp
    assert other.aux_loss() == model.aux_loss() > 0


# -----------------------------------------------------------------------------
# Routing under bfloat16 autocast

@pytest.mark.parametrize('settings', [
    dict(), dict(n_expert_active=1), dict(moe_balance='bias')], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_routing_under_bfloat16_autocast_is_float32(dtype, settings):
    """The losses, the load and the entropy are bitwise those of a layer in float32."""
    x = torch.randn(4, 16, 16).to(dtype)
    plain = moe_layer(**settings)
    plain(x.float())
    layer = moe_layer(**settings)
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    assert layer.z_loss.dtype == torch.float32
    assert torch.equal(layer.z_loss, plain.z_loss)
    if layer.moe_balance == 'aux':
        assert layer.balancing_loss.dtype == torch.float32
        assert torch.equal(layer.balancing_loss, plain.balancing_loss)
    assert torch.equal(layer.load, plain.load)
    assert torch.equal(layer.entropy, plain.entropy)


@pytest.mark.parametrize('sign, selected', [(1.0, 3), (-1.0, 0)])
def test_under_bfloat16_autocast_an_expert_is_selected_by_a_difference_below_bfloat16(
        sign, selected):
    layer = moe_layer(n_expert_active=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        # In bfloat16 all of these are 1.
        layer.router.weight[:, 0] = 1 + torch.arange(4) / 2 ** 12
    assert (layer.router.weight[:, 0].bfloat16() == 1).all()
    x = torch.zeros(1, 1, 16)
    x[..., 0] = sign
    with torch.autocast('cpu', torch.bfloat16):
        layer(x)
    assert layer.load.argmax() == selected


# -----------------------------------------------------------------------------
# Losses

def layer_with_fixed_routes(routes):
    """A top-1 layer of 4 experts whose router sends the unit vector i to expert routes[i], and the
    four unit vectors (1, 4, C)."""
    layer = moe_layer(n_expert_active=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        for direction, expert in enumerate(routes):
            layer.router.weight[expert, direction] = 30.0
    return layer, torch.eye(16)[None, :4]


@pytest.mark.parametrize('routes, expected', [
    ([0, 1, 2, 3], 1), ([3, 1, 0, 2], 1), ([0, 0, 1, 1], 2), ([2, 2, 2, 2], 4)], ids=str)
def test_the_balancing_loss_is_1_for_an_even_load_and_n_expert_for_a_single_expert(
        routes, expected):
    layer, x = layer_with_fixed_routes(routes)
    layer(x)
    assert abs(layer.balancing_loss.item() - expected) < 1e-5


def test_the_balancing_loss_is_the_formula_of_the_paper():
    """E * sum of (share of the tokens) * (mean probability), in loops over experts and tokens."""
    probs = torch.randn(30, 5).softmax(-1)
    for n_active in (1, 2, 5):
        selected = probs.topk(n_active).indices
        expected = 0.0
        for e in range(5):
            n_tokens = sum(e in row for row in selected.tolist())
            mean_prob = sum(row[e] for row in probs.tolist()) / 30
            expected += 5 * n_tokens / (30 * n_active) * mean_prob
        assert abs(load_balancing_loss(probs, selected).item() - expected) < 1e-5


def test_both_losses_of_a_model_are_the_formulas_of_the_papers_averaged_over_layers():
    model = small_gpt(n_expert=4, n_expert_active=2, n_layer=4, moe_every=2)
    balancing_losses = []
    z_losses = []
    for block in (model.h[1], model.h[3]):
        x = torch.randn(3, 5, 16)
        block.mlp(x)
        share = np.zeros(4)
        mean_prob = np.zeros(4)
        squares = []
        for row in numpy_linear(block.mlp.router, array(x).reshape(15, 16)):
            share[np.argsort(-row)[:2]] += 1 / (2 * 15)
            mean_prob += numpy_softmax(row) / 15
            squares.append(math.log(np.exp(row).sum()) ** 2)
        balancing_losses.append(4 * (share * mean_prob).sum())
        z_losses.append(np.mean(squares))
    assert abs(model.aux_loss().item() - np.mean(balancing_losses)) < 1e-5
    assert min(balancing_losses) > 1
    assert abs(model.aux_loss('z').item() - np.mean(z_losses)) < 1e-4


@pytest.mark.parametrize('settings', [
    {}, dict(n_expert=4, moe_balance='bias'), dict(n_expert=4, moe_balance='none')], ids=str)
def test_without_experts_or_with_another_balancing_the_balancing_loss_is_0(settings):
    model = small_gpt(**settings)
    loss = model(some_ids(2, 12), some_ids(2, 12))[1]
    assert model.aux_loss() == 0
    assert (model.aux_loss('z') > 0) == bool(settings)
    (loss + 0.01 * model.aux_loss()).backward()  # as every script adds it


def unbalanced_layer(**settings):
    """A layer whose router sends most tokens to its first expert, and tokens (8, 64, C) that have a
    common direction."""
    torch.manual_seed(0)
    layer = moe_layer(**settings)
    x = torch.randn(8, 64, 16)
    x[..., 0] = 2.0
    with torch.no_grad():
        layer.router.weight.normal_(std=0.3)
        layer.router.weight[0, 0] += 1.5
    return layer, x


def measure_imbalance(layer, x):
    """The largest load of an expert as a multiple of the mean load."""
    layer.load = torch.zeros(len(layer.experts))
    layer.entropy = torch.zeros(())
    layer(x)
    load = layer.load
    layer.load = torch.zeros(len(layer.experts))
    layer.entropy = torch.zeros(())
    return (load.max() / load.mean()).item()


def test_gradient_descent_on_the_balancing_loss_evens_the_load():
    layer, x = unbalanced_layer()
    assert measure_imbalance(layer, x) > 1.8
    weight = layer.router.weight
    for _ in range(60):
        layer(x)
        weight.data -= 0.5 * torch.autograd.grad(layer.balancing_loss, weight)[0]
    assert measure_imbalance(layer, x) < 1.25


def test_gradient_descent_on_the_z_loss_makes_the_routers_logits_small():
    layer, x = unbalanced_layer()
    weight = layer.router.weight

    def size_of_logits():
        return (x @ weight.T).logsumexp(-1).abs().mean()

    before = size_of_logits()
    for _ in range(20):
        layer(x)
        weight.data -= 0.05 * torch.autograd.grad(layer.z_loss, weight)[0]
    assert size_of_logits() < before / 2


@pytest.mark.parametrize('settings', [
    dict(), dict(n_expert_active=1), dict(causal=False)], ids=str)
def test_padding_is_counted_in_no_loss_no_load_and_no_entropy(settings):
    model = small_gpt(n_expert=4, n_layer=1, **settings).train()
    layer = model.h[0].mlp
    row_1 = some_ids(9).tolist()
    row_2 = some_ids(4, seed=1).tolist()
    padded = torch.tensor([[-1, *row_1, -1, -1], [-1] * 6 + row_2 + [-1] * 2])
    pos = torch.tensor([[-1, *range(9), -1, -1], [-1] * 6 + [0, 1, 2, 3] + [-1] * 2])

    # 1. both rows in one padded batch
    model.hidden(padded, pos=pos)
    losses = torch.stack((model.aux_loss(), model.aux_loss('z')))
    load = layer.load
    entropy = layer.entropy

    # 2. each row alone, without padding
    layer.load = torch.zeros(len(layer.experts))
    layer.entropy = torch.zeros(())
    layer_inputs = []

    def keep_input(_, args):
        layer_inputs.append(args[0].flatten(0, 1))

    hook = layer.register_forward_pre_hook(keep_input)
    for row in (row_1, row_2):
        model.hidden(torch.tensor([row]))
    hook.remove()
    assert close(load, layer.load, 1e-4) and close(entropy, layer.entropy, 1e-4)
    assert load.sum() == 13 * model.config.n_expert_active

    # 3. the tokens of both rows without padding, for the losses
    layer(torch.cat(layer_inputs)[None])
    assert close(losses, torch.stack((layer.balancing_loss, layer.z_loss)), 1e-5)


def test_padding_on_the_right_is_counted_in_no_layer_also_without_positions():
    model = small_gpt(n_expert=4, n_layer=3).train()
    idx = some_ids(2, 9)
    idx[0, 5:] = -1
    pos = torch.arange(9).expand(2, -1).masked_fill(idx < 0, -1)

    def losses_and_loads(**arguments):
        for moe in model.moes.values():
            moe.load = torch.zeros(4)
        model.hidden(idx, **arguments)
        loads = torch.stack([moe.load for moe in model.moes.values()])
        return torch.stack((model.aux_loss(), model.aux_loss('z'))), loads

    losses, loads = losses_and_loads(pos=pos)
    assert (loads.sum(dim=1) == 14 * model.config.n_expert_active).all()
    for read in (None, (idx >= 0).nonzero(as_tuple=True)):
        other_losses, other_loads = losses_and_loads(read=read)
        assert close(losses, other_losses, 1e-5) and torch.equal(loads, other_loads)


# -----------------------------------------------------------------------------
# The bias on the selection

def test_the_bias_is_a_buffer_that_only_moe_balance_bias_has():
    names = {}
    for balance in ('aux', 'bias', 'none'):
        names[balance] = set(small_gpt(n_expert=4, moe_balance=balance).state_dict())
    assert names['bias'] - names['aux'] == {'h.0.mlp.bias', 'h.1.mlp.bias'}
    assert names['aux'] == names['none']
    model = small_gpt(n_expert=4, moe_balance='bias')
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert set(parameters) == names['aux']


def test_a_checkpoint_from_before_the_bias_and_shared_experts_can_be_loaded():
    model = small_gpt(n_expert=4)
    settings = dict(vars(model.config))
    for name in ('n_shared_expert', 'moe_balance'):
        del settings[name]
    GPT(GPTConfig(**settings)).load_state_dict(model.state_dict())


def test_a_step_moves_the_bias_once_by_the_load_of_all_its_micro_batches():
    model = small_gpt(n_expert=4, moe_balance='bias', n_layer=1).train()
    layer = model.h[0].mlp
    expected = torch.zeros(4)
    for step in range(5):
        load = torch.zeros(4)
        for batch_size in (3, 8):
            x = torch.randn(batch_size, 5, 16)
            load += moe_reference(layer, x, 2, layer.bias)[1]
            before = layer.bias.clone()
            layer(x)
            assert torch.equal(layer.bias, before)
        # An evaluation is not counted.
        layer.eval()
        layer(torch.randn(50, 5, 16))
        layer.train()
        model.balance_experts(0.25)
        # 55 tokens select two experts each: an even load is 27.5.
        expected += 0.25 * torch.sign(27.5 - load)
        assert close(layer.bias, expected, 1e-6)
    assert expected.abs().max() > 0.2


def test_the_bias_evens_the_load_and_does_not_change_the_weights_of_selected_experts():
    model = small_gpt(n_expert=4, moe_balance='bias', n_layer=1).train()
    layer, x = unbalanced_layer(moe_balance='bias')
    model.h[0].mlp = layer
    assert measure_imbalance(layer, x) > 1.8
    for rate in [0.01] * 100 + [0.001] * 50:
        layer(x)
        model.balance_experts(rate)
    assert measure_imbalance(layer, x) < 1.1
    with_bias = moe_reference(layer, x, 2, layer.bias)[0]
    without_bias = moe_reference(layer, x, 2)[0]
    assert close(layer(x), with_bias, 1e-4)
    assert not close(layer(x), without_bias, 0.1)  # other experts are selected

    inputs = [layer.router.weight, *layer.experts.parameters()]
    reference = moe_reference(layer, x[:1], 2, layer.bias)[0]
    expected = torch.autograd.grad(reference.square().sum(), inputs)
    gradients = torch.autograd.grad(layer(x[:1]).square().sum(), inputs)
    for a, b in zip(gradients, expected):
        scale = b.abs().max()
        assert close(a / scale, b / scale, 1e-4)


def values_of(metrics):
    return {name: value.item() for name, value in metrics.items()}


def test_all_ranks_move_the_bias_alike_by_the_load_of_all(monkeypatch):
    def make():
        return small_gpt(n_expert=4, moe_balance='bias').train()

    single = make()  # sees the batches of both ranks
    ranks = [make(), make()]
    for seed, rank in enumerate(ranks):
        idx = some_ids(3, 12, seed=seed)
        rank(idx)
        single(idx)
    expected = values_of(single.balance_experts(0.1))

    # What each rank contributes to the sum: its loads and its entropy, per layer.
    counts = []
    for rank in ranks:
        of_layers = [torch.cat((moe.load, moe.entropy[None])) for moe in rank.moes.values()]
        counts.append(torch.stack(of_layers))
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda t: t.copy_(sum(counts)))
    for rank in ranks:
        assert values_of(rank.balance_experts(0.1)) == pytest.approx(expected)
        for layer, moe in rank.moes.items():
            assert torch.equal(moe.bias, single.moes[layer].bias) and moe.bias.any()


# -----------------------------------------------------------------------------
# Counts

def test_the_metrics_of_a_step_equal_a_count():
    model = small_gpt(n_expert=4, n_layer=4, moe_every=2).train()
    shares = {}
    entropies = []
    for layer in (1, 3):
        moe = model.h[layer].mlp
        load = torch.zeros(4)
        for batch_size in (2, 5):
            x = torch.randn(batch_size, 7, 16)
            moe(x)
            _, load_of_batch, probs = moe_reference(moe, x, 2)
            load += load_of_batch
            for row in probs.tolist():
                entropies.append(-sum(p * math.log(p) for p in row))
        shares[layer] = (load / load.sum()).tolist()
    expected = {
        'moe_imbalance': 4 * max(shares[1] + shares[3]),
        'moe_entropy': np.mean(entropies),
    }
    for layer in (1, 3):
        for e in range(4):
            expected[f'moe/layer_{layer}/expert_{e}'] = shares[layer][e]
    assert values_of(model.balance_experts(0.0)) == pytest.approx(expected, rel=1e-5)


def test_a_step_begins_with_empty_counts():
    model = small_gpt(n_expert=4).train()
    model(some_ids(2, 12))
    first = values_of(model.balance_experts(0.0))
    model(some_ids(2, 12))
    assert values_of(model.balance_experts(0.0)) == first


def test_shared_experts_are_counted_as_active_parameters_and_as_operations():
    settings = dict(n_embd=64, block_size=32, vocab_size=50, attn='manual', n_expert=5,
                    moe_every=2, n_hidden=24)
    with_shared = small_gpt(**settings, n_shared_expert=3)
    without = small_gpt(**settings)
    expert = 3 * 64 * 24
    assert with_shared.n_params() - without.n_params() == 3 * expert
    # Three of the five experts are not used by a token; shared ones always are.
    for model in (with_shared, without):
        assert model.n_params() - model.n_params(active=True) == 3 * expert
    with FlopCounterMode(display=False) as counter:
        with_shared(some_ids(2, 32), some_ids(2, 32))[1].backward()
    counted = counter.get_total_flops() / 64
    assert abs(with_shared.flops_per_token(32) / counted - 1) < 0.02


# -----------------------------------------------------------------------------
# Generation and training

@pytest.mark.parametrize('settings', [
    dict(n_shared_expert=1), dict(n_expert_active=1), dict(moe_balance='bias', moe_every=2)],
    ids=str)
def test_greedy_text_is_the_same_with_and_without_a_cache_and_counts_nothing(settings):
    model = small_gpt(n_expert=4, tie_weights=False, **settings)
    for moe in model.moes.values():
        if moe.bias is not None:
            moe.bias.copy_(SELECTION_BIAS)
    ids = some_ids(3, 6)
    cached = model.generate(ids, 30, temperature=0)
    uncached = model.generate(ids, 30, temperature=0, use_cache=False)
    assert torch.equal(cached, uncached) and len(cached.unique()) > 2
    for moe in model.moes.values():
        assert moe.load.sum() == 0 and moe.entropy == 0


SPARSE = TINY | dict(
    n_expert=4,
    n_expert_active=2,
    n_shared_expert=1,
    moe_balance='bias',
    moe_bias_rate=0.01,
    n_hidden=32,
    gradient_accumulation_steps=2,
    batch_size=4,
    lr_decay_iters=20,
)


@pytest.fixture
def no_pictures(monkeypatch):
    """The runs draw no curves, which would take longer than training."""
    monkeypatch.setattr(assets.draw, 'draw_curves', lambda *args, **kwargs: None)


def train(dataset, out_dir, settings, max_iters):
    """What a run of train.py prints."""
    settings = settings | dict(dataset=dataset, out_dir=out_dir, max_iters=max_iters)
    return ok(call('train.py', *flags(settings)))


def logged_steps(out_dir):
    return [record for record in read_log(str(out_dir)) if 'loss' in record]


def records_without_times(out_dir):
    of_the_clock = ('ms', 'tokens_per_second', 'mfu', 'final')
    records = []
    for record in read_log(str(out_dir)):
        records.append({k: v for k, v in record.items() if k not in of_the_clock})
    return records


def assert_bitwise_equal(a, b):
    """Nested dicts and lists of tensors and values are equal."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_bitwise_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_bitwise_equal(x, y)
    else:
        assert a == b


def test_a_resumed_run_with_a_bias_is_bitwise_equal_to_one_that_was_never_stopped(
        dataset, tmp_path, no_pictures):
    train(dataset, tmp_path / 'whole', SPARSE, 20)
    train(dataset, tmp_path / 'resumed', SPARSE, 10)
    assert 'n_shared_expert' in load_checkpoint(str(tmp_path / 'resumed'))['model_args']
    ok(call('train.py', '--init_from=resume', f'--out_dir={tmp_path / "resumed"}',
            '--max_iters=20'))
    assert records_without_times(tmp_path / 'resumed') == records_without_times(tmp_path / 'whole')
    whole = load_checkpoint(str(tmp_path / 'whole'))
    resumed = load_checkpoint(str(tmp_path / 'resumed'))
    for key in ('model', 'model_args', 'optimizer', 'step', 'best_val_loss', 'tokenizer'):
        assert_bitwise_equal(resumed[key], whole[key])

    # The bias moved by the rate in each of 20 steps, up or down.
    bias = whole['model']['h.1.mlp.bias']
    steps = bias / 0.01
    assert bias.any() and close(steps, steps.round(), 1e-3) and steps.abs().max() <= 20


def test_a_run_logs_the_load_of_each_expert_and_prints_the_imbalance(
        dataset, tmp_path, no_pictures):
    printed = train(dataset, tmp_path, SPARSE, 20)
    assert 'moe_imbalance' in printed and 'moe/' not in printed
    records = logged_steps(tmp_path)
    assert len(records) == 20
    for record in records:
        largest = 0
        for layer in range(2):
            shares = [record[f'moe/layer_{layer}/expert_{e}'] for e in range(4)]
            assert sum(shares) == pytest.approx(1)
            largest = max(largest, *shares)
        assert record['moe_imbalance'] == pytest.approx(4 * largest)
        assert 0 < record['moe_entropy'] <= math.log(4) + 1e-5


def test_the_balancing_loss_evens_the_load_of_a_run(dataset, tmp_path, no_pictures):
    imbalance = {}
    for balance in ('aux', 'none'):
        settings = SPARSE | dict(n_expert=8, moe_balance=balance, moe_aux_weight=0.1,
                                 eval_interval=30)
        train(dataset, tmp_path / balance, settings, 30)
        last_steps = logged_steps(tmp_path / balance)[-10:]
        imbalance[balance] = np.mean([record['moe_imbalance'] for record in last_steps])
    assert imbalance['aux'] < imbalance['none'] / 1.5, imbalance
