"""
The updates of ppo.py (PPO, RLOO and GRPO) and of reward.py (DPO) against plain references: loops
over responses and tokens, in float64, that use nothing of these two scripts.

The scripts run as their user runs them, for a few updates of a model whose weights are float64.
Before and after each update its gradients and weights are recorded. The reference computes the same
gradients from the recorded weights, and the optimizer's step from these gradients. So the division
of a minibatch among micro-batches and ranks is tested where it is written.
"""
import contextlib
import dataclasses
import json
import os
import random
import sys
from unittest import mock

import pytest
import torch
from torch.optim.optimizer import (register_optimizer_step_post_hook,
                                   register_optimizer_step_pre_hook)

import assets.draw
import data.pretrained
from bpe import Tokenizer
from configurator import generator_for, save_checkpoint
from conftest import CPU, ROOT, call, finish, flags, ok, run_script, start
from model import GPT, GPTConfig

tok = Tokenizer.byte()
END_TOKENS = (tok.end_of_text, tok.chat_end)
TOLERANCE = 1e-6


# -----------------------------------------------------------------------------
# Record a run

load_chat_model = data.pretrained.load_chat_model
generate = GPT.generate


def load_in_float64(source, config):
    gpt, tokenizer = load_chat_model(source, config)
    return gpt.double(), tokenizer


def cut(idx, out, max_new_tokens, end_token):
    """
    Cut sampled responses to different lengths: row i keeps 1 + 3 i mod (max_new_tokens + 1) tokens,
    the last of which becomes the end token. Rows that would be longer keep no end token. An
    untrained model would hardly end a response.
    """
    out = out.clone()
    for i, row in enumerate(out):
        length = 1 + 3 * i % (max_new_tokens + 1)
        last = idx.size(1) + length - 1
        if last < len(row) and row[last] >= 0:
            row[last] = end_token
            row[last + 1:] = -1
    return out


def split_rows(idx, out):
    """[(ids without padding, number of ids of the prompt)] of prompts idx and responses out."""
    responses = []
    for row in out:
        n_prompt = int((row[:idx.size(1)] >= 0).sum())
        responses.append((row[row >= 0].tolist(), n_prompt))
    return responses


def current_weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group['params']]


@contextlib.contextmanager
def recording(path):
    """
    While a script runs in this process: its weights are float64, and its responses have different
    lengths. `path` then holds a list of its updates, each a dict of the responses that were
    sampled last, the weights before, the gradients, and the weights after.
    """
    updates = []
    last_responses = []

    def generate_and_record(gpt, idx, max_new_tokens, *args, stop=(), **settings):
        out = generate(gpt, idx, max_new_tokens, *args, stop=stop, **settings)
        out = cut(idx, out, max_new_tokens, stop[0])
        last_responses[:] = split_rows(idx, out)
        return out

    def before_step(optimizer, args, settings):
        gradients = [p.grad.clone() for group in optimizer.param_groups for p in group['params']]
        updates.append({'responses': list(last_responses), 'before': current_weights(optimizer),
                        'gradients': gradients})

    def after_step(optimizer, args, settings):
        updates[-1]['after'] = current_weights(optimizer)
        torch.save(updates, path)  # now, because ranks other than 0 end without returning here

    hooks = [register_optimizer_step_pre_hook(before_step),
             register_optimizer_step_post_hook(after_step)]
    try:
        with (mock.patch.object(data.pretrained, 'load_chat_model', load_in_float64),
              mock.patch.object(GPT, 'generate', generate_and_record),
              mock.patch.object(assets.draw, 'draw_curves')):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def record_run(script, settings, folder, n_ranks):
    """Run a script on n_ranks. Returns the updates of each rank."""
    paths = [folder / f'rank_{rank}.pt' for rank in range(n_ranks)]
    if n_ranks == 1:
        with recording(paths[0]):
            ok(call(script, *settings))
    else:
        ok(finish(start('-m', 'torch.distributed.run', '--standalone',
                        f'--nproc_per_node={n_ranks}', __file__, folder, script, *settings,
                        env={'PYTHONPATH': ROOT})))
    return [torch.load(path) for path in paths]


# -----------------------------------------------------------------------------
# Data and model

def random_text(rng, least, most):
    return ''.join(rng.choices('abcdef', k=rng.randint(least, most)))


