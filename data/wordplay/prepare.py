"""
Wordplay: instructions whose answers a short function can check. They make post-training measurable.

    python data/wordplay/prepare.py

Demonstrations are imperfect, as people's are: a share `noise` is wrong. So a model that imitates them
well is right 1 - noise of the time when it samples, and reinforcement learning has something to gain.
Preferences are two draws of one demonstrator, the better by `gold` chosen, a share `flip` turned round.
A hash of (operation, argument) puts it into train, val (to look at while tuning) or test (not to);
words longer than any in training are a split of their own. It writes JSON Lines:
    sft_train, sft_val                        prompt, response, op, clean (false: the response is wrong)
    pref_train, _val, _test                   prompt, chosen, rejected, margin, op, clean (false: flipped)
    prompts_train, _val, _test, _longer       as sft, with the right response; sft_val is prompts_val
"""
import hashlib, json, random, re, string, subprocess, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from configurator import configure

# -----------------------------------------------------------------------------
input = ''          # the text whose words are taken; '' = the plays, made first if they are not there
out = ''            # folder to write to; '' = beside this file
n_sft = 205_000     # demonstrations
n_pref = 48_000     # preference pairs
n_prompt = 20_000   # prompts for reinforcement learning
n_val = 2_000       # held-out prompts, and held-out pairs, to look at while tuning; and as many pairs for the final figures
n_test = 1_000      # held-out prompts for the final figures, and as many on longer words
noise = 0.35        # share of the demonstrations that are wrong
flip = 0.10         # share of the preference labels that are turned round
add_weight = 5      # adding is by far the hardest: how often it is demonstrated for once of any other operation
pref_add_weight = 7 # the same in pairs
seed = 1337         # all is a pure function of the settings and the words
# -----------------------------------------------------------------------------

next_letter = str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + 'a')  # z becomes a
operations = {  # the answer, then the ways to ask for it
    'reverse': (lambda w: w[::-1], 'Spell {} backwards.', 'Write {} in reverse.', 'What is {} spelled backwards?'),
    'sort': (lambda w: ''.join(sorted(w)), 'Sort the letters of {}.', 'Order the letters of {}.', 'Alphabetize {}.'),
    'twice': (lambda w: f'{w} {w}', 'Say {} twice.', 'Write {} two times.', 'What is {} said twice?'),
    'vowels': (lambda w: re.sub('[aeiou]', '', w), 'Drop the vowels of {}.', 'Write {} without vowels.', 'Unvowel {}.'),
    'shift': (lambda w: w.translate(next_letter), 'Shift each letter of {} by one.', 'Move {} on by one letter.'),
    'capitals': (str.upper, 'Write {} in capitals.', 'Put {} in upper case.', 'What is {} in capital letters?'),
    'count': (lambda w: str(len(w)), 'Count the letters of {}.', 'How many letters are in {}?', 'How long is {}?'),
    'add': (lambda a, b: str(int(a) + int(b)), 'Add {} and {}.', 'What is {} plus {}?', 'What is {} added to {}?'),
}
patterns = [(op, re.compile(re.escape(p).replace(r'\{\}', '([0-9]+)' if op == 'add' else '([a-z]+)')))
            for op, (_, *phrasings) in operations.items() for p in phrasings]

def solve(prompt):
    """(operation, right answer), from the text alone: 'Add 48 and 75.' -> ('add', '123')."""
    for op, pattern in patterns:
        if found := pattern.fullmatch(prompt):
            return op, operations[op][0](*found.groups())
    raise ValueError(f'{prompt!r} is no wordplay prompt')

