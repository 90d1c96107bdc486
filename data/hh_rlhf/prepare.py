"""
HH-RLHF: people's preferences between two answers of an assistant (Anthropic, MIT; arXiv 2204.05862); or
your own in its format, JSON Lines, gzipped or not, of whole dialogues that differ in the last reply:

    {"chosen": "\\n\\nHuman: Hi!\\n\\nAssistant: Hello.", "rejected": "\\n\\nHuman: Hi!\\n\\nAssistant: What?"}

    python data/hh_rlhf/prepare.py                              # 44,000 pairs about helpfulness
    python data/hh_rlhf/prepare.py --subset=harmless-base
    python data/hh_rlhf/prepare.py --input=FILE                 # every tenth pair is held out
    python data/hh_rlhf/prepare.py --input=FOLDER               # of train.jsonl(.gz) and test.jsonl(.gz)

Writes pref_train.jsonl and pref_val.jsonl. The prompt is all that comes before the last reply: of a
dialogue of one turn what the human said, of a longer one the turns as they stand, "Human:" and
"Assistant:" between them.
"""
import gzip, json, os, re, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure
from data.dataset import download

# -----------------------------------------------------------------------------
subset = 'helpful-base'  # or 'harmless-base', 'helpful-online', 'helpful-rejection-sampled'
input = ''               # a local file or folder; '' = download the subset
out = ''                 # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

def fetch(subset, split):
    """(name, bytes) of a published file."""
    url = f'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{subset}/{split}.jsonl.gz'
    return url, download(url)

def find(folder, split):
    """(name, bytes) of folder/split.jsonl, or .jsonl.gz."""
    for path in (Path(folder, f'{split}.jsonl'), Path(folder, f'{split}.jsonl.gz')):
        if path.exists():
            return str(path), path.read_bytes()
    raise FileNotFoundError(f'{folder}: neither {split}.jsonl nor {split}.jsonl.gz is there')

def split_dialogue(chosen, rejected):
    """{prompt, chosen, rejected}, of two dialogues that are the same up to the last reply."""
    start = os.path.commonprefix([chosen, rejected]).rfind('\n\nAssistant:')
    if start < 0 or not chosen.startswith('\n\nHuman:'):
        raise ValueError('the two do not begin with the same "\\n\\nHuman: ...\\n\\nAssistant:"')
    if re.search('[\ud800-\udfff]', chosen + rejected):
        raise ValueError('half a character, a lone surrogate')
    reply = start + len('\n\nAssistant:')
    return {'prompt': chosen[len('\n\nHuman:'):start].strip(),
            'chosen': chosen[reply:].strip(), 'rejected': rejected[reply:].strip()}

def read_pairs(name, data):
    """The pairs of a file. Bad lines are an error that names them. Pairs from which nothing can be learned
    are left out and counted: a side is empty, both are the same, or the dialogues part before the last reply."""
    try:
        lines = (gzip.decompress(data) if data.startswith(b'\x1f\x8b') else data).decode('utf-8').split('\n')
    except (EOFError, gzip.zlib.error) as error:
        raise ValueError(f'{name}: damaged gzip file ({error})') from error
    pairs, bad = [], []
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
                pairs.append(split_dialogue(record['chosen'], record['rejected']))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = {KeyError: f'{error} is missing', ValueError: str(error)}.get(type(error), 'not such a pair')
                bad.append(f'{name}:{i}: {what}')
    if bad or not pairs:
        raise ValueError(f'{name}: {len(bad)} bad lines, {len(pairs)} good ones: ' + '; '.join(bad[:5]))
    useful = [p for p in pairs if all(p.values()) and p['chosen'] != p['rejected']
              and '\n\nHuman:' not in p['chosen'] + p['rejected']]
    print(f'{name}: {len(pairs):,} pairs, {len(pairs) - len(useful):,} of them left out')
    return useful

if __name__ == '__main__':
    configure(globals())
    folder = Path(out or here)
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.isfile(input):
        pairs = read_pairs(input, Path(input).read_bytes())
        splits = {'train': [p for i, p in enumerate(pairs) if i % 10 != 9], 'val': pairs[9::10]}
    else:
        splits = {name: read_pairs(*(find(input, split) if input else fetch(subset, split)))
                  for name, split in (('train', 'train'), ('val', 'test'))}
    for split, pairs in splits.items():
        with open(folder / f'pref_{split}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(pair, ensure_ascii=False) + '\n' for pair in pairs)
        print(f'{folder}/pref_{split}.jsonl: {len(pairs):,} lines')
