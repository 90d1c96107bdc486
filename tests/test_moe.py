"""
What model.py and train.py promise of experts. Independent of them: the dense model, a layer in plain loops over tokens
(`slow_moe`, below), closed forms, runs that never stopped. Mixtral's own layer stands beside ours in test_interop.py.
"""
import copy, math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import assets.draw
from configurator import load_checkpoint, read_log
from conftest import TINY, call, flags, ok
from model import GPT, GPTConfig, MoE
from test_model import close, linear, small_gpt, softmax, some_ids
from test_train import records, same, state_of


def layer_of(seed=0, **settings):
    """A layer of experts, in training."""
    return small_gpt(seed, **dict(n_expert=4) | settings).h[0].mlp.train()


def slow_moe(layer, x, n_active, bias=0.0):
    """A token at a time, x (B, T, C): what the layer returns, how often each expert was chosen, and the
    probabilities that the router gave."""
    out, load, probs = [], torch.zeros(len(layer.experts)), []
    for token in x.flatten(0, 1):
        logits = layer.router.weight @ token
        p = logits.exp() / logits.exp().sum()
        chosen = ((p if layer.bias is not None else logits) + bias).argsort(descending=True)[:n_active].tolist()
        total = sum(p[e] for e in chosen) if n_active > 1 else 1
        y = sum(p[e] / total * layer.experts[e](token) for e in chosen)
        out.append(y + sum(expert(token) for expert in layer.shared))
        load[chosen] += 1
        probs.append(p)
    return torch.stack(out).view_as(x), load, torch.stack(probs)


# What a layer computes

def test_one_expert_is_the_dense_model():
    dense, sparse = small_gpt(), small_gpt(n_expert=1, n_expert_active=1, seed=1)
    state = {name.replace('mlp.', 'mlp.experts.0.'): p for name, p in dense.state_dict().items()}
    state |= {name: p for name, p in sparse.state_dict().items() if 'router' in name}
    sparse.load_state_dict(state)
    assert close(sparse(some_ids(2, 16))[0], dense(some_ids(2, 16))[0], 1e-5)


def test_all_experts_active_is_their_sum_weighted_by_the_routers_softmax():
    layer, x = layer_of(n_expert=3, n_expert_active=3), torch.randn(2, 7, 16)
    share = torch.softmax(x @ layer.router.weight.T, dim=-1)
    assert close(layer(x), sum(share[..., e, None] * layer.experts[e](x) for e in range(3)), 1e-5)


@pytest.mark.parametrize('balance', ['aux', 'bias', 'none'])
@pytest.mark.parametrize('n_active, n_shared', [(1, 0), (1, 1), (2, 0), (2, 2), (3, 0), (4, 1)])
def test_outputs_and_all_gradients_are_those_of_plain_loops(n_active, n_shared, balance):
    """Of an output weighted at random, and of both losses written out; with biases on the choice."""
    layer = layer_of(n_expert_active=n_active, n_shared_expert=n_shared, moe_balance=balance, bias=n_shared == 1)
    bias = torch.tensor([0.3, 0.0, -0.4, 0.1]) if balance == 'bias' else torch.zeros(4)
    if balance == 'bias':
        layer.bias.copy_(bias)
    x, weight = torch.randn(2, 9, 16, requires_grad=True), torch.randn(2, 9, 16)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    total = (y * weight).sum() + 3 * layer.z + (5 * layer.aux if balance == 'aux' else 0)
    ours = torch.autograd.grad(total, inputs)
    expected, load, probs = slow_moe(layer, x, n_active, bias)
    z = (x.flatten(0, 1) @ layer.router.weight.T).exp().sum(1).log().square().mean()
    aux = 4 * sum(load[e] / (18 * n_active) * probs[:, e].mean() for e in range(4))
    assert close(y, expected, 1e-4) and close(layer.z, z, 1e-4)
    assert close(layer.aux, aux, 1e-5) if balance == 'aux' else layer.aux is None
    theirs = torch.autograd.grad((expected * weight).sum() + 3 * z + (5 * aux if balance == 'aux' else 0), inputs,
                                 allow_unused=True)
    for a, b in zip(ours, theirs):
        assert close(a, torch.zeros_like(a) if b is None else b, 1e-3)  # an expert that nobody chose
    assert ours[1].abs().max() > 0.1  # the router's


