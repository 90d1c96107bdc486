"""
Supervised fine-tuning: the tokens that the loss counts, the order of the examples, the evaluation,
and the stage as its user runs it.
"""
import itertools
import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

import sample
import sft
from bpe import SPECIAL_TOKENS, Tokenizer, render_chat
from configurator import load_checkpoint, read_log, save_checkpoint, start_run
from conftest import CPU, call, finish, flags, ok, one_line, start
from data.pretrained import save_pretrained
from model import GPT, GPTConfig
from reward import log_prob

tok = Tokenizer.byte()
USER = tok.special['<|user|>']
ASSISTANT = tok.special['<|assistant|>']
END = tok.special['<|end|>']

# A tokenizer of bytes with the chat format of SmolLM2 and Qwen
CHATML = Tokenizer({i: bytes([i]) for i in range(256)},
                   special={'<|endoftext|>': 256, '<|im_start|>': 257, '<|im_end|>': 258})


def chat(prompt, response):
    """A demonstration: a row with one message by the user and one by the assistant."""
    return {'messages': [{'role': 'user', 'content': prompt},
                         {'role': 'assistant', 'content': response}]}


def small_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))


def two_examples():
    """Two examples whose prompts and responses have different lengths."""
    rows = [chat('a', 'bc'), chat('a much longer', 'question')]
    return sft.prepare_examples(rows, tok, 32)


def final_figures(folder):
    return read_log(str(folder))[-1]['final']


# -----------------------------------------------------------------------------
# The tokens that the loss counts

def test_the_loss_counts_the_response_and_its_end_token_and_nothing_else():
    [(ids, mask)] = sft.prepare_examples([chat('ab', 'xyz')], tok, 32)
    assert ids.tolist() == [USER, *b'ab', END, ASSISTANT, *b'xyz', END]
    assert mask.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]

    x, y, y_mask = sft.get_batch([(ids, mask)])
    counted = []
    for token, target, is_counted in zip(x[0].tolist(), y[0].tolist(), y_mask[0].tolist()):
        if is_counted:
            counted.append((token, target))
    assert counted == [(ASSISTANT, ord('x')), (ord('x'), ord('y')), (ord('y'), ord('z')),
                       (ord('z'), END)]


def test_the_mask_is_by_position_so_a_response_with_the_padding_id_is_counted():
    rows = [chat('a', '\0\0'), chat('a', 'a longer one')]
    examples = sft.prepare_examples(rows, tok, 32)
    x, y, mask = sft.get_batch(examples)  # padded with id 0, which the first response contains
    assert mask[0].sum() == 3
    assert y[0][mask[0] > 0].tolist() == [0, 0, END]


def test_of_a_long_conversation_earlier_responses_are_truncated_first():
    def conversation(n):
        return {'messages': chat('a', 'b' * n)['messages'] + chat('c', 'd' * 5)['messages']}

    rows = [conversation(3), conversation(40)]
    (_, mask), (truncated, truncated_mask) = sft.prepare_examples(rows, tok, 20)
    assert sum(mask) == 4 + 6
    assert len(truncated) == 21
    assert truncated_mask.tolist() == [1] * 11 + [0] * 4 + [1] * 6


@pytest.mark.parametrize('prompt, longest', [
    ('a', 16),                # nothing is truncated: 1 + 3 markers + 16 + 1 end token = 21 tokens
    ('some words a', 16),     # truncated to the last word and three tokens for the markers
    ('some words abc', 14)])
def test_an_example_is_skipped_if_the_last_word_of_its_prompt_would_be_cut(prompt, longest):
    for n, is_kept in ((longest, True), (longest + 1, False)):
        examples = sft.prepare_examples([chat(prompt, 'b' * n), chat('a', 'b')], tok, 20)
        assert len(examples) == 1 + is_kept
        assert examples[0][1].sum() == (n if is_kept else 1) + 1


@pytest.mark.parametrize('chat_tok', [tok, CHATML], ids=['ours', 'chatml'])
def test_no_example_keeps_a_response_without_a_question(chat_tok):
    n_markers = len(render_chat([{'role': 'user', 'content': ''}], chat_tok)[0])
    n_end = len(render_chat(chat('', '')['messages'], chat_tok)[0]) - n_markers
    for n in range(1, 40):
        # n letters, with all that the format writes around them, against a context of 32
        rows = [chat('why not?', 'x' * n), chat('a', 'b')]
        examples = sft.prepare_examples(rows, chat_tok, 32, verbose=False)
        has_room = n_markers + len('not?') + n + n_end <= 32 + 1
        assert len(examples) == 1 + has_room, n


