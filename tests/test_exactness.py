"""
What makes the reported figures exact, in every stage as its user runs it: precision, resumption,
rates, random streams, divergence, and what PPO reports.
"""
import contextlib
import functools
import json
import math
import os
import sys

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import configurator
import ppo
import reward
import sample
from assets.draw import collect_curves
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, save_checkpoint
from conftest import (CPU, DAMAGED_LINES, TINY, call, checker_again, finish, flags, ok, one_line,
                      same, start, with_checker)
from model import GPT, GPTConfig, MoE, RewardModel, skip_idle_experts

tok = Tokenizer.byte()

# A run of a few steps of each stage. What precedes the comma is the name of its script.
STAGES = {
    'train': dict(TINY, max_iters=4, eval_interval=2, eval_iters=1),
    'sft': dict(CPU, max_iters=4, eval_interval=2, batch_size=4, gradient_accumulation_steps=2,
                eval_prompts=2, test_prompts=2, test_draws=1, max_new_tokens=4, log_interval=1),
    'reward': dict(CPU, max_iters=4, eval_interval=2, batch_size=4, gradient_accumulation_steps=2,
                   normalize_prompts=4, max_new_tokens=4, log_interval=1),
    'reward, dpo': dict(CPU, max_iters=4, eval_interval=2, batch_size=4, loss='dpo', causal=True,
                        gradient_accumulation_steps=2, max_new_tokens=4, log_interval=1),
    'ppo': dict(CPU, max_iters=4, eval_interval=2, batch_size=8, minibatch_size=4, reward='gold',
                eval_prompts=2, test_prompts=2, test_draws=1, max_new_tokens=4)}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr('assets.draw.draw_curves', lambda *args: None)


@pytest.fixture
def run_stage(dataset, letters_data, small_base):
    """A function that runs a stage in a folder. Settings override those of STAGES; with
    init_from='resume' a run continues with its own. Returns the result of call()."""
    def run_stage(stage, folder, **more):
        script = stage.split(',')[0] + '.py'
        if more.get('init_from') == 'resume':
            if stage in ('reward', 'ppo'):
                more.update(checker_again(letters_data))
            return call(script, *flags(more, out_dir=folder))
        settings = dict(STAGES[stage], out_dir=folder)
        if stage == 'train':
            settings['dataset'] = dataset
        else:
            settings.update(dataset=letters_data, init_from=small_base)
        if stage == 'ppo':
            settings.update(with_checker(letters_data))
        return call(script, *flags(settings | more))
    return run_stage


@pytest.mark.parametrize('stage', ['sft', 'reward', 'reward, dpo', 'ppo'])
def test_the_context_of_a_model_with_rope_can_grow_in_every_stage(
        stage, run_stage, small_base, tmp_path):
    ok(run_stage(stage, tmp_path / 'run', init_from=small_base, max_iters=1, block_size=48))
    path = str(tmp_path / 'run')
    assert load_checkpoint(path)['model_args']['block_size'] == 48
    ok(run_stage(stage, tmp_path / 'run', init_from='resume', max_iters=2))
    checkpoint = load_checkpoint(path)
    assert (checkpoint['step'], checkpoint['model_args']['block_size']) == (2, 48)
    message = one_line(run_stage(stage, tmp_path / 'new', block_size=16))
    assert 'block_size 16 is less than the 32 of the model' in message


def records_of(folder):
    """The records of a run's log."""
    return read_log(str(folder))


@pytest.mark.parametrize('stage', STAGES)
def test_an_out_dir_that_is_a_file_is_an_error_that_names_the_setting(stage, run_stage, tmp_path):
    (tmp_path / 'file').write_text('not a folder', encoding='utf-8')
    message = one_line(run_stage(stage, tmp_path / 'file'))
    assert f'out_dir={tmp_path}/file cannot be written (File exists)' in message


def small_gpt(**more):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=32, n_layer=2, n_head=2, n_embd=32) | more))


# -----------------------------------------------------------------------------
# Precision