def test_gradients_of_the_layer_reach_the_chosen_experts_alone():
    layer, x = layer_of(), torch.randn(1, 1, 16)
    chosen = linear(layer.router, x[0].double().numpy())[0].argsort()[-2:]
    layer(x).square().sum().backward()
    for e, expert in enumerate(layer.experts):
        assert all((p.grad.abs().max() > 1e-4) == (e in chosen) for p in expert.parameters())
    assert [row.abs().max() > 1e-6 for row in layer.router.weight.grad] == [e in chosen for e in range(4)]
    layer.router.weight.grad = None
    layer(x)
    layer.aux.backward()
    assert layer.router.weight.grad.abs().min() > 0  # the balancing loss moves every expert's score


def test_a_single_active_expert_is_weighed_by_its_probability_so_that_the_router_learns_from_the_text():
    model, ids = small_gpt(n_expert=4, n_expert_active=1), some_ids(2, 12)
    model(ids, some_ids(2, 12, seed=1))[1].backward()
    assert all(block.mlp.router.weight.grad.abs().max() > 1e-4 for block in model.h)
    layer, x = model.h[0].mlp, torch.randn(1, 5, 16)
    probs = torch.softmax(x @ layer.router.weight.T, dim=-1)
    for t in range(5):
        best = probs[0, t].argmax()
        assert close(layer(x)[0, t], probs[0, t, best] * layer.experts[best](x[0, t]), 1e-5)


def test_experts_stand_in_every_layer_or_in_every_other():
    kinds = lambda every: [isinstance(b.mlp, MoE) for b in small_gpt(n_layer=4, n_expert=2, moe_every=every).h]
    assert kinds(1) == [True] * 4 and kinds(2) == [False, True] * 2 and kinds(4) == [False] * 3 + [True]


def test_a_copy_can_be_made_after_a_step_of_training():
    model, ids = small_gpt(n_expert=4).train(), some_ids(2, 12)
    loss = model(ids, ids)[1] + model.aux_loss() + model.aux_loss('z')
    other = copy.deepcopy(model)
    loss.backward()
    assert torch.equal(other(ids)[0], model(ids)[0]) and other.moes[0] is other.h[0].mlp
    assert other.aux_loss() == model.aux_loss() > 0


# Losses

def moe_that_sends(direction_to_expert, n_active=1):
    """A layer of 4 experts whose router sends the unit vector i to expert direction_to_expert[i]."""
    layer = layer_of(n_expert_active=n_active)
    with torch.no_grad():
        layer.router.weight.zero_()
        for direction, expert in enumerate(direction_to_expert):
            layer.router.weight[expert, direction] = 30.0
    return layer, torch.eye(16)[None, :4]


def test_the_balancing_loss_is_1_when_even_and_the_number_of_experts_when_all_go_to_one():
    for sends, expected in (([0, 1, 2, 3], 1), ([3, 1, 0, 2], 1), ([0, 0, 1, 1], 2), ([2, 2, 2, 2], 4)):
        layer, x = moe_that_sends(sends)
        layer(x)
        assert abs(layer.aux.item() - expected) < 1e-5


def test_both_losses_are_their_papers_formulas_averaged_over_layers():
    model = small_gpt(n_expert=4, n_expert_active=2, n_layer=4, moe_every=2)
    balancing, z = [], []
    for block in (model.h[1], model.h[3]):
        x = torch.randn(3, 5, 16)
        block.mlp(x)
        logits = linear(block.mlp.router, x.reshape(15, 16).double().numpy())
        tokens, probability = np.zeros(4), np.zeros(4)
        for row in logits:
            tokens[np.argsort(-row)[:2]] += 1 / (2 * 15)
            probability += softmax(row) / 15
        balancing.append(4 * (tokens * probability).sum())
        z.append(np.mean([math.log(sum(math.exp(a) for a in row)) ** 2 for row in logits]))
    assert abs(model.aux_loss().item() - np.mean(balancing)) < 1e-5 and min(balancing) > 1
    assert abs(model.aux_loss('z').item() - np.mean(z)) < 1e-4


