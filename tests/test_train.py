"""
train.py: batches, validation, a run from its start to its final line, stopping and resuming, ranks,
and the checks of its data.

The references are independent: the raw bytes of the text, plain loops over them, runs that were
never stopped, and processes that receive signals.
"""
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import tempfile
import time
import types

import numpy as np
import pytest
import torch

import assets.draw
import data.dataset
import train
from bpe import Tokenizer
from configurator import generator_for, load_checkpoint, read_log
from conftest import (CPU, ROOT, TINY, call, finish, flags, ok, one_line, process_of_rank, same,
                      start, story)
from data.dataset import load_dataset
from data.pretrained import load_model

# A run with everything that a resumed run must restore: two optimizers, dropout, a router.
FULL = dict(TINY, dropout=0.1, optimizer='muon', n_expert=2, n_expert_active=1, lr_decay_iters=20)

# A run that lasts until it is stopped. Without a schedule, a shorter run is the beginning of it.
CONSTANT = dict(TINY, lr_schedule='constant', max_iters=100_000, gradient_accumulation_steps=2,
                batch_size=4)

VOCAB_SIZE = 261  # of the byte tokenizer


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than these runs. Only the run of the fixture `full` draws its curves."""
    monkeypatch.setattr(assets.draw, 'draw_curves', lambda *args: None)


def run_train(folder, dataset, settings=TINY, **changed):
    """Run train.py, which must succeed, with out_dir=folder. Returns its stdout."""
    return ok(call('train.py', *flags(settings, dataset=dataset, out_dir=folder, **changed)))


def resume_train(folder, **changed):
    """Resume a run, with only these settings given. Returns its stdout."""
    return ok(call('train.py', *flags(init_from='resume', out_dir=folder, **changed)))


def error_of(folder, dataset, settings=TINY, **changed):
    """Run train.py, which must end with a user's error. Returns that line."""
    return one_line(call('train.py', *flags(settings, dataset=dataset, out_dir=folder, **changed)))


def prepare_bpe(folder, dataset):
    """Prepare the text of `dataset` with a BPE tokenizer of 300 tokens."""
    ok(call('data/text/prepare.py', f'--input={dataset}/story.txt', f'--out={folder}',
            '--tokenizer=bpe', '--vocab_size=300'))


def write_unprepared(folder):
    """Write to a folder the text of story() and a prepare.py that makes a dataset of it."""
    (folder / 'story.txt').write_bytes(story().encode())
    with open(os.path.join(ROOT, 'data/text/prepare.py'), encoding='utf-8') as f:
        source = f.read()
    source = source.replace("input = ''", f"input = '{folder}/story.txt'")
    source = source.replace('here.parents[1]', repr(ROOT))
    (folder / 'prepare.py').write_text(source, encoding='utf-8')


@pytest.fixture
def unprepared(tmp_path, monkeypatch):
    """The folder of the dataset 'mine', whose prepare.py was not run yet. It lies in a data folder
    that this process uses in place of the project's."""
    monkeypatch.setattr(data.dataset, 'DATA_FOLDER', str(tmp_path / 'data'))
    folder = tmp_path / 'data' / 'mine'
    folder.mkdir(parents=True)
    write_unprepared(folder)
    return folder


@pytest.fixture
def unprepared_in_project():
    """The folder of a dataset whose prepare.py was not run yet, in the project's data folder, where
    other processes find it too. It is removed at the end."""
    folder = tempfile.mkdtemp(prefix='test_', dir=data.dataset.DATA_FOLDER)
    write_unprepared(pathlib.Path(folder))
    yield pathlib.Path(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope='module')
def full(dataset, tmp_path_factory):
    """A run of 20 steps with the settings FULL: its folder and stdout."""
    folder = tmp_path_factory.mktemp('full')
    return types.SimpleNamespace(folder=folder, stdout=run_train(folder, dataset, FULL))


@pytest.fixture(scope='module')
def one_rank(dataset, tmp_path_factory):
    """The folder of a run of 60 steps with the settings CONSTANT, on one rank."""
    folder = tmp_path_factory.mktemp('one_rank')
    run_train(folder, dataset, CONSTANT, max_iters=60)
    return folder


def records_of(folder):
    """The records of a log without what depends on the clock."""
    clock = ('ms', 'tokens_per_second', 'mfu', 'final')
    records = []
    for record in read_log(str(folder)):
        records.append({key: value for key, value in record.items() if key not in clock})
    return records


def values_of(folder, metric):
    """{step: value} of a metric in a log."""
    return {r['step']: r[metric] for r in records_of(folder) if metric in r}


def final_of(folder):
    """The final figures of a run, which are the last line of its log."""
    return read_log(str(folder))[-1]['final']


def state_of(folder):
    """The parts of a checkpoint that two equal runs share."""
    checkpoint = load_checkpoint(str(folder))
    keys = ('model', 'model_args', 'optimizer', 'step', 'best_val_loss', 'tokenizer')
    return {key: checkpoint[key] for key in keys}


def wait_for_steps(folder, n, process, seconds=90):
    """Wait until a process has logged the losses of n steps."""
    until = time.time() + seconds
    while len(values_of(folder, 'loss')) < n:
        assert process.poll() is None and time.time() < until, finish(process)
        time.sleep(0.02)


# -----------------------------------------------------------------------------
# Batches

