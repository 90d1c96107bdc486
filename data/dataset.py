"""
Tokens on disk: written, read, validated, and prepared if they are missing.

A dataset is a folder with four files (data/README.md describes them in detail):

    train.bin, val.bin    token ids, one after another, as little-endian uint16 or uint32
    tokenizer.json        the tokenizer that made these ids
    meta.json             the tokenizer's name and fingerprint, the dtype, the number of tokens

The datasets of this project are the folders of data/. Each contains the script prepare.py, which
makes its files. Code is run only from these folders, and only if a dataset is selected by its plain
name: nothing is run from a folder that is given by a path.
"""
import hashlib
import json
import os
import subprocess
import sys
import time
import unicodedata
from contextlib import ExitStack
from urllib.request import urlopen

import numpy as np
from filelock import FileLock

from bpe import END_OF_TEXT_NAMES, NAMED_TOKENIZERS, REPORT_SECONDS, Tokenizer, get_tokenizer
from configurator import errors_name_setting, printable, write_atomically

DATA_FOLDER = os.path.dirname(os.path.abspath(__file__))

# Text is encoded in pieces of at most this many characters, so that its size does not matter.
MAX_PIECE = 1_000_000

# ----- Download and write


def download(url, sha256=''):
    """
    Return the bytes behind a public address.

    OSError if it cannot be reached; the message names the address, and --input=FILE instead.
    ValueError if the content does not have the expected sha256 ('' = any content).
    """
    print(f'downloading {url}', flush=True)
    try:
        data = urlopen(url, timeout=60).read()
    except OSError as error:
        message = f'{url} could not be downloaded ({error}); give a local copy by --input=FILE'
        raise OSError(message) from error
    actual = hashlib.sha256(data).hexdigest()
    if sha256 and actual != sha256:
        raise ValueError(f'{url} has changed: its sha256 is {actual}, expected {sha256}')
    return data


def find_cut(text):
    """
    The last position where a text can be cut without changing its token ids.

    Every word pattern of ours ends a word after a run of letters or digits, and none looks back.
    So a text can be cut after a letter or digit that is followed by white space or punctuation:
    the two parts, encoded separately, give the ids of the whole. Unicode normalisation (NFC) does
    not join such characters either. If there is no such position, the text is cut at its end, where
    the ids may differ from those of the whole.

    >>> find_cut('Hello, wor')    # before the comma; whether "wor" is a whole word is not known yet
    5
    """
    # from the end backwards: usually only a few steps
    for i in range(len(text) - 1, 0, -1):
        following = text[i]
        is_end_of_word = following.isspace() or unicodedata.category(following).startswith('P')
        if is_end_of_word and text[i - 1].isalnum():
            return i
    return len(text)


def split_document(document):
    """
    Yield the text of a document in pieces of at most MAX_PIECE characters, each ending at find_cut.

    document: a text, or an iterable of texts that are its parts, in order.
    """
    parts = document
    if isinstance(document, str):
        parts = [document]
    # waiting: what follows the last cut
    waiting = ''
    for part in parts:
        # A part may be long itself. It is added step by step, so that `waiting` stays short.
        for start in range(0, len(part), MAX_PIECE):
            waiting += part[start:start + MAX_PIECE]
            while len(waiting) > MAX_PIECE:
                cut = find_cut(waiting[:MAX_PIECE])
                yield waiting[:cut]
                waiting = waiting[cut:]
    yield waiting


def write_tokens(file, tokenizer, documents, dtype):
    """
    Write the ids of the documents to a binary file, each document followed by the end of document.

    Returns (number of tokens, number of bytes of the text in UTF-8). The end of a document counts
    as a token; it has no bytes.
    """
    end = tokenizer.end_of_text
    n_tokens = 0
    n_bytes = 0
    last_report = time.monotonic()
    for document in documents:
        for piece in split_document(document):
            ids = np.array(tokenizer.encode(piece), dtype)
            file.write(ids.tobytes())
            n_tokens += len(ids)
            n_bytes += len(piece.encode())
            if time.monotonic() - last_report > REPORT_SECONDS:
                print(f'  {n_bytes:,} bytes', flush=True)
                last_report = time.monotonic()
        if end is not None:
            file.write(np.array([end], dtype).tobytes())
            n_tokens += 1
    return n_tokens, n_bytes


