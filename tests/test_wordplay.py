"""Wordplay: correct responses, splits without overlap, and errors in the stated share."""
import hashlib
import random

import pytest

from test_data import lines, load, one_line, run

wordplay = load('wordplay')

# 2,000 made-up words of 3 to 12 letters stand for the plays.
generator = random.Random(0)
words = []
for i in range(4000):
    letters = [generator.choice('aeiourstlnbdkmz') for _ in range(3 + i % 10)]
    words.append(''.join(letters))
text = ' '.join(words)

SMALL = ('--n_sft=300', '--n_pref=100', '--n_prompt=50', '--n_val=80')


def make(out, *args):
    path = out.with_suffix('.txt')
    path.write_text(text, encoding='utf-8')
    return run('wordplay', f'--input={path}', f'--out={out}', *args)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """{file: its examples} of one run of prepare.py."""
    out = tmp_path_factory.mktemp('wordplay') / 'a'
    sizes = ['--n_sft=40000', '--n_pref=12000', '--n_prompt=4000', '--n_val=520', '--n_test=400']
    result = make(out, *sizes)
    assert result.returncode == 0, result.stderr
    return {path.stem: lines(path) for path in out.glob('*.jsonl')}


def expected_response(op, args):
    """The correct response, computed in another way than by the script."""
    word = args[0]
    if op == 'reverse':
        return ''.join(reversed(word))
    if op == 'sort':
        return ''.join(c * word.count(c) for c in sorted(set(word)))
    if op == 'twice':
        return ' '.join([word] * 2)
    if op == 'vowels':
        return ''.join(c for c in word if c not in 'aeiou')
    if op == 'shift':
        following = dict(zip('abcdefghijklmnopqrstuvwxyz', 'bcdefghijklmnopqrstuvwxyza'))
        return ''.join(following[c] for c in word)
    if op == 'capitals':
        return ''.join(chr(ord(c) - 32) for c in word)
    if op == 'count':
        return f'{sum(1 for _ in word)}'
    assert op == 'add'
    return f'{sum(int(number) for number in args)}'


@pytest.mark.parametrize('op', list(wordplay.operations))
def test_gold_agrees_with_an_independent_computation_for_every_phrasing(op):
    assert len(wordplay.phrasings[op]) >= 2
    arguments = [('dream',), ('zany',), ('eel',), ('mississippi',)]
    if op == 'add':
        arguments = [('7', '93'), ('48', '75')]
    for args in arguments:
        for phrasing in wordplay.phrasings[op]:
            prompt = phrasing.format(*args)
            correct = expected_response(op, args)
            assert wordplay.solve(prompt) == (op, correct)
            assert wordplay.gold(prompt, correct) == (1.0, 1.0)
            assert wordplay.gold(prompt, correct + '!')[0] == 0.0


def test_graded_gold_is_one_minus_the_normalised_edit_distance():
    prompt = 'Spell dream backwards.'
    assert wordplay.gold(prompt, 'maerb') == (0.0, 0.8)          # one letter of five is wrong
    assert wordplay.gold(prompt, '') == (0.0, 0.0)
    assert wordplay.gold(prompt, 'maerdmaerd') == (0.0, 0.5)     # five of ten letters are too many
    assert wordplay.edit_distance('kitten', 'sitting') == 3


def test_a_prompt_of_another_kind_is_refused():
    prompts = ['Tell me a joke.', 'Spell DREAM backwards.', 'Add one and two.']
    prompts += ['Spell dream backwards. ']
    for prompt in prompts:
        with pytest.raises(ValueError, match='not a wordplay prompt'):
            wordplay.gold(prompt, 'x')


def instruction_of(prompt):
    """The operation and its arguments, whatever the phrasing and the order of the arguments."""
    op = wordplay.solve(prompt)[0]
    for other, pattern in wordplay.patterns:
        match = pattern.fullmatch(prompt)
        if other == op and match:
            return op, *sorted(match.groups())


def test_no_instruction_is_in_two_splits(made):
    seen = {}
    for split in ('train', 'val', 'test', 'longer'):
        seen[split] = set()
        for name, rows in made.items():
            if name.endswith('_' + split):
                seen[split] |= {instruction_of(row['prompt']) for row in rows}
    for a in seen:
        for b in seen:
            assert a == b or not seen[a] & seen[b]
    assert all(len(args[0]) <= 8 for op, *args in seen['train'] | seen['val'] | seen['test'])
    assert all(9 <= len(args[0]) <= 12 for op, *args in seen['longer'])


