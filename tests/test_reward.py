"""The reward model: its losses against closed forms, its scores against padding, and the stage as its user runs it."""
import itertools
import json
import math
import random
import shutil

import pytest
import torch

import reward
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, rng, save_checkpoint
from conftest import CPU, call, finish, flags, letters, ok, one_line, start
from data.answers import auc, calibration_error, fit_scale, log_choice, pad_left, pair_figures, tamper
from data.dataset import load_gold, read_jsonl
from data.pretrained import load_model, load_reward_model
from model import GPT, GPTConfig, RewardModel

tok = Tokenizer.byte()
FAST = dict(CPU, max_iters=4, batch_size=8, gradient_accumulation_steps=1, log_interval=1, eval_interval=2, max_new_tokens=4,
            normalize_prompts=8)


def judge(causal=False, **more):
    torch.manual_seed(0)
    model = RewardModel(GPT(GPTConfig(**{**dict(block_size=32, n_layer=2, n_head=2, n_embd=32, causal=causal), **more})))
    torch.nn.init.normal_(model.head.proj.weight)
    return model


def pairs(n, seed=0, block_size=32):
    rows = [{'prompt': p, 'chosen': right, 'rejected': wrong} for p, right, _, wrong in letters(n, seed)]
    return reward.prepare_pairs(rows, tok, block_size)


def final(folder):
    return read_log(str(folder))[-1]['final']


# -----------------------------------------------------------------------------
# Losses

def test_losses_are_the_formulas_written_out():
    a, b, m = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.5, 0.0, 0.5]), torch.tensor([0.1, 0.2, 0.3])
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    d = [0.5, -1.0, 0.0]
    mean = lambda values: pytest.approx(sum(values) / 3, rel=1e-6)
    assert reward.pairwise_loss(a, b).item() == mean([-math.log(sigmoid(x)) for x in d])
    assert reward.pairwise_loss(a, b, 'margin').item() == mean([max(0, 1 - x) for x in d])
    assert reward.pairwise_loss(a, b, 'margin', 0.25).item() == mean([max(0, 0.25 - x) for x in d])
    assert reward.pairwise_loss(a, b, 'bt_margin', m).item() == mean([
        -math.log(sigmoid(x - y)) for x, y in zip(d, (0.1, 0.2, 0.3))])
    for kind, shifts in (('bt', (0, 0, 0)), ('bt_margin', (0.1, 0.2, 0.3))):  # a choice is as meant, or it is turned round
        assert reward.pairwise_loss(a, b, kind, m, flip_rate=0.1).item() == mean([
            -math.log(0.9 * sigmoid(x - y) + 0.1 * sigmoid(y - x)) for x, y in zip(d, shifts)])


@pytest.mark.parametrize('flip_rate', [0.0, 0.2])
def test_a_pair_that_is_far_apart_has_a_finite_loss_and_no_pull_where_it_may_have_been_flipped(flip_rate):
    d = torch.tensor([300.0, -300.0], requires_grad=True)
    loss = -log_choice(d, flip_rate)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-math.log(1 - flip_rate), -math.log(flip_rate) if flip_rate else 300.0])
    assert d.grad.tolist() == pytest.approx([0, 0 if flip_rate else -1], abs=1e-6)


def test_the_scale_that_fits_is_the_one_that_scores_were_spoiled_by():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(40_000, generator=generator) * 3
    for flip_rate in (0.0, 0.1):
        choices = torch.rand(len(d), generator=generator) < log_choice(d, flip_rate).exp()
        d = torch.where(choices, d, -d)  # of chosen and rejected
        for factor in (0.5, 1.0, 3.0):
            assert fit_scale(d / factor, flip_rate) == pytest.approx(factor, rel=0.06)
    assert fit_scale(torch.ones(3)) == 8 and fit_scale(-torch.ones(3)) == 0.125


