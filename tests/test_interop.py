"""
What model.py promises of Hugging Face folders, read and written. Independent of it: transformers' own models and
tokenizers, on small random weights. Nothing is fetched from anywhere.
"""
import json, os, shutil, struct, sys
from dataclasses import replace

os.environ['HF_HUB_OFFLINE'] = '1'
import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bpe import Tokenizer
from conftest import TINY, call, flags, ok, one_line, story
from data.pretrained import config_from, load_model, resize_vocab
from model import GPT, GPTConfig
from test_bpe import random_strings

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Sizes that show a mix-up: none is a multiple of another without need, and no default stands.
SIZES = dict(vocab_size=301, hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=96, rms_norm_eps=3e-5, rope_theta=5000.0,
             bos_token_id=None, eos_token_id=None, pad_token_id=None)
GPT2_SIZES = dict(vocab_size=301, n_embd=36, n_layer=3, n_head=6, n_positions=96, layer_norm_epsilon=3e-5,
                  bos_token_id=None, eos_token_id=None)
THEIRS = {
    'gpt2': dict(GPT2_SIZES),
    'gpt2 untied, of another width': dict(GPT2_SIZES, n_inner=50, tie_word_embeddings=False),
    'llama': dict(SIZES),
    'llama tied, of another head size': dict(SIZES, head_dim=10, tie_word_embeddings=True),
    'llama with a key head for each head': dict(SIZES, num_key_value_heads=6),
    'mistral': dict(SIZES, sliding_window=7),
    'mistral tied, without a window': dict(SIZES, sliding_window=None, tie_word_embeddings=True),
    'qwen2': dict(SIZES),
    'qwen2 tied': dict(SIZES, tie_word_embeddings=True),
    'qwen3': dict(SIZES, head_dim=14),
    'qwen3 tied': dict(SIZES, head_dim=6, tie_word_embeddings=True),
    'mixtral': dict(SIZES, num_local_experts=5, num_experts_per_tok=2, sliding_window=None),
    'mixtral with a window': dict(SIZES, num_local_experts=3, num_experts_per_tok=3, sliding_window=5),
}
BASE = dict(vocab_size=301, n_embd=36, n_layer=3, n_head=6, block_size=96, norm_eps=3e-5, n_hidden=52)
MODERN = dict(BASE, n_kv_head=2, rope_base=5000.0)
OLD = dict(BASE, norm='layernorm', pos='learned', mlp='gelu_tanh')
OURS = {
    'gpt2': dict(OLD, bias=True),
    'gpt2 without biases': dict(OLD, tie_weights=False),
    'gpt2 with biases of queries, keys and values': dict(OLD, qkv_bias=True),
    'llama': dict(MODERN),
    'llama untied, of another head size': dict(MODERN, tie_weights=False, head_dim=10),
    'mistral': dict(MODERN, window=7),
    'mistral, for heads that do not divide n_embd': dict(MODERN, n_head=8, head_dim=10),
    'qwen2': dict(MODERN, qkv_bias=True),
    'qwen3': dict(MODERN, qk_norm=True, head_dim=8),
    'mixtral': dict(MODERN, n_expert=5, n_expert_active=3),
    'mixtral with a window': dict(MODERN, n_expert=3, n_expert_active=2, window=5, tie_weights=False),
}
IDS = torch.randint(301, (2, 60), generator=torch.Generator().manual_seed(0))


def shaken(model, seed=0):
    """Random weights, large enough that every one of them counts, in biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + (p.dim() == 1 and p.mean() > 0.5))
    return model.eval()


def their_model(name):
    return shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split()[0], **THEIRS[name])))


def our_model(**settings):
    return shaken(GPT(GPTConfig(**settings)))


@torch.no_grad()
def gap(ours, theirs, ids=IDS):
    return (ours(ids)[0] - theirs(ids).logits).abs().max().item()


def same_text(ours, theirs, n=64):
    """Greedy text after each of two prompts, with both caches."""
    prompt = IDS[:, :11]
    told = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False)
    return torch.equal(ours.generate(prompt, n, temperature=0), told) and told.shape == (2, 11 + n)


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
    """The folder of a model that transformers has saved; change(folder) works on a copy of it."""
    folders = {}

    def folder_of(name, change=None):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp('theirs') / 'model'
            their_model(name).save_pretrained(folders[name])
        if not change:
            return folders[name]
        copy = tmp_path_factory.mktemp('changed') / 'model'
        shutil.copytree(folders[name], copy)
        change(copy)
        return copy
    return folder_of


def edit(**keys):
    """A change to the folder's config.json."""
    def change(folder):
        d = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps({**d, **keys}))
    return change


