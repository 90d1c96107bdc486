"""
Sums of two numbers as questions, such as "What is 8 plus 8?".

    python data/sums/prepare.py

A hash of the two numbers assigns a sum to train or val, so that 8 plus 3 and 3 plus 8 are in the
same split, and no sum is in both. The files, in JSON Lines:

    sft_train, sft_val           prompt, response: "8 + 8 = 16"
    pref_train, pref_val         prompt, chosen: the same, rejected: a wrong sum
    prompts_train, prompts_val   prompt
"""
import hashlib
import json
import random
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure

# -----------------------------------------------------------------------------
out = ''      # folder to write to; '' = the folder of this script
largest = 10  # both numbers are from 1 to this one
seed = 1337   # of the wrong sums
# -----------------------------------------------------------------------------


def split_of(a, b):
    """'val' for about 30% of the sums, else 'train'."""
    key = f'{min(a, b)} {max(a, b)}'
    bucket = hashlib.sha256(key.encode()).digest()[0]    # 0 to 255
    return 'val' if bucket < 77 else 'train'


if __name__ == '__main__':
    configure(globals())
    rng = random.Random(seed)
    folder = Path(out or here)
    folder.mkdir(parents=True, exist_ok=True)

    # 1. The examples.
    files = {}
    for kind in ('sft', 'pref', 'prompts'):
        for split in ('train', 'val'):
            files[f'{kind}_{split}'] = []
    for a in range(1, largest + 1):
        for b in range(1, largest + 1):
            split = split_of(a, b)
            prompt = f'What is {a} plus {b}?'
            right = f'{a} + {b} = {a + b}'
            wrong = f'{a} + {b} = {a + b + rng.choice((-1, 1, 2))}'
            files[f'sft_{split}'].append({'prompt': prompt, 'response': right})
            files[f'pref_{split}'].append({'prompt': prompt, 'chosen': right, 'rejected': wrong})
            files[f'prompts_{split}'].append({'prompt': prompt})

    # 2. The files.
    for name, examples in files.items():
        with open(folder / f'{name}.jsonl', 'w', encoding='utf-8', newline='\n') as file:
            for example in examples:
                file.write(json.dumps(example) + '\n')
        print(f'{name:13} {len(examples):4} lines')
