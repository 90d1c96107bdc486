"""
What the tests share: how to run a script as a user does, and small datasets and models, each made
once per session.
"""
import atexit
import contextlib
import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import types

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)  # tests import the scripts from the root of the project

# On a busy machine several threads wait for each other, which is slow. Torch reads this when it is
# imported.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; runs only if asked for, by -m slow')
    config.option.markexpr = config.option.markexpr or 'not slow'


# -----------------------------------------------------------------------------
# Run a script

def start(*command, env={}, **options):
    """
    Start `python` with these arguments as a process of its own, in the project's folder.
    `env` is added to the environment; `options` go to subprocess.Popen.
    """
    defaults = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, cwd=ROOT)
    arguments = [str(argument) for argument in command]
    process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, **env},
                               **{**defaults, **options})
    atexit.register(process.kill)  # in case a test fails before the process ends
    return process


def finish(process, stdin=None):
    """Wait for a process of start(). Returns its returncode, stdout and stderr."""
    stdout, stderr = process.communicate(stdin, timeout=120)
    return types.SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def run_script(path):
    """Run a script in this process as __main__. Returns the exit status of a process."""
    try:
        runpy.run_path(path, run_name='__main__')
    except SystemExit as exit:
        return exit.code or 0
    except Exception:
        try:
            sys.excepthook(*sys.exc_info())
        except SystemExit as exit:
            return exit.code
        return 1
    return 0


def call(script, *args, stdin=''):
    """
    The result of finish(start(script, *args)), but computed in this process, where torch is already
    imported. That is many times faster.
    """
    # 1. what the script may change, to be restored afterwards
    argv = sys.argv
    excepthook = sys.excepthook
    real_stdin = sys.stdin
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    # 2. the script
    stdout = io.StringIO()
    stderr = io.StringIO()
    sys.argv = [os.path.join(ROOT, script), *[str(argument) for argument in args]]
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            returncode = run_script(sys.argv[0])
    finally:
        sys.argv = argv
        sys.excepthook = excepthook
        sys.stdin = real_stdin
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(returncode=returncode, stdout=stdout.getvalue(),
                                 stderr=stderr.getvalue())


def ok(result):
    """The stdout of a script, which must have succeeded."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def one_line(result):
    """The stderr of a script that met a user's mistake: one line, no traceback, exit status 2."""
    assert result.returncode == 2, result.stderr
    assert 'Traceback' not in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def process_of_rank(rank, torchrun):
    """The process id of a rank, a child of the process torchrun; None if there is none now."""
    with open(f'/proc/{torchrun}/task/{torchrun}/children') as f:
        children = f.read().split()
    for pid in children:
        # A child may end before its environment is read.
        with contextlib.suppress(OSError), open(f'/proc/{pid}/environ') as f:
            if f'RANK={rank}' in f.read().split('\0'):
                return int(pid)
    return None


