"""
What every stage shares because it has one right answer: settings, the machine at hand, seeds, the learning-rate
schedule, checkpoints, the log. Run as a script it compares runs, the settings in which they differ beside their
results, and draws their curves in one picture (those that differ in the seed alone as a mean and its spread):

    python configurator.py out/a out/b --out=compare.png
"""
import ast, contextlib, difflib, glob, json, math, os, re, shutil, signal, sys, types, zipfile
import numpy as np
import torch

# -----------------------------------------------------------------------------
# Settings: names assigned a literal between the first two rules of a script

def read_settings(path):
    """{name: comment} of the settings of a script, read from its source."""
    with open(path, encoding='utf-8') as f:
        lines = f.read().splitlines()
    rules = [i for i, line in enumerate(lines) if re.match(r'\s*# -{20,}\s*$', line)][:2]
    found = (re.match(r'\s*(\w+) = .*?(?:\s# (.*))?$', line) for line in lines[slice(*rules)])
    return {m[1]: m[2] or '' for m in found if m}

def check(where, key, value, settings):
    """`value` as the type that setting `key` has, or a ValueError that begins with `where`. An int is taken for
    a float; what is 'auto' may be a bool as well; text from the command line is read as the type needs."""
    if key not in settings:
        near = difflib.get_close_matches(key, settings, 1)
        raise ValueError(f"{where}: there is no setting {key!r}; {f'did you mean {near[0]}?' if near else '--help lists all'}")
    default = settings[key]
    if isinstance(value, str) and (not isinstance(default, str) or value in ('True', 'False') and default == 'auto'):
        with contextlib.suppress(ValueError, SyntaxError):  # --learning_rate=3e-4, --compile=False, --stages=(8,64)
            value = ast.literal_eval(value.capitalize() if isinstance(default, bool) else value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) and not (default == 'auto' and isinstance(value, bool)):
        raise ValueError(f'{where}: {key} must be of type {type(default).__name__}, like {default!r}; got {value!r}')
    return value

def run_config_file(path, settings):
    """What a config file assigns, checked. It is Python (run only those you trust), in a namespace of its own that
    starts with the current settings; names that begin with '_' and imported modules are its own."""
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such config file (a setting is written --key=value)')
    with open(path, encoding='utf-8') as f:
        source = f.read()
    names, changed = dict(settings, __file__=path), {}
    try:
        exec(compile(source, path, 'exec'), names)
    except Exception as e:
        trace = e.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        raise ValueError(f"{path}:{getattr(e, 'lineno', None) or trace.tb_lineno}: {type(e).__name__}: {e}") from e
    for key, value in names.items():
        if not (key.startswith('_') or isinstance(value, types.ModuleType) or key in settings and value is settings[key]):
            lines = [i for i, line in enumerate(source.splitlines(), 1) if re.search(rf'\b{key}\b', line)]
            changed[key] = check(f'{path}:{max(lines, default=1)}', key, value, settings)
    return changed

def configure(names):
    """Apply, in order, the config files and --key=value arguments of the command line to the settings among
    `names`, a script's globals(), and return all settings as a dict. From here on a user's mistake is one line on
    stderr and exit status 2; --debug=True shows where it was raised."""
    sys.excepthook = one_line_errors
    comments = read_settings(names['__file__']) if '__file__' in names else {
        k: '' for k, v in names.items() if not k.startswith('_') and isinstance(v, (bool, int, float, str, tuple))}
    defaults = {key: names[key] for key in comments}
    settings, given, by_file = dict(defaults), {}, {}
    for arg in sys.argv[1:]:
        key, equals, value = arg.removeprefix('--').partition('=')
        if arg in ('--help', '-h'):
            print((names.get('__doc__') or '').strip(), '\n\nSettings:')
            print(*(f'  --{key}={defaults[key]!r}'.ljust(40) + comment for key, comment in comments.items()), sep='\n')
            sys.exit(0)
        elif arg == '--debug=True':
            sys.excepthook = sys.__excepthook__
        elif not arg.startswith('--'):
            by_file.update(run_config_file(arg, settings))
            settings.update(by_file)
        elif not equals or key in given:
            raise ValueError(f'{arg}: ' + (f'{key} is given twice' if equals else 'a setting is written --key=value'))
        else:
            settings[key] = given[key] = check(arg, key, value, defaults)
    configure.given = {**by_file, **given}
    names.update(settings)
    return settings

