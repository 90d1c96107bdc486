"""
Wordplay: instructions whose responses a short function can check, so that post-training becomes
measurable.

    python data/wordplay/prepare.py

Demonstrations are imperfect, like those of people: a share `noise` is wrong. A model that imitates
them well is therefore right in a share of 1 - noise of its samples, and reinforcement learning can
improve it. A preference pair is two samples of one demonstrator; the better one by `gold` is
chosen, and a share `flip` of these labels is flipped.

A hash of (operation, arguments) assigns each instruction to train, val (to look at while tuning) or
test (for the final figures). Words longer than any in train form a split of their own, `longer`.

The files, in JSON Lines:

    sft_train, sft_val                   prompt, response, op, clean (false: wrong response)
    pref_train, _val, _test              prompt, chosen, rejected, margin, op, clean (false = flip)
    prompts_train, _val, _test, _longer  as sft, with the correct response; sft_val is prompts_val
"""
import hashlib
import json
import math
import random
import re
import string
import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure

# -----------------------------------------------------------------------------
input = ''          # a text whose words are used; '' = the plays, prepared first if missing
out = ''            # folder to write to; '' = the folder of this script
n_sft = 205_000     # demonstrations
n_pref = 48_000     # preference pairs
n_prompt = 20_000   # prompts for reinforcement learning
n_val = 2_000       # prompts of val, pairs of val, and pairs of test
n_test = 1_000      # prompts of test, and prompts of longer
noise = 0.35        # share of the demonstrations that are wrong
flip = 0.10         # share of the preference labels that are flipped
add_weight = 5      # demonstrations of adding, the hardest, per one of another operation
pref_add_weight = 7 # the same for pairs
seed = 1337         # the files are a pure function of the settings and the text
# -----------------------------------------------------------------------------

# ----- The operations

NEXT_LETTER = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + 'a')  # z becomes a


def reverse(word):
    return word[::-1]


def sort(word):
    return ''.join(sorted(word))


def twice(word):
    return f'{word} {word}'


def drop_vowels(word):
    return re.sub('[aeiou]', '', word)


def shift(word):
    return word.translate(NEXT_LETTER)


def capitals(word):
    return word.upper()


def count(word):
    return str(len(word))


def add(a, b):
    return str(int(a) + int(b))


# {name: function that computes the correct response}
operations = {
    'reverse': reverse,
    'sort': sort,
    'twice': twice,
    'vowels': drop_vowels,
    'shift': shift,
    'capitals': capitals,
    'count': count,
    'add': add,
}

# {name: prompts, with {} for the arguments}
phrasings = {
    'reverse': ('Spell {} backwards.', 'Write {} in reverse.', 'What is {} spelled backwards?'),
    'sort': ('Sort the letters of {}.', 'Order the letters of {}.', 'Alphabetize {}.'),
    'twice': ('Say {} twice.', 'Write {} two times.', 'What is {} said twice?'),
    'vowels': ('Drop the vowels of {}.', 'Write {} without vowels.', 'Unvowel {}.'),
    'shift': ('Shift each letter of {} by one.', 'Move {} on by one letter.'),
    'capitals': (
        'Write {} in capitals.',
        'Put {} in upper case.',
        'What is {} in capital letters?',
    ),
    'count': ('Count the letters of {}.', 'How many letters are in {}?', 'How long is {}?'),
    'add': ('Add {} and {}.', 'What is {} plus {}?', 'What is {} added to {}?'),
}


def make_patterns():
    """[(operation, regular expression)]: one for each phrasing, with a group for each argument."""
    patterns = []
    for op, texts in phrasings.items():
        argument = '([a-z]+)'
        if op == 'add':
            argument = '([0-9]+)'
        for text in texts:
            # re.escape writes the {} of a phrasing as \{\}.
            escaped = re.escape(text).replace(r'\{\}', argument)
            patterns.append((op, re.compile(escaped)))
    return patterns


patterns = make_patterns()

# ----- The correct response, and how close another one is


def solve(prompt):
    """
    The operation and the correct response, computed from the prompt alone.

    ValueError if the prompt is not one of wordplay's.

    >>> solve('Add 48 and 75.')
    ('add', '123')
    """
    for op, pattern in patterns:
        match = pattern.fullmatch(prompt)
        if match:
            function = operations[op]
            return op, function(*match.groups())
    raise ValueError(f'{prompt!r} is not a wordplay prompt')


def edit_distance(a, b):
    """
    The smallest number of insertions, deletions and substitutions that turn a into b
    (Levenshtein distance).

    >>> edit_distance('kitten', 'sitting')
    3
    """
    # row[j] is the distance between the part of a read so far and b[:j].
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal = row[0]        # the distance between a[:i - 1] and b[:j - 1]
        row[0] = i
        for j, y in enumerate(b, start=1):
            substitution = diagonal + (x != y)
            deletion = row[j] + 1
            insertion = row[j - 1] + 1
            diagonal = row[j]
            row[j] = min(substitution, deletion, insertion)
    return row[-1]


