"""
The reward model: losses against closed forms, scores against padding, figures against loops, and
the stage run from the command line.
"""
import json
import math
import re
import shutil

import pytest
import torch

import break_reward_model
import reward
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, save_checkpoint
from conftest import (CPU, ROOT, call, checker_again, finish, flags, letters, ok, one_line, start,
                      with_checker)
from data.examples import load_gold, read_examples
from data.pretrained import load_chat_model, load_reward_model
from model import GPT, GPTConfig, RewardModel
from sample import pad_left

tok = Tokenizer.byte()

# Settings of a run of a few seconds.
FAST = dict(CPU, max_iters=4, batch_size=8, gradient_accumulation_steps=1, log_interval=1,
            eval_interval=2, max_new_tokens=4, normalize_prompts=8)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_reward_model(causal=False, **more):
    """A small reward model with random weights, whose scores differ clearly."""
    torch.manual_seed(0)
    config = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, causal=causal) | more
    model = RewardModel(GPT(GPTConfig(**config)))
    torch.nn.init.normal_(model.head.proj.weight)
    return model


def make_row(prompt, chosen, rejected):
    messages = [{'role': 'user', 'content': prompt}]
    return {'prompt': prompt, 'messages': messages, 'chosen': chosen, 'rejected': rejected}


def make_pairs(n, seed=0, block_size=32):
    """n pairs of a correct and a wrong response to letters."""
    rows = [make_row(prompt, correct, wrong) for prompt, correct, _, wrong in letters(n, seed)]
    return reward.prepare_pairs(rows, tok, block_size)


def write_jsonl(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        for row in rows:
            f.write(json.dumps(row) + '\n')


def final(folder):
    """The final figures of a run."""
    return read_log(str(folder))[-1]['final']


def losses(folder):
    """The training losses of a run, one per step."""
    return [record['loss'] for record in read_log(str(folder)) if 'loss' in record]


def weights(folder):
    return load_checkpoint(str(folder))['model']


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# -----------------------------------------------------------------------------
# Losses

def test_losses_equal_their_formulas():
    chosen = torch.tensor([2.0, -1.0, 0.5])
    rejected = torch.tensor([1.5, 0.0, 0.5])
    margins = torch.tensor([0.1, 0.2, 0.3])
    d = [0.5, -1.0, 0.0]
    d_margin = [0.4, -1.2, -0.3]  # minus the margin of each pair

    def loss(*args, **kwargs):
        return reward.pairwise_loss(chosen, rejected, *args, **kwargs).item()

    def mean(values):
        return pytest.approx(sum(values) / 3, rel=1e-6)

    assert loss() == mean([-math.log(sigmoid(x)) for x in d])
    assert loss('margin') == mean([max(0, 1 - x) for x in d])
    assert loss('margin', 0.25) == mean([max(0, 0.25 - x) for x in d])
    assert loss('bt_margin', margins) == mean([-math.log(sigmoid(x)) for x in d_margin])

    # With a flip_rate a label is right with probability 0.9 and flipped with probability 0.1.
    flipped = [-math.log(0.9 * sigmoid(x) + 0.1 * sigmoid(-x)) for x in d]
    assert loss('bt', margins, flip_rate=0.1) == mean(flipped)
    flipped = [-math.log(0.9 * sigmoid(x) + 0.1 * sigmoid(-x)) for x in d_margin]
    assert loss('bt_margin', margins, flip_rate=0.1) == mean(flipped)


@pytest.mark.parametrize('flip_rate', [0.0, 0.2])
def test_distant_scores_have_a_finite_loss_and_no_gradient_if_labels_may_be_flipped(flip_rate):
    d = torch.tensor([300.0, -300.0], requires_grad=True)
    loss = -reward.log_choice(d, flip_rate)
    loss.sum().backward()
    wrong_loss = -math.log(flip_rate) if flip_rate else 300.0
    wrong_gradient = 0 if flip_rate else -1
    assert loss.tolist() == pytest.approx([-math.log(1 - flip_rate), wrong_loss])
    assert d.grad.tolist() == pytest.approx([0, wrong_gradient], abs=1e-6)


def test_fit_scale_recovers_the_factor_that_scores_were_divided_by():
    generator = seeded(0)
    d = torch.randn(40_000, generator=generator) * 3
    for flip_rate in (0.0, 0.1):
        probability = reward.log_choice(d, flip_rate).exp()
        is_preferred = torch.rand(len(d), generator=generator) < probability
        d = torch.where(is_preferred, d, -d)  # of chosen and rejected
        for factor in (0.5, 1.0, 3.0):
            assert reward.fit_scale(d / factor, flip_rate) == pytest.approx(factor, rel=0.06)
    # The factor stays between 1/8 and 8.
    assert reward.fit_scale(torch.ones(3)) == 8
    assert reward.fit_scale(-torch.ones(3)) == 0.125


def test_bradley_terry_loss_of_equal_scores_is_log_2_with_a_gradient_of_one_half():
    chosen = torch.zeros(4, requires_grad=True)
    rejected = torch.zeros(4)
    loss = reward.pairwise_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert torch.allclose(chosen.grad, torch.full((4,), -0.5 / 4))
    distant = torch.tensor([1000.0, -1000.0])
    assert torch.isfinite(reward.pairwise_loss(distant, -distant))


@pytest.mark.parametrize('kind, margin', [('bradley', None), ('bt_margin', None)])
def test_an_unknown_loss_or_a_missing_margin_is_named(kind, margin):
    with pytest.raises(ValueError, match=f"got '{kind}'"):
        reward.pairwise_loss(torch.zeros(1), torch.zeros(1), kind, margin)


def response_logprob(model, ids, mask):
    """Log-probability of the tokens where mask is 1, with one forward pass per token."""
    total = 0.0
    for t in range(1, len(ids)):
        if mask[t]:
            logits, _ = model(ids[None, :t])
            total += logits[0, -1].log_softmax(-1)[ids[t]].item()
    return total


def test_the_dpo_reward_is_beta_times_the_log_ratio_summed_over_the_response():
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)
    policy = GPT(config)
    reference = GPT(config)
    pairs = make_pairs(3)
    idx, mask, _ = reward.get_batch(pairs)
    scores = reward.score(policy, reference, idx, mask, dpo_beta=0.1)
    sides = [chosen for chosen, _, _ in pairs] + [rejected for _, rejected, _ in pairs]
    for score, (ids, response_mask) in zip(scores, sides, strict=True):
        log_ratio = (response_logprob(policy, ids, response_mask)
                     - response_logprob(reference, ids, response_mask))
        assert score.item() == pytest.approx(0.1 * log_ratio, abs=1e-4)

    # At the start of training the policy is the reference, and the loss is log 2.
    chosen, rejected = reward.score(policy, policy, idx, mask, dpo_beta=0.1).chunk(2)
    assert reward.pairwise_loss(chosen, rejected).item() == pytest.approx(math.log(2), abs=1e-6)


