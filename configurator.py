"""
What every stage shares because it has one right answer: settings, the machine at hand, seeds, the learning-rate
schedule, checkpoints, the log. Run as a script it compares runs, the settings in which they differ beside their
results, and draws their curves in one picture (those that differ in the seed alone as a mean and its spread):

    python configurator.py out/a out/b --out=compare.png
"""
import ast, contextlib, difflib, dis, functools, glob, json, math, os, re, shutil, signal, sys, traceback, types
import numpy as np
import torch
from data.checkpoint import load_checkpoint, replacing, save_checkpoint, set_aside  # the scripts take the first from here

# ----- Settings: names assigned a literal between the first two rules of a script

def read_settings(path):
    """{name: comment} of the settings of a script, read from its source."""
    with open(path, encoding='utf-8') as f:
        block = re.split(r'(?m)^ *# -{20,}$', f.read())[1]
    return dict(re.findall(r'(?m)^ *(\w+) = .*?(?: # (.*))?$', block))

def check(where, key, value, settings):
    """`value` as the type that setting `key` has, or a ValueError that begins with `where`. An int is taken for
    a float; what is 'auto' may be a bool as well; text from the command line is read as the type needs."""
    if key not in settings:
        near = [*difflib.get_close_matches(key, settings, 1), 'help'][0]
        raise ValueError(f'{where}: there is no setting {key!r}; did you mean --{near}?')
    default, truth = settings[key], str(value).lower() in ('true', 'false')
    if isinstance(value, str) and (not isinstance(default, str) or default == 'auto' and truth):
        with contextlib.suppress(ValueError, SyntaxError):  # --learning_rate=3e-4, --compile=False, --stages=(8,64)
            value = ast.literal_eval(value.capitalize() if truth else value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) and not (default == 'auto' and isinstance(value, bool)):
        raise ValueError(f'{where}: {key} must be of type {type(default).__name__}, like {default!r}; got {value!r}')
    return value

def run_config_file(path, settings, defaults):
    """What a config file assigns, checked. It is Python (run only those you trust), in a namespace of its own that
    starts with the current settings; names that begin with '_' and imported modules are its own."""
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such config file (a setting is written --key=value)')
    names = dict(settings, __file__=path)
    try:
        with open(path, 'rb') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, names)
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        raise ValueError(f"{path}:{lines[-1] if lines else getattr(e, 'lineno', 0)}: {type(e).__name__}: {e}") from e
    lines = {i.argval: i.positions.lineno for i in dis.get_instructions(code) if i.opname == 'STORE_NAME'}
    return {key: check(f'{path}:{line}', key, names[key], defaults) for key, line in lines.items()
            if key in names and not (key.startswith('_') or isinstance(names[key], types.ModuleType))}

def configure(names):
    """Apply, in order, the config files and --key=value arguments of the command line to the settings among
    `names`, a script's globals(), and return all settings as a dict. From here on a user's mistake is one line on
    stderr and exit status 2; --debug=True shows where it was raised."""
    sys.excepthook = sys.__excepthook__ if '--debug=True' in sys.argv else one_line_errors
    comments, keys = read_settings(names['__file__']), [arg.partition('=')[0] for arg in sys.argv]
    settings = defaults = {key: names[key] for key in comments}
    configure.given = set()
    if '--help' in sys.argv or '-h' in sys.argv:
        print((names['__doc__'] or '').strip(), '\n\nSettings:')
        print(*(f'  --{key}={defaults[key]!r}'.ljust(40) + comment for key, comment in comments.items()), sep='\n')
        sys.exit(0)
    for arg in (arg for arg in sys.argv[1:] if arg != '--debug=True'):
        key, equals, value = arg.removeprefix('--').partition('=')
        if not arg.startswith('--'):
            new = run_config_file(arg, settings, defaults)
        elif not equals or keys.count(f'--{key}') > 1:
            raise ValueError(f'{arg}: ' + (f'{key} is given twice' if equals else 'a setting is written --key=value'))
        else:
            new = {key: check(arg, key, value, defaults)}
        settings = settings | new
        configure.given.update(new)
    names.update(settings)
    return settings

def at_least_one(config, *names):
    """ValueError naming the first of these settings that is below 1."""
    for name in names:
        if config[name] < 1:
            raise ValueError(f'{name} must be at least 1; got {config[name]}')