def test_held_out_prompts_are_balanced_correct_and_unique(made):
    for name in ('prompts_val', 'prompts_test', 'sft_val'):
        ops = [row['op'] for row in made[name]]
        assert {ops.count(op) for op in wordplay.operations} == {len(ops) // 8}
        for row in made[name]:
            assert wordplay.gold(row['prompt'], row['response']) == (1.0, 1.0)
    prompts_test = [row['prompt'] for row in made['prompts_test']]
    assert len(set(prompts_test)) == len(prompts_test) == 400
    assert made['sft_val'] == made['prompts_val']
    prompts_val = [row['prompt'] for row in made['prompts_val']]
    assert [row['prompt'] for row in made['pref_val']] == prompts_val


def test_adding_has_five_times_the_demonstrations_and_seven_times_the_pairs(made):
    for name, times in (('sft_train', 5), ('pref_train', 7), ('prompts_train', 1)):
        ops = [row['op'] for row in made[name]]
        assert abs(ops.count('add') / ops.count('sort') - times) < 0.01


def test_the_stated_share_of_the_demonstrations_is_wrong(made):
    rows = made['sft_train']
    exact = [wordplay.gold(row['prompt'], row['response'])[0] for row in rows]
    assert exact == [float(row['clean']) for row in rows]
    assert abs(1 - sum(exact) / len(exact) - 0.35) < 0.01


def test_the_length_does_not_reveal_a_wrong_response(made):
    rng = random.Random(1)
    for op in wordplay.operations:
        correct = []
        for row in made['sft_train']:
            if row['op'] == op:
                correct.append(wordplay.solve(row['prompt'])[1])
        wrong = [wordplay.demonstrate(op, response, rng, noise=1.0) for response in correct]
        assert all(a != b for a, b in zip(correct, wrong))
        assert abs(sum(map(len, wrong)) / sum(map(len, correct)) - 1) < 0.02

    # A classifier that only looks at the length, and guesses where it is equal, is near 0.5.
    clean = [row for row in made['pref_train'] if row['clean']]
    difference = [len(row['chosen']) - len(row['rejected']) for row in clean]
    for prefers_long in (True, False):
        votes = [0.5 if n == 0 else float((n > 0) == prefers_long) for n in difference]
        assert 0.45 <= sum(votes) / len(votes) <= 0.60


def test_pairs_are_ordered_by_gold_except_for_the_flipped_share(made):
    for row in made['pref_train'] + made['pref_val']:
        chosen = wordplay.gold(row['prompt'], row['chosen'])[1]
        rejected = wordplay.gold(row['prompt'], row['rejected'])[1]
        assert chosen != rejected
        assert (chosen > rejected) == row['clean']
        assert row['margin'] == pytest.approx(abs(chosen - rejected), abs=1e-4)
    flipped = [not row['clean'] for row in made['pref_train']]
    assert abs(sum(flipped) / len(flipped) - 0.10) < 0.01


def test_equal_seeds_write_equal_files_and_another_seed_writes_others(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        result = make(tmp_path / name, *SMALL, '--n_test=40', f'--seed={seed}')
        assert result.returncode == 0
    for path in (tmp_path / 'a').iterdir():
        a = path.read_bytes()
        b = (tmp_path / 'b' / path.name).read_bytes()
        c = (tmp_path / 'c' / path.name).read_bytes()
        assert a == b
        assert b != c


def test_the_files_are_those_of_earlier_versions(tmp_path):
    # A change of the random draws would make published results impossible to repeat.
    assert make(tmp_path / 'a', *SMALL, '--n_test=40').returncode == 0
    content = b''
    for path in sorted((tmp_path / 'a').iterdir()):
        content += path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        'c33a605268210b1ed990de33a8db65b745fb5c2dc4a7fb33a6e241683246d608')


@pytest.mark.parametrize('args, message', [
    (('--n_test=100000',), '100000 prompts are'),
    (('--noise=1.5',), 'noise must be between 0 and 1; got 1.5'),
    (('--flip=-0.5',), 'flip must be from 0 to 1; got -0.5'),
    (('--add_weight=0',), 'add_weight and pref_add_weight must be at least 1'),
    (('--n_sfd=3',), 'did you mean --n_sft'),
])
def test_a_mistake_gets_one_line(tmp_path, args, message):
    assert message in one_line(make(tmp_path / 'a', *SMALL, *args))
