"""
Tiny Shakespeare, 1,115,394 characters from several plays: the dataset of nanoGPT's first example,
split as it is there, the first 90% to train on and the rest held out.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=FILE    # with no network

nanoGPT numbers the 65 characters that occur. Here a token is a byte, which for this text is the
same thing (all of it is ASCII), and any other text can be encoded too.
"""
import sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from bpe import get_tokenizer
from data.dataset import download, write_dataset
from configurator import configure

# -----------------------------------------------------------------------------
input = ''          # a local copy of the text; '' = download it
tokenizer = 'byte'  # 'byte', 'bpe' (trained on the training part), 'gpt2', or the path of a tokenizer.json
vocab_size = 0      # of a trained tokenizer; 0 = its default
out = ''            # folder to write to; '' = beside this file
# -----------------------------------------------------------------------------

url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
sha256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

if __name__ == '__main__':
    settings = configure(globals())
    text = (Path(input).read_bytes() if input else download(url, sha256)).decode('utf-8')
    cut = int(len(text) * 0.9)
    train, val = text[:cut], text[cut:]
    write_dataset(out or here, get_tokenizer(tokenizer, train, vocab_size), [train], [val], settings=settings)

# data/shakespeare_char: 1,003,855 tokens for training, 111,541 for validation, vocabulary 261, 1.00 bytes a token