# -----------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('pos', ['rope', 'learned'])
def test_padding_on_either_side_does_not_change_a_score(causal, pos):
    model = make_reward_model(causal, pos=pos)
    rows = [torch.tensor([5, 6, 7]), torch.tensor([9]), torch.tensor([4, 3, 2, 1, 8])]
    unpadded = torch.cat([model(row[None]) for row in rows])
    for left, right in ((0, 0), (3, 0), (0, 4), (2, 5)):
        T = 5 + left + right
        idx = torch.full((3, T), -1)
        for i, row in enumerate(rows):
            # With padding on the right rows begin together, otherwise they end together.
            begin = left if right else T - len(row)
            idx[i, begin:begin + len(row)] = row
        assert torch.allclose(model(idx), unpadded, atol=1e-5)
    assert unpadded.std() > 0.01


def test_an_encoder_scores_the_mean_of_all_tokens_and_a_decoder_the_last_token():
    ids = torch.tensor([[5, 6, 7, 8]])
    encoder = make_reward_model(causal=False)
    h = encoder.trunk.hidden(ids)[0]
    assert torch.allclose(encoder(ids), encoder.head.proj(h.mean(0)), atol=1e-6)
    # The first token of an encoder sees the tokens after it.
    assert not torch.allclose(h[0], encoder.trunk.hidden(ids[:, :1])[0, 0])

    decoder = make_reward_model(causal=True)
    h = decoder.trunk.hidden(ids)[0]
    assert torch.allclose(decoder(ids), decoder.head.proj(h[-1]), atol=1e-6)