def edit_distance(a, b):
    """The least number of insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]

def gold(prompt, response):
    """How right a response is: exact, 1.0 or 0.0, and graded, 1 - edit distance / the longer length."""
    _, right = solve(prompt)
    graded = 1.0 if response == right else 1 - edit_distance(response, right) / max(len(response), len(right))
    return float(graded == 1), graded

def demonstrate(op, right, rng, noise):
    """The right answer or, with probability `noise`, a wrong one, about as long: a slip of the pen, a carry forgotten."""
    if rng.random() >= noise:
        return right
    if right.isdigit():
        return str(int(right) + rng.choice((-1, 1) if op == 'count' else (-10, -1, 1, 10)))
    wrong, letters = right, string.ascii_uppercase if op == 'capitals' else string.ascii_lowercase
    while wrong == right:
        i = rng.randrange(len(right))
        wrong = rng.choice((right[:i] + rng.choice(letters) + right[i + 1:],             # another letter
                            right[:i] + right[i:i + 2][::-1] + right[i + 2:],            # two letters swapped
                            right[:i] + right[i] + right[i:],                            # a letter doubled
                            right[:i] + right[i + 1:] or right * 2))                     # a letter lost
    return wrong

def examples(draws, rng, noise):
    for prompt, op, right in draws:
        said = demonstrate(op, right, rng, noise)
        yield {'prompt': prompt, 'response': said, 'op': op, 'clean': said == right}

def pairs(draws, rng, noise, flip):
    """Labelled pairs; two draws that `gold` cannot tell apart are drawn again. `margin`, how far apart, is above 0 always."""
    for prompt, op, right in draws:
        a = b = 0
        while a == b:
            both = [demonstrate(op, right, rng, noise) for _ in range(2)]
            a, b = (gold(prompt, response)[1] for response in both)
        clean = rng.random() >= flip
        chosen, rejected = both if (a > b) == clean else both[::-1]
        yield {'prompt': prompt, 'chosen': chosen, 'rejected': rejected, 'margin': round(abs(a - b), 4),
               'op': op, 'clean': clean}

def all_arguments(text):
    """{split: {operation: [arguments]}} for the words of a text and the numbers of two digits."""
    found = re.findall(r"(?<![\w'-])[a-z]{3,12}(?![\w'-])", text)  # no names, no "er" of "o'er"
    words = sorted({(word,) for word in found if word.strip('aeiou')})  # something must be left without vowels
    numbers = [(str(a), str(b)) for a in range(10, 100) for b in range(10, 100)]
    splits = {name: {op: [] for op in operations} for name in ('train', 'val', 'test', 'longer')}
    for op in operations:
        for args in numbers if op == 'add' else words:
            bucket = hashlib.sha256(' '.join([op, *sorted(args)]).encode()).digest()[0]  # of 12 + 34 as of 34 + 12
            split = 'longer' if len(args[0]) > 8 else 'train' if bucket >= 26 else 'val' if bucket >= 9 else 'test'
            splits[split][op].append(args)
    return splits

def draw(arguments, n, rng, add_weight=0):
    """n times (prompt, operation, right answer), the operations in turn. With an add_weight, for training,
    arguments are drawn anew each time; without, for evaluation, none comes twice."""
    turns = [op for op in operations if arguments[op] for _ in range(add_weight or 1 if op == 'add' else 1)]
    each, least = -(-n // max(1, len(turns))), min((len(arguments[op]) for op in turns), default=0)
    if each > least and not (add_weight and least):
        raise ValueError(f'{n} prompts would be {each} of each operation, and there are words for only {least}')
    fresh = {op: rng.sample(arguments[op], each) for op in turns if not add_weight}
    chosen = [(op, rng.choice(arguments[op]) if add_weight else fresh[op].pop()) for op in (turns * each)[:n]]
    return [(rng.choice(operations[op][1:]).format(*args), op, operations[op][0](*args)) for op, args in chosen]

if __name__ == '__main__':
    configure(globals())
    if not (0 < noise < 1 and 0 <= flip <= 1 and min(add_weight, pref_add_weight) >= 1):
        raise ValueError(f'needed: 0 < noise < 1, 0 <= flip <= 1, weights >= 1; got {noise}, {flip}, {add_weight}, {pref_add_weight}')
    plays, folder = Path(input or here.parent / 'shakespeare/input.txt'), Path(out or here)
    if not input and not plays.exists() and subprocess.run([sys.executable, plays.with_name('prepare.py')]).returncode:
        sys.exit(2)  # it has said why
    splits = all_arguments(plays.read_text(encoding='utf-8'))
    folder.mkdir(parents=True, exist_ok=True)
    counts = {'sft_train': n_sft, 'sft_val': n_val, 'pref_train': n_pref, 'pref_val': n_val, 'pref_test': n_val,
              'prompts_train': n_prompt, 'prompts_val': n_val, 'prompts_test': n_test, 'prompts_longer': n_test}
    weights = {'sft_train': add_weight, 'pref_train': pref_add_weight, 'prompts_train': 1}
    for name, n in counts.items():
        kind, split = name.split('_')
        rng = random.Random(f'{seed} {name if split == "train" else split}')
        draws = draw(splits[split], n, rng, weights.get(name, 0))
        records = list(pairs(draws, rng, noise, flip) if kind == 'pref' else
                       examples(draws, rng, noise * (name == 'sft_train')))
        with open(folder / f'{name}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(record) + '\n' for record in records)
        print(f'{name:16} {n:8,} lines, {sum(r["clean"] for r in records) / max(1, n):7.2%} clean')
        for r in records[:10] if name == 'sft_train' else ():
            print(f'    {r["prompt"]} -> {r["response"]}', '' if r['clean'] else '   (wrong)')
