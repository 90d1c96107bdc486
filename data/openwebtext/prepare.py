"""
OpenWebText, the open copy of what GPT-2 was trained on: 8 million web pages, 9 billion tokens; or
any other set of the Hugging Face hub that has a column of text. Needs `pip install datasets` and,
for OpenWebText, about 75 GB of disk.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --name=HuggingFaceFW/fineweb-edu --subset=sample-10BT
    python data/openwebtext/prepare.py --input=FOLDER    # local .parquet or .jsonl files

About one document in two thousand is held out, chosen by a hash of its number: whoever takes only
the first `max_documents` holds out the same ones.
"""
import hashlib, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from data.dataset import write_dataset
from configurator import configure

# -----------------------------------------------------------------------------
name = 'Skylion007/openwebtext'  # of the set on the hub
subset = ''          # a part of it that has a name; '' = its default
input = ''           # a folder of local files instead
column = 'text'      # where the text stands
max_documents = 0    # take only the first so many; 0 = all
val_share = 0.0005   # held out, of the documents
tokenizer = 'gpt2'   # 'byte', 'gpt2', or the path of a tokenizer.json
out = ''             # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

def load(name, subset, input):
    """The documents as a datasets.Dataset: on disk, mapped into memory, so that its size does not matter."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError('data/openwebtext needs the package datasets: pip install datasets') from error
    if not input:
        try:
            return load_dataset(name, subset or None, split='train')
        except (OSError, RuntimeError) as error:
            raise OSError(f'{name} could not be had from the Hugging Face hub ({error}); '
                          'give a folder of local files by --input=FOLDER') from error
    for ending, kind in (('.parquet', 'parquet'), ('.jsonl', 'json')):
        files = sorted(map(str, Path(input).rglob('*' + ending)))
        if files:
            return load_dataset(kind, data_files=files, split='train')
    raise ValueError(f'{input}: no .parquet or .jsonl files there')

def is_held_out(index, share):
    return int.from_bytes(hashlib.sha256(b'%d' % index).digest()[:8], 'big') < share * 2**64

if __name__ == '__main__':
    settings = configure(globals())
    documents = load(name, subset, input)
    if column not in documents.column_names:
        raise ValueError(f'there is no column {column!r}; there are: {", ".join(documents.column_names)}')
    count = min(max_documents or len(documents), len(documents))
    held = {i: None for i in range(count) if is_held_out(i, val_share)} or {count - 1: None}  # in order; never none
    print(f'{count:,} documents, {len(held):,} of them held out')
    train = (row[column] for i, row in enumerate(documents.select(range(count))) if i not in held)
    val = (documents[i][column] for i in held)
    write_dataset(out or here, get_tokenizer(tokenizer), train, val, source=input or name, settings=settings)
