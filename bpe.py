"""
Byte-level byte-pair encoding (BPE, arXiv 1508.07909): text to token ids and back, and chats.

Training starts from the 256 bytes, which can write any text. It then repeats one step: find the
most frequent pair of neighbouring tokens, and make it a new token. A tokenizer without any such
merge is the byte tokenizer. As in GPT-2, and unlike in the paper, a regular expression first splits
the text into words, and a word has no end-of-word symbol. No merge crosses the border of a word.

Train a tokenizer on a text file, and print each merge as it is learned:

    python bpe.py --input=plays.txt --vocab_size=4096 --out=tokenizer.json --verbose=True
"""
import codecs
import hashlib
import heapq
import json
import math
import os
import re
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

import regex
import tiktoken

from configurator import configure, errors_name_setting, printable, write_atomically

# The special tokens of our own chat format and data files, in the order of their ids.
SPECIAL_TOKENS = ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>')

# What tokenizers call the token that ends a document. The first name that a tokenizer has is used.
# The order matters for two of them: Gemma also has </s>, a mark of HTML; and <|endoftext|> may be
# ours, added to a published tokenizer that has a name of its own.
END_OF_TEXT_NAMES = ('<|end_of_text|>', '<eos>', '<｜end▁of▁sentence｜>', '</s>',
                     '<|endoftext|>')

# No published vocabulary has a tenth as many ids without a token. More of them would only allocate
# a huge embedding.
MAX_UNUSED_IDS = 100_000

# The names that get_tokenizer knows. Anything else is the path of a tokenizer.json.
NAMED_TOKENIZERS = ('byte', 'bpe', 'gpt2')

# Work that takes longer than this prints its progress as often.
REPORT_SECONDS = 5

# ----- Words: how a text is split before training and encoding

