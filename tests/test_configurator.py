"""
configurator.py: settings, the choice of device and precision, seeds, the learning-rate schedule,
checkpoints and the log. Also two rules for all files: their doctests pass, and imports go one way.

The references are independent: values computed by hand, nanoGPT's own schedule and config file,
processes that are killed, full disks, pickles that would do harm, and the readers of TensorBoard
and wandb.
"""
import ast
import contextlib
import doctest
import errno
import glob
import graphlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile

import pytest
import torch

import configurator
import train
from configurator import (SCALER_ENTRIES, Logger, StopSignal, check_choice, check_divisible,
                          configure, divergence_error, generator_for, learning_rate_at,
                          load_checkpoint, must_skip, one_line_errors, parallel, peak_flops,
                          peak_memory_mb, print_help, printable, read_log, read_settings,
                          restore_optimizers, resume, save_checkpoint, schedule_factor, seed_for,
                          start_run, start_wandb, write_atomically)
from conftest import DAMAGED_LINES, ROOT, call, finish, ok, one_line, start

# -----------------------------------------------------------------------------
# All files: doctests and imports

DOCTESTED = ['configurator', 'model', 'bpe', 'sample', 'train', 'sft', 'reward', 'ppo',
             'data.dataset', 'data.examples', 'data.pretrained', 'assets.draw', 'assets.draw_mask',
             'assets.draw_merges']

# Where each idea is introduced, it has a worked example.
WORKED_EXAMPLES = ['model.attention', 'model.rotate', 'model.visible', 'model.KVCache',
                   'model.load_balancing_loss', 'model.sampling_probs', 'bpe.train_bpe_plain',
                   'bpe.render_chat', 'reward.pairwise_loss', 'ppo.compute_gae']


@pytest.mark.parametrize('name', DOCTESTED)
def test_the_doctests_of_a_module_pass(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_the_doctests_of_all_modules_of_data_are_run():
    files = glob.glob(os.path.join(ROOT, 'data', '*.py'))
    modules = {f'data.{os.path.basename(file)[:-3]}' for file in files}
    assert modules <= set(DOCTESTED)


@pytest.mark.parametrize('name', WORKED_EXAMPLES)
def test_each_central_idea_has_a_worked_example(name):
    module, _, member = name.rpartition('.')
    function = getattr(importlib.import_module(module), member)
    assert doctest.DocTestParser().get_examples(function.__doc__)


# What a file may import of ours. 'data' stands for the modules in this folder, 'assets' for
# assets/draw.py, which the stages import, and 'pictures' for the other drawing scripts.
LAYER_1 = {'model', 'configurator'}
LAYER_2 = LAYER_1 | {'bpe'}
LAYER_3 = LAYER_2 | {'data'}
LAYER_4 = LAYER_3 | {'sample', 'assets'}
MAY_IMPORT = {
    'model': set(),
    'configurator': set(),
    'bpe': {'configurator'},
    'data': LAYER_3,
    'sample': LAYER_3,
    'assets': LAYER_3,
    'train': LAYER_4,
    'sft': LAYER_4,
    'reward': LAYER_4,
    'ppo': LAYER_4,
    'pictures': LAYER_4 | {'train', 'sft', 'reward', 'ppo'},
    'config': set(),
}


def source_files():
    """{name of the module: path} of the source files, tests excluded."""
    found = {}
    for pattern in ('*.py', 'assets/*.py', 'config/**/*.py', 'data/*.py', 'data/*/*.py'):
        for path in glob.glob(os.path.join(ROOT, pattern), recursive=True):
            name = os.path.relpath(path, ROOT).removesuffix('.py').replace(os.sep, '.')
            found[name] = path
    return found


def imported_modules(path, ours):
    """The modules among `ours` that a file imports anywhere, also inside its functions."""
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f'{node.module}.{alias.name}' for alias in node.names)
    return names & set(ours)


def layer_of(module):
    if module.startswith('assets.draw_'):
        return 'pictures'
    return module.split('.')[0]