def test_responses_of_weight_0_are_read_but_not_counted():
    messages = [*chat('a', 'bad')['messages'], *chat('b', 'OK')['messages']]
    messages[1]['weight'] = 0
    messages[3]['weight'] = 1
    [(ids, mask)] = sft.prepare_examples([{'messages': messages}], tok, 64)
    assert ids[mask > 0].tolist() == [*b'OK', END]

    # An example of which only a response of weight 0 is left is skipped.
    messages = [*chat('a', 'x' * 30)['messages'], *chat('b', 'bad')['messages']]
    messages[3]['weight'] = 0
    rows = [{'messages': messages}, chat('a', 'b')]
    assert len(sft.prepare_examples(rows, tok, 8)) == 1


def test_long_examples_are_truncated_on_the_left_or_skipped_and_the_numbers_are_printed(capsys):
    rows = [chat('p ' * 20, 'short'), chat('p', 'r' * 40), chat('p', 'r')]
    examples = sft.prepare_examples(rows, tok, 16)
    assert len(examples) == 2
    ids, _ = examples[0]
    assert len(ids) == 17
    assert ids.tolist() == [*b' p p p p ', END, ASSISTANT, *b'short', END][-17:]
    assert capsys.readouterr().out == (
        'of 3 examples, skipped 1 (no room for a question in block_size 16), '
        'truncated 1 on the left\n')

    sft.prepare_examples(rows, tok, 16, verbose=False)
    sft.prepare_examples(rows[2:], tok, 16)  # nothing is truncated or skipped
    assert capsys.readouterr().out == ''

    with pytest.raises(ValueError, match='no example fits in block_size 4'):
        sft.prepare_examples([chat('p', 'r' * 40)], tok, 4)


# -----------------------------------------------------------------------------
# The loss

def test_masked_loss_is_the_mean_cross_entropy_of_the_counted_tokens():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    targets = torch.randint(5, (2, 3))
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    losses = []
    for b, t in [(0, 1), (0, 2), (1, 0)]:
        exps = [math.exp(v) for v in logits[b, t]]
        losses.append(-math.log(exps[targets[b, t]] / sum(exps)))

    loss = sft.masked_loss(logits, targets, mask)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    loss = sft.masked_loss(logits, targets, mask, total=10)
    assert loss.item() == pytest.approx(sum(losses) / 10, rel=1e-5)


def test_padding_on_the_right_does_not_change_the_loss():
    model = small_model()
    examples = two_examples()
    one_by_one = 0
    for example in examples:
        x, y, mask = sft.get_batch([example])
        one_by_one += sft.masked_loss(model(x)[0], y, mask, 1)
    x, y, mask = sft.get_batch(examples)
    together = sft.masked_loss(model(x)[0], y, mask, 1)
    assert together.item() == pytest.approx(one_by_one.item(), rel=1e-5)


def test_logits_of_the_responses_only_give_the_same_loss_and_gradients():
    model = small_model()
    x, y, mask = sft.get_batch(two_examples())
    all_logits, _ = model(x)
    response_logits, _ = model(x, read=mask.nonzero(as_tuple=True))
    assert response_logits.shape == (mask.sum(), model.config.vocab_size)

    results = []
    for logits in (all_logits, response_logits):
        loss = sft.masked_loss(logits, y, mask)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((loss, *gradients))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_log_probability_of_a_response_is_the_sum_over_its_tokens():
    model = small_model()
    rows = [chat('a', 'bc'), chat('a longer', 'one')]
    x, y, mask = sft.get_batch(sft.prepare_examples(rows, tok, 32))
    # log_prob takes the tokens and their mask before they are shifted.
    idx = F.pad(x, (0, 1))
    idx[:, -1] = y[:, -1]
    idx_mask = F.pad(mask, (1, 0))

    logprobs = model(x)[0].log_softmax(-1)
    expected = []
    for i in range(2):
        counted = [t for t in range(x.size(1)) if mask[i, t]]
        expected.append(sum(logprobs[i, t, y[i, t]].item() for t in counted))
    assert log_prob(model, idx, idx_mask).tolist() == pytest.approx(expected, rel=1e-5)