def test_bradley_terry_is_ln_2_for_equal_scores_with_the_gradient_of_its_closed_form():
    a, b = torch.zeros(4, requires_grad=True), torch.zeros(4)
    loss = reward.pairwise_loss(a, b)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and torch.allclose(a.grad, torch.full((4,), -0.5 / 4))
    far = torch.tensor([1000.0, -1000.0])
    assert torch.isfinite(reward.pairwise_loss(far, -far))


@pytest.mark.parametrize('kind, margin', [('bradley', None), ('bt_margin', None)])
def test_a_loss_that_is_not_there_is_named(kind, margin):
    with pytest.raises(ValueError, match=f"got '{kind}'"):
        reward.pairwise_loss(torch.zeros(1), torch.zeros(1), kind, margin)


def test_the_implicit_reward_of_dpo_is_the_log_ratio_of_the_responses_token_by_token():
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)) for _ in range(2))
    batch = pairs(3)
    idx, mask, _ = reward.get_batch(batch)
    got = reward.score(policy, reference, idx, mask)
    for row, (ids, counts) in enumerate([*(p[0] for p in batch), *(p[1] for p in batch)]):
        total = 0.0
        for t in range(1, len(ids)):
            if counts[t]:
                total += sum(sign * model(ids[None, :t])[0][0, -1].log_softmax(-1)[ids[t]].item()
                             for sign, model in ((1, policy), (-1, reference)))
        assert got[row].item() == pytest.approx(reward.dpo_beta * total, abs=1e-4)
    same = reward.score(policy, policy, idx, mask)
    assert reward.pairwise_loss(*same.chunk(2)).item() == pytest.approx(math.log(2), abs=1e-6)


# -----------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('pos', ['rope', 'learned'])
def test_any_padding_gives_the_same_score(causal, pos):
    model = judge(causal, pos=pos)
    ids = [torch.tensor(row) for row in ([5, 6, 7], [9], [4, 3, 2, 1, 8])]
    alone = torch.cat([model(row[None]) for row in ids])
    for left, right in ((0, 0), (3, 0), (0, 4), (2, 5)):
        T = 5 + left + right
        idx = torch.full((3, T), -1)
        for i, row in enumerate(ids):
            begin = left if right else T - len(row) - right
            idx[i, begin:begin + len(row)] = row
        assert torch.allclose(model(idx), alone, atol=1e-5)
    assert alone.std() > 0.01


def test_an_encoder_reads_all_tokens_and_a_decoder_its_last():
    ids = torch.tensor([[5, 6, 7, 8]])
    for causal in (False, True):
        model = judge(causal)
        h = model.trunk.hidden(ids)[0]
        expected = model.head.proj(h[-1] if causal else h.mean(0))
        assert torch.allclose(model(ids), expected, atol=1e-6)
    assert not torch.allclose(judge(False).trunk.hidden(ids)[0, 0], judge(False).trunk.hidden(ids[:, :1])[0, 0])


def test_an_encoder_with_a_mask_reads_the_mean_of_the_answer_alone_but_sees_the_prompt():
    model = judge()
    idx, mask, _ = reward.get_batch(pairs(5))
    scores = model(idx, mask)
    for row, m, got in zip(idx, mask, scores):
        h = model.trunk.hidden(row[row >= 0][None])[0]
        assert got.item() == pytest.approx(model.head.proj(h[m[row >= 0] > 0].mean(0)).item(), abs=1e-5)
    other = torch.where((idx > 0) & (mask == 0) & (idx < 256), 65, idx)
    assert not torch.allclose(model(other, mask), scores, atol=1e-4)


def test_a_decoder_reads_the_last_token_of_the_answer_whatever_the_mask():
    model = judge(True)
    idx, mask, _ = reward.get_batch(pairs(5))
    assert torch.equal(model(idx, mask), model(idx))


