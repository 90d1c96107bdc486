"""
A reward model: it learns from pairs of answers, of which people preferred one, to score any answer (arXiv 1909.08593,
2203.02155). Or, with --loss=dpo, the policy learns from the same pairs without one (arXiv 2305.18290).

    python reward.py                                    wordplay, on the model of sft.py
    python reward.py --causal=True --loss=bt_margin     a decoder, read at the last token; another loss
    python reward.py --check=True                       then: sanity checks of data, loss and model, a verdict a line
    python reward.py --loss=dpo --causal=True --learning_rate=1e-4 --muon_lr=1e-3 --out_dir=out/dpo

The trunk is the SFT model's; causal=False makes it an encoder: all tokens see each other, and it restores tampered answers.
"""
import copy, math, sys, time
from dataclasses import asdict
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from bpe import render_chat
from configurator import (Logger, StopSignal, at_least_one, configure, diverged, learning_rate_at, one_of, parallel,
                          peak_memory_mb, resume, rng, save_checkpoint, start_run, sum_over_ranks)
from data.answers import log_choice, log_prob, pair_figures, score_moments, tamper
from data.dataset import endless_order, grouped_order, load_examples, load_gold
from data.pretrained import load_chat_model
from model import RewardModel

# -----------------------------------------------------------------------------
# where and when
out_dir = 'out/reward'             # folder of the run: checkpoints, log, curves
init_from = 'out/sft'              # 'scratch' | 'resume' | a run's folder | a Hugging Face folder or name
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 100                # steps between evaluations, each with a checkpoint
log_interval = 10                  # steps between lines of the log
check = False                      # check the model in out_dir, its loss and its data, instead of training one
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, as project nanollm, by the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with pref_train.jsonl and pref_val.jsonl, or the full path of one
test_split = 'pref_test'           # the final figures are of this file, or where it is not there of pref_val
max_pairs = 0                      # train on the first so many pairs; 0 = all
shuffle_labels = False             # toss a coin for every label: what is learned then is a bug
gradient_accumulation_steps = 2    # micro-batches a step, over all ranks together
batch_size = 32                    # pairs in a micro-batch
length_groups = 1                  # the pairs of so many steps are dealt in the order of length, and so padded less
# model and loss
causal = False                     # False = an encoder, the mean of the answer is read; True = a decoder, its last token
loss = 'bt'                        # 'bt' (Bradley-Terry) | 'margin' (ranking) | 'bt_margin' | 'dpo' (trains the policy)
flip_rate = 0.0                    # share of labels taken to be flipped by chance, which bounds a pair's loss (not of 'margin')
margin = 1.0                       # distance that 'margin' asks for; what 'bt_margin' multiplies a pair's margin by
denoise_weight = 1.0               # of an encoder's other task: to restore chosen answers that were tampered with
center_weight = 0.0                # weight of (chosen + rejected)^2, which keeps scores around 0 (arXiv 2312.09244)
dpo_beta = 0.1
normalize_prompts = 500            # held-out prompts whose answers by the SFT model set the score's mean and variance
max_new_tokens = 64                # of such an answer
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 1e-3               # of AdamW, at the top of the schedule
muon_lr = 0.004                    # of Muon, on the same schedule
max_iters = 0                      # 0 = every pair once
weight_decay = 0.1
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' (warm-up, stable, decay) | 'constant'
warmup_iters = 20
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss, where experts have moe_balance 'aux'
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------

def prepare_pairs(rows, tok, block_size):
    """[((ids, mask) of chosen, the same of rejected, row)]; mask is 1 on the response and its end. Long ones are
    cut on the left, for they differ at their end."""
    def render(row, key):
        messages = [{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row[key]}]
        return tuple(torch.tensor(part[-block_size:]) for part in render_chat(messages, tok))
    pairs = [(render(row, 'chosen'), render(row, 'rejected'), row) for row in rows]
    if cut := sum(len(side[0]) == block_size for pair in pairs for side in pair[:2]):
        print(f'{cut} of {2 * len(rows)} conversations fill block_size {block_size}: longer ones are cut on the left')
    return pairs

