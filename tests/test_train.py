"""
What train.py promises. Independent of it: the raw bytes of the text, plain loops over them, runs that never stopped,
and processes that are sent signals.
"""
import json, math, os, re, shlex, shutil, signal, time, types

import numpy as np
import pytest
import torch

import assets.draw
import data.dataset
import train
from bpe import Tokenizer
from configurator import load_checkpoint, read_log, save_checkpoint
from conftest import ROOT, TINY, call, finish, flags, ok, one_line, start, story
from data.dataset import load_dataset
from data.pretrained import load_model

# What a run that is stopped and goes on must not lose: momenta of two optimizers, dropout, a router.
FULL = dict(TINY, dropout=0.1, optimizer='muon', n_expert=2, n_expert_active=1, lr_decay_iters=20)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(assets.draw, 'draw', lambda *args: None)


def run_of(folder, dataset, settings=TINY, *more, **changed):
    """What a run in a folder said; it must succeed."""
    return ok(call('train.py', *flags(settings, dataset=dataset, out_dir=folder, **changed), *more))


def refused(folder, dataset, settings=TINY, **changed):
    """The line that a run in a folder ends with, which must fail."""
    return one_line(call('train.py', *flags(settings, dataset=dataset, out_dir=folder, **changed)))


def prepare_bpe(folder, dataset):
    """The story of a dataset again, as 300 kinds of tokens."""
    ok(call('data/text/prepare.py', f'--input={dataset}/story.txt', f'--out={folder}', '--tokenizer=bpe',
            '--vocab_size=300'))


@pytest.fixture(scope='module')
def full(dataset, tmp_path_factory):
    """A run of 20 steps: its folder, and what it said."""
    folder = tmp_path_factory.mktemp('full')
    return types.SimpleNamespace(folder=folder, said=run_of(folder, dataset, FULL))


@pytest.fixture(scope='module')
def one_rank(dataset, tmp_path_factory):
    """A run of 60 steps on one rank, at a constant learning rate: its folder."""
    folder = tmp_path_factory.mktemp('one_rank')
    run_of(folder, dataset, CONSTANT, max_iters=60)
    return folder


# Longer than anyone waits for: these runs are stopped. With no schedule, all of them are parts of one run.
CONSTANT = dict(TINY, lr_schedule='constant', max_iters=100_000, gradient_accumulation_steps=2, batch_size=4)


def records(folder):
    """log.jsonl without what depends on the clock."""
    clock = ('ms', 'tokens_per_second', 'final')
    return [{k: v for k, v in r.items() if k not in clock} for r in read_log(str(folder))]


def losses(folder):
    return {r['step']: r['loss'] for r in records(folder) if 'loss' in r}