def test_an_encoder_with_a_mask_averages_over_the_response_only_but_sees_the_prompt():
    model = make_reward_model()
    idx, mask, _ = reward.get_batch(make_pairs(5))
    scores = model(idx, mask)
    for ids, response_mask, score in zip(idx, mask, scores):
        real = ids >= 0
        h = model.trunk.hidden(ids[real][None])[0]
        h_response = h[response_mask[real] > 0].mean(0)
        assert score.item() == pytest.approx(model.head.proj(h_response).item(), abs=1e-5)

    is_prompt_text = (idx > 0) & (mask == 0) & (idx < 256)
    other_prompt = torch.where(is_prompt_text, 65, idx)
    assert not torch.allclose(model(other_prompt, mask), scores, atol=1e-4)


def test_a_decoder_scores_the_last_token_of_the_response_with_or_without_a_mask():
    model = make_reward_model(causal=True)
    idx, mask, _ = reward.get_batch(make_pairs(5))
    assert torch.equal(model(idx, mask), model(idx))


def test_tamper_replaces_response_tokens_of_chosen_sides_only_half_of_them_by_a_blank():
    idx, mask, _ = reward.get_batch(make_pairs(400))
    tampered, tampered_mask, all_targets = reward.tamper(idx, mask, 260, seeded(1))

    # The pairs themselves stay as they are, and have no targets.
    assert torch.equal(tampered[:800], idx)
    assert torch.equal(tampered_mask[:800], mask)
    assert torch.equal(tampered_mask[800:], mask[:400])
    assert (all_targets[:800] == -1).all()

    # The copies of the chosen sides differ only where there is a target, which is the original.
    chosen = idx[:400]
    noisy = tampered[800:]
    targets = all_targets[800:]
    is_response = mask[:400] > 0
    replaced = targets >= 0
    assert (is_response | ~replaced).all()
    assert torch.equal(noisy[~replaced], chosen[~replaced])
    assert torch.equal(targets[replaced], chosen[replaced])

    # 40% of the response tokens are replaced, half of them by the blank.
    replaced_share = replaced.sum() / is_response.sum()
    blank_share = (noisy[replaced] == 260).float().mean()
    assert abs(replaced_share - 0.4) < 0.06
    assert abs(blank_share - 0.5) < 0.08
    assert set(noisy[replaced].tolist()) <= {260, *chosen[is_response].tolist()}
    assert (noisy[replaced] != chosen[replaced]).float().mean() > 0.6

    # The generator alone decides.
    assert torch.equal(reward.tamper(idx, mask, 260, seeded(1))[0], tampered)
    assert not torch.equal(reward.tamper(idx, mask, 260, seeded(2))[0], tampered)


def test_the_denoising_loss_is_the_cross_entropy_of_the_originals_and_changes_no_score():
    model = make_reward_model()
    idx, mask, _ = reward.get_batch(make_pairs(6))
    tampered, tampered_mask, targets = reward.tamper(idx, mask, 260, seeded(1))
    scores, denoise_loss = model(tampered, tampered_mask, targets)
    assert torch.allclose(scores[:12], model(idx, mask), atol=1e-5)
    total = 0.0
    for ids, row_targets in zip(tampered[12:], targets[12:]):
        logits = model.trunk.lm_head(model.trunk.hidden(ids[ids >= 0][None])[0])
        logp = logits.log_softmax(-1)
        for t in range(len(logp)):
            if row_targets[t] >= 0:
                total -= logp[t, row_targets[t]].item()
    n_targets = (targets >= 0).sum().item()
    assert denoise_loss.item() == pytest.approx(total / n_targets, rel=1e-5)


def test_swapping_a_pair_negates_the_difference_of_its_scores():
    model = make_reward_model()
    pairs = make_pairs(5)
    swapped = [(rejected, chosen, row) for chosen, rejected, row in pairs]
    chosen, rejected = model(reward.get_batch(pairs)[0]).chunk(2)
    swapped_chosen, swapped_rejected = model(reward.get_batch(swapped)[0]).chunk(2)
    assert torch.allclose(chosen - rejected, swapped_rejected - swapped_chosen, atol=1e-6)


# -----------------------------------------------------------------------------
# Pairs

def test_long_pairs_are_truncated_on_the_left_because_they_differ_at_their_end(capsys):
    (chosen, _), (rejected, _), _ = make_pairs(1, block_size=6)[0]
    assert len(chosen) == len(rejected) == 6
    assert chosen.tolist() != rejected.tolist()
    assert chosen[-1] == tok.special['<|end|>']
    assert 'longer conversations are truncated on the left' in capsys.readouterr().out