@pytest.fixture(scope='module')
def ragged_data(tmp_path_factory):
    """The folder of 12 prompts and 12 pairs of many lengths, and of a reward function."""
    folder = tmp_path_factory.mktemp('ragged')
    rng = random.Random(0)
    rows = []
    for _ in range(12):
        rows.append({'prompt': random_text(rng, 1, 8), 'chosen': random_text(rng, 1, 10),
                     'rejected': 'g' + random_text(rng, 0, 9)})
    for split in ('train', 'val'):
        with open(folder / f'prompts_{split}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps({'prompt': row['prompt']}) + '\n' for row in rows)
        with open(folder / f'pref_{split}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
    code = 'def score(prompt, response):\n    return sum(map(ord, response)) % 7 - 3\n'
    (folder / 'function.py').write_text(code, encoding='utf-8')
    return folder


def score_of(response):
    """What the reward function above returns for a response."""
    return sum(map(ord, response)) % 7 - 3


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """The run folder of a model with random weights, large enough that tokens differ clearly in
    probability."""
    folder = tmp_path_factory.mktemp('base')
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=40, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=16))
    weights = {}
    for name, tensor in gpt.state_dict().items():
        weights[name] = 5 * tensor if tensor.dim() > 1 else tensor
    save_checkpoint(str(folder), {
        'stage': 'sft', 'step': 0, 'model': weights, 'optimizer': [], 'config': {},
        'model_args': dataclasses.asdict(gpt.config), 'tokenizer': tok.to_dict()})
    return folder


# -----------------------------------------------------------------------------
# What the references of all methods share

def with_weights(gpt, parameters, values):
    """The model after its parameters, in the order of the optimizer, were set to these values."""
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
    return gpt


def response_terms(gpt, ids, n_prompt, temperature=1.0):
    """The log-probability of each token of one response, and the hidden states that predict
    them."""
    h = gpt.hidden(torch.tensor([ids]))[0]
    logprobs = []
    for t in range(n_prompt, len(ids)):
        logits = gpt.lm_head.weight @ h[t - 1] / temperature
        largest = logits.max()
        log_sum = largest + (logits - largest).exp().sum().log()
        logprobs.append(logits[ids[t]] - log_sum)
    return logprobs, h[n_prompt - 1:-1]


def clipped_gradients(loss, parameters, grad_clip):
    """Gradients, scaled to a common norm of at most grad_clip."""
    gradients = torch.autograd.grad(loss, parameters)
    norm = sum(float((g ** 2).sum()) for g in gradients) ** 0.5
    factor = min(1.0, grad_clip / norm)
    return [g * factor for g in gradients]


class PlainAdamW:
    """AdamW (arXiv 1711.05101), with the rates and weight decays of each parameter."""

    def __init__(self, rates, decays, eps):
        self.rates = rates
        self.decays = decays
        self.eps = eps
        self.n_steps = 0
        self.first = [0.0] * len(rates)
        self.second = [0.0] * len(rates)

    def step(self, weights, gradients):
        beta1, beta2 = 0.9, 0.95
        self.n_steps += 1
        new_weights = []
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            self.first[i] = beta1 * self.first[i] + (1 - beta1) * g
            self.second[i] = beta2 * self.second[i] + (1 - beta2) * g ** 2
            mean = self.first[i] / (1 - beta1 ** self.n_steps)
            mean_square = self.second[i] / (1 - beta2 ** self.n_steps)
            decayed = w - self.rates[i] * self.decays[i] * w
            new_weights.append(decayed - self.rates[i] * mean / (mean_square.sqrt() + self.eps))
        return new_weights


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)


# -----------------------------------------------------------------------------
# PPO, RLOO and GRPO

# Two iterations of two epochs of two minibatches: eight updates. The clip ranges are small and the
# rates large, so that ratios and values leave them. missing_end_score, length_penalty, score_clip
# and whitening are all in use.
UPDATES = dict(CPU, batch_size=12, minibatch_size=6, ppo_epochs=2, max_iters=2, max_new_tokens=9,
               group_size=3, temperature=0.8, kl_coef=0.3, kl_stop=0.0, clip_range=0.02,
               value_clip=0.02, value_coef=0.5, gamma=0.98, lam=0.9, missing_end_score=-1.5,
               length_penalty=0.1, score_clip=2.0, grad_clip=0.5, learning_rate=2e-3, gain_lr=5e-3,
               critic_lr=2e-2, lr_schedule='constant', warmup_iters=0, eval_interval=1000,
               eval_prompts=2, test_prompts=2, test_draws=1)


def policy_parameters(gpt):
    """Those of the model in the order of ppo.py's groups: the final norm's weight is last."""
    norm_weight = gpt.ln_f.weight
    return [p for p in gpt.parameters() if p is not norm_weight] + [norm_weight]


