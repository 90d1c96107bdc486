"""What bpe.py promises. Independent of it: a naive trainer, and Hugging Face's tokenizers and transformers."""
import json, os, random, subprocess, sys, unicodedata
from collections import Counter

import numpy as np
import pytest
import regex
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import bpe
from bpe import Tokenizer, get_tokenizer, render_chat
from data.dataset import read_jsonl, write_dataset

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def made_up_text(n_words, seed=0):
    """English-like text: the commoner a word the shorter, with numbers, capitals, contractions and lines."""
    rng = random.Random(seed)
    syllables = ['ba', 'the', 'an', 'or', 'ing', 'wé', 'ti', 'on', 'sh', 'ell', 'no', 'ma', '字', 'ß']
    words = [''.join(rng.choices(syllables, k=1 + i // 60)) for i in range(240)]
    ends = [' ', ' ', ' ', ' ', ', ', '. ', "'s ", "'ll ", '\n', '\n\n', '  ', ' 17 ', ' 2024 ', '! ', '"\r\n\t']
    picks = rng.choices(words, weights=[1 / (i + 1) for i in range(240)], k=n_words)
    return ''.join(word.title() * (rng.random() < 0.1) or word for word in picks for word in (word, rng.choice(ends)))


PIECES = [*'abcdefgXYZ', 'the', ' and', "'s", "'LL", "don't", "'re", '’s', ' ', '  ', '\t', '\n', '\r\n', '\n\n ',
          '\u00a0', '\u2003', '\u2028', '\x00', '\x0b', '\x1c', '\x85', '\u200b', '\ufeff', '7', '42', '12345', '½',
          '٣', 'Ⅷ', '²', 'é', 'e\u0301', 'ñ', 'ﬁ', 'Å', 'ß', 'İ', 'ſ', '日本', '語', '한국', 'ก็', 'हिन्दी', 'עב', '👍🏽',
          '👩‍👩‍👧‍👦', '🇫🇷', '\u0338', '\U0001d49c', '\U0010ffff', '.', ',', '...', '!?', '"', '(', '_', '-', '$', '<|', '|>']


def random_strings(n, seed=1):
    """Nine in ten are made of PIECES, one of any characters whose properties all libraries' tables agree on."""
    rng = random.Random(seed)
    old = [chr(c) for c in range(0x3000) if unicodedata.ucd_3_2_0.category(chr(c)) != 'Cn']
    return [''.join(rng.choices(PIECES if i % 10 else old, k=rng.randint(1, 9))) for i in range(n)]


@pytest.fixture(scope='module')
def text():
    return made_up_text(30_000)


@pytest.fixture(scope='module')
def trained(text):
    return Tokenizer.train(text, 700)


def hugging_face(tokenizer, path):
    tokenizer.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


# Training

def naive_bpe(text, n_tokens, pattern):
    """Count every pair anew for each merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(pattern, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < n_tokens:
        counts = Counter((tokens.index(a), tokens.index(b)) for word in words for a, b in zip(word, word[1:]))
        if not counts:
            break
        a, b = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] == tokens[a] and word[i + 1] == tokens[b]:
                    word[i:i + 2] = [tokens[a] + tokens[b]]
                i += 1
        tokens.append(tokens[a] + tokens[b])
    return tokens


@pytest.mark.parametrize('pattern', bpe.PATTERNS)
def test_training_equals_a_naive_trainer(pattern):
    rng = random.Random(0)
    samples = ['', 'a', 'aaabdaaabac', 'aaaaaaaaaaa aaaaa aaaa', 'hahahahaha haha', made_up_text(150),
               *(''.join(rng.choices('ab \n1é', k=rng.randint(1, 80))) for _ in range(40))]
    for sample in samples:
        assert bpe.train_bpe(sample, 300, bpe.PATTERNS[pattern]) == naive_bpe(sample, 300, bpe.PATTERNS[pattern])


def test_training_equals_hugging_faces_trainer(text):
    """Ties between equally frequent pairs go by ids, so its alphabet is put in the order of the bytes."""
    shown = lambda word: ''.join(chr(0x4e00 + byte) for byte in word)
    words = [shown(word.encode()) for word in regex.findall(bpe.PATTERNS['digits'], text)]
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.train_from_iterator([' '.join(words)], trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=[shown([b]) for b in range(256)], show_progress=False))
    theirs = sorted(theirs.get_vocab().items(), key=lambda item: item[1])
    assert [name for name, _ in theirs] == [shown(token) for token in bpe.train_bpe(text, 700, bpe.PATTERNS['digits'])]


def test_vocab_size_counts_bytes_merges_and_special_tokens(trained):
    assert trained.vocab_size == 700 and len(trained.merges) == 700 - 256 - 5
    assert all(trained.decode_bytes([b]) == bytes([b]) for b in range(256))
    assert trained.special == {name: 695 + i for i, name in enumerate(bpe.SPECIAL)}
    byte = Tokenizer.byte()
    assert byte.vocab_size == 261 and byte.special == {name: 256 + i for i, name in enumerate(bpe.SPECIAL)}
    assert byte.encode('né\0') == list('né\0'.encode())


@pytest.mark.parametrize('text, size, words', [('', 300, 'no text'), ('ab ab', 260, 'ask for 261'),
                                               ('ab ab', 9999, 'ask for 263'), ('a\ud800', 300, 'position 1'), (None, 300, 'no text')])
def test_impossible_training_is_refused(text, size, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.train(text, size)


# Encoding and decoding

def test_tiktoken_equals_the_plain_encoder(trained):
    strings = random_strings(3000, seed=2)
    for pattern in bpe.PATTERNS:
        tokenizer = Tokenizer.train(made_up_text(3000), 500, pattern)
        for string in strings:
            assert tokenizer.encode(string) == tokenizer.encode_plain(string), repr(string)
    assert trained.encode(made_up_text(2000, seed=5)) == trained.encode_plain(made_up_text(2000, seed=5))


def test_text_comes_back_exactly(trained):
    hard = ['', '\ufeffBOM', 'a\r\nb\rc\n', '\0\0', '👩‍👩‍👧‍👦', 'e\u0301é', '\x7f\x80\xff', '\U0010ffff', ' ' * 300,
            '<|end|> <|endoftext|>', *random_strings(3000, seed=3)]
    for tokenizer in (Tokenizer.byte(), trained):
        for string in hard:
            assert tokenizer.decode(tokenizer.encode(string)) == string
            assert tokenizer.decode(tokenizer.encode(string, special=True)) == string


def test_a_lone_surrogate_is_an_error_that_names_its_position(trained):
    for call in (trained.encode, trained.encode_plain):
        with pytest.raises(ValueError, match=r'ud83d.* position 3'):
            call('abc\ud83d')


def test_special_tokens_in_a_users_text_are_plain_text(trained):
    for tokenizer in (Tokenizer.byte(), trained):
        for name, id in tokenizer.special.items():
            assert max(tokenizer.encode(f'a{name}b')) < 256 + len(tokenizer.merges)
            assert tokenizer.encode(f'a{name}b', special=True) == [97, id, 98]
            assert tokenizer.decode([id]) == name


def test_ids_outside_the_vocabulary_are_refused(trained):
    for id in (-1, 700):
        with pytest.raises(ValueError, match=f'token id {id} .* 700'):
            trained.decode([0, id])


def test_broken_utf8_decodes_to_replacement_characters(trained):
    assert trained.decode([0xe9, 97]) == '\ufffda' and trained.decode_bytes([0xe9, 97]) == b'\xe9a'


def test_streaming_never_shows_half_a_character(trained):
    string = 'né 👩‍👩‍👧 日本 <|x'
    for tokenizer in (Tokenizer.byte(), trained):
        decode = tokenizer.stream_decoder()
        parts = [decode([id]) for id in tokenizer.encode(string)]
        assert ''.join(parts) == string and '\ufffd' not in ''.join(parts)
        assert decode([0xf0, 0x9f]) == '' and decode([], final=True) == '\ufffd'


def test_printed_text_cannot_drive_a_terminal():
    assert bpe.printable('é\t\x1b[2J\x9b2J\r\x07\0👩\u200d👧\n') == 'é\t[2J2J👩\u200d👧\n'


def test_add_special_adds_new_names_at_the_end(trained, tmp_path):
    tokenizer = Tokenizer.from_dict(trained.to_dict())
    assert tokenizer.add_special(['<|end|>', '<|tool|>']) == 1
    assert tokenizer.special['<|tool|>'] == 700 and tokenizer.vocab_size == 701 and trained.vocab_size == 700
    assert tokenizer.encode('<|tool|>', special=True) == [700]
    assert hugging_face(tokenizer, tmp_path / 'tokenizer.json').encode('a<|tool|>').ids == [97, 700]


def test_the_fingerprint_changes_with_anything_that_changes_ids(trained, text):
    again = Tokenizer.from_dict(json.loads(json.dumps(trained.to_dict())))
    more = Tokenizer.from_dict(trained.to_dict())
    more.add_special(['<|tool|>'])
    others = [Tokenizer.byte(), Tokenizer.train(text, 701), Tokenizer.train(text[::-1], 700), more,
              Tokenizer.train(text, 700, 'gpt2')]
    assert again.fingerprint == trained.fingerprint
    assert len({t.fingerprint for t in others} | {trained.fingerprint}) == 1 + len(others)


# Files

def test_hugging_face_opens_our_files_and_gives_the_same_ids(trained, tmp_path):
    """On 100,000 random strings."""
    strings = random_strings(100_000)
    for tokenizer in (Tokenizer.byte(), trained):
        theirs = hugging_face(tokenizer, tmp_path / 'tokenizer.json')
        for string, encoding in zip(strings, theirs.encode_batch_fast(strings)):
            assert tokenizer.encode(string) == encoding.ids, repr(string)
        assert theirs.get_vocab_size() == tokenizer.vocab_size
        ids = [*range(tokenizer.vocab_size)]
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
        assert theirs.encode('hi<|end|>').ids == tokenizer.encode('hi<|end|>', special=True)
        again = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
        assert again.fingerprint == tokenizer.fingerprint and again.special == tokenizer.special


def test_transformers_opens_our_files(trained, tmp_path):
    transformers = pytest.importorskip('transformers')
    trained.save(str(tmp_path / 'tokenizer.json'))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json'))
    assert theirs('the  anor 2024 é').input_ids == trained.encode('the  anor 2024 é') and len(theirs) == 700


def foreign(text, pre, normalizer=None, special=('<|endoftext|>',), first=True, post=None, ignore_merges=False):
    """A tokenizer of Hugging Face's own making. first: special tokens before the bytes, as SmolLM has them."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(special) if first else [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if not first:
        tokenizer.add_special_tokens(list(special))
    if post:
        tokenizer.post_processor = post
    return tokenizer


def split(pattern):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior='isolated'), level])


LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
FAMILIES = {
    'gpt2': dict(pre=LEVEL, first=False),
    'smollm': dict(pre=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), LEVEL]),
                   special=('<|endoftext|>', '<|im_start|>', '<repo_name>')),
    'llama3': dict(pre=split(LLAMA), first=False, ignore_merges=True, special=('<|begin_of_text|>', '<|eot_id|>'),
                   post=processors.TemplateProcessing('<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 800)])),
    'qwen2': dict(pre=split(QWEN), first=False, normalizer=normalizers.NFC(), special=('<|im_end|>', '<tool_call>')),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_published_families_load_and_give_the_same_ids(family, text, tmp_path):
    theirs = foreign(text, **FAMILIES[family])
    path = str(tmp_path / 'tokenizer.json')
    theirs.save(path)
    if family == 'gpt2':  # the published file is older: it leaves use_regex and the model's type out
        d = json.load(open(path, encoding='utf-8'))
        del d['pre_tokenizer']['use_regex'], d['model']['type']
        d['model']['merges'] = [' '.join(pair) for pair in d['model']['merges']]
        json.dump(d, open(path, 'w', encoding='utf-8'))
    if family == 'llama3':  # the published file lists every split of a token, and has tokens that no merge makes
        d = json.load(open(path, encoding='utf-8'))
        vocab = d['model']['vocab']
        d['model']['merges'] = [[name[:i], name[i:]] for name in vocab for i in range(1, len(name))
                                if name[:i] in vocab and name[i:] in vocab]
        vocab |= {'ĠKingdoms': 900} | {token['content']: token['id'] for token in d['added_tokens']}
        json.dump(d, open(path, 'w', encoding='utf-8'))
        theirs = tokenizers.Tokenizer.from_file(path)
    ours = Tokenizer.load(path)
    strings = random_strings(20_000, seed=4) + [' Kingdoms', ' Kingdom', text[:5000]]
    for string, encoding in zip(strings, theirs.encode_batch_fast(strings, add_special_tokens=False)):
        assert ours.encode(string) == encoding.ids, repr(string)
    for string in strings[:2000]:
        assert ours.encode_plain(string) == ours.encode(string)
        assert ours.decode(ours.encode(string)) == unicodedata.normalize(ours.normalizer, string) if ours.normalizer else string
    for name in FAMILIES[family].get('special', ['<|endoftext|>']):
        assert ours.encode(f'a{name}b', special=True) == theirs.encode(f'a{name}b', add_special_tokens=False).ids
        assert ours.special[name] not in ours.encode(f'a{name}b')
    ours.add_special(bpe.SPECIAL)  # and written by us they give the same ids again
    again = hugging_face(ours, tmp_path / 'again.json')
    for string, encoding in zip(strings, again.encode_batch_fast(strings)):
        assert ours.encode(string) == encoding.ids, repr(string)
    assert again.encode('<|user|>').ids == ours.encode('<|user|>', special=True)
    assert Tokenizer.load(str(tmp_path / 'again.json')).fingerprint == ours.fingerprint


def test_gpt2_through_tiktoken_equals_gpt2_from_its_file(text, tmp_path, monkeypatch):
    theirs = foreign(text, pre=LEVEL, first=False)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    ours = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    ours.encode('')
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', lambda name: ours._encoder)
    assert get_tokenizer('gpt2').fingerprint == ours.fingerprint


def test_gpt2_without_a_network_is_one_line_that_says_what_to_do(monkeypatch):
    def no_network(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', no_network)
    with pytest.raises(ValueError, match="GPT-2's vocabulary from openaipublic.* tokenizer.json") as error:
        get_tokenizer('gpt2')
    assert '\n' not in str(error.value)


def changed(d, **parts):
    return json.loads(json.dumps(d)) | parts


def test_what_would_change_ids_is_refused_by_name(trained, tmp_path):
    d, path = trained.to_dict(), tmp_path / 'tokenizer.json'
    metaspace = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}
    level = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
    other = {'type': 'Split', 'pattern': {'Regex': r'\w+'}, 'behavior': 'Isolated', 'invert': False}
    strip = {'id': 700, 'content': '<mask>', 'lstrip': True}
    for words, bad in {
            'byte_fallback': changed(d, model=d['model'] | {'byte_fallback': True}, pre_tokenizer=metaspace),
            'Metaspace': changed(d, pre_tokenizer=metaspace), 'dropout 0.1': changed(d, model=d['model'] | {'dropout': 0.1}),
            'WordPiece': changed(d, model=d['model'] | {'type': 'WordPiece'}), 'NFKC': changed(d, normalizer={'type': 'NFKC'}),
            'add_prefix_space': changed(d, pre_tokenizer=level), '<mask>': changed(d, added_tokens=[strip]),
            r'w\+': changed(d, pre_tokenizer={'type': 'Sequence', 'pretokenizers': [other, level]}),
            'decoder': changed(d, decoder={'type': 'WordPiece'}),
            'merges': changed(d, model=d['model'] | {'merges': d['model']['merges'][::-1]}),
            'not byte-level': changed(d, model=d['model'] | {'vocab': {'a': 0}, 'merges': []}),
            'smaller ids': changed(d, model=d['model'] | {'vocab': d['model']['vocab'] | {'qzqzq': 900}}),
            'damaged': changed(d, model=None)}.items():
        path.write_text(json.dumps(bad), encoding='utf-8')
        with pytest.raises(ValueError, match=f'tokenizer.json: .*{words}') as error:
            Tokenizer.load(str(path))
        assert '\n' not in str(error.value)


def test_a_sentencepiece_tokenizer_is_refused(text, tmp_path):
    theirs = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    theirs.train_from_iterator([text], trainers.BpeTrainer(vocab_size=500, special_tokens=['<unk>'], show_progress=False))
    theirs.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(ValueError, match='byte_fallback.*Metaspace'):
        get_tokenizer(str(tmp_path))


@pytest.mark.parametrize('damage', [b'', b'{', b'[]', b'"a"', b'\xff\xfe', b'[' * 100_000, b'{"model": {"vocab": 1}}'])
def test_a_damaged_file_is_named(damage, tmp_path):
    (tmp_path / 'tokenizer.json').write_bytes(damage)
    with pytest.raises(ValueError, match='tokenizer.json: damaged'):
        Tokenizer.load(str(tmp_path / 'tokenizer.json'))


def test_a_failed_save_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = tmp_path / 'tokenizer.json'
    Tokenizer.byte().save(str(path))
    def full(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(bpe.os, 'fsync', full)
    with pytest.raises(OSError):
        trained.save(str(path))
    assert Tokenizer.load(str(path)).vocab_size == 261 and os.listdir(tmp_path) == ['tokenizer.json']


def test_unknown_tokenizer_names_are_refused(text, tmp_path):
    assert get_tokenizer('byte').vocab_size == 261 and get_tokenizer('bpe', text, 300).vocab_size == 300
    for name in ('bite', str(tmp_path)):
        with pytest.raises(ValueError, match='byte, bpe, gpt2'):
            get_tokenizer(name)
    with pytest.raises(ValueError, match='text'):
        get_tokenizer('bpe')


# Chats

def test_a_chat_is_its_parts_and_the_loss_counts_only_what_the_assistant_says(trained):
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'the<|end|>'},
                {'role': 'assistant', 'content': 'anor'}, {'role': 'user', 'content': 'on'},
                {'role': 'assistant', 'content': ''}]
    for tokenizer in (Tokenizer.byte(), trained):
        user, assistant, end = (tokenizer.special[f'<|{name}|>'] for name in ('user', 'assistant', 'end'))
        say = tokenizer.encode
        ids, mask = render_chat(messages, tokenizer)
        assert ids == [user, *say('Be brief.\n\nthe<|end|>'), end, assistant, *say('anor'), end,
                       user, *say('on'), end, assistant, end]
        counted = [id for id, counts in zip(ids, mask) if counts]
        assert counted == [*say('anor'), end, end] and len(ids) == len(mask) and set(mask) == {0, 1}
        ids, mask = render_chat(messages[:2], tokenizer)
        assert ids[-2:] == [end, assistant] and sum(mask) == 0 and len(mask) == len(ids)


@pytest.mark.parametrize('messages, words', [
    ([], 'user'), ([{'role': 'system', 'content': 'x'}], 'user'), ([{'role': 'bot', 'content': 'x'}], "'bot'"),
    ([{'role': 'user'}], "missing key 'content'"), ([{'role': 'user', 'content': 5}], "'content' must be text"),
    ([{'role': 'user', 'content': 'x'}, {'role': 'system', 'content': 'x'}], 'message 1')])
def test_impossible_chats_are_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        render_chat(messages, Tokenizer.byte())


def test_a_tokenizer_without_chat_tokens_is_told_to_add_them(text, tmp_path):
    foreign(text, pre=LEVEL).save(str(tmp_path / 'tokenizer.json'))
    tokenizer = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    chat = [{'role': 'user', 'content': 'x'}]
    with pytest.raises(ValueError, match='add_special'):
        render_chat(chat, tokenizer)
    assert tokenizer.add_special(bpe.SPECIAL) == 4
    render_chat(chat, tokenizer)


# JSON Lines

def write(path, *lines):
    path.write_bytes('\r\n'.join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode())
    return str(path)


def test_every_form_of_example_is_read(tmp_path):
    path = write(tmp_path / 'a.jsonl', '\ufeff{"prompt": "p", "response": "r", "gold": 3}', '', '  ',
                 {'instruction': 'i', 'input': '', 'output': 'o'}, {'instruction': 'i', 'input': 'x', 'output': 'o'},
                 {'messages': [{'role': 'user', 'content': 'é\0'}, {'role': 'assistant', 'content': 'b'}]})
    rows = read_jsonl(path, 'sft')
    assert [[m['content'] for m in row['messages']] for row in rows] == [['p', 'r'], ['i', 'o'], ['i\n\nx', 'o'], ['é\0', 'b']]
    assert all([m['role'] for m in row['messages']] == ['user', 'assistant'] for row in rows) and rows[0]['gold'] == 3
    pair = {'prompt': 'p', 'chosen': 'c', 'rejected': 'r', 'margin': 0.5, 'op': 'sort'}
    assert read_jsonl(write(tmp_path / 'b.jsonl', pair), 'preference') == [pair]
    assert read_jsonl(write(tmp_path / 'c.jsonl', {'prompt': 'p'}), 'prompt') == [{'prompt': 'p'}]


@pytest.mark.parametrize('kind, line, words', [
    ('sft', '{"prompt": "p"}', "missing key 'response'"), ('sft', '{"instruction": "i"}', "missing key 'output'"),
    ('sft', '{"messages": []}', 'user'), ('sft', '{"messages": [{"role": "user", "content": "x"}]}', 'assistant'),
    ('sft', '{"messages": [3]}', ''), ('sft', '{"messages": [{"role": "x", "content": "x"}]}', "'x'"),
    ('sft', '{"prompt": 1, "response": "r"}', "'prompt' must be text"), ('prompt', '[1]', ''), ('prompt', '{"a"', ''),
    ('prompt', '{}', "missing key 'prompt'"), ('prompt', r'{"prompt": "\ud800"}', 'surrogate'),
    ('preference', '{"prompt": "p", "chosen": "c"}', "missing key 'rejected'"),
    ('preference', '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": "x"}', ''),
    ('preference', '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": NaN}', 'margin'), ('prompt', '[' * 99999, '')])
def test_a_bad_line_is_named(kind, line, words, tmp_path):
    path = write(tmp_path / 'a.jsonl', '', line)
    with pytest.raises(ValueError, match=f'a.jsonl:2: .*{words}'):
        read_jsonl(path, kind)


def test_all_bad_lines_are_counted_and_five_shown(tmp_path):
    good, bad = {'prompt': 'p'}, {'prom': 'p'}
    path = write(tmp_path / 'a.jsonl', good, *[bad] * 7, good)
    with pytest.raises(ValueError, match='^7 bad lines') as error:
        read_jsonl(path, 'prompt')
    assert str(error.value).count('missing key') == 5 and 'a.jsonl:6:' in str(error.value)
    for empty in (write(tmp_path / 'b.jsonl'), write(tmp_path / 'c.jsonl', '', ' ')):
        with pytest.raises(ValueError, match='no examples'):
            read_jsonl(empty, 'prompt')


# Data sets

def read_dataset(folder):
    with open(folder / 'meta.json', encoding='utf-8') as file:
        meta = json.load(file)
    return meta, np.fromfile(folder / 'train.bin', meta['dtype']), np.fromfile(folder / 'val.bin', meta['dtype'])


def test_a_data_set_is_its_documents_each_with_an_end(trained, tmp_path, capsys):
    train, val = ['the anor\r\n', 'é\0 17', ''], ['shell']
    for tokenizer, name in ((trained, 'bpe'), (Tokenizer.byte(), 'byte')):
        write_dataset(str(tmp_path), tokenizer, iter(train), val, source='made up')
        meta, *ids = read_dataset(tmp_path)
        assert [tokenizer.decode(part.tolist()) for part in ids] == [
            ''.join(document + '<|endoftext|>' for document in documents) for documents in (train, val)]
        assert meta['tokenizer'] == {'name': name, 'fingerprint': tokenizer.fingerprint, 'vocab_size': tokenizer.vocab_size}
        assert (meta['train_tokens'], meta['val_tokens']) == tuple(map(len, ids)) and meta['source'] == 'made up'
        assert (meta['train_bytes'], meta['val_bytes']) == (len(''.join(train).encode()), 5) and meta['dtype'] == 'uint16'
        assert Tokenizer.load(str(tmp_path / 'tokenizer.json')).fingerprint == tokenizer.fingerprint
        assert 'train' in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ['meta.json', 'tokenizer.json', 'train.bin', 'val.bin']


def test_large_vocabularies_take_four_bytes_a_token(tmp_path):
    tokenizer = Tokenizer(Tokenizer.byte().tokens, {'<|endoftext|>': 256, '<last>': 65_535})
    write_dataset(str(tmp_path), tokenizer, ['a'], ['b'])
    assert read_dataset(tmp_path)[0]['dtype'] == 'uint16'
    tokenizer.add_special(['<one more>'])
    write_dataset(str(tmp_path), tokenizer, ['a'], ['b'])
    meta, train, _ = read_dataset(tmp_path)
    assert meta['dtype'] == 'uint32' and train.tolist() == [97, 256]


def test_a_failed_or_repeated_preparation_spares_the_old_data(tmp_path):
    write_dataset(str(tmp_path), Tokenizer.byte(), ['old'], ['old'])
    old = np.memmap(tmp_path / 'train.bin', np.uint16, 'r')
    def breaks():
        yield 'new'
        raise RuntimeError('network')
    for train, val, error in ((breaks(), ['v'], RuntimeError), (['new'], breaks(), RuntimeError), (['new'], [], ValueError)):
        with pytest.raises(error):
            write_dataset(str(tmp_path), Tokenizer.byte(), train, val)
    assert len(os.listdir(tmp_path)) == 4 and read_dataset(tmp_path)[1].tolist() == [*b'old', 256]
    write_dataset(str(tmp_path), Tokenizer.byte(), ['newer'], ['newer'])
    assert read_dataset(tmp_path)[1].tolist() == [*b'newer', 256] and old.tolist() == [*b'old', 256]


# From the command line

def run(*arguments):
    command = [sys.executable, os.path.join(ROOT, 'bpe.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120)


def test_the_command_line_trains_a_tokenizer(text, tmp_path):
    (tmp_path / 'a.txt').write_bytes(text[:20_000].encode())
    done = run(f'--input={tmp_path}/a.txt', '--vocab_size=300', f'--out={tmp_path}/t.json')
    assert done.returncode == 0, done.stderr
    assert '39 merges' in done.stdout and 'bytes a token' in done.stdout
    assert Tokenizer.load(str(tmp_path / 't.json')).fingerprint == Tokenizer.train(text[:20_000], 300).fingerprint


def test_a_users_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / 'a.txt').write_text('ab', encoding='utf-8')
    for arguments in (['--input=nowhere.txt'], [f'--input={tmp_path}/a.txt']):
        done = run(*arguments, f'--out={tmp_path}/t.json')
        assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert not (tmp_path / 't.json').exists()