def test_tampering_replaces_answer_tokens_of_the_chosen_alone_half_of_them_by_a_blank():
    idx, mask, _ = reward.get_batch(pairs(400))
    more, read, targets = tamper(idx, mask, 260, rng(1))
    assert torch.equal(more[:800], idx) and torch.equal(read[:800], mask) and torch.equal(read[800:], mask[:400])
    assert (targets[:800] == -1).all()
    chosen, noisy, own, targets, hit = idx[:400], more[800:], mask[:400] > 0, targets[800:], targets[800:] >= 0
    assert (own | ~hit).all() and torch.equal(noisy[~hit], chosen[~hit]) and torch.equal(targets[hit], chosen[hit])
    share, blank = hit.sum() / own.sum(), (noisy[hit] == 260).float().mean()
    assert abs(share - 0.4) < 0.06 and abs(blank - 0.5) < 0.08
    assert set(noisy[hit].tolist()) <= {260, *chosen[own].tolist()} and (noisy[hit] != chosen[hit]).float().mean() > 0.6
    assert torch.equal(tamper(idx, mask, 260, rng(1))[0], more) and not torch.equal(tamper(idx, mask, 260, rng(2))[0], more)


def test_restoring_is_scored_by_the_cross_entropy_of_what_stood_there_and_leaves_the_scores_alone():
    model = judge()
    idx, mask, _ = reward.get_batch(pairs(6))
    more, read, targets = tamper(idx, mask, 260, rng(1))
    scores, restored = model(more, read, targets)
    assert torch.allclose(scores[:12], model(idx, mask), atol=1e-5)
    total = 0.0
    for row, target in zip(more[12:], targets[12:]):
        logp = model.trunk.lm_head(model.trunk.hidden(row[row >= 0][None])[0]).log_softmax(-1)
        total -= sum(logp[t, target[t]].item() for t in range(len(logp)) if target[t] >= 0)
    assert restored.item() == pytest.approx(total / (targets >= 0).sum().item(), rel=1e-5)


def test_swapping_a_pair_negates_the_difference():
    model, batch = judge(), pairs(5)
    d = [model(reward.get_batch(p)[0]).chunk(2) for p in (batch, [(b, a, row) for a, b, row in batch])]
    assert torch.allclose(d[0][0] - d[0][1], d[1][1] - d[1][0], atol=1e-6)


def test_long_pairs_are_cut_on_the_left_for_they_differ_at_their_end(capsys):
    (a, _), (b, _), _ = pairs(1, block_size=6)[0]
    assert len(a) == len(b) == 6 and a.tolist() != b.tolist() and a[-1] == tok.special['<|end|>']
    assert 'longer ones are cut on the left' in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Measures

def test_auc_is_the_share_of_right_answers_above_wrong_ones():
    generator = torch.Generator().manual_seed(0)
    right, wrong = (torch.randint(6, (n,), generator=generator).float() for n in (13, 17))
    by_hand = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong) / (13 * 17)
    assert auc(right, wrong) == pytest.approx(by_hand.item())


def test_calibration_error_is_small_where_probabilities_are_true_and_large_where_they_boast():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(20_000, generator=generator) * 2
    labels = torch.rand(20_000, generator=generator) < torch.sigmoid(d)
    assert calibration_error(d, labels) < 0.015 and calibration_error(4 * d, labels) > 0.1
    flipped = labels ^ (torch.rand(20_000, generator=generator) < 0.1)
    assert calibration_error(d, flipped, flip_rate=0.1) < 0.015 and calibration_error(d, flipped) > 0.03
    # written out for two bins: probabilities .2 .3 | .6 .9, outcomes 0 1 | 1 1
    p = torch.tensor([.2, .3, .6, .9])
    assert calibration_error(p.logit(), torch.tensor([0, 1, 1, 1]), bins=2) == pytest.approx((.25 + .25) / 2)


def test_calibration_is_of_scores_scaled_by_what_fits_the_other_half():
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(8_000, generator=generator) * 2
    chosen = torch.rand(8_000, generator=generator) < torch.sigmoid(d)
    d, rows = torch.where(chosen, d, -d), [{'prompt': '', 'chosen': '', 'rejected': ''}] * 8_000
    for timid in (1, 3):
        figures = pair_figures(d / timid, torch.zeros(8_000), rows)
        assert figures['calibration_error'] < 0.025 and figures['best_scale'] == pytest.approx(timid, rel=0.06)
    halves = torch.cat((d[:4000] * 2, d[4000:] / 2))  # each would be right at its own scale, and is taken at the other's
    assert pair_figures(halves, torch.zeros(8_000), rows)['calibration_error'] > 0.1


