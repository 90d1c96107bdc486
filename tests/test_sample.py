"""
sample.py: continuing a text, answering a file of prompts, chatting, and the functions for prompts
and responses that the other stages share.

The runs are trained or made here. The references are independent of sample.py: the model's own
logits, one full forward pass per token, and UTF-8 as Python decodes it.
"""
import json
import math
import os
import select
import subprocess

import pytest
import torch

import sample
from bpe import Tokenizer, render_chat
from configurator import load_checkpoint, printable, save_checkpoint
from conftest import TINY, call, finish, flags, ok, one_line, start
from data.pretrained import load_model
from model import GPT, GPTConfig, RewardModel

CPU = ['--device=cpu', '--dtype=float32']
SEPARATOR = '-' * 15


# ----- Runs, and what their models generate

@pytest.fixture(scope='module')
def trained_run(dataset, tmp_path_factory):
    """The folder of a run that has been trained for 60 steps."""
    folder = tmp_path_factory.mktemp('trained')
    settings = flags(TINY, dataset=dataset, out_dir=folder, max_iters=60, eval_interval=60)
    ok(call('train.py', *settings))
    return folder


def write_random_run(trained_run, folder, **architecture):
    """
    Write a run whose weights are random and large. Its samples contain all kinds of bytes, hardly
    ever a special token, and each token depends on all tokens before it.
    """
    checkpoint = load_checkpoint(str(trained_run))
    checkpoint['model_args'] |= architecture
    torch.manual_seed(0)
    model = GPT(GPTConfig(**checkpoint['model_args']))
    weights = {}
    for name, weight in model.state_dict().items():
        weights[name] = 8 * weight if weight.dim() > 1 else weight
    weights['wte.weight'][256:] /= 1000            # special tokens become improbable
    weights['lm_head.weight'] = weights['wte.weight']  # the two are tied
    save_checkpoint(str(folder), {**checkpoint, 'model': weights})
    return folder


@pytest.fixture(scope='module')
def random_run(trained_run, tmp_path_factory):
    """A run with random weights and a context of 32 tokens."""
    return write_random_run(trained_run, tmp_path_factory.mktemp('random'))


@pytest.fixture(scope='module')
def random_run_16(trained_run, tmp_path_factory):
    """A run with random weights and 16 learned positions."""
    folder = tmp_path_factory.mktemp('random16')
    return write_random_run(trained_run, folder, pos='learned', block_size=16)


def greedy_ids(folder, ids, n):
    """The n most probable next ids, each from a forward pass over all ids before it."""
    model, _ = load_model(str(folder), {})
    model.eval()
    ids = list(ids)
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    return ids[-n:]


def sample_texts(*args):
    """Run sample.py and return the list of the samples that it prints."""
    device_line, output = ok(call('sample.py', *CPU, *args)).split('\n', 1)
    assert device_line.startswith('device cpu')
    *texts, rest = ('\n' + output).split(f'\n{SEPARATOR}\n')
    assert rest == ''
    texts[0] = texts[0].removeprefix('\n')
    return texts


def user(text):
    return {'role': 'user', 'content': text}


def assistant(text):
    return {'role': 'assistant', 'content': text}


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + '\n' for row in rows]
    path.write_text(''.join(lines), encoding='utf-8')


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


# -----------------------------------------------------------------------------
# Continuing a text

def test_the_command_line_continues_a_text_and_a_chat_ends_with_its_input(trained_run):
    args = [f'--out_dir={trained_run}', '--start=the king ', '--num_samples=2',
            '--max_new_tokens=40']
    text_process = start('sample.py', *args, *CPU)
    chat_process = start('sample.py', f'--out_dir={trained_run}', '--chat=True',
                         '--max_new_tokens=8', *CPU, stdin=subprocess.PIPE)
    text_result = finish(text_process)
    chat_result = finish(chat_process, 'the king\n/reset\n')

    _, text = ok(text_result).split('\n', 1)
    assert text.split(f'\n{SEPARATOR}\n') == [*sample_texts(*args), '']
    assert text.startswith('the king ')
    assert text_result.stderr == ''

    greeting, response, after_reset, last = ok(chat_result).split('> ')
    assert 'device cpu' in greeting
    assert len(response) > 1
    assert (after_reset, last, chat_result.stderr) == ('', '\n', '')


