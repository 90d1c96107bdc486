"""
A dataset of your own text: files, or folders that are searched for files, all of it UTF-8.

    python data/text/prepare.py --input=notes.txt
    python data/text/prepare.py --input=letters,diary.md --tokenizer=bpe --out=data/mine

Each file is one document. From 20 files on, every tenth is held out whole; of fewer files, which
may differ much in size, the last tenth of the joined text is.
"""
import os, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from data.dataset import write_dataset
from configurator import configure

# -----------------------------------------------------------------------------
input = ''          # files and folders, separated by commas
ext = '.txt,.md'    # the files that are taken from a folder, by the end of their name
tokenizer = 'byte'  # 'byte', 'bpe' (trained on the training part), 'gpt2', or the path of a tokenizer.json
vocab_size = 0      # of a trained tokenizer; 0 = its default
out = ''            # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

def find_files(input, ext):
    """The files that `input` names: a file as it is, a folder searched for names that end in `ext`,
    hidden ones left out. In a fixed order, so that the same files give the same dataset."""
    if not input:
        raise ValueError('give your text by --input=FILE, --input=FOLDER, or several of them, separated by commas')
    found = []
    for path in map(Path, [input] if os.path.exists(input) else input.split(',')):
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file or folder')
        inside = (p for p in path.rglob('*') if p.is_file() and p.name.endswith(tuple(ext.split(','))))
        found += sorted(p for p in inside if not any(part.startswith('.') for part in p.relative_to(path).parts)
                        ) if path.is_dir() else [path]
    if not found:
        raise ValueError(f'{input}: no file there ends in {ext}; name other endings by --ext')
    return list(dict.fromkeys(found))  # a file named twice is taken once

def read_text(path):
    try:
        return path.read_bytes().decode('utf-8')  # not read_text, which changes line ends
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at byte {error.start} (0x{error.object[error.start]:02x})') from error

def hold_out(documents):
    """(train, val, how it was split)."""
    if len(documents) >= 20:
        train = [text for i, text in enumerate(documents) if i % 10 != 9]
        return train, documents[9::10], 'every tenth file'
    cut = sum(map(len, documents)) * 9 // 10
    for i, text in enumerate(documents):
        if cut < len(text):  # the cut falls into this one
            return documents[:i] + [text[:cut]] * (cut > 0), [text[cut:]] + documents[i + 1:], 'the last tenth'
        cut -= len(text)

if __name__ == '__main__':
    settings = configure(globals())
    files = find_files(input, ext)
    documents = [text for text in map(read_text, files) if text]
    size = sum(map(len, documents))
    if size < 100:
        raise ValueError(f'{input}: {size} characters in {len(files)} files; at least 100 are needed')
    train, val, how = hold_out(documents)
    print(f'{len(files)} files, {len(documents)} of them not empty; held out: {how}')
    write_dataset(out or here, get_tokenizer(tokenizer, '\n'.join(train), vocab_size), train, val, split=how, settings=settings)
