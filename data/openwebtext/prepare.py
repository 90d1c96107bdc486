"""
OpenWebText, the open copy of GPT-2's training data: 8 million web pages, 9 billion tokens; or any
other dataset of the Hugging Face hub that has a column of text. Needs `pip install datasets` and,
for OpenWebText, about 75 GB of disk.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --name=HuggingFaceFW/fineweb-edu --subset=sample-10BT
    python data/openwebtext/prepare.py --input=FOLDER    # local .parquet or .jsonl files

About one document in two thousand is held out, chosen by a hash of its number. So with any
`max_documents` the same documents are held out.
"""
import hashlib
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from configurator import configure
from data.dataset import write_dataset

# -----------------------------------------------------------------------------
name = 'Skylion007/openwebtext'  # of the dataset on the hub
subset = ''          # the name of a part of it; '' = its default
input = ''           # a folder of local files instead
column = 'text'      # the column with the text
max_documents = 0    # use only the first documents, up to this number; 0 = all
val_share = 0.0005   # share of the documents that is held out
tokenizer = 'gpt2'   # 'byte', 'gpt2', or the path of a tokenizer.json
out = ''             # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------


def load(name, subset, input):
    """The documents as a datasets.Dataset: memory-mapped from disk, so that any size fits."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        message = 'data/openwebtext needs the package datasets: pip install datasets'
        raise ImportError(message) from error

    # Case 1: a dataset of the hub.
    if not input:
        try:
            return load_dataset(name, subset or None, split='train')
        except (OSError, RuntimeError) as error:
            raise OSError(f'{name} could not be downloaded from the Hugging Face hub ({error}); '
                          'give a folder of local files by --input=FOLDER') from error

    # Case 2: local files, of one of two kinds.
    for ending, kind in (('.parquet', 'parquet'), ('.jsonl', 'json')):
        files = sorted(str(path) for path in Path(input).rglob('*' + ending))
        if files:
            return load_dataset(kind, data_files=files, split='train')
    raise ValueError(f'{input}: there are no .parquet or .jsonl files')


def is_held_out(index, share):
    """Whether the hash of a document's number, as a fraction from 0 to 1, is below share."""
    digest = hashlib.sha256(b'%d' % index).digest()
    return int.from_bytes(digest[:8], 'big') < share * 2**64


if __name__ == '__main__':
    settings, _ = configure(globals())
    documents = load(name, subset, input)
    if column not in documents.column_names:
        columns = ', '.join(documents.column_names)
        raise ValueError(f'there is no column {column!r}; the columns are: {columns}')

    count = min(max_documents or len(documents), len(documents))
    held_out = [i for i in range(count) if is_held_out(i, val_share)]
    if not held_out:
        # at least one document
        held_out = [count - 1]
    print(f'{count:,} documents, {len(held_out):,} of them held out')

    # Generators: the documents are read one at a time while they are encoded.
    excluded = set(held_out)
    rows = enumerate(documents.select(range(count)))
    train = (row[column] for i, row in rows if i not in excluded)
    val = (documents[i][column] for i in held_out)
    tok = get_tokenizer(tokenizer)
    write_dataset(out or here, tok, train, val, source=input or name, settings=settings)