def write_dataset(folder, tokenizer, train, val, **about):
    """
    Encode two iterables of documents; write train.bin, val.bin, tokenizer.json and meta.json.

    A document is a text or, if it is too large for memory, an iterable of texts: its parts, in
    order. Each document is followed by the tokenizer's end of document. `about` is stored in
    meta.json; its entry `settings` makes it possible to prepare the dataset again in the same way.

    The old files stay in place until the new ones are complete, and a running job keeps the old
    files that it has open. ValueError if a split contains no text.
    """
    with errors_name_setting('out', folder):
        os.makedirs(folder, exist_ok=True)
    # Two bytes per token as long as every id fits into them.
    dtype = np.dtype('<u2')
    if tokenizer.vocab_size > 65536:
        dtype = np.dtype('<u4')
    meta = {
        'tokenizer': {
            'name': tokenizer.name,
            'fingerprint': tokenizer.fingerprint,
            'vocab_size': tokenizer.vocab_size,
        },
        'dtype': dtype.name,
    }
    if tokenizer.end_of_text is None:
        names = ', '.join(END_OF_TEXT_NAMES)
        print(f'the tokenizer has none of {names}: documents are not separated', flush=True)

    # 1. The token files. ExitStack gives both their names only after both are complete.
    with ExitStack() as stack:
        stack.enter_context(errors_name_setting('out', folder))
        for split, documents in (('train', train), ('val', val)):
            path = os.path.join(folder, f'{split}.bin')
            print(printable(f'encoding {path}'), flush=True)
            file = stack.enter_context(write_atomically(path))
            n_tokens, n_bytes = write_tokens(file, tokenizer, documents, dtype)
            if n_bytes == 0:
                raise ValueError(f'{folder}: there is no text for {split}.bin')
            meta[f'{split}_tokens'] = n_tokens
            meta[f'{split}_bytes'] = n_bytes

    # 2. The tokenizer. 3. meta.json comes last: if it exists, the other files are complete.
    tokenizer.save(os.path.join(folder, 'tokenizer.json'))
    meta.update(about)
    with write_atomically(os.path.join(folder, 'meta.json')) as file:
        file.write(json.dumps(meta, indent=1).encode())

    counts = [f'{key} {meta[key]:,}' for key in meta if key.endswith(('tokens', 'bytes'))]
    print(printable(f'{folder} {" ".join(counts)}'), flush=True)


# ----- Prepare if missing


def is_project_dataset(dataset):
    """
    Whether a dataset is named by a plain folder name of data/, and not by a path.

    >>> is_project_dataset('wordplay')
    True
    >>> is_project_dataset('../out/wordplay')
    False
    """
    if dataset in ('', '.', '..'):
        return False
    return not any(character in dataset for character in '/\\:')


def dataset_folder(dataset):
    """The folder of a dataset: data/<name> for a plain name, otherwise the path itself."""
    if dataset == '':
        raise ValueError('dataset must be the name of a folder of data/, or the path of a folder')
    if is_project_dataset(dataset):
        return os.path.join(DATA_FOLDER, dataset)
    return os.path.expanduser(dataset)


def project_datasets():
    """The names of the folders of data/ that contain a prepare.py, sorted."""
    names = []
    for name in sorted(os.listdir(DATA_FOLDER)):
        if os.path.exists(os.path.join(DATA_FOLDER, name, 'prepare.py')):
            names.append(name)
    return names


def prepare_if_missing(dataset, is_ready, settings=None):
    """
    Run data/<dataset>/prepare.py with these settings, unless is_ready() returns True.

    Nothing happens if the dataset is given by a path, or has no prepare.py. Only one process
    prepares a dataset; all others wait until it has finished. ValueError if the script fails.
    """
    folder = dataset_folder(dataset)
    script = os.path.join(folder, 'prepare.py')
    if not is_project_dataset(dataset) or not os.path.exists(script):
        return
    if not os.access(folder, os.W_OK):
        # A read-only folder: this process cannot prepare it, and no other is preparing it.
        return
    with FileLock(os.path.join(folder, 'prepare.lock')):
        # Only now, because before another process may have been writing the files.
        if is_ready():
            return
        arguments = [f'--{key}={value}' for key, value in (settings or {}).items()]
        print(printable(f'preparing data/{dataset} {" ".join(arguments)}'), flush=True)
        result = subprocess.run([sys.executable, script, *arguments])
        if result.returncode != 0:
            raise ValueError(f'data/{dataset} could not be prepared, for the reason above')


