"""
A dataset of your own text: files, or folders that are searched for files, all of it in UTF-8.

    python data/text/prepare.py --input=notes.txt
    python data/text/prepare.py --input=letters,diary.md --tokenizer=bpe --out=data/mine

Each file is one document. With at least 20 files, every tenth file is held out; with fewer files,
which may differ in size, the last tenth of the joined text.

The text is kept as it is, line ends included: a CRLF (of Windows) stays two characters, so convert
your files first if you want LF only. Only a byte-order mark at the start of a file is ignored. The
files are read in pieces, so they may be larger than the memory.
"""
import codecs
import os
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from configurator import configure
from data.dataset import write_dataset

# -----------------------------------------------------------------------------
input = ''          # files and folders, separated by commas
ext = '.txt,.md'    # a folder's files with these suffixes are used, in upper or lower case
tokenizer = 'byte'  # 'byte', 'bpe' (trained on the training part), 'gpt2', or a tokenizer.json
vocab_size = 0      # of a trained tokenizer; 0 = its default
bpe_chars = 20_000_000  # 'bpe' is trained on at most this many characters of the training part
out = ''            # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------

READ_SIZE = 2**20  # bytes that are read at a time

# ----- Files


def find_files(input, ext):
    """
    The files that `input` names, each once, in a fixed order: the same files give the same dataset.

    A folder is searched for files with one of the suffixes; hidden files and folders are skipped.
    """
    if not input:
        raise ValueError('give your text by --input=FILE, --input=FOLDER, '
                         'or several of them, separated by commas')
    names = input.split(',')
    if os.path.exists(input):
        names = [input]  # a file with a comma in its name
    files = []
    for name in names:
        # A file that is named is used whatever its suffix.
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f'{path}: no such file or folder')
        if path.is_dir():
            files += search_folder(path, ext)
        else:
            files.append(path)
    if not files:
        raise ValueError(f'{input}: no file has the suffix {ext}; name other suffixes by --ext')
    # A dict keeps the order and removes files that are named twice.
    return list(dict.fromkeys(files))


def search_folder(folder, ext):
    """The files in a folder with one of the suffixes, sorted."""
    suffixes = tuple(ext.lower().split(','))
    files = []
    for path in sorted(folder.rglob('*')):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith('.') for part in parts)
        if path.is_file() and path.name.lower().endswith(suffixes) and not is_hidden:
            files.append(path)
    return files


# ----- Text, in pieces. A document is a part of a file: (path, start, end), in characters.


def read_pieces(path):
    """Yield the text of a file in pieces. ValueError, with the position, if it is not UTF-8."""
    decoder = codecs.getincrementaldecoder('utf-8')()
    at_start = True
    n_read = 0
    with open(path, 'rb') as file:
        while True:
            data = file.read(READ_SIZE)
            n_read += len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object: the end of the last piece that was not decoded yet, and this piece
                position = n_read - len(error.object) + error.start
                byte = error.object[error.start]
                message = f'{path}: not UTF-8 at byte {position} (0x{byte:02x})'
                raise ValueError(message) from error
            # A piece may end within a character, so the first text may be empty.
            if at_start and text:
                text = text.removeprefix('\ufeff')
                at_start = False
            yield text
            if not data:
                return


def read_document(path, start, end):
    """Yield the characters from start to end of a file, in pieces."""
    # position: of the first character of this piece in the file
    position = 0
    for text in read_pieces(path):
        first = max(0, start - position)
        last = max(0, end - position)
        yield text[first:last]
        position += len(text)
        if position >= end:
            return


def hold_out(files):
    """
    (train, val, how): the documents of both splits, and how they were split.

    files: [(path, number of characters)], none of them empty.
    """
    train = []
    val = []
    if len(files) >= 20:
        for i, (path, size) in enumerate(files):
            document = (path, 0, size)
            if i % 10 == 9:
                val.append(document)
            else:
                train.append(document)
        return train, val, 'every tenth file'

    # The number of characters that are still to be put into train.
    remaining = sum(size for _, size in files) * 9 // 10
    for path, size in files:
        n_train = min(size, remaining)
        if n_train > 0:
            train.append((path, 0, n_train))
        if n_train < size:
            val.append((path, n_train, size))
        remaining -= n_train
    return train, val, 'the last tenth'


def join_documents(documents, max_chars):
    """The text of the documents, with a line break between them; only the first max_chars."""
    texts = []
    n_chars = 0
    for document in documents:
        pieces = []
        for piece in read_document(*document):
            pieces.append(piece[:max_chars - n_chars])
            n_chars += len(pieces[-1])
            if n_chars >= max_chars:
                break
        texts.append(''.join(pieces))
        if n_chars >= max_chars:
            print(f'the tokenizer is trained on the first {n_chars:,} characters')
            break
    return '\n'.join(texts)


if __name__ == '__main__':
    settings, _ = configure(globals())

    # 1. The files, and how many characters each has. This also checks that all of it is UTF-8.
    paths = find_files(input, ext)
    files = []
    print(f'reading {sum(path.stat().st_size for path in paths):,} bytes', flush=True)
    for path in paths:
        size = sum(len(text) for text in read_pieces(path))
        if size > 0:
            files.append((path, size))
    total = sum(size for _, size in files)
    if total < 100:
        raise ValueError(f'{input}: {total} characters in {len(paths)} files; '
                         'at least 100 are needed')

    # 2. The splits.
    train, val, how = hold_out(files)
    print(f'{len(paths)} files, {len(files)} of them not empty; held out: {how}')

    # 3. The tokenizer; only 'bpe' needs a text to be trained on.
    text = None
    if tokenizer == 'bpe':
        text = join_documents(train, bpe_chars)
    tok = get_tokenizer(tokenizer, text, vocab_size)

    # 4. The tokens. The documents are read again while they are encoded.
    train_texts = (read_document(*document) for document in train)
    val_texts = (read_document(*document) for document in val)
    write_dataset(out or here, tok, train_texts, val_texts, split=how, settings=settings)
