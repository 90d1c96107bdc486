"""
A reward model: it learns from pairs of responses, of which people preferred one, to score any
response (arXiv 1909.08593, 2203.02155). With --loss=dpo the policy learns from the same pairs
without a reward model (arXiv 2305.18290).

    python reward.py                                     wordplay, on the model of sft.py
    python reward.py --causal=True --loss=bt_margin      a decoder, with another loss
    python reward.py --check=True                        afterwards: sanity checks of the run
    python reward.py --loss=dpo --causal=True --learning_rate=1e-4 --muon_lr=1e-3 --out_dir=out/dpo

The trunk is the SFT model. With causal=False it becomes an encoder, in which all tokens see each
other; it then also learns to restore replaced tokens (see tamper).
"""
import copy
import math
import os
import sys
import time
from dataclasses import asdict, replace

# configurator comes first: it answers --help before torch is loaded
from configurator import (Logger, StopSignal, check_choice, check_divisible, configure,
                          generator_for, mean_over_ranks, must_skip, parallel, peak_flops,
                          peak_memory_mb, printable, restore_optimizers, resume, save_checkpoint,
                          schedule_factor, seed_for, start_run)
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from assets.draw import draw_curves
from data.examples import endless_order, grouped_order, load_examples, load_gold
from data.pretrained import check_not_moved, load_chat_model, restore_weights
from model import GPT, RewardModel, evaluation_mode, skip_idle_experts
from sample import encode_prompts, fast_decoding, pad_left, render_response

# -----------------------------------------------------------------------------
# the run
out_dir = 'out/reward'             # folder of the run: checkpoints, log, curves
init_from = 'out/sft'              # 'scratch' | 'resume' | a run's folder | a Hugging Face model
reference_dir = ''                 # on resume: where the folder init_from is now, if it was moved
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 100                # steps between evaluations, each with a checkpoint
log_interval = 10                  # steps between lines of the log
check = False                      # run the sanity checks on the model in out_dir, do not train
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, under the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with pref_train, pref_val.jsonl, or its path
gold = ''                          # checking function, FILE.py:function; '' = the dataset's own
test_split = 'pref_test'           # the pairs of the final figures; pref_val if it does not exist
max_pairs = 0                      # train on this many pairs, the first ones; 0 = all
shuffle_labels = False             # random labels in training: validation accuracy must stay at 0.5
block_size = 0                     # context, in tokens; 0 = the model's, which RoPE can extend
gradient_accumulation_steps = 2    # micro-batches per step, over all ranks together
batch_size = 32                    # pairs per micro-batch
length_groups = 1                  # sort the pairs of this many steps by length, so less is padded
# model and loss
causal = False                     # False = encoder, reads the whole response; True = decoder
loss = 'bt'                        # 'bt' (Bradley-Terry) | 'margin' (ranking) | 'bt_margin' |
                                   # 'dpo' (trains the policy itself)
flip_rate = 0.0                    # share of labels that are taken to be wrong, by all losses but
                                   # 'margin' and by the calibration error
margin = 1.0                       # of loss 'margin'; for 'bt_margin' a factor on pairs' margins
denoise_weight = 1.0               # weight of an encoder's second task, to restore replaced tokens
center_weight = 0.0                # weight of (chosen + rejected)^2, to centre the scores
dpo_beta = 0.1                     # weight of the KL penalty that DPO implies
normalize_prompts = 500            # after training, scores are normalised to mean 0 and variance 1
                                   # on the SFT model's responses to this many prompts
max_new_tokens = 64                # per such response, at most
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 1e-3               # of AdamW, at the peak of the schedule
muon_lr = 0.004                    # of Muon, on the same schedule
max_iters = 0                      # steps; 0 = every pair once
weight_decay = 0.1
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' | 'constant'
warmup_iters = 20
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss of a model with experts
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------


# Data. A pair is (chosen, rejected, row): each side (ids, mask), and the example it was made from.