def rewrite(function):
    """A change to the tensors of the folder's file."""
    def change(folder):
        tensors = safetensors.torch.load_file(folder / 'model.safetensors')
        safetensors.torch.save_file(function(tensors), folder / 'model.safetensors', {'format': 'pt'})
    return change


# Reading

@pytest.mark.parametrize('name', THEIRS)
def test_what_transformers_saved_gives_its_logits_and_its_greedy_text(name, folder_of):
    ours, theirs = GPT.from_pretrained(str(folder_of(name))).eval(), their_model(name)
    assert theirs(IDS).logits.std() > 0.3
    assert gap(ours, theirs) < 1e-4
    assert same_text(ours, theirs)


def test_the_window_of_mistral_makes_a_difference(folder_of):
    wide = GPT.from_pretrained(folder_of('mistral', edit(sliding_window=None))).eval()
    assert gap(wide, their_model('mistral'), IDS[:, :7]) < 1e-4
    assert gap(wide, their_model('mistral')) > 0.1


def test_a_window_beyond_the_context_is_the_context(folder_of):
    config = GPT.from_pretrained(folder_of('mistral', edit(sliding_window=4096))).config
    assert (config.window, config.block_size) == (96, 96)


@pytest.mark.parametrize('rope', [
    {'rope_theta': 5000.0}, {'rope_theta': 5000, 'rope_scaling': None},
    {'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'}},
    {'rope_theta': 5000.0, 'rope_scaling': {'type': 'default'}},
    {'rope_theta': 1.0, 'rope_parameters': {'rope_theta': 5000.0, 'rope_type': 'default'}}])
def test_the_base_of_rope_is_read_in_its_older_and_its_newer_place(rope):
    d = {k: v for k, v in THEIRS['llama'].items() if k != 'rope_theta'} | {'model_type': 'llama'} | rope
    assert config_from(d).rope_base == 5000
    assert AutoConfig.for_model(**d).rope_parameters['rope_theta'] == 5000


@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'mistral', 'qwen2', 'qwen3', 'mixtral'])
def test_keys_that_are_not_there_mean_what_they_mean_to_transformers(kind):
    asked = GPT2_SIZES | {'n_positions': 9999} if kind == 'gpt2' else SIZES | {'max_position_embeddings': 9999}
    asked = {k: v for k, v in asked.items() if not k.endswith(('token_id', 'theta', 'eps', 'epsilon'))}
    ours, theirs = config_from({'model_type': kind, **asked}), AutoConfig.for_model(kind, **asked)
    assert (ours.tie_weights, ours.block_size) == (theirs.tie_word_embeddings, 9999)
    if kind == 'gpt2':
        assert ours.norm_eps == theirs.layer_norm_epsilon
    else:
        assert (ours.norm_eps, ours.rope_base) == (theirs.rms_norm_eps, theirs.rope_parameters['rope_theta'])
        assert ours.window == (getattr(theirs, 'sliding_window', None) or 0)


def test_shards_are_read_as_one_file_is(folder_of, tmp_path):
    their_model('qwen3').save_pretrained(tmp_path, max_shard_size='20KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 3 and not (tmp_path / 'model.safetensors').exists()
    whole, pieces = (GPT.from_pretrained(folder).state_dict() for folder in (folder_of('qwen3'), tmp_path))
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[k], pieces[k]) for k in whole)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['gpt2', 'qwen3', 'mixtral'])
def test_half_precision_is_kept_or_widened_as_asked(name, dtype, folder_of, tmp_path):
    their_model(name).to(dtype).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kept, wide = GPT.from_pretrained(tmp_path).eval(), GPT.from_pretrained(tmp_path, torch.float32).eval()
    assert {p.dtype for p in kept.parameters()} == {dtype} and {p.dtype for p in wide.parameters()} == {torch.float32}
    assert gap(wide, theirs) < 1e-4
    with torch.no_grad():
        assert (kept(IDS)[0] - wide(IDS)[0]).abs().mean() < 0.1
    kept.save_pretrained(tmp_path / 'again')
    again = GPT.from_pretrained(tmp_path / 'again').state_dict()
    assert all(torch.equal(p, again[k]) and again[k].dtype == dtype for k, p in kept.state_dict().items())