def test_gradients_do_not_depend_on_the_size_of_the_micro_batches():
    rng = random.Random(0)
    rows = []
    for _ in range(8):
        prompt = 'q' * rng.randrange(1, 9)
        rows.append(chat(prompt, 'a' * rng.randrange(1, 15)))
    examples = sft.prepare_examples(rows, tok, 32)
    total = sum(mask[1:].sum().item() for _, mask in examples)
    gradients = []
    for size in (8, 2):
        model = small_model()
        for i in range(0, 8, size):
            x, y, mask = sft.get_batch(examples[i:i + size])
            sft.masked_loss(model(x)[0], y, mask, total).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)
    assert gradients[0].norm() > 0.1


# -----------------------------------------------------------------------------
# The order of the examples

def order_settings(**changed):
    settings = dict(seed=1, batch_size=4, gradient_accumulation_steps=2, curriculum='none',
                    curriculum_stages=4, curriculum_frac=0.5, max_iters=100)
    return settings | changed


def test_each_epoch_contains_every_example_once_in_a_random_order_of_its_own():
    by_length = list(range(100, 140))
    epochs = []
    for first_step in (0, 5):  # an epoch has 5 steps of 8 examples
        indices = []
        for step in range(first_step, first_step + 5):
            indices += sft.batch_indices(by_length, step, order_settings())
        epochs.append(indices)
    assert sorted(epochs[0]) == sorted(epochs[1]) == by_length
    assert epochs[0] != epochs[1]

    batch = sft.batch_indices(by_length, 3, order_settings())
    assert batch == sft.batch_indices(by_length, 3, order_settings())
    assert batch != sft.batch_indices(by_length, 3, order_settings(seed=2))


def test_the_examples_of_a_step_are_ordered_by_length_so_that_little_is_padded():
    lengths = random.Random(0).choices(range(99), k=50)
    by_length = sorted(range(50), key=lambda i: lengths[i])
    batch_lengths = [lengths[i] for i in sft.batch_indices(by_length, 2, order_settings())]
    assert batch_lengths == sorted(batch_lengths)


def test_examples_are_ordered_by_their_whole_length_or_by_that_of_their_prompt():
    examples = []
    for n_prompt, n_response in [(5, 1), (2, 6), (3, 2)]:
        mask = torch.tensor([0] * n_prompt + [1] * n_response)
        examples.append((torch.zeros(len(mask), dtype=torch.long), mask))
    assert sft.order_by_length(examples, 'none') == [2, 0, 1]              # lengths 6, 8, 5
    assert sft.order_by_length(examples, 'short_examples') == [2, 0, 1]
    assert sft.order_by_length(examples, 'short_prompts') == [1, 2, 0]     # lengths 5, 2, 3


def test_the_curriculum_goes_from_the_shortest_quarter_to_all_examples():
    by_length = list(range(400))
    settings = order_settings(curriculum='short_examples')
    longest = [max(sft.batch_indices(by_length, step, settings)) for step in range(100)]
    # Four stages of 100 more examples each; the last begins at half of the 100 steps.
    for stage, (first, last) in enumerate([(0, 17), (17, 33), (33, 50), (50, 100)]):
        assert 100 * stage < max(longest[first:last]) < 100 * (stage + 1)


# -----------------------------------------------------------------------------
# Evaluation

def subsequences(words):
    """All subsequences of a list of words, as a set of tuples."""
    found = set()
    for length in range(len(words) + 1):
        found |= set(itertools.combinations(words, length))
    return found


def harmonic_mean(n_common, a, b):
    """The harmonic mean of precision n_common / len(a) and recall n_common / len(b)."""
    if n_common == 0:
        return 0
    return 2 / (len(a) / n_common + len(b) / n_common)


def test_rouge_l_uses_the_longest_common_subsequence_and_token_f1_the_common_words():
    rng = random.Random(0)
    for _ in range(100):
        a = rng.choices('xyz', k=rng.randrange(1, 6))
        b = rng.choices('xyz', k=rng.randrange(1, 6))
        longest = max(len(s) for s in subsequences(a) & subsequences(b))
        n_common = sum(min(a.count(word), b.count(word)) for word in set(a))
        rouge_l = sft.rouge_l(' '.join(a), ' '.join(b))
        token_f1 = sft.token_f1(' '.join(a), ' '.join(b))
        assert rouge_l == pytest.approx(harmonic_mean(longest, a, b))
        assert token_f1 == pytest.approx(harmonic_mean(n_common, a, b))


