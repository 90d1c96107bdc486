"""
Alpaca: 52,000 instructions with demonstrations by a large model (Stanford, CC BY-NC 4.0); or files
of your own, in this or any other format that data/README.md lists.

    python data/alpaca/prepare.py
    python data/alpaca/prepare.py --input=FILE
    python data/alpaca/prepare.py --input=questions.jsonl,pairs.jsonl

    {"instruction": ..., "input": ..., "output": ..., "chosen": ..., "rejected": ...}

`input` (what the instruction is about) may be empty or missing. A record may have an output, or a
preferred and a dispreferred response (chosen, rejected), or both.

Writes sft_train.jsonl and sft_val.jsonl for the outputs, pref_train.jsonl and pref_val.jsonl for
the pairs. A tenth of the prompts is held out, chosen by a hash. So no prompt is in both splits, and
the same prompts are always split in the same way.
"""
import os
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure, printable
from data.dataset import download
from data.examples import (
    has_empty_text, held_out_prompts, read_records, split_examples, to_examples, write_examples,
)

# -----------------------------------------------------------------------------
input = ''  # local files, separated by commas; '' = download Alpaca
out = ''    # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'


def is_pair(record):
    return isinstance(record, dict) and ('chosen' in record or 'rejected' in record)


def has_output(record):
    """Whether a record must have a demonstration: all do, except for pairs that have none."""
    if not is_pair(record):
        return True
    keys = ('output', 'response', 'completion', 'answer')
    return any(record.get(key) is not None for key in keys)


def read(files):
    """(demonstrations, pairs) of files, {name: content}. Those with an empty text are skipped."""
    records = []
    for name, data in files.items():
        records += read_records(data, name)
    source = ','.join(files)
    with_output = []
    with_pair = []
    for item in records:
        _, record, _ = item
        if has_output(record):
            with_output.append(item)
        if is_pair(record):
            with_pair.append(item)

    # A file may have only one of the two kinds; to_examples refuses an empty list.
    demonstrations = []
    pairs = []
    if with_output or not with_pair:
        demonstrations = to_examples(with_output, source, 'sft')
    if with_pair:
        pairs = to_examples(with_pair, source, 'preference')
    print(printable(f'{source}: {len(demonstrations):,} demonstrations and {len(pairs):,} pairs'))
    return skip_empty(demonstrations), skip_empty(pairs)


def skip_empty(examples):
    """The examples without those that have an empty text, as in some records of Alpaca."""
    full = [example for example in examples if not has_empty_text(example)]
    if len(full) < len(examples):
        print(f'skipped {len(examples) - len(full):,} with an empty text')
    return full


if __name__ == '__main__':
    configure(globals())

    # 1. Read.
    source = input or URL
    if os.path.exists(input):
        contents = {input: Path(input).read_bytes()}  # perhaps with a comma in its name
    elif input:
        contents = {name: Path(name).read_bytes() for name in input.split(',')}
    else:
        contents = {URL: download(URL)}
    demonstrations, pairs = read(contents)

    # 2. Split. The same prompts are held out of both, so an SFT model has not seen those of the
    # validation pairs.
    held_out = held_out_prompts(demonstrations + pairs, source)
    files = {}
    files['sft_train'], files['sft_val'] = split_examples(demonstrations, held_out)
    files['pref_train'], files['pref_val'] = split_examples(pairs, held_out)
    for kind, examples in (('sft', demonstrations), ('pref', pairs)):
        for split in ('train', 'val'):
            if examples and not files[f'{kind}_{split}']:
                raise ValueError(f'{source}: {len(examples):,} examples are too few: '
                                 f'{kind}_{split}.jsonl would be empty')

    # 3. Write.
    write_examples(out or here, files)