@pytest.mark.parametrize('settings', [{}, dict(n_expert=4, moe_balance='bias'), dict(n_expert=4, moe_balance='none')])
def test_without_experts_or_by_another_way_of_balancing_the_balancing_loss_is_0(settings):
    model = small_gpt(**settings)
    loss = model(some_ids(2, 12), some_ids(2, 12))[1]
    assert model.aux_loss() == 0 and (model.aux_loss('z') > 0) == bool(settings)
    (loss + 0.01 * model.aux_loss()).backward()  # as every script adds it


def lopsided(**settings):
    """A layer whose router sends most tokens to its first expert, and tokens that have a common direction."""
    torch.manual_seed(0)
    layer, x = layer_of(**settings), torch.randn(8, 64, 16)
    x[..., 0] = 2.0
    with torch.no_grad():
        layer.router.weight.normal_(std=0.3)
        layer.router.weight[0, 0] += 1.5
    return layer, x


def imbalance(layer, x):
    """The largest expert's tokens as a multiple of the mean."""
    layer.tally = 0.0
    layer(x)
    load, layer.tally = layer.tally[:-1], 0.0
    return (load.max() / load.mean()).item()


def test_descending_the_balancing_loss_evens_the_loads():
    layer, x = lopsided()
    assert imbalance(layer, x) > 1.8
    for _ in range(60):
        layer(x)
        layer.router.weight.data -= 0.5 * torch.autograd.grad(layer.aux, layer.router.weight)[0]
    assert imbalance(layer, x) < 1.25


def test_descending_the_z_loss_makes_the_routers_logits_small():
    layer, x = lopsided()
    scale = lambda: (x @ layer.router.weight.T).logsumexp(-1).abs().mean()
    before = scale()
    for _ in range(20):
        layer(x)
        layer.router.weight.data -= 0.05 * torch.autograd.grad(layer.z, layer.router.weight)[0]
    assert scale() < before / 2


@pytest.mark.parametrize('settings', [dict(), dict(n_expert_active=1), dict(causal=False)])
def test_padding_counts_in_no_loss_and_in_no_share(settings):
    rows, model = [some_ids(9).tolist(), some_ids(4, seed=1).tolist()], small_gpt(n_expert=4, n_layer=1, **settings)
    model.train()
    padded = torch.tensor([[-1, *rows[0], -1, -1], [-1] * 6 + rows[1] + [-1] * 2])
    pos = torch.tensor([[-1, *range(9), -1, -1], [-1] * 6 + [*range(4)] + [-1] * 2])
    model.hidden(padded, pos=pos)
    layer = model.h[0].mlp
    tally, layer.tally = layer.tally, 0.0
    hs = []
    layer.register_forward_pre_hook(lambda _, args: hs.append(args[0].flatten(0, 1)))
    measured = model.aux_loss(), model.aux_loss('z')
    for row in rows:
        model.hidden(torch.tensor([row]))
    assert close(tally, layer.tally, 1e-4) and tally[:-1].sum() == 13 * model.config.n_expert_active
    layer(torch.cat(hs)[None])
    assert close(torch.stack(measured), torch.stack((layer.aux, layer.z)), 1e-5)


# The bias on the choice

def test_the_bias_is_no_parameter_and_is_saved_only_where_it_is_used():
    names = {kind: {*small_gpt(n_expert=4, moe_balance=kind).state_dict()} for kind in ('aux', 'bias', 'none')}
    assert names['bias'] - names['aux'] == {'h.0.mlp.bias', 'h.1.mlp.bias'} and names['aux'] == names['none']
    model = small_gpt(n_expert=4, moe_balance='bias')
    assert {*dict(model.named_parameters(remove_duplicate=False))} == names['aux']
    old = {k: v for k, v in vars(model.config).items() if k not in ('n_shared_expert', 'moe_balance')}
    GPT(GPTConfig(**old)).load_state_dict({k: v for k, v in model.state_dict().items() if k in names['aux']})


