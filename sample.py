"""
Use a trained model: continue a text, answer a file of prompts, or chat in the terminal.

    python sample.py                                     from the default run, out/base
    python sample.py --start="O Romeo" --stream=True     print tokens as they are sampled
    python sample.py --start=FILE:prompt.txt --num_samples=5
    python sample.py --out_dir=out/sft --chat=True       /reset forgets, Ctrl-C stops a response
    python sample.py --out_dir=out/sft --chat=True --system="Answer in one word."
    python sample.py --prompts=questions.jsonl --answers=answers.jsonl --best_of=4 \\
        --reward_model=out/reward

The first half of this file, responses to prompts in batches, serves the other stages too.
"""
import contextlib
import json
import math
import os
import select
import sys

# configurator comes first: it answers --help before torch is loaded
from configurator import (configure, errors_name_setting, generator_for, has_fast_bfloat16,
                          load_checkpoint, printable, start_run)
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from bpe import chat_format, render_chat
from data.examples import read_records, to_examples
from data.pretrained import is_run, load_model, load_reward_model, model_of_checkpoint

# -----------------------------------------------------------------------------
# the model
init_from = 'resume'      # 'resume' = the run in out_dir | a run's folder | a Hugging Face model
out_dir = 'out/base'      # folder of the run
# what to do
start = '\n'              # the text to continue; FILE:prompt.txt reads it from a file
num_samples = 3           # continuations, sampled in one batch
stream = False            # print each sample token by token
chat = False              # chat with the model
system = ''               # system prompt of the chat
prompts = ''              # a file of prompts to answer, JSON Lines
answers = 'answers.jsonl'  # the file to write: the lines of that file, each with a "response"; a
                           # file that exists is replaced only if it is named
best_of = 1               # keep the best of this many responses to each prompt, by their scores
reward_model = 'out/reward'  # folder of the reward model that scores them
missing_end_score = -3.0  # replaces the score of a response without an end token, as in ppo.py
# sampling
max_new_tokens = 0        # largest number of tokens per sample; 0 = 300, but responses of a chat or
                          # to prompts take no more than the context leaves
temperature = 0.8         # below 1 sharpens the distribution; 0 = always the most probable token
top_k = 0                 # only the k most probable tokens; 0 = all
top_p = 1.0               # only the fewest tokens whose probability reaches p
seed = 1337
batch_size = 32           # prompts per batch
use_cache = True          # False = recompute all keys and values for every token, to compare
# machine
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False           # has no effect; accepted so that nanoGPT's command lines run
# -----------------------------------------------------------------------------


# Prompts and responses, for this script and for the other stages


def prompt_ids(messages, tok):
    """The ids of a conversation that ends with the user, with what opens the response at their
    end."""
    return render_chat(messages, tok)[0]


