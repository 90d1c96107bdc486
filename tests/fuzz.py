"""
Give damaged and hostile inputs to the scripts, and check that none of them does harm.

    python tests/fuzz.py                      3,200 inputs, on one core
    python tests/fuzz.py --first=200 --count=200 --seed=5
    python tests/fuzz.py --only=1234          one input again: prints its command and its output,
                                              and keeps its folder

An input is a valid file, folder or command line with a few mutations. It is a function of the seed
and its number alone. Whatever the input, a script must succeed, or end with one line on stderr and
status 2. It must neither run code of the input, nor write outside of its folder, nor take more than
1 GB of memory or LIMIT_SECONDS of CPU time, nor print characters that drive a terminal.

Starting Python with torch takes seconds. So one process imports everything once, and each input is
processed by a fork of it, which takes a fraction of a second. This needs Linux.
"""
import argparse
import ast
import contextlib
import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import types
import zipfile

# One thread, because a fork copies only one; and no look-ups on huggingface.co.
os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

from conftest import CPU, ROOT, flags, letters, run_script, story, write_jsonl

LIMIT_BYTES = 2 ** 30  # beyond what Python with torch needs
LIMIT_SECONDS = 20     # of CPU time

# -----------------------------------------------------------------------------
# Mutations. They draw from `rng`, a random.Random, and change what they return only.

ESCAPE = '\x1b]0;title\x07'      # sets the title of a terminal
BIDI = 'a\u202egnp.exe'          # is displayed as aexe.png
DEEP = [[[[[[[[[[[[]]]]]]]]]]]]

NUMBERS = [0, 1, -1, 2, 3, 7, 255, 256, 10 ** 6, 70_000_000, 10 ** 12, 2 ** 63, -2 ** 63, 10 ** 30,
           10 ** 400, 0.5, -0.5, 1e-300, 1e39, 1e308, math.nan, math.inf, -math.inf]
TEXTS = ['', 'a', '0', 'None', ESCAPE, BIDI, '\x00', '\ud800', '../../escaped', '/', '王' * 300,
         'x' * 20_000, 'foreign.py:f', 'foreign', '<|endoftext|>', '{{ 1 / 0 }}']
PIECES = [b'"', b'}', b'[', b'\n', b'\0', b'\xff', b'\xed\xa0\x80', ESCAPE.encode(), b'9' * 400,
          b'[' * 5000]
OTHERS = [None, True, False, [], {}, [0], [None], ['a', 1], {'a': 1}, {'a': {'b': []}}, DEEP]


def junk(rng):
    """A value of any type that JSON can hold."""
    values = rng.choice([NUMBERS, TEXTS, OTHERS])
    return copy.deepcopy(rng.choice(values))


def nodes(tree):
    """All (container, key) of a tree of dicts and lists."""
    found = []
    waiting = [tree]
    while waiting:
        container = waiting.pop()
        keys = container if isinstance(container, dict) else range(len(container))
        for key in list(keys):
            found.append((container, key))
            if isinstance(container[key], (dict, list)):
                waiting.append(container[key])
    return found


def choose_node(rng, tree):
    """A random (container, key) of a tree, where small branches are as likely as large ones."""
    container = tree
    while True:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        key = rng.choice(keys)
        child = container[key]
        is_inner = isinstance(child, (dict, list)) and len(child) > 0
        if not is_inner or rng.random() < 0.2:
            return container, key
        container = child


def mutate_node(rng, tree, make_junk):
    """Change one place of a tree of dicts and lists, in place."""
    if not isinstance(tree, (dict, list)) or not tree:
        return
    container, key = choose_node(rng, tree)
    old = container[key]
    action = rng.choice(['replace', 'replace', 'replace', 'delete', 'retype', 'swap', 'add'])
    if action == 'replace':
        container[key] = make_junk(rng)
    elif action == 'delete':
        del container[key]
    elif action == 'retype':
        container[key] = rng.choice([lambda: str(old), lambda: [old], lambda: {'a': old}])()
    elif action == 'swap':
        other, other_key = choose_node(rng, tree)
        container[key] = copy.deepcopy(other[other_key])
    elif isinstance(container, dict):
        container[rng.choice(TEXTS)] = make_junk(rng)
    else:
        container.insert(key, make_junk(rng))