def one_of(config, **allowed):
    """ValueError naming the first of these settings that is none of the values allowed for it."""
    for name, values in allowed.items():
        if config[name] not in values:
            raise ValueError(f'{name} must be one of {", ".join(map(repr, values))}; got {config[name]!r}')

def resume(config, fixed):
    """The checkpoint in out_dir to go on from, of init_from='resume' or after a restart by torchrun; {} for a fresh
    start. The settings it was saved with become those of `config`, but for those given on this command line, which are
    said. ValueError for one of those that cannot change, `fixed`."""
    path = os.path.join(config['out_dir'], 'ckpt.pt')
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) and os.path.exists(path)
    if config['init_from'] != 'resume' and not restarted:
        return {}
    checkpoint, script = load_checkpoint(config['out_dir']), os.path.basename(sys.argv[0])
    saved, made_by = checkpoint['config'], {'dpo': 'reward'}.get(checkpoint.get('stage'), checkpoint.get('stage'))
    if made_by and f'{made_by}.py' != script:
        raise ValueError(f'{path} was made by {made_by}.py, not by {script}: resume it there, or name it by --init_from')
    for key in [key for key in config if key in saved and key != 'out_dir']:
        old, new = saved[key], config[key]
        if key not in configure.given or key == 'init_from':
            config[key] = old
        elif new != old and key in fixed:
            raise ValueError(f'{key}={new!r}: the run to resume has {old!r}, which cannot change; leave it out, or '
                             'start anew in another out_dir')
        elif new != old and os.environ.get('RANK', '0') == '0':
            print(f'{key}: {old!r} -> {new!r}')
    return checkpoint

def one_line_errors(kind, error, trace):
    """sys.excepthook: what a user can mend is said in one line, the rest keeps its traceback."""
    text = ' '.join(str(error).split())
    if issubclass(kind, ModuleNotFoundError):
        text += f': pip install {error.name}'
    if issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or 'not enough memory' in text or "can't allocate memory" in text:
        text = 'out of memory: lower batch_size (and raise gradient_accumulation_steps), minibatch_size, block_size or n_layer'
    elif not issubclass(kind, (ValueError, OSError, ImportError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {text or kind.__name__}', file=sys.stderr, flush=True)
    sys.exit(130 if kind is KeyboardInterrupt else 2)

# ----- The run: device, dtype, compile, ranks, seeds, schedule

def start_run(config, flops=math.inf):
    """Choose what is fastest and right on this machine where the settings say 'auto', join the ranks that torchrun
    started, and say what was chosen. `flops` is what the whole run will compute, by which compile='auto' tells
    whether it wins back a cold compile (15-60 s). Returns a namespace: device, type ('cuda' | 'cpu' | 'mps'), dtype,
    autocast (a context manager), scaler (of float16), compile, rank, world (their number), master (rank 0, which saves)."""
    env = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1} | os.environ
    rank, local_rank, world = (int(env[key]) for key in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    there = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    device = config['device'] if config['device'] != 'auto' else next(kind for kind in there if there[kind])
    kind, say = str(device).split(':')[0], functools.partial(print, flush=True) if rank == 0 else lambda *_: None
    for key, value, allowed in (('device', kind, there), ('compile', config['compile'], (True, False)),
                                ('dtype', config['dtype'], ('float32', 'bfloat16', 'float16'))):
        if value != 'auto' and value not in allowed:
            raise ValueError(f"{key} must be 'auto' or one of {', '.join(map(str, allowed))}; got {config[key]!r}")
    if not there[kind]:
        say(f'no {kind.upper()} here: running on the CPU')
        device = kind = 'cpu'
    if kind == 'cuda':
        device = f'cuda:{local_rank}' if world > 1 else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
    if world > 1:
        hook = sys.excepthook
        torch.distributed.init_process_group(config.get('backend') if kind == 'cuda' else 'gloo')
        sys.excepthook = hook  # it puts its own before ours, and then says nothing where ours exits
    # bfloat16 where the hardware multiplies in it; elsewhere it is emulated, and up to a hundred times slower
    fast = (kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)) or (
        kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()))
    name = config['dtype'] if config['dtype'] != 'auto' else 'bfloat16' if fast else 'float32'
    dtype, enough = getattr(torch, name), {'cuda': 1e15, 'cpu': 4e13, 'mps': math.inf}[kind]
    compiles = flops > enough if config['compile'] == 'auto' else config['compile']
    if compiles and not (torch.utils._triton.has_triton() if kind == 'cuda' else shutil.which(os.environ.get('CXX', 'g++'))):
        say(f"no {'Triton for this GPU' if kind == 'cuda' else 'C++ compiler'} here: running in eager mode")
        compiles = False
    say(f"device {device}, {name}, {'compiled' if compiles else 'eager'}, {world} rank{'s' * (world > 1)}")
    return types.SimpleNamespace(
        device=device, type=kind, dtype=dtype, compile=compiles, rank=rank, world=world, master=rank == 0,
        autocast=contextlib.nullcontext() if name == 'float32' else torch.autocast(kind, dtype),
        scaler=torch.amp.GradScaler(kind, enabled=name == 'float16'))

