"""
What data/pretrained.py promises about Hugging Face folders, checkpoints and exports.

The independent references are transformers' own models and tokenizers, with small random weights.
Nothing is downloaded.
"""
import json
import os
import re
import shutil
import struct
import sys
from dataclasses import asdict, replace

os.environ['HF_HUB_OFFLINE'] = '1'
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from bpe import SPECIAL_TOKENS, Tokenizer, render_chat
from conftest import TINY, call, flags, ok, one_line, story
from data.pretrained import (
    build_model, config_from, export_problem, load_chat_model, load_model, load_pretrained,
    load_reward_model, resize_vocab, save_pretrained)
from model import GPT, GPTConfig, RewardModel, rope_frequencies
from test_bpe import random_strings

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Sizes that show a mix-up: they differ from each other and from all defaults.
SIZES = dict(vocab_size=301, hidden_size=36, intermediate_size=52, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=96,
             rms_norm_eps=3e-5, rope_theta=5000.0, bos_token_id=None, eos_token_id=None,
             pad_token_id=None)
GPT2_SIZES = dict(vocab_size=301, n_embd=36, n_layer=3, n_head=6, n_positions=96,
                  layer_norm_epsilon=3e-5, bos_token_id=None, eos_token_id=None)
# Frequencies on both sides of the interpolation, and one within it
LLAMA3 = {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
          'original_max_position_embeddings': 64}
THEIRS = {
    'gpt2': dict(GPT2_SIZES),
    'gpt2 untied, of another width': dict(GPT2_SIZES, n_inner=50, tie_word_embeddings=False),
    'llama': dict(SIZES),
    'llama tied, of another head size': dict(SIZES, head_dim=10, tie_word_embeddings=True),
    'llama with a key head for each head': dict(SIZES, num_key_value_heads=6),
    'llama with llama3 scaling': dict(SIZES, head_dim=16, rope_scaling=LLAMA3),
    'llama with linear scaling': dict(SIZES, rope_scaling={'type': 'linear', 'factor': 4.0}),
    'mistral': dict(SIZES, sliding_window=7),
    'mistral tied, without a window': dict(SIZES, sliding_window=None, tie_word_embeddings=True),
    'qwen2': dict(SIZES),
    'qwen2 tied': dict(SIZES, tie_word_embeddings=True),
    'qwen3': dict(SIZES, head_dim=14),
    'qwen3 tied': dict(SIZES, head_dim=6, tie_word_embeddings=True),
    'mixtral': dict(SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    'mixtral with a window': dict(SIZES, num_local_experts=3, num_experts_per_tok=3,
                                  sliding_window=5),
}
BASE = dict(vocab_size=301, n_embd=36, n_layer=3, n_head=6, block_size=96, norm_eps=3e-5,
            n_hidden=52, qk_norm=False)
MODERN = dict(BASE, n_kv_head=2, rope_base=5000.0, norm='rmsnorm', pos='rope', mlp='swiglu')
OLD = dict(BASE, norm='layernorm', pos='learned', mlp='gelu_tanh')
OURS = {
    'gpt2': dict(OLD, bias=True),
    'gpt2 without biases': dict(OLD, tie_weights=False),
    'gpt2 with biases of queries, keys and values': dict(OLD, qkv_bias=True),
    'llama': dict(MODERN),
    'llama untied, of another head size': dict(MODERN, tie_weights=False, head_dim=10),
    'llama with llama3 scaling': dict(
        MODERN, head_dim=16, rope_scaling='llama3', rope_factor=8.0, rope_original_context=64,
        rope_low_freq_factor=1.0, rope_high_freq_factor=4.0),
    'mistral': dict(MODERN, window=7),
    'mistral, for heads that do not divide n_embd': dict(MODERN, n_head=8, head_dim=10),
    'mistral with linear scaling': dict(MODERN, window=7, rope_scaling='linear', rope_factor=4.0),
    'qwen2': dict(MODERN, qkv_bias=True),
    'qwen3': dict(MODERN, qk_norm=True, head_dim=8),
    'mixtral': dict(MODERN, n_expert=5, n_expert_active=3),
    'mixtral with a window': dict(MODERN, n_expert=3, n_expert_active=2, window=5,
                                  tie_weights=False),
}
IDS = torch.randint(301, (2, 60), generator=torch.Generator().manual_seed(0))


def randomise(model, seed=0):
    """Random weights, large enough that every one matters, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            is_gain = p.dim() == 1 and p.mean() > 0.5
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + float(is_gain))
    return model.eval()


def their_model(name):
    config = AutoConfig.for_model(name.split()[0], **THEIRS[name])
    return randomise(AutoModelForCausalLM.from_config(config))


def our_model(**settings):
    return randomise(GPT(GPTConfig(**settings)))


@torch.no_grad()
def difference(ours, theirs, ids=IDS):
    return (ours(ids)[0] - theirs(ids).logits).abs().max().item()


def greedy_text_is_equal(ours, theirs, n=64):
    """Greedy continuation of two prompts, with both caches."""
    prompt = IDS[:, :11]
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n,
                               do_sample=False)
    assert expected.shape == (2, 11 + n)
    return torch.equal(ours.generate(prompt, n, temperature=0), expected)


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
    """The folder of a model that transformers has saved; change(folder) works on a copy of it."""
    folders = {}

    def folder_of(name, change=None):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp('theirs') / 'model'
            their_model(name).save_pretrained(folders[name])
        if change is None:
            return folders[name]
        copy = tmp_path_factory.mktemp('changed') / 'model'
        shutil.copytree(folders[name], copy)
        change(copy)
        return copy
    return folder_of


def read(folder, name):
    return json.loads((folder / name).read_text(encoding='utf-8'))


def edit(name='config.json', **keys):
    """A change to a JSON file of the folder."""
    def change(folder):
        content = read(folder, name) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**content, **keys}), encoding='utf-8')
    return change


def rewrite(function):
    """A change to the tensors of the folder's file."""
    def change(folder):
        tensors = safetensors.torch.load_file(folder / 'model.safetensors')
        safetensors.torch.save_file(function(tensors), folder / 'model.safetensors',
                                    {'format': 'pt'})
    return change


# Reading

@pytest.mark.parametrize('name', THEIRS)
def test_a_model_saved_by_transformers_gives_its_logits_and_its_greedy_text(name, folder_of):
    ours = load_pretrained(str(folder_of(name))).eval()
    theirs = their_model(name)
    assert theirs(IDS).logits.std() > 0.3
    assert difference(ours, theirs) < 1e-4
    assert greedy_text_is_equal(ours, theirs)


def test_the_window_of_mistral_makes_a_difference(folder_of):
    wide = load_pretrained(folder_of('mistral', edit(sliding_window=None))).eval()
    assert difference(wide, their_model('mistral'), IDS[:, :7]) < 1e-4
    assert difference(wide, their_model('mistral')) > 0.1


def test_a_window_beyond_the_context_is_the_context(folder_of):
    folder = folder_of('mistral', edit(sliding_window=4096))
    config = load_pretrained(folder).config
    assert (config.window, config.block_size) == (96, 96)
    longer = load_pretrained(folder, block_size=200).config
    assert (longer.window, longer.block_size) == (200, 200)


@pytest.mark.parametrize('rope', [
    {'rope_theta': 5000.0},
    {'rope_theta': 5000, 'rope_scaling': None},
    {'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'}},
    {'rope_theta': 5000.0, 'rope_scaling': {'type': 'default'}},
    {'rope_theta': 1.0, 'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'}}])
