"""
What all scripts share: settings, the choice of device and precision, random seeds, the
learning-rate schedule, checkpoints, and the log.

A setting is a module-level name with a literal default, between the first two rules of a script:

    # -----------------------------------------------------------------------------
    # optimizer                        a heading
    learning_rate = 6e-3               # a comment, which --help prints
    # -----------------------------------------------------------------------------

Config files and --key=value arguments override settings, in the order of the command line:

    python train.py config/x.py --learning_rate=1e-3
"""
import ast
import contextlib
import ctypes
import difflib
import dis
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import types
import unicodedata
import zipfile
from dataclasses import dataclass

# -----------------------------------------------------------------------------
# Settings

# The lines of a block of settings: the rules around it, a setting with its comment, a heading.
RULE = re.compile(r'(?m)^ *# -{20,}$')
SETTING = re.compile(r'^ *(\w+) = .*?(?: # *(.*))?$')
CONTINUATION = re.compile(r'^ {8,}# *(.*)$')  # of the comment in the line above
HEADING = re.compile(r'^ *# (.*)$')

# Common short names, so that a wrong one gets the right suggestion.
ABBREVIATIONS = {
    'lr': 'learning_rate', 'bs': 'batch_size', 'epochs': 'max_iters', 'steps': 'max_iters',
    'iters': 'max_iters', 'wd': 'weight_decay', 'ctx': 'block_size', 'layers': 'n_layer',
    'heads': 'n_head', 'dim': 'n_embd', 'output_dir': 'out_dir', 'model': 'init_from',
}

# Settings that may name code to run, FILE.py:function, and their values that do not.
CODE_SETTINGS = ('reward', 'gold')
NO_CODE = ('', 'model', 'gold')

# Ranges of settings. A value outside would invert or break training.
AT_LEAST_ONE = (
    'block_size', 'batch_size', 'minibatch_size', 'gradient_accumulation_steps', 'eval_interval',
    'log_interval', 'eval_prompts', 'test_prompts', 'test_draws', 'max_new_tokens', 'ppo_epochs',
    'curriculum_stages', 'length_groups', 'normalize_prompts', 'best_of', 'num_samples',
    'n_layer', 'n_head', 'n_embd')
AT_LEAST_ZERO = (
    'seed', 'max_iters', 'warmup_iters', 'lr_decay_iters', 'eval_iters', 'sample_tokens',
    'max_pairs', 'learning_rate', 'muon_lr', 'gain_lr', 'critic_lr', 'min_lr', 'weight_decay',
    'grad_clip', 'vocab_size', 'temperature', 'top_k', 'clip_range', 'value_clip', 'value_coef',
    'score_clip', 'kl_coef', 'kl_stop', 'moe_aux_weight', 'moe_bias_rate', 'moe_z_weight',
    'denoise_weight', 'center_weight', 'flip_rate', 'dpo_beta')
FROM_ZERO_TO_ONE = ('dropout', 'beta1', 'beta2', 'gamma', 'lam', 'top_p', 'curriculum_frac',
                    'cooldown_frac')
ABOVE_ZERO = ('kl_target', 'kl_horizon')
# Counts that only a slip, or a foreign checkpoint, sets so high that they would fill the memory.
AT_MOST_A_MILLION = (
    'batch_size', 'minibatch_size', 'gradient_accumulation_steps', 'eval_iters', 'sample_tokens',
    'max_new_tokens', 'test_draws', 'curriculum_stages', 'length_groups', 'best_of', 'num_samples',
    'group_size', 'n_layer', 'n_expert', 'n_shared_expert')
LARGEST = 3e38  # the largest number of float32, nearly

# Settings that may be a path.
PATHS = {'out_dir', 'init_from', 'reference_dir', 'reward_model', 'reward', 'gold', 'dataset',
         'tokenizer', 'input', 'out', 'prompts', 'answers'}


def settings_block(path):
    """The lines between the first two rules of a script."""
    with open(path, encoding='utf-8') as f:
        parts = RULE.split(f.read())
    return parts[1].splitlines() if len(parts) > 2 else []


def read_settings(path):
    """{name: comment} of the settings of a script, read from its source."""
    comments = {}
    for line in settings_block(path):
        setting = SETTING.match(line)
        if setting:
            comments[setting[1]] = setting[2] or ''
    return comments


def print_help(path):
    """Print a script's docstring, then its settings under their headings with default and
    comment."""
    # The defaults are read from the source, so that nothing is run or imported.
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    defaults = {}
    for node in ast.walk(ast.parse(textwrap.dedent('\n'.join(settings_block(path))))):
        if isinstance(node, ast.Assign):
            defaults[node.targets[0].id] = ast.unparse(node.value)
    print((ast.get_docstring(tree) or '').strip())
    print('\nSettings:')
    for line in settings_block(path):
        setting = SETTING.match(line)
        continuation = CONTINUATION.match(line)
        heading = HEADING.match(line)
        if setting:
            name, comment = setting.groups()
            print(f'  --{name}={defaults[name]}'.ljust(40) + (comment or ''))
        elif continuation:
            print(' ' * 40 + continuation[1])
        elif heading:
            print(f' {heading[1]}')


def has_settings(path):
    """Whether a file is one of the scripts, whose settings configure() reads."""
    if not os.path.isfile(path):
        return False
    with open(path, encoding='utf-8') as f:
        return 'configure(globals())' in f.read()


# --help answers at once: before torch is imported, which takes a second or more.
if {'--help', '-h'} & set(sys.argv[1:]) and has_settings(sys.argv[0]):
    print_help(sys.argv[0])
    sys.exit(0)

import torch
from filelock import FileLock, Timeout  # installed with torch


def nearest_name(key, names):
    """The setting that was probably meant by an unknown key, or 'help'."""
    if ABBREVIATIONS.get(key) in names:
        return ABBREVIATIONS[key]
    close = difflib.get_close_matches(key, names, n=1)
    return close[0] if close else 'help'