def same(a, b):
    """Whether two nested structures are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


# What damage may leave in a log.jsonl: lines that are not text, not JSON, or not records.
DAMAGED_LINES = b'\n'.join([
    b'\xff\xfe', b'\x00\x00', b'[' * 100_000, b'{"a":' * 100_000, b'9' * 5000, b'[1, 2]', b'3',
    b'{}', b'{"loss": 3.0}', b'{"step": "x"}', b'{"step": null, "loss": 1.0}',
    b'{"step": [1], "loss": 1.0}', b'{"step": 1.5, "loss": 1.0}', b'{"step": 0, "loss": "x"}',
    b'{"step": 0, "loss": [2]}', b'{"step": 0, "loss": true}',
    b'{"step": 0, "loss": 1' + b'0' * 400 + b'}', b'{"step": 1' + b'0' * 70 + b', "loss": 1.0}',
    b'{"final": {"loss": "low"}}', b'{"step": NaN}',
    b'{"step": 0, "final": {"loss": 2.0}}',
    b'{"final": 3}', b''])


def flags(settings={}, **more):
    """Settings as command-line arguments."""
    return [f'--{key}={value}' for key, value in {**settings, **more}.items()]


# -----------------------------------------------------------------------------
# Pretraining

CPU = dict(device='cpu', dtype='float32', compile=False)

# A model that trains in a second.
TINY = dict(CPU, n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8, optimizer='muon',
            learning_rate=3e-3, muon_lr=0.02, lr_schedule='linear', warmup_iters=2, max_iters=20,
            eval_interval=10, eval_iters=0, log_interval=1, sample_tokens=4)


def story(n_words=6000, seed=0):
    """Text that a tiny model learns quickly: 19 words, some with letters of two or three bytes."""
    rng = random.Random(seed)
    words = ('the a king queen of and was so né mère went to see 王 his her old '
             'stone\nhall').split(' ')
    weights = range(len(words), 0, -1)  # the first words are the most frequent
    return ' '.join(rng.choices(words, weights=weights, k=n_words)) + '\n'


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """The folder of a dataset in byte tokens, made from story()."""
    folder = tmp_path_factory.mktemp('dataset')
    (folder / 'story.txt').write_bytes(story().encode())
    ok(call('data/text/prepare.py', f'--input={folder / "story.txt"}', f'--out={folder}'))
    return folder


# -----------------------------------------------------------------------------
# Post-training: prompts ask for three letters as capitals ("Raise abc" -> "ABC")

GOLD = '''
def gold(prompt, response):
    right = prompt.split()[-1].upper()
    same = sum(a == b for a, b in zip(response, right))
    return float(response == right), same / max(len(right), len(response))
'''


def letters(n, seed, noise=0.4):
    """
    Yield n examples (prompt, gold response, demonstrated response, wrong response). A wrong
    response has one letter wrong. So has a share `noise` of the demonstrated responses, so that
    PPO can improve on a model that learned from them.
    """
    rng = random.Random(seed)
    for i in range(n):
        word = ''.join(rng.choices('abcdef', k=3))
        prompt = f"{rng.choice(['Raise', 'Now do', 'Up'])} {word}"
        gold = word.upper()
        wrong = [gold.replace(letter, 'G', 1) for letter in gold]
        # Two demonstrations are drawn and one is used, which keeps the random stream as it was.
        demonstrations = []
        for _ in range(2):
            is_wrong = rng.random() < noise
            demonstrations.append(rng.choice(wrong) if is_wrong else gold)
        yield prompt, gold, demonstrations[0], wrong[i % 3]


def write_jsonl(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')


def with_checker(folder):
    """The settings of reward.py and ppo.py for a dataset whose checking function is in its
    checker.py. A dataset that is given by a path has none unless it is named."""
    return dict(dataset=folder, gold=f'{folder}/checker.py:gold')


def checker_again(folder):
    """The setting that a resumed run needs again, since no code is run because of a checkpoint."""
    return {'gold': with_checker(folder)['gold']}


@pytest.fixture(scope='session')
def letters_data(tmp_path_factory):
    """The folder of a dataset of demonstrations, preferences and prompts; checker.py has a function
    gold."""
    folder = tmp_path_factory.mktemp('letters')
    (folder / 'checker.py').write_text(GOLD, encoding='utf-8')
    for split, n, seed in (('train', 2000, 1), ('val', 60, 2)):
        sft = []
        preferences = []
        prompts = []
        for prompt, gold, demonstrated, wrong in letters(n, seed):
            op = prompt.split()[0]
            response = demonstrated if split == 'train' else gold
            sft.append({'prompt': prompt, 'response': response, 'op': op})
            preferences.append({'prompt': prompt, 'chosen': gold, 'rejected': wrong, 'margin': 0.5,
                                'op': op, 'clean': True})
            prompts.append({'prompt': prompt, 'response': gold})
        write_jsonl(folder / f'sft_{split}.jsonl', sft)
        write_jsonl(folder / f'pref_{split}.jsonl', preferences)
        write_jsonl(folder / f'prompts_{split}.jsonl', prompts)
    return folder


@pytest.fixture(scope='session')
def small_base(tmp_path_factory):
    """The run folder of an untrained model of byte tokens."""
    from bpe import Tokenizer
    from configurator import save_checkpoint
    from model import GPT, GPTConfig
    folder = tmp_path_factory.mktemp('base')
    tok = Tokenizer.byte()
    model_args = dict(block_size=32, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=48,
                      mlp='relu2', qk_norm=True)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**model_args))
    save_checkpoint(str(folder), {
        'stage': 'train', 'step': 0, 'model': model.state_dict(), 'model_args': model_args,
        'optimizer': [], 'config': {}, 'tokenizer': tok.to_dict()})
    return folder


@pytest.fixture(scope='session')
def small_sft(letters_data, small_base, tmp_path_factory):
    """An SFT model trained on the demonstrations: the run's folder and stdout."""
    folder = tmp_path_factory.mktemp('sft')
    settings = flags(CPU, dataset=letters_data, init_from=small_base, out_dir=folder,
                     max_iters=150, batch_size=32, gradient_accumulation_steps=1,
                     eval_interval=75, eval_prompts=20, test_draws=4, max_new_tokens=8)
    stdout = ok(call('sft.py', *settings))
    return types.SimpleNamespace(folder=folder, stdout=stdout)


@pytest.fixture(scope='session')
def small_reward(letters_data, small_sft, tmp_path_factory):
    """A reward model, an encoder, trained on the preferences: the run's folder and stdout."""
    folder = tmp_path_factory.mktemp('reward')
    settings = flags(CPU, **with_checker(letters_data), init_from=small_sft.folder, out_dir=folder,
                     max_iters=150, batch_size=32, gradient_accumulation_steps=1,
                     eval_interval=75, muon_lr=0.02, learning_rate=3e-3, max_new_tokens=8)
    stdout = ok(call('reward.py', *settings))
    return types.SimpleNamespace(folder=folder, stdout=stdout)
