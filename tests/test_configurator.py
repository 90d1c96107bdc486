"""
What configurator.py promises: settings, the choice of device, seeds, the schedule, checkpoints, the log.
Independent of it: values by hand, nanoGPT's own schedule and config file, processes that are killed, full disks,
pickles that would do harm, TensorBoard's and wandb's own readers.
"""
import errno, itertools, json, math, multiprocessing, os, random, shutil, signal, struct, subprocess, sys, time, types
import zipfile

import numpy as np
import pytest
import torch

import train
from assets.draw import compare, draw
from configurator import (Logger, StopSignal, configure, learning_rate_at, load_checkpoint,
                          one_line_errors, peak_memory_mb, read_log, read_settings, resume, rng,
                          save_checkpoint, seed_for, start_run)
from conftest import call, finish, ok, one_line, start

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


@pytest.fixture
def settings_of(tmp_path, monkeypatch):
    """Settings as configure() leaves them for a command line; *.py are config files, given as texts."""
    def settings_of(*args, script=SCRIPT, **files):
        path = tmp_path / 'script.py'
        path.write_text(script, encoding='utf-8')
        for name, text in files.items():
            (tmp_path / f'{name}.py').write_text(text, encoding='utf-8')
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, 'argv', ['script.py', *args])
        monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
        names = {'__file__': str(path)}
        exec(script, names)
        returned = configure(names)
        assert all(names[key] == value for key, value in returned.items())
        return returned
    return settings_of


@pytest.fixture
def mistake(settings_of):
    """The message of the ValueError that a command line meets."""
    def mistake(*args, **files):
        with pytest.raises(ValueError) as error:
            settings_of(*args, **files)
        return str(error.value)
    return mistake