def resume_settings(config, saved, architecture):
    """`config` for a run that goes on: the settings it was saved with, but for those given on this command line,
    which are said. ValueError for one of the architecture, which cannot change."""
    for key in (config.keys() & saved.keys()) - {'init_from', 'out_dir'}:
        if key not in configure.given:
            config[key] = saved[key]
        elif config[key] != saved[key] and key in architecture:
            raise ValueError(f'{key}={config[key]!r}: the run to resume has {saved[key]!r}, and an architecture cannot '
                             'change; leave it out, or start anew in another out_dir')
        elif config[key] != saved[key]:
            print(f'{key}: {saved[key]!r} -> {config[key]!r}')
    return config

def one_line_errors(kind, error, trace):
    """sys.excepthook: what a user can mend is said in one line, the rest keeps its traceback."""
    text = ' '.join(str(error).split())
    if issubclass(kind, torch.OutOfMemoryError) or 'not enough memory' in text:
        text = 'out of memory: lower batch_size (and raise gradient_accumulation_steps), block_size or n_layer'
    elif not issubclass(kind, (ValueError, OSError, ImportError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {text or kind.__name__}', file=sys.stderr, flush=True)
    sys.exit(130 if kind is KeyboardInterrupt else 2)

# -----------------------------------------------------------------------------
# The run: device, dtype, compile, ranks, seeds, schedule

def start_run(config, flops=math.inf):
    """Choose what is fastest and right on this machine where the settings say 'auto', join the ranks that torchrun
    started, and say what was chosen. `flops` is what the whole run will compute, by which compile='auto' tells
    whether it wins back a cold compile (15-60 s).

    Returns a namespace: device, type ('cuda' | 'cpu' | 'mps'), dtype (torch's), autocast (a context manager),
    scaler (for float16), compile (bool), rank, world (the number of ranks), master (rank 0, which prints and saves)."""
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = config['device']
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    elif device.startswith('cuda') and not torch.cuda.is_available():
        print('no CUDA here: running on the CPU')
        device = 'cpu'
    kind = device.split(':')[0]
    if kind == 'cuda':
        device = f'cuda:{local_rank}' if world > 1 else device
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
    if world > 1:
        torch.distributed.init_process_group(config.get('backend') if kind == 'cuda' else 'gloo')
    # bfloat16 where the hardware multiplies in it; elsewhere it is emulated, and up to a hundred times slower
    fast = (kind == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)) or (
        kind == 'cpu' and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()))
    name = config['dtype'] if config['dtype'] != 'auto' else 'bfloat16' if fast else 'float32'
    if name not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16'; got {name!r}")
    compiles = config['compile']
    if compiles == 'auto':
        compiles = kind != 'mps' and flops > {'cuda': 1e15, 'cpu': 4e12}[kind]
    if compiles and kind == 'cpu' and not any(map(shutil.which, (os.environ.get('CXX', 'g++'), 'clang++'))):
        print('no C++ compiler found: running in eager mode')
        compiles = False
    if rank == 0:
        print(f"device {device}, {name}, {'compiled' if compiles else 'eager'}, {world} rank{'s' * (world > 1)}", flush=True)
    return types.SimpleNamespace(
        device=device, type=kind, dtype=getattr(torch, name), compile=compiles, rank=rank, world=world, master=rank == 0,
        autocast=contextlib.nullcontext() if name == 'float32' else torch.autocast(kind, getattr(torch, name)),
        scaler=torch.amp.GradScaler(kind, enabled=name == 'float16'))

def seed_for(seed, *where):
    """A seed that is a pure function of (seed, step, rank, ...): a run resumed at a step draws what it would have
    drawn, with no random state in its checkpoint."""
    return int(np.random.SeedSequence([seed, *where]).generate_state(1, np.uint64)[0] >> np.uint64(1))

def rng(seed, *where, device='cpu'):
    """A torch.Generator seeded by seed_for."""
    return torch.Generator(device).manual_seed(seed_for(seed, *where))

class StopSignal:
    """SIGTERM and Ctrl-C end the step, not the process: the loop asks `requested`, saves, and leaves with
    `exit_code`. A second Ctrl-C quits at once."""
    requested, exit_code = False, 0

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.requested, self.exit_code = True, 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

def peak_memory_mb(kind='cpu'):
    """The most memory this process has held, in MB (2^20 bytes): on the GPU if there is one, else resident."""
    import resource  # not on Windows
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
    return torch.cuda.max_memory_allocated() / 2**20 if kind == 'cuda' else resident