# ----- Read and validate


def is_count(value):
    # bool is a subclass of int, so isinstance would accept true
    return type(value) is int and 0 < value < 2**63


def is_text(value):
    return isinstance(value, str)


def is_setting(value):
    return isinstance(value, (str, int, float))


def check_meta(meta, path):
    """ValueError, naming file and field, unless meta.json has all that write_dataset writes."""
    if not isinstance(meta, dict):
        raise ValueError(f'{path} is damaged: it must contain a JSON object; '
                         'prepare the dataset again')

    # 1. The fields of the file, and of its object `tokenizer`.
    fields = {
        'train_tokens': (is_count, 'a whole number, at least 1'),
        'val_tokens': (is_count, 'a whole number, at least 1'),
        'train_bytes': (is_count, 'a whole number, at least 1'),
        'val_bytes': (is_count, 'a whole number, at least 1'),
    }
    tokenizer_fields = {
        'name': (is_text, 'text'),
        'fingerprint': (is_text, 'text'),
        'vocab_size': (is_count, 'a whole number, at least 1'),
    }
    check_fields(meta, fields, path, '')
    if not isinstance(meta.get('tokenizer'), dict):
        raise ValueError(f'{path}: tokenizer must be an object; prepare the dataset again')
    check_fields(meta['tokenizer'], tokenizer_fields, path, 'tokenizer.')

    # 2. The dtype. Others would read wrong ids, or even interpret the file as pointers.
    if meta.get('dtype') not in ('uint16', 'uint32'):
        raise ValueError(f"{path}: dtype must be 'uint16' or 'uint32'; got {meta.get('dtype')!r}")

    # 3. The settings of prepare.py, which may be missing.
    settings = meta.get('settings', {})
    if not isinstance(settings, dict):
        raise ValueError(f'{path}: settings must be an object; prepare the dataset again')
    for key, value in settings.items():
        if not is_setting(value):
            raise ValueError(f'{path}: settings.{key} must be text, a number or true or false; '
                             f'got {value!r}')


def check_fields(actual, fields, path, prefix):
    """ValueError unless each of the fields, {name: (test, what it must be)}, passes its test."""
    for name, (test, description) in fields.items():
        if name not in actual:
            raise ValueError(f'{path}: the field {prefix}{name} is missing; '
                             'prepare the dataset again')
        if not test(actual[name]):
            raise ValueError(f'{path}: {prefix}{name} must be {description}; got {actual[name]!r}')


