"""PPO: its parts against slow references, what is masked, and the stage as its user runs it."""
import json
import math
import random

import numpy as np
import pytest
import torch

import ppo
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, save_checkpoint
from conftest import CPU, call, finish, flags, ok, one_line, start
from data.dataset import read_jsonl
from data.pretrained import load_chat_model, load_reward_model
from model import GPT, GPTConfig

tok = Tokenizer.byte()
end = tok.special['<|end|>']


def policy(separate_critic=False, **more):
    torch.manual_seed(0)
    made = ppo.Policy(GPT(GPTConfig(**{**dict(block_size=32, n_layer=2, n_head=2, n_embd=32), **more})), separate_critic)
    torch.nn.init.normal_(made.value_head.proj.weight)
    return made.eval()


def ragged_mask(B, T, seed=0):
    """Rows of a prompt, an answer, and nothing."""
    rng, mask = random.Random(seed), torch.zeros(B, T)
    for row in mask:
        begin = rng.randrange(T - 1)
        row[begin:rng.randrange(begin + 1, T + 1)] = 1
    return mask


# -----------------------------------------------------------------------------
# The parts

@pytest.mark.parametrize('gamma, lam', [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_sum_written_out(gamma, lam):
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(6, 9), torch.randn(6, 9), ragged_mask(6, 9)
    advantages, returns = ppo.compute_gae(rewards * mask, values, mask, gamma, lam)
    for b in range(6):
        where = mask[b].nonzero()[:, 0].tolist()
        r, v = rewards[b, where].tolist(), values[b, where].tolist() + [0.0]  # the value after the end is 0
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        expected = [sum((gamma * lam) ** l * delta[t + l] for l in range(len(r) - t)) for t in range(len(r))]
        assert advantages[b, where].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[b, where].tolist() == pytest.approx([a + x for a, x in zip(expected, v)], abs=1e-5)
    assert (advantages * (1 - mask)).abs().max() == 0 and (returns * (1 - mask)).abs().max() == 0


def test_what_stands_after_the_end_moves_no_advantage():
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(6, 9), torch.randn(6, 9), ragged_mask(6, 9)
    other = torch.where(mask > 0, values, 100.0)
    for a, b in zip(ppo.compute_gae(rewards * mask, values, mask, 1, 0.9), ppo.compute_gae(rewards * mask, other, mask, 1, 0.9)):
        assert torch.equal(a, b)


def test_whitening_is_over_real_tokens():
    torch.manual_seed(0)
    x, mask = torch.randn(5, 7) * 3 + 2, ragged_mask(5, 7)
    real, white = x[mask > 0].numpy(), ppo.whiten(x, mask)
    assert np.allclose(white[mask > 0], (real - real.mean()) / real.std(), atol=1e-5) and (white * (1 - mask)).abs().max() == 0
    kept = ppo.whiten(x, mask, keep_mean=True)[mask > 0].numpy()
    assert kept.mean() == pytest.approx(real.mean(), abs=1e-5) and kept.std() == pytest.approx(1, abs=1e-4)


def test_the_policy_loss_is_the_clipped_objective_token_by_token():
    torch.manual_seed(0)
    old, advantages, mask = torch.randn(4, 6), torch.randn(4, 6), ragged_mask(4, 6)
    new = old + torch.randn(4, 6) * 0.4
    terms = []
    for b in range(4):
        for t in range(6):
            if mask[b, t]:
                ratio, a = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
                terms.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    assert ppo.policy_loss(new, old, advantages, mask, 0.2).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_a_token_that_has_moved_far_enough_adds_no_gradient():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    new = torch.tensor([[0.5, -0.5, 0.5, -0.5]], requires_grad=True)
    ppo.policy_loss(new, old, torch.tensor([[1.0, -1.0, -1.0, 1.0]]), mask, 0.2).backward()
    assert (new.grad[0, :2] == 0).all() and (new.grad[0, 2:] != 0).all()


def test_the_value_loss_is_the_larger_of_clipped_and_not():
    torch.manual_seed(0)
    values, old, returns, mask = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6), ragged_mask(4, 6)
    terms = []
    for b, t in mask.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (values, old, returns))
        near = min(max(v, o - 0.2), o + 0.2)
        terms.append(0.5 * max((v - r) ** 2, (near - r) ** 2))
    assert ppo.value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_group_advantages_are_against_the_others_to_the_same_prompt():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    rloo = ppo.group_advantages(returns, 4, 'rloo').tolist()
    assert rloo == pytest.approx([1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2, 0, 0, 0, 0], abs=1e-5)
    grpo = ppo.group_advantages(returns, 4, 'grpo').tolist()
    std = np.std([1, 2, 3, 6], ddof=1)
    assert grpo == pytest.approx([-2 / std, -1 / std, 0, 3 / std, 0, 0, 0, 0], abs=1e-3)


