"""
Train a language model on a dataset of tokens, from scratch or from any checkpoint.

    python train.py                                   the default: Shakespeare's plays, on whatever is here
    python train.py config/train_gpt2.py              a config file
    python train.py --tokenizer=byte --n_layer=6      settings
    python train.py --init_from=resume                go on after a stop, with the run's own settings
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

The dataset is prepared first if it is not there yet. Every random choice is a function of (seed, step):
a run that was resumed, on as many ranks as you like, sees the batches of one that never stopped.
"""
import math, os, time
from dataclasses import asdict
import numpy as np
import torch
from bpe import NAMED, printable
from configurator import (Logger, StopSignal, at_least_one, configure, diverged, learning_rate_at, load_checkpoint,
                          parallel, peak_memory_mb, resume, rng, save_checkpoint, seed_for, start_run, sum_over_ranks)
from data.dataset import load_dataset
from data.pretrained import load_model
from model import GPTConfig

# -----------------------------------------------------------------------------
# where and when
out_dir = 'out/base'               # folder of the run: checkpoints, log, curves
init_from = 'scratch'              # 'scratch' | 'resume' | a run's folder | a Hugging Face folder or name
seed = 1337                        # every random choice is a function of (seed, step)
eval_interval = 200                # steps between evaluations, each with a sample and a checkpoint
eval_iters = 20                    # validation batches, evenly spread; 0 = the whole validation set
eval_only = False                  # evaluate once, log it in out_dir/eval, and stop
log_interval = 10                  # steps between lines of the log
sample_tokens = 128                # tokens sampled at each evaluation
always_save_checkpoint = True      # False = only when the validation loss improves
tensorboard_log = False            # log to out_dir/tensorboard
wandb_log = False                  # log to Weights & Biases
wandb_project = 'nanollm'
wandb_run_name = 'base'
# data
dataset = 'shakespeare'            # a folder of data/, or the full path of one elsewhere
tokenizer = ''                     # 'byte' | 'bpe' | 'gpt2' | a tokenizer.json; '' = as the dataset was prepared
vocab_size = 0                     # of a 'bpe' tokenizer; 0 = as the dataset was prepared
gradient_accumulation_steps = 1    # micro-batches a step, over all ranks together
batch_size = 16                    # sequences in a micro-batch
block_size = 128                   # tokens of context
# model: see GPTConfig in model.py
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
mlp = 'relu2'                      # 'gelu' | 'gelu_tanh' | 'swiglu' | 'relu2'
qk_norm = True                     # RMSNorm on queries and keys
window = 0                         # a token sees the last `window` tokens; 0 = all
n_sink = 0                         # first tokens that stay visible behind the window
n_expert = 0                       # experts a layer (mixture of experts); 0 = dense
n_expert_active = 2                # experts a token is sent to
n_shared_expert = 0                # experts that see every token, beside those
moe_every = 1                      # 2 = every other layer stays dense
moe_balance = 'aux'                # what keeps all experts in use: 'aux' (a loss) | 'bias' (of the choice) | 'none'
moe_aux_weight = 0.01              # weight of the loss of 'aux'
moe_bias_rate = 0.01               # how far 'bias' moves in a step; 0.001 in runs of many thousands
moe_z_weight = 0.001               # weight of the loss that keeps the routers' logits small
tie_weights = True                 # the output head is the token embedding
attn = 'auto'                      # 'auto' | 'sdpa' (PyTorch's fused attention) | 'manual' (by hand)
# optimizer and schedule
optimizer = 'muon'                 # 'muon' (matrices of the blocks; AdamW for the rest) | 'adamw'
learning_rate = 6e-3               # of AdamW, at the top of the schedule
muon_lr = 0.03                     # of Muon, on the same schedule
max_iters = 800
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0                    # largest gradient norm; 0 = no clipping
decay_lr = True                    # False = constant after warm-up
lr_schedule = 'linear'             # 'cosine' | 'linear' | 'wsd' (warm-up, stable, decay) | 'constant'
cooldown_frac = 0.2                # share of a 'wsd' schedule that decays
warmup_iters = 20
lr_decay_iters = 0                 # step at which min_lr is reached; 0 = max_iters
min_lr = 0.0
# machine
backend = 'nccl'                   # of torch.distributed on GPUs; on CPUs it is gloo
device = 'auto'                    # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'                     # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = 'auto'                   # 'auto' | True | False: torch.compile
# -----------------------------------------------------------------------------