def read_meta(folder):
    """The validated content of folder/meta.json; None if there is no such file."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged ({error}); prepare the dataset again') from error
    check_meta(meta, path)
    return meta


def refuse_nanogpt_folder(dataset):
    """
    ValueError if the folder contains nanoGPT's token files, without meta.json and tokenizer.json.

    Without this check, preparing the dataset would replace them. meta.pkl is never read: loading a
    pickle can run any code.
    """
    folder = dataset_folder(dataset)
    names = ('train.bin', 'val.bin', 'meta.json', 'tokenizer.json')
    exists = {name: os.path.exists(os.path.join(folder, name)) for name in names}
    has_tokens = exists['train.bin'] and exists['val.bin']
    if not has_tokens or exists['meta.json'] or exists['tokenizer.json']:
        return
    # How to make all four files: by the dataset's own script, or from the user's text.
    command = f'python data/text/prepare.py --input=TEXT --tokenizer=gpt2 --out={folder}'
    script = os.path.join(folder, 'prepare.py')
    if is_project_dataset(dataset) and os.path.exists(script):
        command = f'python {script}'
    raise ValueError(f'{folder} has train.bin and val.bin, as made by nanoGPT, but no meta.json '
                     'and no tokenizer.json, so the tokenizer of its tokens is not known (meta.pkl '
                     f'is never read). Make all four files from the text: {command}')


def has_fields(actual, wanted):
    """Whether the dict `actual` contains every key of `wanted`, with the same value."""
    return all(key in actual and actual[key] == wanted[key] for key in wanted)


def load_dataset(dataset, block_size, tokenizer='', vocab_size=0):
    """
    Load data/<dataset>: returns (train tokens, val tokens, meta, Tokenizer), tokens as memory maps.

    tokenizer, vocab_size: the name (or path) and the size of the tokenizer that the tokens must
    come from; '' and 0 accept any. A dataset of this project is prepared first if it is missing, or
    if its tokens come from another tokenizer. It is then prepared with the settings of the last
    time, except for these two.

    ValueError, which names the file and the field, if files are missing, disagree with each other,
    or contain less than one block of block_size + 1 tokens.
    """
    folder = dataset_folder(dataset)
    meta_path = os.path.join(folder, 'meta.json')

    # 1. What the caller asks for: as settings of prepare.py, and as fields of meta['tokenizer'].
    new_settings = {}
    wanted = {}
    if tokenizer:
        new_settings['tokenizer'] = tokenizer
    if tokenizer in NAMED_TOKENIZERS:
        wanted['name'] = tokenizer
    elif tokenizer:
        # Only the content of a file counts: its path may differ, and the file may have changed.
        wanted['fingerprint'] = get_tokenizer(tokenizer).fingerprint
    if vocab_size:
        new_settings['vocab_size'] = vocab_size
        wanted['vocab_size'] = vocab_size

    def is_ready():
        meta = read_meta(folder)
        return meta is not None and has_fields(meta['tokenizer'], wanted)

    # 2. Case: the files are nanoGPT's. They are not replaced.
    refuse_nanogpt_folder(dataset)

    # 3. Case: it is missing, or its tokens come from another tokenizer. Prepare it.
    settings = {}
    meta = read_meta(folder)
    if meta is not None:
        settings.update(meta.get('settings', {}))
    if tokenizer:
        # A saved size belongs to the saved tokenizer; another one has its own default.
        settings.pop('vocab_size', None)
    settings.update(new_settings)
    prepare_if_missing(dataset, is_ready, settings)

    # 4. Case: it is still missing.
    meta = read_meta(folder)
    if meta is None:
        names = ', '.join(project_datasets())
        raise ValueError(f'{folder}: no such dataset (there is no meta.json); choose one of '
                         f'{names}; data/text takes your own files')

    # 5. Case: it exists, but with another tokenizer.
    if not has_fields(meta['tokenizer'], wanted):
        actual = {key: meta['tokenizer'].get(key) for key in wanted}
        raise ValueError(f'{meta_path}: the tokenizer has {actual}, but {wanted} was requested')

    # 6. Case: it is ready. Check that the files agree with each other.
    train_tokens = load_tokens(folder, 'train', meta, block_size)
    val_tokens = load_tokens(folder, 'val', meta, block_size)
    tok = Tokenizer.load(os.path.join(folder, 'tokenizer.json'))
    if tok.fingerprint != meta['tokenizer']['fingerprint']:
        raise ValueError(f'{folder}: tokenizer.json does not have the fingerprint that meta.json '
                         'has; prepare the dataset again')
    if tok.vocab_size != meta['tokenizer']['vocab_size']:
        expected = meta['tokenizer']['vocab_size']
        raise ValueError(f'{folder}: tokenizer.json has {tok.vocab_size:,} tokens, but meta.json '
                         f'has tokenizer.vocab_size {expected:,}')
    return train_tokens, val_tokens, meta, tok


def load_tokens(folder, split, meta, block_size):
    """
    The ids of folder/<split>.bin as a memory map.

    ValueError if their number is not that of meta.json, or is below block_size + 1: a block and the
    token that follows it.
    """
    path = os.path.join(folder, f'{split}.bin')
    # The files are little-endian on every machine.
    dtype = np.dtype(meta['dtype']).newbyteorder('<')
    count, remaining_bytes = divmod(os.path.getsize(path), dtype.itemsize)
    expected = meta[f'{split}_tokens']
    if remaining_bytes or count != expected:
        raise ValueError(f"{path} holds {count:,} tokens of {meta['dtype']}, but meta.json has "
                         f'{split}_tokens {expected:,}; prepare the dataset again')
    if count <= block_size:
        raise ValueError(f'{path} holds {count:,} tokens, but block_size {block_size} needs '
                         f'{block_size + 1:,}: add text, or lower block_size')
    return np.memmap(path, dtype, mode='r')
