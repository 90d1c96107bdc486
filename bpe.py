"""
Text to token ids and back: byte-level byte-pair encoding (BPE, arXiv 1508.07909), chats and examples.

Start from the 256 bytes, which can write any text; again and again make the most frequent pair of
neighbours a new token. With none made it is the byte tokenizer. Unlike the paper, and like GPT-2, a regular
expression cuts the words, and they have no end sign. To train one on a text file:

    python bpe.py --input=plays.txt --vocab_size=4096 --out=tokenizer.json
"""
import codecs, hashlib, heapq, json, os, time, unicodedata
from collections import Counter, defaultdict
import regex, tiktoken
from configurator import configure, replacing

SPECIAL = ('<|endoftext|>', '<|user|>', '<|assistant|>', '<|end|>', '<|pad|>')
NAMED = ('byte', 'bpe', 'gpt2')  # what get_tokenizer knows by name; all else is a path

# How a text is cut into words; no merge crosses a cut. Ours is 'digits', as in SmolLM: GPT-2's, but every
# digit is its own word, so that a number is spelt one way wherever it stands, and sums can be learned.
PATTERNS = {
    'digits': r" ?\p{L}+|\p{N}|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    'gpt2': r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    'llama3': r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
PATTERNS['qwen2'] = PATTERNS['llama3'].replace('{1,3}', '')

# A tokenizer.json shows a byte as one visible character: its own, or for the others U+0100, U+0101, ...
visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
SHOWN = [chr(byte if byte in visible else 256 + len({*range(byte)} - visible)) for byte in range(256)]
BYTE_OF = {char: byte for byte, char in enumerate(SHOWN)}

# Here a word is a str with one character for each token, chr(id): so str.replace merges a pair, from the
# left and at C's speed, characters compare as their ids do, and zip(word, word[1:]) gives its pairs.

def apply_merges(word, merges):
    """Merge, the lowest new id first, until no pair of neighbours is in merges = {(left, right): new}."""
    while len(word) > 1:
        pair = min(zip(word, word[1:]), key=lambda pair: merges.get(pair, chr(0x10ffff)))
        if pair not in merges:
            break
        word = word.replace(''.join(pair), merges[pair])
    return word

def train_bpe(text, n_tokens, pattern):
    """A vocabulary of n_tokens (fewer if the text has no more pairs), as a list of bytes: the 256 single ones,
    then what each merge made: of the most frequent pair, of equally frequent ones that of smaller ids."""
    text.encode()  # a lone surrogate has no bytes: UnicodeEncodeError, a ValueError, names its position
    word_counts = Counter(regex.findall(pattern, text))                # each different word is merged once
    words = [word.encode().decode('latin-1') for word in word_counts]  # one character a byte
    counts = list(word_counts.values())
    pair_counts, where = defaultdict(int), defaultdict(set)  # where: pair -> indices of words that hold it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            where[pair].add(i)
    heap = sorted((-count, pair) for pair, count in pair_counts.items())  # a sorted list is a heap
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < n_tokens and heap and heap[0][0] < 0:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair]:  # stale, and too high: a known pair's count only falls. Put it back
            heapq.heappush(heap, (-pair_counts[pair], pair))
            continue
        first, last = pair
        new, made = chr(len(tokens)), defaultdict(int)
        tokens.append(tokens[ord(first)] + tokens[ord(last)])
        for i in where.pop(pair):
            words[i] = words[i].replace(first + last, new)
            for left, right in zip(words[i], words[i][1:]):
                if left == new or right == new:  # this pair stands where an older one stood
                    made[left, right] += counts[i]
                    where[left, right].add(i)
                    old = last if left == new else left, first if right == new else right
                    pair_counts[old] -= counts[i]
        pair_counts.update(made)
        for pair, count in made.items():
            heapq.heappush(heap, (-count, pair))
    return tokens

