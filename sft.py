"""
Supervised fine-tuning: a language model learns to respond from demonstrations, prompts with
responses (InstructGPT, arXiv 2203.02155, section 3.5).

    python sft.py                                        wordplay, on the model in out/bytes
    python sft.py --dataset=alpaca --init_from=FOLDER    any instructions, any model
    python sft.py --curriculum=short_prompts             from short prompts to long ones
    python sft.py --init_from=resume                     continue a stopped run
    torchrun --standalone --nproc_per_node=8 sft.py --gradient_accumulation_steps=8

The loss counts the response and its end token, never the prompt. At the end the model answers
held-out prompts, greedily and by sampling, and its responses are compared with the gold responses.
"""
import math
import os
import time
from collections import Counter
from dataclasses import asdict

# configurator comes first: it answers --help before torch is loaded
from configurator import (Logger, StopSignal, check_choice, check_divisible, configure,
                          generator_for, must_skip, one_line, parallel, peak_flops, peak_memory_mb,
                          printable, restore_optimizers, resume, save_checkpoint, schedule_factor,
                          seed_for, start_run, sum_over_ranks)
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from assets.draw import draw_curves
from bpe import render_chat
from data.examples import grouped_order, load_examples
from data.pretrained import load_chat_model
from model import evaluation_mode, skip_idle_experts
from sample import answer, encode_prompts, exact_match, prompt_ids

# -----------------------------------------------------------------------------
# the run
out_dir = 'out/sft'                # folder of the run: checkpoints, log, curves
init_from = 'out/bytes'            # 'resume' | a run's folder | a Hugging Face model | 'scratch'
                                   # (a small model of bytes with random weights)
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 500                # steps between evaluations, each with a checkpoint
eval_prompts = 200                 # held-out prompts per evaluation
eval_only = False                  # evaluate as at the end, log it in out_dir/eval, and stop
log_interval = 20                  # steps between lines of the log
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases, under the name of the folder
# data
dataset = 'wordplay'               # a folder of data/ with sft_train and sft_val.jsonl, or its path
test_split = 'prompts_test'        # file of the final figures; sft_val if there is none
test_prompts = 1000                # number of its prompts
test_draws = 4                     # sampled responses to each, at temperature 1
max_new_tokens = 64                # per response, in evaluations
block_size = 0                     # context, in tokens; 0 = the model's, which RoPE can extend
gradient_accumulation_steps = 2    # micro-batches per step, over all ranks together
batch_size = 64                    # examples per micro-batch
curriculum = 'none'                # 'none' (random order) | 'short_prompts' | 'short_examples':
                                   # the short ones first (arXiv 2108.02170)
curriculum_stages = 4              # stage i of n uses the i/n shortest of them
curriculum_frac = 0.4              # share of the run after which all examples are used
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 3e-3               # of AdamW, at the peak of the schedule
muon_lr = 0.02                     # of Muon, on the same schedule
max_iters = 1600                   # steps
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' | 'constant'
warmup_iters = 20
dropout = 0.0
attn = 'auto'                      # 'auto' | 'sdpa' | 'manual'
moe_aux_weight = 0.01              # weight of the load-balancing loss of a model with experts
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------


def keeps_a_question(messages, n_cut, tok):
    """Whether a conversation of which the first n_cut tokens are cut still has, before its last
    response, room for the markers of the chat format and the last word of the prompt."""
    n_kept = len(prompt_ids(messages[:-1], tok)) - n_cut  # tokens before the last response
    n_markers = len(prompt_ids([{'role': 'user', 'content': ''}], tok))
    last_word = ''.join(messages[-2]['content'].split()[-1:])  # '' if there is none
    return n_kept >= n_markers + len(tok.encode(last_word))


