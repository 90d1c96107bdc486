"""
The frontier of true reward against KL (arXiv 2210.10760): how often a policy is correct, and how it
is scored by the reward model it was trained with, against its distance from the reference. The
paper's experiment, with the checking function of the dataset as the true reward.

    python tests/bench_frontier.py out/kl_none out/dpo_few --out=out/frontier.png

The folders are runs of ppo.py, whose curves are read from their logs, and of reward.py with
--loss=dpo, which are measured on test prompts. Best-of-n is always among the curves; it samples
from --reference and chooses by --reward_model.
"""
import argparse
import contextlib
import math
import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.chdir(ROOT)
import torch

from configurator import generator_for, load_checkpoint, read_log
from data.examples import load_examples, load_gold
from data.pretrained import load_chat_model, load_reward_model
from ppo import Policy, rollout, score_by_function, score_by_model, score_policy
from sample import encode_prompts

# Iterations of PPO that make up a point of a curve.
WINDOW = 5

# Responses per prompt for best-of-n.
N_LARGEST = 64

# What score_policy needs of the settings of ppo.py and of a run.
SETTINGS = {'seed': 1, 'batch_size': 200, 'minibatch_size': 200, 'gradient_accumulation_steps': 1,
            'max_new_tokens': 32, 'temperature': 1.0}
RUN = types.SimpleNamespace(device='cpu', autocast=contextlib.nullcontext())


def best_of_n_kl(n):
    """The KL, in nats per response, of the best of n samples from their distribution, if no two of
    them have equal scores; otherwise it is lower (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def label_of(config):
    """The name of the curve of a run of ppo.py with these settings, such as RLOO, no KL penalty."""
    algorithm = {'gae': 'PPO', 'rloo': 'RLOO', 'grpo': 'GRPO'}[config['adv']]
    penalty = 'no KL penalty'
    if config['kl_control'] != 'none':
        penalty = f"{config['kl_control']} KL penalty, {config['kl_coef']}"
    return f'{algorithm}, {penalty}'


def read_curve(folder):
    """[(KL, gold, score)] of a run of ppo.py, each the mean of WINDOW iterations."""
    names = ('objective/kl_exact', 'objective/gold', 'objective/score')
    records = [record for record in read_log(folder) if names[0] in record]
    columns = []
    for name in names:
        columns.append([record[name] for record in records])
    n_points = len(records) // WINDOW
    table = torch.tensor(columns)[:, :n_points * WINDOW]
    windows = table.view(len(names), n_points, WINDOW)
    return windows.mean(dim=2).T.tolist()


def measure_policy(folder, reference, tok, rows, prompts, scorer, check_response):
    """[(KL, gold, score)] of the policy in a run's folder: one point."""
    policy, _ = load_chat_model(folder, {})
    found = score_policy(Policy(policy.eval(), separate_critic=False),
                         Policy(reference, separate_critic=False), rows, prompts, tok, scorer,
                         check_response, SETTINGS, RUN)
    return [(found['kl'], found['gold'], found['score'])]


def best_of_n_curve(reference, tok, rows, prompts, scorer, check_response):
    """[(KL, gold, score)] of the best of n samples, for n = 1, 2, 4, ..."""
    # 1. N_LARGEST responses to each prompt: gold and score, (prompts, N_LARGEST)
    all_gold = []
    all_scores = []
    for row, prompt in zip(rows, prompts):
        generator = generator_for(SETTINGS['seed'], 'best of n', len(all_gold))
        idx, mask, ended = rollout(reference, [prompt] * N_LARGEST, tok.eos_ids,
                                   SETTINGS['max_new_tokens'], 1.0, generator)
        scores = score_by_model(scorer, idx, mask, N_LARGEST)
        all_scores.append(torch.where(ended, scores, -3.0))
        all_gold.append(score_by_function(check_response, [row] * N_LARGEST, idx, mask, tok))
    gold = torch.stack(all_gold)
    scores = torch.stack(all_scores)

    # 2. Each n responses side by side are one group, of which the best is taken.
    points = []
    n = 1
    while n <= N_LARGEST:
        best = scores.view(len(rows), -1, n).argmax(dim=2, keepdim=True)
        gold_of_best = gold.view(len(rows), -1, n).gather(2, best).mean().item()
        score_of_best = scores.view(len(rows), -1, n).gather(2, best).mean().item()
        points.append((best_of_n_kl(n), gold_of_best, score_of_best))
        n *= 2
    return points


def draw(curves, path):
    """Draw gold and score against the square root of the KL."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    panels = [('true reward', 'gold: share of correct responses'),
              ('reward that was optimised', 'score by the reward model')]
    for number, (title, ylabel) in enumerate(panels, start=1):
        axis = figure.add_subplot(1, 2, number, title=title, ylabel=ylabel)
        axis.set_xlabel('square root of the KL to the reference (nats per response)')
        for name, points in curves.items():
            distances = [math.sqrt(max(0.0, point[0])) for point in points]
            heights = [point[number] for point in points]
            axis.plot(distances, heights, marker='.', label=name)
        axis.grid(alpha=0.3)
    handles = list(figure.axes[0].lines)
    figure.legend(handles=handles, loc='outside lower center', ncols=4, fontsize='small')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    figure.savefig(path, dpi=80)
    print(f'wrote {path}')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('folders', nargs='*', help='runs of ppo.py, and of reward.py with dpo')
    parser.add_argument('--reference', default='out/sft', help='the model that all started from')
    parser.add_argument('--reward_model', default='out/reward_few')
    parser.add_argument('--prompts', type=int, default=200, help='number of test prompts')
    parser.add_argument('--out', default='out/frontier.png', help='the picture to write')
    args = parser.parse_args()

    # 1. The reference, the reward model, the test prompts and the true reward.
    reference, tok = load_chat_model(args.reference, {})
    reference.eval()
    scorer = load_reward_model(args.reward_model, tok)
    rows = load_examples('wordplay', 'prompts_test', 'prompt')[:args.prompts]
    prompts = encode_prompts([row['messages'] for row in rows], tok, reference.config.block_size,
                             SETTINGS['max_new_tokens'])
    check_response = load_gold('wordplay', '')

    # 2. The curves. The policies of DPO, one point each, form one curve in the order of the KL.
    curves = {}
    dpo_points = []
    for folder in args.folders:
        checkpoint = load_checkpoint(folder)
        if checkpoint['stage'] == 'dpo':
            dpo_points += measure_policy(folder, reference, tok, rows, prompts, scorer,
                                         check_response)
        else:
            curves[label_of(checkpoint['config'])] = read_curve(folder)
    if dpo_points:
        curves['DPO'] = sorted(dpo_points)
    curves['best of n'] = best_of_n_curve(reference, tok, rows, prompts, scorer, check_response)

    # 3. The table, and the picture.
    for name, points in curves.items():
        best = max(points, key=lambda point: point[1])
        last = points[-1]
        print(f'{name:26} best gold {best[1]:.3f} at KL {best[0]:6.2f}; last point: gold '
              f'{last[1]:.3f}, score {last[2]:5.2f}, KL {last[0]:6.2f}')
    draw(curves, args.out)


if __name__ == '__main__':
    main()
