"""
PPO: its parts against loops and closed forms, what the masks exclude, and the stage run from the
command line.
"""
import json
import math
import random
import re
import shutil

import numpy as np
import pytest
import torch

import ppo
import sample
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, save_checkpoint
from conftest import (CPU, call, checker_again, finish, flags, letters, ok, one_line, start,
                      with_checker)
from data.examples import load_gold, read_examples
from data.pretrained import load_chat_model, load_model, load_reward_model, save_pretrained
from model import GPT, GPTConfig

tok = Tokenizer.byte()
end = tok.special['<|end|>']


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_gpt(seed=0, **more):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**dict(block_size=32, n_layer=2, n_head=2, n_embd=32) | more)).eval()


def make_policy(separate_critic=False, **more):
    """A small policy with random weights, those of the value head included."""
    policy = ppo.Policy(make_gpt(**more), separate_critic)
    torch.nn.init.normal_(policy.value_head.proj.weight)
    return policy.eval()


def make_mask(B, T, seed=0):
    """(B, T), rows of a prompt (0), a response (1) and padding (0), of random lengths."""
    rng = random.Random(seed)
    mask = torch.zeros(B, T)
    for row in mask:
        begin = rng.randrange(T - 1)
        row[begin:rng.randrange(begin + 1, T + 1)] = 1
    return mask


def clip(x, low, high):
    return min(max(x, low), high)


def write_jsonl(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')


# -----------------------------------------------------------------------------
# Advantages and losses

@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_equals_the_sum_of_discounted_deltas(gamma, lam):
    torch.manual_seed(0)
    rewards = torch.randn(6, 9)
    values = torch.randn(6, 9)
    mask = make_mask(6, 9)
    advantages, returns = ppo.compute_gae(rewards * mask, values, mask, gamma, lam)
    for b in range(6):
        response = mask[b].nonzero()[:, 0].tolist()
        n = len(response)
        r = rewards[b, response].tolist()
        v = values[b, response].tolist() + [0.0]  # the value after the last token is 0
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        expected = []
        for t in range(n):
            expected.append(sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)))
        assert advantages[b, response].tolist() == pytest.approx(expected, abs=1e-5)
        expected_returns = [advantage + value for advantage, value in zip(expected, v)]
        assert returns[b, response].tolist() == pytest.approx(expected_returns, abs=1e-5)
    assert (advantages * (1 - mask)).abs().max() == 0
    assert (returns * (1 - mask)).abs().max() == 0


def test_values_outside_the_response_change_no_advantage():
    torch.manual_seed(0)
    rewards = torch.randn(6, 9)
    values = torch.randn(6, 9)
    mask = make_mask(6, 9)
    other_values = torch.where(mask > 0, values, 100.0)
    advantages, returns = ppo.compute_gae(rewards * mask, values, mask, 1, 0.9)
    other_advantages, other_returns = ppo.compute_gae(rewards * mask, other_values, mask, 1, 0.9)
    assert torch.equal(advantages, other_advantages)
    assert torch.equal(returns, other_returns)


def test_whitening_uses_the_tokens_in_the_mask_only():
    torch.manual_seed(0)
    x = torch.randn(5, 7) * 3 + 2
    mask = make_mask(5, 7)
    real = x[mask > 0].numpy()
    whitened = ppo.whiten(x, mask)
    expected = (real - real.mean()) / real.std()
    assert np.allclose(whitened[mask > 0], expected, atol=1e-5)
    assert (whitened * (1 - mask)).abs().max() == 0

    kept = ppo.whiten(x, mask, keep_mean=True)[mask > 0].numpy()
    assert kept.mean() == pytest.approx(real.mean(), abs=1e-5)
    assert kept.std() == pytest.approx(1, abs=1e-4)

    # The sums of squares are in float64: in float32 this variance would be lost.
    shifted = ppo.whiten(x + 1e4, mask)
    assert np.allclose(shifted[mask > 0], expected, atol=1e-3)


def test_the_policy_loss_is_the_mean_of_the_clipped_objective_of_each_token():
    torch.manual_seed(0)
    old_logprobs = torch.randn(4, 6)
    advantages = torch.randn(4, 6)
    mask = make_mask(4, 6)
    logprobs = old_logprobs + torch.randn(4, 6) * 0.4
    terms = []
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t] - old_logprobs[b, t])
        advantage = advantages[b, t].item()
        terms.append(-min(ratio * advantage, clip(ratio, 0.8, 1.2) * advantage))
    loss = ppo.policy_loss(logprobs, old_logprobs, advantages, mask, 0.2)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_a_token_outside_the_clip_range_in_the_direction_of_its_advantage_has_no_gradient():
    old_logprobs = torch.zeros(1, 4)
    logprobs = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    ppo.policy_loss(logprobs, old_logprobs, advantages, torch.ones(1, 4), 0.2).backward()
    assert (logprobs.grad[0, :2] == 0).all()
    assert (logprobs.grad[0, 2:] != 0).all()