def test_imports_are_found_also_inside_functions(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text('import os, model\nfrom data import examples\nfrom bpe import Tokenizer\n'
                    'def f():\n    from data.dataset import load_dataset\n', encoding='utf-8')
    ours = ['model', 'bpe', 'ppo', 'data.examples', 'data.dataset', 'data.pretrained']
    assert imported_modules(path, ours) == {'model', 'bpe', 'data.examples', 'data.dataset'}


def test_every_file_imports_only_from_the_layers_below():
    files = source_files()
    assert len(files) > 20
    for module, path in files.items():
        allowed = MAY_IMPORT[layer_of(module)]
        for imported in imported_modules(path, files):
            assert layer_of(imported) in allowed, f'{module} imports {imported}'


def test_there_is_no_circle_of_imports():
    files = source_files()
    graph = {module: imported_modules(path, files) for module, path in files.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError if there is one
    assert sorted(order) == sorted(files)


# -----------------------------------------------------------------------------
# Settings

SCRIPT = '''"""What the script does."""
import math
before = 1

# -----------------------------------------------------------------------------
# where
out_dir = 'out/a'        # folder of the run
seed = 1337
# how
n_layer = 4              # layers: 1 = one
learning_rate = 3e-4     # at the top, #1
bias = False             # in linear layers
stages = (8, 64)         # a tuple
compile = 'auto'         # 'auto' | True | False
max_iters = 100
warmup_iters = 10
# -----------------------------------------------------------------------------
after = 2  # no setting

# -----------------------------------------------------------------------------
neither = 3
'''

DEFAULTS = dict(out_dir='out/a', seed=1337, n_layer=4, learning_rate=3e-4, bias=False,
                stages=(8, 64), compile='auto', max_iters=100, warmup_iters=10)


@pytest.fixture
def run_configure(tmp_path, monkeypatch):
    """
    A function that runs configure() in SCRIPT, with these arguments. Config files are given by name
    and text: run_configure('a.py', a='n_layer = 1').
    """
    def run_configure(*args, script=SCRIPT, **config_files):
        path = tmp_path / 'script.py'
        path.write_text(script, encoding='utf-8')
        for name, text in config_files.items():
            (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', ['script.py', *args])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # configure() replaces it
        names = {'__file__': str(path)}
        exec(script, names)
        config, overrides = configure(names)
        for key, value in config.items():
            assert names[key] == value  # the script's own names are set, too
        return config, overrides
    return run_configure


@pytest.fixture
def settings_of(run_configure):
    """A function that returns the settings of a command line."""
    return lambda *args, **more: run_configure(*args, **more)[0]


@pytest.mark.parametrize('short, name', [
    ('lr', 'learning_rate'), ('epochs', 'max_iters'), ('bs', 'batch_size')])
def test_a_usual_short_name_suggests_the_setting(short, name):
    assert configurator.nearest_name(short, read_settings(train.__file__)) == name


@pytest.fixture
def error_of(run_configure):
    """A function that returns the message of the ValueError that a command line raises."""
    def error_of(*args, **config_files):
        with pytest.raises(ValueError) as error:
            run_configure(*args, **config_files)
        return str(error.value)
    return error_of


def test_settings_are_read_from_the_lines_between_the_first_two_rules(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    assert read_settings(tmp_path / 'script.py') == {
        'out_dir': 'folder of the run', 'seed': '', 'n_layer': 'layers: 1 = one',
        'learning_rate': 'at the top, #1', 'bias': 'in linear layers', 'stages': 'a tuple',
        'compile': "'auto' | True | False", 'max_iters': '', 'warmup_iters': ''}


def test_without_arguments_all_settings_have_their_defaults(run_configure):
    assert run_configure() == (DEFAULTS, {})


@pytest.mark.parametrize('args, n_layer', [
    (['a.py', '--n_layer=2'], 2),
    (['--n_layer=2', 'a.py'], 1),
    (['a.py', 'b.py'], 3),
    (['b.py', 'a.py'], 1),
    (['a.py', '--n_layer=2', 'empty.py'], 2)])
def test_config_files_and_arguments_apply_in_their_order(settings_of, args, n_layer):
    config = settings_of(*args, a='n_layer = 1', b='n_layer = 3', empty='')
    assert config['n_layer'] == n_layer


def test_overrides_name_the_argument_or_the_file_and_line_that_set_each_setting(run_configure):
    text = 'n_layer = 1\nseed = 2\n\nseed = 3\n_private = 4\n'
    _, overrides = run_configure('--max_iters=7', 'a.py', '--n_layer=4', a=text)
    assert overrides == {'max_iters': '--max_iters=7', 'seed': 'a.py:4', 'n_layer': '--n_layer=4'}


@pytest.mark.parametrize('argument, value', [
    ('--n_layer=6', 6),
    ('--n_layer=1e6', 1_000_000),
    ('--n_layer=2.0', 2),
    ('--learning_rate=1e-3', 0.001),
    ('--learning_rate=1', 1.0),
    ('--bias=True', True),
    ('--bias=true', True),
    ('--stages=(1,2,3)', (1, 2, 3)),
    ('--compile=False', False),
    ('--compile=true', True),
    ('--compile=auto', 'auto'),
    ('--out_dir=a=b=c', 'a=b=c'),
    ('--out_dir=', ''),
    ('--out_dir=5', '5'),
    ('--out_dir=True', 'True'),
    ("--out_dir=it's --here", "it's --here"),
    ('--out_dir=o/é 字', 'o/é 字')])
def test_a_value_is_read_as_the_type_of_its_setting(settings_of, argument, value):
    key = argument[2:].split('=')[0]
    result = settings_of(argument)[key]
    assert result == value
    assert type(result) is type(value)


def test_a_config_file_runs_in_its_own_namespace_which_starts_with_the_current_settings(
        settings_of):
    text = '''
import math, os.path as path
from os import sep as _sep
_half = 0.5
warmup_iters = 7
max_iters = 10 * warmup_iters + n_layer
learning_rate = _half * math.pi
for _i in range(3):
    seed = sum(_half * i for i in range(_i))
bias = path.exists(__file__) and _sep == path.sep
'''
    # The sum is 0.5, and a seed is a whole number.
    with pytest.raises(ValueError, match='seed must be of type int, like 1337; got 0.5'):
        settings_of('a.py', a=text)
    config = settings_of('--n_layer=5', 'a.py', a=text.replace('_half * i', 'i'))
    assert config == dict(out_dir='out/a', seed=1, n_layer=5, learning_rate=math.pi / 2, bias=True,
                          stages=(8, 64), compile='auto', max_iters=75, warmup_iters=7)


# Idioms of config files that were published for nanoGPT.
IDIOMS = '''
from datetime import datetime
import time as clock
out_dir = 'out/' + datetime.fromtimestamp(0).strftime('%Y')
max_iters = 1e6
warmup_iters = max_iters * 0.03
_tokens_per_step = 32768

def steps(tokens):
    return tokens // _tokens_per_step

class Stages:
    first = 8

for _i in range(2):
    n_layer = _i + 1
seed = max(1, steps(100_000))
stages = (Stages.first, int(clock.time() > 0))
'''


def test_functions_classes_imports_and_names_with_an_underscore_are_private_to_a_config_file(
        run_configure):
    config, overrides = run_configure('a.py', a=IDIOMS)
    expected = dict(DEFAULTS, max_iters=1_000_000, warmup_iters=30_000, n_layer=2, seed=3,
                    stages=(8, 1))
    assert config.pop('out_dir') in ('out/1969', 'out/1970')  # by the time zone
    expected.pop('out_dir')
    assert config == expected
    assert type(config['max_iters']) is int and type(config['warmup_iters']) is int
    assert set(overrides) == {'out_dir', 'max_iters', 'warmup_iters', 'n_layer', 'seed', 'stages'}


@pytest.mark.parametrize('text, name', [
    ('tokens_per_step = 32768', 'tokens_per_step'),
    ('for i in range(3):\n    n_layer = i + 1', 'i'),
    ('from math import pi', 'pi')])
def test_an_unknown_name_in_a_config_file_is_an_error_that_explains_the_underscore(
        error_of, text, name):
    message = error_of('a.py', a=text)
    assert message == (f"a.py:1: there is no setting {name!r}; a helper name of your own begins "
                       f"with '_', like _{name}")


def test_a_function_as_the_value_of_a_setting_is_an_error(error_of):
    message = error_of('a.py', a='def _steps():\n    return 5\nmax_iters = _steps\n')
    assert message.startswith('a.py:3: max_iters must be of type int, like 100; got <function')


def test_a_function_of_a_config_file_may_assign_a_setting(settings_of):
    text = 'def _deepen():\n    global n_layer\n    n_layer = 7\n_deepen()'
    assert settings_of('a.py', a=text)['n_layer'] == 7


def test_a_setting_whose_default_is_auto_may_be_a_bool(settings_of):
    config = settings_of('a.py', 'b.py', a='compile = False', b="compile = 'auto'")
    assert config['compile'] == 'auto'
    assert settings_of('a.py', a='compile = False')['compile'] is False


@pytest.mark.parametrize('args, parts', [
    (['--n_layr=6'], ['--n_layr=6', 'no setting', '--n_layer?']),
    (['--qqq=6'], ['--qqq=6', 'no setting', '--help']),
    (['--lr=0.1'], ['--lr=0.1', 'no setting', '--learning_rate?']),
    (['--epochs=3'], ['--epochs=3', 'no setting', '--max_iters?']),
    (['--after=6'], ['--after=6', 'no setting']),
    (['--n_layer=six'], ['--n_layer=six', 'n_layer', 'int', '4', "'six'"]),
    (['--n_layer=1.5'], ['--n_layer=1.5', 'int', '1.5']),
    (['--n_layer=1e400'], ['--n_layer=1e400', 'int', 'inf']),
    (['--n_layer=True'], ['int', 'True']),
    (['--n_layer='], ['--n_layer=', 'int']),
    (['--n_layer=__import__("os").getpid()'], ['int']),
    (['--learning_rate=fast'], ['--learning_rate=fast', 'float']),
    (['--learning_rate=1' + '0' * 400], ['learning_rate', 'float']),
    (['--bias=1'], ['--bias=1', 'bool', '1']),
    (['--stages=8'], ['--stages=8', 'tuple']),
    (['--seed=1', '--n_layer=2', '--seed=1'], ['--seed=1', 'seed is given twice']),
    (['--bias'], ['--bias', '--key=value']),
    (['n_layer=6'], ['n_layer=6', 'no such config file', '--key=value']),
    (['nowhere.py'], ['nowhere.py', 'no such config file'])])
def test_a_mistake_on_the_command_line_is_an_error_that_names_the_argument(error_of, args, parts):
    message = error_of(*args)
    for part in parts:
        assert part in message
    assert '\n' not in message


@pytest.mark.parametrize('text, parts', [
    ('\nn_layr = 6\n# n_layr', ['a.py:2', "'n_layr'", 'did you mean n_layer?']),
    ('n_layer = 3\nn_layer = "six"\n\n', ['a.py:2', 'n_layer', 'int', "'six'"]),
    ('\n\nn_layer = = 6', ['a.py:3', 'SyntaxError']),
    ('\n\nn_layer = 1 / 0\n', ['a.py:3', 'ZeroDivisionError']),
    ('\nimport json\n\nn_layer = json.loads("{")\n', ['a.py:4', 'JSONDecodeError']),
    ('\nimport nowhere_at_all\n', ['a.py:2', 'ModuleNotFoundError']),
    ('\nfrom math import pi\n', ['a.py:2', "'pi'"])])
def test_a_mistake_in_a_config_file_is_an_error_that_names_the_file_and_the_line(
        error_of, text, parts):
    message = error_of('a.py', a=text)
    for part in parts:
        assert part in message


RANGED = '''
# -----------------------------------------------------------------------------
out_dir = 'out/a'
init_from = 'scratch'
seed = 1
batch_size = 8
learning_rate = 0.1
weight_decay = 0.1
grad_clip = 1.0
warmup_iters = 1
beta1 = 0.9
dropout = 0.0
kl_target = 6.0
# -----------------------------------------------------------------------------
'''


@pytest.mark.parametrize('argument, message', [
    ('--batch_size=0', 'batch_size must be at least 1; got 0'),
    ('--learning_rate=-0.1', 'learning_rate must be at least 0; got -0.1'),
    ('--learning_rate=1e400', 'learning_rate must be a finite number of at most 3e+38; got inf'),
    ('--learning_rate=1e39', 'learning_rate must be a finite number of at most 3e+38; got 1e+39'),
    ('--batch_size=1000001', 'batch_size must be at most 1,000,000; got 1000001'),
    ('--weight_decay=-1', 'weight_decay must be at least 0; got -1.0'),
    ('--grad_clip=-1', 'grad_clip must be at least 0; got -1.0'),
    ('--warmup_iters=-1', 'warmup_iters must be at least 0; got -1'),
    ('--beta1=1.5', 'beta1 must be from 0 to 1; got 1.5'),
    ('--dropout=-0.5', 'dropout must be from 0 to 1; got -0.5'),
    ('--kl_target=0', 'kl_target must be above 0; got 0.0'),
    ('--seed=-1', 'seed must be at least 0; got -1'),
    (f'--seed={2 ** 63}', f'seed must be below 2**63; got {2 ** 63}'),
    ('--out_dir=', 'out_dir is empty; give a folder for the run, like out/x')])
def test_a_value_that_would_invert_or_break_training_is_refused(run_configure, argument, message):
    with pytest.raises(ValueError) as error:
        run_configure(argument, script=RANGED)
    assert str(error.value) == message


@pytest.mark.parametrize('argument', ['--learning_rate=0', '--grad_clip=0', '--beta1=1',
                                      '--dropout=0', f'--seed={2 ** 63 - 1}'])
def test_the_limits_of_a_range_are_accepted(run_configure, argument):
    run_configure(argument, script=RANGED)


def test_a_common_short_name_gets_the_setting_that_it_stands_for(run_configure):
    with pytest.raises(ValueError, match="no setting 'bs'; did you mean --batch_size?"):
        run_configure('--bs=3', script=RANGED)


def test_a_choice_that_does_not_exist_is_an_error_that_lists_those_that_do():
    check_choice({'loss': 'bt'}, 'loss', ('bt', 'dpo'))
    with pytest.raises(ValueError, match="loss must be one of 'bt', 'dpo'; got 'ppo'"):
        check_choice({'loss': 'ppo'}, 'loss', ('bt', 'dpo'))


@pytest.mark.parametrize('argument', ['--out_dir=~/run', '--init_from=~/run'])
def test_a_path_may_begin_with_a_tilde(run_configure, argument):
    config, _ = run_configure(argument, script=RANGED)
    assert os.path.expanduser('~/run') in (config['out_dir'], config['init_from'])


def test_a_default_may_be_outside_its_range_where_it_has_a_meaning_of_its_own(run_configure):
    script = RANGED.replace('batch_size = 8', 'batch_size = 0')
    assert run_configure(script=script)[0]['batch_size'] == 0
    with pytest.raises(ValueError, match='batch_size must be at least 1; got -1'):
        run_configure('--batch_size=-1', script=script)


def test_help_lists_every_setting_with_its_default_and_comment():
    printed = ok(call('train.py', '--help'))
    assert printed.startswith(train.__doc__.strip())
    lines = printed.splitlines()
    for key, comment in read_settings(train.__file__).items():
        beginning = f'  --{key}={getattr(train, key)!r} '
        assert any(line.startswith(beginning) and line.endswith(comment) for line in lines), key


HEADINGS = {
    'train.py': ['the run', 'data', 'optimizer and schedule', 'machine'],
    'sft.py': ['the run', 'data', 'machine'],
    'reward.py': ['the run', 'data', 'machine'],
    'ppo.py': ['the run', 'machine'],
    'sample.py': [],
}


@pytest.mark.parametrize('script', HEADINGS)
def test_help_prints_the_headings_of_the_settings_without_importing_torch(script):
    result = finish(start('-X', 'importtime', script, '--help'))
    printed = ok(result).splitlines()
    settings = printed[printed.index('Settings:') + 1:]

    # 1. The headings and settings are those of the source, in the same order.
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        block = f.read().split('# ' + '-' * 77 + '\n')[1]
    expected = []
    for line in block.splitlines():
        if line.startswith('# '):
            expected.append(' ' + line.removeprefix('# '))
        elif line and not line.startswith(' '):
            expected.append('  --' + line.split(' = ')[0])
    # A comment that continues on the next line is indented.
    lines = [line for line in settings if not line.startswith(' ' * 40)]
    assert [line.split('=')[0] if '--' in line else line for line in lines] == expected
    for heading in HEADINGS[script]:
        assert f' {heading}' in settings

    # 2. Each line of -X importtime ends with the name of a module.
    imported = {line.split('|')[-1].strip() for line in result.stderr.splitlines()}
    assert 'configurator' in imported
    assert 'torch' not in imported and 'numpy' not in imported


@pytest.mark.parametrize('script', ['fuzz', 'kill', 'prove_post_training'])
def test_programs_with_their_own_options_answer_help_themselves(script):
    assert 'usage:' in ok(finish(start(f'tests/{script}.py', '--help')))


def test_help_prints_a_comment_of_several_lines_in_one_column(tmp_path, capsys):
    rule = '# ' + '-' * 77
    comment = "'sum' |"
    path = tmp_path / 'script.py'
    path.write_text(f"""{rule}
# loss
loss = 'mean'       # {comment}
                    # 'mean' = per token
{rule}
""", encoding='utf-8')
    print_help(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [' loss', "  --loss='mean'".ljust(40) + comment,
                          ' ' * 40 + "'mean' = per token"]


def test_a_users_mistake_is_one_line_with_exit_status_2():
    result = finish(start('train.py', '--n_layr=6'))
    expected = "error: --n_layr=6: there is no setting 'n_layr'; did you mean --n_layer?\n"
    assert one_line(result) == expected


def test_debug_shows_where_an_error_was_raised():
    result = call('train.py', '--n_layr=6', '--debug=True')
    assert result.returncode == 1
    assert 'Traceback' in result.stderr and 'configurator.py' in result.stderr


@pytest.mark.parametrize('error, status, printed', [
    (ValueError('a\nb'), 2, 'error: a b\n'),
    (OSError(2, 'not there', 'x'), 2, "error: [Errno 2] not there: 'x'\n"),
    (ModuleNotFoundError("No module named 'wandb'", name='wandb'), 2,
     "error: No module named 'wandb': pip install wandb\n"),
    (ValueError('x' * 10_000), 2, 'error: ' + 'x' * 1997 + '...\n'),
    (ValueError('\x1b[2J\u202egnp.\x07exe'), 2, 'error: [2Jgnp.exe\n'),
    (KeyboardInterrupt(), 130, 'error: KeyboardInterrupt\n'),
    (torch.OutOfMemoryError('CUDA'), 2, 'error: out of memory: lower batch_size'),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), 2,
     'error: out of memory: lower batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2,
     'error: out of memory: lower batch_size'),
    (MemoryError(), 2, 'error: out of memory: lower batch_size')])
def test_an_error_that_a_user_can_correct_is_printed_in_one_line(capsys, error, status, printed):
    with pytest.raises(SystemExit) as exit:
        one_line_errors(type(error), error, None)
    assert exit.value.code == status
    assert capsys.readouterr().err.startswith(printed)


def test_what_is_printed_neither_drives_the_terminal_nor_hides_its_order_nor_fails():
    text = ''.join(map(chr, range(sys.maxunicode + 1)))
    printed = printable(text)
    printed.encode()  # no lone surrogate
    removed = set(text) - set(printed)
    assert {'\x00', '\x07', '\x1b', '\r', '\x7f', '\x9b', '\u202e', '\u2066'} <= removed
    kept = {'\n', '\t', '\u200d', '\ufe0f', 'é', 'ש', '王', '👍'}  # also what joins emoji
    assert kept <= set(printed)
    assert len(removed) == 2 ** 11 + 63 + 12  # surrogates, control characters, directions


def test_an_internal_error_keeps_its_traceback(capsys):
    error = AssertionError('3 == 4')
    assert one_line_errors(type(error), error, None) is None
    assert 'AssertionError: 3 == 4' in capsys.readouterr().err


NANOGPT = '''
# train a miniature character-level shakespeare model
import time

out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False
wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-' + str(time.time())
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
device = 'cpu'
compile = False
'''


def test_a_config_file_and_arguments_of_nanogpt_apply_to_train_unchanged(settings_of):
    with open(train.__file__, encoding='utf-8') as f:
        script = f.read()
    config = settings_of('nanogpt.py', '--device=cpu', '--compile=False', '--eval_iters=20',
                         '--log_interval=1', '--block_size=64', '--batch_size=12', '--dropout=0.0',
                         script=script, nanogpt=NANOGPT)
    expected = {}
    exec(NANOGPT, expected)
    expected.update(eval_iters=20, log_interval=1, block_size=64, batch_size=12, dropout=0.0)
    for name in ('__builtins__', 'time', 'wandb_run_name'):
        expected.pop(name)
    assert len(expected) == 23
    assert {key: config[key] for key in expected} == expected
    assert config['wandb_run_name'].startswith('mini-gpt-')


# -----------------------------------------------------------------------------
# Resume

SAVED = dict(out_dir='old', init_from='out/sft', seed=1, n_layer=8, learning_rate=0.1, bias=True,
             stages=(1,), max_iters=7, gone=1)


@pytest.fixture
def saved_run(tmp_path):
    """The folder of a run with the settings SAVED, at step 3."""
    folder = str(tmp_path / 'run')
    save_checkpoint(folder, {'model': {}, 'model_args': {}, 'step': 3, 'config': SAVED})
    return folder


def test_a_run_that_is_not_resumed_keeps_its_settings(run_configure, saved_run):
    config, overrides = run_configure('--seed=5')
    config.update(init_from='scratch', out_dir=saved_run)
    assert resume(config, overrides, {'n_layer'}) == (config, {})


def test_a_resumed_run_continues_with_its_own_settings_except_those_given_which_are_printed(
        run_configure, capsys, saved_run):
    # The file sets max_iters to the default, which is not what the run was saved with.
    config, overrides = run_configure('a.py', '--seed=5', '--n_layer=8', a='max_iters = 100')
    config.update(init_from='resume', out_dir=saved_run)
    before = dict(config)
    resumed, checkpoint = resume(config, overrides, {'n_layer'})
    assert checkpoint['step'] == 3
    assert resumed == dict(
        out_dir=saved_run, init_from='out/sft', seed=5, n_layer=8, learning_rate=0.1, bias=True,
        stages=(1,), compile='auto', max_iters=100, warmup_iters=10)
    assert capsys.readouterr().out == 'seed: 1 -> 5\nmax_iters: 7 -> 100\n'
    assert config == before  # the argument is not changed


@pytest.mark.parametrize('args, where', [(['--n_layer=9'], '--n_layer=9'), (['a.py'], 'a.py:1')])
def test_a_fixed_setting_cannot_change_on_resume(run_configure, saved_run, args, where):
    config, overrides = run_configure(*args, a='n_layer = 9')
    config.update(init_from='resume', out_dir=saved_run)
    with pytest.raises(ValueError, match=f'^{where}: n_layer=9, but the run to resume has 8'):
        resume(config, overrides, {'n_layer'})


def test_a_run_restarted_by_torchrun_is_resumed_if_it_has_a_checkpoint(
        run_configure, monkeypatch, saved_run, tmp_path):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    config, overrides = run_configure()
    config.update(init_from='scratch', out_dir=str(tmp_path / 'new'))
    assert resume(config, overrides, set()) == (config, {})
    config.update(out_dir=saved_run)
    resumed, checkpoint = resume(config, overrides, set())
    assert checkpoint['step'] == 3 and resumed['init_from'] == 'out/sft'


def test_a_restart_by_torchrun_does_not_continue_an_older_run_in_the_folder(
        run_configure, monkeypatch, tmp_path):
    checkpoint = {'model': {}, 'model_args': {}, 'step': 3, 'config': {'n_layer': 8}}
    for run_id in ('first', 'second'):
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run_id)
        save_checkpoint(str(tmp_path / run_id), checkpoint)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    config, overrides = run_configure()
    config.update(init_from='scratch', out_dir=str(tmp_path / 'first'))
    assert resume(config, overrides, set()) == (config, {})
    config.update(out_dir=str(tmp_path / 'second'))
    assert resume(config, overrides, set())[1]['step'] == 3
    # On the command line a user may choose any run.
    config.update(init_from='resume', out_dir=str(tmp_path / 'first'))
    assert resume(config, overrides, set())[1]['step'] == 3


def test_a_run_is_not_resumed_while_a_process_may_still_save_a_later_checkpoint(
        run_configure, saved_run):
    logger = Logger(saved_run, {}, step=3)
    config, overrides = run_configure()
    config.update(init_from='resume', out_dir=saved_run)
    with pytest.raises(ValueError, match=f'{saved_run}: process {os.getpid()} .* is using this '):
        resume(config, overrides, set())
    for reader in ('eval_only', 'check'):  # these change nothing in the folder
        assert resume(config | {reader: True}, overrides, set())[1]['step'] == 3
    logger.lock.release()
    assert resume(config, overrides, set())[1]['step'] == 3


@pytest.mark.parametrize('name, value, message', [
    ('max_iters', 'many', "ckpt.pt: max_iters must be of type int, like 100; got 'many'"),
    ('bias', 1, 'ckpt.pt: bias must be of type bool'),
    ('seed', -1, 'ckpt.pt: seed must be at least 0; got -1'),
    ('learning_rate', math.inf, 'ckpt.pt: learning_rate must be a finite number')])
def test_a_saved_setting_of_another_type_or_out_of_range_is_refused(
        run_configure, tmp_path, name, value, message):
    folder = str(tmp_path)
    save_checkpoint(folder, {'model': {}, 'model_args': {}, 'step': 3,
                             'config': SAVED | {name: value}})
    config, overrides = run_configure()
    config.update(init_from='resume', out_dir=folder)
    with pytest.raises(ValueError, match=message):
        resume(config, overrides, set())


@pytest.mark.parametrize('name', ['reward', 'gold'])
def test_code_is_run_only_if_this_command_line_names_it(name, run_configure, tmp_path):
    folder = str(tmp_path)
    code = 'foreign.py:score'
    save_checkpoint(folder, {'model': {}, 'model_args': {}, 'step': 3,
                             'config': SAVED | {name: code}})
    config, overrides = run_configure()
    config.update(init_from='resume', out_dir=folder, **{name: ''})
    with pytest.raises(ValueError, match=f'started with --{name}={code}.*give this setting again'):
        resume(config, overrides, set())
    config[name] = code
    resumed, _ = resume(config, overrides | {name: f'--{name}={code}'}, set())
    assert resumed[name] == code


@pytest.mark.parametrize('stage, made_by', [('sft', 'sft.py'), ('dpo', 'reward.py')])
def test_a_run_is_resumed_only_by_the_script_that_made_it(
        run_configure, tmp_path, stage, made_by):
    save_checkpoint(str(tmp_path), {'stage': stage, 'model': {}, 'model_args': {}, 'step': 3,
                                    'config': {}})
    config, overrides = run_configure()
    config.update(init_from='resume', out_dir=str(tmp_path))
    with pytest.raises(ValueError, match=f'was made by {made_by}, not by script.py'):
        resume(config, overrides, set())


# -----------------------------------------------------------------------------
# Device, precision and compilation

@pytest.fixture
def machine(monkeypatch):
    """A function that makes torch see a machine with or without CUDA, bfloat16 and a compiler."""
    def machine(bf16=True, compiler=True, cuda=False):
        path = '/usr/bin/g++' if compiler else None
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bf16)
        monkeypatch.setattr(shutil, 'which', lambda name: path)
    return machine


def config_of(**changed):
    return {'device': 'auto', 'dtype': 'auto', 'compile': 'auto', **changed}


NO_CUDA = 'no CUDA here: running on the CPU'
NO_MPS = 'no MPS here: running on the CPU'
NO_COMPILER = 'no C++ compiler here: running in eager mode'


@pytest.mark.parametrize('features, settings, lines', [
    (dict(), dict(), ['device cpu, bfloat16, compiled, 1 rank']),
    (dict(bf16=False), dict(), ['device cpu, float32, compiled, 1 rank']),
    (dict(bf16=False), dict(dtype='bfloat16', compile=False),
     ['device cpu, bfloat16, eager, 1 rank']),
    (dict(), dict(device='cuda:1'), [NO_CUDA, 'device cpu, bfloat16, compiled, 1 rank']),
    (dict(), dict(device='mps'), [NO_MPS, 'device cpu, bfloat16, compiled, 1 rank']),
    (dict(compiler=False), dict(), [NO_COMPILER, 'device cpu, bfloat16, eager, 1 rank']),
    (dict(compiler=False), dict(compile=False), ['device cpu, bfloat16, eager, 1 rank'])])
def test_the_fastest_correct_option_is_chosen_and_printed_and_what_is_missing_costs_one_line(
        machine, capsys, features, settings, lines):
    machine(**features)
    run = start_run(config_of(**settings), flops=1e20)
    assert capsys.readouterr().out.splitlines() == lines
    assert (run.device, run.device_type) == ('cpu', 'cpu')
    assert (run.rank, run.world_size, run.is_master) == (0, 1, True)
    assert run.compile == ('compiled' in lines[-1])
    assert str(run.dtype).removeprefix('torch.') in lines[-1]
    with run.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is run.dtype


def test_a_run_too_short_to_outweigh_a_compilation_is_not_compiled(machine):
    machine()
    assert start_run(config_of(), 1e11).compile is False
    assert start_run(config_of(), 1e14).compile is True
    assert start_run(config_of(compile=True), 1e11).compile is True


def test_only_rank_0_prints_the_choice(machine, monkeypatch, capsys):
    machine(compiler=False)
    monkeypatch.setenv('RANK', '1')
    assert not start_run(config_of()).is_master
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('device', ['cpu:', 'cpu:1', 'cpu:x', 'cuda:1', 'cuda:-1', 'cuda:x'])
def test_a_device_that_does_not_exist_is_an_error(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    with pytest.raises(ValueError, match=f"device '{device}' does not exist; there are 1 of type"):
        start_run(config_of(device=device))


@pytest.mark.parametrize('key, value, allowed', [
    ('dtype', 'bf16', 'float32, bfloat16, float16'),
    ('device', 'gpu', 'cuda, mps, cpu'),
    ('device', True, 'cuda, mps, cpu'),
    ('device', 'cpux', 'cuda, mps, cpu'),
    ('compile', 'yes', 'True, False')])
def test_an_unknown_device_dtype_or_compile_is_an_error_that_lists_the_known_ones(
        key, value, allowed):
    with pytest.raises(ValueError) as error:
        start_run(config_of(**{key: value}))
    assert f"{key} must be 'auto' or one of {allowed}; got {value!r}" in str(error.value)


def test_work_that_the_ranks_cannot_share_evenly_is_an_error_with_both_numbers():
    run = types.SimpleNamespace(world_size=3)
    check_divisible(run, 'batch_size', 6)
    with pytest.raises(ValueError, match=('batch_size = 8 cannot be divided by 3 ranks; make it a '
                                          'multiple of 3')):
        check_divisible(run, 'batch_size', 8)


@pytest.mark.parametrize('dynamic', [None, True])
def test_a_model_is_wrapped_only_if_the_run_compiles_or_has_several_ranks(monkeypatch, dynamic):
    def compile(model, dynamic):
        return 'compiled', model, dynamic

    def data_parallel(model, device_ids):
        return 'parallel', model, device_ids

    monkeypatch.setattr(torch, 'compile', compile)
    monkeypatch.setattr(torch.nn.parallel, 'DistributedDataParallel', data_parallel)
    run = types.SimpleNamespace(compile=False, world_size=1, device='cuda:1', device_type='cuda')
    assert parallel('model', run, dynamic) == 'model'
    run.compile = True
    assert parallel('model', run, dynamic) == ('compiled', 'model', dynamic)
    run.world_size = 2
    assert parallel('model', run, dynamic) == (
        'parallel', ('compiled', 'model', dynamic), ['cuda:1'])
    run.compile = False
    run.device_type = 'cpu'
    assert parallel('model', run, dynamic) == ('parallel', 'model', None)


@pytest.mark.parametrize('device_name, flops', [
    ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA L40S', 362e12),
    ('NVIDIA L4', 121e12), ('NVIDIA A10', 125e12), ('NVIDIA GeForce RTX 4090', 165e12)])
def test_the_speed_of_a_known_gpu_is_that_of_its_data_sheet(monkeypatch, device_name, flops):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: device_name)
    run = types.SimpleNamespace(device='cuda:1', device_type='cuda', dtype=torch.bfloat16)
    assert peak_flops(run) == flops


def test_the_speed_of_another_machine_is_measured():
    run = start_run(config_of(device='cpu', dtype='float32', compile=False))
    a = torch.ones(1024, 1024)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    # On a busy machine the two measurements differ, but not in their unit.
    assert 0.1 < peak_flops(run) * min(seconds) / (2 * 1024 ** 3) < 10


def test_peak_memory_is_in_megabytes_and_never_falls():
    before = peak_memory_mb()
    with open('/proc/self/status') as f:
        high_water_kb = next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))
    assert before == pytest.approx(high_water_kb / 1024, rel=0.05)
    block = torch.ones(2 ** 20 * int(before) // 4)  # as much again
    assert peak_memory_mb() > 1.3 * before
    assert block.numel()


# -----------------------------------------------------------------------------
# Seeds and the schedule

def test_a_seed_is_a_function_of_its_arguments_alone():
    torch.manual_seed(1)
    first = seed_for(1337, 'dropout', 5, 0)
    torch.rand(9)
    assert seed_for(1337, 'dropout', 5, 0) == first


def test_a_seed_is_the_same_in_every_process():
    """Python's own hash of a text is not."""
    code = "from configurator import seed_for; print(seed_for(1337, 'dropout', 5, 0))"
    printed = ok(finish(start('-c', code, env={'PYTHONHASHSEED': '7'})))
    assert int(printed) == seed_for(1337, 'dropout', 5, 0)


def test_a_generator_neither_uses_nor_changes_the_global_state():
    state = torch.get_rng_state()
    drawn = torch.rand(4, generator=generator_for(1337, 'batches', 5))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = torch.rand(4, generator=generator_for(1337, 'batches', 5))
    assert torch.equal(drawn, again)


def test_seeds_differ_in_every_argument_and_have_63_bits():
    numbers = (0, 1, 2, 1337)
    seeds = []
    for seed in numbers:
        for purpose in ('batches', 'dropout'):
            for n in (0, 1, 2):
                for where in itertools.product(numbers, repeat=n):
                    seeds.append(seed_for(seed, purpose, *where))
    assert len(seeds) == 4 * 2 * (1 + 4 + 16)
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2 ** 63 for seed in seeds)