def get_batch(data, starts, block_size, vocab_size):
    """Sequences of block_size tokens from each start: x (B, T), and y, the same shifted by one, so that
    y[:, t] is what follows x[:, t]. ValueError for an id that the vocabulary does not have."""
    tokens = data[np.asarray(starts)[:, None] + np.arange(block_size + 1)].astype(np.int64)
    if tokens.max() >= vocab_size:
        row, column = np.unravel_index(tokens.argmax(), tokens.shape)
        raise ValueError(f'{data.filename}: token {tokens.max()} at offset {int(starts[row]) + column}, but the '
                         f'vocabulary has {vocab_size}; prepare the dataset again')
    return torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])

def batch_starts(n_tokens, step, config):
    """Where the sequences of a step begin, for all ranks together: a function of (seed, step) alone."""
    count = config['gradient_accumulation_steps'] * config['batch_size']
    return torch.randint(n_tokens - config['block_size'], (count,), generator=rng(config['seed'], step))

@torch.no_grad()
def evaluate(model, data, config, run):
    """Validation loss, nats a token: over the whole of `data` in blocks of block_size side by side, or over
    eval_iters batches of them, evenly spread and always the same. The ranks share the work."""
    T, B, training = config['block_size'], config['batch_size'], model.training
    starts = np.arange(0, len(data) - T, T)
    if config['eval_iters']:
        starts = starts[np.unique(np.linspace(0, len(starts) - 1, config['eval_iters'] * B).astype(int))]
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    for i in range(run.rank * B, len(starts), run.world * B):
        x, y = get_batch(data, starts[i:i + B], T, model.config.vocab_size)
        with run.autocast:
            _, loss = model(x.to(run.device), y.to(run.device))
        total += torch.tensor([loss.item() * y.numel(), y.numel()])
    model.train(training)
    total = sum_over_ranks(total.to(run.device, torch.float32 if run.type == 'mps' else torch.float64))
    return (total[0] / total[1]).item()