def forms(pattern):
    """How a tokenizer.json may write a pattern: as we do, or in GPT-2's and SmolLM's own way."""
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': True}
    split = {'type': 'Split', 'behavior': 'Isolated', 'invert': False, 'pattern': {'Regex': PATTERNS[pattern]}}
    own = {'gpt2': [[level]], 'digits': [[{'type': 'Digits', 'individual_digits': True}, level]]}
    return [[split, level | {'use_regex': False}], *own.get(pattern, [])]

class Tokenizer:
    """Byte-level BPE. Ours number the 256 bytes by value, then what merges make, then the special tokens.

    Special tokens, and all added tokens of a loaded file, are encoded only with special=True: in a user's
    text the same characters are just text. No start token is put in front. So ids equal those of Hugging
    Face's tokenizers with add_special_tokens=False, on any text that spells no added token."""
    def __init__(self, tokens, special=None, pattern='digits', normalizer=None, whole_words=False):
        self.tokens = dict(tokens)      # {id: bytes}, the special ones apart
        self.special = special or {}    # {name: id}
        self.pattern = pattern          # a key of PATTERNS
        self.normalizer = normalizer    # None, or Qwen's 'NFC': an e and its accent become one é
        self.whole_words = whole_words  # Llama 3's ignore_merges: a word that is a token is that token
        self.char_of = {token[0]: chr(id) for id, token in self.tokens.items() if len(token) == 1}
        if len(self.char_of) < 256:
            raise ValueError(f'not byte-level: {256 - len(self.char_of)} of the 256 bytes have no token')
        self.merges = {}                # {(chr(left), chr(right)): chr(new)}: how older tokens make each
        for id, token in sorted(self.tokens.items()):
            parts = self._merged(token)
            if len(parts) == 2:
                self.merges[tuple(parts)] = chr(id)
            elif len(token) != 1 and not (whole_words and len(parts) > 2):
                raise ValueError(f'token {id}, {token}, is not made of two tokens with smaller ids')
        self.add_special(SPECIAL if special is None else ())
        self.name = 'bpe' if self.merges else 'byte'

    def add_special(self, names):
        """Give the next ids to those of the names that are not special tokens yet; return their number."""
        new = [name for name in names if name not in self.special]
        first = max(*self.tokens, *self.special.values()) + 1
        self.special |= {name: first + i for i, name in enumerate(new)}
        self.bytes_of = self.tokens | {id: name.encode() for name, id in self.special.items()}
        self.vocab_size, self._encoder = max(self.bytes_of) + 1, None
        return len(new)

    @classmethod
    def byte(cls):
        return cls({byte: bytes([byte]) for byte in range(256)})

    @classmethod
    def train(cls, text, vocab_size, pattern='digits'):
        """vocab_size counts all: 256 bytes, what merges of the text make, and 5 special tokens."""
        if not text or pattern not in PATTERNS:
            raise ValueError(f'{pattern=} is not one of {list(PATTERNS)}' if text else 'no text to train on')
        tokens = train_bpe(text, vocab_size - len(SPECIAL), PATTERNS[pattern])
        if vocab_size != len(tokens) + len(SPECIAL):
            raise ValueError(f'vocab_size {vocab_size} does not fit 256 bytes, {len(SPECIAL)} special tokens '
                             f'and {len(text):,} characters of text: ask for {len(tokens) + len(SPECIAL)}')
        return cls(enumerate(tokens), pattern=pattern)

    @classmethod
    def gpt2(cls):
        try:
            gpt2 = tiktoken.get_encoding('gpt2')
        except (OSError, ValueError) as error:
            raise ValueError("cannot get GPT-2's vocabulary from openaipublic.blob.core.windows.net "
                             f'({type(error).__name__}): give the path of its tokenizer.json') from None
        return cls({id: token for token, id in gpt2._mergeable_ranks.items()}, dict(gpt2._special_tokens), 'gpt2')

    def _merged(self, word):
        return apply_merges(''.join(self.char_of[byte] for byte in word), self.merges)

    def _normalized(self, text):
        text.encode()  # no lone surrogates
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    def encode_plain(self, text):
        """encode(text) in plain Python, to show what it does; a test holds them equal."""
        ids, known = [], {token: id for id, token in self.tokens.items()} if self.whole_words else {}
        for word in regex.findall(PATTERNS[self.pattern], self._normalized(text)):
            word = word.encode()
            ids += [known[word]] if word in known else map(ord, self._merged(word))
        return ids

    def encode(self, text, special=False):
        text = self._normalized(text)
        if self._encoder is None:
            self._encoder = tiktoken.Encoding('nanollm', pat_str=PATTERNS[self.pattern], special_tokens=self.special,
                                              mergeable_ranks={token: id for id, token in self.tokens.items()})
        return self._encoder.encode(text, allowed_special='all') if special else self._encoder.encode_ordinary(text)

    def decode_bytes(self, ids):
        try:
            return b''.join([self.bytes_of[id] for id in ids])
        except KeyError as error:
            raise ValueError(f'token id {error} is not in the vocabulary of {self.vocab_size}') from None

    def decode(self, ids):
        """Special tokens come out by their names, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def stream_decoder(self):
        """A function from the next ids to the text that is complete by now; final=True gives the rest."""
        utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')
        return lambda ids, final=False: utf8.decode(self.decode_bytes(ids), final)

    @property
    def fingerprint(self):
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self):
        """The content of a Hugging Face tokenizer.json: plain dicts, lists and strings."""
        show = {id: ''.join(SHOWN[byte] for byte in token) for id, token in self.tokens.items()}
        flags = {'special': True, **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)}
        stages, special = forms(self.pattern)[0], sorted(self.special.items(), key=lambda item: item[1])
        return {'version': '1.0', 'normalizer': self.normalizer and {'type': self.normalizer},
                'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': stages}, 'decoder': stages[1],
                'added_tokens': [{'id': id, 'content': name, **flags} for name, id in special],
                'model': {'type': 'BPE', 'ignore_merges': self.whole_words,
                          'vocab': {name: id for id, name in show.items()} | self.special,
                          'merges': [f'{show[ord(left)]} {show[ord(right)]}' for left, right in self.merges]}}

    @classmethod
    def from_dict(cls, d):
        """The opposite. What would change ids and is not known here is refused by name."""
        model, special = d['model'], {token['content']: token['id'] for token in d['added_tokens']}
        normalizer, cut, decoder = (d.get(key) or {} for key in ('normalizer', 'pre_tokenizer', 'decoder'))
        plain = lambda form: [{'use_regex': True} | stage | {'trim_offsets': None} for stage in form]
        pattern = next((name for name in PATTERNS for form in forms(name)
                        if plain(form) == plain(cut.get('pretokenizers', [cut]))), None)
        fits = {key: value in (None, '', False, 'BPE') for key, value in model.items()}
        fits |= dict.fromkeys(('vocab', 'merges', 'ignore_merges', 'unk_token', 'fuse_unk'), True)
        fits |= {'normalizer': normalizer in ({}, {'type': 'NFC'}), 'pre_tokenizer': pattern,
                 'decoder': decoder.get('type') == 'ByteLevel'}
        foreign = [f'{key} {json.dumps((model | d).get(key))}' for key in fits if not fits[key]]
        foreign += [f'{flag} of {token["content"]}' for token in d['added_tokens']
                    for flag in ('lstrip', 'rstrip', 'single_word') if token.get(flag)]
        if foreign:
            raise ValueError(f'only byte-level BPE is read, not {", ".join(foreign)}')
        tokens = {id: bytes(BYTE_OF[char] for char in name)
                  for name, id in model['vocab'].items() if name not in special}
        self = cls(tokens, special, pattern, normalizer.get('type'), model.get('ignore_merges', False))

        # tiktoken knows no merges: it joins neighbours that together are a token, the lowest id first. If the
        # file's merges stand in the order of ids and hold all that __init__ found, that is the same.
        char, listed = {name: chr(id) for name, id in model['vocab'].items()}, {}
        for pair in model['merges']:
            left, right = pair.split(' ') if isinstance(pair, str) else pair
            listed[char[left], char[right]] = char[left + right]
        if sorted(listed.values()) != list(listed.values()) or self.merges.keys() - listed:
            raise ValueError('its merges are not those by which its tokens can be made, in the order of ids')
        return self

    def save(self, path):
        with replacing(path) as file:
            file.write(json.dumps(self.to_dict(), ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, path):
        with open(path, encoding='utf-8') as file:
            try:
                return cls.from_dict(json.load(file))
            except Exception as error:
                damage = '' if type(error) is ValueError else f'damaged ({type(error).__name__}): '
                raise ValueError(f'{path}: {damage}{error}') from error

def printable(text):
    """The text without the control characters by which a model could drive a terminal."""
    return ''.join(char for char in text if char in '\n\t' or unicodedata.category(char) != 'Cc')

def check_texts(row, *keys):
    for key in keys:
        if not isinstance(row.get(key), str):
            raise ValueError(f'{key!r} must be text' if key in row else f'missing key {key!r}')
        row[key].encode()  # no lone surrogates
    return [row[key] for key in keys]

def render_chat(messages, tokenizer):
    """The ids of [{'role', 'content'}, ...] as <|user|>...<|end|><|assistant|>...<|end|>, and for each id 1 if
    the loss counts it: the assistant's words and its <|end|>. If the user speaks last, <|assistant|> follows,
    to be continued. A system message may come first: its text and an empty line open the first user's."""
    if not {'<|user|>', '<|assistant|>', '<|end|>'} <= tokenizer.special.keys():
        raise ValueError('the tokenizer has no special tokens for chats: call its add_special(bpe.SPECIAL)')
    begin = {role: tokenizer.special[f'<|{role}|>'] for role in ('user', 'assistant')}
    ids, loss_mask, system, role = [], [], '', ''
    for i, message in enumerate(messages):
        role, content = check_texts(message, 'role', 'content')
        if role == 'system' and i == 0:
            system = content + '\n\n'
            continue
        if role not in begin:
            raise ValueError(f'message {i}: role {role!r} must be user or assistant, or system at the start')
        if role == 'user':
            content, system = system + content, ''
        turn = tokenizer.encode(content) + [tokenizer.special['<|end|>']]
        ids += [begin[role], *turn]
        loss_mask += [0] + [int(role == 'assistant')] * len(turn)
    if not ids or system:
        raise ValueError('a conversation needs a message of a user')
    return (ids + [begin['assistant']], loss_mask + [0]) if role == 'user' else (ids, loss_mask)

