"""
Datasets on disk, written and read in one place. Tokens: train.bin and val.bin, beside the tokenizer.json that made
them and a meta.json that says what they hold. Examples for post-training: JSON Lines, a checked object a line.
"""
import codecs, fcntl, glob, hashlib, importlib.util, json, math, os, subprocess, sys
from contextlib import ExitStack
from urllib.request import urlopen
import numpy as np
import torch
from bpe import NAMED, SPECIAL, Tokenizer, check_texts, get_tokenizer, render_chat
from configurator import replacing, rng

HERE = os.path.dirname(os.path.abspath(__file__))

def download(url, sha256=''):
    """The bytes behind a public address. OSError, naming it and the way out, where it cannot be reached;
    ValueError where what is there is not what it was."""
    try:
        data = urlopen(url, timeout=60).read()
    except OSError as error:
        raise OSError(f'{url} could not be downloaded ({error}); give a local copy by --input=FILE') from error
    got = hashlib.sha256(data).hexdigest()
    if sha256 not in ('', got):
        raise ValueError(f'{url} is not what it was: its sha256 is {got}, expected {sha256}')
    return data

def write_dataset(folder, tokenizer, train, val, **about):
    """
    Encode two iterables of documents, each followed by <|endoftext|> if the tokenizer has it, to train.bin
    and val.bin, beside tokenizer.json and, last, meta.json with the counts and **about: the settings, by which
    it can be prepared again. A running job keeps the old files it has open. Bytes are counted of the text in
    UTF-8: <|endoftext|> has none.
    """
    os.makedirs(folder, exist_ok=True)
    dtype = np.dtype('<u2' if tokenizer.vocab_size <= 65536 else '<u4')
    end = [tokenizer.special[name] for name in SPECIAL[:1] if name in tokenizer.special]
    meta = {'tokenizer': {'name': tokenizer.name, 'fingerprint': tokenizer.fingerprint,
                          'vocab_size': tokenizer.vocab_size}, 'dtype': dtype.name}
    with ExitStack() as stack:  # neither file gets its name before both are whole
        for split, documents in (('train', train), ('val', val)):
            file = stack.enter_context(replacing(os.path.join(folder, f'{split}.bin')))
            n_tokens = n_bytes = 0
            for document in documents:
                ids = tokenizer.encode(document) + end
                file.write(np.array(ids, dtype).tobytes())
                n_tokens, n_bytes = n_tokens + len(ids), n_bytes + len(document.encode())
            if not n_bytes:
                raise ValueError(f'{folder}: there is no text for {split}.bin')
            meta |= {f'{split}_tokens': n_tokens, f'{split}_bytes': n_bytes}
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    with replacing(os.path.join(folder, 'meta.json')) as file:
        file.write(json.dumps(meta | about, indent=1).encode())
    print(folder, *(f'{key} {meta[key]:,}' for key in meta if key.endswith(('tokens', 'bytes'))), flush=True)

def prepare_unless(ready, dataset, settings=dict):
    """Run data/<dataset>/prepare.py, if there is one, with the settings() for it, unless ready() says that it need not
    be. One process prepares; other ranks and runs wait for it."""
    script = os.path.join(HERE, dataset, 'prepare.py')
    if not os.path.exists(script):
        return
    with open(script, 'rb') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # files that are there may still be written to
        if not ready():
            asked = [f'--{key}={value}' for key, value in settings().items()]
            print(f'preparing data/{dataset}', *asked, flush=True)
            if subprocess.run([sys.executable, script, *asked]).returncode:
                raise ValueError(f'data/{dataset} could not be prepared, for the reason above')