def test_packing_keeps_the_order_of_real_tokens():
    idx = torch.tensor([[-1, -1, 5, 6, 7, -1], [1, 2, 3, 4, 5, -1]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0]])
    packed, kept = ppo.pack(idx, mask)
    assert packed.tolist() == [[5, 6, 7, -1, -1], [1, 2, 3, 4, 5]]
    assert kept.tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize('separate_critic', [False, True])
@pytest.mark.parametrize('pos', ['rope', 'learned'])
def test_prompts_of_different_lengths_share_a_batch_with_no_effect_on_anyone(pos, separate_critic):
    made = policy(separate_critic, pos=pos)
    rows = [torch.tensor(r) for r in ([5, 6, 7, 8], [9, 1], [3])]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    logits, values = made(idx)
    for i, row in enumerate(rows):
        alone, value = made(row[None])
        assert torch.allclose(logits[i, :len(row)], alone[0], atol=1e-5)
        assert torch.allclose(values[i, :len(row)], value[0], atol=1e-5)


def test_the_value_starts_at_zero_everywhere():
    made = ppo.Policy(GPT(GPTConfig(block_size=8, n_layer=1, n_head=2, n_embd=32)), False)
    assert (made(torch.tensor([[1, 2, 3]]))[1] == 0).all()


def test_a_rollout_is_masked_to_the_answer_and_its_end():
    made, prompts = policy(), [[5, 6, 7], [9], [1, 2]]
    with torch.no_grad():
        made.gpt.wte.weight[end] *= 8  # ends often
    idx, mask, ended = ppo.rollout(made.gpt, prompts * 20, end, torch.Generator().manual_seed(0), 'cpu')
    assert 5 < ended.sum() < 60 and idx.size(1) <= 3 + ppo.max_new_tokens
    for i, (ids, counts, whole) in enumerate(zip(idx.tolist(), mask.tolist(), ended.tolist())):
        prompt, n = prompts[i % 3], sum(counts)
        assert ids[:len(prompt)] == prompt and counts[:len(prompt)] == [0] * len(prompt)
        assert counts[len(prompt):len(prompt) + n] == [1] * n and n >= 1
        answer = ids[len(prompt):len(prompt) + n]
        assert (answer[-1] == end) == whole and end not in answer[:-1] and (whole or n == ppo.max_new_tokens)
        assert ids[len(prompt) + n:] == [-1] * (len(ids) - len(prompt) - n)


def test_log_probabilities_entropy_and_kl_are_those_of_the_tempered_softmax(monkeypatch):
    monkeypatch.setattr(ppo, 'temperature', 0.7)
    made, reference = policy(), GPT(GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32))
    idx, mask = torch.tensor([[5, 6, 7, 8], [9, 1, 2, -1], [3, 4, -1, -1]]), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0]])
    logp, ref, values, entropy, kl = ppo.measure(made, reference, idx, mask, 2)
    for b, t in mask[:, 1:].nonzero().tolist():
        p, q = (model(idx[b:b + 1, :t + 1])[0][0, -1].double().div(0.7).softmax(-1) for model in (made.gpt, reference))
        target = idx[b, t + 1]
        assert logp[b, t].item() == pytest.approx(p[target].log().item(), abs=1e-4)
        assert ref[b, t].item() == pytest.approx(q[target].log().item(), abs=1e-4)
        assert entropy[b, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)
        assert kl[b, t].item() == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-4)
    outside = mask[:, 1:] == 0
    assert all((x[outside] == 0).all() for x in (logp, ref, values, entropy, kl))


def test_an_answer_without_an_end_gets_the_penalty_in_place_of_its_score(monkeypatch):
    score, ended, length = torch.tensor([2.0, -5.0, 9.0]), torch.tensor([True, True, False]), torch.tensor([3.0, 4.0, 5.0])
    assert ppo.shape(score, ended, length).tolist() == [2, -5, ppo.missing_end_score]
    monkeypatch.setattr(ppo, 'length_penalty', 0.5)
    monkeypatch.setattr(ppo, 'score_clip', 4.0)
    assert ppo.shape(score, ended, length).tolist() == [0.5, -6, ppo.missing_end_score]


# -----------------------------------------------------------------------------
# The stage

FAST = dict(CPU, max_iters=4, batch_size=16, minibatch_size=8, eval_interval=2, eval_prompts=4, test_prompts=8, test_draws=4,
            max_new_tokens=8)