def test_a_file_of_two_precisions_is_read_in_float32_exactly(folder_of):
    half = lambda tensors: {k: t if 'norm' in k else t.bfloat16() for k, t in tensors.items()}
    model = GPT.from_pretrained(folder_of('llama', rewrite(half)))
    exact = GPT.from_pretrained(folder_of('llama'))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.wte.weight, exact.wte.weight.bfloat16().float())
    assert torch.equal(model.ln_f.weight, exact.ln_f.weight)


def test_flags_that_change_no_weight_can_be_given(folder_of):
    config = GPT.from_pretrained(folder_of('llama'), block_size=24, dropout=0.1, attn='manual').config
    assert (config.block_size, config.dropout, config.attn) == (24, 0.1, 'manual')


def test_the_published_gpt2_has_no_prefix_and_holds_the_mask(folder_of):
    def published(tensors):
        masks = {f'h.{i}.attn.bias': torch.ones(96, 96).tril()[None, None].clone() for i in range(3)}
        return {k.removeprefix('transformer.'): t for k, t in tensors.items()} | masks
    assert gap(GPT.from_pretrained(folder_of('gpt2', rewrite(published))).eval(), their_model('gpt2')) < 1e-4


def test_an_old_llama_holds_the_table_of_rope(folder_of):
    table = {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(3)}
    GPT.from_pretrained(folder_of('llama', rewrite(lambda tensors: tensors | table)))


def test_a_tied_head_may_stand_in_the_file_too_if_it_is_the_embedding(folder_of):
    twice = lambda tensors: tensors | {'lm_head.weight': tensors['model.embed_tokens.weight'].clone()}
    model = GPT.from_pretrained(folder_of('qwen3 tied', rewrite(twice)))
    assert model.lm_head.weight is model.wte.weight
    other = lambda tensors: tensors | {'lm_head.weight': 2 * tensors['model.embed_tokens.weight']}
    with pytest.raises(ValueError, match='lm_head.weight is not the embedding'):
        GPT.from_pretrained(folder_of('qwen3 tied', rewrite(other)))


# The config.json of published models, from memory; only the sizes are ours.
TINY_SIZES = dict(hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
                  num_key_value_heads=2, vocab_size=301, max_position_embeddings=96)