def get_tokenizer(name, text=None, vocab_size=0):
    """'byte'; 'bpe', trained on the text (vocab_size 0: 4096); 'gpt2'; or a tokenizer.json or its folder."""
    path = os.path.join(name, 'tokenizer.json') if os.path.isdir(name) else name
    if name not in NAMED and not os.path.isfile(path):
        raise ValueError(f'tokenizer {name!r} is not byte, bpe, gpt2 or the path of a tokenizer.json')
    tokenizer = (Tokenizer.byte() if name == 'byte' else Tokenizer.gpt2() if name == 'gpt2' else
                 Tokenizer.train(text, vocab_size or 4096) if name == 'bpe' else Tokenizer.load(path))
    tokenizer.name = name
    return tokenizer

if __name__ == '__main__':
    # --------------------------------------------------------------------------------
    input = ''              # the text file to train on, UTF-8
    vocab_size = 4096       # 256 bytes, the merges, and 5 special tokens
    pattern = 'digits'      # how words are cut: digits, gpt2, llama3 or qwen2
    out = 'tokenizer.json'  # the file to write
    # --------------------------------------------------------------------------------
    configure(globals())
    text = open(input, encoding='utf-8', newline='').read()
    started = time.time()
    tokenizer = Tokenizer.train(text, vocab_size, pattern)
    seconds, n_tokens, n_bytes = time.time() - started, len(tokenizer.encode(text)), len(text.encode())
    tokenizer.save(out)
    print(f'{out}: {len(tokenizer.merges):,} merges from {n_bytes:,} bytes in {seconds:.1f} s, '
          f'{n_bytes / n_tokens:.2f} bytes a token; first', [tokenizer.decode([256 + i]) for i in range(min(10, len(tokenizer.merges)))])
