"""Supervised fine-tuning: what the loss counts, the order of examples, and the stage as its user runs it."""
import itertools
import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

import sft
from bpe import SPECIAL, Tokenizer
from configurator import load_checkpoint, read_log
from conftest import CPU, call, flags, ok, one_line, start, finish
from data.answers import answer, log_prob, pad_left, rouge_l, token_f1
from model import GPT, GPTConfig

tok = Tokenizer.byte()
user, assistant, end = (tok.special[f'<|{name}|>'] for name in ('user', 'assistant', 'end'))


def chat(prompt, response):
    return {'messages': [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': response}]}


def tiny(**more):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(block_size=32, n_layer=2, n_head=2, n_embd=32), **more}))


def final(folder):
    return read_log(str(folder))[-1]['final']


# -----------------------------------------------------------------------------
# What is learned

def test_the_loss_counts_the_response_and_its_end_and_nothing_else():
    (ids, mask), = sft.prepare_examples([chat('ab', 'xyz')], tok, 32)
    assert ids.tolist() == [user, *b'ab', end, assistant, *b'xyz', end]
    assert mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]
    x, y, counts = sft.get_batch([(ids, mask)])
    assert [(a, b) for a, b, m in zip(x[0].tolist(), y[0].tolist(), counts[0].tolist()) if m] == [
        (assistant, ord('x')), (ord('x'), ord('y')), (ord('y'), ord('z')), (ord('z'), end)]


def test_masking_is_by_position_so_that_a_response_of_the_pad_id_counts():
    examples = sft.prepare_examples([chat('a', '\0\0'), chat('a', 'a longer one')], tok, 32)
    x, y, mask = sft.get_batch(examples)  # padded with id 0, which the first response holds
    assert mask[0].sum() == 3 and y[0][mask[0] > 0].tolist() == [0, 0, end]


def test_a_conversation_is_left_out_only_where_its_last_response_does_not_fit():
    said = lambda n: [*chat('a', 'b' * n)['messages'], *chat('c', 'd' * 5)['messages']]
    (ids, mask), (cut, counts) = sft.prepare_examples([{'messages': said(n)} for n in (3, 40)], tok, 20)
    assert sum(mask) == 4 + 6 and len(cut) == 21 and counts.tolist() == [1] * 11 + [0] * 4 + [1] * 6  # a cut first response stays
    assert [len(sft.prepare_examples([chat('a', 'b' * n), chat('a', 'b')], tok, 20)) for n in (19, 20)] == [2, 1]


def test_padding_on_the_right_changes_no_loss():
    model = tiny()
    examples = sft.prepare_examples([chat('a', 'bc'), chat('a much longer', 'question')], tok, 32)
    one_by_one = 0
    for example in examples:
        x, y, mask = sft.get_batch([example])
        one_by_one += sft.masked_loss(model(x)[0], y, mask, 1)
    x, y, mask = sft.get_batch(examples)
    assert sft.masked_loss(model(x)[0], y, mask, 1).item() == pytest.approx(one_by_one.item(), rel=1e-5)


def test_a_head_that_reads_responses_alone_has_the_same_loss_and_gradients():
    model = tiny()
    x, y, mask = sft.get_batch(sft.prepare_examples([chat('a', 'bc'), chat('a much longer', 'question')], tok, 32))
    found = []
    for logits in (model(x)[0], model(x, read=mask.nonzero(as_tuple=True))[0]):
        loss = sft.masked_loss(logits, y, mask)
        found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    assert logits.shape == (mask.sum(), model.config.vocab_size)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found))


def test_the_log_probability_of_answers_is_the_sum_written_out():
    model, (x, y, mask) = tiny(), sft.get_batch(sft.prepare_examples([chat('a', 'bc'), chat('a longer', 'one')], tok, 32))
    idx, own = F.pad(x, (0, 1)), F.pad(mask, (1, 0))
    idx[:, -1] = y[:, -1]
    logp = model(x)[0].log_softmax(-1)
    by_hand = [sum(logp[i, t, y[i, t]].item() for t in range(x.size(1)) if mask[i, t]) for i in range(2)]
    assert log_prob(model, idx, own).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_masked_loss_is_the_mean_written_out():
    torch.manual_seed(0)
    logits, targets, mask = torch.randn(2, 3, 5), torch.randint(5, (2, 3)), torch.tensor([[0, 1, 1], [1, 0, 0]])
    by_hand = [-math.log(math.exp(logits[b, t, targets[b, t]]) / sum(math.exp(v) for v in logits[b, t]))
               for b in range(2) for t in range(3) if mask[b, t]]
    assert sft.masked_loss(logits, targets, mask).item() == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert sft.masked_loss(logits, targets, mask, total=10).item() == pytest.approx(sum(by_hand) / 10, rel=1e-5)


