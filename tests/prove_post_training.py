"""
The proof of post-training: run the whole chain on wordplay with several seeds, and print a table of
the results on held-out prompts that were not used for tuning. Finished runs are not repeated. On
two cores, the first seed with all its control runs takes about 45 minutes, each further seed about
half an hour.

    python tests/prove_post_training.py
    python tests/prove_post_training.py --seeds=1 --out=out/proof
    python tests/prove_post_training.py --only=sft,reward
"""
import argparse
import os
import subprocess
import sys
from statistics import mean

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
from configurator import read_log

# A run with shuffled labels deviates from 0.5 by hundredths, because random labels can make the
# model prefer a whole kind of mistake. Therefore the mean of several runs is reported.
N_SHUFFLED = 8


# -----------------------------------------------------------------------------
# The runs


def runs(base):
    """
    The runs of a seed, in their order: {name: (command, whether it runs for the first seed only)}.
    In a command, {out} is the seed's folder and {seed} the seed. `base` is the folder of the base
    model, which all seeds share.
    """
    config = 'config/wordplay'
    from_sft = '--init_from={out}/sft'
    learned = f'{from_sft} --reward_model={{out}}/reward'
    commands = {
        'base': (f'train.py {config}/base.py', True),
        'sft': (f'sft.py {config}/sft.py --init_from={base}', False),
        'reward': (f'reward.py {config}/reward.py {from_sft}', False)}
    for n in range(N_SHUFFLED):
        shuffled = f'--shuffle_labels=True --max_pairs=4800 --seed={{seed}}{n}'
        commands[f'shuffled_{n}'] = (f'reward.py {config}/reward.py {from_sft} {shuffled}', False)
    commands.update({
        'ppo_gold': (f'ppo.py {config}/ppo_gold.py {from_sft}', False),
        'ppo': (f'ppo.py {config}/ppo.py {learned}', False),
        'rloo': (f'ppo.py {config}/rloo.py {learned}', True),
        'grpo': (f'ppo.py {config}/grpo.py {learned}', True),
        'reward_few': (f'reward.py {config}/reward_few.py {from_sft}', True),
        'hacking': (f'ppo.py {config}/hacking.py {from_sft} --reward_model={{out}}/reward_few',
                    True)})
    return commands


def final_figures(folder):
    """The final figures of a run; None if it has not finished."""
    records = read_log(folder)
    if not records:
        return None
    return records[-1].get('final')


def run(command, seed, folder, name):
    """Run one command of a seed; its output goes to a text file next to its run folder."""
    words = command.format(out=folder, seed=seed).split()
    words.append(f'--out_dir={folder}/{name}')
    if '--seed' not in command:
        words.append(f'--seed={seed}')
    print('python', *words, flush=True)
    os.makedirs(folder, exist_ok=True)
    path = f'{folder}/{name}.txt'
    with open(path, 'w', encoding='utf-8') as f:
        done = subprocess.run([sys.executable, *words], stdout=f, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f'error: the run failed, see {path}')


def run_all(seeds, out, only):
    """Run for each seed what is not finished; `only`: names of runs, empty = all."""
    for seed in seeds:
        folder = f'{out}/{seed}'
        for name, (command, first_seed_only) in runs(f'{out}/{seeds[0]}/base').items():
            if first_seed_only and seed != seeds[0]:
                continue
            if only and name not in only:
                continue
            if not final_figures(f'{folder}/{name}'):
                run(command, seed, folder, name)


# -----------------------------------------------------------------------------
# The table of final figures


def worst_operation(figures):
    """The lowest exact match of an operation."""
    return min(value for name, value in figures.items() if name.startswith('exact_match/'))


def change_of_greedy(figures):
    """The change of the greedy exact match by PPO."""
    return figures['exact_match'] - figures['exact_match_before']


def kl_over_minimum(figures):
    """The KL divergence as a multiple of the least that this gain in exact match needs."""
    return figures['kl'] / figures['kl_minimum']


def ppo_rows(title, name, bar):
    """The rows of a PPO run, see ROWS."""
    return [
        (f'{title}: sampled exact match', name, 'exact_match_sampled', bar),
        ('  before', name, 'exact_match_sampled_before', ''),
        ('  KL, nats per response', name, 'kl', '<= 0.6'),
        ('  KL / its minimum', name, kl_over_minimum, ''),
        ('  greedy exact match, change', name, change_of_greedy, '>= -0.02'),
        ('  ended by the end token', name, 'ended', '>= 0.98'),
        ('  seconds', name, 'seconds', '<= 240')]