def test_the_base_of_rope_is_read_in_its_older_and_its_newer_place(rope):
    settings = {key: value for key, value in SIZES.items() if key != 'rope_theta'}
    settings |= {'model_type': 'llama'} | rope
    assert config_from(settings).rope_base == 5000
    assert AutoConfig.for_model(**settings).rope_parameters['rope_theta'] == 5000


@pytest.mark.parametrize('name', ['llama with llama3 scaling', 'llama with linear scaling'])
@pytest.mark.parametrize('place', ['rope_scaling', 'rope_parameters'])
def test_scaled_rope_frequencies_equal_those_of_transformers(name, place):
    settings = {'model_type': 'llama'} | THEIRS[name]
    scaling = settings.pop('rope_scaling')
    if place == 'rope_parameters':
        scaling = scaling | {'rope_theta': settings.pop('rope_theta')}
    ours = config_from(settings | {place: scaling})
    expected = their_model(name).model.rotary_emb.inv_freq
    assert torch.allclose(rope_frequencies(ours).float(), expected, rtol=1e-6)
    plain = rope_frequencies(replace(ours, rope_scaling='')).float()
    assert not torch.allclose(plain, expected, rtol=0.1)
    if name == 'llama with llama3 scaling':  # kept, interpolated and divided
        ratio = plain / expected
        assert (ratio == 1).any() and (ratio > 7.9).any() and ((ratio > 1.1) & (ratio < 7)).any()


def test_llama3_scaling_without_its_original_context_takes_the_context_as_transformers_does():
    scaling = {k: v for k, v in LLAMA3.items() if k != 'original_max_position_embeddings'}
    settings = dict(SIZES, model_type='llama', rope_scaling=scaling)
    assert config_from(settings).rope_original_context == 96
    theirs = AutoConfig.for_model(**settings)
    assert theirs.rope_parameters['original_max_position_embeddings'] == 96


@pytest.mark.parametrize('scaling', [
    {'type': 'linear', 'factor': 1.0}, {'rope_type': 'linear', 'factor': 1},
    dict(LLAMA3, factor=1.0)])
def test_a_rope_scaling_by_1_is_none(scaling):
    settings = dict(SIZES, model_type='llama', rope_scaling=scaling)
    assert config_from(settings) == config_from(settings | {'rope_scaling': None})


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral'])
def test_missing_keys_mean_what_they_mean_to_transformers(kind):
    settings = dict(SIZES, max_position_embeddings=9999)
    if kind == 'gpt2':
        settings = dict(GPT2_SIZES, n_positions=9999)
    left_out = ('token_id', 'theta', 'eps', 'epsilon')
    settings = {k: v for k, v in settings.items() if not k.endswith(left_out)}
    ours = config_from({'model_type': kind, **settings})
    theirs = AutoConfig.for_model(kind, **settings)
    assert (ours.tie_weights, ours.block_size) == (theirs.tie_word_embeddings, 9999)
    if kind == 'gpt2':
        assert ours.norm_eps == theirs.layer_norm_epsilon
    else:
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.rope_base == theirs.rope_parameters['rope_theta']
        assert ours.window == (getattr(theirs, 'sliding_window', None) or 0)


def test_shards_are_read_like_one_file(folder_of, tmp_path):
    their_model('qwen3').save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 3
    assert not (tmp_path / 'model.safetensors').exists()
    whole = load_pretrained(folder_of('qwen3')).state_dict()
    pieces = load_pretrained(tmp_path).state_dict()
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_missing_shard_is_named(tmp_path):
    their_model('qwen3').save_pretrained(tmp_path, max_shard_size='20KB')
    shard = sorted(tmp_path.glob('*.safetensors'))[2].name
    os.remove(tmp_path / shard)
    message = f'{tmp_path}: missing shard: {shard} .listed in .*index.json'
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def dtypes_of(model):
    return {p.dtype for p in model.parameters()}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['gpt2', 'qwen3', 'mixtral'])
def test_half_precision_is_kept_or_widened_as_asked(name, dtype, folder_of, tmp_path):
    their_model(name).to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kept = load_pretrained(tmp_path).eval()
    wide = load_pretrained(tmp_path, torch.float32).eval()
    assert dtypes_of(kept) == {dtype} and dtypes_of(wide) == {torch.float32}
    assert difference(wide, theirs) < 1e-4
    with torch.no_grad():
        assert (kept(IDS)[0] - wide(IDS)[0]).abs().mean() < 0.1
    save_pretrained(kept, tmp_path / 'again')
    again = load_pretrained(tmp_path / 'again').state_dict()
    for key, p in kept.state_dict().items():
        assert torch.equal(p, again[key]) and again[key].dtype == dtype


def test_a_file_of_two_precisions_is_read_in_float32_exactly(folder_of):
    def half(tensors):
        return {k: t if 'norm' in k else t.bfloat16() for k, t in tensors.items()}
    model = load_pretrained(folder_of('llama', rewrite(half)))
    exact = load_pretrained(folder_of('llama'))
    assert dtypes_of(model) == {torch.float32}
    assert torch.equal(model.wte.weight, exact.wte.weight.bfloat16().float())
    assert torch.equal(model.ln_f.weight, exact.ln_f.weight)


def test_flags_that_change_no_weight_can_be_given(folder_of):
    config = load_pretrained(folder_of('llama'), block_size=24, dropout=0.1, attn='manual').config
    assert (config.block_size, config.dropout, config.attn) == (24, 0.1, 'manual')


def test_the_published_gpt2_has_no_prefix_and_holds_the_mask(folder_of):
    def published(tensors):
        masks = {}
        for layer in range(3):
            masks[f'h.{layer}.attn.bias'] = torch.ones(96, 96).tril()[None, None].clone()
        return {k.removeprefix('transformer.'): t for k, t in tensors.items()} | masks
    ours = load_pretrained(folder_of('gpt2', rewrite(published))).eval()
    assert difference(ours, their_model('gpt2')) < 1e-4


def test_an_old_llama_holds_the_table_of_rope(folder_of):
    table = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(3)}
    load_pretrained(folder_of('llama', rewrite(lambda tensors: tensors | table)))


def test_a_tied_head_may_be_in_the_file_too_if_it_is_the_embedding(folder_of):
    def with_head(factor):
        return rewrite(lambda tensors: tensors | {
            'lm_head.weight': factor * tensors['model.embed_tokens.weight']})
    model = load_pretrained(folder_of('qwen3 tied', with_head(1)))
    assert model.lm_head.weight is model.wte.weight
    with pytest.raises(ValueError, match='lm_head.weight is not equal to the embedding'):
        load_pretrained(folder_of('qwen3 tied', with_head(2)))


# The config.json of published models, from memory; only the sizes are ours.
TINY_SIZES = dict(hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
                  num_key_value_heads=2, vocab_size=301, max_position_embeddings=96)