def parse_value(text, default):
    """Text of the command line as a value of the type of `default`; unchanged if it is no
    literal."""
    is_bool = text.lower() in ('true', 'false')
    if isinstance(default, str) and not (default == 'auto' and is_bool):
        return text
    try:
        return ast.literal_eval(text.capitalize() if is_bool else text)
    except (ValueError, SyntaxError):
        return text  # check_setting reports the wrong type


def check_setting(where, key, value, defaults):
    """
    `value` in the type of setting `key`, or a ValueError that begins with `where`. An int is
    accepted for a float, a whole number such as 1e6 for an int, and a bool where the default is
    'auto'.
    """
    if key not in defaults:
        raise ValueError(f'{where}: there is no setting {key!r}; did you mean '
                         f'--{nearest_name(key, defaults)}?')
    default = defaults[key]
    if isinstance(default, float) and type(value) is int and abs(value) < LARGEST:
        value = float(value)
    if type(default) is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if default == 'auto' and isinstance(value, bool):
        return value
    if type(value) is not type(default):
        raise ValueError(f'{where}: {key} must be of type {type(default).__name__}, like '
                         f'{default!r}; got {value!r}')
    return value


def run_config_file(path, settings, defaults):
    """
    {name: (value, where)} of what a config file assigns, checked; where is 'file:line'.

    A config file is Python code, so run only those you trust. Its namespace starts with the current
    settings. Names that begin with '_', modules, functions and classes are private to it.
    """
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such config file (a setting is written --key=value)')
    # Run it.
    names = dict(settings, __file__=path)
    try:
        with open(path, 'rb') as f:
            code = compile(f.read(), path, 'exec')
        exec(code, names)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        line = lines[-1] if lines else getattr(error, 'lineno', 0)
        raise ValueError(f'{path}:{line}: {type(error).__name__}: {error}') from error

    # The compiled code tells which names were assigned at module level, and where.
    assigned = {instruction.argval: instruction.positions.lineno
                for instruction in dis.get_instructions(code) if instruction.opname == 'STORE_NAME'}
    for key, value in settings.items():
        if names.get(key) != value:
            assigned.setdefault(key, 0)  # by a function of the file (`global`), at some line
    # Keep the settings among them.
    found = {}
    for key, line in assigned.items():
        if key not in names or key.startswith('_'):
            continue
        is_private = isinstance(names[key], types.ModuleType) or callable(names[key])
        if is_private and key not in defaults:
            continue
        where = f'{path}:{line}'
        if key not in defaults:
            message = f'{where}: there is no setting {key!r};'
            nearest = nearest_name(key, defaults)
            if nearest != 'help':
                message += f' did you mean {nearest}?'
            raise ValueError(f"{message} a helper name of your own begins with '_', like _{key}")
        found[key] = check_setting(where, key, names[key], defaults), where
    return found


def check_ranges(config, defaults):
    """ValueError for the first setting whose value would invert or break training."""
    for key, value in config.items():
        if value == defaults[key]:
            continue  # a default is always allowed, such as 0 for a value that is computed
        if isinstance(value, float) and not abs(value) <= LARGEST:
            raise ValueError(f'{key} must be a finite number of at most {LARGEST}; got {value}')
        if key in AT_MOST_A_MILLION and value > 1_000_000:
            raise ValueError(f'{key} must be at most 1,000,000; got {value}')
        if key in AT_LEAST_ONE and value < 1:
            raise ValueError(f'{key} must be at least 1; got {value}')
        if key in AT_LEAST_ZERO and value < 0:
            raise ValueError(f'{key} must be at least 0; got {value}')
        if key in FROM_ZERO_TO_ONE and not 0 <= value <= 1:
            raise ValueError(f'{key} must be from 0 to 1; got {value}')
        if key in ABOVE_ZERO and value <= 0:
            raise ValueError(f'{key} must be above 0; got {value}')
    if config.get('seed', 0) >= 2 ** 63:
        raise ValueError(f"seed must be below 2**63; got {config['seed']}")
    if config.get('out_dir') == '' and 'init_from' in config:
        raise ValueError('out_dir is empty; give a folder for the run, like out/x')


def check_choice(config, key, allowed):
    """ValueError if the setting `key` has none of the allowed values."""
    if config[key] not in allowed:
        raise ValueError(f'{key} must be one of {", ".join(map(repr, allowed))}; '
                         f'got {config[key]!r}')


def configure(names):
    """
    Apply the config files and --key=value arguments of the command line, in order, to the settings
    among `names`, a script's globals(). Returns (config, overrides): all settings, and
    {name: where} of those that this command line set.

    From here on a user's mistake is one line on stderr and exit status 2; --debug=True shows where
    it was raised.
    """
    debug = '--debug=True' in sys.argv
    sys.excepthook = sys.__excepthook__ if debug else one_line_errors
    script = names['__file__']
    if '--help' in sys.argv or '-h' in sys.argv:
        print_help(script)
        sys.exit(0)
    # 1. the defaults
    defaults = {key: names[key] for key in read_settings(script)}
    config = dict(defaults)
    overrides = {}
    # 2. what the command line changes, from left to right
    seen = set()  # keys among the arguments
    for argument in sys.argv[1:]:
        if argument == '--debug=True':
            continue
        if not argument.startswith('--'):
            found = run_config_file(argument, config, defaults)
            for key, (value, where) in found.items():
                config[key] = value
                overrides[key] = where
            continue
        key, equals, text = argument.removeprefix('--').partition('=')
        if not equals:
            raise ValueError(f'{argument}: a setting is written --key=value')
        if key in seen:
            raise ValueError(f'{argument}: {key} is given twice')
        seen.add(key)
        value = parse_value(text, defaults.get(key, ''))
        config[key] = check_setting(argument, key, value, defaults)
        overrides[key] = argument
    # 3. check the result
    for key in PATHS & config.keys():
        config[key] = os.path.expanduser(config[key])  # shells leave the ~ of --key=~/x as it is
    check_ranges(config, defaults)
    names.update(config)
    return config, overrides