def parallel(model, run, dynamic=None, **shared):
    """The module to call in training: compiled where the run compiles (dynamic=True: for batches of any length, once); with
    several ranks, which must be able to share these numbers evenly, one that averages their gradients."""
    for name, number in shared.items():
        if number % run.world:
            raise ValueError(f'{name} {number} cannot be shared by {run.world} ranks; make it a multiple of {run.world}')
    model = torch.compile(model, dynamic=dynamic) if run.compile else model
    if run.world == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[run.device] if run.type == 'cuda' else None)

def sum_over_ranks(x):
    """The tensor x, summed over all ranks in place, where there are several."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x

def diverged(step, out_dir, saved, **numbers):
    """The error to raise for a loss or a gradient that is no number."""
    text = ', '.join(f'{k} {float(v):.4g}' for k, v in numbers.items())
    return ValueError(f'step {step}: {text}: the run has diverged; lower learning_rate or raise warmup_iters.' +
                      f' What {out_dir} holds is good, of step {saved}' * bool(glob.glob(f'{out_dir}/ckpt*.pt')))

def seed_for(seed, *where):
    """A seed, a pure function of (seed, step, ...), so that a resumed run draws what it would have drawn."""
    return int(np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)[0] >> np.uint64(1))

def rng(seed, *where, device='cpu'):
    """A torch.Generator seeded by seed_for."""
    return torch.Generator(device).manual_seed(seed_for(seed, *where))

class StopSignal:
    """SIGTERM and Ctrl-C end the step, not the process: the loop asks `requested`, saves, and leaves with
    `exit_code`. A second Ctrl-C quits at once."""
    requested, exit_code = False, 128 + signal.SIGTERM

    def __init__(self):
        signal.signal(signal.SIGTERM, self.handle), signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        self.requested, self.exit_code = True, 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def by_any_rank(self, run):
        """Whether a rank was asked to stop. All ranks ask together, so that they end after the same step."""
        return sum_over_ranks(torch.tensor(float(self.requested), device=run.device)).item() > 0

    def leave(self, run, stopping, step, out_dir):
        """The end of the ranks' work together: the first goes on alone, or where a signal ended it says how to go on and ends."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)  # as before
        if run.world > 1:
            torch.distributed.barrier()  # none leaves while another still works
            torch.distributed.destroy_process_group()
            if not run.master:  # it is done; where threads of gloo's still wind down an ordinary exit now and then aborts
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(self.exit_code if stopping else 0)
        if stopping:
            script = os.path.basename(sys.argv[0])
            print(f'stopped at step {step}; go on with: python {script} --init_from=resume --out_dir={out_dir}')
            sys.exit(self.exit_code)

def peak_memory_mb(kind='cpu'):
    """The most memory this process has held, in MB (2^20 bytes): on the GPU if there is one, else resident."""
    import resource  # not on Windows
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
    return torch.cuda.max_memory_allocated() / 2**20 if kind == 'cuda' else resident