def load_dataset(dataset, block_size, tokenizer='', vocab_size=0):
    """
    (train tokens, val tokens, meta, Tokenizer) of data/<dataset>, the tokens as memory maps. It is prepared first
    if it is not there, or if it holds other tokens than the name and size of a tokenizer ask for ('' and 0 ask
    for nothing; a tokenizer.json that is named must be the same as then). It is prepared again by the settings that
    it was prepared by. ValueError, naming file and field, where its files disagree or are shorter than a block.
    """
    folder = os.path.join(HERE, dataset)
    script, meta_file = os.path.join(folder, 'prepare.py'), os.path.join(folder, 'meta.json')
    asked = {key: value for key, value in (('tokenizer', tokenizer), ('vocab_size', vocab_size)) if value}
    wanted = {'name' if key == 'tokenizer' else key: value for key, value in asked.items()}
    if tokenizer and tokenizer not in NAMED:
        wanted['fingerprint'] = get_tokenizer(tokenizer).fingerprint

    def read_meta():
        """(meta.json, whether it is there and of the tokenizer wanted)."""
        if not os.path.exists(meta_file):
            return {}, False
        with open(meta_file, encoding='utf-8') as file:
            try:
                meta = json.load(file)
                return meta, wanted.items() <= meta['tokenizer'].items()
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f'{meta_file} is damaged ({error!r}); prepare the dataset again') from error

    prepare_unless(lambda: read_meta()[1], dataset, lambda: {**read_meta()[0].get('settings', {}), **asked})
    meta, ready = read_meta()
    if not meta:
        there = sorted(name for name in os.listdir(HERE) if os.path.exists(os.path.join(HERE, name, 'prepare.py')))
        raise ValueError(f'{folder}: no such dataset; there are {", ".join(there)}, and data/text takes any files')
    if not ready:
        has = {key: meta['tokenizer'].get(key) for key in wanted}
        raise ValueError(f'{meta_file}: the tokenizer has {has}, and {wanted} was asked for')
    tokens = []
    for split in ('train', 'val'):
        path = os.path.join(folder, f'{split}.bin')
        count, rest = divmod(os.path.getsize(path), np.dtype(meta['dtype']).itemsize)
        if rest or count != meta[f'{split}_tokens']:
            raise ValueError(f"{path} holds {count:,} tokens of {meta['dtype']}, but meta.json says {split}_tokens "
                             f"{meta[f'{split}_tokens']:,}; run {script} again")
        if count <= block_size:
            raise ValueError(f'{path} holds {count:,} tokens, but block_size {block_size} needs {block_size + 1:,}: '
                             'give more text, or lower block_size')
        tokens.append(np.memmap(path, meta['dtype'], mode='r'))
    tok = Tokenizer.load(os.path.join(folder, 'tokenizer.json'))
    if tok.fingerprint != meta['tokenizer']['fingerprint']:
        raise ValueError(f'{folder}: tokenizer.json is not the one whose fingerprint meta.json has; run {script} again')
    return *tokens, meta, tok

def load_examples(dataset, split, kind, default=None):
    """The examples, see read_jsonl, of data/<dataset>/<split>.jsonl. A data set of which no file is there is prepared first;
    one that is there stays as it is, for it may be of somebody's own. Where there is no such file, the default, or a
    ValueError if none is given."""
    path, script, files = (os.path.join(HERE, dataset, name) for name in (f'{split}.jsonl', 'prepare.py', '*.jsonl'))
    if default is None:
        prepare_unless(lambda: glob.glob(files), dataset)
    elif not os.path.exists(path):
        return default
    if not os.path.exists(path):
        raise ValueError(f'{path}: no such file' + f'; {script} did not make it, or was stopped before' * os.path.exists(script))
    return read_jsonl(path, kind)

def endless_order(n, first, count, *seed):
    """`count` indices from position `first` on of an endless sequence of permutations of 0..n-1, one after another: a
    pure function of the seed, so that a resumed run goes on where it stopped."""
    indices = []
    for epoch in range(first // n, (first + count - 1) // n + 1):
        order = torch.randperm(n, generator=rng(*seed, epoch))
        indices += order[max(0, first - epoch * n):first + count - epoch * n].tolist()
    return indices

def grouped_order(n, step, count, groups, *seed):
    """The `count` indices of a step, of examples that are numbered by length: those of `groups` steps are drawn together,
    as endless_order has them, and dealt in the order of length. So a step's are alike, and padded little."""
    drawn = endless_order(n, step // groups * groups * count, groups * count, *seed)
    return sorted(drawn)[step % groups * count:][:count]

def load_gold(dataset):
    """The function gold(prompt, response) -> (exact, graded) of data/<dataset>/prepare.py; None if it has none."""
    script = os.path.join(HERE, dataset, 'prepare.py')
    if not os.path.exists(script):
        return None
    spec = importlib.util.spec_from_file_location(f'prepare_{os.path.basename(dataset)}', script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, 'gold', None)

def read_jsonl(path, kind):
    """
    The examples of a JSON Lines file, each with all its keys. kind 'sft': prompt and response, or Alpaca's
    instruction, input and output, or messages; each gets messages. 'preference': prompt, chosen, rejected,
    perhaps a margin. 'prompt': prompt. If any line is bad, a ValueError counts all and shows the first five.
    """
    needed = {'sft': (), 'preference': ('prompt', 'chosen', 'rejected'), 'prompt': ('prompt',)}[kind]
    rows, bad, byte = [], [], Tokenizer.byte()
    with open(path, 'rb') as file:
        lines = enumerate(file.read().removeprefix(codecs.BOM_UTF8).splitlines(), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            row = json.loads(line.decode())
            check_texts(row, *needed)
            if not math.isfinite(row.get('margin', 0)):
                raise ValueError(f"margin {row['margin']} is not a number")
            if kind == 'sft' and 'messages' not in row:
                keys = ('instruction', 'output') if 'instruction' in row else ('prompt', 'response')
                prompt, response, more = check_texts({'input': ''} | row, *keys, 'input')
                row['messages'] = [{'role': 'user', 'content': f'{prompt}\n\n{more}' if more else prompt},
                                   {'role': 'assistant', 'content': response}]
            if kind == 'sft' and not render_chat(row['messages'], byte)[1][-1]:
                raise ValueError('the last message must be of the assistant')
            rows.append(row)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            bad.append(f'{path}:{number}: {error}')
    if bad or not rows:
        raise ValueError(f'{len(bad)} bad lines: {"; ".join(bad[:5])}' if bad else f'{path}: no examples')
    return rows
