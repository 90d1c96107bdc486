"""
What the scripts in assets/ promise: the comparison of runs and their curves (draw.py), the
attention maps (draw_attention.py), the distributions that are sampled from (draw_sampling.py), the
losses (draw_losses.py), and the pictures of the pipeline, of RoPE, of windows and their caches, of
merges, of schedules and of the loss mask. Independent of them: what matplotlib was given, the
outputs of the model's attention layers, formulas, and plain loops.
"""
import math
import sys

import pytest
import torch

from assets.draw import compare, draw_curves
from assets.draw_attention import attention_maps
from assets.draw_rope import at_position, pair_angles
from assets.draw_window import ring_slots, visible_positions
from assets.draw_mask import token_losses
from assets.draw_merges import final_figures, measure_merges, unigram_bits
from assets.draw_schedules import draw_schedules
from bpe import SPECIAL_TOKENS, Tokenizer
from assets.draw_losses import policy_curves, reward_curves
from configurator import Logger, save_checkpoint
from conftest import call, ok, one_line, story
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# draw.py


@pytest.fixture
def figures(monkeypatch):
    """A list to which every figure that matplotlib saves is added."""
    from matplotlib.figure import Figure
    saved = []
    savefig = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, 'savefig', record)
    return saved


def write_run(folder, losses, stage='train', **config):
    """Write the log and the checkpoint of a run with these losses and settings."""
    logger = Logger(str(folder), {})
    for step, loss in enumerate(losses):
        logger.log(step, {'loss': loss, 'lr': 0.1})
    logger.write({'final': {'val_loss': losses[-1], 'steps': len(losses), 'bad': math.nan}})
    save_checkpoint(folder, {
        'stage': stage, 'step': len(losses), 'model': {}, 'model_args': {}, 'optimizer': [],
        'tokenizer': {}, 'config': {'out_dir': str(folder), **config}})
    return str(folder)


def panels_of(figure):
    """{title of the panel: {label of the curve: (steps, values)}} of a figure."""
    panels = {}
    for axis in figure.axes:
        panels[axis.get_title()] = {
            line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist())
            for line in axis.lines}
    return panels


def test_the_curves_of_a_run_are_drawn_losses_first_without_values_that_are_not_finite(
        tmp_path, figures):
    import matplotlib.image
    folder = write_run(tmp_path / 'run', [3.0, 2.0, math.nan, 1.0])
    path = tmp_path / 'curves.png'
    draw_curves([folder], str(path))
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 500 and height > 100
    panels = panels_of(figures[0])
    assert list(panels) == ['loss', 'lr']
    assert panels['loss'] == {folder: ([0, 1, 3], [3.0, 2.0, 1.0])}


def test_a_number_of_seventy_digits_in_a_log_is_drawn(tmp_path, figures):
    number = '1' + 70 * '0'
    (tmp_path / 'log.jsonl').write_text(
        f'{{"step": 0, "loss": {number}}}\n{{"step": {number}, "loss": 1}}\n')
    draw_curves([str(tmp_path)], str(tmp_path / 'curves.png'))
    assert panels_of(figures[0])['loss'] == {str(tmp_path): ([0], [1e70])}


def test_the_axes_are_labelled_with_units(tmp_path, figures):
    folder = write_run(tmp_path / 'run', [3.0, 2.0])
    Logger(folder, {}, step=2).log(2, {'val_loss': 2.0, 'moe/layer_0/expert_0': 0.5})
    draw_curves([folder], str(tmp_path / 'curves.png'))
    labels = {axis.get_title(): axis.get_ylabel() for axis in figures[0].axes}
    assert labels == {'loss': 'nats', 'val_loss': 'nats per token', 'lr': 'learning rate',
                      'moe/layer_0': 'share of tokens'}
    assert all(axis.get_xlabel() == 'step' for axis in figures[0].axes)