def test_figures_are_against_the_labels_as_given_and_as_they_were_before_some_were_flipped():
    rows = [{'prompt': 'p', 'chosen': c, 'rejected': r, 'clean': clean, 'op': op} for c, r, clean, op in (
        ('right', 'bad', True, 'x'), ('worse', 'right', False, 'x'), ('bad', 'worse', True, 'y'), ('right', 'wrongs', True, 'y'))]
    gold = lambda prompt, said: (float(said == 'right'), 0)
    figures = pair_figures(torch.tensor([2.0, 0.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.0, 1.5]), rows, gold)
    assert figures['accuracy'] == 0.5 and figures['accuracy_clean'] == 0.75 and figures['noise_ceiling'] == 0.75
    assert figures['accuracy_one_right'] == pytest.approx(2 / 3)
    right, wrong = [2.0, 2.0, 0.5], [1.0, 0.0, 1.0, 0.0, 1.5]
    assert figures['auc'] == pytest.approx(sum(a > b for a in right for b in wrong) / 15)
    assert figures['accuracy_length_only'] == 0.625  # shorter is better: 0 for the first, 0.5 for a tie, 1, 1
    assert figures['best_scale'] == fit_scale(torch.tensor([1.0, -2.0, 1.0, -1.0]))
    assert figures['margin/x'] == 1.5 and figures['margin/y'] == 0
    del rows[3]['op']
    assert pair_figures(torch.tensor([2.0, 0.0, 1.0, 0.5]), torch.tensor([1.0, 2.0, 0.0, 1.5]), rows, gold)['margin/y'] == 1


# -----------------------------------------------------------------------------
# The stage

def test_it_learns_to_tell_right_from_wrong(small_reward):
    figures = final(small_reward.folder)
    assert figures['accuracy_clean'] > 0.95 and figures['auc'] > 0.9 and figures['noise_ceiling'] == 1
    assert figures['accuracy_length_only'] == 0.5 and 'margin/Raise' in figures
    assert read_log(str(small_reward.folder))[1]['loss'] == pytest.approx(math.log(2), abs=0.2)


def test_scores_have_mean_0_and_variance_1_on_answers_of_the_policy(small_sft, small_reward, letters_data):
    config = load_checkpoint(str(small_reward.folder))['config']
    policy, tok = load_model(str(small_sft.folder), {})
    model = load_reward_model(str(small_reward.folder), tok)
    rows = read_jsonl(letters_data / 'pref_val.jsonl', 'preference')
    end = tok.special['<|end|>']
    prompts = [[tok.special['<|user|>'], *tok.encode(r['prompt']), end, tok.special['<|assistant|>']] for r in rows]
    answers = policy.generate(pad_left(prompts), 8, stop=[end], generator=rng(config['seed'], 150))
    own = torch.arange(answers.size(1)) >= max(map(len, prompts))
    std, mean = torch.std_mean(model(answers, own))
    assert abs(mean) < 1e-3 and std.item() == pytest.approx(1, abs=1e-3)


def test_the_final_figures_are_of_the_test_pairs_where_there_are_some(letters_data, small_base, tmp_path):
    shutil.copytree(letters_data, tmp_path / 'data')
    rows = read_jsonl(letters_data / 'pref_val.jsonl', 'preference')
    with open(tmp_path / 'data/pref_test.jsonl', 'w', encoding='utf-8') as f:  # the same pairs, turned round
        f.writelines(json.dumps(row | {'chosen': row['rejected'], 'rejected': row['chosen']}) + '\n' for row in rows)
    ok(call('reward.py', *flags(FAST, dataset=tmp_path / 'data', init_from=small_base, out_dir=tmp_path / 'run',
                                learning_rate=0.0, muon_lr=0.0, max_iters=1)))
    assert final(tmp_path / 'run')['accuracy'] == pytest.approx(1 - read_log(str(tmp_path / 'run'))[0]['accuracy'])