def mutate_tree(rng, tree, make_junk=junk):
    """A copy of a tree of dicts and lists with one to three mutations."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutate_node(rng, tree, make_junk)
    return tree


def mutate_bytes(rng, data):
    """The data with one to four pieces changed, removed, repeated or inserted."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        stop = start + rng.choice([1, 1, 4, 50])
        action = rng.choice(['change', 'change', 'remove', 'repeat', 'insert', 'truncate'])
        if action == 'change':
            for i in range(start, min(stop, len(data))):
                data[i] ^= rng.choice([1, 0x20, 0x80, 0xff])
        elif action == 'remove':
            del data[start:stop]
        elif action == 'repeat':
            data[start:start] = data[start:stop]
        elif action == 'insert':
            data[start:start] = rng.choice(PIECES)
        elif rng.random() < 0.3:
            del data[start:]
    return bytes(data)


def mutate_json(rng, data):
    """A JSON text (bytes) with mutations of its values or, less often, of its bytes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    tree = json.loads(data)
    if rng.random() < 0.05:
        tree = junk(rng)
    else:
        tree = mutate_tree(rng, tree)
    return json.dumps(tree).encode()


def junk_tensor(rng, like):
    """A tensor that does not belong where `like` is."""
    import torch
    return rng.choice([
        lambda: torch.zeros(3), lambda: torch.zeros(()), lambda: torch.zeros(0),
        lambda: like.double(), lambda: like.half(), lambda: like.long(), lambda: like.bool(),
        lambda: like.to(torch.complex64), lambda: like.flatten(), lambda: like[None],
        lambda: like.mT if like.dim() > 1 else like, lambda: like * math.nan, lambda: like + 1e38,
        lambda: -like, lambda: like.to_sparse(), lambda: like.to('meta'),
        lambda: torch.zeros(1).expand(10 ** 6, 10 ** 6), lambda: torch.zeros(()).expand(like.shape),
        lambda: torch.nn.Parameter(like.float())])()


def junk_entry(rng):
    """A value of any type that a checkpoint can hold."""
    import torch
    if rng.random() < 0.7:
        return junk(rng)
    return junk_tensor(rng, torch.ones(4, 4))


def mutate_checkpoint(rng, checkpoint):
    """A copy of a checkpoint with one to three mutations of its entries or tensors."""
    import torch
    if rng.random() < 0.5:
        # any entry
        return mutate_tree(rng, checkpoint, junk_entry)
    checkpoint = copy.deepcopy(checkpoint)
    if rng.random() < 0.4:
        # settings
        for _ in range(rng.randint(1, 2)):
            part = checkpoint[rng.choice(['config', 'model_args'])]
            part[rng.choice([*part])] = junk(rng)
        return checkpoint
    tensors = [place for place in nodes(checkpoint) if torch.is_tensor(place[0][place[1]])]
    for container, key in rng.choices(tensors, k=rng.choice([1, 1, 2])):
        container[key] = junk_tensor(rng, container[key])
    return checkpoint


# Pickles that make a file, when they are loaded by Python's own loader.
PICKLES = [b"cos\nsystem\n(S'touch executed'\ntR.",
           b"cbuiltins\nexec\n(S'open(\"executed\", \"w\")'\ntR.",
           b'cbuiltins\nbytearray\n(I4000000000\ntR.',
           b'cbuiltins\ngetattr\n(cos\nsystem\nVx\ntR.']


def mutate_archive(rng, path):
    """Change one member of a zip archive, in place, with correct checksums."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    name = rng.choice([*members, *[name for name in members if name.endswith('.pkl')] * 10])
    action = rng.choice(['change', 'change', 'pickle', 'remove', 'double', 'rename'])
    if action == 'change':
        members[name] = mutate_bytes(rng, members[name])
    elif action == 'pickle':
        members[name] = rng.choice(PICKLES)
    elif action == 'remove':
        del members[name]
    elif action == 'double':
        members[f'{name}.x'] = members[name]
    else:
        members[f'../{name}'] = members.pop(name)
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, 'w', method) as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def rewrite(path, change):
    """Replace the content of a file (bytes) by change(content)."""
    with open(path, 'rb') as f:
        data = f.read()
    with open(path, 'wb') as f:
        f.write(change(data))


# -----------------------------------------------------------------------------
# Run a script on an input, in a fork of this process

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.link', 'os.symlink',
           'os.truncate', 'os.chmod', 'shutil.rmtree', 'shutil.copyfile', 'shutil.move'}
