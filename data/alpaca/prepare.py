"""
Alpaca: 52,000 instructions with demonstrations written by a large model (Stanford, CC BY-NC 4.0); or
any file of your own in the same format, a JSON list or JSON Lines of

    {"instruction": ..., "input": ..., "output": ..., "chosen": ..., "rejected": ...}

    python data/alpaca/prepare.py
    python data/alpaca/prepare.py --input=FILE

where `input` (what the instruction is about) may be empty or missing, and so may the last two, a
preferred and a dispreferred response. Writes sft_train.jsonl and sft_val.jsonl and, where there are
preferences, pref_train.jsonl and pref_val.jsonl. A tenth of the prompts is held out, chosen by a hash,
so that no prompt stands on both sides and a longer file of the same prompts is split alike.
"""
import hashlib, json, re, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure
from data.dataset import download

# -----------------------------------------------------------------------------
input = ''  # a local file; '' = download Alpaca
out = ''    # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

url = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'

def parse(text):
    """[(where, record)] of a JSON list or of JSON Lines; a line that is not JSON has None for a record."""
    if text.lstrip().startswith('['):
        return [(f'record {i}', record) for i, record in enumerate(json.loads(text), 1)]
    found = []
    for i, line in enumerate(text.split('\n'), 1):
        if line.strip():
            try:
                found.append((f'line {i}', json.loads(line)))
            except json.JSONDecodeError:
                found.append((f'line {i}', None))
    return found

def complaint(record):
    """What is wrong with a record, or ''."""
    if not isinstance(record, dict):
        return 'not a JSON object'
    preference = 'chosen' in record or 'rejected' in record
    for key in ('instruction', 'output', *(('chosen', 'rejected') if preference else ())):
        if key not in record:
            return f'{key} is missing'
    for key, value in record.items():
        if key in ('instruction', 'input', 'output', 'chosen', 'rejected'):
            if not isinstance(value, str):
                return f'{key} is not text'
            if re.search('[\ud800-\udfff]', value):
                return f'{key} has half a character, a lone surrogate'
    return ''

def read(data, source):
    """The records, each with its `prompt`: the instruction, and its input in a paragraph of its own. Bad ones
    are an error that names them; those with an empty text, as Alpaca has some, are left out and counted."""
    try:
        found = parse(data.decode('utf-8-sig'))
    except ValueError as error:
        raise ValueError(f'{source}: neither JSON nor JSON Lines in UTF-8 ({error})') from error
    bad = [f'{where}: {what}' for where, record in found if (what := complaint(record))]
    if bad or not found:
        raise ValueError(f'{source}: {len(bad)} of {len(found)} records are bad; ' + '; '.join(bad[:5]))
    records = [{**record, 'prompt': '\n\n'.join(filter(None, [record['instruction'], record.get('input')]))}
               for _, record in found]
    needed = ('instruction', 'output', 'chosen', 'rejected')
    full = [r for r in records if all(r[key].strip() for key in needed if key in r)]
    print(f'{source}: {len(records):,} records, {len(records) - len(full):,} of them left out for an empty text')
    return full

def hold_out(records):
    """{split: records}; a tenth of the prompts, those with the lowest hashes, is 'val'."""
    prompts = sorted({r['prompt'] for r in records}, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held = set(prompts[:max(1, len(prompts) // 10)])
    return {'train': [r for r in records if r['prompt'] not in held],
            'val': [r for r in records if r['prompt'] in held]}

def write(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    print(f'{path}: {len(rows):,} lines')

if __name__ == '__main__':
    configure(globals())
    folder = Path(out or here)
    folder.mkdir(parents=True, exist_ok=True)
    records = read(Path(input).read_bytes() if input else download(url), input or url)
    for split, rows in hold_out(records).items():
        write(folder / f'sft_{split}.jsonl', [{'prompt': r['prompt'], 'response': r['output']} for r in rows])
        pairs = [{key: r[key] for key in ('prompt', 'chosen', 'rejected')} for r in rows if 'chosen' in r]
        if pairs:
            write(folder / f'pref_{split}.jsonl', pairs)