def test_two_empty_texts_agree_and_an_empty_and_another_text_do_not():
    assert sft.token_f1('', '') == 1
    assert sft.rouge_l('', '') == 1
    assert sft.token_f1('a', '') == 0
    assert sft.rouge_l('', 'b') == 0


@pytest.fixture
def cpu_run():
    """The Run of a CPU in float32."""
    return start_run(CPU)


def test_response_loss_is_nats_per_token_over_all_examples(cpu_run):
    model = small_model()
    rows = [chat('q' * n, 'a' * (2 * n)) for n in (4, 1, 7)]
    examples = sft.prepare_examples(rows, tok, 32)
    total = 0.0
    count = 0
    for ids, mask in examples:
        logits, _ = model(ids[None, :-1])
        losses = F.cross_entropy(logits[0], ids[1:], reduction='none')
        total += losses[mask[1:] > 0].sum().item()
        count += mask.sum().item()
    for batch_size in (1, 2, 8):
        loss = sft.response_loss(model, examples, batch_size, cpu_run)
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_the_figures_compare_responses_with_the_gold_responses(cpu_run, monkeypatch):
    """evaluate is called with responses that are fixed here, two of four of them correct."""
    rows = []
    for prompt, gold, op in [('a', 'the king', 'x'), ('b', 'the queen', 'x'), ('c', 'z', 'y'),
                             ('d', 'w', 'y')]:
        rows.append(chat(prompt, gold) | {'op': op})
    greedy = [('the king', True), ('the old', True), ('z', False), ('', True)]
    draws = [('the king', True), ('', False), ('', False), ('w', True)] * 2
    calls = []

    def answer(model, tok, prompts, max_new_tokens, **sampling):
        calls.append((prompts, max_new_tokens, sampling))
        return greedy if sampling.get('temperature') == 0 else draws

    monkeypatch.setattr(sft, 'answer', answer)
    prompts = [[i] for i in range(4)]
    figures, responses = sft.evaluate(None, tok, rows, prompts, 2, 5, cpu_run, 'generator')
    assert calls == [(prompts, 5, {'temperature': 0}),
                     (prompts * 2, 5, {'generator': 'generator'})]
    assert responses == ['the king', 'the old', 'z', '']
    assert figures == {
        'exact_match': 0.5, 'exact_match/x': 0.5, 'exact_match/y': 0.5,
        'exact_match_sampled': 0.5, 'token_f1': 2.5 / 4, 'rouge_l': 2.5 / 4,
        'ended': 0.75, 'ended_sampled': 0.5}


# -----------------------------------------------------------------------------
# The stage

FAST = dict(CPU, max_iters=6, batch_size=8, log_interval=1, eval_interval=3, eval_prompts=4,
            test_prompts=4, test_draws=1, max_new_tokens=4)


def parameters(folder):
    """All parameters of a run's checkpoint as one vector."""
    weights = load_checkpoint(str(folder))['model'].values()
    return torch.cat([weight.flatten() for weight in weights])


def start_on_two_ranks(*args):
    return start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'sft.py',
                 *args)


def test_a_model_learns_the_task_and_its_figures_are_logged_and_printed(small_sft):
    figures = final_figures(small_sft.folder)
    # Greedy responses are correct, although a part of the demonstrations is not.
    assert figures['exact_match'] > 0.9
    assert 0.3 < figures['exact_match_sampled'] < figures['exact_match']
    assert figures['ended'] == 1
    for key in ('token_f1', 'rouge_l', 'response_loss', 'seconds', 'peak_memory_mb',
                'exact_match/Raise'):
        assert key in figures
    first = read_log(str(small_sft.folder))[0]
    assert first['exact_match'] == 0
    assert first['response_loss'] > 3 * figures['response_loss']
    assert '-> ' in small_sft.stdout
    assert '(gold: ' in small_sft.stdout