SCHEDULE = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14, max_iters=99,
                decay_lr=True, cooldown_frac=0.4)

# How far above min_lr the rate is at t = 0, 0.2, 0.5, 0.8 and 1; 1 = at the peak.
SHARES = {
    'cosine': [1, (1 + math.cos(math.radians(36))) / 2, 0.5,
               (1 - math.cos(math.radians(36))) / 2, 0],
    'linear': [1, 0.8, 0.5, 0.2, 0],
    'constant': [1, 1, 1, 1, 1],
    'wsd': [1, 1, 1, 0.5, 0],
}


@pytest.mark.parametrize('kind', SHARES)
def test_the_learning_rate_warms_up_follows_its_schedule_and_stays_at_the_end(kind):
    def rate(step, **changed):
        return learning_rate_at(step, {**SCHEDULE, 'lr_schedule': kind, **changed})

    expected = [0.1 + 0.9 * share for share in SHARES[kind]]
    assert [rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [rate(step) for step in (4, 6, 9, 12, 14)] == pytest.approx(expected)
    assert [rate(step) for step in (15, 20, 10 ** 6)] == pytest.approx([expected[-1]] * 3)
    # lr_decay_iters=0 means max_iters
    assert rate(14, lr_decay_iters=0, max_iters=24) == pytest.approx(expected[2])
    assert rate(0, warmup_iters=0) == 1.0
    assert rate(99, cooldown_frac=0.0) == rate(99)


@pytest.mark.parametrize('kind', SHARES)
def test_without_decay_lr_the_rate_is_the_learning_rate_at_every_step(kind):
    config = dict(SCHEDULE, lr_schedule=kind, decay_lr=False)
    assert [learning_rate_at(step, config) for step in (0, 1, 4, 9, 99)] == [1.0] * 5


def test_the_cosine_schedule_is_nanogpts():
    config = dict(learning_rate=6e-4, min_lr=6e-5, warmup_iters=20, lr_decay_iters=300,
                  max_iters=1, decay_lr=True)

    def get_lr(it):  # nanoGPT's formula
        if it < 20:
            return 6e-4 * (it + 1) / 21
        if it > 300:
            return 6e-5
        return 6e-5 + 0.5 * (1.0 + math.cos(math.pi * (it - 20) / 280)) * (6e-4 - 6e-5)

    rates = [learning_rate_at(step, config) for step in range(400)]
    assert rates == pytest.approx([get_lr(step) for step in range(400)])


@pytest.mark.parametrize('step', [0, 9])  # also during the warm-up
def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones(step):
    with pytest.raises(ValueError, match="cosine, linear, wsd, constant; got 'cosin'"):
        learning_rate_at(step, {**SCHEDULE, 'lr_schedule': 'cosin'})


def test_the_schedule_factor_is_the_share_of_the_peak_rate():
    config = dict(SCHEDULE, learning_rate=0.5, min_lr=0.05, lr_schedule='linear')
    assert schedule_factor(4, config) == 1.0
    assert schedule_factor(9, config) == pytest.approx(0.55)
    assert schedule_factor(14, config) == pytest.approx(0.1)
    # A learning rate of 0 freezes the groups that use it, and no others.
    assert schedule_factor(9, dict(config, learning_rate=0.0, min_lr=0.0)) == pytest.approx(0.5)


def adamw_of(**settings):
    """An AdamW of one weight of shape (3,), after one step."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], **settings)
    weight.sum().backward()
    optimizer.step()
    return optimizer


def test_a_restored_optimizer_has_the_saved_state_and_its_own_rates():
    saved = adamw_of(lr=0.1).state_dict()
    saved['state'][0]['exp_avg'] += 7
    optimizer = adamw_of(lr=0.2, weight_decay=0.25)
    restore_optimizers([optimizer], {'optimizer': [saved]})
    state = optimizer.state_dict()['state'][0]
    assert state.keys() == saved['state'][0].keys()
    for name in state:
        assert torch.equal(state[name], saved['state'][0][name])
    assert optimizer.param_groups[0]['lr'] == 0.2
    assert optimizer.param_groups[0]['weight_decay'] == 0.25


def test_without_a_checkpoint_an_optimizer_keeps_its_state():
    optimizer = adamw_of(lr=0.1)
    before = optimizer.state_dict()['state'][0]['exp_avg'].clone()
    restore_optimizers([optimizer], {})
    assert torch.equal(optimizer.state_dict()['state'][0]['exp_avg'], before)


@pytest.mark.parametrize('index, name, value, message', [
    (0, 'exp_avg', torch.ones(4), r"'exp_avg' .* must be a tensor of torch.float32 and of shape"),
    (0, 'exp_avg', torch.ones(3, dtype=torch.long), "'exp_avg' of parameter 0"),
    (0, 'exp_avg', torch.ones(3, dtype=torch.double), "'exp_avg' of parameter 0"),
    (0, 'exp_avg', torch.ones(1).expand(3), "'exp_avg' of parameter 0"),
    (0, 'exp_avg', torch.ones(3).to_sparse(), "'exp_avg' of parameter 0"),
    (0, 'exp_avg', torch.ones(3, device='meta'), "'exp_avg' of parameter 0"),
    (0, 'exp_avg', 'text', "'exp_avg' of parameter 0"),
    (0, 'exp_avg', torch.full((3,), math.nan), 'impossible values'),
    (0, 'exp_avg_sq', -torch.ones(3), 'impossible values'),
    (0, 'step', torch.tensor(-1.0), 'impossible values'),
    (0, 'step', torch.ones(3), "'step' of parameter 0"),
    (0, 'other', torch.ones(3), 'parameter 0 .* must have step, exp_avg, exp_avg_sq'),
    (1, 'exp_avg', torch.ones(3), 'a parameter 1, but there are 1'),
    ('0', 'exp_avg', torch.ones(3), "a parameter '0', but there are 1")])
def test_optimizer_state_that_does_not_fit_is_refused(index, name, value, message):
    saved = adamw_of(lr=0.1).state_dict()
    saved['state'].setdefault(index, {})[name] = value
    with pytest.raises(ValueError, match=message):
        restore_optimizers([adamw_of(lr=0.1)], {'optimizer': [saved]})


@pytest.mark.parametrize('saved_states, message', [
    ([], 'the state of 0 optimizers, but this run has 1'),
    (['text'], 'must be a dict of dicts'),
    ([{'state': [], 'param_groups': []}], 'must be a dict of dicts'),
    ([{'state': {0: {}}, 'param_groups': []}], 'must have step, exp_avg, exp_avg_sq'),
    ([{'state': {0: {'momentum_buffer': torch.ones(3)}}}], 'must have step, exp_avg, exp_avg_sq')])
def test_the_state_of_other_optimizers_is_refused(saved_states, message):
    with pytest.raises(ValueError, match=message):
        restore_optimizers([adamw_of(lr=0.1)], {'optimizer': saved_states})


# -----------------------------------------------------------------------------
# Stopping

@pytest.fixture
def restored_handlers():
    """Restores the signal handlers of this process after a test."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_requests_a_stop_and_a_second_ctrl_c_quits_at_once(
        restored_handlers, number, status):
    stop = StopSignal()
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested and stop.exit_code == status
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_command_that_resumes_names_code_again_wherever_it_was_set(restored_handlers, capsys):
    run = types.SimpleNamespace(world_size=1, is_master=True)
    config = {'out_dir': 'out/x', 'reward': 'r.py:f', 'gold': ''}
    with pytest.raises(SystemExit):
        StopSignal().end_training(run, stopping=True, step=3, config=config)
    expected = '--init_from=resume --out_dir=out/x --reward=r.py:f\n'
    assert capsys.readouterr().out.endswith(expected)