def prompt_limit(tok, block_size, max_new_tokens):
    """
    The largest number of tokens that are kept of a prompt: block_size - max_new_tokens, but at
    least the markers of the chat format and half of block_size (a longer response then streams past
    block_size), and never more than block_size. ValueError if nothing of a question would be kept.
    """
    n_markers = len(prompt_ids([{'role': 'user', 'content': ''}], tok))
    limit = max(block_size - max_new_tokens, n_markers + block_size // 2)
    limit = min(limit, block_size)
    if limit <= n_markers:
        raise ValueError(f'block_size {block_size} leaves nothing of a question: the chat format '
                         f'alone takes {n_markers} tokens; use a model with a larger block_size')
    return limit


def truncate_prompts(prompts, limit):
    """Returns (prompts, n_truncated): lists of ids, truncated on the left to `limit` tokens."""
    n_truncated = sum(len(ids) > limit for ids in prompts)
    return [ids[-limit:] for ids in prompts], n_truncated


def encode_prompts(conversations, tok, block_size, max_new_tokens, verbose=True):
    """
    The ids of each conversation (a list of messages that ends with the user), truncated on the left
    to prompt_limit. Rollouts, evaluations and sampling all take their prompts from here. The number
    of truncated prompts is printed.
    """
    limit = prompt_limit(tok, block_size, max_new_tokens)
    prompts = [prompt_ids(messages, tok) for messages in conversations]
    prompts, n_truncated = truncate_prompts(prompts, limit)
    if n_truncated and verbose:
        print(f'truncated {n_truncated} of {len(prompts)} prompts to {limit} tokens')
    return prompts


def render_response(messages, response, tok, block_size):
    """(ids, mask) of a conversation with a response, as a reward model reads it: mask 1 on the
    response and its end token; truncated on the left, because responses differ at their end."""
    ids, mask = render_chat([*messages, {'role': 'assistant', 'content': response}], tok)
    return torch.tensor(ids[-block_size:]), torch.tensor(mask[-block_size:])


def pad_left(rows, device='cpu'):
    """Rows of ids, lists or tensors, as one tensor (B, T), with -1 on the left of shorter ones, as
    GPT.generate expects."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    padded = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side='left')
    return padded.to(device)


def answer(model, tok, prompts, max_new_tokens, batch_size=250, **sampling):
    """
    Responses to prompts (lists of ids): [(text, ended)], ended telling whether it has an end token.
    max_new_tokens: 0 = what the context leaves, see response_room. `sampling`: temperature, top_k,
    top_p, use_cache and generator, as GPT.generate takes them.
    """
    suppress = tok.missing_ids(model.config.vocab_size)
    responses = [None] * len(prompts)
    # Prompts of similar length share a batch, so that little is padded.
    lengths = torch.tensor([len(ids) for ids in prompts])
    for chunk in lengths.argsort(stable=True).split(batch_size):
        numbers = chunk.tolist()
        idx = pad_left([prompts[i] for i in numbers], model.wte.weight.device)
        with fast_decoding(model, len(numbers)):
            n_new = response_room(idx.size(1), model.config.block_size, max_new_tokens)
            out = model.generate(idx, n_new, stop=tok.eos_ids, suppress=suppress, **sampling)
        for i, ids in zip(numbers, out[:, idx.size(1):].tolist()):
            new = [token for token in ids if token != -1]
            ended = new[-1] in tok.eos_ids
            responses[i] = tok.decode(new[:-1] if ended else new), ended
    return responses


@torch.no_grad()
def best_of_n(model, tok, conversations, responses, missing_end_score):
    """
    The best of n responses to each conversation by the scores of a reward model (best-of-n
    sampling, arXiv 2009.01325). responses: [(text, ended)], the n of a conversation side by side. A
    response without an end token has the score missing_end_score.
    """
    n = len(responses) // len(conversations)
    device = next(model.parameters()).device
    block_size = model.trunk.config.block_size
    best = []
    for i, messages in enumerate(conversations):
        candidates = responses[i * n:(i + 1) * n]
        all_ids, all_masks = [], []
        for text, _ in candidates:
            ids, mask = render_response(messages, text, tok, block_size)
            all_ids.append(ids)
            all_masks.append(mask)
        # The score is read where the mask is 1; here padding has the mask -1, which is not read.
        scores = model(pad_left(all_ids, device), pad_left(all_masks, device))
        ended = torch.tensor([ended for _, ended in candidates], device=device)
        scores = torch.where(ended, scores, missing_end_score)
        best.append(candidates[scores.argmax()][0])
    return best


def exact_match(responses, gold):
    """The share of texts that equal the gold responses; None if one of these is None, unknown."""
    if None in gold:
        return None
    return sum(text == correct for text, correct in zip(responses, gold)) / len(gold)


# -----------------------------------------------------------------------------
# Faster decoding on a CPU


@contextlib.contextmanager
def fast_decoding(model, n_rows):
    """
    A context in which a CPU generates faster, n_rows responses at a time; on other devices it does
    nothing. Outside this context the same code computes the same logits, up to rounding.

    It replaces the forward of large linear layers by a function of fast_linear, which may hold a
    copy of the weights. So inside the context the weights must not change, and no gradients are
    computed.
    """
    if model.wte.weight.device.type != 'cpu':
        yield
        return
    dtype = model.wte.weight.dtype
    if torch.is_autocast_enabled('cpu'):
        dtype = torch.get_autocast_dtype('cpu')
    replaced = []
    for layer in model.modules():
        # 'forward' is in vars(layer) if it is replaced already: one context inside another.
        if isinstance(layer, torch.nn.Linear) and 'forward' not in vars(layer):
            forward = fast_linear(layer, n_rows, dtype)
            if forward is not None:
                layer.forward = forward
                replaced.append(layer)
    try:
        # The fast layers multiply in dtype; everything else is faster without autocast.
        with torch.autocast('cpu', enabled=False):
            yield
    finally:
        for layer in replaced:
            del layer.forward


def fast_linear(layer, n_rows, dtype):
    """A function that computes what a linear layer does, for about n_rows tokens; None if there is
    no faster way, as for small layers."""
    weight = layer.weight.detach()
    bias = None if layer.bias is None else layer.bias.detach()
    is_small = n_rows * weight.numel() < 2 ** 18  # found by measurement
    if is_small or dtype not in (torch.float32, torch.bfloat16):
        return None

    # 1. oneDNN's blocked layout of the weights, which otherwise is made anew at each call. It helps
    # with more than two rows, and always where the CPU multiplies in bfloat16. Where it only
    # emulates bfloat16, the copy is in float32, which is faster.
    multiplies_bfloat16 = has_fast_bfloat16('cpu')
    use_bfloat16 = multiplies_bfloat16 and dtype == torch.bfloat16
    if torch.backends.mkldnn.is_available() and (n_rows > 2 or use_bfloat16):
        kept_dtype = dtype if multiplies_bfloat16 else torch.float32
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight.to(kept_dtype))
        if bias is not None:
            bias = bias.to(kept_dtype)

        def linear_blocked(x):
            y = torch.ops.mkldnn._linear_pointwise(x.to(kept_dtype), blocked, bias, 'none', [], '')
            return y.to(x.dtype)
        return linear_blocked

    # 2. A single row: PyTorch multiplies a matrix by a vector on one core; here all cores share the
    # rows of the matrix.
    n_parts = math.gcd(torch.get_num_threads(), layer.out_features)
    if n_parts == 1 or weight.dtype != torch.float32:
        return None
    parts = weight.view(n_parts, -1, layer.in_features)

    def linear_on_all_cores(x):
        if x.numel() != layer.in_features:  # a prompt of several tokens
            return F.linear(x, weight, bias)
        column = x.reshape(1, -1, 1).expand(n_parts, -1, -1)          # (parts, in, 1)
        y = torch.bmm(parts, column).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return linear_on_all_cores


# -----------------------------------------------------------------------------
# Text in the terminal

DEFAULT_NEW_TOKENS = 300


def response_room(n_prompt, block_size, max_new_tokens):
    """The largest number of tokens of a response to n_prompt tokens: max_new_tokens or, if that is
    0, what the context leaves, at most DEFAULT_NEW_TOKENS."""
    room = min(DEFAULT_NEW_TOKENS, block_size - n_prompt)
    return max_new_tokens or max(1, room)


def printed_text(tokens, tok, stop=()):
    """Yield printable text from token ids as they come, up to a stop token. A character whose bytes
    are split over several tokens is held back until it is complete."""
    decode = tok.stream_decoder()
    for token in tokens:
        if token in stop:
            break
        yield printable(decode([token]))
    yield printable(decode([], final=True))


def print_stream(model, tok, ids, stop, sampling):
    """Sample a continuation of ids and print it token by token; Ctrl-C ends it. Returns the
    text."""
    text = ''
    idx = torch.tensor([ids], device=model.wte.weight.device)
    suppress = tok.missing_ids(model.config.vocab_size)
    with fast_decoding(model, 1):
        tokens = (token.item() for token in model.stream(idx, stop=stop, suppress=suppress,
                                                         **sampling))
        try:
            for piece in printed_text(tokens, tok, stop):
                print(piece, end='', flush=True)
                text += piece
        except KeyboardInterrupt:
            print(' [stopped]', end='')
    return text


# A conversation in the terminal


def more_input_waits(seconds=0.05):
    """Whether the terminal has more input than the line that was just read: the rest of a paste."""
    if not sys.stdin.isatty():
        return False
    try:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
    except OSError:  # Windows, where select does not work on a terminal
        return False
    return len(ready) > 0


def read_message():
    """A message that is typed: a line, or several lines that were pasted together."""
    lines = [input('> ')]
    while more_input_waits():
        lines.append(input())
    return '\n'.join(lines).strip()


def recent_turns(messages, tok, limit):
    """
    The messages of a conversation without its oldest turns (a question and its response), as many
    as needed to render it in `limit` tokens. The system message and the last question stay.
    """
    n_system = 1 if messages[0]['role'] == 'system' else 0
    system = messages[:n_system]
    turns = messages[n_system:]
    while len(turns) > 1 and len(prompt_ids(system + turns, tok)) > limit:
        turns = turns[2:]
    return system + turns


def chat_loop(model, tok, system, max_new_tokens, sampling):
    """A conversation in the terminal, until the end of the input. system: text, '' = none."""
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # once it is imported, input() has line editing and a history
    block_size = model.config.block_size
    limit = prompt_limit(tok, block_size, max_new_tokens or DEFAULT_NEW_TOKENS)
    start = [{'role': 'system', 'content': system}] if system else []
    history = list(start)
    warned = False
    print('Type a message. /reset starts anew, Ctrl-C stops a response, Ctrl-D quits.')
    while True:
        # 1. the message
        try:
            message = read_message()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if message == '/reset':
            history = list(start)
        if message in ('', '/reset'):
            continue
        history.append({'role': 'user', 'content': message})

        # 2. what the model sees of the conversation
        n_tokens = len(prompt_ids(history, tok))
        history = recent_turns(history, tok, limit)
        ids = prompt_ids(history, tok)[-limit:]
        if len(ids) < n_tokens and not warned:
            print(f'[the conversation has {n_tokens} tokens; the model sees the last {len(ids)}, '
                  f'because block_size is {block_size}]')
            warned = True

        # 3. the response
        n_new = response_room(len(ids), block_size, max_new_tokens)
        response = print_stream(model, tok, ids, tok.eos_ids,
                                dict(sampling, max_new_tokens=n_new))
        print()
        history.append({'role': 'assistant', 'content': response})


def answer_file(model, tok, path, out, scorer, n, missing_end_score, batch_size, max_new_tokens,
                sampling):
    """Answer the prompts of a file and write each with its "response" to `out`. With a scorer, a
    reward model, the response is the best of n."""
    with open(path, 'rb') as f:
        records = read_records(f.read(), path)
    conversations = [row['messages'] for row in to_examples(records, path, 'prompt')]
    block_size = model.config.block_size
    encoded = encode_prompts(conversations, tok, block_size, max_new_tokens or DEFAULT_NEW_TOKENS)
    with errors_name_setting('answers', out), open(out, 'a', encoding='utf-8'):
        pass  # an output that cannot be written is reported before the work
    repeated = [ids for ids in encoded for _ in range(n)]
    print(f'answering {len(repeated):,} prompts', flush=True)
    responses = answer(model, tok, repeated, max_new_tokens, batch_size, **sampling)
    if scorer is None:
        texts = [text for text, _ in responses]
    else:
        texts = best_of_n(scorer, tok, conversations, responses, missing_end_score)
    with open(out, 'w', encoding='utf-8') as f:
        for (_, record, _), text in zip(records, texts):
            if isinstance(record, list):  # a bare list of messages
                record = {'messages': record}
            f.write(json.dumps({**record, 'response': text}, ensure_ascii=False) + '\n')
    print(printable(f'{len(texts)} responses written to {out}'))


if __name__ == '__main__':
    # 1. settings, model, machine
    config, overrides = configure(globals())
    if prompts and 'answers' not in overrides and os.path.exists(answers):
        raise ValueError(f'{answers} exists; name the file to write: --answers=FILE')
    source = out_dir if init_from == 'resume' else init_from
    stage = None  # the one that trained a model of ours
    if is_run(source, out_dir):
        checkpoint = load_checkpoint(source)
        stage = checkpoint.get('stage')
        model, tok = model_of_checkpoint(checkpoint, source, config)
    else:
        model, tok = load_model(source, config)
    if (chat or prompts) and chat_format(tok) is None:
        raise ValueError(f'{source}: the tokenizer has no special tokens for chats; teach the '
                         f'model to respond: python sft.py --init_from={source}')
    run = start_run(dict(config, compile=False), flops=0)
    model.to(run.device).eval()
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, use_cache=use_cache,
                    generator=generator_for(seed, 'sample', device=run.device))
    if (chat or prompts) and stage == 'train':
        print(printable(
            f'note: {source} was trained on texts, not on chats, so it continues texts rather '
            f'than responds; python sft.py --init_from={source} teaches it to respond'))

    with run.autocast:
        # 2. a conversation
        if chat:
            chat_loop(model, tok, system, max_new_tokens, sampling)

        # 3. a file of prompts
        elif prompts:
            scorer = None
            if best_of > 1:
                scorer = load_reward_model(reward_model, tok).to(run.device)
            with errors_name_setting('answers', answers):
                os.makedirs(os.path.dirname(answers) or '.', exist_ok=True)
            answer_file(model, tok, prompts, answers, scorer, best_of, missing_end_score,
                        batch_size, max_new_tokens, sampling)

        # 4. continuations of a text
        else:
            if start.startswith('FILE:'):
                with open(start.removeprefix('FILE:'), encoding='utf-8', newline='') as f:
                    start = f.read()
            stop = tok.eos_ids
            sampling['max_new_tokens'] = max_new_tokens or DEFAULT_NEW_TOKENS
            # As in nanoGPT, <|endoftext|> in the start is the special token.
            ids = tok.encode(start, special=True)
            if not ids:  # an empty start is the beginning of a document, which follows another
                ids = stop[:1] if tok.end_of_text is None else [tok.end_of_text]
            if model.config.pos == 'learned' and len(ids) > model.config.block_size:
                print(f'truncated the start from {len(ids)} to {model.config.block_size} tokens')
                ids = ids[-model.config.block_size:]
            if stream:
                for _ in range(num_samples):
                    print(printable(start), end='', flush=True)
                    print_stream(model, tok, ids, stop, sampling)
                    print('\n' + '-' * 15)
            else:
                idx = torch.tensor([ids] * num_samples, device=run.device)
                with fast_decoding(model, num_samples):
                    out = model.generate(idx, stop=stop, **sampling,
                                         suppress=tok.missing_ids(model.config.vocab_size))
                for row in out[:, len(ids):].tolist():
                    new = [token for token in row if token != -1 and token not in stop]
                    print(printable(start + tok.decode(new)))
                    print('-' * 15)
