"""
PPO: the policy answers prompts, a reward model scores the answers, and the policy moves towards what scored well without
going far from where it started (arXiv 1707.06347, 1909.08593, 2203.02155).

    python ppo.py                                       wordplay, from the models of sft.py and reward.py
    python ppo.py --reward=gold                         the true measure in place of the reward model, to debug
    python ppo.py --adv=rloo                            no critic: each answer against others to the same prompt
    python ppo.py --init_from=resume                    go on after a stop

An iteration is: prompts -> answers -> scores -> advantages -> a few epochs of clipped updates. It departs from the papers
in this: log-probabilities of the answers are computed anew with the training forward pass, since those of the cache
differ in the last bits; GRPO's KL penalty is part of the reward, as in the other two, not of the loss; and the gain of the
last norm, which says how sure the policy is of everything, learns at a rate of its own.
"""
import copy, math, time
from dataclasses import asdict
import torch
import torch.nn as nn
from bpe import printable
from configurator import (Logger, StopSignal, at_least_one, configure, diverged, learning_rate_at, one_of, parallel,
                          peak_memory_mb, resume, rng, save_checkpoint, start_run, sum_over_ranks)
from data.answers import answer, best_of, exact_match, length_chunks, pad_left, prompt_ids, short_prompts
from data.dataset import endless_order, load_examples, load_gold
from data.pretrained import load_chat_model, load_reward_model
from model import ScalarHead

# -----------------------------------------------------------------------------
# where and when
out_dir = 'out/ppo'                # folder of the run: checkpoints, log, curves
init_from = 'out/sft'              # 'scratch' | 'resume' | a run's folder | a Hugging Face folder or name
reward_model = 'out/reward'        # folder of a run of reward.py
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 20                 # iterations between evaluations, each with a few answers and a checkpoint
eval_prompts = 200                 # held-out prompts answered at each of them
log_interval = 1                   # iterations between lines of the log
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, as project nanollm, by the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with prompts_train.jsonl and prompts_val.jsonl, or the full path
test_split = 'prompts_test'        # the final figures are of this file, or where it is not there of prompts_val
test_prompts = 1000                # this many of its prompts are answered
test_draws = 4                     # sampled answers to each
# rollout
batch_size = 256                   # answers an iteration, over all ranks together
minibatch_size = 64                # answers an update, over all ranks together
gradient_accumulation_steps = 2    # parts of a minibatch, of like length, so that they are padded less
max_new_tokens = 32                # of an answer
temperature = 1.0                  # of sampling, and of policy, old policy and reference wherever they are compared
use_cache = True                   # False = rollouts without the KV cache, to see what it saves
# reward
reward = 'model'                   # 'model' | 'gold' (the data set's own measure, exact or not)
missing_end_score = -3.0           # replaces the score of an answer that did not end by itself
length_penalty = 0.0               # taken from the score for each token of the answer
score_clip = 0.0                   # largest score either way; 0 = no clipping
kl_control = 'fixed'               # 'fixed' | 'adaptive' (arXiv 1909.08593, section 2.2) | 'none'
kl_coef = 0.05                     # weight of the KL penalty, at the start where it is adaptive
kl_target = 0.4                    # nats an answer, which the adaptive weight steers to
kl_horizon = 5000                  # answers in which it may change by a fifth, at most
whiten_rewards = False             # rewards of variance 1 over the batch, their mean kept
# advantages and losses
adv = 'gae'                        # 'gae' (a critic; arXiv 1506.02438) | 'rloo' (2402.14740) | 'grpo' (2402.03300)
group_size = 4                     # answers to each prompt, for rloo and grpo
gamma = 1.0
lam = 0.95
clip_range = 0.2                   # of the policy's ratio
value_clip = 0.2                   # of the value's change
value_coef = 0.1                   # weight of the value loss
separate_critic = False            # True = the value has a trunk of its own, False = it reads the policy's
ppo_epochs = 1                     # passes over an iteration's answers: more learn more from each, and drift further
kl_stop = 0.1                      # end an iteration's updates where the policy has moved this far; 0 = never
# optimizer and schedule
learning_rate = 2e-4
gain_lr = 2e-2                     # of the gain of the last norm, by which the policy is surer of all it says, or less sure
critic_lr = 1e-3                   # of a separate critic, and of the value head
max_iters = 60                     # iterations
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' (warm-up, stable, decay) | 'constant'
warmup_iters = 5
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss, where experts have moe_balance 'aux'
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------