def is_rank_0():
    """Whether this process is rank 0, which prints, of those that torchrun started; or alone."""
    return os.environ.get('RANK', '0') == '0'


def torchrun_id():
    """The name that torchrun gave to the run, the same in a restart; '' without torchrun."""
    return os.environ.get('TORCHELASTIC_RUN_ID', '')


def settings_that_name_code(config):
    """The settings among config whose value is FILE.py:function."""
    return {key: config[key] for key in CODE_SETTINGS if config.get(key, '') not in NO_CODE}


def resume(config, overrides, fixed):
    """
    Returns (config, checkpoint). For a new run these are the config as it is, and {}.

    With init_from='resume', or after a restart by torchrun, the checkpoint is the one in out_dir.
    The config then has the settings that the run was saved with, except those that this command
    line set; changes are printed. Its init_from is what the run first started from. ValueError if
    this command line changes a setting in `fixed`, the names of those that cannot change, or if a
    saved setting has another type, is out of range, or names code.
    """
    # 1. Is there something to resume?
    path = os.path.join(config['out_dir'], 'ckpt.pt')
    previous = os.path.join(config['out_dir'], 'ckpt_prev.pt')
    restarts = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
    has_checkpoint = os.path.exists(path) or os.path.exists(previous)
    if config['init_from'] != 'resume' and not (restarts > 0 and has_checkpoint):
        return config, {}
    is_reader = config.get('eval_only') or config.get('check')
    if has_checkpoint and is_rank_0() and not is_reader:
        # A process that is still using the folder may yet save a later checkpoint.
        lock_run_folder(config['out_dir']).release()
    checkpoint = load_checkpoint(config['out_dir'])
    # A restart continues only what this command of torchrun saved, not an older run in the folder.
    if config['init_from'] != 'resume' and checkpoint.get('run_id', '') != torchrun_id():
        return config, {}

    # 2. It must be of the same stage.
    script = os.path.basename(sys.argv[0])
    stage = checkpoint.get('stage')
    made_by = 'reward.py' if stage == 'dpo' else f'{stage}.py'
    if stage and made_by != script:
        raise ValueError(f'{path} was made by {made_by}, not by {script}: resume it there, or name '
                         'it by --init_from')

    # 3. Its settings, unless this command line changes them.
    of_command_line = config
    config = dict(config)
    for key, saved in checkpoint['config'].items():
        if key not in config or key in ('out_dir', 'eval_only', 'check'):
            continue  # these say what this command is to do
        if key not in overrides or key == 'init_from':
            config[key] = check_setting(path, key, saved, config)
        elif config[key] != saved and key in fixed:
            raise ValueError(f'{overrides[key]}: {key}={config[key]!r}, but the run to resume has '
                             f'{saved!r}, which cannot change; leave it out, or start a new run in '
                             'another out_dir')
        elif config[key] != saved and is_rank_0():
            print(printable(f'{key}: {saved!r} -> {config[key]!r}'))
    try:
        check_ranges(config, of_command_line)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error

    # 4. What code is run is decided by the command line, never by a checkpoint.
    for key, value in settings_that_name_code(config).items():
        if key not in overrides:
            raise ValueError(f'{path}: the run was started with --{key}={value}. A '
                             'checkpoint may come from somebody else, so code that it names is not '
                             'run: give this setting again')
    return config, checkpoint


# Characters that change the direction of text, by which a file could disguise what is printed.
BIDI_CONTROLS = '\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069'


def printable(text):
    """The text without control characters, by which a model or a foreign file could drive the
    terminal, without changes of the direction of text, and without lone surrogates, which cannot be
    printed. Whatever may come from a file or a folder is printed through this function."""
    kept = []
    for char in text:
        is_control = unicodedata.category(char) in ('Cc', 'Cs') and char not in '\n\t'
        if not is_control and char not in BIDI_CONTROLS:
            kept.append(char)
    return ''.join(kept)


def one_line(text, width=100):
    """The text on one line of at most `width` characters, printable, for examples in the log."""
    text = printable(' '.join(text.split()))
    return text if len(text) <= width else text[:width - 3] + '...'


def one_line_errors(kind, error, trace):
    """sys.excepthook: a mistake that a user can correct is one line; the rest keeps its
    traceback."""
    # Messages of libraries may have several lines, and may quote foreign text of any length.
    text = one_line(str(error), width=2000)
    out_of_memory = (issubclass(kind, (torch.OutOfMemoryError, MemoryError))
                     or 'not enough memory' in text or "can't allocate memory" in text)
    if issubclass(kind, ModuleNotFoundError):
        text += f': pip install {error.name}'
    if out_of_memory:
        text = ('out of memory: lower batch_size (and raise gradient_accumulation_steps), '
                'minibatch_size, block_size or n_layer')
    elif not issubclass(kind, (ValueError, OSError, ImportError, KeyboardInterrupt)):
        return sys.__excepthook__(kind, error, trace)
    print(f'error: {text or kind.__name__}', file=sys.stderr, flush=True)
    sys.exit(130 if kind is KeyboardInterrupt else 2)


# -----------------------------------------------------------------------------
# Device, precision, compilation and ranks


@dataclass
class Run:
    """What a run computes on, as start_run chose it."""
    device: str             # 'cpu', 'mps', 'cuda' or 'cuda:1'
    device_type: str        # 'cpu', 'mps' or 'cuda'
    dtype: torch.dtype      # of matrix products; weights stay in float32
    autocast: object        # the context manager for forward passes
    scaler: object          # gradient scaler, which does something in float16 only
    compile: bool
    rank: int               # number of this process
    world_size: int         # number of processes
    is_master: bool         # rank 0, which prints, logs and saves