def test_temperature_0_top_k_1_and_a_tiny_top_p_all_sample_the_most_probable_tokens(random_run):
    args = [f'--out_dir={random_run}', '--start=the king ', '--max_new_tokens=20']
    ids = greedy_ids(random_run, b'the king ', 20)
    expected = 'the king ' + printable(Tokenizer.byte().decode(ids))
    assert sample_texts(*args, '--temperature=0', '--num_samples=2') == [expected] * 2
    for setting in ('--top_k=1', '--top_p=1e-6'):
        assert sample_texts(*args, setting, '--num_samples=1') == [expected]
    uncached = sample_texts(*args, '--temperature=0', '--use_cache=False', '--num_samples=1')
    assert uncached == [expected]


def test_the_same_seed_repeats_the_samples_and_another_seed_changes_them(trained_run):
    args = [f'--out_dir={trained_run}', '--num_samples=2', '--max_new_tokens=40']
    first = sample_texts(*args, '--seed=1')
    assert first == sample_texts(*args, '--seed=1')
    assert first[0] != first[1]
    assert not set(first) & set(sample_texts(*args, '--seed=2'))


def test_init_from_names_a_run_as_out_dir_does(trained_run):
    args = ['--num_samples=1', '--max_new_tokens=40']
    by_init_from = sample_texts(f'--init_from={trained_run}', *args)
    assert by_init_from == sample_texts(f'--out_dir={trained_run}', *args)


@pytest.mark.parametrize('fixture', ['trained_run', 'random_run', 'random_run_16'])
def test_streaming_prints_the_text_that_sampling_at_once_prints(request, fixture):
    # The samples contain invalid UTF-8 and are longer than the context.
    folder = request.getfixturevalue(fixture)
    args = [f'--out_dir={folder}', '--max_new_tokens=80', '--start=né 王']
    first, second = sample_texts(*args, '--num_samples=2', '--stream=True')
    assert [first] == sample_texts(*args, '--num_samples=1')
    assert first != second


def test_the_start_may_be_a_file_whose_bytes_are_all_used(random_run, tmp_path):
    path = tmp_path / 'start.txt'
    path.write_bytes('the né\r\n\tking'.encode())
    [text] = sample_texts(f'--out_dir={random_run}', f'--start=FILE:{path}', '--num_samples=1',
                          '--temperature=0')
    # The model reads the carriage return, although it is not printed.
    ids = greedy_ids(random_run, 'the né\r\n\tking'.encode(), 10)
    assert ids != greedy_ids(random_run, 'the né\n\tking'.encode(), 10)
    continuation = printable(Tokenizer.byte().decode(ids)).rstrip('\ufffd')
    assert text.startswith('the né\n\tking' + continuation)

    missing = f'{tmp_path}/no.txt'
    result = call('sample.py', *CPU, f'--out_dir={random_run}', f'--start=FILE:{missing}')
    assert missing in one_line(result)


def test_an_empty_start_and_endoftext_are_the_beginning_of_a_document(random_run):
    tok = Tokenizer.byte()
    args = [f'--out_dir={random_run}', '--num_samples=1', '--max_new_tokens=10',
            '--temperature=0']
    ids = greedy_ids(random_run, [tok.special['<|endoftext|>']], 10)
    expected = printable(tok.decode(ids))
    assert sample_texts(*args, '--start=') == [expected]
    assert sample_texts(*args, '--start=<|endoftext|>') == ['<|endoftext|>' + expected]


def test_the_start_is_truncated_to_learned_positions_and_that_is_printed_once(random_run_16):
    args = [*CPU, f'--out_dir={random_run_16}', '--temperature=0', '--max_new_tokens=4',
            '--num_samples=1']
    last_16 = 'aaaathe king is '
    long_output = ok(call('sample.py', *args, '--start=' + 'b' * 36 + last_16))
    short_output = ok(call('sample.py', *args, f'--start={last_16}'))
    assert long_output.count('truncated') == 1
    assert 'truncated the start from 52 to 16 tokens\n' in long_output
    assert 'truncated' not in short_output
    # The last 16 tokens are continued.
    assert long_output.split(last_16)[1] == short_output.split(last_16)[1]