def test_after_training_signals_end_the_process_again(restored_handlers, tmp_path):
    stop = StopSignal()
    assert signal.getsignal(signal.SIGTERM) == stop.handle
    run = types.SimpleNamespace(world_size=1, is_master=True)
    stop.end_training(run, stopping=False, step=3, config={'out_dir': str(tmp_path)})
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def run_one_of_two_ranks(rank, file, ready, last_step, requested):
    """Count steps until any rank is asked to stop; then record the step."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank,
                                         world_size=2)
    stop = StopSignal()
    run = types.SimpleNamespace(world_size=2, device='cpu')
    ready.release()
    for step in itertools.count():
        if stop.by_any_rank(run):
            break
        time.sleep(0.001 * rank)
    last_step[rank] = step
    requested[rank] = stop.requested


@pytest.mark.parametrize('asked', [0, 1])
def test_all_ranks_stop_after_the_same_step_if_one_is_asked_to(tmp_path, asked):
    fork = multiprocessing.get_context('fork')
    ready = fork.Semaphore(0)
    last_step = fork.Array('i', 2)
    requested = fork.Array('i', 2)
    ranks = []
    for rank in (0, 1):
        args = (rank, tmp_path / 'rendezvous', ready, last_step, requested)
        ranks.append(fork.Process(target=run_one_of_two_ranks, args=args))
    for process in ranks:
        process.start()
    for process in ranks:
        assert ready.acquire(timeout=60)
    time.sleep(0.05)
    os.kill(ranks[asked].pid, signal.SIGTERM)
    for process in ranks:
        process.join(60)
    assert last_step[0] == last_step[1] > 0
    assert list(requested) == [asked == 0, asked == 1]


def test_the_error_of_a_run_that_diverged_names_the_step_the_numbers_and_the_checkpoint(tmp_path):
    folder = str(tmp_path)
    beginning = 'step 7: loss nan, grad_norm inf: the run has diverged; lower learning_rate'
    error = divergence_error(7, folder, 5, loss=torch.tensor(math.nan), grad_norm=math.inf)
    assert isinstance(error, ValueError)
    assert str(error).startswith(beginning) and 'checkpoint' not in str(error)
    save_checkpoint(folder, checkpoint_of(5))
    error = divergence_error(7, folder, 5, loss=torch.tensor(math.nan), grad_norm=math.inf)
    assert str(error).startswith(beginning)
    assert str(error).endswith(f'Last good checkpoint: {folder}, step 5')


@pytest.mark.parametrize('float16, grad_norm, loss, loss_of_other_rank, expected', [
    (True, 1.0, 2.0, 2.0, 'step'), (False, 1.0, 2.0, 2.0, 'step'),
    (True, math.inf, 2.0, 2.0, 'skip'), (True, math.nan, 2.0, 2.0, 'skip'),
    (False, math.inf, 2.0, 2.0, 'error'), (True, math.nan, math.nan, 2.0, 'error'),
    # Both ranks find the same: otherwise one would wait for the other for ever.
    (True, math.nan, 2.0, math.nan, 'error')])
def test_a_step_is_skipped_only_if_float16_gradients_overflowed_on_all_ranks(
        monkeypatch, tmp_path, float16, grad_norm, loss, loss_of_other_rank, expected):
    monkeypatch.setattr(configurator, 'sum_over_ranks', lambda x: x + loss_of_other_rank)
    scaler = types.SimpleNamespace(is_enabled=lambda: float16)
    run = types.SimpleNamespace(scaler=scaler)
    own_loss = torch.tensor(loss)
    arguments = (run, torch.tensor(grad_norm), own_loss, 3, str(tmp_path), 0)
    if expected == 'error':
        with pytest.raises(ValueError, match='step 3: .*diverged'):
            must_skip(*arguments)
    else:
        assert must_skip(*arguments) == (expected == 'skip')
    assert own_loss.item() == pytest.approx(loss, nan_ok=True)


# -----------------------------------------------------------------------------
# Checkpoints

def checkpoint_of(step, n_numbers=1000):
    """A checkpoint in which every number equals the step."""
    weights = torch.full((n_numbers,), float(step))
    momentum = torch.full((n_numbers,), float(step))
    return {'model': {'w': weights}, 'model_args': {}, 'optimizer': [{'m': momentum}],
            'step': step, 'config': {'step': step}, 'tokenizer': {}}


def is_intact(checkpoint):
    """Whether a checkpoint of checkpoint_of() is as it was made."""
    step = checkpoint['step']
    tensors = [checkpoint['model']['w'], checkpoint['optimizer'][0]['m']]
    same_tensors = all(bool((tensor == step).all()) for tensor in tensors)
    return same_tensors and checkpoint['config'] == {'step': step}


def new_logger(folder, settings={}, step=None):
    """A Logger that does not hold the folder's lock, so that one test can make several."""
    logger = Logger(str(folder), settings, step)
    logger.lock.release()
    return logger


