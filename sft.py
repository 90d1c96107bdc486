"""
Supervised fine-tuning: a language model learns to answer from demonstrations, prompts and responses (InstructGPT,
arXiv 2203.02155, section 3.5).

    python sft.py                                          wordplay, from the byte model of config/wordplay/base.py
    python sft.py --dataset=alpaca --init_from=FOLDER      any instructions, any model
    python sft.py --curriculum=short_to_long               from short examples to long ones
    python sft.py --init_from=resume                       go on after a stop
    torchrun --standalone --nproc_per_node=8 sft.py --gradient_accumulation_steps=8

The loss counts the response and its end, never the prompt: the model learns to answer, not to ask. At the end it
answers held-out prompts, greedily and by sampling, and is compared with the gold responses.
"""
import math, time
from dataclasses import asdict
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from bpe import printable, render_chat
from configurator import (Logger, StopSignal, at_least_one, configure, diverged, learning_rate_at, one_of, parallel,
                          peak_memory_mb, resume, rng, save_checkpoint, seed_for, start_run, sum_over_ranks)
from data.answers import answer, exact_match, rouge_l, token_f1
from data.dataset import grouped_order, load_examples
from data.pretrained import load_chat_model

# -----------------------------------------------------------------------------
# where and when
out_dir = 'out/sft'                # folder of the run: checkpoints, log, curves
init_from = 'out/bytes'            # 'scratch' | 'resume' | a run's folder | a Hugging Face folder or name
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 500                # steps between evaluations, each with a few answers and a checkpoint
eval_prompts = 200                 # held-out prompts answered at each of them
eval_only = False                  # evaluate as at the end, log it in out_dir/eval, and stop
log_interval = 20                  # steps between lines of the log
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, as project nanollm, by the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with sft_train.jsonl and sft_val.jsonl, or the full path of one
test_split = 'prompts_test'        # the final figures are of this file, or where it is not there of sft_val
test_prompts = 1000                # this many of its prompts are answered
test_draws = 4                     # sampled answers to each, at temperature 1
max_new_tokens = 64                # of an answer, in evaluations
gradient_accumulation_steps = 2    # micro-batches a step, over all ranks together
batch_size = 64                    # examples in a micro-batch
curriculum = 'none'                # 'none' (random order) | 'short_to_long' (arXiv 2108.02170)
curriculum_stages = 4              # stage i draws from the i/n shortest examples, the last from all
curriculum_frac = 0.4              # share of the run at which the last stage begins
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 3e-3               # of AdamW, at the top of the schedule
muon_lr = 0.02                     # of Muon, on the same schedule
max_iters = 1600
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' (warm-up, stable, decay) | 'constant'
warmup_iters = 20
dropout = 0.0
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss, where experts have moe_balance 'aux'
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------

def prepare_examples(rows, tok, block_size):
    """[(ids, mask)] of rows with messages, mask 1 where the loss counts the token: the response and its end, not
    the prompt. Too long ones are cut on the left, or left out if the last response alone is too long,
    and both are said. ValueError if none is left."""
    examples, cut, dropped = [], 0, 0
    for row in rows:
        ids, mask = render_chat(row['messages'], tok)
        if len(ids) > block_size + 1:
            cut += 1
            ids, mask = ids[-block_size - 1:], mask[-block_size - 1:]
            if all(mask):  # the cut falls into the last response
                dropped += 1
                continue
        examples.append((torch.tensor(ids), torch.tensor(mask)))
    if cut:
        print(f'{cut} of {len(rows)} examples are longer than block_size {block_size}: {dropped} of them left out, '
              f'for their response does not fit; the others cut on the left')
    if not examples:
        raise ValueError(f'no response fits in block_size {block_size}')
    return examples

def get_batch(examples):
    """Pad examples on the right: x (B, T), y the same shifted by one, and mask, 1 where y counts. A causal model's tokens
    see no padding on their right, so it needs no mask of its own (the balancing loss of experts alone counts it)."""
    ids, mask = (pad_sequence(part, batch_first=True) for part in zip(*examples))
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]

def masked_loss(logits, targets, mask, total=None):
    """Cross-entropy, nats a token, where mask is 1: its sum divided by `total`, the number of such tokens in the
    whole accumulated batch of all ranks (None = in this one), so that every token weighs the same however a batch
    is cut. Masked by position: a pad or an end token that counts has the id it has. logits (B, T, V), or (N, V) of the
    tokens where mask is 1 alone."""
    logits = logits[mask > 0] if logits.dim() == 3 else logits
    return F.cross_entropy(logits.float(), targets[mask > 0], reduction='sum') / (mask.sum() if total is None else total)

