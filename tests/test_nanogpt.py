"""
Config files written for nanoGPT, read after config/nanogpt.py, train what nanoGPT would train. The
references are nanoGPT's defaults, the values that its configs assign, its formulas written out
again, and the figures that it prints.
"""
import math
import os

import pytest
import torch

import train
from configurator import learning_rate_at, read_settings, run_config_file
from conftest import ROOT, call, flags, ok
from model import GPT, GPTConfig

NANOGPT = os.path.join(ROOT, 'config', 'nanogpt.py')

# nanoGPT's defaults. Those of the machine (device, dtype, compile) are left to 'auto' here.
DEFAULTS = dict(
    out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
    always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
    wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
    block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
    learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
    decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='nccl')

# What nanoGPT's configs assign.
CONFIGS = {
    'train_gpt2': dict(
        wandb_log=True, wandb_project='owt', wandb_run_name='gpt2-124M', batch_size=12,
        block_size=1024, gradient_accumulation_steps=40, max_iters=600000, lr_decay_iters=600000,
        eval_interval=1000, eval_iters=200, log_interval=10, weight_decay=0.1),
    'train_shakespeare_char': dict(
        out_dir='out-shakespeare-char', eval_interval=250, eval_iters=200, log_interval=10,
        always_save_checkpoint=False, wandb_log=False, wandb_project='shakespeare-char',
        wandb_run_name='mini-gpt', dataset='shakespeare_char', gradient_accumulation_steps=1,
        batch_size=64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
        learning_rate=1e-3, max_iters=5000, lr_decay_iters=5000, min_lr=1e-4, beta2=0.99,
        warmup_iters=100),
    'finetune_shakespeare': dict(
        out_dir='out-shakespeare', eval_interval=5, eval_iters=40, wandb_log=False,
        wandb_project='shakespeare', wandb_run_name='ft-1700000000.5', dataset='shakespeare',
        init_from='gpt2-xl', always_save_checkpoint=False, batch_size=1,
        gradient_accumulation_steps=32, max_iters=20, learning_rate=3e-5, decay_lr=False),
    'eval_gpt2': dict(
        batch_size=8, eval_iters=500, eval_only=True, wandb_log=False, init_from='gpt2'),
}

# The architectures of the pretrained models that they name; all have biases and 1,024 positions.
PRETRAINED = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=True),
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600, block_size=1024, bias=True),
}

# nanoGPT's vocabularies: GPT-2's is padded to 50,304 rows for a new model.
VOCABULARY = {'train_gpt2': 50304, 'train_shakespeare_char': 65, 'finetune_shakespeare': 50257,
              'eval_gpt2': 50257}

# The parameters that nanoGPT prints (without position embeddings), in millions, and its optimizer
# groups: tensors and parameters with weight decay, and without.
PRINTED = {
    'train_gpt2': ('123.59', (50, 124_354_560), (25, 19_200)),
    'train_shakespeare_char': ('10.65', (26, 10_740_096), (13, 4_992)),
    'finetune_shakespeare': ('1555.97', (194, 1_556_609_600), (386, 1_001_600)),
    'eval_gpt2': ('123.65', (50, 124_318_464), (98, 121_344)),
}


def settings_of(script):
    """{name: default} of the settings of train.py."""
    return {name: getattr(script, name) for name in read_settings(script.__file__)}


def write_config(path, **values):
    """Write a config file that assigns these values."""
    lines = [f'{name} = {value!r}\n' for name, value in values.items()]
    path.write_text(''.join(lines), encoding='utf-8')
    return path


def values_of(path, settings):
    """{name: value} of what a config file assigns, on top of these settings."""
    found = run_config_file(str(path), settings, settings_of(train))
    return {name: value for name, (value, _) in found.items()}


def read_config(name, tmp_path):
    """The settings of train.py after config/nanogpt.py and one of the configs."""
    path = write_config(tmp_path / f'{name}.py', **CONFIGS[name])
    settings = settings_of(train)
    settings.update(values_of(NANOGPT, settings))
    settings.update(values_of(path, settings))
    return settings