def test_the_value_loss_is_half_the_larger_of_the_clipped_and_the_unclipped_squared_error():
    torch.manual_seed(0)
    values = torch.randn(4, 6)
    old_values = torch.randn(4, 6)
    returns = torch.randn(4, 6)
    mask = make_mask(4, 6)
    terms = []
    for b, t in mask.nonzero().tolist():
        value = values[b, t].item()
        old_value = old_values[b, t].item()
        target = returns[b, t].item()
        clipped = clip(value, old_value - 0.2, old_value + 0.2)
        terms.append(0.5 * max((value - target) ** 2, (clipped - target) ** 2))
    loss = ppo.value_loss(values, old_values, returns, mask, 0.2)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_group_advantages_compare_with_the_other_responses_to_the_prompt():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    # RLOO subtracts the mean of the other three.
    rloo = ppo.rloo_advantages(returns, 4).tolist()
    expected = [1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2, 0, 0, 0, 0]
    assert rloo == pytest.approx(expected, abs=1e-5)
    # GRPO subtracts the mean of all four, 3, and divides by the standard deviation.
    grpo = ppo.grpo_advantages(returns, 4).tolist()
    std = np.std([1, 2, 3, 6], ddof=1)
    assert grpo == pytest.approx([-2 / std, -1 / std, 0, 3 / std, 0, 0, 0, 0], abs=1e-3)
    # Dr. GRPO does not divide.
    dr_grpo = ppo.grpo_advantages(returns, 4, divide_by_std=False).tolist()
    assert dr_grpo == pytest.approx([-2, -1, 0, 3, 0, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize('score', [0.0, 1.0, -3.0, 0.1])
@pytest.mark.parametrize('divide_by_std', [True, False])
def test_a_group_with_equal_scores_has_no_advantage_in_grpo(score, divide_by_std):
    scores = torch.tensor([score, score, score, score, 1.0, 0.0, 0.0, 0.0])
    advantages = ppo.grpo_advantages(scores, 4, divide_by_std)
    assert advantages[:4].tolist() == [0, 0, 0, 0]
    assert advantages[4] > 0 and (advantages[5:] < 0).all()


def test_the_k3_estimate_is_never_negative_and_its_mean_is_the_kl():
    torch.manual_seed(0)
    logp = torch.randn(50).log_softmax(-1)
    ref_logp = torch.randn(50).log_softmax(-1)
    estimate = ppo.k3_estimate(logp, ref_logp)
    assert (estimate >= 0).all()
    kl = (logp.exp() * (logp - ref_logp)).sum()
    assert (logp.exp() * estimate).sum().item() == pytest.approx(kl.item(), abs=1e-5)


# -----------------------------------------------------------------------------
# Rewards and the KL coefficient

def test_a_response_without_an_end_token_gets_missing_end_score_instead_of_its_score():
    scores = torch.tensor([2.0, -5.0, 9.0])
    ended = torch.tensor([True, True, False])
    length = torch.tensor([3.0, 4.0, 5.0])
    shaped = ppo.shape_scores(scores, ended, length, score_clip=0.0, length_penalty=0.0,
                              missing_end_score=-3.0)
    assert shaped.tolist() == [2, -5, -3]
    shaped = ppo.shape_scores(scores, ended, length, score_clip=4.0, length_penalty=0.5,
                              missing_end_score=-3.0)
    assert shaped.tolist() == [0.5, -6, -3]


def test_every_token_is_rewarded_with_the_kl_penalty_and_the_last_one_also_with_the_score():
    torch.manual_seed(0)
    scores = torch.randn(6)
    log_ratio = torch.randn(6, 9)
    mask = make_mask(6, 9)
    rewards = ppo.token_rewards(scores, log_ratio, mask, 0.3)
    for b in range(6):
        response = mask[b].nonzero()[:, 0].tolist()
        for t in range(9):
            expected = 0.0
            if t in response:
                expected = -0.3 * log_ratio[b, t].item()
            if t == response[-1]:
                expected += scores[b].item()
            assert rewards[b, t].item() == pytest.approx(expected, abs=1e-6)


def test_scores_by_a_function_are_of_the_text_of_the_response_without_its_end_token():
    seen = []

    def function(prompt, response):
        seen.append((prompt, response))
        return float(response == 'yes')

    tok = Tokenizer.byte()
    tok.eos_ids = [end]
    idx = torch.tensor([[7, *b'yes', end], [7, 8, *b'no', -1]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0]])
    rows = [{'prompt': 'a'}, {'prompt': 'b'}]
    assert ppo.score_by_function(function, rows, idx, mask, tok).tolist() == [1.0, 0.0]
    assert seen == [('a', 'yes'), ('b', 'no')]


def test_the_adaptive_kl_coefficient_follows_the_clipped_relative_error():
    # kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_responses / horizon)
    for kl, factor in ((0.4, 1.0), (0.44, 1 + 0.1 * 0.05), (0.36, 1 - 0.1 * 0.05),
                       (4.0, 1 + 0.2 * 0.05), (0.0, 1 - 0.2 * 0.05)):
        coef = ppo.adapt_kl_coef(0.05, kl, kl_target=0.4, kl_horizon=5000, n_responses=250)
        assert coef == pytest.approx(0.05 * factor, rel=1e-9)


def test_minimum_kl_is_the_kl_of_two_coins():
    for before in (0.01, 0.3, 0.65, 0.99):
        for after in (0.02, 0.3, 0.95):
            p = torch.distributions.Bernoulli(torch.tensor(before, dtype=torch.float64))
            q = torch.distributions.Bernoulli(torch.tensor(after, dtype=torch.float64))
            expected = torch.distributions.kl_divergence(q, p).item()
            assert ppo.minimum_kl(before, after) == pytest.approx(expected, abs=1e-9)


def test_no_policy_reaches_the_minimum_kl_with_less():
    # Of all ways to raise the share of the first of four responses from 0.1 to 0.7.
    torch.manual_seed(0)
    before = torch.tensor([0.1, 0.2, 0.3, 0.4])
    minimum = ppo.minimum_kl(0.1, 0.7)
    for _ in range(1000):
        others = torch.rand(3)
        after = torch.cat((torch.tensor([0.7]), 0.3 * others / others.sum()))
        assert (after * (after / before).log()).sum().item() > minimum - 1e-6
    # It is reached if the other responses keep their shares among themselves.
    after = torch.cat((torch.tensor([0.7]), 0.3 * before[1:] / 0.9))
    assert (after * (after / before).log()).sum().item() == pytest.approx(minimum, abs=1e-6)


def test_minimum_kl_is_finite_for_shares_of_0_and_1():
    for before in (0.0, 1.0):
        for after in (0.0, 1.0):
            kl = ppo.minimum_kl(before, after)
            assert math.isfinite(kl)
            assert (kl > 10) == (before != after)


# -----------------------------------------------------------------------------
# Rollouts and what is computed for them

def test_packing_moves_padding_to_the_right_and_keeps_the_order():
    idx = torch.tensor([[-1, -1, 5, 6, 7, -1], [1, 2, 3, 4, 5, -1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]])
    packed, packed_mask = ppo.pack(idx, mask)
    assert packed.tolist() == [[5, 6, 7, -1, -1], [1, 2, 3, 4, 5]]
    assert packed_mask.tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


def test_length_chunks_visit_every_row_once_and_keep_all_of_its_tokens():
    lengths = [5, 2, 9, 9, 1, 3, 7]
    idx = torch.full((7, 9), -1)
    for row, length in enumerate(lengths):
        idx[row, :length] = 1
    visited = []
    for rows, T in ppo.length_chunks(idx, 3):
        assert len(rows) <= 3
        assert T == max(lengths[row] for row in rows)
        visited += rows.tolist()
    assert sorted(visited) == list(range(7))
    assert [lengths[row] for row in visited] == sorted(lengths)


@pytest.mark.parametrize('separate_critic', [False, True])
@pytest.mark.parametrize('pos', ['rope', 'learned'])
def test_rows_of_different_lengths_share_a_batch_without_changing_each_other(pos, separate_critic):
    policy = make_policy(separate_critic, pos=pos)
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 1]), torch.tensor([3])]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    logits, values = policy(idx)
    for i, row in enumerate(rows):
        single_logits, single_values = policy(row[None])
        assert torch.allclose(logits[i, :len(row)], single_logits[0], atol=1e-5)
        assert torch.allclose(values[i, :len(row)], single_values[0], atol=1e-5)