def metrics(folder):
    return [r for r in read_log(str(folder)) if 'objective/kl' in r]


def final(folder):
    return read_log(str(folder))[-1]['final']


@pytest.mark.parametrize('adv', ['gae', 'rloo', 'grpo'])
def test_with_a_learning_rate_of_0_ratios_stay_1_and_the_kl_0(adv, letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, reward='gold', adv=adv,
                             learning_rate=0.0, critic_lr=0.0)))
    for r in metrics(tmp_path):
        assert r['val/first_ratio'] == pytest.approx(1, abs=1e-5) and r['val/ratio'] == pytest.approx(1, abs=1e-5)
        assert abs(r['objective/kl']) < 1e-4 and abs(r['objective/kl_exact']) < 1e-5 and r['policy/approxkl'] < 1e-9
        assert r['policy/clipfrac'] == 0


def test_the_first_minibatch_has_ratio_1_however_far_the_policy_has_moved(letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, reward='gold')))
    log = metrics(tmp_path)
    assert all(r['val/first_ratio'] == pytest.approx(1, abs=1e-5) for r in log) and log[-1]['objective/kl_exact'] > 1e-3


@pytest.mark.parametrize('adv', ['gae', 'rloo', 'grpo'])
def test_the_gold_reward_is_learned(adv, letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, reward='gold', adv=adv,
                             max_iters=25, batch_size=64, minibatch_size=32, eval_interval=25, test_prompts=60,
                             learning_rate=2e-3, separate_critic=adv == 'gae')))
    figures = final(tmp_path)
    assert figures['exact_match_sampled'] > figures['exact_match_sampled_before'] + 0.1
    assert figures['kl'] > figures['kl_minimum'] * 0.9 > 0 and figures['ended'] > 0.95


def test_the_gain_of_the_last_norm_alone_makes_the_policy_surer(letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, reward='gold', max_iters=12,
                             batch_size=64, minibatch_size=32, learning_rate=1e-12, critic_lr=1e-12, gain_lr=0.1)))
    before, after = (load_checkpoint(str(folder))['model'] for folder in (small_sft.folder, tmp_path))
    assert {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)} == {'ln_f.weight'}
    log = metrics(tmp_path)
    assert log[-1]['objective/entropy'] < 0.9 * log[0]['objective/entropy']


def test_a_learned_reward_is_taken_and_the_figures_told(letters_data, small_sft, small_reward, tmp_path):
    made = ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, reward_model=small_reward.folder,
                                    out_dir=tmp_path, whiten_rewards=True, kl_control='adaptive', kl_target=1e-4, kl_horizon=32,
                                    kl_coef=0.1)))
    log, figures = metrics(tmp_path), final(tmp_path)
    for key in ('kl', 'kl_k3', 'kl_exact', 'kl_coef', 'entropy', 'score', 'gold', 'non_score_reward', 'rlhf_reward'):
        assert f'objective/{key}' in log[0]
    for key in ('policy/approxkl', 'policy/clipfrac', 'loss/policy', 'loss/value', 'val/ratio', 'val/clipfrac',
                'val/explained_variance', 'response_length', 'ended', 'grad_norm', 'episodes_per_second'):
        assert key in log[0]
    for key in ('exact_match', 'exact_match_sampled', 'score', 'gold', 'kl', 'kl_minimum', 'ended', 'episodes_per_second',
                'best_of_4', 'seconds', 'peak_memory_mb', 'rollout_share'):
        assert key in figures
    shown = [line.rsplit(' -> ', 1)[0] for line in made.splitlines() if '   (gold: ' in line]  # the prompt and the first answer
    assert len(shown) == 3 * len(set(shown)) and log[0]['objective/non_score_reward'] == pytest.approx(0, abs=1e-5)
    assert [r['objective/kl_coef'] for r in log[:2]] == pytest.approx([0.1, 0.09])  # KL 0 is below the target: at most -0.2 * 16 / 32
    for before, after in zip(log[1:], log[2:]):  # and then above it
        up = 1 + min(0.2, max(-0.2, before['objective/kl_exact'] / 1e-4 - 1)) * 16 / 32
        assert after['objective/kl_coef'] == pytest.approx(before['objective/kl_coef'] * up, rel=1e-6)