def files_of(folder):
    """The files of a run's folder, sorted, without those that tell which process holds it."""
    return sorted(set(os.listdir(folder)) - {'run.lock', 'run.pid'})


def save_twice(folder):
    """Save the steps 1 and 2 in a folder."""
    for step in (1, 2):
        save_checkpoint(folder, checkpoint_of(step))
    return folder


def test_a_saved_checkpoint_is_loaded_and_the_one_before_is_kept(tmp_path):
    folder = tmp_path / 'new' / 'run'
    save_twice(folder)
    assert sorted(os.listdir(folder)) == ['ckpt.pt', 'ckpt_prev.pt']
    for path, step in ((folder, 2), (folder / 'ckpt.pt', 2), (folder / 'ckpt_prev.pt', 1)):
        checkpoint = load_checkpoint(path)
        assert checkpoint['step'] == step and is_intact(checkpoint)
    save_checkpoint(folder, checkpoint_of(9), 'ckpt_best.pt')
    assert load_checkpoint(folder, 'ckpt_best.pt')['step'] == 9
    assert load_checkpoint(folder)['step'] == 2
    assert load_checkpoint(folder / 'ckpt_prev.pt')['step'] == 1


def test_at_every_moment_of_a_save_there_is_a_checkpoint(tmp_path, monkeypatch):
    replace = os.replace
    steps = []  # of ckpt.pt after each renaming of a file

    def replace_and_look(source, target):
        replace(source, target)
        steps.append(load_checkpoint(tmp_path / 'ckpt.pt')['step'])

    monkeypatch.setattr(os, 'replace', replace_and_look)
    save_twice(tmp_path)
    assert steps == [1, 1, 2]
    assert load_checkpoint(tmp_path / 'ckpt_prev.pt')['step'] == 1