def test_pairs_that_are_equal_after_truncation_are_skipped_and_counted(capsys):
    rows = [
        make_row('p', 'Yes, the end', 'No, the end'),     # equal within the last 6 tokens
        make_row('p', 'the end', 'the beginning'),
        make_row('p', 'same', 'same'),                    # equal at any length
    ]
    pairs = reward.prepare_pairs(rows, tok, 6)
    assert [row for _, _, row in pairs] == [rows[1]]
    assert 'skipped 2 of 3 pairs: both sides are equal' in capsys.readouterr().out

    pairs = reward.prepare_pairs(rows, tok, 32)
    assert [row for _, _, row in pairs] == rows[:2]
    assert 'skipped 1 of 3 pairs: both sides are equal' in capsys.readouterr().out


def test_a_dataset_without_different_sides_is_refused():
    with pytest.raises(ValueError, match='no pair has two different sides within block_size 6'):
        reward.prepare_pairs([make_row('p', 'Yes, the end', 'No, the end')], tok, 6)


def test_shuffled_labels_swap_half_of_the_pairs_and_lose_none():
    pairs = make_pairs(400)
    shuffled = reward.shuffle_pairs(pairs, seeded(1))
    n_swapped = 0
    for (chosen, rejected, row), (new_chosen, new_rejected, new_row) in zip(pairs, shuffled):
        assert new_row is row
        if new_chosen is rejected:
            assert new_rejected is chosen
            n_swapped += 1
        else:
            assert new_chosen is chosen and new_rejected is rejected
    assert len(shuffled) == 400 and 160 < n_swapped < 240


# -----------------------------------------------------------------------------
# Figures

def share_above(right, wrong):
    """The share of pairs, over all combinations, where right is above wrong; ties count half."""
    wins = 0.0
    for a in right:
        for b in wrong:
            if a > b:
                wins += 1
            elif a == b:
                wins += 0.5
    return wins / (len(right) * len(wrong))


def test_auc_is_the_share_of_correct_responses_above_wrong_ones():
    generator = seeded(0)
    right = torch.randint(6, (13,), generator=generator).float()
    wrong = torch.randint(6, (17,), generator=generator).float()
    assert reward.auc(right, wrong) == pytest.approx(share_above(right.tolist(), wrong.tolist()))


def test_calibration_error_is_small_for_true_probabilities_and_large_for_over_confident_ones():
    generator = seeded(0)
    d = torch.randn(20_000, generator=generator) * 2
    labels = torch.rand(20_000, generator=generator) < torch.sigmoid(d)
    assert reward.calibration_error(d, labels) < 0.015
    assert reward.calibration_error(4 * d, labels) > 0.1
    flipped = labels ^ (torch.rand(20_000, generator=generator) < 0.1)
    assert reward.calibration_error(d, flipped, flip_rate=0.1) < 0.015
    assert reward.calibration_error(d, flipped) > 0.03


def test_calibration_error_of_two_bins_equals_the_formula():
    d = torch.tensor([0.2, 0.3, 0.6, 0.9]).logit()
    labels = torch.tensor([0, 1, 1, 1])
    # The bins predict 0.25 and 0.75, and 0.5 and 1 are observed.
    assert reward.calibration_error(d, labels, bins=2) == pytest.approx((0.25 + 0.25) / 2)


def test_each_half_is_scaled_by_the_factor_that_fits_the_other_half():
    generator = seeded(0)
    d = torch.randn(8_000, generator=generator) * 2
    is_preferred = torch.rand(8_000, generator=generator) < torch.sigmoid(d)
    d = torch.where(is_preferred, d, -d)
    rows = [make_row('', '', '')] * 8_000
    zeros = torch.zeros(8_000)
    for factor in (1, 3):
        figures = reward.pair_figures(d / factor, zeros, rows)
        assert figures['calibration_error'] < 0.025
        assert figures['best_scale'] == pytest.approx(factor, rel=0.06)
    # Each half would be calibrated by its own factor, but is scaled by that of the other.
    unequal = torch.cat((d[:4000] * 2, d[4000:] / 2))
    assert reward.pair_figures(unequal, zeros, rows)['calibration_error'] > 0.1


# Four pairs and their scores; the label of the second is flipped.
FOUR_ROWS = [
    make_row('p', 'right', 'bad') | {'clean': True, 'op': 'x'},
    make_row('p', 'worse', 'right') | {'clean': False, 'op': 'x'},
    make_row('p', 'bad', 'worse') | {'clean': True, 'op': 'y'},
    make_row('p', 'right', 'wrongs') | {'clean': True, 'op': 'y'},
]
FOUR_CHOSEN = torch.tensor([2.0, 0.0, 1.0, 0.5])
FOUR_REJECTED = torch.tensor([1.0, 2.0, 0.0, 1.5])