@pytest.mark.parametrize('loss', ['bt', 'margin', 'bt_margin'])
def test_16_pairs_are_learned_by_heart(loss, letters_data, small_base, tmp_path):
    ok(call('reward.py', *flags(FAST, dataset=letters_data, init_from=small_base, out_dir=tmp_path, max_pairs=16, batch_size=16,
                                max_iters=60, eval_interval=60, loss=loss, optimizer='adamw', learning_rate=3e-3, causal=True)))
    assert sum(r['train_accuracy'] for r in read_log(str(tmp_path)) if r.get('step', 0) > 50 and 'train_accuracy' in r) == 9


def test_shuffled_labels_teach_nothing(letters_data, small_base, tmp_path):
    ok(call('reward.py', *flags(FAST, dataset=letters_data, init_from=small_base, out_dir=tmp_path, shuffle_labels=True,
                                max_iters=60, batch_size=32, eval_interval=60)))
    assert 0.3 < final(tmp_path)['accuracy_clean'] < 0.7  # 60 pairs; the proof has 2,000


def test_dpo_trains_the_policy_itself(letters_data, small_sft, tmp_path):
    ok(call('reward.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, loss='dpo', causal=True,
                                max_iters=40, batch_size=32, eval_interval=40, muon_lr=2e-3)))
    first = next(r for r in read_log(str(tmp_path)) if 'loss' in r)
    assert first['loss'] == pytest.approx(math.log(2), abs=1e-5)
    assert final(tmp_path)['accuracy_clean'] > 0.9
    assert ok(call('sample.py', '--device=cpu', f'--out_dir={tmp_path}', '--max_new_tokens=4'))  # it speaks


def test_a_stopped_run_goes_on_bit_for_bit(letters_data, small_sft, tmp_path, monkeypatch):
    how = flags(FAST, dataset=letters_data, init_from=small_sft.folder)
    ok(call('reward.py', *how, f'--out_dir={tmp_path / "whole"}'))
    done = load_checkpoint(str(tmp_path / 'whole'))['model']
    ok(call('reward.py', '--init_from=resume', f'--out_dir={tmp_path / "whole"}'))  # it had ended: nothing changes
    assert all(torch.equal(weight, done[key]) for key, weight in load_checkpoint(str(tmp_path / 'whole'))['model'].items())
    monkeypatch.setattr('data.answers.score_moments', None)
    assert call('reward.py', *how, f'--out_dir={tmp_path / "half"}').returncode == 1  # what fails at the end loses nothing
    monkeypatch.undo()
    assert load_checkpoint(str(tmp_path / 'half'))['step'] == 4
    (tmp_path / 'half' / 'ckpt.pt').write_bytes((tmp_path / 'half' / 'ckpt_prev.pt').read_bytes())
    assert load_checkpoint(str(tmp_path / 'half'))['step'] == 2
    ok(call('reward.py', '--init_from=resume', f'--out_dir={tmp_path / "half"}'))
    a, b = (load_checkpoint(str(tmp_path / name))['model'] for name in ('whole', 'half'))
    assert all(torch.equal(a[key], b[key]) for key in a) and a['scale'] != 1


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile wants a C++ compiler')
@pytest.mark.parametrize('script', ['sft.py', 'reward.py'])
def test_a_compiled_run_is_the_eager_one_on_batches_of_any_length(script, letters_data, small_sft, tmp_path):
    losses = {}
    for compiles in (False, True):
        ok(call(script, *flags(CPU, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path / str(compiles), log_interval=1,
                               compile=compiles, max_iters=5, batch_size=4, gradient_accumulation_steps=3, optimizer='adamw')))
        losses[compiles] = [r['loss'] for r in read_log(tmp_path / str(compiles)) if 'loss' in r]
    assert len(losses[True]) == 5 and losses[True] == pytest.approx(losses[False], rel=1e-3)