def test_without_hard_links_the_checkpoint_before_is_kept_too(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, 'no hard links here')

    monkeypatch.setattr(os, 'link', link)
    save_twice(tmp_path)
    assert load_checkpoint(tmp_path)['step'] == 2
    assert load_checkpoint(tmp_path / 'ckpt_prev.pt')['step'] == 1
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_prev.pt']


@pytest.mark.parametrize('how', ['truncated', 'flipped bit', 'empty', 'missing'])
def test_a_damaged_checkpoint_does_not_replace_the_intact_one_before_it(
        tmp_path, monkeypatch, how):
    damage(save_twice(tmp_path) / 'ckpt.pt', how)
    replace = os.replace
    steps = []  # of what can be loaded after each renaming of a file

    def replace_and_look(source, target):
        replace(source, target)
        steps.append(load_checkpoint(tmp_path)['step'])

    monkeypatch.setattr(os, 'replace', replace_and_look)
    save_checkpoint(tmp_path, checkpoint_of(3))
    assert steps == [3]
    assert load_checkpoint(tmp_path / 'ckpt_prev.pt')['step'] == 1


def test_a_file_written_atomically_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / 'a.bin'
    path.write_bytes(b'old')
    with write_atomically(str(path)) as f:
        f.write(b'new')
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new'
    with pytest.raises(KeyError), write_atomically(str(path)) as f:
        f.write(b'half')
        raise KeyError
    assert path.read_bytes() == b'new'
    assert os.listdir(tmp_path) == ['a.bin']


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, bad):
    save_checkpoint(tmp_path, checkpoint_of(1))
    checkpoint = checkpoint_of(2)
    checkpoint['model']['w'][17] = bad
    with pytest.raises(ValueError, match='step 2: w has values that are not finite'):
        save_checkpoint(tmp_path, checkpoint)
    assert os.listdir(tmp_path) == ['ckpt.pt']
    assert load_checkpoint(tmp_path)['step'] == 1


def save_for_ever(folder, last_saved):
    for step in itertools.count(last_saved.value + 1):
        save_checkpoint(folder, checkpoint_of(step, 2 ** 19))
        last_saved.value = step


def test_a_process_killed_at_any_moment_leaves_the_last_saved_checkpoint(tmp_path):
    fork = multiprocessing.get_context('fork')
    rng = random.Random(0)
    last_saved = fork.Value('i', 0)
    n_interrupted = 0
    for trial in range(20):
        before = last_saved.value
        process = fork.Process(target=save_for_ever, args=(str(tmp_path), last_saved))
        process.start()
        while last_saved.value == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        n_interrupted += any(name.endswith('.tmp') for name in os.listdir(tmp_path))
        checkpoint = load_checkpoint(str(tmp_path))
        assert is_intact(checkpoint)
        # The save may have been complete, and only its record missing.
        assert checkpoint['step'] in (last_saved.value, last_saved.value + 1)
    assert n_interrupted > 5  # so the kills did fall into saves


def test_a_temporary_file_is_removed_when_a_run_starts_but_not_when_a_checkpoint_is_read(tmp_path):
    save_twice(tmp_path)
    (tmp_path / 'ckpt.pt.tmp').write_bytes(b'half')
    assert load_checkpoint(tmp_path)['step'] == 2
    assert (tmp_path / 'ckpt.pt.tmp').exists()  # another process may be writing it
    new_logger(tmp_path, step=2)
    assert files_of(tmp_path) == ['ckpt.pt', 'ckpt_prev.pt', 'log.jsonl']


def test_only_temporary_files_of_our_own_are_removed(tmp_path):
    for name in ('notes.tmp', 'model.pt.tmp'):
        (tmp_path / name).write_text('mine')
    new_logger(tmp_path)
    assert files_of(tmp_path) == ['log.jsonl', 'model.pt.tmp', 'notes.tmp']