STARTS = {'os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn', 'os.spawn',
          'pty.spawn', 'subprocess.Popen', 'pickle.find_class', 'socket.connect',
          'socket.getaddrinfo'}
# Where code may come from: Python, its packages, and this project.
TRUSTED = [ROOT, *{os.path.dirname(path) for path in sysconfig.get_paths().values()},
           os.path.dirname(os.__file__), sys.prefix, sys.base_prefix]


def is_inside(path, folder):
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    path = os.path.realpath(os.path.abspath(path))
    return path == folder or path.startswith(folder + os.sep)


def is_trusted(filename):
    return any(is_inside(filename, os.path.realpath(folder)) for folder in TRUSTED)


def watch(folder, own_code, report):
    """Call report(text) for whatever this process does that an input must not cause. own_code: the
    files that the command line tells it to run."""
    def hook(event, args):
        if event == 'open' and isinstance(args[0], (str, bytes)):
            writes = isinstance(args[2], int) and args[2] & WRITES
            if writes and not is_inside(args[0], folder) and args[0] != os.devnull:
                report(f'writes {args[0]!r}')
        elif event in CHANGES:
            for path in args[:2]:
                if isinstance(path, (str, bytes)) and not is_inside(path, folder):
                    report(f'{event} {args!r}')
        elif event in STARTS:
            report(f'{event} {args!r}')
        elif event == 'exec':
            filename = args[0].co_filename
            caller = sys._getframe(1).f_code.co_filename
            if filename.startswith('<'):
                # text that is run, by dataclasses for example
                if not is_trusted(caller) and not caller.startswith('<frozen'):
                    report(f'runs {filename} in {caller}')
            elif filename not in own_code and not is_trusted(filename):
                report(f'runs {filename}')
    sys.addaudithook(hook)


def limit_resources():
    """Limit the memory, the CPU time and the size of files of this process."""
    with open('/proc/self/statm', encoding='ascii') as f:
        used = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.alarm(10 * LIMIT_SECONDS)  # in case it waits without using the CPU


def run_here(script, args, folder, files, draws):
    """What the forked process does: run a script as a user does, with its output in files."""
    if not draws:
        # the pictures at the end of the stages, which take most of the time
        import assets.draw
        assets.draw.draw_curves = lambda folders, path: None
    os.setsid()
    os.chdir(folder)
    for number, file in enumerate(files[:2], start=1):
        os.dup2(file.fileno(), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding='utf-8', closefd=False)
    sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = open(2, 'w', encoding='utf-8', errors='backslashreplace', closefd=False)
    sys.argv = [os.path.join(ROOT, script), *args]
    own_code = [os.path.join(folder, arg) for arg in args if arg.endswith('.py')]
    own_code += [arg for arg in args if arg.endswith('.py')]
    # No dataset of the project exists here, so that none is prepared, which takes long.
    import data.dataset
    data.dataset.DATA_FOLDER = os.path.join(folder, 'project')
    limit_resources()
    watch(folder, own_code, lambda text: os.write(files[2].fileno(), text.encode() + b'\n'))
    return run_script(sys.argv[0])


def run_forked(script, args, folder, draws=False):
    """
    Run a script with these arguments in `folder`, watched and limited. Returns its status (minus
    the signal that ended it), stdout, stderr, what it did that it must not do, and the seconds of
    CPU time and the bytes of memory that it took. draws=False: without the pictures of the stages.
    """
    folder = os.path.realpath(folder)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        process = os.fork()
        if process == 0:
            status = 99
            try:
                status = run_here(script, args, folder, files, draws)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status if isinstance(status, int) else 98)
        _, status, usage = os.wait4(process, 0)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode('utf-8', errors='backslashreplace'))
    return types.SimpleNamespace(
        status=os.waitstatus_to_exitcode(status), stdout=texts[0], stderr=texts[1],
        forbidden=texts[2].splitlines(), seconds=usage.ru_utime + usage.ru_stime,
        bytes=usage.ru_maxrss * 1024)