def same(a, b):
    """Equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(folder):
    checkpoint = load_checkpoint(str(folder))
    return {k: checkpoint[k] for k in ('model', 'model_args', 'optimizer', 'step', 'best_val_loss', 'tokenizer')}


def wait_for_losses(folder, n, process, seconds=90):
    """Until n steps are logged."""
    until = time.time() + seconds
    while len(losses(folder)) < n:
        assert process.poll() is None and time.time() < until, finish(process)
        time.sleep(0.02)


# -----------------------------------------------------------------------------
# Batches

def test_x_is_the_raw_bytes_of_the_text_and_y_is_x_shifted_by_one(dataset):
    train_data, val_data, meta, tok = load_dataset(str(dataset), 32)
    text = story()
    raw = [*text[:len(text) * 9 // 10].encode(), tok.special['<|endoftext|>']]
    assert len(train_data) == len(raw) == meta['train_tokens'] == meta['train_bytes'] + 1
    starts = torch.tensor([0, 17, len(raw) - 33])
    x, y = train.get_batch(train_data, starts, 32, tok.vocab_size)
    assert x.tolist() == [raw[s:s + 32] for s in starts] and y.tolist() == [raw[s + 1:s + 33] for s in starts]


def test_the_sequences_of_a_step_are_a_function_of_seed_and_step_alone():
    starts = lambda step=3, **changed: train.batch_starts(1000, step, {
        'seed': 1, 'gradient_accumulation_steps': 1, 'batch_size': 8, 'block_size': 32, **changed}).tolist()
    torch.manual_seed(0)
    for accumulate, size in ((4, 2), (8, 1)):
        assert starts() == starts(gradient_accumulation_steps=accumulate, batch_size=size)
    assert starts() != starts(step=4) and starts() != starts(seed=2)


def test_every_sequence_that_fits_is_drawn_and_no_other():
    config = {'seed': 1, 'gradient_accumulation_steps': 1, 'batch_size': 50, 'block_size': 32}
    drawn = {s for step in range(10) for s in train.batch_starts(40, step, config).tolist()}
    assert drawn == set(range(40 - 32))  # 33 tokens from each, the last one being token 39


def test_accumulating_one_micro_batch_of_8_or_four_of_2_gives_the_same_weights(dataset, tmp_path):
    for name, accumulate, size in (('a', 1, 8), ('b', 4, 2), ('c', 3, 2)):
        run_of(tmp_path / name, dataset, max_iters=5, gradient_accumulation_steps=accumulate, batch_size=size)
    a, b, c = (load_checkpoint(str(tmp_path / name))['model'] for name in 'abc')
    assert all(torch.allclose(a[k], b[k], atol=2e-5) for k in a)
    assert not all(torch.allclose(a[k], c[k], atol=1e-3) for k in a)
    assert list(losses(tmp_path / 'a').values()) == pytest.approx(list(losses(tmp_path / 'b').values()), abs=1e-5)


# -----------------------------------------------------------------------------
# Validation

@pytest.fixture
def evaluating(full, dataset):
    """A model, validation data, settings and a run, as evaluate() takes them."""
    model, _ = load_model(str(full.folder), {})
    config = {'block_size': 32, 'batch_size': 3, 'eval_iters': 0}
    run = types.SimpleNamespace(rank=0, world=1, device='cpu', type='cpu', autocast=torch.no_grad())
    return model, load_dataset(str(dataset), 32)[1], config, run


def test_the_validation_loss_is_that_of_a_plain_loop_over_the_whole_set_each_time(evaluating):
    model, val_data, config, run = evaluating
    model.train()
    first = train.evaluate(*evaluating)
    assert model.training and train.evaluate(*evaluating) == first  # without dropout, and with no mode left behind
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(val_data), 32):
        block = torch.tensor(val_data[start:start + 33].astype(int))
        if len(block) == 33:
            with torch.no_grad():
                logits = model(block[None, :-1])[0][0]
            for t, probs in enumerate(torch.softmax(logits, dim=-1)):
                total, count = total - math.log(probs[block[t + 1]]), count + 1
    assert count == (len(val_data) - 1) // 32 * 32 and first == pytest.approx(total / count, rel=1e-5)
    assert not model.training and train.evaluate(*evaluating) == first and not model.training


@pytest.mark.parametrize('eval_iters', [1, 4, 10_000])
def test_eval_iters_batches_are_spread_evenly_over_the_set(evaluating, monkeypatch, eval_iters):
    model, val_data, config, run = evaluating
    asked, get_batch = [], train.get_batch

    def remember(data, starts, *more):
        asked.extend(starts)
        return get_batch(data, starts, *more)
    monkeypatch.setattr(train, 'get_batch', remember)
    train.evaluate(model, val_data, {**config, 'eval_iters': eval_iters}, run)
    blocks = (len(val_data) - 1) // 32
    assert len(asked) == min(3 * eval_iters, blocks) and asked[0] == 0 and asked[-1] == 32 * (blocks - 1)
    gaps = np.diff(asked) / 32
    assert (np.diff(asked) % 32 == 0).all() and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_the_ranks_share_the_validation_set(evaluating, monkeypatch):
    model, val_data, config, run = evaluating
    shares = []
    monkeypatch.setattr(train, 'sum_over_ranks', lambda total: shares.append(total.clone()) or total)
    for run.rank in range(3):
        run.world = 3
        train.evaluate(model, val_data, config, run)
    total, count = sum(shares).tolist()
    run.rank, run.world = 0, 1
    assert count == (len(val_data) - 1) // 32 * 32 and total / count == pytest.approx(train.evaluate(*evaluating))
    assert max(shares[rank][1] for rank in range(3)) <= count / 3 + 3 * 32


# -----------------------------------------------------------------------------
# A run, from its start to its final line

def test_a_run_learns(full):
    learned = losses(full.folder)
    assert list(learned) == list(range(20))
    assert learned[0] == pytest.approx(math.log(261), abs=0.1) and learned[19] < learned[0] - 1
    validated = {r['step']: r['val_loss'] for r in records(full.folder) if 'val_loss' in r}
    assert list(validated) == [0, 10, 20] and validated[0] > validated[10] > validated[20]


def test_the_final_line_is_said_last_and_stands_last_in_the_log(full, dataset):
    log = read_log(str(full.folder))
    final = log[-1]['final']
    assert {'val_loss', 'val_bpb', 'tokens_per_second', 'seconds', 'peak_memory_mb'} <= final.keys()
    assert [r for r in log if 'final' in r] == [log[-1]] and final['val_loss'] == log[-2]['val_loss']
    said = f"final: val_loss {final['val_loss']:.4f}, val_bpb {final['val_bpb']:.4f}, "
    assert full.said.splitlines()[-1].startswith(said)
    assert 50 < final['peak_memory_mb'] < 50_000 and 0 < final['seconds'] < 100
    assert final['tokens_per_second'] > 20 * 256 / final['seconds']  # evaluations are not training
    assert final['val_loss'] == train.evaluate(load_model(str(full.folder), {})[0], load_dataset(str(dataset), 32)[1], {
        'block_size': 32, 'batch_size': 8, 'eval_iters': 0}, types.SimpleNamespace(
            rank=0, world=1, device='cpu', type='cpu', autocast=torch.no_grad()))
    assert (full.folder / 'curves.png').exists()


def test_bits_a_byte_mean_the_same_for_every_tokenizer(full, dataset, tmp_path):
    """All the nats that the held-out text costs, in bits, over its bytes: whatever the tokens are."""
    text = story()
    held_out = text[len(text) * 9 // 10:].encode()
    prepare_bpe(tmp_path, dataset)
    run_of(tmp_path / 'run', tmp_path, max_iters=0)
    for run, folder in ((full.folder, dataset), (tmp_path / 'run', tmp_path)):
        final = read_log(str(run))[-1]['final']
        n_tokens = os.path.getsize(folder / 'val.bin') / 2
        assert final['val_bpb'] == pytest.approx(final['val_loss'] * n_tokens / len(held_out) * math.log2(math.e))
    untrained = read_log(str(tmp_path / 'run'))[-1]['final']
    assert n_tokens < len(held_out) / 1.3 and untrained['val_loss'] == pytest.approx(math.log(300), abs=0.1)
    assert untrained['val_bpb'] < math.log2(300) / 1.3


def test_the_checkpoint_holds_all_that_the_next_stage_needs(full):
    checkpoint = load_checkpoint(str(full.folder))
    assert {'model', 'model_args', 'optimizer', 'step', 'config', 'tokenizer'} <= checkpoint.keys()
    assert checkpoint['step'] == 20 and checkpoint['config']['n_expert'] == 2 and len(checkpoint['optimizer']) == 2
    assert not any('_orig_mod' in name or 'module' in name for name in checkpoint['model'])
    assert checkpoint['model'].keys() == load_model(str(full.folder), {})[0].state_dict().keys()
    assert sorted(path.name for path in full.folder.glob('*.pt')) == ['ckpt.pt', 'ckpt_best.pt', 'ckpt_prev.pt']
    assert load_checkpoint(str(full.folder / 'ckpt_prev.pt'))['step'] == 10


def test_where_only_better_ones_are_saved_ckpt_is_the_best(dataset, tmp_path):
    """As nanoGPT has it: what gets worse is not saved, and sample.py finds the best."""
    for name, rate, expected in (
            ('good', 3e-3, {'ckpt.pt': 4, 'ckpt_prev.pt': 2, 'ckpt_best.pt': 4}), ('wild', 3.0, {'ckpt.pt': 0, 'ckpt_best.pt': 0})):
        run_of(tmp_path / name, dataset, optimizer='adamw', learning_rate=rate, max_iters=4, eval_interval=2,
               always_save_checkpoint=False)
        validated = {r['step']: r['val_loss'] for r in records(tmp_path / name) if 'val_loss' in r}
        assert min(validated, key=validated.get) == expected['ckpt.pt'] and list(validated) == [0, 2, 4]
        saved = [f for f in os.listdir(tmp_path / name) if f.endswith('.pt')]
        assert {f: load_checkpoint(str(tmp_path / name / f))['step'] for f in saved} == expected


def test_a_worse_model_of_a_run_that_goes_on_does_not_replace_the_best(dataset, tmp_path):
    run_of(tmp_path, dataset, max_iters=5, eval_interval=3)  # ends with a better model than that of step 3, after the last save
    best = load_checkpoint(str(tmp_path / 'ckpt_best.pt'))
    assert best['step'] == 5 and best['best_val_loss'] < load_checkpoint(str(tmp_path))['best_val_loss']
    run_of(tmp_path, dataset, {'out_dir': tmp_path}, init_from='resume', max_iters=6, learning_rate=3.0, warmup_iters=0)
    assert best['best_val_loss'] < read_log(str(tmp_path))[-1]['final']['val_loss']
    assert load_checkpoint(str(tmp_path / 'ckpt_best.pt'))['step'] == 5


def test_the_best_is_chosen_by_one_measure_though_the_last_figure_is_of_the_whole_set(dataset, tmp_path):
    run_of(tmp_path, dataset, optimizer='adamw', max_iters=4, eval_interval=2, eval_iters=1)
    best, val_data = load_checkpoint(str(tmp_path / 'ckpt_best.pt')), load_dataset(str(dataset), 32)[1]
    loss = lambda eval_iters: train.evaluate(load_model(str(tmp_path), {})[0], val_data, {
        'block_size': 32, 'batch_size': 8, 'eval_iters': eval_iters}, types.SimpleNamespace(
            rank=0, world=1, device='cpu', type='cpu', autocast=torch.no_grad()))
    assert best['step'] == 4 and best['best_val_loss'] == loss(1) != loss(0) == read_log(str(tmp_path))[-1]['final']['val_loss']


def test_eval_only_says_the_loss_and_leaves_the_run_as_it_was(full, dataset):
    before = {name: (full.folder / name).read_bytes() for name in os.listdir(full.folder)}
    said = ok(call('train.py', '--init_from=resume', f'--out_dir={full.folder}', '--eval_only=True', '--device=cpu'))
    final, = (r['final'] for r in read_log(str(full.folder / 'eval')) if 'final' in r)
    assert final['val_loss'] == read_log(str(full.folder))[-1]['final']['val_loss']
    assert f"val_loss {final['val_loss']:.4f}" in said.splitlines()[-1]
    shutil.rmtree(full.folder / 'eval')
    assert before == {name: (full.folder / name).read_bytes() for name in os.listdir(full.folder)}


def test_init_from_a_runs_folder_starts_from_its_weights_at_step_0(full, dataset, tmp_path):
    run_of(tmp_path, dataset, init_from=full.folder, max_iters=1, learning_rate=1e-9, muon_lr=1e-9)
    log = records(tmp_path)
    assert log[0] == {'step': 0, 'val_loss': records(full.folder)[-2]['val_loss'], 'val_bpb': log[0]['val_bpb']}
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint['step'] == 1 and checkpoint['model_args']['n_expert'] == 2  # its architecture, not the settings'
    message = refused(tmp_path, dataset, init_from=full.folder, block_size=64)
    assert f'block_size 64 is more than the 32 of {full.folder}' in message


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_learns_about_as_much(full, dataset, tmp_path, dtype):
    run_of(tmp_path, dataset, {**FULL, 'dtype': dtype})
    assert losses(tmp_path) != losses(full.folder)
    assert list(losses(tmp_path).values()) == pytest.approx(list(losses(full.folder).values()), abs=0.1)


# -----------------------------------------------------------------------------
# Stopping and going on

def test_n_steps_and_m_more_are_bit_for_bit_n_plus_m_steps(full, dataset, tmp_path):
    run_of(tmp_path, dataset, FULL, max_iters=10)
    assert state_of(tmp_path)['step'] == 10 and not same(state_of(tmp_path)['model'], state_of(full.folder)['model'])
    said = ok(call('train.py', '--init_from=resume', f'--out_dir={tmp_path}', '--max_iters=20'))  # else as it was
    assert 'max_iters: 10 -> 20' in said
    assert same(state_of(tmp_path), state_of(full.folder)) and records(tmp_path) == records(full.folder)


@pytest.fixture(scope='module')
def stopped(dataset, tmp_path_factory):
    """Two runs in processes of their own, the one sent SIGTERM and the other SIGINT after some steps."""
    began, runs = [], {}
    for number in (signal.SIGTERM, signal.SIGINT):
        folder = tmp_path_factory.mktemp('stopped')
        always = number == signal.SIGTERM  # but a stopped run saves in any case
        began.append((number, folder, start('train.py', *flags(CONSTANT, dataset=dataset, out_dir=folder,
                                                               always_save_checkpoint=always))))
    for number, folder, process in began:
        wait_for_losses(folder, 4, process)
        os.kill(process.pid, number)
        runs[number] = folder, finish(process)
    return runs


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_its_step_saves_and_goes_on_bit_for_bit_by_the_command_it_prints(
        stopped, dataset, tmp_path, number, status):
    folder, result = stopped[number]
    assert result.returncode == status and result.stderr == ''
    step, command = re.fullmatch(r'stopped at step (\d+); go on with: (.*)', result.stdout.splitlines()[-1]).groups()
    step = int(step)
    assert load_checkpoint(str(folder))['step'] == step and list(losses(folder)) == list(range(step))
    assert not any('final' in r for r in read_log(str(folder)))
    python, script, *args = shlex.split(command)
    ok(call(script, *args, f'--max_iters={step + 3}', '--always_save_checkpoint=True'))
    run_of(tmp_path, dataset, CONSTANT, max_iters=step + 3)  # never stopped
    assert records(folder) == records(tmp_path) and same(state_of(folder)['model'], state_of(tmp_path)['model'])


def test_what_changes_on_resume_is_said_and_an_architecture_cannot(full, tmp_path):
    shutil.copytree(full.folder, tmp_path / 'run')
    resume = ['--init_from=resume', f'--out_dir={tmp_path / "run"}']
    for key, old, new in (('n_layer', 2, 3), ('norm', 'rmsnorm', 'layernorm'), ('optimizer', 'muon', 'adamw'),
                          ('block_size', 32, 64)):
        message = one_line(call('train.py', *resume, f'--{key}={new}'))
        assert f'{key}={new!r}: the run to resume has {old!r}' in message
    said = ok(call('train.py', *resume, '--max_iters=21', '--learning_rate=0.5', '--dropout=0.0'))
    assert {'learning_rate: 0.003 -> 0.5', 'dropout: 0.1 -> 0.0', 'max_iters: 20 -> 21'} <= set(said.splitlines())
    assert records(tmp_path / 'run')[-3]['step'] == 20 and state_of(tmp_path / 'run')['step'] == 21


def test_a_run_that_is_past_max_iters_is_evaluated_and_ends(full, tmp_path):
    shutil.copytree(full.folder, tmp_path / 'run')
    ok(call('train.py', '--init_from=resume', f'--out_dir={tmp_path / "run"}', '--max_iters=5'))
    assert read_log(str(tmp_path / 'run'))[-1]['final']['steps'] == 20
    assert same(state_of(tmp_path / 'run'), state_of(full.folder))


def test_a_crash_in_an_evaluation_finds_the_checkpoint_saved(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / 'data')
    with open(tmp_path / 'data' / 'val.bin', 'r+b') as f:
        f.seek(-100, os.SEEK_END)
        f.write(b'\xff\xff')  # met only when the whole set is gone through, at the end
    assert 'val.bin' in refused(tmp_path, tmp_path / 'data', eval_iters=1, batch_size=1)
    assert load_checkpoint(str(tmp_path))['step'] == 20


def test_diverging_ends_the_run_in_one_line_with_nothing_of_it_saved(dataset, tmp_path):
    wild = dict(TINY, optimizer='adamw', learning_rate=1e38, warmup_iters=0, lr_schedule='constant')
    for interval, what in ((1, 'val_loss nan'), (10, 'loss nan, grad_norm nan')):
        folder = tmp_path / str(interval)
        message = refused(folder, dataset, wild, eval_interval=interval)
        assert f'step 1: {what}: the run has diverged' in message and f'{folder} holds is good, of step 0' in message
        saved = [load_checkpoint(str(path)) for path in folder.glob('*.pt')]
        assert [c['step'] for c in saved] == [0] and all(t.isfinite().all() for t in saved[0]['model'].values())
        assert list(losses(folder).values()) == [pytest.approx(math.log(261), abs=0.1)]


def test_poisoned_weights_are_not_trained_on(full, dataset, tmp_path):
    checkpoint = load_checkpoint(str(full.folder))
    checkpoint['model']['wte.weight'][65, 3] = math.nan
    save_checkpoint(str(tmp_path / 'poisoned'), checkpoint)
    message = refused(tmp_path / 'run', dataset, init_from=tmp_path / 'poisoned')
    assert 'step 0: val_loss nan: the run has diverged' in message
    assert os.listdir(tmp_path / 'run') == ['log.jsonl']


# -----------------------------------------------------------------------------
# Ranks

@pytest.fixture
def unprepared(tmp_path):
    """A dataset with a prepare.py that was not run yet."""
    folder = tmp_path / 'mine'
    folder.mkdir()
    (folder / 'story.txt').write_bytes(story().encode())
    with open(os.path.join(ROOT, 'data/text/prepare.py'), encoding='utf-8') as f:
        source = f.read().replace("input = ''", f"input = '{folder}/story.txt'").replace('here.parents[1]', repr(ROOT))
    (folder / 'prepare.py').write_text(source)
    return folder


def process_of_rank(rank, parent):
    with open(f'/proc/{parent}/task/{parent}/children') as f:
        for pid in f.read().split():
            with open(f'/proc/{pid}/environ') as e:
                if f'RANK={rank}' in e.read().split('\0'):
                    return int(pid)


def test_two_ranks_are_one_run_whatever_happens_to_them(one_rank, unprepared, tmp_path):
    """One of two is killed: torchrun starts both again, and they go on from the checkpoint. torchrun is asked to
    stop: both end the same step. At last one rank goes on alone. All see the losses of one that never stopped."""
    ranks = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max-restarts=3', 'train.py',
                  *flags(CONSTANT, dataset=unprepared, out_dir=tmp_path, batch_size=8, gradient_accumulation_steps=1),
                  env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})  # github.com/pytorch/pytorch/issues/135712
    wait_for_losses(tmp_path, 12, ranks)  # so there is a checkpoint of step 10
    log = os.stat(tmp_path / 'log.jsonl').st_ino
    os.kill(process_of_rank(1, ranks.pid), signal.SIGKILL)
    while os.stat(tmp_path / 'log.jsonl').st_ino == log:  # until it is begun anew, up to the checkpoint
        assert ranks.poll() is None, finish(ranks).stderr
        time.sleep(0.02)
    wait_for_losses(tmp_path, 15, ranks)
    ranks.terminate()
    result = finish(ranks)
    assert result.returncode != 0 and result.stdout.count('preparing') == 1
    assert result.stdout.count('2 ranks') == 2 and result.stdout.count('step      0 | loss') == 1
    stopped, = re.findall(r'stopped at step (\d+)', result.stdout)
    step = int(stopped)
    ok(call('train.py', '--init_from=resume', f'--out_dir={tmp_path}', f'--max_iters={step + 3}'))
    learned, expected = losses(tmp_path), losses(one_rank)
    assert load_checkpoint(str(tmp_path))['step'] == step + 3 and list(learned) == list(range(step + 3))
    assert [learned[s] for s in range(min(60, step + 3))] == pytest.approx(
        [expected[s] for s in range(min(60, step + 3))], abs=1e-4)
    assert records(tmp_path)[0]['val_loss'] == pytest.approx(records(one_rank)[0]['val_loss'], abs=1e-6)


def test_a_batch_that_the_ranks_cannot_share_is_an_error_with_both_numbers(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args: None)
    monkeypatch.setenv('WORLD_SIZE', '3')
    message = refused(tmp_path, dataset)
    assert 'gradient_accumulation_steps 1 * batch_size 8' in message and '3 ranks' in message


# -----------------------------------------------------------------------------
# Data

@pytest.fixture
def damaged(dataset, tmp_path):
    """The error of a run on a copy of the dataset to which something was done."""
    def damaged(do, **changed):
        folder = tmp_path / 'data'
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(dataset, folder)
        do(folder)
        return refused(tmp_path / 'run', folder, **changed)
    return damaged


def edit(name, **changed):
    def do(folder):
        content = json.loads((folder / name).read_text(encoding='utf-8'))
        (folder / name).write_text(json.dumps(content | changed), encoding='utf-8')
    return do


def test_a_dataset_shorter_than_a_block_is_an_error_with_both_lengths(damaged, dataset):
    tokens = os.path.getsize(dataset / 'val.bin') // 2
    message = damaged(lambda folder: None, block_size=tokens)
    assert f'val.bin holds {tokens:,} tokens, but block_size {tokens} needs {tokens + 1:,}' in message


@pytest.mark.parametrize('do, parts', [
    (lambda f: os.truncate(f / 'train.bin', 2000), ['train.bin', '1,000', 'meta.json', 'train_tokens']),
    (lambda f: os.truncate(f / 'train.bin', 2001), ['train.bin', 'meta.json', 'train_tokens']),
    (lambda f: os.truncate(f / 'val.bin', 0), ['val.bin', 'holds 0 tokens', 'val_tokens']),
    (lambda f: os.remove(f / 'val.bin'), ['val.bin']),
    (edit('meta.json', dtype='uint32'), ['train.bin', 'uint32', 'train_tokens']),
    (edit('meta.json', val_tokens=7), ['val.bin', 'val_tokens 7']),
    (edit('meta.json', tokenizer={'fingerprint': 'other'}), ['tokenizer.json', 'fingerprint', 'meta.json']),
    (edit('meta.json', tokenizer=None), ['meta.json']),
    (lambda f: os.truncate(f / 'meta.json', 50), ['meta.json is damaged']),
    (lambda f: os.truncate(f / 'tokenizer.json', 50), ['tokenizer.json', 'damaged']),
    (shutil.rmtree, ['no such dataset', 'shakespeare', 'data/text'])])
def test_files_of_a_dataset_that_disagree_are_named_with_the_field(damaged, do, parts):
    message = damaged(do)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize('name', ['train', 'val'])
def test_a_token_id_out_of_range_is_named_with_its_file_and_offset(damaged, name):
    def poison(folder):
        tokens = np.memmap(folder / f'{name}.bin', dtype='uint16', mode='r+')
        tokens[1000::8] = 60000  # so every sequence has one
        tokens[1000] = 60001
    message = damaged(poison)
    offset = int(re.search(r'offset (\d+)', message)[1])
    assert f'{name}.bin' in message and offset >= 1000 and offset % 8 == 0 and '261' in message
    assert f'token {60001 if offset == 1000 else 60000}' in message


def test_data_of_another_tokenizer_than_the_models_is_an_error_with_both_sizes(full, dataset, tmp_path):
    prepare_bpe(tmp_path, dataset)
    message = refused(tmp_path / 'run', tmp_path, init_from=full.folder)
    assert '300' in message and '261' in message


def test_the_architecture_that_a_run_starts_from_stands(full, dataset, tmp_path):
    for settings in (dict(n_layer=3), dict(norm='layernorm'), dict(n_kv_head=1), dict(n_hidden=8)):
        (key, value), = settings.items()
        message = refused(tmp_path, dataset, dict(TINY, init_from=full.folder), **settings)
        assert f'{key}={value!r}: {full.folder} has ' in message
    same = {key: value for key, value in TINY.items() if not key.startswith('n_')}
    run_of(tmp_path, dataset, same, init_from=full.folder, n_kv_head=0, block_size=16, max_iters=1, dropout=0.0)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint['model_args'] == load_checkpoint(str(full.folder))['model_args'] | {'dropout': 0.0}
    for key in ('n_layer', 'n_embd', 'n_expert', 'n_kv_head'):  # the record tells what was trained, not the defaults
        assert checkpoint['config'][key] == checkpoint['model_args'][key]
    assert checkpoint['config']['block_size'] == 16


def test_a_run_that_begins_anew_in_a_folder_spares_what_is_there_even_where_it_starts_from_it(full, dataset, tmp_path):
    shutil.copytree(full.folder, tmp_path / 'run')
    said = run_of(tmp_path / 'run', dataset, init_from=tmp_path / 'run', max_iters=2, n_expert=2, n_expert_active=1)
    before = tmp_path / 'run' / 'before.1'
    assert 'held another run' in said and load_checkpoint(str(before))['step'] == FULL['max_iters']
    assert {r['step'] for r in read_log(str(before)) if 'step' in r} == {r['step'] for r in read_log(str(full.folder)) if 'step' in r}
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == 2


def test_a_dataset_is_prepared_when_it_is_not_there_and_again_for_another_tokenizer(unprepared, tmp_path, monkeypatch):
    prepared = []

    def run(command):  # in this process
        prepared.append(command[2:])
        return call(*command[1:])
    monkeypatch.setattr(data.dataset, 'subprocess', types.SimpleNamespace(run=run))
    settings = {}
    for asked, again in ((dict(), True), (dict(), False), (dict(tokenizer='bpe', vocab_size=300), True),
                         (dict(tokenizer='bpe'), False), (dict(vocab_size=300), False), (dict(tokenizer='byte'), True)):
        prepared.clear()
        said = run_of(tmp_path / 'run', unprepared, max_iters=0, **asked)
        assert prepared == [flags(settings | asked)] * again and ('preparing' in said) == again
        meta = json.loads((unprepared / 'meta.json').read_text())
        settings, has = meta['settings'], meta['tokenizer']  # it is prepared again by the former
        assert has['name'] == asked.get('tokenizer', has['name'])
        best = load_checkpoint(str(tmp_path / 'run' / 'ckpt_best.pt'))
        assert best['model_args']['vocab_size'] == has['vocab_size'] == asked.get('vocab_size', has['vocab_size'])
    message = refused(tmp_path / 'run', unprepared, tokenizer='byte', vocab_size=300)
    assert 'meta.json' in message and '261' in message and '300' in message
    assert 'is not byte, bpe, gpt2' in refused(tmp_path / 'run', unprepared, tokenizer='no.json')


def test_a_run_goes_on_with_its_own_tokens_though_the_data_were_prepared_with_others(unprepared, tmp_path):
    run_of(tmp_path / 'run', unprepared, max_iters=1)
    run_of(tmp_path / 'other', unprepared, max_iters=1, tokenizer='bpe', vocab_size=300)
    said = ok(call('train.py', '--init_from=resume', f"--out_dir={tmp_path / 'run'}", '--max_iters=2'))
    assert 'preparing' in said and '--tokenizer=byte' in said and load_checkpoint(str(tmp_path / 'run'))['step'] == 2
    said = ok(call('train.py', '--init_from=resume', f"--out_dir={tmp_path / 'other'}", '--max_iters=2'))
    assert '--tokenizer=bpe --vocab_size=300' in said and 'held another' not in said


def test_a_data_set_keeps_its_own_settings_and_notices_that_a_tokenizer_was_trained_anew(unprepared):
    (unprepared / 'more.log').write_text('and four, and five ' * 20)
    ok(call(unprepared / 'prepare.py', f'--input={unprepared}', '--ext=.txt,.log'))
    meta = lambda: json.loads((unprepared / 'meta.json').read_text())
    before, file = meta(), str(unprepared / 'mine.json')
    for text in ('one two three ', 'and four, and five '):
        Tokenizer.train(text * 20, 270).save(file)
        load_dataset(str(unprepared), 8, file)
        assert meta()['settings'] == before['settings'] | {'tokenizer': file} and meta()['val_bytes'] == before['val_bytes']
        assert meta()['tokenizer']['fingerprint'] == Tokenizer.load(file).fingerprint
    with open(unprepared / 'meta.json') as f:
        written = os.fstat(f.fileno()).st_ino
    load_dataset(str(unprepared), 8, file)
    assert os.stat(unprepared / 'meta.json').st_ino == written  # once is enough


@pytest.mark.parametrize('name', ['eval_interval', 'log_interval', 'batch_size', 'gradient_accumulation_steps'])
def test_what_must_be_at_least_1_is(dataset, tmp_path, name):
    assert f'{name} must be at least 1; got 0' in refused(tmp_path, dataset, **{name: 0})