def is_right(prompt, response):
    return float(response == 'right')


def test_figures_compare_with_the_labels_as_given_and_before_some_were_flipped():
    figures = reward.pair_figures(FOUR_CHOSEN, FOUR_REJECTED, FOUR_ROWS, is_right)
    assert figures['accuracy'] == 0.5
    assert figures['accuracy_clean'] == 0.75
    assert figures['noise_ceiling'] == 0.75
    assert figures['accuracy_one_right'] == pytest.approx(2 / 3)
    right_scores = [2.0, 2.0, 0.5]
    wrong_scores = [1.0, 0.0, 1.0, 0.0, 1.5]
    assert figures['auc'] == pytest.approx(share_above(right_scores, wrong_scores))
    # On clean labels, preferring the shorter one is wrong in the first pair; the second is a tie,
    # which counts half; it is right in the others.
    assert figures['accuracy_length_only'] == 0.625
    assert figures['best_scale'] == reward.fit_scale(torch.tensor([1.0, -2.0, 1.0, -1.0]))
    assert figures['margin/x'] == 1.5
    assert figures['margin/y'] == 0


def test_rows_without_an_op_count_in_no_margin():
    rows = [dict(row) for row in FOUR_ROWS]
    del rows[3]['op']
    figures = reward.pair_figures(FOUR_CHOSEN, FOUR_REJECTED, rows, is_right)
    assert figures['margin/y'] == 1


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_figures_that_cannot_be_computed_are_omitted(value):
    # If no response is correct, or every one, nothing can be ranked above or below.
    figures = reward.pair_figures(FOUR_CHOSEN, FOUR_REJECTED, FOUR_ROWS, lambda p, r: value)
    assert 'auc' not in figures
    assert ('accuracy_one_right' in figures) == (value == 1.0)
    assert all(math.isfinite(figure) for figure in figures.values())


# -----------------------------------------------------------------------------
# The stage

def test_it_learns_to_score_correct_responses_higher(small_reward):
    figures = final(small_reward.folder)
    assert figures['accuracy_clean'] > 0.95
    assert figures['auc'] > 0.9
    assert figures['noise_ceiling'] == 1
    assert figures['accuracy_length_only'] == 0.5
    assert 'margin/Raise' in figures
    assert losses(small_reward.folder)[0] == pytest.approx(math.log(2), abs=0.2)


def test_scores_of_the_policys_responses_have_mean_0_and_variance_1(small_sft, letters_data,
                                                                    tmp_path, monkeypatch):
    # Record the responses that the run samples to normalise the scores.
    recorded = []
    generate = GPT.generate

    def recording_generate(policy, idx, *args, **kwargs):
        out = generate(policy, idx, *args, **kwargs)
        recorded.append((policy, idx, out))
        return out

    monkeypatch.setattr(GPT, 'generate', recording_generate)
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                                out_dir=tmp_path, normalize_prompts=50)))
    (policy, idx, out), = recorded

    # They are responses of the SFT policy to the first 50 prompts of the validation pairs.
    for name, weight in weights(small_sft.folder).items():
        assert torch.equal(policy.state_dict()[name], weight), name
    user, end, assistant = [tok.special[name] for name in ('<|user|>', '<|end|>', '<|assistant|>')]
    prompts = []
    for row in read_examples(letters_data / 'pref_val.jsonl', 'preference')[:50]:
        prompts.append([user, *tok.encode(row['prompt']), end, assistant])
    assert torch.equal(idx, pad_left(prompts))

    # Their scores by the saved reward model.
    model = load_reward_model(str(tmp_path), tok)
    is_response = torch.arange(out.size(1)) >= idx.size(1)
    std, mean = torch.std_mean(model(out, is_response))
    assert abs(mean) < 1e-3
    assert std.item() == pytest.approx(1, abs=1e-3)


def test_the_final_figures_are_of_the_test_pairs_if_there_are_some(letters_data, small_base,
                                                                   tmp_path):
    shutil.copytree(letters_data, tmp_path / 'data')
    rows = read_examples(letters_data / 'pref_val.jsonl', 'preference')
    # The test pairs are the validation pairs with flipped labels, and nothing is learned.
    flipped = [row | {'chosen': row['rejected'], 'rejected': row['chosen']} for row in rows]
    write_jsonl(tmp_path / 'data' / 'pref_test.jsonl', flipped)
    run = tmp_path / 'run'
    ok(call('reward.py', *flags(FAST, **with_checker(tmp_path / 'data'), init_from=small_base,
                                out_dir=run, learning_rate=0.0, muon_lr=0.0, max_iters=1)))
    val_accuracy = read_log(str(run))[0]['accuracy']
    assert final(run)['accuracy'] == pytest.approx(1 - val_accuracy)