def learning_rate_at(step, config):
    """The learning rate of a step: linear warm-up over warmup_iters, then by `lr_schedule` down to min_lr at
    lr_decay_iters (0 = max_iters), where it stays: 'cosine' (arXiv 1608.03983), 'linear', 'wsd' (warm-up, stable,
    decay: flat until the last cooldown_frac, then linear; arXiv 2405.18392), 'constant' (so is decay_lr=False)."""
    top, low, warmup = config['learning_rate'], config['min_lr'], config['warmup_iters']
    end = config['lr_decay_iters'] or config['max_iters']
    kind = config.get('lr_schedule', 'cosine') if config['decay_lr'] else 'constant'
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    t = min(1.0, (step - warmup) / max(1, end - warmup))  # from 0, the end of warm-up, to 1, the end of decay
    falls = {'cosine': 0.5 * (1 + math.cos(math.pi * t)), 'linear': 1 - t, 'constant': 1.0,
             'wsd': min(1.0, (1 - t) / config.get('cooldown_frac', 0.2))}
    if kind not in falls:
        raise ValueError(f'lr_schedule must be one of {", ".join(falls)}; got {kind!r}')
    return low + falls[kind] * (top - low)

# -----------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and primitives, never half-written, never run as code

@contextlib.contextmanager
def replacing(path):
    """A binary file that gets its name when it is whole and on the disk; until then the old one stands."""
    try:
        with open(f'{path}.tmp', 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f'{path}.tmp', path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(f'{path}.tmp')

def save_checkpoint(out_dir, checkpoint, name='ckpt.pt', final=True):
    """Write out_dir/name so that a crash at any moment leaves a whole checkpoint; the ckpt.pt before it stays as
    ckpt_prev.pt. Where the disk is full the old one stays: OSError, or a warning if this is not the final save."""
    path = os.path.join(out_dir, name)
    try:
        os.makedirs(out_dir, exist_ok=True)
        with replacing(path) as f:
            torch.save(checkpoint, f)
            f.flush()
            if name == 'ckpt.pt' and os.path.exists(path):
                os.replace(path, os.path.join(out_dir, 'ckpt_prev.pt'))
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        need = 3 * sum(t.nbytes for t in checkpoint['model'].values())  # weights and two moments
        text = f'{path} could not be saved; about {need:,} bytes are needed, and what was saved before is kept ({e})'
        if final:
            raise OSError(text) from e
        print('warning:', text)

def load_checkpoint(path, name='ckpt.pt'):
    """The checkpoint at a path or in a run's folder, on the CPU; its checksums are verified. Where a folder's
    ckpt.pt is damaged or missing ckpt_prev.pt is taken, and that is said. ValueError if neither can be read."""
    if os.path.isdir(path):
        for stale in glob.glob(os.path.join(glob.escape(path), '*.tmp')):
            os.remove(stale)
        previous, path = os.path.join(path, 'ckpt_prev.pt'), os.path.join(path, name)
        try:
            return load_checkpoint(path) if os.path.exists(path) or not os.path.exists(previous) else load_checkpoint(previous)
        except ValueError as e:
            if not os.path.exists(previous):
                raise
            checkpoint = load_checkpoint(previous)
            print(f"{e}; taking {previous}, of step {checkpoint['step']}")
            return checkpoint
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such checkpoint; train one, or name another folder')
    try:
        with zipfile.ZipFile(path) as z:
            if z.testzip():
                raise ValueError(f'the checksum of {z.testzip()} is wrong')
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        if not {'model', 'model_args', 'step', 'config'} <= checkpoint.keys():
            raise ValueError('it is not of nanoLLM')
        return checkpoint
    except Exception as e:
        raise ValueError(f'{path}: damaged or foreign checkpoint ({str(e).splitlines()[0][:100]})') from e

# -----------------------------------------------------------------------------
# The log and its pictures

class Logger:
    """A run's records, kept by rank 0: one aligned line a step on the screen, log.jsonl, and by their switches
    TensorBoard (tensorboard_log) and wandb (wandb_log); at the end curves.png. A run resumed at `step` drops the
    lines from there on, which it will write again."""

    def __init__(self, out_dir, config, step=0, master=True):
        self.out_dir, self.master, self.board, self.wandb = out_dir, master, None, None
        if not master:
            return
        os.makedirs(out_dir, exist_ok=True)
        kept = [r for r in read_log(out_dir) if r.get('step', step) < step]
        with open(os.path.join(out_dir, 'log.jsonl'), 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r) + '\n' for r in kept)
        if config.get('tensorboard_log'):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(os.path.join(out_dir, 'tensorboard'), purge_step=step)
        if config.get('wandb_log'):
            import wandb
            self.wandb = wandb.init(project=config['wandb_project'], name=config['wandb_run_name'], config=config, dir=out_dir)

    def write(self, record):
        with open(os.path.join(self.out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
            f.write(json.dumps(record) + '\n')

    def log(self, step, metrics):
        """Record {name: number}; what is not finite is written as null, since JSON has no NaN."""
        if not self.master:
            return
        values = {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}
        self.write({'step': step, **values})
        text = {k: 'nan' if v is None else f'{v:.0f}' if abs(v) >= 1000 else f'{v:.2e}' if 0 < abs(v) < 1e-2 else f'{v:.4f}'
                for k, v in values.items()}
        print(f'step {step:>6}', *(f'{k} {v:>8}' for k, v in text.items()), sep=' | ', flush=True)
        for k, v in values.items() if self.board else ():
            self.board.add_scalar(k, math.nan if v is None else v, step)
        if self.wandb:
            self.wandb.log(values, step=step)

    def final(self, figures):
        """The run's last line, on the screen and in log.jsonl."""
        if not self.master:
            return
        self.write({'final': figures})
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.summary.update(figures)
            self.wandb.finish()
        draw([self.out_dir], os.path.join(self.out_dir, 'curves.png'))
        print('final:', ', '.join(f'{k} {v:,.4f}' if isinstance(v, float) else f'{k} {v}' for k, v in figures.items()))

def read_log(out_dir):
    """The records of out_dir/log.jsonl; a last line that a crash cut short is left out."""
    records = []
    for path in glob.glob(os.path.join(glob.escape(out_dir), 'log.jsonl')):
        with open(path, encoding='utf-8') as f:
            for line in f:
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
    return records

def draw(folders, path, labels=None):
    """Draw every logged metric of the runs against the step, a panel each. Runs of one label are one curve, their
    mean, in a band from the lowest to the highest. Without matplotlib it is said that nothing was drawn."""
    try:
        import matplotlib
    except ImportError:
        return print(f'{path} not drawn: it needs pip install matplotlib')
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    series = {}  # metric -> label -> step -> values of the runs of that label
    for folder, label in zip(folders, labels or folders):
        for record in read_log(folder):
            for key in (k for k, v in record.items() if k not in ('step', 'final') and v is not None):
                series.setdefault(key, {}).setdefault(label, {}).setdefault(record['step'], []).append(record[key])
    rows = -(-len(series) // 3)
    figure = plt.figure(figsize=(15, 3.5 * max(1, rows)), layout='constrained')
    for i, key in enumerate(sorted(series, key=lambda k: ('loss' not in k, k)), 1):
        axis = figure.add_subplot(rows, 3, i, title=key, xlabel='step')
        for label, points in series[key].items():
            steps, values = zip(*sorted(points.items()))
            line, = axis.plot(steps, [np.mean(v) for v in values], label=label)
            axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
        axis.grid(alpha=0.3)
        if i == 1 and len(folders) > 1:
            axis.legend(fontsize='small')
    figure.savefig(path, dpi=80)
    plt.close(figure)

def compare(folders, picture):
    """Print the settings in which finished runs differ beside their results, and draw their curves."""
    configs = [load_checkpoint(folder)['config'] for folder in folders]
    finals = [next((r['final'] for r in read_log(folder) if 'final' in r), {}) for folder in folders]
    keys = [k for k in dict.fromkeys(k for c in configs for k in c) if k not in ('out_dir', 'wandb_run_name')
            and any(c.get(k) != configs[0].get(k) for c in configs)]
    rows = [['', *folders], *([k, *(str(c.get(k)) for c in configs)] for k in keys), ['---'] * (1 + len(folders))]
    rows += [[k, *(f'{f[k]:.4g}' if k in f else '-' for f in finals)] for k in dict.fromkeys(k for f in finals for k in f)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print(*(cell.ljust(width) for cell, width in zip(row, widths)), sep='  ')
    draw(folders, picture, [', '.join(f'{k} {c.get(k)}' for k in keys if k != 'seed') or f for c, f in zip(configs, folders)])

if __name__ == "__main__":
    # -----------------------------------------------------------------------------
    out = 'compare.png'  # the picture to write
    # -----------------------------------------------------------------------------
    folders = [a.rstrip('/') for a in sys.argv[1:] if not a.startswith('-')]
    sys.argv[1:] = [a for a in sys.argv[1:] if a.startswith('-')]
    configure(globals())
    if not folders:
        raise ValueError('name the folders of the runs to compare: python configurator.py out/a out/b')
    compare(folders, out)
