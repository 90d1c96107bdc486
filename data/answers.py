"""
Answers to prompts, in batches of any lengths, and the measures of them: how near they are to gold ones, how well
scores tell right from wrong. Each has one right value, so they stand here, for all scripts.
"""
import math
from collections import Counter
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from bpe import render_chat

def pad_left(rows, device='cpu'):
    """Lists of ids as one tensor (B, T), -1 on the left of the shorter ones, as GPT.generate takes them."""
    rows = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=-1, padding_side='left').to(device)

def answer(model, tok, prompts, max_new_tokens, batch_size=250, **how):
    """The model's answers to prompts, lists of ids as render_chat makes them: [(text, whether it ended by itself)].
    `how`: temperature, top_k, top_p, generator, as GPT.generate takes them. A prompt that leaves no room for
    max_new_tokens in the context is cut on the left, to no less than half of the context."""
    end, answers, size = tok.special['<|end|>'], [''] * len(prompts), model.config.block_size
    most = max(size - max_new_tokens, (size + 1) // 2)
    for rows in torch.tensor([len(ids) for ids in prompts]).argsort(stable=True).split(batch_size):  # of like length
        idx = pad_left([prompts[i][-most:] for i in rows], model.wte.weight.device)
        out = model.generate(idx, max_new_tokens, stop=[end], **how)[:, idx.size(1):].tolist()
        for i, ids in zip(rows, out):
            answers[i] = tok.decode([token for token in ids if token not in (-1, end)]), end in ids
    return answers

def prompt_ids(prompt, tok):
    """The ids of a user's words, up to where the answer begins."""
    return render_chat([{'role': 'user', 'content': prompt}], tok)[0]

def short_prompts(rows, tok, block_size, max_new_tokens):
    """prompt_ids of the prompts of rows; those that leave no room for max_new_tokens in the context are cut on the left."""
    room = max(1, block_size - max_new_tokens)
    return [prompt_ids(row['prompt'], tok)[-room:] for row in rows]

def length_chunks(idx, size):
    """The rows of idx (B, T), padded with -1 on the right, in the order of length, `size` at a time: (their numbers, the
    length of the longest), so that little padding is computed."""
    length = (idx >= 0).sum(1)
    for rows in length.argsort().split(size):
        yield rows, int(length[rows].max())

def best_of(judge, tok, conversations, texts):
    """Of several answers to each conversation, which stand side by side in texts, the one that a reward model scores
    highest (best-of-n sampling; arXiv 2009.01325)."""
    n, best, device = len(texts) // len(conversations), [], next(judge.parameters()).device
    for i, messages in enumerate(conversations):
        said = texts[i * n:(i + 1) * n]
        rows = [render_chat([*messages, {'role': 'assistant', 'content': text}], tok) for text in said]
        idx, mask = (pad_left([row[-judge.trunk.config.block_size:] for row in part], device) for part in zip(*rows))
        with torch.no_grad():
            best.append(said[judge(idx, mask).argmax()])
    return best

@torch.no_grad()
def score_moments(judge, model, tok, rows, max_new_tokens, generator, batch_size=250):
    """(standard deviation, mean) of a reward model's scores of a language model's sampled answers to the prompts of rows."""
    scores, device, prompts = [], model.wte.weight.device, short_prompts(rows, tok, model.config.block_size, max_new_tokens)
    for i in range(0, len(prompts), batch_size):
        idx = pad_left(prompts[i:i + batch_size], device)
        out = model.generate(idx, max_new_tokens, stop=[tok.special['<|end|>']], generator=generator)
        scores.append(judge(out, torch.arange(out.size(1), device=device) >= idx.size(1)).float())
    return torch.std_mean(torch.cat(scores))

def log_prob(model, idx, mask):
    """Log-probability, in nats, that a language model gives to the tokens of idx (B, T) where mask is 1, a row's sum
    (B,). Padding is -1, on the right, where no real token sees it."""
    row, t = mask[:, 1:].nonzero(as_tuple=True)                       # what stands at t tells the token after it
    logits, _ = model(idx.clamp(min=0), read=(row, t))
    logp = -F.cross_entropy(logits.float(), idx[row, t + 1], reduction='none')
    return logp.new_zeros(mask.shape).index_put((row, t), logp).sum(1)

def tamper(idx, mask, blank, generator):
    """Pairs (2B, T), first all chosen, and the chosen once more with 40% of their answers' tokens replaced, half by a
    blank, half by others of these answers: idx, mask, 1 on answers, and targets, what stood where a token was replaced, -1
    elsewhere, all (3B, T). To restore an answer, an encoder must see what is wrong with it, from both sides (BERT, arXiv
    1810.04805); a trunk that learned to look back alone needs the practice (2404.05961)."""
    chosen, own = idx.chunk(2)[0], mask.chunk(2)[0]
    hit, blanked = ((own > 0) & (torch.rand(own.shape, generator=generator, device=own.device) < p) for p in (0.4, 0.5))
    hit = hit | (own > 0) & ~hit.any()  # where chance spared all none is spared: a mean over nothing is NaN
    others = chosen[own > 0]
    others = others[torch.randint(len(others), own.shape, generator=generator, device=own.device)]
    noisy = torch.where(hit, others.masked_fill(blanked, blank), chosen)
    targets = torch.cat((torch.full_like(idx, -1), chosen.masked_fill(~hit, -1)))
    return torch.cat((idx, noisy)), torch.cat((mask, own)), targets

def exact_match(said, gold):
    """The share of texts that are the gold ones; nan where one of these is None, not known."""
    return sum(a == b for a, b in zip(said, gold)) / len(gold) if None not in gold else math.nan

def token_f1(said, gold):
    """Harmonic mean of precision and recall of the words that two texts share (SQuAD, arXiv 1606.05250)."""
    a, b = said.split(), gold.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if a or b else 1.0

def rouge_l(said, gold):
    """The same of their longest common subsequence of words (Lin 2004)."""
    a, b = said.split(), gold.split()
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return 2 * row[-1] / (len(a) + len(b)) if a or b else 1.0

def auc(right, wrong):
    """The probability that a right answer has a higher score than a wrong one, of all such pairs; ties are halves."""
    both = torch.cat((right, wrong)).double()
    _, inverse, counts = both.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]            # 1 = the lowest; equal ones share their mean
    return ((ranks[:len(right)].sum() - len(right) * (len(right) + 1) / 2) / (len(right) * len(wrong))).item()