def choose_device(setting):
    """The device of a 'device' setting, and whether it had to fall back to the CPU."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(),
                 'cpu': True}
    if setting == 'auto':
        return next(name for name in available if available[name]), False
    device_type = str(setting).split(':')[0]  # --device=true sets it to True
    if device_type not in available:
        raise ValueError(f"device must be 'auto' or one of {', '.join(available)}; got {setting!r}")
    if not available[device_type]:
        return 'cpu', True
    n_devices = torch.cuda.device_count() if device_type == 'cuda' else 1
    if setting not in (device_type, *(f'{device_type}:{i}' for i in range(n_devices))):
        raise ValueError(f"device {setting!r} does not exist; there are {n_devices} of type "
                         f'{device_type!r}')
    return setting, False


def has_fast_bfloat16(device_type):
    """Whether the hardware multiplies in bfloat16. Elsewhere it is emulated, up to 100 times
    slower."""
    if device_type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == 'cpu':
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def can_compile(device_type):
    """Whether torch.compile finds the compiler that it needs: Triton on a GPU, else C++."""
    if device_type == 'cuda':
        return torch.utils._triton.has_triton()
    return shutil.which(os.environ.get('CXX', 'g++')) is not None


def keep_freed_memory():
    """
    Let the C library of Linux keep large blocks of freed memory. Otherwise it returns them to the
    system, and each step gets them back page by page, which takes a tenth of its time on a CPU.
    The results are the same without it.
    """
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-3, 32 * 2 ** 20)  # M_MMAP_THRESHOLD, the largest value allowed
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # another system


def start_run(config, flops=math.inf):
    """
    Choose the fastest correct device, dtype and compile where the settings say 'auto', join the
    ranks that torchrun started, and print the choice. Returns a Run.

    `flops` is the number of operations of the whole run: compile='auto' compiles if they outweigh a
    cold compilation (15 to 60 s).
    """
    rank = int(os.environ.get('RANK', 0))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    is_master = rank == 0

    # device
    device, fell_back = choose_device(config['device'])
    if fell_back and is_master:
        print(f"no {config['device'].split(':')[0].upper()} here: running on the CPU", flush=True)
    device_type = device.split(':')[0]
    if device_type == 'cuda':
        if world_size > 1:
            device = f'cuda:{local_rank}'
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
    if device_type == 'cpu':
        keep_freed_memory()

    # ranks
    if world_size > 1:
        our_excepthook = sys.excepthook
        backend = config.get('backend') if device_type == 'cuda' else 'gloo'
        torch.distributed.init_process_group(backend)
        sys.excepthook = our_excepthook  # torch.distributed installs its own, which hides ours

    # dtype
    name = config['dtype']
    if name == 'auto':
        name = 'bfloat16' if has_fast_bfloat16(device_type) else 'float32'
    if name not in ('float32', 'bfloat16', 'float16'):
        raise ValueError("dtype must be 'auto' or one of float32, bfloat16, float16; got "
                         f'{name!r}')
    dtype = getattr(torch, name)

    # compilation
    compiles = config['compile']
    if compiles == 'auto':
        # Operations that outweigh a compilation; on 'mps' it is never worth it.
        enough = {'cuda': 1e15, 'cpu': 4e13, 'mps': math.inf}[device_type]
        compiles = flops > enough
    if compiles not in (True, False):
        raise ValueError(f"compile must be 'auto' or one of True, False; got {compiles!r}")
    if compiles and not can_compile(device_type):
        missing = 'Triton for this GPU' if device_type == 'cuda' else 'C++ compiler'
        if is_master:
            print(f'no {missing} here: running in eager mode', flush=True)
        compiles = False

    if is_master:
        mode = 'compiled' if compiles else 'eager'
        ranks = '1 rank' if world_size == 1 else f'{world_size} ranks'
        print(f'device {device}, {name}, {mode}, {ranks}', flush=True)
    if name == 'float32':
        autocast = contextlib.nullcontext()
    else:
        autocast = torch.autocast(device_type, dtype)
    return Run(device=device, device_type=device_type, dtype=dtype, autocast=autocast,
               scaler=torch.amp.GradScaler(device_type, enabled=name == 'float16'),
               compile=compiles, rank=rank, world_size=world_size, is_master=is_master)


# Dense bfloat16 operations per second, by a word of the device's name (from the data sheets).
PEAK_FLOPS = {'H100': 989e12, 'H200': 989e12, 'B200': 2250e12, 'A100': 312e12, 'L40S': 362e12,
              'L4': 121e12, 'A10': 125e12, 'V100': 125e12, '4090': 165e12, '3090': 71e12}


def peak_flops(run):
    """Operations per second of the machine's matrix products, to report what share of them a run
    achieves (MFU): from the data sheet of a known GPU, otherwise measured (in float32 always)."""
    if run.device_type == 'cuda' and run.dtype != torch.float32:
        words = re.split(r'\W+', torch.cuda.get_device_name(run.device))
        for name, flops in PEAK_FLOPS.items():
            if name in words:
                return flops
    # The fastest of five products of two large matrices.
    n = 4096 if run.device_type == 'cuda' else 1024
    a = torch.ones(n, n, device=run.device, dtype=run.dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        (a @ a).sum().item()  # waits for the result
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def check_divisible(run, name, number):
    """ValueError if the ranks cannot share a number of sequences, pairs or responses evenly."""
    if number % run.world_size:
        raise ValueError(f'{name} = {number} cannot be divided by {run.world_size} ranks; make it '
                         f'a multiple of {run.world_size}')


def parallel(model, run, dynamic=None):
    """The module to call in training: compiled if the run compiles (dynamic=True: once, for batches
    of any length), and with several ranks wrapped so that their gradients are averaged."""
    if run.compile:
        model = torch.compile(model, dynamic=dynamic)
    if run.world_size > 1:
        device_ids = [run.device] if run.device_type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
    return model


def sum_over_ranks(x):
    """The tensor x, summed in place over all ranks if there are several."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def must_skip(run, grad_norm, loss, step, out_dir, saved_step):
    """
    Whether the optimizers skip this step, because its gradients are not finite while the loss is.
    In float16 that is usual: they were too large for its range, and the scaler will lower its
    factor. ValueError if the run has diverged. grad_norm is the same on all ranks, so they all
    decide the same; loss is this rank's own.
    """
    if torch.isfinite(grad_norm):
        return False
    loss_of_all = sum_over_ranks(loss.clone())
    if run.scaler.is_enabled() and torch.isfinite(loss_of_all):
        return True
    raise divergence_error(step, out_dir, saved_step, loss=loss, grad_norm=grad_norm)