@pytest.mark.parametrize('stage', STAGES)
def test_every_forward_pass_of_a_run_has_the_precision_of_the_run(stage, run_stage, monkeypatch,
                                                                  tmp_path):
    # So training, measurements, evaluations and the final table compare like with like.
    passes = []       # whether autocast was on, in each forward pass outside of generation
    generations = []  # and where each generation began: inside, fast_decoding has its own way
    hidden = GPT.hidden
    fast_decoding = sample.fast_decoding

    def recorded_hidden(gpt, *args, **settings):
        is_generation = sys._getframe(1).f_code.co_name == 'next_logits'
        if not is_generation:
            passes.append(torch.is_autocast_enabled('cpu'))
        return hidden(gpt, *args, **settings)

    def recorded_decoding(*args):
        generations.append(torch.is_autocast_enabled('cpu'))
        return fast_decoding(*args)

    monkeypatch.setattr(GPT, 'hidden', recorded_hidden)
    monkeypatch.setattr(sample, 'fast_decoding', recorded_decoding)
    ok(run_stage(stage, tmp_path, dtype='bfloat16', max_iters=2))
    assert len(passes) > 4 and all(passes)
    assert all(generations)
    # train.py shows a sample, which is no figure; DPO generates nothing.
    assert bool(generations) == (stage not in ('train', 'reward, dpo'))