def test_a_missing_run_is_an_error_of_one_line_that_names_it(tmp_path):
    message = one_line(call('sample.py', f'--out_dir={tmp_path}/no'))
    assert f'{tmp_path}/no: no such run' in message


# -----------------------------------------------------------------------------
# Text in the terminal

@pytest.mark.parametrize('text', ['né', '王 and 👩‍👩‍👧‍👦', 'e\u0301 \U0001d49c'])
def test_a_character_split_over_several_tokens_is_printed_when_it_is_complete(text):
    printed = []
    received = []

    def tokens():
        for byte in text.encode():
            received.append(byte)
            yield byte
            # Python ignores the incomplete character at the end.
            complete = bytes(received).decode(errors='ignore')
            assert ''.join(printed) == complete

    for piece in sample.printed_text(tokens(), Tokenizer.byte()):
        printed.append(piece)
    assert ''.join(printed) == text
    assert '\ufffd' not in ''.join(printed)


@pytest.mark.parametrize('data', [
    b'a\xffb', b'\xe7\x8e', b'\xe7\x8ea\x80', b'\xf0\x9f\x91\xe7\x8e\x8b'])
def test_invalid_utf8_is_printed_as_python_decodes_it(data):
    printed = ''.join(sample.printed_text(data, Tokenizer.byte()))
    assert printed == data.decode(errors='replace')


def test_printing_ends_before_a_stop_token_and_samples_no_further_token():
    tok = Tokenizer.byte()
    end = tok.special['<|end|>']
    tokens = iter([*b'yes', end, *b'no'])
    assert ''.join(sample.printed_text(tokens, tok, [end])) == 'yes'
    assert bytes(tokens) == b'no'  # these were not taken


def test_control_characters_that_could_drive_a_terminal_are_not_printed(trained_run):
    evil = 'a\x1b[2Jb\x9b31mc\x07\x08\r\x00d\ne\tf\x7f'
    harmless = 'a[2Jb31mcd\ne\tf'
    assert ''.join(sample.printed_text(evil.encode(), Tokenizer.byte())) == harmless
    for setting in ('--stream=True', '--stream=False'):
        # An argument cannot contain a null character.
        [text] = sample_texts(f'--out_dir={trained_run}', '--start=' + evil.replace('\x00', ''),
                              '--num_samples=1', '--max_new_tokens=80', setting)
        assert text.startswith(harmless)
        assert not set(text) & set('\x1b\x9b\x07\x08\r\x7f')


# -----------------------------------------------------------------------------
# Prompts that do not fit the context

def test_a_prompt_may_have_the_tokens_that_the_response_leaves_of_the_context():
    tok = Tokenizer.byte()
    assert sample.prompt_limit(tok, block_size=32, max_new_tokens=8) == 24
    assert sample.prompt_limit(tok, block_size=128, max_new_tokens=1) == 127


@pytest.mark.parametrize('block_size', [8, 16, 31, 32, 100])
@pytest.mark.parametrize('max_new_tokens', [1, 8, 31, 32, 33, 1000])
def test_a_prompt_keeps_at_least_the_chat_markers_and_half_of_the_context(
        block_size, max_new_tokens):
    tok = Tokenizer.byte()
    limit = sample.prompt_limit(tok, block_size, max_new_tokens)
    markers = ['<|user|>', '<|end|>', '<|assistant|>']
    least = len(markers) + block_size // 2
    assert limit == max(least, block_size - max_new_tokens)
    assert limit <= block_size

    question = 'q' * 200
    [ids] = sample.encode_prompts([[user(question)]], tok, block_size, max_new_tokens)
    assert len(ids) == limit
    assert ids[-2:] == [tok.special['<|end|>'], tok.special['<|assistant|>']]
    n_letters = sum(id == ord('q') for id in ids)
    assert n_letters >= block_size // 2