def prepare_pairs(rows, tok, block_size, verbose=True):
    """The pairs of rows with messages, chosen and rejected. Pairs whose sides are equal once
    truncated are skipped; the numbers are printed. ValueError if no pair is left."""
    pairs = []
    n_truncated = 0
    n_equal = 0
    for row in rows:
        chosen = render_response(row['messages'], row['chosen'], tok, block_size)
        rejected = render_response(row['messages'], row['rejected'], tok, block_size)
        if torch.equal(chosen[0], rejected[0]):
            n_equal += 1
            continue
        n_truncated += max(len(chosen[0]), len(rejected[0])) == block_size
        pairs.append((chosen, rejected, row))
    if verbose and n_truncated:
        print(f'{n_truncated} of {len(rows)} pairs fill block_size {block_size}: longer '
              'conversations are truncated on the left')
    if verbose and n_equal:
        print(f'skipped {n_equal} of {len(rows)} pairs: both sides are equal within block_size '
              f'{block_size}')
    if not pairs:
        raise ValueError(f'no pair has two different sides within block_size {block_size}')
    return pairs


def shuffle_pairs(pairs, generator):
    """The pairs with random labels: each side is the chosen one with probability 0.5."""
    coins = torch.rand(len(pairs), generator=generator)
    shuffled = []
    for coin, (chosen, rejected, row) in zip(coins, pairs):
        shuffled.append((rejected, chosen, row) if coin < 0.5 else (chosen, rejected, row))
    return shuffled


def get_batch(pairs):
    """
    B pairs -> idx (2B, T), first all chosen, then all rejected, padded on the right with -1; mask
    (2B, T), 1 on the responses; margins (B,), how clear the preference was (0 if unknown).
    """
    sides = [chosen for chosen, _, _ in pairs] + [rejected for _, rejected, _ in pairs]
    idx = pad_sequence([ids for ids, _ in sides], batch_first=True, padding_value=-1)
    mask = pad_sequence([mask for _, mask in sides], batch_first=True, padding_value=0)
    margins = torch.tensor([float(row.get('margin', 0)) for _, _, row in pairs])
    return idx, mask, margins


def tamper(idx, mask, blank, generator):
    """
    Add the denoising task to a batch of pairs, idx and mask (2B, T): its B chosen conversations
    once more, with 40% of the response tokens replaced: half of these by the id `blank`, half by
    other tokens of the responses. Returns idx, mask and targets, each (3B, T); targets holds the
    original where a token was replaced, -1 elsewhere.

    To restore a response, an encoder must find what is wrong with it, from both sides (BERT, arXiv
    1810.04805). The trunk was trained to look back only, so it needs this practice (arXiv
    2404.05961).
    """
    chosen = idx.chunk(2)[0]                                          # (B, T)
    chosen_mask = mask.chunk(2)[0]
    is_response = chosen_mask > 0
    random = torch.rand(is_response.shape, generator=generator, device=idx.device)
    replaced = is_response & (random < 0.4)
    random = torch.rand(is_response.shape, generator=generator, device=idx.device)
    blanked = random < 0.5
    if not replaced.any():  # the mean over no token would be NaN
        replaced = is_response
    pool = chosen[is_response]
    drawn = torch.randint(len(pool), is_response.shape, generator=generator, device=idx.device)
    replacement = pool[drawn].masked_fill(blanked, blank)
    noisy = torch.where(replaced, replacement, chosen)                # (B, T)
    no_targets = torch.full_like(idx, -1)                             # (2B, T)
    targets = torch.cat((no_targets, chosen.masked_fill(~replaced, -1)))
    return torch.cat((idx, noisy)), torch.cat((mask, chosen_mask)), targets


# Losses


def log_choice(d, flip_rate=0.0):
    """
    Log-probability, in nats, that the response whose score is d higher is preferred: log
    sigmoid(d), the model of Bradley and Terry (1952). If a share flip_rate of the labels is flipped
    at random: log((1 - flip_rate) sigmoid(d) + flip_rate sigmoid(-d)) (arXiv 1609.03683), so that a
    wrong label pulls no harder the larger d is. d of any shape -> the same shape.
    """
    flip_rate = torch.tensor(float(flip_rate))  # log(0) = -inf, which logaddexp can take
    as_labelled = F.logsigmoid(d) + (1 - flip_rate).log()
    flipped = F.logsigmoid(-d) + flip_rate.log()
    return torch.logaddexp(as_labelled, flipped)