@pytest.mark.parametrize('causal', [False, True])
def test_reward_scores_under_bfloat16_autocast_are_distinct(causal):
    model = RewardModel(small_gpt(causal=causal)).eval()
    idx = torch.randint(256, (512, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        scores = model(idx)
    assert scores.dtype == torch.float32
    assert len(scores.unique()) > 500  # in bfloat16 about 380


def test_log_probabilities_kl_and_entropy_of_bfloat16_logits_are_float32():
    logits = 3 * torch.randn(64, 261, generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        logprobs = ppo.log_softmax(logits, 0.7)
    expected = (logits.double() / 0.7).log_softmax(dim=-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-6, atol=1e-5)


def test_the_dpo_reward_of_an_unchanged_policy_is_exactly_0_in_bfloat16():
    policy = small_gpt()
    idx = torch.randint(256, (8, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(idx)
    with torch.autocast('cpu', torch.bfloat16):
        rewards = reward.dpo_reward(policy, small_gpt(), idx, mask, 1.0)
    assert rewards.requires_grad and (rewards == 0).all()


# -----------------------------------------------------------------------------
# float16

# Loss scales at which the gradients of the first step overflow. After an overflow the scale is
# halved, and with growth_interval=1 it doubles after every other step.
SCALES = {'train': 2.0 ** 19, 'sft': 2.0 ** 20, 'reward': 2.0 ** 19, 'reward, dpo': 2.0 ** 23,
          'ppo': 2.0 ** 20}


@pytest.mark.parametrize('stage', STAGES)
def test_8_steps_in_float16_equal_4_and_4_resumed_steps_bit_for_bit(stage, run_stage, monkeypatch,
                                                                    tmp_path):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=SCALES[stage], growth_interval=1)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    settings = dict(dtype='float16', learning_rate=0.05, warmup_iters=0, lr_schedule='constant',
                    eval_interval=4)
    whole = tmp_path / 'whole'
    half = tmp_path / 'half'
    ok(run_stage(stage, whole, **settings, max_iters=8))
    ok(run_stage(stage, half, **settings, max_iters=4))
    assert load_checkpoint(str(half))['scaler']['scale'] != SCALES[stage]
    ok(run_stage(stage, half, init_from='resume', max_iters=8))
    found = load_checkpoint(str(half))
    expected = load_checkpoint(str(whole))
    assert expected['step'] == 8
    for name in ('model', 'policy', 'optimizer', 'scaler'):
        assert same(found.get(name), expected.get(name)), name

    # A skipped step is logged as skipped, and no figure of it is nan.
    skipped = {}
    for record in records_of(whole):
        values = [value for value in record.values() if isinstance(value, float)]
        assert all(map(math.isfinite, values)), record
        if 'loss' in record or 'loss/policy' in record:
            skipped[record['step']] = record.get('skipped', 0)
            if stage != 'ppo':  # an iteration of ppo.py may have skipped one of its updates
                assert ('grad_norm' in record) != ('skipped' in record)
    assert sorted(skipped) == list(range(8))
    assert skipped[0] == 1
    for steps in (range(4), range(4, 8)):
        assert min(skipped[step] for step in steps) < 1


# -----------------------------------------------------------------------------
# Rates

@pytest.mark.parametrize('stage, rates, logged', [
    ('train', dict(muon_lr=0.01), ['muon_lr']),
    ('sft', dict(muon_lr=0.01), ['muon_lr']),
    ('reward', dict(muon_lr=0.01), ['muon_lr']),
    ('reward, dpo', dict(muon_lr=0.01), ['muon_lr']),
    ('ppo', dict(gain_lr=0.01, critic_lr=0.02), ['gain_lr', 'critic_lr'])])
def test_learning_rate_0_stops_neither_muon_nor_the_gain_nor_the_critic(stage, rates, logged,
                                                                        run_stage, tmp_path):
    more = {} if stage == 'ppo' else {'optimizer': 'muon'}
    settings = dict(learning_rate=0.0, warmup_iters=0, lr_schedule='constant', **more)
    ok(run_stage(stage, tmp_path / 'all', **settings, **rates, max_iters=2))
    frozen = {name: 0.0 for name in rates}
    ok(run_stage(stage, tmp_path / 'none', **settings, **frozen, max_iters=2))
    weights = []
    for name in ('all', 'none'):
        checkpoint = load_checkpoint(str(tmp_path / name))
        weights.append(checkpoint.get('policy') or checkpoint['model'])
    trained, untrained = weights
    changed = {name for name in trained if not torch.equal(trained[name], untrained[name])}
    changed -= {'shift', 'scale'}  # of a reward model's scores
    if stage == 'ppo':
        assert changed == {'gpt.ln_f.weight', 'value_head.proj.weight', 'value_head.proj.bias'}
    else:
        assert changed == {name for name in trained if '.c_' in name}  # the blocks' matrices

    # the rate of each group is logged
    training = [record for record in records_of(tmp_path / 'all')
                if 'loss' in record or 'loss/policy' in record]
    assert len(training) == 2
    for record in training:
        assert record['lr'] == 0
        assert [record[name] for name in logged] == pytest.approx(list(rates.values()))


# -----------------------------------------------------------------------------
# Random streams

PURPOSES = {
    'train': {'batches', 'dropout', 'sample'},
    'sft': {'batches', 'dropout', 'evaluation', 'test'},
    'reward': {'batches', 'reward head', 'denoising', 'normalisation'},
    'reward, dpo': {'batches'},
    'ppo': {'evaluation', 'prompts', 'rollout', 'minibatches', 'test', 'test score'}}


@pytest.mark.parametrize('stage', STAGES)
def test_every_purpose_has_a_random_stream_of_its_own(stage, run_stage, monkeypatch, tmp_path):
    real_seed_for = configurator.seed_for
    lines = {}   # purpose -> the lines of the scripts that draw from its streams
    seeds = {}   # arguments -> seed

    def recorded(seed, purpose, *where):
        frame = sys._getframe(1)
        while os.path.basename(frame.f_code.co_filename) in ('configurator.py', 'examples.py'):
            frame = frame.f_back
        script = os.path.basename(frame.f_code.co_filename)
        lines.setdefault(purpose, set()).add((script, frame.f_lineno))
        seeds[seed, purpose, where] = real_seed_for(seed, purpose, *where)
        return seeds[seed, purpose, where]

    monkeypatch.setattr(configurator, 'seed_for', recorded)
    ok(run_stage(stage, tmp_path))
    assert PURPOSES[stage] <= lines.keys()
    for purpose, places in lines.items():
        assert len(places) == 1, (purpose, places)
    assert len(set(seeds.values())) == len(seeds)


# -----------------------------------------------------------------------------
# Divergence

@contextlib.contextmanager
def broken_steps(group):
    """Every step of an AdamW makes a weight of one of its parameter groups NaN."""
    def break_weight(optimizer, args, settings):
        if isinstance(optimizer, torch.optim.AdamW):
            with torch.no_grad():
                optimizer.param_groups[group]['params'][0].view(-1)[0] = math.nan

    hook = register_optimizer_step_post_hook(break_weight)
    try:
        yield
    finally:
        hook.remove()


CRITIC = 2  # the number of its parameter group in ppo.py


@pytest.mark.parametrize('eval_interval', [1, 1000])  # 1000: only the last save of the run is due
@pytest.mark.parametrize('stage, more, group', [
    ('train', {}, 0), ('train', {}, 1), ('sft', {}, 0), ('reward', {}, 0), ('reward', {}, -1),
    ('reward, dpo', {}, 0), ('ppo', {}, 0), ('ppo', {}, 1), ('ppo', dict(minibatch_size=8), CRITIC),
    ('ppo', dict(minibatch_size=8, separate_critic=True), CRITIC)])
def test_weights_that_are_not_finite_are_never_saved_and_the_status_is_2(
        stage, more, group, eval_interval, run_stage, tmp_path):
    settings = dict(warmup_iters=0, lr_schedule='constant', eval_interval=eval_interval)
    ok(run_stage(stage, tmp_path, max_iters=1, **settings, **more))
    before = load_checkpoint(str(tmp_path))
    assert before['step'] == 1
    with broken_steps(group):
        message = one_line(run_stage(stage, tmp_path, init_from='resume', max_iters=2))
    # The error names the folder of the last good checkpoint, which is still there.
    assert str(tmp_path) in message and 'last' in message.lower()
    assert 'not finite' in message or 'the run has diverged' in message
    after = load_checkpoint(str(tmp_path))
    for name in ('step', 'model', 'policy', 'optimizer'):
        assert same(after.get(name), before.get(name))


@pytest.mark.parametrize('stage', ['sft', 'reward', 'reward, dpo', 'ppo'])
def test_a_run_does_not_start_from_weights_that_are_not_finite(stage, run_stage, small_base,
                                                               tmp_path):
    checkpoint = load_checkpoint(str(small_base))
    checkpoint['model']['h.1.mlp.c_fc.weight'][3, 4] = math.inf
    (tmp_path / 'bad').mkdir()
    torch.save(checkpoint, tmp_path / 'bad' / 'ckpt.pt')  # save_checkpoint refuses it
    message = one_line(run_stage(stage, tmp_path / 'run', init_from=tmp_path / 'bad'))
    assert 'h.1.mlp.c_fc.weight has values that are not finite' in message


# -----------------------------------------------------------------------------
# Idle experts

@pytest.mark.parametrize('kind', ['adamw', 'muon'])
@pytest.mark.parametrize('mlp', ['swiglu', 'gelu'])
def test_experts_that_received_no_token_in_a_step_are_not_updated(kind, mlp):
    model = small_gpt(n_expert=16, n_expert_active=1, mlp=mlp, bias=True)
    optimizers = model.optimizers(kind, 1e-2, 0.1, (0.9, 0.95), muon_lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    n_idle = 0
    n_idle_with_momentum = 0
    ever_used = set()
    for _ in range(4):
        before = [p.clone() for p in model.parameters()]
        # two micro-batches
        for _ in range(2):
            idx = torch.randint(256, (1, 5), generator=generator)
            model(idx[:, :-1], idx[:, 1:])[1].backward()
        skip_idle_experts(model)
        for o in optimizers:
            o.step()
            o.zero_grad(set_to_none=True)
        changed = {id(p): not torch.equal(p, old) for p, old in zip(model.parameters(), before)}
        for layer, moe in model.moes.items():
            for number, expert in enumerate(moe.experts):
                used = moe.load[number] > 0
                for p in expert.parameters():
                    assert changed[id(p)] == used
                n_idle += not used
                n_idle_with_momentum += not used and (layer, number) in ever_used
                if used:
                    ever_used.add((layer, number))
        assert all(changed[id(moe.router.weight)] for moe in model.moes.values())
        model.balance_experts(0.0)  # resets the loads
    assert n_idle > 8 and n_idle_with_momentum > 2


def test_two_ranks_leave_idle_experts_as_they_are_like_one(dataset, tmp_path):
    settings = dict(TINY, dataset=dataset, n_expert=16, n_expert_active=1, moe_balance='none',
                    block_size=4, batch_size=1, gradient_accumulation_steps=2, max_iters=4,
                    eval_interval=4, eval_iters=1, sample_tokens=0)
    one, two = tmp_path / 'one', tmp_path / 'two'
    ok(call('train.py', *flags(settings, out_dir=one)))
    ok(finish(start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'train.py',
                    *flags(settings, out_dir=two))))
    # a run whose only step changes nothing
    frozen = dict(settings, max_iters=1, learning_rate=0.0, muon_lr=0.0)
    ok(call('train.py', *flags(frozen, out_dir=tmp_path / 'initial')))
    initial = load_checkpoint(str(tmp_path / 'initial'))['model']
    found_one = load_checkpoint(str(one))['model']
    found_two = load_checkpoint(str(two))['model']
    for name, weight in found_one.items():
        torch.testing.assert_close(found_two[name], weight, rtol=1e-4, atol=1e-5, msg=name)

    # Experts that never received a token have the weights that were drawn first.
    records = [record for record in records_of(one) if 'moe/layer_0/expert_0' in record]
    n_idle = 0
    for layer in range(TINY['n_layer']):
        for number in range(16):
            idle = all(record[f'moe/layer_{layer}/expert_{number}'] == 0 for record in records)
            n_idle += idle
            name = f'h.{layer}.mlp.experts.{number}.c_fc.weight'
            for found in (found_one, found_two):
                assert torch.equal(found[name], initial[name]) == idle
    assert n_idle > 0


def test_an_expert_that_receives_only_padding_is_idle():
    torch.manual_seed(0)
    moe = MoE(GPTConfig(n_embd=8, n_expert=4, n_expert_active=1, moe_balance='none'))
    x = torch.randn(1, 6, 8)
    y = moe(x)
    y[:, :1].square().sum().backward()  # the loss reads the first token alone
    skip_idle_experts(moe)
    with torch.no_grad():
        used = int(moe.router(x[0, 0]).argmax())
    for number, expert in enumerate(moe.experts):
        for p in expert.parameters():
            assert (p.grad is not None) == (number == used)


# -----------------------------------------------------------------------------
# Sampling and PPO's report

def test_ids_that_the_tokenizer_does_not_have_are_sampled_in_no_stage(run_stage, small_base,
                                                                      monkeypatch, tmp_path):
    checkpoint = load_checkpoint(str(small_base))
    n_padded = 300
    weights = dict(checkpoint['model'])
    # Without suppression the padding would be sampled nearly always.
    padding = 5 * torch.randn(n_padded - tok.vocab_size, 48,
                              generator=torch.Generator().manual_seed(0))
    for name in ('wte.weight', 'lm_head.weight'):
        weights[name] = torch.cat((weights[name], padding))
    model_args = dict(checkpoint['model_args'], vocab_size=n_padded)
    base = tmp_path / 'base'
    save_checkpoint(str(base), dict(checkpoint, model=weights, model_args=model_args))

    sampled = []
    stream = GPT.stream

    def recorded(gpt, *args, **settings):
        for new in stream(gpt, *args, **settings):
            sampled.extend(new.tolist())
            yield new

    monkeypatch.setattr(GPT, 'stream', recorded)
    stages = ('sft', 'reward', 'ppo')
    for stage in stages:
        n_before = len(sampled)
        ok(run_stage(stage, tmp_path / stage, init_from=base, max_iters=1))
        assert len(sampled) > n_before
    for args in (['--start=a'], ['--chat=True']):
        n_before = len(sampled)
        ok(call('sample.py', f'--init_from={base}', '--device=cpu', '--max_new_tokens=20', *args,
                stdin='hello\n'))
        assert len(sampled) > n_before
    assert max(sampled) < tok.vocab_size


def test_ppos_report_is_complete_and_readable(letters_data, small_base, small_reward, monkeypatch,
                                              tmp_path):
    # Prompts have several lines, and an untrained model hardly ends a response.
    (tmp_path / 'data').mkdir()
    rows = [{'prompt': 'Raise these letters,\n\nplease:\n' + 'x' * 200 + '\n' + word,
             'response': word.upper()} for word in ('abc', 'bcd', 'cde', 'def')]
    for split in ('train', 'val'):
        path = tmp_path / 'data' / f'prompts_{split}.jsonl'
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    calls = []
    real_best_of_n = sample.best_of_n

    def recorded(reward_model, tok, conversations, responses, missing_end_score):
        calls.append((responses, missing_end_score))
        return real_best_of_n(reward_model, tok, conversations, responses, missing_end_score)

    monkeypatch.setattr(sample, 'best_of_n', recorded)
    settings = dict(STAGES['ppo'], dataset=tmp_path / 'data', init_from=small_base, reward='model',
                    reward_model=small_reward.folder, out_dir=tmp_path / 'run', max_iters=1,
                    test_draws=4, missing_end_score=-7.5)
    lines = ok(call('ppo.py', *flags(settings))).splitlines()

    # 1. the score before and after
    final = records_of(tmp_path / 'run')[-1]['final']
    for name in ('score', 'score_before'):
        assert math.isfinite(final[name])
        [shown] = [line for line in lines if line.split()[:1] == [name]]
        assert float(shown.split()[1]) == pytest.approx(final[name], abs=1e-4)

    # 2. too few responses end
    share = final['ended']
    assert share < 0.5
    warnings = [line for line in lines if 'of the responses ended within' in line]
    assert warnings and all('4 tokens; raise --max_new_tokens' in line for line in warnings)

    # 3. each displayed prompt with its responses is one line
    shown = [line for line in lines if ' -> ' in line]
    assert len(shown) == 4  # two prompts, at steps 0 and 1
    for line in shown:
        assert line.strip().startswith('Raise these letters, please: xxx')
        assert line.count(' -> ') >= 2 and '(gold: ' in line

    # 4. the best of four responses treats unfinished ones as the reward does
    [(responses, missing_end_score)] = calls
    assert missing_end_score == -7.5
    assert len(responses) == 4 * STAGES['ppo']['test_prompts']
    assert not all(ended for _, ended in responses)


def test_there_is_no_warning_if_the_responses_end(letters_data, small_sft, tmp_path):
    settings = dict(STAGES['ppo'], **with_checker(letters_data), init_from=small_sft.folder,
                    out_dir=tmp_path, max_iters=1, max_new_tokens=8)
    assert 'of the responses ended within' not in ok(call('ppo.py', *flags(settings)))


# -----------------------------------------------------------------------------
# Other runs in the folder, and damage

@pytest.mark.parametrize('stage', STAGES)
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(stage, run_stage, tmp_path):
    ok(run_stage(stage, tmp_path, max_iters=1))
    holder = configurator.Logger(str(tmp_path), {}, step=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for init_from in ({}, {'init_from': 'resume'}):
        message = one_line(run_stage(stage, tmp_path, max_iters=2, **init_from))
        assert f'{tmp_path}: process {os.getpid()} ' in message
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    holder.lock.release()
    ok(run_stage(stage, tmp_path, init_from='resume', max_iters=2))


@pytest.mark.parametrize('stage', STAGES)
def test_a_damaged_log_does_not_stop_a_resumed_run_and_its_records_are_kept(
        stage, run_stage, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr('assets.draw.draw_curves',
                        lambda folders, path: drawn.append(collect_curves(folders, folders)))
    ok(run_stage(stage, tmp_path, max_iters=2))
    before = [record for record in records_of(tmp_path) if record.get('step', 2) < 2]
    assert len(before) >= 2
    log = tmp_path / 'log.jsonl'
    log.write_bytes(DAMAGED_LINES + log.read_bytes() + DAMAGED_LINES)
    ok(run_stage(stage, tmp_path, init_from='resume', max_iters=3))
    after = records_of(tmp_path)
    assert after[:len(before)] == before
    assert 'final' in after[-1] and after[-2]['step'] >= 2
    assert len(log.read_bytes().splitlines()) == len(after)  # the damage is gone
    assert drawn[-1]