def test_settings_and_their_comments_are_what_stands_between_the_first_two_rules(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    assert read_settings(tmp_path / 'script.py') == {
        'out_dir': 'folder of the run', 'seed': '', 'n_layer': 'layers: 1 = one', 'learning_rate': 'at the top, #1',
        'bias': 'in linear layers', 'stages': 'a tuple', 'compile': "'auto' | True | False", 'max_iters': '',
        'warmup_iters': ''}


def test_without_arguments_all_settings_are_returned_at_their_defaults(settings_of):
    assert settings_of() == dict(out_dir='out/a', seed=1337, n_layer=4, learning_rate=3e-4, bias=False, stages=(8, 64),
                                 compile='auto', max_iters=100, warmup_iters=10)


@pytest.mark.parametrize('args, n_layer', [
    (['a.py', '--n_layer=2'], 2), (['--n_layer=2', 'a.py'], 1), (['a.py', 'b.py'], 3), (['b.py', 'a.py'], 1),
    (['a.py', '--n_layer=2', 'empty.py'], 2)])
def test_config_files_and_arguments_apply_in_their_order(settings_of, args, n_layer):
    assert settings_of(*args, a='n_layer = 1', b='n_layer = 3', empty='')['n_layer'] == n_layer


@pytest.mark.parametrize('arg, value', [
    ('--n_layer=6', 6), ('--learning_rate=1e-3', 0.001), ('--learning_rate=1', 1.0), ('--bias=True', True),
    ('--bias=true', True), ('--stages=(1,2,3)', (1, 2, 3)), ('--compile=False', False), ('--compile=true', True),
    ('--compile=auto', 'auto'), ('--out_dir=a=b=c', 'a=b=c'), ('--out_dir=', ''), ('--out_dir=5', '5'),
    ('--out_dir=True', 'True'), ("--out_dir=it's --here", "it's --here"), ('--out_dir=o/é 字', 'o/é 字')])
def test_a_value_is_read_as_the_type_of_its_setting(settings_of, arg, value):
    got = settings_of(arg)[arg[2:].split('=')[0]]
    assert got == value and type(got) is type(value)


def test_a_config_file_is_python_in_a_namespace_of_its_own(settings_of):
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
    with pytest.raises(ValueError, match='seed must be of type int, like 1337; got 0.5'):
        settings_of('a.py', a=text)
    found = settings_of('--n_layer=5', 'a.py', a=text.replace('_half * i', 'i'))
    assert found == dict(out_dir='out/a', seed=1, n_layer=5, learning_rate=math.pi / 2, bias=True, stages=(8, 64),
                         compile='auto', max_iters=75, warmup_iters=7)


def test_a_setting_whose_default_is_auto_may_be_a_bool_in_every_config_file(settings_of):
    assert settings_of('a.py', 'b.py', a='compile = False', b="compile = 'auto'")['compile'] == 'auto'


@pytest.mark.parametrize('args, parts', [
    (['--n_layr=6'], ['--n_layr=6', 'no setting', '--n_layer?']),
    (['--qqq=6'], ['--qqq=6', 'no setting', '--help']),
    (['--after=6'], ['--after=6', 'no setting']),
    (['--n_layer=six'], ['--n_layer=six', 'n_layer', 'int', '4', "'six'"]),
    (['--n_layer=1.5'], ['--n_layer=1.5', 'int', '1.5']), (['--n_layer=True'], ['int', 'True']),
    (['--n_layer='], ['--n_layer=', 'int']), (['--n_layer=__import__("os").getpid()'], ['int']),
    (['--learning_rate=fast'], ['--learning_rate=fast', 'float']), (['--bias=1'], ['--bias=1', 'bool', '1']),
    (['--stages=8'], ['--stages=8', 'tuple']),
    (['--seed=1', '--n_layer=2', '--seed=1'], ['--seed=1', 'seed is given twice']),
    (['--bias'], ['--bias', '--key=value']), (['n_layer=6'], ['n_layer=6', 'no such config file', '--key=value']),
    (['nowhere.py'], ['nowhere.py', 'no such config file'])])
def test_a_mistake_on_the_command_line_names_the_argument(mistake, args, parts):
    message = mistake(*args)
    assert all(part in message for part in parts) and '\n' not in message, message


@pytest.mark.parametrize('text, parts', [
    ('\nn_layr = 6\n# n_layr', ['a.py:2', "'n_layr'", '--n_layer?']),
    ('n_layer = 3\nn_layer = "six"\n\n', ['a.py:2', 'n_layer', 'int', "'six'"]),
    ('\n\nn_layer = = 6', ['a.py:3', 'SyntaxError']),
    ('\n\nn_layer = 1 / 0\n', ['a.py:3', 'ZeroDivisionError']),
    ('\nimport json\n\nn_layer = json.loads("{")\n', ['a.py:4', 'JSONDecodeError']),
    ('\nimport nowhere_at_all\n', ['a.py:2', 'ModuleNotFoundError']),
    ('\nfrom math import pi\n', ['a.py:2', "'pi'"]), ('\n\ndef helper(): pass\n', ['a.py:3', "'helper'"])])
def test_a_mistake_in_a_config_file_names_the_file_and_the_line(mistake, text, parts):
    message = mistake('a.py', a=text)
    assert all(part in message for part in parts), message


def test_help_lists_every_setting_with_its_default_and_its_comment():
    said = ok(call('train.py', '--help'))
    assert said.startswith(train.__doc__.strip())
    for key, comment in read_settings(train.__file__).items():
        assert any(line.startswith(f'  --{key}={getattr(train, key)!r} ') and line.endswith(comment)
                   for line in said.splitlines()), key


def test_a_mistake_is_one_line_and_exit_status_2_and_debug_shows_where_it_was_raised():
    result = finish(start('train.py', '--n_layr=6'))
    assert one_line(result) == "error: --n_layr=6: there is no setting 'n_layr'; did you mean --n_layer?\n"
    debug = call('train.py', '--n_layr=6', '--debug=True')
    assert debug.returncode == 1 and 'Traceback' in debug.stderr and 'configurator.py' in debug.stderr


@pytest.mark.parametrize('error, status, said', [
    (ValueError('a\nb'), 2, 'error: a b\n'), (OSError(2, 'not there', 'x'), 2, "error: [Errno 2] not there: 'x'\n"),
    (ModuleNotFoundError("No module named 'wandb'", name='wandb'), 2,
     "error: No module named 'wandb': pip install wandb\n"),
    (KeyboardInterrupt(), 130, 'error: KeyboardInterrupt\n'),
    (torch.OutOfMemoryError('CUDA'), 2, 'error: out of memory: lower batch_size'),
    (RuntimeError('DefaultCPUAllocator: not enough memory: you tried'), 2, 'error: out of memory: lower batch_size'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, 'error: out of memory: lower batch_size'),
    (MemoryError(), 2, 'error: out of memory: lower batch_size')])
def test_what_a_user_can_mend_is_said_in_one_line(capsys, error, status, said):
    with pytest.raises(SystemExit) as stop:
        one_line_errors(type(error), error, None)
    assert stop.value.code == status and capsys.readouterr().err.startswith(said)


def test_an_error_of_ours_keeps_its_traceback(capsys):
    error = AssertionError('3 == 4')
    assert one_line_errors(type(error), error, None) is None and 'AssertionError: 3 == 4' in capsys.readouterr().err


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


def test_a_nanogpt_config_file_and_command_line_apply_to_train_unchanged(settings_of):
    with open(train.__file__, encoding='utf-8') as f:
        script = f.read()
    config = settings_of('nanogpt.py', '--device=cpu', '--compile=False', '--eval_iters=20', '--log_interval=1',
                         '--block_size=64', '--batch_size=12', '--dropout=0.0', script=script, nanogpt=NANOGPT)
    expected = {}
    exec(NANOGPT, expected)
    expected |= dict(eval_iters=20, log_interval=1, block_size=64, batch_size=12, dropout=0.0)
    names = [key for key in expected if key not in ('__builtins__', 'time', 'wandb_run_name')]
    assert len(names) == 23 and {key: config[key] for key in names} == {key: expected[key] for key in names}
    assert config['wandb_run_name'].startswith('mini-gpt-')


def test_a_run_goes_on_with_its_own_settings_but_for_those_given_which_are_said(settings_of, capsys, tmp_path):
    saved = dict(out_dir='old', init_from='out/sft', seed=1, n_layer=8, learning_rate=0.1, bias=True, stages=(1,),
                 max_iters=7, gone=1)
    save_checkpoint(str(tmp_path), {'model': {}, 'model_args': {}, 'step': 3, 'config': saved})
    config = settings_of('a.py', '--seed=5', '--n_layer=8', a='max_iters = 100')  # the file gives the default
    assert resume(dict(config, init_from='scratch', out_dir=str(tmp_path)), {'n_layer'}) == {}
    config |= dict(init_from='resume', out_dir=str(tmp_path))
    assert resume(config, {'n_layer'})['step'] == 3
    assert config == dict(
        out_dir=str(tmp_path), init_from='out/sft', seed=5, n_layer=8, learning_rate=0.1, bias=True, stages=(1,),
        compile='auto', max_iters=100, warmup_iters=10)
    assert capsys.readouterr().out == 'seed: 1 -> 5\nmax_iters: 7 -> 100\n'
    with pytest.raises(ValueError, match=r'n_layer=9: the run to resume has 8'):
        resume(settings_of('--n_layer=9') | dict(init_from='resume', out_dir=str(tmp_path)), {'n_layer'})


# -----------------------------------------------------------------------------
# The run

@pytest.fixture
def machine(monkeypatch):
    """A machine with or without CUDA, bfloat16 and a compiler."""
    def machine(bf16=True, compiler=True, cuda=False):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
        monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
        monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: bf16)
        monkeypatch.setattr(shutil, 'which', lambda name: f'/usr/bin/{name}' if compiler else None)
    return machine