def pairwise_loss(chosen, rejected, kind='bt', margin=None, flip_rate=0.0):
    """
    Mean loss of the scores (B,) of chosen and rejected responses; with d = chosen - rejected:

    'bt'         -log sigmoid(d), Bradley-Terry; with a flip_rate, see log_choice
    'margin'     max(0, margin - d), ranking; the margin is 1 if None
    'bt_margin'  -log sigmoid(d - margin), margin (B,) of each pair (Llama 2, arXiv 2307.09288)

    >>> pairwise_loss(torch.tensor([1.0]), torch.tensor([1.0]))  # equal scores: log 2
    tensor(0.6931)
    """
    d = chosen - rejected
    if kind == 'margin':
        margin = 1.0 if margin is None else margin
        return F.relu(margin - d).mean()
    if kind == 'bt':
        return -log_choice(d, flip_rate).mean()
    if kind == 'bt_margin' and margin is not None:
        return -log_choice(d - margin, flip_rate).mean()
    raise ValueError(f"kind must be 'bt', 'margin', or 'bt_margin' with a margin; got {kind!r}, "
                     f'margin {margin}')


def log_prob(model, idx, mask):
    """Log-probability, in nats, that a language model gives to the tokens of idx (B, T) where mask
    is 1, summed per row -> (B,). Padding is -1 on the right, where no real token sees it."""
    row, column = mask[:, 1:].nonzero(as_tuple=True)
    # The logits at position t predict token t + 1.
    logits, _ = model(idx.clamp(min=0), read=(row, column))           # (N, V)
    logprobs = -F.cross_entropy(logits.float(), idx[row, column + 1], reduction='none')  # (N,)
    table = logprobs.new_zeros(mask.shape).index_put((row, column), logprobs)
    return table.sum(dim=1)


def dpo_reward(policy, reference, idx, mask, beta):
    """The reward that a policy implies, beta times the log-ratio to its reference, of conversations
    idx (B, T) -> (B,) (arXiv 2305.18290, equation 5)."""
    with torch.no_grad():
        ref_logprobs = log_prob(reference, idx, mask)
    return beta * (log_prob(policy, idx, mask) - ref_logprobs)


def score(model, reference, idx, mask, dpo_beta):
    """Scores (B,) of conversations by a reward model or, if there is a reference, by DPO's
    policy."""
    if reference is None:
        return model(idx, mask)
    return dpo_reward(model, reference, idx, mask, dpo_beta)


# Figures that tell how good scores are


def accuracy(d):
    """The share of positive differences d (N,), a tensor; a difference of 0 counts half."""
    return (d > 0).float().mean() + (d == 0).float().mean() / 2


def auc(right, wrong):
    """The probability that a correct response has a higher score than a wrong one, over all pairs
    of these; ties count half.

    >>> auc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))  # three of four pairs
    0.75
    """
    both = torch.cat((right, wrong)).double()
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    mean_rank = counts.cumsum(0) - (counts - 1) / 2                   # 1 = the lowest score
    rank_sum = mean_rank[inverse][:len(right)].sum()
    lowest_sum = len(right) * (len(right) + 1) / 2
    return ((rank_sum - lowest_sum) / (len(right) * len(wrong))).item()


def fit_scale(d, flip_rate=0.0):
    """
    Temperature scaling (arXiv 1706.04599): the factor, from 1/8 to 8, by which the differences d
    (N,) of chosen and rejected scores should be multiplied to make the labels most probable. Above
    1, the scores are under-confident.
    """
    factors = torch.logspace(-3, 3, 193, base=2.0)
    likelihood = log_choice(factors[:, None] * d, flip_rate).mean(dim=1)
    return factors[likelihood.argmax()].item()


def calibration_error(d, labels, flip_rate=0.0, bins=10):
    """
    How far predicted probabilities are from what happens: pairs are sorted by the predicted
    probability that the first response is preferred, and divided into bins of equal number; the
    error is the mean over the bins of |mean prediction - share of labels that are 1|. d and labels
    (N,). (In arXiv 1706.04599 the bins have equal width.)
    """
    order = d.argsort()
    predicted = log_choice(d, flip_rate).exp()[order]
    observed = labels[order].float()
    total = 0.0
    for p, share in zip(predicted.chunk(bins), observed.chunk(bins)):
        total += len(p) * (p.mean() - share.mean()).abs()
    return (total / len(d)).item()


def cross_calibration_error(d, flip_rate):
    """
    calibration_error of the differences d (N,) of chosen and rejected scores. Each half of the
    pairs is scaled by the factor that fits the other half. All labels would be 1 ("chosen"), so
    every second pair is turned round: -d, with label 0.
    """
    first, second = d.tensor_split(2)
    scaled = torch.cat((first * fit_scale(second, flip_rate), second * fit_scale(first, flip_rate)))
    is_forward = torch.arange(len(d)) % 2 == 0
    presented = torch.where(is_forward, scaled, -scaled)
    return calibration_error(presented, is_forward, flip_rate)