def whitened(rows):
    """Lists of numbers with mean 0 and variance 1 over all of them."""
    values = [x for row in rows for x in row]
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    whitened_rows = []
    for row in rows:
        whitened_rows.append([(x - mean) / (variance + 1e-8) ** 0.5 for x in row])
    return whitened_rows


def shaped_score(ids, n_prompt, config):
    """The score of one response after clipping and penalties."""
    if ids[-1] not in END_TOKENS:
        return config['missing_end_score']
    response = tok.decode([token for token in ids[n_prompt:] if token not in END_TOKENS])
    score = min(max(score_of(response), -config['score_clip']), config['score_clip'])
    return score - config['length_penalty'] * (len(ids) - n_prompt)


def gae(rewards, values, gamma, lam):
    """Advantages of one response: the sum of (gamma lam)^k delta_{t+k} (arXiv 1506.02438)."""
    deltas = []
    for t, (reward, value) in enumerate(zip(rewards, values)):
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        deltas.append(reward + gamma * next_value - value)
    advantages = []
    for t in range(len(deltas)):
        later = deltas[t:]
        advantages.append(sum((gamma * lam) ** k * delta for k, delta in enumerate(later)))
    return advantages


def group_of(values, i, size):
    """The values of the responses to the same prompt as response i, and their place."""
    first = i // size * size
    return values[first:first + size], i - first


def advantages_of(scores, old, ref, values, config):
    """Advantages and returns, a list for each response, from the shaped scores of the responses,
    and the log-probabilities (old and of the reference) and values of their tokens."""
    rewards = []
    for score, old_row, ref_row in zip(scores, old, ref):
        row = [-config['kl_coef'] * (a - b) for a, b in zip(old_row, ref_row)]
        row[-1] += score
        rewards.append(row)
    advantages = []
    if config['adv'] == 'gae':
        for reward_row, value_row in zip(rewards, values):
            advantages.append(gae(reward_row, value_row, config['gamma'], config['lam']))
        returns = []
        for advantage_row, value_row in zip(advantages, values):
            returns.append([a + v for a, v in zip(advantage_row, value_row)])
        return whitened(advantages), returns

    size = config['group_size']
    totals = [sum(row) for row in rewards]
    for i, row in enumerate(rewards):
        if config['adv'] == 'rloo':
            group, place = group_of(totals, i, size)
            others = group[:place] + group[place + 1:]
            advantage = group[place] - sum(others) / len(others)
        else:
            group, place = group_of(scores, i, size)
            mean = sum(group) / size
            advantage = group[place] - mean
            if config['grpo_std']:
                variance = sum((x - mean) ** 2 for x in group) / (size - 1)
                advantage = advantage / (variance ** 0.5 + 1e-4)
        advantages.append([advantage] * len(row))
    return advantages, None


class Iteration:
    """What is known of the responses of an iteration before its updates."""

    def __init__(self, gpt, initial, weights, responses, config):
        self.gpt = gpt
        self.config = config
        self.responses = responses
        self.parameters = policy_parameters(gpt)
        self.n_clipped = 0       # tokens whose ratio has left the clip range, over all updates
        self.n_value_clipped = 0
        with torch.no_grad():
            self.ref, _ = self.measure(initial)
            self.old, self.old_values = self.measure(weights)
        scores = [shaped_score(ids, n_prompt, config) for ids, n_prompt in responses]
        self.advantages, self.returns = advantages_of(scores, self.old, self.ref, self.old_values,
                                                      config)

    def measure(self, weights):
        """Log-probabilities and values of all tokens of all responses, as numbers."""
        with_weights(self.gpt, self.parameters, weights[:len(self.parameters)])
        logprobs, values = [], []
        for ids, n_prompt in self.responses:
            row, h = response_terms(self.gpt, ids, n_prompt, self.config['temperature'])
            logprobs.append([float(x) for x in row])
            values.append(self.values(h, weights).tolist())
        return logprobs, values

    def values(self, h, weights):
        """The values of the tokens that hidden states h predict; 0 without a critic."""
        if self.config['adv'] != 'gae':
            return h.new_zeros(len(h))
        head_weight, head_bias = weights[-2:]
        return h @ head_weight[0].double() + head_bias.double()

    def gradients(self, weights, chosen):
        """The gradients of the loss of a minibatch, the numbers of its responses."""
        config = self.config
        with_weights(self.gpt, self.parameters, weights[:len(self.parameters)])
        head = [w.double().requires_grad_() for w in weights[len(self.parameters):]]
        total = 0.0
        total_weight = 0.0
        for i in chosen:
            ids, n_prompt = self.responses[i]
            logprobs, h = response_terms(self.gpt, ids, n_prompt, config['temperature'])
            values = self.values(h, head)
            # each token counts the same, or each response
            weight = 1.0 if config['loss_mean'] == 'token' else 1 / len(logprobs)
            for t, logprob in enumerate(logprobs):
                total = total + weight * self.token_loss(i, t, logprob, values[t])
                total_weight += weight
        return clipped_gradients(total / total_weight, self.parameters + head, config['grad_clip'])

    def token_loss(self, i, t, logprob, value):
        config = self.config
        advantage = self.advantages[i][t]
        # 1. the clipped objective (arXiv 1707.06347, equation 7)
        ratio = (logprob - self.old[i][t]).exp()
        clipped_ratio = ratio.clamp(1 - config['clip_range'], 1 + config['clip_range'])
        self.n_clipped += int(clipped_ratio * advantage < ratio * advantage)
        loss = -torch.minimum(ratio * advantage, clipped_ratio * advantage)
        # 2. the clipped value loss
        if config['adv'] == 'gae':
            old_value, ret = self.old_values[i][t], self.returns[i][t]
            change = (value - old_value).clamp(-config['value_clip'], config['value_clip'])
            error = (value - ret) ** 2
            clipped_error = (old_value + change - ret) ** 2
            self.n_value_clipped += int(clipped_error > error)
            loss = loss + config['value_coef'] * 0.5 * torch.maximum(error, clipped_error)
        # 3. the KL to the reference in GRPO (arXiv 2402.03300, equation 4)
        if config['adv'] == 'grpo':
            log_ratio = self.ref[i][t] - logprob
            loss = loss + config['kl_coef'] * (log_ratio.exp() - log_ratio - 1)
        return loss