def config_of(**changed):
    return {'device': 'auto', 'dtype': 'auto', 'compile': 'auto', **changed}


@pytest.mark.parametrize('here, asked, lines', [
    (dict(), dict(), ['device cpu, bfloat16, compiled, 1 rank']),
    (dict(bf16=False), dict(), ['device cpu, float32, compiled, 1 rank']),
    (dict(bf16=False), dict(dtype='bfloat16', compile=False), ['device cpu, bfloat16, eager, 1 rank']),
    (dict(), dict(device='cuda:1'), ['no CUDA here: running on the CPU', 'device cpu, bfloat16, compiled, 1 rank']),
    (dict(), dict(device='mps'), ['no MPS here: running on the CPU', 'device cpu, bfloat16, compiled, 1 rank']),
    (dict(compiler=False), dict(), ['no C++ compiler here: running in eager mode',
                                    'device cpu, bfloat16, eager, 1 rank']),
    (dict(compiler=False), dict(compile=False), ['device cpu, bfloat16, eager, 1 rank'])])
def test_what_is_fastest_and_right_is_chosen_and_what_is_not_there_costs_one_line(machine, capsys, here, asked, lines):
    machine(**here)
    run = start_run(config_of(**asked), flops=1e20)
    assert capsys.readouterr().out.splitlines() == lines
    assert (run.device, run.type, run.rank, run.world, run.master) == ('cpu', 'cpu', 0, 1, True)
    assert run.compile == ('compiled' in lines[-1]) and str(run.dtype).removeprefix('torch.') in lines[-1]
    with run.autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is run.dtype


def test_a_run_too_short_to_win_back_a_compile_is_not_compiled(machine):
    machine()
    assert [start_run(config_of(), flops).compile for flops in (1e11, 1e14)] == [False, True]
    assert start_run(config_of(compile=True), 1e11).compile is True


def test_only_rank_0_says_what_was_chosen(machine, monkeypatch, capsys):
    machine(compiler=False)
    monkeypatch.setenv('RANK', '1')
    assert not start_run(config_of()).master and capsys.readouterr().out == ''


@pytest.mark.parametrize('key, value, there', [
    ('dtype', 'bf16', 'float32, bfloat16, float16'), ('device', 'gpu', 'cuda, mps, cpu'),
    ('device', True, 'cuda, mps, cpu'), ('compile', 'yes', 'True, False')])
def test_a_device_dtype_or_compile_that_does_not_exist_is_an_error_that_lists_those_that_do(key, value, there):
    with pytest.raises(ValueError, match=f"{key} must be 'auto' or one of {there}; got {value!r}"):
        start_run(config_of(**{key: value}))


def test_a_seed_is_a_pure_function_of_seed_step_and_rank():
    torch.manual_seed(1), np.random.seed(1)
    first, state = seed_for(1337, 5, 0), torch.get_rng_state()
    torch.rand(9), np.random.rand(9)
    assert seed_for(1337, 5, 0) == first
    torch.set_rng_state(state)
    drawn = torch.rand(4, generator=rng(1337, 5, 0))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(drawn, torch.rand(4, generator=rng(1337, 5, 0)))
    where = [w for n in (0, 1, 2) for w in itertools.product((0, 1, 2, 1337), repeat=1 + n)]
    seeds = {seed_for(*w) for w in where if len(w) == 1 or w[-1]}  # NumPy takes (1, 0) for (1)
    assert len(seeds) == sum(len(w) == 1 or w[-1] > 0 for w in where) and all(0 <= seed < 2**63 for seed in seeds)