def length_only_accuracy(rows, is_flipped):
    """Accuracy on clean labels of a baseline that knows only which response is longer: the better
    of preferring the longer and the shorter one."""
    longer = torch.tensor([float(len(row['chosen']) - len(row['rejected'])) for row in rows])
    longer = torch.where(is_flipped, -longer, longer)
    return max(accuracy(longer), accuracy(-longer)).item()


def pair_figures(chosen, rejected, rows, gold=None, flip_rate=0.0):
    """
    Figures of the scores (N,) of chosen and rejected responses of N rows:

    accuracy              against the labels as they are
    accuracy_clean        against the labels before some were flipped; rows whose label was flipped
                          have "clean": false
    noise_ceiling         the share of labels that were not flipped: the best possible accuracy
    accuracy_one_right    accuracy_clean of the pairs in which at least one response is correct
    auc                   of correct against wrong responses
    calibration_error     see cross_calibration_error
    score_std             standard deviation of all scores
    best_scale            see fit_scale
    accuracy_length_only  see length_only_accuracy
    margin/OP             mean difference on clean labels, for each "op" of the rows

    gold(prompt, response) tells which responses are correct; without it, all chosen ones count as
    correct.
    """
    d = chosen - rejected
    is_flipped = torch.tensor([row.get('clean') is False for row in rows])
    d_clean = torch.where(is_flipped, -d, d)

    # which responses are correct: (2, N)
    if gold is None:
        correct = torch.tensor([[True], [False]]).expand(2, len(rows))
    else:
        right_chosen = [gold(row['prompt'], row['chosen']) > 0 for row in rows]
        right_rejected = [gold(row['prompt'], row['rejected']) > 0 for row in rows]
        correct = torch.tensor([right_chosen, right_rejected])
    one_right = correct.any(dim=0)
    both_kinds = correct.any() and not correct.all()
    scores = torch.stack((chosen, rejected))

    figures = {
        'accuracy': accuracy(d).item(),
        'accuracy_clean': accuracy(d_clean).item(),
        'noise_ceiling': 1 - is_flipped.float().mean().item(),
        'accuracy_one_right': accuracy(d_clean[one_right]).item() if one_right.any() else None,
        'auc': auc(scores[correct], scores[~correct]) if both_kinds else None,
        'calibration_error': cross_calibration_error(d, flip_rate),
        'score_std': scores.std().item(),
        'best_scale': fit_scale(d, flip_rate),
        'accuracy_length_only': length_only_accuracy(rows, is_flipped),
    }
    for op in sorted({row['op'] for row in rows if 'op' in row}):
        has_op = torch.tensor([row.get('op') == op for row in rows])
        figures[f'margin/{op}'] = d_clean[has_op].mean().item()
    return {name: value for name, value in figures.items() if value is not None}


@torch.no_grad()
def score_pairs(model, reference, pairs, batch_size, dpo_beta, run):
    """Scores (N,) of the chosen and of the rejected responses of N pairs, on the CPU."""
    chosen = torch.zeros(len(pairs))
    rejected = torch.zeros(len(pairs))
    with evaluation_mode(model):
        for i in range(0, len(pairs), batch_size):
            idx, mask, _ = get_batch(pairs[i:i + batch_size])
            with run.autocast:
                scores = score(model, reference, idx.to(run.device), mask.to(run.device), dpo_beta)
            batch_chosen, batch_rejected = scores.chunk(2)
            chosen[i:i + batch_size] = batch_chosen.cpu()
            rejected[i:i + batch_size] = batch_rejected.cpu()
    return chosen, rejected


def evaluate(model, reference, pairs, gold, config, run):
    """pair_figures of the scores of pairs."""
    chosen, rejected = score_pairs(model, reference, pairs, config['batch_size'],
                                   config['dpo_beta'], run)
    rows = [row for _, _, row in pairs]
    return pair_figures(chosen, rejected, rows, gold, config['flip_rate'])