@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_a_context_that_leaves_nothing_of_a_question_is_an_error(block_size):
    tok = Tokenizer.byte()
    message = (f'block_size {block_size} leaves nothing of a question: the chat format alone '
               'takes 3 tokens; use a model with a larger block_size')
    with pytest.raises(ValueError) as error:
        sample.prompt_limit(tok, block_size, max_new_tokens=1)
    assert str(error.value) == message
    with pytest.raises(ValueError, match='leaves nothing of a question'):
        sample.encode_prompts([[user('a')]], tok, block_size, max_new_tokens=1)
    assert sample.prompt_limit(tok, block_size=4, max_new_tokens=1000) == 4


def test_truncate_prompts_keeps_the_last_tokens_and_counts_the_truncated_prompts():
    prompts = [[1, 2, 3], [1, 2, 3, 4], [], [5, 6, 7, 8, 9]]
    truncated, n_truncated = sample.truncate_prompts(prompts, 3)
    assert truncated == [[1, 2, 3], [2, 3, 4], [], [7, 8, 9]]
    assert n_truncated == 2
    assert prompts[1] == [1, 2, 3, 4]  # the arguments are unchanged


def test_encode_prompts_returns_chats_truncated_on_the_left_and_prints_how_many(capsys):
    tok = Tokenizer.byte()
    history = [user('b' * 20), assistant('yes'), user('why')]
    conversations = [[user('a' * n)] for n in (1, 16, 17, 50)] + [history]
    chats = [render_chat(messages, tok)[0] for messages in conversations]
    prompts = sample.encode_prompts(conversations, tok, block_size=32, max_new_tokens=30)
    assert prompts == [ids[-19:] for ids in chats]
    assert [len(ids) for ids in prompts] == [4, 19, 19, 19, 19]
    assert capsys.readouterr().out == 'truncated 3 of 5 prompts to 19 tokens\n'

    quiet = sample.encode_prompts(conversations, tok, 32, 30, verbose=False)
    assert quiet == prompts
    assert sample.encode_prompts(conversations[:2], tok, 32, 30) == chats[:2]
    assert capsys.readouterr().out == ''


# -----------------------------------------------------------------------------
# Responses

def test_pad_left_puts_minus_one_before_shorter_rows():
    assert sample.pad_left([[1], [2, 3]]).tolist() == [[-1, 1], [2, 3]]


def test_responses_in_a_batch_equal_those_of_each_prompt_alone_and_keep_the_order():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32))
    tok = Tokenizer.byte()
    end = tok.special['<|end|>']
    prompts = [sample.prompt_ids([user(text)], tok) for text in ('ab', '', 'much longer')]
    # A batch holds prompts of similar length, so the order in batches is another one.
    together = sample.answer(model, tok, prompts, 6, batch_size=2, temperature=0)
    for prompt, response in zip(prompts, together, strict=True):
        out = model.generate(torch.tensor([prompt]), 6, temperature=0, stop=[end])
        ids = out[0, len(prompt):].tolist()
        text = tok.decode([token for token in ids if token != end])
        assert response == (text, end in ids)


def test_exact_match_is_the_share_of_equal_texts_and_none_if_a_gold_response_is_unknown():
    assert sample.exact_match(['a', 'b', 'c ', 'd'], ['a', 'x', 'c', 'd']) == 0.5
    assert sample.exact_match(['a', 'b'], ['a', None]) is None


class CountOfX(torch.nn.Module):
    """A reward model whose score is the number of the letter x in the response."""

    def __init__(self, block_size):
        super().__init__()
        self.trunk = GPT(GPTConfig(block_size=block_size, n_layer=1, n_head=1, n_embd=4))

    def forward(self, idx, mask):
        return ((idx == ord('x')) & (mask > 0)).sum(dim=1).float()


def test_best_of_n_keeps_the_response_with_the_highest_score():
    conversations = [[user('xxxxxx')], [user('a'), assistant('xxx'), user('b')]]
    texts = ['ax', 'xx', '', 'a longer x', 'xaxax', 'x']
    responses = [(text, True) for text in texts]
    best = sample.best_of_n(CountOfX(64), Tokenizer.byte(), conversations, responses, -3.0)
    assert best == ['xx', 'xaxax']


