"""
Train a language model on a dataset of tokens, from scratch or from any checkpoint.

    python train.py                                      Shakespeare's plays, on this machine
    python train.py config/train_gpt2.py                 with a config file
    python train.py --tokenizer=byte --n_layer=6         with settings
    python train.py --init_from=resume                   continue a stopped run, with its settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

A dataset that is missing is prepared first. The batches of a step are a function of the seed and
the step alone, so a resumed run, on any number of ranks, sees those of a run that never stopped.
"""
import math
import os
import time
from dataclasses import asdict

# configurator comes first: it answers --help before torch is loaded
from configurator import (Logger, StopSignal, check_divisible, configure, divergence_error,
                          generator_for, is_rank_0, must_skip, parallel, peak_flops,
                          peak_memory_mb, printable, read_checkpoint, restore_optimizers, resume,
                          save_checkpoint, schedule_factor, seed_for, start_run, sum_over_ranks)
import numpy as np
import torch

from assets.draw import draw_curves
from bpe import NAMED_TOKENIZERS
from data.dataset import load_dataset
from data.pretrained import export_problem, load_model
from model import GPTConfig, evaluation_mode, skip_idle_experts, widest_float

# -----------------------------------------------------------------------------
# the run
out_dir = 'out/base'               # folder of the run: checkpoints, log, curves
init_from = 'scratch'              # 'scratch' | 'resume' | a run's folder | a Hugging Face model
seed = 1337                        # all random choices follow from it
eval_interval = 200                # steps between evaluations, with a sample and a checkpoint
eval_iters = 20                    # validation batches, evenly spread; 0 = the whole validation set
eval_only = False                  # evaluate once, log it in out_dir/eval, and stop
log_interval = 10                  # steps between lines of the log
sample_tokens = 128                # tokens sampled at each evaluation
always_save_checkpoint = True      # False = only if the validation loss improves, or on a stop
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases
wandb_project = 'nanollm'
wandb_run_name = ''                # '' = the name of the folder
# data
dataset = 'shakespeare'            # a folder of data/, or the full path of a folder elsewhere
tokenizer = 'bpe'                  # 'byte' | 'bpe' | 'gpt2' | a tokenizer.json or its folder |
                                   # '' = as the dataset was prepared; the default is '' if
                                   # --dataset is given
vocab_size = 2048                  # of a 'bpe' tokenizer; 0 = as the dataset was prepared
gradient_accumulation_steps = 1    # micro-batches per step, over all ranks together
batch_size = 16                    # sequences per micro-batch
block_size = 128                   # context length, in tokens
# model: see GPTConfig in model.py; its other flags cannot be set here
n_layer = 4
n_head = 4
n_kv_head = 0                      # key/value heads (grouped-query attention); 0 = n_head
n_embd = 128
head_dim = 0                       # 0 = n_embd / n_head
n_hidden = 0                       # width of the MLP; 0 = the usual one
dropout = 0.0
bias = False                       # in linear layers and LayerNorm
norm = 'rmsnorm'                   # 'layernorm' | 'rmsnorm'
pos = 'rope'                       # 'learned' | 'sinusoidal' | 'rope'
rope_base = 10000.0
mlp = 'swiglu'                     # 'gelu' | 'gelu_tanh' | 'swiglu' | 'relu2'
qk_norm = True                     # RMSNorm on queries and keys
window = 0                         # a token sees the last `window` tokens; 0 = all
n_sink = 0                         # first tokens that stay visible behind the window
n_expert = 0                       # experts per layer (mixture of experts); 0 = dense
n_expert_active = 2                # experts per token
n_shared_expert = 0                # further experts that see every token
moe_every = 1                      # 2 = every other layer stays dense
moe_balance = 'aux'                # how the load is balanced: 'aux' (a loss) | 'bias' | 'none'
moe_aux_weight = 0.01              # weight of the load-balancing loss of 'aux'
moe_bias_rate = 0.01               # change of the bias per step; 0.001 in long runs
moe_z_weight = 0.001               # weight of the loss that keeps the routers' logits small
tie_weights = True                 # the output layer is the token embedding
attn = 'auto'                      # 'auto', 'sdpa' (PyTorch's fused attention) | 'manual' (by hand)
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 6e-3               # of AdamW, at the peak of the schedule
muon_lr = 0.03                     # of Muon, on the same schedule
max_iters = 800                    # steps
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
decay_lr = True                    # False = learning_rate at every step, without warm-up
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' (stable, then decay) | 'constant'
cooldown_frac = 0.2                # share of a 'wsd' schedule that decays
warmup_iters = 20
lr_decay_iters = 0                 # step at which min_lr is reached; 0 = max_iters
min_lr = 0.0                       # of AdamW; other rates fall by the same factor
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------

