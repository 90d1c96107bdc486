"""
What sample.py promises, of a small run that is trained here. Independent of it: the model's own logits, walked by
hand, and UTF-8 as Python decodes it.
"""
import json, subprocess, types

import pytest
import torch

import sample
from bpe import Tokenizer, printable, render_chat
from configurator import load_checkpoint, save_checkpoint
from conftest import TINY, call, finish, flags, ok, one_line, start
from data.pretrained import load_model
from model import GPT, GPTConfig

CPU = ['--device=cpu', '--dtype=float32']


@pytest.fixture(scope='module')
def run(dataset, tmp_path_factory):
    """The folder of a run that has learned a little."""
    folder = tmp_path_factory.mktemp('run')
    ok(call('train.py', *flags(TINY, dataset=dataset, out_dir=folder, max_iters=60, eval_interval=60)))
    return folder


def babbler(run, folder, **changed):
    """The folder of a run whose weights are random, and large: it says all kinds of bytes, special tokens hardly
    ever, and each hangs on all that was said before."""
    checkpoint = load_checkpoint(str(run))
    checkpoint['model_args'] |= changed
    torch.manual_seed(0)
    model = GPT(GPTConfig(**checkpoint['model_args']))
    weights = {name: 8 * w if w.dim() > 1 else w for name, w in model.state_dict().items()}
    weights['wte.weight'][256:] /= 1000
    weights['lm_head.weight'] = weights['wte.weight']  # they are tied
    save_checkpoint(str(folder), {**checkpoint, 'model': weights})
    return folder


@pytest.fixture(scope='module')
def babble(run, tmp_path_factory):
    return babbler(run, tmp_path_factory.mktemp('babble'))


@pytest.fixture(scope='module')
def babble16(run, tmp_path_factory):
    """Positions are learned, 16 of them."""
    return babbler(run, tmp_path_factory.mktemp('babble16'), pos='learned', block_size=16)


def likeliest(folder, ids, n):
    """The n ids that the model's logits make the likeliest, one after another, each from all that stands before."""
    model, ids = load_model(str(folder), {})[0].eval(), list(ids)
    for _ in range(n):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return ids[-n:]


def samples(*args):
    """What sample.py says of a run, a text for each sample."""
    device, *said = ok(call('sample.py', *CPU, *args)).split('\n')
    assert device.startswith('device cpu')
    *texts, rest = '\n'.join(said).split('\n' + '-' * 15 + '\n')
    assert rest == ''
    return texts


def test_as_a_user_runs_it_it_continues_the_given_text_and_a_conversation_ends_with_its_input(run):
    args = [f'--out_dir={run}', '--start=the king ', '--num_samples=2', '--max_new_tokens=40']
    texts = start('sample.py', *args, *CPU)
    words = start('sample.py', f'--out_dir={run}', '--chat=True', '--max_new_tokens=8', *CPU, stdin=subprocess.PIPE)
    texts, words = finish(texts), finish(words, 'the king\n/reset\n')
    device, text = ok(texts).split('\n', 1)
    assert text.split('\n' + '-' * 15 + '\n') == [*samples(*args), '']
    assert text.startswith('the king ') and texts.stderr == ''
    hello, answer, reset, end = ok(words).split('> ')
    assert 'device cpu' in hello and len(answer) > 1 and (reset, end, words.stderr) == ('', '\n', '')


def test_temperature_0_and_its_equals_say_what_is_likeliest(babble):
    args = [f'--out_dir={babble}', '--start=the king ', '--max_new_tokens=20']
    expected = 'the king ' + printable(Tokenizer.byte().decode(likeliest(babble, b'the king ', 20)))
    assert samples(*args, '--temperature=0', '--num_samples=2') == [expected] * 2
    for how in ('--top_k=1', '--top_p=1e-6'):
        assert samples(*args, how, '--num_samples=1') == [expected]
    assert samples(*args, '--temperature=0', '--use_cache=False', '--num_samples=1') == [expected]


def test_a_seed_repeats_its_samples_and_another_gives_others(run):
    args = [f'--out_dir={run}', '--num_samples=2', '--max_new_tokens=40']
    first = samples(*args, '--seed=1')
    assert first == samples(*args, '--seed=1') and first[0] != first[1]
    assert not set(first) & set(samples(*args, '--seed=2'))


def test_init_from_names_a_run_as_out_dir_does(run):
    args = ['--num_samples=1', '--max_new_tokens=40']
    assert samples(f'--init_from={run}', *args) == samples(f'--out_dir={run}', *args)


@pytest.mark.parametrize('folder', ['run', 'babble', 'babble16'])
def test_streaming_says_what_sampling_at_once_says(request, folder):
    """Bytes that are no characters too, and far past the context."""
    args = [f'--out_dir={request.getfixturevalue(folder)}', '--max_new_tokens=80', '--start=né 王']
    first, second = samples(*args, '--num_samples=2', '--stream=True')
    assert [first] == samples(*args, '--num_samples=1') and first != second