def test_the_value_starts_at_zero_everywhere():
    policy = ppo.Policy(make_gpt(), separate_critic=False)
    _, values = policy(torch.tensor([[1, 2, 3]]))
    assert (values == 0).all()


def test_a_rollout_is_masked_to_the_response_and_its_end_token():
    policy = make_policy()
    prompts = [[5, 6, 7], [9], [1, 2]]
    with torch.no_grad():
        policy.gpt.wte.weight[end] *= 8  # so that the end token is sampled often
    idx, mask, ended = ppo.rollout(policy.gpt, prompts * 20, [end], 8, 1.0, seeded(0))
    assert 5 < ended.sum() < 60
    assert idx.size(1) <= 3 + 8
    for i, (ids, row_mask, has_end) in enumerate(zip(idx.tolist(), mask.tolist(), ended.tolist())):
        prompt = prompts[i % 3]
        n_prompt = len(prompt)
        n = sum(row_mask)
        n_padding = len(ids) - n_prompt - n
        assert row_mask == [0] * n_prompt + [1] * n + [0] * n_padding
        assert ids[:n_prompt] == prompt
        assert ids[n_prompt + n:] == [-1] * n_padding
        response = ids[n_prompt:n_prompt + n]
        assert n >= 1
        assert (response[-1] == end) == has_end
        assert end not in response[:-1]
        assert has_end or n == 8


def test_a_rollout_without_the_cache_samples_the_same_responses():
    policy = make_policy()
    prompts = [[5, 6, 7], [9], [1, 2]]
    cached = ppo.rollout(policy.gpt, prompts, [end], 8, 0.7, seeded(0), use_cache=True)
    uncached = ppo.rollout(policy.gpt, prompts, [end], 8, 0.7, seeded(0), use_cache=False)
    for a, b in zip(cached, uncached, strict=True):
        assert torch.equal(a, b)


def test_measured_logprobs_entropy_and_kl_are_those_of_the_softmax_at_the_temperature():
    policy = make_policy()
    reference = make_gpt(seed=1, n_layer=1)
    idx = torch.tensor([[5, 6, 7, 8], [9, 1, 2, -1], [3, 4, -1, -1]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]])
    found = ppo.measure(policy, reference, idx, mask, 0.7, 2)
    for b, t in mask[:, 1:].nonzero().tolist():
        prefix = idx[b:b + 1, :t + 1]
        p = policy.gpt(prefix)[0][0, -1].double().div(0.7).softmax(-1)
        q = reference(prefix)[0][0, -1].double().div(0.7).softmax(-1)
        target = idx[b, t + 1]
        expected = {
            'logprobs': p[target].log(),
            'ref_logprobs': q[target].log(),
            'values': policy(prefix)[1][0, -1],
            'entropy': -(p * p.log()).sum(),
            'kl': (p * (p / q).log()).sum(),
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name][b, t].item() == pytest.approx(value.item(), abs=1e-4), name
    outside = mask[:, 1:] == 0
    for name, values in found.items():
        assert (values[outside] == 0).all(), name


# How far the ratio of a token may be from 1 if the same kernel computes both log-probabilities, for
# rows padded to different lengths. In float32 the sums differ in the last bits. In bfloat16 such a
# sum may round to the neighbouring number; another kernel differs by 2e-3.
RATIO_TOLERANCE = {'float32': 1e-5, 'bfloat16': 1e-3}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('more', [
    {}, {'pos': 'learned'}, {'n_kv_head': 1, 'window': 6, 'n_sink': 1}, {'attn': 'manual'},
    {'n_expert': 4, 'n_expert_active': 2},
], ids=str)
def test_before_an_update_the_ratio_of_every_token_is_1(more, dtype):
    policy = make_policy(**more)
    prompts = [[5, 6, 7], [9], [1, 2], [4, 4, 4, 4, 4, 4]] * 4
    idx, mask, _ = ppo.rollout(policy.gpt, prompts, [end], 12, 0.7, seeded(0))
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16')
    with autocast:
        old_logprobs = ppo.measure(policy, policy.gpt, idx, mask, 0.7, 16)['logprobs']

    # The update: other batches, padded to other lengths, and with gradients.
    n_tokens = 0
    minibatches = torch.randperm(16, generator=seeded(1)).split(8)
    for minibatch in minibatches:
        for chunk, T in ppo.length_chunks(idx[minibatch], 3):
            mb = minibatch[chunk]
            row, column = mask[mb, 1:T].nonzero(as_tuple=True)
            with autocast:
                logits, _ = policy(idx[mb, :T], read=(row, column))
            assert logits.requires_grad
            next_token = idx[mb[row], column + 1][:, None]
            logprobs = ppo.log_softmax(logits, 0.7).gather(1, next_token)[:, 0]
            ratio = (logprobs - old_logprobs[mb[row], column]).exp()
            assert (ratio - 1).abs().max() < RATIO_TOLERANCE[dtype]
            n_tokens += len(ratio)
    assert n_tokens == mask.sum()


# -----------------------------------------------------------------------------
# The stage

FAST = dict(CPU, max_iters=4, batch_size=16, minibatch_size=8, eval_interval=2, eval_prompts=4,
            test_prompts=8, test_draws=4, max_new_tokens=8)


def iterations(folder):
    """The logged metrics of a run's iterations."""
    return [record for record in read_log(str(folder)) if 'objective/kl' in record]


def final(folder):
    """The final figures of a run."""
    return read_log(str(folder))[-1]['final']


def weights(folder):
    return load_checkpoint(str(folder))['model']