def damage(path, how):
    """Damage a checkpoint of step 2."""
    if how == 'missing':
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if how == 'truncated':
        del content[len(content) // 2:]
    elif how == 'flipped bit':
        content[content.index(struct.pack('<f', 2.0) * 50) + 17] ^= 1
    elif how == 'empty':
        content.clear()
    path.write_bytes(content)


def test_only_rank_0_prints_that_another_checkpoint_is_loaded(tmp_path, monkeypatch, capsys):
    damage(save_twice(tmp_path) / 'ckpt.pt', 'truncated')
    monkeypatch.setenv('RANK', '1')
    assert load_checkpoint(tmp_path)['step'] == 1
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('how', ['truncated', 'flipped bit', 'empty', 'missing'])
def test_for_a_damaged_checkpoint_the_one_before_is_loaded_and_both_are_named(
        tmp_path, capsys, how):
    damage(save_twice(tmp_path) / 'ckpt.pt', how)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint['step'] == 1 and is_intact(checkpoint)
    reason = 'no such' if how == 'missing' else 'damaged'
    printed = capsys.readouterr().out
    assert printed.startswith(f'{tmp_path}/ckpt.pt: {reason}')
    assert printed.endswith(f'loading {tmp_path}/ckpt_prev.pt, step 1\n')
    assert printed.count('\n') == 1
    if how != 'missing':
        # A file that is named is not replaced by another one.
        with pytest.raises(ValueError, match=f'{tmp_path}/ckpt.pt: damaged'):
            load_checkpoint(tmp_path / 'ckpt.pt')
    damage(tmp_path / 'ckpt_prev.pt', 'truncated')
    with pytest.raises(ValueError, match=f'{tmp_path}/ckpt_prev.pt: damaged'):
        load_checkpoint(tmp_path)


def test_a_bit_flipped_anywhere_is_an_error_or_changes_nothing(tmp_path):
    path = save_twice(tmp_path) / 'ckpt.pt'
    content = path.read_bytes()
    rng = random.Random(0)
    n_errors = 0
    for place in rng.sample(range(len(content)), 200):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            checkpoint = load_checkpoint(path)
        except ValueError as error:
            n_errors += str(error).startswith(f'{path}: damaged')
        else:
            assert checkpoint['step'] == 2 and is_intact(checkpoint)
    assert n_errors > 150


def test_a_folder_without_a_checkpoint_or_a_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=f'{tmp_path / "ckpt.pt"}: no such checkpoint'):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=f'{tmp_path / "no"}: no such run'):
        load_checkpoint(tmp_path / 'no')