def test_the_checks_give_a_verdict_a_line(letters_data, small_reward, small_sft, tmp_path):
    for split in ('train', 'val'):  # every tenth label is turned round: what is learned by heart is the label as given
        with open(letters_data / f'pref_{split}.jsonl', encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
        with open(tmp_path / f'pref_{split}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(r if i % 10 else r | dict(chosen=r['rejected'], rejected=r['chosen'], clean=False)) + '\n'
                         for i, r in enumerate(rows))
    made = call('reward.py', *flags(CPU, dataset=tmp_path, init_from=small_sft.folder, out_dir=small_reward.folder, check=True,
                                    learning_rate=3e-3))
    lines = [line for line in made.stdout.splitlines() if line[:6] in ('ok    ', 'FAILED')]
    assert len(lines) == 7 and 'by heart: accuracy 1.00' in made.stdout, made.stdout + made.stderr
    assert all(line.startswith('ok') for line in lines[:3])


def test_a_decoder_is_checked_as_the_decoder_it_is(letters_data, small_base, tmp_path):
    ok(call('reward.py', *flags(FAST, dataset=letters_data, init_from=small_base, out_dir=tmp_path, causal=True, max_iters=30)))
    made = call('reward.py', '--check=True', f'--out_dir={tmp_path}')
    assert f"length alone: accuracy {final(tmp_path)['accuracy_clean']:.3f}" in made.stdout, made.stdout + made.stderr


def test_an_encoder_of_a_windowed_model_sees_all_and_can_be_loaded(letters_data, small_base, tmp_path):
    checkpoint = load_checkpoint(str(small_base))
    checkpoint['model_args'] |= dict(window=8, n_sink=2)
    save_checkpoint(str(tmp_path / 'base'), checkpoint)
    ok(call('reward.py', *flags(FAST, dataset=letters_data, init_from=tmp_path / 'base', out_dir=tmp_path / 'run')))
    config = load_reward_model(str(tmp_path / 'run'), tok).trunk.config
    assert (config.causal, config.window, config.n_sink) == (False, 0, 0)


@pytest.mark.parametrize('args, message', [
    (['--loss=hinge'], "got 'hinge'"), (['--loss=dpo'], 'causal must be one of True; got False'),
    (['--flip_rate=0.5'], 'below 0.5; got 0.5'), (['--normalize_prompts=0'], 'normalize_prompts must be at least 1')])
def test_mistakes_are_one_line(args, message, letters_data, small_base, tmp_path):
    how = {k: v for k, v in FAST.items() if k != 'normalize_prompts'}
    assert message in one_line(call('reward.py', *flags(how, dataset=letters_data, init_from=small_base, out_dir=tmp_path), *args))


def test_pairs_without_margins_cannot_be_learned_with_them(letters_data, small_base, tmp_path):
    for split in ('train', 'val'):
        rows = read_jsonl(letters_data / f'pref_{split}.jsonl', 'preference')[:20]
        with open(tmp_path / f'pref_{split}.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps({k: r[k] for k in ('prompt', 'chosen', 'rejected')}) + '\n' for r in rows)
    said = one_line(call('reward.py', *flags(FAST, dataset=tmp_path, init_from=small_base, out_dir=tmp_path, loss='bt_margin')))
    assert "needs pairs with a margin" in said and load_gold(str(tmp_path)) is None


def test_two_ranks_learn_what_one_learns(letters_data, small_sft, tmp_path):
    how = flags(CPU, dataset=letters_data, init_from=small_sft.folder, optimizer='adamw', max_iters=3, warmup_iters=1, batch_size=8,
                eval_interval=3, log_interval=1, gradient_accumulation_steps=2, normalize_prompts=8, max_new_tokens=4)
    ok(call('reward.py', *how, f'--out_dir={tmp_path / "one"}'))
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'reward.py', *how,
                    f'--out_dir={tmp_path / "two"}')))
    one, two = ([r['loss'] for r in read_log(str(tmp_path / name)) if 'train_accuracy' in r] for name in ('one', 'two'))
    assert one == pytest.approx(two, abs=1e-4) and len(one) == 3