def gold(prompt, response):
    """
    How correct a response is, as two numbers: exact, 1.0 or 0.0, and graded, from 0.0 to 1.0.

    graded = 1 - edit distance / length of the longer of the two texts

    >>> gold('Spell dream backwards.', 'maerb')    # one letter of five is wrong
    (0.0, 0.8)
    """
    _, correct = solve(prompt)
    if response == correct:
        return 1.0, 1.0
    graded = 1 - edit_distance(response, correct) / max(len(response), len(correct))
    return 0.0, graded


# ----- The demonstrator


def wrong_number(op, correct, rng):
    """A number near the correct one: off by one, or in a sum by a forgotten carry."""
    if op == 'count':
        errors = (-1, 1)
    else:
        errors = (-10, -1, 1, 10)
    return str(int(correct) + rng.choice(errors))


def wrong_word(op, correct, rng):
    """The correct text with one slip of the pen, of four kinds that are equally likely."""
    letters = string.ascii_lowercase
    if op == 'capitals':
        letters = string.ascii_uppercase
    while True:
        # All four wrong texts are made first, then one of them is selected.
        i = rng.randrange(len(correct))
        before = correct[:i]
        letter = correct[i]
        after = correct[i + 1:]
        another_letter = before + rng.choice(letters) + after
        swapped_letters = before + after[:1] + letter + after[1:]
        doubled_letter = before + letter + letter + after
        lost_letter = before + after
        if lost_letter == '':
            lost_letter = correct * 2
        wrong = rng.choice((another_letter, swapped_letters, doubled_letter, lost_letter))
        # Another letter may be the same one, and two swapped letters may be equal: then try again.
        if wrong != correct:
            return wrong


def demonstrate(op, correct, rng, noise):
    """The correct response or, with probability `noise`, a wrong one of about the same length."""
    if rng.random() >= noise:
        return correct
    if correct.isdigit():
        return wrong_number(op, correct, rng)
    return wrong_word(op, correct, rng)


def examples(instructions, rng, noise):
    """A demonstration for each of the instructions (prompt, operation, correct response)."""
    for prompt, op, correct in instructions:
        response = demonstrate(op, correct, rng, noise)
        yield {
            'prompt': prompt,
            'response': response,
            'op': op,
            'clean': response == correct,
        }


def pairs(instructions, rng, noise, flip):
    """
    A preference pair for each of the instructions (prompt, operation, correct response).

    Two responses with the same graded gold are sampled again. So `margin`, the difference in
    graded gold, is always positive.
    """
    for prompt, op, correct in instructions:
        gold_a = gold_b = 0
        while gold_a == gold_b:
            a = demonstrate(op, correct, rng, noise)
            b = demonstrate(op, correct, rng, noise)
            _, gold_a = gold(prompt, a)
            _, gold_b = gold(prompt, b)

        # The label: the better response is chosen, unless the label is flipped.
        clean = rng.random() >= flip
        a_is_chosen = (gold_a > gold_b) == clean
        if a_is_chosen:
            chosen, rejected = a, b
        else:
            chosen, rejected = b, a
        yield {
            'prompt': prompt,
            'chosen': chosen,
            'rejected': rejected,
            'margin': round(abs(gold_a - gold_b), 4),
            'op': op,
            'clean': clean,
        }


# ----- The splits


def find_words(text):
    """The words of 3 to 12 lower-case letters, sorted."""
    # This skips names, and parts of words such as the "er" of "o'er".
    found = re.findall(r"(?<![\w'-])[a-z]{3,12}(?![\w'-])", text)
    # Without its vowels, a word must not be empty.
    return sorted({word for word in found if word.strip('aeiou')})


def split_of(op, arguments):
    """The split of an instruction, a pure function of its operation and arguments."""
    if len(arguments[0]) > 8:
        return 'longer'
    # Sorted, so that 12 + 34 and 34 + 12 are in the same split.
    key = ' '.join([op, *sorted(arguments)])
    bucket = hashlib.sha256(key.encode()).digest()[0]    # 0 to 255
    if bucket >= 26:
        return 'train'
    if bucket >= 9:
        return 'val'
    return 'test'


def all_arguments(text):
    """{split: {operation: [arguments]}} for the words of a text and all numbers of two digits."""
    words = [(word,) for word in find_words(text)]
    numbers = []
    for a in range(10, 100):
        for b in range(10, 100):
            numbers.append((str(a), str(b)))

    splits = {'train': {}, 'val': {}, 'test': {}, 'longer': {}}
    for op in operations:
        for arguments_of in splits.values():
            arguments_of[op] = []
        all_of_op = words
        if op == 'add':
            all_of_op = numbers
        for arguments in all_of_op:
            split = split_of(op, arguments)
            splits[split][op].append(arguments)
    return splits


