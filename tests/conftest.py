"""Tests import the scripts from the root of the project, and run them as a user does."""
import atexit, contextlib, io, json, os, random, runpy, signal, subprocess, sys, types

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # on a busy machine, threads that wait for each other are slow


def start(*command, env={}, **how):
    """`python` and a command line, in the project's folder, begun as a process of its own."""
    how = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) | how
    process = subprocess.Popen([sys.executable, *map(str, command)], env={**os.environ, **env}, **how)
    atexit.register(process.kill)  # where a test fails before its end
    return process


def finish(process, stdin=None):
    stdout, stderr = process.communicate(stdin, timeout=120)
    return types.SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def call(script, *args, stdin=''):
    """The same in this process, where torch is already there: many times as fast."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before, code, stdout, stderr = (sys.argv, sys.excepthook, sys.stdin), 0, io.StringIO(), io.StringIO()
    sys.argv, sys.stdin = [os.path.join(ROOT, script), *map(str, args)], io.StringIO(stdin)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as stop:
            code = stop.code
        except Exception:
            code = 1
            try:
                sys.excepthook(*sys.exc_info())
            except SystemExit as stop:
                code = stop.code
    sys.argv, sys.excepthook, sys.stdin = before
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return types.SimpleNamespace(returncode=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def ok(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def one_line(result):
    """The line that a user's mistake gets, with exit status 2 and no traceback."""
    assert result.returncode == 2 and 'Traceback' not in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def flags(settings={}, **more):
    return [f'--{key}={value}' for key, value in {**settings, **more}.items()]


# A model that trains in a second.
TINY = dict(device='cpu', dtype='float32', compile=False, n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=8,
            optimizer='muon', learning_rate=3e-3, muon_lr=0.02, lr_schedule='linear', warmup_iters=2, max_iters=20,
            eval_interval=10, eval_iters=0, log_interval=1, sample_tokens=4)


def story(n_words=6000, seed=0):
    """Text that is easily learned a little: few words, and some letters of two and three bytes."""
    rng = random.Random(seed)
    words = 'the a king queen of and was so né mère went to see 王 his her old stone\nhall'.split(' ')
    return ' '.join(rng.choices(words, weights=range(len(words), 0, -1), k=n_words)) + '\n'


@pytest.fixture(scope='session')
def dataset(tmp_path_factory):
    """The folder of a dataset of bytes, prepared from a story."""
    folder = tmp_path_factory.mktemp('dataset')
    (folder / 'story.txt').write_bytes(story().encode())
    ok(call('data/text/prepare.py', f'--input={folder / "story.txt"}', f'--out={folder}'))
    return folder


# Post-training of a model that trains in seconds: three letters are asked for in capitals. `noise` of the demonstrators'
# answers have a letter wrong, so that there is something to gain; `gold` tells.
GOLD = '''
def gold(prompt, response):
    right = prompt.split()[-1].upper()
    return float(response == right), sum(a == b for a, b in zip(response, right)) / max(len(right), len(response))
'''


def letters(n, seed, noise=0.4):
    rng = random.Random(seed)
    for i in range(n):
        word = ''.join(rng.choices('abcdef', k=3))
        prompt = f"{rng.choice(['Raise', 'Now do', 'Up'])} {word}"
        slips = [word.upper().replace(c, 'G', 1) for c in word.upper()]
        said = [rng.choice(slips) if rng.random() < noise else word.upper() for _ in range(2)]
        yield prompt, word.upper(), said[0], slips[i % 3]


@pytest.fixture(scope='session')
def letters_data(tmp_path_factory):
    """A folder of demonstrations, pairs and prompts, with a function gold."""
    folder = tmp_path_factory.mktemp('letters')
    (folder / 'prepare.py').write_text(GOLD)
    for split, n, seed in (('train', 2000, 1), ('val', 60, 2)):
        rows = list(letters(n, seed))
        made = {'sft': [{'prompt': p, 'response': said if split == 'train' else right, 'op': p.split()[0]}
                        for p, right, said, _ in rows],
                'pref': [{'prompt': p, 'chosen': right, 'rejected': wrong, 'margin': 0.5, 'op': p.split()[0], 'clean': True}
                         for p, right, _, wrong in rows],
                'prompts': [{'prompt': p, 'response': right} for p, right, _, _ in rows]}
        for kind, records in made.items():
            with open(folder / f'{kind}_{split}.jsonl', 'w', encoding='utf-8') as f:
                f.writelines(json.dumps(r) + '\n' for r in records)
    return folder


CPU = dict(device='cpu', dtype='float32', compile=False)


@pytest.fixture(scope='session')
def small_base(tmp_path_factory):
    """The run folder of an untrained model of bytes, with the default architecture."""
    import torch
    from bpe import Tokenizer
    from configurator import save_checkpoint
    from model import GPT, GPTConfig
    folder, tok = tmp_path_factory.mktemp('base'), Tokenizer.byte()
    config = dict(block_size=32, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=48, mlp='relu2', qk_norm=True)
    torch.manual_seed(0)
    save_checkpoint(str(folder), {'stage': 'train', 'step': 0, 'model': GPT(GPTConfig(**config)).state_dict(),
                                  'model_args': config, 'optimizer': [], 'config': {}, 'tokenizer': tok.to_dict()})
    return folder


@pytest.fixture(scope='session')
def small_sft(letters_data, small_base, tmp_path_factory):
    """The run folder of a model that was taught the letters, as its demonstrators do them."""
    folder = tmp_path_factory.mktemp('sft')
    made = call('sft.py', *flags(CPU, dataset=letters_data, init_from=small_base, out_dir=folder, max_iters=150, batch_size=32,
                                 gradient_accumulation_steps=1, eval_interval=75, eval_prompts=20, test_draws=4,
                                 max_new_tokens=8))
    return types.SimpleNamespace(folder=folder, stdout=ok(made))


@pytest.fixture(scope='session')
def small_reward(letters_data, small_sft, tmp_path_factory):
    """The run folder of a reward model of the letters, an encoder."""
    folder = tmp_path_factory.mktemp('reward')
    made = call('reward.py', *flags(CPU, dataset=letters_data, init_from=small_sft.folder, out_dir=folder, max_iters=150,
                                    batch_size=32, gradient_accumulation_steps=1, eval_interval=75, muon_lr=0.02,
                                    learning_rate=3e-3, max_new_tokens=8))
    return types.SimpleNamespace(folder=folder, stdout=ok(made))