def write_reward(folder, expression):
    """Write a function score, whose value is this expression. Returns FILE.py:function."""
    script = f'def score(prompt, response):\n    return {expression}\n'
    (folder / 'my_reward.py').write_text(script, encoding='utf-8')
    return f'{folder / "my_reward.py"}:score'


def largest_log_ratio(metrics, n_responses):
    """
    An upper bound of |log ratio| of every token of an iteration with one epoch. approxkl is half
    the mean square of the log ratios, and no square is larger than the sum of all.
    """
    n_tokens = metrics['response_length'] * n_responses
    return math.sqrt(2 * metrics['policy/approxkl'] * n_tokens)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('adv', ['gae', 'rloo', 'grpo'])
def test_with_learning_rates_of_0_every_ratio_stays_1_and_the_kl_0(adv, dtype, letters_data,
                                                                   small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold', adv=adv, dtype=dtype,
                             learning_rate=0.0, gain_lr=0.0, critic_lr=0.0)))
    log = iterations(tmp_path)
    assert len(log) == 4
    for metrics in log:
        assert metrics['val/first_ratio'] == pytest.approx(1, abs=RATIO_TOLERANCE[dtype])
        assert metrics['val/ratio'] == pytest.approx(1, abs=RATIO_TOLERANCE[dtype])
        assert largest_log_ratio(metrics, 16) < RATIO_TOLERANCE[dtype]
        assert metrics['policy/clipfrac'] == 0
        assert abs(metrics['objective/kl']) < 1e-4
        assert abs(metrics['objective/kl_exact']) < 1e-5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_in_the_first_minibatch_every_ratio_is_1_however_far_the_policy_has_moved(
        dtype, letters_data, small_sft, tmp_path):
    # There is one minibatch per iteration, so all metrics are of the first.
    settings = FAST | dict(minibatch_size=16, gradient_accumulation_steps=4, dtype=dtype)
    ok(call('ppo.py', *flags(settings, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold')))
    log = iterations(tmp_path)
    for metrics in log:
        assert metrics['updates'] == 1
        assert metrics['val/first_ratio'] == pytest.approx(1, abs=RATIO_TOLERANCE[dtype])
        assert largest_log_ratio(metrics, 16) < RATIO_TOLERANCE[dtype]
    assert log[-1]['objective/kl_exact'] > 1e-3


def test_the_first_of_several_minibatches_has_ratio_1(letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold')))
    log = iterations(tmp_path)
    for metrics in log:
        assert metrics['updates'] == 2
        assert metrics['val/first_ratio'] == pytest.approx(1, abs=1e-5)
    assert log[-1]['objective/kl_exact'] > 1e-3


@pytest.mark.parametrize('adv', ['gae', 'rloo', 'grpo'])
def test_the_gold_reward_is_learned(adv, letters_data, small_sft, tmp_path):
    # 240 test prompts, so that the figures vary little.
    data = tmp_path / 'data'
    shutil.copytree(letters_data, data)
    write_jsonl(data / 'prompts_test.jsonl', [{'prompt': prompt, 'response': correct}
                                              for prompt, correct, _, _ in letters(240, seed=3)])
    run = tmp_path / 'run'
    ok(call('ppo.py', *flags(FAST, **with_checker(data), init_from=small_sft.folder, out_dir=run,
                             reward='gold', adv=adv, max_iters=25, batch_size=64,
                             minibatch_size=32, eval_interval=25, test_prompts=240,
                             learning_rate=2e-3, separate_critic=adv == 'gae')))
    figures = final(run)
    assert figures['exact_match_sampled'] > figures['exact_match_sampled_before'] + 0.1
    assert figures['kl'] > figures['kl_minimum'] * 0.9 > 0
    assert figures['ended'] > 0.95


def test_in_grpo_equal_scores_leave_only_the_kl_term_to_move_the_policy(letters_data, small_sft,
                                                                        tmp_path):
    # 1. Every response has a score of 1, ended or not. A policy that is its own reference, and
    # without the KL term, does not move.
    start_of_all = tmp_path / 'start'
    settings = FAST | dict(max_iters=1, lr_schedule='constant', warmup_iters=0)
    ok(call('ppo.py', *flags(settings, dataset=letters_data, init_from=small_sft.folder,
                             out_dir=start_of_all, adv='grpo', kl_coef=0.0,
                             reward=write_reward(tmp_path, '1.0'), missing_end_score=1.0)))
    checkpoint = load_checkpoint(str(start_of_all))
    for name, weight in weights(small_sft.folder).items():
        assert torch.equal(checkpoint['model'][name], weight), name

    # 2. Two runs continue with a policy whose distribution is sharper than that of the reference.
    checkpoint['policy']['gpt.ln_f.weight'] *= 1.5
    logs = {}
    policies = {}
    for kl_coef in (0.0, 1.0):
        run = tmp_path / str(kl_coef)
        save_checkpoint(str(run), checkpoint)
        ok(call('ppo.py', *flags(init_from='resume', out_dir=run, max_iters=9, kl_coef=kl_coef,
                                 reward=write_reward(tmp_path, '1.0'))))
        logs[kl_coef] = iterations(run)
        policies[kl_coef] = load_checkpoint(str(run))['policy']
        assert [metrics['loss/policy'] for metrics in logs[kl_coef]] == [0] * 8
        assert logs[kl_coef][0]['objective/kl_exact'] > 0.1

    # 3. Without the KL term nothing changes. With it the policy returns towards the reference.
    for name, weight in checkpoint['policy'].items():
        assert torch.equal(policies[0.0][name], weight), name
    assert [metrics['grad_norm'] for metrics in logs[0.0]] == [0] * 8
    first, *_, last = [metrics['objective/kl_exact'] for metrics in logs[1.0]]
    assert last < 0.7 * first


def test_gain_lr_trains_the_final_norm_alone_which_sharpens_the_distribution(letters_data,
                                                                             small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold', max_iters=12, batch_size=64,
                             minibatch_size=32, learning_rate=0.0, critic_lr=0.0, gain_lr=0.1)))
    before = weights(small_sft.folder)
    after = weights(tmp_path)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ['ln_f.weight']
    log = iterations(tmp_path)
    assert log[-1]['objective/entropy'] < 0.9 * log[0]['objective/entropy']


def test_a_run_with_a_reward_model_logs_all_metrics_and_figures(letters_data, small_sft,
                                                                small_reward, tmp_path):
    stdout = ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), out_dir=tmp_path,
                                      init_from=small_sft.folder,
                                      reward_model=small_reward.folder, whiten_rewards=True,
                                      kl_control='adaptive', kl_target=1e-4, kl_horizon=32,
                                      kl_coef=0.1)))
    log = iterations(tmp_path)
    for name in ('kl', 'kl_k3', 'kl_exact', 'kl_coef', 'entropy', 'score', 'gold',
                 'non_score_reward', 'rlhf_reward'):
        assert f'objective/{name}' in log[0]
    for name in ('policy/approxkl', 'policy/clipfrac', 'loss/policy', 'loss/value', 'val/ratio',
                 'val/clipfrac', 'val/explained_variance', 'response_length', 'ended', 'grad_norm',
                 'episodes_per_second'):
        assert name in log[0]
    figures = final(tmp_path)
    for name in ('exact_match', 'exact_match_sampled', 'exact_match_sampled_before', 'score',
                 'score_before', 'gold', 'kl', 'kl_minimum', 'ended', 'episodes_per_second',
                 'best_of_4', 'seconds', 'peak_memory_mb', 'rollout_share'):
        assert name in figures

    # Three evaluations show the same prompts with the same responses of the reference.
    shown = [line.rsplit(' -> ', 1)[0] for line in stdout.splitlines() if '   (gold: ' in line]
    assert len(shown) > 0
    assert len(shown) == 3 * len(set(shown))
    assert log[0]['objective/non_score_reward'] == pytest.approx(0, abs=1e-5)