# The flags of the architecture that a loaded model keeps. Of the others, block_size may grow,
# vocab_size follows from the tokenizer, and dropout and attn do not change what a model computes.
ARCHITECTURE = {name for name in GPTConfig.__dataclass_fields__
                if name not in ('block_size', 'vocab_size', 'dropout', 'attn')}


def get_batch(data, starts, block_size, vocab_size):
    """
    Sequences of block_size tokens of data, an np.memmap, from each start: x (B, T) and y, the same
    shifted by one, so that y[:, t] is the token after x[:, t]. ValueError for an id that is not in
    the vocabulary.
    """
    offsets = np.asarray(starts)[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    tokens = data[offsets].astype(np.int64)
    if tokens.max() >= vocab_size:
        row, column = np.unravel_index(tokens.argmax(), tokens.shape)
        raise ValueError(f'{data.filename}: token {tokens.max()} at offset {offsets[row, column]}, '
                         f'but the vocabulary has {vocab_size}; prepare the dataset again')
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])


def batch_starts(n_tokens, block_size, count, generator):
    """Random offsets at which `count` sequences begin: those of a step, for all ranks together."""
    return torch.randint(n_tokens - block_size, (count,), generator=generator)


@torch.no_grad()
def evaluate(model, data, block_size, batch_size, run, n_batches=0):
    """
    Validation loss in nats per token. n_batches=0: over all of `data`, each token but the first
    scored once, in adjacent blocks. Otherwise over n_batches batches of these blocks, evenly spread
    and always the same. The ranks share the work.
    """
    # 1. where the blocks start; the last block of the data may be shorter than the others
    starts = np.arange(0, len(data) - 1, block_size)
    full = starts[starts + block_size < len(data)]
    has_short_block = len(full) < len(starts)
    if n_batches:
        spread = np.linspace(0, len(full) - 1, n_batches * batch_size)
        full = full[np.unique(spread.astype(int))]
        has_short_block = False
    batches = [full[i:i + batch_size] for i in range(0, len(full), batch_size)]
    if has_short_block:
        batches.append(starts[-1:])

    # 2. sum of the losses, and number of the tokens
    total = torch.zeros(2, dtype=torch.float64)
    with evaluation_mode(model):
        for batch in batches[run.rank::run.world_size]:
            length = min(block_size, len(data) - 1 - batch[0])
            x, y = get_batch(data, batch, length, model.config.vocab_size)
            with run.autocast:
                _, loss = model(x.to(run.device), y.to(run.device))
            total += torch.tensor([loss.item() * y.numel(), y.numel()])
    total = total.to(run.device, widest_float(run.device_type))
    loss_sum, n_tokens = sum_over_ranks(total).tolist()
    return loss_sum / n_tokens