@pytest.mark.parametrize('loss', ['bt', 'margin', 'bt_margin'])
def test_16_pairs_can_be_memorised(loss, letters_data, small_base, tmp_path):
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=small_base,
                                out_dir=tmp_path, max_pairs=16, batch_size=16, max_iters=60,
                                eval_interval=60, loss=loss, optimizer='adamw',
                                learning_rate=3e-3, causal=True)))
    last = [record['train_accuracy'] for record in read_log(str(tmp_path))
            if record.get('step', 0) > 50 and 'train_accuracy' in record]
    assert last == [1.0] * 9


def test_shuffled_labels_teach_nothing(letters_data, small_base, small_reward, tmp_path):
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=small_base,
                                out_dir=tmp_path, shuffle_labels=True, max_iters=60,
                                batch_size=32, eval_interval=60)))
    # Every pair is used once, so the accuracy on 60 * 32 new pairs stays at 0.5.
    train_accuracy = [record['train_accuracy'] for record in read_log(str(tmp_path))
                      if 'train_accuracy' in record]
    assert len(train_accuracy) == 60
    assert abs(sum(train_accuracy) / 60 - 0.5) < 0.05
    # The differences of the scores stay small beside those learned from true labels. (Their sign
    # is the same for almost all pairs, because all wrong responses contain the letter G.)
    for op in ('Raise', 'Up', 'Now'):
        learned = final(small_reward.folder)[f'margin/{op}']
        assert abs(final(tmp_path)[f'margin/{op}']) < 0.1 * learned


def test_dpo_trains_the_policy_itself(letters_data, small_sft, tmp_path):
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=small_sft.folder,
                                out_dir=tmp_path, loss='dpo', causal=True, max_iters=40,
                                batch_size=32, eval_interval=40, muon_lr=2e-3)))
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert final(tmp_path)['accuracy_clean'] > 0.9
    # The result is a language model, which can be sampled.
    assert ok(call('sample.py', '--device=cpu', f'--out_dir={tmp_path}', '--max_new_tokens=4'))


def test_a_resumed_run_continues_bit_for_bit(letters_data, small_sft, tmp_path):
    settings = flags(FAST, **with_checker(letters_data), init_from=small_sft.folder)
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(call('reward.py', *settings, f'--out_dir={whole}'))
    expected = weights(whole)
    assert expected['scale'] != 1

    # Resuming a run that has ended changes nothing.
    ok(call('reward.py', *flags(init_from='resume', out_dir=whole, **checker_again(letters_data))))
    for name, weight in weights(whole).items():
        assert torch.equal(weight, expected[name]), name

    # An error after the last step, here in the normalisation of the scores, loses nothing.
    script = ("import runpy, sample\n"
              "sample.encode_prompts = None\n"
              "runpy.run_path('reward.py', run_name='__main__')\n")
    (tmp_path / 'script.py').write_text(script, encoding='utf-8')
    result = finish(start(tmp_path / 'script.py', *settings, f'--out_dir={half}',
                          env={'PYTHONPATH': ROOT}))
    assert result.returncode == 1 and 'TypeError' in result.stderr, result.stderr
    assert load_checkpoint(str(half))['step'] == 4

    # Resumed from the checkpoint of step 2, the run ends with the same weights.
    shutil.copyfile(half / 'ckpt_prev.pt', half / 'ckpt.pt')
    assert load_checkpoint(str(half))['step'] == 2
    ok(call('reward.py', *flags(init_from='resume', out_dir=half, **checker_again(letters_data))))
    resumed = weights(half)
    assert resumed.keys() == expected.keys()
    for name, weight in resumed.items():
        assert torch.equal(weight, expected[name]), name