@torch.no_grad()
def score_moments(reward_model, policy, tok, prompts, max_new_tokens, generator, batch_size=250):
    """(standard deviation, mean) of a reward model's scores of a policy's sampled responses to
    prompts, lists of ids."""
    device = policy.wte.weight.device
    suppress = tok.missing_ids(policy.config.vocab_size)
    scores = []
    for i in range(0, len(prompts), batch_size):
        idx = pad_left(prompts[i:i + batch_size], device)
        with fast_decoding(policy, len(idx)):
            out = policy.generate(idx, max_new_tokens, stop=tok.eos_ids, generator=generator,
                                  suppress=suppress)
        # 1 after the prompt; the padding after a response is never read
        is_response = (torch.arange(out.size(1), device=device) >= idx.size(1)).expand(out.shape)
        with evaluation_mode(reward_model):
            scores.append(reward_model(out, is_response))
    return torch.std_mean(torch.cat(scores))


# Models


def make_models(policy, loss, causal, seed, device):
    """
    (model, reference) at the start of training. For DPO a copy of the policy, and the policy itself
    as reference. Otherwise a reward model with the policy's weights as trunk and a new head, drawn
    from `seed`; no reference.
    """
    if loss == 'dpo':
        return copy.deepcopy(policy).to(device), policy.to(device)
    trunk_config = policy.config
    if not causal:
        trunk_config = replace(trunk_config, causal=False, window=0, n_sink=0)
    trunk = GPT(trunk_config)
    trunk.load_state_dict(policy.state_dict())
    torch.manual_seed(seed_for(seed, 'reward head'))
    return RewardModel(trunk).to(device), None


# Sanity checks: each returns (ok, message)


def differences(model, reference, pairs, dpo_beta, device):
    """The differences (B,) of the scores of the two sides of pairs."""
    idx, mask, _ = get_batch(pairs)
    chosen, rejected = score(model, reference, idx.to(device), mask.to(device), dpo_beta).chunk(2)
    return chosen - rejected


@torch.no_grad()
def check_swap(model, reference, pairs, dpo_beta, device):
    swapped = [(rejected, chosen, row) for chosen, rejected, row in pairs]
    total = (differences(model, reference, pairs, dpo_beta, device)
             + differences(model, reference, swapped, dpo_beta, device))
    error = total.abs().max().item()
    return error < 1e-4, f'swapping a pair negates the difference: error {error:.0e}'


@torch.no_grad()
def check_padding(model, reference, pairs, dpo_beta, device):
    padded = differences(model, reference, pairs, dpo_beta, device)
    single = [differences(model, reference, [pair], dpo_beta, device) for pair in pairs]
    error = (padded - torch.cat(single)).abs().max().item()
    return error < 1e-4, f'padding changes no score: error {error:.0e}'