def test_x_is_the_bytes_of_the_text_and_y_is_x_shifted_by_one(dataset):
    train_data, _, meta, tok = load_dataset(str(dataset), 32)
    text = story()
    raw = [*text[:len(text) * 9 // 10].encode(), tok.special['<|endoftext|>']]
    assert len(train_data) == len(raw) == meta['train_tokens'] == meta['train_bytes'] + 1
    starts = torch.tensor([0, 17, len(raw) - 33])
    x, y = train.get_batch(train_data, starts, 32, tok.vocab_size)
    assert x.tolist() == [raw[s:s + 32] for s in starts]
    assert y.tolist() == [raw[s + 1:s + 33] for s in starts]


def test_the_sequences_of_a_step_are_a_function_of_the_generator_alone():
    def starts(seed=1, step=3):
        generator = generator_for(seed, 'batches', step)
        return train.batch_starts(1000, 32, 8, generator).tolist()

    torch.manual_seed(0)
    first = starts()
    torch.manual_seed(1)
    assert starts() == first
    assert starts(step=4) != first
    assert starts(seed=2) != first


def test_every_sequence_that_fits_is_drawn_and_no_other():
    drawn = set()
    for step in range(10):
        generator = generator_for(1, 'batches', step)
        drawn.update(train.batch_starts(40, 32, 50, generator).tolist())
    # A sequence has 33 tokens, and the last token is number 39.
    assert drawn == set(range(40 - 32))


def test_accumulating_four_micro_batches_of_2_gives_the_weights_of_one_of_8(dataset, tmp_path):
    for name, accumulate, size in (('1*8', 1, 8), ('4*2', 4, 2), ('3*2', 3, 2)):
        run_train(tmp_path / name, dataset, max_iters=5, gradient_accumulation_steps=accumulate,
                  batch_size=size)
    a = load_checkpoint(str(tmp_path / '1*8'))['model']
    b = load_checkpoint(str(tmp_path / '4*2'))['model']
    c = load_checkpoint(str(tmp_path / '3*2'))['model']
    assert all(torch.allclose(a[name], b[name], atol=2e-5) for name in a)
    assert not all(torch.allclose(a[name], c[name], atol=1e-3) for name in a)
    losses_a = list(values_of(tmp_path / '1*8', 'loss').values())
    losses_b = list(values_of(tmp_path / '4*2', 'loss').values())
    assert losses_a == pytest.approx(losses_b, abs=1e-5)


# -----------------------------------------------------------------------------
# Validation

RANK_0 = types.SimpleNamespace(rank=0, world_size=1, device='cpu', device_type='cpu',
                               autocast=torch.no_grad())


@pytest.fixture
def model(full):
    """The model of the run `full`."""
    return load_model(str(full.folder), {})[0]


@pytest.fixture
def val_data(dataset):
    return load_dataset(str(dataset), 32)[1]


def plain_loss(model, tokens):
    """The mean loss in nats per token of all tokens but the first, by a loop over blocks of 32."""
    losses = []
    for first in range(0, len(tokens) - 1, 32):
        block = torch.tensor(tokens[first:first + 33].astype(int))
        with torch.no_grad():
            logits, _ = model(block[None, :-1])
        for t, probs in enumerate(torch.softmax(logits[0], dim=-1)):
            losses.append(-math.log(probs[block[t + 1]]))
    assert len(losses) == len(tokens) - 1
    return sum(losses) / len(losses)


def test_the_validation_loss_is_the_mean_over_every_token_of_the_set(model, val_data):
    assert (len(val_data) - 1) % 32 != 0  # so the last block is shorter
    loss = train.evaluate(model, val_data, 32, 3, RANK_0)
    assert loss == pytest.approx(plain_loss(model.eval(), val_data), rel=1e-5)


@pytest.mark.parametrize('is_training', [True, False])
def test_evaluation_is_without_dropout_and_restores_the_mode(model, val_data, is_training):
    expected = train.evaluate(model.eval(), val_data, 32, 3, RANK_0)
    model.train(is_training)
    for _ in range(2):
        assert train.evaluate(model, val_data, 32, 3, RANK_0) == expected
        assert model.training == is_training


@pytest.mark.parametrize('eval_iters', [1, 4, 10_000])
def test_eval_iters_batches_are_spread_evenly_over_the_set(
        model, val_data, monkeypatch, eval_iters):
    starts = []
    get_batch = train.get_batch

    def record(data, batch, *args):
        starts.extend(batch)
        return get_batch(data, batch, *args)

    monkeypatch.setattr(train, 'get_batch', record)
    train.evaluate(model, val_data, 32, 3, RANK_0, eval_iters)
    n_blocks = (len(val_data) - 1) // 32
    assert len(starts) == min(3 * eval_iters, n_blocks)
    assert starts[0] == 0 and starts[-1] == 32 * (n_blocks - 1)
    gaps = np.diff(starts)
    assert (gaps % 32 == 0).all()
    assert gaps.min() >= 32 and gaps.max() - gaps.min() <= 32


def test_the_ranks_share_the_validation_set(model, val_data, monkeypatch):
    shares = []  # of each rank: the sum of its losses, and the number of its tokens

    def record(total):
        shares.append(total.clone())
        return total

    expected = train.evaluate(model, val_data, 32, 3, RANK_0)
    monkeypatch.setattr(train, 'sum_over_ranks', record)
    for rank in range(3):
        run = types.SimpleNamespace(**{**vars(RANK_0), 'rank': rank, 'world_size': 3})
        train.evaluate(model, val_data, 32, 3, run)
    loss_sum, n_tokens = sum(shares).tolist()
    assert n_tokens == len(val_data) - 1
    assert loss_sum / n_tokens == pytest.approx(expected)
    assert max(share[1] for share in shares) <= n_tokens / 3 + 3 * 32


# -----------------------------------------------------------------------------
# A run, from its start to its final line

def test_a_run_learns(full):
    losses = values_of(full.folder, 'loss')
    assert list(losses) == list(range(20))
    assert losses[0] == pytest.approx(math.log(VOCAB_SIZE), abs=0.1)
    assert losses[19] < losses[0] - 1
    val_losses = values_of(full.folder, 'val_loss')
    assert list(val_losses) == [0, 10, 20]
    assert val_losses[0] > val_losses[10] > val_losses[20]


def test_the_final_figures_are_printed_last_and_are_the_last_line_of_the_log(full, model, val_data):
    log = read_log(str(full.folder))
    final = log[-1]['final']
    assert [r for r in log if 'final' in r] == [log[-1]]
    expected = f"final: val_loss {final['val_loss']:.4f}, val_bpb {final['val_bpb']:.4f}, "
    assert full.stdout.splitlines()[-1].startswith(expected)
    assert {'val_loss', 'val_bpb', 'val_nats_per_byte', 'tokens_per_second', 'seconds',
            'peak_memory_mb'} <= final.keys()
    assert 50 < final['peak_memory_mb'] < 50_000
    assert 0 < final['seconds'] < 100
    # 256 tokens per step. Evaluations count in `seconds`, not in `tokens_per_second`.
    assert final['tokens_per_second'] > 20 * 256 / final['seconds']
    assert final['val_loss'] == log[-2]['val_loss']
    assert final['val_loss'] == train.evaluate(model, val_data, 32, 8, RANK_0)
    assert (full.folder / 'curves.png').exists()


def test_bits_per_byte_do_not_depend_on_the_tokenizer(full, dataset, tmp_path):
    """They are the bits that the whole held-out text costs, divided by its bytes."""
    text = story()
    held_out = text[len(text) * 9 // 10:].encode()
    prepare_bpe(tmp_path, dataset)
    run_train(tmp_path / 'run', tmp_path, max_iters=0)
    for folder, data_folder in ((full.folder, dataset), (tmp_path / 'run', tmp_path)):
        final = final_of(folder)
        n_tokens = os.path.getsize(data_folder / 'val.bin') / 2
        nats = final['val_loss'] * n_tokens
        assert final['val_bpb'] == pytest.approx(nats * math.log2(math.e) / len(held_out))
        assert final['val_nats_per_byte'] == pytest.approx(nats / len(held_out))
    # An untrained model of 300 tokens, which are longer than bytes.
    assert n_tokens < len(held_out) / 1.3
    assert final['val_loss'] == pytest.approx(math.log(300), abs=0.1)
    assert final['val_bpb'] < math.log2(300) / 1.3


def test_the_checkpoint_contains_what_the_next_stage_needs(full, model):
    checkpoint = load_checkpoint(str(full.folder))
    assert {'model', 'model_args', 'optimizer', 'step', 'config', 'tokenizer', 'eos_ids',
            'scaler'} <= checkpoint.keys()
    assert checkpoint['step'] == 20
    assert checkpoint['config']['n_expert'] == 2
    assert len(checkpoint['optimizer']) == 2
    assert not any('_orig_mod' in name or 'module' in name for name in checkpoint['model'])
    assert checkpoint['model'].keys() == model.state_dict().keys()
    files = sorted(path.name for path in full.folder.glob('*.pt'))
    assert files == ['ckpt.pt', 'ckpt_best.pt', 'ckpt_prev.pt']
    assert load_checkpoint(str(full.folder / 'ckpt_prev.pt'))['step'] == 10


def test_the_checkpoint_and_the_run_folder_contain_the_tokenizer(full, dataset):
    tok = load_dataset(str(dataset), 32)[3]
    checkpoint = load_checkpoint(str(full.folder))
    saved = Tokenizer.load(str(full.folder / 'tokenizer.json'))
    assert saved.fingerprint == tok.fingerprint
    assert Tokenizer.from_dict(checkpoint['tokenizer']).fingerprint == tok.fingerprint
    assert checkpoint['eos_ids'] == [tok.special['<|endoftext|>'], tok.special['<|end|>']]


def test_each_logged_step_has_its_rates_and_its_share_of_the_machines_speed(full):
    records = [record for record in read_log(str(full.folder)) if 'loss' in record]
    flops = load_model(str(full.folder), {})[0].flops_per_token(32)
    for record in records:
        # The speed of the machine is the same in each record.
        machine_flops = record['tokens_per_second'] * flops / record['mfu']
        first = records[0]
        assert machine_flops == pytest.approx(
            first['tokens_per_second'] * flops / first['mfu'], rel=1e-6)
        assert record['muon_lr'] / record['lr'] == pytest.approx(0.02 / 3e-3)
        assert 'skipped' not in record
    assert 1e8 < machine_flops < 1e14


@pytest.mark.parametrize('learning_rate, saved_steps', [
    (3e-3, {'ckpt.pt': 4, 'ckpt_prev.pt': 2, 'ckpt_best.pt': 4}),
    (3.0, {'ckpt.pt': 0, 'ckpt_best.pt': 0})])  # too high, so the model gets worse
def test_without_always_save_checkpoint_ckpt_is_the_best_model_as_in_nanogpt(
        dataset, tmp_path, learning_rate, saved_steps):
    run_train(tmp_path, dataset, optimizer='adamw', learning_rate=learning_rate, max_iters=4,
              eval_interval=2, always_save_checkpoint=False)
    val_losses = values_of(tmp_path, 'val_loss')
    assert list(val_losses) == [0, 2, 4]
    assert min(val_losses, key=val_losses.get) == saved_steps['ckpt.pt']
    found = {path.name: load_checkpoint(str(path))['step'] for path in tmp_path.glob('*.pt')}
    assert found == saved_steps


def test_a_resumed_run_that_gets_worse_does_not_replace_the_best_model(dataset, tmp_path):
    # Step 5 is better than step 3, and its evaluation comes after the last ckpt.pt.
    run_train(tmp_path, dataset, max_iters=5, eval_interval=3)
    best = load_checkpoint(str(tmp_path / 'ckpt_best.pt'))
    assert best['step'] == 5
    assert best['best_val_loss'] < load_checkpoint(str(tmp_path))['best_val_loss']
    resume_train(tmp_path, max_iters=6, learning_rate=3.0, warmup_iters=0)
    assert best['best_val_loss'] < final_of(tmp_path)['val_loss']
    assert load_checkpoint(str(tmp_path / 'ckpt_best.pt'))['step'] == 5


def test_a_run_killed_between_its_two_saves_of_the_best_model_saves_it_again(dataset, tmp_path):
    run_train(tmp_path, dataset, max_iters=6, eval_interval=3, always_save_checkpoint=False)
    expected = state_of(tmp_path)
    assert expected['step'] == 6 and expected['best_val_loss'] < math.inf
    os.replace(tmp_path / 'ckpt_prev.pt', tmp_path / 'ckpt.pt')  # ckpt_best.pt is of step 6
    resume_train(tmp_path)
    assert same(state_of(tmp_path), expected)


def test_a_damaged_best_model_does_not_stop_a_resumed_run(dataset, tmp_path):
    run_train(tmp_path, dataset, max_iters=1)
    os.truncate(tmp_path / 'ckpt_best.pt', 1000)
    printed = resume_train(tmp_path, max_iters=2)
    assert printed.count(f'{tmp_path}/ckpt_best.pt: damaged') == 1
    assert load_checkpoint(str(tmp_path))['step'] == 2


def test_the_best_model_is_chosen_by_eval_iters_and_the_final_loss_is_of_the_whole_set(
        dataset, val_data, tmp_path):
    run_train(tmp_path, dataset, optimizer='adamw', max_iters=4, eval_interval=2, eval_iters=1)
    best = load_checkpoint(str(tmp_path / 'ckpt_best.pt'))
    model, _ = load_model(str(tmp_path), {})
    loss_of_one_batch = train.evaluate(model, val_data, 32, 8, RANK_0, n_batches=1)
    loss_of_whole_set = train.evaluate(model, val_data, 32, 8, RANK_0)
    assert loss_of_one_batch != loss_of_whole_set
    assert best['step'] == 4
    assert best['best_val_loss'] == loss_of_one_batch
    assert final_of(tmp_path)['val_loss'] == loss_of_whole_set


def test_eval_only_logs_the_loss_in_a_folder_of_its_own_and_changes_nothing_else(full):
    before = {path.name: path.read_bytes() for path in full.folder.iterdir()}
    printed = resume_train(full.folder, eval_only=True, device='cpu')
    final, = [r['final'] for r in read_log(str(full.folder / 'eval')) if 'final' in r]
    assert final['val_loss'] == final_of(full.folder)['val_loss']
    assert f"val_loss {final['val_loss']:.4f}" in printed.splitlines()[-1]
    shutil.rmtree(full.folder / 'eval')
    assert before == {path.name: path.read_bytes() for path in full.folder.iterdir()}


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_learns_about_as_much(full, dataset, tmp_path, dtype):
    run_train(tmp_path, dataset, {**FULL, 'dtype': dtype})
    losses = values_of(tmp_path, 'loss')
    expected = values_of(full.folder, 'loss')
    assert losses != expected
    assert list(losses.values()) == pytest.approx(list(expected.values()), abs=0.1)


def test_a_float16_step_whose_gradients_overflow_is_skipped_and_a_resumed_run_keeps_the_scale(
        dataset, tmp_path):
    run_train(tmp_path, dataset, dtype='float16', max_iters=1)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint['scaler']['scale'] == 2 ** 16
    weights = checkpoint['model']
    # A scale at which the gradients overflow: this step is skipped, and the scale is halved.
    checkpoint['scaler']['scale'] = 2.0 ** 100
    torch.save(checkpoint, tmp_path / 'ckpt.pt')
    resume_train(tmp_path, max_iters=2)
    record = records_of(tmp_path)[-3]
    assert record['step'] == 1
    assert record['skipped'] == 1 and 'grad_norm' not in record
    assert math.isfinite(record['loss'])
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint['scaler']['scale'] == 2.0 ** 99
    assert same(checkpoint['model'], weights)


@pytest.mark.parametrize('name', ['eval_interval', 'log_interval', 'batch_size',
                                  'gradient_accumulation_steps'])
def test_a_count_of_0_is_an_error_before_anything_is_written(dataset, tmp_path, name):
    message = error_of(tmp_path / 'run', dataset, **{name: 0})
    assert f'{name} must be at least 1; got 0' in message
    assert not (tmp_path / 'run').exists()


# -----------------------------------------------------------------------------
# Starting from another model

def test_init_from_a_run_folder_starts_from_its_weights_at_step_0(full, dataset, tmp_path):
    run_train(tmp_path, dataset, init_from=full.folder, max_iters=1, learning_rate=1e-9,
              muon_lr=1e-9)
    first = records_of(tmp_path)[0]
    assert first['step'] == 0
    assert first['val_loss'] == records_of(full.folder)[-2]['val_loss']
    assert load_checkpoint(str(tmp_path))['step'] == 1


def test_the_block_size_of_a_rope_model_may_grow(full, dataset, tmp_path):
    run_train(tmp_path, dataset, init_from=full.folder, block_size=64, max_iters=1)
    own = load_checkpoint(str(full.folder))['model_args']
    model_args = load_checkpoint(str(tmp_path))['model_args']
    assert own['block_size'] == 32
    assert model_args == own | {'block_size': 64, 'dropout': 0.0}


def test_the_block_size_of_a_model_does_not_grow_by_the_default(full, dataset, tmp_path):
    settings = {key: value for key, value in TINY.items() if key != 'block_size'}
    printed = run_train(tmp_path, dataset, settings, init_from=full.folder, max_iters=1)
    checkpoint = load_checkpoint(str(tmp_path))
    assert checkpoint['model_args']['block_size'] == 32
    assert checkpoint['config']['block_size'] == 32
    assert '256 tokens per step' in printed  # 8 sequences of 32 tokens


def test_the_block_size_of_a_model_with_learned_positions_cannot_grow(dataset, tmp_path):
    run_train(tmp_path / 'learned', dataset, pos='learned', max_iters=1)
    message = error_of(tmp_path / 'run', dataset, init_from=tmp_path / 'learned', pos='learned',
                       block_size=64)
    assert f'{tmp_path / "learned"}: block_size 64 is more than the 32 of the model' in message
    assert "pos='learned'" in message
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name, value, own', [
    ('n_layer', 3, 2), ('norm', 'layernorm', "'rmsnorm'"), ('n_kv_head', 1, 2),
    ('n_hidden', 8, 88), ('n_expert', 0, 2)])
def test_an_argument_that_sets_another_architecture_than_the_models_is_an_error(
        full, dataset, tmp_path, name, value, own):
    message = error_of(tmp_path, dataset, dict(TINY, init_from=full.folder), **{name: value})
    assert f'--{name}={value}: {full.folder} has {name}={own}, which cannot change' in message


def test_an_argument_that_sets_the_models_own_architecture_is_accepted(full, dataset, tmp_path):
    # 0 and 2 are both right for the heads of keys and values: 0 means n_head.
    for n_kv_head in (0, 2):
        run_train(tmp_path, dataset, init_from=full.folder, n_kv_head=n_kv_head, n_expert=2,
                  max_iters=0)


def test_the_architecture_in_a_config_file_is_ignored_for_a_model_that_has_its_own(
        full, dataset, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text(f'init_from = {str(full.folder)!r}\nn_layer = 7\nn_head = 5\n'
                      "norm = 'layernorm'\nblock_size = 16\nmax_iters = 1\n", encoding='utf-8')
    settings = flags(CPU, dataset=dataset, out_dir=tmp_path / 'run', batch_size=2)
    printed = ok(call('train.py', config, *settings))
    line = f'the architecture of {config} is ignored: {full.folder} has its own'
    assert printed.splitlines().count(line) == 1
    model_args = load_checkpoint(str(tmp_path / 'run'))['model_args']
    own = load_checkpoint(str(full.folder))['model_args']
    assert model_args == own | {'dropout': 0.0}


def test_two_config_files_whose_architecture_is_ignored_are_named_in_one_line(model):
    config = {'n_layer': 7, 'norm': 'layernorm', 'n_embd': 32, 'n_head': 5}
    overrides = {'n_layer': 'a.py:1', 'norm': 'b.py:2', 'n_embd': 'c.py:3', 'n_head': 'a.py:4'}
    # c.py sets the model's own n_embd.
    assert train.check_architecture(model, config, overrides, 'out/x') == ['a.py', 'b.py']


def test_a_config_file_with_the_models_own_architecture_prints_nothing(full, dataset, tmp_path):
    config = tmp_path / 'mine.py'
    config.write_text('n_layer = 2\nn_kv_head = 0\nmax_iters = 0\n', encoding='utf-8')
    settings = flags(CPU, dataset=dataset, out_dir=tmp_path / 'run', init_from=full.folder,
                     block_size=32)
    assert 'is ignored' not in ok(call('train.py', config, *settings))


def test_the_saved_settings_are_those_of_the_model_that_was_trained(full, dataset, tmp_path):
    settings = {key: value for key, value in TINY.items() if not key.startswith('n_')}
    run_train(tmp_path, dataset, settings, init_from=full.folder, n_kv_head=0, block_size=16,
              max_iters=1, dropout=0.0)
    checkpoint = load_checkpoint(str(tmp_path))
    own = load_checkpoint(str(full.folder))['model_args']
    assert checkpoint['model_args'] == own | {'dropout': 0.0}
    model, _ = load_model(str(tmp_path), {})
    for name in ('n_layer', 'n_embd', 'n_expert', 'n_kv_head'):
        assert checkpoint['config'][name] == model.config.resolved()[name]
    assert checkpoint['config']['block_size'] == 16


def test_a_fresh_run_in_a_used_folder_keeps_the_old_run_even_if_it_starts_from_it(
        full, dataset, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(full.folder, folder)
    printed = run_train(folder, dataset, init_from=folder, max_iters=2, n_expert=2,
                        n_expert_active=1)
    before = folder / 'before.1'
    assert 'held another run' in printed
    assert load_checkpoint(str(before))['step'] == FULL['max_iters']
    assert records_of(before) == records_of(full.folder)
    assert load_checkpoint(str(folder))['step'] == 2


def test_data_of_another_tokenizer_than_the_models_is_an_error_with_both_sizes(
        full, dataset, tmp_path):
    prepare_bpe(tmp_path, dataset)
    message = error_of(tmp_path / 'run', tmp_path, init_from=full.folder)
    assert '300' in message and '261' in message


# -----------------------------------------------------------------------------
# Stopping and resuming

def test_10_steps_and_10_resumed_steps_equal_20_steps_bit_for_bit(full, dataset, tmp_path):
    run_train(tmp_path, dataset, FULL, max_iters=10)
    assert state_of(tmp_path)['step'] == 10
    assert not same(state_of(tmp_path)['model'], state_of(full.folder)['model'])
    printed = resume_train(tmp_path, max_iters=20)
    assert 'max_iters: 10 -> 20' in printed
    assert same(state_of(tmp_path), state_of(full.folder))
    assert records_of(tmp_path) == records_of(full.folder)


STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope='module')
def stopped(dataset, tmp_path_factory):
    """{signal: (folder, result)} of two runs that got this signal after some steps."""
    processes = {}
    for number in STATUS:
        folder = tmp_path_factory.mktemp('stopped')
        # A stopped run saves a checkpoint in any case, even if only better models are saved.
        settings = flags(CONSTANT, dataset=dataset, out_dir=folder,
                         always_save_checkpoint=number == signal.SIGTERM)
        processes[number] = folder, start('train.py', *settings)
    results = {}
    for number, (folder, process) in processes.items():
        wait_for_steps(folder, 4, process)
        os.kill(process.pid, number)
        results[number] = folder, finish(process)
    return results


@pytest.mark.parametrize('number', STATUS)
def test_a_stopped_run_saves_and_continues_bit_for_bit_by_the_command_that_it_prints(
        stopped, dataset, tmp_path, number):
    # 1. It ended after a whole step, with a checkpoint and without final figures.
    folder, result = stopped[number]
    assert result.returncode == STATUS[number]
    assert result.stderr == ''
    last_line = result.stdout.splitlines()[-1]
    step, command = re.fullmatch(r'stopped at step (\d+); resume with: (.*)', last_line).groups()
    step = int(step)
    assert load_checkpoint(str(folder))['step'] == step
    assert list(values_of(folder, 'loss')) == list(range(step))
    assert not any('final' in record for record in read_log(str(folder)))

    # 2. Resumed by the printed command, it equals a run that was never stopped.
    _, script, *args = shlex.split(command)
    ok(call(script, *args, f'--max_iters={step + 3}', '--always_save_checkpoint=True'))
    run_train(tmp_path, dataset, CONSTANT, max_iters=step + 3)
    assert records_of(folder) == records_of(tmp_path)
    assert same(state_of(folder)['model'], state_of(tmp_path)['model'])


@pytest.mark.parametrize('name, saved, value', [
    ('n_layer', 2, 3), ('norm', 'rmsnorm', 'layernorm'), ('optimizer', 'muon', 'adamw'),
    ('block_size', 32, 64)])
def test_a_resumed_run_cannot_change_its_architecture_or_optimizer(full, name, saved, value):
    message = one_line(call('train.py', *flags(init_from='resume', out_dir=full.folder,
                                               **{name: value})))
    assert f'--{name}={value}: {name}={value!r}, but the run to resume has {saved!r}' in message


def test_settings_that_change_on_resume_are_printed(full, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(full.folder, folder)
    printed = resume_train(folder, max_iters=21, learning_rate=0.5, dropout=0.0)
    assert {'learning_rate: 0.003 -> 0.5', 'dropout: 0.1 -> 0.0',
            'max_iters: 20 -> 21'} <= set(printed.splitlines())
    assert records_of(folder)[-3]['step'] == 20
    assert state_of(folder)['step'] == 21


def test_a_run_beyond_max_iters_is_evaluated_and_ends(full, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(full.folder, folder)
    resume_train(folder, max_iters=5)
    assert final_of(folder)['val_loss'] == final_of(full.folder)['val_loss']
    assert same(state_of(folder), state_of(full.folder))


def test_if_the_last_evaluation_fails_the_checkpoint_is_already_saved(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / 'data')
    with open(tmp_path / 'data' / 'val.bin', 'r+b') as f:
        # A token id beyond the vocabulary, which only the evaluation of the whole set reads.
        f.seek(-100, os.SEEK_END)
        f.write(b'\xff\xff')
    message = error_of(tmp_path / 'run', tmp_path / 'data', eval_iters=1, batch_size=1)
    assert 'val.bin' in message
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == 20


@pytest.mark.parametrize('eval_interval, figures', [(1, 'val_loss nan'),
                                                    (10, 'loss nan, grad_norm nan')])
def test_a_run_that_diverges_ends_in_one_line_and_saves_nothing_of_it(
        dataset, tmp_path, eval_interval, figures):
    settings = dict(TINY, optimizer='adamw', learning_rate=1e38, warmup_iters=0,
                    lr_schedule='constant')
    message = error_of(tmp_path, dataset, settings, eval_interval=eval_interval)
    assert f'step 1: {figures}: the run has diverged' in message
    assert f'Last good checkpoint: {tmp_path}, step 0' in message
    saved = [load_checkpoint(str(path)) for path in tmp_path.glob('*.pt')]
    assert [checkpoint['step'] for checkpoint in saved] == [0]
    assert all(tensor.isfinite().all() for tensor in saved[0]['model'].values())
    losses = list(values_of(tmp_path, 'loss').values())
    assert losses == [pytest.approx(math.log(VOCAB_SIZE), abs=0.1)]


def test_a_model_with_weights_that_are_not_finite_is_not_trained(full, dataset, tmp_path):
    checkpoint = load_checkpoint(str(full.folder))
    checkpoint['model']['wte.weight'][65, 3] = math.nan
    (tmp_path / 'bad').mkdir()
    torch.save(checkpoint, tmp_path / 'bad' / 'ckpt.pt')  # save_checkpoint refuses it
    message = error_of(tmp_path / 'run', dataset, init_from=tmp_path / 'bad')
    assert f'{tmp_path / "bad"}: wte.weight has values that are not finite' in message
    assert not (tmp_path / 'run').exists()


# -----------------------------------------------------------------------------
# Ranks

def test_two_ranks_train_as_one_does_through_a_kill_a_stop_and_a_resume_on_one_rank(
        one_rank, unprepared_in_project, tmp_path):
    settings = flags(CONSTANT, dataset=unprepared_in_project.name, out_dir=tmp_path, batch_size=8,
                     gradient_accumulation_steps=1)
    # The variable works around github.com/pytorch/pytorch/issues/135712.
    torchrun = start('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                     '--max-restarts=3', 'train.py', *settings,
                     env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})

    # 1. One rank is killed after the checkpoint of step 10. torchrun restarts both, and they resume
    # from it: the log is written again up to there.
    wait_for_steps(tmp_path, 12, torchrun)
    log = os.stat(tmp_path / 'log.jsonl').st_ino
    os.kill(process_of_rank(1, torchrun.pid), signal.SIGKILL)
    while os.stat(tmp_path / 'log.jsonl').st_ino == log:
        assert torchrun.poll() is None, finish(torchrun).stderr
        time.sleep(0.02)
    wait_for_steps(tmp_path, 15, torchrun)

    # 2. torchrun is asked to stop. Both ranks end the same step, and rank 0 saves and prints it.
    torchrun.terminate()
    result = finish(torchrun)
    assert result.returncode != 0
    assert result.stdout.count('preparing') == 1
    assert result.stdout.count('2 ranks') == 2
    assert result.stdout.count('step      0/100000 | loss') == 1
    step, = re.findall(r'stopped at step (\d+)', result.stdout)
    n_steps = int(step) + 3

    # 3. One rank resumes alone. All losses are those of a run on one rank that never stopped.
    resume_train(tmp_path, max_iters=n_steps)
    assert load_checkpoint(str(tmp_path))['step'] == n_steps
    losses = values_of(tmp_path, 'loss')
    expected = values_of(one_rank, 'loss')
    assert list(losses) == list(range(n_steps))
    n_common = min(60, n_steps)
    assert [losses[i] for i in range(n_common)] == pytest.approx(
        [expected[i] for i in range(n_common)], abs=1e-4)
    assert values_of(tmp_path, 'val_loss')[0] == pytest.approx(
        values_of(one_rank, 'val_loss')[0], abs=1e-6)


def test_a_batch_that_the_ranks_cannot_share_is_an_error_with_both_numbers(
        dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args: None)
    monkeypatch.setenv('WORLD_SIZE', '3')
    message = error_of(tmp_path, dataset)
    assert ('gradient_accumulation_steps * batch_size = 8 cannot be divided by 3 ranks; make it a '
            'multiple of 3') in message


# -----------------------------------------------------------------------------
# Data

@pytest.fixture
def error_of_damaged(dataset, tmp_path):
    """A function that changes a copy of the dataset, and returns the error of a run on it."""
    def error_of_damaged(change, **changed):
        folder = tmp_path / 'data'
        shutil.copytree(dataset, folder)
        change(folder)
        return error_of(tmp_path / 'run', folder, **changed)
    return error_of_damaged


def truncate(name, size):
    """A function that truncates a file of a folder."""
    return lambda folder: os.truncate(folder / name, size)


def edit_meta(**fields):
    """A function that changes fields of a folder's meta.json."""
    def edit(folder):
        path = folder / 'meta.json'
        meta = json.loads(path.read_text(encoding='utf-8'))
        path.write_text(json.dumps({**meta, **fields}), encoding='utf-8')
    return edit


@pytest.mark.parametrize('change, parts', [
    (truncate('train.bin', 2000), ['train.bin', '1,000', 'meta.json', 'train_tokens']),
    (truncate('train.bin', 2001), ['train.bin', 'meta.json', 'train_tokens']),
    (truncate('val.bin', 0), ['val.bin', 'holds 0 tokens', 'val_tokens']),
    (lambda folder: os.remove(folder / 'val.bin'), ['val.bin']),
    (edit_meta(dtype='uint32'), ['train.bin', 'uint32', 'train_tokens']),
    (edit_meta(val_tokens=7), ['val.bin', 'val_tokens 7']),
    (edit_meta(tokenizer={'name': 'byte', 'vocab_size': VOCAB_SIZE, 'fingerprint': 'other'}),
     ['tokenizer.json', 'fingerprint', 'meta.json']),
    (edit_meta(tokenizer={'fingerprint': 'other'}), ['meta.json', 'tokenizer.name is missing']),
    (edit_meta(tokenizer=None), ['meta.json', 'tokenizer must be an object']),
    (truncate('meta.json', 50), ['meta.json is damaged']),
    (truncate('tokenizer.json', 50), ['tokenizer.json', 'damaged']),
    (shutil.rmtree, ['no such dataset', 'shakespeare', 'data/text'])])
def test_files_of_a_dataset_that_disagree_are_named_with_the_field(
        error_of_damaged, change, parts):
    message = error_of_damaged(change)
    for part in parts:
        assert part in message


def test_a_dataset_shorter_than_a_block_is_an_error_with_both_lengths(error_of_damaged, dataset):
    n_tokens = os.path.getsize(dataset / 'val.bin') // 2
    message = error_of_damaged(lambda folder: None, block_size=n_tokens)
    assert (f'val.bin holds {n_tokens:,} tokens, but block_size {n_tokens} needs '
            f'{n_tokens + 1:,}') in message


@pytest.mark.parametrize('name', ['train', 'val'])
def test_a_token_id_beyond_the_vocabulary_is_named_with_its_file_and_offset(
        error_of_damaged, name):
    def change(folder):
        tokens = np.memmap(folder / f'{name}.bin', dtype='uint16', mode='r+')
        tokens[1000::8] = 60000  # so that every sequence has one
        tokens[1000] = 60001

    message = error_of_damaged(change)
    offset = int(re.search(r'offset (\d+)', message)[1])
    assert offset >= 1000 and offset % 8 == 0
    token = 60001 if offset == 1000 else 60000
    assert f'{name}.bin: token {token}' in message
    assert '261' in message


@pytest.fixture
def prepared(monkeypatch):
    """A list of the arguments of every prepare.py that a run starts. They run in this process."""
    calls = []

    def run(command):
        _, script, *arguments = command
        calls.append(arguments)
        return call(script, *arguments)

    monkeypatch.setattr(data.dataset, 'subprocess', types.SimpleNamespace(run=run))
    return calls


@pytest.mark.parametrize('given, tokenizer, vocab_size', [
    (dict(), 'bpe', 2048),
    (dict(vocab_size=512), 'bpe', 512),
    (dict(tokenizer='byte'), 'byte', 0),
    (dict(tokenizer='bpe', vocab_size=512), 'bpe', 512),
    (dict(dataset='text'), '', 0),
    (dict(dataset='text', vocab_size=512), '', 512),
    (dict(dataset='text', tokenizer='bpe'), 'bpe', 0)])
def test_the_default_tokenizer_is_that_of_the_default_dataset_only(given, tokenizer, vocab_size):
    defaults = dict(dataset=train.dataset, tokenizer=train.tokenizer, vocab_size=train.vocab_size)
    overrides = {name: f'--{name}={value}' for name, value in given.items()}
    chosen = train.choose_tokenizer(defaults | given, overrides)
    assert chosen == defaults | given | dict(tokenizer=tokenizer, vocab_size=vocab_size)


def test_a_dataset_is_prepared_if_it_is_missing_and_again_for_another_tokenizer(
        unprepared, tmp_path, prepared):
    settings = {}  # with which it was prepared last
    for changed, is_prepared in (
            (dict(), True),
            (dict(), False),
            (dict(tokenizer='bpe', vocab_size=300), True),
            (dict(tokenizer='bpe'), False),
            (dict(vocab_size=300), False),
            (dict(tokenizer='byte'), True)):
        # 1. It is prepared with its last settings, except for those that are given. A vocabulary
        # size belongs to its tokenizer.
        prepared.clear()
        if 'tokenizer' in changed:
            settings.pop('vocab_size', None)
        printed = run_train(tmp_path / 'run', 'mine', max_iters=0, **changed)
        expected = [sorted(flags(settings, **changed))] if is_prepared else []
        assert [sorted(arguments) for arguments in prepared] == expected
        assert ('preparing' in printed) == is_prepared

        # 2. Its tokenizer is the one that was asked for.
        meta = json.loads((unprepared / 'meta.json').read_text(encoding='utf-8'))
        settings = meta['settings']
        name = meta['tokenizer']['name']
        vocab_size = meta['tokenizer']['vocab_size']
        assert name == changed.get('tokenizer', name)
        assert vocab_size == changed.get('vocab_size', vocab_size)
        best = load_checkpoint(str(tmp_path / 'run' / 'ckpt_best.pt'))
        assert best['model_args']['vocab_size'] == vocab_size


def test_a_tokenizer_that_cannot_be_made_is_an_error(unprepared, tmp_path, prepared):
    message = error_of(tmp_path / 'run', 'mine', tokenizer='byte', vocab_size=300)
    assert 'meta.json' in message and '261' in message and '300' in message
    message = error_of(tmp_path / 'run', 'mine', tokenizer='no.json')
    assert 'is not byte, bpe, gpt2' in message


def test_a_resumed_run_prepares_its_own_tokens_again_if_the_data_has_others(unprepared, tmp_path):
    run_train(tmp_path / 'byte', 'mine', max_iters=1)
    run_train(tmp_path / 'bpe', 'mine', max_iters=1, tokenizer='bpe', vocab_size=300)
    printed = resume_train(tmp_path / 'byte', max_iters=2)
    assert 'preparing' in printed and f'--tokenizer={tmp_path}/byte/tokenizer.json' in printed
    assert load_checkpoint(str(tmp_path / 'byte'))['step'] == 2
    printed = resume_train(tmp_path / 'bpe', max_iters=2)
    assert f'--tokenizer={tmp_path}/bpe/tokenizer.json' in printed
    assert 'held another' not in printed


def test_a_run_continues_with_one_more_file_that_is_prepared_with_its_own_tokenizer(
        unprepared, tmp_path):
    run = tmp_path / 'run'
    run_train(run, 'mine', max_iters=1, tokenizer='bpe', vocab_size=300)
    before = json.loads((unprepared / 'meta.json').read_text())
    (unprepared / 'more.txt').write_text('some further words ' * 200)
    ok(call(unprepared / 'prepare.py', f'--input={unprepared}', f'--tokenizer={run}'))
    after = json.loads((unprepared / 'meta.json').read_text())
    assert after['train_tokens'] > before['train_tokens']
    assert after['tokenizer']['fingerprint'] == before['tokenizer']['fingerprint']
    assert 'preparing' not in resume_train(run, max_iters=2)
    assert json.loads((unprepared / 'meta.json').read_text()) == after
    assert load_checkpoint(str(run))['step'] == 2


def test_a_dataset_is_prepared_again_if_the_tokenizer_file_has_changed(unprepared):
    (unprepared / 'more.log').write_text('and four, and five ' * 20, encoding='utf-8')
    ok(call(unprepared / 'prepare.py', f'--input={unprepared}', '--ext=.txt,.log'))

    def read_meta():
        return json.loads((unprepared / 'meta.json').read_text(encoding='utf-8'))

    before = read_meta()
    file = str(unprepared / 'mine.json')
    for text in ('one two three ', 'and four, and five '):
        Tokenizer.train(text * 20, 270).save(file)
        load_dataset('mine', 8, file)
        meta = read_meta()
        assert meta['settings'] == before['settings'] | {'tokenizer': file}
        assert meta['val_bytes'] == before['val_bytes']  # so the same files were read
        assert meta['tokenizer']['fingerprint'] == Tokenizer.load(file).fingerprint

    # With an unchanged file nothing is written.
    with open(unprepared / 'meta.json') as f:
        written = os.fstat(f.fileno()).st_ino
    load_dataset('mine', 8, file)
    assert os.stat(unprepared / 'meta.json').st_ino == written