def log_choice(d, flip_rate=0.0):
    """Log-probability, in nats, that an answer is preferred whose score is d higher (any shape; the same), in the model of
    Bradley and Terry (1952): log sigmoid(d); or, where a share flip_rate of the choices is turned round by chance, whatever
    the scores, log((1 - flip_rate) sigmoid(d) + flip_rate sigmoid(-d)) (arXiv 1609.03683)."""
    flipped = torch.tensor(float(flip_rate))
    return torch.logaddexp(F.logsigmoid(d) + (1 - flipped).log(), F.logsigmoid(-d) + flipped.log())

def fit_scale(d, flip_rate=0.0):
    """The factor, from 1/8 to 8, under which differences d (N,) of chosen and rejected scores make the choices likeliest
    (temperature scaling, arXiv 1706.04599)."""
    factors = torch.logspace(-3, 3, 193, base=2.0)
    return factors[log_choice(factors[:, None] * d, flip_rate).mean(1).argmax()].item()

def calibration_error(d, labels, flip_rate=0.0, bins=10):
    """How far the probability of a choice that log_choice gives is from the share of such choices that were made (labels,
    0 or 1): the mean distance over bins of equally many pairs (those of arXiv 1706.04599 are equally wide)."""
    p, order = log_choice(d, flip_rate).exp(), d.argsort()
    parts = zip(p[order].chunk(bins), labels[order].float().chunk(bins))
    return (sum(len(a) * (a.mean() - b.mean()).abs() for a, b in parts) / len(d)).item()

def pair_figures(chosen, rejected, rows, gold=None, flip_rate=0.0):
    """What scores (N,) of the two answers of N pairs, whose records are rows, are worth. "accuracy" is against the
    labels, of which at most "noise_ceiling" are right; the others against the labels before some were flipped, where
    the data says which ("clean"). "auc" is of right answers against wrong ones, and "one_right" of pairs with a right
    answer, where there is a function gold to tell them; else of chosen against rejected. "length_only" is a judge
    who knows nothing but which answer is longer. "best_scale" is the factor that makes scores as sure as they should be, above
    1 for timid ones; "calibration_error" is of scores so scaled, each half of the pairs by the factor that fits the other."""
    accuracy = lambda d: ((d > 0).float().mean() + (d == 0).float().mean() / 2).item()
    flipped = torch.tensor([not row.get('clean', True) for row in rows])
    longer = torch.tensor([float(len(row['chosen']) - len(row['rejected'])) for row in rows])
    exact = torch.tensor([[gold(row['prompt'], row[key])[0] if gold else float(key == 'chosen') for row in rows]
                          for key in ('chosen', 'rejected')]) > 0
    d, first = chosen - rejected, torch.arange(len(rows)) % 2 == 0    # every other pair is asked the other way round
    a, b = d.tensor_split(2)
    scaled = torch.cat((a * fit_scale(b, flip_rate), b * fit_scale(a, flip_rate)))
    truth, scores = torch.where(flipped, -d, d), torch.stack((chosen, rejected))
    figures = {'accuracy': accuracy(d), 'accuracy_clean': accuracy(truth), 'noise_ceiling': 1 - flipped.float().mean().item(),
               'accuracy_one_right': accuracy(truth[exact.any(0)]), 'auc': auc(scores[exact], scores[~exact]),
               'calibration_error': calibration_error(torch.where(first, scaled, -scaled), first, flip_rate),
               'score_std': scores.std().item(), 'best_scale': fit_scale(d, flip_rate),
               'accuracy_length_only': max(accuracy(sign * torch.where(flipped, -longer, longer)) for sign in (1, -1))}
    for op in sorted({row['op'] for row in rows if 'op' in row}):
        figures[f'margin/{op}'] = truth[[row.get('op') == op for row in rows]].mean().item()
    return figures