def test_best_of_n_replaces_the_score_of_an_unfinished_response():
    def best(missing_end_score, *responses):
        [text] = sample.best_of_n(CountOfX(64), Tokenizer.byte(), [[user('a')]], responses,
                                  missing_end_score)
        return text

    assert best(-3.0, ('xxxx', False), ('x', True), ('xx', True)) == 'xx'
    assert best(-3.0, ('xxxx', False), ('none', True)) == 'none'  # 0 is above -3
    assert best(0.5, ('xxxx', False), ('none', True)) == 'xxxx'   # 0 is below 0.5
    assert best(1.5, ('xxxx', False), ('x', True), ('xx', True)) == 'xx'
    assert best(-3.0, ('xxxx', False), ('x', False)) in ('xxxx', 'x')


def test_best_of_n_scores_the_last_block_of_a_long_conversation():
    # 12 tokens hold <|assistant|>, a response of 10 letters and <|end|>, and nothing before.
    scored = []

    class Recorder(CountOfX):
        def forward(self, idx, mask):
            scored.append((idx.tolist(), mask.tolist()))
            return super().forward(idx, mask)

    tok = Tokenizer.byte()
    responses = [('x' * 10, True), ('a', True)]
    best = sample.best_of_n(Recorder(12), tok, [[user('q' * 40)]], responses, -3.0)
    assert best == ['x' * 10]
    [(idx, mask)] = scored
    for row, row_mask, (text, _) in zip(idx, mask, responses, strict=True):
        ids, loss_mask = render_chat([user('q' * 40), assistant(text)], tok)
        assert row == ids[-12:]
        assert row_mask == loss_mask[-12:]


@pytest.mark.parametrize('causal', [True, False])
def test_best_of_n_in_batches_agrees_with_scores_of_single_responses(causal):
    torch.manual_seed(0)
    scorer = RewardModel(GPT(GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32,
                                       causal=causal))).eval()
    tok = Tokenizer.byte()
    conversations = [[user('ab')], [user('a longer one')]]
    texts = ['a', 'bcd', 'efghi', '', 'xy', 'longest']
    responses = [(text, True) for text in texts]
    expected = []
    for i, messages in enumerate(conversations):
        scores = {}
        for text in texts[3 * i:3 * i + 3]:
            ids, mask = render_chat([*messages, assistant(text)], tok)
            with torch.no_grad():
                scores[text] = scorer(torch.tensor([ids]), torch.tensor([mask])).item()
        expected.append(max(scores, key=scores.get))
    assert sample.best_of_n(scorer, tok, conversations, responses, -math.inf) == expected


# -----------------------------------------------------------------------------
# A file of prompts

def test_each_prompt_of_a_file_gets_the_response_it_would_get_alone(random_run, tmp_path):
    tok = Tokenizer.byte()
    texts = ['the king', 'a', '王 né ' * 2]
    rows = [{'prompt': text, 'id': i} for i, text in enumerate(texts)]
    # A response that the conversation already has is not part of the prompt.
    rows[1]['messages'] = [user('a'), assistant('an earlier response')]
    write_jsonl(tmp_path / 'prompts.jsonl', rows)
    args = [*CPU, f'--out_dir={random_run}', '--temperature=0', '--max_new_tokens=8',
            f'--prompts={tmp_path}/prompts.jsonl']
    for name, batch_size in (('new/a', 32), ('b', 1)):
        out = f'{tmp_path}/{name}.jsonl'
        printed = ok(call('sample.py', *args, f'--answers={out}', f'--batch_size={batch_size}'))
        assert printed.splitlines()[-1] == f'3 responses written to {out}'

    # Each line is the line of the prompts file with a "response".
    expected = []
    for row, text in zip(rows, texts, strict=True):
        prompt, _ = render_chat([user(text)], tok)
        response = tok.decode(greedy_ids(random_run, prompt, 8)).split('<|end|>')[0]
        expected.append({**row, 'response': response})
    assert read_jsonl(tmp_path / 'new' / 'a.jsonl') == expected
    assert read_jsonl(tmp_path / 'b.jsonl') == expected
    assert len({row['response'] for row in expected}) == 3