def minibatches(n_ranks, step, config):
    """Yield the numbers of the responses of each minibatch of an iteration, which takes the same
    share of every rank's responses."""
    n = config['batch_size'] // n_ranks
    size = config['minibatch_size'] // n_ranks
    for epoch in range(config['ppo_epochs']):
        order = torch.randperm(n, generator=generator_for(1337, 'minibatches', step, epoch))
        for own in order.split(size):
            yield [rank * n + i for rank in range(n_ranks) for i in own.tolist()]


METHODS = {
    'ppo': dict(adv='gae', loss_mean='token'),
    'rloo': dict(adv='rloo', loss_mean='token'),
    'grpo': dict(adv='grpo', loss_mean='response', grpo_std=True),
    'dr_grpo': dict(adv='grpo', loss_mean='token', grpo_std=False)}

CASES = [(method, n_ranks, steps) for method in METHODS for n_ranks, steps in ((1, 1), (1, 3))]
CASES += [('ppo', 1, 2), ('ppo', 2, 1), ('ppo', 2, 3), ('rloo', 2, 2), ('grpo', 2, 3),
          ('dr_grpo', 2, 3)]


@pytest.mark.parametrize('method, n_ranks, accumulation_steps', CASES)
def test_every_update_of_ppo_equals_plain_loops_over_responses_and_tokens(
        method, n_ranks, accumulation_steps, ragged_data, base, tmp_path):
    config = UPDATES | METHODS[method]
    settings = flags(config, dataset=ragged_data, init_from=base, out_dir=tmp_path / 'run',
                     reward=f'{ragged_data}/function.py:score',
                     gradient_accumulation_steps=accumulation_steps)
    ranks = record_run('ppo.py', settings, tmp_path, n_ranks)

    # 1. all ranks take the same steps
    n_updates = 2 * config['ppo_epochs'] * config['batch_size'] // config['minibatch_size']
    for updates in ranks:
        assert len(updates) == n_updates
        for update, first in zip(updates, ranks[0]):
            assert_equal(update['gradients'], first['gradients'])
            assert_equal(update['after'], first['after'])

    # 2. the reference of each update begins with the weights that the run had
    gpt, _ = load_in_float64(str(base), {})
    updates = iter(ranks[0])
    initial = ranks[0][0]['before']
    n_model = len(policy_parameters(gpt))
    rates = [config['learning_rate']] * (n_model - 1) + [config['gain_lr']]
    rates += [config['critic_lr']] * (len(initial) - n_model)
    adamw = PlainAdamW(rates, [0.0] * len(rates), eps=1e-5)
    n_clipped = 0
    n_value_clipped = 0
    number = 0
    for step in range(config['max_iters']):
        responses = [response for rank in ranks for response in rank[number]['responses']]
        weights = ranks[0][number]['before']
        iteration = Iteration(gpt, initial, weights, responses, config)
        for chosen in minibatches(n_ranks, step, config):
            update = next(updates)
            gradients = iteration.gradients(update['before'], chosen)
            assert_equal(update['gradients'], gradients)
            assert_equal(update['after'], adamw.step(update['before'], gradients))
            number += 1
        n_clipped += iteration.n_clipped
        n_value_clipped += iteration.n_value_clipped

        # 3. the case is not a trivial one
        assert len(responses) == config['batch_size']
        lengths = {len(ids) - n_prompt for ids, n_prompt in responses}
        ended = [ids[-1] in END_TOKENS for ids, _ in responses]
        assert len(lengths) > 3 and any(ended) and not all(ended)
    assert n_clipped > 20
    assert n_value_clipped > 20 or method != 'ppo'