def batch_indices(by_length, step, config):
    """The examples of a step, for all ranks together: those that follow in an endless sequence of permutations, a
    function of (seed, step). With a curriculum, stages begin with the shortest examples and end with all."""
    count, n, stages = config['gradient_accumulation_steps'] * config['batch_size'], len(by_length), 1
    stage, began = 0, 0
    if config['curriculum'] == 'short_to_long':
        stages = config['curriculum_stages']
        starts = [round(config['max_iters'] * config['curriculum_frac'] * i / max(1, stages - 1)) for i in range(stages)]
        stage = sum(step >= start for start in starts) - 1
        began, n = starts[stage], math.ceil(n * (stage + 1) / stages)
    return [by_length[i] for i in grouped_order(n, step - began, count, 1, config['seed'], stage)]  # micro-batches are alike

@torch.no_grad()
def response_loss(model, examples, run):
    """Nats a token of the gold responses, over all examples."""
    total = count = 0
    examples = sorted(examples, key=lambda e: len(e[0]))
    for i in range(0, len(examples), batch_size):
        x, y, mask = (t.to(run.device) for t in get_batch(examples[i:i + batch_size]))
        with run.autocast:
            logits, _ = model(x, read=mask.nonzero(as_tuple=True))
        total, count = total + masked_loss(logits, y, mask, 1).item(), count + mask.sum().item()
    return total / count

def evaluate(model, tok, rows, run, draws, generator):
    """Figures of the greedy answers to rows beside their gold responses, of `draws` samples each at temperature 1,
    and, where rows have an "op", of each of these; and the greedy answers, as texts."""
    gold = [row['messages'][-1]['content'] for row in rows]
    prompts = [render_chat(row['messages'][:-1], tok)[0] for row in rows]
    with run.autocast:
        greedy = answer(model, tok, prompts, max_new_tokens, temperature=0)
        sampled = answer(model, tok, prompts * draws, max_new_tokens, generator=generator)
    mean, texts = lambda values: sum(values) / len(values), [text for text, _ in greedy]
    right = [a == b for a, b in zip(texts, gold)]
    figures = {'exact_match': exact_match(texts, gold),
               'exact_match_sampled': exact_match([text for text, _ in sampled], gold * draws),
               'token_f1': mean([*map(token_f1, texts, gold)]), 'rouge_l': mean([*map(rouge_l, texts, gold)]),
               'ended': mean([ended for _, ended in greedy]), 'ended_sampled': mean([ended for _, ended in sampled])}
    for op in sorted({row['op'] for row in rows if 'op' in row}):
        figures[f'exact_match/{op}'] = mean([r for r, row in zip(right, rows) if row['op'] == op])
    return figures, texts