def model_of(name, config):
    """The model that a config trains, without memory for its parameters."""
    flags = {flag: config[flag] for flag in GPTConfig.__dataclass_fields__ if flag in config}
    flags['vocab_size'] = VOCABULARY[name]
    flags.update(PRETRAINED.get(config['init_from'], {}))
    with torch.device('meta'):
        return GPT(GPTConfig(**flags))


def shapes_of(name):
    """The shapes of nanoGPT's parameters, the tied output head counted once."""
    config = {**DEFAULTS, **CONFIGS[name]}
    config.update(PRETRAINED.get(config['init_from'], {}))
    C = config['n_embd']
    norm = [(C,)]
    bias = {False: [], True: [(C,)]}[config['bias']]
    shapes = [(VOCABULARY[name], C), (config['block_size'], C), *norm, *bias]
    for _ in range(config['n_layer']):
        shapes += [*norm, *bias, *norm, *bias]
        shapes += [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)]
        if config['bias']:
            shapes += [(3 * C,), (C,), (4 * C,), (C,)]
    return shapes


def nanogpt_learning_rate(step, config):
    """nanoGPT's schedule: linear warm-up, then a cosine; constant throughout if it is off."""
    top = config['learning_rate']
    low = config['min_lr']
    warmup = config['warmup_iters']
    end = config['lr_decay_iters']
    if not config['decay_lr']:
        return top
    if step < warmup:
        return top * (step + 1) / (warmup + 1)
    if step > end:
        return low
    progress = (step - warmup) / (end - warmup)
    return low + (top - low) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize('name', CONFIGS)
def test_every_setting_of_nanogpt_has_nanogpts_value(name, tmp_path):
    config = read_config(name, tmp_path)
    expected = {**DEFAULTS, **CONFIGS[name]}
    assert {key: config[key] for key in expected} == expected
    assert config['optimizer'] == 'adamw'


@pytest.mark.parametrize('name', CONFIGS)
def test_the_architecture_is_gpt2s(name, tmp_path):
    config = read_config(name, tmp_path)
    assert (config['norm'], config['pos'], config['mlp']) == ('layernorm', 'learned', 'gelu')
    assert config['tie_weights'] and not config['qk_norm']
    for flag in ('n_kv_head', 'head_dim', 'n_hidden', 'window', 'n_sink', 'n_expert'):
        assert config[flag] == 0, flag


@pytest.mark.parametrize('name', CONFIGS)
def test_the_parameters_are_as_many_as_nanogpts(name, tmp_path):
    model = model_of(name, read_config(name, tmp_path))
    expected = shapes_of(name)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(expected)
    total = sum(p.numel() for p in model.parameters())
    assert total == sum(math.prod(shape) for shape in expected)
    without_positions = total - model.wpe.weight.numel()
    assert f'{without_positions / 1e6:.2f}' == PRINTED[name][0]


@pytest.mark.parametrize('name', CONFIGS)
def test_the_optimizer_groups_are_nanogpts(name, tmp_path):
    config = read_config(name, tmp_path)
    model = model_of(name, config)
    optimizers = model.optimizers(config['optimizer'], config['learning_rate'],
                                  config['weight_decay'], (config['beta1'], config['beta2']))
    assert len(optimizers) == 1 and type(optimizers[0]) is torch.optim.AdamW
    decayed, not_decayed = optimizers[0].param_groups

    # 1. Matrices and embeddings decay; biases and norms do not.
    assert decayed['weight_decay'] == config['weight_decay'] and not_decayed['weight_decay'] == 0
    in_matrices = {id(p) for p in model.parameters() if p.dim() >= 2}
    others = {id(p) for p in model.parameters() if p.dim() < 2}
    assert {id(p) for p in decayed['params']} == in_matrices
    assert {id(p) for p in not_decayed['params']} == others

    # 2. The counts are those that nanoGPT prints.
    for group, expected in ((decayed, PRINTED[name][1]), (not_decayed, PRINTED[name][2])):
        parameters = sum(p.numel() for p in group['params'])
        assert (len(group['params']), parameters) == expected

    # 3. Both groups have the schedule's learning rate, with nanoGPT's moments and epsilon.
    for group in (decayed, not_decayed):
        assert group['lr'] == config['learning_rate']
        assert group['peak_lr'] == config['learning_rate']
        assert group['betas'] == (config['beta1'], config['beta2']) and group['eps'] == 1e-8