SCHEDULE = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=14, max_iters=99, decay_lr=True,
                cooldown_frac=0.4)
BY_HAND = {  # the share of the way from min_lr to the top at t = 0, 0.2, 0.5, 0.8 and 1
    'cosine': [1, (1 + math.cos(math.radians(36))) / 2, 0.5, (1 - math.cos(math.radians(36))) / 2, 0],
    'linear': [1, 0.8, 0.5, 0.2, 0], 'constant': [1, 1, 1, 1, 1], 'wsd': [1, 1, 1, 0.5, 0]}


@pytest.mark.parametrize('kind', BY_HAND)
def test_the_learning_rate_warms_up_follows_its_schedule_and_stays_at_the_end(kind):
    rate = lambda step, **changed: learning_rate_at(step, {**SCHEDULE, 'lr_schedule': kind, **changed})
    assert [rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [rate(step) for step in (4, 6, 9, 12, 14)] == pytest.approx([0.1 + 0.9 * share for share in BY_HAND[kind]])
    assert [rate(step) for step in (15, 20, 10**6)] == pytest.approx([0.1 + 0.9 * BY_HAND[kind][-1]] * 3)
    assert rate(14, lr_decay_iters=0, max_iters=24) == pytest.approx(0.1 + 0.9 * BY_HAND[kind][2])  # 0 = max_iters
    assert rate(0, warmup_iters=0) == rate(99, decay_lr=False) == 1.0
    assert rate(99, cooldown_frac=0.0) == rate(99)


def test_the_cosine_is_nanogpts():
    c = dict(learning_rate=6e-4, min_lr=6e-5, warmup_iters=20, lr_decay_iters=300, max_iters=1, decay_lr=True)

    def get_lr(it):  # as nanoGPT's train.py has it
        if it < 20:
            return 6e-4 * (it + 1) / 21
        if it > 300:
            return 6e-5
        return 6e-5 + 0.5 * (1.0 + math.cos(math.pi * (it - 20) / 280)) * (6e-4 - 6e-5)
    assert [learning_rate_at(step, c) for step in range(400)] == pytest.approx([get_lr(step) for step in range(400)])


def test_an_unknown_schedule_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="cosine, linear, constant, wsd; got 'cosin'"):
        learning_rate_at(0, {**SCHEDULE, 'lr_schedule': 'cosin'})  # at once, not after the warm-up


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_to_stop_and_a_second_ctrl_c_quits_at_once(number, status):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSignal()
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.exit_code == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