def mean_over_ranks(metrics, run):
    """The mean over all ranks of a dict of scalar tensors, as a dict of floats."""
    means = sum_over_ranks(torch.stack(list(metrics.values()))) / run.world_size
    return dict(zip(metrics, means.tolist()))


def divergence_error(step, out_dir, saved_step, **numbers):
    """The error to raise for a loss or gradient norm that is not finite."""
    figures = ', '.join(f'{name} {float(value):.4g}' for name, value in numbers.items())
    text = (f'step {step}: {figures}: the run has diverged; lower learning_rate or raise '
            'warmup_iters.')
    if glob.glob(os.path.join(glob.escape(out_dir), 'ckpt*.pt')):
        text += f' Last good checkpoint: {out_dir}, step {saved_step}'
    return ValueError(text)


def peak_memory_mb(device_type='cpu'):
    """The most memory that this process has held, in MB (2^20 bytes): on the GPU if there is one,
    else resident. None where the system does not tell."""
    if device_type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10  # bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# -----------------------------------------------------------------------------
# Seeds and the schedule


def seed_for(seed, purpose, *where):
    """
    A seed that is a pure function of the run's seed, the purpose ('batches', 'dropout', ...), and
    where in the run it is used (step, rank, ...). So a resumed run draws the same numbers, and no
    two purposes share a random stream.
    """
    text = f'{seed} {purpose} {where}'
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], 'little') >> 1  # torch takes seeds of 63 bits


def generator_for(seed, purpose, *where, device='cpu'):
    """A torch.Generator seeded by seed_for(seed, purpose, *where)."""
    return torch.Generator(device).manual_seed(seed_for(seed, purpose, *where))


def learning_rate_at(step, config):
    """
    The learning rate of a step: linear warm-up over warmup_iters, then by lr_schedule down to
    min_lr at lr_decay_iters (0 = max_iters), where it stays. decay_lr=False: learning_rate at every
    step.

    'cosine'    half a cosine (arXiv 1608.03983)
    'linear'    a straight line
    'wsd'       warm-up, stable, decay: linear over the last cooldown_frac of the steps after the
                warm-up (arXiv 2405.18392)
    'constant'  no decay
    """
    peak = config['learning_rate']
    floor = config.get('min_lr', 0.0)
    warmup = config['warmup_iters']
    end = config.get('lr_decay_iters') or config['max_iters']
    schedule = config.get('lr_schedule', 'cosine')
    if schedule not in ('cosine', 'linear', 'wsd', 'constant'):
        raise ValueError('lr_schedule must be one of cosine, linear, wsd, constant; '
                         f'got {schedule!r}')
    if not config.get('decay_lr', True):
        return peak
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)

    # t goes from 0 at the end of the warm-up to 1 at the end of the decay
    t = min(1.0, (step - warmup) / max(1, end - warmup))
    if schedule == 'cosine':
        share = 0.5 * (1 + math.cos(math.pi * t))
    elif schedule == 'linear':
        share = 1 - t
    elif schedule == 'wsd':
        share = min(1.0, (1 - t) / max(1e-9, config.get('cooldown_frac', 0.2)))
    else:
        share = 1.0
    return floor + share * (peak - floor)


def schedule_factor(step, config):
    """The learning rate of a step as a share of its peak. It scales the rate of every parameter
    group, so that one schedule serves groups of different rates."""
    # With a rate of 0, the other groups still follow the schedule.
    peak = config['learning_rate'] or 1.0
    return learning_rate_at(step, dict(config, learning_rate=peak)) / peak


# What the optimizers keep of each parameter.
ADAMW_STATE = ('step', 'exp_avg', 'exp_avg_sq')
MUON_STATE = ('momentum_buffer',)


def restore_optimizers(optimizers, checkpoint):
    """
    Load the optimizers' state (moments and momentum) from a checkpoint; nothing happens if that is
    empty. Rates and decay stay those of this run's settings. ValueError for state that these
    optimizers did not save: other names, shapes or types could crash them.
    """
    if not checkpoint:
        return
    saved_states = checkpoint.get('optimizer', [])
    if len(saved_states) != len(optimizers):
        raise ValueError(f'the checkpoint has the state of {len(saved_states)} optimizers, but '
                         f'this run has {len(optimizers)}')
    for optimizer, saved in zip(optimizers, saved_states):
        if not isinstance(saved, dict) or not isinstance(saved.get('state'), dict):
            raise ValueError("the checkpoint's optimizer state must be a dict of dicts")
        groups = optimizer.state_dict()['param_groups']
        parameters = [p for group in optimizer.param_groups for p in group['params']]
        names = ADAMW_STATE if 'betas' in optimizer.defaults else MUON_STATE
        for index, state in saved['state'].items():
            check_optimizer_state(index, state, parameters, names)
        optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})