@pytest.mark.parametrize('name', CONFIGS)
def test_the_learning_rates_are_nanogpts(name, tmp_path):
    config = read_config(name, tmp_path)
    steps = {0, 1, 100, 101, 1999, 2000, 2001, 300_000, 5000, 5001, 600_000, 600_001}
    for step in sorted(steps):
        expected = nanogpt_learning_rate(step, {**DEFAULTS, **CONFIGS[name]})
        assert learning_rate_at(step, config) == pytest.approx(expected, rel=1e-9), step


@pytest.mark.parametrize('name, rates', [
    ('train_gpt2', [6e-4 / 2001, 6e-4 * 2 / 2001, 6e-4 * 101 / 2001]),
    ('train_shakespeare_char', [1e-3 / 101, 1e-3 * 2 / 101, 1e-3]),
    ('finetune_shakespeare', [3e-5, 3e-5, 3e-5]),
    ('eval_gpt2', [6e-4 / 2001, 6e-4 * 2 / 2001, 6e-4 * 101 / 2001])])
def test_the_learning_rates_at_steps_0_1_and_100_by_hand(name, rates, tmp_path):
    config = read_config(name, tmp_path)
    assert [learning_rate_at(step, config) for step in (0, 1, 100)] == pytest.approx(rates)


@pytest.mark.parametrize('name', ['train_gpt2', 'train_shakespeare_char'])
def test_our_config_of_the_same_name_trains_the_same(name, tmp_path):
    ours = settings_of(train)
    ours.update(values_of(os.path.join(ROOT, 'config', f'{name}.py'), ours))
    theirs = read_config(name, tmp_path)
    # These do not affect what is trained.
    for key in ('out_dir', 'wandb_log', 'wandb_project', 'wandb_run_name', 'sample_tokens',
                'tokenizer', 'vocab_size', 'device', 'dtype', 'compile'):
        ours.pop(key)
        theirs.pop(key)
    assert ours == theirs


CPU = dict(device='cpu', dtype='float32', compile=False)


def test_a_config_written_for_nanogpt_trains(tmp_path, dataset):
    theirs = write_config(tmp_path / 'theirs.py', n_layer=1, n_head=2, n_embd=16, block_size=16,
                          batch_size=2, gradient_accumulation_steps=2, max_iters=2, eval_iters=1)
    printed = ok(call('train.py', NANOGPT, theirs,
                      *flags(CPU, out_dir=tmp_path / 'run', dataset=dataset)))
    # The embedding of 261 bytes and 16 positions, the block's matrices, and three norms.
    expected = 261 * 16 + 16 * 16 + 12 * 16 * 16 + 3 * 16
    assert f'{expected:,} parameters' in printed


def test_a_model_named_by_init_from_keeps_its_own_architecture(tmp_path, dataset, small_base):
    from configurator import load_checkpoint
    theirs = write_config(tmp_path / 'theirs.py', init_from=str(small_base), eval_only=True,
                          batch_size=2, eval_iters=1, block_size=16)
    printed = ok(call('train.py', NANOGPT, theirs,
                      *flags(CPU, out_dir=tmp_path / 'run', dataset=dataset)))
    weights = load_checkpoint(str(small_base))['model']
    total = sum(w.numel() for name, w in weights.items() if name != 'lm_head.weight')
    assert f'{total:,} parameters' in printed
    line = f'the architecture of {NANOGPT} is ignored: {small_base} has its own'
    assert printed.splitlines().count(line) == 1


def test_a_config_may_import_modules_and_compute_with_nanogpts_defaults(tmp_path):
    path = tmp_path / 'theirs.py'
    path.write_text('import time\nwandb_run_name = "ft-" + str(time.time())\n'
                    'max_iters = 10 * warmup_iters\nmin_lr = learning_rate / 10\n',
                    encoding='utf-8')
    settings = settings_of(train)
    settings.update(values_of(NANOGPT, settings))
    changed = values_of(path, settings)
    assert changed.pop('wandb_run_name').startswith('ft-')
    assert changed == {'max_iters': 20_000, 'min_lr': pytest.approx(6e-5)}