PATTERNS = {
    # Ours, as in SmolLM: GPT-2's pattern, but every digit is a word of its own, and a blank before
    # a digit is not part of it. A number is then always written as the same tokens, wherever it
    # appears, so that a model can learn arithmetic.
    'digits': r" ?\p{L}+|\p{N}|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    'gpt2': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Llama 3: contractions in both cases, up to three digits, line ends apart from other blanks.
    'llama3': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3: Llama 3's pattern with single digits.
    'qwen2': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# tiktoken's regular expressions run out of memory for their stack in very long runs of blanks.
LONG_BLANKS = re.compile(r'\s{10000}')


# ----- Bytes as visible characters: how a tokenizer.json writes tokens

# A token may be a part of a character, which is not valid UTF-8 and cannot be written in JSON.


def byte_characters():
    """GPT-2's table: a list of 256 characters, one for each byte.

    A visible Latin-1 character stands for its own byte. The other bytes are blanks and control
    characters. They take the characters from U+0100 on, in their order.

    >>> table = byte_characters()
    >>> table[ord('A')], table[ord('~')], table[0], table[ord(' ')]
    ('A', '~', 'Ā', 'Ġ')
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    table = []
    next_free = 256
    for byte in range(256):
        if byte in visible:
            table.append(chr(byte))
        else:
            table.append(chr(next_free))
            next_free += 1
    return table

BYTE_TO_CHAR = byte_characters()
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def to_visible(token):
    """The name that a tokenizer.json gives to a token: bytes -> str.

    >>> to_visible(b' the')
    'Ġthe'
    """
    return ''.join(BYTE_TO_CHAR[byte] for byte in token)


def from_visible(name):
    """The opposite of to_visible: str -> bytes."""
    return bytes(CHAR_TO_BYTE[char] for char in name)

# ----- Training in plain form


def count_pairs(words):
    """How often each pair of neighbouring ids occurs in words = {tuple of ids: count}.

    >>> count_pairs({(5, 6, 5, 6): 10, (5, 6): 1})
    {(5, 6): 21, (6, 5): 10}
    """
    pairs = {}
    for word, count in words.items():
        for pair in zip(word, word[1:]):
            pairs[pair] = pairs.get(pair, 0) + count
    return pairs


def merge(word, pair, new_id):
    """The word, a tuple of ids, with each occurrence of the pair replaced, from left to right.

    >>> merge((5, 6, 7, 5, 6), (5, 6), 99)
    (99, 7, 99)
    >>> merge((5, 5, 5), (5, 5), 99)
    (99, 5)
    """
    merged = []
    i = 0
    while i < len(word):
        if word[i:i + 2] == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def print_merge(tokens, pair, count):
    """Print the newest of the tokens, the pair of ids that it was made of, and the pair's count."""
    names = []
    for token in (tokens[pair[0]], tokens[pair[1]], tokens[-1]):
        try:
            names.append(repr(token.decode()))
        except UnicodeDecodeError:  # part of a character
            names.append(repr(token))
    # repr() also shows control characters as escapes, so that they cannot drive a terminal.
    left, right, new = names
    print(f'merge {len(tokens) - 256:,}: {left} + {right} -> {new} ({count:,} times)', flush=True)


def train_bpe_plain(text, n_tokens, pattern, verbose=False):
    """Learn a vocabulary in the plainest way: count all pairs again before each merge.

    Returns a list of bytes, where the index is the id: the 256 single bytes, then one token per
    merge. Of equally frequent pairs, the one with the smaller ids is merged. The list is shorter
    than n_tokens if the text has no more pairs. `pattern` is a regular expression of PATTERNS.

    >>> tokens = train_bpe_plain('aaabdaaabac', 259, PATTERNS['digits'], verbose=True)
    merge 1: 'a' + 'a' -> 'aa' (4 times)
    merge 2: 'a' + 'b' -> 'ab' (2 times)
    merge 3: 'aa' + 'ab' -> 'aaab' (2 times)

    The text is now aaab d aaab a c: five tokens in place of eleven.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    word_counts = Counter(regex.findall(pattern, text))
    words = {tuple(word.encode()): count for word, count in word_counts.items()}
    while len(tokens) < n_tokens:
        pairs = count_pairs(words)
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        new_id = len(tokens) - 1
        words = {merge(word, best, new_id): count for word, count in words.items()}
        if verbose:
            print_merge(tokens, best, pairs[best])
    return tokens

# ----- Training, faster: each merge visits only the words that contain its pair


def train_bpe(text, n_tokens, pattern, verbose=False):
    """The same as train_bpe_plain, and much faster; a test compares them.

    The pair counts are kept and corrected around each merge, instead of being counted again. A heap
    finds the most frequent pair. Training that takes long prints its progress.
    """
    last_report = time.monotonic()
    # 1. Split the text into words. Each different word is stored once, with its count.
    text.encode()  # raises UnicodeEncodeError, a ValueError, at a lone surrogate
    word_counts = Counter(regex.findall(pattern, text))
    words = [list(word.encode()) for word in word_counts]
    counts = list(word_counts.values())

    # 2. Count the pairs, and note in which words each pair occurs.
    pair_counts = defaultdict(int)
    words_with = defaultdict(set)  # pair -> indices of words
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < n_tokens and heap:
        # 3. Take the most frequent pair. The count in the heap may be out of date. It is then too
        # high, because the count of a pair that exists already can only fall: put the pair back.
        negative_count, best = heapq.heappop(heap)
        count = pair_counts[best]
        if count == 0:
            continue
        if count != -negative_count:
            heapq.heappush(heap, (-count, best))
            continue
        left, right = best
        new_id = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        if verbose:
            print_merge(tokens, best, count)
        elif time.monotonic() - last_report > REPORT_SECONDS:
            print(f'  {len(tokens) - 256:,} of {n_tokens - 256:,} merges', flush=True)
            last_report = time.monotonic()

        # 4. Merge the pair in the words that contain it, and correct the counts of its neighbours.
        new_pairs = set()
        for i in words_with.pop(best):
            word = words[i]
            position = 0
            while position < len(word) - 1:
                if word[position] == left and word[position + 1] == right:
                    word[position:position + 2] = [new_id]
                    if position > 0:
                        before = word[position - 1]
                        pair_counts[before, left] -= counts[i]
                        pair_counts[before, new_id] += counts[i]
                        words_with[before, new_id].add(i)
                        new_pairs.add((before, new_id))
                    if position + 1 < len(word):
                        after = word[position + 1]
                        pair_counts[right, after] -= counts[i]
                        pair_counts[new_id, after] += counts[i]
                        words_with[new_id, after].add(i)
                        new_pairs.add((new_id, after))
                position += 1
        del pair_counts[best]
        for pair in new_pairs:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return tokens

# ----- Encoding in plain form


def apply_merges(word, merges):
    """Encode one word: a tuple of ids in which all merges = {(left, right): new id} have been made.

    The merge with the lowest new id comes first, because it was learned first.

    >>> apply_merges((97, 97, 97, 98), {(97, 97): 256, (97, 98): 257, (256, 257): 258})
    (258,)
    """
    while len(word) > 1:
        best = min(zip(word, word[1:]), key=lambda pair: merges.get(pair, math.inf))
        if best not in merges:
            break
        word = merge(word, best, merges[best])
    return word

# ----- The parts of a tokenizer.json


def pre_tokenizer_forms(pattern):
    """The ways in which a tokenizer.json may write a key of PATTERNS, each a list of stages.

    The first is the one that we write. The others are found in published files.
    """
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False,
                  'use_regex': True}
    split = {'type': 'Split', 'behavior': 'Isolated', 'invert': False,
             'pattern': {'Regex': PATTERNS[pattern]}}
    # GPT-4 (cl100k) removes what does not match the pattern. But every text matches as a whole.
    removing = split | {'behavior': 'Removed', 'invert': True}
    bytes_only = byte_level | {'use_regex': False}
    forms = [[split, bytes_only], [removing, bytes_only]]
    if pattern == 'gpt2':
        forms.append([byte_level])
    if pattern == 'digits':
        # SmolLM
        forms.append([{'type': 'Digits', 'individual_digits': True}, byte_level])
    return forms


def comparable(stages):
    """The stages of a pre-tokenizer in one form: a default filled in, and without trim_offsets."""
    # trim_offsets is about positions in the text, which we do not use. It never changes ids.
    return [{'use_regex': True} | stage | {'trim_offsets': None} for stage in stages]


def find_pattern(pre_tokenizer):
    """The key of PATTERNS that the pre_tokenizer of a tokenizer.json stands for, or None."""
    stages = comparable(pre_tokenizer.get('pretokenizers', [pre_tokenizer]))
    for pattern in PATTERNS:
        for form in pre_tokenizer_forms(pattern):
            if comparable(form) == stages:
                return pattern
    return None


def unsupported_parts(content):
    """What in the content of a tokenizer.json changes ids in a way that Tokenizer does not know.

    Returns a list of texts for an error message. It is empty if Tokenizer can represent the file.
    """
    parts = []
    model = content['model']
    # Everything else must be off. unk_token and fuse_unk are for bytes without a token.
    handled = ('type', 'vocab', 'merges', 'ignore_merges', 'unk_token', 'fuse_unk')
    if model.get('type', 'BPE') != 'BPE':
        parts.append(f'type {json.dumps(model["type"])}')
    for key, value in model.items():
        if key not in handled and value:
            parts.append(f'{key} {json.dumps(value)}')
    if model.get('unk_token') and any(char not in model['vocab'] for char in BYTE_TO_CHAR):
        parts.append(f'unk_token {json.dumps(model["unk_token"])}')
    normalizer = content.get('normalizer')
    if normalizer and normalizer != {'type': 'NFC'}:
        parts.append(f'normalizer {json.dumps(normalizer)}')
    pre_tokenizer = content.get('pre_tokenizer')
    if find_pattern(pre_tokenizer or {}) is None:
        parts.append(f'pre_tokenizer {json.dumps(pre_tokenizer)}')
    decoder = content.get('decoder') or {}
    if decoder.get('type') != 'ByteLevel':
        parts.append(f'decoder {json.dumps(content.get("decoder"))}')
    for token in content.get('added_tokens', []):
        for flag in ('lstrip', 'rstrip', 'single_word'):
            if token.get(flag):
                parts.append(f'{flag} of {token["content"]!r}')
    return parts


def check_content(content):
    """ValueError if a tokenizer.json has tokens that cannot be: with impossible or shared ids."""
    # 1. The parts that we read have the right types.
    if not isinstance(content, dict) or not isinstance(content.get('model'), dict):
        raise ValueError('damaged: it has no "model"')
    vocab = content['model'].get('vocab')
    added_tokens = content.get('added_tokens', [])
    if not isinstance(vocab, (dict, list)) or not isinstance(added_tokens, list):
        raise ValueError('damaged: "vocab" or "added_tokens" is of the wrong type')
    if isinstance(vocab, list):  # a Unigram model: [name, score] for each id
        vocab = {str(entry[0]): id for id, entry in enumerate(vocab)}

    # 2. Each name has one id, and each id one name.
    limit = len(vocab) + len(added_tokens) + MAX_UNUSED_IDS
    id_of = dict(vocab)
    name_of = {}
    for name, id in vocab.items():
        check_id(name, id, limit)
        if id in name_of:
            raise ValueError(f'damaged: tokens {name_of[id]!r} and {name!r} have the same id {id}')
        name_of[id] = name
    for token in added_tokens:
        name = token['content']
        id = token['id']
        if not isinstance(name, str) or not name:
            raise ValueError(f'damaged: an added token has the name {name!r}')
        check_id(name, id, limit)
        if name_of.get(id, name) != name:
            raise ValueError(f'damaged: the added token {name!r} has the id {id} of '
                             f'another token, {name_of[id]!r}')
        if id_of.get(name, id) != id:
            raise ValueError(f'damaged: token {name!r} has two ids, {id_of[name]} and {id}')
        name_of[id] = name
        id_of[name] = id


def check_id(name, id, limit):
    """ValueError if this is not a possible token id. bool is a kind of int, but not an id."""
    if type(id) is not int or not 0 <= id < limit:
        raise ValueError(f'damaged: token {name!r} has the id {id!r}, which is not a whole number '
                         f'from 0 to {limit - 1:,}')

# ----- Chat formats


@dataclass(frozen=True)
class ChatFormat:
    """How a chat is written as special tokens and plain text.

    A part is the name of a special token (one of `markers`) or plain text. A message is written as

        before[role]   opening[role] + content   after[role]

    where opening is plain text that is encoded together with the content.
    """
    markers: tuple   # the special tokens by which a tokenizer's format is recognised
    start: tuple     # the parts before the first message
    before: dict     # {role: parts}
    opening: dict    # {role: plain text}
    after: dict      # {role: parts}; the assistant's begin with the token that ends a response
    system: str      # where the system message goes: 'own turn', or before the text of the
                     # 'first user' or 'last user' message, followed by an empty line
    stripped: tuple = ()        # roles whose content loses the blanks around it
    response_prefix: str = ''   # plain text before the assistant's words, which the model generates

ROLES = ('system', 'user', 'assistant')

CHAT_FORMATS = {
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n (SmolLM2, Qwen). The
    # default system messages of these models are not added: give one as the first message.
    'chatml': ChatFormat(
        markers=('<|im_start|>', '<|im_end|>'),
        start=(),
        before=dict.fromkeys(ROLES, ('<|im_start|>',)),
        opening={'system': 'system\n', 'user': 'user\n', 'assistant': 'assistant\n'},
        after=dict.fromkeys(ROLES, ('<|im_end|>', '\n')),
        system='own turn'),
    # <|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>...
    'llama3': ChatFormat(
        markers=('<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'),
        start=('<|begin_of_text|>',),
        before={role: ('<|start_header_id|>', role, '<|end_header_id|>') for role in ROLES},
        opening=dict.fromkeys(ROLES, '\n\n'),
        after=dict.fromkeys(ROLES, ('<|eot_id|>',)),
        system='own turn',
        stripped=ROLES),
    # <s>[INST] Hi[/INST] Yes</s> (Mistral 7B v0.3 and later, where [INST] is a special token)
    'mistral': ChatFormat(
        markers=('<s>', '</s>', '[INST]', '[/INST]'),
        start=('<s>',),
        before={'user': ('[INST]',), 'assistant': ()},
        opening={'user': ' ', 'assistant': ''},
        after={'user': ('[/INST]',), 'assistant': ('</s>',)},
        system='last user',
        stripped=('assistant',),
        response_prefix=' '),
    # Ours: <|user|>Hi<|end|><|assistant|>Yes<|end|>
    'nanollm': ChatFormat(
        markers=('<|user|>', '<|assistant|>', '<|end|>'),
        start=(),
        before={'user': ('<|user|>',), 'assistant': ('<|assistant|>',)},
        opening={'user': '', 'assistant': ''},
        after={'user': ('<|end|>',), 'assistant': ('<|end|>',)},
        system='first user'),
}


def chat_format(tokenizer):
    """The ChatFormat that the tokenizer has the special tokens for, or None.

    A published format comes before ours, whose tokens may have been added to a published tokenizer.
    """
    for chat in CHAT_FORMATS.values():
        if all(name in tokenizer.special for name in chat.markers):
            return chat
    return None

# ----- The tokenizer


class EndTokens:
    """What both classes of tokenizers share: the ids that end a text, by self.special."""

    @property
    def chat_end(self):
        """The id that ends a response in the tokenizer's chat format, or None without a format."""
        chat = chat_format(self)
        if chat is None:
            return None
        return self.special[chat.after['assistant'][0]]

    @property
    def end_of_text(self):
        """The id that ends a document, or None if the tokenizer has no such token."""
        for name in END_OF_TEXT_NAMES:
            if name in self.special:
                return self.special[name]
        return None


def added_token(name, id):
    """The entry of a special token in a tokenizer.json."""
    return {'id': id, 'content': name, 'special': True, 'single_word': False, 'lstrip': False,
            'rstrip': False, 'normalized': False}


def fingerprint_of(content):
    """16 hexadecimal digits for the content of a tokenizer.json."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_content(content, path):
    """Write a tokenizer.json. If that fails, the old file is still there."""
    text = json.dumps(content, ensure_ascii=False, indent=1)
    with write_atomically(path) as file:
        file.write(text.encode())


class Tokenizer(EndTokens):
    """Byte-level BPE: text to ids and back.

    In our own tokenizers, ids 0 to 255 are the bytes. The merges follow, then the special tokens.
    Loaded files may have any order of ids.

    Special tokens, and all other added tokens of a loaded file, are encoded only with special=True.
    In a user's text, the same characters are plain text. No start token is added. The ids equal
    those of Hugging Face's tokenizers with add_special_tokens=False on every text that does not
    contain the name of an added token.

    >>> tokenizer = Tokenizer.train('aaabdaaabac', vocab_size=256 + 3 + len(SPECIAL_TOKENS))
    >>> tokenizer.merges
    {(97, 97): 256, (97, 98): 257, (256, 257): 258}
    >>> tokenizer.encode('aaabdaaabac')
    [258, 100, 258, 97, 99]
    >>> tokenizer.decode([258, 100])
    'aaabd'
    """
    def __init__(self, tokens, special=None, pattern='digits', normalizer=None,
                 ignore_merges=False):
        """
        tokens: {id: bytes} without the special tokens, or pairs (id, bytes).
        special: {name: id}; None gives SPECIAL_TOKENS the next ids.
        pattern: a key of PATTERNS.
        normalizer: None, or 'NFC' (Qwen): an e followed by an accent becomes one é.
        ignore_merges: a word that is a token becomes it, even if no merges make it (Llama 3).

        A byte without a token is dropped from texts, as Hugging Face's tokenizers do. Published
        vocabularies omit bytes that UTF-8 never uses, and SmolLM2 some control characters.

        ValueError if a token is not a byte, and not made of two tokens with smaller ids.
        """
        self.tokens = dict(tokens)
        self.special = dict(special or {})
        self.pattern = pattern
        self.normalizer = normalizer
        self.ignore_merges = ignore_merges
        if not self.tokens:
            raise ValueError('not byte-level: it has no tokens')

        self._id_of = {token: id for id, token in self.tokens.items()}
        self._byte_ids = {token[0]: id for token, id in self._id_of.items() if len(token) == 1}
        missing = [re.escape(bytes([byte])) for byte in range(256) if byte not in self._byte_ids]
        self._missing_bytes = re.compile(b'|'.join(missing)) if missing else None
        self._has_warned = False
        self.merges = self._find_merges()
        # This also sets what depends on all tokens: vocab_size and _bytes_of.
        self.add_special(SPECIAL_TOKENS if special is None else [])
        self.eos_ids = []     # where a generation ends; data/pretrained.py sets them
        self.name = 'bpe' if self.merges else 'byte'

    def _find_merges(self):
        """{(left id, right id): new id}, found by encoding each token with the merges before it."""
        merges = {}
        for id, token in sorted(self.tokens.items()):
            if len(token) == 1:
                continue
            if any(byte not in self._byte_ids for byte in token):
                raise ValueError(f'token {id}, {token}, contains a byte that has no token')
            parts = apply_merges(self._bytes_to_ids(token), merges)
            if len(parts) == 2:
                merges[parts] = id
            elif len(parts) == 1 or not self.ignore_merges:  # one part: a token of the same bytes
                raise ValueError(f'token {id}, {token}, is not made of two tokens with smaller ids')
        return merges

    def _bytes_to_ids(self, word):
        return tuple(self._byte_ids[byte] for byte in word)

    def add_special(self, names):
        """Give the next ids to the names that are not special tokens yet. Returns their number."""
        new_names = [name for name in names if name not in self.special]
        next_id = max([*self.tokens, *self.special.values()]) + 1
        for name in new_names:
            self.special[name] = next_id
            next_id += 1
        self._bytes_of = dict(self.tokens)
        for name, id in self.special.items():
            self._bytes_of[id] = name.encode()
        self.vocab_size = max(self._bytes_of) + 1
        self._encoder = None  # tiktoken's, which is built when it is next needed
        return len(new_names)

    def missing_ids(self, n_rows):
        """The ids below n_rows, a model's vocabulary size, that this tokenizer does not have.
        They only pad the vocabulary, and must not be sampled."""
        return [id for id in range(n_rows) if id not in self._bytes_of]

    # --- Where tokenizers come from

    @classmethod
    def byte(cls):
        """The tokenizer without merges: ids 0 to 255 are the bytes, then the special tokens."""
        return cls({byte: bytes([byte]) for byte in range(256)})

    @classmethod
    def train(cls, text, vocab_size, pattern='digits', verbose=False):
        """Learn merges from a text. vocab_size counts the bytes, the merges and the special tokens.

        ValueError if vocab_size is too small for the bytes, or the text too short for vocab_size.
        """
        if not text:
            raise ValueError('no text to train on')
        if pattern not in PATTERNS:
            raise ValueError(f'pattern={pattern!r} is not one of {list(PATTERNS)}')
        tokens = train_bpe(text, vocab_size - len(SPECIAL_TOKENS), PATTERNS[pattern], verbose)
        possible = len(tokens) + len(SPECIAL_TOKENS)
        if vocab_size != possible:
            limit = 'least' if vocab_size < possible else 'most'
            raise ValueError(
                f'vocab_size {vocab_size} does not fit 256 bytes, {len(SPECIAL_TOKENS)} special '
                f'tokens and the words in {len(text):,} characters of text: ask for at {limit} '
                f'{possible}')
        return cls(enumerate(tokens), pattern=pattern)

    @classmethod
    def gpt2(cls):
        """GPT-2's tokenizer, which tiktoken downloads once. ValueError without a network."""
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as error:
            raise ValueError(
                "cannot get GPT-2's vocabulary from openaipublic.blob.core.windows.net "
                f'({type(error).__name__}): give the path of its tokenizer.json') from None
        tokens = {id: token for token, id in gpt2._mergeable_ranks.items()}
        return cls(tokens, gpt2._special_tokens, 'gpt2')

    # --- Text to ids

    def _normalized(self, text):
        text.encode()  # raises UnicodeEncodeError, a ValueError, at a lone surrogate
        if self.normalizer:
            return unicodedata.normalize(self.normalizer, text)
        return text

    def encode_plain(self, text):
        """The same as encode(text), in plain Python, to show what it does; a test compares them."""
        ids = []
        for word in regex.findall(PATTERNS[self.pattern], self._normalized(text)):
            word = word.encode()
            if self.ignore_merges and word in self._id_of:
                ids.append(self._id_of[word])
            else:
                ids.extend(apply_merges(self._bytes_to_ids(self._drop_missing(word)), self.merges))
        return ids

    def _drop_missing(self, word):
        """The word, which is bytes, without the bytes that have no token. Prints one warning."""
        if self._missing_bytes is None:
            return word
        dropped = self._missing_bytes.findall(word)
        if dropped and not self._has_warned:
            print(f'warning: bytes without a token are dropped, such as {dropped[0].hex()} '
                  'in this text', file=sys.stderr, flush=True)
            self._has_warned = True
        return self._missing_bytes.sub(b'', word)

    def encode(self, text, special=False):
        """A text as a list of ids. special=True: names of special tokens become these tokens.

        ValueError (UnicodeEncodeError) for a lone surrogate.
        """
        text = self._normalized(text)
        if not special or not self.special:
            return self._encode_words(text)
        # The longest name first: one name may be the beginning of another.
        names = sorted(self.special, key=len, reverse=True)
        alternatives = '|'.join(re.escape(name) for name in names)
        ids = []
        for part in re.split(f'({alternatives})', text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids.extend(self._encode_words(part))
        return ids

    def encode_after_special(self, text):
        """The ids of a text that follows a special token. For this class it makes no difference."""
        return self.encode(text)

    def _encode_words(self, text):
        """The ids of a normalized text without special tokens. tiktoken does the work."""
        if self._encoder is None:
            self._encoder = tiktoken.Encoding(
                'nanollm', pat_str=PATTERNS[self.pattern], mergeable_ranks=self._id_of,
                special_tokens={})
        has_missing = self._missing_bytes and self._missing_bytes.search(text.encode())
        if not has_missing and not LONG_BLANKS.search(text):
            return self._encoder.encode_ordinary(text)

        # tiktoken fails at a byte without a token, and at a very long run of blanks. So we split
        # the text, with the same pattern, and give it the words one by one.
        ids = []
        for word in regex.findall(PATTERNS[self.pattern], text):
            word = self._drop_missing(word.encode())
            if word:
                ids.extend(self._encoder._encode_single_piece(word))
        return ids

    # --- Ids to text

    def decode_bytes(self, ids):
        """The bytes of the ids. A special token gives its name. ValueError for an unknown id."""
        try:
            return b''.join([self._bytes_of[id] for id in ids])
        except KeyError as error:
            raise ValueError(
                f'token id {error} is not in the vocabulary of {self.vocab_size}') from None

    def decode(self, ids):
        """The text of the ids. Invalid UTF-8 becomes U+FFFD, the replacement character."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def stream_decoder(self):
        """A function decode_next(ids, final=False) for ids that arrive in pieces.

        It returns the text that is complete so far, and keeps the bytes of an unfinished character
        for the next call. final=True returns the rest.
        """
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

        def decode_next(ids, final=False):
            return utf8.decode(self.decode_bytes(ids), final)
        return decode_next

    # --- Files

    @property
    def fingerprint(self):
        """16 hexadecimal digits that change with anything that changes ids."""
        return fingerprint_of(self.to_dict())

    def to_dict(self):
        """The content of a Hugging Face tokenizer.json: dicts, lists, strings and numbers."""
        names = {id: to_visible(token) for id, token in self.tokens.items()}
        special = sorted(self.special.items(), key=lambda item: item[1])
        added_tokens = [added_token(name, id) for name, id in special]
        vocab = {name: id for id, name in names.items()}
        merges = [f'{names[left]} {names[right]}' for left, right in self.merges]
        stages = pre_tokenizer_forms(self.pattern)[0]

        # The order of the keys is that of the file.
        return {
            'version': '1.0',
            'normalizer': {'type': self.normalizer} if self.normalizer else None,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': stages},
            'decoder': stages[1],
            'added_tokens': added_tokens,
            'model': {
                'type': 'BPE',
                'ignore_merges': self.ignore_merges,
                'vocab': vocab | self.special,
                'merges': merges,
            },
        }

    @classmethod
    def from_dict(cls, content):
        """The tokenizer with this content of a tokenizer.json.

        It is a HuggingFaceTokenizer, which has the same methods, if this class cannot represent the
        content. ValueError if the content is damaged.
        """
        try:
            check_content(content)
            reason = ', '.join(unsupported_parts(content))
            if not reason:
                try:
                    return cls._from_byte_level(content)
                except ValueError as error:
                    reason = str(error)
            return HuggingFaceTokenizer(content, reason)
        except Exception as error:
            if type(error) is ValueError:  # our own; a UnicodeError is damage
                raise
            message = ' '.join(str(error).split())
            raise ValueError(f'damaged ({type(error).__name__}): {message}') from error

    @classmethod
    def _from_byte_level(cls, content):
        """from_dict for what this class can represent. ValueError that says why it cannot."""
        # 1. Read the tokens. The vocabulary may contain the special tokens as well.
        model = content['model']
        special = {token['content']: token['id'] for token in content.get('added_tokens', [])}
        tokens = {}
        for name, id in model['vocab'].items():
            if name in special:
                continue
            if any(char not in CHAR_TO_BYTE for char in name):
                raise ValueError(f'not byte-level: token {name!r}')
            tokens[id] = from_visible(name)
        normalizer = (content.get('normalizer') or {}).get('type')
        tokenizer = cls(tokens, special, find_pattern(content['pre_tokenizer']), normalizer,
                        model.get('ignore_merges', False))

        # 2. Compare the merges. tiktoken does not know them: it joins neighbours that together are
        # a token, the lowest id first. This gives the same ids if the file lists its merges in the
        # order of the new ids, and if these include all merges that the constructor has found.
        listed = {}
        for pair in model['merges']:
            left, right = pair.split(' ') if isinstance(pair, str) else pair
            ids = (model['vocab'][left], model['vocab'][right])
            listed[ids] = model['vocab'][left + right]
        new_ids = list(listed.values())
        if sorted(new_ids) != new_ids or not tokenizer.merges.keys() <= listed.keys():
            raise ValueError('merges that are not in the order of the ids, or not complete')
        return tokenizer

    def save(self, path):
        """Write a tokenizer.json. If that fails, the old file is still there."""
        save_content(self.to_dict(), path)

    @classmethod
    def load(cls, path):
        """from_dict for a file. ValueError that names the file if it is damaged."""
        with open(path, encoding='utf-8') as file:
            try:
                content = json.load(file)
            except (ValueError, RecursionError) as error:
                kind = type(error).__name__
                raise ValueError(f'{path}: damaged ({kind}): {error}') from error
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error

# ----- Tokenizers of other kinds


class HuggingFaceTokenizer(EndTokens):
    """What Tokenizer cannot represent, by Hugging Face's package, behind the same methods.

    These are byte-fallback BPE as in Llama 2, Mistral and Gemma, other split patterns and
    normalizers as in GPT-4o and DeepSeek, and models such as WordPiece.
    """
    pattern = None
    normalizer = None

    def __init__(self, content, reason='this tokenizer'):
        """content: that of a tokenizer.json. reason: what Tokenizer cannot represent, for errors.

        ValueError without the tokenizers package, and for dropout, which makes ids random.
        """
        if content['model'].get('dropout'):
            raise ValueError(f'dropout {content["model"]["dropout"]} makes ids random: set it to 0')
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f'{reason}: install the tokenizers package to use this file '
                             '(pip install tokenizers)') from None
        self._build = tokenizers.Tokenizer.from_str
        self._set_content(content)
        self.eos_ids = []  # where a generation ends; data/pretrained.py sets them
        self.name = 'huggingface'

    def _set_content(self, content):
        self._content = content
        added_tokens = content.get('added_tokens', [])
        self._all = self._open(added_tokens)
        self._plain = self._open([])   # for users' texts, where names of tokens are plain text
        self._after_marker = None      # for encode_after_special, built when it is first needed
        self.special = {token['content']: token['id'] for token in added_tokens}
        for name, id in self.special.items():
            if self._all.token_to_id(name) != id:
                raise ValueError(f'damaged: the added token {name!r} cannot have the id {id}')
        self._ids = set(self._all.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(self._ids) + 1

    def _open(self, added_tokens):
        """Hugging Face's tokenizer with these added tokens."""
        tokenizer = self._build(json.dumps(self._content | {'added_tokens': added_tokens}))
        # A file may ask for batches of one length. We always want the whole text and nothing else.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def missing_ids(self, n_rows):
        """The ids below n_rows, a model's vocabulary size, that this tokenizer does not have."""
        return [id for id in range(n_rows) if id not in self._ids]

    def add_special(self, names):
        """Give the next ids to the names that are not special tokens yet. Returns their number."""
        new_tokens = []
        for name in names:
            if name not in self.special:
                new_tokens.append(added_token(name, self.vocab_size + len(new_tokens)))
        if not new_tokens:
            return 0
        added_tokens = self._content.get('added_tokens', []) + new_tokens
        model = self._content['model']
        if model.get('type', 'BPE') == 'BPE':
            # An added token keeps its id only if it is in the vocabulary. Others are numbered by
            # Hugging Face, without gaps. BPE makes none of them from plain text: no merge does.
            ids = {token['content']: token['id'] for token in added_tokens}
            model = model | {'vocab': model['vocab'] | ids}
        self._set_content(self._content | {'added_tokens': added_tokens, 'model': model})
        return len(new_tokens)

    def encode(self, text, special=False):
        """A text as a list of ids. special=True: names of added tokens become these tokens."""
        text.encode()  # raises UnicodeEncodeError, a ValueError, at a lone surrogate
        tokenizer = self._all if special else self._plain
        return tokenizer.encode(text, add_special_tokens=False).ids

    def encode_after_special(self, text):
        """The ids of a text that follows a special token, as in a chat.

        Tokenizers that begin a text with a blank may leave it out there (Mistral). So the text is
        encoded after a token that exists only here, and that token is removed again.
        """
        text.encode()
        marker = '<|text follows|>'
        if marker in text:  # it must stay plain text
            return self.encode(text)
        if self._after_marker is None:
            self._after_marker = self._open([added_token(marker, self.vocab_size)])
        return self._after_marker.encode(marker + text, add_special_tokens=False).ids[1:]

    def decode(self, ids):
        """The text of the ids, with special tokens by name. ValueError for an unknown id."""
        for id in ids:
            if id not in self._ids:
                raise ValueError(
                    f'token id {id} is not in the vocabulary of {self.vocab_size}')
        return self._all.decode(list(ids), skip_special_tokens=False)

    def decode_bytes(self, ids):
        """The text of the ids in UTF-8."""
        return self.decode(ids).encode()

    def stream_decoder(self):
        """A function decode_next(ids, final=False) for ids that arrive in pieces.

        It returns the text that is complete so far. All ids are decoded again at each call, since
        the text of a token can depend on the tokens before it.
        """
        all_ids = []
        n_returned = 0  # characters

        def decode_next(ids, final=False):
            nonlocal n_returned
            all_ids.extend(ids)
            text = self.decode(all_ids)
            if not final:
                text = text.rstrip('\ufffd')  # perhaps the beginning of a character
            new_text = text[n_returned:]
            n_returned += len(new_text)
            return new_text
        return decode_next

    @property
    def fingerprint(self):
        """16 hexadecimal digits that change with anything that changes ids."""
        return fingerprint_of(self._content)

    def to_dict(self):
        """The content of the tokenizer.json: dicts, lists, strings and numbers."""
        return self._content

    def save(self, path):
        """Write a tokenizer.json. If that fails, the old file is still there."""
        save_content(self._content, path)

# ----- Chats


def check_message(index, message):
    """The role and the content of a chat message. ValueError if one is missing or is not text."""
    if not isinstance(message, dict):
        raise ValueError(f"message {index} must be a dict with 'role' and 'content'")
    for key in ('role', 'content'):
        if key not in message:
            raise ValueError(f'message {index}: missing key {key!r}')
        if not isinstance(message[key], str):
            raise ValueError(f'message {index}: {key!r} must be text')
        message[key].encode()  # raises UnicodeEncodeError, a ValueError, at a lone surrogate
    return message['role'], message['content']


def place_system(messages, chat):
    """The messages of a chat, with the system message in its place, as a list of (role, content,
    1 if the loss counts it, else 0).

    messages: [{'role': ..., 'content': ...}, ...]. ValueError for a message of another form.
    """
    # 1. Check all messages.
    turns = []
    for i, message in enumerate(messages):
        role, content = check_message(i, message)
        is_system = role == 'system' and i == 0
        if role not in ('user', 'assistant') and not is_system:
            raise ValueError(f'message {i}: role {role!r} must be user or assistant, '
                             'or system at the start')
        counted = int(role == 'assistant' and message.get('weight', 1) != 0)
        turns.append((role, content, counted))
    has_system = bool(turns) and turns[0][0] == 'system'
    users = [i for i, (role, _, _) in enumerate(turns) if role == 'user']
    if not turns or (has_system and not users):
        raise ValueError('a conversation needs a message of a user')

    # 2. Where the format has no turn for the system, its text goes before a user's.
    if has_system and chat.system != 'own turn':
        i = users[0] if chat.system == 'first user' else users[-1]
        turns[i] = ('user', turns[0][1] + '\n\n' + turns[i][1], 0)
        turns = turns[1:]
    return turns


def n_common(left, right):
    """How many ids at their beginning two lists have in common."""
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n


def render_chat(messages, tokenizer):
    """The ids of a chat, and a loss mask: for each id 1 if training computes a loss on it, else 0.

    messages: [{'role': 'user' or 'assistant', 'content': text}, ...]. A system message may come
    first. They are written in the tokenizer's own chat format, or in ours (see CHAT_FORMATS). In
    ours, the system's text and an empty line are put in front of the first user message.

    The loss counts the assistant's words and the token that ends them, unless the message has
    'weight': 0. If the last message is the
    user's, the ids end with what begins a response, so that a model continues with it. Every
    message is a turn of its own, also if the same role spoke before. The ids equal those of the
    published templates, except that names of special tokens in a message are plain text.

    >>> tokenizer = Tokenizer.byte()
    >>> question = {'role': 'user', 'content': 'Hi?'}
    >>> answer = {'role': 'assistant', 'content': 'Yes'}
    >>> ids, loss_mask = render_chat([question, answer], tokenizer)
    >>> for id, counted in zip(ids, loss_mask):
    ...     print(counted, tokenizer.decode([id]))
    0 <|user|>
    0 H
    0 i
    0 ?
    0 <|end|>
    0 <|assistant|>
    1 Y
    1 e
    1 s
    1 <|end|>

    ValueError for a message of another form, and if the tokenizer lacks the special tokens.
    """
    chat = chat_format(tokenizer)
    if chat is None:
        raise ValueError('the tokenizer has no special tokens for chats: call '
                         'tokenizer.add_special(bpe.SPECIAL_TOKENS)')

    def encode_part(part):
        if part in chat.markers:
            return [tokenizer.special[part]]
        return tokenizer.encode_after_special(part)

    # 1. The start of the chat. What the format itself writes is never counted in the loss.
    ids = []
    for part in chat.start:
        ids += encode_part(part)
    loss_mask = [0] * len(ids)

    turns = place_system(messages, chat)
    for role, content, counted in turns:
        # 2. What comes before the message.
        for part in chat.before[role]:
            ids += encode_part(part)
        loss_mask += [0] * (len(ids) - len(loss_mask))

        # 3. The message. Its first token can contain the end of the opening, for example two line
        # ends. The loss counts from the first token that the opening alone does not give.
        if role in chat.stripped:
            content = content.strip()
        if role == 'assistant':
            content = chat.response_prefix + content
        opening = chat.opening[role]
        words = tokenizer.encode_after_special(opening + content)
        n_opening = n_common(words, tokenizer.encode_after_special(opening))
        ids += words
        loss_mask += [0] * n_opening + [counted] * (len(words) - n_opening)

        # 4. What comes after it: the loss counts the first token, which ends a response.
        for part in chat.after[role]:
            ids += encode_part(part)
        loss_mask += [counted]
        loss_mask += [0] * (len(ids) - len(loss_mask))

    # 5. If it is the model's turn: what begins a response.
    if turns[-1][0] == 'user':
        for part in chat.before['assistant']:
            ids += encode_part(part)
        ids += tokenizer.encode_after_special(chat.opening['assistant'])
        loss_mask += [0] * (len(ids) - len(loss_mask))
    return ids, loss_mask


def chat_template(tokenizer):
    """The tokenizer's chat format as a Jinja template, for other programs. None without a format.

    With transformers' apply_chat_template(messages, add_generation_prompt=...), it gives the ids of
    render_chat. add_generation_prompt must be true if the last message is the user's.
    """
    chat = chat_format(tokenizer)
    if chat is None:
        return None
    # 1. The message that takes the system's text: ns.taker. -1 means none: the system has its own
    # turn.
    template = "{% set ns = namespace(system='', taker=-1) %}"
    if chat.system != 'own turn':
        template += "{% for message in messages %}{% if message['role'] == 'system' %}"
        template += "{% set ns.system = message['content'] + '\\n\\n' %}"
        template += "{% elif message['role'] == 'user'"
        if chat.system == 'first user':
            template += " and ns.taker < 0"
        template += " %}{% set ns.taker = loop.index0 %}{% endif %}{% endfor %}"

    # 2. The messages. repr() writes a Python text as a Jinja text.
    template += '{{ ' + repr(''.join(chat.start)) + ' }}{% for message in messages %}'
    for role in chat.before:
        content = "message['content']"
        if role == 'user' and chat.system != 'own turn':
            content = "(ns.system if loop.index0 == ns.taker else '') + " + content
        if role in chat.stripped:
            content = f'({content}) | trim'
        begin = ''.join(chat.before[role]) + chat.opening[role]
        if role == 'assistant':
            begin += chat.response_prefix
        end = ''.join(chat.after[role])
        template += "{% if message['role'] == " + repr(role) + ' %}'
        template += '{{ ' + f'{begin!r} + ({content}) + {end!r}' + ' }}{% endif %}'
    template += '{% endfor %}'

    # 3. What begins a response.
    prompt = ''.join(chat.before['assistant']) + chat.opening['assistant']
    template += '{% if add_generation_prompt %}{{ ' + repr(prompt) + ' }}{% endif %}'
    return template

# ----- A tokenizer by its name


def get_tokenizer(name, text=None, vocab_size=0):
    """The tokenizer that a --tokenizer setting asks for.

    name: 'byte'; 'bpe', trained on the text with vocab_size tokens (0 means 4096); 'gpt2'; or the
    path of a tokenizer.json or of a folder that contains one. ValueError for anything else.
    """
    if name == 'byte':
        tokenizer = Tokenizer.byte()
    elif name == 'bpe':
        vocab_size = vocab_size or 4096
        print(f'training a tokenizer of {vocab_size:,} tokens on {len(text or ""):,} characters',
              flush=True)
        tokenizer = Tokenizer.train(text, vocab_size)
    elif name == 'gpt2':
        tokenizer = Tokenizer.gpt2()
    else:
        path = os.path.join(name, 'tokenizer.json') if os.path.isdir(name) else name
        if not os.path.isfile(path):
            raise ValueError(f'tokenizer {name!r} is not byte, bpe, gpt2 '
                             'or the path of a tokenizer.json')
        tokenizer = Tokenizer.load(path)
    tokenizer.name = name
    return tokenizer

if __name__ == '__main__':
    # ----------------------------------------------------------------------------------------------
    input = ''              # the text file to train on, in UTF-8
    vocab_size = 4096       # 256 bytes, the merges, and 5 special tokens
    pattern = 'digits'      # how words are split: digits, gpt2, llama3 or qwen2
    out = 'tokenizer.json'  # the file to write
    verbose = False         # print each merge as it is learned
    # ----------------------------------------------------------------------------------------------
    configure(globals())
    if not input:
        raise ValueError('no text file to train on: give one by --input=FILE')

    # 1. Train.
    with open(input, encoding='utf-8', newline='') as file:
        text = file.read()
    started = time.perf_counter()
    tokenizer = Tokenizer.train(text, vocab_size, pattern, verbose)
    seconds = time.perf_counter() - started
    with errors_name_setting('out', out):
        tokenizer.save(out)

    # 2. Report how well it compresses the text, and what it learned first.
    n_bytes = len(text.encode())
    n_tokens = len(tokenizer.encode(text))
    n_shown = min(10, len(tokenizer.merges))
    first_tokens = [tokenizer.decode([256 + i]) for i in range(n_shown)]
    print(printable(f'{out}: {len(tokenizer.merges):,} merges from {n_bytes:,} bytes in '
                    f'{seconds:.1f} s, {n_bytes / n_tokens:.2f} bytes per token; first '
                    f'{first_tokens}'))