def test_the_kl_coefficient_adapts_after_every_iteration(letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold', kl_control='adaptive',
                             kl_target=1e-4, kl_horizon=32, kl_coef=0.1)))
    log = iterations(tmp_path)
    assert log[0]['objective/kl_coef'] == pytest.approx(0.1)
    # At first the KL is 0, below the target, so the coefficient falls by 20% of 16 / 32.
    assert log[1]['objective/kl_coef'] == pytest.approx(0.09)
    for before, after in zip(log[1:], log[2:]):
        expected = ppo.adapt_kl_coef(before['objective/kl_coef'], before['objective/kl_exact'],
                                     1e-4, 32, 16)
        assert after['objective/kl_coef'] == pytest.approx(expected, rel=1e-6)
    assert log[-1]['objective/kl_coef'] > log[1]['objective/kl_coef']


def test_a_resumed_run_continues_bit_for_bit(letters_data, small_sft, small_reward, tmp_path):
    settings = flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                     reward_model=small_reward.folder, kl_control='adaptive')
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(call('ppo.py', *settings, f'--out_dir={whole}'))
    ok(call('ppo.py', *settings, f'--out_dir={half}'))
    shutil.copyfile(half / 'ckpt_prev.pt', half / 'ckpt.pt')
    assert load_checkpoint(str(half))['step'] == 2
    ok(call('ppo.py', *flags(init_from='resume', out_dir=half, **checker_again(letters_data))))
    expected = load_checkpoint(str(whole))
    resumed = load_checkpoint(str(half))
    for name, weight in expected['policy'].items():
        assert torch.equal(weight, resumed['policy'][name]), name
    assert resumed['kl_coef'] == expected['kl_coef']
    assert final(half)['exact_match_sampled'] == final(whole)['exact_match_sampled']


def test_a_resumed_run_keeps_its_kl_coefficient_unless_the_settings_change(letters_data, small_sft,
                                                                           tmp_path):
    ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                             out_dir=tmp_path, reward='gold', max_iters=2, kl_control='adaptive',
                             kl_coef=0.1, kl_target=1e-4, kl_horizon=32, eval_interval=100)))
    saved = load_checkpoint(str(tmp_path))['kl_coef']
    assert saved != 0.1
    max_iters = 2
    for changes, expected in (([], saved), (['--kl_coef=0.7'], 0.7), (['--kl_control=none'], 0),
                              (['--kl_control=fixed'], 0.7)):
        max_iters += 1
        ok(call('ppo.py', *flags(init_from='resume', out_dir=tmp_path, max_iters=max_iters,
                                 **checker_again(letters_data)), *changes))
        coefficient = iterations(tmp_path)[-1]['objective/kl_coef']
        assert coefficient == pytest.approx(expected), changes


def test_a_resumed_run_finds_its_reference_by_reference_dir_if_it_was_moved(letters_data, small_sft,
                                                                            tmp_path):
    settings = flags(FAST, **with_checker(letters_data), reward='gold')
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(call('ppo.py', *settings, f'--init_from={small_sft.folder}', f'--out_dir={whole}'))
    shutil.copytree(small_sft.folder, tmp_path / 'sft')
    ok(call('ppo.py', *settings, f'--init_from={tmp_path / "sft"}', f'--out_dir={half}'))
    shutil.copyfile(half / 'ckpt_prev.pt', half / 'ckpt.pt')
    assert load_checkpoint(str(half))['step'] == 2
    (tmp_path / 'sft').rename(tmp_path / 'moved')

    # Without the setting the missing folder is named.
    resume = flags(init_from='resume', out_dir=half, **checker_again(letters_data))
    message = one_line(call('ppo.py', *resume))
    assert f'{tmp_path}/sft: ' in message and '--reference_dir' in message
    # With it the run ends with the same weights.
    ok(call('ppo.py', *resume, f'--reference_dir={tmp_path / "moved"}'))
    expected = load_checkpoint(str(whole))['policy']
    for name, weight in load_checkpoint(str(half))['policy'].items():
        assert torch.equal(weight, expected[name]), name
    assert final(half)['kl'] == final(whole)['kl']
    # The setting is saved: the next time it need not be repeated.
    ok(call('ppo.py', *resume, '--max_iters=5'))
    assert load_checkpoint(str(half))['step'] == 5


