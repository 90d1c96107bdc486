"""
PPO: the policy responds to prompts, a reward model scores the responses, and the policy moves
towards those that scored well, while a KL penalty keeps it near its reference, the SFT model it
started from (arXiv 1707.06347, 1909.08593, 2203.02155).

    python ppo.py                                        wordplay, from sft.py and reward.py
    python ppo.py --reward=gold                          score with the dataset's checking function
    python ppo.py --adv=rloo                             no critic: compare responses to a prompt
    python ppo.py --init_from=resume                     continue a stopped run

One iteration: prompts -> responses -> scores -> advantages -> a few epochs of clipped updates.

Departures from the papers:
- All: the old log-probabilities are recomputed with the forward pass of training, because those of
  the KV cache differ in the last bits. The updates of an iteration end early beyond kl_stop. The
  final norm's weight, which acts as an inverse temperature, has its own learning rate.
- PPO (arXiv 1909.08593, 2203.02155): the value head shares the policy's trunk, unless
  separate_critic; there is no pretraining loss.
- RLOO (arXiv 2402.14740): updates are clipped as in PPO, and may be several per rollout.
- GRPO (arXiv 2402.03300): the reference is the SFT model throughout, not renewed.
"""
import copy
import math
import os
import time
from dataclasses import asdict

# configurator comes first: it answers --help before torch is loaded
from configurator import (Logger, StopSignal, check_choice, check_divisible, configure,
                          generator_for, mean_over_ranks, must_skip, one_line, parallel,
                          peak_memory_mb, printable, restore_optimizers, resume, save_checkpoint,
                          schedule_factor, start_run, sum_over_ranks)
import torch
import torch.nn as nn

from assets.draw import draw_curves
from data.examples import endless_order, load_examples, load_function, load_gold
from data.pretrained import check_not_moved, load_chat_model, load_reward_model, restore_weights
from model import ScalarHead, last_of_each_row, skip_idle_experts, widest_float
from sample import (answer, best_of_n, encode_prompts, exact_match, fast_decoding, pad_left,
                    prompt_limit)

# -----------------------------------------------------------------------------
# the run
out_dir = 'out/ppo'                # folder of the run: checkpoints, log, curves
init_from = 'out/sft'              # 'scratch' | 'resume' | a run's folder | a Hugging Face model
reference_dir = ''                 # on resume: where the reference, init_from, is now, if moved
reward_model = 'out/reward'        # folder of a run of reward.py
gold = ''                          # checking function, FILE.py:function; '' = the dataset's own
seed = 1337                        # all random choices follow from it
eval_interval = 20                 # iterations between evaluations, each with a checkpoint
eval_prompts = 200                 # held-out prompts per evaluation
log_interval = 1                   # iterations between lines of the log
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, under the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with prompts_train, prompts_val, or its path
test_split = 'prompts_test'        # file of the final figures; prompts_val if there is none
test_prompts = 1000                # number of its prompts
test_draws = 4                     # sampled responses to each
block_size = 0                     # context, in tokens; 0 = the model's, which RoPE can extend
# rollout
batch_size = 256                   # responses per iteration, over all ranks together
minibatch_size = 64                # responses per update, over all ranks together
gradient_accumulation_steps = 2    # micro-batches per minibatch, on each rank of several
max_new_tokens = 32                # per response
temperature = 1.0                  # of sampling; divides the logits of policy and reference too
use_cache = True                   # False = rollouts without the KV cache, to compare
# reward
reward = 'model'                   # 'model' | 'gold' | FILE.py:function(prompt, response)
missing_end_score = -3.0           # replaces the score of a response without an end token
length_penalty = 0.0               # for each token of a response, subtracted from its score
score_clip = 0.0                   # scores are clipped to +-score_clip; 0 = no clipping
kl_control = 'fixed'               # 'fixed' | 'adaptive' (arXiv 1909.08593, section 2.2) | 'none'
kl_coef = 0.05                     # weight of the KL penalty; 'adaptive' starts with it
kl_target = 0.4                    # nats per response that 'adaptive' aims at
kl_horizon = 5000                  # the coefficient changes by at most 20% per this many responses
whiten_rewards = False             # scale rewards to variance 1, keeping their mean (not for grpo)
# advantages and losses
adv = 'gae'                        # 'gae' (with a critic) | 'rloo' | 'grpo'
group_size = 4                     # responses to each prompt, for rloo and grpo
grpo_std = True                    # divide by the standard deviation; False = Dr. GRPO
loss_mean = 'auto'                 # 'token' (all tokens weigh the same, as in DAPO) | 'response'
                                   # (all responses do) | 'auto' = 'response' for grpo, else 'token'
gamma = 1.0
lam = 0.95
clip_range = 0.2                   # of the ratio to the old policy
value_clip = 0.2                   # of the change of a value
value_coef = 0.1                   # weight of the value loss
separate_critic = False            # True = the value head has a trunk of its own
ppo_epochs = 1                     # passes over the responses of an iteration
kl_stop = 0.1                      # end the updates when policy/approxkl is above it; 0 = never
# optimizer and schedule
learning_rate = 2e-4               # of all parameters but those of the next two
gain_lr = 2e-2                     # of the final norm's weight, an inverse temperature
critic_lr = 1e-3                   # of the value head and of a separate critic
max_iters = 60                     # iterations
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' | 'constant'
warmup_iters = 5
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss of 'aux'; a 'bias' stays
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------