def prepare_examples(rows, tok, block_size, verbose=True):
    """
    [(ids, mask)] of rows with messages; mask is 1 where the loss counts the token: the response and
    its end token, not the prompt. Examples that are too long are truncated on the left, or skipped
    if that would cut into the last response. The numbers are printed. ValueError if no example is
    left.
    """
    examples = []
    n_truncated = 0
    n_skipped = 0
    for row in rows:
        ids, mask = render_chat(row['messages'], tok)
        n_cut = len(ids) - (block_size + 1)  # the model reads ids[:-1] and predicts ids[1:]
        if n_cut > 0:
            ids = ids[n_cut:]
            mask = mask[n_cut:]
            # A response of weight 0 may be all that is left.
            if not keeps_a_question(row['messages'], n_cut, tok) or not any(mask[1:]):
                n_skipped += 1
                continue
            n_truncated += 1
        examples.append((torch.tensor(ids), torch.tensor(mask)))
    if verbose and n_truncated + n_skipped:
        print(f'of {len(rows)} examples, skipped {n_skipped} (no room for a question in block_size '
              f'{block_size}), truncated {n_truncated} on the left')
    if not examples:
        raise ValueError(f'no example fits in block_size {block_size}')
    return examples


def get_batch(examples):
    """Examples padded on the right: x (B, T), y the same shifted by one, and mask (B, T), 1 where y
    counts. The tokens of a causal model do not see padding on their right, so it needs no further
    mask."""
    ids = pad_sequence([ids for ids, _ in examples], batch_first=True)
    mask = pad_sequence([mask for _, mask in examples], batch_first=True)
    return ids[:, :-1], ids[:, 1:], mask[:, 1:]


def masked_loss(logits, targets, mask, total=None):
    """
    Cross-entropy in nats per token where mask is 1. logits (B, T, V), or (N, V) of the N tokens
    where mask is 1; targets and mask (B, T) -> scalar.

    It is the sum divided by `total`, the number of such tokens in the whole accumulated batch of
    all ranks (None = in this batch), so that every token has the same weight however a batch is
    divided. The mask is by position, not by id: the end token counts even if its id is that of
    padding.
    """
    if logits.dim() == 3:
        logits = logits[mask > 0]
    loss = F.cross_entropy(logits.float(), targets[mask > 0], reduction='sum')
    return loss / (mask.sum() if total is None else total)


def order_by_length(examples, curriculum):
    """The numbers of all examples (ids, mask), the shortest first. The length is that of the whole
    example, or with the curriculum 'short_prompts' that of the prompt, which the mask does not
    count."""
    lengths = []
    for ids, mask in examples:
        n_response = mask.sum().item() if curriculum == 'short_prompts' else 0
        lengths.append(len(ids) - n_response)
    return sorted(range(len(examples)), key=lambda i: lengths[i])


def curriculum_stage(step, n_examples, stages, last_stage_at):
    """
    A curriculum from short to long (arXiv 2108.02170): returns (stage, first step of it, number of
    examples in use, the shortest first). The last stage, of all examples, begins at step
    last_stage_at.

    >>> curriculum_stage(0, n_examples=100, stages=4, last_stage_at=60)
    (0, 0, 25)
    >>> curriculum_stage(45, n_examples=100, stages=4, last_stage_at=60)
    (2, 40, 75)
    """
    starts = [round(last_stage_at * i / max(1, stages - 1)) for i in range(stages)]
    stage = sum(step >= start for start in starts) - 1
    return stage, starts[stage], math.ceil(n_examples * (stage + 1) / stages)


def batch_indices(by_length, step, config):
    """
    The examples of a step, for all ranks together: the next ones in an endless sequence of
    permutations, a function of (seed, step). They are sorted by length, so that those of a
    micro-batch need little padding. by_length: the numbers of all examples, from order_by_length.
    """
    count = config['gradient_accumulation_steps'] * config['batch_size']
    stage, stage_start, n = 0, 0, len(by_length)
    if config['curriculum'] != 'none':
        last_stage_at = config['max_iters'] * config['curriculum_frac']
        stage, stage_start, n = curriculum_stage(step, n, config['curriculum_stages'],
                                                 last_stage_at)
    # The numbers of this step's examples in ascending order, which by_length makes one of lengths.
    n_steps = 1  # that are sorted together
    order = grouped_order(n, step - stage_start, count, n_steps, config['seed'], 'batches', stage)
    return [by_length[i] for i in order]


