"""
The proof of post-training: the whole chain on wordplay, on several seeds, and the table of what it showed on held-out
prompts that were not looked at while tuning. Runs that have ended are not repeated; a seed takes about half an hour of
two cores, the first one, with all its controls, about 45 minutes.

    python tests/prove_post_training.py
    python tests/prove_post_training.py --seeds=1 --out=out/proof
"""
import argparse, os, subprocess, sys
from statistics import mean
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
from configurator import read_log

parser = argparse.ArgumentParser()
parser.add_argument('--seeds', default='1,2,3')
parser.add_argument('--out', default='out/proof')
parser.add_argument('--only', default='', help='names of runs, by commas')
args = parser.parse_args()

W, P = 'config/wordplay', '--reward_model={o}/reward'
RUNS = {  # name: (command, with {s} the seed, {o} its folder; whether the first seed is enough)
    'base': (f'train.py {W}/base.py', True),
    'sft': (f'sft.py {W}/sft.py --init_from={args.out}/{args.seeds.split(",")[0]}/base', False),
    'reward': (f'reward.py {W}/reward.py --init_from={{o}}/sft', False),
    **{f'tossed_{n}': (f'reward.py {W}/reward.py --init_from={{o}}/sft --shuffle_labels=True --max_pairs=4800 --seed={{s}}{n}',
                       False) for n in range(8)},  # coins teach to like whole kinds of slips: each is off 0.5 by hundredths
    'ppo_gold': (f'ppo.py {W}/ppo_gold.py --init_from={{o}}/sft', False),
    'ppo': (f'ppo.py {W}/ppo.py --init_from={{o}}/sft {P}', False),
    'rloo': (f'ppo.py {W}/rloo.py --init_from={{o}}/sft {P}', True),
    'grpo': (f'ppo.py {W}/grpo.py --init_from={{o}}/sft {P}', True),
    'reward_few': (f'reward.py {W}/reward_few.py --init_from={{o}}/sft', True),
    'hacking': (f'ppo.py {W}/hacking.py --init_from={{o}}/sft --reward_model={{o}}/reward_few', True)}

def final(seed, name):
    records = read_log(f'{args.out}/{seed}/{name}')
    return records[-1].get('final') if records else None

def evaluations(seed, name, key, n):
    """A metric of PPO's log, means of n iterations: the prompts of one are too few to tell small steps from chance."""
    found = [r[key] for r in read_log(f'{args.out}/{seed}/{name}') if key in r]
    return [mean(found[i:i + n]) for i in range(0, len(found) - n + 1, n)]

def spearman(a, b):
    """The correlation of ranks."""
    rank = lambda x: [sum(v < u for v in x) + (sum(v == u for v in x) - 1) / 2 for u in x]
    a, b = rank(a), rank(b)
    ma, mb = mean(a), mean(b)
    cov = sum((x - ma) * (y - mb) for x, y in zip(a, b))
    return cov / (sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b)) ** 0.5

seeds = args.seeds.split(',')
for seed in seeds:
    for name, (command, once) in RUNS.items():
        if once and seed != seeds[0] or final(seed, name) or args.only and name not in args.only.split(','):
            continue
        folder = f'{args.out}/{seed}'
        line = [*command.format(o=folder, s=seed).split(), f'--out_dir={folder}/{name}']
        line += [] if '--seed' in command else [f'--seed={seed}']
        print('python', *line, flush=True)
        os.makedirs(folder, exist_ok=True)
        with open(f'{folder}/{name}.txt', 'w', encoding='utf-8') as f:
            if subprocess.run([sys.executable, *line], stdout=f, stderr=subprocess.STDOUT).returncode:
                sys.exit(f'it failed: see {folder}/{name}.txt')

ROWS = [  # what, run, figure, its bar
    ('SFT, greedy exact match', 'sft', 'exact_match', '>= 0.97'),
    ('  of the worst operation', 'sft', lambda f: min(v for k, v in f.items() if k.startswith('exact_match/')), '>= 0.90'),
    ('  sampled (the demonstrators: 0.65)', 'sft', 'exact_match_sampled', '0.59 to 0.71'),
    ('  ends by itself', 'sft', 'ended', '>= 0.99'),
    ('  seconds', 'sft', 'seconds', '<= 240'),
    ('reward model, accuracy on clean labels', 'reward', 'accuracy_clean', '>= 0.94'),
    ('  where one of the two is right', 'reward', 'accuracy_one_right', '>= 0.97'),
    ('  AUC', 'reward', 'auc', '>= 0.97'),
    ('  calibration error', 'reward', 'calibration_error', '<= 0.05'),
    ('  a judge of length alone', 'reward', 'accuracy_length_only', '<= 0.60'),
    ('  seconds', 'reward', 'seconds', '<= 240')]
for name, title, sampled in (('ppo_gold', 'PPO, gold reward', '>= 0.92'), ('ppo', 'PPO, learned reward', '>= 0.86')):
    ROWS += [(f'{title}: sampled', name, 'exact_match_sampled', sampled), ('  before', name, 'exact_match_sampled_before', ''),
             ('  KL, nats an answer', name, 'kl', '<= 0.6'), ('  over its minimum', name, lambda f: f['kl'] / f['kl_minimum'], ''),
             ('  greedy, change', name, lambda f: f['exact_match'] - f['exact_match_before'], '>= -0.02'),
             ('  ends by itself', name, 'ended', '>= 0.98'), ('  seconds', name, 'seconds', '<= 240')]
ROWS += [('  best of 4 with the same reward model', 'ppo', 'best_of_4', 'PPO within 0.03'),
         ('RLOO, learned reward: sampled', 'rloo', 'exact_match_sampled', ''), ('  KL', 'rloo', 'kl', ''), ('  seconds', 'rloo', 'seconds', ''),
         ('GRPO, learned reward: sampled', 'grpo', 'exact_match_sampled', ''), ('  KL', 'grpo', 'kl', ''), ('  seconds', 'grpo', 'seconds', '')]
for text, name, figure, bar in ROWS:
    found = [f[figure] if isinstance(figure, str) else figure(f) for seed in seeds if (f := final(seed, name))]
    print(f'{text:42}', *(f'{x:8.3f}' if abs(x) < 100 else f'{x:8.0f}' for x in found), '  ', bar)
for seed in seeds:
    if tossed := [f['accuracy_clean'] for n in range(8) if (f := final(seed, f'tossed_{n}'))]:
        print(f'tossed labels, seed {seed}: accuracy {mean(tossed):.3f} (bar 0.48 to 0.52), mean of', *(f'{x:.3f}' for x in tossed))
    if final(seed, 'ppo'):
        (score, gold), few = ([evaluations(seed, 'ppo', f'objective/{key}', n) for key in ('score', 'gold')] for n in (10, 5))
        print(f'no hacking, seed {seed}: Spearman(score, gold) {spearman(score, gold):.3f} (bar 0.9; by 5 iterations '
              f'{spearman(*few):.3f}), last gold {gold[-1]:.3f} = {gold[-1] / max(gold):.3f} of its best (bar 0.97)')
if final(seeds[0], 'hacking'):
    score, gold = (evaluations(seeds[0], 'hacking', f'objective/{key}', 5) for key in ('score', 'gold'))
    print(f'hacking, on purpose: score {score[0]:.2f} -> {score[-1]:.2f}, gold {gold[0]:.3f}, best {max(gold):.3f}, last {gold[-1]:.3f} '
          '(bar: 0.10 below its best)')
