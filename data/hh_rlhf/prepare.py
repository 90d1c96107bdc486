"""
HH-RLHF: human preferences between two responses of an assistant (Anthropic, MIT; arXiv 2204.05862);
or a file of your own, gzipped or not, in this or any other preference format of data/README.md.

    {"chosen": "\\n\\nHuman: Hi!\\n\\nAssistant: Hello.",
     "rejected": "\\n\\nHuman: Hi!\\n\\nAssistant: What?"}     (on one line)

    python data/hh_rlhf/prepare.py                    # 44,000 pairs about helpfulness
    python data/hh_rlhf/prepare.py --subset=harmless-base
    python data/hh_rlhf/prepare.py --input=FILE       # a tenth of the prompts is held out
    python data/hh_rlhf/prepare.py --input=FOLDER     # of train.jsonl(.gz) and test.jsonl(.gz)

Writes pref_train.jsonl and pref_val.jsonl. Both dialogues of a pair are the same up to the last
response. Everything before it is the prompt, earlier turns included.
"""
import gzip
import os
import sys
import zlib
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure, printable
from data.dataset import download
from data.examples import (
    has_empty_text, held_out_prompts, read_records, split_examples, to_examples, write_examples,
)

# -----------------------------------------------------------------------------
subset = 'helpful-base'  # or 'harmless-base', 'helpful-online', 'helpful-rejection-sampled'
input = ''               # a local file or folder; '' = download the subset
out = ''                 # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------

URL = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main'


def read_published(subset, split):
    """The pairs of a published file."""
    url = f'{URL}/{subset}/{split}.jsonl.gz'
    return read_pairs(url, download(url))


def read_folder(folder, split):
    """The pairs of folder/<split>.jsonl, or .jsonl.gz."""
    for ending in ('.jsonl', '.jsonl.gz'):
        path = Path(folder, split + ending)
        if path.exists():
            return read_pairs(str(path), path.read_bytes())
    raise FileNotFoundError(f'{folder}: there is neither {split}.jsonl nor {split}.jsonl.gz')


def is_useful(pair):
    """Whether something can be learned from a pair: no text is empty, and its sides differ."""
    return pair['chosen'] != pair['rejected'] and not has_empty_text(pair)


def read_pairs(name, data):
    """The useful pairs of a file, given as bytes; the number of those skipped is printed."""
    # the first two bytes of every gzip file
    if data.startswith(b'\x1f\x8b'):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f'{name}: damaged gzip file ({error})') from error
    records = read_records(data, name)
    pairs = to_examples(records, name, 'preference', skip_divergent=True)
    useful = [pair for pair in pairs if is_useful(pair)]
    n_skipped = len(records) - len(useful)
    print(printable(f'{name}: {len(records):,} pairs, skipped {n_skipped:,} of them'))
    return useful


if __name__ == '__main__':
    configure(globals())

    # 1. Read, and split: no prompt is in both splits.
    if os.path.isfile(input):
        source = input
        pairs = read_pairs(input, Path(input).read_bytes())
        held_out = held_out_prompts(pairs, input)
        train, val = split_examples(pairs, held_out)
    else:
        source = input or subset
        if input:
            pairs = read_folder(input, 'train')
            val = read_folder(input, 'test')
        else:
            pairs = read_published(subset, 'train')
            val = read_published(subset, 'test')
        # The files are already split, except for prompts that both contain.
        held_out = {pair['prompt'] for pair in val}
        train, in_both = split_examples(pairs, held_out)
        print(f'skipped {len(in_both):,} training pairs with a prompt of the validation split')

    # 2. Write.
    files = {'pref_train': train, 'pref_val': val}
    for name, examples in files.items():
        if not examples:
            raise ValueError(f'{source}: {name}.jsonl would be empty')
    write_examples(out or here, files)