def test_a_step_moves_the_bias_once_by_the_loads_of_all_its_micro_batches():
    layer_model = small_gpt(n_expert=4, moe_balance='bias', n_layer=1).train()
    layer, expected = layer_model.h[0].mlp, torch.zeros(4)
    for step in range(5):
        load = torch.zeros(4)
        for size in (3, 8):
            x = torch.randn(size, 5, 16)
            load += slow_moe(layer, x, 2, layer.bias)[1]
            before = layer.bias.clone()
            layer(x)
            assert torch.equal(layer.bias, before)
        layer.eval()
        layer(torch.randn(50, 5, 16))  # an evaluation counts for nothing
        layer.train()
        layer_model.balance(0.25)
        expected += torch.tensor([0.25 if n < 55 / 2 else -0.25 if n > 55 / 2 else 0.0 for n in load.tolist()])
        assert close(layer.bias, expected, 1e-6)
    assert expected.abs().max() > 0.2


def test_the_bias_evens_the_loads_and_leaves_every_gate_to_the_scores_alone():
    model = small_gpt(n_expert=4, moe_balance='bias', n_layer=1).train()
    layer, x = lopsided(moe_balance='bias')
    model.moes[0] = layer
    assert imbalance(layer, x) > 1.8
    for rate in [0.01] * 100 + [0.001] * 50:
        layer(x)
        model.balance(rate)
    assert imbalance(layer, x) < 1.1
    assert close(layer(x), slow_moe(layer, x, 2, layer.bias)[0], 1e-4)
    assert not close(layer(x), slow_moe(layer, x, 2)[0], 0.1)  # others are chosen
    inputs = [layer.router.weight, *layer.experts.parameters()]
    theirs = torch.autograd.grad(slow_moe(layer, x[:1], 2, layer.bias)[0].square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(layer(x[:1]).square().sum(), inputs), theirs):
        assert close(a / b.abs().max(), b / b.abs().max(), 1e-4)


def test_all_ranks_move_the_bias_alike_by_the_loads_of_all(monkeypatch):
    make = lambda: small_gpt(n_expert=4, moe_balance='bias').train()
    ids = [some_ids(3, 12, seed=seed) for seed in range(2)]
    alone, ranks = make(), [make(), make()]
    for rank, x in zip(ranks, ids):
        rank(x)
        alone(x)
    numbers = lambda shown: {k: v.item() for k, v in shown.items()}
    shown = numbers(alone.balance(0.1))
    tallies = [torch.stack([moe.tally for moe in rank.moes.values()]) for rank in ranks]
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda t: t.copy_(sum(tallies)))
    for rank in ranks:
        assert numbers(rank.balance(0.1)) == pytest.approx(shown)
        assert all(torch.equal(moe.bias, alone.moes[n].bias) and moe.bias.any() for n, moe in rank.moes.items())


# What is counted

def test_what_a_step_shows_equals_a_count():
    model = small_gpt(n_expert=4, n_layer=4, moe_every=2).train()
    shares, entropies = [], []
    for layer in (1, 3):
        load, probs = torch.zeros(4), []
        for size in (2, 5):
            x = torch.randn(size, 7, 16)
            model.h[layer].mlp(x)
            _, n, p = slow_moe(model.h[layer].mlp, x, 2)
            load, probs = load + n, probs + p.tolist()
        shares.append((load / load.sum()).tolist())
        entropies += [-sum(a * math.log(a) for a in p) for p in probs]
    shown = {k: v.item() for k, v in model.balance(0.0).items()}
    expected = {f'moe/layer_{n}/expert_{e}': s for n, row in zip((1, 3), shares) for e, s in enumerate(row)}
    expected |= {'moe_imbalance': 4 * max(map(max, shares)), 'moe_entropy': np.mean(entropies)}
    assert shown == pytest.approx(expected, rel=1e-5)