def test_once_the_work_is_done_signals_end_the_process_again(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = StopSignal()
    assert signal.getsignal(signal.SIGTERM) == stop.handle
    stop.leave(types.SimpleNamespace(world=1, master=True), False, 3, str(tmp_path))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == (signal.SIG_DFL, signal.default_int_handler)
    for number, handler in zip((signal.SIGTERM, signal.SIGINT), before):
        signal.signal(number, handler)


def one_of_two_ranks(rank, file, ready, stopped):
    torch.distributed.init_process_group('gloo', init_method=f'file://{file}', rank=rank, world_size=2)
    stop, run = StopSignal(), types.SimpleNamespace(world=2, device='cpu')
    ready.release()
    for step in itertools.count():
        if stop.by_any_rank(run):
            break
        time.sleep(0.001 * rank)
    stopped[rank], stopped[2 + rank] = step, stop.requested


def test_ranks_of_which_one_is_asked_to_stop_stop_after_the_same_step(tmp_path):
    fork = multiprocessing.get_context('fork')
    for asked in (0, 1):
        ready, stopped = fork.Semaphore(0), fork.Array('i', 4)
        ranks = [fork.Process(target=one_of_two_ranks, args=(rank, tmp_path / str(asked), ready, stopped))
                 for rank in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            assert ready.acquire(timeout=60)
        time.sleep(0.05)
        os.kill(ranks[asked].pid, signal.SIGTERM)
        for process in ranks:
            process.join(60)
        assert stopped[0] == stopped[1] > 0 and list(stopped[2:]) == [asked == 0, asked == 1]


def test_peak_memory_is_in_megabytes_and_never_falls():
    before = peak_memory_mb()
    with open('/proc/self/status') as f:
        resident = next(int(line.split()[1]) for line in f if line.startswith('VmHWM')) / 1024
    assert before == pytest.approx(resident, rel=0.05)
    block = torch.ones(2**20 * int(before) // 4)  # as much again
    assert peak_memory_mb() > 1.3 * before and block.numel()


# -----------------------------------------------------------------------------
# Checkpoints

def checkpoint_of(step, numbers=1000):
    w, m = (torch.full((numbers,), float(step)) for _ in range(2))
    return {'model': {'w': w}, 'model_args': {}, 'optimizer': [{'m': m}], 'step': step, 'config': {'step': step},
            'tokenizer': {}}


def is_whole(checkpoint):
    step = checkpoint['step']
    return checkpoint['config'] == {'step': step} and all(
        bool((t == step).all()) for t in (checkpoint['model']['w'], checkpoint['optimizer'][0]['m']))


def two_saves(folder):
    for step in (1, 2):
        save_checkpoint(folder, checkpoint_of(step))
    return folder


def test_at_no_moment_is_there_no_checkpoint(tmp_path, monkeypatch):
    rename, there = os.replace, []
    monkeypatch.setattr(os, 'replace', lambda a, b: (rename(a, b), there.append(load_checkpoint(tmp_path / 'ckpt.pt')['step'])))
    two_saves(tmp_path)
    assert there == [1, 1, 2] and load_checkpoint(tmp_path / 'ckpt_prev.pt')['step'] == 1


def test_what_is_saved_is_loaded_and_the_one_before_is_kept(tmp_path):
    two_saves(tmp_path / 'new' / 'run')
    folder = tmp_path / 'new' / 'run'
    assert sorted(os.listdir(folder)) == ['ckpt.pt', 'ckpt_prev.pt']
    for path, step in ((folder, 2), (folder / 'ckpt.pt', 2), (folder / 'ckpt_prev.pt', 1)):
        checkpoint = load_checkpoint(path)
        assert checkpoint['step'] == step and is_whole(checkpoint)
    save_checkpoint(folder, checkpoint_of(9), 'ckpt_best.pt')
    assert load_checkpoint(folder, 'ckpt_best.pt')['step'] == 9
    assert load_checkpoint(folder)['step'] == 2 and load_checkpoint(folder / 'ckpt_prev.pt')['step'] == 1


def save_for_ever(folder, saved):
    for step in itertools.count(saved.value + 1):
        save_checkpoint(folder, checkpoint_of(step, 2**19))
        saved.value = step


def test_kill_9_at_any_moment_leaves_the_last_checkpoint_that_was_saved(tmp_path):
    fork, chance, halves = multiprocessing.get_context('fork'), random.Random(0), 0
    saved = fork.Value('i', 0)
    for trial in range(20):
        before, process = saved.value, fork.Process(target=save_for_ever, args=(str(tmp_path), saved))
        process.start()
        while saved.value == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        halves += any(name.endswith('.tmp') for name in os.listdir(tmp_path))
        checkpoint = load_checkpoint(str(tmp_path))
        assert is_whole(checkpoint) and checkpoint['step'] in (saved.value, saved.value + 1)
    assert halves > 5  # so the kills did fall into saves


def test_a_temporary_file_is_removed_when_a_run_starts_there_but_not_when_somebody_reads(tmp_path):
    two_saves(tmp_path)
    (tmp_path / 'ckpt.pt.tmp').write_bytes(b'half')
    assert load_checkpoint(tmp_path)['step'] == 2 and (tmp_path / 'ckpt.pt.tmp').exists()  # it may be a save going on
    Logger(str(tmp_path), {}, step=2)
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'ckpt_prev.pt', 'log.jsonl']


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == 'truncated':
        del content[len(content) // 2:]
    elif how == 'flipped':
        content[content.index(struct.pack('<f', 2.0) * 50) + 17] ^= 1
    elif how == 'empty':
        content.clear()
    elif how == 'missing':
        return path.unlink()
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['truncated', 'flipped', 'empty', 'missing'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken_with_its_step(tmp_path, capsys, how):
    damage(two_saves(tmp_path) / 'ckpt.pt', how)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint['step'] == 1 and is_whole(checkpoint)
    said = capsys.readouterr().out
    assert said.startswith(f'{tmp_path}/ckpt.pt: ' + ('no such' if how == 'missing' else 'damaged'))
    assert said.endswith(f'taking {tmp_path}/ckpt_prev.pt, of step 1\n') and said.count('\n') == 1
    if how != 'missing':
        with pytest.raises(ValueError, match=f'{tmp_path}/ckpt.pt: damaged'):
            load_checkpoint(tmp_path / 'ckpt.pt')
    damage(tmp_path / 'ckpt_prev.pt', 'truncated')
    with pytest.raises(ValueError, match=f'{tmp_path}/ckpt_prev.pt: damaged'):
        load_checkpoint(tmp_path)


def test_a_byte_flipped_anywhere_is_noticed_or_changes_nothing(tmp_path):
    path, chance, noticed = two_saves(tmp_path) / 'ckpt.pt', random.Random(0), 0
    content = path.read_bytes()
    for place in chance.sample(range(len(content)), 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1:])
        try:
            assert load_checkpoint(path)['step'] == 2 and is_whole(load_checkpoint(path))
        except ValueError as error:
            noticed += str(error).startswith(f'{path}: damaged')
    assert noticed > 150


def test_a_folder_without_a_checkpoint_and_a_path_that_is_not_there_are_named(tmp_path):
    for path, named in ((tmp_path, tmp_path / 'ckpt.pt'), (tmp_path / 'no', tmp_path / 'no')):
        with pytest.raises(ValueError, match=f'{named}: no such checkpoint'):
            load_checkpoint(path)


class Touch:
    """Unpickled, it makes a folder."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, zipped):
    harm, path = tmp_path / 'harm', tmp_path / 'ckpt.pt'
    torch.save({**checkpoint_of(1), 'more': Touch(harm)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=f'{path}: damaged or foreign'):
        load_checkpoint(path)
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # so it would have


def test_a_checkpoint_of_another_program_is_refused(tmp_path):
    torch.save({'model': {}, 'iter_num': 5, 'config': {}}, tmp_path / 'nanogpt.pt')
    torch.save(torch.ones(3), tmp_path / 'tensor.pt')
    (tmp_path / 'text.pt').write_text('hello')
    for name in ('nanogpt.pt', 'tensor.pt', 'text.pt'):
        with pytest.raises(ValueError, match=f'{name}: damaged or foreign'):
            load_checkpoint(tmp_path / name)


def rewrite(path, change, compression=zipfile.ZIP_STORED):
    """A zip again, with right checksums, each (name, content) changed."""
    with zipfile.ZipFile(path) as old:
        entries = [(name, old.read(name)) for name in old.namelist()]
    with zipfile.ZipFile(path, 'w', compression) as new:
        for name, content in entries:
            new.writestr(name, change(name, content))


def test_sizes_that_lie_are_refused(tmp_path):
    path = tmp_path / 'ckpt.pt'

    def longer(name, content):  # the tensors' shape (1000,), and their storages' size, become 30000
        return content.replace(struct.pack('<cH', b'M', 1000), struct.pack('<cH', b'M', 30000)) \
            if name.endswith('data.pkl') else content
    save_checkpoint(tmp_path, checkpoint_of(1))
    rewrite(path, lambda name, content: content)
    assert is_whole(load_checkpoint(path))
    rewrite(path, longer)
    with pytest.raises(ValueError, match='damaged'):
        load_checkpoint(path)
    save_checkpoint(tmp_path, checkpoint_of(1))
    rewrite(path, lambda name, content: bytes(10**8) if name.endswith('data/0') else content, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 10**6
    with pytest.raises(ValueError, match='larger than it is'):
        load_checkpoint(path)


@pytest.fixture(params=['a disk of one megabyte', 'fsync fails'])
def full_disk(request, tmp_path, monkeypatch):
    """A folder with a checkpoint of step 1, on a disk that is too full for one of 2 MB."""
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', tmp_path]
    if request.param == 'fsync fails':
        save_checkpoint(tmp_path, checkpoint_of(1))

        def fsync(file):
            raise OSError(errno.ENOSPC, 'No space left on device')
        monkeypatch.setattr(os, 'fsync', fsync)
        yield tmp_path
    elif not shutil.which('mount') or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        pytest.skip('only root may mount a small disk')
    else:
        try:
            save_checkpoint(tmp_path, checkpoint_of(1))
            yield tmp_path
        finally:
            subprocess.run(['umount', tmp_path], check=True)


def test_on_a_full_disk_the_old_checkpoint_stays_and_the_bytes_needed_are_said(full_disk, capsys):
    save_checkpoint(full_disk, checkpoint_of(2, 2**18), final=False)
    said = capsys.readouterr().out
    assert said.startswith(f'warning: {full_disk}/ckpt.pt could not be saved; about 3,145,728 bytes are needed')
    with pytest.raises(OSError, match='about 3,145,728 bytes are needed'):
        save_checkpoint(full_disk, checkpoint_of(2, 2**18))
    assert os.listdir(full_disk) == ['ckpt.pt']
    assert load_checkpoint(full_disk)['step'] == 1 and capsys.readouterr().out == ''


def test_a_log_on_a_full_disk_is_a_warning_and_the_run_goes_on(full_disk, monkeypatch, capsys):
    if os.statvfs(full_disk).f_bfree > 1000:
        pytest.skip('not a small disk')
    logger = Logger(str(full_disk), {})
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

def strict(line):
    """JSON as the standard has it, without NaN and Infinity."""
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(line, parse_constant=refuse)


def lines_of(folder):
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
        return [strict(line) for line in f]


def test_the_log_holds_exactly_what_was_logged_and_null_for_what_json_cannot_say(tmp_path, capsys):
    logger = Logger(str(tmp_path), {})
    logger.log(0, {'loss': 4.123456789, 'lr': torch.tensor(0.5)})
    logger.log(10, {'loss': math.nan, 'grad_norm': math.inf, 'tokens': 123456})
    logger.final({'val_loss': math.nan, 'steps': 10})
    assert lines_of(tmp_path) == [{'step': 0, 'loss': 4.123456789, 'lr': 0.5},
                                  {'step': 10, 'loss': None, 'grad_norm': None, 'tokens': 123456},
                                  {'final': {'val_loss': None, 'steps': 10}}]
    first, second, final = capsys.readouterr().out.splitlines()
    assert [part.split() for part in first.split('|')] == [['step', '0'], ['loss', '4.1235'], ['lr', '0.5']]
    assert [part.split() for part in second.split('|')] == [['step', '10'], ['loss', 'nan'], ['grad_norm', 'inf'],
                                                            ['tokens', '123456']]
    assert final == 'final: val_loss nan, steps 10' and first.index('|') == second.index('|')


def test_a_resumed_run_drops_the_lines_that_it_will_write_again(tmp_path):
    logger = Logger(str(tmp_path), {})
    for step in range(6):
        logger.log(step, {'loss': step})
    logger.final({'steps': 6})
    with open(tmp_path / 'log.jsonl', 'a') as f:
        f.write('{"step": 2, "lo')  # a crash in the middle of a line
    resumed = Logger(str(tmp_path), {}, step=3)
    assert lines_of(tmp_path) == [{'step': step, 'loss': step} for step in range(3)]
    resumed.log(3, {'loss': 30})
    assert lines_of(tmp_path)[-1] == {'step': 3, 'loss': 30} and len(lines_of(tmp_path)) == 4
    Logger(str(tmp_path), {})
    assert lines_of(tmp_path) == []


def test_what_another_run_left_is_moved_aside_and_nothing_else(tmp_path, capsys):
    for i in range(3):
        logger = Logger(str(tmp_path), {})
        logger.log(0, {'loss': i})
        save_checkpoint(str(tmp_path), {'step': i, 'model': {}, 'model_args': {}, 'config': {}}, 'ckpt_best.pt' if i else 'ckpt.pt')
        (tmp_path / 'notes.txt').write_text('mine')
    for step in (3, 0):
        Logger(str(tmp_path), {}, step)  # which goes on
        assert sorted(os.listdir(tmp_path)) == ['before.1', 'before.2', 'ckpt_best.pt', 'log.jsonl', 'notes.txt']
    for i in range(2):
        before = tmp_path / f'before.{i + 1}'
        assert load_checkpoint(str(before), 'ckpt_best.pt' if i else 'ckpt.pt')['step'] == i
        assert lines_of(before) == [{'step': 0, 'loss': i}] and len(os.listdir(before)) == 2
    said = capsys.readouterr().out
    assert said.count('held another run') == 2 and f'in {tmp_path}/before.2 now' in said


def test_other_ranks_than_the_first_neither_print_nor_write(tmp_path, capsys):
    logger = Logger(str(tmp_path / 'run'), {'tensorboard_log': True, 'wandb_log': True}, master=False)
    logger.log(0, {'loss': 1.0})
    logger.final({'loss': 1.0})
    assert not (tmp_path / 'run').exists() and capsys.readouterr().out == ''


def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logger = Logger(str(tmp_path), {'tensorboard_log': True})
    for step in range(3):
        logger.log(step, {'loss': 4.0 - step, 'lr': 0.5})
    resumed = Logger(str(tmp_path), {'tensorboard_log': True}, step=2)  # of a run that was killed
    resumed.log(2, {'loss': 7.0, 'lr': 0.25})
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert events.Tags()['scalars'] == ['loss', 'lr']
    assert [(e.step, e.value) for e in events.Scalars('loss')] == [(0, 4.0), (1, 3.0), (2, 7.0)]
    assert [(e.step, e.value) for e in events.Scalars('lr')] == [(0, 0.5), (1, 0.5), (2, 0.25)]


def wandb_records(path):
    """The records of a .wandb file, a LevelDB log: blocks of 32 KB, each record with checksum, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record
    content, data, at = path.read_bytes(), b'', 7
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # the rest of a block
            at += 2**15 - at % 2**15
        length, kind = struct.unpack('<4xHB', content[at:at + 7])
        data += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(data)
            data = b''


def test_wandb_offline_writes_a_run_with_the_settings_and_what_was_logged(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    config = {'wandb_log': True, 'wandb_project': 'a-project', 'wandb_run_name': 'a-name', 'n_layer': 3}
    logger = Logger(str(tmp_path), config)
    logger.log(5, {'loss': 4.5})
    logger.final({'val_loss': 4.25})
    path, = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    records = list(wandb_records(path))
    run = next(r.run for r in records if r.HasField('run'))
    assert (run.project, run.display_name) == ('a-project', 'a-name')
    assert {item.key: item.value_json for item in run.config.update}['n_layer'] == '3'
    history, = ({item.key or item.nested_key[0]: item.value_json for item in r.history.item}
                for r in records if r.HasField('history'))
    assert (history['_step'], history['loss']) == ('5', '4.5')
    summary = {item.key or item.nested_key[0]: item.value_json for r in records for item in r.summary.update}
    assert summary['val_loss'] == '4.25'


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, as matplotlib knows them."""
    from matplotlib.figure import Figure
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, 'savefig', lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    return figures


def write_run(folder, losses, **config):
    logger = Logger(str(folder), {})
    for step, loss in enumerate(losses):
        logger.log(step, {'loss': loss, 'lr': 0.1})
    logger.write({'final': {'val_loss': losses[-1], 'steps': len(losses), 'bad': math.nan}})
    save_checkpoint(folder, {**checkpoint_of(len(losses)), 'config': {'out_dir': str(folder), **config}})
    return str(folder)


def test_the_curves_of_a_run_are_drawn_at_its_end(tmp_path, drawn):
    import matplotlib.image
    logger = Logger(str(tmp_path), {})
    for step, loss in enumerate([3.0, 2.0, math.nan, 1.0]):
        logger.log(step, {'loss': loss, 'lr': 0.1})
    logger.final({'val_loss': 1.0})
    height, width, _ = matplotlib.image.imread(tmp_path / 'curves.png').shape
    assert width > 500 and height > 100
    axes, = ({axis.get_title(): axis.lines[0] for axis in figure.axes} for figure in drawn)
    assert list(axes) == ['loss', 'lr']  # losses first
    assert axes['loss'].get_xdata().tolist() == [0, 1, 3] and axes['loss'].get_ydata().tolist() == [3.0, 2.0, 1.0]


def test_without_matplotlib_it_is_said_that_nothing_was_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    draw([str(tmp_path)], str(tmp_path / 'curves.png'))
    assert capsys.readouterr().out == f'{tmp_path}/curves.png not drawn: it needs pip install matplotlib\n'
    assert not (tmp_path / 'curves.png').exists()


def test_compare_prints_the_settings_that_differ_beside_the_results_and_draws_one_picture(tmp_path, capsys):
    a = write_run(tmp_path / 'a', [3.0, 2.5], n_layer=2, seed=1, lr=0.1)
    b = write_run(tmp_path / 'b', [3.0, 2.25], n_layer=4, seed=1, lr=0.1)
    capsys.readouterr()
    said = ok(call('configurator.py', a + '/', b, f'--out={tmp_path / "both.png"}'))
    rows = [line.split() for line in said.splitlines()]
    assert rows == [[a, b], ['n_layer', '2', '4'], ['---'] * 3, ['val_loss', '2.5', '2.25'], ['steps', '2', '2'],
                    ['bad', '-', '-']]
    assert (tmp_path / 'both.png').read_bytes().startswith(b'\x89PNG')
    assert 'name the folders' in one_line(call('configurator.py'))
    assert 'no such checkpoint' in one_line(call('configurator.py', tmp_path / 'c'))


def test_runs_that_differ_in_the_seed_alone_are_one_curve_their_mean_in_a_band(tmp_path, drawn):
    folders = [write_run(tmp_path / str(i), losses, n_layer=n_layer, seed=i)
               for i, (losses, n_layer) in enumerate([([3.0, 2.0], 2), ([4.0, 2.0], 2), ([1.0, 1.0], 3)])]
    compare(folders, str(tmp_path / 'all.png'))
    axis = next(axis for axis in drawn[-1].axes if axis.get_title() == 'loss')
    assert {line.get_label(): line.get_ydata().tolist() for line in axis.lines} == {
        'n_layer 2': [3.5, 2.0], 'n_layer 3': [1.0, 1.0]}
    band = axis.collections[0].get_paths()[0].vertices
    assert [band[band[:, 0] == 0, 1].min(), band[band[:, 0] == 0, 1].max()] == [3.0, 4.0]


def test_a_picture_shows_the_metrics_asked_for_from_the_step_asked_for_and_runs_on_one_axis(tmp_path, drawn, capsys):
    folders = [write_run(tmp_path / str(i), [3.0, 2.0, 1.0 + i], n_layer=i) for i in range(2)]
    for folder in folders:
        Logger(folder, {}, step=3).log(3, {'moe/a/x': 1.0, 'moe/a/y': 2.0})
    compare(folders, str(tmp_path / 'few.png'), 'loss,moe/a/x', 1)
    assert {axis.get_title(): [line.get_xdata().tolist() for line in axis.lines] for axis in drawn[-1].axes} == {
        'loss': [[1, 2], [1, 2]], 'moe/a/x': [[3], [3]]}
    assert [text.get_text() for text in drawn[-1].axes[1].get_legend().get_texts()] == ['n_layer 0', 'n_layer 1']
    compare(folders, str(tmp_path / 'part.png'), 'moe/a')
    assert [axis.get_title() for axis in drawn[-1].axes] == ['moe/a (n_layer 0)', 'moe/a (n_layer 1)']
    compare(folders, str(tmp_path / 'none.png'), 'los')
    assert f'{tmp_path}/none.png not drawn: no los is logged' in capsys.readouterr().out