def test_the_number_of_truncated_prompts_of_a_file_is_printed_once(random_run_16, tmp_path):
    write_jsonl(tmp_path / 'prompts.jsonl', [{'prompt': 'b' * n} for n in (40, 2, 41)])
    printed = ok(call('sample.py', *CPU, f'--out_dir={random_run_16}', '--temperature=0',
                      '--max_new_tokens=4', f'--prompts={tmp_path}/prompts.jsonl',
                      f'--answers={tmp_path}/a.jsonl'))
    assert printed.count('truncated 2 of 3 prompts to 12 tokens\n') == 1
    assert len(read_jsonl(tmp_path / 'a.jsonl')) == 3


def test_a_bad_line_of_prompts_is_named_and_nothing_is_written(trained_run, tmp_path):
    path = tmp_path / 'prompts.jsonl'
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n', encoding='utf-8')
    args = [*CPU, f'--out_dir={trained_run}', f'--prompts={path}']
    message = one_line(call('sample.py', *args, f'--answers={tmp_path}/a.jsonl'))
    assert 'prompts.jsonl:2' in message
    assert "'prompt'" in message
    assert not (tmp_path / 'a.jsonl').exists()

    # Earlier responses stay as they are.
    (tmp_path / 'a.jsonl').write_text('{"response": "earlier"}\n', encoding='utf-8')
    one_line(call('sample.py', *args, f'--answers={tmp_path}/a.jsonl'))
    assert read_jsonl(tmp_path / 'a.jsonl') == [{'response': 'earlier'}]


def test_responses_to_a_file_take_what_the_context_leaves_the_prompts_of_their_batch(
        random_run, tmp_path, monkeypatch):
    write_jsonl(tmp_path / 'prompts.jsonl', [{'prompt': 'the'}, {'prompt': 'a queen'}])
    generate = GPT.generate
    limits = []

    def record(model, idx, max_new_tokens, **options):
        limits.append(max_new_tokens)
        return generate(model, idx, max_new_tokens, **options)

    monkeypatch.setattr(GPT, 'generate', record)
    for batch_size in (1, 2):
        ok(call('sample.py', *CPU, f'--out_dir={random_run}', f'--batch_size={batch_size}',
                f'--prompts={tmp_path}/prompts.jsonl', f'--answers={tmp_path}/a.jsonl'))
    # <|user|>a queen<|end|><|assistant|> has 10 tokens, the other prompt fewer, the context 32.
    shorter, longer, both = limits
    assert longer == both == 22
    assert shorter > 22


def test_an_existing_file_is_replaced_by_answers_only_if_it_is_named(
        trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / 'answers.jsonl', [{'prompt': 'a'}])
    message = one_line(call('sample.py', *CPU, f'--out_dir={trained_run}',
                            '--prompts=answers.jsonl'))
    assert 'answers.jsonl exists' in message and '--answers=FILE' in message
    assert read_jsonl(tmp_path / 'answers.jsonl') == [{'prompt': 'a'}]


def test_answers_that_cannot_be_written_are_an_error_before_any_response(
        trained_run, tmp_path, monkeypatch):
    write_jsonl(tmp_path / 'prompts.jsonl', [{'prompt': 'a'}])
    (tmp_path / 'folder').mkdir()

    def generate(*args, **kwargs):
        raise AssertionError('generated before the output was tried')
    monkeypatch.setattr(GPT, 'generate', generate)
    message = one_line(call('sample.py', *CPU, f'--out_dir={trained_run}',
                            f'--prompts={tmp_path}/prompts.jsonl',
                            f'--answers={tmp_path}/folder'))
    assert f'{tmp_path}/folder' in message


# -----------------------------------------------------------------------------
# Chat