def get_batch(pairs):
    """Both sides of B pairs as idx (2B, T), first all chosen, padded with -1; mask (2B, T), 1 on the responses;
    margins (B,), how sure the labeller was (0 where that is not known)."""
    sides = [pair[i] for i in (0, 1) for pair in pairs]
    idx, mask = (pad_sequence(part, batch_first=True, padding_value=fill) for part, fill in zip(zip(*sides), (-1, 0)))
    return idx, mask, torch.tensor([float(row.get('margin', 0)) for *_, row in pairs])

def pairwise_loss(chosen, rejected, kind='bt', margin=None, flip_rate=0.0):
    """Mean loss of scores (B,) of the preferred and the other answers, with d = chosen - rejected: 'bt' -log sigmoid(d), or
    -log((1 - flip_rate) sigmoid(d) + flip_rate sigmoid(-d)), see log_choice; 'margin' max(0, margin - d), ranking, margin 1
    if None; 'bt_margin' as 'bt' of d - margin, where the margin (B,) is each pair's own (Llama 2, arXiv 2307.09288)."""
    d = chosen - rejected
    if kind == 'margin':
        return F.relu((1.0 if margin is None else margin) - d).mean()
    if kind not in ('bt', 'bt_margin') or kind == 'bt_margin' and margin is None:
        raise ValueError(f"kind must be 'bt', 'margin', or 'bt_margin' with a margin; got {kind!r}, margin {margin}")
    return -log_choice(d - margin if kind == 'bt_margin' else d, flip_rate).mean()

def score(trained, reference, idx, mask):
    """Scores (B,) of conversations; with a reference DPO's, dpo_beta times the log-ratio to it (equation 5)."""
    if reference is None:
        return trained(idx, mask)
    with torch.no_grad():
        before = log_prob(reference, idx, mask)
    return dpo_beta * (log_prob(trained, idx, mask) - before)

@torch.no_grad()
def evaluate(model, reference, pairs, gold, run):
    """What the scores of pairs are worth, see pair_figures."""
    scores = torch.zeros(2, len(pairs))
    for i in range(0, len(pairs), batch_size):
        idx, mask, _ = get_batch(pairs[i:i + batch_size])
        with run.autocast:
            scores[:, i:i + batch_size] = score(model, reference, idx.to(run.device), mask.to(run.device)).view(2, -1)
    return pair_figures(*scores, [row for *_, row in pairs], gold, flip_rate)

def toss_labels(pairs, n=0):
    """The pairs, of which a coin, another for each n, turned half round."""
    coins = torch.rand(len(pairs), generator=rng(seed, n))
    return [(b, a, row) if c < 0.5 else (a, b, row) for c, (a, b, row) in zip(coins, pairs)]

def sanity_checks(train, val, gold, make, trained, run):
    """Print a verdict a line, of a fresh model, of short runs, and of the trained one's figures; 1 if one failed."""
    def apart(pairs):
        return torch.sub(*score(model, reference, *(t.to(run.device) for t in get_batch(pairs)[:2])).chunk(2))
    (model, reference), few, found = make(), train[:16], []
    with torch.no_grad():
        together, turned = apart(few), apart([(b, a, row) for a, b, row in few])
        swapped, padded = together + turned, together - torch.cat([apart([pair]) for pair in few])  # together they are padded
    tosses = [(toss_labels(train, n), 300, val, 'accuracy_clean') for n in range(1, 5)]  # one alone: 0.5 +- 0.05
    for n, (pairs, steps, judged, figure) in enumerate([(few, 100, few, 'accuracy'), *tosses]):
        model, reference = make(n)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for step in range(steps):
            pairwise_loss(apart([pairs[i] for i in endless_order(len(pairs), step * 16, 16, seed)]), 0).backward()
            optimizer.step(), optimizer.zero_grad()
        found.append(evaluate(model, reference, judged, gold, run)[figure])
    heart, tossed, own, blind = found[0], sum(found[1:]) / len(tosses), trained['accuracy_clean'], trained['accuracy_length_only']
    verdicts = {f'a pair swapped negates the difference: off by {swapped.abs().max():.0e}': swapped.abs().max() < 1e-4,
                f'padding moves no score: off by {padded.abs().max():.0e}': padded.abs().max() < 1e-4,
                f'16 pairs are learned by heart: accuracy {heart:.2f}': heart == 1,
                f'tossed labels teach nothing: accuracy {tossed:.3f}': abs(tossed - 0.5) < 0.08,
                f'the trained model beats a judge of length alone: accuracy {own:.3f}, {blind:.3f}': own > blind + 0.1,
                f"its scores spread: standard deviation {trained['score_std']:.3f}": trained['score_std'] > 0.1,
                f"scaled, they are calibrated: off by {trained['calibration_error']:.3f}": trained['calibration_error'] < 0.1}
    print(*(f"{'ok    ' if good else 'FAILED'} {text}" for text, good in verdicts.items()), sep='\n')
    return 0 if all(verdicts.values()) else 1