def test_evaluations_use_the_prompts_that_encode_prompts_returns(
        letters_data, small_base, tmp_path, monkeypatch):
    """Two of three prompts are truncated in the context of 32 tokens with max_new_tokens=20."""
    for split in ('train', 'val'):
        rows = []
        with open(letters_data / f'sft_{split}.jsonl', encoding='utf-8') as f:
            for i, line in enumerate(f):
                row = json.loads(line)
                messages = chat(row['prompt'], row['response'])['messages']
                if i % 3 == 1:  # a long prompt
                    messages[0]['content'] = 'please ' * 2 + row['prompt']
                if i % 3 == 2:  # a conversation with an earlier response
                    messages = chat('no', 'yes')['messages'] + messages
                rows.append({'messages': messages})
        lines = [json.dumps(row) + '\n' for row in rows]
        (tmp_path / f'sft_{split}.jsonl').write_text(''.join(lines), encoding='utf-8')

    used = []
    answer = sample.answer

    def recording_answer(model, tok, prompts, max_new_tokens, **sampling):
        used.append(prompts)
        return answer(model, tok, prompts, max_new_tokens, **sampling)

    monkeypatch.setattr(sample, 'answer', recording_answer)
    settings = FAST | dict(max_iters=1, eval_prompts=9, test_prompts=12, test_draws=2,
                           max_new_tokens=20)
    printed = ok(call('sft.py', *flags(settings, dataset=tmp_path, init_from=small_base,
                                       out_dir=tmp_path / 'out')))

    conversations = [row['messages'][:-1] for row in rows[:12]]
    expected = sample.encode_prompts(conversations, tok, 32, 20, verbose=False)
    # An evaluation has greedy responses, then sampled ones.
    assert used == [expected[:9], expected[:9], expected, expected * 2]

    # 19 tokens: the three markers of the chat format and half of the context.
    chats = [render_chat(messages, tok)[0] for messages in conversations]
    assert expected == [ids[-19:] for ids in chats]
    assert any(len(ids) > 19 for ids in chats)
    for n in (9, 12):
        n_truncated = sum(len(ids) > 19 for ids in chats[:n])
        assert f'truncated {n_truncated} of {n} prompts to 19 tokens\n' in printed


@pytest.mark.parametrize('prompt, response, expected', [
    ('a', 'b', 'no example fits in block_size 3'),
    ('', '', 'block_size 3 leaves nothing of a question')])  # an example of four markers fits
def test_a_context_without_room_for_a_question_is_an_error_of_one_line(
        tmp_path, prompt, response, expected):
    architecture = dict(block_size=3, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=8)
    model = GPT(GPTConfig(**architecture))
    save_checkpoint(str(tmp_path / 'base'), {
        'stage': 'train', 'step': 0, 'model': model.state_dict(), 'model_args': architecture,
        'optimizer': [], 'config': {}, 'tokenizer': tok.to_dict()})
    for name in ('sft_train.jsonl', 'sft_val.jsonl'):
        line = json.dumps({'prompt': prompt, 'response': response})
        (tmp_path / name).write_text(line + '\n', encoding='utf-8')
    out = tmp_path / 'out'
    message = one_line(call('sft.py', *flags(FAST, dataset=tmp_path, out_dir=out,
                                             init_from=tmp_path / 'base')))
    assert expected in message
    assert not out.exists()


def test_a_stopped_run_resumes_bit_for_bit(letters_data, small_base, tmp_path):
    settings = flags(FAST, dataset=letters_data, init_from=small_base, dropout=0.1,
                     curriculum='short_prompts')
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(call('sft.py', *settings, f'--out_dir={whole}'))
    ok(call('sft.py', *settings, f'--out_dir={half}'))
    assert load_checkpoint(str(half / 'ckpt_prev.pt'))['step'] == 3
    (half / 'ckpt.pt').write_bytes((half / 'ckpt_prev.pt').read_bytes())
    ok(call('sft.py', '--init_from=resume', f'--out_dir={half}'))
    assert torch.equal(parameters(whole), parameters(half))