def test_parameters_of_shared_experts_are_active_and_operations_equal_those_pytorch_counts():
    settings = dict(n_embd=64, block_size=32, vocab_size=50, attn='manual', n_expert=5, moe_every=2, n_hidden=24)
    with_shared, without = (small_gpt(**settings, n_shared_expert=n) for n in (3, 0))
    expert = 3 * 64 * 24
    assert with_shared.n_params() - without.n_params() == 3 * expert
    assert all(model.n_params() - model.n_params(active=True) == 3 * expert for model in (with_shared, without))
    with FlopCounterMode(display=False) as counter:
        with_shared(some_ids(2, 32), some_ids(2, 32))[1].backward()
    assert abs(with_shared.flops_per_token(32) / (counter.get_total_flops() / 64) - 1) < 0.02


# Sampling and training

@pytest.mark.parametrize('settings', [dict(n_shared_expert=1), dict(n_expert_active=1),
                                      dict(moe_balance='bias', moe_every=2)])
def test_greedy_text_is_the_same_with_a_cache_and_without(settings):
    model, ids = small_gpt(n_expert=4, tie_weights=False, **settings), some_ids(3, 6)
    for moe in model.moes.values():
        if moe.bias is not None:
            moe.bias.copy_(torch.tensor([0.3, 0.0, -0.4, 0.1]))
    texts = [model.generate(ids, 30, temperature=0, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*texts) and len(texts[0].unique()) > 2
    assert all(isinstance(moe.tally, float) for moe in model.moes.values())  # nothing was counted


SPARSE = dict(TINY, n_expert=4, n_expert_active=2, n_shared_expert=1, moe_balance='bias', moe_bias_rate=0.01,
              n_hidden=32, gradient_accumulation_steps=2, batch_size=4, lr_decay_iters=20)


def test_a_run_with_a_bias_goes_on_bit_for_bit_and_logs_what_its_routers_do(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.draw, 'draw', lambda *args: None)
    run = lambda name, n: ok(call('train.py', *flags(SPARSE, dataset=dataset, out_dir=tmp_path / name, max_iters=n)))
    said = run('whole', 20)
    run('parts', 10)
    assert 'n_shared_expert' in load_checkpoint(str(tmp_path / 'parts'))['model_args']
    ok(call('train.py', '--init_from=resume', f'--out_dir={tmp_path / "parts"}', '--max_iters=20'))
    assert records(tmp_path / 'parts') == records(tmp_path / 'whole')
    assert same(state_of(tmp_path / 'parts'), state_of(tmp_path / 'whole'))
    bias = state_of(tmp_path / 'whole')['model']['h.1.mlp.bias']
    steps = bias / 0.01
    assert bias.any() and close(steps, steps.round(), 1e-3) and steps.abs().max() <= 20
    logged = [r for r in read_log(str(tmp_path / 'whole')) if 'loss' in r]
    assert len(logged) == 20 and 'moe_imbalance' in said and 'moe/' not in said
    for record in logged:
        shares = [[record[f'moe/layer_{n}/expert_{e}'] for e in range(4)] for n in range(2)]
        assert [sum(row) for row in shares] == pytest.approx([1, 1])
        assert record['moe_imbalance'] == pytest.approx(4 * max(map(max, shares)))
        assert 0 < record['moe_entropy'] <= math.log(4) + 1e-5


def test_the_balancing_loss_spreads_the_tokens_of_a_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.draw, 'draw', lambda *args: None)
    worst = {}
    for balance in ('aux', 'none'):
        settings = dict(SPARSE, n_expert=8, moe_balance=balance, moe_aux_weight=0.1, max_iters=30, eval_interval=30)
        ok(call('train.py', *flags(settings, dataset=dataset, out_dir=tmp_path / balance)))
        worst[balance] = np.mean([r['moe_imbalance'] for r in read_log(str(tmp_path / balance)) if 'loss' in r][-10:])
    assert worst['aux'] < worst['none'] / 1.5, worst