def check_optimizer_state(index, state, parameters, names):
    """ValueError unless `state` is what an optimizer saves under these names for the parameter
    number `index`."""
    if type(index) is not int or not 0 <= index < len(parameters):
        raise ValueError(f'the checkpoint has optimizer state of a parameter {index!r}, but there '
                         f'are {len(parameters)}')
    if not isinstance(state, dict) or set(state) != set(names):
        raise ValueError(f'the optimizer state of parameter {index} in the checkpoint must have '
                         f'{", ".join(names)}')
    parameter = parameters[index]
    for name, value in state.items():
        shape = torch.Size() if name == 'step' else parameter.shape
        dtype = torch.float32 if name == 'step' else parameter.dtype
        # A tensor of another layout, or of overlapping rows, is not updated correctly.
        is_plain = (isinstance(value, torch.Tensor) and value.layout == torch.strided
                    and value.device.type == 'cpu' and value.is_contiguous())
        if not is_plain or value.shape != shape or value.dtype != dtype:
            raise ValueError(f'the optimizer state {name!r} of parameter {index} in the checkpoint '
                             f'must be a tensor of {dtype} and of shape {tuple(shape)}')
        is_negative = name in ('step', 'exp_avg_sq') and (value < 0).any()
        if is_negative or not torch.isfinite(value).all():
            raise ValueError(f'the optimizer state {name!r} of parameter {index} in the checkpoint '
                             'has impossible values')


# -----------------------------------------------------------------------------
# Checkpoints: plain dicts of tensors and primitives, never half-written, never run as code


@contextlib.contextmanager
def errors_name_setting(setting, path):
    """A context in which an OSError, such as of a full disk, a read-only folder, or a file where a
    folder is expected, is raised again with a message that names the setting of the path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f'{setting}={path} cannot be written ({reason}); give another {setting}, or '
                      'make room there') from error


@contextlib.contextmanager
def write_atomically(path, keep=None):
    """
    A binary file that appears under its name only when it is complete and on the disk. Until then
    the old file stays; from then on the old file has the name `keep`, if that is given.
    """
    temporary = f'{path}.tmp'
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        # The new file is complete: now, and not before, the old one gives up its name.
        if keep and os.path.exists(path):
            keep_old_file(path, keep)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def keep_old_file(path, keep):
    """Give the file at `path` the second name `keep`, so that at no moment either name is without
    a file. (On a file system without hard links, `path` is without one for a moment.)"""
    temporary = f'{keep}.tmp'
    if os.path.exists(keep) and os.path.samefile(path, keep):
        return  # a run that was killed had got this far
    with contextlib.suppress(FileNotFoundError):
        os.remove(temporary)  # left by a run that was killed
    try:
        os.link(path, temporary)
        os.replace(temporary, keep)
    except OSError:  # a file system without hard links
        os.replace(path, keep)


def save_checkpoint(out_dir, checkpoint, name='ckpt.pt', final=True):
    """
    Write out_dir/name so that a crash at any moment leaves a complete checkpoint; the ckpt.pt
    before it, if it is intact, is kept as ckpt_prev.pt. On a full disk the old one stays: OSError,
    or a warning if this is not the final save. ValueError, and nothing is written, if a weight is
    not finite.
    """
    # A model that has diverged must not replace a good one.
    tensors = checkpoint['model'] | checkpoint.get('policy', {})  # in PPO with the value head
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"step {checkpoint['step']}: {key} has values that are not finite, so "
                             f'nothing is saved; the last checkpoint in {out_dir} is kept')
    path = os.path.join(out_dir, name)
    keep = None
    if name == 'ckpt.pt' and is_intact(path):  # a damaged one must not replace a good ckpt_prev.pt
        keep = os.path.join(out_dir, 'ckpt_prev.pt')
    try:
        os.makedirs(out_dir, exist_ok=True)
        with write_atomically(path, keep) as f:
            torch.save(checkpoint | {'run_id': torchrun_id()}, f)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        weights = sum(tensor.nbytes for tensor in checkpoint['model'].values())
        text = (f'{path} could not be saved; about {3 * weights:,} bytes are needed for weights '
                f'and optimizer state: make room there, or give another out_dir. The previous '
                f'checkpoint is kept ({error})')
        if final:
            raise OSError(text) from error
        print(printable(f'warning: {text}'))


def is_intact(path):
    """Whether the file at `path` is a zip archive, as a checkpoint is, with the right checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # missing, or damaged in one of many ways
        return False


def load_checkpoint(path, name='ckpt.pt'):
    """
    The checkpoint at a path or, with this name, in a run's folder, on the CPU; its checksums are
    verified. If it is damaged or missing in a folder, ckpt_prev.pt is loaded and that is printed.
    ValueError if neither can be read.
    """
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such run; train it first, or name another folder')
    if not os.path.isdir(path):
        return read_checkpoint(path)
    current = os.path.join(path, name)
    previous = os.path.join(path, 'ckpt_prev.pt')
    try:
        return read_checkpoint(current)
    except ValueError as error:
        if not os.path.exists(previous):
            raise
        checkpoint = read_checkpoint(previous)
        if is_rank_0():
            print(printable(f"{error}; loading {previous}, step {checkpoint['step']}"), flush=True)
        return checkpoint


# The entries of a checkpoint and their types; all checkpoints have the required ones.
ENTRIES = {
    'stage': str, 'step': int, 'model': dict, 'model_args': dict, 'config': dict, 'tokenizer': dict,
    'eos_ids': list, 'optimizer': list, 'scaler': dict, 'best_val_loss': float, 'policy': dict,
    'kl_coef': float, 'run_id': str,
}
REQUIRED_ENTRIES = ('step', 'model', 'model_args', 'config')
SCALER_ENTRIES = {'scale', 'growth_factor', 'backoff_factor', 'growth_interval', '_growth_tracker'}