def check_architecture(model, config, overrides, source):
    """
    Compare the architecture that this command line sets with that of the model loaded from
    `source`; the model's is always kept. overrides is {name: where}, as configure returns it.
    ValueError if an argument sets another architecture. A config file may set another one, because
    it serves new models too; the names of such files are returned.
    """
    has = model.config.resolved()
    ignored_files = []
    for name, where in overrides.items():
        if name not in ARCHITECTURE:
            continue
        # Of some flags 0 means the usual value, so n_kv_head 0 and 4 may be the same model.
        if config[name] in (has[name], getattr(model.config, name)):
            continue
        if where.startswith('--'):
            raise ValueError(f'{where}: {source} has {name}={has[name]!r}, which cannot change; '
                             'leave it out')
        file = where.rpartition(':')[0]  # where is 'file:line'
        if file not in ignored_files:
            ignored_files.append(file)
    return ignored_files


def choose_tokenizer(config, overrides):
    """The default tokenizer belongs to the default dataset. If the command line names another
    dataset or another tokenizer, what it leaves open becomes '' or 0: as the dataset was prepared.
    Returns the config."""
    if 'dataset' in overrides and 'tokenizer' not in overrides:
        config = dict(config, tokenizer='')
    if ('dataset' in overrides or 'tokenizer' in overrides) and 'vocab_size' not in overrides:
        config = dict(config, vocab_size=0)
    return config


def find_best_val_loss(out_dir, checkpoint):
    """The lowest validation loss of a run so far; infinity for a new one. ckpt_best.pt may know a
    lower one than ckpt.pt, which is usually saved before the evaluation."""
    best_val_loss = checkpoint.get('best_val_loss', math.inf)
    path = os.path.join(out_dir, 'ckpt_best.pt')
    if checkpoint and os.path.exists(path):
        try:
            best_val_loss = min(best_val_loss, read_checkpoint(path).get('best_val_loss', math.inf))
        except ValueError as error:
            if is_rank_0():
                print(printable(f'{error}; ignored'))
    return best_val_loss


def make_checkpoint(step, model, optimizers, scaler, config, tok, best_val_loss):
    """What a run needs to resume, and what the next stage needs to start from it."""
    return {'stage': 'train', 'step': step, 'model': model.state_dict(),
            'model_args': asdict(model.config), 'config': config,
            'tokenizer': tok.to_dict(), 'eos_ids': tok.eos_ids,
            'optimizer': [o.state_dict() for o in optimizers], 'scaler': scaler.state_dict(),
            'best_val_loss': best_val_loss}