PUBLISHED = {
    'gpt2': {
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1,
        'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02,
        'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 96, 'n_embd': 36, 'n_head': 6,
        'n_layer': 2, 'n_positions': 96, 'resid_pdrop': 0.1, 'summary_activation': None,
        'summary_first_dropout': 0.1, 'summary_proj_to_labels': True, 'summary_type': 'cls_index',
        'summary_use_proj': True, 'task_specific_params': {'text-generation': {'do_sample': True,
        'max_length': 50}}, 'vocab_size': 301},
    'gpt2-medium': {
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1,
        'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02,
        'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 96, 'n_embd': 36, 'n_head': 6,
        'n_layer': 2, 'n_positions': 96, 'n_special': 0, 'predict_special_tokens': True,
        'resid_pdrop': 0.1, 'summary_activation': None, 'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True, 'summary_type': 'cls_index', 'summary_use_proj': True,
        'vocab_size': 301},
    'SmolLM2-135M': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu', 'initializer_range':
        0.041666666666666664, 'is_llama_config': True, 'model_type': 'llama', 'pretraining_tp': 1,
        'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None, 'rope_theta':
        100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version':
        '4.40.1', 'use_cache': True},
    'SmolLM2-135M-Instruct': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range':
        0.041666666666666664, 'is_llama_config': True, 'mlp_bias': False, 'model_type': 'llama',
        'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False,
        'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype':
        'bfloat16', 'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
        'transformers_version': '4.42.3', 'use_cache': True},
    'TinyLlama-1.1B': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'llama',
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': None, 'rope_theta': 10000.0,
        'tie_word_embeddings': False, 'torch_dtype': 'bfloat16', 'transformers_version': '4.35.0',
        'use_cache': True},
    'Meta-Llama-3-8B': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 128000, 'eos_token_id': 128001, 'hidden_act': 'silu', 'initializer_range':
        0.02, 'model_type': 'llama', 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling':
        None, 'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.0.dev0', 'use_cache': True},
    'distilgpt2, as saved with labels': {
        '_num_labels': 1, 'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'],
        'attn_pdrop': 0.1, 'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256,
        'id2label': {'0': 'LABEL_0'}, 'initializer_range': 0.02, 'label2id': {'LABEL_0': 0},
        'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 96, 'n_embd': 36, 'n_head': 6,
        'n_layer': 2, 'n_positions': 96, 'resid_pdrop': 0.1, 'summary_activation': None,
        'summary_first_dropout': 0.1, 'summary_proj_to_labels': True, 'summary_type': 'cls_index',
        'summary_use_proj': True, 'vocab_size': 301, 'task_specific_params': {'text-generation':
        {'do_sample': True, 'max_length': 50}}},
    'a fine-tuned SmolLM2, with keys of its trainers': TINY_SIZES | {
        '_model_name_or_path': 'some/name', '_name_or_path': 'x', 'architectures':
        ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range': 0.041666666666666664,
        'is_llama_config': True, 'mlp_bias': False, 'model_type': 'llama', 'pad_token_id': 2,
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False, 'rope_scaling': None,
        'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers.js_config': {'kv_cache_dtype': {'q4f16': 'float16'}}, 'transformers_version':
        '4.42.3', 'use_cache': True, 'gradient_checkpointing': False, 'output_attentions': False,
        'output_hidden_states': False, 'torchscript': False, 'use_bfloat16': False, 'is_decoder':
        False, 'return_dict': True, 'unsloth_fixed': True, 'unsloth_version': '2024.9',
        'quantization_config': None, 'pruned_heads': {}, 'problem_type': None, 'finetuning_task':
        None, 'a_key_of_next_year': [1, {'x': None}]},
    'Llama-3.2-1B': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 128000, 'eos_token_id': [128001, 128008, 128009], 'head_dim': 16,
        'hidden_act': 'silu', 'initializer_range': 0.02, 'mlp_bias': False, 'model_type': 'llama',
        'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': {'factor': 32.0,
        'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 32,
        'rope_type': 'llama3'}, 'rope_theta': 500000.0, 'tie_word_embeddings': True, 'torch_dtype':
        'bfloat16', 'transformers_version': '4.45.0.dev0', 'use_cache': True},
    'Mistral-7B-v0.1': TINY_SIZES | {
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act':
        'silu', 'initializer_range': 0.02, 'model_type': 'mistral', 'rms_norm_eps': 1e-05,
        'rope_theta': 10000.0, 'sliding_window': 9, 'tie_word_embeddings': False, 'torch_dtype':
        'bfloat16', 'transformers_version': '4.34.0.dev0', 'use_cache': True},
    'Mistral-7B-v0.3': TINY_SIZES | {
        'architectures': ['MistralForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'mistral',
        'rms_norm_eps': 1e-05, 'rope_theta': 1000000.0, 'sliding_window': None,
        'tie_word_embeddings': False, 'torch_dtype': 'bfloat16', 'transformers_version':
        '4.42.0.dev0', 'use_cache': True},
    'Qwen2-0.5B': TINY_SIZES | {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151643, 'hidden_act': 'silu', 'initializer_range': 0.02,
        'max_window_layers': 24, 'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta':
        1000000.0, 'sliding_window': 131072, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.1', 'use_cache': True, 'use_sliding_window': False},
    'Qwen2.5-0.5B': TINY_SIZES | {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151643, 'hidden_act': 'silu', 'initializer_range': 0.02,
        'max_window_layers': 24, 'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta':
        1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.1', 'use_cache': True, 'use_mrope': False,
        'use_sliding_window': False},
    'Qwen3-0.6B': TINY_SIZES | {
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 151643, 'eos_token_id': 151645, 'head_dim': 16, 'hidden_act': 'silu',
        'initializer_range': 0.02, 'max_window_layers': 28, 'model_type': 'qwen3', 'rms_norm_eps':
        1e-06, 'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0',
        'use_cache': True, 'use_sliding_window': False},
    'Mixtral-8x7B-v0.1': TINY_SIZES | {
        'architectures': ['MixtralForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'mixtral',
        'num_experts_per_tok': 2, 'num_local_experts': 4, 'output_router_logits': False,
        'rms_norm_eps': 1e-05, 'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.02,
        'sliding_window': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.36.0.dev0', 'use_cache': True},
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_config_of_a_published_model_is_read_as_transformers_reads_it(name, tmp_path):
    published = PUBLISHED[name]
    config = AutoConfig.for_model(**published)
    theirs = randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(published))
    assert difference(load_pretrained(tmp_path).eval(), theirs) < 1e-4


# Writing

@pytest.mark.parametrize('name', OURS)
def test_transformers_opens_an_export_with_our_logits_and_our_greedy_text(name, tmp_path):
    ours = our_model(**OURS[name])
    save_pretrained(ours, tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.model_type == name.split()[0].rstrip(',')
    assert type(theirs).__name__ == theirs.config.architectures[0]
    assert theirs.dtype == torch.float32
    assert difference(ours, theirs.eval()) < 1e-4
    assert greedy_text_is_equal(ours, theirs)


@pytest.mark.parametrize('name', OURS)
def test_an_export_is_loaded_again_to_the_bit(name, tmp_path):
    ours = our_model(**OURS[name])
    save_pretrained(ours, tmp_path)
    again = load_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS)[0], ours(IDS)[0])
    if ours.config.pos == 'rope':  # a gpt2 comes back with biases of 0
        assert again.config.resolved() == ours.config.resolved()
    state = again.state_dict()
    assert all(torch.equal(state[key], p) for key, p in ours.state_dict().items())
    assert all(not state[key].any() for key in state.keys() - ours.state_dict().keys())


@pytest.mark.parametrize('problem, settings', [
    ("mlp='relu2'", dict(mlp='relu2', qk_norm=True)),
    ("mlp='gelu'", dict(mlp='gelu')),
    ('bias=True', dict(bias=True)),
    ("pos='sinusoidal'", dict(pos='sinusoidal')),
    ("norm='layernorm'", dict(norm='layernorm')),
    ("norm='rmsnorm'", dict(pos='learned', mlp='gelu')),
    ('n_sink=2', dict(window=8, n_sink=2)),
    ('causal=False', dict(causal=False)),
    ('moe_every=3', dict(n_expert=4, moe_every=3)),
    ('n_shared_expert=1', dict(n_expert=4, n_shared_expert=1)),
    ("moe_balance='bias'", dict(n_expert=4, moe_balance='bias')),
    ('window=8', dict(qk_norm=True, window=8)),
    ('qkv_bias=True', dict(qk_norm=True, qkv_bias=True)),
    ('qk_norm=True', dict(n_expert=4, qk_norm=True)),
    ('n_kv_head=2', dict(OLD, n_kv_head=2)),
    ('head_dim=10', dict(OLD, head_dim=10)),
    ('window=8', dict(OLD, window=8)),
    ('qk_norm=True', dict(OLD, qk_norm=True))])
def test_settings_that_no_family_has_are_named(problem, settings, tmp_path):
    config = GPTConfig(**dict(MODERN, n_kv_head=6) | settings)
    assert problem in export_problem(config)
    with pytest.raises(ValueError, match=f'no Hugging Face family has .*{problem}'):
        save_pretrained(randomise(GPT(config)), tmp_path / 'model')
    assert not (tmp_path / 'model').exists()


def test_a_config_that_can_be_exported_has_no_export_problem():
    for settings in OURS.values():
        assert export_problem(GPTConfig(**settings)) == ''
    assert export_problem(GPTConfig()) == ''
    assert export_problem(GPTConfig(dropout=0.2, attn='manual')) == ''
    assert export_problem(GPTConfig(rope_scaling='linear', rope_factor=1.0)) == ''
    assert export_problem(GPTConfig(mlp='relu2')) == "mlp='relu2'"


def test_one_active_expert_is_refused_because_mixtral_weights_it_otherwise(folder_of, tmp_path):
    with pytest.raises(ValueError, match='n_expert_active=1'):
        load_pretrained(folder_of('mixtral', edit(num_experts_per_tok=1)))
    several = our_model(**dict(MODERN, n_expert=4, n_expert_active=1))
    with pytest.raises(ValueError, match='n_expert_active=1'):
        save_pretrained(several, tmp_path / 'model')
    # the gate weight of a single expert is 1 in both
    single = our_model(**dict(MODERN, n_expert=1, n_expert_active=1, moe_balance='none'))
    save_pretrained(single, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(load_pretrained(tmp_path), theirs) < 1e-4


def test_an_export_writes_all_files_and_replaces_those_of_another_export(tmp_path):
    tokenizer = Tokenizer.train(story(), 301)
    ours = our_model(**OURS['llama'])
    save_pretrained(our_model(**OURS['qwen3']), tmp_path, tokenizer)
    save_pretrained(ours, tmp_path, tokenizer)
    assert set(os.listdir(tmp_path)) == {
        'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json',
        'tokenizer_config.json'}
    assert torch.equal(load_pretrained(tmp_path).wte.weight, ours.wte.weight)
    # who may read one of the files may read all of them
    assert len({(tmp_path / name).stat().st_mode for name in os.listdir(tmp_path)}) == 1


def test_an_export_answers_chats_in_the_pipeline_of_transformers(tmp_path):
    tokenizer = Tokenizer.byte()
    ours = our_model(**dict(OURS['llama'], vocab_size=tokenizer.vocab_size))
    save_pretrained(ours, tmp_path, tokenizer)
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi né'}]
    ids, _ = render_chat(messages, tokenizer)
    stop = [tokenizer.special['<|endoftext|>'], tokenizer.special['<|end|>']]
    pipe = pipeline('text-generation', model=str(tmp_path), device='cpu')
    rendered = pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True,
                                                  return_dict=False)
    assert rendered == ids
    chat = pipe(messages, max_new_tokens=30, do_sample=False)[0]['generated_text']
    assert chat[:2] == messages and chat[2]['role'] == 'assistant'
    response = ours.generate(torch.tensor([ids]), 30, temperature=0, stop=stop)[0, len(ids):]
    kept = [id for id in response.tolist() if id not in tokenizer.special.values()]
    assert len(kept) > 5
    assert chat[2]['content'].strip() == tokenizer.decode(kept).strip()


# Tokenizers

def check_tokenizers(ours, theirs):
    assert len(theirs) == ours.vocab_size
    for text in [*random_strings(300), '<|user|>né?<|end|><|assistant|>']:
        ids = ours.encode(text, special=True)
        assert theirs(text)['input_ids'] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


@pytest.mark.parametrize('name', [name for name in OURS if name.split()[0] != 'qwen2'])
@pytest.mark.parametrize('pattern', ['digits', 'llama3'])
def test_the_tokenizer_of_an_export_gives_our_ids(name, pattern, tmp_path):
    tokenizer = Tokenizer.train(story(), 290, pattern)
    save_pretrained(our_model(**OURS[name]), tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_tokenizers(tokenizer, theirs)
    assert theirs.eos_token == '<|endoftext|>' and theirs.pad_token == '<|pad|>'
    assert theirs.model_max_length == 96
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    special = tokenizer.special
    assert model.generation_config.eos_token_id == [special['<|endoftext|>'], special['<|end|>']]
    assert model.generation_config.pad_token_id == special['<|pad|>']


def test_a_qwen2_has_the_tokenizer_that_transformers_gives_every_qwen2(tmp_path):
    model = our_model(**OURS['qwen2'])
    qwen = Tokenizer.train(story(), 290, 'qwen2')
    qwen.normalizer = 'NFC'
    save_pretrained(model, tmp_path, qwen)
    check_tokenizers(qwen, AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="as Qwen's tokenizer does"):
        save_pretrained(model, tmp_path, Tokenizer.train(story(), 290))


# EOS

def test_without_a_tokenizer_an_export_has_no_eos(tmp_path):
    save_pretrained(our_model(**OURS['llama']), tmp_path)  # transformers' default for a llama is 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id is None


@pytest.mark.parametrize('in_config, in_generation_config, eos_ids', [
    (7, None, [7]), ([5, 7], None, [5, 7]), (None, 3, [3]), (5, [7, 5, 3], [5, 7, 3]),
    (2, 99999, [2]),  # an id that the tokenizer does not have
    (None, None, [256, 259])])  # our own <|endoftext|> and <|end|>
def test_every_eos_of_a_folder_is_read_and_written(in_config, in_generation_config, eos_ids,
                                                   with_tokenizer, tmp_path):
    folder, _ = with_tokenizer
    shutil.copytree(folder, tmp_path / 'model')
    edit('config.json', eos_token_id=in_config)(tmp_path / 'model')
    edit('generation_config.json', eos_token_id=in_generation_config)(tmp_path / 'model')
    model, tok = load_model(str(tmp_path / 'model'), {})
    assert tok.eos_ids == eos_ids
    save_pretrained(model, tmp_path / 'again', tok)
    assert read(tmp_path / 'again', 'config.json')['eos_token_id'] == eos_ids
    assert read(tmp_path / 'again', 'generation_config.json')['eos_token_id'] == eos_ids
    assert load_model(str(tmp_path / 'again'), {})[1].eos_ids == eos_ids


@pytest.mark.parametrize('eos', ['</s>', -1, [True], {'id': 3}])
def test_an_eos_that_is_no_id_is_refused(eos, with_tokenizer, tmp_path):
    shutil.copytree(with_tokenizer[0], tmp_path, dirs_exist_ok=True)
    edit('generation_config.json', eos_token_id=eos)(tmp_path)
    with pytest.raises(ValueError, match='an EOS id must be a whole number'):
        load_model(str(tmp_path), {})


def test_the_eos_token_of_an_export_is_the_first_eos_of_its_model(tmp_path):
    names = {'<|endoftext|>': 256, '<|im_start|>': 257, '<|im_end|>': 258}
    tok = Tokenizer({byte: bytes([byte]) for byte in range(256)}, special=names)
    tok.eos_ids = [258, 256]
    save_pretrained(our_model(**OURS['llama']), tmp_path, tok)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == '<|im_end|>'


def test_a_checkpoint_carries_its_eos_ids():
    assert load_model(checkpoint_of(), {})[1].eos_ids == [256, 259]
    assert load_model(checkpoint_of() | {'eos_ids': [7, 256]}, {})[1].eos_ids == [7, 256]
    model, tok = load_chat_model(checkpoint_of() | {'eos_ids': [7]}, {})
    assert tok.eos_ids == [7, 259]  # the end of a response is an EOS too


# What is refused

@pytest.mark.parametrize('name, keys, message', [
    ('llama', dict(model_type='gemma'),
     "model_type 'gemma' is not one of gpt2, llama, qwen2, qwen3, mistral, mixtral"),
    ('llama', dict(model_type=None), 'model_type None is not one of'),
    ('llama', dict(model_type=['llama']), r"model_type \['llama'\] is not one of"),
    ('llama', dict(rope_parameters={'rope_theta': 1e4, 'rope_type': 'llama3', 'factor': 8.0}),
     'rope_parameters of type llama3 needs low_freq_factor'),
    ('llama', dict(rope_scaling=dict(LLAMA3, low_freq_factor=4.0)),
     'high_freq_factor must be above low_freq_factor'),
    ('llama', dict(rope_scaling=dict(LLAMA3, factor='8')), "factor must be of type float; got '8'"),
    ('llama', dict(rope_scaling={'type': 'linear', 'factor': 0}), 'factor must be above 0; got 0'),
    ('llama', dict(rope_scaling={'type': 'linear'}), 'rope_scaling of type linear needs factor'),
    ('llama', dict(rope_scaling=[4.0]), r'rope_scaling must be an object; got \[4.0\]'),
    ('qwen3', dict(rope_scaling={'type': 'yarn', 'factor': 4.0}),
     'rope_scaling of type yarn is not supported'),
    ('llama', dict(rope_parameters={'rope_type': 'dynamic', 'factor': 2.0}),
     'rope_parameters of type dynamic is not supported'),
    ('qwen2', dict(rope_scaling={'type': 'default', 'mrope_section': [2, 2, 2]}),
     r'rope_scaling with mrope_section=\[2, 2, 2\] is not supported'),
    ('llama', dict(rope_parameters={'full_attention': {'rope_type': 'default'}}),
     'rope_parameters with full_attention='),
    ('llama', dict(rope_parameters={'rope_type': 'default', 'partial_rotary_factor': 0.5}),
     'partial_rotary_factor=0.5 is not supported'),
    ('llama', dict(partial_rotary_factor=0.25), 'partial_rotary_factor=0.25 is not supported'),
    ('llama', dict(rope_interleaved=True), 'rope_interleaved=True is not supported'),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' is not supported"),
    ('gpt2', dict(activation_function='relu'), "activation_function='relu' is not supported"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention=True'),
    ('llama', dict(attention_bias=True), 'attention_bias=True'),
    ('llama', dict(mlp_bias=True), 'mlp_bias=True'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True'),
    ('qwen2', dict(use_sliding_window=True), 'use_sliding_window=True'),
    ('qwen2', dict(layer_types=['full_attention', 'sliding_attention']),
     'layer_types=.*sliding_attention'),
    ('mistral', dict(logit_softcap=30.0, sandwich_norm=True),
     'logit_softcap=30.0, sandwich_norm=True are not supported'),
    ('llama', dict(embedding_multiplier=12.0), 'embedding_multiplier=12.0 is not supported'),
    ('llama', dict(quantization_config={'bits': 4}), 'quantization_config='),
    ('llama', dict(auto_map={'AutoModelForCausalLM': 'modeling.Evil'}), 'auto_map='),
    ('llama', dict(num_hidden_layers=10**9), 'are too few for 1000000000 layers'),
    ('mixtral', dict(num_local_experts=10**9), 'are too few for 3 layers of 1000000000 experts'),
    ('llama', dict(num_hidden_layers=2),
     'unexpected weights: model.layers.2.input_layernorm.weight, .* and 5 more'),
    ('llama', dict(num_hidden_layers=4),
     'missing weights: model.layers.3.input_layernorm.weight, .* and 5 more'),
    ('llama', dict(vocab_size=10**12),
     r'embed_tokens.weight is \[301, 36\] and should be \[1000000000000, 36\]'),
    ('llama', dict(vocab_size=10**30), 'too large'),
    ('llama', dict(hidden_size=6 * 10**7), 'should be .60000000'),
    ('llama', dict(hidden_size='wide'), "hidden_size must be of type int; got 'wide'"),
    ('llama', dict(hidden_size=36.5), 'hidden_size must be of type int; got 36.5'),
    ('llama', dict(hidden_size=-36), 'n_embd must be at least 1; got -36'),
    ('llama', dict(hidden_size=None), 'n_embd must be at least 1; got 0'),
    ('llama', dict(max_position_embeddings=float('inf')),
     'max_position_embeddings must be of type int; got inf'),
    ('llama', dict(rms_norm_eps=10**400), 'rms_norm_eps must be of type float; got 1000'),
    ('llama', dict(tie_word_embeddings='no'), "tie_word_embeddings must be of type bool; got 'no'"),
    ('llama', dict(num_key_value_heads=4), 'n_head 6 must be a multiple of n_kv_head 4'),
    ('llama', dict(num_key_value_heads=3),
     r'k_proj.weight is \[12, 36\] and should be \[18, 36\]'),
    ('llama', dict(tie_word_embeddings=True), 'lm_head.weight is not equal to the embedding'),
    ('gpt2', dict(tie_word_embeddings=False), 'missing weights: lm_head.weight'),
    ('gpt2', dict(n_positions=97),
     r'transformer.wpe.weight is \[96, 36\] and should be \[97, 36\]'),
    ('mixtral', dict(num_local_experts=4),
     'unexpected weights: model.layers.0.block_sparse_moe.experts.4.w1.weight')])
def test_a_config_that_we_would_compute_otherwise_is_refused(name, keys, message, folder_of):
    folder = folder_of(name, edit(**keys))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(folder)
    assert str(error.value).startswith(f'{folder}: ')
    assert len(str(error.value).removeprefix(str(folder))) < 700


def write_index(*shards):
    def change(folder):
        os.rename(folder / 'model.safetensors', folder.parent / 'model.safetensors')
        content = {'weight_map': dict(enumerate(shards))}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(content))
    return change


def damage(function):
    def change(folder):
        content = (folder / 'model.safetensors').read_bytes()
        (folder / 'model.safetensors').write_bytes(function(content))
    return change


def lie_about(key, value):
    """A header in which the first large tensor is described wrongly; the data stays."""
    def function(content):
        size, = struct.unpack('<Q', content[:8])
        header = json.loads(content[8:8 + size])
        header['model.embed_tokens.weight'][key] = value
        text = json.dumps(header).encode()
        return struct.pack('<Q', len(text)) + text + content[8 + size:]
    return function


class Trap:
    """Makes a folder when it is unpickled."""
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def only_a_pickle(folder):
    os.remove(folder / 'model.safetensors')
    torch.save(Trap(folder / 'trapped'), folder / 'pytorch_model.bin')


def no_config(folder):
    os.remove(folder / 'config.json')


def config_text(text):
    def change(folder):
        (folder / 'config.json').write_text(text)
    return change


def in_norm(value):
    """The last norm's weight has one value replaced."""
    def function(tensors):
        weight = tensors['model.norm.weight'].clone()
        weight[3] = value
        return tensors | {'model.norm.weight': weight}
    return rewrite(function)


@pytest.mark.parametrize('change, message', [
    (only_a_pickle, r'it has no model.safetensors, and other weights are not read \(it holds '
                    r'config.json, .*pytorch_model.bin\)'),
    (no_config, 'FileNotFoundError: .*config.json'),
    (config_text('{"model_type": '), 'JSONDecodeError'),
    (config_text('[]'), 'config.json must hold a JSON object, not a list'),
    (write_index('../model.safetensors'), 'missing shard: ../model.safetensors .listed in .*json'),
    (write_index('/etc/passwd'), 'missing shard: /etc/passwd .listed in .*index.json'),
    (write_index('config.json'), 'index.json lists config.json; only .safetensors files are read'),
    (write_index('model-00001-of-00002.safetensors'),
     'missing shard: model-00001-of-00002.safetensors .listed in model.safetensors.index.json'),
    (write_index(), 'are too few'),
    (damage(lambda content: b''), 'SafetensorError'),
    (damage(lambda content: content[:-40]), 'SafetensorError'),
    (damage(lambda content: struct.pack('<Q', 2**60) + content[8:]), 'SafetensorError'),
    (damage(lambda content: content[:20] + b'\xff' + content[21:]), 'SafetensorError'),
    (damage(lie_about('shape', [10**9, 36])), 'SafetensorError'),
    (damage(lie_about('data_offsets', [0, 10**15])), 'SafetensorError'),
    (rewrite(lambda t: t | {'model.norm.weight': t['model.norm.weight'].double()}),
     'dtype F64 is none of F32, F16, BF16'),
    (rewrite(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
     'dtype F8_E4M3 is none of'),
    (rewrite(lambda t: {k: v for k, v in t.items() if '.1.' not in k}),
     'missing weights: model.layers.1.input_layernorm.weight, .* and 5 more'),
    (rewrite(lambda t: t | {'model.extra.weight': torch.ones(2)}),
     'unexpected weights: model.extra.weight'),
    (rewrite(lambda t: t | {'model.norm.weight': torch.ones(35)}),
     r'model.norm.weight is \[35\] and should be \[36\]'),
    (in_norm(float('nan')), r'ln_f.weight has values that are not finite \(NaN or infinity\)'),
    (in_norm(float('-inf')), 'ln_f.weight has values that are not finite')])
def test_a_folder_that_is_damaged_or_foreign_is_refused_by_name(change, message, folder_of):
    folder = folder_of('llama', change)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(folder)
    assert str(error.value).startswith(f'{folder}: ')
    assert not (folder / 'trapped').exists()


# Names on the hub

def test_only_files_that_are_read_are_downloaded_from_the_hub(folder_of, monkeypatch):
    calls = []

    def fetch(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(folder_of('llama'))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    assert difference(load_pretrained('somebody/a-llama').eval(), their_model('llama')) < 1e-4
    (name, patterns), = calls
    wanted = ['config.json', 'generation_config.json', 'model.safetensors',
              'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'tokenizer.json']
    present = wanted + ['pytorch_model.bin', 'consolidated.safetensors', 'modeling.py',
                        'chat_template.jinja']
    chosen = huggingface_hub.utils.filter_repo_objects(present, allow_patterns=patterns)
    assert list(chosen) == wanted
    assert name == 'somebody/a-llama'


def test_without_a_network_the_error_tells_what_to_give_instead():
    message = 'somebody/a-llama is not a folder, .* give a folder that holds config.json'
    with pytest.raises(ValueError, match=message):
        load_pretrained('somebody/a-llama')


def test_missing_packages_are_named(folder_of, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    message = 'ModuleNotFoundError: .*huggingface_hub.* give a folder'
    with pytest.raises(ValueError, match=message):
        load_pretrained('somebody/a-llama')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ImportError, match='safetensors'):
        load_pretrained(folder_of('llama'))


# load_model

@pytest.fixture(scope='module')
def with_tokenizer(tmp_path_factory):
    """An exported folder, and its tokenizer."""
    folder = tmp_path_factory.mktemp('ours')
    tokenizer = Tokenizer.byte()
    model = our_model(**dict(OURS['llama'], vocab_size=tokenizer.vocab_size))
    save_pretrained(model, folder, tokenizer)
    return folder, tokenizer


@pytest.mark.parametrize('rows', [261, 272])  # a padded vocabulary stays padded
def test_load_model_opens_a_folder_in_float32_with_its_tokenizer(rows, with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    half = resize_vocab(load_pretrained(folder).bfloat16(), rows)
    save_pretrained(half, tmp_path, tokenizer)
    settings = {'dropout': 0.1, 'attn': 'manual', 'n_layer': 7, 'out_dir': 'out/base'}
    model, own = load_model(str(tmp_path), settings, tokenizer)
    assert own.fingerprint == tokenizer.fingerprint and model.wte.weight.dtype == torch.float32
    config = model.config
    assert (config.dropout, config.attn, config.n_layer) == (0.1, 'manual', 3)
    assert (config.vocab_size, own.vocab_size) == (rows, 261)


def test_load_model_refuses_another_tokenizer_or_one_that_is_too_large(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    with pytest.raises(ValueError, match='another tokenizer'):
        load_model(str(folder), {}, Tokenizer.train(story(), 270))
    save_pretrained(load_pretrained(folder), tmp_path, Tokenizer.train(story(), 310))
    message = 'tokenizer.json: 310 tokens, but the model has rows for 261'
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path), {})


def test_load_model_takes_the_given_tokenizer_if_the_folder_has_none(tmp_path):
    save_pretrained(our_model(**OURS['llama']), tmp_path)
    tokenizer = Tokenizer.byte()
    assert load_model(str(tmp_path), {}, tokenizer)[1] is tokenizer
    with pytest.raises(OSError, match='tokenizer.json'):
        load_model(str(tmp_path), {})


def test_a_missing_run_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    def fetch(*_, **__):
        pytest.fail('asked the hub')
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    monkeypatch.chdir(tmp_path)  # like a fresh clone, it has no folder out
    (tmp_path / 'runs').mkdir()
    missing = ['out/sft', 'runs/sft', './sft', '../sft', 'out/deep/sft', 'runs/sft/', '~/sft',
               str(tmp_path / 'sft')]
    for source in missing:
        with pytest.raises(ValueError, match=f'^{re.escape(source)}: no such run; train it first'):
            load_model(source, {'out_dir': 'out/ppo'})
    with pytest.raises(ValueError, match='^mine: no such run'):
        load_model('mine', {'out_dir': 'mine'})


def test_a_folder_that_is_both_a_run_and_a_model_is_the_run(with_tokenizer, tmp_path):
    shutil.copytree(with_tokenizer[0], tmp_path, dirs_exist_ok=True)
    torch.save(checkpoint_of(), tmp_path / 'ckpt.pt')
    assert load_model(str(tmp_path), {})[0].config.n_embd == 8


@pytest.mark.parametrize('kind', ['run', 'folder'])
def test_block_size_grows_for_rope_models_only(kind, with_tokenizer, tmp_path):
    source, n_new = str(with_tokenizer[0]), 200
    if kind == 'run':
        torch.save(checkpoint_of(), tmp_path / 'ckpt.pt')
        source = str(tmp_path)
    before = load_model(source, {})[0].eval()
    same = load_model(source, {'block_size': 4})[0]
    assert same.config.block_size == before.config.block_size
    longer = load_model(source, {'block_size': n_new})[0].eval()
    assert longer.config == replace(before.config, block_size=n_new)
    ids = torch.randint(250, (1, n_new))
    short = ids[:, :before.config.block_size]
    assert torch.equal(longer(short)[0], before(short)[0])
    assert longer.config.window_size == n_new and longer(ids)[0].isfinite().all()


@pytest.mark.parametrize('pos, message', [
    ('learned', 'block_size 64 is more than the 16 of the model, which learned one vector per '
                'position .* use at most 16'),
    ('sinusoidal', "only models with pos='rope' can be extended, and this one has pos='sinus")])
def test_block_size_does_not_grow_for_other_positions_and_the_error_explains_it(pos, message):
    with pytest.raises(ValueError, match=message):
        load_model(checkpoint_of(pos=pos), {'block_size': 64})


def test_load_model_from_scratch_depends_on_the_seed_only():
    settings = dict(TINY, seed=3)
    first, tok = load_model('scratch', settings, Tokenizer.byte())
    torch.randn(5)
    second, _ = load_model('scratch', settings, Tokenizer.byte())
    assert torch.equal(first.wte.weight, second.wte.weight)
    assert first.config.n_embd == 32 and tok.eos_ids == [256, 259]


def test_training_and_sampling_start_from_a_folder(with_tokenizer, dataset, tmp_path):
    folder, _ = with_tokenizer
    # the folder's architecture stands
    settings = {key: value for key, value in TINY.items() if not key.startswith('n_')}
    settings |= dict(init_from=folder, out_dir=tmp_path, dataset=dataset, max_iters=3,
                     optimizer='adamw')
    ok(call('train.py', *flags(settings)))
    trained, _ = load_model(str(tmp_path), {})
    expected = load_pretrained(folder).config.resolved() | {'dropout': 0.0, 'attn': 'auto'}
    assert trained.config.resolved() | {'dropout': 0.0, 'attn': 'auto'} == expected
    sampling = dict(device='cpu', num_samples=1, max_new_tokens=5)
    assert ok(call('sample.py', *flags(sampling, init_from=folder)))
    assert ok(call('sample.py', *flags(sampling, out_dir=folder)))


def test_a_mistake_is_one_line(with_tokenizer, tmp_path, monkeypatch):
    shutil.copytree(with_tokenizer[0], tmp_path, dirs_exist_ok=True)
    edit(hidden_act='gelu')(tmp_path)
    assert "hidden_act='gelu'" in one_line(call('sample.py', f'--init_from={tmp_path}'))
    assert 'give a folder' in one_line(call('sample.py', '--init_from=somebody/a-llama'))
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    result = call('sample.py', f'--init_from={with_tokenizer[0]}')
    assert 'pip install safetensors' in one_line(result)


def test_the_script_exports_a_run(tmp_path):
    os.mkdir(tmp_path / 'run')
    checkpoint = checkpoint_of() | {'eos_ids': [7]}
    torch.save(checkpoint, tmp_path / 'run' / 'ckpt.pt')
    names = dict(init_from=tmp_path / 'run', out=tmp_path / 'export')
    assert f'{tmp_path / "export"}: llama, ' in ok(call('data/pretrained.py', *flags(names)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'export').eval()
    ours = load_model(str(tmp_path / 'run'), {})[0].eval()
    assert difference(ours, theirs, IDS[:, :16] % 256) < 1e-4
    assert theirs.generation_config.eos_token_id == [7]
    assert AutoTokenizer.from_pretrained(tmp_path / 'export').chat_template
    assert '--out=FOLDER' in one_line(call('data/pretrained.py'))
    torch.save(checkpoint_of(mlp='relu2'), tmp_path / 'run' / 'ckpt.pt')
    assert "mlp='relu2'" in one_line(call('data/pretrained.py', *flags(names)))


# Checkpoints

def small_model(**settings):
    sizes = dict(vocab_size=261, block_size=16, n_layer=1, n_head=2, n_embd=8, n_hidden=12,
                 qk_norm=False)
    return our_model(**sizes | settings)


def checkpoint_of(**settings):
    model = small_model(**settings)
    return {'stage': 'train', 'step': 1, 'config': {}, 'model': model.state_dict(),
            'model_args': asdict(model.config), 'tokenizer': Tokenizer.byte().to_dict()}


def reward_checkpoint():
    checkpoint = checkpoint_of()
    model = RewardModel(small_model())
    return checkpoint | {'stage': 'reward', 'model': model.state_dict()}


@pytest.mark.parametrize('settings', [
    {}, {'tie_weights': False}, {'n_expert': 3, 'moe_balance': 'bias'}, {'pos': 'learned'}])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_checkpoint_gives_its_model_in_float32(settings, dtype):
    checkpoint = checkpoint_of(**settings)
    checkpoint['model'] = {k: t.to(dtype) for k, t in checkpoint['model'].items()}
    model = build_model(checkpoint, dropout=0.1, attn='manual')
    assert asdict(model.config) == checkpoint['model_args'] | {'dropout': 0.1, 'attn': 'manual'}
    assert dtypes_of(model) == {torch.float32}
    assert (model.lm_head.weight is model.wte.weight) == model.config.tie_weights
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint['model'][name].float()), name
    model(torch.tensor([[1, 2]]))[0].sum().backward()
    assert model.wte.weight.grad.abs().sum() > 0


def arguments(**changes):
    return lambda checkpoint: checkpoint['model_args'].update(changes)


def weights(**changes):
    names = {name.replace('__', '.'): tensor for name, tensor in changes.items()}
    return lambda checkpoint: checkpoint['model'].update(names)


def member(**changes):
    return lambda checkpoint: checkpoint.update(changes)


def without(*names):
    def change(checkpoint):
        for name in names:
            del checkpoint['model'][name]
    return change


def huge_by_strides(checkpoint):
    checkpoint['model_args']['vocab_size'] = 10**9
    for name in ('wte.weight', 'lm_head.weight'):
        checkpoint['model'][name] = torch.zeros(1).expand(10**9, 8)


def huge_by_sharing(checkpoint):
    """1,000 layers that all have the tensors of the first one."""
    checkpoint['model_args']['n_layer'] = 1000
    for name, tensor in list(checkpoint['model'].items()):
        if name.startswith('h.0.'):
            for layer in range(1000):
                checkpoint['model'][name.replace('h.0.', f'h.{layer}.')] = tensor


NAN = torch.full((8,), float('nan'))
BAD_CHECKPOINTS = [
    (member(model_args=[]), 'model_args must be a dict'),
    (arguments(n_layer='1'), "model_args: n_layer must be of type int; got '1'"),
    (arguments(n_layer=True), 'model_args: n_layer must be of type int; got True'),
    (arguments(bias=0), 'model_args: bias must be of type bool; got 0'),
    (arguments(rope_base=10**400), 'model_args: rope_base must be of type float; got 1000'),
    (arguments(dropout=float('nan')), 'model_args: dropout must be of type float; got nan'),
    (arguments(norm=None), 'model_args: norm must be of type str; got None'),
    (arguments(norm='batch'), "norm must be one of .*; got 'batch'"),
    (arguments(n_heads=2, width=3), "model_args: this version has no 'n_heads', 'width'"),
    (arguments(n_layer=100), 'tensors are too few for 100 layers'),
    (arguments(n_expert=10**6), 'tensors are too few for 1 layers of 1000000 experts'),
    (arguments(n_expert=2, n_shared_expert=10**6), 'tensors are too few for 1 layers'),
    (arguments(n_embd=16), r'h.0.attn.c_attn.weight is \[24, 8\] and should be \[48, 16\], .*more'),
    (arguments(vocab_size=10**12), r'should be \[1000000000000, 8\]'),
    (arguments(vocab_size=10**30), 'too large'),
    (arguments(qk_norm=True),
     'missing weights: h.0.attn.k_norm.weight, h.0.attn.q_norm.weight'),
    (without('ln_f.weight', 'wte.weight'), 'missing weights: ln_f.weight, wte.weight'),
    (weights(h__0__gate=torch.ones(2)), 'unexpected weights: h.0.gate'),
    (weights(ln_f__weight=torch.ones(9)), r'ln_f.weight is \[9\] and should be \[8\]'),
    (weights(ln_f__weight=torch.ones(8, dtype=torch.int64)),
     'model: ln_f.weight must be a dense tensor of float32, float16 or bfloat16, not torch.int64'),
    (weights(ln_f__weight=torch.ones(8).to_sparse()), 'ln_f.weight must be a dense tensor'),
    (weights(ln_f__weight=torch.ones(8, device='meta')), 'ln_f.weight must be a dense tensor'),
    (weights(ln_f__weight=[1.0] * 8), "model: 'ln_f.weight' must be a tensor; got "),
    (member(model='weights'), "model must be a dict of tensors; got 'weights'"),
    (member(tokenizer=None), 'tokenizer must be a dict; got None'),
    (member(eos_ids=[2.5]), 'an EOS id must be a whole number; got 2.5'),
    (member(eos_ids='</s>'), "eos_ids must be a list; got '</s>'"),
    (huge_by_strides, r'its tensors describe 8,000,000,568 numbers, but the file holds 57'),
    (huge_by_sharing, 'its tensors describe .* numbers, but the file holds')]


@pytest.mark.parametrize('change, message', BAD_CHECKPOINTS)
def test_a_foreign_checkpoint_is_refused_before_memory_is_allocated(change, message, monkeypatch):
    checkpoint = checkpoint_of()
    change(checkpoint)

    def to_empty(*_, **__):
        pytest.fail('memory was allocated')
    monkeypatch.setattr(torch.nn.Module, 'to_empty', to_empty)
    with pytest.raises(ValueError, match=message) as error:
        load_model(checkpoint, {})
    text = str(error.value)
    assert text.startswith('the checkpoint: ') and len(text) < 500


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused():
    checkpoint = checkpoint_of()
    checkpoint['model']['ln_f.weight'] = NAN
    with pytest.raises(ValueError, match='the checkpoint: ln_f.weight has values that are not fin'):
        load_model(checkpoint, {})


def test_a_checkpoint_whose_tied_weights_differ_is_refused():
    checkpoint = checkpoint_of()
    checkpoint['model']['lm_head.weight'] = checkpoint['model']['wte.weight'] + 1
    with pytest.raises(ValueError, match='wte.weight is tied to lm_head.weight .* but differs'):
        load_model(checkpoint, {})


def test_the_same_checks_hold_for_a_reward_model(tmp_path, capsys):
    tok = Tokenizer.byte()

    def load(change):
        checkpoint = reward_checkpoint()
        change(checkpoint)
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        return load_reward_model(str(tmp_path), tok)
    model = load(weights(head__proj__bias=torch.ones(1)))
    assert model.head.proj.bias == 1
    assert 'its scores are not normalised' in capsys.readouterr().out
    assert model.trunk.lm_head.weight is model.trunk.wte.weight and not model.training
    for change, message in [
            (arguments(n_layer=100), 'tensors are too few for 100 layers'),
            (weights(head__proj__bias=torch.ones(3)), r'head.proj.bias is \[3\] and should be \[1'),
            (without('shift'), 'missing weights: shift'),
            (weights(trunk__ln_f__weight=NAN), 'trunk.ln_f.weight has values that are not finite'),
            (member(tokenizer=7), 'tokenizer must be of type dict')]:
        with pytest.raises(ValueError, match=message) as error:
            load(change)
        assert str(error.value).startswith(str(tmp_path))


def test_a_reward_model_is_not_a_model_to_start_from():
    with pytest.raises(ValueError, match='this is a reward model, which cannot generate text'):
        load_model(reward_checkpoint(), {})


# More tokens

@pytest.mark.parametrize('tie', [True, False])
def test_new_tokens_start_as_the_mean_of_the_old(tie, tmp_path):
    model = our_model(**dict(OURS['llama'], tie_weights=tie))
    config = model.config
    before = model(IDS)[0].detach()
    embedding = model.wte.weight.clone()
    head = model.lm_head.weight.clone()
    assert resize_vocab(model, 300) is model
    assert model.config.vocab_size == 301  # it never shrinks
    assert resize_vocab(model, 305) is model
    assert model.config == replace(config, vocab_size=305) and config.vocab_size == 301
    after = model(IDS)[0].detach()
    assert torch.allclose(after[..., :301], before, atol=1e-6)
    mean = before.mean(-1, keepdim=True).expand(-1, -1, 4)
    assert torch.allclose(after[..., 301:], mean, atol=1e-5)
    assert torch.equal(model.wte.weight[:301], embedding)
    assert torch.equal(model.lm_head.weight[:301], head)
    assert (model.lm_head.weight is model.wte.weight) == tie and model.wte.weight.requires_grad
    model(torch.tensor([[304]]))[0].sum().backward()
    save_pretrained(model, tmp_path)
    assert difference(model, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-4


@pytest.mark.parametrize('rows, n', [(301, 298), (301, 301), (301, 305)])
def test_rows_of_padding_do_not_count_in_the_mean_and_are_used_first(rows, n):
    model = our_model(**dict(OURS['llama'], vocab_size=rows))
    before = model.wte.weight.detach().clone()
    resize_vocab(model, n, n_real=290)
    after = model.wte.weight.detach()
    assert len(after) == max(rows, n) == model.config.vocab_size
    assert torch.equal(after[:290], before[:290])
    expected = before[:290].mean(0).expand(n - 290, -1)
    assert torch.allclose(after[290:n], expected, atol=1e-6)
    assert torch.equal(after[n:], before[n:])
    assert model.lm_head.weight is model.wte.weight


def test_the_tokens_of_chats_are_the_mean_of_the_rows_that_the_tokenizer_has(tmp_path):
    plain = Tokenizer({i: bytes([i]) for i in range(256)}, special={'<|endoftext|>': 256})
    padded = our_model(**dict(OURS['llama'], vocab_size=300))
    save_pretrained(padded, tmp_path, plain)
    model, tok = load_chat_model(str(tmp_path), {})
    assert model.config.vocab_size == 300 and tok.vocab_size == 256 + len(SPECIAL_TOKENS)
    old = padded.wte.weight[:257]
    assert torch.allclose(model.wte.weight[257:261], old.mean(0).expand(4, -1), atol=1e-6)
    assert torch.equal(model.wte.weight[:257], old)
    # a tokenizer that has them already changes nothing
    save_pretrained(model, tmp_path / 'again', tok)
    again, _ = load_chat_model(str(tmp_path / 'again'), {})
    assert torch.equal(again.wte.weight, model.wte.weight)
