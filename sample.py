"""
Let a trained model speak: continue a text, answer a file of prompts, or chat in the terminal.

    python sample.py                                          from the default run, out/base
    python sample.py --start="O Romeo" --stream=True          print as it goes
    python sample.py --start=FILE:prompt.txt --num_samples=5
    python sample.py --out_dir=out/sft --chat=True            a conversation; /reset forgets it, Ctrl-C stops an answer
    python sample.py --prompts=questions.jsonl --answers=answers.jsonl --best_of=4 --reward_model=out/reward
"""
import json, os
import torch
from bpe import printable, render_chat
from configurator import at_least_one, configure, rng, start_run
from data.answers import answer, best_of as best_of_n
from data.dataset import read_jsonl
from data.pretrained import load_model, load_reward_model

# -----------------------------------------------------------------------------
init_from = 'resume'      # 'resume' = the run in out_dir | a run's folder | a Hugging Face folder or name
out_dir = 'out/base'      # folder of the run
start = '\n'              # the text to continue; FILE:prompt.txt reads it from a file
num_samples = 3           # continuations, made in one batch
max_new_tokens = 300      # tokens of each, at most
temperature = 0.8         # below 1 safer, above 1 wilder; 0 = always the likeliest token
top_k = 0                 # only the k likeliest tokens; 0 = all
top_p = 1.0               # only the fewest tokens that together reach this probability
seed = 1337
stream = False            # print each sample as it is made
chat = False              # talk to the model
prompts = ''              # a JSON Lines file of prompts to answer
answers = 'answers.jsonl'  # where the answers go: each line of `prompts` with a "response"
best_of = 1               # of so many answers to each prompt, take the one that reward_model scores highest
reward_model = 'out/reward'  # folder of a run of reward.py
batch_size = 32           # prompts answered at a time
use_cache = True          # False = compute every token's keys and values again, to see what the cache saves
device = 'auto'           # 'auto' | 'cpu' | 'cuda' | 'cuda:1' | 'mps'
dtype = 'auto'            # 'auto' | 'float32' | 'bfloat16' | 'float16'
compile = False           # no effect; here so that nanoGPT's command lines run
# -----------------------------------------------------------------------------

def fit(ids, model, room):
    """Prompt ids that leave `room` tokens, or half of the context, to what follows: cut on the left where they do
    not, which is said once."""
    size = model.config.block_size
    most = max(size - room, (size + 1) // 2)
    if len(ids) > most and not hasattr(fit, 'said'):
        fit.said = print(f'[a prompt of {len(ids)} tokens is cut on the left to {most}; block_size is {size}]')
    return ids[-most:]

def spoken(tokens, tok, stop=()):
    """Yield printable text from token ids as they come, up to a stop token. A character whose bytes are split
    over tokens is held back until it is whole."""
    decode = tok.stream_decoder()
    for token in tokens:
        if token in stop:
            break
        yield printable(decode([token]))
    yield printable(decode([], final=True))

def answer_prompts(model, tok, conversations, judge, how):
    """The model's answers (strings) to lists of messages; with a judge, the best of best_of by its scores."""
    prompts = [fit(render_chat(c, tok)[0], model, max_new_tokens) for c in conversations for _ in range(best_of)]
    texts = [text for text, _ in answer(model, tok, prompts, batch_size=batch_size, **how)]
    return best_of_n(judge, tok, conversations, texts) if judge else texts

def converse(model, tok, stream):
    """A conversation in the terminal, until the end of input."""
    history, end = [], tok.special.get('<|end|>')
    print('Say something; /reset starts anew, Ctrl-C stops an answer, Ctrl-D leaves.')
    while True:
        try:
            said = input('> ').strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if said == '/reset':
            history = []
        if said in ('', '/reset'):
            continue
        history.append({'role': 'user', 'content': said})
        ids, answer = fit(render_chat(history, tok)[0], model, max_new_tokens), ''
        tokens = (t.item() for t in stream(torch.tensor([ids], device=run.device), stop=[end]))
        try:
            for text in spoken(tokens, tok, [end]):
                print(text, end='', flush=True)
                answer += text
        except KeyboardInterrupt:
            print(' [stopped]', end='')
        print()
        history.append({'role': 'assistant', 'content': answer})

if __name__ == "__main__":
    config = configure(globals())
    at_least_one(config, 'best_of', 'num_samples', 'batch_size', 'max_new_tokens')
    model, tok = load_model(out_dir if init_from == 'resume' else init_from, config)
    run = start_run(config, flops=0)
    model.to(run.device).eval()
    how = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, use_cache=use_cache,
               generator=rng(seed, device=run.device))
    with run.autocast:
        if chat:
            converse(model, tok, lambda idx, stop: model.stream(idx, stop=stop, **how))
        elif prompts:
            asked = read_jsonl(prompts, 'prompt')
            conversations = [a.get('messages') or [{'role': 'user', 'content': a['prompt']}] for a in asked]
            conversations = [c[:-1] if render_chat(c, tok)[1][-1] else c for c in conversations]  # not what was answered
            judge = load_reward_model(reward_model, tok).to(run.device) if best_of > 1 else None
            os.makedirs(os.path.dirname(answers) or '.', exist_ok=True)
            texts = answer_prompts(model, tok, conversations, judge, how)
            with open(answers, 'w', encoding='utf-8') as f:
                f.writelines(json.dumps({**a, 'response': t}, ensure_ascii=False) + '\n' for a, t in zip(asked, texts))
            print(f'{len(texts)} answers written to {answers}')
        else:
            if start.startswith('FILE:'):
                with open(start[5:], encoding='utf-8', newline='') as f:
                    start = f.read()
            stop = [tok.special[s] for s in ('<|endoftext|>',) if s in tok.special]
            ids = tok.encode(start) or stop
            if model.config.pos == 'learned':
                ids = fit(ids, model, 0)
            idx = torch.tensor([ids] * (1 if stream else num_samples), device=run.device)
            for _ in range(num_samples if stream else 0):
                print(printable(start), end='', flush=True)
                for text in spoken((t.item() for t in model.stream(idx, stop=stop, **how)), tok, stop):
                    print(text, end='', flush=True)
                print('\n' + '-' * 15)
            for row in [] if stream else model.generate(idx, stop=stop, **how).tolist():
                print(printable(start + tok.decode([t for t in row[len(ids):] if t != -1 and t not in stop])))
                print('-' * 15)