def learning_rate_at(step, config):
    """The learning rate of a step: linear warm-up over warmup_iters, then by `lr_schedule` down to min_lr at
    lr_decay_iters (0 = max_iters), where it stays: 'cosine' (arXiv 1608.03983), 'linear', 'wsd' (warm-up, stable,
    decay: flat until the last cooldown_frac, then linear; arXiv 2405.18392), 'constant' (so is decay_lr=False)."""
    top, low, warmup = config['learning_rate'], config.get('min_lr', 0.0), config['warmup_iters']
    end = config.get('lr_decay_iters') or config['max_iters']
    kind = config.get('lr_schedule', 'cosine') if config.get('decay_lr', True) else 'constant'
    t = min(1.0, (step - warmup) / max(1, end - warmup))  # from 0, the end of warm-up, to 1, the end of decay
    falls = {'cosine': 0.5 * (1 + math.cos(math.pi * t)), 'linear': 1 - t, 'constant': 1.0,
             'wsd': min(1.0, (1 - t) / max(1e-9, config.get('cooldown_frac', 0.2)))}
    if kind not in falls:
        raise ValueError(f'lr_schedule must be one of {", ".join(falls)}; got {kind!r}')
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    return low + falls[kind] * (top - low)

# ----- The log

class Logger:
    """A run's records, kept by rank 0: one aligned line a step on the screen, log.jsonl, and by their switches
    TensorBoard (tensorboard_log) and wandb (wandb_log); at the end curves.png. A run resumed at `step` (None = a fresh
    one) drops the lines from there on, which it will write again; what is left of a save that was killed is removed."""

    def __init__(self, out_dir, config, step=None, master=True):
        self.out_dir, self.board, self.wandb = out_dir, None, None
        if not master:
            self.log = self.final = lambda *ignored: None
            return
        if step is None:
            set_aside(out_dir)  # nothing saved is ever lost
        os.makedirs(out_dir, exist_ok=True)
        for stale in glob.glob('*.tmp', root_dir=out_dir):
            os.remove(os.path.join(out_dir, stale))
        kept = [r for r in read_log(out_dir) if step and r.get('step', step) < step]
        with replacing(os.path.join(out_dir, 'log.jsonl')) as f:
            f.writelines(json.dumps(r).encode() + b'\n' for r in kept)
        if config.get('tensorboard_log'):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step or 0)
        if config.get('wandb_log'):
            import wandb
            project, name = config.get('wandb_project', 'nanollm'), config.get('wandb_run_name', os.path.basename(out_dir))
            self.wandb = wandb.init(project=project, name=name, config=config, dir=out_dir)

    def write(self, record):
        """Append a line to log.jsonl; what is not finite is null there, since JSON has no NaN."""
        record = json.loads(json.dumps(record), parse_constant=lambda constant: None)
        try:
            with open(os.path.join(self.out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
                f.write(json.dumps(record) + '\n')
        except OSError as e:  # a full disk
            print('warning: not logged:', e)

    def log(self, step, metrics):
        """Record {name: number} of a step. The shares of experts, moe/..., are too many for the screen."""
        metrics = {k: float(v) for k, v in metrics.items()}
        self.write({'step': step, **metrics})
        text = (f'{k} {v:>10{".0f" if abs(v) >= 1000 else ".5g"}}' for k, v in metrics.items() if not k.startswith('moe/'))
        print(f'step {step:>6}', *text, sep=' | ', flush=True)
        if self.board:
            for k, v in metrics.items():
                self.board.add_scalar(k, v, step)
            self.board.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def final(self, figures):
        """The run's last line, on the screen and in log.jsonl."""
        self.write({'final': figures})
        if self.wandb:
            self.wandb.summary.update(figures)
            self.wandb.finish()
        from assets.draw import draw
        draw([self.out_dir], os.path.join(self.out_dir, 'curves.png'))
        print('final:', ', '.join(f'{k} {v:,.4f}' if isinstance(v, float) else f'{k} {v}' for k, v in figures.items()))

def read_log(out_dir):
    """The records of out_dir/log.jsonl; a last line that a crash cut short is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError), open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
        for line in f:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records

if __name__ == "__main__":
    # -----------------------------------------------------------------------------
    out = 'compare.png'  # the picture to write
    metrics = ''         # draw these alone, with commas between, as loss,val_loss; '' = all
    first = 0            # draw from this step on
    # -----------------------------------------------------------------------------
    folders = [a.rstrip('/') for a in sys.argv[1:] if not a.startswith('-')]
    sys.argv[1:] = [a for a in sys.argv[1:] if a.startswith('-')]
    configure(globals())
    from assets.draw import compare
    compare(folders, out, metrics, first)