def chat_output(folder, stdin, *args):
    """The output of a chat after each prompt sign, for an input that is piped in."""
    printed = ok(call('sample.py', *CPU, f'--out_dir={folder}', '--chat=True', '--temperature=0',
                      *args, stdin=stdin))
    greeting, *outputs, last = printed.split('\n', 1)[1].split('> ')
    assert '/reset' in greeting
    assert last == '\n'
    return outputs


def conversation(texts, system_prompt=''):
    """The messages of texts by the user and the assistant in turn."""
    messages = []
    if system_prompt:
        messages.append({'role': 'system', 'content': system_prompt})
    for i, text in enumerate(texts):
        messages.append(user(text) if i % 2 == 0 else assistant(text))
    return messages


def greedy_response(folder, messages, max_new_tokens, limit=32):
    """The response to the last `limit` tokens of a conversation."""
    tok = Tokenizer.byte()
    ids, _ = render_chat(messages, tok)
    new = greedy_ids(folder, ids[-limit:], max_new_tokens)
    return printable(tok.decode(new).split('<|end|>')[0])


def test_a_chat_remembers_its_messages_until_reset(random_run):
    first = greedy_response(random_run, conversation(['the']), 4)
    second = greedy_response(random_run, conversation(['the', first, 'a']), 4)
    alone = greedy_response(random_run, conversation(['a']), 4)
    assert second != alone
    outputs = chat_output(random_run, 'the\na\n/reset\n\na\n', '--max_new_tokens=4')
    assert outputs == [f'{first}\n', f'{second}\n', '', '', f'{alone}\n']


def test_a_chat_has_a_system_prompt_also_after_reset(random_run):
    expected = greedy_response(random_run, conversation(['the'], 'Be brief.'), 4)
    assert expected != greedy_response(random_run, conversation(['the']), 4)
    outputs = chat_output(random_run, 'the\n/reset\nthe\n', '--max_new_tokens=4',
                          '--system=Be brief.')
    assert outputs == [f'{expected}\n', '', f'{expected}\n']


def test_a_response_takes_what_the_context_leaves_unless_max_new_tokens_is_given(random_run):
    # <|user|>the<|end|><|assistant|> has 6 tokens, and the context 32.
    fits = greedy_response(random_run, conversation(['the']), 26)
    longer = greedy_response(random_run, conversation(['the']), 40)
    assert len(fits.encode()) < len(longer.encode())
    assert chat_output(random_run, 'the\n') == [f'{fits}\n']
    assert chat_output(random_run, 'the\n', '--max_new_tokens=40') == [f'{longer}\n']


@pytest.mark.parametrize('n_prompt, block_size, given, expected', [
    (6, 32, 0, 26), (6, 32, 40, 40), (20, 8192, 0, 300), (8, 8, 0, 1)])
def test_the_room_for_a_response(n_prompt, block_size, given, expected):
    assert sample.response_room(n_prompt, block_size, given) == expected


def test_a_long_chat_loses_whole_turns_and_keeps_its_system_prompt():
    tok = Tokenizer.byte()
    messages = conversation(['one', 'two', 'three', 'four', 'five'], 'Sys.')
    # In our format a message takes its letters and two markers; the response adds one marker, and
    # the system prompt an empty line.
    assert len(render_chat(messages, tok)[0]) == 4 + 2 + 19 + 5 * 2 + 1
    assert sample.recent_turns(messages, tok, 36) == messages
    assert sample.recent_turns(messages, tok, 35) == [messages[0], *messages[3:]]
    assert sample.recent_turns(messages, tok, 20) == [messages[0], messages[5]]
    # The last question is never lost.
    assert sample.recent_turns(messages, tok, 1) == [messages[0], messages[5]]
    assert sample.recent_turns(messages[1:], tok, 19) == messages[5:]


