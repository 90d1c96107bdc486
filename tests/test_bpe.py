"""
What bpe.py promises, compared with independent references: a naive trainer, and Hugging Face's
tokenizers and transformers.
"""
import doctest
import hashlib
import json
import os
import random
import subprocess
import sys
import types
import unicodedata
from collections import Counter

import pytest
import regex
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import bpe
from bpe import (SPECIAL_TOKENS, HuggingFaceTokenizer, Tokenizer, chat_format, get_tokenizer,
                 render_chat)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ----- Texts for the tests

def made_up_text(n_words, seed=0):
    """English-like text with numbers, capitals, contractions and line ends.

    A word is more frequent the shorter it is.
    """
    rng = random.Random(seed)
    syllables = ['ba', 'the', 'an', 'or', 'ing', 'wé', 'ti', 'on', 'sh', 'ell', 'no', 'ma', '字',
                 'ß']
    words = [''.join(rng.choices(syllables, k=1 + i // 60)) for i in range(240)]
    ends = [' ', ' ', ' ', ' ', ', ', '. ', "'s ", "'ll ", '\n', '\n\n', '  ', ' 17 ', ' 2024 ',
            '! ', '"\r\n\t']
    weights = [1 / (i + 1) for i in range(240)]
    parts = []
    for word in rng.choices(words, weights=weights, k=n_words):
        end = rng.choice(ends)
        if rng.random() < 0.1:
            word = word.title()
        parts += [word, end]
    return ''.join(parts)


# Pieces of text at which tokenizers tend to differ.
PIECES = [*'abcdefgXYZ', 'the', ' and', "'s", "'LL", "don't", "'re", '’s', ' ', '  ', '\t', '\n',
          '\r\n', '\n\n ', '\u00a0', '\u2003', '\u2028', '\x00', '\x0b', '\x1c', '\x85', '\u200b',
          '\ufeff', '7', '42', '12345', '½', '٣', 'Ⅷ', '²', 'é', 'e\u0301', 'ñ', 'ﬁ', 'Å', 'ß', 'İ',
          'ſ', '日本', '語', '한국', 'ก็', 'हिन्दी', 'עב', '👍🏽', '👩‍👩‍👧‍👦', '🇫🇷', '\u0338',
          '\U0001d49c', '\U0010ffff', '.', ',', '...', '!?', '"', '(', '_', '-', '$', '<|', '|>']


def random_strings(n, seed=1):
    """Nine strings in ten are made of PIECES, the tenth of any characters.

    These are characters of Unicode 3.2, about whose properties all libraries agree.
    """
    rng = random.Random(seed)
    unicode_3 = unicodedata.ucd_3_2_0
    old_characters = [chr(c) for c in range(0x3000) if unicode_3.category(chr(c)) != 'Cn']
    strings = []
    for i in range(n):
        pieces = PIECES if i % 10 else old_characters
        strings.append(''.join(rng.choices(pieces, k=rng.randint(1, 9))))
    return strings


@pytest.fixture(scope='module')
def text():
    return made_up_text(30_000)


@pytest.fixture(scope='module')
def trained(text):
    return Tokenizer.train(text, 700)


def hugging_face(tokenizer, path):
    """Our tokenizer, opened by Hugging Face's tokenizers from the file that we save."""
    tokenizer.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


def read_json(path):
    with open(path, encoding='utf-8') as file:
        return json.load(file)


def write_json(path, content):
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(content, file)


def test_the_examples_in_docstrings_print_what_they_show():
    results = doctest.testmod(bpe)
    assert results.failed == 0 and results.attempted >= 15


# ----- Training

def naive_bpe(text, n_tokens, pattern):
    """A trainer that shares no code with bpe.py: it counts bytes, not ids, for each merge."""
    words = []
    for word in regex.findall(pattern, text):
        words.append([bytes([byte]) for byte in word.encode()])
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < n_tokens:
        counts = Counter()
        for word in words:
            for left, right in zip(word, word[1:]):
                counts[tokens.index(left), tokens.index(right)] += 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        left, right = tokens[best[0]], tokens[best[1]]
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] == left and word[i + 1] == right:
                    word[i:i + 2] = [left + right]
                i += 1
        tokens.append(left + right)
    return tokens


@pytest.mark.parametrize('pattern', bpe.PATTERNS)
def test_both_trainers_equal_a_naive_trainer(pattern):
    rng = random.Random(0)
    samples = ['', 'a', 'aaabdaaabac', 'aaaaaaaaaaa aaaaa aaaa', 'hahahahaha haha',
               made_up_text(150)]
    for _ in range(40):
        samples.append(''.join(rng.choices('ab \n1é', k=rng.randint(1, 80))))
    pattern = bpe.PATTERNS[pattern]
    for sample in samples:
        expected = naive_bpe(sample, 300, pattern)
        assert bpe.train_bpe(sample, 300, pattern) == expected
        assert bpe.train_bpe_plain(sample, 300, pattern) == expected


def test_the_fast_trainer_equals_the_plain_trainer_on_a_longer_text(text, capsys):
    pattern = bpe.PATTERNS['digits']
    fast = bpe.train_bpe(text, 600, pattern, verbose=True)
    printed = capsys.readouterr().out
    assert fast == bpe.train_bpe_plain(text, 600, pattern, verbose=True)
    assert capsys.readouterr().out == printed  # the counts are the same as well
    assert printed.count('merge ') == 600 - 256


def test_training_equals_hugging_faces_trainer(text):
    """Their trainer breaks ties by ids, so its alphabet is put in the order of the bytes."""
    def shown(token):
        return ''.join(chr(0x4e00 + byte) for byte in token)

    words = [shown(word.encode()) for word in regex.findall(bpe.PATTERNS['digits'], text)]
    theirs = tokenizers.Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    alphabet = [shown([byte]) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    theirs.train_from_iterator([' '.join(words)], trainer)
    vocab = theirs.get_vocab()
    ours = bpe.train_bpe(text, 700, bpe.PATTERNS['digits'])
    assert sorted(vocab, key=vocab.get) == [shown(token) for token in ours]


def test_vocab_size_counts_bytes_merges_and_special_tokens(trained):
    assert trained.vocab_size == 700 and len(trained.merges) == 700 - 256 - 5
    assert all(trained.decode_bytes([b]) == bytes([b]) for b in range(256))
    assert trained.special == {name: 695 + i for i, name in enumerate(bpe.SPECIAL_TOKENS)}
    byte = Tokenizer.byte()
    assert byte.vocab_size == 261
    assert byte.special == {name: 256 + i for i, name in enumerate(bpe.SPECIAL_TOKENS)}
    assert byte.encode('né\0') == list('né\0'.encode())


def test_merges_are_pairs_of_older_ids(trained):
    assert list(trained.merges.values()) == list(range(256, 695))
    for (left, right), new_id in trained.merges.items():
        assert max(left, right) < new_id
        assert trained.tokens[left] + trained.tokens[right] == trained.tokens[new_id]


@pytest.mark.parametrize('text, size, words', [
    ('', 300, 'no text'),
    (None, 300, 'no text'),
    ('ab ab', 260, 'ask for at least 261'),
    ('ab ab', 9999, 'ask for at most 263'),
    ('a\ud800', 300, 'position 1'),
])
def test_impossible_training_is_refused(text, size, words):
    with pytest.raises(ValueError, match=words):
        Tokenizer.train(text, size)


def test_an_unknown_pattern_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'words'.*digits.*gpt2.*llama3.*qwen2"):
        Tokenizer.train('a b', 262, pattern='words')


# ----- Encoding and decoding

def test_encode_equals_the_plain_encoder(trained):
    strings = random_strings(3000, seed=2)
    for pattern in bpe.PATTERNS:
        tokenizer = Tokenizer.train(made_up_text(3000), 500, pattern)
        for string in strings:
            assert tokenizer.encode(string) == tokenizer.encode_plain(string), repr(string)
    longer = made_up_text(2000, seed=5)
    assert trained.encode(longer) == trained.encode_plain(longer)


def test_decoding_returns_the_encoded_text_exactly(trained):
    hard = ['', '\ufeffBOM', 'a\r\nb\rc\n', '\0\0', '👩‍👩‍👧‍👦', 'e\u0301é', '\x7f\x80\xff',
            '\U0010ffff', ' ' * 300, '<|end|> <|endoftext|>', *random_strings(3000, seed=3)]
    for tokenizer in (Tokenizer.byte(), trained):
        for string in hard:
            assert tokenizer.decode(tokenizer.encode(string)) == string
            assert tokenizer.decode(tokenizer.encode(string, special=True)) == string


def test_the_error_for_a_lone_surrogate_gives_its_position(trained):
    for encode in (trained.encode, trained.encode_plain):
        with pytest.raises(ValueError, match=r'ud83d.* position 3'):
            encode('abc\ud83d')


def test_names_of_special_tokens_in_a_users_text_are_plain_text(trained):
    for tokenizer in (Tokenizer.byte(), trained):
        for name, id in tokenizer.special.items():
            assert max(tokenizer.encode(f'a{name}b')) < 256 + len(tokenizer.merges)
            assert tokenizer.encode(f'a{name}b', special=True) == [97, id, 98]
            assert tokenizer.decode([id]) == name


def test_ids_outside_the_vocabulary_are_refused(trained):
    for id in (-1, 700):
        with pytest.raises(ValueError, match=f'token id {id} .* 700'):
            trained.decode([0, id])


def test_invalid_utf8_is_decoded_to_replacement_characters(trained):
    assert trained.decode([0xe9, 97]) == '\ufffda'
    assert trained.decode_bytes([0xe9, 97]) == b'\xe9a'


def test_streaming_never_returns_a_part_of_a_character(trained):
    string = 'né 👩‍👩‍👧 日本 <|x'
    for tokenizer in (Tokenizer.byte(), trained):
        decode = tokenizer.stream_decoder()
        parts = [decode([id]) for id in tokenizer.encode(string)]
        assert ''.join(parts) == string and '\ufffd' not in ''.join(parts)
        assert decode([0xf0, 0x9f]) == ''
        assert decode([], final=True) == '\ufffd'


def test_add_special_gives_new_names_the_next_ids(trained, tmp_path):
    tokenizer = Tokenizer.from_dict(trained.to_dict())
    assert tokenizer.add_special(['<|end|>', '<|tool|>']) == 1
    assert tokenizer.special['<|tool|>'] == 700
    assert tokenizer.vocab_size == 701 and trained.vocab_size == 700
    assert tokenizer.encode('<|tool|>', special=True) == [700]
    theirs = hugging_face(tokenizer, tmp_path / 'tokenizer.json')
    assert theirs.encode('a<|tool|>').ids == [97, 700]


def test_the_fingerprint_changes_with_anything_that_changes_ids(trained, text):
    again = Tokenizer.from_dict(json.loads(json.dumps(trained.to_dict())))
    assert again.fingerprint == trained.fingerprint
    more = Tokenizer.from_dict(trained.to_dict())
    more.add_special(['<|tool|>'])
    others = [Tokenizer.byte(), Tokenizer.train(text, 701), Tokenizer.train(text[::-1], 700), more,
              Tokenizer.train(text, 700, 'gpt2')]
    fingerprints = {trained.fingerprint} | {tokenizer.fingerprint for tokenizer in others}
    assert len(fingerprints) == 1 + len(others)


def test_fingerprints_and_files_are_those_of_earlier_versions(tmp_path):
    """Datasets and checkpoints store the fingerprint, so it must never change."""
    assert Tokenizer.byte().fingerprint == 'd61f02460f3ca012'
    tokenizer = Tokenizer.train(made_up_text(3000), 400)
    assert tokenizer.fingerprint == '819a09160d2d82bb'
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    digest = hashlib.sha256((tmp_path / 'tokenizer.json').read_bytes()).hexdigest()
    assert digest == '6f0182934589ce828f09660db200e083a337ed714f6120cc733eceff04fb5699'


# ----- Files

def test_hugging_face_opens_our_files_and_gives_the_same_ids(trained, tmp_path):
    """Compared on 100,000 random strings."""
    strings = random_strings(100_000)
    path = tmp_path / 'tokenizer.json'
    for tokenizer in (Tokenizer.byte(), trained):
        theirs = hugging_face(tokenizer, path)
        for string, encoding in zip(strings, theirs.encode_batch_fast(strings)):
            assert tokenizer.encode(string) == encoding.ids, repr(string)
        assert theirs.get_vocab_size() == tokenizer.vocab_size
        ids = list(range(tokenizer.vocab_size))
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)
        assert theirs.encode('hi<|end|>').ids == tokenizer.encode('hi<|end|>', special=True)
        again = Tokenizer.load(str(path))
        assert again.fingerprint == tokenizer.fingerprint
        assert again.special == tokenizer.special


def test_transformers_opens_our_files(trained, tmp_path):
    transformers = pytest.importorskip('transformers')
    path = str(tmp_path / 'tokenizer.json')
    trained.save(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    sample = 'the  anor 2024 é'
    assert theirs(sample).input_ids == trained.encode(sample)
    assert len(theirs) == 700


def foreign(text, pre, normalizer=None, special=('<|endoftext|>',), special_first=True, post=None,
            ignore_merges=False):
    """A tokenizer that Hugging Face's library has trained.

    special_first: the special tokens have the lowest ids, as in SmolLM.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(special) if special_first else [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    if not special_first:
        tokenizer.add_special_tokens(list(special))
    if post:
        tokenizer.post_processor = post
    return tokenizer


METASPACE_FIRST = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)


def split(pattern, behavior='isolated', invert=False):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior, invert),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# The patterns as they are published.
LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
FAMILIES = {
    'gpt2': dict(pre=BYTE_LEVEL, special_first=False),
    'smollm': dict(
        pre=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
        special=('<|endoftext|>', '<|im_start|>', '<repo_name>')),
    'llama3': dict(
        pre=split(LLAMA), special_first=False, ignore_merges=True,
        special=('<|begin_of_text|>', '<|eot_id|>'),
        post=processors.TemplateProcessing(
            '<|begin_of_text|> $A', special_tokens=[('<|begin_of_text|>', 800)])),
    # cl100k has Llama's pattern, and removes what does not match it.
    'gpt4': dict(
        pre=split(LLAMA, 'removed', invert=True), special_first=False,
        special=('<|endoftext|>', '<|fim_prefix|>')),
    'qwen2': dict(
        pre=split(QWEN), special_first=False, normalizer=normalizers.NFC(),
        special=('<|im_end|>', '<tool_call>')),
}


def save_as_published(theirs, family, path):
    """Save the tokenizer, and change the file where the family's published file differs."""
    theirs.save(path)
    content = read_json(path)
    model = content['model']
    if family == 'gpt2':
        # The published file is older: without use_regex and the model's type, merges as text.
        del content['pre_tokenizer']['use_regex']
        del model['type']
        model['merges'] = [' '.join(pair) for pair in model['merges']]
    if family == 'llama3':
        # The published file lists every split of a token, and has tokens that no merge makes.
        vocab = model['vocab']
        merges = []
        for name in vocab:
            for i in range(1, len(name)):
                if name[:i] in vocab and name[i:] in vocab:
                    merges.append([name[:i], name[i:]])
        model['merges'] = merges
        vocab['ĠKingdoms'] = 900
        for token in content['added_tokens']:
            vocab[token['content']] = token['id']
    write_json(path, content)


@pytest.mark.parametrize('family', FAMILIES)
def test_published_families_load_and_give_the_same_ids(family, text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    save_as_published(foreign(text, **FAMILIES[family]), family, path)
    theirs = tokenizers.Tokenizer.from_file(path)
    ours = Tokenizer.load(path)
    assert type(ours) is Tokenizer
    strings = random_strings(20_000, seed=4) + [' Kingdoms', ' Kingdom', text[:5000]]

    # 1. Plain text gives the same ids, with the plain encoder as well, and comes back.
    encodings = theirs.encode_batch_fast(strings, add_special_tokens=False)
    for string, encoding in zip(strings, encodings):
        assert ours.encode(string) == encoding.ids, repr(string)
    for string in strings[:2000]:
        ids = ours.encode(string)
        assert ours.encode_plain(string) == ids
        expected = unicodedata.normalize('NFC', string) if family == 'qwen2' else string
        assert ours.decode(ids) == expected

    # 2. Names of added tokens are encoded as these tokens only on request.
    for name in FAMILIES[family].get('special', ['<|endoftext|>']):
        string = f'a{name}b'
        expected = theirs.encode(string, add_special_tokens=False).ids
        assert ours.encode(string, special=True) == expected
        assert ours.special[name] not in ours.encode(string)

    # 3. With our special tokens added, and saved by us, the ids are still the same.
    ours.add_special(bpe.SPECIAL_TOKENS)
    again = hugging_face(ours, tmp_path / 'again.json')
    for string, encoding in zip(strings, again.encode_batch_fast(strings)):
        assert ours.encode(string) == encoding.ids, repr(string)
    assert again.encode('<|user|>').ids == ours.encode('<|user|>', special=True)
    assert Tokenizer.load(str(tmp_path / 'again.json')).fingerprint == ours.fingerprint


def test_gpt2_through_tiktoken_equals_gpt2_from_its_file(text, tmp_path, monkeypatch):
    theirs = foreign(text, pre=BYTE_LEVEL, special_first=False)
    theirs.save(str(tmp_path / 'tokenizer.json'))
    ours = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    ranks = {token: id for id, token in ours.tokens.items()}
    encoding = types.SimpleNamespace(_mergeable_ranks=ranks, _special_tokens=ours.special)
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', lambda name: encoding)
    assert get_tokenizer('gpt2').fingerprint == ours.fingerprint


def test_without_a_network_the_error_for_gpt2_is_one_line_with_a_remedy(monkeypatch):
    def no_network(name):
        raise ConnectionError('no route')
    monkeypatch.setattr(bpe.tiktoken, 'get_encoding', no_network)
    words = "GPT-2's vocabulary from openaipublic.* tokenizer.json"
    with pytest.raises(ValueError, match=words) as error:
        get_tokenizer('gpt2')
    assert '\n' not in str(error.value)


# ----- Vocabularies with missing bytes

# SmolLM2 has no tokens for these: control characters, and bytes that UTF-8 never or rarely uses.
SMOLLM2_MISSING = bytes.fromhex('040613141d16c0c1f1f2f5f6f7f8f9fafbfcfdfeff')


def smollm2(text):
    """A tokenizer like SmolLM2's, without the tokens of these bytes."""
    missing = {bpe.BYTE_TO_CHAR[byte] for byte in SMOLLM2_MISSING}
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = FAMILIES['smollm']['pre']
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in missing]
    trainer = trainers.BpeTrainer(
        vocab_size=800, show_progress=False, initial_alphabet=alphabet,
        special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'])
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def test_bytes_without_a_token_are_dropped_as_hugging_face_drops_them(text, tmp_path, capsys):
    path = str(tmp_path / 'tokenizer.json')
    theirs = smollm2(text)
    theirs.save(path)
    ours = Tokenizer.load(path)
    assert type(ours) is Tokenizer and len(ours._byte_ids) == 256 - len(SMOLLM2_MISSING)

    # 1. Texts without these bytes cause no warning.
    for string in random_strings(2000, seed=6):
        if not ours._missing_bytes.search(string.encode()):
            assert ours.encode(string) == theirs.encode(string).ids, repr(string)
    assert capsys.readouterr().err == ''

    # 2. Texts with them give the same ids as theirs, after one warning.
    rng = random.Random(7)
    pieces = PIECES + ['\x04', '\x06', '\x13\x14', '\x16', '\x1d', '\U00040000', '\U00080123']
    for _ in range(5000):
        string = ''.join(rng.choices(pieces, k=rng.randint(1, 9)))
        ids = theirs.encode(string).ids
        assert ours.encode(string) == ids, repr(string)
        assert ours.encode_plain(string) == ids, repr(string)
    assert ours.encode('\x04') == []
    warning = capsys.readouterr().err
    assert warning.count('\n') == 1 and 'dropped' in warning

    # 3. Special tokens work, and our file gives the same ids.
    assert ours.encode('a\x04<|im_end|>', special=True) == theirs.encode('a<|im_end|>').ids
    again = hugging_face(ours, tmp_path / 'again.json')
    assert again.encode('a\x04b\x1d c').ids == ours.encode('a\x04b\x1d c')
    assert Tokenizer.load(str(tmp_path / 'again.json')).fingerprint == ours.fingerprint


def test_an_unknown_token_for_missing_bytes_is_left_to_hugging_face(text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    smollm2(text).save(path)
    content = read_json(path)
    content['model']['unk_token'] = '<|endoftext|>'
    write_json(path, content)
    ours = Tokenizer.load(path)
    assert type(ours) is HuggingFaceTokenizer
    assert ours.encode('a\x04') == tokenizers.Tokenizer.from_file(path).encode('a\x04').ids


# ----- Very long runs of blanks

@pytest.mark.parametrize('pattern', bpe.PATTERNS)
def test_a_million_blanks_are_encoded_as_the_pattern_demands(pattern, text):
    tokenizer = Tokenizer.train(text[:3000], 400, pattern)
    for blank, end in ((' ', ''), (' ', 'a'), ('\n', ' 7'), ('\u3000', 'a'), ('\n ', '\n!')):
        string = 'a' + blank * 1_000_000 + end
        ids = tokenizer.encode(string)
        assert tokenizer.decode(ids) == string
        # The words before and after the long one have the ids of the plain encoder.
        words = regex.findall(bpe.PATTERNS[pattern], string)
        long = max(range(len(words)), key=lambda i: len(words[i]))
        head = []
        for word in words[:long]:
            head += tokenizer.encode_plain(word)
        tail = []
        for word in words[long + 1:]:
            tail += tokenizer.encode_plain(word)
        assert ids[:len(head)] == head
        assert ids[len(ids) - len(tail):] == tail
        n_bytes = len(tokenizer.decode_bytes(ids[len(head):len(ids) - len(tail)]))
        assert n_bytes == len(words[long].encode())


def test_both_ways_to_encode_blanks_give_the_same_ids(monkeypatch, text):
    """The way for a million blanks, used for all texts, equals tiktoken's."""
    for pattern in bpe.PATTERNS:
        tokenizer = Tokenizer.train(text[:3000], 400, pattern)
        strings = random_strings(2000, seed=8) + [' ' * 9000 + 'a', '\n ' * 4000, text[:3000]]
        expected = [tokenizer.encode(string) for string in strings]
        with monkeypatch.context() as patch:
            patch.setattr(bpe, 'LONG_BLANKS', bpe.re.compile(''))
            assert [tokenizer.encode(string) for string in strings] == expected


# ----- Tokenizers of other kinds

O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def deepseek_pre_tokenizer():
    words = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
             r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
             r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r'\p{N}{1,3}'), 'isolated'),
        pre_tokenizers.Split(Regex('[一-龥\u3040-ゟ゠-ヿ]+'), 'isolated'),
        pre_tokenizers.Split(Regex(words), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_fallback(text, normalizer=None, pre=None, strip=True, special=('<unk>', '<s>', '</s>')):
    """A tokenizer like SentencePiece's: characters, and bytes for characters without a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE(
        byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre:
        tokenizer.pre_tokenizer = pre
    stages = [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        stages.append(decoders.Strip(' ', 1, 0))
    tokenizer.decoder = decoders.Sequence(stages)
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), show_progress=False)
    tokenizer.train_from_iterator(text[:20_000].split('\n'), trainer)
    # The tokens of the 256 bytes are part of the vocabulary, but no special tokens.
    content = json.loads(tokenizer.to_str())
    vocab = content['model']['vocab']
    for byte in range(256):
        vocab[f'<0x{byte:02X}>'] = 500 + byte
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def word_piece(text):
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=['[UNK]', '[CLS]'], show_progress=False)
    tokenizer.train_from_iterator([text[:20_000]], trainer)
    return tokenizer


def unigram(text):
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=['<unk>', '</s>'], unk_token='<unk>', show_progress=False)
    tokenizer.train_from_iterator([text[:20_000]], trainer)
    return tokenizer


def other_kind(kind, text):
    if kind == 'llama2':
        return byte_fallback(text, normalizers.Sequence([
            normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]))
    if kind == 'mistral':
        return byte_fallback(text, pre=METASPACE_FIRST)
    if kind == 'gemma':
        tokenizer = byte_fallback(text, normalizers.Replace(' ', '▁'), strip=False,
                                  pre=pre_tokenizers.Split(' ', 'merged_with_previous'))
        tokenizer.add_tokens(['<table>'])  # an added token that is not special
        return tokenizer
    if kind == 'gpt4o':
        return foreign(text, split(O200K, 'removed', invert=True), special_first=False)
    if kind == 'deepseek':
        return foreign(text, deepseek_pre_tokenizer(), normalizers.Sequence([]))
    if kind == 'nfkc':
        return foreign(text, BYTE_LEVEL, normalizers.NFKC())
    if kind == 'word_piece':
        return word_piece(text)
    return unigram(text)


OTHER_KINDS = ['llama2', 'mistral', 'gemma', 'gpt4o', 'deepseek', 'nfkc', 'word_piece', 'unigram']


@pytest.mark.parametrize('kind', OTHER_KINDS)
def test_every_other_kind_of_file_loads_and_gives_the_same_ids(kind, text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    other_kind(kind, text).save(path)
    theirs = tokenizers.Tokenizer.from_file(path)
    ours = get_tokenizer(path)
    assert type(ours) is HuggingFaceTokenizer
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    strings = random_strings(5000, seed=9) + ['', ' ', '  a', '▁', '<0x41>', text[:5000]]

    # 1. The same ids and the same text, also if the ids arrive one by one.
    encodings = theirs.encode_batch_fast(strings, add_special_tokens=False)
    for i, (string, encoding) in enumerate(zip(strings, encodings)):
        ids = ours.encode(string)
        assert ids == encoding.ids, repr(string)
        decoded = theirs.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == decoded
        assert ours.decode_bytes(ids) == decoded.encode()
        if i < 500:
            decode = ours.stream_decoder()
            parts = [decode([id]) for id in ids] + [decode([], final=True)]
            assert ''.join(parts) == decoded, repr(string)

    # 2. Names of added tokens are encoded as these tokens only on request.
    for name, id in ours.special.items():
        expected = theirs.encode(f'a{name}b', add_special_tokens=False).ids
        assert ours.encode(f'a{name}b', special=True) == expected and id in expected
        # In two kinds, an unknown character becomes a special token as well.
        if kind not in ('word_piece', 'unigram'):
            assert id not in ours.encode(f'a{name}b')

    # 3. The content can be stored in a checkpoint, and saved.
    again = Tokenizer.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.fingerprint == ours.fingerprint and again.to_dict() == read_json(path)
    again.save(str(tmp_path / 'again.json'))
    assert Tokenizer.load(str(tmp_path / 'again.json')).fingerprint == ours.fingerprint

    # 4. Unknown ids and lone surrogates are errors.
    for id in (-1, ours.vocab_size):
        with pytest.raises(ValueError, match=f'token id {id} .* {ours.vocab_size}'):
            ours.decode([id])
    with pytest.raises(ValueError, match=r'ud83d.* position 3'):
        ours.encode('abc\ud83d')


@pytest.mark.parametrize('kind', OTHER_KINDS)
def test_special_tokens_can_be_added_to_other_kinds(kind, text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    other_kind(kind, text).save(path)
    ours = Tokenizer.load(path)
    strings = random_strings(500, seed=10)
    before = [ours.encode(string) for string in strings]
    size = ours.vocab_size
    names = [name for name in bpe.SPECIAL_TOKENS if name not in ours.special]
    assert ours.add_special(bpe.SPECIAL_TOKENS) == len(names)
    assert [ours.special[name] for name in names] == list(range(size, size + len(names)))
    assert ours.vocab_size == size + len(names)
    assert ours.add_special(bpe.SPECIAL_TOKENS) == 0
    assert [ours.encode(string) for string in strings] == before

    # Hugging Face reads the same from our file. What follows a special token can be encoded alone.
    theirs = hugging_face(ours, path)
    user = ours.special['<|user|>']
    for string in strings:
        expected = theirs.encode('<|user|>' + string, add_special_tokens=False).ids
        assert [user] + ours.encode_after_special(string) == expected, repr(string)


def test_files_with_gaps_between_ids_keep_their_ids(text, tmp_path):
    """GPT-4o's <|endofprompt|> has the id 200018, and 17 ids before it are unused."""
    path = str(tmp_path / 'tokenizer.json')
    other_kind('gpt4o', text).save(path)
    content = read_json(path)
    content['added_tokens'].append(content['added_tokens'][0] | {'id': 820, 'content': '<gap>'})
    content['model']['vocab'] |= {'<|endoftext|>': 800, '<gap>': 820}
    write_json(path, content)
    ours = Tokenizer.load(path)
    assert ours.vocab_size == 821 and ours.special == {'<|endoftext|>': 800, '<gap>': 820}
    assert ours.add_special(['<|end|>']) == 1 and ours.special['<|end|>'] == 821
    assert ours.encode('<gap><|end|>', special=True) == [820, 821]
    with pytest.raises(ValueError, match='token id 810'):
        ours.decode([810])


def test_truncation_and_padding_of_a_file_are_ignored(text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    theirs = other_kind('nfkc', text)
    expected = theirs.encode('the anor').ids
    theirs.enable_truncation(2)
    theirs.enable_padding(length=9)
    theirs.save(path)
    assert Tokenizer.load(path).encode('the anor') == expected


# ----- Files that need Hugging Face's package, and files that are refused

METASPACE = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False}
PREFIX_SPACE = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True,
                'use_regex': True}
OTHER_SPLIT = {'type': 'Split', 'pattern': {'Regex': r'\w+'}, 'behavior': 'Isolated',
               'invert': False}
STRIPPING = {'id': 700, 'content': '<mask>', 'lstrip': True}


def changed(content, model={}, **parts):
    """A copy of the content of a tokenizer.json in which these parts are others."""
    copy = json.loads(json.dumps(content))
    copy['model'].update(model)
    copy.update(parts)
    return copy


def unknown_to_our_class(good):
    """{words of the error: content that our class cannot represent}."""
    vocab = good['model']['vocab']
    return {
        'byte_fallback': changed(good, {'byte_fallback': True}, pre_tokenizer=METASPACE),
        'Metaspace': changed(good, pre_tokenizer=METASPACE),
        'WordPiece': changed(good, {'type': 'WordPiece'}),
        'NFKC': changed(good, normalizer={'type': 'NFKC'}),
        'add_prefix_space': changed(good, pre_tokenizer=PREFIX_SPACE),
        '<mask>': changed(good, added_tokens=[STRIPPING]),
        r'w\+': changed(good, pre_tokenizer={
            'type': 'Sequence', 'pretokenizers': [OTHER_SPLIT, PREFIX_SPACE]}),
        'decoder': changed(
            good, decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': True}),
        'merges': changed(good, {'merges': good['model']['merges'][::-1]}),
        'not byte-level': changed(good, {'vocab': vocab | {'字': 900}}),
        'smaller ids': changed(good, {'vocab': vocab | {'qzqzq': 900}}),
    }


def test_without_the_tokenizers_package_the_error_names_it_and_the_reason(trained, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    path = str(tmp_path / 'tokenizer.json')
    for words, content in unknown_to_our_class(trained.to_dict()).items():
        write_json(path, content)
        message = f'tokenizer.json: .*{words}.*pip install tokenizers'
        with pytest.raises(ValueError, match=message) as error:
            Tokenizer.load(path)
        assert '\n' not in str(error.value)


def test_what_our_class_cannot_represent_gives_hugging_faces_ids(trained, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    strings = random_strings(500, seed=12)
    for words, content in unknown_to_our_class(trained.to_dict()).items():
        if words in ('WordPiece', '<mask>'):
            continue  # these are not complete files, only a part of one
        write_json(path, content)
        ours = Tokenizer.load(path)
        theirs = tokenizers.Tokenizer.from_file(path)
        assert type(ours) is HuggingFaceTokenizer, words
        for string in strings:
            assert ours.encode(string) == theirs.encode(string).ids, (words, string)


def test_dropout_is_refused_because_it_makes_ids_random(trained):
    with pytest.raises(ValueError, match='dropout 0.1'):
        Tokenizer.from_dict(changed(trained.to_dict(), {'dropout': 0.1}))
    Tokenizer.from_dict(changed(trained.to_dict(), {'dropout': None}))


def with_id(good, name, id):
    return changed(good, {'vocab': good['model']['vocab'] | {name: id}})


def with_added(good, *tokens):
    return changed(good, added_tokens=good['added_tokens'] + list(tokens))


def test_impossible_ids_are_refused_by_name(trained, tmp_path):
    good = trained.to_dict()
    flags = good['added_tokens'][0]
    refused = {
        "'e' has the id nan": with_id(good, 'e', float('nan')),
        "'e' has the id -1": with_id(good, 'e', -1),
        "'e' has the id 70000000": with_id(good, 'e', 70_000_000),
        "'e' has the id 100705, .* from 0 to 100,704": with_id(good, 'e', 100_705),
        "'e' has the id True": with_id(good, 'e', True),
        "'e' has the id '5'": with_id(good, 'e', '5'),
        "'e' has the id 1.0": with_id(good, 'e', 1.0),
        "'e' has the id None": with_id(good, 'e', None),
        "tokens 'd' and 'e' have the same id 100": with_id(good, 'e', 100),
        # 'hello' would be decoded to '<new>ello'.
        "'<new>' has the id 104 of another token, 'h'":
            with_added(good, flags | {'id': 104, 'content': '<new>'}),
        "'<new>' has the id 699 of another token":
            with_added(good, flags | {'id': 699, 'content': '<new>'}),
        "'<new>' has the id nan":
            with_added(good, flags | {'id': float('nan'), 'content': '<new>'}),
        "'<new>' has the id -5": with_added(good, flags | {'id': -5, 'content': '<new>'}),
        "'<new>' has the id 70000000":
            with_added(good, flags | {'id': 70_000_000, 'content': '<new>'}),
        "'<.end.>' has two ids": with_added(good, flags | {'id': 700, 'content': '<|end|>'}),
        "added token has the name ''": with_added(good, flags | {'id': 700, 'content': ''}),
        'added token has the name 5': with_added(good, flags | {'id': 700, 'content': 5}),
    }
    path = str(tmp_path / 'tokenizer.json')
    for words, content in refused.items():
        write_json(path, content)
        with pytest.raises(ValueError, match=f'tokenizer.json: damaged: .*{words}') as error:
            Tokenizer.load(path)
        assert '\n' not in str(error.value)


def test_damaged_parts_are_one_line_errors(trained, tmp_path):
    good = trained.to_dict()
    damaged = [
        good | {'model': None}, good | {'model': []}, good | {'added_tokens': None},
        good | {'added_tokens': [5]}, good | {'added_tokens': [{'id': 700}]},
        good | {'pre_tokenizer': 5}, good | {'pre_tokenizer': {'pretokenizers': 5}},
        good | {'normalizer': 'x'}, good | {'decoder': 5},
        changed(good, {'vocab': None}), changed(good, {'vocab': 5}), changed(good, {'vocab': [5]}),
        changed(good, {'vocab': {}}), changed(good, {'merges': 5}),
        changed(good, {'merges': ['a b c']}), changed(good, {'merges': [['a']]}),
        changed(good, {'merges': ['字 字']}), changed(good, {'type': 'Nothing'}),
        {}, {'model': {}}, {'model': {'vocab': {'a': 0}}},
    ]
    path = str(tmp_path / 'tokenizer.json')
    for content in damaged:
        write_json(path, content)
        with pytest.raises(ValueError, match='tokenizer.json: ') as error:
            Tokenizer.load(path)
        assert '\n' not in str(error.value), content
        with pytest.raises(ValueError):  # so from a checkpoint
            Tokenizer.from_dict(content)


@pytest.mark.parametrize('damage', [
    b'', b'{', b'[]', b'"a"', b'\xff\xfe', b'[' * 100_000, b'{"model": {"vocab": 1}}'])
def test_a_damaged_file_is_named(damage, tmp_path):
    (tmp_path / 'tokenizer.json').write_bytes(damage)
    with pytest.raises(ValueError, match='tokenizer.json: damaged'):
        Tokenizer.load(str(tmp_path / 'tokenizer.json'))


def test_a_failed_save_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = str(tmp_path / 'tokenizer.json')
    Tokenizer.byte().save(path)

    def full_disk(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(OSError):
        trained.save(path)
    assert Tokenizer.load(path).vocab_size == 261
    assert os.listdir(tmp_path) == ['tokenizer.json']


def test_unknown_tokenizer_names_are_refused(text, tmp_path):
    assert get_tokenizer('byte').vocab_size == 261
    assert get_tokenizer('bpe', text, 300).vocab_size == 300
    for name in ('bite', str(tmp_path)):
        with pytest.raises(ValueError, match='byte, bpe, gpt2'):
            get_tokenizer(name)
    with pytest.raises(ValueError, match='text'):
        get_tokenizer('bpe')


# ----- Chats

def test_a_chat_is_its_parts_and_the_loss_counts_only_the_assistants_words(trained):
    messages = [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': 'the<|end|>'},
        {'role': 'assistant', 'content': 'anor'},
        {'role': 'user', 'content': 'on'},
        {'role': 'assistant', 'content': ''},
    ]
    for tokenizer in (Tokenizer.byte(), trained):
        user = tokenizer.special['<|user|>']
        assistant = tokenizer.special['<|assistant|>']
        end = tokenizer.special['<|end|>']
        encode = tokenizer.encode
        ids, mask = render_chat(messages, tokenizer)
        assert ids == [user, *encode('Be brief.\n\nthe<|end|>'), end,
                       assistant, *encode('anor'), end, user, *encode('on'), end, assistant, end]
        counted = [id for id, counts in zip(ids, mask) if counts]
        assert counted == [*encode('anor'), end, end]
        assert len(ids) == len(mask) and set(mask) == {0, 1}
        ids, mask = render_chat(messages[:2], tokenizer)
        assert ids[-2:] == [end, assistant]
        assert sum(mask) == 0 and len(mask) == len(ids)


@pytest.mark.parametrize('messages, words', [
    ([], 'user'),
    ([{'role': 'system', 'content': 'x'}], 'user'),
    ([{'role': 'bot', 'content': 'x'}], "'bot'"),
    ([{'role': 'user'}], "missing key 'content'"),
    ([{'role': 'user', 'content': 5}], "'content' must be text"),
    ([{'role': 'user', 'content': 'x'}, {'role': 'system', 'content': 'x'}], 'message 1'),
])
def test_impossible_chats_are_refused(messages, words):
    with pytest.raises(ValueError, match=words):
        render_chat(messages, Tokenizer.byte())


def test_a_message_that_is_not_a_dict_is_refused():
    with pytest.raises(ValueError, match='message 0 .*role'):
        render_chat(['Hi'], Tokenizer.byte())


def test_two_messages_of_one_role_in_a_row_are_two_turns():
    tokenizer = Tokenizer.byte()
    user = tokenizer.special['<|user|>']
    assistant = tokenizer.special['<|assistant|>']
    end = tokenizer.special['<|end|>']
    ids, mask = render_chat([
        {'role': 'user', 'content': 'a'}, {'role': 'user', 'content': 'b'},
        {'role': 'assistant', 'content': 'c'}, {'role': 'assistant', 'content': 'd'}], tokenizer)
    assert ids == [user, 97, end, user, 98, end, assistant, 99, end, assistant, 100, end]
    assert mask == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 1]


def test_the_error_for_missing_chat_tokens_says_how_to_add_them(text, tmp_path):
    foreign(text, pre=BYTE_LEVEL).save(str(tmp_path / 'tokenizer.json'))
    tokenizer = Tokenizer.load(str(tmp_path / 'tokenizer.json'))
    chat = [{'role': 'user', 'content': 'x'}]
    with pytest.raises(ValueError, match='add_special'):
        render_chat(chat, tokenizer)
    assert tokenizer.chat_end is None
    assert tokenizer.add_special(bpe.SPECIAL_TOKENS) == 4
    render_chat(chat, tokenizer)
    assert tokenizer.chat_end == tokenizer.special['<|end|>']


# ----- Published chat formats

# The templates as they are published, without their parts for tools.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
    "assistant.<|im_end|>\\n' }}\n{%- endif %}\n{%- for message in messages %}\n"
    "    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or "
    "(message.role == 'assistant' and not message.tool_calls) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "\n"
    "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
LLAMA3_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}")
MISTRAL_TEMPLATE = (
    '{%- if messages[0]["role"] == "system" %}\n'
    '    {%- set system_message = messages[0]["content"] %}\n'
    '    {%- set loop_messages = messages[1:] %}\n{%- else %}\n'
    '    {%- set loop_messages = messages %}\n{%- endif %}\n\n{{- bos_token }}\n'
    '{%- for message in loop_messages %}\n    {%- if message["role"] == "user" %}\n'
    '        {%- if loop.last and system_message is defined %}\n'
    '            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}\n'
    '        {%- else %}\n            {{- "[INST] " + message["content"] + "[/INST]" }}\n'
    '        {%- endif %}\n    {%- elif message["role"] == "assistant" %}\n'
    '        {{- " " + message["content"]|trim + eos_token}}\n    {%- endif %}\n{%- endfor %}\n')

CHATML_TOKENS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
LLAMA3_TOKENS = ('<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>',
                 '<|eot_id|>')
MISTRAL_TOKENS = ('<unk>', '<s>', '</s>', '[INST]', '[/INST]')
LEGACY = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])

# {name: (format, published template, the token that ends a response, a maker of the tokenizer)}
MODELS = {
    'smollm2': ('chatml', SMOLLM2_TEMPLATE, '<|im_end|>', lambda text: foreign(
        text, FAMILIES['smollm']['pre'], special=CHATML_TOKENS)),
    'qwen2.5': ('chatml', QWEN_TEMPLATE, '<|im_end|>', lambda text: foreign(
        text, split(QWEN), normalizers.NFC(), special=CHATML_TOKENS, special_first=False)),
    'gpt4o-like': ('chatml', QWEN_TEMPLATE, '<|im_end|>', lambda text: foreign(
        text, split(O200K), special=CHATML_TOKENS, special_first=False)),
    'llama3': ('llama3', LLAMA3_TEMPLATE, '<|eot_id|>', lambda text: foreign(
        text, split(LLAMA), special=LLAMA3_TOKENS, special_first=False, ignore_merges=True)),
    'mistral': ('mistral', MISTRAL_TEMPLATE, '</s>', lambda text: byte_fallback(
        text, pre=METASPACE_FIRST, special=MISTRAL_TOKENS)),
    'mistral-legacy': ('mistral', MISTRAL_TEMPLATE, '</s>', lambda text: byte_fallback(
        text, LEGACY, special=MISTRAL_TOKENS)),
    'mistral-byte-level': ('mistral', MISTRAL_TEMPLATE, '</s>', lambda text: foreign(
        text, split(LLAMA), special=MISTRAL_TOKENS)),
}

CONTENTS = ['the anor', ' the', 'on\n', '\n\nwé\n no', '  17 + 4', '', 'ma!\r\n', '\t字 👍🏽', "'ll",
            '\nassistant\n', 'INST', ' ']


def conversations(n, seed=0):
    """Chats that begin with a system message (n of them) or without one (n)."""
    rng = random.Random(seed)
    chats = []
    for i in range(2 * n):
        chat = []
        if i < n:
            chat.append({'role': 'system', 'content': rng.choice(CONTENTS)})
        for turn in range(rng.randint(1, 5)):
            role = 'assistant' if turn % 2 else 'user'
            chat.append({'role': role, 'content': rng.choice(CONTENTS)})
        chats.append(chat)
    return chats


def chat_model(name, text, tmp_path, template=None):
    """Our tokenizer of one of MODELS, and transformers' with the published or another template."""
    transformers = pytest.importorskip('transformers')
    format_name, published, end, make = MODELS[name]
    path = str(tmp_path / 'tokenizer.json')
    make(text).save(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    if format_name == 'llama3':
        theirs.bos_token = '<|begin_of_text|>'
    if format_name == 'mistral':
        theirs.bos_token = '<s>'
        theirs.eos_token = '</s>'
    theirs.chat_template = template or published
    return Tokenizer.load(path), theirs


def their_ids(theirs, chat):
    return theirs.apply_chat_template(
        chat, add_generation_prompt=chat[-1]['role'] == 'user', tokenize=True, return_dict=False)


@pytest.mark.parametrize('name', MODELS)
def test_chats_have_the_ids_of_the_published_template(name, text, tmp_path):
    format_name, _, end, _ = MODELS[name]
    ours, theirs = chat_model(name, text, tmp_path)
    assert chat_format(ours) is bpe.CHAT_FORMATS[format_name]
    assert ours.chat_end == ours.special[end]
    for chat in conversations(100):
        has_system = chat[0]['role'] == 'system'
        if format_name == 'chatml' and not has_system:
            continue  # the templates would add the model's default system message
        if format_name == 'mistral' and has_system and chat[-1]['role'] != 'user':
            continue  # the published template loses the system message
        assert render_chat(chat, ours)[0] == their_ids(theirs, chat), chat


@pytest.mark.parametrize('name', MODELS)
def test_the_loss_counts_the_assistants_words_and_the_end_token(name, text, tmp_path):
    format_name, _, end, make = MODELS[name]
    path = str(tmp_path / 'tokenizer.json')
    make(text).save(path)
    tokenizer = Tokenizer.load(path)
    end_id = tokenizer.special[end]
    for chat in conversations(100, seed=1):
        ids, mask = render_chat(chat, tokenizer)
        assert len(ids) == len(mask) and set(mask) <= {0, 1}
        # Each run of counted ids is a response. Llama 3 and Mistral remove the blanks around it.
        responses = []
        current = []
        for id, counted in zip(ids, mask):
            if counted:
                current.append(id)
            if counted and id == end_id:
                responses.append(tokenizer.decode(current))
                current = []
        assert current == []
        expected = [message['content'] for message in chat if message['role'] == 'assistant']
        assert len(responses) == len(expected)
        for response, content in zip(responses, expected):
            content = unicodedata.normalize('NFC', content)
            assert response.removesuffix(end).strip() == content.strip()


@pytest.mark.parametrize('name', MODELS)
def test_a_prompt_is_the_beginning_of_the_chat_with_the_response(name, text, tmp_path):
    """What the model is trained to continue is what it is given at generation."""
    ours, _ = chat_model(name, text, tmp_path)
    chat = [{'role': 'user', 'content': 'on 17'}, {'role': 'assistant', 'content': 'the anor'}]
    prompt, _ = render_chat(chat[:1], ours)
    ids, mask = render_chat(chat, ours)
    assert ids[:len(prompt)] == prompt
    assert mask[:len(prompt)] == [0] * len(prompt) and mask[len(prompt)] == 1


@pytest.mark.parametrize('name', [*MODELS, 'ours'])
def test_the_exported_template_gives_the_ids_of_render_chat(name, text, trained, tmp_path):
    transformers = pytest.importorskip('transformers')
    if name == 'ours':
        path = str(tmp_path / 'tokenizer.json')
        trained.save(path)
        ours = trained
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    else:
        ours, theirs = chat_model(name, text, tmp_path)
    theirs.chat_template = bpe.chat_template(ours)
    chats = conversations(100, seed=2)
    chats += [chat[1:] for chat in chats if chat[0]['role'] == 'system' and len(chat) > 2]
    chats += [chat + [{'role': 'assistant', 'content': 'no'}] * 2 for chat in chats]
    chats += [[*chat, {'role': 'user', 'content': 'no'}] for chat in chats]
    for chat in chats:
        assert render_chat(chat, ours)[0] == their_ids(theirs, chat), chat


def test_a_tokenizer_without_a_format_has_no_template(text, tmp_path):
    path = str(tmp_path / 'tokenizer.json')
    foreign(text, pre=BYTE_LEVEL).save(path)
    tokenizer = Tokenizer.load(path)
    assert chat_format(tokenizer) is None and bpe.chat_template(tokenizer) is None


@pytest.mark.parametrize('name', MODELS)
def test_names_of_markers_in_a_message_are_plain_text(name, text, tmp_path):
    ours, _ = chat_model(name, text, tmp_path)
    for marker in bpe.CHAT_FORMATS[MODELS[name][0]].markers:
        plain, _ = render_chat([{'role': 'user', 'content': 'a'}], ours)
        ids, _ = render_chat([{'role': 'user', 'content': marker}], ours)
        id = ours.special[marker]
        assert ids.count(id) == plain.count(id)


def test_a_published_format_comes_before_ours(text, tmp_path):
    ours, _ = chat_model('qwen2.5', text, tmp_path)
    ours.add_special(bpe.SPECIAL_TOKENS)
    assert chat_format(ours) is bpe.CHAT_FORMATS['chatml']


def test_the_token_that_ends_a_document_is_found(text, tmp_path):
    assert Tokenizer.byte().end_of_text == 256
    for name, end in (('smollm2', '<|endoftext|>'), ('llama3', '<|end_of_text|>'),
                      ('mistral', '</s>')):
        tokenizer, _ = chat_model(name, text, tmp_path)
        assert tokenizer.end_of_text == tokenizer.special[end]
        tokenizer.add_special(bpe.SPECIAL_TOKENS)
        assert tokenizer.end_of_text == tokenizer.special[end]
    assert Tokenizer({97: b'a'}, {}).end_of_text is None


# ----- From the command line

def run(*arguments):
    command = [sys.executable, os.path.join(ROOT, 'bpe.py'), *arguments]
    return subprocess.run(command, capture_output=True, text=True, encoding='utf-8', timeout=120)


def test_the_command_line_trains_a_tokenizer(text, tmp_path):
    (tmp_path / 'a.txt').write_bytes(text[:20_000].encode())
    done = run(f'--input={tmp_path}/a.txt', '--vocab_size=300', f'--out={tmp_path}/t.json')
    assert done.returncode == 0, done.stderr
    assert '39 merges' in done.stdout and 'bytes per token' in done.stdout
    trained = Tokenizer.train(text[:20_000], 300)
    assert Tokenizer.load(str(tmp_path / 't.json')).fingerprint == trained.fingerprint


def test_training_that_takes_long_prints_its_progress(text, monkeypatch, capsys):
    monkeypatch.setattr(bpe, 'REPORT_SECONDS', -1)  # every merge takes longer
    Tokenizer.train(text, 256 + 3 + len(SPECIAL_TOKENS))
    assert capsys.readouterr().out == '  1 of 3 merges\n  2 of 3 merges\n  3 of 3 merges\n'


def test_verbose_prints_each_merge_with_its_count(tmp_path):
    (tmp_path / 'a.txt').write_text('aaabdaaabac', encoding='utf-8')
    done = run(f'--input={tmp_path}/a.txt', '--vocab_size=264', f'--out={tmp_path}/t.json',
               '--verbose=True')
    assert done.stdout.splitlines()[:3] == [
        "merge 1: 'a' + 'a' -> 'aa' (4 times)",
        "merge 2: 'a' + 'b' -> 'ab' (2 times)",
        "merge 3: 'aa' + 'ab' -> 'aaab' (2 times)"]


def test_a_users_mistake_is_one_line_and_status_2(tmp_path):
    (tmp_path / 'a.txt').write_text('ab', encoding='utf-8')
    for arguments in ([], ['--input=nowhere.txt'], [f'--input={tmp_path}/a.txt']):
        done = run(*arguments, f'--out={tmp_path}/t.json')
        assert done.returncode == 2
        assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert not (tmp_path / 't.json').exists()