PUBLISHED = {
    'gpt2': {
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1,
        'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02,
        'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 96, 'n_embd': 36, 'n_head': 6, 'n_layer': 2,
        'n_positions': 96, 'resid_pdrop': 0.1, 'summary_activation': None, 'summary_first_dropout': 0.1,
        'summary_proj_to_labels': True, 'summary_type': 'cls_index', 'summary_use_proj': True,
        'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}}, 'vocab_size': 301},
    'gpt2-medium': {
        'activation_function': 'gelu_new', 'architectures': ['GPT2LMHeadModel'], 'attn_pdrop': 0.1,
        'bos_token_id': 50256, 'embd_pdrop': 0.1, 'eos_token_id': 50256, 'initializer_range': 0.02,
        'layer_norm_epsilon': 1e-05, 'model_type': 'gpt2', 'n_ctx': 96, 'n_embd': 36, 'n_head': 6, 'n_layer': 2,
        'n_positions': 96, 'n_special': 0, 'predict_special_tokens': True, 'resid_pdrop': 0.1,
        'summary_activation': None, 'summary_first_dropout': 0.1, 'summary_proj_to_labels': True,
        'summary_type': 'cls_index', 'summary_use_proj': True, 'vocab_size': 301},
    'SmolLM2-135M': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 0,
        'eos_token_id': 0, 'hidden_act': 'silu', 'initializer_range': 0.041666666666666664, 'is_llama_config': True,
        'model_type': 'llama', 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_interleaved': False,
        'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.1', 'use_cache': True},
    'SmolLM2-135M-Instruct': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'initializer_range': 0.041666666666666664, 'is_llama_config': True,
        'mlp_bias': False, 'model_type': 'llama', 'pad_token_id': 2, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
        'torch_dtype': 'bfloat16', 'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
        'transformers_version': '4.42.3', 'use_cache': True},
    'TinyLlama-1.1B': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'llama', 'pretraining_tp': 1,
        'rms_norm_eps': 1e-05, 'rope_scaling': None, 'rope_theta': 10000.0, 'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.35.0', 'use_cache': True},
    'Meta-Llama-3-8B': TINY_SIZES | {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 128000, 'eos_token_id': 128001, 'hidden_act': 'silu', 'initializer_range': 0.02,
        'model_type': 'llama', 'pretraining_tp': 1, 'rms_norm_eps': 1e-05, 'rope_scaling': None,
        'rope_theta': 500000.0, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.0.dev0', 'use_cache': True},
    'Mistral-7B-v0.1': TINY_SIZES | {
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu',
        'initializer_range': 0.02, 'model_type': 'mistral', 'rms_norm_eps': 1e-05, 'rope_theta': 10000.0,
        'sliding_window': 9, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.34.0.dev0', 'use_cache': True},
    'Mistral-7B-v0.3': TINY_SIZES | {
        'architectures': ['MistralForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'mistral', 'rms_norm_eps': 1e-05,
        'rope_theta': 1000000.0, 'sliding_window': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.42.0.dev0', 'use_cache': True},
    'Qwen2-0.5B': TINY_SIZES | {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151643, 'hidden_act': 'silu', 'initializer_range': 0.02, 'max_window_layers': 24,
        'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 131072,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1', 'use_cache': True,
        'use_sliding_window': False},
    'Qwen2.5-0.5B': TINY_SIZES | {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151643, 'hidden_act': 'silu', 'initializer_range': 0.02, 'max_window_layers': 24,
        'model_type': 'qwen2', 'rms_norm_eps': 1e-06, 'rope_theta': 1000000.0, 'sliding_window': 32768,
        'tie_word_embeddings': True, 'torch_dtype': 'bfloat16', 'transformers_version': '4.40.1', 'use_cache': True,
        'use_mrope': False, 'use_sliding_window': False},
    'Qwen3-0.6B': TINY_SIZES | {
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 151643, 'eos_token_id': 151645, 'head_dim': 16, 'hidden_act': 'silu',
        'initializer_range': 0.02, 'max_window_layers': 28, 'model_type': 'qwen3', 'rms_norm_eps': 1e-06,
        'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False},
    'Mixtral-8x7B-v0.1': TINY_SIZES | {
        'architectures': ['MixtralForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'initializer_range': 0.02, 'model_type': 'mixtral', 'num_experts_per_tok': 2,
        'num_local_experts': 4, 'output_router_logits': False, 'rms_norm_eps': 1e-05, 'rope_theta': 1000000.0,
        'router_aux_loss_coef': 0.02, 'sliding_window': None, 'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.36.0.dev0', 'use_cache': True},
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_config_of_a_published_model_is_read_as_transformers_reads_it(name, tmp_path):
    d = PUBLISHED[name]
    theirs = shaken(AutoModelForCausalLM.from_config(AutoConfig.for_model(**d), dtype=torch.float32))
    theirs.save_pretrained(tmp_path)
    (tmp_path / 'config.json').write_text(json.dumps(d))
    assert gap(GPT.from_pretrained(tmp_path).eval(), theirs) < 1e-4


# Writing

@pytest.mark.parametrize('name', OURS)
def test_transformers_opens_what_we_save_with_our_logits_and_our_greedy_text(name, tmp_path):
    ours = our_model(**OURS[name])
    ours.save_pretrained(tmp_path)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.model_type == name.split()[0].rstrip(',')
    assert type(theirs).__name__ == theirs.config.architectures[0] and theirs.dtype == torch.float32
    assert gap(ours, theirs.eval()) < 1e-4
    assert same_text(ours, theirs)


@pytest.mark.parametrize('name', OURS)
def test_out_and_in_again_is_the_same_to_the_bit(name, tmp_path):
    ours = our_model(**OURS[name])
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS)[0], ours(IDS)[0])
    if ours.config.pos == 'rope':  # a gpt2 comes back with biases of 0
        assert again.config == ours.config
    state = again.state_dict()
    assert all(torch.equal(state[k], p) for k, p in ours.state_dict().items())
    assert all(not state[k].any() for k in state.keys() - ours.state_dict().keys())


@pytest.mark.parametrize('odd, settings', [
    ("mlp='relu2'", dict(mlp='relu2', qk_norm=True)), ("mlp='gelu'", dict(mlp='gelu')), ('bias=True', dict(bias=True)),
    ("pos='sinusoidal'", dict(pos='sinusoidal')), ("norm='layernorm'", dict(norm='layernorm')),
    ("norm='rmsnorm'", dict(pos='learned', mlp='gelu')), ('n_sink=2', dict(window=8, n_sink=2)),
    ('causal=False', dict(causal=False)), ('moe_every=3', dict(n_expert=4, moe_every=3)),
    ('n_shared_expert=1', dict(n_expert=4, n_shared_expert=1)),
    ("moe_balance='bias'", dict(n_expert=4, moe_balance='bias')),
    ('window=8', dict(qk_norm=True, window=8)), ('qkv_bias=True', dict(qk_norm=True, qkv_bias=True)),
    ('qk_norm=True', dict(n_expert=4, qk_norm=True)), ('n_kv_head=2', dict(OLD, n_kv_head=2)),
    ('head_dim=10', dict(OLD, head_dim=10)), ('window=8', dict(OLD, window=8)),
    ('qk_norm=True', dict(OLD, qk_norm=True))])
def test_flags_that_no_family_has_are_named(odd, settings, tmp_path):
    with pytest.raises(ValueError, match=f'no Hugging Face family has .*{odd}'):
        our_model(**dict(MODERN, n_kv_head=6) | settings).save_pretrained(tmp_path / 'model')
    assert not (tmp_path / 'model').exists()


def test_a_single_active_expert_which_mixtral_weighs_otherwise_is_refused(folder_of, tmp_path):
    with pytest.raises(ValueError, match='n_expert_active=1'):
        GPT.from_pretrained(folder_of('mixtral', edit(num_experts_per_tok=1)))
    with pytest.raises(ValueError, match='n_expert_active=1'):
        our_model(**dict(MODERN, n_expert=4, n_expert_active=1)).save_pretrained(tmp_path / 'model')
    single = our_model(**dict(MODERN, n_expert=1, n_expert_active=1, moe_balance='none'))  # whose weight is 1 for both
    single.save_pretrained(tmp_path)
    assert gap(GPT.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-4


def test_a_saved_folder_holds_what_it_needs_and_replaces_what_was_there(tmp_path):
    ours, tokenizer = our_model(**OURS['llama']), Tokenizer.train(story(), 301)
    for model in (our_model(**OURS['qwen3']), ours):
        model.save_pretrained(tmp_path, tokenizer)
    assert {*os.listdir(tmp_path)} == {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json'}
    assert torch.equal(GPT.from_pretrained(tmp_path).wte.weight, ours.wte.weight)
    assert len({(tmp_path / name).stat().st_mode for name in os.listdir(tmp_path)}) == 1  # whoever reads one reads all


# Tokenizers

@pytest.mark.parametrize('name', [name for name in OURS if name.split()[0] != 'qwen2'])
@pytest.mark.parametrize('pattern', ['digits', 'llama3'])
def test_the_tokenizer_of_a_saved_folder_gives_our_ids(name, pattern, tmp_path):
    tokenizer = Tokenizer.train(story(), 290, pattern)
    our_model(**OURS[name]).save_pretrained(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_tokenizers(tokenizer, theirs)
    assert theirs.eos_token == '<|endoftext|>' and theirs.pad_token == '<|pad|>' and theirs.model_max_length == 96
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [tokenizer.special['<|endoftext|>'], tokenizer.special['<|end|>']]


def check_tokenizers(ours, theirs):
    assert len(theirs) == ours.vocab_size
    for text in [*random_strings(300), '<|user|>né?<|end|><|assistant|>']:
        ids = ours.encode(text, special=True)
        assert theirs(text)['input_ids'] == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


def test_a_qwen2_has_the_tokenizer_that_transformers_gives_every_qwen2(tmp_path):
    model, qwen = our_model(**OURS['qwen2']), Tokenizer.train(story(), 290, 'qwen2')
    qwen.normalizer = 'NFC'
    model.save_pretrained(tmp_path, qwen)
    check_tokenizers(qwen, AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="as Qwen's tokenizer does"):
        model.save_pretrained(tmp_path, Tokenizer.train(story(), 290))


def test_without_a_tokenizer_no_token_ends_a_text(tmp_path):
    our_model(**OURS['llama']).save_pretrained(tmp_path)  # transformers' own default for a llama is 2, a byte here
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id is None


# What is refused

@pytest.mark.parametrize('name, keys, message', [
    ('llama', dict(model_type='gemma'), "model_type 'gemma' is not one of gpt2, llama, qwen2, qwen3, mistral, mixtral"),
    ('llama', dict(model_type=None), 'model_type None is not one of'),
    ('llama', dict(rope_scaling={'rope_type': 'linear', 'factor': 2.0}, rope_parameters=None),
     'rope_type=linear, factor=2.0'),
    ('llama', dict(rope_parameters={'rope_theta': 1e4, 'rope_type': 'llama3', 'factor': 8.0}),
     'rope_type=llama3, factor=8.0'),
    ('qwen3', dict(rope_scaling={'type': 'yarn', 'factor': 4.0}), 'type=yarn, factor=4.0'),
    ('llama', dict(rope_parameters={'full_attention': {'rope_type': 'default'}}), 'full_attention='),
    ('llama', dict(rope_parameters={'rope_type': 'default', 'partial_rotary_factor': 0.5}),
     'partial_rotary_factor=0.5'),
    ('llama', dict(partial_rotary_factor=0.25), 'partial_rotary_factor=0.25'),
    ('llama', dict(rope_interleaved=True), 'rope_interleaved=True'),
    ('llama', dict(hidden_act='gelu'), 'hidden_act=gelu'),
    ('gpt2', dict(activation_function='relu'), 'activation_function=relu'),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse_layer_idx=True'),
    ('gpt2', dict(scale_attn_weights=False), 'scale_attn_weights=False'),
    ('gpt2', dict(add_cross_attention=True), 'add_cross_attention=True'),
    ('llama', dict(attention_bias=True), 'attention_bias=True'),
    ('llama', dict(mlp_bias=True), 'mlp_bias=True'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True'),
    ('qwen2', dict(use_sliding_window=True), 'use_sliding_window=True'),
    ('qwen2', dict(layer_types=['full_attention', 'sliding_attention']), "layer_types=.*sliding_attention"),
    ('mistral', dict(logit_softcap=30.0, sandwich_norm=True), 'logit_softcap=30.0, sandwich_norm=True'),
    ('llama', dict(quantization_config={'bits': 4}), 'quantization_config='),
    ('llama', dict(auto_map={'AutoModelForCausalLM': 'modeling.Evil'}), 'auto_map='),
    ('llama', dict(num_hidden_layers=10**9), 'are too few for 1000000000 layers'),
    ('mixtral', dict(num_local_experts=10**9), 'are too few for 3 layers of 1000000000 experts'),
    ('llama', dict(num_hidden_layers=2), 'model.layers.2.input_layernorm.weight is .36. and should be absent'),
    ('llama', dict(num_hidden_layers=4), 'model.layers.3.input_layernorm.weight is missing and should be .36.'),
    ('llama', dict(vocab_size=10**12), r'embed_tokens.weight is \[301, 36\] and should be \[1000000000000, 36\]'),
    ('llama', dict(hidden_size=6 * 10**7), 'should be .60000000'),
    ('llama', dict(hidden_size='wide'), "invalid literal .*'wide'"),
    ('llama', dict(hidden_size=-36), 'n_embd must be at least 1; got -36'),
    ('llama', dict(hidden_size=None), 'n_embd must be at least 1; got 0'),
    ('llama', dict(max_position_embeddings=float('inf')), 'OverflowError'),
    ('llama', dict(num_key_value_heads=4), 'n_head 6 must be a multiple of n_kv_head 4'),
    ('llama', dict(num_key_value_heads=3), r'k_proj.weight is \[12, 36\] and should be \[18, 36\]'),
    ('llama', dict(tie_word_embeddings=True), 'lm_head.weight is not the embedding'),
    ('gpt2', dict(tie_word_embeddings=False), 'lm_head.weight is missing'),
    ('gpt2', dict(n_positions=97), r'transformer.wpe.weight is \[96, 36\] and should be \[97, 36\]'),
    ('mixtral', dict(num_local_experts=4), 'experts.4.w1.weight is .52, 36. and should be absent')])
def test_a_config_that_we_would_compute_otherwise_is_refused_by_name(name, keys, message, folder_of):
    folder = folder_of(name, edit(**keys))
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(folder)
    assert str(error.value).startswith(f'{folder}: ')


def write_index(*shards):
    def change(folder):
        os.rename(folder / 'model.safetensors', folder.parent / 'model.safetensors')
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': dict(enumerate(shards))}))
    return change


def damage(function):
    def change(folder):
        (folder / 'model.safetensors').write_bytes(function((folder / 'model.safetensors').read_bytes()))
    return change


def lie_about(key, value):
    """A header whose first large tensor says something else of itself; the bytes stay."""
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


@pytest.mark.parametrize('change, message', [
    (only_a_pickle, r'no model.safetensors in it, and no other weights are read \(config.json, .*pytorch_model.bin\)'),
    (lambda folder: os.remove(folder / 'config.json'), 'FileNotFoundError: .*config.json'),
    (lambda folder: (folder / 'config.json').write_text('{"model_type": '), 'JSONDecodeError'),
    (lambda folder: (folder / 'config.json').write_text('[]'), 'AttributeError'),
    (write_index('../model.safetensors'), 'no ../model.safetensors in it'),
    (write_index('/etc/passwd'), 'no /etc/passwd in it'),
    (write_index('config.json'), 'no config.json in it'),
    (write_index('model-00001-of-00002.safetensors'), 'no model-00001-of-00002.safetensors in it'),
    (write_index(), 'are too few'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b''), 'SafetensorError'),
    (damage(lambda content: content[:-40]), 'SafetensorError'),
    (damage(lambda content: struct.pack('<Q', 2**60) + content[8:]), 'SafetensorError'),
    (damage(lambda content: content[:20] + b'\xff' + content[21:]), 'SafetensorError'),
    (damage(lie_about('shape', [10**9, 36])), 'SafetensorError'),
    (damage(lie_about('data_offsets', [0, 10**15])), 'SafetensorError'),
    (rewrite(lambda t: t | {'model.norm.weight': t['model.norm.weight'].double()}),
     'dtype F64 is none of F32, F16, BF16'),
    (rewrite(lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}), 'dtype F8_E4M3 is none of'),
    (rewrite(lambda t: {k: v for k, v in t.items() if '.1.' not in k}),
     'model.layers.1.input_layernorm.weight is missing and should be .36.; .*; and 5 more'),
    (rewrite(lambda t: t | {'model.extra.weight': torch.ones(2)}), r'model.extra.weight is \[2\] and should be absent'),
    (rewrite(lambda t: t | {'model.norm.weight': torch.ones(35)}),
     r'model.norm.weight is \[35\] and should be \[36\]')])
def test_a_folder_that_is_not_what_it_should_be_is_refused_by_name(change, message, folder_of):
    folder = folder_of('llama', change)
    with pytest.raises(ValueError, match=message) as error:
        GPT.from_pretrained(folder)
    assert str(error.value).startswith(f'{folder}: ')
    assert not (folder / 'trapped').exists()


# Names on the hub

def test_a_name_is_fetched_from_the_hub_with_the_files_that_are_read_and_no_other(folder_of, monkeypatch):
    asked = []
    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder_of('llama'))
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', fetch)
    assert gap(GPT.from_pretrained('somebody/a-llama').eval(), their_model('llama')) < 1e-4
    (name, patterns), = asked
    wanted = ['config.json', 'model.safetensors', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json',
              'tokenizer.json']
    there = wanted + ['pytorch_model.bin', 'consolidated.safetensors', 'modeling.py', 'chat_template.jinja']
    assert list(huggingface_hub.utils.filter_repo_objects(there, allow_patterns=patterns)) == wanted
    assert name == 'somebody/a-llama'


def test_without_a_network_it_is_said_what_to_give_instead():
    with pytest.raises(ValueError, match='somebody/a-llama is no folder .* give a folder that holds its config.json'):
        GPT.from_pretrained('somebody/a-llama')


def test_without_the_packages_they_are_named(folder_of, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match='ModuleNotFoundError: .*huggingface_hub.* give a folder'):
        GPT.from_pretrained('somebody/a-llama')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(ImportError, match='safetensors'):
        GPT.from_pretrained(folder_of('llama'))


# The scripts

@pytest.fixture(scope='module')
def with_tokenizer(tmp_path_factory):
    """A folder of ours, and its tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp('ours'), Tokenizer.byte()
    our_model(**dict(OURS['llama'], vocab_size=tokenizer.vocab_size)).save_pretrained(folder, tokenizer)
    return folder, tokenizer


@pytest.mark.parametrize('rows', [261, 272])  # a padded vocabulary stays so
def test_load_model_opens_a_folder_in_float32_with_its_tokenizer(rows, with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    half = GPT.from_pretrained(folder).bfloat16()
    resize_vocab(half, rows)
    half.save_pretrained(tmp_path, tokenizer)
    settings = {'dropout': 0.1, 'attn': 'manual', 'n_layer': 7, 'out_dir': 'out/base'}
    model, own = load_model(str(tmp_path), settings, tokenizer)
    assert own.fingerprint == tokenizer.fingerprint and model.wte.weight.dtype == torch.float32
    assert (model.config.dropout, model.config.attn, model.config.n_layer) == (0.1, 'manual', 3)
    assert (model.config.vocab_size, own.vocab_size) == (rows, 261)


def test_load_model_refuses_another_tokenizer_or_one_that_is_too_large(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    with pytest.raises(ValueError, match='another tokenizer'):
        load_model(str(folder), {}, Tokenizer.train(story(), 270))
    GPT.from_pretrained(folder).save_pretrained(tmp_path, large := Tokenizer.train(story(), 310))
    with pytest.raises(ValueError, match='tokenizer.json: 310 tokens, but the model has rows for 261'):
        load_model(str(tmp_path), {})


def test_load_model_takes_the_tokenizer_given_where_the_folder_has_none(tmp_path):
    our_model(**OURS['llama']).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), {}, tokenizer := Tokenizer.byte())[1] is tokenizer
    with pytest.raises(OSError, match='tokenizer.json'):
        load_model(str(tmp_path), {})


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *_, **__: pytest.fail('asked the hub'))
    with pytest.raises(ValueError, match='no such checkpoint'):
        load_model('out/nowhere', {'out_dir': 'out/nowhere'})


def test_a_folder_that_is_both_a_run_and_a_model_is_the_run(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = GPT(GPTConfig(vocab_size=261, block_size=16, n_layer=1, n_head=2, n_embd=8))
    torch.save({'model': run.state_dict(), 'model_args': vars(run.config), 'step': 1, 'config': {},
                'tokenizer': tokenizer.to_dict()}, tmp_path / 'ckpt.pt')
    assert load_model(str(tmp_path), {})[0].config.n_embd == 8


def test_training_goes_on_from_a_folder_and_samples_are_drawn_from_it(with_tokenizer, dataset, tmp_path):
    folder, _ = with_tokenizer
    settings = {key: value for key, value in TINY.items() if not key.startswith('n_')} | dict(  # the folder's architecture stands
        init_from=folder, out_dir=tmp_path, dataset=dataset, max_iters=3, optimizer='adamw')
    ok(call('train.py', *flags(settings)))
    trained, _ = load_model(str(tmp_path), {})
    assert replace(trained.config, dropout=0.0, attn='auto') == GPT.from_pretrained(folder).config
    assert ok(call('sample.py', *flags(init_from=folder, device='cpu', num_samples=1, max_new_tokens=5)))
    assert ok(call('sample.py', *flags(out_dir=folder, device='cpu', num_samples=1, max_new_tokens=5)))


def test_a_mistake_is_one_line(with_tokenizer, tmp_path, monkeypatch):
    shutil.copytree(with_tokenizer[0], tmp_path, dirs_exist_ok=True)
    edit(hidden_act='gelu')(tmp_path)
    assert 'hidden_act=gelu' in one_line(call('sample.py', f'--init_from={tmp_path}'))
    assert 'give a folder' in one_line(call('sample.py', '--init_from=somebody/a-llama'))
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    assert 'pip install safetensors' in one_line(call('sample.py', f'--init_from={with_tokenizer[0]}'))


# More tokens

@pytest.mark.parametrize('tie', [True, False])
def test_new_tokens_start_as_the_mean_of_the_old(tie, tmp_path):
    model = our_model(**dict(OURS['llama'], tie_weights=tie))
    before, embedding, head = model(IDS)[0].detach(), model.wte.weight.clone(), model.lm_head.weight.clone()
    resize_vocab(model, 300)
    assert model.config.vocab_size == 301  # it never shrinks
    resize_vocab(model, 305)
    after = model(IDS)[0].detach()
    assert torch.allclose(after[..., :301], before, atol=1e-6)
    assert torch.allclose(after[..., 301:], before.mean(-1, keepdim=True).expand(-1, -1, 4), atol=1e-5)
    assert torch.equal(model.wte.weight[:301], embedding) and torch.equal(model.lm_head.weight[:301], head)
    assert (model.lm_head.weight is model.wte.weight) == tie and model.wte.weight.requires_grad
    model(torch.tensor([[304]]))[0].sum().backward()
    model.save_pretrained(tmp_path)
    assert gap(model, AutoModelForCausalLM.from_pretrained(tmp_path)) < 1e-4