def test_a_long_chat_continues_with_its_last_turns_and_that_is_printed_once(random_run):
    first = greedy_response(random_run, conversation(['the king']), 8)
    # Together with the first turn, this question has more than 24 tokens.
    second = greedy_response(random_run, conversation(['the queen of']), 8)
    third = greedy_response(random_run, conversation(['a stone']), 8)
    n_tokens = len(render_chat(conversation(['the king', first, 'the queen of']),
                               Tokenizer.byte())[0])
    assert n_tokens > 24
    note = (f'[the conversation has {n_tokens} tokens; the model sees the last 15, because '
            'block_size is 32]\n')
    outputs = chat_output(random_run, 'the king\nthe queen of\na stone\n', '--max_new_tokens=8')
    assert outputs == [f'{first}\n', f'{note}{second}\n', f'{third}\n']


def test_a_question_that_is_too_long_by_itself_is_truncated_on_the_left(random_run):
    question = 'the king of the old stone hall'
    response = greedy_response(random_run, conversation([question]), 8, limit=24)
    note = ('[the conversation has 33 tokens; the model sees the last 24, because block_size is '
            '32]\n')
    outputs = chat_output(random_run, f'{question}\n', '--max_new_tokens=8')
    assert outputs == [f'{note}{response}\n']


def test_lines_that_are_pasted_together_are_one_message(random_run):
    pty = pytest.importorskip('pty')  # not on Windows
    controller, terminal = pty.openpty()
    process = start('sample.py', *CPU, f'--out_dir={random_run}', '--chat=True',
                    '--temperature=0', '--max_new_tokens=4', stdin=terminal, stdout=terminal)
    os.close(terminal)

    def wait_for(text):
        received = ''
        while text not in received:
            ready, _, _ = select.select([controller], [], [], 60)
            assert ready, f'{text!r} is not printed after {received!r}'
            received += os.read(controller, 1000).decode().replace('\r\n', '\n')

    wait_for('> ')
    os.write(controller, b'the\na\n')
    expected = greedy_response(random_run, conversation(['the\na']), 4)
    wait_for(f'{expected}\n> ')
    os.write(controller, b'\x04')
    assert process.wait(timeout=60) == 0
    os.close(controller)


def test_a_model_that_never_learned_to_chat_is_named_before_the_chat(trained_run, small_sft):
    printed = ok(call('sample.py', *CPU, f'--out_dir={trained_run}', '--chat=True'))
    assert f'note: {trained_run} was trained on texts, not on chats' in printed
    assert f'python sft.py --init_from={trained_run} teaches it' in printed
    printed = ok(call('sample.py', *CPU, f'--out_dir={small_sft.folder}', '--chat=True'))
    assert 'note:' not in printed


def test_ctrl_c_stops_a_response_and_not_the_chat(trained_run, monkeypatch, capsys):
    model, tok = load_model(str(trained_run), {})
    messages = iter(['hi', 'and?'])
    prompts = []

    def read_message(prompt_sign):
        try:
            return next(messages)
        except StopIteration:
            raise EOFError from None

    def stream(idx, max_new_tokens, stop, suppress):
        assert max_new_tokens == 32 - idx.size(1)
        assert suppress == []  # the byte tokenizer has all ids of the model
        prompts.append(tok.decode(idx[0].tolist()))
        yield from torch.tensor([*b'yes'])
        if len(prompts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr('builtins.input', read_message)
    monkeypatch.setattr(model, 'stream', stream)
    sample.chat_loop(model, tok, '', 0, {})
    assert capsys.readouterr().out.splitlines()[-3:] == ['yes [stopped]', 'yes', '']
    conversation = '<|user|>hi<|end|><|assistant|>yes<|end|><|user|>and?<|end|><|assistant|>'
    assert prompts == ['<|user|>hi<|end|><|assistant|>', conversation]


def test_a_chat_with_a_model_without_chat_tokens_is_an_error_of_one_line(trained_run, tmp_path):
    checkpoint = load_checkpoint(str(trained_run))
    tokens = {byte: bytes([byte]) for byte in range(256)}
    tok = Tokenizer(tokens, special={'<|endoftext|>': 260})
    save_checkpoint(str(tmp_path), {**checkpoint, 'tokenizer': tok.to_dict()})
    result = call('sample.py', *CPU, f'--out_dir={tmp_path}', '--chat=True', stdin='hello\n')
    assert 'the tokenizer has no special tokens for chats' in one_line(result)