if __name__ == "__main__":
    config = configure(globals())

    # 1. model, data, machine
    config['init_from'] = 'resume' if check else init_from  # what is checked is the run in out_dir, by its own settings
    checkpoint = resume(config, {'loss', 'causal'} if check else {'optimizer', 'dataset', 'loss', 'causal'})
    globals().update(config)
    at_least_one(config, 'eval_interval', 'log_interval', 'batch_size', 'gradient_accumulation_steps', 'normalize_prompts',
                 'length_groups')
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f'flip_rate must be at least 0 and below 0.5; got {flip_rate}')
    one_of(config, loss=('bt', 'margin', 'bt_margin', 'dpo'), causal=(True,) if loss == 'dpo' else (True, False))
    train_rows, val_rows = (load_examples(dataset, f'pref_{split}', 'preference') for split in ('train', 'val'))
    test_rows = load_examples(dataset, test_split, 'preference', val_rows)
    if loss == 'bt_margin' and not any('margin' in row for row in train_rows):
        raise ValueError(f"loss='bt_margin' needs pairs with a margin, and those of {dataset} have none; take 'bt'")
    gold, (policy, tok) = load_gold(dataset), load_chat_model(init_from, config)
    def make(n=0):
        """A fresh (model, reference): a reward model of the policy's weights, the nth head, or for DPO the policy and a copy."""
        trunk = copy.deepcopy(policy).to(run.device)
        vars(trunk.config).update({'causal': True} if causal else {'causal': False, 'window': 0, 'n_sink': 0})
        torch.manual_seed(seed + n)
        return (trunk, policy.to(run.device)) if loss == 'dpo' else (RewardModel(trunk).to(run.device), None)
    train_pairs, val_pairs = (prepare_pairs(rows, tok, policy.config.block_size)
                              for rows in (train_rows[:max_pairs or None], val_rows))
    train_pairs = toss_labels(train_pairs) if shuffle_labels else train_pairs
    first, sequences = checkpoint.get('step', 0), gradient_accumulation_steps * batch_size  # pairs a step, of all ranks
    max_iters = config['max_iters'] = max_iters or -(-len(train_pairs) // sequences)
    n_tokens = 2 * sum(len(pair[0][0]) for pair in train_pairs) / len(train_pairs) * sequences * max_iters
    run = start_run(config, flops=policy.flops_per_token(policy.config.block_size) * n_tokens)
    model, reference = make()
    model.load_state_dict({**checkpoint.get('model', model.state_dict()), **dict(model.named_buffers(recurse=False))})  # unscaled
    if check:
        sys.exit(sanity_checks(train_pairs[:2000], val_pairs, gold, make, evaluate(model, reference, val_pairs, gold, run), run))
    train_pairs.sort(key=lambda pair: len(pair[0][0]))  # neighbours are padded little
    trunk = model if loss == 'dpo' else model.trunk
    optimizers = trunk.optimizers(optimizer, learning_rate, weight_decay, (0.9, 0.95), muon_lr)
    if loss != 'dpo':
        optimizers[0].add_param_group({'params': model.head.parameters(), 'weight_decay': 0.0, 'lr_scale': 5.0})  # it is new
    for o, old in zip(optimizers, checkpoint.get('optimizer', [])):  # the moments, under this run's settings
        o.load_state_dict({'state': old['state'], 'param_groups': o.state_dict()['param_groups']})
    trained = parallel(model, run, dynamic=True, gradient_accumulation_steps=gradient_accumulation_steps)
    logger, stop = Logger(out_dir, config, checkpoint.get('step'), run.master), StopSignal()
    if run.master:
        print(f'{trunk.n_params():,} parameters; {dataset}: {len(train_pairs):,} + {len(val_pairs):,} pairs')

    def snapshot(step):
        return {'stage': 'dpo' if loss == 'dpo' else 'reward', 'step': step, 'model': model.state_dict(), 'config': config,
                'model_args': asdict(trunk.config), 'optimizer': [o.state_dict() for o in optimizers], 'tokenizer': tok.to_dict()}

    began, last_time, saved = time.time(), time.time(), first
    for step in range(first, max(first, max_iters) + 1):
        # 2. learning rate
        lr = learning_rate_at(step, config)
        for group in (g for o in optimizers for g in o.param_groups):
            group['lr'] = lr * group['lr_scale']

        # 3. save, evaluate
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters
        if stopping or step > first and (done or step % eval_interval == 0):
            saved = step
            if run.master:
                save_checkpoint(out_dir, snapshot(step), final=done)
        if done:
            break
        if step % eval_interval == 0 and run.master:
            logger.log(step, evaluate(model, reference, val_pairs, gold, run))
            last_time = time.time()

        # 4. forward and backward, a micro-batch at a time
        chosen = [train_pairs[i] for i in grouped_order(len(train_pairs), step, sequences, length_groups, seed)]
        micro_batches = [chosen[i:i + batch_size] for i in range(0, sequences, batch_size)][run.rank::run.world]
        found = torch.zeros(3, device=run.device)  # the two losses, accuracy
        for i, pairs in enumerate(micro_batches):
            idx, mask, margins = (t.to(run.device, non_blocking=True) for t in get_batch(pairs))
            if run.world > 1:  # the ranks exchange gradients once a step
                trained.require_backward_grad_sync = i == len(micro_batches) - 1
            with run.autocast:
                if denoise_weight and not causal:  # in one pass with the scores; the pad token, which no text has, is a blank
                    noise = rng(seed, step, run.rank + i * run.world, device=run.device)
                    scores, restored = trained(*tamper(idx, mask, tok.special['<|pad|>'], noise))
                else:
                    scores, restored = score(trained, reference, idx, mask), torch.zeros((), device=run.device)
                a, b, *_ = scores.float().split(len(pairs))
                micro_loss = pairwise_loss(a, b, 'bt' if loss == 'dpo' else loss, margin * margins if loss == 'bt_margin'
                                           else margin, flip_rate) + center_weight * (a + b).square().mean()
            total = (micro_loss + denoise_weight * restored + moe_aux_weight * trunk.aux_loss()) / len(micro_batches)
            run.scaler.scale(total).backward()
            found += torch.stack((micro_loss, restored, (a > b).float().mean())).detach() / len(micro_batches)

        # 5. clip and step
        for o in optimizers:
            run.scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if not torch.isfinite(found[0] if run.scaler.is_enabled() else grad_norm):
            raise diverged(step, out_dir, saved, loss=found[0], grad_norm=grad_norm)
        for o in optimizers:
            torch.isfinite(grad_norm) and run.scaler.step(o)  # float16: all step or none
            o.zero_grad(set_to_none=True)
        run.scaler.update()

        # 6. log
        if step % log_interval == 0:
            record = dict(zip(('loss', 'denoise_loss', 'train_accuracy'), sum_over_ranks(found) / run.world))
            logger.log(step, record | dict(lr=lr, grad_norm=grad_norm, ms=1000 * (time.time() - last_time)))
        last_time = time.time()

    # 7. the end: set the score's mean and variance, save, and tell what was learned
    stop.leave(run, stopping, step, out_dir)  # the other ranks end here
    seconds, test_pairs = time.time() - began, prepare_pairs(test_rows, tok, policy.config.block_size)
    figures = evaluate(model, reference, test_pairs, gold, run)
    if loss != 'dpo':
        with run.autocast:
            std, mean = score_moments(model, policy.to(run.device), tok, val_rows[:normalize_prompts], max_new_tokens,
                                      rng(seed, step, device=run.device))
        model.shift.add_(mean), model.scale.div_(std if std > 0 else 1)
    save_checkpoint(out_dir, snapshot(step))
    print(*(f'    {name:24} {value:8.4f}' for name, value in figures.items()), sep='\n')
    logger.final({**figures, 'seconds': seconds, 'peak_memory_mb': peak_memory_mb(run.type), 'steps': step,
                  'parameters': trunk.n_params()})