class Policy(nn.Module):
    """A language model and a value for every token, from the same hidden states or from a critic's own."""
    def __init__(self, gpt, separate_critic):
        super().__init__()
        self.gpt, self.value_head = gpt, ScalarHead(gpt.config.n_embd)  # starts at zero everywhere
        self.critic = copy.deepcopy(gpt) if separate_critic else None
        if separate_critic:
            self.critic.lm_head.requires_grad_(gpt.config.tie_weights)

    def forward(self, idx, read=...):
        """idx (B, T), -1 = padding on the right -> logits (B, T, V) of the next token, values (B, T); `read` as in GPT.hidden."""
        idx = idx.clamp(min=0)  # a causal model's real tokens see no padding that stands on the right
        h = self.gpt.hidden(idx, read=read)
        values = self.value_head(h if self.critic is None else self.critic.hidden(idx, read=read))
        return self.gpt.lm_head(h).float() / temperature, values.float()

# ----- The parts of the objective. Tensors are (B, T): a row an answer with its prompt, a column a predicted token; mask is 1
# where the token was the policy's own, its end included. The losses also take these tokens alone, (N,), as the update has them.

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()

def whiten(x, mask, keep_mean=False):
    """x with mean 0 (or its own) and variance 1 over what mask holds, on all ranks together."""
    sums = torch.stack((mask.sum(), (x * mask).sum(), (x.square() * mask).sum())).to(torch.float32 if x.is_mps else torch.float64)
    n, total, squares = sum_over_ranks(sums)
    mean, variance = total / n, squares / n - (total / n) ** 2
    return (((x - mean) / (variance + 1e-8).sqrt() + (mean if keep_mean else 0)) * mask).float()

def compute_gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438, equation 16): advantage_t = sum over l >= 0 of
    (gamma lam)^l delta_{t+l}, with delta_t = reward_t + gamma value_{t+1} - value_t, and 0 for the value after the
    last token of a row's mask. Returns (advantages, returns), both 0 outside the mask; returns = advantages + values."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.size(1))):
        after = values[:, t + 1] * mask[:, t + 1] if t + 1 < rewards.size(1) else 0.0
        running = (rewards[:, t] + gamma * after - values[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask

def group_advantages(returns, group_size, kind):
    """Advantages (B,) of whole answers with returns (B,), each against the others to the same prompt, which stand side
    by side: 'rloo' minus the mean of the others; 'grpo' minus the mean of all, over their standard deviation."""
    groups = returns.view(-1, group_size)
    if kind == 'rloo':
        others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        return (groups - others).flatten()
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

def policy_loss(logp, old_logp, advantages, mask, clip_range):
    """The clipped objective of arXiv 1707.06347, equation 7, to be minimised: a token whose ratio to the old policy has
    left [1 - clip, 1 + clip] in the direction that its advantage wants adds no gradient."""
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return masked_mean(-torch.min(ratio * advantages, clipped * advantages), mask)

def value_loss(values, old_values, returns, mask, value_clip):
    """Half the squared error, of the value or of what of its change is left after clipping, whichever is larger."""
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return masked_mean(0.5 * torch.max((values - returns).square(), (near - returns).square()), mask)

def pack(idx, mask):
    """Rows that are padded on both sides (-1) with their padding on the right, no longer than the longest."""
    order = (idx < 0).long().argsort(dim=1, stable=True)[:, :(idx >= 0).sum(1).max()]
    return idx.gather(1, order), mask.gather(1, order)

def rollout(gpt, prompts, end, generator, device):
    """Sample an answer to each prompt (lists of ids), from the plain softmax at `temperature`. Returns idx (B, T), prompt
    and answer, padded on the right with -1; mask (B, T), 1 on the answer and its end; ended (B,)."""
    idx = pad_left(prompts, device)
    out = gpt.generate(idx, max_new_tokens, temperature, stop=[end], use_cache=use_cache, generator=generator)
    said = (out >= 0) & (torch.arange(out.size(1), device=device) >= idx.size(1))
    return *pack(out, said.long()), (said & (out == end)).any(1)

@torch.no_grad()
def measure(policy, reference, idx, mask, batch):
    """What the policy and the reference say of answers, `batch` rows at a time. All (B, T - 1), 0 where mask is 0:
    log-probabilities of the tokens by both, values, the entropy, and the exact KL over the vocabulary, nats a token."""
    found = torch.zeros(5, *idx[:, 1:].shape, device=idx.device)
    for rows, T in length_chunks(idx, batch):
        row, t = mask[rows, 1:T].nonzero(as_tuple=True)                # what stands at t tells the token after it
        (logits, values), (before, _) = policy(idx[rows, :T], (row, t)), reference(idx[rows, :T].clamp(min=0), read=(row, t))
        logp, ref = logits.log_softmax(-1), (before.float() / temperature).log_softmax(-1)
        both = (x.gather(-1, idx[rows[row], t + 1][:, None])[:, 0] for x in (logp, ref))
        entropy, kl = -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - ref)).sum(-1)
        found[:, rows[row], t] = torch.stack((*both, values, entropy, kl))
    return found