class Policy(nn.Module):
    """A language model with a value for every token. The value head reads the hidden states of the
    language model or, with separate_critic, of a copy of its own. It starts at zero."""

    def __init__(self, gpt, separate_critic):
        super().__init__()
        self.gpt = gpt
        self.value_head = ScalarHead(gpt.config.n_embd)
        self.critic = None
        if separate_critic:
            self.critic = copy.deepcopy(gpt)
            if not gpt.config.tie_weights:
                self.critic.lm_head.requires_grad_(False)  # a critic has no use for it

    def forward(self, idx, read=None):
        """idx (B, T), -1 = padding on the right -> logits (B, T, V) of the next token, values (B,
        T); or (N, V) and (N,) at `read`, see GPT.hidden."""
        h = self.gpt.hidden(idx, read=read)
        logits = self.gpt.lm_head(h)
        if self.critic is not None:
            h = self.critic.hidden(idx, read=read)
        return logits, self.value_head(h)


# The parts of the objective. Tensors are (B, T), one row per prompt with its response, one column
# per predicted token; mask is 1 on the tokens of the response, its end token included. update_loss
# calls masked_mean and the losses with the N response tokens alone, (N,), and with weights as mask.


def log_softmax(logits, temperature, suppress=()):
    """Log-probabilities (N, V) of the distribution that is sampled from, in float32. Ids in
    `suppress`, which pad the vocabulary, have probability 0."""
    logits = logits.float() / temperature
    if len(suppress):
        # -1e9 is finite, so that the entropy is not 0 * inf = NaN
        logits = logits.index_fill(1, torch.tensor(suppress, device=logits.device), -1e9)
    return logits.log_softmax(dim=-1)


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, keep_mean=False):
    """x with variance 1 and mean 0 (or its own mean) over the tokens in mask, of all ranks
    together; 0 elsewhere."""
    x = x.to(widest_float(x.device.type))
    sums = torch.stack((mask.sum(), (x * mask).sum(), (x.square() * mask).sum()))
    n, total, total_squares = sum_over_ranks(sums)
    mean = total / n
    variance = total_squares / n - mean ** 2
    whitened = (x - mean) / (variance + 1e-8).sqrt()
    if keep_mean:
        whitened = whitened + mean
    return (whitened * mask).float()


def compute_gae(rewards, values, mask, gamma, lam):
    """
    Generalised advantage estimation (arXiv 1506.02438, equation 16):

        delta_t     = reward_t + gamma * value_{t+1} - value_t
        advantage_t = delta_t + gamma * lam * advantage_{t+1}

    where value and advantage after the last token of a row are 0. Returns (advantages, returns),
    (B, T), with returns = advantages + values; both are 0 outside the mask.

    Three tokens and a reward of 1 at the end, with gamma 1 and lam 0.5: the deltas are 0.1, 0.1,
    0.4.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.4, 0.5, 0.6]])
    >>> advantages, returns = compute_gae(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    >>> advantages                                    # 0.1 + 0.5 * 0.3, 0.1 + 0.5 * 0.4, 0.4
    tensor([[0.2500, 0.3000, 0.4000]])
    >>> returns
    tensor([[0.6500, 0.8000, 1.0000]])
    """
    T = rewards.size(1)
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(T)):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def rloo_advantages(returns, group_size):
    """
    Advantages (B,) of whole responses with returns (B,), the group_size responses to one prompt
    side by side: the return minus the mean of the others in the group (RLOO, arXiv 2402.14740).

    >>> rloo_advantages(torch.tensor([1.0, 0.0, 0.0]), group_size=3)
    tensor([ 1.0000, -0.5000, -0.5000])
    """
    groups = returns.view(-1, group_size)
    mean_of_others = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - mean_of_others).flatten()