def faults_of(result, is_command_line):
    """What is wrong with the result of run_forked, as a list of texts. A command line may ask for
    more memory than there is; a file must not."""
    from configurator import printable
    faults = list(result.forbidden)
    errors = [line for line in result.stderr.splitlines() if not line.startswith('warning:')]
    if result.status in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        faults.append('does not end')
    elif result.status not in (0, 2):
        faults.append(f'status {result.status}')
    if result.status == 2 and (len(errors) != 1 or not errors[0].startswith('error: ')):
        faults.append('not one line')
    if result.status == 0 and errors:
        faults.append('success with errors')
    if 'Traceback' in result.stderr:
        faults.append('traceback')
    if 'out of memory' in result.stderr and not is_command_line:
        faults.append('asks for more than 1 GB')
    output = result.stdout + result.stderr
    if printable(output) != output:
        faults.append('prints control characters')
    if len(result.stderr) > 5000:
        faults.append('a very long error')
    return faults


# -----------------------------------------------------------------------------
# Valid inputs

# Runs of a few steps; reward.py and ppo.py can also start from the folders of others.
SMALL = dict(CPU, eval_interval=2, max_iters=2, log_interval=1, warmup_iters=1)
STAGES = {
    'train': dict(SMALL, dataset='./tokens', tokenizer='', vocab_size=0, n_layer=2, n_head=2,
                  n_embd=16, block_size=32, batch_size=2, eval_iters=2, sample_tokens=4),
    'sft': dict(SMALL, dataset='./examples', init_from='base', batch_size=2, eval_prompts=2,
                test_prompts=2, test_draws=1, max_new_tokens=4),
    'reward': dict(SMALL, dataset='./examples', init_from='sft', batch_size=2, normalize_prompts=2,
                   max_new_tokens=4),
    'ppo': dict(SMALL, dataset='./examples', init_from='sft', reward_model='reward', batch_size=4,
                minibatch_size=4, eval_prompts=2, test_prompts=2, test_draws=1, max_new_tokens=4),
}
RUNS = {'train': 'base', 'sft': 'sft', 'reward': 'reward', 'ppo': 'ppo'}
SAMPLE = dict(num_samples=1, max_new_tokens=4, device='cpu', dtype='float32')

FOREIGN = '''
import os
open('executed', 'w')

def gold(prompt, response):
    os.system('touch executed')
    return 1.0

f = gold
'''


def make_valid_inputs(folder):
    """
    Fill a folder with what the inputs are made of: tokens/ and examples/ (datasets), the runs
    base/, sft/, reward/ and ppo/ made from them, hf/ (a model in Hugging Face's format), bpe.json
    and fallback.json (tokenizers), and foreign.py, which must not be run.
    """
    def run(script, **settings):
        result = run_forked(script, flags(settings), folder)
        assert result.status == 0 and not faults_of(result, False), (script, result)

    # 1. data
    for name in ('', 'examples', 'tokens', 'project'):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for file in ('foreign.py', 'prepare.py'):
            with open(os.path.join(folder, name, file), 'w', encoding='utf-8') as f:
                f.write(FOREIGN)
    with open(os.path.join(folder, 'story.txt'), 'w', encoding='utf-8') as f:
        f.write(story(1000))
    run('data/text/prepare.py', input='story.txt', out='tokens')
    for split in ('train', 'val'):
        rows = list(letters(20, seed=1))
        for kind in ('sft', 'pref', 'prompts'):
            write_jsonl(os.path.join(folder, 'examples', f'{kind}_{split}.jsonl'), [
                {'prompt': prompt, 'response': gold, 'chosen': gold, 'rejected': wrong,
                 'op': prompt.split()[0], 'margin': 0.5, 'clean': True}
                for prompt, gold, _, wrong in rows])

    # 2. tokenizers
    run('bpe.py', input='story.txt', vocab_size=270, out='bpe.json')
    import tokenizers
    vocab = {f'<0x{byte:02X}>': byte for byte in range(256)}
    vocab |= {'▁': 256, 'a': 257, '▁a': 258, '<unk>': 259, '</s>': 260}
    model = tokenizers.models.BPE(vocab, [('▁', 'a')], unk_token='<unk>', byte_fallback=True)
    fallback = tokenizers.Tokenizer(model)
    fallback.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fallback.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(),
                                                     tokenizers.decoders.Metaspace()])
    fallback.add_special_tokens(['<unk>', '</s>'])
    fallback.save(os.path.join(folder, 'fallback.json'))

    # 3. runs, which are also what comes after them starts from
    for stage, settings in STAGES.items():
        run(f'{stage}.py', out_dir=RUNS[stage], **settings)
    run('data/pretrained.py', init_from='base', out='hf')