def is_finite_number(value):
    """True for an int or a float that float can hold; False for bool, NaN and infinity."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def check_entries(checkpoint):
    """ValueError unless a checkpoint has the entries that this program saves. Weights, model_args,
    tokenizer and optimizer state are checked by those who load them."""
    # 1. names and types
    if not isinstance(checkpoint, dict):
        raise ValueError('not a nanoLLM checkpoint')
    missing = [name for name in REQUIRED_ENTRIES if name not in checkpoint]
    unexpected = [one_line(repr(name), 30) for name in checkpoint if name not in ENTRIES]
    if missing or unexpected:
        raise ValueError(f'not a nanoLLM checkpoint; missing: {", ".join(missing) or "nothing"}; '
                         f'unexpected: {", ".join(unexpected[:5]) or "nothing"}')
    for name, value in checkpoint.items():
        if not isinstance(value, ENTRIES[name]) or isinstance(value, bool):
            raise ValueError(f'not a nanoLLM checkpoint; {name} must be of type '
                             f'{ENTRIES[name].__name__}')

    # 2. values
    if not 0 <= checkpoint['step'] < 2 ** 63:
        raise ValueError(f"not a nanoLLM checkpoint; its step is {checkpoint['step']}")
    if math.isnan(checkpoint.get('best_val_loss', 0)):
        raise ValueError('not a nanoLLM checkpoint; best_val_loss is NaN')
    if not 0 <= checkpoint.get('kl_coef', 0) < math.inf:
        raise ValueError(f"not a nanoLLM checkpoint; kl_coef is {checkpoint['kl_coef']}")
    for name, value in checkpoint['config'].items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str, tuple)):
            raise ValueError(f'not a nanoLLM checkpoint; its setting {one_line(repr(name), 30)} '
                             f'has a value of type {type(value).__name__}')
    scaler = checkpoint.get('scaler', {})  # it is empty unless the run is in float16
    numbers = [value for value in scaler.values() if is_finite_number(value) and value >= 0]
    if scaler and (set(scaler) != SCALER_ENTRIES or len(numbers) < len(scaler)):
        raise ValueError('not a nanoLLM checkpoint; scaler is not the state of a gradient scaler')


def read_checkpoint(path):
    """The checkpoint file at `path`. Only tensors and primitives are read; nothing in it is run.
    ValueError if it is damaged, or not what this program saves."""
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such checkpoint; train one, or name another folder')
    try:
        # A checkpoint is a zip archive, whose checksums tell damage.
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if size > os.path.getsize(path):
                raise ValueError('compressed members, which this program never writes')
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f'wrong checksum of {damaged}')
        # weights_only: no code in the file is run.
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
        check_entries(checkpoint)
        return checkpoint
    except Exception as error:
        raise ValueError(f'{path}: damaged or foreign checkpoint '
                         f'({one_line(str(error), 200)})') from error


def move_old_run_aside(out_dir):
    """Move what another run left in a folder to before.1 in it, or to the next free number."""
    names = ['log.jsonl', 'curves.png', 'tensorboard', 'wandb_id.txt', 'tokenizer.json',
             'ckpt_prev.pt', 'ckpt_best.pt', 'ckpt.pt']
    names = [name for name in names if os.path.exists(os.path.join(out_dir, name))]
    if not set(names) - {'tokenizer.json'}:
        return
    # The first number that is free; earlier runs stay where they were moved.
    for number in itertools.count(1):
        folder = os.path.join(out_dir, f'before.{number}')
        if not os.path.exists(folder):
            break
    os.mkdir(folder)
    for name in names:
        os.rename(os.path.join(out_dir, name), os.path.join(folder, name))
    print(printable(f'{out_dir} held another run, which is now in {folder}'))


# -----------------------------------------------------------------------------
# Stopping


class StopSignal:
    """SIGTERM and Ctrl-C end the step, not the process: the loop asks by_any_rank, saves, and calls
    end_training. A second Ctrl-C quits at once."""

    def __init__(self):
        self.requested = False
        self.exit_code = 0
        signal.signal(signal.SIGTERM, self.handle)
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, number, frame):
        self.requested = True
        self.exit_code = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def by_any_rank(self, run):
        """Whether any rank was asked to stop. All ranks ask together, so that they end after the
        same step."""
        requested = torch.tensor(float(self.requested), device=run.device)
        return sum_over_ranks(requested).item() > 0

    def end_training(self, run, stopping, step, config):
        """End the ranks' work together: only rank 0 returns. If a signal stopped the run, rank 0
        prints the command that resumes it and exits too."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # from here on they end the process again
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # exit_code is 0 here if only another rank received the signal.
        exit_code = self.exit_code or 128 + signal.SIGTERM
        if run.world_size > 1:
            torch.distributed.barrier()  # no rank leaves while another still works
            torch.distributed.destroy_process_group()
            if not run.is_master:
                sys.stdout.flush()
                sys.stderr.flush()
                # An ordinary exit now and then aborts, while threads of gloo still end.
                os._exit(exit_code if stopping else 0)
        if stopping:
            script = os.path.basename(sys.argv[0])
            words = [script, '--init_from=resume', f"--out_dir={config['out_dir']}"]
            for key, value in settings_that_name_code(config).items():
                words.append(f'--{key}={value}')  # resume() wants it again
            command = shlex.join(words)
            print(printable(f'stopped at step {step}; resume with: python {command}'))
            sys.exit(exit_code)


# -----------------------------------------------------------------------------
# The log

# Files that a run writes under a temporary name first; a killed run may leave one behind.
TEMPORARY_FILES = ('ckpt.pt.tmp', 'ckpt_prev.pt.tmp', 'ckpt_best.pt.tmp', 'log.jsonl.tmp')