def test_without_matplotlib_one_line_is_printed_and_nothing_is_drawn(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    path = tmp_path / 'curves.png'
    draw_curves([str(tmp_path)], str(path))
    assert capsys.readouterr().out == f'{path} not drawn: it needs pip install matplotlib\n'
    assert not path.exists()


def test_the_script_prints_the_settings_that_differ_next_to_the_results_and_draws(tmp_path):
    a = write_run(tmp_path / 'a', [3.0, 2.5], n_layer=2, seed=1, lr=0.1)
    b = write_run(tmp_path / 'b', [3.0, 2.25], n_layer=4, seed=1, lr=0.1)
    picture = tmp_path / 'both.png'
    printed = ok(call('assets/draw.py', a + '/', b, f'--out={picture}'))
    rows = [line.split() for line in printed.splitlines()]
    assert rows == [[a, b], ['n_layer', '2', '4'], ['---'] * 3, ['val_loss', '2.5', '2.25'],
                    ['steps', '2', '2'], ['bad', '-', '-']]
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_a_run_of_which_only_the_previous_checkpoint_is_left_is_compared(tmp_path):
    a = write_run(tmp_path / 'a', [3.0, 2.5], n_layer=2)
    b = write_run(tmp_path / 'b', [3.0, 2.25], n_layer=4)
    (tmp_path / 'b' / 'ckpt.pt').rename(tmp_path / 'b' / 'ckpt_prev.pt')
    printed = ok(call('assets/draw.py', a, b, f'--out={tmp_path / "both.png"}'))
    assert 'ckpt_prev.pt, step 2' in printed and 'n_layer' in printed


def test_the_script_without_folders_or_with_a_folder_without_a_run_is_an_error_of_one_line(
        tmp_path):
    run = write_run(tmp_path / 'a', [3.0])
    missing = tmp_path / 'missing'
    assert 'name the folders of the runs' in one_line(call('assets/draw.py'))
    error = one_line(call('assets/draw.py', run, missing))
    assert error == f'error: {missing}: no run there (no ckpt.pt)\n'


def test_runs_of_different_stages_are_compared_in_the_settings_that_they_share(
        tmp_path, capsys, figures):
    base = write_run(tmp_path / 'base', [3.0], stage='train', n_layer=2, seed=1, block_size=32)
    sft = write_run(tmp_path / 'sft', [2.0], stage='sft', n_layer=2, seed=2, test_draws=4)
    capsys.readouterr()
    compare([base, sft], str(tmp_path / 'both.png'))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[:4] == [[base, sft], ['stage', 'train', 'sft'], ['seed', '1', '2'], ['---'] * 3]
    # They differ in too much for a short label, so the curves are labelled by the folders.
    assert list(panels_of(figures[0])['loss']) == [base, sft]


def test_runs_that_differ_only_in_the_seed_are_one_curve_their_mean_in_a_band(tmp_path, figures):
    folders = [write_run(tmp_path / 'a', [3.0, 2.0], n_layer=2, seed=0),
               write_run(tmp_path / 'b', [4.0, 2.0], n_layer=2, seed=1),
               write_run(tmp_path / 'c', [1.0, 1.0], n_layer=3, seed=2)]
    compare(folders, str(tmp_path / 'all.png'))
    assert panels_of(figures[-1])['loss'] == {'n_layer 2': ([0, 1], [3.5, 2.0]),
                                              'n_layer 3': ([0, 1], [1.0, 1.0])}
    band = figures[-1].axes[0].collections[0].get_paths()[0].vertices
    at_step_0 = band[band[:, 0] == 0, 1]
    assert [at_step_0.min(), at_step_0.max()] == [3.0, 4.0]


def test_a_picture_shows_the_chosen_metrics_from_the_chosen_step(tmp_path, figures):
    folders = [write_run(tmp_path / str(i), [3.0, 2.0, 1.0 + i], n_layer=i) for i in range(2)]
    for folder in folders:
        Logger(folder, {}, step=3).log(3, {'moe/a/x': 1.0, 'moe/a/y': 2.0})
    compare(folders, str(tmp_path / 'few.png'), 'loss,moe/a/x', 1)
    assert panels_of(figures[-1]) == {
        'loss': {'n_layer 0': ([1, 2], [2.0, 1.0]), 'n_layer 1': ([1, 2], [2.0, 2.0])},
        'moe/a/x': {'n_layer 0': ([3], [1.0]), 'n_layer 1': ([3], [1.0])}}
    legend = figures[-1].axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ['n_layer 0', 'n_layer 1']


def test_the_experts_of_a_layer_share_one_panel_per_run_in_the_order_of_the_runs_on_one_scale(
        tmp_path, figures):
    folders = [write_run(tmp_path / str(i), [3.0, 2.0, 1.0], n_layer=i) for i in range(2)]
    for folder in folders:
        Logger(folder, {}, step=3).log(3, {'moe/a/x': 1.0, 'moe/a/y': 2.0})
    Logger(folders[0], {}, step=4).log(4, {'moe/a/x': 9.0})
    compare(folders[::-1], str(tmp_path / 'experts.png'), 'moe/a')
    panels = panels_of(figures[-1])
    assert list(panels) == ['moe/a (n_layer 1)', 'moe/a (n_layer 0)']
    assert panels['moe/a (n_layer 1)'] == {'x': ([3], [1.0]), 'y': ([3], [2.0])}
    lowest, highest = figures[-1].axes[0].get_ylim()
    assert lowest < 1 and highest > 9
    assert figures[-1].axes[1].get_ylim() == (lowest, highest)


def test_the_curves_are_named_by_the_labels_one_for_each_run(tmp_path, figures):
    folders = [write_run(tmp_path / str(i), [3.0, 2.0], n_layer=i) for i in range(2)]
    picture = str(tmp_path / 'named.png')
    compare(folders, picture, 'loss', labels='shallow,deep')
    assert list(panels_of(figures[-1])['loss']) == ['shallow', 'deep']
    with pytest.raises(ValueError, match='1 labels for 2 runs: deep'):
        compare(folders, picture, labels='deep')


def test_nothing_is_drawn_for_a_metric_that_is_not_logged(tmp_path, capsys):
    folder = write_run(tmp_path / 'run', [3.0])
    path = tmp_path / 'none.png'
    compare([folder], str(path), 'los')
    assert f'{path} not drawn: no los is logged from step 0 on' in capsys.readouterr().out
    assert not path.exists()


# -----------------------------------------------------------------------------
# draw_attention.py, draw_sampling.py and draw_pipeline.py

SMALL = dict(block_size=16, n_layer=2, n_head=4, n_embd=32)
ARCHITECTURES = {
    'rope': dict(pos='rope', qk_norm=False),
    'qk_norm': dict(pos='rope', qk_norm=True),
    'learned positions': dict(pos='learned', norm='layernorm', mlp='gelu', bias=True),
    'grouped queries': dict(pos='rope', n_kv_head=2),
    'window and sinks': dict(pos='rope', window=2, n_sink=1, attn='manual'),
    'encoder': dict(causal=False),
}


def test_attention_maps_are_rows_that_sum_to_one_and_never_look_ahead():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32))
    maps = attention_maps(model, [5, 6, 7, 8])
    assert len(maps) == 2 and all(weights.shape == (2, 4, 4) for weights in maps)
    for weights in maps:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4))
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize('flags', ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_attention_maps_times_values_are_the_output_of_the_models_own_attention(flags):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SMALL, **flags})).eval()
    with torch.no_grad():  # larger weights, so that the maps are far from uniform
        for block in model.h:
            block.attn.c_attn.weight.mul_(20)
    projections = []
    outputs = []
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda m, inputs, out: projections.append(out[0]))
        block.attn.register_forward_hook(lambda m, inputs, out: outputs.append(out[0]))
    ids = [5, 6, 7, 8, 5, 6, 9, 3]
    maps = attention_maps(model, ids)
    n_kv_head = flags.get('n_kv_head', 4)
    for block, weights, projection, output in zip(model.h, maps, projections, outputs):
        values = projection[:, -8 * n_kv_head:].view(len(ids), n_kv_head, 8).transpose(0, 1)
        values = values.repeat_interleave(4 // n_kv_head, dim=0)      # (nh, T, hs)
        heads = (weights @ values).transpose(0, 1).flatten(1)         # (T, nh * hs)
        assert torch.allclose(block.attn.c_proj(heads), output, atol=1e-5)


def test_a_text_longer_than_the_context_is_an_error():
    model = GPT(GPTConfig(**SMALL))
    with pytest.raises(ValueError, match='the text has 17 tokens'):
        attention_maps(model, [1] * 17)


def test_the_script_draws_the_maps_of_a_run(small_base, tmp_path):
    path = tmp_path / 'maps.png'
    printed = ok(call('assets/draw_attention.py', f'--out_dir={small_base}', f'--out={path}',
                      '--text=a rose'))
    assert printed.count('tokens back on average') == 4
    assert path.read_bytes().startswith(b'\x89PNG')


def test_each_panel_shows_what_is_predicted_and_what_is_sampled_from(
        small_base, tmp_path, figures):
    path = tmp_path / 'sampling.png'
    printed = ok(call('assets/draw_sampling.py', f'--out_dir={small_base}', '--text=a rose',
                      '--n_tokens=7', f'--out={path}'))
    assert 'top_k 5:   5 tokens allowed' in printed
    assert path.read_bytes().startswith(b'\x89PNG')
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    sampled, predicted = panels['temperature 1.0'].containers
    assert [bar.get_height() for bar in sampled] == [bar.get_height() for bar in predicted]
    sampled, _ = panels['top_k 5'].containers
    heights = [bar.get_height() for bar in sampled]
    assert sum(heights[:5]) == pytest.approx(1) and heights[5:] == [0, 0]


# -----------------------------------------------------------------------------
# draw_rope.py, draw_window.py and draw_pipeline.py


def test_the_arrows_of_rope_are_rotated_by_the_angle_per_position():
    x, y = at_position((3.0, 4.0), position=6, degrees=15)
    assert (x, y) == pytest.approx((-4.0, 3.0), abs=1e-5)             # 90 degrees


def test_the_first_pair_of_rope_turns_once_in_2_pi_positions_and_the_others_more_slowly():
    angles = pair_angles(GPTConfig(n_embd=64, n_head=4), n_positions=3)
    assert angles.shape == (8, 3)
    assert angles[0].tolist() == pytest.approx([0, 1 / (2 * math.pi), 2 / (2 * math.pi)])
    assert angles[4, 1].item() == pytest.approx(1 / (2 * math.pi * 100))


def test_the_drawn_cache_holds_what_the_drawn_mask_shows():
    seen = visible_positions(9, window=3, n_sink=1)
    held = ring_slots(9, window=3, n_sink=1)
    for token in range(9):
        expected = {0} | set(range(max(0, token - 2), token + 1))
        assert set(seen[token]) - {-1} == expected
        assert set(held[token]) - {-1} == expected
    assert held[8] == [0, 7, 8, 6]


@pytest.mark.parametrize('name', ['pipeline', 'rope', 'window'])
def test_the_script_draws_its_picture(name, tmp_path):
    path = tmp_path / f'{name}.png'
    ok(call(f'assets/draw_{name}.py', f'--out={path}'))
    assert path.read_bytes().startswith(b'\x89PNG')


def test_the_drawn_losses_and_gradients_are_those_of_the_formulas():
    curves = reward_curves()
    d, loss, gradient = curves['Bradley-Terry']
    assert torch.allclose(loss, (1 + (-d).exp()).log(), atol=1e-5)
    assert torch.allclose(gradient, -1 / (1 + d.exp()), atol=1e-5)
    d, loss, gradient = curves['margin ranking, margin 1']
    assert torch.allclose(loss, (1 - d).clamp(min=0), atol=1e-5)
    assert torch.equal(gradient[d < 0.99], torch.full_like(gradient[d < 0.99], -1))
    assert torch.equal(gradient[d > 1.01], torch.zeros_like(gradient[d > 1.01]))
    # A good token has no gradient above 1.2, a bad one has none below 0.8.
    for advantage, kept in (('+1', [-1, -1, 0]), ('-1', [0, 1, 1])):
        ratio, _, gradient = policy_curves()[f'advantage {advantage}']
        for value, slope in zip((0.6, 1.0, 1.4), kept):
            nearest = (ratio - value).abs().argmin()
            assert gradient[nearest].item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize('of', ['reward', 'policy'])
def test_the_script_draws_losses(of, tmp_path):
    path = tmp_path / 'losses.png'
    ok(call('assets/draw_losses.py', f'--of={of}', f'--out={path}'))
    assert path.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('script', ['attention', 'losses', 'merges', 'mask', 'pipeline', 'rope',
                                    'sampling', 'window'])
def test_the_scripts_name_matplotlib_if_it_is_missing(script, small_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.patches', None)
    args = [f'--out={tmp_path / "picture.png"}']
    if script in ('attention', 'mask', 'sampling'):
        args.append(f'--out_dir={small_base}')
    if script == 'merges':
        text = tmp_path / 'story.txt'
        text.write_text(story(), encoding='utf-8')
        args += [f'--input={text}', '--n_merges=1']
    assert 'pip install matplotlib' in one_line(call(f'assets/draw_{script}.py', *args))


# -----------------------------------------------------------------------------
# draw_merges.py and draw_mask.py


def test_the_cost_of_a_text_is_that_of_each_token_by_its_share_of_the_training_text():
    # shares of 6/8 and 2/8, since each of the two tokens is counted once more than it occurs
    bits = unigram_bits([5, 5, 5, 5, 5, 6], [5, 6, 6], vocab_size=2)
    assert bits == pytest.approx(-math.log2(6 / 8) - 2 * math.log2(2 / 8))


def test_each_merge_makes_tokens_longer_and_the_rows_are_those_of_tokenizers_of_that_size():
    text = 'the cat sat on the mat, and the other cat sat on the other mat. ' * 20
    rows = measure_merges(text, 16)
    assert [merges for merges, _, _, _ in rows] == [0, 1, 2, 4, 8, 16]
    lengths = [length for _, _, length, _ in rows]
    assert lengths == sorted(lengths) and lengths[0] == 1
    cut = len(text) * 9 // 10
    tokenizer = Tokenizer.train(text[:cut], 256 + 8 + len(SPECIAL_TOKENS))
    assert rows[4][1] == tokenizer.tokens[256 + 7]
    val = text[cut:]
    assert rows[4][2] == pytest.approx(len(val) / len(tokenizer.encode(val)))


def test_the_drawn_losses_are_the_terms_of_the_models_loss():
    model = GPT(GPTConfig(**SMALL))
    ids = [3, 1, 4, 1, 5, 9]
    _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    losses = token_losses(model, ids)
    assert losses.shape == (5,)
    assert losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)


def test_the_scripts_draw_the_merges_of_a_text_and_the_mask_of_a_chat(small_base, tmp_path):
    text = tmp_path / 'story.txt'
    text.write_text(story(), encoding='utf-8')
    merges = tmp_path / 'merges.png'
    printed = ok(call('assets/draw_merges.py', f'--input={text}', '--n_merges=4',
                      f'--out={merges}'))
    assert 'bits per byte' in printed
    mask = tmp_path / 'mask.png'
    printed = ok(call('assets/draw_mask.py', f'--out_dir={small_base}', '--chat=Hi?|Yes',
                      f'--out={mask}'))
    assert '4 are counted' in printed                                  # Yes and the end token
    for path in (merges, mask):
        assert path.read_bytes().startswith(b'\x89PNG')


def test_the_figures_of_a_trained_model_are_its_vocabulary_and_its_final_bits_per_byte(tmp_path):
    with pytest.raises(ValueError, match='no run of train.py that has ended'):
        final_figures(str(tmp_path))
    Logger(str(tmp_path), {}).write({'final': {'val_bpb': 2.5}})
    save_checkpoint(tmp_path, {'step': 1, 'model': {}, 'model_args': {'vocab_size': 512},
                               'config': {}})
    assert final_figures(str(tmp_path)) == (512, 2.5)


# -----------------------------------------------------------------------------
# draw_schedules.py


def write_linear_run(folder, warmup):
    """A run of four steps with the schedule 'linear'."""
    folder = write_run(folder, [3.0], learning_rate=0.5, max_iters=4, lr_schedule='linear',
                       warmup_iters=warmup)
    logger = Logger(folder, {}, 1)
    for step, loss in ((0, 5.0), (2, 4.0), (4, 3.0)):
        logger.log(step, {'val_loss': loss})
    return folder


def test_the_drawn_rates_and_losses_are_those_of_the_runs(tmp_path, figures):
    folders = [write_linear_run(tmp_path / f'warmup-{warmup}', warmup) for warmup in (0, 2)]
    draw_schedules(folders, str(tmp_path / 'pictures' / 'schedules.png'), first=2)
    rates, losses = panels_of(figures[0]).values()
    assert rates['linear, 0 steps of warm-up'][1] == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert rates['linear, 2 steps of warm-up'][1] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.25, 0])
    assert losses['linear, 2 steps of warm-up'] == ([2, 4], [4.0, 3.0])


def test_the_script_draws_the_schedules_of_the_runs_that_are_named(tmp_path):
    path = tmp_path / 'schedules.png'
    folder = write_linear_run(tmp_path / 'run', 2)
    ok(call('assets/draw_schedules.py', folder, f'--out={path}', '--first=0'))
    assert path.read_bytes().startswith(b'\x89PNG')
    problem = one_line(call('assets/draw_schedules.py', f'--out={path}'))
    assert 'name the folders of the runs' in problem