def test_the_start_may_be_a_file_which_is_taken_to_the_byte(babble, tmp_path):
    (tmp_path / 'start.txt').write_bytes('the né\r\n\tking'.encode())
    text, = samples(f'--out_dir={babble}', f'--start=FILE:{tmp_path}/start.txt', '--num_samples=1', '--temperature=0')
    ids = likeliest(babble, 'the né\r\n\tking'.encode(), 10)
    assert ids != likeliest(babble, 'the né\n\tking'.encode(), 10)  # it is read, though it is not printed
    assert text.startswith('the né\n\tking' + printable(Tokenizer.byte().decode(ids)).rstrip('\ufffd'))
    message = one_line(call('sample.py', *CPU, f'--out_dir={babble}', f'--start=FILE:{tmp_path}/no.txt'))
    assert f'{tmp_path}/no.txt' in message


def test_an_empty_start_is_the_beginning_of_a_document(babble):
    tok = Tokenizer.byte()
    text, = samples(f'--out_dir={babble}', '--start=', '--num_samples=1', '--max_new_tokens=10', '--temperature=0')
    assert text == printable(tok.decode(likeliest(babble, [tok.special['<|endoftext|>']], 10)))


def test_a_missing_run_is_one_line_that_names_it(tmp_path):
    assert f'{tmp_path}/no: no such checkpoint' in one_line(call('sample.py', f'--out_dir={tmp_path}/no'))


@pytest.mark.parametrize('text', ['né', '王 and 👩‍👩‍👧‍👦', 'e\u0301 \U0001d49c'])
def test_a_character_that_is_split_over_tokens_is_said_when_it_is_whole(text):
    tok, said, given = Tokenizer.byte(), [], []

    def tokens():
        for byte in text.encode():
            given.append(byte)
            yield byte
            whole = bytes(given).decode(errors='ignore')  # of a prefix, the characters that are complete
            assert ''.join(said) == whole
    for piece in sample.spoken(tokens(), tok):
        said.append(piece)
    assert ''.join(said) == text and '\ufffd' not in ''.join(said)


def test_bytes_that_are_no_character_are_said_as_python_decodes_them():
    for data in (b'a\xffb', b'\xe7\x8e', b'\xe7\x8ea\x80', b'\xf0\x9f\x91\xe7\x8e\x8b'):
        assert ''.join(sample.spoken(data, Tokenizer.byte())) == data.decode(errors='replace')


def test_what_is_said_ends_before_a_stop_token():
    tok = Tokenizer.byte()
    end, drawn = tok.special['<|end|>'], iter([*b'yes', tok.special['<|end|>'], *b'no'])
    assert ''.join(sample.spoken(drawn, tok, [end])) == 'yes' and bytes(drawn) == b'no'  # and no token more is drawn


def test_control_characters_by_which_a_terminal_is_driven_are_not_said(run):
    evil = 'a\x1b[2Jb\x9b31mc\x07\x08\r\x00d\ne\tf\x7f'
    harmless = 'a[2Jb31mcd\ne\tf'
    assert ''.join(sample.spoken(evil.encode(), Tokenizer.byte())) == harmless
    for how in ('--stream=True', '--stream=False'):
        text, = samples(f'--out_dir={run}', '--start=a\x1b[2Jb\x9b31mc\x07\x08\rd\ne\tf\x7f', '--num_samples=1',
                        '--max_new_tokens=80', how)
        assert text.startswith(harmless) and not set(text) & set('\x1b\x9b\x07\x08\r\x7f')


# -----------------------------------------------------------------------------
# Prompts, and conversations

def jsonl(path, rows=None):
    if rows is not None:
        path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def user(text):
    return {'role': 'user', 'content': text}


def test_each_prompt_of_a_file_gets_the_answer_it_would_get_alone(babble, tmp_path):
    tok, asked = Tokenizer.byte(), [{'prompt': p, 'id': i} for i, p in enumerate(['the king', 'a', '王 né ' * 2])]
    asked[1]['messages'] = [user('a'), {'role': 'assistant', 'content': 'which was answered before'}]
    jsonl(tmp_path / 'asked.jsonl', asked)
    args = [*CPU, f'--out_dir={babble}', '--temperature=0', '--max_new_tokens=8', f'--prompts={tmp_path}/asked.jsonl']
    for name, size in (('new/a', 32), ('b', 1)):
        said = ok(call('sample.py', *args, f'--answers={tmp_path}/{name}.jsonl', f'--batch_size={size}'))
        assert said.splitlines()[-1] == f'3 answers written to {tmp_path}/{name}.jsonl'
    alone = [tok.decode(likeliest(babble, render_chat([user(row['prompt'])], tok)[0], 8)) for row in asked]
    expected = [{**row, 'response': text.split('<|end|>')[0]} for row, text in zip(asked, alone)]
    assert jsonl(tmp_path / 'new' / 'a.jsonl') == jsonl(tmp_path / 'b.jsonl') == expected
    assert len({row['response'] for row in expected}) == 3