def test_gradients_are_equal_however_a_ragged_batch_is_cut():
    rng = random.Random(0)
    examples = sft.prepare_examples([chat('q' * rng.randrange(1, 9), 'a' * rng.randrange(1, 15)) for _ in range(8)], tok, 32)
    total, grads = sum(mask[1:].sum().item() for _, mask in examples), []
    for size in (8, 2):
        model = tiny()
        for i in range(0, 8, size):
            x, y, mask = sft.get_batch(examples[i:i + size])
            sft.masked_loss(model(x)[0], y, mask, total).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-6) and grads[0].norm() > 0.1


def test_long_examples_are_cut_in_the_prompt_or_left_out_and_that_is_said(capsys):
    rows = [chat('p' * 40, 'short'), chat('p', 'r' * 40), chat('p', 'r')]
    examples = sft.prepare_examples(rows, tok, 16)
    assert len(examples) == 2 and examples[0][0].tolist()[-7:] == [assistant, *b'short', end] and len(examples[0][0]) == 17
    assert '2 of 3 examples are longer than block_size 16: 1 of them left out' in capsys.readouterr().out
    with pytest.raises(ValueError, match='no response fits in block_size 4'):
        sft.prepare_examples([chat('p', 'r' * 40)], tok, 4)


# -----------------------------------------------------------------------------
# In which order

def settings(**more):
    return dict(seed=1, batch_size=4, gradient_accumulation_steps=2, curriculum='none', curriculum_stages=4,
                curriculum_frac=0.5, max_iters=100) | more


def test_random_order_passes_every_example_once_an_epoch_in_another_order_each_time():
    order = list(range(100, 140))
    epochs = [[i for step in range(5 * e, 5 * e + 5) for i in sft.batch_indices(order, step, settings())] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == order and epochs[0] != epochs[1]
    assert sft.batch_indices(order, 3, settings()) == sft.batch_indices(order, 3, settings())
    assert sft.batch_indices(order, 3, settings()) != sft.batch_indices(order, 3, settings(seed=2))


def test_a_step_stands_in_the_order_of_length_so_that_its_micro_batches_are_padded_little():
    lengths = random.Random(0).choices(range(99), k=50)
    by_length = sorted(range(50), key=lengths.__getitem__)
    got = [lengths[i] for i in sft.batch_indices(by_length, 2, settings())]
    assert got == sorted(got)


def test_the_curriculum_goes_from_the_shortest_quarter_to_all():
    order, most = list(range(400)), []
    for step in range(100):
        most.append(max(sft.batch_indices(order, step, settings(curriculum='short_to_long'))))
    starts = [0, 17, 33, 50]  # of stages 1 to 4, in half of 100 steps
    for stage, (a, b) in enumerate(zip(starts, [*starts[1:], 100])):
        assert 100 * stage < max(most[a:b]) < 100 * (stage + 1)


# -----------------------------------------------------------------------------
# How it is judged

def test_rouge_l_is_of_the_longest_common_subsequence_and_f1_of_the_common_words():
    rng = random.Random(0)
    for _ in range(100):
        a, b = (rng.choices('xyz', k=rng.randrange(1, 6)) for _ in range(2))
        subsequences = lambda s: {c for n in range(len(s) + 1) for c in itertools.combinations(s, n)}
        lcs = max(map(len, subsequences(a) & subsequences(b)))
        common = sum(min(a.count(w), b.count(w)) for w in set(a))
        harmonic = lambda n: 0 if not n else 2 / (len(a) / n + len(b) / n)
        assert rouge_l(' '.join(a), ' '.join(b)) == pytest.approx(harmonic(lcs))
        assert token_f1(' '.join(a), ' '.join(b)) == pytest.approx(harmonic(common))
    assert token_f1('', '') == rouge_l('', '') == 1 and token_f1('a', '') == rouge_l('', 'b') == 0


def test_answers_are_those_of_each_prompt_alone():
    model, prompts = tiny(), [[user, *b'ab', end, assistant], [user, end, assistant], [user, *b'much longer', end, assistant]]
    together = answer(model, tok, prompts, 6, batch_size=2, temperature=0)  # in batches of like length, told in their order
    for prompt, got in zip(prompts, together):
        ids = model.generate(torch.tensor([prompt]), 6, temperature=0, stop=[end])[0, len(prompt):].tolist()
        assert got == (tok.decode([t for t in ids if t != end]), end in ids)
    assert pad_left([[1], [2, 3]]).tolist() == [[-1, 1], [2, 3]]


# -----------------------------------------------------------------------------
# The stage

def test_a_model_is_taught_and_its_figures_are_told(small_sft):
    figures = final(small_sft.folder)
    assert figures['exact_match'] > 0.9  # greedy is right though a share of the demonstrations is not
    assert 0.3 < figures['exact_match_sampled'] < figures['exact_match'] and figures['ended'] == 1
    for key in ('token_f1', 'rouge_l', 'response_loss', 'seconds', 'peak_memory_mb', 'exact_match/Raise'):
        assert key in figures
    first = read_log(str(small_sft.folder))[0]
    assert first['exact_match'] == 0 and first['response_loss'] > 3 * figures['response_loss']
    assert '-> ' in small_sft.stdout and '(gold: ' in small_sft.stdout


FAST = dict(CPU, max_iters=6, batch_size=8, log_interval=1, eval_interval=3, eval_prompts=4, test_prompts=4, test_draws=1,
            max_new_tokens=4)


def weights(folder):
    return torch.cat([t.flatten() for t in load_checkpoint(str(folder))['model'].values()])


def test_a_stopped_run_goes_on_bit_for_bit(letters_data, small_base, tmp_path):
    how = flags(FAST, dataset=letters_data, init_from=small_base, dropout=0.1, curriculum='short_to_long')
    ok(call('sft.py', *how, f'--out_dir={tmp_path / "whole"}'))
    ok(call('sft.py', *how, f'--out_dir={tmp_path / "half"}'))
    previous = load_checkpoint(str(tmp_path / 'half' / 'ckpt_prev.pt'))
    assert previous['step'] == 3
    (tmp_path / 'half' / 'ckpt.pt').write_bytes((tmp_path / 'half' / 'ckpt_prev.pt').read_bytes())
    ok(call('sft.py', '--init_from=resume', f'--out_dir={tmp_path / "half"}'))
    assert torch.equal(weights(tmp_path / 'whole'), weights(tmp_path / 'half'))


def test_a_mistake_is_told_by_several_ranks_too(letters_data, small_base, tmp_path):
    made = finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'sft.py', *flags(
        CPU, dataset=letters_data, init_from=small_base, out_dir=tmp_path, gradient_accumulation_steps=3)))
    assert 'error: gradient_accumulation_steps 3 cannot be shared by 2 ranks' in made.stderr and made.returncode