@pytest.mark.parametrize('adv', ['gae', 'rloo'])
def test_metrics_that_cannot_be_computed_are_omitted(adv, letters_data, small_sft, small_reward,
                                                     tmp_path):
    # There are neither gold responses nor a checking function.
    for split in ('train', 'val'):
        rows = read_examples(str(letters_data / f'prompts_{split}.jsonl'), 'prompt')
        write_jsonl(tmp_path / f'prompts_{split}.jsonl', [{'prompt': row['prompt']}
                                                          for row in rows])
    run = tmp_path / 'run'
    ok(call('ppo.py', *flags(FAST, dataset=tmp_path, init_from=small_sft.folder, adv=adv,
                             reward_model=small_reward.folder, out_dir=run, max_iters=1)))
    figures = final(run)
    for name in ('exact_match', 'exact_match_sampled', 'exact_match_before', 'gold', 'kl_minimum',
                 'best_of_4'):
        assert name not in figures
    assert math.isfinite(figures['score'])
    assert figures['ended'] > 0

    *records, _ = read_log(str(run))
    for record in [*records, figures]:
        assert None not in record.values(), record
        assert 'eval/exact_match' not in record and 'objective/gold' not in record
    # Without a critic nothing explains the variance of the returns.
    assert ('val/explained_variance' in iterations(run)[0]) == (adv == 'gae')


def test_a_reward_model_saved_before_its_run_ended_is_named(small_sft, small_reward, tmp_path,
                                                           capsys):
    checkpoint = load_checkpoint(str(small_reward.folder))
    _, tok = load_chat_model(str(small_sft.folder), {})
    assert load_reward_model(str(small_reward.folder), tok).scale != 1
    assert capsys.readouterr().out == ''
    checkpoint['model'] |= {'shift': torch.zeros(()), 'scale': torch.ones(())}
    save_checkpoint(str(tmp_path), checkpoint)
    load_reward_model(str(tmp_path), tok)
    assert f'reward.py --init_from=resume --out_dir={tmp_path}' in capsys.readouterr().out


@pytest.mark.parametrize('script', ['sft.py', 'reward.py', 'ppo.py'])
def test_a_run_does_not_overwrite_the_model_it_starts_from(script, letters_data, small_sft):
    before = (small_sft.folder / 'ckpt.pt').read_bytes()
    settings = flags(CPU, dataset=letters_data, init_from=small_sft.folder,
                     out_dir=f'{small_sft.folder}/')
    if script == 'ppo.py':
        settings += flags(reward='gold', gold=with_checker(letters_data)['gold'])
    message = one_line(call(script, *settings))
    assert 'is the folder that the run would write to' in message
    assert (small_sft.folder / 'ckpt.pt').read_bytes() == before


def test_a_minibatch_gives_the_same_step_in_one_micro_batch_or_three(letters_data, small_sft,
                                                                     tmp_path):
    policies = {}
    logs = {}
    for n in (1, 3):
        run = tmp_path / str(n)
        ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                                 out_dir=run, reward='gold', gradient_accumulation_steps=n,
                                 max_iters=1, learning_rate=1e-3, ppo_epochs=1)))
        policies[n] = load_checkpoint(str(run))['policy']
        logs[n] = iterations(run)[0]
    for name, weight in policies[1].items():
        assert torch.allclose(weight, policies[3][name], atol=2e-5), name
    for name in ('policy/approxkl', 'policy/clipfrac', 'val/clipfrac', 'loss/policy', 'loss/value',
                 'grad_norm'):
        assert logs[3][name] == pytest.approx(logs[1][name], rel=1e-3, abs=1e-5), name


def test_two_ranks_run_together(letters_data, small_sft, small_reward, tmp_path):
    settings = flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                     reward_model=small_reward.folder, out_dir=tmp_path, max_iters=2)
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ppo.py',
                    *settings)))
    first_ratios = [metrics['val/first_ratio'] for metrics in iterations(tmp_path)]
    assert first_ratios == pytest.approx([1, 1], abs=1e-5)
    assert final(tmp_path)['ended'] > 0


def test_the_best_of_four_responses_by_a_reward_model_is_more_often_correct(
        letters_data, small_sft, small_reward, tmp_path):
    settings = flags(device='cpu', out_dir=small_sft.folder, max_new_tokens=8, temperature=1.0,
                     prompts=letters_data / 'prompts_val.jsonl', answers=tmp_path / 'answers',
                     reward_model=small_reward.folder)
    n_correct = {}
    for n in (1, 4):
        ok(call('sample.py', *settings, f'--best_of={n}'))
        with open(tmp_path / 'answers', encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
        assert len(rows) == 60
        n_correct[n] = sum(row['response'] == row['prompt'].split()[-1].upper() for row in rows)
    assert n_correct[4] > n_correct[1] + 4, n_correct


# -----------------------------------------------------------------------------
# A function of a file as the reward

@pytest.mark.parametrize('expression, expected', [
    ('0.25', 0.25), ('-2', -2), ('True', 1), ('False', 0), ('(0.5, "half correct")', 0.5),
])
def test_the_reward_may_be_a_function_that_returns_a_number_or_a_bool(
        expression, expected, letters_data, small_sft, tmp_path):
    run = tmp_path / 'run'
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=run,
                             reward=write_reward(tmp_path, expression), max_iters=1)))
    assert iterations(run)[0]['objective/score'] == pytest.approx(expected)
    assert final(run)['score'] == pytest.approx(expected)
    assert final(run)['score_before'] == pytest.approx(expected)