# -----------------------------------------------------------------------------
# Inputs. Each function mutates the copies in `folder` and returns (script, arguments).

def literal_settings(script):
    """{name: default} of a script's settings, read from its source."""
    from configurator import settings_block
    text = '\n'.join(settings_block(os.path.join(ROOT, script)))
    tree = ast.parse('if True:\n' + text if text.lstrip('\n').startswith(' ') else text)
    defaults = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            defaults[node.targets[0].id] = ast.literal_eval(node.value)
    return defaults


# Settings that a user may well set to a huge number: the run then takes long, as requested.
LONG = {'max_iters', 'max_new_tokens', 'sample_tokens', 'ppo_epochs', 'test_draws', 'num_samples',
        'gradient_accumulation_steps', 'best_of'}
# Settings that reach out of the process when they are on.
NOT_MUTATED = {'wandb_log', 'tensorboard_log', 'compile', 'check'}

COMMANDS = {
    'train.py': dict(STAGES['train'], out_dir='out'),
    'sft.py': dict(STAGES['sft'], out_dir='out'),
    'reward.py': dict(STAGES['reward'], out_dir='out'),
    'ppo.py': dict(STAGES['ppo'], out_dir='out'),
    'sample.py': dict(SAMPLE, out_dir='base'),
    'bpe.py': dict(input='story.txt', vocab_size=270),
    'data/pretrained.py': dict(init_from='base', out='out'),
    'data/text/prepare.py': dict(input='story.txt', out='out'),
    'data/alpaca/prepare.py': dict(input='examples/sft_train.jsonl', out='out'),
    'data/hh_rlhf/prepare.py': dict(input='examples/pref_train.jsonl', out='out'),
    'assets/draw.py': dict(out='out.png'),
}


def junk_setting(rng, script):
    """(name, value) of a setting of the script that gets a value from anywhere."""
    name = rng.choice([name for name in literal_settings(script) if name not in NOT_MUTATED])
    while True:
        value = junk(rng)
        if name in LONG and isinstance(value, (int, float)) and not -1e9 < value < 300:
            continue
        if isinstance(value, str) and ('..' in value or value == '/' or '\0' in value):
            continue  # a user may write where he likes, and an argument has no NUL
        if name == 'input' and value == '':
            continue  # the published file is downloaded
        return name, value


def settings_input(rng, folder):
    script = rng.choice([*COMMANDS])
    settings = dict(COMMANDS[script])
    for _ in range(rng.choice([1, 1, 2])):
        name, value = junk_setting(rng, script)
        settings[name] = value if isinstance(value, str) else repr(value)
    args = [arg.encode('utf-8', 'surrogatepass') for arg in flags(settings)]
    args = [os.fsdecode(arg) for arg in args]
    if rng.random() < 0.2:
        args.append(rng.choice(['--lr=1', '--', '-x', '--seed', '--seed=1=2', '--seed=1', 'no.py',
                                '--=', '--__class__=1', f'--{BIDI}=1', ESCAPE, '.', '--seed=']))
    return script, args


def config_input(rng, folder):
    script = rng.choice(['train.py', 'sft.py', 'reward.py', 'ppo.py', 'sample.py'])
    lines = [f'{name} = {value!r}' for name, value in COMMANDS[script].items()]
    path = os.path.join(folder, 'config.py')
    for _ in range(rng.choice([1, 1, 2])):
        name, value = junk_setting(rng, script)
        text = repr(value).replace('nan', 'float("nan")').replace('inf', 'float("inf")')
        line = rng.choice([f'{name} = {text}', f'{name} = {text}', f'{name}: int = {text}',
                           f'{name} += {text}', f'del {name}', f'{name} = lambda: 1',
                           f'unknown_{name} = 1', f'import {name}', '1 / 0', 
                           f'def {name}(): pass', 'class max_iters: pass', f'{name} = [',
                           'raise ValueError("\x1b[2J")', f'"{ESCAPE}" + 1', 'x\u202ey = 1'])
        lines.insert(rng.randrange(len(lines) + 1), line)
    text = '\n'.join(lines).encode('utf-8', 'surrogatepass')
    if rng.random() < 0.2:
        text = mutate_bytes(rng, text)
    with open(path, 'wb') as f:
        f.write(text)
    return script, ['config.py']