if __name__ == "__main__":
    config = configure(globals())

    # 1. data, model, machine
    checkpoint = resume(config, {'optimizer', *GPTConfig.__dataclass_fields__} - {'dropout', 'attn'})
    globals().update(config)
    at_least_one(config, 'eval_interval', 'log_interval', 'batch_size', 'gradient_accumulation_steps')
    train_data, val_data, meta, tok = load_dataset(dataset, block_size, tokenizer, vocab_size)
    if (name := meta['tokenizer']['name']) in NAMED:  # the run's own, should the data be prepared anew
        config.update(tokenizer=name, vocab_size=tok.vocab_size if name == 'bpe' else 0)
    model, tok = load_model(checkpoint or init_from, config, tok)
    if not checkpoint and init_from != 'scratch':  # its architecture stands
        own = {k: v for k, v in vars(model.config).items() if k in config and k not in ('block_size', 'vocab_size')}
        asked = {k: config[k] for k in configure.given & own.keys()}
        if other := [k for k in asked if getattr(GPTConfig(**vars(model.config) | asked), k) != own[k]]:
            raise ValueError(f'{other[0]}={config[other[0]]!r}: {init_from} has {own[other[0]]!r}; leave it out')
        config.update(own)
    if block_size > model.config.block_size:
        raise ValueError(f'block_size {block_size} is more than the {model.config.block_size} of {init_from}')
    first, best_val_loss = checkpoint.get('step', 0), checkpoint.get('best_val_loss', math.inf)
    if checkpoint and os.path.exists(f'{out_dir}/ckpt_best.pt'):  # it may be of the evaluation right after the last save
        best_val_loss = min(best_val_loss, load_checkpoint(out_dir, 'ckpt_best.pt').get('best_val_loss', math.inf))
    sequences = gradient_accumulation_steps * batch_size  # a step's, over all ranks
    run = start_run(config, flops=model.flops_per_token(block_size) * sequences * block_size * max_iters)
    optimizers = model.to(run.device).optimizers(optimizer, learning_rate, weight_decay, (beta1, beta2), muon_lr)
    for o, old in zip(optimizers, checkpoint.get('optimizer', [])):  # the moments, under this run's settings
        o.load_state_dict({'state': old['state'], 'param_groups': o.state_dict()['param_groups']})
    steps = f'gradient_accumulation_steps {gradient_accumulation_steps} * batch_size {batch_size} ='
    trained = parallel(model, run, **{steps: sequences})
    logger = Logger(f'{out_dir}/eval' if eval_only else out_dir, config, checkpoint.get('step'), run.master)
    stop = StopSignal()
    bytes_per_token = meta['val_bytes'] / meta['val_tokens']
    if run.master:
        print(f'{model.n_params():,} parameters; {dataset}: {len(train_data):,} + {len(val_data):,} tokens of '
              f'{bytes_per_token:.2f} bytes; {sequences * block_size:,} tokens a step')

    def snapshot(step):
        return {'stage': 'train', 'step': step, 'model': model.state_dict(), 'model_args': asdict(model.config),
                'optimizer': [o.state_dict() for o in optimizers], 'config': config, 'tokenizer': tok.to_dict(),
                'best_val_loss': best_val_loss}

    began = last_time = time.time()
    train_seconds, saved = 0.0, first
    for step in range(first, max(first, max_iters) + 1):
        # 2. learning rate
        lr = learning_rate_at(step, config)
        for group in (g for o in optimizers for g in o.param_groups):
            group['lr'] = lr * group['lr_scale']

        # 3. save, evaluate, sample
        stopping = stop.by_any_rank(run)
        done = stopping or step >= max_iters
        if done or eval_only or step % eval_interval == 0:
            if not math.isfinite(val_loss := evaluate(model, val_data[:block_size + 1], config, run)):
                raise diverged(step, out_dir, saved, val_loss=val_loss)  # a block is enough to see it, and nothing is saved
            if (stopping or always_save_checkpoint and step > first) and not eval_only:
                saved = step
                if run.master:
                    save_checkpoint(out_dir, snapshot(step), final=done)
            if stopping:
                break
            whole = step >= max_iters and not eval_only  # the last figure is of the whole validation set
            val_loss = measure = evaluate(model, val_data, config, run)  # the best is chosen by one measure throughout
            if whole and eval_iters:
                val_loss = evaluate(model, val_data, dict(config, eval_iters=0), run)
            val_bpb = val_loss / bytes_per_token / math.log(2)
            logger.log(step, {'val_loss': val_loss, 'val_bpb': val_bpb})
            if measure < best_val_loss and not eval_only:
                best_val_loss, saved = measure, step
                if run.master:
                    save_checkpoint(out_dir, snapshot(step), 'ckpt_best.pt', final=done)
                if run.master and not always_save_checkpoint:         # else it is written above
                    save_checkpoint(out_dir, snapshot(step), final=done)
            if run.master and sample_tokens:
                ids = model.generate(torch.tensor([tok.encode('\n')], device=run.device), sample_tokens,
                                     temperature=0.8, generator=rng(seed, step, device=run.device))
                print(printable(tok.decode(ids[0].tolist())), flush=True)
            last_time = time.time()
        if done or eval_only:
            break

        # 4. forward and backward, a micro-batch at a time
        torch.manual_seed(seed_for(seed, step, run.rank))  # the dropout masks of this step
        mine = batch_starts(len(train_data), step, config).chunk(run.world)[run.rank]
        micro_batches, loss = mine.split(batch_size), 0.0
        for i, starts in enumerate(micro_batches):
            x, y = get_batch(train_data, starts, block_size, model.config.vocab_size)
            if run.world > 1:  # the ranks exchange gradients once a step
                trained.require_backward_grad_sync = i == len(micro_batches) - 1
            with run.autocast:
                _, micro_loss = trained(x.to(run.device, non_blocking=True), y.to(run.device, non_blocking=True))
                total = micro_loss + moe_aux_weight * model.aux_loss() + moe_z_weight * model.aux_loss('z')
            run.scaler.scale(total * (len(starts) / len(mine))).backward()
            loss += micro_loss.detach() * (len(starts) / len(mine))

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
        balance = model.balance(moe_bias_rate) if model.config.n_expert else {}

        # 6. log
        if step % log_interval == 0:
            loss = sum_over_ranks(loss).item() / run.world  # waits for the GPU, so it comes before the clock is read
        now = time.time()
        train_seconds += now - last_time
        if step % log_interval == 0:
            logger.log(step, {'loss': loss, 'lr': lr, 'grad_norm': grad_norm.item(), 'ms': 1000 * (now - last_time),
                              'tokens_per_second': sequences * block_size / (now - last_time), **balance})
        last_time = now

    # 7. the end
    stop.leave(run, stopping, step, out_dir)
    logger.final({'val_loss': val_loss, 'val_bpb': val_bpb, 'val_nats_per_byte': val_bpb * math.log(2),
                  'tokens_per_second': (step - first) * sequences * block_size / max(train_seconds, 1e-9),
                  'seconds': time.time() - began, 'peak_memory_mb': peak_memory_mb(run.type), 'steps': step,
                  'parameters': model.n_params()})