def test_a_stopped_run_goes_on_bit_for_bit(letters_data, small_sft, small_reward, tmp_path):
    how = flags(FAST, dataset=letters_data, init_from=small_sft.folder, reward_model=small_reward.folder, kl_control='adaptive')
    ok(call('ppo.py', *how, f'--out_dir={tmp_path / "whole"}'))
    ok(call('ppo.py', *how, f'--out_dir={tmp_path / "half"}'))
    (tmp_path / 'half' / 'ckpt.pt').write_bytes((tmp_path / 'half' / 'ckpt_prev.pt').read_bytes())
    assert load_checkpoint(str(tmp_path / 'half'))['step'] == 2
    ok(call('ppo.py', '--init_from=resume', f'--out_dir={tmp_path / "half"}'))
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ('whole', 'half'))
    assert all(torch.equal(a['policy'][key], b['policy'][key]) for key in a['policy']) and a['kl_coef'] == b['kl_coef']
    assert final(tmp_path / 'whole')['exact_match_sampled'] == final(tmp_path / 'half')['exact_match_sampled']


def test_a_resumed_run_goes_on_with_its_kl_weight_unless_it_is_given_another(letters_data, small_sft, tmp_path):
    ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path, reward='gold', max_iters=2,
                             kl_control='adaptive', kl_coef=0.1, kl_target=1e-4, kl_horizon=32, eval_interval=100)))
    reached = load_checkpoint(str(tmp_path))['kl_coef']
    assert reached != 0.1
    for n, (given, expected) in enumerate((([], reached), (['--kl_coef=0.7'], 0.7), (['--kl_control=none'], 0),
                                           (['--kl_control=fixed'], 0.7))):
        ok(call('ppo.py', '--init_from=resume', f'--out_dir={tmp_path}', f'--max_iters={3 + n}', *given))
        assert metrics(tmp_path)[-1]['objective/kl_coef'] == pytest.approx(expected), given


def test_where_right_answers_are_not_known_nothing_is_said_to_be_wrong(letters_data, small_sft, small_reward, tmp_path):
    for split in ('train', 'val'):
        rows = read_jsonl(str(letters_data / f'prompts_{split}.jsonl'), 'prompt')
        (tmp_path / f'prompts_{split}.jsonl').write_text(''.join(json.dumps({'prompt': row['prompt']}) + '\n' for row in rows))
    ok(call('ppo.py', *flags(FAST, dataset=tmp_path, init_from=small_sft.folder, reward_model=small_reward.folder,
                             out_dir=tmp_path / 'run', max_iters=1)))
    figures = final(tmp_path / 'run')
    assert all(figures[key] is None for key in ('exact_match', 'exact_match_sampled', 'gold', 'kl_minimum', 'best_of_4'))
    assert math.isfinite(figures['score']) and figures['ended'] > 0


def test_a_reward_model_that_was_saved_before_its_end_is_named(small_sft, small_reward, tmp_path, capsys):
    checkpoint, (_, tok) = load_checkpoint(str(small_reward.folder)), load_chat_model(str(small_sft.folder), {})
    assert load_reward_model(str(small_reward.folder), tok).scale != 1 and capsys.readouterr().out == ''
    checkpoint['model'] |= {'shift': torch.zeros(()), 'scale': torch.ones(())}
    save_checkpoint(str(tmp_path), checkpoint)
    load_reward_model(str(tmp_path), tok)
    assert f'reward.py --init_from=resume --out_dir={tmp_path}' in capsys.readouterr().out


@pytest.mark.parametrize('script', ['sft.py', 'reward.py', 'ppo.py'])
def test_a_run_does_not_write_over_what_it_starts_from(script, letters_data, small_sft):
    before = (small_sft.folder / 'ckpt.pt').read_bytes()
    said = one_line(call(script, *flags(CPU, dataset=letters_data, init_from=small_sft.folder, out_dir=f'{small_sft.folder}/',
                                        **{'reward': 'gold'} if script == 'ppo.py' else {})))
    assert 'is the folder that the run would write to' in said and (small_sft.folder / 'ckpt.pt').read_bytes() == before


def test_a_minibatch_in_one_part_or_three_gives_the_same_step(letters_data, small_sft, tmp_path):
    found = {}
    for parts in (1, 3):
        ok(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path / str(parts), reward='gold',
                                 gradient_accumulation_steps=parts, max_iters=1, learning_rate=1e-3, ppo_epochs=1)))
        found[parts] = (load_checkpoint(tmp_path / str(parts) / 'ckpt.pt')['policy'], metrics(tmp_path / str(parts))[0])
    (one, log), (three, other) = found.values()
    for name, weight in one.items():
        assert torch.allclose(weight, three[name], atol=2e-5), name
    for key in ('policy/approxkl', 'policy/clipfrac', 'val/clipfrac', 'loss/policy', 'loss/value', 'grad_norm'):
        assert other[key] == pytest.approx(log[key], rel=1e-3, abs=1e-5), key