def token_f1(response, gold):
    """Harmonic mean of precision and recall of the words of a response (SQuAD, arXiv 1606.05250).

    >>> token_f1('the old king', 'the king sleeps')  # two words in common, three in each
    0.6666666666666666
    """
    a = response.split()
    b = gold.split()
    if not a and not b:
        return 1.0
    n_common = sum((Counter(a) & Counter(b)).values())
    return 2 * n_common / (len(a) + len(b))


def rouge_l(response, gold):
    """Harmonic mean of precision and recall of the longest common subsequence of words (ROUGE-L,
    Lin 2004).

    >>> rouge_l('king the old', 'the king sleeps')   # only one word in the same order
    0.3333333333333333
    """
    a = response.split()
    b = gold.split()
    if not a and not b:
        return 1.0
    # row[j]: length of the longest common subsequence of the words of a so far and of b[:j]
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return 2 * row[-1] / (len(a) + len(b))


@torch.no_grad()
def response_loss(model, examples, batch_size, run):
    """Nats per token of the gold responses, over all examples."""
    total = 0.0
    count = 0
    examples = sorted(examples, key=lambda example: len(example[0]))
    with evaluation_mode(model):
        for i in range(0, len(examples), batch_size):
            x, y, mask = [t.to(run.device) for t in get_batch(examples[i:i + batch_size])]
            with run.autocast:
                logits, _ = model(x, read=mask.nonzero(as_tuple=True))
            total += masked_loss(logits, y, mask, total=1).item()  # the sum
            count += mask.sum().item()
    return total / count


def evaluate(model, tok, rows, prompts, draws, max_new_tokens, run, generator):
    """
    Returns (figures, responses). The responses are the greedy ones. The figures tell how these, and
    `draws` samples of each prompt at temperature 1, agree with the gold responses of the rows, also
    for each "op" that rows have.
    """
    gold = [row['messages'][-1]['content'] for row in rows]
    with run.autocast:
        greedy = answer(model, tok, prompts, max_new_tokens, temperature=0)
        sampled = answer(model, tok, prompts * draws, max_new_tokens, generator=generator)
    responses = [text for text, _ in greedy]
    n = len(rows)
    figures = {
        'exact_match': exact_match(responses, gold),
        'exact_match_sampled': exact_match([text for text, _ in sampled], gold * draws),
        'token_f1': sum(map(token_f1, responses, gold)) / n,
        'rouge_l': sum(map(rouge_l, responses, gold)) / n,
        'ended': sum(ended for _, ended in greedy) / n,
        'ended_sampled': sum(ended for _, ended in sampled) / len(sampled),
    }
    for op in sorted({row['op'] for row in rows if 'op' in row}):
        chosen = [i for i, row in enumerate(rows) if row.get('op') == op]
        figures[f'exact_match/{op}'] = exact_match([responses[i] for i in chosen],
                                                   [gold[i] for i in chosen])
    return figures, responses


def make_checkpoint(step, model, optimizers, scaler, config, tok):
    """What a run needs to resume, and what the next stage needs to start from it."""
    return {'stage': 'sft', 'step': step, 'model': model.state_dict(),
            'model_args': asdict(model.config), 'config': config,
            'tokenizer': tok.to_dict(), 'eos_ids': tok.eos_ids,
            'optimizer': [o.state_dict() for o in optimizers], 'scaler': scaler.state_dict()}