def test_micro_batches_and_ranks_change_only_the_order_of_sums(letters_data, small_base, tmp_path):
    settings = flags({**FAST, 'max_iters': 3}, dataset=letters_data, init_from=small_base,
                     optimizer='adamw', warmup_iters=1)
    settings = [flag for flag in settings if 'batch_size' not in flag]
    small_batches = ['--batch_size=2', '--gradient_accumulation_steps=4']
    one_batch = ['--batch_size=8', '--gradient_accumulation_steps=1']
    ok(call('sft.py', *settings, *small_batches, f'--out_dir={tmp_path / "a"}'))
    ok(call('sft.py', *settings, *one_batch, f'--out_dir={tmp_path / "b"}'))
    ok(finish(start_on_two_ranks(*settings, *small_batches, f'--out_dir={tmp_path / "c"}')))
    a = parameters(tmp_path / 'a')
    assert torch.allclose(a, parameters(tmp_path / 'b'), atol=1e-4)
    assert torch.allclose(a, parameters(tmp_path / 'c'), atol=1e-4)
    assert not torch.allclose(a, parameters(small_base), atol=1e-3)


def test_a_mistake_is_reported_with_several_ranks_too(letters_data, small_base, tmp_path):
    settings = flags(CPU, dataset=letters_data, init_from=small_base, out_dir=tmp_path,
                     gradient_accumulation_steps=3)
    result = finish(start_on_two_ranks(*settings))
    message = ('error: gradient_accumulation_steps = 3 cannot be divided by 2 ranks; make it a '
               'multiple of 2')
    assert message in result.stderr
    assert result.returncode != 0


def test_a_hugging_face_model_is_trained_and_its_tokenizer_gets_the_chat_tokens(
        letters_data, tmp_path):
    pytest.importorskip('safetensors')
    tokens = {byte: bytes([byte]) for byte in range(256)}
    plain = Tokenizer(tokens, special={'<|endoftext|>': 256})
    model = GPT(GPTConfig(vocab_size=257, block_size=32, n_layer=1, n_head=2, n_embd=32))
    save_pretrained(model, str(tmp_path / 'hf'), plain)
    ok(call('sft.py', *flags(FAST, dataset=letters_data, init_from=tmp_path / 'hf',
                             out_dir=tmp_path / 'out')))
    checkpoint = load_checkpoint(str(tmp_path / 'out'))
    assert checkpoint['model']['wte.weight'].shape == (261, 32)
    special = Tokenizer.from_dict(checkpoint['tokenizer']).special
    assert set(SPECIAL_TOKENS) <= special.keys()


@pytest.mark.parametrize('argument, message', [
    ('--curriculum=hard_to_easy',
     "curriculum must be one of 'none', 'short_prompts', 'short_examples'; got 'hard_to_easy'"),
    ('--curriculum_stages=0', 'curriculum_stages must be at least 1; got 0'),
    ('--init_from=nowhere', 'nowhere'),
])
def test_a_wrong_setting_is_an_error_of_one_line(
        argument, message, letters_data, small_base, tmp_path):
    settings = flags(FAST, dataset=letters_data, out_dir=tmp_path / 'out')
    if not argument.startswith('--init_from'):
        settings.append(f'--init_from={small_base}')
    assert message in one_line(call('sft.py', *settings, argument))


def test_a_bad_example_is_named_by_file_and_line_before_training_starts(
        letters_data, small_base, tmp_path):
    for name in ('sft_train.jsonl', 'sft_val.jsonl'):
        (tmp_path / name).write_bytes((letters_data / name).read_bytes())
    with open(tmp_path / 'sft_train.jsonl', 'a', encoding='utf-8') as f:
        f.write(json.dumps({'prompt': 'no response'}) + '\n')
    out = tmp_path / 'out'
    message = one_line(call('sft.py', *flags(FAST, dataset=tmp_path, init_from=small_base,
                                             out_dir=out)))
    assert "sft_train.jsonl:2001: missing key 'response'" in message
    assert not out.exists()


def test_fine_tuning_does_not_start_from_a_reward_model(letters_data, small_reward, tmp_path):
    message = one_line(call('sft.py', *flags(FAST, dataset=letters_data,
                                             init_from=small_reward.folder,
                                             out_dir=tmp_path / 'out')))
    assert 'this is a reward model, which cannot generate text' in message


def test_the_run_of_another_stage_is_not_resumed(letters_data, small_sft, tmp_path):
    message = one_line(call('reward.py', *flags(CPU, dataset=letters_data, init_from='resume',
                                                out_dir=small_sft.folder)))
    assert 'ckpt.pt was made by sft.py, not by reward.py' in message