if __name__ == '__main__':
    # 1. settings; a resumed run continues with its own
    config, overrides = configure(globals())
    config = choose_tokenizer(config, overrides)
    # A resumed run keeps its block_size too: it may grow only where a new run starts from a model.
    fixed = ARCHITECTURE | {'block_size', 'optimizer'}
    config, checkpoint = resume(config, overrides, fixed=fixed)
    globals().update(config)
    source = init_from  # the run's first starting point: resume() has restored init_from
    first_step = checkpoint.get('step', 0)

    # 2. data and model
    own_tokenizer = os.path.join(out_dir, 'tokenizer.json')
    if checkpoint and 'tokenizer' not in overrides and os.path.exists(own_tokenizer):
        # Tokens of the run's own tokenizer, also if the data was prepared again in the meantime.
        tokenizer = own_tokenizer
        vocab_size = 0
    train_data, val_data, meta, tok = load_dataset(dataset, block_size, tokenizer, vocab_size)
    tokenizer_name = meta['tokenizer']['name']
    model_settings = dict(config)
    if source != 'scratch' and 'block_size' not in overrides:
        # load_model extends the context to a larger block_size; without one it stays as it is.
        del model_settings['block_size']
    # On resume the model is that of the checkpoint, otherwise that of the source.
    model, tok = load_model(checkpoint or source, model_settings, tok)
    block_size = min(block_size, model.config.block_size)  # of the training sequences
    ignored_files = []
    if not checkpoint and source != 'scratch':
        ignored_files = check_architecture(model, config, overrides, source)

    # The settings to record: those above, and what they left open.
    recorded = dict(config, block_size=block_size)
    if tokenizer_name in NAMED_TOKENIZERS:
        # A resumed run asks for the tokenizer that was used. Only 'bpe' can have several sizes.
        recorded['tokenizer'] = tokenizer_name
        recorded['vocab_size'] = tok.vocab_size if tokenizer_name == 'bpe' else 0
    if source != 'scratch':
        # A loaded model has its own architecture, which comparisons of runs are to show.
        for name, value in model.config.resolved().items():
            if name in ARCHITECTURE and name in config:
                recorded[name] = value

    # 3. machine, optimizer, log
    sequences = gradient_accumulation_steps * batch_size  # per step, over all ranks
    tokens_per_step = sequences * block_size
    flops_per_token = model.flops_per_token(block_size)
    # From the work to do, start_run decides whether compiling is worth its time.
    run = start_run(config, flops=flops_per_token * tokens_per_step * max_iters)
    check_divisible(run, 'gradient_accumulation_steps * batch_size', sequences)
    model.to(run.device)
    optimizers = model.optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), muon_lr)
    restore_optimizers(optimizers, checkpoint)
    if checkpoint.get('scaler'):
        run.scaler.load_state_dict(checkpoint['scaler'])
    # The same model, compiled or averaging gradients over ranks, for the passes of training.
    wrapped = parallel(model, run)
    log_dir = os.path.join(out_dir, 'eval') if eval_only else out_dir
    logger = Logger(log_dir, recorded, checkpoint.get('step'), run.is_master)
    stop = StopSignal()
    machine_flops = peak_flops(run) * run.world_size
    bytes_per_token = meta['val_bytes'] / meta['val_tokens']
    if run.is_master:
        tok.save(os.path.join(log_dir, 'tokenizer.json'))
        print(printable(
            f'{model.n_params():,} parameters; {dataset}, tokenizer {tokenizer_name}: '
            f'{len(train_data):,} + {len(val_data):,} tokens of {bytes_per_token:.2f} bytes; '
            f'{tokens_per_step:,} tokens per step'))
        if ignored_files:
            print(printable(f"the architecture of {' and '.join(ignored_files)} is ignored: "
                            f'{source} has its own'))
        problem = export_problem(model.config)
        if problem:
            print(f'this model cannot be exported: {problem}')
    best_val_loss = find_best_val_loss(out_dir, checkpoint)

    began = time.perf_counter()
    last_time = began
    train_seconds = 0.0
    saved_step = first_step
    # The last pass only saves what was trained, and evaluates.
    for step in range(first_step, max(first_step, max_iters) + 1):
        # 4. learning rate
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = group['peak_lr'] * schedule_factor(step, config)

        # 5. save, evaluate, sample
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters
        if done or eval_only or step % eval_interval == 0:
            # A model that has diverged is not saved; one block is enough to see it.
            block_loss = evaluate(model, val_data[:block_size + 1], block_size, batch_size, run)
            if not math.isfinite(block_loss):
                raise divergence_error(step, out_dir, saved_step, val_loss=block_loss)
            # Saved before the evaluation, so that a crash in it loses nothing.
            should_save = stopping or (always_save_checkpoint and step > first_step)
            if should_save and not eval_only:
                saved_step = step
                if run.is_master:
                    snapshot = make_checkpoint(step, model, optimizers, run.scaler, recorded, tok,
                                               best_val_loss)
                    save_checkpoint(out_dir, snapshot, final=done)
            if stopping:
                break

            # The best model is chosen by the same batches throughout; the last figure of a run is
            # of the whole validation set.
            val_loss = evaluate(model, val_data, block_size, batch_size, run, eval_iters)
            # An equal loss is that of this step, if the run was killed after ckpt_best.pt was saved
            # and before ckpt.pt was.
            is_best = val_loss <= best_val_loss and not eval_only
            if is_best:
                best_val_loss = val_loss
                saved_step = step
            if is_best and run.is_master:
                snapshot = make_checkpoint(step, model, optimizers, run.scaler, recorded, tok,
                                           best_val_loss)
                save_checkpoint(out_dir, snapshot, 'ckpt_best.pt', final=done)
                if not always_save_checkpoint:
                    save_checkpoint(out_dir, snapshot, final=done)
            if step >= max_iters and eval_iters and not eval_only:
                if run.is_master:
                    print(f'evaluating on all {len(val_data):,} tokens of the validation set',
                          flush=True)
                val_loss = evaluate(model, val_data, block_size, batch_size, run)
            val_bpb = val_loss / bytes_per_token / math.log(2)
            logger.log(step, {'val_loss': val_loss, 'val_bpb': val_bpb})
            if run.is_master and sample_tokens:
                start = torch.tensor([tok.encode('\n')], device=run.device)
                generator = generator_for(seed, 'sample', step, device=run.device)
                ids = model.generate(start, sample_tokens, temperature=0.8, generator=generator,
                                     suppress=tok.missing_ids(model.config.vocab_size))
                print(printable(tok.decode(ids[0].tolist())), flush=True)
            last_time = time.perf_counter()
        if done or eval_only:
            break

        # 6. forward and backward, one micro-batch at a time
        torch.manual_seed(seed_for(seed, 'dropout', step, run.rank))
        starts = batch_starts(len(train_data), block_size, sequences,
                              generator_for(seed, 'batches', step))
        own_starts = starts.chunk(run.world_size)[run.rank]
        micro_batches = own_starts.split(batch_size)
        loss = 0.0
        for i, micro_starts in enumerate(micro_batches):
            x, y = get_batch(train_data, micro_starts, block_size, model.config.vocab_size)
            x = x.to(run.device, non_blocking=True)
            y = y.to(run.device, non_blocking=True)
            if run.world_size > 1:
                # The ranks exchange gradients once per step, after the last micro-batch.
                wrapped.require_backward_grad_sync = i == len(micro_batches) - 1
            with run.autocast:
                _, micro_loss = wrapped(x, y)
            total = (micro_loss + moe_aux_weight * model.aux_loss()
                     + moe_z_weight * model.aux_loss('z'))
            share = len(micro_starts) / len(own_starts)
            run.scaler.scale(total * share).backward()
            loss += micro_loss.detach() * share

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
        moe_metrics = model.balance_experts(moe_bias_rate) if model.config.n_expert else {}

        # 8. log
        now = time.perf_counter()
        train_seconds += now - last_time
        if step % log_interval == 0:
            loss = sum_over_ranks(loss).item() / run.world_size
            metrics = {'loss': loss, 'lr': optimizers[0].param_groups[0]['lr']}
            if len(optimizers) > 1:
                metrics['muon_lr'] = optimizers[1].param_groups[0]['lr']
            if skipped:
                metrics['skipped'] = 1
            else:
                metrics['grad_norm'] = grad_norm.item()
            metrics['ms'] = 1000 * (now - last_time)
            metrics['tokens_per_second'] = tokens_per_step / (now - last_time)
            metrics['mfu'] = metrics['tokens_per_second'] * flops_per_token / machine_flops
            logger.log(step, metrics | moe_metrics)
        last_time = now

    # 9. the end
    stop.end_training(run, stopping, step, config)  # other ranks, and a stopped run, exit here
    n_steps = step - first_step  # of this process
    logger.final({'val_loss': val_loss, 'val_bpb': val_bpb,
                  'val_nats_per_byte': val_loss / bytes_per_token,
                  'tokens_per_second': n_steps * tokens_per_step / max(train_seconds, 1e-9),
                  'seconds': time.perf_counter() - began,
                  'peak_memory_mb': peak_memory_mb(run.device_type), 'steps': step,
                  'parameters': model.n_params()})
    draw_curves([log_dir], os.path.join(log_dir, 'curves.png'))