def train_briefly(model, reference, pairs, steps, config, device):
    """A few steps of AdamW with the Bradley-Terry loss, 16 pairs each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config['learning_rate'])
    for step in range(steps):
        order = endless_order(len(pairs), step * 16, 16, config['seed'], 'check')
        batch = [pairs[i] for i in order]
        d = differences(model, reference, batch, config['dpo_beta'], device)
        pairwise_loss(d, torch.zeros_like(d)).backward()  # the loss sees only the difference
        optimizer.step()
        optimizer.zero_grad()


def check_overfitting(policy, pairs, config, run):
    model, reference = make_models(policy, config['loss'], config['causal'], config['seed'],
                                   run.device)
    train_briefly(model, reference, pairs, 100, config, run.device)
    found = evaluate(model, reference, pairs, None, config, run)['accuracy']
    return found == 1, f'{len(pairs)} pairs are learned by heart: accuracy {found:.2f}'


def check_shuffled_labels(policy, train_pairs, val_pairs, config, run, n_runs=4):
    found = []
    for i in range(1, n_runs + 1):
        model, reference = make_models(policy, config['loss'], config['causal'], config['seed'] + i,
                                       run.device)
        shuffled = shuffle_pairs(train_pairs, generator_for(config['seed'], 'check labels', i))
        train_briefly(model, reference, shuffled, 300, config, run.device)
        found.append(evaluate(model, reference, val_pairs, None, config, run)['accuracy_clean'])
    mean = sum(found) / n_runs
    # A single run deviates from 0.5 by about 0.04.
    return abs(mean - 0.5) < 0.08, f'shuffled labels teach nothing: accuracy {mean:.3f}'


def check_figures(figures):
    """Yield (ok, message) of the checks of a trained model, from its pair_figures."""
    own = figures['accuracy_clean']
    baseline = figures['accuracy_length_only']
    std = figures['score_std']
    error = figures['calibration_error']
    yield own > baseline + 0.1, ('the trained model beats a length-only baseline: accuracy '
                                 f'{own:.3f}, baseline {baseline:.3f}')
    yield std > 0.1, f'its scores differ: standard deviation {std:.3f}'
    yield error < 0.1, f'scaled, they are calibrated: error {error:.3f}'


def sanity_checks(policy, model, reference, train_pairs, val_pairs, gold, config, run):
    """Yield (ok, message) of each check: of a fresh model, of short runs, and of the trained
    model."""
    # 1. the code, with a fresh model
    few = train_pairs[:16]
    fresh, fresh_reference = make_models(policy, config['loss'], config['causal'], config['seed'],
                                         run.device)
    yield check_swap(fresh, fresh_reference, few, config['dpo_beta'], run.device)
    yield check_padding(fresh, fresh_reference, few, config['dpo_beta'], run.device)

    # 2. what can be learned, and what cannot
    yield check_overfitting(policy, few, config, run)
    yield check_shuffled_labels(policy, train_pairs, val_pairs, config, run)

    # 3. the trained model
    yield from check_figures(evaluate(model, reference, val_pairs, gold, config, run))


def make_checkpoint(step, model, trunk, optimizers, scaler, config, tok):
    """What a run needs to resume, and what the next stage needs to load it."""
    return {'stage': 'dpo' if config['loss'] == 'dpo' else 'reward', 'step': step,
            'model': model.state_dict(), 'model_args': asdict(trunk.config),
            'tokenizer': tok.to_dict(), 'eos_ids': tok.eos_ids, 'config': config,
            'optimizer': [o.state_dict() for o in optimizers], 'scaler': scaler.state_dict()}


if __name__ == '__main__':
    # 1. settings; a resumed run, and one that is checked, continues with its own
    config, overrides = configure(globals())
    # what a resumed run cannot change
    fixed = {'loss', 'causal'} if check else {'optimizer', 'dataset', 'loss', 'causal'}
    if check:
        config = dict(config, init_from='resume')
    config, checkpoint = resume(config, overrides, fixed)
    globals().update(config)
    if reference_dir and not checkpoint:
        raise ValueError('reference_dir is for a resumed run; a new one starts from init_from')
    source = reference_dir or init_from  # resume() has restored init_from, the first start
    if checkpoint:
        check_not_moved(source)
    first_step = checkpoint.get('step', 0)
    check_choice(config, 'loss', ('bt', 'margin', 'bt_margin', 'dpo'))
    if loss == 'dpo' and not causal:
        raise ValueError('loss=dpo trains a policy, which is causal; add --causal=True')
    if flip_rate >= 0.5:
        raise ValueError(f'flip_rate must be below 0.5; got {flip_rate}')

    # 2. models and data
    policy, tok = load_chat_model(source, config)
    train_rows = load_examples(dataset, 'pref_train', 'preference')
    val_rows = load_examples(dataset, 'pref_val', 'preference')
    test_rows = load_examples(dataset, test_split, 'preference', default=val_rows)
    if loss == 'bt_margin' and not any('margin' in row for row in train_rows):
        raise ValueError(f"loss='bt_margin' needs pairs with a margin, and those of {dataset} have "
                         "none; use 'bt'")
    check_response = load_gold(dataset, gold)
    block_size = policy.config.block_size
    # The token that replaces others in the denoising task: if possible, one that occurs in no
    # response.
    blank = tok.special.get('<|pad|>', tok.end_of_text)
    if blank is None:
        blank = tok.chat_end
    train_pairs = prepare_pairs(train_rows[:max_pairs or None], tok, block_size)
    val_pairs = prepare_pairs(val_rows, tok, block_size)
    if shuffle_labels:
        train_pairs = shuffle_pairs(train_pairs, generator_for(seed, 'labels'))

    # 3. machine, optimizer, log
    pairs_per_step = gradient_accumulation_steps * batch_size  # over all ranks
    max_iters = max_iters or math.ceil(len(train_pairs) / pairs_per_step)
    config = dict(config, max_iters=max_iters)
    mean_length = sum(len(ids) for (ids, _), _, _ in train_pairs) / len(train_pairs)
    n_tokens = 2 * mean_length * pairs_per_step * max_iters
    flops_per_token = policy.flops_per_token(round(mean_length))
    run = start_run(config, flops=flops_per_token * n_tokens)
    model, reference = make_models(policy, loss, causal, seed, run.device)
    if checkpoint:
        restore_weights(model, checkpoint['model'], out_dir)
    if loss != 'dpo':
        model.shift.zero_()  # until the end, the scores are not normalised
        model.scale.fill_(1.0)
    if check:
        failures = 0
        print('sanity checks: the first ones are immediate, the others train for a while',
              flush=True)
        for ok, message in sanity_checks(policy, model, reference, train_pairs[:2000], val_pairs,
                                         check_response, config, run):
            print('ok    ' if ok else 'FAILED', message, flush=True)
            failures += not ok
        sys.exit(1 if failures else 0)
    # By length of the chosen side: grouped_order sorts the numbers of pairs, and so their lengths.
    train_pairs.sort(key=lambda pair: len(pair[0][0]))
    trunk = model if loss == 'dpo' else model.trunk
    optimizers = trunk.optimizers(optimizer, learning_rate, weight_decay, (0.9, 0.95), muon_lr)
    if loss != 'dpo':
        # The head is new, so it learns faster than the trunk.
        optimizers[0].add_param_group({'params': model.head.parameters(), 'weight_decay': 0.0,
                                       'peak_lr': 5 * learning_rate})
    restore_optimizers(optimizers, checkpoint)
    if checkpoint.get('scaler'):
        run.scaler.load_state_dict(checkpoint['scaler'])
    check_divisible(run, 'gradient_accumulation_steps', gradient_accumulation_steps)
    # The same model, compiled or averaging gradients over ranks, for the passes of training.
    wrapped = parallel(model, run, dynamic=True)
    logger = Logger(out_dir, config, checkpoint.get('step'), run.is_master)
    if run.is_master:
        tok.save(os.path.join(out_dir, 'tokenizer.json'))
    stop = StopSignal()
    machine_flops = peak_flops(run) * run.world_size
    if run.is_master:
        n_epochs = max_iters * pairs_per_step / len(train_pairs)
        print(printable(
            f'{trunk.n_params():,} parameters; {dataset}: {len(train_pairs):,} + '
            f'{len(val_pairs):,} pairs; {max_iters:,} steps are {n_epochs:,.1f} epochs'))
        if max_iters <= warmup_iters:
            print(f'warning: all steps are part of the warm-up (warmup_iters={warmup_iters}), so '
                  'little is learned; raise --max_iters')

    began = time.perf_counter()
    last_time = began
    saved_step = first_step
    # The last pass only saves what was trained; the final figures come after the loop.
    for step in range(first_step, max(first_step, max_iters) + 1):
        # 4. learning rate
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = group['peak_lr'] * schedule_factor(step, config)

        # 5. save, evaluate
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters
        if stopping or (step > first_step and (done or step % eval_interval == 0)):
            saved_step = step
            if run.is_master:
                snapshot = make_checkpoint(step, model, trunk, optimizers, run.scaler, config, tok)
                save_checkpoint(out_dir, snapshot, final=done)
        if done:
            break
        if step % eval_interval == 0 and run.is_master:
            logger.log(step, evaluate(model, reference, val_pairs, check_response, config, run))
            last_time = time.perf_counter()

        # 6. forward and backward, one micro-batch at a time
        order = grouped_order(len(train_pairs), step, pairs_per_step, length_groups, seed,
                              'batches')
        pairs = [train_pairs[i] for i in order]
        micro_batches = [pairs[i:i + batch_size] for i in range(0, pairs_per_step, batch_size)]
        micro_batches = micro_batches[run.rank::run.world_size]
        mean_loss = 0.0
        mean_denoise_loss = 0.0
        mean_accuracy = 0.0
        for i, micro_batch in enumerate(micro_batches):
            batch = [t.to(run.device, non_blocking=True) for t in get_batch(micro_batch)]
            idx, mask, margins = batch
            if run.world_size > 1:
                # The ranks exchange gradients once per step, after the last micro-batch.
                wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            denoise_loss = torch.zeros((), device=run.device)
            with run.autocast:
                if denoise_weight and not causal:
                    # One pass for both tasks.
                    number = i * run.world_size + run.rank  # of the micro-batch, over all ranks
                    generator = generator_for(seed, 'denoising', step, number, device=run.device)
                    noisy = tamper(idx, mask, blank, generator)
                    scores, denoise_loss = wrapped(*noisy)  # with targets, two results
                else:
                    scores = score(wrapped, reference, idx, mask, dpo_beta)
            # With the denoising task there are scores of its responses too; they are not used.
            n_pairs = len(micro_batch)
            chosen = scores[:n_pairs].float()
            rejected = scores[n_pairs:2 * n_pairs].float()
            kind = 'bt' if loss == 'dpo' else loss
            pair_margin = margin * margins if loss == 'bt_margin' else margin
            micro_loss = pairwise_loss(chosen, rejected, kind, pair_margin, flip_rate)
            micro_loss = micro_loss + center_weight * (chosen + rejected).square().mean()
            total = micro_loss + denoise_weight * denoise_loss + moe_aux_weight * trunk.aux_loss()
            run.scaler.scale(total / len(micro_batches)).backward()
            mean_loss += micro_loss.detach() / len(micro_batches)
            mean_denoise_loss += denoise_loss.detach() / len(micro_batches)
            mean_accuracy += accuracy(chosen - rejected) / len(micro_batches)

        # 7. clip and step
        for o in optimizers:
            run.scaler.unscale_(o)
        skip_idle_experts(model)  # experts without tokens stay as they are
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        # raises an error if the run has diverged
        skipped = must_skip(run, grad_norm, mean_loss, step, out_dir, saved_step)
        for o in optimizers:
            if not skipped:
                run.scaler.step(o)
            o.zero_grad(set_to_none=True)
        run.scaler.update()

        # 8. log
        if step % log_interval == 0:
            metrics = mean_over_ranks({'loss': mean_loss, 'denoise_loss': mean_denoise_loss,
                                       'train_accuracy': mean_accuracy}, run)
            metrics['lr'] = optimizers[0].param_groups[0]['lr']
            if loss != 'dpo':
                metrics['head_lr'] = optimizers[0].param_groups[-1]['lr']
            if len(optimizers) > 1:
                metrics['muon_lr'] = optimizers[1].param_groups[0]['lr']
            if skipped:
                metrics['skipped'] = 1
            else:
                metrics['grad_norm'] = grad_norm.item()
            seconds = time.perf_counter() - last_time
            metrics['ms'] = 1000 * seconds
            n_tokens = 0  # of both sides, over all ranks
            for (chosen_ids, _), (rejected_ids, _), _ in pairs:
                n_tokens += len(chosen_ids) + len(rejected_ids)
            metrics['tokens_per_second'] = n_tokens / seconds
            metrics['mfu'] = metrics['tokens_per_second'] * flops_per_token / machine_flops
            logger.log(step, metrics)
        last_time = time.perf_counter()

    # 9. the end: the figures of the test pairs, the mean and variance of the scores, the last save
    stop.end_training(run, stopping, step, config)  # other ranks, and a stopped run, exit here
    seconds = time.perf_counter() - began
    test_pairs = prepare_pairs(test_rows, tok, block_size)
    print(f'evaluating on {len(test_pairs):,} pairs', flush=True)
    figures = evaluate(model, reference, test_pairs, check_response, config, run)
    if loss != 'dpo':
        n_prompts = min(len(val_rows), normalize_prompts)
        print(f'normalising the scores on responses to {n_prompts:,} prompts', flush=True)
        conversations = [row['messages'] for row in val_rows[:normalize_prompts]]
        prompts = encode_prompts(conversations, tok, block_size, max_new_tokens)
        with run.autocast:
            std, mean = score_moments(model, policy.to(run.device), tok, prompts, max_new_tokens,
                                      generator_for(seed, 'normalisation', device=run.device))
        # From here on the model returns (score - mean) / std.
        model.shift.fill_(mean)
        model.scale.fill_(1 / std if std > 0 else 1.0)
    snapshot = make_checkpoint(step, model, trunk, optimizers, run.scaler, config, tok)
    save_checkpoint(out_dir, snapshot)
    for name, value in figures.items():
        print(printable(f'    {name:24} {value:8.4f}'))
    logger.final({**figures, 'seconds': seconds, 'peak_memory_mb': peak_memory_mb(run.device_type),
                  'steps': step, 'parameters': trunk.n_params()})
    draw_curves([out_dir], os.path.join(out_dir, 'curves.png'))
