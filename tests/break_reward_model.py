"""
Break the training of a reward model on purpose, in one way at a time, and see whether the sanity
checks of reward.py notice. Every check is run twice: on the code as it is, where it should say ok,
and on broken code, where it should say FAILED.

    python tests/break_reward_model.py       wordplay, on the models in out/sft and out/reward
"""
import contextlib
import itertools
import os
import sys
import types
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import reward
from data.examples import load_examples
from data.pretrained import load_chat_model, load_reward_model
from model import RewardModel, last_of_each_row

SETTINGS = {'loss': 'bt', 'causal': False, 'seed': 1, 'dpo_beta': 0.1, 'learning_rate': 2e-3,
            'batch_size': 32, 'flip_rate': 0.1}
RUN = types.SimpleNamespace(device='cpu', autocast=contextlib.nullcontext())


# -----------------------------------------------------------------------------
# The faults


correct_forward = RewardModel.forward
correct_get_batch = reward.get_batch


def mean_over_all_columns(self, idx, mask=None, targets=None):
    """In place of RewardModel.forward: the mean over all columns, padding included."""
    return correct_forward(self, idx, mask) * mask.sum(dim=1) / idx.size(1)


def get_batch_with_leak(pairs):
    """In place of get_batch: only the chosen side keeps its end token, and so betrays the label."""
    idx, mask, margins = correct_get_batch(pairs)
    is_last = last_of_each_row(mask > 0)
    is_last[:len(pairs)] = False
    return idx.masked_fill(is_last, -1), mask.masked_fill(is_last, 0), margins


def prefer_longer(pairs):
    """The pairs with sides of different length, the longer one chosen."""
    relabelled = []
    for chosen, rejected, row in pairs:
        if len(row['chosen']) == len(row['rejected']):
            continue
        row = {**row, 'clean': True}
        if len(row['chosen']) < len(row['rejected']):
            chosen, rejected = rejected, chosen
            row['chosen'], row['rejected'] = row['rejected'], row['chosen']
        relabelled.append((chosen, rejected, row))
    return relabelled


def swap_sides(pairs):
    """The pairs with the rejected side as the chosen one."""
    return [(rejected, chosen, row) for chosen, rejected, row in pairs]


# -----------------------------------------------------------------------------
# The checks


def new_model(policy):
    """A reward model on the policy as trunk, with a new head."""
    model, _ = reward.make_models(policy, SETTINGS['loss'], SETTINGS['causal'], SETTINGS['seed'],
                                  RUN.device)
    return model


def train(policy, pairs, learning_rate):
    """A new model after 300 steps."""
    model = new_model(policy)
    config = {**SETTINGS, 'learning_rate': learning_rate}
    reward.train_briefly(model, None, pairs, 300, config, RUN.device)
    return model


def check_trained(model, pairs):
    """{check: (ok, message)} of the three checks of a trained model."""
    figures = reward.evaluate(model, None, pairs, None, SETTINGS, RUN)
    return dict(zip(('length', 'spread', 'calibration'), reward.check_figures(figures)))


def break_code(policy, with_dropout, train_pairs, val_pairs):
    """
    The checks of the code and of what can be learned. Yield (fault, verdict of the correct code,
    verdict of the broken code), a verdict being (ok, message). with_dropout: the policy with
    dropout.
    """
    few = train_pairs[:16]
    model = new_model(policy)

    correct = reward.check_swap(model, None, few, 0.1, RUN.device)
    broken = reward.check_swap(new_model(with_dropout), None, few, 0.1, RUN.device)
    yield 'dropout is on while pairs are scored', correct, broken

    correct = reward.check_padding(model, None, few, 0.1, RUN.device)
    with mock.patch.object(RewardModel, 'forward', mean_over_all_columns):
        broken = reward.check_padding(model, None, few, 0.1, RUN.device)
    yield 'the mean of the encoder counts padding too', correct, broken

    correct = reward.check_overfitting(policy, few, SETTINGS, RUN)
    broken = reward.check_overfitting(policy, few, {**SETTINGS, 'learning_rate': 1e-6}, RUN)
    yield 'the learning rate is 1e-6', correct, broken

    pairs = (train_pairs, val_pairs)
    correct = reward.check_shuffled_labels(policy, *pairs, SETTINGS, RUN, n_runs=2)
    with mock.patch.object(reward, 'get_batch', get_batch_with_leak):
        broken = reward.check_shuffled_labels(policy, *pairs, SETTINGS, RUN, n_runs=2)
    yield 'only the chosen response has an end token', correct, broken


def break_training(policy, trained, train_pairs, val_pairs):
    """The checks of a trained model; yields what break_code does."""
    correct = check_trained(trained, val_pairs)
    model = train(policy, prefer_longer(train_pairs), SETTINGS['learning_rate'])
    broken = check_trained(model, prefer_longer(val_pairs))
    yield 'the longer response is always preferred', correct['length'], broken['length']

    model = train(policy, train_pairs, learning_rate=0.3)
    broken = check_trained(model, val_pairs)
    yield 'the learning rate is 0.3', correct['spread'], broken['spread']

    # With the sides swapped in training, a model would learn the same scores with the other sign.
    broken = check_trained(trained, swap_sides(val_pairs))
    yield 'the sides were swapped in training', correct['calibration'], broken['calibration']


def main():
    os.chdir(ROOT)
    policy, tok = load_chat_model('out/sft', {})
    with_dropout, _ = load_chat_model('out/sft', {'dropout': 0.1})
    trained = load_reward_model('out/reward', tok)
    pairs = []
    for split, n in (('pref_train', 2000), ('pref_val', 500)):
        rows = load_examples('wordplay', split, 'preference')[:n]
        pairs.append(reward.prepare_pairs(rows, tok, policy.config.block_size))
    verdicts = itertools.chain(break_code(policy, with_dropout, *pairs),
                               break_training(policy, trained, *pairs))
    for fault, correct, broken in verdicts:
        print(f'{fault}:')
        for name, (ok, message) in (('correct', correct), ('broken', broken)):
            print(f'    {name:8} {"ok    " if ok else "FAILED"} {message}', flush=True)


if __name__ == '__main__':
    main()