def test_a_resumed_run_of_dpo_finds_its_reference_by_reference_dir_if_it_was_moved(
        letters_data, small_sft, tmp_path):
    settings = flags(FAST, **with_checker(letters_data), loss='dpo', causal=True,
                     lr_schedule='constant')
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(call('reward.py', *settings, f'--init_from={small_sft.folder}', f'--out_dir={whole}'))
    shutil.copytree(small_sft.folder, tmp_path / 'sft')
    settings.remove('--max_iters=4')
    ok(call('reward.py', *settings, f'--init_from={tmp_path / "sft"}', f'--out_dir={half}',
            '--max_iters=2'))
    (tmp_path / 'sft').rename(tmp_path / 'moved')

    # Without the setting the missing folder is named; with it the run ends with the same weights.
    resume = flags(init_from='resume', out_dir=half, max_iters=4, **checker_again(letters_data))
    message = one_line(call('reward.py', *resume))
    assert f'{tmp_path}/sft: ' in message and '--reference_dir' in message
    ok(call('reward.py', *resume, f'--reference_dir={tmp_path / "moved"}'))
    expected = weights(whole)
    for name, weight in weights(half).items():
        assert torch.equal(weight, expected[name]), name
    assert final(half)['accuracy'] == final(whole)['accuracy']


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
@pytest.mark.parametrize('script', ['sft.py', 'reward.py'])
def test_a_compiled_run_has_the_losses_of_an_eager_run(script, letters_data, small_sft, tmp_path):
    found = {}
    for compiles in (False, True):
        run = tmp_path / str(compiles)
        ok(call(script, *flags(CPU, dataset=letters_data, init_from=small_sft.folder, out_dir=run,
                               log_interval=1, compile=compiles, max_iters=5, batch_size=4,
                               gradient_accumulation_steps=3, optimizer='adamw')))
        found[compiles] = losses(run)
    assert len(found[True]) == 5
    assert found[True] == pytest.approx(found[False], rel=1e-3)


def test_check_prints_one_line_per_sanity_check(letters_data, small_reward, small_sft, tmp_path):
    # Every tenth label is flipped. What the model memorises are the labels as given.
    for split in ('train', 'val'):
        rows = read_examples(letters_data / f'pref_{split}.jsonl', 'preference')
        for row in rows[::10]:
            row['chosen'], row['rejected'] = row['rejected'], row['chosen']
            row['clean'] = False
        write_jsonl(tmp_path / f'pref_{split}.jsonl', rows)
    result = call('reward.py', *flags(CPU, dataset=tmp_path, init_from=small_sft.folder,
                                      out_dir=small_reward.folder, check=True, learning_rate=3e-3,
                                      **checker_again(letters_data)))
    output = result.stdout + result.stderr
    lines = [line for line in result.stdout.splitlines() if line[:6] in ('ok    ', 'FAILED')]
    assert len(lines) == 7, output
    assert re.match(r'ok +16 pairs .*: accuracy 1\.00', lines[2]), output
    assert all(line.startswith('ok') for line in lines[:3]), output
    n_failed = sum(line.startswith('FAILED') for line in lines)
    assert result.returncode == (1 if n_failed else 0), output


def test_each_sanity_check_notices_the_fault_that_it_is_for(letters_data, small_sft):
    policy, tok = load_chat_model(str(small_sft.folder), {})
    with_dropout, _ = load_chat_model(str(small_sft.folder), {'dropout': 0.1})
    pairs = []
    for split in ('train', 'val'):
        rows = read_examples(letters_data / f'pref_{split}.jsonl', 'preference')
        pairs.append(reward.prepare_pairs(rows, tok, 32))
    verdicts = list(break_reward_model.break_code(policy, with_dropout, *pairs))
    for fault, (ok, message), _ in verdicts[:3]:
        assert ok, (fault, message)
    for fault, _, (ok, message) in verdicts:
        assert not ok, (fault, message)


@pytest.mark.parametrize('figure, value, broken', [
    ('accuracy_length_only', 0.9, 'length-only baseline'),
    ('score_std', 0.05, 'its scores differ'),
    ('calibration_error', 0.2, 'they are calibrated')])
def test_the_checks_of_a_trained_model_fail_for_a_figure_that_is_too_bad(figure, value, broken):
    figures = {'accuracy_clean': 0.95, 'accuracy_length_only': 0.5, 'score_std': 1.0,
               'calibration_error': 0.02}
    assert all(ok for ok, _ in reward.check_figures(figures))
    verdicts = reward.check_figures({**figures, figure: value})
    assert [broken in message for ok, message in verdicts if not ok] == [True]