# Examples in other published formats.
RECORDS = [
    {'messages': [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'u'},
                  {'role': 'assistant', 'content': 'a', 'weight': 1}]},
    {'conversations': [{'from': 'human', 'value': 'u'}, {'from': 'gpt', 'value': 'a'}]},
    {'instruction': 'do', 'input': 'this', 'output': 'done', 'history': [['a', 'b']],
     'system': 's'},
    {'question': 'q', 'answer': 'a', 'weight': 1},
    {'prompt': [{'role': 'user', 'content': 'u'}],
     'chosen': [{'role': 'assistant', 'content': 'a'}],
     'rejected': [{'role': 'assistant', 'content': 'b'}], 'margin': 1},
    {'chosen': '\n\nHuman: Hi!\n\nAssistant: Hello.',
     'rejected': '\n\nHuman: Hi!\n\nAssistant: What?'},
    [{'role': 'user', 'content': 'u'}, {'role': 'assistant', 'content': 'a'}],
]


def jsonl_input(rng, folder):
    consumers = [('sft.py', 'sft'), ('reward.py', 'pref'), ('ppo.py', 'prompts'),
                 ('data/alpaca/prepare.py', 'sft'), ('data/hh_rlhf/prepare.py', 'pref'),
                 ('sample.py', 'prompts')]
    script, kind = rng.choice(consumers)
    split = rng.choice(['train', 'val'])
    if script.startswith('data/'):
        split = 'train'
    path = os.path.join('examples', f'{kind}_{split}.jsonl')
    with open(os.path.join(folder, path), encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    for _ in range(rng.randint(0, 3)):
        records.insert(0, copy.deepcopy(rng.choice(RECORDS)))
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(min(len(records), 5))
        records[i] = mutate_tree(rng, records[i]) if rng.random() < 0.9 else junk(rng)
    if rng.random() < 0.15:
        text = json.dumps(records)
    else:
        text = '\n'.join(json.dumps(record) for record in records)
    data = text.encode()
    if rng.random() < 0.2:
        data = mutate_bytes(rng, data)
    with open(os.path.join(folder, path), 'wb') as f:
        f.write(data)
    settings = dict(COMMANDS[script])
    if script == 'sample.py':
        settings = dict(SAMPLE, out_dir='sft', prompts=path, answers='answers.jsonl')
    elif script == 'ppo.py' and rng.random() < 0.5:
        settings['temperature'] = 0.5
    elif script == 'reward.py':
        settings['loss'] = rng.choice(['bt', 'bt_margin', 'margin'])
    return script, flags(settings)


def tokenizer_input(rng, folder):
    name = rng.choice(['bpe.json', 'fallback.json', 'hf/tokenizer.json', 'tokens/tokenizer.json'])
    path = os.path.join(folder, name)
    rewrite(path, lambda data: mutate_json(rng, data))
    if name == 'hf/tokenizer.json':
        text = rng.choice(['hello', '<|user|>', '', 'né 王'])
        settings = dict(SAMPLE, init_from='hf', start=text)
        if rng.random() < 0.3:
            write_jsonl(os.path.join(folder, 'prompts.jsonl'), [{'prompt': 'Raise abc'}])
            settings.update(prompts='prompts.jsonl')
        if rng.random() < 0.2:
            return 'sft.py', flags(COMMANDS['sft.py'], init_from='hf')
        return 'sample.py', flags(settings)
    if name == 'tokens/tokenizer.json':
        meta_path = os.path.join(folder, 'tokens', 'meta.json')
        if rng.random() < 0.5:
            fit_meta(path, meta_path)
        return 'train.py', flags(COMMANDS['train.py'])
    return 'data/text/prepare.py', flags(input='story.txt', out='out', tokenizer=path)


def fit_meta(path, meta_path):
    """Give meta.json the fingerprint of a mutated tokenizer.json, so that it is not refused for
    this."""
    from bpe import Tokenizer
    try:
        tok = Tokenizer.load(path)
    except BaseException:
        return
    with open(meta_path, encoding='utf-8') as f:
        meta = json.load(f)
    meta['tokenizer'].update(fingerprint=tok.fingerprint, vocab_size=tok.vocab_size)
    with open(meta_path, 'w', encoding='utf-8') as f:
        json.dump(meta, f)


def meta_input(rng, folder):
    rewrite(os.path.join(folder, 'tokens', 'meta.json'), lambda data: mutate_json(rng, data))
    return 'train.py', flags(COMMANDS['train.py'])


def bin_input(rng, folder):
    name = rng.choice(['train.bin', 'val.bin'])
    path = os.path.join(folder, 'tokens', name)
    rewrite(path, lambda data: mutate_bytes(rng, data))
    meta_path = os.path.join(folder, 'tokens', 'meta.json')
    with open(meta_path, encoding='utf-8') as f:
        meta = json.load(f)
    if rng.random() < 0.7:
        # the count of tokens fits the mutated file
        dtype = rng.choice(['uint16', 'uint16', 'uint32', 'int16', 'O', '>u2', 'float16'])
        meta['dtype'] = dtype
        size = 4 if dtype == 'uint32' else 2
        for split in ('train', 'val'):
            file = os.path.join(folder, 'tokens', f'{split}.bin')
            n_bytes = os.path.getsize(file) // size * size
            os.truncate(file, n_bytes)
            meta[f'{split}_tokens'] = n_bytes // size
        with open(meta_path, 'w', encoding='utf-8') as f:
            json.dump(meta, f)
    return 'train.py', flags(COMMANDS['train.py'])


def checkpoint_input(rng, folder):
    import torch
    from configurator import read_checkpoint
    stage = rng.choice([*RUNS])
    run = RUNS[stage]
    path = os.path.join(folder, run, 'ckpt.pt')
    if rng.random() < 0.75:
        checkpoint = mutate_checkpoint(rng, read_checkpoint(path))
        torch.save(checkpoint, path)
    elif rng.random() < 0.8:
        mutate_archive(rng, path)
    else:
        rewrite(path, lambda data: mutate_bytes(rng, data))
    previous = os.path.join(folder, run, 'ckpt_prev.pt')
    if os.path.exists(previous) and rng.random() < 0.8:
        os.remove(previous)
    return rng.choice(consumers_of(stage, run))


def consumers_of(stage, run):
    """The commands that read the checkpoint of a run."""
    resume = dict(out_dir=run, init_from='resume', max_iters=4)
    commands = [(f'{stage}.py', flags(resume))] * 4
    commands += [('assets/draw.py', [run, 'out', '--out=out.png'])]
    if stage == 'reward':
        commands += [('ppo.py', flags(COMMANDS['ppo.py']))] * 2
        return commands
    commands += [('sample.py', flags(SAMPLE, out_dir=run)),
                 ('data/pretrained.py', flags(init_from=run, out='exported')),
                 ('sft.py', flags(COMMANDS['sft.py'], init_from=run)),
                 ('train.py', flags(COMMANDS['train.py'], init_from=run, n_layer=2))]
    if stage == 'sft':
        commands += [('reward.py', flags(COMMANDS['reward.py'])),
                     ('ppo.py', flags(COMMANDS['ppo.py']))]
    return commands


def folder_input(rng, folder):
    """A Hugging Face folder."""
    name = rng.choice(['config.json', 'config.json', 'model.safetensors', 'model.safetensors',
                       'generation_config.json', 'tokenizer_config.json', 'index'])
    path = os.path.join(folder, 'hf', name)
    if name == 'index':
        os.rename(os.path.join(folder, 'hf', 'model.safetensors'),
                  os.path.join(folder, 'hf', 'model-1.safetensors'))
        index = {'weight_map': dict.fromkeys(['a', 'b'], 'model-1.safetensors')}
        text = mutate_json(rng, json.dumps(index).encode())
        with open(os.path.join(folder, 'hf', 'model.safetensors.index.json'), 'wb') as f:
            f.write(text)
    elif name == 'model.safetensors':
        rewrite(path, lambda data: mutate_safetensors(rng, data))
    else:
        rewrite(path, lambda data: mutate_json(rng, data))
    return rng.choice([
        ('sample.py', flags(SAMPLE, init_from='hf')),
        ('sample.py', flags(SAMPLE, init_from='hf', stream=True, temperature=0)),
        ('train.py', flags(COMMANDS['train.py'], init_from='hf')),
        ('sft.py', flags(COMMANDS['sft.py'], init_from='hf')),
        ('data/pretrained.py', flags(init_from='hf', out='exported'))])


def mutate_safetensors(rng, data):
    """Mutate the header, which is JSON behind its length, or any byte."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], 'little')
    header = mutate_json(rng, data[8:8 + size])
    return len(header).to_bytes(8, 'little') + header + data[8 + size:]


def log_input(rng, folder):
    """What else a resumed run, or draw.py, finds in a folder."""
    stage = rng.choice([*RUNS])
    run = RUNS[stage]
    path = os.path.join(folder, run, 'log.jsonl')
    with open(path, 'rb') as f:
        lines = f.read().splitlines()
    for i in rng.sample(range(len(lines)), k=min(3, len(lines))):
        lines[i] = mutate_json(rng, lines[i])
    with open(path, 'wb') as f:
        f.write(b'\n'.join(lines))
    for name in ('ckpt_best.pt', 'tokenizer.json', 'curves.png', 'run.pid'):
        file = os.path.join(folder, run, name)
        if os.path.exists(file) and rng.random() < 0.3:
            rewrite(file, lambda data: mutate_bytes(rng, data))
    return rng.choice(consumers_of(stage, run)[:5])


# How often each kind is drawn.
KINDS = {settings_input: 3, config_input: 2, jsonl_input: 3, tokenizer_input: 3, meta_input: 1,
         bin_input: 1, checkpoint_input: 6, folder_input: 3, log_input: 1}


# -----------------------------------------------------------------------------
# All inputs

def run_input(number, seed, valid, folder):
    """Make input number `number` in a new folder from the valid ones, and run it. Returns (kind,
    command, result of run_forked, faults)."""
    rng = random.Random(f'{seed} {number}')
    make_input = rng.choices([*KINDS], weights=KINDS.values())[0]
    shutil.copytree(valid, folder)
    script, args = make_input(rng, folder)
    result = run_forked(script, args, folder, draws=make_input is log_input)
    if os.path.exists(os.path.join(folder, 'executed')):
        result.forbidden.append('foreign code was run')
    is_command_line = make_input in (settings_input, config_input)
    faults = faults_of(result, is_command_line)
    return make_input.__name__.removesuffix('_input'), [script, *args], result, faults


def import_everything():
    """What the scripts import, so that a fork finds it imported. No gradient is computed here,
    because autograd does not survive a fork."""
    import huggingface_hub
    import matplotlib.pyplot
    import safetensors.torch
    import tokenizers
    import torch._dynamo

    import data.examples
    import data.pretrained
    import ppo
    import reward
    import sample
    import sft
    import train


def fuzz(numbers, seed, keep=False):
    """Run the inputs with these numbers, and print what is wrong with them. Returns how many have
    faults. keep=True: keep the folder of each, and print its output."""
    import_everything()
    n_faulty = 0
    with contextlib.ExitStack() as stack:
        top = os.path.realpath(stack.enter_context(tempfile.TemporaryDirectory()))
        valid = os.path.join(top, 'valid')
        make_valid_inputs(valid)
        began = time.perf_counter()
        seconds = []
        most_bytes = 0
        statuses = {}
        for i, number in enumerate(numbers, start=1):
            folder = os.path.join(tempfile.mkdtemp() if keep else top, str(number))
            kind, command, result, faults = run_input(number, seed, valid, folder)
            seconds.append(result.seconds)
            most_bytes = max(most_bytes, result.bytes)
            counts = statuses.setdefault(kind, {})
            counts[result.status] = counts.get(result.status, 0) + 1
            if keep:
                print(folder, command, f'status {result.status}', result.stdout, result.stderr,
                      sep='\n')
            else:
                shutil.rmtree(folder, ignore_errors=True)
            if i % 200 == 0:
                print(f'{i:,} inputs', flush=True)
            if faults:
                n_faulty += 1
                print(number, kind, faults, command, result.stderr[-600:], sep='\n    ', flush=True)
        elapsed = time.perf_counter() - began
        print(f'{len(seconds):,} inputs, {n_faulty} with faults; {elapsed:.0f} s, '
              f'{sum(seconds) / len(seconds):.3f} s of CPU time per input, at most '
              f'{max(seconds):.1f} s; at most {most_bytes / 2 ** 20:.0f} MB of memory, Python with '
              'torch included')
        for kind, counts in sorted(statuses.items()):
            print(f'    {kind:12}', counts)
    return n_faulty


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--count', type=int, default=3200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', type=int)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.count)
    if options.only is not None:
        numbers = [options.only]
    sys.exit(1 if fuzz(numbers, options.seed, keep=options.only is not None) else 0)