if __name__ == '__main__':
    # 1. settings; a resumed run continues with its own
    config, overrides = configure(globals())
    config, checkpoint = resume(config, overrides, fixed={'optimizer', 'dataset'})
    globals().update(config)
    first_step = checkpoint.get('step', 0)
    check_choice(config, 'curriculum', ('none', 'short_prompts', 'short_examples'))

    # 2. model and data
    model, tok = load_chat_model(checkpoint or init_from, config)  # the checkpoint on resume
    train_rows = load_examples(dataset, 'sft_train', 'sft')
    val_rows = load_examples(dataset, 'sft_val', 'sft')
    # The test prompts have gold responses, so they can be read as demonstrations.
    test_rows = load_examples(dataset, test_split, 'sft', default=val_rows)[:test_prompts]
    train_examples = prepare_examples(train_rows, tok, model.config.block_size)
    val_examples = prepare_examples(val_rows, tok, model.config.block_size)
    by_length = order_by_length(train_examples, curriculum)
    eval_rows = val_rows[:eval_prompts]
    val_prompts = encode_prompts([row['messages'][:-1] for row in eval_rows], tok,
                                 model.config.block_size, max_new_tokens)

    # 3. machine, optimizer, log
    sequences = gradient_accumulation_steps * batch_size  # per step, over all ranks
    mean_length = sum(len(ids) for ids, _ in train_examples) / len(train_examples)
    tokens_per_step = mean_length * sequences
    flops_per_token = model.flops_per_token(round(mean_length))
    run = start_run(config, flops=flops_per_token * tokens_per_step * max_iters)
    model.to(run.device)
    optimizers = model.optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), muon_lr)
    restore_optimizers(optimizers, checkpoint)
    if checkpoint.get('scaler'):
        run.scaler.load_state_dict(checkpoint['scaler'])
    check_divisible(run, 'gradient_accumulation_steps', gradient_accumulation_steps)
    # The same model, compiled or averaging gradients over ranks, for the passes of training.
    wrapped = parallel(model, run, dynamic=True)
    log_dir = os.path.join(out_dir, 'eval') if eval_only else out_dir
    logger = Logger(log_dir, config, checkpoint.get('step'), run.is_master)
    if run.is_master:
        tok.save(os.path.join(log_dir, 'tokenizer.json'))
    stop = StopSignal()
    machine_flops = peak_flops(run) * run.world_size
    if run.is_master:
        n_epochs = max_iters * sequences / len(train_examples)
        print(printable(
            f'{model.n_params():,} parameters; {dataset}: {len(train_examples):,} + '
            f'{len(val_examples):,} examples; {tokens_per_step:,.0f} tokens per step; '
            f'{max_iters:,} steps are {n_epochs:,.1f} epochs'))

    began = time.perf_counter()
    last_time = began
    saved_step = first_step
    # The last pass only saves what was trained; the final figures come after the loop.
    for step in range(first_step, max(first_step, max_iters) + 1):
        # 4. learning rate
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = group['peak_lr'] * schedule_factor(step, config)

        # 5. save, evaluate, show a few responses
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters or eval_only
        is_due = step > first_step and (step >= max_iters or step % eval_interval == 0)
        # Saved before the evaluation, so that a crash in it loses nothing.
        if (stopping or is_due) and not eval_only:
            saved_step = step
            if run.is_master:
                snapshot = make_checkpoint(step, model, optimizers, run.scaler, config, tok)
                save_checkpoint(out_dir, snapshot, final=done)
        if done:
            break
        if step % eval_interval == 0 and run.is_master:
            print(f'evaluating on {len(eval_rows):,} prompts', flush=True)
            figures, responses = evaluate(model, tok, eval_rows, val_prompts, 1, max_new_tokens,
                                          run, generator_for(seed, 'evaluation', step,
                                                             device=run.device))
            # A part is enough here; the final response_loss is that of all examples.
            loss = response_loss(model, val_examples[:1000], batch_size, run)
            logger.log(step, {'response_loss': loss, **figures})
            for row, response in zip(eval_rows[:4], responses):
                prompt = row['messages'][-2]['content']
                gold = row['messages'][-1]['content']
                verdict = '' if response == gold else f'   (gold: {one_line(gold)})'
                print(f'    {one_line(prompt)} -> {one_line(response)}{verdict}', flush=True)
            last_time = time.perf_counter()

        # 6. forward and backward, one micro-batch at a time
        model.train()
        torch.manual_seed(seed_for(seed, 'dropout', step, run.rank))
        examples = [train_examples[i] for i in batch_indices(by_length, step, config)]
        n_targets = sum(mask[1:].sum().item() for _, mask in examples)  # over all ranks
        micro_batches = [examples[i:i + batch_size] for i in range(0, sequences, batch_size)]
        micro_batches = micro_batches[run.rank::run.world_size]
        loss = 0.0
        for i, micro_batch in enumerate(micro_batches):
            x, y, mask = [t.to(run.device, non_blocking=True) for t in get_batch(micro_batch)]
            if run.world_size > 1:
                # The ranks exchange gradients once per step, after the last micro-batch.
                wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            with run.autocast:
                # Logits are needed only where the mask is 1.
                logits, _ = wrapped(x, read=mask.nonzero(as_tuple=True))
                micro_loss = masked_loss(logits, y, mask, n_targets)
            # DDP takes the mean over the ranks, but this loss is to be summed over them.
            total = micro_loss * run.world_size
            total = total + moe_aux_weight * model.aux_loss() / len(micro_batches)
            run.scaler.scale(total).backward()
            loss += micro_loss.detach()

        # 7. clip and step
        for o in optimizers:
            run.scaler.unscale_(o)
        skip_idle_experts(model)  # experts without tokens stay as they are
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        # raises an error if the run has diverged
        skipped = must_skip(run, grad_norm, loss, step, out_dir, saved_step)
        for o in optimizers:
            if not skipped:
                run.scaler.step(o)
            o.zero_grad(set_to_none=True)
        run.scaler.update()

        # 8. log
        now = time.perf_counter()
        if step % log_interval == 0:
            metrics = {'loss': sum_over_ranks(loss).item(),
                       'lr': optimizers[0].param_groups[0]['lr']}
            if len(optimizers) > 1:
                metrics['muon_lr'] = optimizers[1].param_groups[0]['lr']
            if skipped:
                metrics['skipped'] = 1
            else:
                metrics['grad_norm'] = grad_norm.item()
            metrics['ms'] = 1000 * (now - last_time)
            n_tokens = sum(len(ids) - 1 for ids, _ in examples)  # over all ranks
            metrics['tokens_per_second'] = n_tokens / (now - last_time)
            metrics['mfu'] = metrics['tokens_per_second'] * flops_per_token / machine_flops
            logger.log(step, metrics)
        last_time = now

    # 9. the end: the figures of the test prompts, and the loss of all validation responses
    stop.end_training(run, stopping, step, config)  # other ranks, and a stopped run, exit here
    seconds = time.perf_counter() - began
    print(f'evaluating on {len(test_rows):,} prompts, with {1 + test_draws} responses each',
          flush=True)
    test_prompt_ids = encode_prompts([row['messages'][:-1] for row in test_rows], tok,
                                     model.config.block_size, max_new_tokens)
    figures, _ = evaluate(model, tok, test_rows, test_prompt_ids, test_draws, max_new_tokens, run,
                          generator_for(seed, 'test', device=run.device))
    figures['response_loss'] = response_loss(model, val_examples, batch_size, run)
    for name, value in figures.items():
        print(printable(f'    {name:24} {value:8.4f}'))
    logger.final({**figures, 'seconds': seconds, 'peak_memory_mb': peak_memory_mb(run.device_type),
                  'steps': step, 'parameters': model.n_params()})
    draw_curves([log_dir], os.path.join(log_dir, 'curves.png'))