def draw(arguments_of, n, rng, add_weight=0):
    """
    n instructions (prompt, operation, correct response); the operations take turns.

    arguments_of: {operation: [arguments]}. With an add_weight, for training, each instruction
    samples its arguments independently, and adding gets so many turns per round. With 0, for
    evaluation, no arguments are used twice. ValueError if there are too few.
    """
    # 1. One round: each operation that has arguments in this split.
    one_round = []
    for op in operations:
        turns = 1
        if op == 'add' and add_weight:
            turns = add_weight
        if arguments_of[op]:
            one_round += [op] * turns
    rounds = math.ceil(n / max(1, len(one_round)))
    # Enough arguments? Each operation needs one per round, unless they may repeat.
    fewest = min((len(arguments_of[op]) for op in one_round), default=0)
    if add_weight:
        enough = fewest > 0 or n == 0
    else:
        enough = rounds <= fewest
    if not enough:
        raise ValueError(f'{n} prompts are {rounds} per operation, '
                         f'but there are words for only {fewest}')

    # 2. The arguments.
    turns = (one_round * rounds)[:n]
    chosen = []
    if add_weight:
        # With replacement: the same arguments may come again.
        for op in turns:
            chosen.append(rng.choice(arguments_of[op]))
    else:
        # Without replacement: no arguments come again.
        unused = {op: rng.sample(arguments_of[op], rounds) for op in one_round}
        for op in turns:
            chosen.append(unused[op].pop())

    # 3. The phrasings and the correct responses.
    instructions = []
    for op, arguments in zip(turns, chosen):
        prompt = rng.choice(phrasings[op]).format(*arguments)
        correct = operations[op](*arguments)
        instructions.append((prompt, op, correct))
    return instructions


def read_text(path):
    """The text of a file; for '' the text of the plays, which are prepared first if missing."""
    if path:
        return Path(path).read_text(encoding='utf-8')
    plays = here.parent / 'shakespeare' / 'input.txt'
    if not plays.exists():
        script = plays.with_name('prepare.py')
        if subprocess.run([sys.executable, script]).returncode != 0:
            sys.exit(2)  # the script has printed the reason
    return plays.read_text(encoding='utf-8')


if __name__ == '__main__':
    configure(globals())
    if not 0 < noise < 1:
        raise ValueError(f'noise must be between 0 and 1; got {noise}')
    if not 0 <= flip <= 1:
        raise ValueError(f'flip must be from 0 to 1; got {flip}')
    if add_weight < 1 or pref_add_weight < 1:
        raise ValueError('add_weight and pref_add_weight must be at least 1; '
                         f'got {add_weight} and {pref_add_weight}')

    splits = all_arguments(read_text(input))
    folder = Path(out or here)
    folder.mkdir(parents=True, exist_ok=True)

    # {file: (number of lines, weight of adding; 0 = no prompt twice)}
    files = {
        'sft_train': (n_sft, add_weight),
        'sft_val': (n_val, 0),
        'pref_train': (n_pref, pref_add_weight),
        'pref_val': (n_val, 0),
        'pref_test': (n_val, 0),
        'prompts_train': (n_prompt, 1),
        'prompts_val': (n_val, 0),
        'prompts_test': (n_test, 0),
        'prompts_longer': (n_test, 0),
    }
    for name, (n, weight) in files.items():
        # 1. The instructions. Those of val are the same in sft_val, pref_val and prompts_val.
        kind, split = name.split('_')
        purpose = split
        if split == 'train':
            purpose = name
        rng = random.Random(f'{seed} {purpose}')
        instructions = draw(splits[split], n, rng, weight)

        # 2. The responses. Only demonstrations for training and pairs are imperfect.
        if kind == 'pref':
            records = list(pairs(instructions, rng, noise, flip))
        elif name == 'sft_train':
            records = list(examples(instructions, rng, noise))
        else:
            records = list(examples(instructions, rng, noise=0))

        # 3. The file, and a few examples on the screen.
        with open(folder / f'{name}.jsonl', 'w', encoding='utf-8', newline='\n') as file:
            for record in records:
                file.write(json.dumps(record) + '\n')
        n_clean = sum(record['clean'] for record in records)
        print(f'{name:16} {n:8,} lines, {n_clean / max(1, n):7.2%} clean')
        if name == 'sft_train':
            for record in records[:10]:
                mark = ''
                if not record['clean']:
                    mark = '   (wrong)'
                print(f'    {record["prompt"]} -> {record["response"]}', mark)