# -----------------------------------------------------------------------------
# DPO

DPO = dict(CPU, loss='dpo', causal=True, optimizer='adamw', max_iters=3, dpo_beta=0.3,
           learning_rate=2e-3, lr_schedule='constant', warmup_iters=0, weight_decay=0.1,
           grad_clip=1.0, eval_interval=1000)


def chat_ids(prompt, response):
    """(ids, number of ids of the prompt) of a chat in the format of bpe.py."""
    special = tok.special
    ids = [special['<|user|>'], *prompt.encode(), special['<|end|>'], special['<|assistant|>']]
    n_prompt = len(ids)
    return [*ids, *response.encode(), special['<|end|>']], n_prompt


def response_logprob(gpt, prompt, response):
    logprobs, _ = response_terms(gpt, *chat_ids(prompt, response))
    return sum(logprobs)


@pytest.mark.parametrize('n_ranks, accumulation_steps, batch_size, flip_rate', [
    (1, 1, 12, 0.0), (1, 3, 4, 0.0), (1, 12, 1, 0.0), (1, 3, 4, 0.2), (2, 2, 6, 0.0),
    (2, 6, 2, 0.0)])
def test_every_update_of_dpo_equals_plain_loops_over_responses_and_tokens(
        n_ranks, accumulation_steps, batch_size, flip_rate, ragged_data, base, tmp_path):
    settings = flags(DPO, dataset=ragged_data, init_from=base, out_dir=tmp_path / 'run',
                     gradient_accumulation_steps=accumulation_steps, batch_size=batch_size,
                     flip_rate=flip_rate)
    ranks = record_run('reward.py', settings, tmp_path, n_ranks)
    with open(ragged_data / 'pref_train.jsonl', encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    assert len(rows) == batch_size * accumulation_steps  # every step takes all pairs

    # 1. the reference's log-probabilities
    gpt, _ = load_in_float64(str(base), {})
    ref_margins = []
    with torch.no_grad():
        for row in rows:
            ref_margins.append(response_logprob(gpt, row['prompt'], row['chosen'])
                               - response_logprob(gpt, row['prompt'], row['rejected']))

    # 2. the updates; the parameters are in the order of the optimizer, matrices first
    parameters = [p for p in gpt.parameters() if p.dim() > 1]
    n_matrices = len(parameters)
    parameters += [p for p in gpt.parameters() if p.dim() == 1]
    n_vectors = len(parameters) - n_matrices
    adamw = PlainAdamW([DPO['learning_rate']] * len(parameters),
                       [DPO['weight_decay']] * n_matrices + [0.0] * n_vectors, eps=1e-8)
    for number in range(DPO['max_iters']):
        update = ranks[0][number]
        with_weights(gpt, parameters, update['before'])
        total = 0.0
        for row, ref_margin in zip(rows, ref_margins):
            margin = (response_logprob(gpt, row['prompt'], row['chosen'])
                      - response_logprob(gpt, row['prompt'], row['rejected']))
            p = 1 / (1 + (-DPO['dpo_beta'] * (margin - ref_margin)).exp())
            total = total - ((1 - flip_rate) * p + flip_rate * (1 - p)).log()
        gradients = clipped_gradients(total / len(rows), parameters, DPO['grad_clip'])
        expected = adamw.step(update['before'], gradients)
        for updates in ranks:
            assert len(updates) == DPO['max_iters']
            assert_equal(updates[number]['gradients'], gradients)
            assert_equal(updates[number]['after'], expected)


if __name__ == '__main__':
    # One rank of record_run: FOLDER SCRIPT SETTINGS
    folder, *sys.argv = sys.argv[1:]
    with recording(os.path.join(folder, f"rank_{os.environ['RANK']}.pt")):
        status = run_script(sys.argv[0])
    sys.exit(status)