def duration(seconds):
    """
    >>> duration(75), duration(7500)
    ('1:15', '2:05:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'


def lock_run_folder(out_dir):
    """
    Take the lock of a run's folder, which one process can hold, and return it. It is released when
    it is garbage-collected or the process ends, however it ends. ValueError, naming the process, if
    another one holds it.
    """
    lock = FileLock(os.path.join(out_dir, 'run.lock'))
    holder = os.path.join(out_dir, 'run.pid')
    try:
        lock.acquire(blocking=False)
    except Timeout:
        process = 'unknown'  # it has not written its number yet
        with contextlib.suppress(OSError), open(holder, encoding='utf-8') as f:
            process = one_line(f.read())
        raise ValueError(f'{out_dir}: process {process} is using this folder; wait for its end, or '
                         'give another out_dir') from None
    with open(holder, 'w', encoding='utf-8') as f:
        f.write(f'{os.getpid()} ({os.path.basename(sys.argv[0])})')
    return lock


def start_wandb(out_dir, config):
    """
    The wandb run of a folder, under the name of the folder unless wandb_run_name is set. Its id is
    kept in the folder, so that a resumed run continues it. (wandb keeps what it has: it ignores the
    steps that a resumed run logs again.)
    """
    import wandb
    id_path = os.path.join(out_dir, 'wandb_id.txt')
    wandb_id = None  # wandb chooses a new one
    if os.path.exists(id_path):
        with open(id_path, encoding='utf-8') as f:
            wandb_id = f.read().strip()
    # out/base is named base; out/base/eval, of --eval_only=True, is named base/eval.
    run_folder = os.path.abspath(config.get('out_dir', out_dir))
    name = os.path.relpath(out_dir, os.path.dirname(run_folder))
    run = wandb.init(project=config.get('wandb_project', 'nanollm'),
                     name=config.get('wandb_run_name') or name, id=wandb_id, resume='allow',
                     config=config, dir=out_dir)
    with write_atomically(id_path) as f:
        f.write(run.id.encode())
    return run


class Logger:
    """
    A run's records, written by rank 0: an aligned line per logged step on the screen, log.jsonl,
    and if switched on TensorBoard (tensorboard_log) and wandb (wandb_log).

    A run resumed at `step` (None = a fresh run) drops the records from that step on, which it will
    write again. A fresh run moves an older run in the folder aside.
    """

    def __init__(self, out_dir, config, step=None, is_master=True):
        self.out_dir = out_dir
        self.is_master = is_master
        self.last_step = config.get('max_iters', 0)
        self.first = None  # (step, time) of the first record, to estimate the time left
        self.tensorboard = None
        self.wandb = None
        if not is_master:
            return
        # 1. the folder: no other run may use it, and nothing saved is ever lost
        with errors_name_setting('out_dir', out_dir):
            os.makedirs(out_dir, exist_ok=True)
            self.lock = lock_run_folder(out_dir)
        if step is None:
            move_old_run_aside(out_dir)
        for name in TEMPORARY_FILES:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out_dir, name))
        # 2. the records before this step (the final figures, which have no step, are written again)
        kept = [record for record in read_log(out_dir) if step and record.get('step', step) < step]
        with write_atomically(os.path.join(out_dir, 'log.jsonl')) as f:
            for record in kept:
                f.write(json.dumps(record).encode() + b'\n')
        # 3. other logs, if they are switched on
        if config.get('tensorboard_log'):
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(os.path.join(out_dir, 'tensorboard'),
                                             purge_step=step or 0)
        if config.get('wandb_log'):
            self.wandb = start_wandb(out_dir, config)

    def write(self, record):
        """Append a record to log.jsonl. JSON has no NaN, so what is not finite becomes null."""
        record = json.loads(json.dumps(record), parse_constant=lambda constant: None)
        try:
            with open(os.path.join(self.out_dir, 'log.jsonl'), 'a', encoding='utf-8') as f:
                f.write(json.dumps(record) + '\n')
        except OSError as error:  # a full disk does not stop a run
            print(printable(f'warning: not logged: {error}'))

    def log(self, step, metrics):
        """Record {name: number} of a step. The loads of single experts, moe/..., are too many for
        the screen."""
        if not self.is_master:
            return
        # The record on disk has all metrics; the line on the screen leaves out single experts.
        metrics = {name: float(value) for name, value in metrics.items() if value is not None}
        self.write({'step': step, **metrics})
        columns = [f'step {step:>6}/{self.last_step}']
        if self.first is None:
            self.first = step, time.perf_counter()
        first_step, began = self.first
        if first_step < step < self.last_step:
            seconds_per_step = (time.perf_counter() - began) / (step - first_step)
            columns.append(f'{duration(seconds_per_step * (self.last_step - step)):>7} left')
        for name, value in metrics.items():
            if not name.startswith('moe/'):
                columns.append(f'{name} {value:>10.0f}' if abs(value) >= 1000
                               else f'{name} {value:>10.5g}')
        print(printable(' | '.join(columns)), flush=True)
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, step)
            self.tensorboard.flush()
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def final(self, figures):
        """Print and record the final figures of a run (None is omitted), end its wandb run, and
        release the folder."""
        if not self.is_master:
            return
        figures = {name: value for name, value in figures.items() if value is not None}
        self.write({'final': figures})
        if self.wandb:
            self.wandb.summary.update(figures)
            self.wandb.finish()
        texts = []
        for name, value in figures.items():
            digits = '.4f' if isinstance(value, float) and abs(value) < 1000 else '.0f'
            texts.append(f'{name} {value:,{digits}}')
        print(printable(f"final: {', '.join(texts)}"))
        self.lock.release()


def is_record(value):
    """Whether a value has the form of what Logger writes: figures of a step, or the final ones."""
    if not isinstance(value, dict):
        return False
    figures = value
    if value.keys() == {'final'}:
        figures = value['final']
    elif type(value.get('step')) is not int or abs(value['step']) > 2 ** 53:
        return False
    if not isinstance(figures, dict):
        return False
    return all(figure is None or is_finite_number(figure) for figure in figures.values())


def read_log(out_dir):
    """The records of out_dir/log.jsonl. Lines that are not records, such as a last line that a
    crash cut short, are skipped."""
    path = os.path.join(out_dir, 'log.jsonl')
    if not os.path.exists(path):
        return []
    records = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if is_record(record):
                records.append(record)
    return records