if __name__ == "__main__":
    config = configure(globals())

    # 1. model, data, machine
    checkpoint = resume(config, {'optimizer', 'dataset'})
    globals().update(config)
    at_least_one(config, 'eval_interval', 'log_interval', 'batch_size', 'gradient_accumulation_steps',
                 'curriculum_stages', 'test_draws', 'test_prompts', 'eval_prompts', 'max_new_tokens')
    one_of(config, curriculum=('none', 'short_to_long'))
    train_rows, val_rows = (load_examples(dataset, f'sft_{split}', 'sft') for split in ('train', 'val'))
    test_rows = load_examples(dataset, test_split, 'sft', val_rows)[:test_prompts]
    model, tok = load_chat_model(checkpoint or init_from, config)
    train_examples, val_examples = (prepare_examples(rows, tok, model.config.block_size) for rows in (train_rows, val_rows))
    by_length = sorted(range(len(train_examples)), key=lambda i: len(train_examples[i][0]))
    first = checkpoint.get('step', 0)
    sequences = gradient_accumulation_steps * batch_size  # a step's, over all ranks
    n_tokens = sum(len(ids) for ids, _ in train_examples) / len(train_examples) * sequences
    run = start_run(config, flops=model.flops_per_token(model.config.block_size) * n_tokens * max_iters)
    model.to(run.device)
    optimizers = model.optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), muon_lr)
    for o, old in zip(optimizers, checkpoint.get('optimizer', [])):  # the moments, under this run's settings
        o.load_state_dict({'state': old['state'], 'param_groups': o.state_dict()['param_groups']})
    trained = parallel(model, run, dynamic=True, gradient_accumulation_steps=gradient_accumulation_steps)
    logger = Logger(f'{out_dir}/eval' if eval_only else out_dir, config, checkpoint.get('step'), run.master)
    stop = StopSignal()
    if run.master:
        print(f'{model.n_params():,} parameters; {dataset}: {len(train_examples):,} + {len(val_examples):,} examples; '
              f'{n_tokens:,.0f} tokens a step')

    def snapshot(step):
        return {'stage': 'sft', 'step': step, 'model': model.state_dict(), 'model_args': asdict(model.config),
                'optimizer': [o.state_dict() for o in optimizers], 'config': config, 'tokenizer': tok.to_dict()}

    began, last_time, saved = time.time(), time.time(), first
    for step in range(first, max(first, max_iters) + 1):
        # 2. learning rate
        lr = learning_rate_at(step, config)
        for group in (g for o in optimizers for g in o.param_groups):
            group['lr'] = lr * group['lr_scale']

        # 3. save, evaluate, sample
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters or eval_only
        if (stopping or step > first and (done or step % eval_interval == 0)) and not eval_only:
            saved = step
            if run.master:
                save_checkpoint(out_dir, snapshot(step), final=done)
        if done:
            break
        if step % eval_interval == 0 and run.master:
            model.eval()
            figures, texts = evaluate(model, tok, val_rows[:eval_prompts], run, 1, rng(seed, step, device=run.device))
            logger.log(step, {'response_loss': response_loss(model, val_examples[:1000], run), **figures})
            for row, text in zip(val_rows[:4], texts):
                prompt, gold = (message['content'] for message in row['messages'][-2:])
                print(printable(f"    {prompt} -> {text}{'' if text == gold else f'   (gold: {gold})'}"), flush=True)
            last_time = time.time()

        # 4. forward and backward, a micro-batch at a time
        model.train()
        torch.manual_seed(seed_for(seed, step, run.rank))  # the dropout masks of this step
        chosen = [train_examples[i] for i in batch_indices(by_length, step, config)]
        total = sum(mask[1:].sum().item() for _, mask in chosen)  # tokens that count, over all ranks
        micro_batches, loss = [chosen[i:i + batch_size] for i in range(0, sequences, batch_size)][run.rank::run.world], 0.0
        for i, examples in enumerate(micro_batches):
            x, y, mask = (t.to(run.device, non_blocking=True) for t in get_batch(examples))
            if run.world > 1:  # the ranks exchange gradients once a step
                trained.require_backward_grad_sync = i == len(micro_batches) - 1
            with run.autocast:
                logits, _ = trained(x, read=mask.nonzero(as_tuple=True))  # nobody asks what follows the others
                micro_loss = masked_loss(logits, y, mask, total)
                balance = moe_aux_weight * model.aux_loss() / len(micro_batches) / run.world
            run.scaler.scale((micro_loss + balance) * run.world).backward()  # DDP takes the ranks' mean
            loss += micro_loss.detach()

        # 5. clip and step
        for o in optimizers:
            run.scaler.unscale_(o)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        if not torch.isfinite(loss if run.scaler.is_enabled() else grad_norm):
            raise diverged(step, out_dir, saved, loss=loss, grad_norm=grad_norm)
        for o in optimizers:
            torch.isfinite(grad_norm) and run.scaler.step(o)  # float16: all step or none
            o.zero_grad(set_to_none=True)
        run.scaler.update()

        # 6. log
        if step % log_interval == 0:
            loss = sum_over_ranks(loss).item()  # waits for the GPU, so it comes before the clock is read
        now = time.time()
        if step % log_interval == 0:
            logger.log(step, {'loss': loss, 'lr': lr, 'grad_norm': grad_norm.item(), 'ms': 1000 * (now - last_time)})
        last_time = now

    # 7. the end
    stop.leave(run, stopping, step, out_dir)  # the other ranks end here
    seconds = time.time() - began
    figures, _ = evaluate(model.eval(), tok, test_rows, run, test_draws, rng(seed, max_iters, device=run.device))
    figures['response_loss'] = response_loss(model, val_examples, run)
    print(*(f'    {name:24} {value:8.4f}' for name, value in figures.items()), sep='\n')
    logger.final({**figures, 'seconds': seconds, 'peak_memory_mb': peak_memory_mb(run.type), 'steps': step,
                  'parameters': model.n_params()})
