"""Tests import the scripts from the root of the project, and run them as a user does."""
import atexit, contextlib, io, os, random, runpy, signal, subprocess, sys, types

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