def shape(score, ended, length):
    """The score (B,) as it is rewarded: clipped, less a penalty for length; missing_end_score where the end is missing."""
    score = score.clamp(-score_clip, score_clip) if score_clip else score
    return torch.where(ended, score - length_penalty * length, missing_end_score)

def judge(idx, mask, rows, judge_model):
    """Scores (B,) of answers to the prompts of rows: by the reward model, and by gold (exact; nan without that)."""
    gold = torch.full((len(rows),), math.nan)
    for i in range(len(rows) if gold_of else 0):
        gold[i], _ = gold_of(rows[i]['prompt'], tok.decode([t for t in idx[i][mask[i] > 0].tolist() if t != end]))
    score = gold.clone()
    for rows, T in length_chunks(idx, minibatch_size) if judge_model else ():
        with torch.no_grad():
            score[rows.cpu()] = judge_model(idx[rows, :T], mask[rows, :T]).float().cpu()
    return score, gold

def evaluate(gpt, tok, rows, draws, run, generator):
    """Figures of the greedy answers to rows beside their gold responses, and of `draws` samples each; the samples as
    [(text, ended)], a pass over the rows after the other; and the greedy answers."""
    right = [row.get('response') for row in rows]
    prompts = [prompt_ids(row['prompt'], tok) for row in rows]
    with run.autocast:
        greedy = [text for text, _ in answer(gpt, tok, prompts, max_new_tokens, temperature=0)]
        sampled = answer(gpt, tok, prompts * draws, max_new_tokens, temperature=temperature, generator=generator)
    return {'exact_match': exact_match(greedy, right), 'exact_match_sampled': exact_match([a for a, _ in sampled], right * draws),
            'ended': sum(ended for _, ended in sampled) / len(sampled)}, sampled, greedy