def grpo_advantages(scores, group_size, divide_by_std=True):
    """
    Advantages (B,) of whole responses with scores (B,), the group_size responses to one prompt side
    by side: the score minus the mean of the group, divided by its standard deviation (GRPO, arXiv
    2402.03300) or not (Dr. GRPO, arXiv 2503.20783). They are 0 if all scores of a group are equal.

    >>> grpo_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    groups = scores.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten()


def k3_estimate(logprobs, ref_logprobs):
    """An estimate, at least 0, of the KL of each token to the reference, in nats (Schulman,
    http://joschu.net/blog/kl-approx.html)."""
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def policy_loss(logprobs, old_logprobs, advantages, mask, clip_range):
    """The clipped objective of arXiv 1707.06347, equation 7, to be minimised. A token whose ratio
    to the old policy has left [1 - clip_range, 1 + clip_range] in the direction of its advantage
    has no gradient."""
    ratio = (logprobs - old_logprobs).exp()
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(torch.max(pg_loss1, pg_loss2), mask)


def value_loss(values, old_values, returns, mask, value_clip):
    """Half the larger of the clipped and the unclipped squared error, where the clipped value has
    moved at most value_clip from the old one."""
    change = (values - old_values).clamp(-value_clip, value_clip)
    vf_loss1 = (values - returns).square()
    vf_loss2 = (old_values + change - returns).square()
    return masked_mean(0.5 * torch.max(vf_loss1, vf_loss2), mask)


def update_loss(policy, batch, mb, T, kl_coef, config, suppress=()):
    """
    Loss and metrics of some responses, (scalar, dict). mb: the numbers of their rows in the batch;
    T: the longest length among them. batch: idx (B, longest), and as (B, longest - 1), one column
    per predicted token: mask, weight, old_logprobs, ref_logprobs, old_values, advantages and
    returns.
    """
    # 1. what was recorded of the N response tokens; from here on all tensors are (N,)
    row, column = batch['mask'][mb, :T - 1].nonzero(as_tuple=True)
    where = mb[row], column
    tokens = batch['idx'][mb[row], column + 1]
    weight = batch['weight'][where]
    advantages = batch['advantages'][where]
    old_logprobs = batch['old_logprobs'][where]

    # 2. the policy as it is now
    logits, values = policy(batch['idx'][mb, :T], read=(row, column))  # (N, V), (N,)
    logprobs = log_softmax(logits, config['temperature'], suppress)
    logprobs = logprobs.gather(1, tokens[:, None])[:, 0]

    # 3. the loss
    pg_loss = policy_loss(logprobs, old_logprobs, advantages, weight, config['clip_range'])
    loss = pg_loss
    if config['adv'] == 'gae':
        old_values = batch['old_values'][where]
        vf_loss = value_loss(values, old_values, batch['returns'][where], weight,
                             config['value_clip'])
        loss = loss + config['value_coef'] * vf_loss
    if config['adv'] == 'grpo':
        k3 = k3_estimate(logprobs, batch['ref_logprobs'][where])
        loss = loss + kl_coef * masked_mean(k3, weight)

    # 4. metrics, with the names of TRL's PPO ('val/' is its prefix of values, not of validation)
    with torch.no_grad():
        change = logprobs - old_logprobs
        ratio = change.exp()
        clipped = ((ratio - 1).abs() > config['clip_range']).float()
        metrics = {
            # estimate of the KL to the old policy, nats per token
            'policy/approxkl': masked_mean(change.square() / 2, weight),
            # probability ratio to the old policy, 1 before the first update
            'val/ratio': masked_mean(ratio, weight),
            # share of tokens whose ratio is outside the clip range
            'policy/clipfrac': masked_mean(clipped, weight),
            'loss/policy': pg_loss.detach(),
        }
        if config['adv'] == 'gae':
            # share of values that moved by more than value_clip
            moved = ((values - old_values).abs() > config['value_clip']).float()
            metrics['val/clipfrac'] = masked_mean(moved, weight)
            metrics['loss/value'] = vf_loss.detach()
    return loss, metrics


def adapt_kl_coef(kl_coef, kl, kl_target, kl_horizon, n_responses):
    """The adaptive KL coefficient after n_responses with a mean KL of `kl` nats per response
    (arXiv 1909.08593, section 2.2)."""
    error = min(0.2, max(-0.2, kl / kl_target - 1))
    return kl_coef * (1 + error * n_responses / kl_horizon)


def minimum_kl(before, after):
    """
    A lower bound of the KL, in nats per response: if the share of correct responses changes from
    p = `before` to q = `after`, the KL is at least q ln(q / p) + (1 - q) ln((1 - q) / (1 - p)),
    because to tell responses apart only as right and wrong cannot raise a KL (the data-processing
    inequality). A policy that is close to this bound has changed little else.

    >>> round(minimum_kl(0.65, 0.95), 3)
    0.263
    """
    p = min(max(before, 1e-6), 1 - 1e-6)
    q = min(max(after, 1e-6), 1 - 1e-6)
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


# Rollouts and scores


def length_chunks(idx, size):
    """Yield (chunk, T): the indices of up to `size` rows of idx (B, T), padded with -1 on the
    right, and the longest length among them. Rows are taken in the order of length, to compute
    little padding."""
    lengths = (idx >= 0).sum(dim=1)
    for chunk in lengths.argsort().split(size):
        yield chunk, int(lengths[chunk].max())


def pack(idx, mask):
    """Rows padded with -1 on both sides -> the same with padding on the right only, no longer than
    the longest row. idx and mask (B, T)."""
    longest = (idx >= 0).sum(dim=1).max()
    order = (idx < 0).long().argsort(dim=1, stable=True)[:, :longest]  # real tokens first
    return idx.gather(1, order), mask.gather(1, order)


def rollout(gpt, prompts, stop, max_new_tokens, temperature, generator, use_cache=True,
            suppress=()):
    """
    Sample a response to each prompt (lists of ids) from the plain softmax at `temperature`. Returns
    idx (B, T), prompt and response, padded with -1 on the right; mask (B, T), 1 on the response and
    its end token; ended (B,), whether there is one of the tokens `stop`.
    """
    idx = pad_left(prompts, gpt.wte.weight.device)
    with fast_decoding(gpt, len(prompts)):
        out = gpt.generate(idx, max_new_tokens, temperature, stop=stop, use_cache=use_cache,
                           generator=generator, suppress=suppress)
    is_new = torch.arange(out.size(1), device=out.device) >= idx.size(1)
    is_response = (out >= 0) & is_new
    is_end = torch.isin(out, torch.tensor(stop, device=out.device))
    ended = (is_response & is_end).any(dim=1)
    idx, mask = pack(out, is_response.long())
    return idx, mask, ended


@torch.no_grad()
def measure(policy, reference, idx, mask, temperature, batch_size, suppress=()):
    """
    What the policy and the reference compute for responses, batch_size rows at a time: a dict of
    tensors (B, T - 1), 0 where mask is 0. In nats: logprobs and ref_logprobs of the tokens, entropy
    of the policy, and kl, the exact KL over the whole vocabulary; and the values.
    """
    names = ('logprobs', 'ref_logprobs', 'values', 'entropy', 'kl')
    found = {name: torch.zeros(idx[:, 1:].shape, device=idx.device) for name in names}
    for chunk, T in length_chunks(idx, batch_size):
        # The logits at position t predict token t + 1.
        row, column = mask[chunk, 1:T].nonzero(as_tuple=True)
        tokens = idx[chunk][row, column + 1][:, None]                  # (N, 1)
        logits, values = policy(idx[chunk, :T], read=(row, column))    # (N, V), (N,)
        ref_logits, _ = reference(idx[chunk, :T], read=(row, column))
        logp = log_softmax(logits, temperature, suppress)
        ref_logp = log_softmax(ref_logits, temperature, suppress)
        where = chunk[row], column
        found['logprobs'][where] = logp.gather(1, tokens)[:, 0]
        found['ref_logprobs'][where] = ref_logp.gather(1, tokens)[:, 0]
        found['values'][where] = values
        found['entropy'][where] = -(logp.exp() * logp).sum(dim=1)
        found['kl'][where] = (logp.exp() * (logp - ref_logp)).sum(dim=1)
    return found


@torch.no_grad()
def score_by_model(reward_model, idx, mask, batch_size):
    """The reward model's scores (B,) of responses; idx and mask (B, T)."""
    scores = torch.zeros(len(idx), device=idx.device)
    for chunk, T in length_chunks(idx, batch_size):
        scores[chunk] = reward_model(idx[chunk, :T], mask[chunk, :T]).float()
    return scores


def score_by_function(function, rows, idx, mask, tok):
    """Scores (B,) of responses to the prompts of rows by a function(prompt, response)."""
    scores = []
    for row, ids, is_response in zip(rows, idx, mask > 0):
        new = ids[is_response].tolist()
        text = tok.decode([token for token in new if token not in tok.eos_ids])
        scores.append(function(row['prompt'], text))
    return torch.tensor(scores, dtype=torch.float32, device=idx.device)


def score_responses(scorer, rows, idx, mask, tok, batch_size):
    """Scores (B,) of responses to the prompts of rows by a reward model, or by a function(prompt,
    response)."""
    if isinstance(scorer, nn.Module):
        return score_by_model(scorer, idx, mask, batch_size)
    return score_by_function(scorer, rows, idx, mask, tok)


def shape_scores(scores, ended, length, score_clip, length_penalty, missing_end_score):
    """Reward shaping: the scores (B,) clipped to +-score_clip (0 = not), minus length_penalty per
    token; missing_end_score for a response without an end token."""
    if score_clip:
        scores = scores.clamp(-score_clip, score_clip)
    return torch.where(ended, scores - length_penalty * length, missing_end_score)


def token_rewards(scores, log_ratio, mask, kl_coef):
    """Rewards (B, T): on every token the KL penalty -kl_coef * log_ratio, where log_ratio is
    logprobs - ref_logprobs; on the last token of the response also its score (B,)."""
    is_last = last_of_each_row(mask > 0)
    return (-kl_coef * log_ratio + is_last * scores[:, None]) * mask


# Evaluation


def evaluate(gpt, tok, rows, prompts, draws, max_new_tokens, temperature, run, generator,
             scorer):
    """
    Respond to prompts (lists of ids). Returns

    figures   exact_match, exact_match_sampled: share of the greedy and of the sampled responses
              that equal the gold response of their row, None without gold responses; ended: share
              of the sampled ones that have an end token; score_greedy: mean score of the greedy
              ones, if scorer is a function
    greedy    the greedy response to each prompt, as text
    sampled   `draws` samples, [(text, ended)]: one of every prompt, then a second one of every
              prompt, ...
    """
    gold_responses = [row.get('response') for row in rows]
    with run.autocast:
        greedy = answer(gpt, tok, prompts, max_new_tokens, temperature=0)
        sampled = answer(gpt, tok, prompts * draws, max_new_tokens, temperature=temperature,
                         generator=generator)
    greedy = [text for text, _ in greedy]
    figures = {
        'exact_match': exact_match(greedy, gold_responses),
        'exact_match_sampled': exact_match([text for text, _ in sampled], gold_responses * draws),
        'ended': sum(ended for _, ended in sampled) / len(sampled),
    }
    if not isinstance(scorer, nn.Module):
        scores = [scorer(row['prompt'], text) for row, text in zip(rows, greedy)]
        figures['score_greedy'] = sum(scores) / len(scores)
    return figures, greedy, sampled


def score_policy(policy, reference, rows, prompts, tok, scorer, check_response, config, run):
    """{score, gold, kl} of one sampled response to each prompt, as means: the score by scorer, not
    shaped; 1 or 0 by check_response; the KL to the reference. Without check_response or reference
    (None), gold or kl is left out."""
    suppress = tok.missing_ids(policy.gpt.config.vocab_size)
    batch_size = config['batch_size']
    micro_batch_size = math.ceil(config['minibatch_size'] / config['gradient_accumulation_steps'])
    found = {'score': [], 'gold': [], 'kl': []}
    for i in range(0, len(rows), batch_size):
        batch_rows = rows[i:i + batch_size]
        generator = generator_for(config['seed'], 'test score', i // batch_size, device=run.device)
        with run.autocast:
            idx, mask, _ = rollout(policy.gpt, prompts[i:i + batch_size], tok.eos_ids,
                                   config['max_new_tokens'], config['temperature'], generator,
                                   suppress=suppress)
            scores = score_responses(scorer, batch_rows, idx, mask, tok, config['minibatch_size'])
            found['score'].append(scores)
            if reference is not None:
                measured = measure(policy, reference, idx, mask, config['temperature'],
                                   micro_batch_size, suppress)
                found['kl'].append(measured['kl'].sum(dim=1))
        if check_response is not None:
            if check_response is not scorer:
                scores = score_by_function(check_response, batch_rows, idx, mask, tok)
            found['gold'].append(scores)
    return {name: torch.cat(parts).mean().item() for name, parts in found.items() if parts}


def final_figures(policy, reference, rows, prompts, tok, scorer, check_response, config, run):
    """
    The figures of the test prompts: those of `evaluate` and score_policy after training, and before
    (of the reference) with _before at the end of their names; kl_minimum; and with a reward model
    best_of_4, the exact match of the best of four samples of the reference. Left out are those that
    need gold responses that are not known.
    """
    draws = config['test_draws']
    found = {}
    for name, gpt in (('before', reference), ('after', policy.gpt)):
        generator = generator_for(config['seed'], 'test', device=run.device)
        found[name] = evaluate(gpt, tok, rows, prompts, draws, config['max_new_tokens'],
                               config['temperature'], run, generator, scorer)
    before, _, sampled_before = found['before']
    after, _, _ = found['after']
    reference_policy = Policy(reference, separate_critic=False).to(run.device)
    before |= score_policy(reference_policy, None, rows, prompts, tok, scorer, check_response,
                           config, run)
    figures = after | score_policy(policy, reference, rows, prompts, tok, scorer, check_response,
                                   config, run)
    if after['exact_match_sampled'] is not None:
        figures['kl_minimum'] = minimum_kl(before['exact_match_sampled'],
                                           after['exact_match_sampled'])
    for name, value in before.items():
        figures[f'{name}_before'] = value

    # what the reward model achieves without PPO
    gold_responses = [row.get('response') for row in rows]
    if isinstance(scorer, nn.Module) and draws >= 4 and None not in gold_responses:
        # `sampled` has one pass over the rows after the other; best_of_n takes them row by row.
        four = [sampled_before[draw * len(rows) + i] for i in range(len(rows)) for draw in range(4)]
        conversations = [row['messages'] for row in rows]
        best = best_of_n(scorer, tok, conversations, four, config['missing_end_score'])
        figures['best_of_4'] = exact_match(best, gold_responses)
    return {name: value for name, value in figures.items() if value is not None}


def make_checkpoint(step, policy, optimizers, scaler, config, tok, kl_coef_now):
    """What a run needs to resume (policy, with its value head), and what sample.py needs
    (model)."""
    return {'stage': 'ppo', 'step': step, 'model': policy.gpt.state_dict(),
            'model_args': asdict(policy.gpt.config), 'policy': policy.state_dict(),
            'tokenizer': tok.to_dict(), 'eos_ids': tok.eos_ids, 'config': config,
            'kl_coef': kl_coef_now,
            'optimizer': [o.state_dict() for o in optimizers], 'scaler': scaler.state_dict()}


if __name__ == '__main__':
    # 1. settings; a resumed run continues with its own
    config, overrides = configure(globals())
    config, checkpoint = resume(config, overrides, fixed={'dataset', 'separate_critic', 'adv'})
    globals().update(config)
    if reference_dir and not checkpoint:
        raise ValueError('reference_dir is for a resumed run; a new one starts from init_from')
    # The model that the run started from, also on resume, where resume() has restored init_from.
    source = reference_dir or init_from
    if checkpoint:
        check_not_moved(source)
    first_step = checkpoint.get('step', 0)
    if '.py:' not in reward:  # FILE.py:function is checked when it is loaded
        check_choice(config, 'reward', ('model', 'gold', 'FILE.py:function'))
    check_choice(config, 'kl_control', ('fixed', 'adaptive', 'none'))
    check_choice(config, 'adv', ('gae', 'rloo', 'grpo'))
    check_choice(config, 'loss_mean', ('auto', 'response', 'token'))
    if loss_mean == 'auto':
        loss_mean = 'response' if adv == 'grpo' else 'token'
    if temperature == 0:
        raise ValueError('temperature must be above 0, because responses are sampled; got 0')
    if adv != 'gae' and group_size < 2:
        raise ValueError(f'group_size must be at least 2 for {adv}; got {group_size}')
    responses_per_prompt = 1 if adv == 'gae' else group_size
    if adv != 'gae' and separate_critic:
        raise ValueError(f"separate_critic is for adv 'gae': {adv} has no critic")
    if batch_size % minibatch_size:
        raise ValueError(f'batch_size {batch_size} must be a multiple of minibatch_size '
                         f'{minibatch_size}')
    if batch_size % responses_per_prompt:
        raise ValueError(f'batch_size {batch_size} must be a multiple of group_size {group_size}')

    # 2. models and prompts
    reference, tok = load_chat_model(source, config)
    train_rows = load_examples(dataset, 'prompts_train', 'prompt')
    val_rows = load_examples(dataset, 'prompts_val', 'prompt')
    test_rows = load_examples(dataset, test_split, 'prompt', default=val_rows)[:test_prompts]
    eval_rows = val_rows[:eval_prompts]
    suppress = tok.missing_ids(reference.config.vocab_size)
    block_size = reference.config.block_size
    # prompt_limit leaves at least half of the context to prompts, however long responses may be.
    longest = prompt_limit(tok, block_size, max_new_tokens) + max_new_tokens
    if reference.config.pos == 'learned' and longest > block_size:
        raise ValueError(f'max_new_tokens {max_new_tokens} is too much for block_size '
                         f"{block_size}, which pos 'learned' cannot exceed; lower it by "
                         f'{longest - block_size}')
    prompts = encode_prompts([row['messages'] for row in train_rows], tok, block_size,
                             max_new_tokens)
    eval_prompt_ids = encode_prompts([row['messages'] for row in eval_rows], tok, block_size,
                                     max_new_tokens)
    check_response = load_gold(dataset, gold)
    if reward == 'model':
        scorer = load_reward_model(reward_model, tok)
    elif reward == 'gold':
        scorer = check_response
        if check_response is None:
            raise ValueError(f"reward='gold': {dataset} has no checking function; give one by "
                             '--gold=FILE.py:function')
    else:
        scorer = load_function(reward)
    policy = Policy(copy.deepcopy(reference), separate_critic)
    if checkpoint:
        restore_weights(policy, checkpoint.get('policy'), out_dir)

    # 3. machine, optimizer, log
    # Roughly 64 tokens per response and its prompt: in the rollout, the measurement and each epoch.
    n_tokens = batch_size * 64 * (2 + ppo_epochs) * max_iters
    # From the work to do, start_run decides whether compiling is worth its time.
    run = start_run(config, flops=reference.flops_per_token(64) * n_tokens)
    for module in (reference, policy, scorer):
        if isinstance(module, nn.Module):  # scorer may be a function
            # In eval mode, also while training: dropout would make the ratios differ from 1.
            module.to(run.device).eval()
    norm_weight = policy.gpt.ln_f.weight
    value_parameters = list(policy.value_head.parameters())
    if separate_critic:
        value_parameters += [p for p in policy.critic.parameters() if p.requires_grad]
    groups = [
        {'params': [p for p in policy.gpt.parameters() if p is not norm_weight],
         'peak_lr': learning_rate},
        {'params': [norm_weight], 'peak_lr': gain_lr},
    ]
    if adv == 'gae':
        groups.append({'params': value_parameters, 'peak_lr': critic_lr})
    else:
        for p in value_parameters:  # there is no critic
            p.requires_grad_(False)
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-5,
                                    weight_decay=0.0)]
    restore_optimizers(optimizers, checkpoint)
    if checkpoint.get('scaler'):
        run.scaler.load_state_dict(checkpoint['scaler'])
    prompts_per_step = batch_size // responses_per_prompt  # over all ranks
    check_divisible(run, 'minibatch_size', minibatch_size)
    # Rows of a forward pass. Their logits, a whole vocabulary per token, take most of the memory.
    micro_batch_size = math.ceil(minibatch_size // run.world_size / gradient_accumulation_steps)
    check_divisible(run, 'the number of prompts per iteration', prompts_per_step)
    # The same policy, compiled or averaging gradients over ranks, for the passes of training.
    wrapped = parallel(policy, run, dynamic=True)
    logger = Logger(out_dir, config, checkpoint.get('step'), run.is_master)
    if run.is_master:
        tok.save(os.path.join(out_dir, 'tokenizer.json'))
    stop = StopSignal()
    # Greedy responses of the reference to a few prompts, to show beside those of the policy.
    responses_before = []
    if run.is_master:
        print(printable(
            f'{policy.gpt.n_params():,} parameters; {dataset}: {len(prompts):,} + '
            f'{len(eval_prompt_ids):,} prompts; {prompts_per_step} prompts per iteration'))
        with run.autocast:
            responses_before = answer(reference, tok, eval_prompt_ids[:8], max_new_tokens,
                                      temperature=0)

    # The KL coefficient; a resumed run continues with its own, unless the settings changed.
    kl_coef_now = 0.0 if kl_control == 'none' else kl_coef
    if checkpoint:
        saved = checkpoint['config']
        if saved.get('kl_control') == kl_control and saved.get('kl_coef') == kl_coef:
            kl_coef_now = checkpoint.get('kl_coef', kl_coef_now)

    began = time.perf_counter()
    last_time = began
    rollout_seconds = 0.0
    train_seconds = 0.0
    saved_step = first_step
    # The last pass only saves what was trained, and evaluates.
    for step in range(first_step, max(first_step, max_iters) + 1):
        # 4. learning rate
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = group['peak_lr'] * schedule_factor(step, config)

        # 5. save, evaluate, show the responses to a few prompts
        stopping = stop.by_any_rank(run)
        done = step >= max_iters
        # Saved before the evaluation, so that a crash in it loses nothing.
        if stopping or (step > first_step and (done or step % eval_interval == 0)):
            saved_step = step
            if run.is_master:
                snapshot = make_checkpoint(step, policy, optimizers, run.scaler, config, tok,
                                           kl_coef_now)
                save_checkpoint(out_dir, snapshot, final=stopping or done)
        if stopping:
            break
        if run.is_master and (done or step % eval_interval == 0):
            print(f'evaluating on {len(eval_prompt_ids):,} prompts', flush=True)
            generator = generator_for(seed, 'evaluation', step, device=run.device)
            figures, responses, _ = evaluate(policy.gpt, tok, eval_rows, eval_prompt_ids, 2,
                                             max_new_tokens, temperature, run, generator, scorer)
            logger.log(step, {f'eval/{name}': value for name, value in figures.items()})
            for row, (before, _), after in zip(eval_rows, responses_before, responses):
                gold_response = ''
                if 'response' in row:
                    gold_response = f"   (gold: {one_line(row['response'])})"
                print(f"    {one_line(row['prompt'])} -> {one_line(before)} -> {one_line(after)}"
                      f'{gold_response}', flush=True)
            if figures['ended'] < 0.5:
                print(f"warning: only {figures['ended']:.0%} of the responses ended within "
                      f'{max_new_tokens} tokens; raise --max_new_tokens', flush=True)
            last_time = time.perf_counter()
        if done:
            break

        # 6. sample: this rank's share of the responses, those to one prompt side by side
        rollout_began = time.perf_counter()
        drawn = endless_order(len(prompts), step * prompts_per_step, prompts_per_step, seed,
                              'prompts')
        repeated = [i for i in drawn for _ in range(responses_per_prompt)]
        n_responses = batch_size // run.world_size
        own = repeated[run.rank * n_responses:(run.rank + 1) * n_responses]
        generator = generator_for(seed, 'rollout', step, run.rank, device=run.device)
        with run.autocast:
            idx, response_mask, ended = rollout(
                policy.gpt, [prompts[i] for i in own], tok.eos_ids, max_new_tokens, temperature,
                generator, use_cache, suppress)
        rollout_time = time.perf_counter() - rollout_began

        # 7. score the responses, and measure them under the policy and the reference
        rows = [train_rows[i] for i in own]
        with run.autocast:
            scores = score_responses(scorer, rows, idx, response_mask, tok, minibatch_size)
            old = measure(wrapped, reference, idx, response_mask, temperature, micro_batch_size,
                          suppress)
        # From here on a column is a predicted token: tensors are (B, T - 1).
        mask = response_mask[:, 1:].float()
        length = mask.sum(dim=1)
        old_logprobs = old['logprobs']
        ref_logprobs = old['ref_logprobs']
        old_values = old['values']
        log_ratio = old_logprobs - ref_logprobs

        # 8. rewards and advantages; GRPO takes the scores alone, with its KL penalty in the loss
        shaped = shape_scores(scores, ended, length, score_clip, length_penalty, missing_end_score)
        returns = None  # what the critic learns
        if adv == 'grpo':
            advantages = grpo_advantages(shaped, group_size, grpo_std)[:, None] * mask
        else:
            rewards = token_rewards(shaped, log_ratio, mask, kl_coef_now)
            if whiten_rewards:
                rewards = whiten(rewards, mask, keep_mean=True)
        if adv == 'gae':
            advantages, returns = compute_gae(rewards, old_values, mask, gamma, lam)
            advantages = whiten(advantages, mask)
        elif adv == 'rloo':
            advantages = rloo_advantages(rewards.sum(dim=1), group_size)[:, None] * mask
        # How much each token counts in the means of the update.
        weight = mask / length[:, None] if loss_mean == 'response' else mask
        batch = {'idx': idx, 'mask': mask, 'weight': weight, 'old_logprobs': old_logprobs,
                 'ref_logprobs': ref_logprobs, 'old_values': old_values, 'advantages': advantages,
                 'returns': returns}

        # 9. update: epochs of clipped steps over shuffled minibatches
        updates = []  # the metrics of each
        for epoch in range(ppo_epochs):
            generator = generator_for(seed, 'minibatches', step, epoch)
            shuffled = torch.randperm(n_responses, generator=generator).to(run.device)
            for minibatch in shuffled.split(minibatch_size // run.world_size):
                if kl_stop and updates and updates[-1]['policy/approxkl'] > kl_stop:
                    # All ranks stop, because the figure is their mean. No update follows in later
                    # epochs either: they find the same updates[-1].
                    break
                total_weight = sum_over_ranks(weight[minibatch].sum())
                chunks = list(length_chunks(idx[minibatch], micro_batch_size))
                update = {}  # its metrics
                for i, (chunk, T) in enumerate(chunks):
                    mb = minibatch[chunk]
                    if run.world_size > 1:
                        # The ranks exchange gradients once, after the last micro-batch.
                        wrapped.require_backward_grad_sync = i == len(chunks) - 1
                    with run.autocast:
                        loss, mb_metrics = update_loss(wrapped, batch, mb, T, kl_coef_now, config,
                                                       suppress)
                    # The weight of this micro-batch as a share of the minibatch of all ranks.
                    # Gradients and metrics are averaged over the ranks later; times world_size,
                    # these averages are sums.
                    share = weight[mb].sum() / total_weight * run.world_size
                    total = loss + moe_aux_weight * policy.gpt.aux_loss()
                    run.scaler.scale(total * share).backward()
                    for name, value in mb_metrics.items():
                        update[name] = update.get(name, 0.0) + value * share

                # 10. clip and step
                for o in optimizers:
                    run.scaler.unscale_(o)
                skip_idle_experts(policy)  # experts without tokens stay as they are
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(),
                                                           grad_clip or math.inf)
                # raises an error if the run has diverged
                skipped = must_skip(run, grad_norm, update['loss/policy'], step, out_dir,
                                    saved_step)
                for o in optimizers:
                    if not skipped:
                        run.scaler.step(o)
                    o.zero_grad(set_to_none=True)
                run.scaler.update()
                update['grad_norm'] = torch.zeros_like(grad_norm) if skipped else grad_norm
                update['skipped'] = torch.full_like(grad_norm, skipped)
                updates.append(mean_over_ranks(update, run))

        # 11. metrics of the iteration, averaged over the ranks
        kl = log_ratio.sum(dim=1)
        penalty = -kl_coef_now * kl
        k3 = k3_estimate(old_logprobs, ref_logprobs) * mask
        metrics = {
            # KL to the reference, nats per response: two estimates and the exact one
            'objective/kl': kl.mean(),
            'objective/kl_k3': k3.sum(dim=1).mean(),
            'objective/kl_exact': old['kl'].sum(dim=1).mean(),
            # entropy of the policy, nats per token
            'objective/entropy': masked_mean(old['entropy'], mask),
            # the score as it was given, the KL penalty, and the shaped score with the penalty
            'objective/score': scores.mean(),
            'objective/non_score_reward': penalty.mean(),
            'objective/rlhf_reward': (shaped + penalty).mean(),
            # tokens per response, and share of responses with an end token
            'response_length': length.mean(),
            'ended': ended.float().mean(),
        }
        if adv == 'gae':
            # share of the variance of the returns that the critic explains
            unexplained = (returns - old_values)[mask > 0].var()
            variance = returns[mask > 0].var().clamp(min=1e-8)
            metrics['val/explained_variance'] = 1 - unexplained / variance
        if check_response is not None:
            gold_scores = scores
            if scorer is not check_response:
                gold_scores = score_by_function(check_response, rows, idx, response_mask, tok)
            metrics['objective/gold'] = gold_scores.mean()
        metrics = mean_over_ranks(metrics, run)
        metrics['objective/kl_coef'] = kl_coef_now
        if kl_control == 'adaptive':
            kl_coef_now = adapt_kl_coef(kl_coef_now, metrics['objective/kl_exact'], kl_target,
                                        kl_horizon, batch_size)

        # 12. log
        now = time.perf_counter()
        train_seconds += now - last_time
        rollout_seconds += rollout_time
        if step % log_interval == 0:
            for name in updates[0]:
                metrics[name] = sum(update[name] for update in updates) / len(updates)
            metrics['val/first_ratio'] = updates[0]['val/ratio']
            metrics['updates'] = len(updates)
            metrics['lr'] = optimizers[0].param_groups[0]['lr']
            metrics['gain_lr'] = optimizers[0].param_groups[1]['lr']
            if adv == 'gae':
                metrics['critic_lr'] = optimizers[0].param_groups[2]['lr']
            metrics['rollout_share'] = rollout_time / (now - last_time)
            metrics['episodes_per_second'] = batch_size / (now - last_time)
            metrics['tokens_per_second'] = (metrics['response_length']
                                            * metrics['episodes_per_second'])
            logger.log(step, metrics)
        last_time = now

    # 13. the end: the figures of the test prompts, before and after
    stop.end_training(run, stopping, step, config)  # other ranks, and a stopped run, exit here
    seconds = time.perf_counter() - began
    test_prompt_ids = encode_prompts([row['messages'] for row in test_rows], tok, block_size,
                                     max_new_tokens)
    print(f'evaluating the reference and the policy on {len(test_rows):,} prompts, with '
          f'{1 + test_draws} responses each', flush=True)
    figures = final_figures(policy, reference, test_rows, test_prompt_ids, tok, scorer,
                            check_response, config, run)
    for name, value in figures.items():
        print(printable(f'    {name:28} {value:8.4f}'))
    episodes = (step - first_step) * batch_size
    logger.final({**figures, 'episodes_per_second': episodes / max(train_seconds, 1e-9),
                  'rollout_share': rollout_seconds / max(train_seconds, 1e-9), 'seconds': seconds,
                  'peak_memory_mb': peak_memory_mb(run.device_type), 'steps': step,
                  'parameters': policy.gpt.n_params()})
    draw_curves([out_dir], os.path.join(out_dir, 'curves.png'))