def test_a_bad_line_of_prompts_is_named_and_nothing_is_answered(run, tmp_path):
    (tmp_path / 'asked.jsonl').write_text('{"prompt": "a"}\n{"question": "b"}\n')
    message = one_line(call('sample.py', *CPU, f'--out_dir={run}', f'--prompts={tmp_path / "asked.jsonl"}',
                            f'--answers={tmp_path / "a.jsonl"}'))
    assert 'asked.jsonl:2' in message and "'prompt'" in message and not (tmp_path / 'a.jsonl').exists()


def chat(run, stdin, *args):
    """The answers of a conversation that is piped in."""
    said = ok(call('sample.py', *CPU, f'--out_dir={run}', '--chat=True', '--temperature=0', '--max_new_tokens=8', *args,
                   stdin=stdin))
    hello, *answers, last = said.split('\n', 1)[1].split('> ')
    assert '/reset' in hello and last == '\n'
    return answers


def test_a_conversation_is_remembered_until_reset(babble):
    tok = Tokenizer.byte()

    def answer(*history):
        roles = ['user', 'assistant'] * len(history)
        ids, _ = render_chat([{'role': role, 'content': text} for role, text in zip(roles, history)], tok)
        return printable(tok.decode(likeliest(babble, ids[-24:], 8)).split('<|end|>')[0])  # 8 of 32 are for the answer
    first = answer('the')
    second = answer('the', first, 'a')
    assert second != answer('a')
    assert chat(babble, 'the\na\n/reset\n\na\n') == [f'{first}\n', f'{second}\n', '', '', f'{answer("a")}\n']


def test_ctrl_c_stops_an_answer_and_not_the_conversation(run, monkeypatch, capsys):
    model, tok = load_model(str(run), {})
    said, asked = iter(['hi', 'and?']), []

    def read(prompt):
        try:
            return next(said)
        except StopIteration:
            raise EOFError

    def stream(idx, stop):
        asked.append(tok.decode(idx[0].tolist()))
        yield from torch.tensor([*b'yes'])
        if len(asked) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr('builtins.input', read)
    monkeypatch.setattr(sample, 'run', types.SimpleNamespace(device='cpu'), raising=False)
    monkeypatch.setattr(sample, 'max_new_tokens', 0)
    sample.converse(model, tok, stream)
    assert capsys.readouterr().out.splitlines()[1:] == ['yes [stopped]', 'yes', '']
    assert asked[1] == ('<|user|>hi<|end|><|assistant|>yes<|end|><|user|>and?<|end|><|assistant|>')[-len(asked[1]):]


def test_a_prompt_longer_than_the_context_is_cut_on_the_left_and_that_is_said_once(babble16, tmp_path):
    args = [*CPU, f'--out_dir={babble16}', '--temperature=0', '--max_new_tokens=4', '--num_samples=1']
    end = 'aaaathe king is '
    said, short = (ok(call('sample.py', *args, f'--start={text}')) for text in ('b' * 36 + end, end))
    assert said.count('cut') == 1 and '[a prompt of 52 tokens is cut on the left to 16; block_size is 16]' in said
    assert 'cut' not in short and said.split(end)[1] == short.split(end)[1]  # its end is what is continued
    jsonl(tmp_path / 'asked.jsonl', [{'prompt': 'b' * n} for n in (40, 2, 41)])
    said = ok(call('sample.py', *args, f'--prompts={tmp_path}/asked.jsonl', f'--answers={tmp_path}/a.jsonl'))
    assert said.count('cut') == 1 and len(jsonl(tmp_path / 'a.jsonl')) == 3


def test_however_long_the_answer_may_be_half_of_the_context_is_left_to_the_prompt():
    model = types.SimpleNamespace(config=types.SimpleNamespace(block_size=32))
    ids = list(range(100))
    assert sample.fit(ids, model, 8) == ids[-24:] and sample.fit(ids, model, 300) == ids[-16:]
    assert sample.fit(ids[:16], model, 300) == ids[:16]


def test_a_model_without_chat_tokens_says_so(run, tmp_path):
    checkpoint = load_checkpoint(str(run))
    tok = Tokenizer({byte: bytes([byte]) for byte in range(256)}, special={'<|endoftext|>': 260})
    save_checkpoint(str(tmp_path), {**checkpoint, 'tokenizer': tok.to_dict()})
    result = call('sample.py', *CPU, f'--out_dir={tmp_path}', '--chat=True', stdin='hello\n')
    assert 'no special tokens for chats' in one_line(result)