class MakeFolder:
    """An object whose pickle makes a folder when it is loaded."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, zipped):
    harm = tmp_path / 'harm'
    path = tmp_path / 'ckpt.pt'
    checkpoint = {**checkpoint_of(1), 'more': MakeFolder(harm)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f'{path}: damaged or foreign'):
        load_checkpoint(path)
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # so the code works, and was not run before


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({'model': {}, 'iter_num': 5, 'config': {}}, tmp_path / 'nanogpt.pt')
    torch.save(torch.ones(3), tmp_path / 'tensor.pt')
    (tmp_path / 'text.pt').write_text('hello')
    for name in ('nanogpt.pt', 'tensor.pt', 'text.pt'):
        with pytest.raises(ValueError, match=f'{name}: damaged or foreign'):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize('name, value, message', [
    ('iter_num', 5, "missing: nothing; unexpected: 'iter_num'"),
    (b'bytes', 5, "unexpected: b'bytes'"),
    ('config', None, 'missing: config; unexpected: nothing'),
    ('step', '3', 'step must be of type int'),
    ('step', True, 'step must be of type int'),
    ('step', -1, 'its step is -1'),
    ('step', 10 ** 30, 'its step is 1000'),
    ('model', torch.ones(3), 'model must be of type dict'),
    ('optimizer', {'state': {}}, 'optimizer must be of type list'),
    ('stage', ['sft'], 'stage must be of type str'),
    ('kl_coef', math.nan, 'kl_coef is nan'),
    ('best_val_loss', math.nan, 'best_val_loss is NaN'),
    ('config', {'seed': [1]}, "its setting 'seed' has a value of type list"),
    ('config', {1: 1}, 'its setting 1 has'),
    ('scaler', {'scale': 1.0}, 'scaler is not the state'),
    ('scaler', dict.fromkeys(SCALER_ENTRIES, 'x'), 'scaler is not the state')])
def test_a_checkpoint_with_other_entries_is_refused_by_name(name, value, message, tmp_path):
    checkpoint = {'model': {}, 'model_args': {}, 'step': 3, 'config': {}}
    checkpoint[name] = value
    if value is None:
        del checkpoint[name]
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match=f'ckpt.pt: damaged or foreign checkpoint .*{message}'):
        load_checkpoint(tmp_path)


def test_a_gradient_scaler_saves_the_entries_that_are_accepted(tmp_path):
    state = torch.amp.GradScaler('cpu').state_dict()
    assert set(state) == SCALER_ENTRIES
    save_checkpoint(str(tmp_path), {'model': {}, 'model_args': {}, 'step': 3, 'config': {},
                                    'scaler': state, 'best_val_loss': math.inf})
    assert load_checkpoint(str(tmp_path))['scaler'] == state


def rewrite_zip(path, change, compression=zipfile.ZIP_STORED):
    """Write a zip file again, with each content replaced by change(name, content) and with valid
    checksums."""
    with zipfile.ZipFile(path) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, 'w', compression) as new:
        for name, content in entries:
            new.writestr(name, change(name, content))


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(tmp_path, checkpoint_of(1))
    rewrite_zip(path, lambda name, content: content)
    assert is_intact(load_checkpoint(path))

    def enlarge(name, content):
        """The shapes (1000,) of the tensors, and the sizes of their storages, become 30000."""
        if not name.endswith('data.pkl'):
            return content
        return content.replace(struct.pack('<cH', b'M', 1000), struct.pack('<cH', b'M', 30000))

    rewrite_zip(path, enlarge)
    with pytest.raises(ValueError, match='damaged'):
        load_checkpoint(path)


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'
    save_checkpoint(tmp_path, checkpoint_of(1))

    def enlarge(name, content):
        return bytes(10 ** 8) if name.endswith('data/0') else content

    rewrite_zip(path, enlarge, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 10 ** 6
    with pytest.raises(ValueError, match='compressed members'):
        load_checkpoint(path)


@pytest.fixture(params=['a disk of one megabyte', 'fsync fails'])
def full_disk(request, tmp_path, monkeypatch):
    """A folder with a checkpoint of step 1, on a disk without space for a checkpoint of 2 MB."""
    if request.param == 'fsync fails':
        save_checkpoint(tmp_path, checkpoint_of(1))

        def fsync(file):
            raise OSError(errno.ENOSPC, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', fsync)
        yield tmp_path
        return
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', tmp_path]
    if not shutil.which('mount') or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip('only root may mount a small disk')
    try:
        save_checkpoint(tmp_path, checkpoint_of(1))
        yield tmp_path
    finally:
        subprocess.run(['umount', tmp_path], check=True)


def test_on_a_full_disk_the_old_checkpoint_is_kept_and_the_bytes_needed_are_named(
        full_disk, capsys):
    save_checkpoint(full_disk, checkpoint_of(2, 2 ** 18), final=False)
    message = f'{full_disk}/ckpt.pt could not be saved; about 3,145,728 bytes are needed'
    assert capsys.readouterr().out.startswith(f'warning: {message}')
    with pytest.raises(OSError, match='about 3,145,728 bytes are needed'):
        save_checkpoint(full_disk, checkpoint_of(2, 2 ** 18))
    assert os.listdir(full_disk) == ['ckpt.pt']
    assert load_checkpoint(full_disk)['step'] == 1
    assert capsys.readouterr().out == ''


def test_on_a_full_disk_a_line_that_cannot_be_logged_is_a_warning(full_disk, capsys):
    if os.statvfs(full_disk).f_bfree > 1000:
        pytest.skip('not a small disk')
    logger = new_logger(full_disk)
    with pytest.raises(OSError), open(full_disk / 'filler', 'wb', buffering=0) as f:
        while True:
            f.write(bytes(4096))
    logger.log(1, {'loss': 1.0})
    os.remove(full_disk / 'filler')
    logger.log(2, {'loss': 2.0})
    assert 'warning: not logged: [Errno 28]' in capsys.readouterr().out
    assert read_log(str(full_disk)) == [{'step': 2, 'loss': 2.0}]


# -----------------------------------------------------------------------------
# The log

def parse_strict_json(line):
    """JSON as the standard defines it, without NaN and Infinity."""
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(line, parse_constant=refuse)


def lines_of(folder):
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
        return [parse_strict_json(line) for line in f]


def columns_of(line):
    """A line of the screen as [[name, number], ...]."""
    return [column.split() for column in line.split('|')]


def test_the_log_contains_what_was_logged_and_null_for_what_is_not_finite(tmp_path, capsys):
    logger = new_logger(tmp_path, {'max_iters': 10})
    logger.log(0, {'loss': 4.123456789, 'lr': torch.tensor(0.5)})
    logger.log(10, {'loss': math.nan, 'grad_norm': math.inf, 'tokens': 123456})
    logger.final({'val_loss': math.nan, 'steps': 10, 'gold': None})
    assert lines_of(tmp_path) == [
        {'step': 0, 'loss': 4.123456789, 'lr': 0.5},
        {'step': 10, 'loss': None, 'grad_norm': None, 'tokens': 123456},
        {'final': {'val_loss': None, 'steps': 10}}]
    first, second, final = capsys.readouterr().out.splitlines()
    assert columns_of(first) == [['step', '0/10'], ['loss', '4.1235'], ['lr', '0.5']]
    assert columns_of(second) == [['step', '10/10'], ['loss', 'nan'], ['grad_norm', 'inf'],
                                  ['tokens', '123456']]
    assert first.index('|') == second.index('|')  # the columns are aligned
    assert final == 'final: val_loss nan, steps 10'


def test_the_loads_of_single_experts_are_logged_but_not_printed(tmp_path, capsys):
    new_logger(tmp_path).log(0, {'loss': 4.0, 'moe/layer_0/expert_0': 0.5})
    assert lines_of(tmp_path) == [{'step': 0, 'loss': 4.0, 'moe/layer_0/expert_0': 0.5}]
    assert columns_of(capsys.readouterr().out) == [['step', '0/0'], ['loss', '4']]


def test_a_logged_line_estimates_the_time_left_from_the_steps_since_the_first_line(
        tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    logger = new_logger(tmp_path, {'max_iters': 1000}, step=100)
    for step, seconds in ((100, 50.0), (101, 52.0), (110, 70.0), (1000, 1850.0)):
        now[0] = seconds
        logger.log(step, {'loss': 1.0})
    times = [columns_of(line)[1] for line in capsys.readouterr().out.splitlines()]
    # 2 seconds per step: 899 steps are left, then 890. The first and the last line have none.
    assert times == [['loss', '1'], ['29:58', 'left'], ['29:40', 'left'], ['loss', '1']]


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    logger = new_logger(tmp_path)
    for step in range(6):
        logger.log(step, {'loss': step})
    logger.final({'steps': 6})
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": 2, "lo')  # a crash in the middle of a line
    resumed = new_logger(tmp_path, step=3)
    assert lines_of(tmp_path) == [{'step': step, 'loss': step} for step in range(3)]
    resumed.log(3, {'loss': 30})
    assert lines_of(tmp_path)[-1] == {'step': 3, 'loss': 30}
    assert len(lines_of(tmp_path)) == 4
    new_logger(tmp_path)  # a fresh run
    assert lines_of(tmp_path) == []


def test_damaged_lines_of_a_log_are_skipped(tmp_path):
    (tmp_path / 'log.jsonl').write_bytes(DAMAGED_LINES + b'{"step": 0, "loss": 4.0}\n'
                                         + DAMAGED_LINES + b'{"step": 1, "loss": null}\n'
                                         + b'{"final": {"loss": 2.0}}\n{"step": 2, "lo')
    assert read_log(str(tmp_path)) == [{'step': 0, 'loss': 4.0}, {'step': 1, 'loss': None},
                                       {'final': {'loss': 2.0}}]
    assert read_log(str(tmp_path / 'missing')) == []


def test_a_fresh_run_moves_the_files_of_an_older_run_aside_and_nothing_else(tmp_path, capsys):
    # 1. Three fresh runs in one folder. The first saves ckpt.pt, the others ckpt_best.pt.
    names = ['ckpt.pt', 'ckpt_best.pt', 'ckpt_best.pt']
    for i, name in enumerate(names):
        logger = new_logger(tmp_path)
        logger.log(0, {'loss': i})
        checkpoint = {'step': i, 'model': {}, 'model_args': {}, 'config': {}}
        save_checkpoint(str(tmp_path), checkpoint, name)
        (tmp_path / 'notes.txt').write_text('mine')

    # 2. A resumed run moves nothing.
    for step in (3, 0):
        new_logger(tmp_path, step=step)
        assert files_of(tmp_path) == ['before.1', 'before.2', 'ckpt_best.pt', 'log.jsonl',
                                      'notes.txt']

    # 3. Each older run is complete in its own folder.
    for i in range(2):
        before = tmp_path / f'before.{i + 1}'
        assert load_checkpoint(str(before), names[i])['step'] == i
        assert lines_of(before) == [{'step': 0, 'loss': i}]
        assert len(os.listdir(before)) == 2
    printed = capsys.readouterr().out
    assert printed.count('held another run') == 2
    assert f'which is now in {tmp_path}/before.2\n' in printed


def test_one_process_at_a_time_holds_a_folder_and_the_other_is_told_which(tmp_path):
    holder = ('import sys; from configurator import Logger; '
              'logger = Logger(sys.argv[1], {}); print("ready", flush=True); sys.stdin.read()')
    process = start('-c', holder, tmp_path, stdin=subprocess.PIPE)
    assert process.stdout.readline() == 'ready\n'
    before = (tmp_path / 'log.jsonl').stat().st_ino
    with pytest.raises(ValueError, match=f'{tmp_path}: process {process.pid} .* is using this '):
        Logger(str(tmp_path), {})
    assert (tmp_path / 'log.jsonl').stat().st_ino == before  # nothing was changed
    process.kill()
    finish(process)
    logger = Logger(str(tmp_path), {})  # a killed process no longer holds it
    logger.final({})
    other = Logger(str(tmp_path), {}, step=0)  # nor does a run that has ended
    os.remove(tmp_path / 'run.pid')  # as if it had not written its number yet
    with pytest.raises(ValueError, match=f'{tmp_path}: process unknown is using this folder'):
        Logger(str(tmp_path), {})
    other.lock.release()


def test_ranks_other_than_rank_0_neither_print_nor_write(tmp_path, capsys):
    settings = {'tensorboard_log': True, 'wandb_log': True}
    logger = Logger(str(tmp_path / 'run'), settings, is_master=False)
    logger.log(0, {'loss': 1.0})
    logger.final({'loss': 1.0})
    assert not (tmp_path / 'run').exists()
    assert capsys.readouterr().out == ''


def test_tensorboard_reads_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logger = new_logger(tmp_path, {'tensorboard_log': True})
    for step in range(3):
        logger.log(step, {'loss': 4.0 - step, 'lr': 0.5})
    resumed = new_logger(tmp_path, {'tensorboard_log': True}, step=2)  # after a kill
    resumed.log(2, {'loss': 7.0, 'lr': 0.25})
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert events.Tags()['scalars'] == ['loss', 'lr']
    losses = [(event.step, event.value) for event in events.Scalars('loss')]
    rates = [(event.step, event.value) for event in events.Scalars('lr')]
    assert losses == [(0, 4.0), (1, 3.0), (2, 7.0)]
    assert rates == [(0, 0.5), (1, 0.5), (2, 0.25)]


def wandb_records(path):
    """
    Yield the records of a .wandb file. It is a LevelDB log: blocks of 32 KB that contain pieces of
    records, each piece with a header of 7 bytes (checksum, length, kind).
    """
    from wandb.proto.wandb_internal_pb2 import Record
    block_size = 2 ** 15
    header_size = 7
    content = path.read_bytes()
    data = b''
    at = header_size  # the file itself has a header, too
    while at < len(content):
        rest_of_block = block_size - at % block_size
        if rest_of_block < header_size:
            at += rest_of_block
        length, kind = struct.unpack('<4xHB', content[at:at + header_size])
        data += content[at + header_size:at + header_size + length]
        at += header_size + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(data)
            data = b''


def wait_for_wandb(path, seconds=60):
    """The records of a .wandb file. wandb's own process may still be writing it after the end of
    the run; the last record is that of its exit."""
    from google.protobuf.message import DecodeError
    until = time.time() + seconds
    while True:
        with contextlib.suppress(struct.error, DecodeError):  # a record that is not complete yet
            records = list(wandb_records(path))
            if any(record.HasField('exit') for record in records):
                return records
        assert time.time() < until, 'wandb did not complete its file'
        time.sleep(0.1)


def test_wandb_offline_writes_a_run_with_its_settings_and_what_was_logged(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    config = {'wandb_log': True, 'wandb_project': 'a-project', 'wandb_run_name': 'a-name',
              'n_layer': 3}
    logger = new_logger(tmp_path, config)
    logger.log(5, {'loss': 4.5})
    logger.final({'val_loss': 4.25})
    path, = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    records = wait_for_wandb(path)

    # 1. the name and the settings of the run
    run = next(record.run for record in records if record.HasField('run'))
    assert (run.project, run.display_name) == ('a-project', 'a-name')
    settings = {item.key: item.value_json for item in run.config.update}
    assert settings['n_layer'] == '3'

    # 2. the logged step
    history, = [record.history for record in records if record.HasField('history')]
    logged = {item.key or item.nested_key[0]: item.value_json for item in history.item}
    assert (logged['_step'], logged['loss']) == ('5', '4.5')

    # 3. the final figures
    summary = {}
    for record in records:
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = item.value_json
    assert summary['val_loss'] == '4.25'


def test_a_resumed_run_continues_its_own_wandb_run_and_a_fresh_one_has_its_own(
        tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    folder = tmp_path / 'sft'
    config = {'wandb_log': True, 'out_dir': f'{folder}/'}

    def wandb_run(step=None):
        logger = Logger(str(folder), config, step)
        logger.log(step or 0, {'loss': 1.0})
        logger.final({})
        return logger.wandb

    first = wandb_run()
    resumed = wandb_run(step=5)
    fresh = wandb_run()
    assert first.id == resumed.id != fresh.id
    assert first.name == resumed.name == fresh.name == 'sft'  # that of the folder
    # Its id stays with the run that was moved aside.
    assert (folder / 'before.1' / 'wandb_id.txt').read_text() == first.id
    assert (folder / 'wandb_id.txt').read_text() == fresh.id
    # The files of the resumed run, which wandb sync uploads, name the same run.
    paths = sorted(folder.glob(f'wandb/offline-run-*/run-{first.id}.wandb'))
    assert len(paths) == 2
    for path in paths:
        run = next(record.run for record in wait_for_wandb(path) if record.HasField('run'))
        assert (run.run_id, run.display_name) == (first.id, 'sft')


@pytest.mark.parametrize('out_dir, log_dir, name, expected', [
    ('out/base', 'out/base', '', 'base'),
    ('out/deep/base/', 'out/deep/base/', '', 'base'),
    ('out/base', 'out/base/eval', '', 'base/eval'),
    ('out/base', 'out/base', 'mine', 'mine')])
def test_the_name_of_a_wandb_run(out_dir, log_dir, name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs(log_dir)
    settings = {}

    def init(**given):
        settings.update(given)
        return types.SimpleNamespace(id='abc')
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    start_wandb(log_dir, {'out_dir': out_dir, 'wandb_run_name': name})
    assert (settings['name'], settings['id']) == (expected, None)
    start_wandb(log_dir, {'out_dir': out_dir, 'wandb_run_name': name})
    assert settings['id'] == 'abc'