def test_accumulation_and_ranks_change_nothing_but_the_order_of_sums(letters_data, small_base, tmp_path):
    how = flags(FAST, dataset=letters_data, init_from=small_base, optimizer='adamw', max_iters=3, warmup_iters=1, gradient_accumulation_steps=4,
                batch_size=2)
    ok(call('sft.py', *how, f'--out_dir={tmp_path / "a"}'))
    how = [h for h in how if 'accumulation' not in h and 'batch_size' not in h]
    ok(call('sft.py', *how, '--gradient_accumulation_steps=1', '--batch_size=8', f'--out_dir={tmp_path / "b"}'))
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'sft.py', *how, '--batch_size=2',
                    '--gradient_accumulation_steps=4', f'--out_dir={tmp_path / "c"}')))
    a, b, c = (weights(tmp_path / name) for name in 'abc')
    assert torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)
    assert not torch.allclose(a, weights(small_base), atol=1e-3)


def test_a_hugging_face_folder_is_taught_and_its_tokenizer_gets_the_tokens_of_chats(letters_data, tmp_path):
    pytest.importorskip('safetensors')
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, special={'<|endoftext|>': 256})
    GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=32)).save_pretrained(str(tmp_path / 'hf'), plain)
    ok(call('sft.py', *flags(FAST, dataset=letters_data, init_from=tmp_path / 'hf', out_dir=tmp_path / 'out')))
    checkpoint = load_checkpoint(str(tmp_path / 'out'))
    assert checkpoint['model']['wte.weight'].shape == (261, 32)
    assert set(SPECIAL) <= Tokenizer.from_dict(checkpoint['tokenizer']).special.keys()


@pytest.mark.parametrize('args, message', [
    (['--curriculum=hard_to_easy'], "curriculum must be one of 'none', 'short_to_long'; got 'hard_to_easy'"),
    (['--curriculum_stages=0'], 'curriculum_stages must be at least 1; got 0'),
    (['--init_from=nowhere'], 'nowhere')])
def test_mistakes_are_one_line(args, message, letters_data, small_base, tmp_path):
    base = [] if any('init_from' in a for a in args) else [f'--init_from={small_base}']
    assert message in one_line(call('sft.py', *flags(FAST, dataset=letters_data, out_dir=tmp_path / 'o'), *base, *args))


def test_bad_examples_are_named_by_file_and_line_before_anything_is_trained(letters_data, small_base, tmp_path):
    for name in ('sft_train.jsonl', 'sft_val.jsonl'):
        (tmp_path / name).write_bytes((letters_data / name).read_bytes())
    with open(tmp_path / 'sft_train.jsonl', 'a', encoding='utf-8') as f:
        f.write(json.dumps({'prompt': 'no answer'}) + '\n')
    said = one_line(call('sft.py', *flags(FAST, dataset=tmp_path, init_from=small_base, out_dir=tmp_path / 'o')))
    assert "sft_train.jsonl:2001: missing key 'response'" in said and not (tmp_path / 'o').exists()


def test_a_reward_model_is_no_model_to_teach(letters_data, small_reward, tmp_path):
    said = one_line(call('sft.py', *flags(FAST, dataset=letters_data, init_from=small_reward.folder, out_dir=tmp_path / 'o')))
    assert 'a reward model judges, it does not speak' in said


def test_another_stage_s_run_is_not_resumed_but_started_from(letters_data, small_sft, tmp_path):
    said = one_line(call('reward.py', *flags(CPU, dataset=letters_data, init_from='resume', out_dir=small_sft.folder)))
    assert 'ckpt.pt was made by sft.py, not by reward.py' in said