def test_a_reward_function_gets_prompt_and_response_like_the_checking_function(
        letters_data, small_sft, tmp_path):
    # A bool that is true when the checking function returns 1.
    function = write_reward(tmp_path, 'response == prompt.split()[-1].upper()')
    for name, reward in (('gold', 'gold'), ('function', function)):
        ok(call('ppo.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                                 out_dir=tmp_path / name, reward=reward)))
    log = iterations(tmp_path / 'function')
    assert len(log) == 4
    for metrics in log:
        assert metrics['objective/score'] == metrics['objective/gold']
    assert any(metrics['objective/score'] > 0 for metrics in log)
    figures = final(tmp_path / 'function')
    for name in ('', '_before'):
        assert figures[f'score_greedy{name}'] == figures[f'exact_match{name}'] > 0
    expected = load_checkpoint(str(tmp_path / 'gold'))['policy']
    for name, weight in load_checkpoint(str(tmp_path / 'function'))['policy'].items():
        assert torch.equal(weight, expected[name]), name


EXAMPLE = r"prompt '(Raise|Now do|Up) [a-f]{3}' and response '.*'"


@pytest.mark.parametrize('expression, message', [
    ('1 / 0', f'score failed for {EXAMPLE}: ZeroDivisionError: division by zero'),
    ('{}[prompt]', f'score failed for {EXAMPLE}: KeyError: '),
    ("'good'", f"score must return a number; got 'good' for {EXAMPLE}"),
    ('None', f'score must return a number; got None for {EXAMPLE}'),
    ("float('nan')", f'score must return a number; got nan for {EXAMPLE}'),
])
def test_a_mistake_in_a_reward_function_is_one_line_with_its_file_and_the_example(
        expression, message, letters_data, small_sft, tmp_path):
    settings = flags(FAST, dataset=letters_data, init_from=small_sft.folder,
                     out_dir=tmp_path / 'run', reward=write_reward(tmp_path, expression))
    error = one_line(call('ppo.py', *settings))
    assert re.search(re.escape(f'{tmp_path / "my_reward.py"}: ') + message, error), error


def test_a_missing_file_or_function_of_a_reward_is_one_line(letters_data, small_sft, tmp_path):
    function = write_reward(tmp_path, '1.0')
    settings = flags(FAST, dataset=letters_data, init_from=small_sft.folder,
                     out_dir=tmp_path / 'run')
    error = one_line(call('ppo.py', *settings, '--reward=nowhere.py:score'))
    assert "nowhere.py:score: no file 'nowhere.py'; a reward is FILE.py:function" in error
    error = one_line(call('ppo.py', *settings, f'--reward={function}s'))
    assert f"{tmp_path / 'my_reward.py'} has no function 'scores'" in error


# -----------------------------------------------------------------------------
# Prompts that do not fit

@pytest.fixture
def recorded_prompts(monkeypatch):
    """{'rollout': ..., 'evaluation': ...}: sets of the prompts, as tuples of ids, that a run of
    ppo.py samples responses to."""
    recorded = {'rollout': set(), 'evaluation': set()}
    answer = sample.answer
    generate = GPT.generate
    is_evaluation = False

    def recording_answer(*args, **kwargs):
        nonlocal is_evaluation
        is_evaluation = True
        responses = answer(*args, **kwargs)
        is_evaluation = False
        return responses

    def recording_generate(gpt, idx, *args, **kwargs):
        for row in idx.tolist():
            prompt = tuple(token for token in row if token != -1)
            recorded['evaluation' if is_evaluation else 'rollout'].add(prompt)
        return generate(gpt, idx, *args, **kwargs)

    monkeypatch.setattr(sample, 'answer', recording_answer)
    monkeypatch.setattr(GPT, 'generate', recording_generate)
    return recorded


@pytest.mark.parametrize('max_new_tokens', [8, 16, 32])
def test_rollouts_and_evaluations_have_the_same_prompts(max_new_tokens, recorded_prompts, small_sft,
                                                        letters_data, tmp_path):
    # The same eight prompts are there to train and to evaluate; four of them are long.
    rows = [{'prompt': f'Raise {word}', 'response': word.upper()}
            for word in ('abc', 'bcd', 'cde', 'def')]
    rows += [row | {'prompt': f'Please, please, please, {row["prompt"]}'} for row in rows]
    write_jsonl(tmp_path / 'prompts_train.jsonl', rows)
    write_jsonl(tmp_path / 'prompts_val.jsonl', rows)
    shutil.copyfile(letters_data / 'checker.py', tmp_path / 'checker.py')
    run = tmp_path / 'run'
    settings = FAST | dict(max_new_tokens=max_new_tokens, max_iters=1, batch_size=8)
    stdout = ok(call('ppo.py', *flags(settings, **with_checker(tmp_path), out_dir=run,
                                      init_from=small_sft.folder, reward='gold',
                                      eval_prompts=8)))

    # Block_size 32 leaves 24 or 16 tokens, but at least the 3 chat markers and 16 tokens remain.
    limit = max(32 - max_new_tokens, 3 + 16)
    user, assistant = tok.special['<|user|>'], tok.special['<|assistant|>']
    expected = []
    for row in rows:
        ids = [user, *tok.encode(row['prompt']), end, assistant]
        expected.append(ids[-limit:])
    as_set = {tuple(ids) for ids in expected}
    assert max(map(len, expected)) == limit
    assert recorded_prompts['rollout'] == as_set
    assert recorded_prompts['evaluation'] == as_set
    assert f'truncated 4 of 8 prompts to {limit} tokens' in stdout

    # The reported exact match is that of the saved model on these prompts.
    model, _ = load_model(str(run), {})
    n_correct = 0
    for ids, row in zip(expected, rows):
        out = model.generate(torch.tensor([ids]), max_new_tokens, temperature=0, stop=[end])
        response = [token for token in out[0, len(ids):].tolist() if token != end]
        n_correct += tok.decode(response) == row['response']
    assert final(run)['exact_match'] == n_correct / 8


def test_no_exact_match_is_reported_for_questions_that_were_truncated_away(letters_data, small_sft,
                                                                           tmp_path):
    # The eight prompts differ only in their first letters, which do not fit. So all greedy
    # responses are equal, and at most one of the eight can be correct.
    rows = [{'prompt': f'Raise {word} {"." * 40}', 'response': word.upper()}
            for word in ('abc', 'bcd', 'cde', 'def', 'fed', 'edc', 'dcb', 'cba')]
    write_jsonl(tmp_path / 'prompts_train.jsonl', rows)
    write_jsonl(tmp_path / 'prompts_val.jsonl', rows)
    script = ("def gold(prompt, response):\n"
              "    return float(response == prompt.split()[1].upper()), 0.0\n")
    (tmp_path / 'checker.py').write_text(script, encoding='utf-8')
    gold = load_gold(str(tmp_path), with_checker(tmp_path)['gold'])
    assert gold('Raise abc ...', 'ABC') == 1.0
    run = tmp_path / 'run'
    settings = FAST | dict(max_new_tokens=32, max_iters=2)
    stdout = ok(call('ppo.py', *flags(settings, **with_checker(tmp_path), out_dir=run,
                                      init_from=small_sft.folder, reward='gold')))
    assert 'truncated 8 of 8 prompts to 19 tokens' in stdout
    assert final(run)['exact_match'] <= 1 / 8
    assert final(run)['gold'] < 0.5


def test_learned_positions_refuse_more_tokens_than_block_size_and_name_the_remedy(letters_data,
                                                                                  tmp_path):
    model_args = dict(block_size=32, vocab_size=tok.vocab_size, n_layer=1, n_head=2, n_embd=32,
                      pos='learned')
    save_checkpoint(str(tmp_path / 'base'), {
        'stage': 'train', 'step': 0, 'model': make_gpt(**model_args).state_dict(),
        'model_args': model_args, 'config': {}, 'tokenizer': tok.to_dict()})
    settings = FAST | dict(max_iters=1, **with_checker(letters_data), init_from=tmp_path / 'base',
                           out_dir=tmp_path / 'run', reward='gold', max_new_tokens=32)
    message = one_line(call('ppo.py', *flags(settings)))
    assert "max_new_tokens 32 is too much for block_size 32, which pos 'learned' cannot exceed; " \
           'lower it by 19' in message
    settings['max_new_tokens'] = 32 - 19
    ok(call('ppo.py', *flags(settings)))


# -----------------------------------------------------------------------------
# Mistakes, and models of other kinds

@pytest.mark.parametrize('args, message', [
    (['--reward=other'], "reward must be one of 'model', 'gold', 'FILE.py:function'; got 'other'"),
    (['--adv=a2c'], "adv must be one of 'gae', 'rloo', 'grpo'; got 'a2c'"),
    (['--kl_control=on'], "kl_control must be one of 'fixed', 'adaptive', 'none'; got 'on'"),
    (['--minibatch_size=7'], 'batch_size 16 must be a multiple of minibatch_size 7'),
    (['--adv=rloo', '--group_size=1'], 'group_size must be at least 2 for rloo; got 1'),
    (['--adv=grpo', '--group_size=0'], 'group_size must be at least 2 for grpo; got 0'),
    (['--adv=rloo', '--separate_critic=True'],
     "separate_critic is for adv 'gae': rloo has no critic"),
    (['--adv=grpo', '--group_size=3'], 'batch_size 16 must be a multiple of group_size 3'),
    (['--temperature=0'], 'temperature must be above 0'),
    (['--reward=model', '--reward_model=nowhere'], 'nowhere'),
])
def test_a_mistake_is_one_line(args, message, letters_data, small_sft, tmp_path):
    settings = dict(FAST)
    if '--minibatch_size=7' in args:
        del settings['minibatch_size']  # a key may be given only once
    settings = flags(settings, **with_checker(letters_data), init_from=small_sft.folder,
                     out_dir=tmp_path)
    assert message in one_line(call('ppo.py', *settings, *args))


def test_reward_gold_is_refused_without_a_checking_function(letters_data, small_sft, tmp_path):
    for split in ('train', 'val'):
        name = f'prompts_{split}.jsonl'
        shutil.copyfile(letters_data / name, tmp_path / name)
    message = one_line(call('ppo.py', *flags(FAST, dataset=tmp_path, init_from=small_sft.folder,
                                             out_dir=tmp_path / 'run', reward='gold')))
    assert 'has no checking function; give one by --gold=FILE.py:function' in message


def test_the_prepare_script_of_a_dataset_given_by_a_path_is_not_run(letters_data, small_sft,
                                                                    tmp_path):
    for name in ('prompts_train.jsonl', 'prompts_val.jsonl', 'checker.py'):
        shutil.copyfile(letters_data / name, tmp_path / name)
    was_run = tmp_path / 'was_run'
    script = (tmp_path / 'checker.py').read_text(encoding='utf-8')
    script += f'open({str(was_run)!r}, "w", encoding="utf-8").close()\n'
    (tmp_path / 'prepare.py').write_text(script, encoding='utf-8')
    settings = flags(FAST, init_from=small_sft.folder, out_dir=tmp_path / 'run', reward='gold',
                     dataset=tmp_path)
    message = one_line(call('ppo.py', *settings))
    assert 'has no checking function' in message
    assert not was_run.exists()
    # It is run if it is named.
    ok(call('ppo.py', *settings, f'--gold={tmp_path / "prepare.py"}:gold'))
    assert was_run.exists()


def test_a_policy_is_refused_as_a_reward_model(letters_data, small_sft, tmp_path):
    message = one_line(call('ppo.py', *flags(FAST, **with_checker(letters_data), out_dir=tmp_path,
                                             init_from=small_sft.folder,
                                             reward_model=small_sft.folder)))
    assert 'a sft checkpoint, not a reward model' in message


def test_a_hugging_face_folder_goes_through_all_stages(letters_data, tmp_path):
    pytest.importorskip('safetensors')
    bytes_only = Tokenizer({i: bytes([i]) for i in range(256)}, special={'<|endoftext|>': 256})
    model = GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_kv_head=1,
                          n_embd=32))
    base = tmp_path / 'hf'
    save_pretrained(model, str(base), bytes_only)
    settings = dict(CPU, **with_checker(letters_data), max_iters=2, max_new_tokens=8,
                    eval_interval=2)
    ok(call('reward.py', *flags(settings, init_from=base, out_dir=tmp_path / 'reward',
                                batch_size=8)))
    ok(call('ppo.py', *flags(settings, init_from=base, reward_model=tmp_path / 'reward',
                             out_dir=tmp_path / 'ppo', batch_size=8, minibatch_size=8,
                             eval_prompts=4, test_prompts=8, test_draws=1)))
    # The special tokens of chats were added to the vocabulary.
    assert weights(tmp_path / 'ppo')['wte.weight'].shape == (261, 32)


