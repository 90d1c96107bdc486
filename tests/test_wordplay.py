"""The wordplay data: answers against independent ones, splits that do not leak, noise as stated."""
import random
import pytest
from test_data import lines, load, one_line, run

wordplay = load('wordplay')

# 2,000 made-up words of 3 to 12 letters stand for the plays
rng = random.Random(0)
text = ' '.join(''.join(rng.choice('aeiourstlnbdkmz') for _ in range(3 + i % 10)) for i in range(4000))

small = ('--n_sft=300', '--n_pref=100', '--n_prompt=50', '--n_val=80')

def make(out, *args):
    words = out.with_suffix('.txt')
    words.write_text(text, encoding='utf-8')
    return run('wordplay', f'--input={words}', f'--out={out}', *args)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('wordplay') / 'a'
    result = make(out, '--n_sft=40000', '--n_pref=12000', '--n_prompt=4000', '--n_val=520', '--n_test=400')
    assert result.returncode == 0, result.stderr
    return {path.stem: lines(path) for path in out.glob('*.jsonl')}

# each operation by another road than the script's
def by_hand(op, args):
    w = args[0]
    if op == 'add':
        return f'{sum(map(int, args))}'
    after = dict(zip('abcdefghijklmnopqrstuvwxyz', 'bcdefghijklmnopqrstuvwxyza'))
    return {'reverse': ''.join(reversed(w)), 'sort': ''.join(c * w.count(c) for c in sorted(set(w))),
            'twice': ' '.join([w] * 2), 'vowels': ''.join(c for c in w if c not in 'aeiou'),
            'shift': ''.join(after[c] for c in w), 'capitals': ''.join(chr(ord(c) - 32) for c in w),
            'count': f'{sum(1 for _ in w)}'}[op]

@pytest.mark.parametrize('op', list(wordplay.operations))
def test_gold_agrees_with_answers_found_another_way_in_every_phrasing(op):
    phrasings = wordplay.operations[op][1:]
    assert len(phrasings) >= 2
    for args in [('7', '93'), ('48', '75')] if op == 'add' else [('dream',), ('zany',), ('eel',), ('mississippi',)]:
        for phrasing in phrasings:
            prompt, right = phrasing.format(*args), by_hand(op, args)
            assert wordplay.solve(prompt) == (op, right)
            assert wordplay.gold(prompt, right) == (1.0, 1.0)
            assert wordplay.gold(prompt, right + '!')[0] == 0.0

def test_graded_gold_is_one_minus_the_normalised_edit_distance():
    assert wordplay.gold('Spell dream backwards.', 'maerb') == (0.0, 0.8)          # one letter of five
    assert wordplay.gold('Spell dream backwards.', '') == (0.0, 0.0)
    assert wordplay.gold('Spell dream backwards.', 'maerdmaerd') == (0.0, 0.5)     # five too many of ten
    assert wordplay.edit_distance('kitten', 'sitting') == 3

def test_a_prompt_of_another_kind_is_refused():
    for prompt in ('Tell me a joke.', 'Spell DREAM backwards.', 'Add one and two.', 'Spell dream backwards. '):
        with pytest.raises(ValueError, match='no wordplay prompt'):
            wordplay.gold(prompt, 'x')

def key(prompt):
    """What must not leak: the operation and its arguments, whatever the phrasing and the order."""
    op = wordplay.solve(prompt)[0]
    pattern = next(p for o, p in wordplay.patterns if o == op and p.fullmatch(prompt))
    return op, *sorted(pattern.fullmatch(prompt).groups())

def test_nothing_leaks_between_the_splits(made):
    seen = {split: {key(r['prompt']) for name, rows in made.items() if name.endswith('_' + split) for r in rows}
            for split in ('train', 'val', 'test', 'longer')}
    for a in seen:
        for b in seen:
            assert a == b or not seen[a] & seen[b]
    assert all(len(args[0]) <= 8 for op, *args in seen['train'] | seen['val'] | seen['test'])
    assert all(9 <= len(args[0]) <= 12 for op, *args in seen['longer'])

def test_held_out_prompts_are_balanced_right_and_never_twice(made):
    for name in ('prompts_val', 'prompts_test', 'sft_val'):
        ops = [r['op'] for r in made[name]]
        assert {ops.count(op) for op in wordplay.operations} == {len(ops) // 8}
        assert all(wordplay.gold(r['prompt'], r['response']) == (1.0, 1.0) for r in made[name])
    assert len({r['prompt'] for r in made['prompts_test']}) == len(made['prompts_test']) == 400
    assert made['sft_val'] == made['prompts_val']
    assert [r['prompt'] for r in made['pref_val']] == [r['prompt'] for r in made['prompts_val']]

def test_adding_is_demonstrated_five_times_as_often_and_paired_seven_times(made):
    for name, times in (('sft_train', 5), ('pref_train', 7), ('prompts_train', 1)):
        ops = [r['op'] for r in made[name]]
        assert abs(ops.count('add') / ops.count('sort') - times) < 0.01

def test_the_stated_share_is_wrong_and_really_wrong(made):
    rows = made['sft_train']
    exact = [wordplay.gold(r['prompt'], r['response'])[0] for r in rows]
    assert exact == [float(r['clean']) for r in rows]
    assert abs(1 - sum(exact) / len(exact) - 0.35) < 0.01

def test_length_does_not_tell_a_wrong_response(made):
    draws = random.Random(1)
    for op in wordplay.operations:
        right = [wordplay.solve(r['prompt'])[1] for r in made['sft_train'] if r['op'] == op]
        wrong = [wordplay.demonstrate(op, answer, draws, noise=1.0) for answer in right]
        assert all(a != b for a, b in zip(right, wrong))
        assert abs(sum(map(len, wrong)) / sum(map(len, right)) - 1) < 0.02
    for prefers_long in (True, False):   # a judge that only looks at the length, and tosses a coin where it is equal
        longer = [len(r['chosen']) - len(r['rejected']) for r in made['pref_train'] if r['clean']]
        votes = [0.5 if n == 0 else float((n > 0) == prefers_long) for n in longer]
        assert 0.45 <= sum(votes) / len(votes) <= 0.60

def test_pairs_are_ordered_by_gold_but_for_the_flipped_share(made):
    for r in made['pref_train'] + made['pref_val']:
        chosen, rejected = (wordplay.gold(r['prompt'], r[side])[1] for side in ('chosen', 'rejected'))
        assert chosen != rejected and (chosen > rejected) == r['clean']
        assert r['margin'] == pytest.approx(abs(chosen - rejected), abs=1e-4)
    assert abs(sum(not r['clean'] for r in made['pref_train']) / len(made['pref_train']) - 0.10) < 0.01

def test_the_same_seed_writes_the_same_files_and_another_does_not(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        assert make(tmp_path / name, *small, '--n_test=40', f'--seed={seed}').returncode == 0
    for path in (tmp_path / 'a').iterdir():
        a, b, c = ((tmp_path / name / path.name).read_bytes() for name in 'abc')
        assert a == b != c

@pytest.mark.parametrize('args, said', [
    (('--n_test=100000',), '100000 prompts would be'),
    (('--noise=1.5',), '0 < noise < 1'),
    (('--n_sfd=3',), 'did you mean --n_sft'),
])
def test_a_mistake_gets_one_line(tmp_path, args, said):
    assert said in one_line(make(tmp_path / 'a', *small, *args))
