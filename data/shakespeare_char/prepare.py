"""
Tiny Shakespeare, 1,115,394 characters from several plays: the dataset of nanoGPT's first example,
split as in nanoGPT: the first 90% for training, the rest held out.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=FILE    # without a network

nanoGPT numbers the 65 characters that occur. Here a token is a byte. For this text that is the same
thing, because all of it is ASCII; and any other text can be encoded too.
"""
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from configurator import configure
from data.dataset import download, write_dataset

# -----------------------------------------------------------------------------
input = ''          # a local copy of the text; '' = download it
tokenizer = 'byte'  # 'byte', 'bpe' (trained on the training part), 'gpt2', or a tokenizer.json
vocab_size = 0      # of a trained tokenizer; 0 = its default
out = ''            # folder to write to; '' = the folder of this script
# -----------------------------------------------------------------------------

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

if __name__ == '__main__':
    settings, _ = configure(globals())
    if input:
        data = Path(input).read_bytes()
    else:
        data = download(URL, SHA256)
    text = data.decode('utf-8')
    n_train = int(len(text) * 0.9)
    train = text[:n_train]
    val = text[n_train:]
    tok = get_tokenizer(tokenizer, train, vocab_size)
    write_dataset(out or here, tok, [train], [val], settings=settings)

# It prints:
#   data/shakespeare_char train_tokens 1,003,855 train_bytes 1,003,854 val_tokens 111,541 ...