def test_two_ranks_share_the_work(letters_data, small_sft, small_reward, tmp_path):
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'ppo.py',
                    *flags(FAST, dataset=letters_data, init_from=small_sft.folder, reward_model=small_reward.folder,
                           out_dir=tmp_path, max_iters=2))))
    assert [r['val/first_ratio'] for r in metrics(tmp_path)] == pytest.approx([1, 1], abs=1e-5) and final(tmp_path)['ended'] > 0


def test_the_model_speaks_and_a_reward_model_chooses_among_its_answers(letters_data, small_sft, small_reward, tmp_path):
    how = flags(device='cpu', out_dir=small_sft.folder, prompts=letters_data / 'prompts_val.jsonl', max_new_tokens=8, temperature=1.0)
    right = {}
    for n in (1, 4):
        ok(call('sample.py', *how, f'--answers={tmp_path / "a"}', f'--best_of={n}', f'--reward_model={small_reward.folder}'))
        with open(tmp_path / 'a', encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
        right[n] = sum(r['response'] == r['prompt'].split()[-1].upper() for r in rows)
    assert len(rows) == 60 and right[4] > right[1] + 4, right


@pytest.mark.parametrize('args, message', [
    (['--reward=judge'], "reward must be one of 'model', 'gold'; got 'judge'"),
    (['--adv=a2c'], "adv must be one of 'gae', 'rloo', 'grpo'"),
    (['--minibatch_size=7'], 'batch_size 16 must be a multiple of minibatch_size 7'),
    (['--adv=rloo', '--group_size=1'], 'which is at least 2 for rloo'),
    (['--temperature=0'], 'temperature must be above 0'),
    (['--reward=model', '--reward_model=nowhere'], 'nowhere')])
def test_mistakes_are_one_line(args, message, letters_data, small_sft, tmp_path):
    how = {k: v for k, v in FAST.items() if k != 'minibatch_size' or '--minibatch_size=7' not in args}
    assert message in one_line(call('ppo.py', *flags(how, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path), *args))


def test_a_policy_is_no_reward_model(letters_data, small_sft, tmp_path):
    said = one_line(call('ppo.py', *flags(FAST, dataset=letters_data, init_from=small_sft.folder, out_dir=tmp_path,
                                          reward_model=small_sft.folder)))
    assert 'a sft checkpoint, not a reward model' in said


def test_a_hugging_face_folder_goes_through_all_three_stages(letters_data, tmp_path):
    pytest.importorskip('safetensors')
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, special={'<|endoftext|>': 256})
    GPT(GPTConfig(vocab_size=257, block_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)).save_pretrained(
        str(tmp_path / 'hf'), plain)
    how = dict(CPU, dataset=letters_data, max_iters=2, max_new_tokens=8, eval_interval=2)
    ok(call('reward.py', *flags(how, init_from=tmp_path / 'hf', out_dir=tmp_path / 'reward', batch_size=8)))
    ok(call('ppo.py', *flags(how, init_from=tmp_path / 'hf', reward_model=tmp_path / 'reward', out_dir=tmp_path / 'ppo',
                             batch_size=8, minibatch_size=8, eval_prompts=4, test_prompts=8, test_draws=1)))
    assert load_checkpoint(str(tmp_path / 'ppo'))['model']['wte.weight'].shape == (261, 32)


def test_experts_go_through_all_three_stages(letters_data, tmp_path):
    config = dict(block_size=32, vocab_size=tok.vocab_size, n_layer=2, n_head=2, n_embd=32, n_expert=4, n_expert_active=2)
    torch.manual_seed(0)
    save_checkpoint(str(tmp_path / 'base'), {'stage': 'train', 'step': 0, 'model': GPT(GPTConfig(**config)).state_dict(),
                                             'model_args': config, 'config': {}, 'tokenizer': tok.to_dict()})
    how = dict(CPU, dataset=letters_data, max_iters=3, max_new_tokens=8, eval_interval=3)
    judged = dict(eval_prompts=4, test_prompts=8, test_draws=1)
    ok(call('sft.py', *flags(how, init_from=tmp_path / 'base', out_dir=tmp_path / 'sft', batch_size=8, **judged)))
    ok(call('reward.py', *flags(how, init_from=tmp_path / 'sft', out_dir=tmp_path / 'reward', batch_size=8)))
    ok(call('ppo.py', *flags(how, init_from=tmp_path / 'sft', reward_model=tmp_path / 'reward', out_dir=tmp_path / 'ppo',
                             batch_size=8, minibatch_size=8, **judged)))
    assert metrics(tmp_path / 'ppo')[0]['val/first_ratio'] == pytest.approx(1, abs=1e-5)