def test_a_model_with_experts_goes_through_all_stages(letters_data, tmp_path):
    model_args = dict(block_size=32, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=32,
                      n_expert=4, n_expert_active=2)
    save_checkpoint(str(tmp_path / 'base'), {
        'stage': 'train', 'step': 0, 'model': make_gpt(**model_args).state_dict(),
        'model_args': model_args, 'config': {}, 'tokenizer': tok.to_dict()})
    settings = dict(CPU, dataset=letters_data, max_iters=3, max_new_tokens=8, eval_interval=3,
                    batch_size=8)
    evaluation = dict(eval_prompts=4, test_prompts=8, test_draws=1)
    ok(call('sft.py', *flags(settings, init_from=tmp_path / 'base', out_dir=tmp_path / 'sft',
                             **evaluation)))
    settings |= with_checker(letters_data)
    ok(call('reward.py', *flags(settings, init_from=tmp_path / 'sft',
                                out_dir=tmp_path / 'reward')))
    ok(call('ppo.py', *flags(settings, init_from=tmp_path / 'sft', out_dir=tmp_path / 'ppo',
                             reward_model=tmp_path / 'reward', minibatch_size=8, **evaluation)))
    first = iterations(tmp_path / 'ppo')[0]
    assert first['val/first_ratio'] == pytest.approx(1, abs=1e-5)