# (text, run, figure: its name or a function of all figures of the run, its bar)
ROWS = [
    ('SFT: greedy exact match', 'sft', 'exact_match', '>= 0.97'),
    ('  of the worst operation', 'sft', worst_operation, '>= 0.90'),
    ('  sampled (demonstrations: 0.65)', 'sft', 'exact_match_sampled', '0.59 to 0.71'),
    ('  ended by the end token', 'sft', 'ended', '>= 0.99'),
    ('  seconds', 'sft', 'seconds', '<= 240'),
    ('reward model: accuracy on clean labels', 'reward', 'accuracy_clean', '>= 0.94'),
    ('  if exactly one response is correct', 'reward', 'accuracy_one_right', '>= 0.97'),
    ('  AUC', 'reward', 'auc', '>= 0.97'),
    ('  calibration error', 'reward', 'calibration_error', '<= 0.05'),
    ('  accuracy of length alone', 'reward', 'accuracy_length_only', '<= 0.60'),
    ('  seconds', 'reward', 'seconds', '<= 240'),
    *ppo_rows('PPO, gold reward', 'ppo_gold', '>= 0.92'),
    *ppo_rows('PPO, learned reward', 'ppo', '>= 0.86'),
    ('  best of 4 with the same reward model', 'ppo', 'best_of_4', 'PPO within 0.03'),
    ('RLOO, learned reward: sampled', 'rloo', 'exact_match_sampled', ''),
    ('  KL', 'rloo', 'kl', ''),
    ('  seconds', 'rloo', 'seconds', ''),
    ('GRPO, learned reward: sampled', 'grpo', 'exact_match_sampled', ''),
    ('  KL', 'grpo', 'kl', ''),
    ('  seconds', 'grpo', 'seconds', '')]


def print_table(seeds, out):
    """Print one line per row, with one column per seed that has the run."""
    for text, name, figure, bar in ROWS:
        cells = []
        for seed in seeds:
            figures = final_figures(f'{out}/{seed}/{name}')
            if not figures:
                continue
            value = figure(figures) if callable(figure) else figures[figure]
            digits = 3 if abs(value) < 100 else 0
            cells.append(f'{value:8.{digits}f}')
        print(f'{text:42}', *cells, '  ', bar)


# -----------------------------------------------------------------------------
# The controls


def averages(folder, key, n):
    """
    A metric of PPO's log, averaged over each n iterations: the prompts of a single iteration are
    too few to distinguish small steps from chance.
    """
    values = [record[key] for record in read_log(folder) if key in record]
    starts = range(0, len(values) - n + 1, n)
    return [mean(values[i:i + n]) for i in starts]


def ranks(values):
    """The rank of each value, from 0; equal values share the mean of their ranks."""
    found = []
    for value in values:
        lower = sum(other < value for other in values)
        equal = sum(other == value for other in values)
        found.append(lower + (equal - 1) / 2)
    return found


def spearman(a, b):
    """Spearman's rank correlation: the Pearson correlation of the ranks."""
    a = ranks(a)
    b = ranks(b)
    mean_a = mean(a)
    mean_b = mean(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    variance_a = sum((x - mean_a) ** 2 for x in a)
    variance_b = sum((y - mean_b) ** 2 for y in b)
    return covariance / (variance_a * variance_b) ** 0.5


def print_shuffled(seed, folder):
    """A reward model that is trained on shuffled labels must not be better than chance."""
    accuracies = []
    for n in range(N_SHUFFLED):
        figures = final_figures(f'{folder}/shuffled_{n}')
        if figures:
            accuracies.append(figures['accuracy_clean'])
    if accuracies:
        cells = [f'{accuracy:.3f}' for accuracy in accuracies]
        print(f'shuffled labels, seed {seed}: accuracy {mean(accuracies):.3f} '
              f'(bar 0.48 to 0.52), mean of', *cells)


def print_no_hacking(seed, folder):
    """In PPO with the learned reward, gold must rise together with the score."""
    if not final_figures(folder):
        return
    by_5 = spearman(averages(folder, 'objective/score', 5), averages(folder, 'objective/gold', 5))
    score = averages(folder, 'objective/score', 10)
    gold = averages(folder, 'objective/gold', 10)
    print(f'no reward hacking, seed {seed}: Spearman(score, gold) {spearman(score, gold):.3f} '
          f'(bar 0.9; by 5 iterations {by_5:.3f}), last gold {gold[-1]:.3f} = '
          f'{gold[-1] / max(gold):.3f} of its best (bar 0.97)')


def print_hacking(folder):
    """With a reward model of few pairs and no KL penalty, gold must fall while the score rises."""
    if not final_figures(folder):
        return
    score = averages(folder, 'objective/score', 5)
    gold = averages(folder, 'objective/gold', 5)
    print(f'reward hacking, on purpose: score {score[0]:.2f} -> {score[-1]:.2f}, '
          f'gold {gold[0]:.3f}, best {max(gold):.3f}, last {gold[-1]:.3f} '
          '(bar: 0.10 below its best)')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--seeds', default='1,2,3', help='separated by commas')
    parser.add_argument('--out', default='out/proof', help='folder of the runs')
    parser.add_argument('--only', default='', help='names of runs, separated by commas')
    args = parser.parse_args()
    seeds = args.seeds.split(',')
    only = args.only.split(',') if args.only else []

    run_all(seeds, args.out, only)
    print_table(seeds, args.out)
    for seed in seeds:
        print_shuffled(seed, f'{args.out}/{seed}')
        print_no_hacking(seed, f'{args.out}/{seed}/ppo')
    print_hacking(f'{args.out}/{seeds[0]}/hacking')


if __name__ == '__main__':
    main()