def test_check_uses_the_causal_setting_of_the_run(letters_data, small_base, tmp_path):
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=small_base,
                                out_dir=tmp_path, causal=True, max_iters=30)))
    result = call('reward.py', *flags(check=True, out_dir=tmp_path, **checker_again(letters_data)))
    assert 'check:' not in result.stdout
    expected = f"length-only baseline: accuracy {final(tmp_path)['accuracy_clean']:.3f}"
    assert expected in result.stdout, result.stdout + result.stderr


def test_the_encoder_of_a_windowed_model_sees_everything_and_can_be_loaded(letters_data, small_base,
                                                                           tmp_path):
    checkpoint = load_checkpoint(str(small_base))
    checkpoint['model_args'] |= dict(window=8, n_sink=2)
    save_checkpoint(str(tmp_path / 'base'), checkpoint)
    ok(call('reward.py', *flags(FAST, **with_checker(letters_data), init_from=tmp_path / 'base',
                                out_dir=tmp_path / 'run')))
    config = load_reward_model(str(tmp_path / 'run'), tok).trunk.config
    assert (config.causal, config.window, config.n_sink) == (False, 0, 0)


def test_a_windowed_model_becomes_an_encoder_in_which_all_tokens_see_each_other():
    torch.manual_seed(0)
    policy = GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32, window=4, n_sink=1))
    model, reference = reward.make_models(policy, 'bt', causal=False, seed=1, device='cpu')
    assert reference is None
    idx = torch.arange(20)[None]
    other = idx.clone()
    other[0, -1] = 99
    # The last token changes the hidden state of the first.
    assert not torch.allclose(model.trunk.hidden(idx)[0, 0], model.trunk.hidden(other)[0, 0])
    assert policy.config.window == 4 and policy.config.causal


@pytest.mark.parametrize('args, message', [
    (['--loss=hinge'], "loss must be one of 'bt', 'margin', 'bt_margin', 'dpo'; got 'hinge'"),
    (['--loss=dpo'], 'loss=dpo trains a policy, which is causal; add --causal=True'),
    (['--flip_rate=0.5'], 'below 0.5; got 0.5'),
    (['--normalize_prompts=0'], 'normalize_prompts must be at least 1'),
])
def test_a_mistake_is_one_line(args, message, letters_data, small_base, tmp_path):
    key = args[0].removeprefix('--').split('=')[0]
    settings = {name: value for name, value in FAST.items() if name != key}
    settings = flags(settings, **with_checker(letters_data), init_from=small_base, out_dir=tmp_path)
    assert message in one_line(call('reward.py', *settings, *args))


def test_bt_margin_is_refused_if_the_pairs_have_no_margin(letters_data, small_base, tmp_path):
    for split in ('train', 'val'):
        rows = read_examples(letters_data / f'pref_{split}.jsonl', 'preference')[:20]
        for row in rows:
            del row['margin']
        write_jsonl(tmp_path / f'pref_{split}.jsonl', rows)
    message = one_line(call('reward.py', *flags(FAST, dataset=tmp_path, init_from=small_base,
                                                out_dir=tmp_path / 'run', loss='bt_margin')))
    assert 'needs pairs with a margin' in message
    assert load_gold(str(tmp_path)) is None


def test_a_log_never_contains_a_figure_that_cannot_be_computed(letters_data, small_base, tmp_path):
    shutil.copytree(letters_data, tmp_path / 'data')
    script = 'def gold(prompt, response):\n    return 0.0, 0.0\n'  # no response is correct
    (tmp_path / 'data' / 'checker.py').write_text(script, encoding='utf-8')
    run = tmp_path / 'run'
    ok(call('reward.py', *flags(FAST, **with_checker(tmp_path / 'data'), init_from=small_base,
                                out_dir=run, max_iters=1)))
    *records, last = read_log(str(run))
    for record in [*records, last['final']]:
        assert None not in record.values(), record
        assert 'auc' not in record and 'accuracy_one_right' not in record


def test_two_ranks_have_the_losses_of_one(letters_data, small_sft, tmp_path):
    settings = flags(CPU, **with_checker(letters_data), init_from=small_sft.folder,
                     optimizer='adamw', max_iters=3, warmup_iters=1, batch_size=8, eval_interval=3,
                     log_interval=1, gradient_accumulation_steps=2, normalize_prompts=8,
                     max_new_tokens=4)
    one = tmp_path / 'one'
    two = tmp_path / 'two'
    ok(call('reward.py', *settings, f'--out_dir={one}'))
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                    'reward.py', *settings, f'--out_dir={two}')))
    assert len(losses(one)) == 3
    assert losses(one) == pytest.approx(losses(two), abs=1e-4)