if __name__ == "__main__":
    config = configure(globals())

    # 1. policy, reference, judge, prompts, machine
    checkpoint = resume(config, {'dataset', 'separate_critic', 'adv'})
    globals().update(config)
    at_least_one(config, 'eval_interval', 'log_interval', 'batch_size', 'minibatch_size', 'eval_prompts', 'test_prompts',
                 'test_draws', 'max_new_tokens', 'ppo_epochs', 'gradient_accumulation_steps')
    one_of(config, reward=('model', 'gold'), kl_control=('fixed', 'adaptive', 'none'), adv=('gae', 'rloo', 'grpo'))
    group = 1 if adv == 'gae' else group_size
    if batch_size % minibatch_size or batch_size % group or adv != 'gae' and group_size < 2:
        raise ValueError(f'batch_size {batch_size} must be a multiple of minibatch_size {minibatch_size} and of group_size '
                         f'{group}, which is at least 2 for {adv}')
    if temperature <= 0:
        raise ValueError(f'temperature must be above 0, for answers are sampled; got {temperature}')
    train_rows, val_rows = (load_examples(dataset, f'prompts_{split}', 'prompt') for split in ('train', 'val'))
    test_rows = load_examples(dataset, test_split, 'prompt', val_rows)[:test_prompts]
    reference, tok = load_chat_model(init_from, config)
    judge_model = load_reward_model(reward_model, tok) if reward == 'model' else None
    gold_of, end = load_gold(dataset), tok.special['<|end|>']
    if reward == 'gold' and gold_of is None:
        raise ValueError(f"reward='gold': data/{dataset}/prepare.py has no function gold; take reward='model'")
    policy = Policy(copy.deepcopy(reference), separate_critic)
    policy.load_state_dict(checkpoint.get('policy', policy.state_dict()))
    first, kl_coef = checkpoint.get('step', 0), kl_coef if kl_control != 'none' else 0.0
    if checkpoint and all(checkpoint['config'][key] == config[key] for key in ('kl_control', 'kl_coef')):
        kl_coef = checkpoint['kl_coef']  # where it has got to
    work = batch_size * 64 * (2 + ppo_epochs) * max_iters  # tokens, about
    run = start_run(config, flops=reference.flops_per_token(64) * work)
    for module in (reference, policy, judge_model):
        module is not None and module.to(run.device).eval()
    value = [p for name, p in policy.named_parameters() if name.startswith(('value_head', 'critic')) and p.requires_grad]
    gain = policy.gpt.ln_f.weight
    groups = [{'params': params, 'lr_scale': lr / (learning_rate or 1)} for params, lr in (
        ([p for p in policy.gpt.parameters() if p is not gain], learning_rate), ([gain], gain_lr), (value, critic_lr))]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), eps=1e-5, weight_decay=0.0)
    for old in checkpoint.get('optimizer', []):  # the moments, under this run's settings
        optimizer.load_state_dict({'state': old['state'], 'param_groups': optimizer.state_dict()['param_groups']})
    trained = parallel(policy, run, dynamic=True, minibatch_size=minibatch_size, prompts=batch_size // group)
    logger, stop, share = Logger(out_dir, config, checkpoint.get('step'), run.master), StopSignal(), batch_size // run.world
    prompts = short_prompts(train_rows, tok, policy.gpt.config.block_size, max_new_tokens)
    before = evaluate(reference, tok, val_rows[:8], 1, run, None)[2] if run.master else []

    def snapshot(step):
        return {'stage': 'ppo', 'step': step, 'model': policy.gpt.state_dict(), 'model_args': asdict(policy.gpt.config),
                'policy': policy.state_dict(), 'optimizer': [optimizer.state_dict()], 'config': config,
                'tokenizer': tok.to_dict(), 'kl_coef': kl_coef}

    began, last_time, saved, rollout_seconds, train_seconds = time.time(), time.time(), first, 0.0, 0.0
    for step in range(first, max(first, max_iters) + 1):
        # 2. learning rate
        lr = learning_rate_at(step, config)
        for param_group in optimizer.param_groups:
            param_group['lr'] = lr * param_group['lr_scale']

        # 3. save, evaluate, show the same few answers
        stopping, done = stop.by_any_rank(run), step >= max_iters
        if stopping or step > first and (done or step % eval_interval == 0):
            saved = step
            if run.master:
                save_checkpoint(out_dir, snapshot(step), final=stopping or done)
        if stopping:
            break
        if run.master and (done or step % eval_interval == 0):
            figures, _, greedy = evaluate(policy.gpt, tok, val_rows[:eval_prompts], 2, run, rng(seed, step, device=run.device))
            logger.log(step, {f'eval/{name}': value for name, value in figures.items()})
            for row, was, now in zip(val_rows, before, greedy):
                print(printable(f"    {row['prompt']} -> {was} -> {now}   (gold: {row.get('response', '?')})"), flush=True)
        if done:
            break

        # 4. sample: the answers of this rank to its prompts, those of a group side by side
        start = time.time()
        asked = endless_order(len(prompts), step * batch_size // group, batch_size // group, seed)
        asked = [i for i in asked for _ in range(group)][run.rank * share:(run.rank + 1) * share]
        with run.autocast:
            idx, mask, ended = rollout(policy.gpt, [prompts[i] for i in asked], end,
                                       rng(seed, step, run.rank, device=run.device), run.device)
        rollout_time = time.time() - start

        # 5. score: one number an answer, on its last token; on every token the KL penalty to the reference
        with run.autocast:
            score, gold = (x.to(run.device) for x in judge(idx, mask, [train_rows[i] for i in asked], judge_model))
            old_logp, ref_logp, values, entropy, exact_kl = measure(trained, reference, idx, mask, minibatch_size)
        mask = mask[:, 1:].float()                                    # from here on a column is a predicted token
        length, log_ratio = mask.sum(1), old_logp - ref_logp
        shaped, penalty = shape(score, ended, length), -kl_coef * log_ratio
        last = (mask.cumsum(1) == length[:, None]) & (mask > 0)       # the token that the score stands on
        rewards = (penalty + last * shaped[:, None]) * mask
        rewards = whiten(rewards, mask, keep_mean=True) if whiten_rewards else rewards

        # 6. advantages
        if adv == 'gae':
            advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
            advantages = whiten(advantages, mask)
        else:
            advantages, returns = group_advantages(rewards.sum(1), group_size, adv)[:, None] * mask, values  # no critic

        # 7. update: a few epochs of clipped steps over reshuffled minibatches
        seen = []
        for epoch in range(ppo_epochs):
            order = torch.randperm(share, generator=rng(seed, step, epoch)).to(run.device)
            for rows in order.split(minibatch_size // run.world):
                if kl_stop and seen and seen[-1][0] > kl_stop:  # the same on all ranks
                    continue
                found, tokens = 0.0, sum_over_ranks(mask[rows].sum()) / run.world
                for part, T in length_chunks(idx[rows], -(-len(rows) // gradient_accumulation_steps)):
                    row, t = mask[part := rows[part], :T - 1].nonzero(as_tuple=True)
                    a, m, old, v, r = (x[part[row], t] for x in (advantages, mask, old_logp, values, returns))
                    with run.autocast:
                        logits, new_values = trained(idx[part, :T], (row, t))
                        logp = logits.log_softmax(-1).gather(-1, idx[part[row], t + 1][:, None])[:, 0]
                        pg_loss = policy_loss(logp, old, a, m, clip_range)
                        vf_loss = value_loss(new_values, v, r, m, value_clip)
                        total = pg_loss + moe_aux_weight * policy.gpt.aux_loss() + value_coef * (adv == 'gae') * vf_loss
                    share_of_tokens = m.sum() / tokens                # every token of all ranks' minibatch weighs the same
                    run.scaler.scale(total * share_of_tokens).backward()
                    with torch.no_grad():
                        ratio, v_moved = (logp - old).exp(), (new_values - v).abs()
                        told = ((logp - old).square() / 2, ratio, (ratio - 1).abs() > clip_range, v_moved > value_clip)
                        found += torch.stack([*(masked_mean(x, m) for x in told), pg_loss, vf_loss]) * share_of_tokens
                run.scaler.unscale_(optimizer)
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), grad_clip or math.inf)
                if not torch.isfinite(found[4] if run.scaler.is_enabled() else grad_norm):
                    raise diverged(step, out_dir, saved, loss=found[4], grad_norm=grad_norm)
                run.scaler.step(optimizer)
                optimizer.zero_grad(set_to_none=True)
                run.scaler.update()
                seen.append(sum_over_ranks(torch.cat((found, grad_norm[None])) / run.world))

        # 8. KL control: the weight follows the distance, an answer's nats, slowly (arXiv 1909.08593, section 2.2)
        record = {'objective/kl': log_ratio.sum(1).mean(), 'objective/kl_exact': exact_kl.sum(1).mean(),
                  'objective/kl_k3': (((-log_ratio).exp() - 1 + log_ratio) * mask).sum(1).mean(),
                  'objective/entropy': masked_mean(entropy, mask), 'response_length': length.mean(), 'objective/score':
                  score.mean(), 'objective/gold': gold.mean(), 'objective/non_score_reward': penalty.sum(1).mean(),
                  'objective/rlhf_reward': (shaped + penalty.sum(1)).mean(), 'ended': ended.float().mean(),
                  'val/explained_variance': 1 - (returns - values)[mask > 0].var() / returns[mask > 0].var().clamp(1e-8)}  # 1: no critic
        numbers = sum_over_ranks(torch.stack([*record.values()]) / run.world)
        record = dict(zip(record, numbers.tolist())) | {'objective/kl_coef': kl_coef}
        if kl_control == 'adaptive':
            kl_coef *= 1 + min(0.2, max(-0.2, record['objective/kl_exact'] / kl_target - 1)) * batch_size / kl_horizon

        # 9. log
        now = time.time()
        train_seconds, rollout_seconds = train_seconds + now - last_time, rollout_seconds + rollout_time
        if step % log_interval == 0:
            names = 'policy/approxkl val/ratio policy/clipfrac val/clipfrac loss/policy loss/value grad_norm'.split()
            logger.log(step, record | dict(zip(names, torch.stack(seen).mean(0).tolist())) | {
                'val/first_ratio': seen[0][1], 'updates': len(seen), 'lr': lr,
                'rollout_share': rollout_time / (now - last_time), 'episodes_per_second': batch_size / (now - last_time)})
        last_time = now

    # 10. the end: held-out prompts that nobody looked at, before and after
    stop.leave(run, stopping, step, out_dir)  # the other ranks end here
    seconds, told = time.time() - began, []
    start, after = (evaluate(model, tok, test_rows, test_draws, run, rng(seed, max_iters, device=run.device))
                    for model in (reference, policy.gpt))
    for rows in (test_rows[i:i + batch_size] for i in range(0, len(test_rows), batch_size)):
        asked = short_prompts(rows, tok, policy.gpt.config.block_size, max_new_tokens)
        idx, mask, _ = rollout(policy.gpt, asked, end, rng(seed, len(told), device=run.device), run.device)
        kl = measure(policy, reference, idx, mask, minibatch_size)[4].sum(1)
        told.append(torch.stack((*judge(idx, mask, rows, judge_model), kl.cpu())))
    score, gold, kl = torch.cat(told, dim=1).mean(1).tolist()
    p, q = (min(max(f['exact_match_sampled'], 1e-6), 1 - 1e-6) for f, *_ in (start, after))
    figures = {**after[0], 'score': score, 'gold': gold, 'kl': kl,
               'kl_minimum': q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)),
               **{f'{name}_before': value for name, value in start[0].items()}}
    if judge_model is not None and test_draws >= 4:  # the same reward model without PPO: the best of four samples
        conversations = [[{'role': 'user', 'content': row['prompt']}] for row in test_rows]
        four = [start[1][draw * len(test_rows) + i][0] for i in range(len(test_rows)) for draw in range(4)]
        best = best_of(judge_model, tok, conversations, four)
        figures['best_of_4'] = exact_match(best, [row.get('response') for row in test_rows])
    print(*(f'    {name:28} {value:8.4f}' for name, value in figures.items()), sep='\n')
    logger.final({**figures, 'episodes_per_second': (step - first) * batch_size / max(train_seconds, 1e-9),
                  'rollout_share': rollout_seconds / max(train_seconds, 1e-9), 'seconds': seconds,
                  'peak_memory_mb': peak_memory_mb(run.type), 'steps': step, 'parameters': policy.gpt.n_params()})
